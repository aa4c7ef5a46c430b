"""Reading query, key and value once: means, similarities and 8-bit copies; the kernels are in kernels/pool.py."""

from __future__ import annotations

import torch
from torch import Tensor

from tamis import geometry
from tamis.backends.triton import chips, launch
from tamis.backends.triton.arguments import batch_stride

TILE = 64  # keys that share a scale
_CHUNK_TILES = 16  # tiles that one program of a reduction over the sequence reads


def _reading_warps(width: int) -> int:
    """Warps that hold a tile of 64 rows with room to spare."""
    return 4 if width <= 64 else 8 if width <= 128 else 16


def key_mean(key: Tensor, segments: Tensor | None, used: Tensor | None) -> Tensor:
    """Mean key of every head over its finite tokens with a segment >= 0 in the used 64-key tiles, fp32."""
    from tamis.backends.triton.kernels import pool

    segments = None if segments is None else segments.contiguous()
    batch, heads, length, dim = key.shape
    tiles = geometry.num_blocks(length, TILE)
    chunks = geometry.num_blocks(tiles, _CHUNK_TILES)
    means = key.new_empty((batch * heads, chunks, dim), dtype=torch.float32)
    numbers = key.new_empty((batch * heads, chunks), dtype=torch.float32)
    mean = key.new_empty((batch, heads, dim), dtype=torch.float32)
    pad = launch.power(dim)
    used = None if used is None else used.expand(batch, heads, tiles).contiguous()
    launch.run(
        pool.key_mean_kernel,
        (chunks * batch * heads,),
        *(key, segments, used, means, numbers, *key.stride(), batch_stride(segments), length, heads, tiles),
        device=key.device,
        warps=_reading_warps(pad),
        DIM=dim,
        DIM_PAD=pad,
        TILES=_CHUNK_TILES,
        TILE=TILE,
    )
    launch.run(
        pool.join_means_kernel,
        (batch * heads,),
        *(means, numbers, mean, chunks),
        device=key.device,
        warps=1,
        DIM=dim,
        DIM_PAD=pad,
    )
    return mean


def read(
    x: Tensor,
    block: int,
    mean: Tensor | None,
    segments: Tensor | None,
    *,
    pools: bool,
    x8: Tensor | None = None,
    scales: Tensor | None = None,
    shifts: Tensor | None = None,
    shift_mean: Tensor | None = None,
    grain: int = 1,
) -> tuple[Tensor, Tensor]:
    """One pass over query or key; returns means and similarities, empty unless it pools."""
    from tamis.backends.triton.kernels import pool

    segments = None if segments is None else segments.contiguous()
    batch, heads, length, dim = x.shape
    blocks = geometry.num_blocks(length, block)
    pooled = x.new_empty((batch, heads, blocks if pools else 0, dim), dtype=torch.float32)
    similarity = x.new_empty((batch, heads, blocks if pools else 0), dtype=torch.float32)
    launch.run(
        pool.summarize_kernel,
        (blocks * batch * heads,),
        x,
        None if mean is None else mean.contiguous(),
        None if shift_mean is None else shift_mean.contiguous(),
        segments,
        pooled if pools else None,
        similarity if pools else None,
        *(x8, scales, shifts, *x.stride(), batch_stride(segments), length, heads),
        1 if shift_mean is None else shift_mean.shape[1],
        blocks,
        device=x.device,
        warps=4 if block * dim <= 8192 else 8,
        DIM=dim,
        DIM_PAD=launch.power(max(dim, 0 if x8 is None else x8.shape[-1])),
        WIDTH=0 if x8 is None else x8.shape[-1],
        BLOCK=block,
        GRAIN=grain,
    )
    return pooled, similarity


def summarize(x: Tensor, block: int, mean: Tensor | None, segments: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean row and self-similarity of every block of x - mean, fp32."""
    return read(x, block, mean, segments, pools=True)


def pack_kv(key: Tensor, value: Tensor, mean: Tensor, segments: Tensor | None) -> list[Tensor]:
    """Quantise key (less its mean) and value by 64-key blocks, in the layout of `PackedKV`."""
    from tamis.backends.triton.kernels import pack

    segments = None if segments is None else segments.contiguous()
    batch, heads, length, dim = key.shape
    blocks, value_dim, width = geometry.num_blocks(length, TILE), value.shape[3], (dim + 3) // 4 * 4
    lead = (batch, heads, blocks)
    key8, key_scale = int8_keys(key, mean, segments, width)
    key_sum = key.new_empty((*lead, TILE), dtype=torch.int32)
    launch.run(
        pack.key_sums_kernel,
        (batch * heads * blocks,),
        *(key8, key_sum),
        device=key.device,
        DIM_PAD=launch.power(width),
        DIM=width,
        TILE=TILE,
    )
    value8 = key.new_empty((*lead, value_dim, TILE), dtype=torch.int8)
    value_scale = key.new_empty((*lead, value_dim), dtype=torch.float32)
    value_sum = key.new_empty((*lead, value_dim), dtype=torch.int32)
    launch.run(
        pack.value_int8_kernel,
        (blocks * batch * heads,),
        *(value, segments, value8, value_scale, value_sum, *value.stride(), batch_stride(segments), length, heads),
        device=key.device,
        DIM=value_dim,
        DIM_PAD=launch.power(value_dim),
        TILE=TILE,
    )
    return [key8, key_scale, key_sum, value8, value_scale, value_sum]


def int8_keys(key: Tensor, mean: Tensor, segments: Tensor | None, width: int) -> tuple[Tensor, Tensor]:
    """Keys less their mean in int8, `[batch, heads, tiles, 64, width]`, and the scales of the tiles."""
    lead = (*key.shape[:2], geometry.num_blocks(key.shape[2], TILE))
    key8 = key.new_empty((*lead, TILE, width), dtype=torch.int8)
    scale = key.new_empty(lead, dtype=torch.float32)
    read(key, TILE, mean, segments, pools=False, x8=key8, scales=scale, grain=TILE)
    return key8, scale


def int8_queries(query: Tensor, mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries in int8, padded to whole powers, the scale of every row, and its product with the mean key."""
    query8 = query.new_empty((*query.shape[:3], launch.power(query.shape[3], 32)), dtype=torch.int8)
    scale = query.new_empty(query.shape[:3], dtype=torch.float32)
    shift = query.new_empty(query.shape[:3], dtype=torch.float32)
    read(query, TILE, None, None, pools=False, x8=query8, scales=scale, shifts=shift, shift_mean=mean)
    return query8, scale, shift


def fp8_values(
    value: Tensor, segments: Tensor | None, used: Tensor | None, shuffled: bool = False
) -> tuple[Tensor, Tensor]:
    """Values in e4m3, `[batch, heads, dim, keys]`, and the scale of every channel; `shuffled`: for hopper.py."""
    from tamis.backends.triton.kernels import pool

    segments = None if segments is None else segments.contiguous()
    batch, heads, length, dim = value.shape
    tiles = geometry.num_blocks(length, TILE)
    chunks = geometry.num_blocks(tiles, _CHUNK_TILES)
    pad = launch.power(dim)
    form = chips.of(value.device).fp8
    assert form is not None
    tops = value.new_empty((batch, heads, chunks, dim), dtype=torch.float32)
    value8 = torch.empty((batch, heads, pad, tiles * TILE), dtype=form, device=value.device)
    scale = value.new_empty((batch, heads, pad), dtype=torch.float32)
    where = (*value.stride(), batch_stride(segments), length, heads)
    launch.run(
        pool.value_top_kernel,
        (chunks * batch * heads,),
        *(value, segments, used, tops, *where, tiles),
        device=value.device,
        warps=_reading_warps(pad),
        DIM=dim,
        DIM_PAD=pad,
        TILES=_CHUNK_TILES,
        TILE=TILE,
    )
    launch.run(
        pool.value_fp8_kernel,
        (tiles * batch * heads,),
        *(value, segments, used, tops, value8, scale, *where, chunks),
        device=value.device,
        DIM=dim,
        DIM_PAD=pad,
        TILE=TILE,
        LARGEST=torch.finfo(form).max,
        SHUFFLED=shuffled,
    )
    return value8, scale


def sound_values(value: Tensor) -> tuple[Tensor, Tensor]:
    """A copy with 0 where values are not finite, in rows of whole 16 bytes, and which 64-key tiles had such values."""
    from tamis.backends.triton.kernels import pool

    batch, heads, length, dim = value.shape
    tiles, width = geometry.num_blocks(length, TILE), (dim + 7) // 8 * 8
    sound = value.new_empty((batch, heads, length, width))
    flags = value.new_empty((batch, heads, tiles), dtype=torch.int32)
    pad = launch.power(dim)
    launch.run(
        pool.sound_values_kernel,
        (tiles * batch * heads,),
        *(value, sound, flags, *value.stride(), length, heads),
        device=value.device,
        warps=_reading_warps(pad),
        DIM=dim,
        DIM_PAD=pad,
        WIDTH=width,
        TILE=TILE,
    )
    return sound[..., :dim], flags
