"""Benchmarks: `cpu` and `decode` (speed against torch), `limits` (what the design promises), `ablation`, `defaults`."""
