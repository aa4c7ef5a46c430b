"""Benchmarks, one a module: each has `run`, which returns plain values, and writes them as a table."""
