"""`tamis tune` finds a profile, `tamis report` makes a page about it."""

from __future__ import annotations

import argparse
from pathlib import Path

from tamis.cli.usage import Commands, UsageError, check_folder, natural, positive, ray, size, workers


def add(commands: Commands) -> None:
    """`tune` and `report`."""
    _add_tune(commands)
    _add_report(commands)


def _add_tune(commands: Commands) -> None:
    tune = commands.add_parser("tune", help="find the settings of every layer and head for an error budget")
    tune.add_argument(
        "--model",
        metavar="NAME|DIR",
        help="smollm2, dinov2, whisper, or the folder of a causal language model (smollm2)",
    )
    tune.add_argument("--captures", type=Path, metavar="FOLDER", help="tune on what `tamis capture` wrote, not a model")
    tune.add_argument("--held-out-captures", type=Path, metavar="FOLDER", help="evaluate on these at the end")
    tune.add_argument("--out", type=Path, required=True, metavar="FILE", help="the profile, JSON")
    tune.add_argument("--l1", type=size, metavar="X", help="relative L1 of a head by its mask (.08)")
    tune.add_argument("--pv-l1", type=size, metavar="X", help="the same with stage 2 (1.125 of --l1)")
    tune.add_argument("--end-l1", type=size, metavar="X", help="instead: relative L1 of the model's output")
    tune.add_argument("--end-perplexity", type=size, metavar="X", help="instead: relative change of perplexity")
    tune.add_argument(
        "--text", type=Path, nargs="+", default=[], metavar="FILE", help="UTF-8 texts, held out ones last"
    )
    tune.add_argument("--inputs", type=positive, default=5, metavar="N", help="built-in inputs to tune on (5)")
    tune.add_argument("--held-out", type=natural, default=5, metavar="N", help="inputs to evaluate on at the end (5)")
    tune.add_argument("--tokens", type=positive, metavar="N", help="tokens of each text (4096)")
    tune.add_argument("--pixels", type=positive, metavar="N", help="side of the photographs (1036)")
    tune.add_argument("--precision", choices=("int8", "full"), default="int8", help="that settings will run in (int8)")
    shared = tune.add_mutually_exclusive_group()
    shared.add_argument("--workers", type=workers, default=1, metavar="N|ray", help="processes, or a Ray cluster (1)")
    shared.add_argument("--ray", dest="workers", type=ray, metavar="ADDRESS", help="the Ray cluster there, or auto")
    tune.add_argument("--resume", type=Path, metavar="FILE", help="keep what was found there, and go on from it")
    tune.set_defaults(command=_tune)


def _tune(options: argparse.Namespace) -> None:
    check_folder(options.out, "--out")
    check_folder(options.resume, "--resume")
    from tamis.demo import tuning
    from tamis.tuning import Budget

    try:
        chosen = tuning.TuneOptions(
            model=options.model,
            budget=Budget(options.l1, options.pv_l1, options.end_l1, options.end_perplexity),
            captures=options.captures,
            held_out_captures=options.held_out_captures,
            text=tuple(options.text),
            inputs=options.inputs,
            held_out=options.held_out,
            tokens=options.tokens,
            pixels=options.pixels,
            precision=options.precision,
            workers=options.workers,
            resume=options.resume,
        )
        tuning.check(chosen)
    except ValueError as error:
        raise UsageError(str(error)) from error
    profile = tuning.run(chosen)
    profile.save(options.out)
    print(profile)
    print(f"profile: {options.out}")


def _add_report(commands: Commands) -> None:
    report = commands.add_parser("report", help="a page about the profile of `tamis tune`")
    report.add_argument("profile", type=Path, metavar="PROFILE", help="the profile, JSON")
    report.add_argument(
        "--journal", type=Path, metavar="FILE", help="the file of `tamis tune --resume`: adds what else there was"
    )
    report.add_argument(
        "--out", type=Path, default=Path("tamis-tuning.html"), metavar="FILE", help="the page (tamis-tuning.html)"
    )
    report.set_defaults(command=_report)


def _report(options: argparse.Namespace) -> None:
    for path, what in ((options.profile, "PROFILE"), (options.journal, "--journal")):
        if path is not None and not path.is_file():
            raise UsageError(f"{what}: {path} is not there")
    check_folder(options.out, "--out")
    from tamis import report
    from tamis.profile import Profile
    from tamis.tuning import surveys

    profile = Profile.load(options.profile)
    survey = None if options.journal is None else surveys.read(options.journal)
    print(profile)
    print(f"report: {report.write_tuning(options.out, profile, survey)}")
