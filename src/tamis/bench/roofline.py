"""The roofline of this machine: what bounds a kernel of so many operations a byte, and where ours are.

Roofs are measured, not read from a data sheet: torch's own products (fp32, bf16, and `torch._int_mm` for int8) and the
faster of its copy and its sum, on all threads. They are what a good library reaches; the processor may do more.

A multiply-add is two operations. Of attention the two products count and no exponential; of prediction and packing the
floating-point operations of each entry. Bytes are those that must move at least once: inputs as they come (fp32, or a
`PackedKV`) and the result. What is read again, from a cache or not, does not count.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tamis.attend import attend, pack_kv
from tamis.bench.cpu import BLOCK_SIZE, random_mask
from tamis.demo.measure import interleaved
from tamis.predictors.sparge import Sparge

HEADS = 2
DENSITIES = (1.0, 0.25, 0.05)
DECODED, DECODE_HEADS = 32768, (32, 8)
SIDE = 2048  # of the matrices whose products are timed
MEMORY_BYTES, CACHE_BYTES = 1 << 29, 1 << 23  # of each tensor: beyond all caches, and in the one that cores share
# Operations an entry. Prediction: less the mean, its square, the sum, the sum of unit rows, and half a key mean.
# Packing: less the mean, absolute, largest, scaled, rounded.
PREDICT, PACK = 7, 5

Timed = tuple[float, Callable[[], object]]


def measure(length: int, repeats: int) -> dict[str, Any]:
    """Peaks in 1e9 operations or bytes a second, and points, each from the best of `repeats` runs in turn."""
    peaks = {name: amount / seconds / 1e9 for name, (amount, seconds) in _best(_probes(), repeats).items()}
    points = []
    for dim in (64, 128):
        points += _attention(length, dim, repeats)
    points += _decoding(repeats) + _preparing(length, repeats)
    return {
        "peaks": {
            **{name: peaks[name] for name in ("int8", "bf16", "fp32")},
            "cache": max(peaks["cache copy"], peaks["cache sum"]),
            "memory": max(peaks["memory copy"], peaks["memory sum"]),
        },
        "points": points,
    }


def _best(calls: dict[str, Timed], repeats: int) -> dict[str, tuple[float, float]]:
    """What each call does and the seconds of its fastest run."""
    functions = [call for _, call in calls.values()]
    interleaved(functions, 1)
    runs = interleaved(functions, repeats)
    return {name: (amount, min(times)) for (name, (amount, _)), times in zip(calls.items(), runs, strict=True)}


def _probes() -> dict[str, Timed]:
    operations = 2.0 * SIDE**3
    a, b = torch.randn(2, SIDE, SIDE)
    a8, b8 = torch.randint(-127, 128, (2, SIDE, SIDE), dtype=torch.int8)
    probes: dict[str, Timed] = {
        "fp32": (operations, partial(torch.mm, a, b)),
        "bf16": (operations, partial(torch.mm, a.bfloat16(), b.bfloat16())),
        "int8": (operations, partial(torch._int_mm, a8, b8)),
    }
    for name, size, number in (("memory", MEMORY_BYTES, 1), ("cache", CACHE_BYTES, 16)):
        x, y = torch.ones(2, size // 4)
        probes[f"{name} copy"] = (2.0 * size * number, partial(_times, number, partial(y.copy_, x)))
        probes[f"{name} sum"] = (float(size) * number, partial(_times, number, x.sum))
    return probes


def _times(number: int, call: Callable[[], object]) -> None:
    """Often enough that what is in a cache is there."""
    for _ in range(number):
        call()


def _point(name: str, kind: str, operations: float, moved: float, seconds: float) -> dict[str, Any]:
    return {
        "name": name,
        "kind": kind,
        "intensity": operations / moved,
        "gops": operations / seconds / 1e9,
        "seconds": seconds,
    }


def _normals(heads: int, tokens: int, dim: int, number: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, heads, tokens, dim, generator=generator) for _ in range(number)]


def _bytes(*tensors: Tensor) -> float:
    return float(sum(tensor.nbytes for tensor in tensors))


def _attention(length: int, dim: int, repeats: int) -> list[dict[str, Any]]:
    q, k, v = _normals(HEADS, length, dim, 3)
    packed = pack_kv(k, v)
    operations = 4.0 * HEADS * length * length * dim
    calls: dict[str, Timed] = {f"full, d={dim}": (operations, partial(attend, q, k, v))}
    for density in DENSITIES:
        mask = random_mask(length, density, torch.Generator().manual_seed(0), heads=HEADS)
        name = f"int8, d={dim}" + (f", density {density:g}" if density < 1 else "")
        calls[name] = (operations * mask.density(), partial(attend, q, packed, None, mask))
    points = []
    for name, (done, seconds) in _best(calls, repeats).items():
        kind = "full" if name.startswith("full") else "int8"
        inputs = (k, v) if kind == "full" else packed.tensors
        points.append(_point(name, kind, done, _bytes(q, q, *inputs), seconds))
    return points


def _decoding(repeats: int) -> list[dict[str, Any]]:
    (heads, kv_heads), dim = DECODE_HEADS, 64
    (q,), (k, v) = _normals(heads, 1, dim, 1), _normals(kv_heads, DECODED, dim, 2)
    packed = pack_kv(k, v)
    operations = 4.0 * heads * DECODED * dim
    full, int8 = f"decoding {heads}:{kv_heads}, full", f"decoding {heads}:{kv_heads}, packed"
    calls: dict[str, Timed] = {
        full: (operations, partial(attend, q, k, v)),
        int8: (operations, partial(attend, q, packed, None)),
    }
    best = _best(calls, 3 * repeats)
    return [
        _point(full, "full", operations, _bytes(q, q, k, v), best[full][1]),
        _point(int8, "int8", operations, _bytes(q, q, *packed.tensors), best[int8][1]),
    ]


def _preparing(length: int, repeats: int) -> list[dict[str, Any]]:
    dim = 64
    q, k, v = _normals(HEADS, length, dim, 3)
    mask = Sparge(similarity=-1.0)(q, k, block_size=BLOCK_SIZE)
    pairs = mask.grid[0] * mask.grid[1]
    predict = float(PREDICT * (q.numel() + k.numel()) + 2 * HEADS * pairs * dim)
    pack = float(PACK * (k.numel() + v.numel()))
    calls: dict[str, Timed] = {
        "prediction": (predict, partial(Sparge(similarity=-1.0), q, k, block_size=BLOCK_SIZE)),
        "packing": (pack, partial(pack_kv, k, v)),
    }
    best = _best(calls, 3 * repeats)
    return [
        _point("prediction", "full", predict, _bytes(q, k, mask.kv_indices), best["prediction"][1]),
        _point("packing", "full", pack, _bytes(k, v, *pack_kv(k, v).tensors), best["packing"][1]),
    ]


def roof(peaks: dict[str, float], point: dict[str, Any]) -> float:
    """1e9 operations a second that a kernel of this intensity could reach with its data in the shared cache."""
    most, fed = peaks["int8" if point["kind"] == "int8" else "fp32"], peaks["cache"] * float(point["intensity"])
    return min(most, fed)


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    peaks = result["peaks"]
    lines = [
        f"peaks: int8 {peaks['int8']:.0f}, bf16 {peaks['bf16']:.0f}, fp32 {peaks['fp32']:.0f} GOPS; "
        f"shared cache {peaks['cache']:.0f}, memory {peaks['memory']:.0f} GB/s",
        f"{'':26}{'ops/byte':>10}{'GOPS':>8}{'of roof':>9}",
    ]
    for point in result["points"]:
        share = point["gops"] / roof(peaks, point)
        lines.append(f"{point['name']:26}{point['intensity']:10.1f}{point['gops']:8.1f}{share:9.0%}")
    return "\n".join(lines)
