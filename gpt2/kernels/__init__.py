"""Quantized linear layers, and the compiled decode step. May import `gpt2.model` and the modules at the top."""
