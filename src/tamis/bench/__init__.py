"""Benchmarks: `cpu` and `decode` (speed against torch), `limits` (promises), `ablation`, `defaults`, `compensate`."""
