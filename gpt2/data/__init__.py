"""Corpora, token files and batches. May import `gpt2.data.sources` and the modules at the top."""
