"""What `python -m gpt2 sweep` consists of: sweep.yaml, the study, its workers, and what they leave behind."""
