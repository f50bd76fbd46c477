"""The DVC stages: each module reads params and files, calls `gpt2`, writes files, and reports to MLflow."""
