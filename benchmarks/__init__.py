"""Measurements, one file a question; their rows are in results/. To be run from the repository's root."""
