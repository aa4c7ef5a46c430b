"""Who sees whom: the blocks that rows at some positions see, whole or in part, and the pairs of a tile.

Without positions, segments and masks what a row sees is an interval, found by arithmetic. With them a pair of blocks
meets if their bounds do (smallest and largest position and segment of each), and every tile asks for each of its pairs.
"""

from __future__ import annotations

import triton
import triton.language as tl

_EVERY = tl.constexpr(2147483647)


@triton.jit
def _interval(low, high, kv_len, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK_KV: tl.constexpr):
    """Blocks that rows at the positions low .. high see: first and last + 1 of those seen, and of those seen whole."""
    low, high, window = low.to(tl.int64), high.to(tl.int64), window.to(tl.int64)
    zero = low * 0
    end, whole_end = zero + kv_len, zero + kv_len
    begin, whole_begin = zero, zero
    if CAUSAL:
        end, whole_end = tl.minimum(end, high + 1), tl.minimum(whole_end, low + 1)
    if WINDOW:
        end, whole_end = tl.minimum(end, high + window), tl.minimum(whole_end, low + window)
        begin, whole_begin = tl.maximum(zero, low - window + 1), tl.maximum(zero, high - window + 1)
    begin = begin // BLOCK_KV
    end = tl.maximum((tl.maximum(end, 0) + BLOCK_KV - 1) // BLOCK_KV, begin)
    whole_begin = tl.minimum((whole_begin + BLOCK_KV - 1) // BLOCK_KV, end)
    # The last block of the sequence is whole only if it is full.
    whole_end = tl.minimum(tl.maximum(tl.maximum(whole_end, 0) // BLOCK_KV, whole_begin), end)
    return begin.to(tl.int32), whole_begin.to(tl.int32), whole_end.to(tl.int32), end.to(tl.int32)


@triton.jit
def _count_below(indices, num, limit, CHUNK: tl.constexpr):
    """How many of the first `num` indices, which ascend, are below `limit`."""
    total = tl.zeros([CHUNK], tl.int32)
    for first in range(0, num, CHUNK):
        at = first + tl.arange(0, CHUNK)
        total += (tl.load(indices + at, mask=at < num, other=_EVERY) < limit).to(tl.int32)
    return tl.sum(total, 0)


@triton.jit
def _meets(q_bounds, kv_bounds, block, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Whether a query block may see key block(s): arithmetic on minima and maxima of positions and segments."""
    q_min, q_max = tl.load(q_bounds), tl.load(q_bounds + 1)
    k_min, k_max = tl.load(kv_bounds + block * 4), tl.load(kv_bounds + block * 4 + 1)
    seen = (q_min <= q_max) & (k_min <= k_max)
    seen = seen & (tl.load(q_bounds + 2) <= tl.load(kv_bounds + block * 4 + 3))
    seen = seen & (tl.load(kv_bounds + block * 4 + 2) <= tl.load(q_bounds + 3))
    if CAUSAL:
        seen = seen & (q_max >= k_min)
    if WINDOW:
        seen = seen & _ahead_less(q_min, k_max, window) & _ahead_less(k_min, q_max, window)
    return seen


@triton.jit
def _count_seen(
    q_bounds,
    kv_bounds,
    visible,
    indices,
    num,
    kv_blocks,
    window,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """How many blocks a query block may see: of all, or of the `num` that are listed."""
    total = tl.zeros([CHUNK], tl.int32)
    for first in range(0, num, CHUNK):
        at = first + tl.arange(0, CHUNK)
        ok = at < num
        block = at
        if indices is not None:
            block = tl.load(indices + at, mask=ok, other=0)
            ok = ok & (block >= 0) & (block < kv_blocks)
        block = tl.where(ok, block, 0)
        seen = ok
        if kv_bounds is not None:
            seen = seen & _meets(q_bounds, kv_bounds, block, window, CAUSAL, WINDOW)
        if visible is not None:
            seen = seen & (tl.load(visible + block) != 0)
        total += seen.to(tl.int32)
    return tl.sum(total, 0)


@triton.jit
def _seen(
    seen,
    columns,
    column_ok,
    q_positions,
    q_segments,
    kv_positions,
    kv_segments,
    window,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Visible pairs of a tile, bool [TILE_Q, TILE_K]."""
    if CAUSAL or WINDOW:
        if kv_positions is not None:
            at = tl.load(kv_positions + columns, mask=column_ok, other=0)
        else:
            at = columns
        if CAUSAL:
            seen = seen & (q_positions[:, None] >= at[None, :])
        if WINDOW:
            if kv_positions is not None:
                seen = seen & _ahead_less(q_positions[:, None], at[None, :], window)
                seen = seen & _ahead_less(at[None, :], q_positions[:, None], window)
            else:
                seen = seen & (tl.abs(q_positions[:, None] - at[None, :]) < window)
    if kv_segments is not None:
        of_key = tl.load(kv_segments + columns, mask=column_ok, other=-1)
        seen = seen & (q_segments[:, None] == of_key[None, :]) & (of_key >= 0)[None, :]
    return seen


@triton.jit
def _shows(mask):
    """Pairs that a tile of attn_mask, bool or added to the scores, leaves visible."""
    if mask.dtype.is_floating():
        return mask.to(tl.float32) != float("-inf")
    else:
        return mask != 0


@triton.jit
def _ahead_less(this, other, window):
    """this - other < window, right even where the difference does not fit 64 bits."""
    difference = this - other
    wrapped = ((this ^ other) & (this ^ difference)) < 0
    return tl.where(wrapped, this < other, difference < window)
