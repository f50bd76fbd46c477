"""Memory, speed and cost of training on many GPUs, computed without them. May import the modules at the top."""
