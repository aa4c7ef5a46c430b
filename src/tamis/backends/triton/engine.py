"""Attention over lists of blocks: operands in the precision asked for, then kernels/attend.py, or hopper.py."""

from __future__ import annotations

import torch
from torch import Tensor

from tamis import geometry
from tamis.backends.triton import chips, hopper, launch
from tamis.backends.triton.arguments import batch_stride, bounds
from tamis.backends.triton.lists import used_tiles
from tamis.backends.triton.operands import operands
from tamis.backends.triton.settings import tiles


def attend(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    packed: list[Tensor],
    kv_num_blocks: Tensor | None,
    kv_indices: Tensor | None,
    block_q: int,
    block_kv: int,
    causal: bool,
    window: int | None,
    scale: float,
    attn_mask: Tensor | None,
    q_positions: Tensor | None,
    kv_positions: Tensor | None,
    q_segments: Tensor | None,
    kv_segments: Tensor | None,
    q_bounds: Tensor | None,
    kv_bounds: Tensor | None,
    visible: Tensor | None,
    softcap: float | None,
    sink_logits: Tensor | None,
    precision: str,
    pv_threshold: Tensor | None,
    prepared: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Run attention; see `tamis.backends.base`."""
    from tamis.backends.triton.kernels.attend import LOG2E, attend_kernel

    batch, heads, q_len, dim = query.shape
    if key is None or value is None:
        kv_heads, kv_len, value_dim = packed[0].shape[1], int(packed[7][0]), packed[4].shape[3]
    else:
        kv_heads, kv_len, value_dim = key.shape[1], key.shape[2], value.shape[3]
    device, chip = query.device, chips.of(query.device)
    q_blocks, kv_blocks = geometry.num_blocks(q_len, block_q), geometry.num_blocks(kv_len, block_kv)
    output = query.new_empty((batch, heads, q_len, value_dim))
    lse = query.new_empty((batch, heads, q_len), dtype=torch.float32)
    if output.numel() == 0 or kv_heads == 0:
        return output, lse, torch.zeros((batch, heads, q_blocks, 3), dtype=torch.float64, device=device)

    if window is not None and q_positions is None:
        window = min(window, 2**31 - 1)  # no distance is larger
    lists, list_strides = _lists(kv_num_blocks, kv_indices)
    seen = bounds(q_bounds, kv_bounds, visible)
    counted = None
    if precision != "full" and key is not None:
        counted = geometry.without_hidden(attn_mask, kv_segments)
        counted = None if counted is None else counted.contiguous()
    sizes = (q_len, kv_len, heads, kv_heads, q_blocks, kv_blocks)

    def used() -> Tensor | None:
        return used_tiles(output, lists, list_strides, seen, sizes, (block_q, block_kv), causal, window)

    regular = q_bounds is None and visible is None
    general = hopper.reason(
        chip.name,
        precision,
        query.dtype,
        (dim, value_dim),
        block_q,
        lists,
        packed=key is None,
        window=window is not None,
        irregular=not regular or attn_mask is not None,
        scores_changed=softcap is not None or sink_logits is not None,
        scale=scale,
    ) or hopper.few_rows(q_len)
    hopper.insist(general)
    inputs = operands(query, key, value, packed, prepared, precision, counted, used, general is None)
    value_width = launch.power(value_dim)
    shape = (inputs.width, value_width, block_q, block_kv, q_len)
    mend = tiles(chip, "mend", *shape)
    if general is None:
        done = hopper.attend(
            inputs,
            output,
            lse,
            lists,
            None if pv_threshold is None else pv_threshold.to(torch.float32).contiguous(),
            kv_len=kv_len,
            block_size=(block_q, block_kv),
            causal=causal,
            factor=scale * LOG2E.value,
        )
        counts, flags, rows = done.counts, done.flags, done.rows
        passes = [] if flags is None else [(mend, done.flag_rows)]
    else:
        plain = regular and not inputs.wide and not inputs.scattered
        skips = pv_threshold is not None
        cut = tiles(chip, inputs.kind, *shape, regular=plain, window=window is not None, skips=skips)
        rows = cut.rows
        counts = torch.empty((batch, heads, geometry.num_blocks(q_len, rows), 3), dtype=torch.float64, device=device)
        flags = query.new_empty(counts.shape[:3], dtype=torch.int32)
        passes = [(cut, 0)]
        # Without an edge there is no pair that is not seen, and 0 * NaN is what it should be.
        edges = not regular or causal or window is not None or kv_len % block_kv != 0
        if inputs.products in ("input", "bf16") and edges:
            passes.append((mend, rows))
    # Numbers that users give may lie so near the end of fp32 that log2(e) times them does not fit.
    natural = (attn_mask is not None and attn_mask.dtype != torch.bool) or sink_logits is not None
    natural = natural or (softcap is not None and softcap > 1e38)
    per_token = [None if t is None else t.contiguous() for t in (q_positions, kv_positions, q_segments, kv_segments)]
    for part, flag_rows in passes:
        q_tiles = geometry.num_blocks(q_len, part.rows)
        launch.run(
            attend_kernel,
            (q_tiles * heads * batch,),
            *(inputs.q, inputs.k, inputs.v, output, lse, counts, flags),
            *(inputs.q_scale, inputs.k_scale, inputs.v_scale, inputs.q_shift, *lists),
            *(None if t is None else t.to(torch.float32).contiguous() for t in (sink_logits, pv_threshold)),
            *(attn_mask, *per_token, *seen[:3]),
            *(*inputs.q.stride(), *inputs.k.stride(), *inputs.v.stride()[:4], *list_strides),
            *((0,) * 4 if attn_mask is None else attn_mask.stride()),
            *(batch_stride(t) for t in per_token),
            *seen[3:],
            *(q_len, kv_len, heads, kv_heads, q_tiles, q_blocks, kv_blocks),
            0 if inputs.k_scale is None else inputs.k_scale.shape[2],
            0 if lists[1] is None else lists[1].shape[-1],
            window or 0,
            scale / softcap if softcap is not None else scale if natural else scale * LOG2E.value,
            softcap,
            device=device,
            warps=part.warps,
            stages=part.stages,
            registers=part.registers,
            HEAD_DIM=dim,
            VALUE_DIM=value_dim,
            D=inputs.width,
            DV=value_width,
            SLICE=0 if inputs.kind != "fp32" or inputs.width <= 64 else 32 if inputs.width <= 128 else 16,
            K_EVEN=inputs.k_even,
            V_EVEN=inputs.v_even,
            BLOCK_Q=block_q,
            BLOCK_KV=block_kv,
            TILE_Q=part.rows,
            TILE_K=part.keys,
            CAUSAL=causal,
            WINDOW=window is not None,
            QK8=precision != "full",
            PV=inputs.products,
            DOT32=chip.dot32,
            # P in e4m3 has 17 powers of two below its largest number.
            HEADROOM=0 if inputs.products != "fp8" else 8 if chip.fp8 == torch.float8_e4m3fn else 7,
            NATURAL=natural,
            CHUNK=256,
            WIDE=inputs.wide,
            FLAG_ROWS=flag_rows,
        )
    return output, lse, _by_block(counts, q_blocks, block_q // rows)


def _lists(num: Tensor | None, indices: Tensor | None) -> tuple[tuple[Tensor | None, Tensor | None], tuple[int, ...]]:
    """Counts and indices, the latter with rows in one piece, and their strides."""
    if num is None or indices is None:
        return (None, None), (0,) * 6
    indices = indices if indices.stride(-1) == 1 else indices.contiguous()
    return (num, indices), (*num.stride(), *indices.stride()[:3])


def _by_block(counts: Tensor, q_blocks: int, parts: int) -> Tensor:
    """Counts of tiles added up over the blocks of the mask."""
    if parts == 1:
        return counts
    missing = q_blocks * parts - counts.shape[2]
    padded = torch.nn.functional.pad(counts, (0, 0, 0, missing))
    return torch.unflatten(padded, 2, (q_blocks, parts)).sum(3)
