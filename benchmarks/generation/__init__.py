"""The parts of `python -m benchmarks.generate`."""
