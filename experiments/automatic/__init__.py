"""`python -m gpt2 preset auto`: params for a text, this machine and the minutes that a run may take."""
