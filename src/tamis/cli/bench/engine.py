"""Benchmarks of the engine, on random tensors or on none: each its options, then what runs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from tamis.cli.bench.result import write
from tamis.cli.usage import Commands, UsageError, check_folder, positive, share, tokens

if TYPE_CHECKING:
    from tamis.bench.gpu import GpuOptions


def add(kinds: Commands) -> None:
    """`cpu`, `gpu`, `gpu-static`, `decode`, `limits`, `scale`."""
    _add_cpu(kinds)
    _add_gpu(kinds)
    _add_gpu_static(kinds)
    _add_decode(kinds)
    _add_limits(kinds)
    _add_scale(kinds)


def _add_cpu(kinds: Commands) -> None:
    cpu = kinds.add_parser("cpu", help="speed and memory against torch")
    cpu.add_argument("--n", type=positive, nargs="+", metavar="N", help="lengths (1024 4096 8192 32768)")
    cpu.add_argument("--head-dim", type=positive, nargs="+", metavar="D", help="head dims (64 128)")
    cpu.add_argument("--density", type=share, nargs="+", metavar="F", help="densities (1 .5 .25 .1)")
    cpu.add_argument("--repeats", type=positive, metavar="N", help="repetitions, fewer for long calls (9)")
    cpu.add_argument("--flex", action="store_true", help="also FlexAttention (needs a C++ compiler, minutes)")
    cpu.add_argument("--quick", action="store_true", help="lengths up to 4096, 3 repetitions, no memory row")
    cpu.add_argument(
        "--compare",
        type=Path,
        metavar="DIR",
        help="print what moved against the results there; writes only with --json",
    )
    cpu.set_defaults(command=_cpu)


def _cpu(options: argparse.Namespace) -> None:
    check_folder(options.json, "--json")
    from tamis.bench import cpu

    if options.compare is not None and not options.compare.is_dir():
        raise UsageError(f"--compare: {options.compare} is not a folder")
    lengths = options.n or [length for length in cpu.LENGTHS if not options.quick or length <= 4096]
    plain = cpu.CpuOptions()
    chosen = cpu.CpuOptions(
        lengths=tuple(lengths),
        head_dims=tuple(options.head_dim or cpu.HEAD_DIMS),
        densities=tuple(options.density or cpu.DENSITIES),
        repeats=options.repeats or (3 if options.quick else plain.repeats),
        flex=options.flex,
        memory=not options.quick,
    )
    result = cpu.run(chosen)
    print(cpu.table(result))
    if options.compare is not None:
        from tamis.bench import compare

        print(compare.report(options.compare, result))
    if options.compare is None or options.json is not None:
        write(options.json, "cpu", result)


def _add_gpu(kinds: Commands) -> None:
    gpu = kinds.add_parser("gpu", help="speed on a GPU against torch's SDPA and FlexAttention")
    gpu.add_argument("--shape", nargs="+", metavar="NAME", help="shapes (cogvideox mochi llama-32k flux llama-128k)")
    gpu.add_argument("--repeats", type=positive, metavar="N", help="repetitions, fewer for long calls (30)")
    gpu.add_argument("--no-flex", action="store_true", help="without FlexAttention, which is compiled for every shape")
    gpu.add_argument("--quick", action="store_true", help="llama-32k and flux, 5 repetitions, no FlexAttention")
    gpu.add_argument("--seconds", type=positive, metavar="N", help="start nothing new after so many seconds (440)")
    gpu.add_argument("--commit", metavar="HASH", help="what is measured, where git cannot tell it")
    gpu.add_argument("--markdown", type=Path, metavar="FILE", help="measure nothing: print this result as a table")
    gpu.set_defaults(command=_gpu)


def _gpu(options: argparse.Namespace) -> None:
    from functools import partial

    from tamis.bench import gpu, gpu_report, record

    if options.markdown is not None:
        print(gpu_report.markdown(options.markdown))
        return
    check_folder(options.json, "--json")
    path = options.json or record.default_path("gpu")
    result = gpu.run(_gpu_options(options), save=partial(record.write, path), show=partial(print, flush=True))
    print(f"{gpu_report.LEGEND}\n\n{gpu_report.bar_table(result)}\nwritten: {path}")
    if result["failures"]:
        raise RuntimeError(f"{len(result['failures'])} failures: {'; '.join(result['failures'])}")


def _gpu_options(options: argparse.Namespace) -> GpuOptions:
    from tamis.bench import gpu, gpu_calls

    shapes = {shape.name: shape for shape in gpu_calls.SHAPES}
    names = options.shape or (gpu_calls.QUICK if options.quick else shapes)
    for name in names:
        if name not in shapes:
            raise UsageError(f"--shape must be among {', '.join(shapes)}, got {name!r}")
    plain = gpu.GpuOptions()
    return gpu.GpuOptions(
        shapes=tuple(shapes[name] for name in names),
        repeats=options.repeats or (5 if options.quick else plain.repeats),
        flex=not (options.no_flex or options.quick),
        seconds=options.seconds or plain.seconds,
        commit=options.commit,
    )


def _add_gpu_static(kinds: Commands) -> None:
    static = kinds.add_parser("gpu-static", help="compile every GPU kernel for every architecture, without a GPU")
    static.add_argument("--target", nargs="+", metavar="NAME", help="architectures such as sm_90 (all)")
    static.add_argument("--head-dim", type=int, nargs="+", choices=(64, 128, 256), metavar="D", help="64 128 256 (all)")
    static.add_argument(
        "--all", action="store_true", help="every pair of what calls may be, not the usual calls and cuts"
    )
    static.add_argument("--markdown", type=Path, metavar="FILE", help="compile nothing: print this result as a table")
    static.set_defaults(command=_gpu_static)


def _gpu_static(options: argparse.Namespace) -> None:
    check_folder(options.json, "--json")
    from tamis.bench import gpu_forms, gpu_static

    if options.markdown is not None:
        print(gpu_static.markdown(json.loads(options.markdown.read_text(encoding="utf-8"))))
        return
    known = gpu_static.architectures()
    if wrong := [name for name in options.target or [] if name not in known]:
        raise UsageError(f"--target: {', '.join(wrong)} is not one of {', '.join(known)}")
    rows = gpu_static.run(options.target or known, tuple(options.head_dim or gpu_forms.DIMS), whole=options.all)
    print(gpu_static.table(rows))
    if options.json is not None:
        write(options.json, "gpu-static", gpu_static.result(rows))
    if faults := sum(bool(row.faults) for row in rows):
        raise RuntimeError(f"{faults} of {len(rows)} kernels fail")


def _add_decode(kinds: Commands) -> None:
    decode = kinds.add_parser("decode", help="one query a head against a long key")
    decode.add_argument("--n", type=positive, default=32768, metavar="N", help="keys (32768)")
    decode.set_defaults(command=_decode)


def _decode(options: argparse.Namespace) -> None:
    check_folder(options.json, "--json")
    from tamis.bench import decode

    result = decode.run(options.n)
    print(decode.table(result))
    write(options.json, "decode", result)


def _add_limits(kinds: Commands) -> None:
    limits = kinds.add_parser("limits", help="what the design promises: bars, and the roofline of this machine")
    limits.add_argument("--quick", action="store_true", help="fewer lengths and repetitions, no million tokens")
    limits.add_argument("--roofline", type=Path, metavar="FILE", help="also draw the roofline as SVG")
    limits.set_defaults(command=_limits)


def _limits(options: argparse.Namespace) -> None:
    check_folder(options.json, "--json")
    check_folder(options.roofline, "--roofline")
    from tamis.bench import limits, picture

    result = limits.run(limits.QUICK if options.quick else limits.FULL)
    print(limits.table(result))
    if options.roofline is not None:
        options.roofline.write_text(picture.svg(result), encoding="utf-8")
    write(options.json, "limits", result)


def _add_scale(kinds: Commands) -> None:
    scale = kinds.add_parser("scale", help="attention over several processes or GPUs: measured, modelled, planned")
    scale.add_argument(
        "--plan", action="store_true", help="measure nothing: memory and traffic of every rank; writes only with --json"
    )
    scale.add_argument("--tokens", type=tokens, nargs="+", metavar="N", help="8192; of a plan 1e6 1e7 1e8")
    scale.add_argument("--ranks", type=positive, nargs="+", metavar="N", help="1 2 4; of a plan 8 64 1024")
    scale.add_argument("--heads", type=positive, metavar="H", help="query heads (8; of a plan 40)")
    scale.add_argument("--kv-heads", type=positive, metavar="H", help="heads of keys (as many)")
    scale.add_argument("--head-dim", type=positive, metavar="D", help="(64; of a plan 128)")
    scale.add_argument("--density", type=share, default=0.25, metavar="F", help="share of the blocks computed (.25)")
    scale.add_argument("--causal", action="store_true", help="queries see what is before them")
    scale.add_argument("--precision", choices=("full", "int8"), default="full", help="of a plan (full)")
    scale.set_defaults(command=_scale)


def _scale(options: argparse.Namespace) -> None:
    check_folder(options.json, "--json")
    if options.plan:
        _scale_plan(options)
        return
    if options.precision != "full":
        raise UsageError("--precision is for --plan: what is measured is compared with one process in full precision")
    from tamis.bench import scale

    plain = scale.ScaleOptions()
    try:
        asked = scale.ScaleOptions(
            heads=options.heads or plain.heads,
            kv_heads=options.kv_heads or options.heads or plain.kv_heads,
            head_dim=options.head_dim or plain.head_dim,
            density=options.density,
            causal=options.causal,
            ranks=tuple(options.ranks or plain.ranks),
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    result = scale.run(asked, options.tokens)
    print(scale.table(result))
    write(options.json, "scale", result)


def _scale_plan(options: argparse.Namespace) -> None:
    from tamis.bench import scale
    from tamis.parallel import Workload

    try:
        work = Workload(
            scale.PLAN_TOKENS[0],
            options.heads or scale.CLUSTER_WORK.heads,
            options.head_dim or scale.CLUSTER_WORK.head_dim,
            kv_heads=options.kv_heads,
            causal=options.causal,
            precision=options.precision,
            density=options.density,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    found = scale.planned(work, tuple(options.tokens or scale.PLAN_TOKENS), tuple(options.ranks or scale.PLAN_RANKS))
    print(scale.plan_table(found))
    if options.json is not None:
        write(options.json, "scale-plan", found)
