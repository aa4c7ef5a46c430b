"""`tamis bench`: what the engine and whole models do, measured."""

from __future__ import annotations

from pathlib import Path

from tamis.cli.bench import engine, models
from tamis.cli.usage import Commands

_RESULT = "result (NAME-DATE.json, under benchmarks/results if there)"


def add(commands: Commands) -> None:
    """`bench`, with a command of its own for each benchmark."""
    bench = commands.add_parser("bench", help="measure speed, ablations, defaults")
    kinds = bench.add_subparsers(title="benchmarks", required=True, metavar="BENCHMARK")
    engine.add(kinds)
    models.add(kinds)
    for name, kind in kinds.choices.items():
        text = "also write the result" if name == "gpu-static" else _RESULT
        kind.add_argument("--json", type=Path, metavar="FILE", help=text)
