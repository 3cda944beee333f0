"""Benchmarks with their peers: `python -m benchmarks list|run`."""
