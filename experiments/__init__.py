"""Programs over finished runs: `python -m gpt2 compare` and others. May import `gpt2`, `stages`, and other programs."""
