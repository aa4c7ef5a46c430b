"""Benchmarks: `cpu` (speed against torch), `ablation` (what each stage does), `defaults` (how they are chosen)."""
