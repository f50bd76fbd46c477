"""Text generation: requests, KV cache, sampling, quantization. May import `gpt2.model` and the modules at the top."""
