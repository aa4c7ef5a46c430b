"""Everything that is read off query, key and value before attention, in one pass over each.

    mean    = mean of the keys of a head that are finite, of a segment >= 0 and in a used tile
    x'      = x - mean (keys), x (queries)
    pooled  = mean of x' over a block, similarity = |mean of x' / |x'| over the block|^2
    x8      = round(127 x' / max|x'|), one scale per query row, one per 64 keys
    shift   = q . mean: what smoothing takes from every score of a row
    v8      = v * 448 / max|v| in e4m3, one scale per channel

Rows of a negative segment are padding: they count for nothing. A row, tile or channel of zeros has scale 0 and gives 0;
one that holds an infinity or a NaN has scale NaN, so that whoever reads it sees it.
"""

from __future__ import annotations

import triton
import triton.language as tl

_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding and subtracting it rounds to the nearest integer, ties to even


@triton.jit
def _finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def _counted(rows, length, segments, stride_segment, batch):
    """Rows that exist and are no padding."""
    counted = rows < length
    if segments is not None:
        counted = counted & (tl.load(segments + batch * stride_segment + rows, mask=counted, other=-1) >= 0)
    return counted


@triton.jit
def _rounded(x, inverse, finite):
    """x * inverse as int8; 0 where x is broken, or the inverse is (the largest entry is 0 or next to it)."""
    whole = (tl.where(finite & _finite(inverse), x * inverse, 0.0) + _ROUND) - _ROUND
    return tl.minimum(tl.maximum(whole, -127.0), 127.0).to(tl.int8)


@triton.jit(do_not_specialize=["length", "heads", "tiles", "stride_segment"])
def key_mean_kernel(
    x,
    segments,
    used,
    part_mean,
    part_count,
    stride_b,
    stride_h,
    stride_n,
    stride_d,
    stride_segment,
    length,
    heads,
    tiles,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    """Mean and number of the counting keys of a chunk of tiles; grid (chunks * batch * heads,)."""
    chunks = tl.cdiv(tiles, TILES)
    chunk, head = tl.program_id(0) % chunks, (tl.program_id(0) // chunks).to(tl.int64)
    batch = head // heads
    base = x + batch * stride_b + (head % heads) * stride_h
    d = tl.arange(0, DIM_PAD).to(tl.int64)
    mean = tl.zeros([DIM_PAD], tl.float32)
    total = 0.0
    for tile in range(chunk * TILES, tl.minimum(tiles, (chunk + 1) * TILES)):
        rows = tile * TILE + tl.arange(0, TILE).to(tl.int64)
        counted = _counted(rows, length, segments, stride_segment, batch)
        if used is not None:
            counted = counted & (tl.load(used + head * tiles + tile) != 0)
        at = base + rows[:, None] * stride_n + d[None, :] * stride_d
        values = tl.load(at, mask=counted[:, None] & (d < DIM)[None, :], other=0.0).to(tl.float32)  # [TILE, DIM_PAD]
        counted = counted & (tl.max((~_finite(values)).to(tl.int32), 1) == 0)
        number = tl.sum(counted.to(tl.float32), 0)
        # Weighted before it is summed: the sum of keys near the end of the fp32 range does not fit there.
        share = tl.where(number > 0, 1.0 / tl.maximum(number, 1.0), 0.0)
        of_tile = tl.sum(tl.where(counted[:, None], values, 0.0) * share, 0)
        weight = number / tl.maximum(total + number, 1.0)
        mean = mean * (1.0 - weight) + of_tile * weight
        total += number
    place = head * chunks + chunk
    tl.store(part_mean + place * DIM + d, mean, mask=d < DIM)
    tl.store(part_count + place, total)


@triton.jit(do_not_specialize=["chunks"])
def join_means_kernel(part_mean, part_count, mean, chunks, DIM: tl.constexpr, DIM_PAD: tl.constexpr):
    """The mean over all chunks, in their order; grid (batch * heads,)."""
    head = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, DIM_PAD).to(tl.int64)
    total = 0.0
    for chunk in range(chunks):
        total += tl.load(part_count + head * chunks + chunk)
    joined = tl.zeros([DIM_PAD], tl.float32)
    for chunk in range(chunks):
        weight = tl.load(part_count + head * chunks + chunk) / tl.maximum(total, 1.0)
        joined += tl.load(part_mean + (head * chunks + chunk) * DIM + d, mask=d < DIM, other=0.0) * weight
    tl.store(mean + head * DIM + d, joined, mask=d < DIM)


@triton.jit(do_not_specialize=["length", "heads", "mean_heads", "blocks", "stride_segment"])
def summarize_kernel(
    x,
    mean,
    shift_mean,
    segments,
    pooled,
    similarity,
    x8,
    scales,
    shifts,
    stride_b,
    stride_h,
    stride_n,
    stride_d,
    stride_segment,
    length,
    heads,
    mean_heads,
    blocks,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    GRAIN: tl.constexpr,
):
    """Pool a block, and quantise it with one scale per GRAIN rows; grid (blocks * batch * heads,).

    Of the outputs, those that are None are not wanted. `x8` is `[batch * heads, blocks * BLOCK, WIDTH]` for keys,
    whose tail is filled with zeros, and `[.., length, WIDTH]` for queries (GRAIN 1), which need none.
    """
    block, head = (tl.program_id(0) % blocks).to(tl.int64), (tl.program_id(0) // blocks).to(tl.int64)
    batch = head // heads
    base = x + batch * stride_b + (head % heads) * stride_h
    rows = block * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, DIM_PAD).to(tl.int64)
    counted = _counted(rows, length, segments, stride_segment, batch)
    inside = (rows < length)[:, None] & (d < DIM)[None, :]
    values = tl.load(base + rows[:, None] * stride_n + d[None, :] * stride_d, mask=inside, other=0.0).to(tl.float32)
    if shifts is not None:
        group = heads // mean_heads
        of_head = batch * mean_heads + (head % heads) // group
        against = tl.load(shift_mean + of_head * DIM + d, mask=d < DIM, other=0.0)
        tl.store(shifts + head * length + rows, tl.sum(values * against[None, :], 1), mask=rows < length)
    if mean is not None:
        values = values - tl.load(mean + head * DIM + d, mask=d < DIM, other=0.0)[None, :]
    values = tl.where(counted[:, None], values, 0.0)
    finite = _finite(values)
    row_broken = tl.max((~finite).to(tl.int32), 1)
    row_top = tl.max(tl.where(finite, tl.abs(values), 0.0), 1)

    if pooled is not None:
        number = tl.maximum(tl.sum(counted.to(tl.float32), 0), 1.0)
        broken = tl.max(row_broken, 0) > 0
        place = head * blocks + block
        of_block = tl.where(broken, float("nan"), tl.sum(values, 0) / number)
        tl.store(pooled + place * DIM + d, of_block, mask=d < DIM)
        # Divided by the largest entry first: then the squares neither overflow nor vanish.
        near_one = tl.where((row_top > 0)[:, None], values / row_top[:, None], 0.0)
        length2 = tl.sum(near_one * near_one, 1)
        unit = tl.where((row_top > 0)[:, None], near_one / tl.sqrt(length2)[:, None], 0.0)
        direction = tl.sum(unit, 0) / number
        alike = tl.sum(direction * direction, 0)
        empty = tl.sum(counted.to(tl.int32), 0) == 0
        tl.store(similarity + place, tl.where(broken, float("nan"), tl.where(empty, 1.0, alike)))

    if x8 is not None:
        if GRAIN == 1:
            whole = _rounded(values, (127.0 / row_top)[:, None], finite)
            scale = tl.where(row_broken > 0, float("nan"), row_top / 127.0)
            at = x8 + (head * length + rows)[:, None] * WIDTH + d[None, :]
            tl.store(at, whole, mask=(rows < length)[:, None] & (d < WIDTH)[None, :])
            tl.store(scales + head * length + rows, scale, mask=rows < length)
        else:
            PARTS: tl.constexpr = BLOCK // GRAIN
            top = tl.max(tl.reshape(row_top, [PARTS, GRAIN]), 1)
            inverse = tl.reshape(tl.broadcast_to((127.0 / top)[:, None], [PARTS, GRAIN]), [BLOCK])
            whole = _rounded(values, inverse[:, None], finite)
            at = x8 + (head * blocks * BLOCK + rows)[:, None] * WIDTH + d[None, :]
            tl.store(at, whole, mask=(d < WIDTH)[None, :])
            bad = tl.max(tl.reshape(row_broken, [PARTS, GRAIN]), 1) > 0
            place = (head * blocks + block) * PARTS + tl.arange(0, PARTS)
            tl.store(scales + place, tl.where(bad, float("nan"), top / 127.0))


@triton.jit(do_not_specialize=["length", "heads", "tiles", "stride_segment"])
def value_top_kernel(
    v,
    segments,
    used,
    part_top,
    stride_b,
    stride_h,
    stride_n,
    stride_d,
    stride_segment,
    length,
    heads,
    tiles,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    """Largest finite |v| of every channel in a chunk of tiles; grid (chunks * batch * heads,)."""
    chunks = tl.cdiv(tiles, TILES)
    chunk, head = tl.program_id(0) % chunks, (tl.program_id(0) // chunks).to(tl.int64)
    batch = head // heads
    base = v + batch * stride_b + (head % heads) * stride_h
    d = tl.arange(0, DIM_PAD).to(tl.int64)
    top = tl.zeros([DIM_PAD], tl.float32)
    for tile in range(chunk * TILES, tl.minimum(tiles, (chunk + 1) * TILES)):
        rows = tile * TILE + tl.arange(0, TILE).to(tl.int64)
        counted = _counted(rows, length, segments, stride_segment, batch)
        if used is not None:
            counted = counted & (tl.load(used + head * tiles + tile) != 0)
        at = base + rows[:, None] * stride_n + d[None, :] * stride_d
        values = tl.abs(tl.load(at, mask=counted[:, None] & (d < DIM)[None, :], other=0.0).to(tl.float32))
        top = tl.maximum(top, tl.max(tl.where(_finite(values), values, 0.0), 0))
    tl.store(part_top + (head * chunks + chunk) * DIM + d, top, mask=d < DIM)


@triton.jit(do_not_specialize=["length", "heads", "chunks", "stride_segment"])
def value_fp8_kernel(
    v,
    segments,
    used,
    part_top,
    v8,
    scales,
    stride_b,
    stride_h,
    stride_n,
    stride_d,
    stride_segment,
    length,
    heads,
    chunks,
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
    top = tl.zeros([DIM_PAD], tl.float32)
    for chunk in range(chunks):
        top = tl.maximum(top, tl.load(part_top + (head * chunks + chunk) * DIM + d, mask=d < DIM, other=0.0))
    places = tile * TILE + tl.arange(0, TILE)
    rows = places
    if SHUFFLED:
        rows = (places & -15) | ((places >> 1) & 1) * 8 | ((places >> 2) & 3) * 2
    counted = _counted(rows, length, segments, stride_segment, batch)
    if used is not None:
        counted = counted & (tl.load(used + head * tiles + tile) != 0)
    at = base + rows[:, None] * stride_n + d[None, :] * stride_d
    values = tl.load(at, mask=counted[:, None] & (d < DIM)[None, :], other=0.0).to(tl.float32)
    inverse = LARGEST / top
    # A broken value stays one: e4m3 has a NaN, which infinities become too.
    scaled = tl.where(_finite(inverse)[None, :], values * inverse[None, :], 0.0)
    scaled = tl.where(_finite(values), tl.minimum(tl.maximum(scaled, -LARGEST), LARGEST), float("nan"))
    place = v8 + (head * DIM_PAD + d)[None, :] * (tiles * TILE) + places[:, None]
    tl.store(place, scaled.to(v8.dtype.element_ty))
    if tile == 0:
        tl.store(scales + head * DIM_PAD + d, top / LARGEST)


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
    """Copy a tile of values with 0 for those that are not finite, and say whether there were; (tiles * batch * heads,).

    The copy is `[batch * heads, length, WIDTH]`, flags are int32 `[batch * heads, tiles]`.
    """
    tiles = tl.cdiv(length, TILE)
    tile, head = (tl.program_id(0) % tiles).to(tl.int64), (tl.program_id(0) // tiles).to(tl.int64)
    base = v + (head // heads) * stride_b + (head % heads) * stride_h
    rows, d = tile * TILE + tl.arange(0, TILE), tl.arange(0, DIM_PAD).to(tl.int64)
    inside = (rows < length)[:, None] & (d < DIM)[None, :]
    values = tl.load(base + rows[:, None] * stride_n + d[None, :] * stride_d, mask=inside, other=0.0)
    finite = _finite(values.to(tl.float32))
    tl.store(sound + (head * length + rows)[:, None] * WIDTH + d[None, :], tl.where(finite, values, 0.0), mask=inside)
    tl.store(flags + head * tiles + tile, tl.max(tl.max((~finite).to(tl.int32), 1), 0))
