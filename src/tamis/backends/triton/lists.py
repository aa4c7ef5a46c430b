"""Lists of blocks: chosen by a prediction, and the tiles of keys that a call's lists visit; kernels/choose.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tamis import geometry
from tamis.backends.triton import chips, launch
from tamis.backends.triton.arguments import bounds, table_strides
from tamis.backends.triton.prepare import TILE, Rounded, digest, key_mean, room

ROWS, COLUMNS = 32, 64  # blocks whose scores a program computes


def chunk_of(kv_blocks: int) -> int:
    """Scores of a row that a program holds at a time."""
    return 256 if kv_blocks <= 256 else 2048


def select(
    q_means: Tensor,
    q_similarity: Tensor,
    k_means: Tensor,
    k_similarity: Tensor,
    scale: float,
    cdf: Tensor | None,
    topk: Tensor | None,
    similarity: Tensor,
    sink: bool,
    causal: bool,
    window: int | None,
    q_len: int,
    kv_len: int,
    block_q: int,
    block_kv: int,
    q_bounds: Tensor | None,
    kv_bounds: Tensor | None,
    visible: Tensor | None,
    must: Tensor | None,
    trim: bool,
) -> tuple[Tensor, Tensor]:
    """Choose key blocks from block means and similarities."""
    from tamis.backends.triton.kernels import choose

    batch, heads, q_blocks, dim = q_means.shape
    kv_heads, kv_blocks = k_means.shape[1:3]
    device = q_means.device
    num = torch.empty((batch, heads, q_blocks), dtype=torch.int32, device=device)
    table = q_means.new_empty((batch, heads, q_blocks, kv_blocks), dtype=torch.int32)
    if 0 in table.shape:
        return num.zero_(), table.new_zeros((*num.shape, max(1, kv_blocks)))
    grid = (geometry.num_blocks(q_blocks, ROWS) * geometry.num_blocks(kv_blocks, COLUMNS) * batch * heads,)
    launch.run(
        choose.scores_kernel,
        grid,
        *(q_means.contiguous(), k_means.contiguous(), k_similarity.contiguous(), similarity.contiguous(), table),
        *bounds(q_bounds, kv_bounds, visible),
        *(q_len, kv_len, heads, kv_heads, q_blocks, kv_blocks, window or 0, scale),
        device=device,
        DIM=dim,
        SLICE=min(32, launch.power(dim)),
        BLOCK_Q=block_q,
        BLOCK_KV=block_kv,
        CAUSAL=causal,
        WINDOW=window is not None,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        DOT32=chips.of(device).dot32,
    )
    per_head = (None if t is None else t.contiguous() for t in (cdf, topk))
    if must is not None:
        must = must.expand(-1, -1, q_blocks, kv_blocks).contiguous()
    chunk = chunk_of(kv_blocks)
    launch.run(
        choose.choose_kernel,
        (q_blocks * batch * heads,),
        *(table, num, q_similarity.contiguous(), similarity.contiguous(), *per_head, must, *table_strides(must)),
        *(q_len, kv_len, heads, q_blocks, kv_blocks),
        device=device,
        warps=2 if kv_blocks <= 256 else 8,
        BLOCK_Q=block_q,
        BLOCK_KV=block_kv,
        SINK=sink,
        DIAGONAL=causal and q_bounds is None,
        CHUNK=chunk,
        WHOLE=kv_blocks <= chunk,
    )
    if trim:
        table = table[..., : max(1, int(num.max()) if num.numel() else 1)].contiguous()
    return num, table


def predict(
    query: Tensor,
    key: Tensor,
    q_segments: Tensor | None,
    kv_segments: Tensor | None,
    scale: float,
    cdf: Tensor | None,
    topk: Tensor | None,
    similarity: Tensor,
    sink: bool,
    causal: bool,
    window: int | None,
    block_q: int,
    block_kv: int,
    q_bounds: Tensor | None,
    kv_bounds: Tensor | None,
    visible: Tensor | None,
    must: Tensor | None,
    trim: bool,
    precision: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """A prediction in one pass over query and two over key; in 8 bits the same pass rounds them for `attend`."""
    mean = key_mean(key, kv_segments, None)
    prepared = room(query, key, block_kv, precision)
    rounded = Rounded(*prepared)
    q_means, q_similarity, k_means, k_similarity = digest(
        query, key, mean, q_segments, kv_segments, block_size=(block_q, block_kv), pools=True, rounded=rounded
    )
    lists = select(
        q_means,
        q_similarity,
        k_means,
        k_similarity,
        scale=scale,
        cdf=cdf,
        topk=topk,
        similarity=similarity,
        sink=sink,
        causal=causal,
        window=window,
        q_len=query.shape[2],
        kv_len=key.shape[2],
        block_q=block_q,
        block_kv=block_kv,
        q_bounds=q_bounds,
        kv_bounds=kv_bounds,
        visible=visible,
        must=must,
        trim=trim,
    )
    return *lists, prepared


def used_tiles(
    output: Tensor,
    lists: tuple[Tensor | None, Tensor | None],
    list_strides: tuple[int, ...],
    seen: tuple[Any, ...],
    sizes: tuple[int, ...],
    block_size: tuple[int, int],
    causal: bool,
    window: int | None,
) -> Tensor | None:
    """64-key tiles that some row visits, int8 `[batch, kv_heads, tiles]`; None for all of them."""
    from tamis.backends.triton.kernels import choose

    if lists[1] is None and window is None and seen[0] is None and seen[2] is None:
        return None  # the last row sees every key
    batch, device = output.shape[0], output.device
    _, kv_len, heads, kv_heads, q_blocks, _ = sizes
    used = torch.zeros((batch, kv_heads, geometry.num_blocks(kv_len, TILE)), dtype=torch.int8, device=device)
    launch.run(
        choose.used_kernel,
        (q_blocks * batch * heads,),
        *(*lists, used, *seen[:3], *list_strides, *seen[3:]),
        *(*sizes, 0 if lists[1] is None else lists[1].shape[-1], window or 0),
        device=device,
        BLOCK_Q=block_size[0],
        BLOCK_KV=block_size[1],
        CAUSAL=causal,
        WINDOW=window is not None,
        CHUNK=256,
    )
    return used
