"""The training loop and its parts. May import `gpt2.model`, `gpt2.data` and the modules at the top."""
