"""Values as attention multiplies them: in e4m3, v8 = v / v_scale by channel, or with 0 for what is not finite.

The scales are those of kernels/pool.py. A value that is not finite is NaN in e4m3, and a channel of zeros gives 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tamis.backends.triton.kernels.pool import _counted, _finite


@triton.jit(do_not_specialize=["length", "heads", "stride_segment"])
def value_fp8_kernel(
    v,
    segments,
    used,
    scales,
    v8,
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
    LARGEST: tl.constexpr,
    SHUFFLED: tl.constexpr,
):
    """A tile of values in fp8, keys contiguous as 8-bit matrix units want them; grid (tiles * batch * heads,).

    SHUFFLED: of 16 keys those at 2t, 2t + 1, 8 + 2t and 9 + 2t become 4t .. 4t + 3: the order in which sm_90 leaves
    the scores of a row in a thread's registers, and wants the weights.
    """
    tiles = tl.cdiv(length, TILE)
    tile, head = (tl.program_id(0) % tiles).to(tl.int64), (tl.program_id(0) // tiles).to(tl.int64)
    batch = head // heads
    base = v + batch * stride_b + (head % heads) * stride_h
    d = tl.arange(0, DIM_PAD).to(tl.int64)
    places = tile * TILE + tl.arange(0, TILE)
    rows = places
    if SHUFFLED:
        rows = (places & -15) | ((places >> 1) & 1) * 8 | ((places >> 2) & 3) * 2
    counted = _counted(rows, length, segments, stride_segment, batch)
    if used is not None:
        counted = counted & (tl.load(used + head * tiles + tile) != 0)
    at = base + rows[:, None] * stride_n + d[None, :] * stride_d
    values = tl.load(at, mask=counted[:, None] & (d < DIM)[None, :], other=0.0).to(tl.float32)
    inverse = 1.0 / tl.load(scales + head * DIM_PAD + d)
    inverse = tl.where(_finite(inverse), inverse, 0.0)
    # A broken value stays one: e4m3 has a NaN, which infinities become too.
    scaled = tl.minimum(tl.maximum(values * inverse[None, :], -LARGEST), LARGEST)
    scaled = tl.where(_finite(values), scaled, float("nan"))
    place = v8 + (head * DIM_PAD + d)[None, :] * (tiles * TILE) + places[:, None]
    tl.store(place, scaled.to(v8.dtype.element_ty))


@triton.jit(do_not_specialize=["length", "heads"])
def sound_values_kernel(
    v,
    sound,
    flags,
    stride_b,
    stride_h,
    stride_n,
    stride_d,
    length,
    heads,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
):
    """Copy a tile of values that are not all finite, with 0 for those, and say so; grid (tiles * batch * heads,).

    The copy is `[batch * heads, length, WIDTH]`, flags are int32 `[batch * heads, tiles]`. Other tiles stay as they
    are: few calls have any to copy, and to write them all would take as long as to read them.
    """
    tiles = tl.cdiv(length, TILE)
    tile, head = (tl.program_id(0) % tiles).to(tl.int64), (tl.program_id(0) // tiles).to(tl.int64)
    base = v + (head // heads) * stride_b + (head % heads) * stride_h
    rows, d = tile * TILE + tl.arange(0, TILE), tl.arange(0, DIM_PAD).to(tl.int64)
    inside = (rows < length)[:, None] & (d < DIM)[None, :]
    values = tl.load(base + rows[:, None] * stride_n + d[None, :] * stride_d, mask=inside, other=0.0)
    finite = _finite(values.to(tl.float32))
    flag = tl.max(tl.max((~finite).to(tl.int32), 1), 0)
    place = (head * length + rows)[:, None] * WIDTH + d[None, :]
    tl.store(sound + place, tl.where(finite, values, 0.0), mask=inside & (flag > 0))
    tl.store(flags + head * tiles + tile, flag)
