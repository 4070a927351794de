"""Measures the claims about speed: `python -m benchmarks`."""
