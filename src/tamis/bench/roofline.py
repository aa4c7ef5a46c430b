"""The roofline of this machine: what bounds a kernel of so many operations a byte, and where ours are.

Roofs are measured, not read from a data sheet: torch's own products (fp32, bf16, and `torch._int_mm` for int8) and the
faster of its copy and its sum, on all threads. They are what a good library reaches; the processor may do more.

A multiply-add is two operations. Of attention the two products count and no exponential; of prediction and packing the
floating-point operations of each entry. Bytes are those that must move at least once: inputs as they come (fp32, or a
`PackedKV`) and the result. What is read again, from a cache or not, does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

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
    """Peaks in 1e9 operations or bytes a second, and points; all in turn, each from the best of its runs.

    In turn, so that roofs and points meet the same machine where others use it too.
    """
    probes, kernels = _probes(), [*_attention(length, 64), *_attention(length, 128), *_decoding(), *_preparing(length)]
    calls = [*(call for _, call in probes.values()), *(kernel.call for kernel in kernels)]
    interleaved(calls, 1)
    best = [min(runs) for runs in interleaved(calls, 2 * repeats)]
    peaks = {name: amount / seconds / 1e9 for (name, (amount, _)), seconds in zip(probes.items(), best, strict=False)}
    return {
        "peaks": {
            **{name: peaks[name] for name in ("int8", "bf16", "fp32")},
            "cache": max(peaks["cache copy"], peaks["cache sum"]),
            "memory": max(peaks["memory copy"], peaks["memory sum"]),
        },
        "points": [kernel.point(seconds) for kernel, seconds in zip(kernels, best[len(probes) :], strict=True)],
    }


class Kernel(NamedTuple):
    """What is measured: `kind` says for which roof it strives, `moved` are bytes."""

    name: str
    kind: str
    operations: float
    moved: float
    call: Callable[[], object]

    def point(self, seconds: float) -> dict[str, Any]:
        """Its place in the picture."""
        return {
            "name": self.name,
            "kind": self.kind,
            "intensity": self.operations / self.moved,
            "gops": self.operations / seconds / 1e9,
            "seconds": seconds,
        }


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


def _normals(heads: int, tokens: int, dim: int, number: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, heads, tokens, dim, generator=generator) for _ in range(number)]


def _bytes(*tensors: Tensor) -> float:
    return float(sum(tensor.nbytes for tensor in tensors))


def _attention(length: int, dim: int) -> Iterator[Kernel]:
    q, k, v = _normals(HEADS, length, dim, 3)
    packed = pack_kv(k, v)
    operations = 4.0 * HEADS * length * length * dim
    yield Kernel(f"full, d={dim}", "full", operations, _bytes(q, q, k, v), partial(attend, q, k, v))
    for density in DENSITIES:
        mask = random_mask(length, density, torch.Generator().manual_seed(0), heads=HEADS)
        name = f"int8, d={dim}" + (f", density {density:g}" if density < 1 else "")
        call = partial(attend, q, packed, None, mask)
        yield Kernel(name, "int8", operations * mask.density(), _bytes(q, q, *packed.tensors), call)


def _decoding() -> Iterator[Kernel]:
    (heads, kv_heads), dim = DECODE_HEADS, 64
    (q,), (k, v) = _normals(heads, 1, dim, 1), _normals(kv_heads, DECODED, dim, 2)
    packed = pack_kv(k, v)
    operations, name = 4.0 * heads * DECODED * dim, f"decoding {heads}:{kv_heads}"
    yield Kernel(f"{name}, full", "full", operations, _bytes(q, q, k, v), partial(attend, q, k, v))
    moved = _bytes(q, q, *packed.tensors)
    yield Kernel(f"{name}, packed", "int8", operations, moved, partial(attend, q, packed, None))


def _preparing(length: int) -> Iterator[Kernel]:
    q, k, v = _normals(HEADS, length, 64, 3)
    predict = partial(Sparge(similarity=-1.0), q, k, block_size=BLOCK_SIZE)
    mask = predict()
    scores = 2.0 * HEADS * mask.grid[0] * mask.grid[1] * 64
    operations = PREDICT * (q.numel() + k.numel()) + scores
    yield Kernel("prediction", "full", operations, _bytes(q, k, mask.kv_indices), predict)
    moved = _bytes(k, v, *pack_kv(k, v).tensors)
    yield Kernel("packing", "full", float(PACK * (k.numel() + v.numel())), moved, partial(pack_kv, k, v))


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
