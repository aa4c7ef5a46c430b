"""Block-sparse attention, one program for a tile of query rows of one head.

Over the key tiles of the kept blocks, with scores in units of log 2 (natural ones with a mask added, sinks or a vast
softcap, which times log2(e) might not fit fp32):

    s       = scale * log2(e) * q k^T     (softcap, + mask, -inf where not visible)
    m_local = row max of s,  m' = max(m, m_local)
    p       = 2^(s - m'),  l = l * 2^(m - m') + rowsum(p),  o = o * 2^(m - m') + p v
    output  = o / l,  lse = (m + log2 l) / log2(e)

The list of kept blocks falls into three runs, visited in this order: blocks seen whole, blocks at the edge of what is
visible before them (there is one under a window), and blocks at the edge behind them. Only the edges pay for masks.
Whole blocks come first: in 8 bits, sm_90's assembler would serialise the
products of a loop over them that goes on with the sums of an edge. Where visibility is no interval (positions,
segments, attn_mask) every block is an edge, and those that hold nothing visible are passed over.

In fp8, p is 2^(s - m_local + HEADROOM) and p v is brought to m' afterwards: against the running maximum, long flat rows
would lose their mass. Stage 2 leaves out p v of a tile if m_local - m' <= -pv_threshold in all of its rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tamis.backends.triton.kernels.sight import _count_below, _count_seen, _interval, _meets, _seen, _shows

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile(at, row_ok, d_ok, ROWS_EVEN: tl.constexpr, DIM_EVEN: tl.constexpr):
    """Load a tile; what lies outside is 0."""
    if ROWS_EVEN:
        if DIM_EVEN:
            return tl.load(at)
        else:
            return tl.load(at, mask=d_ok[None, :], other=0.0)
    else:
        if DIM_EVEN:
            return tl.load(at, mask=row_ok[:, None], other=0.0)
        else:
            return tl.load(at, mask=row_ok[:, None] & d_ok[None, :], other=0.0)


@triton.jit
def _power(x, NATURAL: tl.constexpr, HEADROOM: tl.constexpr = 0):
    """e^x or 2^x, times 2^HEADROOM."""
    if NATURAL:
        x = x * LOG2E
    if HEADROOM > 0:
        x = x + HEADROOM
    return tl.exp2(x)


@triton.jit
def _tanh(x):
    """In fp32 to its last digits: a series where 1 - 2^-y would cancel."""
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    fall = tl.exp2(tl.abs(x) * (-2 * LOG2E))
    far = (1 - fall) / (1 + fall)
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0, -far, far))


@triton.jit
def _broken_values(p, seen, v):
    """What infinities and NaN in v add to p v, for the rows that see them; 0 elsewhere.

    The rows that meet +inf, -inf and NaN (0 * inf is one) are counted in one product by weights 1, 2^8 and 2^16: a
    tile has at most 128 keys, so that the sums stay apart, and exact.
    """
    kind = tl.where(v != v, 65536.0, tl.where(v == float("inf"), 1.0, tl.where(v == float("-inf"), 256.0, 0.0)))
    lost = tl.where(kind > 0, 65536.0, 0.0)
    met = tl.dot((seen & (p > 0)).to(tl.bfloat16), kind.to(tl.bfloat16))
    met = tl.dot((seen & (p == 0)).to(tl.bfloat16), lost.to(tl.bfloat16), met)
    minus = met >= 256
    plus = met - tl.floor(met * (1 / 256)) * 256 > 0
    infinite = tl.where(plus, float("inf"), tl.where(minus, float("-inf"), 0.0))
    return tl.where((met >= 65536) | (plus & minus), float("nan"), infinite)


@triton.jit
def _largest(x):
    """The largest of x [n], as a scalar. On sm_100 Triton 3.6 fails where `tl.max(x, 0)` decides about a product: it
    follows layouts through that reduction, of which there is no such thing as the layout of a result.
    """
    return tl.max(x[:, None], 0).item()


@triton.jit
def _visit(
    o,
    m,
    total,
    skipped,
    broken,
    first,
    last,
    q,
    q_factor,
    q_shift,
    q_positions,
    q_segments,
    rows,
    row_ok,
    d_ok,
    dv_ok,
    k_at,
    v_at,
    k_in,
    v_in,
    k_scale,
    v_scale,
    indices,
    mask_at,
    kv_positions,
    kv_segments,
    q_bounds,
    kv_bounds,
    visible,
    stride_qd,
    stride_kn,
    stride_kd,
    stride_vn,
    stride_maskn,
    kv_len,
    kv_blocks,
    window,
    factor,
    softcap,
    threshold,
    EDGE: tl.constexpr,
    MENDS: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    QK8: tl.constexpr,
    PV: tl.constexpr,
    K_EVEN: tl.constexpr,
    DV_EVEN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    D: tl.constexpr,
    SLICE: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    DOT32: tl.constexpr,
    HEADROOM: tl.constexpr,
    NATURAL: tl.constexpr,
):
    """Take in the entries first .. last - 1 of the list.

    0 * NaN is NaN, so at the edges values that are not finite count as 0 here, and `broken` tells of them. With MENDS,
    m is final, and o gathers what such values add to the output.
    """
    PER_BLOCK: tl.constexpr = BLOCK_KV // TILE_K
    n = tl.arange(0, TILE_K)
    if not EDGE:
        last = tl.where(kv_len >= BLOCK_KV, last, first)
    following = first
    if indices is not None:
        following = tl.load(indices + first, mask=first < last, other=0)
    # What does not change in the loop stays in it (`here * 0` below as well) where its registers are needed more.
    for step in tl.range(first * PER_BLOCK, last * PER_BLOCK, disable_licm=SLICE > 0 or (EDGE and WINDOW)):
        # The next index is fetched a turn ahead, or else the address of every tile would wait for it.
        block = following
        entry = (step + 1) // PER_BLOCK
        if indices is not None:
            following = tl.load(indices + entry, mask=entry < last, other=0)
            # A list out of order may name any block anywhere; the run of whole blocks loads without a mask.
            block = tl.minimum(tl.maximum(block, 0), (kv_blocks if EDGE else kv_len // BLOCK_KV) - 1)
        else:
            following = entry
        start = block * BLOCK_KV + (step % PER_BLOCK) * TILE_K
        columns = start + n
        here = start.to(tl.int64)
        wanted = True
        if kv_bounds is not None:
            wanted = _meets(q_bounds, kv_bounds, block, window, CAUSAL, WINDOW)
        if visible is not None:
            wanted = wanted & (tl.load(visible + block) != 0)
        if wanted:
            column_ok = columns < kv_len
            if SLICE == 0:
                k = _tile((k_at + here * stride_kn) + k_in, column_ok, d_ok, not EDGE, K_EVEN)  # [TILE_K, D]
            if QK8:
                s = tl.dot(q, tl.trans(k)).to(tl.float32)  # [TILE_Q, TILE_K]
                if TILE_K <= 64:
                    s = s * (q_factor * tl.load(k_scale + start // 64, mask=start < kv_len, other=0.0))[:, None]
                else:
                    k_step = tl.load(k_scale + start // 64 + n // 64, mask=column_ok, other=0.0)
                    s = s * q_factor[:, None] * k_step[None, :]
                if q_shift is not None:
                    s = s + q_shift[:, None]
            elif SLICE == 0:
                s = tl.dot(q, tl.trans(k), input_precision=DOT32) * factor
            else:
                s = tl.zeros([TILE_Q, TILE_K], tl.float32)
                k_here = (k_at + here * stride_kn) + k_in
                for part in tl.range(D // SLICE, num_stages=1, disable_licm=True):
                    part_ok = part * SLICE + tl.arange(0, SLICE) < HEAD_DIM
                    q_part = _tile(q + (here * 0 + part * SLICE) * stride_qd, row_ok, part_ok, False, HEAD_DIM == D)
                    k_part = _tile(k_here + (here * 0 + part * SLICE) * stride_kd, column_ok, part_ok, not EDGE, K_EVEN)
                    s = tl.dot(q_part, tl.trans(k_part), s, input_precision=DOT32)
                s = s * factor
            if softcap is not None:
                # Up to here scores are natural and divided by the cap.
                s = _tanh(s) * (softcap if NATURAL else softcap * LOG2E)
            if EDGE:
                seen = row_ok[:, None] & column_ok[None, :]
                seen = _seen(
                    seen, columns, column_ok, q_positions, q_segments, kv_positions, kv_segments, window, CAUSAL, WINDOW
                )
                if mask_at is not None:
                    tile = tl.load(mask_at + here * stride_maskn, mask=seen, other=0)
                    seen = seen & _shows(tile)
                    if mask_at.dtype.element_ty.is_floating():
                        s = s + tile.to(tl.float32)
                s = tl.where(seen, s, float("-inf"))

            if MENDS:
                p = _power(s - tl.where(m == float("-inf"), 0.0, m)[:, None], NATURAL)
                v = _tile((v_at + here * stride_vn) + v_in, column_ok, dv_ok, False, DV_EVEN).to(tl.float32)
                if tl.max(tl.max(((v - v) != 0).to(tl.int32), 1), 0) > 0:
                    o += _broken_values(p, seen, v)
            else:
                m_local = tl.max(s, 1)
                m_next = tl.maximum(m, m_local)
                # A row that has seen nothing yet has maximum -inf: less 0 its scores stay at -inf, and 2^-inf at 0.
                reference = tl.where(m_next == float("-inf"), 0.0, m_next)
                decay = _power(m - reference, NATURAL)
                if PV == "fp8":
                    m_own = tl.where(m_local == float("-inf"), 0.0, m_local)
                    p = _power(s - m_own[:, None], NATURAL, HEADROOM)
                    gain = _power(m_local - reference, NATURAL)
                    total = total * decay + tl.sum(p, 1) * gain
                else:
                    p = _power(s - reference[:, None], NATURAL)
                    gain = decay
                    total = total * decay + tl.sum(p, 1)
                m = m_next

                taken = True
                if threshold is not None:
                    behind = tl.where(row_ok, m_local - reference, float("-inf"))
                    nearest = _largest(tl.where(behind == behind, behind, 0.0))
                    taken = nearest > -threshold
                    if EDGE:
                        # With no key seen there is nothing to leave out.
                        taken = taken | (_largest(m_local) == float("-inf"))
                    of_block = tl.minimum((kv_len - block * BLOCK_KV + TILE_K - 1) // TILE_K, PER_BLOCK)
                    skipped += tl.where(taken, 0.0, 1.0 / of_block)
                # Loaded in any case: a load that may not happen is not fetched ahead.
                if PV == "packed":
                    v = tl.load(
                        (v_at + here // 64 * (64 * VALUE_DIM) + here % 64) + v_in,
                        mask=column_ok[:, None] & dv_ok[None, :],
                        other=0,
                    )
                else:
                    v = _tile((v_at + here * stride_vn) + v_in, column_ok, dv_ok, not EDGE, DV_EVEN or PV == "fp8")
                if EDGE and (PV == "input" or PV == "bf16"):
                    unsound = (v.to(tl.float32) - v.to(tl.float32)) != 0
                    broken += tl.max(tl.max(unsound.to(tl.int32), 1), 0)
                    v = tl.where(unsound, 0.0, v).to(v.dtype)
                if taken:
                    if PV == "packed":
                        v_step = tl.load(v_scale + (start // 64) * VALUE_DIM, mask=dv_ok & (start < kv_len), other=0.0)
                        o = o * decay[:, None] + tl.dot(p.to(tl.bfloat16), v.to(tl.bfloat16)) * v_step[None, :]
                    elif PV == "fp8":
                        o = o * decay[:, None] + tl.dot(p.to(v.dtype), v) * gain[:, None]
                    elif PV == "bf16":
                        o = tl.dot(p.to(tl.bfloat16), v.to(tl.bfloat16), o * decay[:, None])
                    else:
                        o = tl.dot(p.to(v.dtype), v, o * decay[:, None], input_precision=DOT32)
    return o, m, total, skipped, broken


@triton.jit(
    do_not_specialize=[
        "q_len",
        "kv_len",
        "heads",
        "kv_heads",
        "q_tiles",
        "q_blocks",
        "kv_blocks",
        "kv_tiles",
        "max_blocks",
        "window",
        "factor",
        "softcap",
        "stride_numb",
        "stride_numh",
        "stride_numq",
        "stride_idxb",
        "stride_idxh",
        "stride_idxq",
        "stride_maskb",
        "stride_maskh",
        "stride_maskq",
        "stride_q_position",
        "stride_kv_position",
        "stride_q_segment",
        "stride_kv_segment",
        "stride_q_bound",
        "stride_kv_bound",
        "stride_visibleb",
        "stride_visibleh",
    ]
)
def attend_kernel(
    q,
    k,
    v,
    output,
    lse,
    counts,
    flags,
    q_scale,
    k_scale,
    v_scale,
    q_shift,
    kv_num,
    kv_indices,
    sink_logits,
    pv_threshold,
    attn_mask,
    q_positions,
    kv_positions,
    q_segments,
    kv_segments,
    q_bounds,
    kv_bounds,
    visible,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_vd,
    stride_numb,
    stride_numh,
    stride_numq,
    stride_idxb,
    stride_idxh,
    stride_idxq,
    stride_maskb,
    stride_maskh,
    stride_maskq,
    stride_maskn,
    stride_q_position,
    stride_kv_position,
    stride_q_segment,
    stride_kv_segment,
    stride_q_bound,
    stride_kv_bound,
    stride_visibleb,
    stride_visibleh,
    q_len,
    kv_len,
    heads,
    kv_heads,
    q_tiles,
    q_blocks,
    kv_blocks,
    kv_tiles,
    max_blocks,
    window,
    factor,
    softcap,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    SLICE: tl.constexpr,
    K_EVEN: tl.constexpr,
    V_EVEN: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    QK8: tl.constexpr,
    PV: tl.constexpr,
    DOT32: tl.constexpr,
    HEADROOM: tl.constexpr,
    NATURAL: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDE: tl.constexpr,
    FLAG_ROWS: tl.constexpr,
):
    """One tile of query rows; grid (q_tiles * heads * batch,).

    In 8 bits q, k (and v in fp8) come from pool.py. factor: scale * log2(e), or scale where NATURAL, or scale / softcap
    where there is a cap. NATURAL: scores are not in units of log 2, in which the most negative number of an added mask
    would be -inf. WIDE: whether places inside a tile of keys or values need 64 bits; where a tile starts always has
    them. SLICE > 0, for fp32: q and k are taken in pieces of so many channels, for whole rows do not fit the registers.

    A call is two kernels where it has edges: the first notes in `flags`, int32 `[batch * heads, q_tiles]`, which tiles
    met values there that are not finite. The second, FLAG_ROWS > 0 being the rows of the first's tiles, mends those: in
    one kernel, so rare a case would take registers from every other.

    `counts` is fp64 `[batch * heads, q_tiles, 3]`: block products visible and done; of a block's tiles the first
    writes the whole, the others what they skipped.
    """
    place = tl.program_id(0)
    # Late rows see most under causality: they start first, and the short ones fill the gaps at the end.
    tile = q_tiles - 1 - place % q_tiles
    head_at = (place // q_tiles).to(tl.int64)
    batch, head = head_at // heads, head_at % heads
    kv_head = head // (heads // kv_heads)
    kv_at = batch * kv_heads + kv_head
    q_block = tile * TILE_Q // BLOCK_Q
    MENDS: tl.constexpr = FLAG_ROWS > 0
    if MENDS:  # noqa: SIM102  (the first condition is the compiler's, the second the device's)
        if tl.load(flags + head_at * tl.cdiv(q_len, FLAG_ROWS) + tile * TILE_Q // FLAG_ROWS) == 0:
            return
    rows = tile * TILE_Q + tl.arange(0, TILE_Q)
    row_ok = rows < q_len
    n, d, dv = tl.arange(0, TILE_K), tl.arange(0, D if SLICE == 0 else SLICE), tl.arange(0, DV)
    d_ok, dv_ok = d < HEAD_DIM, dv < VALUE_DIM
    wide_rows = rows.to(tl.int64)

    q_at = (
        q + batch * stride_qb + head * stride_qh + wide_rows[:, None] * stride_qn + d.to(tl.int64)[None, :] * stride_qd
    )
    q_tile = q_at
    if SLICE == 0:
        q_tile = _tile(q_at, row_ok, d_ok, False, HEAD_DIM == D or QK8)
    k_at = k + batch * stride_kb + kv_head * stride_kh
    v_at = v + batch * stride_vb + kv_head * stride_vh
    k_in, v_in = n[:, None] * stride_kn + d[None, :] * stride_kd, n[:, None] + dv[None, :] * 64
    if PV != "packed":
        v_in = n[:, None] * stride_vn + dv[None, :] * stride_vd
    if WIDE:
        k_in = n.to(tl.int64)[:, None] * stride_kn + d.to(tl.int64)[None, :] * stride_kd
        if PV != "packed":
            v_in = n.to(tl.int64)[:, None] * stride_vn + dv.to(tl.int64)[None, :] * stride_vd
    row_factor, score_shift = None, None
    if QK8:
        row_factor = tl.load(q_scale + head_at * q_len + wide_rows, mask=row_ok, other=0.0) * factor
        k_scale += kv_at * kv_tiles
        if softcap is not None:
            score_shift = tl.load(q_shift + head_at * q_len + wide_rows, mask=row_ok, other=0.0) * factor
    if PV == "packed":
        v_scale += kv_at * kv_tiles * VALUE_DIM + dv
    UNIT: tl.constexpr = 1.0 if NATURAL else LOG2E
    threshold = None
    if pv_threshold is not None:
        threshold = tl.load(pv_threshold + head) * UNIT

    q_at_positions, q_at_segments = rows + (kv_len - q_len), None
    if q_positions is not None:
        q_at_positions = tl.load(q_positions + batch * stride_q_position + wide_rows, mask=row_ok, other=0)
        kv_positions += batch * stride_kv_position
    if q_segments is not None:
        q_at_segments = tl.load(q_segments + batch * stride_q_segment + wide_rows, mask=row_ok, other=-1)
        kv_segments += batch * stride_kv_segment
    mask_at = None
    if attn_mask is not None:
        mask_at = attn_mask + batch * stride_maskb + head * stride_maskh
        mask_at += wide_rows[:, None] * stride_maskq + n.to(tl.int64)[None, :] * stride_maskn
    if q_bounds is not None:
        q_bounds += batch * stride_q_bound + q_block * 4
        kv_bounds += batch * stride_kv_bound
    if visible is not None:
        visible += batch * stride_visibleb + head * stride_visibleh + q_block.to(tl.int64) * kv_blocks

    num = kv_blocks
    indices = None
    if kv_indices is not None:
        num = tl.load(kv_num + batch * stride_numb + head * stride_numh + q_block * stride_numq)
        num = tl.minimum(tl.maximum(num, 0), max_blocks)
        indices = kv_indices + batch * stride_idxb + head * stride_idxh + q_block.to(tl.int64) * stride_idxq

    o = tl.zeros([TILE_Q, DV], tl.float32)
    m = tl.full([TILE_Q], float("-inf"), tl.float32)
    total = tl.zeros([TILE_Q], tl.float32)
    skipped = 0.0
    # Nothing is an interval where positions, segments or a mask say who sees whom; bounds are then given.
    REGULAR: tl.constexpr = (q_bounds is None) and (visible is None)
    if REGULAR:
        offset = kv_len - q_len
        block_low = q_block * BLOCK_Q + offset
        block_high = tl.minimum(q_len, (q_block + 1) * BLOCK_Q) - 1 + offset
        begin, _, _, end = _interval(block_low, block_high, kv_len, window, CAUSAL, WINDOW, BLOCK_KV)
        visible_blocks = end - begin
        kept_blocks = visible_blocks
        if indices is not None:
            kept_blocks = _count_below(indices, num, end, CHUNK) - _count_below(indices, num, begin, CHUNK)
        # What was an edge to the first kernel's larger tile is one here.
        OF_TILE: tl.constexpr = FLAG_ROWS if MENDS else TILE_Q
        if OF_TILE < BLOCK_Q:
            wide_tile = tile * TILE_Q // OF_TILE
            low = wide_tile * OF_TILE + offset
            high = tl.minimum(q_len, (wide_tile + 1) * OF_TILE) - 1 + offset
            begin, whole_begin, whole_end, end = _interval(low, high, kv_len, window, CAUSAL, WINDOW, BLOCK_KV)
        else:
            begin, whole_begin, whole_end, end = _interval(
                block_low, block_high, kv_len, window, CAUSAL, WINDOW, BLOCK_KV
            )
        if tile * TILE_Q >= q_len:
            end = begin
            whole_begin = begin
            whole_end = begin
        if indices is not None:
            begin = _count_below(indices, num, begin, CHUNK) if WINDOW else begin
            whole_begin = _count_below(indices, num, whole_begin, CHUNK) if WINDOW else whole_begin
            whole_end = _count_below(indices, num, whole_end, CHUNK)
            end = _count_below(indices, num, end, CHUNK) if CAUSAL or WINDOW else num
    else:
        visible_blocks = _count_seen(
            q_bounds, kv_bounds, visible, None, kv_blocks, kv_blocks, window, CAUSAL, WINDOW, CHUNK
        )
        kept_blocks = visible_blocks
        if indices is not None:
            kept_blocks = _count_seen(
                q_bounds, kv_bounds, visible, indices, num, kv_blocks, window, CAUSAL, WINDOW, CHUNK
            )
        begin, whole_begin, whole_end, end = 0, 0, 0, num
    if MENDS:
        m = tl.load(lse + head_at * q_len + wide_rows, mask=row_ok, other=0.0) * UNIT
    else:
        count_at = counts + (head_at * q_tiles + tile) * 3
        leads = tile * TILE_Q % BLOCK_Q == 0
        tl.store(count_at, tl.where(leads, visible_blocks.to(tl.float64), 0.0))
        tl.store(count_at + 1, tl.where(leads, kept_blocks.to(tl.float64), 0.0))
    broken = 0
    for run in tl.static_range(3):
        # Whole blocks, the edge before them (there is one under a window), the edge behind them.
        if (run == 0 and REGULAR and not MENDS) or run == 2 or (run == 1 and REGULAR and WINDOW):
            o, m, total, skipped, broken = _visit(
                o,
                m,
                total,
                skipped,
                broken,
                begin if run == 1 else (whole_begin if run == 0 else whole_end),
                whole_begin if run == 1 else (whole_end if run == 0 else end),
                q_tile,
                row_factor,
                score_shift,
                q_at_positions,
                q_at_segments,
                rows,
                row_ok,
                d_ok,
                dv_ok,
                k_at,
                v_at,
                k_in,
                v_in,
                k_scale,
                v_scale,
                indices,
                mask_at,
                kv_positions,
                kv_segments,
                q_bounds,
                kv_bounds,
                visible,
                stride_qd,
                stride_kn,
                stride_kd,
                stride_vn,
                stride_maskn,
                kv_len,
                kv_blocks,
                window,
                factor,
                softcap,
                threshold,
                EDGE=run != 0,
                MENDS=MENDS,
                CAUSAL=CAUSAL,
                WINDOW=WINDOW,
                QK8=QK8,
                PV=PV,
                K_EVEN=K_EVEN,
                DV_EVEN=V_EVEN,
                HEAD_DIM=HEAD_DIM,
                VALUE_DIM=VALUE_DIM,
                D=D,
                SLICE=SLICE,
                BLOCK_KV=BLOCK_KV,
                TILE_Q=TILE_Q,
                TILE_K=TILE_K,
                DOT32=DOT32,
                HEADROOM=HEADROOM,
                NATURAL=NATURAL,
            )

    out_at = output + (head_at * q_len + tile * TILE_Q) * VALUE_DIM
    out_at += tl.arange(0, TILE_Q)[:, None] * VALUE_DIM + dv[None, :]
    if MENDS:
        inside = row_ok[:, None] & dv_ok[None, :]
        o += tl.load(out_at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_at, o.to(output.dtype.element_ty), mask=inside)
        return
    empty = total == 0
    o = o * tl.where(empty, 0.0, 1.0 / total)[:, None]
    if PV == "fp8":
        o = o * tl.load(v_scale + kv_at * DV + dv)[None, :]
    sum_log = m + (tl.log2(total) - HEADROOM) * (UNIT / LOG2E)
    if QK8 and softcap is None:
        sum_log += tl.load(q_shift + head_at * q_len + wide_rows, mask=row_ok, other=0.0) * factor
    sum_log = tl.where(empty, float("-inf"), sum_log)
    if sink_logits is not None:
        sink = tl.load(sink_logits + head) * UNIT
        largest = tl.maximum(sum_log, sink)
        base = tl.where(tl.abs(largest) < float("inf"), largest, 0.0)
        both = _power(sum_log - base, NATURAL) + _power(sink - base, NATURAL)
        joined = base + tl.log2(both) * (UNIT / LOG2E)
        o = o * tl.where(empty, 0.0, _power(sum_log - joined, NATURAL))[:, None]
        sum_log = joined
    o = tl.where(empty[:, None], 0.0, o)
    tl.store(out_at, o.to(output.dtype.element_ty), mask=row_ok[:, None] & dv_ok[None, :])
    tl.store(lse + head_at * q_len + wide_rows, sum_log / UNIT, mask=row_ok)
    if PV == "input" or PV == "bf16":
        tl.store(flags + head_at * q_tiles + tile, broken)

    count_at = counts + (head_at * q_tiles + tile) * 3
    rows_here = tl.minimum(q_len - tile * TILE_Q, TILE_Q).to(tl.float64)
    rows_block = tl.minimum(q_len - q_block * BLOCK_Q, BLOCK_Q).to(tl.float64)
    tl.debug_barrier()  # what is read here was written above
    tl.store(count_at + 2, tl.load(count_at + 1) - skipped * rows_here / rows_block)
