"""Everything that is read off query and key before attention, and how large values are.

`columns_kernel` goes over key, value or both, for what the whole sequence decides, and `join_kernel` puts its parts
together:

    mean    = mean of the keys of a head that are finite, of a segment >= 0 and in a used tile
    v_scale = max|v| / 448 of a channel, over the same tiles

`digest_kernel` goes over query and key:

    x'      = x - mean (keys), x (queries)
    pooled  = mean of x' over a block, similarity = |mean of x' / |x'| over the block|^2
    x8      = round(127 x' / max|x'|), one scale per query row, one per 64 keys
    shift   = q . mean: what smoothing takes from every score of a row

Rows of a negative segment are padding: they count for nothing. A row, tile or channel of zeros has scale 0 and gives 0;
a row or tile that holds an infinity or a NaN has scale NaN, so that whoever reads it sees it.

Memory is what these kernels wait for: at 2 to 3 bytes an entry a GPU has about 20 instructions for each. Hence rows are
judged by one maximum over their bits, divisions are by row and not by entry, and blocks of 128 rows are read by halves,
so that several programs share a processor. No sum depends on which program ends first. `tamis.bench.gpu_traffic` has
the bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl

_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23: in the last bits of a sum with it is the nearest integer, ties to even
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_INFINITY = tl.constexpr(0x7F800000)
_SMALLEST = tl.constexpr(2.0**-126)


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
def _row_bits(values):
    """Largest magnitude of each row, as bits: their order is that of the numbers, with NaN above infinity."""
    return tl.max(values.to(tl.int32, bitcast=True) & _MAGNITUDE, 1)


@triton.jit
def _settled(values, counted):
    """Values with 0 in rows that do not count or are broken, the largest magnitude of each row, and the broken rows."""
    bits = _row_bits(values)
    broken = counted & (bits >= _INFINITY)
    counted = counted & (bits < _INFINITY)
    return tl.where(counted[:, None], values, 0.0), tl.where(counted, bits, 0).to(tl.float32, bitcast=True), broken


@triton.jit
def _inverse(top):
    """127 / top; 0 where top is 0 or next to it."""
    inverse = 127.0 / top
    return tl.where(_finite(inverse), inverse, 0.0)


@triton.jit
def _rounded(x, inverse):
    """Finite x * inverse, at most 127, as int8."""
    return (x * inverse + _ROUND).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit(do_not_specialize=["length", "heads", "tiles", "stride_segment"])
def columns_kernel(
    k,
    v,
    segments,
    used,
    sums,
    counts,
    tops,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_vd,
    stride_segment,
    length,
    heads,
    tiles,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    """Of a chunk of tiles, the sum of the keys that count / (TILES * TILE), their number, and the largest finite |v|.

    Grid (chunks * batch * heads,). Of k and v, one may be None.
    """
    chunks = tl.cdiv(tiles, TILES)
    chunk, head = tl.program_id(0) % chunks, (tl.program_id(0) // chunks).to(tl.int64)
    batch = head // heads
    n, d, e = tl.arange(0, TILE), tl.arange(0, DIM_PAD), tl.arange(0, VALUE_PAD)
    total = tl.zeros([TILE, DIM_PAD], tl.float32)
    number = tl.zeros([TILE], tl.int32)
    top = tl.zeros([TILE, VALUE_PAD], tl.float32)
    for part in range(TILES):
        tile = chunk * TILES + part
        first = tile.to(tl.int64) * TILE
        counted = _counted(first + n, length, segments, stride_segment, batch)
        if used is not None:
            counted = counted & (tl.load(used + head * tiles + tile, mask=tile < tiles, other=0) != 0)
        if k is not None:
            base = k + batch * stride_kb + (head % heads) * stride_kh
            at = base + (first + n)[:, None] * stride_kn + d.to(tl.int64)[None, :] * stride_kd
            keys = tl.load(at, mask=counted[:, None] & (d < DIM)[None, :], other=0.0).to(tl.float32)
            counts_too = counted & (_row_bits(keys) < _INFINITY)
            # Divided before it is summed: the sum of keys near the end of the fp32 range does not fit there.
            total += tl.where(counts_too[:, None], keys, 0.0) * (1.0 / (TILES * TILE))
            number += counts_too.to(tl.int32)
        if v is not None:
            base = v + batch * stride_vb + (head % heads) * stride_vh
            at = base + (first + n)[:, None] * stride_vn + e.to(tl.int64)[None, :] * stride_vd
            values = tl.abs(tl.load(at, mask=counted[:, None] & (e < VALUE_DIM)[None, :], other=0.0).to(tl.float32))
            top = tl.maximum(top, tl.where(_finite(values), values, 0.0))
    place = head * chunks + chunk
    if k is not None:
        tl.store(sums + place * DIM + d, tl.sum(total, 0), mask=d < DIM)
        tl.store(counts + place, tl.sum(number, 0))
    if v is not None:
        tl.store(tops + place * VALUE_DIM + e, tl.max(top, 0), mask=e < VALUE_DIM)


@triton.jit(do_not_specialize=["chunks", "slices"])
def join_kernel(
    sums,
    counts,
    tops,
    mean,
    scales,
    chunks,
    slices,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    CHUNK_KEYS: tl.constexpr,
    LARGEST: tl.constexpr,
    STEP: tl.constexpr,
    SLICE: tl.constexpr,
):
    """Mean key and scale of value over all chunks; a program has SLICE channels. Grid (slices * batch * heads,)."""
    slice_at, head = tl.program_id(0) % slices, (tl.program_id(0) // slices).to(tl.int64)
    d = slice_at * SLICE + tl.arange(0, SLICE)
    total = tl.zeros([STEP, SLICE], tl.float32)
    number = tl.zeros([STEP], tl.int32)
    top = tl.zeros([STEP, SLICE], tl.float32)
    share = 1.0 / tl.maximum(chunks, 1).to(tl.float32)
    for first in range(0, chunks, STEP):
        chunk = first + tl.arange(0, STEP)
        place, there = head * chunks + chunk, chunk < chunks
        if sums is not None:
            at = sums + place[:, None] * DIM + d[None, :]
            total += tl.load(at, mask=there[:, None] & (d < DIM)[None, :], other=0.0) * share
            number += tl.load(counts + place, mask=there, other=0)
        if tops is not None:
            at = tops + place[:, None] * VALUE_DIM + d[None, :]
            top = tl.maximum(top, tl.load(at, mask=there[:, None] & (d < VALUE_DIM)[None, :], other=0.0))
    if sums is not None:
        many = tl.maximum(tl.sum(number, 0), 1).to(tl.float32)
        tl.store(mean + head * DIM + d, tl.sum(total, 0) * (CHUNK_KEYS / (share * many)), mask=d < DIM)
    if tops is not None:
        tl.store(scales + head * VALUE_PAD + d, tl.max(top, 0) / LARGEST, mask=d < VALUE_PAD)


@triton.jit
def _directions(values, row_top):
    """Sum of the rows, each divided by its length; rows of zeros give zeros."""
    # Divided by the largest entry first: then the squares neither overflow nor vanish.
    near_one = values * (1.0 / tl.maximum(row_top, _SMALLEST))[:, None]
    length = tl.sqrt(tl.sum(near_one * near_one, 1))
    return tl.sum(near_one * tl.where(row_top > 0, 1.0 / length, 0.0)[:, None], 0)


@triton.jit
def _pool(total, direction, number, bad, pooled, similarity, place, d, DIM: tl.constexpr):
    """Store the mean of a block's rows, and the squared length of the mean of their directions."""
    many = tl.maximum(number, 1).to(tl.float32)
    tl.store(pooled + place * DIM + d, tl.where(bad > 0, float("nan"), total / many), mask=d < DIM)
    direction = direction / many
    alike = tl.where(number == 0, 1.0, tl.sum(direction * direction, 0))
    tl.store(similarity + place, tl.where(bad > 0, float("nan"), alike))


@triton.jit
def _digest_queries(
    block, head, blocks, q, mean, segments, pooled, similarity, x8, scales, shifts,
    stride_b, stride_h, stride_n, stride_d, stride_segment, length, heads, mean_heads,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A block of queries; x8 is `[batch * heads, length, WIDTH]`."""
    batch, n, d = head // heads, tl.arange(0, TILE), tl.arange(0, DIM_PAD)
    base = q + batch * stride_b + (head % heads) * stride_h
    number, bad = 0, 0
    total, direction = tl.zeros([DIM_PAD], tl.float32), tl.zeros([DIM_PAD], tl.float32)
    for part in range(BLOCK // TILE):
        first = block * BLOCK + part * TILE
        there = first + n < length
        counted = _counted(first + n, length, segments, stride_segment, batch)
        at = base + (first + n)[:, None] * stride_n + d.to(tl.int64)[None, :] * stride_d
        values = tl.load(at, mask=there[:, None] & (d < DIM)[None, :], other=0.0).to(tl.float32)  # [TILE, DIM_PAD]
        place = head * length + first
        if shifts is not None:
            of_head = batch * mean_heads + (head % heads) // (heads // mean_heads)
            against = tl.load(mean + of_head * DIM + d, mask=d < DIM, other=0.0)
            tl.store(shifts + place + n, tl.sum(values * against[None, :], 1), mask=there)
        values, row_top, broken = _settled(values, counted)
        if x8 is not None:
            whole = _rounded(values, _inverse(row_top)[:, None])
            at = x8 + place * WIDTH + (n[:, None] * WIDTH + d[None, :])
            tl.store(at, whole, mask=there[:, None] & (d < WIDTH)[None, :])
            tl.store(scales + place + n, tl.where(broken, float("nan"), row_top / 127.0), mask=there)
        if pooled is not None:
            number += tl.sum(counted.to(tl.int32), 0)
            bad += tl.sum(broken.to(tl.int32), 0)
            total += tl.sum(values, 0)
            direction += _directions(values, row_top)
    if pooled is not None:
        _pool(total, direction, number, bad, pooled, similarity, head * blocks + block, d, DIM)


@triton.jit
def _digest_keys(
    block, head, blocks, k, mean, segments, pooled, similarity, x8, scales,
    stride_b, stride_h, stride_n, stride_d, stride_segment, length, heads,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A block of keys; x8 is `[batch * heads, blocks * BLOCK, WIDTH]`, with zeros behind the last key."""
    batch, n, d = head // heads, tl.arange(0, TILE), tl.arange(0, DIM_PAD)
    base = k + batch * stride_b + (head % heads) * stride_h
    number, bad = 0, 0
    total, direction = tl.zeros([DIM_PAD], tl.float32), tl.zeros([DIM_PAD], tl.float32)
    for part in range(BLOCK // TILE):
        first = block * BLOCK + part * TILE
        counted = _counted(first + n, length, segments, stride_segment, batch)
        at = base + (first + n)[:, None] * stride_n + d.to(tl.int64)[None, :] * stride_d
        values = tl.load(at, mask=(first + n < length)[:, None] & (d < DIM)[None, :], other=0.0).to(tl.float32)
        if mean is not None:
            values = values - tl.load(mean + head * DIM + d, mask=d < DIM, other=0.0)[None, :]
        values, row_top, broken = _settled(values, counted)
        if x8 is not None:
            top = tl.max(row_top, 0)
            at = x8 + (head * blocks * BLOCK + first) * WIDTH + (n[:, None] * WIDTH + d[None, :])
            tl.store(at, _rounded(values, _inverse(top)), mask=(d < WIDTH)[None, :])
            scale = tl.where(tl.max(broken.to(tl.int32), 0) > 0, float("nan"), top / 127.0)
            tl.store(scales + (head * blocks + block) * (BLOCK // TILE) + part, scale)
        if pooled is not None:
            number += tl.sum(counted.to(tl.int32), 0)
            bad += tl.sum(broken.to(tl.int32), 0)
            total += tl.sum(values, 0)
            direction += _directions(values, row_top)
    if pooled is not None:
        _pool(total, direction, number, bad, pooled, similarity, head * blocks + block, d, DIM)


@triton.jit(
    do_not_specialize=[
        "q_len",
        "kv_len",
        "heads",
        "kv_heads",
        "q_blocks",
        "kv_blocks",
        "q_programs",
        "stride_q_segment",
        "stride_k_segment",
    ]
)
def digest_kernel(
    q,
    k,
    mean,
    q_segments,
    k_segments,
    q_pooled,
    q_similarity,
    k_pooled,
    k_similarity,
    q8,
    q_scales,
    q_shifts,
    k8,
    k_scales,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_kd,
    stride_q_segment,
    stride_k_segment,
    q_len,
    kv_len,
    heads,
    kv_heads,
    q_blocks,
    kv_blocks,
    q_programs,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    TILE: tl.constexpr,
):
    """Pool a block of queries or keys and round it; the q_programs first programs have queries, the others keys.

    Of q and k one may be None, and of the outputs those that are not wanted.
    """
    program = tl.program_id(0)
    if q is not None:  # noqa: SIM102 (decided by the compiler, the second by the program)
        if program < q_programs:
            _digest_queries(
                (program % q_blocks).to(tl.int64), (program // q_blocks).to(tl.int64), q_blocks, q, mean, q_segments,
                q_pooled, q_similarity, q8, q_scales, q_shifts, stride_qb, stride_qh, stride_qn, stride_qd,
                stride_q_segment, q_len, heads, kv_heads, DIM, DIM_PAD, WIDTH, BLOCK_Q, TILE,
            )  # fmt: skip
    if k is not None:  # noqa: SIM102
        if program >= q_programs:
            program -= q_programs
            _digest_keys(
                (program % kv_blocks).to(tl.int64), (program // kv_blocks).to(tl.int64), kv_blocks, k, mean, k_segments,
                k_pooled, k_similarity, k8, k_scales, stride_kb, stride_kh, stride_kn, stride_kd,
                stride_k_segment, kv_len, kv_heads, DIM, DIM_PAD, WIDTH, BLOCK_KV, TILE,
            )  # fmt: skip
