"""Text generation: requests, KV cache, sampling. May import `gpt2.model`, `kernels` and the modules at the top."""
