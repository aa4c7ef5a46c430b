"""`tamis bench scale`: attention over 1, 2 and 4 processes of this machine, measured and modelled, and GPUs modelled.

Every process is a rank of a gloo group and has its share of the machine's cores, so more ranks add no speed here: what
is measured is what being spread costs. The model of this machine is

    seconds = seconds of one process * balance + bytes that all ranks send / bytes a second that they can
              + exchanges * seconds of an empty one

with the bytes of `tamis.parallel.plan`, and a bandwidth and an empty exchange measured in the same run. A gate of
correctness runs first.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tamis.bench.cpu import spread
from tamis.bench.record import commit
from tamis.demo.machine import machine
from tamis.demo.measure import relative_l1, seconds
from tamis.demo.progress import Progress
from tamis.parallel import Speeds, Workload, plan
from tamis.parallel.planning import MODES, balance, traffic_of
from tamis.predictors.sparge import Sparge

GATE = 1e-5  # relative L1 against one process in full precision: fp32 sums in another order
_BANDWIDTH_BYTES = 1 << 25

# Nothing of this was measured here. Links: NVIDIA's data sheets of H100 and H200 (NVLink 4: 900 GB/s both ways, so 450
# out of a GPU) and of ConnectX-7 (NDR InfiniBand: 400 Gb/s a port, one per GPU). Rate and wait are assumptions.
STATED = Speeds(rate=4e14, near=450e9, far=50e9, node=8, wait=2e-5)
CLUSTER = (8, 16, 32, 64, 128, 256, 512, 1024)
CLUSTER_WORK = Workload(1 << 20, 40, 128, density=0.25)  # heads as in Wan 2.1 14B, bf16
PLAN_TOKENS = (1_000_000, 10_000_000, 100_000_000)
PLAN_RANKS = (8, 64, 1024)


@dataclass(frozen=True)
class ScaleOptions:
    """What is measured, and what the model is asked."""

    tokens: int = 8192
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 64
    density: float = 0.25
    causal: bool = False
    ranks: tuple[int, ...] = (1, 2, 4)
    repeats: int = 7
    pairs: int = 41  # on one rank, where the overhead is a few thousandths and single ratios scatter by hundredths
    timeout: float = 120.0

    def __post_init__(self) -> None:
        work_of(self)  # refuses sizes that do not fit together
        for name, numbers in (("repeats", (self.repeats,)), ("pairs", (self.pairs,)), ("ranks", self.ranks)):
            if not numbers or min(numbers) < 1:
                raise ValueError(f"{name} must be at least 1, got {numbers}")


def run(options: ScaleOptions | None = None, lengths: Sequence[int] | None = None) -> dict[str, Any]:
    """Measurements of this machine at every length (by default that of the options), and the model of clusters.

    Raises:
        ValueError: sizes do not fit together, before anything is measured; or a length is given twice.
    """
    options = ScaleOptions() if options is None else options
    lengths = (options.tokens,) if lengths is None else tuple(lengths)
    if len(set(lengths)) < len(lengths):
        raise ValueError(f"lengths must be different ones, got {lengths}")
    each = [replace(options, tokens=length) for length in lengths]
    rows: list[dict[str, Any]] = []
    with Progress(len(options.ranks) * len(each), "bench scale") as progress:
        for one in each:
            found: list[dict[str, Any]] = []
            for size in options.ranks:
                found += _measured(one, size)
                progress.advance()
            beside(found, one)
            rows += found
    model = clusters(CLUSTER_WORK)
    return {"options": asdict(options), "rows": rows, "model": model, "machine": machine(), "commit": commit()}


def work_of(options: ScaleOptions) -> Workload:
    """The sizes of what is measured, in fp32."""
    return Workload(
        options.tokens,
        options.heads,
        options.head_dim,
        kv_heads=options.kv_heads,
        item=4,
        causal=options.causal,
        density=options.density,
    )


def _measured(options: ScaleOptions, size: int) -> list[dict[str, Any]]:
    """Rows of both modes on so many processes."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        store = "file://" + os.path.join(folder, "store")
        # A rank that fails ends the pool with its error; the others then fail by the group's timeout.
        with ProcessPoolExecutor(size, context) as pool:
            ranks = [pool.submit(_rank, rank, size, store, options) for rank in range(size)]
            found = [rank.result() for rank in ranks]
    return rows_of(found, options)


def rows_of(found: Sequence[dict[str, Any]], options: ScaleOptions) -> list[dict[str, Any]]:
    """What all ranks measured as one row for each mode."""
    size, rows = len(found), []
    for mode in MODES:
        own = [answer[mode] for answer in found]
        # A call ends when its last rank ends.
        times = [max(pair) for pair in zip(*(row["seconds"] for row in own), strict=True)]
        overhead = quartiles(own[0]["overhead"]) if size == 1 else None
        rows.append(
            {
                "tokens": options.tokens,
                "mode": mode,
                "ranks": size,
                "seconds": spread(times),
                "bytes_sent": [sum(row["sent"].values()) for row in own],
                "bytes_planned": [sum(traffic_of(work_of(options), size, mode, rank).values()) for rank in range(size)],
                "gate_l1": max(row["gate"] for row in own),
                "bandwidth": found[0]["bandwidth"],
                "exchanges": own[0]["exchanges"],
                "seconds_of_an_exchange": found[0]["wait"],
                "overhead": overhead,
            }
        )
    return rows


def _rank(rank: int, size: int, store: str, options: ScaleOptions) -> dict[str, Any]:
    """One process: both modes, timed between barriers."""
    import torch.distributed as dist

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
    limit = datetime.timedelta(seconds=options.timeout)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=limit)
    answer = measure(options)
    dist.destroy_process_group()
    return answer


def measure(options: ScaleOptions) -> dict[str, Any]:
    """What one rank of all processes measures; every rank must call it."""
    import torch.distributed as dist

    rank, size = dist.get_rank(), dist.get_world_size()
    with torch.inference_mode():
        answer: dict[str, Any] = {mode: _mode(rank, size, options, mode) for mode in MODES}
        answer |= _links(size)
    return answer


def _mode(rank: int, size: int, options: ScaleOptions, mode: str) -> dict[str, Any]:
    """One mode: checked against one process, then timed; on one rank beside the call that knows of none."""
    import torch.distributed as dist

    from tamis.attend import sparse_attention
    from tamis.parallel import Layout, Traffic
    from tamis.parallel import sparse_attention as spread_attention

    whole, layout = _inputs(options), Layout.even(options.tokens, size)
    query, key, value = (layout.take(tensor, rank).contiguous() for tensor in whole)
    predictor = Sparge(topk=options.density, similarity=-1)

    def spread_call() -> Tensor:
        output = spread_attention(
            query,
            key,
            value,
            mode=mode,
            predictor=predictor,
            precision="full",
            pv_threshold=None,
            causal=options.causal,
        )
        assert isinstance(output, Tensor)
        return output

    def alone() -> Tensor:
        output = sparse_attention(
            whole[0],
            whole[1],
            whole[2],
            is_causal=options.causal,
            enable_gqa=True,
            predictor=predictor,
            precision="full",
            pv_threshold=None,
        )
        assert isinstance(output, Tensor)
        return output

    with Traffic() as traffic:
        output = spread_call()
    gate = float(relative_l1(output, layout.take(alone(), rank)).max()) if output.numel() else 0.0
    if not gate <= GATE:
        raise RuntimeError(f"mode {mode} on {size} ranks differs from one process by {gate:.1e}")
    if size == 1:
        times, plain = paired(spread_call, alone, options.pairs)
        overhead = [own / other for own, other in zip(times, plain, strict=True)]
    else:
        times, overhead = [_timed(spread_call, dist.barrier) for _ in range(options.repeats)], []
    sent = {"sent": dict(traffic.sent), "exchanges": traffic.exchanges}
    return {"seconds": times, "gate": gate, "overhead": overhead} | sent


def _inputs(options: ScaleOptions) -> list[Tensor]:
    """Query, key and value of the whole sequence, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    heads = (options.heads, options.kv_heads, options.kv_heads)
    return [torch.randn(1, number, options.tokens, options.head_dim, generator=generator) for number in heads]


def paired(one: Callable[[], object], other: Callable[[], object], pairs: int) -> tuple[list[float], list[float]]:
    """Seconds of both, pair by pair; they take turns at being first, for the second finds warmer caches."""
    times: tuple[list[float], list[float]] = ([], [])
    for pair in range(pairs):
        for which in (0, 1) if pair % 2 == 0 else (1, 0):
            times[which].append(seconds((one, other)[which]))
    return times


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles, and of how many numbers."""
    low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return {"median": median, "low": low, "high": high, "pairs": len(values)}


def _timed(call: Callable[[], object], barrier: Callable[[], object]) -> float:
    barrier()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _links(size: int) -> dict[str, float | None]:
    """Seconds of an all-to-all of next to nothing, and bytes a second that all ranks together send in a large one."""
    if size == 1:
        return {"wait": None, "bandwidth": None}
    part = _BANDWIDTH_BYTES // size // size
    wait, large = _exchange_seconds(size), _exchange_seconds(part * size)
    return {"wait": wait, "bandwidth": part * size * (size - 1) / large}


def _exchange_seconds(numbers: int) -> float:
    """Of the slowest rank; the median of some after a first one."""
    import torch.distributed as dist

    send = torch.zeros(numbers, dtype=torch.uint8)
    received = torch.empty_like(send)
    dist.all_to_all_single(received, send)
    times = [_timed(lambda: dist.all_to_all_single(received, send), dist.barrier) for _ in range(9)]
    slowest = torch.tensor(statistics.median(times))
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return float(slowest)


def beside(rows: list[dict[str, Any]], options: ScaleOptions) -> None:
    """Put the modelled seconds into the rows."""
    first = {row["mode"]: row["seconds"]["median"] for row in rows if row["ranks"] == 1}
    for row in rows:
        alone = first.get(row["mode"])
        if alone is None:
            row["seconds_modelled"] = None
            continue
        sending = 0.0
        if row["bandwidth"]:
            sending = sum(row["bytes_planned"]) / row["bandwidth"] + row["exchanges"] * row["seconds_of_an_exchange"]
        row["seconds_modelled"] = alone * balance(work_of(options), row["ranks"], row["mode"]) + sending


def clusters(work: Workload, speeds: Speeds = STATED, ranks: tuple[int, ...] = CLUSTER) -> dict[str, Any]:
    """The model of GPU clusters: what a call takes, from stated speeds; nothing in it was measured."""
    alone = plan(work, 1).seconds(speeds)
    rows = []
    for size in ranks:
        for mode in MODES:
            made = plan(work, size, mode)
            seconds = made.seconds(speeds)
            rows.append(
                {
                    "mode": mode,
                    "ranks": size,
                    "seconds": seconds,
                    "efficiency": alone / seconds / size,
                    "bytes_sent": made.sent,
                    "bytes_held": made.held,
                }
            )
    return {"kind": "model, nothing measured", "work": asdict(work), "speeds": asdict(speeds), "rows": rows}


def planned(work: Workload, tokens: tuple[int, ...], ranks: tuple[int, ...]) -> dict[str, Any]:
    """Memory and traffic of every rank, for both modes, as plain values."""
    rows = []
    for length in tokens:
        for size in ranks:
            for mode in MODES:
                made = plan(replace(work, tokens=length), size, mode)
                sizes = {"memory": made.memory, "traffic": made.traffic}
                rows.append({"tokens": length, "ranks": size, "mode": mode} | sizes)
    return {"kind": "computed from sizes, nothing measured", "work": asdict(work), "rows": rows}


def plan_table(result: dict[str, Any]) -> str:
    """A plan as text, GB of 10^9 bytes for each rank and attention call."""
    work = result["work"]
    kv_heads = work["kv_heads"] or work["heads"]
    lines = [
        f"Each rank, one attention call: {work['heads']} heads ({kv_heads} of keys) of {work['head_dim']}, "
        f"{work['item']} bytes a number, precision {work['precision']}{', causal' if work['causal'] else ''}. "
        "Computed, not measured.",
        f"{'tokens':>12}{'ranks':>7} {'mode':6}{'holds GB':>10}{'lists GB':>10}{'sends GB':>10}  largest part of each",
    ]
    for row in result["rows"]:
        memory, traffic = row["memory"], row["traffic"]
        most = max(memory, key=lambda kind: memory[kind])
        sent = max(traffic, key=lambda kind: traffic[kind]) if traffic else "nothing"
        lines.append(
            f"{row['tokens']:12,}{row['ranks']:7} {row['mode']:6}{sum(memory.values()) / 1e9:10.2f}"
            f"{memory.get('blocks', 0) / 1e9:10.2f}{sum(traffic.values()) / 1e9:10.3f}  {most}; {sent}"
            f"{_idle(row, work)}"
        )
    lines += [
        "holds: the fullest rank's largest tensors of one call (its tokens, what it got, buffers, lists), no weights",
        f"lists: of blocks to visit, room for all, counted in holds; density ({work['density']}) changes none of this",
    ]
    return "\n".join(lines)


def _idle(row: dict[str, Any], work: dict[str, Any]) -> str:
    """What a row of mode "heads" has to say if there are more ranks than heads."""
    return f"; only {work['heads']} ranks work" if row["mode"] == "heads" and row["ranks"] > work["heads"] else ""


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    lines = [
        f"{'tokens':>9} {'mode':6}{'ranks':>6}{'ms':>9}{'model ms':>10}{'sent MB':>9}{'planned':>9}{'MB/s':>8}"
        f"{'exchanges':>11}{'ms each':>9}{'gate L1':>9}  overhead: median (quartiles)"
    ]
    for row in result["rows"]:
        modelled, overhead, wait = row["seconds_modelled"], row["overhead"], row["seconds_of_an_exchange"]
        lines.append(
            f"{row['tokens']:9,} {row['mode']:6}{row['ranks']:6}{row['seconds']['median'] * 1e3:9.1f}"
            f"{'-' if modelled is None else f'{modelled * 1e3:.1f}':>10}"
            f"{sum(row['bytes_sent']) / 1e6:9.1f}{sum(row['bytes_planned']) / 1e6:9.1f}"
            f"{'-' if row['bandwidth'] is None else format(row['bandwidth'] / 1e6, '.0f'):>8}{row['exchanges']:11}"
            f"{'-' if wait is None else format(wait * 1e3, '.2f'):>9}{row['gate_l1']:9.0e}"
            f"  {'-' if overhead is None else _percent(overhead)}"
        )
    lines.append(f"gate L1: sum of differences from one process / sum of its sizes; a row is kept up to {GATE:.0e}")
    return "\n".join([*lines, "", *_model_lines(result["model"])])


def _percent(overhead: dict[str, float]) -> str:
    median, low, high = (format(overhead[name] - 1, "+.1%") for name in ("median", "low", "high"))
    return f"{median} ({low} .. {high}, {overhead['pairs']} pairs)"


def _model_lines(model: dict[str, Any]) -> list[str]:
    speeds, work = model["speeds"], model["work"]
    lines = [
        f"MODEL, nothing measured: {work['tokens']:,} tokens, {work['heads']} heads of {work['head_dim']}, density "
        f"{work['density']}; {speeds['rate'] / 1e12:.0f} TFLOP/s a GPU assumed, {speeds['near'] / 1e9:.0f} GB/s inside "
        f"a node of {speeds['node']}, {speeds['far'] / 1e9:.0f} GB/s between nodes",
        f"{'mode':6}{'GPUs':>6}{'ms':>10}{'efficiency':>12}{'sends GB':>10}{'holds GB':>10}",
    ]
    for row in model["rows"]:
        lines.append(
            f"{row['mode']:6}{row['ranks']:6}{row['seconds'] * 1e3:10.2f}{row['efficiency']:12.0%}"
            f"{row['bytes_sent'] / 1e9:10.3f}{row['bytes_held'] / 1e9:10.2f}{_idle(row, work)}"
        )
    return lines
