"""`tamis capture`: the inputs of a model's attention layers, to tune on or to study."""

from __future__ import annotations

import argparse
from pathlib import Path

from tamis.cli.usage import Commands, UsageError, layers, numbers, positive, size


def add(commands: Commands) -> None:
    """`capture`."""
    capture = commands.add_parser(
        "capture", help="write query, key and value of a model's attention layers to a folder"
    )
    capture.add_argument(
        "--model",
        default="smollm2",
        metavar="NAME|DIR",
        help="smollm2, dinov2, whisper, or the folder of a causal language model (smollm2)",
    )
    capture.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new folder")
    capture.add_argument("--text", type=Path, nargs="+", default=[], metavar="FILE", help="read these UTF-8 texts")
    capture.add_argument(
        "--inputs", type=positive, default=1, metavar="N", help="how many built-in texts, photographs, recordings (1)"
    )
    capture.add_argument("--tokens", type=positive, metavar="N", help="tokens of each text (4096)")
    capture.add_argument("--pixels", type=positive, metavar="N", help="side of the photographs, 14 or more (1036)")
    capture.add_argument("--layers", type=layers, metavar="L,L", help="numbers or module names (all)")
    capture.add_argument("--heads", type=numbers, metavar="H,H", help="query heads, with all of their groups (all)")
    capture.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="number format (that of the model)")
    capture.add_argument("--max-gb", type=size, default=2.0, metavar="N", help="largest size of the folder (2)")
    capture.set_defaults(command=_capture)


def _capture(options: argparse.Namespace) -> None:
    from tamis.demo import record
    from tamis.integrations.capture_files import DTYPES

    chosen = record.CaptureOptions(
        model=options.model,
        out=options.out,
        text=tuple(options.text),
        inputs=options.inputs,
        tokens=options.tokens,
        pixels=options.pixels,
        layers=options.layers,
        heads=options.heads,
        dtype=DTYPES.get(options.dtype),
        max_bytes=int(options.max_gb * 1e9),
    )
    try:
        record.check(chosen)
    except ValueError as error:
        raise UsageError(str(error)) from error
    print(record.summary(record.run(chosen)))
