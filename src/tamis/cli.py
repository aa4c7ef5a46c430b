"""The `tamis` command: demo, capture, tune, report, bench, info.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted. Results go to stdout, progress and errors to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tamis.version import installed

if TYPE_CHECKING:
    from tamis.bench.gpu import GpuOptions

FAILED, USAGE, INTERRUPTED = 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    command: Callable[[argparse.Namespace], None] = options.command
    try:
        command(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # Who read has seen enough (`tamis info | head`); what is left must not fail when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("tamis: interrupted", file=sys.stderr)
        return INTERRUPTED
    except _UsageError as error:
        print(f"tamis: {error}", file=sys.stderr)
        return USAGE
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "tamis":
            raise
        print(f"tamis: {error.name} is not installed: {_how_to_install(error.name)}", file=sys.stderr)
        return FAILED
    except (ValueError, RuntimeError, OSError) as error:
        print(f"tamis: {error}", file=sys.stderr)
        return FAILED
    return 0


def _how_to_install(module: str) -> str:
    from tamis.backends.triton import chips

    return chips.how_to_install() if module.split(".")[0] == "triton" else "pip install 'tamis[demo]'"


class _UsageError(Exception):
    """An option that can only be judged after parsing."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tamis", description="Sparse, quantised attention that reports what it cost.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_capture(commands)
    _add_tune(commands)
    _add_report(commands)
    _add_bench(commands)
    info = commands.add_parser("info", help="backends, GPUs and what runs on them, CPU target, threads, versions")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(command=_info)
    parser.add_argument("--version", action="version", version=f"tamis {installed() or '(not installed)'}")
    return parser


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser("demo", help="real models read with dense and with sparse attention")
    demo.add_argument("--only", choices=("language", "image"), help="run one of the two models")
    demo.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    demo.add_argument(
        "--report", type=Path, default=Path("tamis-report.html"), metavar="FILE", help="the page (tamis-report.html)"
    )
    demo.add_argument("--text", type=Path, metavar="FILE", help="read this UTF-8 text")
    demo.add_argument("--tokens", type=_positive, default=8192, metavar="N", help="tokens to read (8192)")
    demo.add_argument(
        "--model", type=Path, metavar="DIR", help="a causal language model as transformers saves it, or one GGUF file"
    )
    demo.add_argument("--rounds", type=_positive, default=2, metavar="N", help="whole passes of each kind (2)")
    demo.add_argument(
        "--pixels", type=_positive, default=1036, metavar="N", help="side of the photograph, 14 or more (1036)"
    )
    demo.set_defaults(command=_demo)


def _add_capture(commands: Any) -> None:
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
        "--inputs", type=_positive, default=1, metavar="N", help="how many built-in texts, photographs, recordings (1)"
    )
    capture.add_argument("--tokens", type=_positive, metavar="N", help="tokens of each text (4096)")
    capture.add_argument("--pixels", type=_positive, metavar="N", help="side of the photographs, 14 or more (1036)")
    capture.add_argument("--layers", type=_layers, metavar="L,L", help="numbers or module names (all)")
    capture.add_argument("--heads", type=_numbers, metavar="H,H", help="query heads, with all of their groups (all)")
    capture.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="number format (that of the model)")
    capture.add_argument("--max-gb", type=_size, default=2.0, metavar="N", help="largest size of the folder (2)")
    capture.set_defaults(command=_capture)


def _add_tune(commands: Any) -> None:
    tune = commands.add_parser("tune", help="find the settings of every layer and head for an error budget")
    tune.add_argument(
        "--model",
        metavar="NAME|DIR",
        help="smollm2, dinov2, whisper, or the folder of a causal language model (smollm2)",
    )
    tune.add_argument("--captures", type=Path, metavar="FOLDER", help="tune on what `tamis capture` wrote, not a model")
    tune.add_argument("--held-out-captures", type=Path, metavar="FOLDER", help="evaluate on these at the end")
    tune.add_argument("--out", type=Path, required=True, metavar="FILE", help="the profile, JSON")
    tune.add_argument("--l1", type=_size, metavar="X", help="relative L1 of a head by its mask (.08)")
    tune.add_argument("--pv-l1", type=_size, metavar="X", help="the same with stage 2 (1.125 of --l1)")
    tune.add_argument("--end-l1", type=_size, metavar="X", help="instead: relative L1 of the model's output")
    tune.add_argument("--end-perplexity", type=_size, metavar="X", help="instead: relative change of perplexity")
    tune.add_argument(
        "--text", type=Path, nargs="+", default=[], metavar="FILE", help="UTF-8 texts, held out ones last"
    )
    tune.add_argument("--inputs", type=_positive, default=5, metavar="N", help="built-in inputs to tune on (5)")
    tune.add_argument("--held-out", type=_natural, default=5, metavar="N", help="inputs to evaluate on at the end (5)")
    tune.add_argument("--tokens", type=_positive, metavar="N", help="tokens of each text (4096)")
    tune.add_argument("--pixels", type=_positive, metavar="N", help="side of the photographs (1036)")
    tune.add_argument("--precision", choices=("int8", "full"), default="int8", help="that settings will run in (int8)")
    shared = tune.add_mutually_exclusive_group()
    shared.add_argument("--workers", type=_workers, default=1, metavar="N|ray", help="processes, or a Ray cluster (1)")
    shared.add_argument("--ray", dest="workers", type=_ray, metavar="ADDRESS", help="the Ray cluster there, or auto")
    tune.add_argument("--resume", type=Path, metavar="FILE", help="keep what was found there, and go on from it")
    tune.set_defaults(command=_tune)


def _add_report(commands: Any) -> None:
    report = commands.add_parser("report", help="a page about the profile of `tamis tune`")
    report.add_argument("profile", type=Path, metavar="PROFILE", help="the profile, JSON")
    report.add_argument(
        "--journal", type=Path, metavar="FILE", help="the file of `tamis tune --resume`: adds what else there was"
    )
    report.add_argument(
        "--out", type=Path, default=Path("tamis-tuning.html"), metavar="FILE", help="the page (tamis-tuning.html)"
    )
    report.set_defaults(command=_report)


def _add_bench(commands: Any) -> None:
    bench = commands.add_parser("bench", help="measure speed, ablations, defaults")
    kinds = bench.add_subparsers(title="benchmarks", required=True, metavar="BENCHMARK")
    _add_bench_order(kinds)
    cpu = kinds.add_parser("cpu", help="speed and memory against torch")
    cpu.add_argument("--n", type=_positive, nargs="+", metavar="N", help="lengths (1024 4096 8192 32768)")
    cpu.add_argument("--head-dim", type=_positive, nargs="+", metavar="D", help="head dims (64 128)")
    cpu.add_argument("--density", type=_share, nargs="+", metavar="F", help="densities (1 .5 .25 .1)")
    cpu.add_argument("--repeats", type=_positive, default=9, metavar="N", help="repetitions, fewer for long calls (9)")
    cpu.add_argument("--flex", action="store_true", help="also FlexAttention (needs a C++ compiler, minutes)")
    cpu.add_argument("--quick", action="store_true", help="lengths up to 4096, 3 repetitions, no memory row")
    cpu.add_argument(
        "--compare",
        type=Path,
        metavar="DIR",
        help="print what moved against the results there; writes only with --json",
    )
    cpu.set_defaults(command=_bench_cpu)
    gpu = kinds.add_parser("gpu", help="speed on a GPU against torch's SDPA and FlexAttention")
    gpu.add_argument("--shape", nargs="+", metavar="NAME", help="shapes (cogvideox mochi llama-32k flux llama-128k)")
    gpu.add_argument("--repeats", type=_positive, metavar="N", help="repetitions, fewer for long calls (30)")
    gpu.add_argument("--no-flex", action="store_true", help="without FlexAttention, which is compiled for every shape")
    gpu.add_argument("--quick", action="store_true", help="llama-32k and flux, 5 repetitions, no FlexAttention")
    gpu.add_argument("--seconds", type=_positive, metavar="N", help="start nothing new after so many seconds (440)")
    gpu.add_argument("--commit", metavar="HASH", help="what is measured, where git cannot tell it")
    gpu.add_argument(
        "--markdown",
        type=Path,
        metavar="FILE",
        help="measure nothing: print this result as a table",
    )
    gpu.set_defaults(command=_bench_gpu)
    decode = kinds.add_parser("decode", help="one query a head against a long key")
    decode.add_argument("--n", type=_positive, default=32768, metavar="N", help="keys (32768)")
    decode.set_defaults(command=_bench_decode)
    limits = kinds.add_parser("limits", help="what the design promises: bars, and the roofline of this machine")
    limits.add_argument("--quick", action="store_true", help="fewer lengths and repetitions, no million tokens")
    limits.add_argument("--roofline", type=Path, metavar="FILE", help="also draw the roofline as SVG")
    limits.set_defaults(command=_bench_limits)
    static = kinds.add_parser("gpu-static", help="compile every GPU kernel for every architecture, without a GPU")
    static.add_argument("--target", nargs="+", metavar="NAME", help="architectures such as sm_90 (all)")
    static.add_argument("--head-dim", type=int, nargs="+", choices=(64, 128, 256), metavar="D", help="64 128 256 (all)")
    static.set_defaults(command=_bench_gpu_static)
    ablation = kinds.add_parser("ablation", help="what each stage does on a real model")
    ablation.add_argument("--tokens", type=_positive, default=8192, metavar="N", help="longest text (8192)")
    ablation.set_defaults(command=_bench_ablation)
    defaults = kinds.add_parser("defaults", help="the measurement that chooses the defaults")
    defaults.set_defaults(command=_bench_defaults)
    tuned = kinds.add_parser("tune", help="what settings for every head are worth, at equal error of the output")
    tuned.add_argument("--model", metavar="NAME|DIR", help="smollm2, dinov2, whisper, or a folder (smollm2)")
    tuned.add_argument("--inputs", type=_positive, default=5, metavar="N", help="inputs to tune on (5)")
    tuned.add_argument("--held-out", type=_positive, default=5, metavar="N", help="inputs to judge by (5)")
    tuned.add_argument("--tokens", type=_positive, metavar="N", help="tokens of each text (4096)")
    tuned.add_argument("--resume", type=Path, metavar="FILE", help="keep what tuning found there, and go on from it")
    tuned.set_defaults(command=_bench_tune)
    compensate = kinds.add_parser("compensate", help="what means of skipped blocks do to the error, and what they cost")
    compensate.add_argument("--tokens", type=_positive, default=4096, metavar="N", help="length of the text (4096)")
    compensate.set_defaults(command=_bench_compensate)
    frontier = kinds.add_parser("frontier", help="density against error of every predictor on a real model")
    frontier.add_argument("--tokens", type=_positive, default=4096, metavar="N", help="length of the text (4096)")
    frontier.add_argument("--start", type=_natural, default=90000, metavar="N", help="its first token (90000)")
    frontier.add_argument("--every", type=_positive, default=1, metavar="N", help="take only each N-th layer (1)")
    frontier.add_argument("--picture", type=Path, metavar="FILE", help="also draw the curves as SVG")
    frontier.add_argument(
        "--markdown", type=Path, metavar="FILE", help="measure nothing: print this result as tables, and draw it"
    )
    frontier.set_defaults(command=_bench_frontier)
    whole = kinds.add_parser("models", help="whole models, by their own attention and through tamis.apply")
    whole.add_argument("--tokens", type=_positive, default=8192, metavar="N", help="tokens to read (8192)")
    whole.add_argument("--pixels", type=_positive, default=1036, metavar="N", help="side of the photograph (1036)")
    whole.add_argument("--rounds", type=_positive, default=3, metavar="N", help="whole passes of each kind (3)")
    whole.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the models (float32)")
    whole.set_defaults(command=_bench_models)
    scale = kinds.add_parser("scale", help="attention over several processes or GPUs: measured, modelled, planned")
    scale.add_argument("--plan", action="store_true", help="measure nothing: memory and traffic of every rank")
    scale.add_argument("--tokens", type=_positive, nargs="+", metavar="N", help="8192; of a plan 1, 10, 100 million")
    scale.add_argument("--ranks", type=_positive, nargs="+", metavar="N", help="1 2 4; of a plan 8 64 1024")
    scale.add_argument("--heads", type=_positive, metavar="H", help="query heads (8; of a plan 40)")
    scale.add_argument("--kv-heads", type=_positive, metavar="H", help="heads of keys (as many)")
    scale.add_argument("--head-dim", type=_positive, metavar="D", help="(64; of a plan 128)")
    scale.add_argument("--density", type=_share, default=0.25, metavar="F", help="share of the blocks computed (.25)")
    scale.add_argument("--causal", action="store_true", help="queries see what is before them")
    scale.add_argument("--precision", choices=("full", "int8"), default="full", help="of a plan (full)")
    scale.set_defaults(command=_bench_scale)
    for kind in (cpu, gpu, decode, whole, limits, ablation, defaults, static, tuned, compensate, frontier, scale):
        kind.add_argument(
            "--json", type=Path, metavar="FILE", help="result (NAME-DATE.json, under benchmarks/results if there)"
        )


def _add_bench_order(kinds: Any) -> None:
    ordered = kinds.add_parser("order", help="what the order of a video's tokens is worth")
    ordered.add_argument("--clip", nargs="+", metavar="NAME", help="bikes bigbuckbunny (both)")
    ordered.add_argument("--frames", type=_positive, default=13, metavar="N", help="frames of each (13)")
    ordered.add_argument("--stride", type=_positive, default=4, metavar="N", help="take only each N-th frame (4)")
    ordered.add_argument("--rows", type=_positive, default=16, metavar="N", help="height of a frame in tokens (16)")
    ordered.add_argument("--every", type=_positive, default=3, metavar="N", help="take only each N-th layer (3)")
    ordered.add_argument("--picture", type=Path, metavar="FILE", help="also draw the orders on small grids as SVG")
    ordered.add_argument("--markdown", type=Path, metavar="FILE", help="measure nothing: print this result as tables")
    ordered.add_argument("--json", type=Path, metavar="FILE", help="result (order-DATE.json, as of the others)")
    ordered.set_defaults(command=_bench_order)


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return number


def _natural(text: str) -> int:
    return 0 if text == "0" else _positive(text)


def _share(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"expected a number in (0, 1], got {text!r}")
    return number


def _size(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return number


def _workers(text: str) -> int | str:
    return text if text == "ray" else _positive(text)


def _ray(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("expected the address of a Ray cluster, as HOST:PORT, or auto")
    return f"ray@{text}"


def _layers(text: str) -> tuple[int | str, ...]:
    return tuple(int(item) if item.isdecimal() else item for item in map(str.strip, text.split(",")))


def _numbers(text: str) -> tuple[int, ...]:
    numbers = [item for item in _layers(text) if isinstance(item, int)]
    if len(numbers) < text.count(",") + 1:
        raise argparse.ArgumentTypeError(f"expected whole numbers with commas between them, got {text!r}")
    return tuple(numbers)


def _demo(options: argparse.Namespace) -> None:
    for path, what in ((options.text, "--text"), (options.model, "--model")):
        if path is not None and not path.exists():
            raise _UsageError(f"{what}: {path} is not there")
    for path, what in ((options.json, "--json"), (options.report, "--report")):
        if path is not None and not path.resolve().parent.is_dir():
            raise _UsageError(f"{what}: the folder of {path} is not there")
    if options.pixels < 14:
        raise _UsageError(f"--pixels must be 14 or more, the side of one patch, got {options.pixels}")
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
        raise _UsageError(str(error)) from error
    print(record.summary(record.run(chosen)))


def _tune(options: argparse.Namespace) -> None:
    _check_folder(options.out, "--out")
    _check_folder(options.resume, "--resume")
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
        raise _UsageError(str(error)) from error
    profile = tuning.run(chosen)
    profile.save(options.out)
    print(profile)
    print(f"profile: {options.out}")


def _report(options: argparse.Namespace) -> None:
    for path, what in ((options.profile, "PROFILE"), (options.journal, "--journal")):
        if path is not None and not path.is_file():
            raise _UsageError(f"{what}: {path} is not there")
    _check_folder(options.out, "--out")
    from tamis import report
    from tamis.profile import Profile
    from tamis.tuning import surveys

    profile = Profile.load(options.profile)
    survey = None if options.journal is None else surveys.read(options.journal)
    print(profile)
    print(f"report: {report.write_tuning(options.out, profile, survey)}")


def _bench_cpu(options: argparse.Namespace) -> None:
    _check_folder(options.json)
    from tamis.bench import cpu

    if options.compare is not None and not options.compare.is_dir():
        raise _UsageError(f"--compare: {options.compare} is not a folder")
    lengths = options.n or [length for length in cpu.LENGTHS if not options.quick or length <= 4096]
    chosen = cpu.CpuOptions(
        lengths=tuple(lengths),
        head_dims=tuple(options.head_dim or cpu.HEAD_DIMS),
        densities=tuple(options.density or cpu.DENSITIES),
        repeats=3 if options.quick else options.repeats,
        flex=options.flex,
        memory=not options.quick,
    )
    result = cpu.run(chosen)
    print(cpu.table(result))
    if options.compare is not None:
        from tamis.bench import compare

        print(compare.report(options.compare, result))
    if options.compare is None or options.json is not None:
        _write(options.json, "cpu", result)


def _bench_gpu(options: argparse.Namespace) -> None:
    from functools import partial

    from tamis.bench import gpu, gpu_report, record

    if options.markdown is not None:
        print(gpu_report.markdown(options.markdown))
        return
    _check_folder(options.json)
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
            raise _UsageError(f"--shape must be among {', '.join(shapes)}, got {name!r}")
    plain = gpu.GpuOptions()
    return gpu.GpuOptions(
        shapes=tuple(shapes[name] for name in names),
        repeats=options.repeats or (5 if options.quick else plain.repeats),
        flex=not (options.no_flex or options.quick),
        seconds=options.seconds or plain.seconds,
        commit=options.commit,
    )


def _bench_decode(options: argparse.Namespace) -> None:
    _check_folder(options.json)
    from tamis.bench import decode

    result = decode.run(options.n)
    print(decode.table(result))
    _write(options.json, "decode", result)


def _bench_scale(options: argparse.Namespace) -> None:
    _check_folder(options.json)
    from tamis.bench import scale
    from tamis.parallel import Workload

    if options.plan:
        heads = options.heads or scale.CLUSTER_WORK.heads
        try:
            work = Workload(
                scale.PLAN_TOKENS[0],
                heads,
                options.head_dim or scale.CLUSTER_WORK.head_dim,
                kv_heads=options.kv_heads,
                causal=options.causal,
                precision=options.precision,
                density=options.density,
            )
        except ValueError as error:
            raise _UsageError(str(error)) from error
        found = scale.planned(
            work, tuple(options.tokens or scale.PLAN_TOKENS), tuple(options.ranks or scale.PLAN_RANKS)
        )
        print(scale.plan_table(found))
        if options.json is not None:
            _write(options.json, "scale-plan", found)
        return
    if options.precision != "full":
        raise _UsageError("--precision is for --plan: what is measured is compared with one process in full precision")
    plain = scale.ScaleOptions()
    result = scale.run(
        scale.ScaleOptions(
            tokens=(options.tokens or (plain.tokens,))[0],
            heads=options.heads or plain.heads,
            kv_heads=options.kv_heads or options.heads or plain.kv_heads,
            head_dim=options.head_dim or plain.head_dim,
            density=options.density,
            causal=options.causal,
            ranks=tuple(options.ranks or plain.ranks),
        )
    )
    print(scale.table(result))
    _write(options.json, "scale", result)


def _bench_gpu_static(options: argparse.Namespace) -> None:
    _check_folder(options.json)
    from tamis.bench import gpu_static

    known = gpu_static.architectures()
    if wrong := [name for name in options.target or [] if name not in known]:
        raise _UsageError(f"--target: {', '.join(wrong)} is not one of {', '.join(known)}")
    rows = gpu_static.run(options.target or known, tuple(options.head_dim or gpu_static.DIMS))
    print(gpu_static.table(rows))
    if options.json is not None:
        _write(options.json, "gpu-static", gpu_static.result(rows))
    if faults := sum(bool(row.faults) for row in rows):
        raise RuntimeError(f"{faults} of {len(rows)} kernels fail")


def _bench_limits(options: argparse.Namespace) -> None:
    _check_folder(options.json)
    _check_folder(options.roofline, "--roofline")
    from tamis.bench import limits, picture

    result = limits.run(limits.QUICK if options.quick else limits.FULL)
    print(limits.table(result))
    if options.roofline is not None:
        options.roofline.write_text(picture.svg(result), encoding="utf-8")
    _write(options.json, "limits", result)


def _bench_ablation(options: argparse.Namespace) -> None:
    _check_folder(options.json)
    from tamis.bench import ablation

    result = ablation.run(options.tokens)
    print(ablation.table(result))
    _write(options.json, "ablation", result)


def _bench_tune(options: argparse.Namespace) -> None:
    _check_folder(options.json)
    from tamis.bench import tuning

    chosen = tuning.options_of(options.model, options.inputs, options.held_out, options.tokens)
    result = tuning.run(chosen, options.resume)
    print(tuning.table(result))
    _write(options.json, "tune", result)


def _bench_defaults(options: argparse.Namespace) -> None:
    _check_folder(options.json)
    from tamis.bench import defaults
    from tamis.bench.record import default_path

    path = options.json or default_path("defaults")
    print(defaults.table(defaults.run(path)))
    print(f"written: {path}")


def _bench_models(options: argparse.Namespace) -> None:
    _check_folder(options.json)
    from tamis.bench import models

    result = models.run(options.tokens, options.pixels, options.rounds, options.dtype)
    print(models.table(result))
    _write(options.json, "models", result)


def _bench_compensate(options: argparse.Namespace) -> None:
    _check_folder(options.json)
    from tamis.bench import compensate

    result = compensate.run(options.tokens)
    print(compensate.table(result))
    _write(options.json, "compensate", result)


def _bench_frontier(options: argparse.Namespace) -> None:
    _check_folder(options.json)
    _check_folder(options.picture, "--picture")
    from tamis.bench import frontier, frontier_report

    if options.markdown is None:
        result = frontier.run(options.tokens, options.start, options.every)
        print(frontier_report.markdown(result))
        _write(options.json, "frontier", result)
    else:
        result = json.loads(options.markdown.read_text(encoding="utf-8"))
        print(frontier_report.markdown(result))
    if options.picture is not None:
        options.picture.write_text(frontier_report.svg(result), encoding="utf-8")


def _bench_order(options: argparse.Namespace) -> None:
    _check_folder(options.json)
    _check_folder(options.picture, "--picture")
    from tamis.bench import order, order_report
    from tamis.demo import clip

    names = tuple(options.clip or clip.CLIPS)
    if wrong := [name for name in names if name not in clip.CLIPS]:
        raise _UsageError(f"--clip: {', '.join(wrong)} is not one of {', '.join(clip.CLIPS)}")
    if options.picture is not None:
        options.picture.write_text(order_report.svg(), encoding="utf-8")
    if options.markdown is None:
        chosen = order.OrderOptions(names, options.frames, options.stride, options.rows, options.every)
        result = order.run(chosen)
        print(order_report.markdown(result))
        _write(options.json, "order", result)
    else:
        print(order_report.markdown(json.loads(options.markdown.read_text(encoding="utf-8"))))


def _check_folder(path: Path | None, option: str = "--json") -> None:
    """Before minutes of measuring, not after."""
    if path is not None and not path.resolve().parent.is_dir():
        raise _UsageError(f"{option}: the folder of {path} is not there")
    if path is not None and path.is_dir():
        raise _UsageError(f"{option}: {path} is a folder, give a file in it")


def _write(path: Path | None, name: str, result: dict[str, Any]) -> None:
    from tamis.bench.record import default_path, write

    path = path or default_path(name)
    write(path, result)
    print(f"written: {path}")


def _info(options: argparse.Namespace) -> None:
    from tamis.demo.machine import info

    found = info()
    if options.json:
        print(json.dumps(found, indent=1))
        return
    print(f"tamis {found['tamis'] or '(not installed)'}, torch {found['torch']}, Python {found['python']}")
    print(f"{found['cpu']}, {found['cores']} cores, {found['threads']} threads, {found['platform']}")
    for name, backend in found["backends"].items():
        print(f"backend {name}: {'available' if backend['available'] else '; '.join(backend['reasons'])}")
    for gpu in found["gpus"]:
        print(f"gpu {gpu['name']} ({gpu['target'] or 'unknown'}): {gpu['state']}")
        if gpu["usable"]:
            runs = (f"{name} {'yes' if why is None else f'no ({why})'}" for name, why in gpu["precisions"].items())
            print(f"  precisions: {'; '.join(runs)}")
    for name, state in found["cpu_targets"].items():
        print(f"cpu target {name}: {state}")
    packages = ", ".join(f"{name} {version or '(not installed)'}" for name, version in found["packages"].items())
    print(f"packages: {packages}")


if __name__ == "__main__":
    sys.exit(main())
