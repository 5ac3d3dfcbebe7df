"""Benchmarks: each module prints one JSON line a figure; `python -m bench` runs them all."""
