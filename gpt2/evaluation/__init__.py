"""Scores and samples of a model. May import `gpt2.model`, `data`, `inference` and the modules at the top."""
