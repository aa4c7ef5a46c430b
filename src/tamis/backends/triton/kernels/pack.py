"""Values in int8 with a scale per channel and 64 keys, in the layout of `PackedKV`."""

from __future__ import annotations

import triton
import triton.language as tl

from tamis.backends.triton.kernels.pool import _counted, _finite, _inverse, _rounded


@triton.jit(do_not_specialize=["length", "heads", "stride_segment"])
def value_int8_kernel(
    v,
    segments,
    v8,
    scales,
    sums,
    stride_b,
    stride_h,
    stride_n,
    stride_d,
    stride_segment,
    length,
    heads,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    TILE: tl.constexpr,
):
    """A tile of values, `[DIM, TILE]`, its scales and its sums over the keys; grid (tiles * batch * heads,)."""
    tiles = tl.cdiv(length, TILE)
    tile, head = (tl.program_id(0) % tiles).to(tl.int64), (tl.program_id(0) // tiles).to(tl.int64)
    batch = head // heads
    base = v + batch * stride_b + (head % heads) * stride_h
    n, d = tl.arange(0, TILE), tl.arange(0, DIM_PAD).to(tl.int64)
    rows = tile * TILE + n
    counted = _counted(rows, length, segments, stride_segment, batch)
    at = base + rows[:, None] * stride_n + d[None, :] * stride_d
    values = tl.load(at, mask=counted[:, None] & (d < DIM)[None, :], other=0.0).to(tl.float32)
    finite = _finite(values)
    broken = tl.max((~finite).to(tl.int32), 0) > 0
    values = tl.where(finite, values, 0.0)
    top = tl.max(tl.abs(values), 0)
    whole = _rounded(values, _inverse(top)[None, :])
    place = head * tiles + tile
    tl.store(v8 + (place * DIM + d)[None, :] * TILE + n[:, None], whole, mask=(d < DIM)[None, :])
    tl.store(scales + place * DIM + d, tl.where(broken, float("nan"), top / 127.0), mask=d < DIM)
    tl.store(sums + place * DIM + d, tl.sum(whole.to(tl.int32), 0), mask=d < DIM)


@triton.jit
def key_sums_kernel(k8, sums, DIM_PAD: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr):
    """Sums of the rows of packed keys, which unsigned products need; grid (tiles,)."""
    rows = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    d = tl.arange(0, DIM_PAD)
    whole = tl.load(k8 + rows[:, None] * DIM + d[None, :], mask=(d < DIM)[None, :], other=0)
    tl.store(sums + rows, tl.sum(whole.to(tl.int32), 1))
