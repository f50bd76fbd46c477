"""Quantized linear layers, and compiled prefill and decode. May import `gpt2.model` and the modules at the top."""
