"""What is read off query, key and value before attention: means, similarities, 8-bit copies.

    columns   one pass over key, value or both: the mean key, the scales of value
    digest    one pass over query, key or both: block means, similarities, int8

The kernels are in kernels/pool.py; what lays values out is in kernels/values.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tamis import geometry
from tamis.backends.triton import chips, launch
from tamis.backends.triton.arguments import batch_stride, by_16_bytes, in_rows, widened

TILE = 64  # keys that share a scale
CHUNK_TILES = 4  # tiles of which a program adds the columns up: enough programs for a short sequence too
_JOINED, SLICE = 128, 32  # chunks and channels that a program puts together at a time


class Rounded(NamedTuple):
    """Query and key in 8 bits.

    Attributes:
        query, key: int8 `[batch, heads, q_len, width]` and `[batch, kv_heads, tiles, 64, width]`.
        query_scale, query_shift: of every row, the latter its product with the mean key.
        key_scale: of every tile.
    """

    query: Tensor | None = None
    query_scale: Tensor | None = None
    query_shift: Tensor | None = None
    key: Tensor | None = None
    key_scale: Tensor | None = None


_NOT_ROUNDED = Rounded()


def _reading_warps(width: int) -> int:
    """Warps that hold a tile of 64 rows with room to spare."""
    return 4 if width <= 64 else 8 if width <= 128 else 16


def _most_registers(device: torch.device, warps: int) -> int | None:
    """A thread's share of the 65,536 registers if a program has a processor for itself, where that can be said."""
    return None if chips.of(device).kind != "cuda" else min(255, 65536 // (32 * warps))


def _whole(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _rows(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors, or copies: of what is not in rows of one piece, and, of more than 128 channels, rows of whole 16
    bytes for all where one can't be loaded by them. A pointer for each entry would take the registers.
    """
    there = [x for x in tensors if x is not None]
    if all(x.shape[3] <= 128 or by_16_bytes(x) for x in there):
        return tuple(None if x is None else in_rows(x) for x in tensors)
    return tuple(None if x is None else widened(x, launch.power(x.shape[3])) for x in tensors)


def _narrow(x: Tensor, dim: int) -> Tensor:
    return x if x.shape[-1] == dim else x[..., :dim].contiguous()


def _strides(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if x is None else x.stride()


def columns(
    key: Tensor | None, value: Tensor | None, segments: Tensor | None, used: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Mean key of every head, fp32 `[batch, heads, dim]`, and scale of every channel of value in e4m3, dim padded.

    Over tokens with a segment >= 0 in the used 64-key tiles; the mean is that of finite keys. Both in one pass, and
    None for what is not given.
    """
    from tamis.backends.triton.kernels import pool

    if key is not None and value is not None and key.element_size() == 4 and max(key.shape[3], value.shape[3]) > 128:
        # Registers do not last for both.
        return columns(key, None, segments, used)[0], columns(None, value, segments, used)[1]
    one = key if key is not None else value
    assert one is not None
    key_dim = one.shape[3]
    (key,), (value,) = _rows(key), _rows(value)
    one = key if key is not None else value
    assert one is not None
    segments = _whole(segments)
    batch, heads, length, _ = one.shape
    tiles = geometry.num_blocks(length, TILE)
    chunks = geometry.num_blocks(tiles, CHUNK_TILES)
    used = None if used is None else used.expand(batch, heads, tiles).contiguous()
    dim, value_dim = (16 if x is None else x.shape[3] for x in (key, value))
    sums = counts = tops = mean = scale = None
    if key is not None:
        sums = one.new_empty((batch, heads, chunks, dim), dtype=torch.float32)
        counts = one.new_empty((batch, heads, chunks), dtype=torch.int32)
        mean = one.new_empty((batch, heads, dim), dtype=torch.float32)
    if value is not None:
        tops = one.new_empty((batch, heads, chunks, value_dim), dtype=torch.float32)
        scale = one.new_empty((batch, heads, launch.power(value_dim)), dtype=torch.float32)
    wide = max(launch.power(x.shape[3]) for x in (key, value) if x is not None)
    # Of more than 128 channels 16 warps spill where places have 64 bits; AMD's processors take no more than 16.
    warps = 8 if wide <= 128 else 32 if chips.of(one.device).kind == "cuda" else 16
    launch.run(
        pool.columns_kernel,
        (chunks * batch * heads,),
        *(key, value, segments, used, sums, counts, tops),
        *(*_strides(key), *_strides(value), batch_stride(segments), length, heads, tiles),
        device=one.device,
        warps=warps,
        registers=_most_registers(one.device, warps),
        DIM=dim,
        DIM_PAD=launch.power(dim),
        VALUE_DIM=value_dim,
        VALUE_PAD=launch.power(value_dim),
        TILES=CHUNK_TILES,
        TILE=TILE,
    )
    slices = geometry.num_blocks(wide, SLICE)
    launch.run(
        pool.join_kernel,
        (slices * batch * heads,),
        *(sums, counts, tops, mean, scale, chunks, slices),
        device=one.device,
        DIM=dim,
        VALUE_DIM=value_dim,
        VALUE_PAD=launch.power(value_dim),
        CHUNK_KEYS=CHUNK_TILES * TILE,
        LARGEST=1.0 if value is None else _largest(value),
        STEP=_JOINED,
        SLICE=SLICE,
    )
    return None if mean is None else _narrow(mean, key_dim), scale


def _form(value: Tensor) -> torch.dtype:
    form = chips.of(value.device).fp8
    assert form is not None
    return form


def _largest(value: Tensor) -> float:
    return torch.finfo(_form(value)).max


def key_mean(key: Tensor, segments: Tensor | None, used: Tensor | None) -> Tensor:
    """Mean key of every head over its finite tokens with a segment >= 0 in the used 64-key tiles, fp32."""
    mean, _ = columns(key, None, segments, used)
    assert mean is not None
    return mean


def room(query: Tensor, key: Tensor, block_kv: int, precision: str) -> list[Tensor]:
    """Where query and key go in 8 bits, in the order of `Rounded`; nothing in "full"."""
    if precision == "full":
        return []
    batch, heads, q_len, dim = query.shape
    lead = (batch, key.shape[1], geometry.traced_blocks(key.shape[2], block_kv) * (block_kv // TILE))
    width = launch.power(dim, 32)
    return [
        query.new_empty((batch, heads, q_len, width), dtype=torch.int8),
        query.new_empty((batch, heads, q_len), dtype=torch.float32),
        query.new_empty((batch, heads, q_len), dtype=torch.float32),
        query.new_empty((*lead, TILE, width), dtype=torch.int8),
        query.new_empty(lead, dtype=torch.float32),
    ]


def digest(
    query: Tensor | None,
    key: Tensor | None,
    mean: Tensor | None,
    q_segments: Tensor | None,
    kv_segments: Tensor | None,
    *,
    block_size: tuple[int, int] = (TILE, TILE),
    pools: bool = False,
    rounded: Rounded = _NOT_ROUNDED,
) -> list[Tensor]:
    """One pass over query, key or both: fills `rounded`, and returns means and similarities of blocks if it pools.

    Keys have their mean taken off, queries not; without a mean there is no query_shift.
    """
    from tamis.backends.triton.kernels import pool

    one = query if query is not None else key
    assert one is not None
    given = one.shape[3]
    query, key = _rows(query, key)
    one = query if query is not None else key
    assert one is not None
    if mean is not None and mean.shape[2] < one.shape[3]:
        mean = widened(mean, one.shape[3])
    sides = [(x, *_counts(x, block)) for x, block in zip((query, key), block_size, strict=True)]
    pooled: list[Tensor | None] = []
    for x, batch, heads, _, blocks in sides:
        wanted = pools and x is not None
        pooled += [one.new_empty((batch, heads, blocks, one.shape[3]), dtype=torch.float32)] if wanted else [None]
        pooled += [one.new_empty((batch, heads, blocks), dtype=torch.float32)] if wanted else [None]
    segments = _whole(q_segments), _whole(kv_segments)
    (_, batch, heads, q_len, q_blocks), (_, kv_batch, kv_heads, kv_len, kv_blocks) = sides
    if mean is not None:
        kv_heads = mean.shape[1]  # without keys too
    programs = q_blocks * batch * heads
    dim, x8 = one.shape[3], rounded.query if rounded.query is not None else rounded.key
    width = 0 if x8 is None else x8.shape[-1]
    warps = _reading_warps(launch.power(max(dim, width)))
    launch.run(
        pool.digest_kernel,
        (programs + kv_blocks * kv_batch * kv_heads,),
        *(query, key, _whole(mean), *segments, *pooled, *rounded, *_strides(query), *_strides(key)),
        *(*(batch_stride(t) for t in segments), q_len, kv_len, heads, kv_heads, q_blocks, kv_blocks, programs),
        device=one.device,
        warps=warps,
        registers=_most_registers(one.device, warps),
        DIM=dim,
        DIM_PAD=launch.power(max(dim, width)),
        WIDTH=width,
        BLOCK_Q=block_size[0],
        BLOCK_KV=block_size[1],
        TILE=TILE,
    )
    return [t if t.dim() == 3 else _narrow(t, given) for t in pooled if t is not None]


def _counts(x: Tensor | None, block: int) -> tuple[int, int, int, int]:
    """Batch, heads, length and blocks; none without a tensor."""
    return (0, 0, 0, 0) if x is None else (*x.shape[:3], geometry.num_blocks(x.shape[2], block))


def summarize(x: Tensor, block: int, mean: Tensor | None, segments: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean row and self-similarity of every block of x - mean, fp32."""
    pooled, similarity = digest(None, x, mean, None, segments, block_size=(TILE, block), pools=True)
    return pooled, similarity


def pack_kv(key: Tensor, value: Tensor, mean: Tensor, segments: Tensor | None) -> list[Tensor]:
    """Quantise key (less its mean) and value by 64-key blocks, in the layout of `PackedKV`."""
    from tamis.backends.triton.kernels import pack

    segments = None if segments is None else segments.contiguous()
    batch, heads, length, dim = key.shape
    blocks, value_dim, width = geometry.num_blocks(length, TILE), value.shape[3], (dim + 3) // 4 * 4
    lead = (batch, heads, blocks)
    key8 = key.new_empty((*lead, TILE, width), dtype=torch.int8)
    key_scale = key.new_empty(lead, dtype=torch.float32)
    digest(None, key, mean, None, segments, rounded=Rounded(key=key8, key_scale=key_scale))
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
    # Of more than 128 channels 16 warps spill on sm_120; AMD's processors take no more than 16.
    warps = 32 if value_dim > 128 and chips.of(key.device).kind == "cuda" else _reading_warps(launch.power(value_dim))
    launch.run(
        pack.value_int8_kernel,
        (blocks * batch * heads,),
        *(value, segments, value8, value_scale, value_sum, *value.stride(), batch_stride(segments), length, heads),
        device=key.device,
        warps=warps,
        registers=_most_registers(key.device, warps),
        DIM=value_dim,
        DIM_PAD=launch.power(value_dim),
        TILE=TILE,
    )
    return [key8, key_scale, key_sum, value8, value_scale, value_sum]


def int8_queries(query: Tensor, mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries in int8, padded to whole powers, the scale of every row, and its product with the mean key."""
    query8 = query.new_empty((*query.shape[:3], launch.power(query.shape[3], 32)), dtype=torch.int8)
    scale = query.new_empty(query.shape[:3], dtype=torch.float32)
    shift = query.new_empty(query.shape[:3], dtype=torch.float32)
    digest(query, None, mean, None, None, rounded=Rounded(query8, scale, shift))
    return query8, scale, shift


def fp8_values(
    value: Tensor, scale: Tensor, segments: Tensor | None, used: Tensor | None, shuffled: bool = False
) -> Tensor:
    """Values over the scales of `columns` in e4m3, `[batch, heads, dim, keys]`; `shuffled`: for hopper.py."""
    from tamis.backends.triton.kernels import values

    segments = _whole(segments)
    batch, heads, length, dim = value.shape
    tiles, pad, form = geometry.num_blocks(length, TILE), scale.shape[2], _form(value)
    used = None if used is None else used.expand(batch, heads, tiles).contiguous()
    value8 = torch.empty((batch, heads, pad, tiles * TILE), dtype=form, device=value.device)
    launch.run(
        values.value_fp8_kernel,
        (tiles * batch * heads,),
        *(value, segments, used, scale, value8, *value.stride(), batch_stride(segments), length, heads),
        device=value.device,
        warps=_reading_warps(pad),
        registers=_most_registers(value.device, _reading_warps(pad)),
        DIM=dim,
        DIM_PAD=pad,
        TILE=TILE,
        LARGEST=_largest(value),
        SHUFFLED=shuffled,
    )
    return value8


def sound_values(value: Tensor) -> tuple[Tensor, Tensor]:
    """Which 64-key tiles hold values that are not finite, and a copy of those alone, with 0 for such values.

    Rows of the copy are whole 16 bytes; its other tiles are never written.
    """
    from tamis.backends.triton.kernels import values

    batch, heads, length, dim = value.shape
    tiles, width = geometry.num_blocks(length, TILE), (dim + 7) // 8 * 8
    sound = value.new_empty((batch, heads, length, width))
    flags = value.new_empty((batch, heads, tiles), dtype=torch.int32)
    pad = launch.power(dim)
    launch.run(
        values.sound_values_kernel,
        (tiles * batch * heads,),
        *(value, sound, flags, *value.stride(), length, heads),
        device=value.device,
        warps=_reading_warps(pad),
        registers=_most_registers(value.device, _reading_warps(pad)),
        DIM=dim,
        DIM_PAD=pad,
        WIDTH=width,
        TILE=TILE,
    )
    return sound[..., :dim], flags
