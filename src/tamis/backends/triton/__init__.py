"""The Triton backend: one set of kernels for every GPU, compiled where they run, with nothing to build.

    pool.py    reads query, key and value once: means, similarities, 8-bit copies
    choose.py  block means -> lists of blocks
    kernel.py  attention over the lists
    settings.py, chips.py   what differs between GPUs;  launch.py, arguments.py   how kernels are started

Precision "full" multiplies in the inputs' dtype (fp32 by three products of tf32), "int8" has int8 scores and 16-bit
values, "fp8" int8 scores and e4m3 values; sums are fp32. Stage 2 skips whole tiles: up to 128 query rows by 64 keys.
Triton needs a C compiler at hand the first time a kernel starts. With `TRITON_INTERPRET=1` everything runs on CPU
tensors, slowly. Lists of blocks are not read before they are used: one that is out of order or range gives a wrong
output, and never an access outside of the tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tamis import geometry
from tamis.backends.triton import chips, launch
from tamis.call import Call
from tamis.stats import Formats

NAME = "triton"
TILE = 64  # keys that share a scale
_CHUNK_TILES = 16  # tiles that one program of a reduction over the sequence reads
_MAX_HEAD_DIM = 256


def reasons(call: Call) -> list[str]:
    """Why this backend can't serve the call; empty if it can."""
    device = call.query.device
    why = chips.missing(device.type, device.index or 0)
    if why is not None:
        return [why]
    found = []
    if max(call.query.shape[3], call.value_dim) > _MAX_HEAD_DIM:
        found.append(f"it takes head dims up to {_MAX_HEAD_DIM}")
    found += _lacks(call.precision, device.type, device.index or 0)
    return found


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _lacks(precision: str, kind: str, index: int) -> list[str]:
    chip = chips.of(torch.device(kind, index))
    if precision == "fp8" and chip.fp8 is None:
        return [f"precision 'fp8' needs sm_89 or newer, and this GPU is {chip.name}"]
    if precision != "full" and not chip.int8 and not _new_triton():
        return [f"precision {precision!r} needs Triton 3.9 or newer on {chip.name}"]
    return []


def _new_triton() -> bool:
    import triton

    return tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 9)


def target(device: torch.device) -> str | None:
    """The architecture in use."""
    return chips.of(device).name


def formats(precision: str, dtype: torch.dtype, packed: bool, device: torch.device) -> Formats:
    """Number formats of the two products."""
    name = str(dtype).removeprefix("torch.")
    if precision == "full":
        both = (name, name)
    elif precision == "fp8":
        both = ("int8", str(chips.of(device).fp8).removeprefix("torch."))
    else:
        both = ("int8", "bfloat16 x int8" if packed else "float16" if dtype == torch.float16 else "bfloat16")
    return Formats(both, both)


def _strides(x: Tensor) -> tuple[int, ...]:
    return x.stride()


def _batch_stride(x: Tensor | None) -> int:
    return 0 if x is None or x.shape[0] == 1 else x.stride(0)


def _table_strides(x: Tensor | None) -> tuple[int, int]:
    """Batch and head strides of a table of blocks that may have one entry for all."""
    return (0, 0) if x is None else (_batch_stride(x), 0 if x.shape[1] == 1 else x.stride(1))


def key_mean(key: Tensor, segments: Tensor | None, used: Tensor | None) -> Tensor:
    """Mean key of every head over its finite tokens with a segment >= 0 in the used 64-key tiles, fp32."""
    from tamis.backends.triton import pool

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
        (chunks, batch * heads),
        *(key, segments, used, means, numbers, *_strides(key), _batch_stride(segments), length, heads, tiles),
        device=key.device,
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


def _read(
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
    from tamis.backends.triton import pool

    batch, heads, length, dim = x.shape
    blocks = geometry.num_blocks(length, block)
    pooled = x.new_empty((batch, heads, blocks if pools else 0, dim), dtype=torch.float32)
    similarity = x.new_empty((batch, heads, blocks if pools else 0), dtype=torch.float32)
    launch.run(
        pool.summarize_kernel,
        (blocks, batch * heads),
        x,
        None if mean is None else mean.contiguous(),
        None if shift_mean is None else shift_mean.contiguous(),
        segments,
        pooled if pools else None,
        similarity if pools else None,
        *(x8, scales, shifts, *_strides(x), _batch_stride(segments), length, heads),
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
    return _read(x, block, mean, segments, pools=True)


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
    from tamis.backends.triton import choose as kernels

    batch, heads, q_blocks, dim = q_means.shape
    kv_heads, kv_blocks = k_means.shape[1:3]
    device = q_means.device
    num = torch.zeros((batch, heads, q_blocks), dtype=torch.int32, device=device)
    table = q_means.new_empty((batch, heads, q_blocks, kv_blocks), dtype=torch.int32)
    if 0 in table.shape:
        return num, table.new_zeros((*num.shape, max(1, kv_blocks)))
    rows = 16 if q_blocks <= 16 else 64
    grid = (geometry.num_blocks(q_blocks, rows) * geometry.num_blocks(kv_blocks, 64), batch * heads)
    launch.run(
        kernels.scores_kernel,
        grid,
        *(q_means.contiguous(), k_means.contiguous(), k_similarity.contiguous(), similarity.contiguous(), table),
        *_bounds(q_bounds, kv_bounds, visible),
        *(q_len, kv_len, heads, kv_heads, q_blocks, kv_blocks, _small(window), scale),
        device=device,
        DIM=dim,
        SLICE=min(64, launch.power(dim)),
        BLOCK_Q=block_q,
        BLOCK_KV=block_kv,
        CAUSAL=causal,
        WINDOW=window is not None,
        ROWS=rows,
        COLUMNS=64,
        DOT32=chips.of(device).dot32,
    )
    if must is not None:
        must = must.expand(-1, -1, q_blocks, kv_blocks).contiguous()
    launch.run(
        kernels.choose_kernel,
        (q_blocks, batch * heads),
        *(table, num, q_similarity.contiguous(), similarity.contiguous(), cdf, topk, must, *_table_strides(must)),
        *(q_len, kv_len, heads, q_blocks, kv_blocks),
        device=device,
        warps=2 if kv_blocks <= 256 else 8,
        BLOCK_Q=block_q,
        BLOCK_KV=block_kv,
        SINK=sink,
        DIAGONAL=causal and q_bounds is None,
        CHUNK=256 if kv_blocks <= 256 else 2048,
    )
    if trim:
        table = table[..., : max(1, int(num.max()) if num.numel() else 1)].contiguous()
    return num, table


def _small(window: int | None) -> int:
    """A window for arguments that are 32-bit unless they have to be more."""
    return 0 if window is None else window


def _bounds(q_bounds: Tensor | None, kv_bounds: Tensor | None, visible: Tensor | None) -> tuple[Any, ...]:
    """The tables that say which blocks meet, and their strides."""
    return (
        None if q_bounds is None else q_bounds.contiguous(),
        None if kv_bounds is None else kv_bounds.contiguous(),
        None if visible is None else visible.contiguous(),
        *(_batch_stride(q_bounds), _batch_stride(kv_bounds), *_table_strides(visible)),
    )


def room(query: Tensor, key: Tensor, block_kv: int, precision: str) -> list[Tensor]:
    """Where `predict` puts query and key in 8 bits: query, its scales, its products with the mean, key, its scales."""
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
    q8, q_scale, shift, k8, k_scale = prepared or (None,) * 5
    q_mean = mean if prepared else None
    q_summary = _read(
        query, block_q, None, q_segments, pools=True, x8=q8, scales=q_scale, shifts=shift, shift_mean=q_mean
    )
    k_summary = _read(key, block_kv, mean, kv_segments, pools=True, x8=k8, scales=k_scale, grain=TILE)
    lists = select(
        *q_summary,
        *k_summary,
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


def pack_kv(key: Tensor, value: Tensor, mean: Tensor, segments: Tensor | None) -> list[Tensor]:
    """Quantise key (less its mean) and value by 64-key blocks, in the layout of `PackedKV`."""
    from tamis.backends.triton import pack

    batch, heads, length, dim = key.shape
    blocks, value_dim, width = geometry.num_blocks(length, TILE), value.shape[3], (dim + 3) // 4 * 4
    lead = (batch, heads, blocks)
    key8, key_scale = _int8_keys(key, mean, segments, width)
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
        (blocks, batch * heads),
        *(value, segments, value8, value_scale, value_sum, *_strides(value), _batch_stride(segments), length, heads),
        device=key.device,
        DIM=value_dim,
        DIM_PAD=launch.power(value_dim),
        TILE=TILE,
    )
    return [key8, key_scale, key_sum, value8, value_scale, value_sum]


def _int8_keys(key: Tensor, mean: Tensor, segments: Tensor | None, width: int) -> tuple[Tensor, Tensor]:
    """Keys less their mean in int8, `[batch, heads, tiles, 64, width]`, and the scales of the tiles."""
    lead = (*key.shape[:2], geometry.num_blocks(key.shape[2], TILE))
    key8 = key.new_empty((*lead, TILE, width), dtype=torch.int8)
    scale = key.new_empty(lead, dtype=torch.float32)
    _read(key, TILE, mean, segments, pools=False, x8=key8, scales=scale, grain=TILE)
    return key8, scale


def _int8_queries(query: Tensor, mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries in int8, padded to whole powers, the scale of every row, and its product with the mean key."""
    query8 = query.new_empty((*query.shape[:3], launch.power(query.shape[3], 32)), dtype=torch.int8)
    scale = query.new_empty(query.shape[:3], dtype=torch.float32)
    shift = query.new_empty(query.shape[:3], dtype=torch.float32)
    _read(query, TILE, None, None, pools=False, x8=query8, scales=scale, shifts=shift, shift_mean=mean)
    return query8, scale, shift


def _fp8_values(value: Tensor, segments: Tensor | None, used: Tensor | None) -> tuple[Tensor, Tensor]:
    """Values in e4m3, `[batch, heads, dim, keys]`, and the scale of every channel."""
    from tamis.backends.triton import pool

    batch, heads, length, dim = value.shape
    tiles = geometry.num_blocks(length, TILE)
    chunks = geometry.num_blocks(tiles, _CHUNK_TILES)
    pad = launch.power(dim)
    form = chips.of(value.device).fp8
    assert form is not None
    tops = value.new_empty((batch, heads, chunks, dim), dtype=torch.float32)
    value8 = torch.empty((batch, heads, pad, tiles * TILE), dtype=form, device=value.device)
    scale = value.new_empty((batch, heads, pad), dtype=torch.float32)
    where = (*_strides(value), _batch_stride(segments), length, heads)
    launch.run(
        pool.value_top_kernel,
        (chunks, batch * heads),
        *(value, segments, used, tops, *where, tiles),
        device=value.device,
        DIM=dim,
        DIM_PAD=pad,
        TILES=_CHUNK_TILES,
        TILE=TILE,
    )
    launch.run(
        pool.value_fp8_kernel,
        (tiles, batch * heads),
        *(value, segments, used, tops, value8, scale, *where, chunks),
        device=value.device,
        DIM=dim,
        DIM_PAD=pad,
        TILE=TILE,
        LARGEST=torch.finfo(form).max,
    )
    return value8, scale


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
    from tamis.backends.triton import kernel
    from tamis.backends.triton.settings import tiles

    batch, heads, q_len, dim = query.shape
    device, chip = query.device, chips.of(query.device)
    if key is None or value is None:
        kv_heads, kv_len, value_dim = packed[0].shape[1], int(packed[7]), packed[4].shape[3]
    else:
        kv_heads, kv_len, value_dim = key.shape[1], key.shape[2], value.shape[3]
    q_blocks, kv_blocks = geometry.num_blocks(q_len, block_q), geometry.num_blocks(kv_len, block_kv)
    output = query.new_empty((batch, heads, q_len, value_dim))
    lse = query.new_empty((batch, heads, q_len), dtype=torch.float32)
    if output.numel() == 0 or kv_heads == 0:
        return output, lse, torch.zeros((batch, heads, q_blocks, 3), dtype=torch.float64, device=device)

    window = window if q_positions is not None or window is None else min(window, 2**31 - 1)
    lists = (kv_num_blocks, kv_indices)
    if kv_indices is not None and kv_indices.stride(-1) != 1:
        lists = (kv_num_blocks, kv_indices.contiguous())
    list_strides: tuple[int, ...] = (0,) * 6
    if kv_num_blocks is not None and lists[1] is not None:
        list_strides = (*kv_num_blocks.stride(), *lists[1].stride()[:3])
    seen = _bounds(q_bounds, kv_bounds, visible)
    if q_positions is not None and kv_positions is not None:
        q_positions, kv_positions = q_positions.contiguous(), kv_positions.contiguous()
    if q_segments is not None and kv_segments is not None:
        q_segments, kv_segments = q_segments.contiguous(), kv_segments.contiguous()

    q, k, v = query, key, value
    q_scale = k_scale = v_scale = q_shift = None
    kind, products, kv_tiles = "fp32" if query.dtype == torch.float32 else "half", "input", 0
    pad, value_pad = launch.power(dim, 16 if precision == "full" else 32), launch.power(value_dim)
    k_even = pad == dim
    if precision != "full":
        mean = None
        if key is not None and value is not None:
            counted = geometry.without_hidden(attn_mask, kv_segments)
            counted = None if counted is None else counted.contiguous()
            used = None
            if not prepared or precision == "fp8":
                sizes = (q_len, kv_len, heads, kv_heads, q_blocks, kv_blocks)
                used = _used(output, lists, list_strides, seen, sizes, (block_q, block_kv), causal, window)
            if prepared:
                q, q_scale, q_shift, key8, k_scale = prepared
            else:
                mean = key_mean(key, counted, used)
                key8, k_scale = _int8_keys(key, mean, counted, pad)
            k, kv_tiles, k_even = key8.flatten(2, 3), key8.shape[2], True
            kind, products = precision, "fp8" if precision == "fp8" else "bf16"
            if precision == "fp8":
                value8, v_scale = _fp8_values(value, counted, used)
                v = value8.transpose(2, 3)
            elif query.dtype == torch.float16:
                products = "input"
        else:
            packed = [t.contiguous() for t in packed]
            k, k_scale, v, v_scale, mean = packed[0].flatten(2, 3), packed[1], packed[3], packed[4], packed[6]
            kind, products, kv_tiles, k_even = "packed", "packed", packed[0].shape[2], packed[0].shape[4] == pad
        if mean is not None:
            q, q_scale, q_shift = _int8_queries(query, mean)
    assert k is not None and v is not None
    cut = tiles(chip, kind, pad, value_pad, block_q, block_kv, q_len)
    q_tiles = geometry.num_blocks(q_len, cut.rows)
    counts = torch.empty((batch, heads, q_tiles, 3), dtype=torch.float64, device=device)
    regular = q_bounds is None and visible is None
    # Without an edge there is no pair that is not seen, and 0 * NaN is what it should be.
    edges = not regular or causal or window is not None or kv_len % block_kv != 0
    flags = query.new_empty((batch, heads, q_tiles), dtype=torch.int32)
    # Of an address the 64-bit start of a tile is one number, and the places inside it one for every element.
    wide = max(128 * abs(x.stride(2)) + 256 * abs(x.stride(3)) for x in (k, v)) >= 2**31
    natural = attn_mask is not None and attn_mask.dtype != torch.bool
    passes = [(cut, 0)]
    if products in ("input", "bf16") and edges:
        passes.append((tiles(chip, "mend", pad, value_pad, block_q, block_kv, q_len), cut.rows))
    for part, flag_rows in passes:
        part_tiles = geometry.num_blocks(q_len, part.rows)
        launch.run(
            kernel.attend_kernel,
            (part_tiles * heads * batch,),
            *(q, k, v, output, lse, counts, flags, q_scale, k_scale, v_scale, q_shift, *lists),
            *(None if t is None else t.to(torch.float32).contiguous() for t in (sink_logits, pv_threshold)),
            *(attn_mask, q_positions, kv_positions, q_segments, kv_segments, *seen[:3]),
            *(*_strides(q), *_strides(k), *_strides(v)[:4], *list_strides),
            *((0,) * 4 if attn_mask is None else attn_mask.stride()),
            *(_batch_stride(t) for t in (q_positions, kv_positions, q_segments, kv_segments)),
            *seen[3:],
            *(q_len, kv_len, heads, kv_heads, part_tiles, q_blocks, kv_blocks, kv_tiles),
            0 if lists[1] is None else lists[1].shape[-1],
            _small(window),
            scale / softcap if softcap is not None else scale if natural else scale * kernel.LOG2E.value,
            softcap,
            device=device,
            warps=part.warps,
            stages=part.stages,
            HEAD_DIM=dim,
            VALUE_DIM=value_dim,
            D=pad,
            DV=value_pad,
            SLICE=64 if kind == "fp32" and pad > 64 else 0,
            K_EVEN=k_even,
            BLOCK_Q=block_q,
            BLOCK_KV=block_kv,
            TILE_Q=part.rows,
            TILE_K=part.keys,
            CAUSAL=causal,
            WINDOW=window is not None,
            QK8=precision != "full",
            PV=products,
            DOT32=chip.dot32,
            # P in e4m3 has 17 powers of two below its largest number.
            HEADROOM=0 if products != "fp8" else 8 if chip.fp8 == torch.float8_e4m3fn else 7,
            CHUNK=256,
            NATURAL=natural,
            WIDE=wide,
            FLAG_ROWS=flag_rows,
        )
    return output, lse, _by_block(counts, q_blocks, block_q // cut.rows)


def _used(
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
    from tamis.backends.triton import choose as kernels

    if lists[1] is None and window is None and seen[0] is None and seen[2] is None:
        return None  # the last row sees every key
    batch, device = output.shape[0], output.device
    _, kv_len, heads, kv_heads, q_blocks, _ = sizes
    used = torch.zeros((batch, kv_heads, geometry.num_blocks(kv_len, TILE)), dtype=torch.int8, device=device)
    launch.run(
        kernels.used_kernel,
        (q_blocks, batch * heads),
        *(*lists, used, *seen[:3], *list_strides, *seen[3:]),
        *(*sizes, 0 if lists[1] is None else lists[1].shape[-1], _small(window)),
        device=device,
        BLOCK_Q=block_size[0],
        BLOCK_KV=block_size[1],
        CAUSAL=causal,
        WINDOW=window is not None,
        CHUNK=256,
    )
    return used


def _by_block(counts: Tensor, q_blocks: int, parts: int) -> Tensor:
    """Counts of tiles added up over the blocks of the mask."""
    if parts == 1:
        return counts
    missing = q_blocks * parts - counts.shape[2]
    padded = torch.nn.functional.pad(counts, (0, 0, 0, missing))
    return torch.unflatten(padded, 2, (q_blocks, parts)).sum(3)
