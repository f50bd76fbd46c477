"""The decode step as one C++ function, compiled for the CPU it runs on. May import `gpt2.model` and modules at the top."""
