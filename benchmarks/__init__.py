"""Benchmarks of speed and learning against other implementations."""
