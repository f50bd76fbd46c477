"""Corpora, token files and batches. May import `gpt2.config`, `errors`, `files`, `progress`, `tokenizer`."""
