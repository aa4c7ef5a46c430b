"""`tamis demo`: the first thing to run."""

from __future__ import annotations

import argparse
from pathlib import Path

from tamis.cli.usage import Commands, UsageError, check_folder, positive


def add(commands: Commands) -> None:
    """`demo`."""
    demo = commands.add_parser("demo", help="real models read with dense and with sparse attention")
    demo.add_argument("--only", choices=("language", "image"), help="run one of the two models")
    demo.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    demo.add_argument(
        "--report", type=Path, default=Path("tamis-report.html"), metavar="FILE", help="the page (tamis-report.html)"
    )
    demo.add_argument("--text", type=Path, metavar="FILE", help="read this UTF-8 text")
    demo.add_argument("--tokens", type=positive, default=8192, metavar="N", help="tokens to read (8192)")
    demo.add_argument(
        "--model", type=Path, metavar="DIR", help="a causal language model as transformers saves it, or one GGUF file"
    )
    demo.add_argument("--rounds", type=positive, default=2, metavar="N", help="whole passes of each kind (2)")
    demo.add_argument(
        "--pixels", type=positive, default=1036, metavar="N", help="side of the photograph, 14 or more (1036)"
    )
    demo.set_defaults(command=_demo)


def _demo(options: argparse.Namespace) -> None:
    for path, what in ((options.text, "--text"), (options.model, "--model")):
        if path is not None and not path.exists():
            raise UsageError(f"{what}: {path} is not there")
    check_folder(options.json, "--json")
    check_folder(options.report, "--report")
    if options.pixels < 14:
        raise UsageError(f"--pixels must be 14 or more, the side of one patch, got {options.pixels}")
    from tamis import demo
    from tamis.demo.language import LanguageOptions

    language = LanguageOptions(options.tokens, options.text, options.model, options.rounds)
    result = demo.run(
        demo.DemoOptions(
            only=options.only, language=language, pixels=options.pixels, json=options.json, report=options.report
        )
    )
    print(demo.summary(result))
    print(f"report: {options.report}")
