"""`tamis bench limits`: does the engine keep what its design promises? Bars, each with the value it came to.

a  a kept key block costs the same at every length: nothing in a call grows with the map instead of with the mask
b  two threads are almost twice as fast as one, also where one head or a few rows have most of the work
c  query heads that share keys are no slower than heads with their own, and pack an eighth
d  prediction is a small share of what dense attention takes
e  a million tokens run in bounded memory
f  causal and short calls against torch's SDPA, the faster of fp32 and bf16; short ones in "full", of their own dtype

Everything that is compared runs in one process and in turn. Absolute times are the smallest of the repetitions, and
ratios to a peer medians over them. A correctness gate runs first.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tamis.attend import attend, pack_kv
from tamis.bench import memory, roofline
from tamis.bench.cpu import BLOCK_SIZE, HEADS, gate, random_mask, spread
from tamis.bench.record import commit
from tamis.block_mask import BlockMask
from tamis.demo.machine import machine
from tamis.demo.measure import interleaved
from tamis.demo.progress import Progress
from tamis.packed import PackedKV
from tamis.predictors.sparge import Sparge

Bar = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """What to run."""

    kept_lengths: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768, 65536, 131072, 262144)
    kept: int = 32  # all that 2,048 tokens have
    length: int = 8192  # of b, c and the causal part of f
    head_dims: tuple[int, ...] = (64, 128)
    predicted: tuple[tuple[int, float], ...] = ((8192, 0.04), (32768, 0.02), (131072, 0.01))  # and what it may take
    longest_dense: int = 32768
    packed: int = 65536
    million: int | None = 1 << 20
    short: tuple[int, ...] = (128, 256, 512, 1024, 2048)
    repeats: int = 9
    patience: float = 20.0  # seconds to wait until two threads had two cores


FULL = Sizes()
QUICK = replace(
    FULL, kept_lengths=(2048, 16384, 131072), predicted=FULL.predicted[:2], million=None, repeats=3, patience=5.0
)
_SPARSE = 0.0625  # the density from which dense time is extrapolated where it would be long
_FEW = 0.015625  # of the rows beside one that keeps all: that one is a fifth of the work then, at 32,768 tokens
_EIGHT = 8


def run(sizes: Sizes = FULL) -> dict[str, Any]:
    """All bars and the points of the roofline, as plain values.

    Raises:
        RuntimeError: an output is wrong; nothing is timed then.
    """
    bars: list[Bar] = []
    parts = (kept_blocks, scaling, shared_heads, prediction, million, causal, full_bf16, short)
    with Progress(len(parts) + 1, "bench limits") as progress, torch.inference_mode():
        for dim in sizes.head_dims:
            mask = random_mask(sizes.length, 0.25, _generator())
            for precision in ("int8", "full"):
                gate(*_normals(HEADS, sizes.length, dim), mask, precision)
        for part in parts:
            bars += part(sizes)
            progress.advance()
        points = roofline.measure(sizes.length, sizes.repeats)
        progress.advance()
    return {"bars": bars, "roofline": points, "machine": machine(), "commit": commit()}


def kept_blocks(sizes: Sizes) -> Iterator[Bar]:
    """a: seconds per kept block of a `PackedKV`, as many calls at each length as make the same number of blocks."""
    names, calls = [], []
    most = sizes.kept_lengths[-1]
    for tokens in sizes.kept_lengths:
        q, k, v = _normals(1, tokens, 64)
        packed = pack_kv(k, v)
        for choice in ("random", "local"):
            mask = _kept(tokens, sizes.kept, choice == "local")
            names.append((choice, tokens))
            calls.append(partial(_times, most // tokens, partial(attend, q, packed, None, mask)))
    interleaved(calls, 1)
    blocks = most // BLOCK_SIZE[0] * sizes.kept
    times = [min(runs) / blocks for runs in interleaved(calls, sizes.repeats)]
    faults = [_faults(call) for call in calls]
    for choice in ("random", "local"):
        rows = [
            {"tokens": tokens, "seconds_per_block": seconds, "page_faults": number}
            for (name, tokens), seconds, number in zip(names, times, faults, strict=True)
            if name == choice
        ]
        each = [row["seconds_per_block"] for row in rows]
        note = "us a block: " + ", ".join(f"{row['tokens']:,} {row['seconds_per_block'] * 1e6:.2f}" for row in rows)
        note += f"; {rows[-1]['page_faults']:,} page faults at {most:,}"
        yield _bar(
            "a",
            f"kept block, {choice} choice: longest / shortest time",
            max(each) / min(each),
            "x",
            most=1.15,
            note=note,
            rows=rows,
        )


def _kept(tokens: int, kept: int, local: bool) -> BlockMask:
    """Each query block keeps `kept` key blocks: around its own place, or anywhere."""
    q_blocks, kv_blocks = tokens // BLOCK_SIZE[0], tokens // BLOCK_SIZE[1]
    kept = min(kept, kv_blocks)
    if local:
        middle = torch.arange(q_blocks) * BLOCK_SIZE[0] // BLOCK_SIZE[1]
        indices = (middle - kept // 2).clamp(0, kv_blocks - kept)[:, None] + torch.arange(kept)
    else:
        indices = torch.rand(q_blocks, kv_blocks, generator=_generator()).topk(kept).indices.sort().values
    counts = torch.full((1, 1, q_blocks), kept, dtype=torch.int32)
    return BlockMask(counts, indices[None, None].to(torch.int32), BLOCK_SIZE, (tokens, tokens))


def _times(number: int, call: Callable[[], object]) -> None:
    for _ in range(number):
        call()


def _faults(call: Callable[[], object]) -> int:
    """Page faults during a call: its first writes to memory that the system has yet to give."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def scaling(sizes: Sizes) -> Iterator[Bar]:
    """b: one thread / two, the fastest of many runs of each: while another process has a core, two are no faster."""
    threads = torch.get_num_threads()
    if threads < 2:
        return
    q, k, v = _normals(4, sizes.length, 64)
    packed, tokens = pack_kv(k, v), 4 * sizes.length
    long = _normals(1, tokens, 64)
    head = random_mask(sizes.length, 0.05, _generator(), heads=4).to_dense()
    row = random_mask(tokens, _FEW, _generator(), heads=1).to_dense()
    head[:, 0], row[:, :, 0] = True, True
    cases: dict[str, tuple[Tensor, PackedKV, BlockMask | None]] = {
        "every row alike": (q, packed, random_mask(sizes.length, 0.25, _generator(), heads=4)),
        "causal": (q, packed, None),
        "one head of 4 keeps all": (q, packed, _of(head, sizes.length)),
        "the first rows keep all": (long[0], pack_kv(long[1], long[2]), _of(row, tokens)),
    }
    try:
        for name, (query, key, mask) in cases.items():
            call = partial(attend, query, key, None, mask, causal=mask is None)
            best = {1: (float("inf"), 0.0), 2: (float("inf"), 0.0)}
            start, runs = time.monotonic(), 0
            while runs < 3 * sizes.repeats or (best[2][1] < 1.8 and time.monotonic() < start + sizes.patience):
                runs += 1
                for number in best:
                    torch.set_num_threads(number)
                    best[number] = min(best[number], _busy(call))
            cores = best[2][1]
            yield _bar(
                "b",
                f"1 thread / 2 threads, {name}",
                best[1][0] / best[2][0],
                "x",
                least=1.9,
                note=f"{best[2][0] * 1e3:.1f} ms; the two threads had {cores:.2f} cores",
                cores=cores,
                seconds=[best[1][0], best[2][0]],
            )
    finally:
        torch.set_num_threads(threads)


def _busy(call: Callable[[], object]) -> tuple[float, float]:
    """Seconds of a call and how many cores this process had meanwhile."""
    cpu, start = time.process_time(), time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    return seconds, (time.process_time() - cpu) / seconds


def _of(kept: Tensor, tokens: int) -> BlockMask:
    return BlockMask.from_dense(kept, BLOCK_SIZE, (tokens, tokens))


def shared_heads(sizes: Sizes) -> Iterator[Bar]:
    """c: eight query heads that share one key head, against eight with their own; packing is in the time."""
    for dim in sizes.head_dims:
        q, k, v = _normals(_EIGHT, sizes.length, dim)
        for density in (1.0, 0.25):
            mask = random_mask(sizes.length, density, _generator(), heads=_EIGHT)
            calls = [
                partial(attend, q, k[:, :1], v[:, :1], mask, precision="int8"),
                partial(attend, q, k, v, mask, precision="int8"),
            ]
            shared, own = interleaved(calls, sizes.repeats)
            ratios = [a / b for a, b in zip(shared, own, strict=True)]
            yield _bar(
                "c",
                f"8:1 / 1:1 heads, d={dim}, density {density:g}, time",
                statistics.median(ratios),
                "x",
                most=1.0,
                note=_extent(ratios),
                seconds=[min(shared), min(own)],
                spread=spread(ratios),
            )
    usages = [memory.packing(sizes.packed, heads) for heads in (1, _EIGHT)]
    if usages[0] is not None and usages[1] is not None:
        bytes_ = [usage.peak_extra_bytes for usage in usages if usage is not None]
        yield _bar(
            "c",
            f"8:1 / 1:1 heads, peak memory of packing {sizes.packed:,} tokens",
            bytes_[0] / max(1, bytes_[1]),
            "x",
            most=1.01 / _EIGHT,
            note=f"{bytes_[0] / 1e6:.1f} and {bytes_[1] / 1e6:.1f} MB",
        )


def prediction(sizes: Sizes) -> Iterator[Bar]:
    """d: `Sparge` with every block judged, which costs most, as a share of dense int8 from query, key and value."""
    predictor = Sparge(similarity=-1.0)
    for dim in sizes.head_dims:
        for tokens, share in sizes.predicted:
            q, k, v = _normals(1, tokens, dim)
            extrapolated = tokens > sizes.longest_dense
            mask = random_mask(tokens, _SPARSE, _generator(), heads=1) if extrapolated else None
            factor = 1 / mask.density() if mask is not None else 1.0
            packed = pack_kv(k, v)
            calls: list[Callable[[], object]] = [
                partial(predictor, q, k, block_size=BLOCK_SIZE),
                partial(pack_kv, k, v),
                partial(attend, q, packed, None, mask),
            ]
            interleaved(calls, 3)  # a call's form is known from its third time on
            times = interleaved(calls, sizes.repeats)
            ratios = [p / (pack + a * factor) for p, pack, a in zip(*times, strict=True)]
            note = f"{min(times[0]) * 1e3:.1f} ms of {(min(times[1]) + min(times[2]) * factor) * 1e3:.0f}"
            note += f"; dense extrapolated from density {_SPARSE:g} by kept blocks" if extrapolated else ""
            yield _bar(
                "d",
                f"prediction / dense int8, {tokens:,} tokens, d={dim}",
                statistics.median(ratios),
                "%",
                most=share,
                note=note,
                extrapolated=extrapolated,
                spread=spread(ratios),
            )


def million(sizes: Sizes) -> Iterator[Bar]:
    """e: a million tokens in a fresh process, predicted with topk .01 and run."""
    if sizes.million is None:
        return
    usage = memory.sparse(sizes.million, 0.01)
    if usage is not None:
        yield _bar(
            "e",
            f"{sizes.million:,} tokens, Sparge(topk=.01): peak extra memory",
            usage.peak_extra_bytes / 1e9,
            "GB",
            most=1.5,
            note=f"{usage.seconds:.1f} s, predicted, packed and run",
            seconds=usage.seconds,
        )


def causal(sizes: Sizes) -> Iterator[Bar]:
    """f: dense and causal, quantisation included."""
    for dim in sizes.head_dims:
        q, k, v = _normals(HEADS, sizes.length, dim)
        calls: list[Callable[[], object]] = [
            *_sdpa(q, k, v, True),
            partial(attend, q, k, v, causal=True, precision="int8"),
        ]
        yield from _against(f"{sizes.length:,} tokens causal, d={dim}, int8", calls, sizes.repeats, least=3.5)


def full_bf16(sizes: Sizes) -> Iterator[Bar]:
    """f: precision "full" of bf16 inputs, dense; only processors with bf16 products can pass."""
    for dim in sizes.head_dims:
        q, k, v = _normals(HEADS, sizes.length, dim)
        ours = partial(attend, q.bfloat16(), k.bfloat16(), v.bfloat16())
        calls: list[Callable[[], object]] = [*_sdpa(q, k, v, False), ours]
        yield from _against(f"{sizes.length:,} tokens, d={dim}, full, bf16 inputs", calls, sizes.repeats, least=1.8)


def short(sizes: Sizes) -> Iterator[Bar]:
    """f: short calls, where what a call costs before it computes anything counts; "full" against SDPA of its dtype."""
    for tokens in sizes.short:
        q, k, v = _normals(HEADS, tokens, 64)
        fp32, bf16 = _sdpa(q, k, v, False)
        number = max(1, 4096 // tokens)
        few = (q.bfloat16(), k.bfloat16(), v.bfloat16())
        kinds: list[tuple[str, list[Callable[[], object]], float]] = [
            ("int8", [fp32, bf16, partial(attend, q, k, v, precision="int8")], 1.5 if tokens in (512, 1024) else 1.0),
            ("full of fp32", [fp32, partial(attend, q, k, v)], 1.0),
            ("full of bf16", [bf16, partial(attend, *few)], 1.0),
        ]
        for what, calls, least in kinds:
            many: list[Callable[[], object]] = [partial(_times, number, call) for call in calls]
            yield from _against(f"{tokens:,} tokens, d=64, {what}", many, 2 * sizes.repeats, least, number)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Iterable[Callable[[], object]]:
    for dtype in (torch.float32, torch.bfloat16):
        peer = partial(scaled_dot_product_attention, is_causal=is_causal)
        yield partial(peer, q.to(dtype), k.to(dtype), v.to(dtype))


def _against(
    what: str, calls: Sequence[Callable[[], object]], repeats: int, least: float, number: int = 1
) -> Iterator[Bar]:
    interleaved(calls, 1)
    *peers, ours = interleaved(calls, repeats)
    ratios = [min(theirs) / own for *theirs, own in zip(*peers, ours, strict=True)]
    times = [min(runs) / number for runs in (*peers, ours)]
    names = ("fp32", "bf16") if len(peers) == 2 else ("SDPA",)
    named = ", ".join(f"{name} {seconds * 1e3:.2f}" for name, seconds in zip((*names, "ours"), times, strict=True))
    note = f"{_extent(ratios)}; ms: {named}"
    yield _bar(
        "f",
        f"SDPA / tamis, {what}",
        statistics.median(ratios),
        "x",
        least=least,
        note=note,
        seconds=times,
        spread=spread(ratios),
    )


def _normals(heads: int, tokens: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(1, heads, tokens, dim, generator=_generator(seed)) for seed in range(3))
    return q, k, v


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _extent(ratios: list[float]) -> str:
    return f"{min(ratios):.2f} to {max(ratios):.2f}"


def _bar(
    part: str,
    what: str,
    value: float,
    unit: str,
    *,
    most: float | None = None,
    least: float | None = None,
    note: str,
    **more: Any,
) -> Bar:
    holds = (most is None or value <= most) and (least is None or value >= least)
    return {
        "part": part,
        "what": what,
        "value": value,
        "unit": unit,
        "most": most,
        "least": least,
        "holds": holds,
        "note": note,
        **more,
    }


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    wide = max(len(bar["what"]) for bar in result["bars"]) + 2
    lines = [f"   {'':{wide}}{'value':>10}  {'bar':>11}"]
    for bar in result["bars"]:
        sign, limit = ("<=", bar["most"]) if bar["most"] is not None else (">=", bar["least"])
        value, limit = (_number(number, bar["unit"]) for number in (bar["value"], limit))
        lines.append(f"{bar['part']}  {bar['what']:{wide}}{value:>10}  {sign} {limit:>8}  {_verdict(bar)}")
        lines.append(f"     {bar['note']}")
    failing = sum(not bar["holds"] for bar in result["bars"])
    lines.append(f"{len(result['bars']) - failing} of {len(result['bars'])} bars hold")
    return "\n".join([*lines, "", roofline.table(result["roofline"])])


def _number(number: float, unit: str) -> str:
    return f"{number:.2%}" if unit == "%" else f"{number:.3g} {unit}"


def _verdict(bar: Bar) -> str:
    return "holds" if bar["holds"] else "FAILS"
