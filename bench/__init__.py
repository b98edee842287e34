"""Benchmarks: a registry of points, one runner, one JSON line for each point. See run.py."""
