"""Training in several processes. May import `gpt2.model`, `gpt2.training` and the modules at the top."""
