"""The training loop and its parts. May import `gpt2.model`, `gpt2.data`, `gpt2.optimizers` and those at the top."""
