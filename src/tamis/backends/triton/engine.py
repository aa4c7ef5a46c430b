"""Attention over lists of blocks: the operands in the precision asked for, then the kernel of kernels/attend.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tamis import geometry
from tamis.backends.triton import chips, launch
from tamis.backends.triton.arguments import batch_stride, bounds
from tamis.backends.triton.lists import used_tiles
from tamis.backends.triton.prepare import fp8_values, int8_keys, int8_queries, key_mean
from tamis.backends.triton.settings import tiles


@dataclass(frozen=True)
class Operands:
    """Query, key and value as the kernel multiplies them.

    Attributes:
        kind: what the tiles depend on, see settings.py.
        products: of weights and values: "input" in the values' own type, "bf16", "fp8" or "packed".
        even: whether rows of k are as long as the kernel's.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_scale: Tensor | None
    k_scale: Tensor | None
    v_scale: Tensor | None
    q_shift: Tensor | None
    kind: str
    products: str
    width: int
    even: bool

    @property
    def wide(self) -> bool:
        """Whether places inside a tile of keys or values need 64 bits."""
        return max(128 * abs(x.stride(2)) + 256 * abs(x.stride(3)) for x in (self.k, self.v)) >= 2**31


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
        kv_heads, kv_len, value_dim = packed[0].shape[1], int(packed[7]), packed[4].shape[3]
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

    inputs = _operands(query, key, value, packed, prepared, precision, counted, used)
    value_width = launch.power(value_dim)
    shape = (inputs.width, value_width, block_q, block_kv, q_len)
    regular = q_bounds is None and visible is None
    cut = tiles(chip, inputs.kind, *shape, regular)
    counts = torch.empty((batch, heads, geometry.num_blocks(q_len, cut.rows), 3), dtype=torch.float64, device=device)
    flags = query.new_empty(counts.shape[:3], dtype=torch.int32)
    passes = [(cut, 0)]
    # Without an edge there is no pair that is not seen, and 0 * NaN is what it should be.
    edges = not regular or causal or window is not None or kv_len % block_kv != 0
    if inputs.products in ("input", "bf16") and edges:
        passes.append((tiles(chip, "mend", *shape), cut.rows))
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
            HEAD_DIM=dim,
            VALUE_DIM=value_dim,
            D=inputs.width,
            DV=value_width,
            SLICE=0 if inputs.kind != "fp32" or inputs.width <= 64 else 32 if inputs.width <= 128 else 16,
            K_EVEN=inputs.even,
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
    return output, lse, _by_block(counts, q_blocks, block_q // cut.rows)


def _lists(num: Tensor | None, indices: Tensor | None) -> tuple[tuple[Tensor | None, Tensor | None], tuple[int, ...]]:
    """Counts and indices, the latter with rows in one piece, and their strides."""
    if num is None or indices is None:
        return (None, None), (0,) * 6
    indices = indices if indices.stride(-1) == 1 else indices.contiguous()
    return (num, indices), (*num.stride(), *indices.stride()[:3])


def _operands(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    packed: list[Tensor],
    prepared: list[Tensor],
    precision: str,
    counted: Tensor | None,
    used: Callable[[], Tensor | None],
) -> Operands:
    """Round what has to be rounded; `used` tells which tiles of keys count for a mean or a scale."""
    dim, width = query.shape[3], launch.power(query.shape[3], 16 if precision == "full" else 32)
    if key is None or value is None:
        packed = [t.contiguous() for t in packed]
        k, k_scale = packed[0].flatten(2, 3), packed[1]
        q, q_scale, q_shift = int8_queries(query, packed[6])
        even = packed[0].shape[4] == width
        return Operands(q, k, packed[3], q_scale, k_scale, packed[4], q_shift, "packed", "packed", width, even)
    if precision == "full":
        kind = "fp32" if query.dtype == torch.float32 else "half"
        return Operands(query, key, value, None, None, None, None, kind, "input", width, width == dim)
    tiles_used = None if prepared and precision == "int8" else used()
    if prepared:
        q, q_scale, q_shift, key8, k_scale = prepared
    else:
        mean = key_mean(key, counted, tiles_used)
        key8, k_scale = int8_keys(key, mean, counted, width)
        q, q_scale, q_shift = int8_queries(query, mean)
    v, products = value, "input" if query.dtype == torch.float16 else "bf16"
    v_scale: Tensor | None = None
    if precision == "fp8":
        value8, v_scale = fp8_values(value, counted, tiles_used)
        v, products = value8.transpose(2, 3), "fp8"
    return Operands(q, key8.flatten(2, 3), v, q_scale, k_scale, v_scale, q_shift, precision, products, width, True)


def _by_block(counts: Tensor, q_blocks: int, parts: int) -> Tensor:
    """Counts of tiles added up over the blocks of the mask."""
    if parts == 1:
        return counts
    missing = q_blocks * parts - counts.shape[2]
    padded = torch.nn.functional.pad(counts, (0, 0, 0, missing))
    return torch.unflatten(padded, 2, (q_blocks, parts)).sum(3)
