"""Block-sparse attention for sm_90 in Gluon: the sums of attend.py, with memory and arithmetic in warps of their own.

One producer warp walks the lists of kept blocks and copies tiles of keys and values into a ring in shared memory; two
warpgroups of consumers, each with 64 query rows, multiply and sum:

    producer    wait empty, copy K(j);  wait empty, copy V(j)
    consumer    issue q K(j+1)^T;  softmax of scores j meanwhile;  wait;  o = o * 2^(m - m') + p V(j)

While one consumer computes exponentials the other's products run. A place of the ring has two barriers: "ready" counts
the bytes that have come, "empty" the consumers that are done. The n-th use of a place waits for phase n & 1.

Programs stay: each takes every gridDim-th item, an item being a tile of query rows of one head, long rows first.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tamis.backends.triton.kernels.gluon_api import (
    fence_async_shared,
    load_tile,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

LOG2E = gl.constexpr(1.4426950408889634)
_NONE = gl.constexpr(2147483647)


@gluon.jit
def _block(indices, entry, num, end, LISTS: gl.constexpr):
    """The block at an entry of the list, and `end` where nothing follows that can be seen."""
    if LISTS == 0:
        return gl.minimum(entry, end)
    else:
        block = gl.load(indices + entry, mask=entry < num, other=_NONE)
        return gl.minimum(gl.maximum(block, 0), end)


@gluon.jit
def _offset(batch, head, tile, stride_b, stride_h, stride_q, LISTS: gl.constexpr):
    """Where the list of an item starts; in 32 bits if that is enough, for there are no registers to spare."""
    if LISTS == 64:
        batch, head, tile = batch.to(gl.int64), head.to(gl.int64), tile.to(gl.int64)
    return batch * stride_b + head * stride_h + tile * stride_q


@gluon.jit
def _item(place, lists, sizes, LISTS: gl.constexpr, CAUSAL: gl.constexpr, BLOCK_KV: gl.constexpr, ROWS: gl.constexpr):
    """What both kinds of warps know of an item: its tile and heads, its list, and where edges and the visible end.

    The last rows of every head come first, for a section of heads at a time, whose keys share the L2.
    """
    kv_num, kv_indices, stride_numb, stride_numh, stride_idxb, stride_idxh, stride_idxq, max_blocks = lists
    (q_len, _, ahead, heads, _, _, all_heads, q_tiles, _, kv_blocks, whole_blocks, _, _, section, section_items, _) = (
        sizes
    )
    group = place // section_items
    inside = place - group * section_items
    size = gl.minimum(section, all_heads - group * section)
    tile = q_tiles - 1 - inside // size
    head_at = group * section + inside % size
    batch = head_at // heads
    head = head_at - batch * heads
    end, whole_end = kv_blocks, whole_blocks
    if CAUSAL:
        low = tile * ROWS + ahead
        high = gl.minimum(q_len, (tile + 1) * ROWS) - 1 + ahead
        end = gl.minimum(end, (gl.maximum(high + 1, 0) + BLOCK_KV - 1) // BLOCK_KV)
        whole_end = gl.minimum(whole_end, gl.maximum(low + 1, 0) // BLOCK_KV)
    num = end
    indices = kv_indices
    if LISTS > 0:
        num = gl.load(kv_num + _offset(batch, head, tile, stride_numb, stride_numh, 1, LISTS))
        num = gl.minimum(gl.maximum(num, 0), max_blocks)
        indices = kv_indices + _offset(batch, head, tile, stride_idxb, stride_idxh, stride_idxq, LISTS)
    return tile, batch, head, head_at, indices, num, whole_end, end


@gluon.jit
def _produce(
    who,
    LISTS: gl.constexpr,
    CAUSAL: gl.constexpr,
    BLOCK_KV: gl.constexpr,
    TILE_K: gl.constexpr,
    STAGES: gl.constexpr,
    SPLIT: gl.constexpr,
    PARTS: gl.constexpr,
    PV8: gl.constexpr,
    MENDS: gl.constexpr,
    descs,
    rooms,
    bars,
    lists,
    sizes,
    v_flags,
    flags,
):
    """Copy the tiles of queries, keys and values that the consumers want, as soon as there is room."""
    q_desc, k_desc, v_desc, sound_desc = descs
    q_room, k_room, v_room = rooms
    q_ready, q_empty, k_ready, k_empty, v_ready, v_empty = bars
    (
        _q_len,
        _kv_len,
        _ahead,
        _heads,
        kv_heads,
        kv_group,
        _all_heads,
        q_tiles,
        _row_tiles,
        _kv_blocks,
        _whole_blocks,
        value_tiles,
        items,
        _section,
        _section_items,
        programs,
    ) = sizes
    ROWS: gl.constexpr = 64 if SPLIT else 128
    PER_BLOCK: gl.constexpr = BLOCK_KV // TILE_K
    WIDTH: gl.constexpr = v_desc.block_type.shape[2 if PV8 else 3]
    base = who * STAGES if SPLIT else 0
    first = gl.program_id(0) * 2 + who if SPLIT else gl.program_id(0)
    every = programs * 2 if SPLIT else programs
    item = 0
    turn = 0
    for place in range(first, items, every):
        tile, batch, head, head_at, indices, num, whole_end, end = _item(
            place, lists, sizes, LISTS, CAUSAL, BLOCK_KV, ROWS
        )
        kv_head = head // kv_group
        for part in gl.static_range(1 if SPLIT else 2):
            mine = who + part
            mbarrier.wait(q_empty.index(mine), (item & 1) ^ 1)
            mbarrier.expect(q_ready.index(mine), q_desc.block_type.nbytes)
            load_tile(q_desc, [batch, head, tile * ROWS + part * 64, 0], q_ready.index(mine), q_room.index(mine))
        item += 1  # noqa: SIM113  (the compiler knows no enumerate)
        step = 0
        broken = 0
        block = _block(indices, 0, num, end, LISTS)
        while block < end:
            following = _block(indices, (step + 1) // PER_BLOCK, num, end, LISTS)
            start = block * BLOCK_KV + (step % PER_BLOCK) * TILE_K
            slot = base + turn % STAGES
            phase = (turn // STAGES & 1) ^ 1
            mended = block < 0  # which it is not: false as the device says it
            if MENDS:
                # Read before it waits. The second pass, of attend.py, adds what such values would have added.
                at = v_flags + (batch * kv_heads + kv_head).to(gl.int64) * value_tiles + start // 64
                flag = gl.load(at, mask=(block >= whole_end) & (start // 64 < value_tiles), other=0)
                broken |= flag
                mended = flag != 0
            mbarrier.wait(k_empty.index(slot), phase)
            mbarrier.expect(k_ready.index(slot), k_desc.block_type.nbytes)
            load_tile(k_desc, [batch, kv_head, start, 0], k_ready.index(slot), k_room.index(slot))
            mbarrier.wait(v_empty.index(slot), phase)
            mbarrier.expect(v_ready.index(slot), v_desc.block_type.nbytes * PARTS)
            for part in gl.static_range(PARTS):
                room = v_room.index(slot * PARTS + part)
                if PV8:
                    load_tile(v_desc, [batch, kv_head, part * WIDTH, start], v_ready.index(slot), room)
                elif not MENDS:
                    load_tile(v_desc, [batch, kv_head, start, part * WIDTH], v_ready.index(slot), room)
                else:
                    # 0 * NaN is NaN: where keys are masked, values come from tiles without any.
                    load_tile(v_desc, [batch, kv_head, start, part * WIDTH], v_ready.index(slot), room, pred=~mended)
                    load_tile(sound_desc, [batch, kv_head, start, part * WIDTH], v_ready.index(slot), room, pred=mended)
            turn += 1
            step += 1
            block = following
        if MENDS:
            gl.store(flags + head_at.to(gl.int64) * q_tiles + tile, broken)


@gluon.jit
def _scores(
    q, k_room, k_ready, slot, turn, SCORES: gl.constexpr, TILE_K: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr
):
    """Start q k^T of a tile, when its keys are there."""
    mbarrier.wait(k_ready.index(slot), turn // STAGES & 1)
    k = k_room.index(slot).reshape([TILE_K, D]).permute((1, 0))
    kind: gl.constexpr = gl.int32 if q.dtype == gl.int8 else gl.float32
    return warpgroup_mma(q, k, gl.zeros([64, TILE_K], kind, SCORES), use_acc=False, is_async=True)


@gluon.jit
def _visit(
    s,
    o,
    m,
    total,
    skipped,
    q,
    room,
    turn,
    base,
    block,
    step,
    k_scale,
    row_factor,
    rows,
    threshold,
    q_len,
    kv_len,
    ahead,
    NEXT: gl.constexpr,
    EDGE: gl.constexpr,
    CAUSAL: gl.constexpr,
    BLOCK_KV: gl.constexpr,
    TILE_K: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
    PARTS: gl.constexpr,
    SCORES: gl.constexpr,
    OUT: gl.constexpr,
    STAGE2: gl.constexpr,
    HEADROOM: gl.constexpr,
):
    """Take in the scores of one tile, while those of the next are being computed."""
    k_room, v_room, k_ready, k_empty, v_ready, v_empty = room
    QK8: gl.constexpr = s.dtype == gl.int32
    PV8: gl.constexpr = v_room.dtype == gl.float8e4nv
    PER_BLOCK: gl.constexpr = BLOCK_KV // TILE_K
    start = block * BLOCK_KV + (step % PER_BLOCK) * TILE_K
    n = gl.arange(0, TILE_K, gl.SliceLayout(0, SCORES))
    x = s.to(gl.float32)  # [64, TILE_K]
    after = base + (turn + 1) % STAGES
    if NEXT:
        coming = _scores(q, k_room, k_ready, after, turn + 1, SCORES, TILE_K, D, STAGES)
    # What multiplies scores is the row's where it can be, and then one multiply-add with the maximum.
    factor = row_factor
    if QK8:
        gl.static_assert(TILE_K <= 64, "keys of a tile have one scale")
        factor = row_factor * gl.load(k_scale + start // 64, mask=start < kv_len, other=0.0)
    if EDGE:
        limit = kv_len - start
        if CAUSAL:
            limit = gl.minimum(limit, rows + (ahead + 1 - start))[:, None]
        # A thread's columns are 8 i + j of a constant i each, and 2t of the thread: that one goes to the other side.
        seen = (n & -7)[None, :] < limit - (n & 6)[None, :]
        x = gl.where(seen, x * factor[:, None], float("-inf"))
        m_local = gl.max(x, 1)
    else:
        m_local = gl.max(x, 1) * factor
    m_next = gl.maximum(m, m_local)
    reference = gl.where(m_next == float("-inf"), 0.0, m_next)
    decay = gl.exp2(m - reference)
    if PV8:
        less = gl.where(m_local == float("-inf"), 0.0, m_local) - HEADROOM
        gain = gl.exp2(m_local - reference)
    else:
        less = reference
        gain = decay
    if EDGE:
        p = gl.exp2(x - less[:, None])
    else:
        p = gl.exp2(x * factor[:, None] - less[:, None])
    if PV8:
        total = total * decay + gl.sum(p, 1) * gain
    else:
        total = total * decay + gl.sum(p, 1)

    weights = _weights(p, v_room.dtype, TILE_K, OUT)
    if NEXT:
        s = warpgroup_mma_wait(0, deps=[coming])
        mbarrier.arrive(k_empty.index(after))
    slot = base + turn % STAGES
    mbarrier.wait(v_ready.index(slot), turn // STAGES & 1)
    if STAGE2:
        behind = gl.where(rows < q_len, m_local - reference, float("-inf"))
        taken = gl.max(gl.where(behind == behind, behind, 0.0), 0) > -threshold
        if EDGE:
            taken = taken | (gl.max(m_local, 0) == float("-inf"))
        # Of a block's tiles only those that exist count.
        of_block = gl.minimum((kv_len - block * BLOCK_KV + TILE_K - 1) // TILE_K, PER_BLOCK)
        skipped += gl.where(taken, 0.0, 1.0 / of_block)
        if taken:
            o = _add(o, weights, v_room, slot, decay, gain, PARTS, OUT)
    else:
        o = _add(o, weights, v_room, slot, decay, gain, PARTS, OUT)
    mbarrier.arrive(v_empty.index(slot))
    return s, o, m_next, total, skipped


@gluon.jit
def _weights(p, kind: gl.constexpr, TILE_K: gl.constexpr, OUT: gl.constexpr):
    """P as the left operand of the second product, in registers.

    A thread holds columns 2t, 2t + 1, 8 + 2t and 9 + 2t of every 16, and for e4m3 has to hold 4t .. 4t + 3. Values are
    stored in that other order (`value_fp8_kernel`), so that nothing has to move.
    """
    if kind == gl.float8e4nv:
        p = p.reshape([64, TILE_K // 16, 2, 4, 2]).permute((0, 1, 3, 2, 4)).reshape([64, TILE_K])
        weights = gl.convert_layout(p.to(kind), gl.DotOperandLayout(0, OUT, 4), assert_trivial=True)
    else:
        weights = gl.convert_layout(p.to(kind), gl.DotOperandLayout(0, OUT, 2), assert_trivial=True)
    return weights


@gluon.jit
def _add(o, weights, v_room, slot, decay, gain, PARTS: gl.constexpr, OUT: gl.constexpr):
    """o * decay + p v."""
    PV8: gl.constexpr = v_room.dtype == gl.float8e4nv
    BY_ROW: gl.constexpr = gl.SliceLayout(1, OUT)
    WIDTH: gl.constexpr = o[0].shape[1]
    TILE_K: gl.constexpr = weights.shape[1]
    decay = gl.convert_layout(decay, BY_ROW)
    gain = gl.convert_layout(gain, BY_ROW)
    made = ()
    for part in gl.static_range(PARTS):
        room = v_room.index(slot * PARTS + part)
        if PV8:
            # The sum inside a product of e4m3 keeps few bits: from tile to tile it is added up in fp32.
            v = room.reshape([WIDTH, TILE_K]).permute((1, 0))
            product = warpgroup_mma(weights, v, gl.zeros([64, WIDTH], gl.float32, OUT), use_acc=False, is_async=True)
            product = warpgroup_mma_wait(0, deps=[product])
            made = made + (o[part] * decay[:, None] + product * gain[:, None],)  # noqa: RUF005  (*made is unknown there)
        else:
            v = room.reshape([TILE_K, WIDTH])
            product = warpgroup_mma(weights, v, o[part] * decay[:, None], is_async=True)
            made = made + (warpgroup_mma_wait(0, deps=[product]),)  # noqa: RUF005
    return made


@gluon.jit
def _consume(
    who,
    LISTS: gl.constexpr,
    CAUSAL: gl.constexpr,
    BLOCK_KV: gl.constexpr,
    TILE_K: gl.constexpr,
    STAGES: gl.constexpr,
    SPLIT: gl.constexpr,
    PARTS: gl.constexpr,
    D: gl.constexpr,
    DV: gl.constexpr,
    VALUE_DIM: gl.constexpr,
    V_SCALES: gl.constexpr,
    STAGE2: gl.constexpr,
    HEADROOM: gl.constexpr,
    rooms,
    bars,
    tensors,
    lists,
    sizes,
    kv_tiles,
    factor,
):
    """Attention for 64 query rows after 64 query rows."""
    q_room, k_room, v_room = rooms
    output, lse, counts, q_scale, k_scale, v_scale, q_shift, pv_threshold = tensors
    q_ready, q_empty, k_ready, k_empty, v_ready, v_empty = bars
    (
        q_len,
        kv_len,
        ahead,
        _heads,
        kv_heads,
        kv_group,
        _all_heads,
        _q_tiles,
        row_tiles,
        _kv_blocks,
        _whole_blocks,
        _value_tiles,
        items,
        _section,
        _section_items,
        programs,
    ) = sizes
    room = (k_room, v_room, k_ready, k_empty, v_ready, v_empty)
    QK8: gl.constexpr = q_room.dtype == gl.int8
    PV8: gl.constexpr = v_room.dtype == gl.float8e4nv
    ROWS: gl.constexpr = 64 if SPLIT else 128
    PER_BLOCK: gl.constexpr = BLOCK_KV // TILE_K
    WIDTH: gl.constexpr = DV // PARTS
    HELD: gl.constexpr = D <= 128
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_K, 32 if QK8 else 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 32 if PV8 else 16])
    BY_ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    OUT_ROW: gl.constexpr = gl.SliceLayout(1, OUT)
    base = who * STAGES if SPLIT else 0
    first = gl.program_id(0) * 2 + who if SPLIT else gl.program_id(0)
    every = programs * 2 if SPLIT else programs
    item = 0
    turn = 0
    for place in range(first, items, every):
        tile, batch, head, head_at, indices, num, whole_end, end = _item(
            place, lists, sizes, LISTS, CAUSAL, BLOCK_KV, ROWS
        )
        start_row = tile * ROWS + (0 if SPLIT else who * 64)
        rows = start_row + gl.arange(0, 64, BY_ROW)
        row_at = head_at.to(gl.int64) * q_len + rows
        row_factor = gl.full([64], factor, gl.float32, BY_ROW)
        scales = k_scale
        if QK8:
            row_factor = gl.load(q_scale + row_at, mask=rows < q_len, other=0.0) * factor
            scales = k_scale + (batch * kv_heads + head // kv_group) * kv_tiles  # 2^31 tiles of keys fit no GPU
        threshold = factor
        if STAGE2:
            threshold = gl.load(pv_threshold + head) * LOG2E

        o = ()
        for _ in gl.static_range(PARTS):
            o = o + (gl.zeros([64, WIDTH], gl.float32, OUT),)  # noqa: RUF005  (nor *o)
        m = gl.full([64], float("-inf"), gl.float32, BY_ROW)
        total = gl.zeros([64], gl.float32, BY_ROW)
        skipped = 0.0
        step = 0
        mbarrier.wait(q_ready.index(who), item & 1)
        q = q_room.index(who).reshape([64, D])
        if HELD:
            # In registers queries take nothing of the bandwidth of shared memory, and their room is free at once.
            q = q.load(gl.DotOperandLayout(0, SCORES, 4 if QK8 else 2))
            fence_async_shared()  # the next copy, which is asynchronous, may not overtake this read
            mbarrier.arrive(q_empty.index(who))
        block = _block(indices, 0, num, end, LISTS)
        if block < end:
            following = _block(indices, 1 // PER_BLOCK, num, end, LISTS)
            slot = base + turn % STAGES
            s = warpgroup_mma_wait(0, deps=[_scores(q, k_room, k_ready, slot, turn, SCORES, TILE_K, D, STAGES)])
            mbarrier.arrive(k_empty.index(slot))
            while (following < end) & (block < whole_end):
                later = _block(indices, (step + 2) // PER_BLOCK, num, end, LISTS)
                s, o, m, total, skipped = _visit(
                    *(s, o, m, total, skipped, q, room, turn, base, block, step, scales),
                    *(row_factor, rows, threshold, q_len, kv_len, ahead),
                    *(True, False, CAUSAL, BLOCK_KV, TILE_K, D, STAGES, PARTS, SCORES, OUT, STAGE2, HEADROOM),
                )
                turn += 1
                step += 1
                block = following
                following = later
            while following < end:
                later = _block(indices, (step + 2) // PER_BLOCK, num, end, LISTS)
                s, o, m, total, skipped = _visit(
                    *(s, o, m, total, skipped, q, room, turn, base, block, step, scales),
                    *(row_factor, rows, threshold, q_len, kv_len, ahead),
                    *(True, True, CAUSAL, BLOCK_KV, TILE_K, D, STAGES, PARTS, SCORES, OUT, STAGE2, HEADROOM),
                )
                turn += 1
                step += 1
                block = following
                following = later
            if not HELD:
                mbarrier.arrive(q_empty.index(who))
            s, o, m, total, skipped = _visit(
                *(s, o, m, total, skipped, q, room, turn, base, block, step, scales),
                *(row_factor, rows, threshold, q_len, kv_len, ahead),
                *(False, True, CAUSAL, BLOCK_KV, TILE_K, D, STAGES, PARTS, SCORES, OUT, STAGE2, HEADROOM),
            )
            turn += 1
            step += 1
        elif not HELD:
            mbarrier.arrive(q_empty.index(who))
        item += 1  # noqa: SIM113  (the compiler knows no enumerate)

        empty = total == 0
        sum_log = m + gl.log2(total) - HEADROOM
        if QK8:
            sum_log += gl.load(q_shift + row_at, mask=rows < q_len, other=0.0) * factor
        gl.store(lse + row_at, gl.where(empty, float("-inf"), sum_log) / LOG2E, mask=rows < q_len)
        inverse = gl.convert_layout(gl.where(empty, 0.0, 1.0 / total), OUT_ROW)
        none = gl.convert_layout(empty, OUT_ROW)
        out_rows = start_row + gl.arange(0, 64, OUT_ROW)
        for part in gl.static_range(PARTS):
            d = part * WIDTH + gl.arange(0, WIDTH, gl.SliceLayout(0, OUT))
            made = o[part] * inverse[:, None]
            if PV8:
                kv_at = (batch * kv_heads + head // kv_group).to(gl.int64)
                made = made * gl.load(v_scale + kv_at * V_SCALES + d, mask=d < VALUE_DIM, other=0.0)[None, :]
            made = gl.where(none[:, None], 0.0, made)
            at = output + (head_at.to(gl.int64) * q_len + out_rows)[:, None] * VALUE_DIM + d[None, :]
            inside = (out_rows < q_len)[:, None] & (d < VALUE_DIM)[None, :]
            gl.store(at, made.to(output.dtype.element_ty), mask=inside)

        # Blocks visible and kept, of the whole item; what was left out, of each half of it.
        halves: gl.constexpr = 1 if SPLIT else 2
        here = tile * halves + (0 if SPLIT else who)
        if here < row_tiles:
            count_at = counts + (head_at.to(gl.int64) * row_tiles + here) * 3
            leads = here % halves == 0
            kept = gl.where(leads, step // PER_BLOCK, 0).to(gl.float64)
            of_rows = gl.minimum(q_len - start_row, 64).to(gl.float64)
            of_item = gl.minimum(q_len - tile * ROWS, ROWS).to(gl.float64)
            gl.store(count_at, gl.where(leads, end, 0).to(gl.float64))
            gl.store(count_at + 1, kept)
            gl.store(count_at + 2, kept - skipped.to(gl.float64) * of_rows / of_item)


@gluon.jit(
    do_not_specialize=[
        "stride_numb",
        "stride_numh",
        "stride_idxb",
        "stride_idxh",
        "stride_idxq",
        "max_blocks",
        "q_len",
        "kv_len",
        "ahead",
        "heads",
        "kv_heads",
        "kv_group",
        "all_heads",
        "q_tiles",
        "row_tiles",
        "kv_blocks",
        "whole_blocks",
        "value_tiles",
        "items",
        "section",
        "section_items",
        "programs",
        "kv_tiles",
        "factor",
    ]
)
def hopper_kernel(
    q_desc,
    k_desc,
    v_desc,
    sound_desc,
    output,
    lse,
    counts,
    flags,
    v_flags,
    q_scale,
    k_scale,
    v_scale,
    q_shift,
    kv_num,
    kv_indices,
    pv_threshold,
    stride_numb,
    stride_numh,
    stride_idxb,
    stride_idxh,
    stride_idxq,
    max_blocks,
    q_len,
    kv_len,
    ahead,
    heads,
    kv_heads,
    kv_group,
    all_heads,
    q_tiles,
    row_tiles,
    kv_blocks,
    whole_blocks,
    value_tiles,
    items,
    section,
    section_items,
    programs,
    kv_tiles,
    factor,
    D: gl.constexpr,
    DV: gl.constexpr,
    VALUE_DIM: gl.constexpr,
    V_SCALES: gl.constexpr,
    BLOCK_KV: gl.constexpr,
    TILE_K: gl.constexpr,
    STAGES: gl.constexpr,
    CAUSAL: gl.constexpr,
    SPLIT: gl.constexpr,
    LISTS: gl.constexpr,
    STAGE2: gl.constexpr,
    MENDS: gl.constexpr,
    HEADROOM: gl.constexpr,
):
    """Attention over lists of blocks; grid (programs,), whatever their number.

    An item is 128 rows, of which each consumer takes half; or, with SPLIT (blocks of 64 rows, whose lists differ), 64
    rows of one consumer with a ring and a producer of its own. Tensors that a call lacks are any other; LISTS says
    whether there are lists: 0, or the bits of a place in them. STAGE2: whether pv_threshold is given. MENDS: at
    edges, tiles of values that are not all finite come from sound_desc, where those that are not are 0, and `flags`,
    int32 `[batch * heads, q_tiles]`, tells of them for the second pass of attend.py; v_flags, `[.., 64-key tiles]`, of
    where they are. factor: scale * log2(e). V_SCALES: length of a row of v_scale.
    `counts` is that of attend.py, for tiles of 64 rows.

    What could be computed from other arguments is one too: a number worked out before the warps part is kept by all of
    them in registers, of which the copying ones have few, and an argument is read where it is used.
    """
    # Else the upper half of each, for products of 64 bits, would be one more number that all warps keep.
    gl.assume((q_len >= 0) & (row_tiles >= 0) & (q_tiles >= 0) & (value_tiles >= 0))
    PARTS: gl.constexpr = 1 if DV <= 128 else DV // 64
    RINGS: gl.constexpr = 2 if SPLIT else 1
    # Registers of consumers and copying warps, of 504 for three warpgroups: found by compiling.
    FEW: gl.constexpr = 40 if D > 128 and q_desc.dtype == gl.int8 and v_desc.dtype != gl.float8e4nv else 24
    MOST: gl.constexpr = 232 if FEW == 40 else 240
    PV8: gl.constexpr = v_desc.dtype == gl.float8e4nv
    q_room = gl.allocate_shared_memory(q_desc.dtype, [2, 1, 1, 64, D], q_desc.layout)
    k_room = gl.allocate_shared_memory(k_desc.dtype, [RINGS * STAGES, 1, 1, TILE_K, D], k_desc.layout)
    V_ROWS: gl.constexpr = DV // PARTS if PV8 else TILE_K
    V_COLUMNS: gl.constexpr = TILE_K if PV8 else DV // PARTS
    v_room = gl.allocate_shared_memory(v_desc.dtype, [RINGS * STAGES * PARTS, 1, 1, V_ROWS, V_COLUMNS], v_desc.layout)
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    q_ready = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    k_ready = gl.allocate_shared_memory(gl.int64, [RINGS * STAGES, 1], BAR)
    k_empty = gl.allocate_shared_memory(gl.int64, [RINGS * STAGES, 1], BAR)
    v_ready = gl.allocate_shared_memory(gl.int64, [RINGS * STAGES, 1], BAR)
    v_empty = gl.allocate_shared_memory(gl.int64, [RINGS * STAGES, 1], BAR)
    for i in gl.static_range(2):
        mbarrier.init(q_ready.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(RINGS * STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=1 if SPLIT else 2)
        mbarrier.init(v_ready.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=1 if SPLIT else 2)
    fence_async_shared()  # copies, which are asynchronous, are to find the barriers initialised
    rooms = (q_room, k_room, v_room)
    bars = (q_ready, q_empty, k_ready, k_empty, v_ready, v_empty)
    descs = (q_desc, k_desc, v_desc, sound_desc)
    tensors = (output, lse, counts, q_scale, k_scale, v_scale, q_shift, pv_threshold)
    lists = (kv_num, kv_indices, stride_numb, stride_numh, stride_idxb, stride_idxh, stride_idxq, max_blocks)
    sizes = (
        q_len,
        kv_len,
        ahead,
        heads,
        kv_heads,
        kv_group,
        all_heads,
        q_tiles,
        row_tiles,
        kv_blocks,
        whole_blocks,
        value_tiles,
        items,
        section,
        section_items,
        programs,
    )
    consumer = (rooms, bars, tensors, lists, sizes, kv_tiles, factor)
    producer = (descs, rooms, bars, lists, sizes, v_flags, flags)
    # Constants written out, and on the left: those that a variable holds, or that are added to others, are no more.
    # fmt: off
    gl.warp_specialize(
        [
            (_consume, (at, LISTS, CAUSAL, BLOCK_KV, TILE_K, STAGES, SPLIT, PARTS, D, DV, VALUE_DIM, V_SCALES, STAGE2,  # noqa: RUF005
                        HEADROOM) + consumer)
            if at < 2
            else (_produce, (at - 2, LISTS, CAUSAL, BLOCK_KV, TILE_K, STAGES, SPLIT, PARTS, PV8, MENDS) + producer)  # noqa: RUF005
            for at in ((0, 1, 2, 3) if SPLIT else (0, 1, 2))
        ],
        [4, 1, 1] if SPLIT else [4, 1],
        [MOST, FEW, FEW] if SPLIT else [MOST, FEW],
    )
    # fmt: on
