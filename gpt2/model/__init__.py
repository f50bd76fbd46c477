"""GPT-2 and its weights. May import `gpt2.config`, `errors`, `files`."""
