"""Training in several processes. May import `gpt2.model`, `gpt2.optimizers`, `gpt2.training` and those at the top."""
