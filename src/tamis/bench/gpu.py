"""`tamis bench gpu`: tamis on a GPU against torch's SDPA (flash, cuDNN) and FlexAttention, in one process, in turn.

Inputs are bf16 normals in several sets, which calls take in turn, so that none finds its own in the cache. Given masks
are random with the density asked for among the visible blocks, the causal diagonal kept. "total" is `sparse_attention`:
prediction, quantisation and the kernel. A time is the GPU's own, between two events around the call. The GPU is kept
waiting until the call is queued: what the processor does for it is not in that time and stands beside it as "host". A
correctness gate on the same inputs comes first: a shape in which tamis is wrong is not timed.

    gpu_calls.py   what is timed;  gpu_gate.py   whether it is right;  gpu_report.py   arithmetic, tables, bars
"""

from __future__ import annotations

import importlib
import subprocess
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch

from tamis.backends.triton import chips
from tamis.bench import gpu_report
from tamis.bench.gpu_calls import SHAPES, Candidate, Inputs, Shape, candidates, moved, normals, random_mask
from tamis.bench.gpu_gate import Verdict, check, one_line
from tamis.bench.gpu_report import Result, Row
from tamis.bench.record import commit
from tamis.demo.machine import machine
from tamis.demo.progress import Progress, note

_SETS = 3
_MOST_SECONDS, _WARM_SECONDS = 30.0, 0.5  # per shape: of timing, and before it
_LEAST_REPEATS = 3
_AHEAD_CYCLES = 4_000_000  # about 2 ms in which the processor gets ahead of the GPU


@dataclass(frozen=True)
class GpuOptions:
    """What to run; what is not reached within `seconds` says so in its row. `commit` is for where git cannot tell."""

    shapes: tuple[Shape, ...] = SHAPES
    densities: tuple[float, ...] = (0.5, 0.25, 0.1)
    repeats: int = 30
    flex: bool = True
    seconds: float = 440.0
    commit: str | None = None


class Sample(NamedTuple):
    """Milliseconds of one call: on the device, and of the processor until the call returned."""

    device: float
    host: float


Timer: TypeAlias = "Callable[[Sequence[Callable[[], object]]], list[Sample]]"


def run(
    options: GpuOptions,
    *,
    save: Callable[[Result], None],
    show: Callable[[str], None],
    device: str = "cuda",
    timer: Timer | None = None,
) -> Result:
    """Measure shape after shape; `save` gets the result after every repetition, `show` every finished table.

    What was wrong, or of tamis could not run, is listed in the result's "failures".

    Raises:
        RuntimeError: there is no GPU, or Triton can't be used on it.
    """
    place = _device(device)
    result: Result = {
        "shapes": [asdict(shape) for shape in options.shapes],
        "rows": [],
        "failures": [],
        "machine": _machine(place),
        "commit": options.commit or commit(),
    }
    bench = _Bench(options, place, timer or device_timer, time.monotonic() + options.seconds, result, save)
    with torch.no_grad():
        for shape in options.shapes:
            try:
                bench.shape(shape)
            except Exception as error:  # the shapes after this one can still be measured
                result["failures"].append(f"{shape.name}: {one_line(error)}")
            bench.update()
            show(gpu_report.table(result, shape.name))
    return result


def _device(name: str) -> torch.device:
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(
            f"bench gpu needs a GPU that torch can use, and torch {torch.__version__} sees none: run it on a machine "
            "with one, with torch's CUDA or ROCm build"
        )
    if (why := chips.missing(device.type, device.index or 0)) is not None:
        raise RuntimeError(f"bench gpu cannot use Triton: {why}")
    return device


def _machine(device: torch.device) -> dict[str, Any]:
    """What figures belong to: `machine()`, and the GPU with what drives it."""
    triton: Any = importlib.import_module("triton")
    found = {**machine(), "triton": triton.__version__, "gpu": None, "chip": chips.name_of(device), "driver": None}
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        found |= {"gpu": about.name, "multiprocessors": about.multi_processor_count, "driver": _driver()}
        cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
        found |= {"cuda": torch.version.cuda, "cudnn": cudnn}
    return found


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return told.splitlines()[0].strip() if told.strip() else None


def device_timer(calls: Sequence[Callable[[], object]]) -> list[Sample]:
    """Each call between two events on the current stream; the GPU waits before them until all is queued."""
    cuda: Any = torch.cuda  # parts of it have no types
    events = [(cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)) for _ in calls]
    hosts = []
    for call, (start, stop) in zip(calls, events, strict=True):
        cuda._sleep(_AHEAD_CYCLES)
        start.record()
        hosts.append(wall_timer([call])[0].host)
        stop.record()
    cuda.synchronize()
    return [Sample(start.elapsed_time(stop), host) for (start, stop), host in zip(events, hosts, strict=True)]


def wall_timer(calls: Sequence[Callable[[], object]]) -> list[Sample]:
    """For a device that is the processor."""
    samples = []
    for call in calls:
        start = time.perf_counter()
        call()
        took = (time.perf_counter() - start) * 1e3
        samples.append(Sample(took, took))
    return samples


@dataclass(frozen=True)
class _Bench:
    """A run: what it uses, when it must end, and where its rows go as they come."""

    options: GpuOptions
    device: torch.device
    timer: Timer
    deadline: float
    result: Result
    save: Callable[[Result], None]

    def update(self) -> None:
        """Save what there is, with all that follows from it."""
        gpu_report.complete(self.result)
        self.save(self.result)

    def shape(self, shape: Shape) -> None:
        """One shape: inputs and masks, the gate, the times.

        Raises:
            RuntimeError: an output of tamis is wrong; nothing is timed then.
        """
        if self._late():
            self.result["failures"].append(f"{shape.name}: {self._late()}")
            return
        note(f"bench gpu: {shape.name}, {shape.tokens:,} tokens")
        generator = torch.Generator(device=self.device).manual_seed(shape.tokens + shape.head_dim)
        sets = [normals(shape, generator) for _ in range(_SETS)]
        masks = {density: random_mask(shape, density, generator) for density in self.options.densities}
        live = self._gate(shape, list(candidates(shape, masks, flex=self.options.flex)), sets[0])
        self._time(live, sets)

    def _late(self) -> str | None:
        late = time.monotonic() > self.deadline
        return f"not reached within the {self.options.seconds:.0f} s there were" if late else None

    def _gate(self, shape: Shape, chosen: list[Candidate], inputs: Inputs) -> list[tuple[Candidate, Row]]:
        """A row for every candidate; returns those that can be timed."""
        live, wrong = [], []
        with Progress(len(chosen), f"{shape.name}, correctness") as progress:
            for candidate in chosen:
                late = self._late()
                verdict = check(shape, candidate, inputs) if late is None else Verdict(failure=late)
                row = _row(shape, candidate, verdict)
                self.result["rows"].append(row)
                if verdict.broken:
                    self.result["failures"].append(f"{shape.name}: {candidate.title} cannot run: {verdict.failure}")
                if verdict.wrong:
                    wrong.append(f"{candidate.title}: {verdict.failure}")
                if verdict.failure is None:
                    live.append((candidate, row))
                progress.advance()
        self.update()
        if wrong:
            raise RuntimeError(f"nothing was timed, since tamis is wrong: {'; '.join(wrong)}")
        return live

    def _time(self, live: list[tuple[Candidate, Row]], sets: list[Inputs]) -> None:
        """Repetitions of all candidates in turn, each time on another set of inputs; fewer where they are long."""
        # No two calls in a row take the same set, nor does a candidate twice.
        step = len(live) + (len(live) % len(sets) == 0)

        def repetition(number: int) -> list[Sample]:
            places = range(number * step, number * step + len(live))
            calls = [partial(item.call, sets[at % len(sets)]) for at, (item, _) in zip(places, live, strict=True)]
            return self.timer(calls)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the gate has seen them
            start = time.monotonic()
            warm = 0
            while warm == 0 or time.monotonic() - start < _WARM_SECONDS:
                repetition(warm)
                warm += 1
            most = int(_MOST_SECONDS * warm / (time.monotonic() - start))
            for number in range(min(self.options.repeats, max(_LEAST_REPEATS, most))):
                if number > 0 and self._late():
                    break
                for (_, row), sample in zip(live, repetition(warm + number), strict=True):
                    row["times_ms"].append(round(sample.device, 5))
                    row["host_times_ms"].append(round(sample.host, 5))
                self.update()


def _row(shape: Shape, candidate: Candidate, verdict: Verdict) -> Row:
    density = candidate.density if verdict.density is None else verdict.density
    moved_bytes, least_bytes = moved(shape, candidate, density) or (None, None)
    return {
        "shape": shape.name,
        "candidate": candidate.name,
        "precision": candidate.precision,
        "asked_density": candidate.density,
        "density": verdict.density,
        "error": verdict.error,
        "agreement": verdict.agreement,
        "failure": verdict.failure,
        "moved_bytes": moved_bytes,
        "least_bytes": least_bytes,
        "times_ms": [],
        "host_times_ms": [],
    }
