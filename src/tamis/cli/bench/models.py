"""Benchmarks on models and real data: each its options, then what runs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tamis.cli.bench.result import write
from tamis.cli.usage import Commands, UsageError, check_folder, natural, positive


def add(kinds: Commands) -> None:
    """`models`, `ablation`, `defaults`, `tune`, `compensate`, `frontier`, `perplexity`, `order`, `audit`."""
    _add_models(kinds)
    _add_ablation(kinds)
    _add_defaults(kinds)
    _add_tune(kinds)
    _add_compensate(kinds)
    _add_frontier(kinds)
    _add_perplexity(kinds)
    _add_order(kinds)
    _add_audit(kinds)


def _add_models(kinds: Commands) -> None:
    whole = kinds.add_parser("models", help="whole models, by their own attention and through tamis.apply")
    whole.add_argument("--tokens", type=positive, default=8192, metavar="N", help="tokens to read (8192)")
    whole.add_argument("--pixels", type=positive, default=1036, metavar="N", help="side of the photograph (1036)")
    whole.add_argument("--rounds", type=positive, default=3, metavar="N", help="whole passes of each kind (3)")
    whole.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the models (float32)")
    whole.set_defaults(command=_models)


def _models(options: argparse.Namespace) -> None:
    check_folder(options.json, "--json")
    from tamis.bench import models

    result = models.run(options.tokens, options.pixels, options.rounds, options.dtype)
    print(models.table(result))
    write(options.json, "models", result)


def _add_ablation(kinds: Commands) -> None:
    ablation = kinds.add_parser("ablation", help="what each stage does on a real model")
    ablation.add_argument("--tokens", type=positive, default=8192, metavar="N", help="longest text (8192)")
    ablation.set_defaults(command=_ablation)


def _ablation(options: argparse.Namespace) -> None:
    check_folder(options.json, "--json")
    from tamis.bench import ablation

    result = ablation.run(options.tokens)
    print(ablation.table(result))
    write(options.json, "ablation", result)


def _add_defaults(kinds: Commands) -> None:
    defaults = kinds.add_parser("defaults", help="the measurement that chooses the defaults")
    defaults.set_defaults(command=_defaults)


def _defaults(options: argparse.Namespace) -> None:
    check_folder(options.json, "--json")
    from tamis.bench import defaults
    from tamis.bench.record import default_path

    path = options.json or default_path("defaults")
    print(defaults.table(defaults.run(path)))
    print(f"written: {path}")


def _add_tune(kinds: Commands) -> None:
    tuned = kinds.add_parser("tune", help="what settings for every head are worth, at equal error of the output")
    tuned.add_argument("--model", metavar="NAME|DIR", help="smollm2, dinov2, whisper, or a folder (smollm2)")
    tuned.add_argument("--inputs", type=positive, default=5, metavar="N", help="inputs to tune on (5)")
    tuned.add_argument("--held-out", type=positive, default=5, metavar="N", help="inputs to judge by (5)")
    tuned.add_argument("--tokens", type=positive, metavar="N", help="tokens of each text (4096)")
    tuned.add_argument("--resume", type=Path, metavar="FILE", help="keep what tuning found there, and go on from it")
    tuned.set_defaults(command=_tune)


def _tune(options: argparse.Namespace) -> None:
    check_folder(options.json, "--json")
    from tamis.bench import tuning

    chosen = tuning.options_of(options.model, options.inputs, options.held_out, options.tokens)
    result = tuning.run(chosen, options.resume)
    print(tuning.table(result))
    write(options.json, "tune", result)


def _add_compensate(kinds: Commands) -> None:
    compensate = kinds.add_parser("compensate", help="what means of skipped blocks do to the error, and what they cost")
    compensate.add_argument("--tokens", type=positive, default=4096, metavar="N", help="length of the text (4096)")
    compensate.set_defaults(command=_compensate)


def _compensate(options: argparse.Namespace) -> None:
    check_folder(options.json, "--json")
    from tamis.bench import compensate

    result = compensate.run(options.tokens)
    print(compensate.table(result))
    write(options.json, "compensate", result)


def _add_frontier(kinds: Commands) -> None:
    frontier = kinds.add_parser("frontier", help="density against error of every predictor on a real model")
    frontier.add_argument("--tokens", type=positive, default=4096, metavar="N", help="length of the text (4096)")
    frontier.add_argument("--start", type=natural, default=90000, metavar="N", help="its first token (90000)")
    frontier.add_argument("--every", type=positive, default=1, metavar="N", help="take only each N-th layer (1)")
    frontier.add_argument("--picture", type=Path, metavar="FILE", help="also draw the curves as SVG")
    frontier.add_argument(
        "--markdown", type=Path, metavar="FILE", help="measure nothing: print this result as tables, and draw it"
    )
    frontier.set_defaults(command=_frontier)


def _frontier(options: argparse.Namespace) -> None:
    check_folder(options.json, "--json")
    check_folder(options.picture, "--picture")
    from tamis.bench import frontier, frontier_report

    if options.markdown is None:
        result = frontier.run(options.tokens, options.start, options.every)
        print(frontier_report.markdown(result))
        write(options.json, "frontier", result)
    else:
        result = json.loads(options.markdown.read_text(encoding="utf-8"))
        print(frontier_report.markdown(result))
    if options.picture is not None:
        options.picture.write_text(frontier_report.svg(result), encoding="utf-8")


def _add_perplexity(kinds: Commands) -> None:
    perplexity = kinds.add_parser("perplexity", help="what predictors do to the perplexity of a real model")
    perplexity.add_argument("--tokens", type=positive, default=4096, metavar="N", help="length of the text (4096)")
    perplexity.add_argument("--start", type=natural, default=60000, metavar="N", help="its first token (60000)")
    perplexity.set_defaults(command=_perplexity)


def _perplexity(options: argparse.Namespace) -> None:
    check_folder(options.json, "--json")
    from tamis.bench import perplexity

    result = perplexity.run(options.tokens, options.start)
    print(perplexity.markdown(result))
    write(options.json, "perplexity", result)


def _add_order(kinds: Commands) -> None:
    ordered = kinds.add_parser("order", help="what the order of a video's tokens is worth")
    ordered.add_argument("--clip", nargs="+", metavar="NAME", help="bikes bigbuckbunny (both)")
    ordered.add_argument("--frames", type=positive, default=13, metavar="N", help="frames of each (13)")
    ordered.add_argument("--stride", type=positive, default=4, metavar="N", help="take only each N-th frame (4)")
    ordered.add_argument("--rows", type=positive, default=16, metavar="N", help="height of a frame in tokens (16)")
    ordered.add_argument("--every", type=positive, default=3, metavar="N", help="take only each N-th layer (3)")
    ordered.add_argument("--picture", type=Path, metavar="FILE", help="also draw the orders on small grids as SVG")
    ordered.add_argument("--markdown", type=Path, metavar="FILE", help="measure nothing: print this result as tables")
    ordered.set_defaults(command=_order)


def _order(options: argparse.Namespace) -> None:
    check_folder(options.json, "--json")
    check_folder(options.picture, "--picture")
    from tamis.bench import order, order_report
    from tamis.demo import clip

    names = tuple(options.clip or clip.CLIPS)
    if wrong := [name for name in names if name not in clip.CLIPS]:
        raise UsageError(f"--clip: {', '.join(wrong)} is not one of {', '.join(clip.CLIPS)}")
    if options.picture is not None:
        options.picture.write_text(order_report.svg(), encoding="utf-8")
    if options.markdown is None:
        chosen = order.OrderOptions(names, options.frames, options.stride, options.rows, options.every)
        result = order.run(chosen)
        print(order_report.markdown(result))
        write(options.json, "order", result)
    else:
        print(order_report.markdown(json.loads(options.markdown.read_text(encoding="utf-8"))))


def _add_audit(kinds: Commands) -> None:
    audit = kinds.add_parser("audit", help="what the audit's intervals hold on a real model, and its time")
    audit.add_argument("--tokens", type=positive, default=4096, metavar="N", help="length of the text (4096)")
    audit.add_argument("--rounds", type=positive, default=9, metavar="N", help="rounds that are timed (9)")
    audit.set_defaults(command=_audit)


def _audit(options: argparse.Namespace) -> None:
    check_folder(options.json, "--json")
    from tamis.bench import audit

    result = audit.run(options.tokens, options.rounds)
    print(audit.markdown(result))
    write(options.json, "audit", result)
