"""Which key blocks each query block visits, from block means and similarities.

    score = scale * q_mean . k_mean
    P     = softmax of the scores over the key blocks that are visible and alike inside, fp32
    cdf   keeps the largest entries of P, ties in order, until their mass reaches cdf;  topk keeps the largest by number

Two kernels. The first writes the scores of a head into the very table that will hold its lists: an fp32 and an int32
are of one size. The second takes a row of them at a time and finds, without sorting, the score at which to cut: it
halves the range of fp32 numbers, read as integers, until one is left, summing the mass above it each time. It then
writes the indices that stay over the scores they came from. A row of up to 2,048 scores is read once and stays in
registers; a longer one is read again for each sum.

The time does not depend on how the mask comes out. The loops of both kernels have bounds of the shape alone: slices of
the head dim, chunks of a row, and 32 halvings, for an fp32 has 32 bits. What scores and settings decide is decided by
selection, in every lane and never by a branch; only the indices stored are as many as blocks stay, by the same stores.
`used_kernel` is no part of the choice: attention starts it on lists that are given, and it reads what they hold.

A score of -inf stands for a block that is not visible, NaN for one that is kept whatever the others are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tamis.backends.triton.kernels.attend import LOG2E
from tamis.backends.triton.kernels.sight import _ahead_less

_LOWEST = tl.constexpr(-2147483648)


@triton.jit
def _visible_blocks(
    q_bounds, kv_bounds, row, column, q_len, kv_len, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
):  # fmt: skip
    """Pairs of blocks [ROWS, COLUMNS] that hold a visible pair; row and column are in range."""
    if q_bounds is None:
        offset = (kv_len - q_len).to(tl.int64)
        q_min, k_min = row.to(tl.int64) * BLOCK_Q + offset, column.to(tl.int64) * BLOCK_KV
        q_max = tl.minimum(q_min + BLOCK_Q, kv_len) - 1
        k_max = tl.minimum(k_min + BLOCK_KV, kv_len) - 1
        seen = (q_min <= q_max)[:, None] & (k_min <= k_max)[None, :]
    else:
        q_min, q_max = tl.load(q_bounds + row * 4), tl.load(q_bounds + row * 4 + 1)
        k_min, k_max = tl.load(kv_bounds + column * 4), tl.load(kv_bounds + column * 4 + 1)
        seen = (q_min <= q_max)[:, None] & (k_min <= k_max)[None, :]
        seen = seen & (tl.load(q_bounds + row * 4 + 2)[:, None] <= tl.load(kv_bounds + column * 4 + 3)[None, :])
        seen = seen & (tl.load(kv_bounds + column * 4 + 2)[None, :] <= tl.load(q_bounds + row * 4 + 3)[:, None])
    if CAUSAL:
        seen = seen & (q_max[:, None] >= k_min[None, :])
    if WINDOW:
        wide = window.to(tl.int64)
        seen = (
            seen & _ahead_less(q_min[:, None], k_max[None, :], wide) & _ahead_less(k_min[None, :], q_max[:, None], wide)
        )
    return seen


@triton.jit(
    do_not_specialize=[
        "q_len",
        "kv_len",
        "heads",
        "kv_heads",
        "q_blocks",
        "kv_blocks",
        "window",
        "scale",
        "stride_q_bound",
        "stride_kv_bound",
        "stride_visibleb",
        "stride_visibleh",
    ]
)
def scores_kernel(
    q_means,
    k_means,
    k_similarity,
    similarity,
    table,
    q_bounds,
    kv_bounds,
    visible,
    stride_q_bound,
    stride_kv_bound,
    stride_visibleb,
    stride_visibleh,
    q_len,
    kv_len,
    heads,
    kv_heads,
    q_blocks,
    kv_blocks,
    window,
    scale,
    DIM: tl.constexpr,
    SLICE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DOT32: tl.constexpr,
):
    """Scores of ROWS x COLUMNS blocks; grid (column tiles * row tiles * batch * heads,)."""
    across, down = tl.cdiv(kv_blocks, COLUMNS), tl.cdiv(q_blocks, ROWS)
    head_at = (tl.program_id(0) // (across * down)).to(tl.int64)
    batch, head = head_at // heads, head_at % heads
    kv_at = batch * kv_heads + head // (heads // kv_heads)
    row = (tl.program_id(0) // across % down) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS)
    row_ok, column_ok = row < q_blocks, column < kv_blocks
    score = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, DIM, SLICE):
        d = start + tl.arange(0, SLICE)
        d_ok = (d < DIM)[None, :]
        a = tl.load(
            q_means + (head_at * q_blocks + row)[:, None] * DIM + d[None, :], mask=row_ok[:, None] & d_ok, other=0.0
        )
        b = tl.load(
            k_means + (kv_at * kv_blocks + column)[:, None] * DIM + d[None, :],
            mask=column_ok[:, None] & d_ok,
            other=0.0,
        )
        score = tl.dot(a, tl.trans(b), score, input_precision=DOT32)
    score = score * scale + 0.0  # so that -0 and 0 are a tie
    if q_bounds is not None:
        q_bounds += batch * stride_q_bound
        kv_bounds += batch * stride_kv_bound
    safe_row, safe_column = tl.where(row_ok, row, 0), tl.where(column_ok, column, 0)
    seen = _visible_blocks(
        q_bounds, kv_bounds, safe_row, safe_column, q_len, kv_len, window, CAUSAL, WINDOW, BLOCK_Q, BLOCK_KV
    )
    inside = row_ok[:, None] & column_ok[None, :]
    if visible is not None:
        visible += batch * stride_visibleb + head * stride_visibleh
        seen = seen & (
            tl.load(visible + row.to(tl.int64)[:, None] * kv_blocks + column[None, :], mask=inside, other=0) != 0
        )
    # Not `<`: a similarity of NaN counts as dissimilar.
    alike = tl.load(k_similarity + kv_at * kv_blocks + column, mask=column_ok, other=1.0) >= tl.load(similarity + head)
    judged = alike[None, :] & (tl.abs(score) < float("inf"))
    score = tl.where(seen, tl.where(judged, score, float("nan")), float("-inf"))
    at = table + (head_at * q_blocks + row)[:, None] * kv_blocks + column[None, :]
    tl.store(at, score.to(tl.int32, bitcast=True), mask=inside)


@triton.jit
def _row_chunk(row, first, kv_blocks, CHUNK: tl.constexpr):
    """A chunk of scores: the numbers, and their order as integers; what has no score is at the lowest."""
    at = first + tl.arange(0, CHUNK)
    bits = tl.load(row + at, mask=at < kv_blocks, other=-8388608)  # -inf
    score = bits.to(tl.float32, bitcast=True)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return score, tl.where(tl.abs(score) < float("inf"), order, _LOWEST)


@triton.jit
def _weight(score, order, top, BY_MASS: tl.constexpr):
    """What a scored block counts: its share of the mass, up to a factor, or 1."""
    weight = tl.exp2((score - top) * LOG2E) if BY_MASS else tl.full(score.shape, 1.0, tl.float32)
    return tl.where(order > _LOWEST, weight, 0.0)


@triton.jit
def _above(row, cut, top, order, weight, kv_blocks, BY_MASS: tl.constexpr, CHUNK: tl.constexpr, WHOLE: tl.constexpr):
    """Mass, or number, of the scores whose order is above `cut`; order and weight are those of a WHOLE row."""
    if WHOLE:
        total = tl.where(order > cut, weight, 0.0)
    else:
        total = tl.zeros([CHUNK], tl.float32)
        for first in range(0, kv_blocks, CHUNK):
            score, chunk_order = _row_chunk(row, first, kv_blocks, CHUNK)
            total += tl.where(chunk_order > cut, _weight(score, chunk_order, top, BY_MASS), 0.0)
    return tl.sum(total, 0)


@triton.jit
def _cut(row, wanted, top, order, weight, kv_blocks, BY_MASS: tl.constexpr, CHUNK: tl.constexpr, WHOLE: tl.constexpr):
    """The least order above which there is less than `wanted`, and what there is."""
    low, high = tl.full([], -2147483648, tl.int32), tl.full([], 2147483647, tl.int32)
    for _ in range(32):
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        less = _above(row, middle, top, order, weight, kv_blocks, BY_MASS, CHUNK, WHOLE) < wanted
        high = tl.where(less & (middle > low), middle, high)
        low = tl.where(less, low, middle)
    return high, _above(row, high, top, order, weight, kv_blocks, BY_MASS, CHUNK, WHOLE)


@triton.jit(do_not_specialize=["q_len", "kv_len", "heads", "q_blocks", "kv_blocks", "stride_mustb", "stride_musth"])
def choose_kernel(
    table,
    kv_num,
    q_similarity,
    similarity,
    cdf,
    topk,
    must,
    stride_mustb,
    stride_musth,
    q_len,
    kv_len,
    heads,
    q_blocks,
    kv_blocks,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    SINK: tl.constexpr,
    DIAGONAL: tl.constexpr,
    CHUNK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Turn a row of scores into the indices of the blocks that stay; grid (q_blocks * batch * heads,).

    WHOLE: a row is no longer than a chunk.
    """
    q_block, head_at = tl.program_id(0) % q_blocks, (tl.program_id(0) // q_blocks).to(tl.int64)
    batch, head = head_at // heads, head_at % heads
    row = table + (head_at * q_blocks + q_block) * kv_blocks
    n = tl.arange(0, CHUNK)

    length = CHUNK if WHOLE else kv_blocks
    score, order = _row_chunk(row, 0, kv_blocks, CHUNK)
    best = tl.full([CHUNK], float("-inf"), tl.float32)
    count = tl.zeros([CHUNK], tl.int32)
    for first in range(0, length, CHUNK):
        if not WHOLE:
            score, order = _row_chunk(row, first, kv_blocks, CHUNK)
        best = tl.maximum(best, tl.where(order > _LOWEST, score, float("-inf")))
        count += tl.where(score == float("-inf"), 0, 1)
    top, seen_blocks = tl.max(best, 0), tl.sum(count, 0)
    top = tl.where(top == float("-inf"), 0.0, top)

    every = (tl.load(q_similarity + head_at * q_blocks + q_block) >= tl.load(similarity + head)) == 0
    mass_cut, mass_left, mass_ties = tl.full([], 2147483647, tl.int32), 0.0, 0.0
    if cdf is not None:
        tau = tl.load(cdf + head)
        every = every | (tau >= 1)
        weight = _weight(score, order, top, True)
        mass = _above(row, _LOWEST, top, order, weight, kv_blocks, True, CHUNK, WHOLE)
        mass_cut, above = _cut(row, tau * mass, top, order, weight, kv_blocks, True, CHUNK, WHOLE)
        mass_left = tau * mass - above
    number_cut, number_left = tl.full([], 2147483647, tl.int32), 0.0
    if topk is not None:
        # The small term takes back what fp32 adds to decimal fractions: 0.1 of 30 is 3 blocks, not 4.
        share = (tl.load(topk + head).to(tl.float64) - 1e-6) * seen_blocks.to(tl.float64)
        wanted = tl.maximum(tl.ceil(share).to(tl.float32), 1.0)
        weight = _weight(score, order, top, False)
        number_cut, above = _cut(row, wanted, top, order, weight, kv_blocks, False, CHUNK, WHOLE)
        number_left = wanted - above

    kept_before, mass_ties, number_ties = 0, 0.0, 0.0
    for first in range(0, length, CHUNK):
        at = first + n
        if not WHOLE:
            score, order = _row_chunk(row, first, kv_blocks, CHUNK)
        scored = order > _LOWEST
        stays = (score != score) | every
        if cdf is not None:
            # Of equal scores at the cut the first ones stay, until their mass is enough.
            tie = scored & (order == mass_cut)
            weight = tl.where(tie, tl.exp2((score - top) * LOG2E), 0.0)
            before = tl.cumsum(weight, 0) - weight + mass_ties
            stays = stays | (scored & (order > mass_cut)) | (tie & (before < mass_left))
            mass_ties += tl.sum(weight, 0)
        if topk is not None:
            tie = scored & (order == number_cut)
            weight = tl.where(tie, 1.0, 0.0)
            before = tl.cumsum(weight, 0) - weight + number_ties
            stays = stays | (scored & (order > number_cut)) | (tie & (before < number_left))
            number_ties += tl.sum(weight, 0)
        if SINK:
            stays = stays | (at == 0)
        if DIAGONAL:
            low = q_block * BLOCK_Q + (kv_len - q_len)
            high = tl.minimum(low + BLOCK_Q, kv_len) - 1
            stays = stays | ((at * BLOCK_KV <= high) & (tl.minimum(at * BLOCK_KV + BLOCK_KV, kv_len) - 1 >= low))
        if must is not None:
            must_at = must + batch * stride_mustb + head * stride_musth + q_block.to(tl.int64) * kv_blocks
            stays = stays | (tl.load(must_at + at, mask=at < kv_blocks, other=0) != 0)
        stays = stays & (score != float("-inf")) & (at < kv_blocks)
        ranks = tl.cumsum(stays.to(tl.int32), 0) - 1
        # Indices move towards the front, onto scores that this loop has read.
        tl.debug_barrier()
        tl.store(row + kept_before + ranks, at, mask=stays)
        kept_before += tl.sum(stays.to(tl.int32), 0)
    tl.store(kv_num + head_at * q_blocks + q_block, kept_before)


@triton.jit(
    do_not_specialize=[
        "q_len",
        "kv_len",
        "heads",
        "kv_heads",
        "q_blocks",
        "kv_blocks",
        "max_blocks",
        "window",
        "stride_numb",
        "stride_numh",
        "stride_numq",
        "stride_idxb",
        "stride_idxh",
        "stride_idxq",
        "stride_q_bound",
        "stride_kv_bound",
        "stride_visibleb",
        "stride_visibleh",
    ]
)
def used_kernel(
    kv_num,
    kv_indices,
    used,
    q_bounds,
    kv_bounds,
    visible,
    stride_numb,
    stride_numh,
    stride_numq,
    stride_idxb,
    stride_idxh,
    stride_idxq,
    stride_q_bound,
    stride_kv_bound,
    stride_visibleb,
    stride_visibleh,
    q_len,
    kv_len,
    heads,
    kv_heads,
    q_blocks,
    kv_blocks,
    max_blocks,
    window,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Mark the 64-key tiles that a query block visits; grid (q_blocks * batch * heads,), `used` starts as zeros."""
    q_block, head_at = tl.program_id(0) % q_blocks, (tl.program_id(0) // q_blocks).to(tl.int64)
    batch, head = head_at // heads, head_at % heads
    kv_at = batch * kv_heads + head // (heads // kv_heads)
    tiles = tl.cdiv(kv_len, 64)
    num = kv_blocks
    if kv_indices is not None:
        num = tl.load(kv_num + batch * stride_numb + head * stride_numh + q_block * stride_numq)
        num = tl.minimum(tl.maximum(num, 0), max_blocks)
        kv_indices += batch * stride_idxb + head * stride_idxh + q_block.to(tl.int64) * stride_idxq
    if q_bounds is not None:
        q_bounds += batch * stride_q_bound
        kv_bounds += batch * stride_kv_bound
    if visible is not None:
        visible += batch * stride_visibleb + head * stride_visibleh + q_block.to(tl.int64) * kv_blocks
    row = q_block + tl.arange(0, 1)
    for first in range(0, num, CHUNK):
        at = first + tl.arange(0, CHUNK)
        ok = at < num
        block = at
        if kv_indices is not None:
            block = tl.load(kv_indices + at, mask=ok, other=0)
            ok = ok & (block >= 0) & (block < kv_blocks)
        block = tl.where(ok, block, 0)
        seen = _visible_blocks(
            q_bounds, kv_bounds, row, block, q_len, kv_len, window, CAUSAL, WINDOW, BLOCK_Q, BLOCK_KV
        )
        ok = ok & (tl.sum(seen.to(tl.int32), 0) > 0)
        if visible is not None:
            ok = ok & (tl.load(visible + block) != 0)
        for part in tl.static_range(BLOCK_KV // 64):
            tile = block * (BLOCK_KV // 64) + part
            # Several programs write the same 1.
            tl.store(used + kv_at * tiles + tile, tl.full([CHUNK], 1, tl.int8), mask=ok & (tile < tiles))
