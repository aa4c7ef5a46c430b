"""Packing of key and value, and attention, in native code. Stage 2 skips groups of 16 query rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tamis import geometry
from tamis.backends.cpu import library, native
from tamis.mixing import neighbours

PACK_BLOCK = 64
# Of library.threads, measured: each is some 60 us of work.
_ASLEEP = {"tiles": 1_500_000, "int8": 1_000_000, "full": 500_000}


def packed_struct(packed: Sequence[Tensor], mixed: int) -> native.Packed:
    """Pointers to key8, key_scale, key_sum, value8, value_scale, value_sum, mean; see `PackedKV`."""
    args = native.Packed()
    args.capacity, args.dim4, args.mixed = packed[0].shape[2], packed[0].shape[4], mixed
    args.key, args.key_scale, args.key_sum, args.value, args.value_scale, args.value_sum, args.key_mean = (
        t.data_ptr() for t in packed[:7]
    )
    return args


def pack_kv(
    key: Tensor, value: Tensor, mean: Tensor, segments: Tensor | None, used: Tensor | None = None
) -> list[Tensor]:
    """Quantise key (less its mean) and value in blocks of 64 keys; layout in csrc/attend.h."""
    batch, heads, length, dim = key.shape
    value_dim = value.shape[3]
    blocks = -(-length // PACK_BLOCK)
    lead = (batch, heads, blocks)
    packed = [
        torch.empty((*lead, PACK_BLOCK, (dim + 3) // 4 * 4), dtype=torch.int8),
        torch.empty(lead, dtype=torch.float32),
        torch.empty((*lead, PACK_BLOCK), dtype=torch.int32),
        torch.empty((*lead, value_dim, PACK_BLOCK), dtype=torch.int8),
        torch.empty((*lead, value_dim), dtype=torch.float32),
        torch.empty((*lead, value_dim), dtype=torch.int32),
    ]
    dense_mean = mean.to(torch.float32).contiguous()
    dense_used = None if used is None else used.expand(lead).contiguous()
    args = native.Pack()
    args.batch, args.kv_heads, args.seq, args.head_dim, args.value_dim = batch, heads, length, dim, value_dim
    args.key, args.value = native.tensor(key), native.tensor(value)
    kept = library.attach_segments(args, segments)
    args.used, args.packed = native.pointer(dense_used), packed_struct([*packed, dense_mean], neighbours(dim))
    args.threads = library.threads(2 * (key.numel() + value.numel()))
    library.run("pack_kv", args)
    del kept
    return packed


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
    heads, q_len = query.shape[1:3]
    kv_heads = (packed[0] if key is None else key).shape[1]
    differs_by_head = (kv_num_blocks, attn_mask, sink_logits, pv_threshold, visible)
    differs_by_row = (window, q_positions, kv_positions, q_segments, kv_segments)
    grouped = groups(query, kv_heads, *differs_by_head, *differs_by_row)
    if grouped:
        query, causal = group(query, kv_heads), False
    args, kept = attend_args(
        query,
        (key, value, packed),
        (kv_num_blocks, kv_indices),
        (block_q, block_kv),
        (causal, window),
        (q_positions, kv_positions, q_segments, kv_segments, q_bounds, kv_bounds, visible),
        (scale, softcap, attn_mask, sink_logits, pv_threshold),
        precision,
        # However many heads there are, a group is one row of each: key and value are read once, which no tile repays.
        bf16_products=q_len >= geometry.TILE_ROWS,
    )
    output, lse, counts = results(args, query.dtype)
    library.run("attend", args)
    del kept
    return ungroup(output, lse, counts, heads) if grouped else (output, lse, counts)


def groups(query: Tensor, kv_heads: int, *differences: object) -> bool:
    """Whether heads that share a key are rows of one block and read it once: in decoding, if nothing sets them apart.

    The last query sees every key.
    """
    heads, q_len = query.shape[1:3]
    return q_len == 1 and heads > kv_heads > 0 and all(difference is None for difference in differences)


def group(query: Tensor, kv_heads: int) -> Tensor:
    """One query of every head, as rows of the key head they read."""
    batch, heads, _, head_dim = query.shape
    return query.reshape(batch, kv_heads, heads // kv_heads, head_dim)


def ungroup(output: Tensor, lse: Tensor, counts: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Results of grouped queries as those of single ones."""
    batch, kv_heads, _, value_dim = output.shape
    counts = counts[:, :, None, :1].expand(-1, -1, heads // kv_heads, -1, -1)
    return (
        output.reshape(batch, heads, 1, value_dim),
        lse.reshape(batch, heads, 1),
        counts.reshape(batch, heads, 1, 3),
    )


def results(args: native.Attend, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Room for what a call returns, and `args` pointing to it."""
    output, lse, counts = (torch.empty(shape, dtype=dtype) for shape, dtype in result_shapes(args, dtype))
    args.output, args.lse, args.counts = output.data_ptr(), lse.data_ptr(), counts.data_ptr()
    return output, lse, counts


def result_shapes(args: native.Attend, dtype: torch.dtype) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of output, log-sum-exp and counts."""
    lead, q_len = (args.batch, args.heads), args.geometry.q_len
    return [
        ((*lead, q_len, args.value_dim), dtype),
        ((*lead, q_len), torch.float32),
        ((*lead, -(-q_len // args.geometry.block_q), 3), torch.float64),
    ]


def attend_args(
    query: Tensor,
    source: tuple[Tensor | None, Tensor | None, Sequence[Tensor]],
    lists: tuple[Tensor | None, Tensor | None],
    block_size: tuple[int, int],
    reach: tuple[bool, int | None],
    places: tuple[Tensor | None, ...],
    scores: tuple[float, float | None, Tensor | None, Tensor | None, Tensor | None],
    precision: str,
    *,
    bf16_products: bool,
) -> tuple[native.Attend, list[object]]:
    """The native arguments but for the results, and what must stay alive.

    source: key, value and packed tensors. reach: causal and window. places: positions and segments of queries and keys,
    bounds of both, what is visible. scores: scale, softcap, attn_mask, sink logits and pv_threshold.
    """
    key, value, packed = source
    scale, softcap, attn_mask, sink_logits, pv_threshold = scores
    args = native.Attend()
    args.batch, args.heads, q_len, args.head_dim = query.shape
    args.query, args.int8, args.bf16_products = native.tensor(query), precision == "int8", bf16_products
    if packed:
        packed = [t.contiguous() for t in packed]
        kv_len, mixed = packed[7].tolist()
        args.packed = packed_struct(packed, mixed)
        args.kv_heads, args.value_dim = packed[0].shape[1], packed[3].shape[3]
    else:
        assert key is not None and value is not None
        args.key, args.value = native.tensor(key), native.tensor(value)
        args.kv_heads, kv_len, args.value_dim = key.shape[1], key.shape[2], value.shape[3]
    kept: list[object] = [packed]
    kept += native.fill_geometry(args.geometry, (q_len, kv_len), block_size, *reach, places[:4], *places[4:])
    kv_num_blocks, kv_indices = lists
    if kv_num_blocks is not None and kv_indices is not None:
        kv_indices = kv_indices if kv_indices.stride(-1) == 1 else kv_indices.contiguous()
        args.kv_num_blocks, args.kv_indices = kv_num_blocks.data_ptr(), kv_indices.data_ptr()
        args.num_stride[:], args.idx_stride[:] = kv_num_blocks.stride(), kv_indices.stride()[:3]
        args.max_blocks = kv_indices.shape[-1]
    args.scale, args.softcap = scale, softcap or 0.0
    if attn_mask is not None:
        args.attn_mask = native.tensor(attn_mask)
    dense_sinks = None if sink_logits is None else sink_logits.to(torch.float32).contiguous()
    dense_threshold = None if pv_threshold is None else pv_threshold.to(torch.float32).contiguous()
    args.sink_logits, args.pv_threshold = native.pointer(dense_sinks), native.pointer(dense_threshold)
    work = query.numel() // query.shape[3] * kv_len * (query.shape[3] + args.value_dim) // 8
    tiles = bf16_products and library.target() == "amx" and (precision == "int8" or query.dtype == torch.bfloat16)
    args.threads = library.threads(work, asleep=_ASLEEP["tiles" if tiles else precision])
    if precision == "int8" and not packed:
        kept.append(library.attach_segments(args, geometry.without_hidden(attn_mask, places[3])))
    return args, [*kept, kv_indices, dense_sinks, dense_threshold]
