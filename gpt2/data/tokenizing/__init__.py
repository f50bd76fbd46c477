"""From a corpus to token files. May import `gpt2.data` and the modules at the top."""
