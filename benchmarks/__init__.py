"""Measurements, one file a question; rows of results in results/. Run from the repository: `python -m benchmarks.step`."""
