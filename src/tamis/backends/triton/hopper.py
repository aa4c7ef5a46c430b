"""The kernel made for sm_90: which calls it takes, how it is cut, and starting it; kernels/hopper.py.

Its tiles are 64 query rows for each of two warpgroups. Of keys a tile holds 64, or 32 where wide heads leave no more
registers: the compiler uses all 240 that a thread can have, and with larger tiles it spills. The ring takes what shared
memory is left. `tamis bench gpu-static --all` compiles every kind and fails if one spills.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

from tamis import geometry
from tamis.backends.triton import chips, launch
from tamis.backends.triton.operands import Operands
from tamis.backends.triton.prepare import TILE, sound_values
from tamis.errors import UnsupportedError

KERNELS = ("auto", "gluon", "triton")
_ROWS = 64  # that one warpgroup multiplies at a time
_WARPS = 4  # the first warpgroup of consumers; the other warps are the kernel's own affair
_MOST_STAGES = 4
_BARRIERS = 2048  # bytes of shared memory for barriers and sums between warps
_NEAR = 32 * 2**20  # bytes of keys and values that programs read at a time: of 50 MB of L2 cache, with room to spare
_PROCESSORS = 132  # assumed where there is no GPU: those of an H100 or H200


class Cut(NamedTuple):
    """How the kernel is cut: keys of a tile, places in a ring, whether each warpgroup has its own, padded head dims."""

    keys: int
    stages: int
    split: bool
    dim: int
    value_dim: int

    @property
    def rows(self) -> int:
        """Query rows of an item."""
        return _ROWS if self.split else 2 * _ROWS


def wanted() -> str:
    """The kernel that `TAMIS_GPU_KERNEL` asks for: "gluon", "triton", or "auto".

    Raises:
        ValueError: it is set to something else.
    """
    name = os.environ.get("TAMIS_GPU_KERNEL", "auto")
    if name not in KERNELS:
        raise ValueError(f"TAMIS_GPU_KERNEL must be one of {', '.join(KERNELS)}, got {name!r}")
    return name


def cut(precision: str, dim: int, value_dim: int, block_q: int, list_bits: int = 32) -> Cut | None:
    """The tiles of a call, or None if it has no place: e4m3 values over 192 wide spill with every tile.

    There the sum of a tile has registers of its own beside the output, since it has to be added in fp32. Over 128 wide
    there are none left for two lists, one for each warpgroup, whose places take 64 bits.
    """
    width = launch.power(dim, 64)
    value_width = launch.power(value_dim, 64) if value_dim <= 128 else (value_dim + 63) // 64 * 64
    split = block_q == _ROWS
    if precision == "fp8" and value_width > (128 if split and list_bits == 64 else 192):
        return None
    keys = 64 if max(width, value_width) <= 128 else 32
    key_bytes, value_bytes = (2 if precision == "full" else 1), (1 if precision == "fp8" else 2)
    stage = keys * (width * key_bytes + value_width * value_bytes) * (2 if split else 1)
    left = chips.CHIPS["sm_90"].shared - _BARRIERS - 2 * _ROWS * width * key_bytes
    stages = min(_MOST_STAGES, left // stage)
    return Cut(keys, stages, split, width, value_width) if stages >= 2 else None


def reason(
    chip: str,
    precision: str,
    dtype: torch.dtype,
    dims: tuple[int, int],
    block_q: int,
    lists: tuple[Tensor | None, Tensor | None],
    *,
    packed: bool,
    window: bool,
    irregular: bool,
    scores_changed: bool,
    scale: float,
) -> str | None:
    """Why a call goes to the kernel that runs everywhere, or None if this one takes it.

    Args:
        dims: of query and value.
        lists: counts and indices of the mask, if there is one.
        irregular: whether positions, segments or a mask say who sees whom.
        scores_changed: whether there is a softcap, or sinks.
    """
    if chip != "sm_90":
        return f"the Gluon kernel is for sm_90, and this GPU is {chip}"
    for other, what in (
        (packed, "a PackedKV"),
        (precision == "full" and dtype == torch.float32, "fp32 products"),
        (irregular, "positions, segments and masks"),
        (window, "windows"),
        (scores_changed, "softcap and sinks"),
        (scale <= 0, "a scale that is not positive"),
    ):
        if other:
            return f"the Gluon kernel does not take {what}"
    lacking = f"the Gluon kernel has no registers for values of {dims[1]} channels"
    if cut(precision, *dims, block_q) is None:
        return f"{lacking} in {precision!r}"
    # While a graph is made sizes may not be known, nor are they asked for: the call decides when it runs.
    if cut(precision, *dims, block_q, 64) is None and not torch.compiler.is_compiling() and list_bits(lists) == 64:
        return f"{lacking} and lists of 2^31 entries in {precision!r}"
    return "TAMIS_GPU_KERNEL=triton" if wanted() == "triton" else None


def insist(general: str | None) -> None:
    """Refuse a call that goes to the other kernel although `TAMIS_GPU_KERNEL=gluon` forbids it.

    Raises:
        UnsupportedError: it does.
    """
    if general is not None and wanted() == "gluon":
        raise UnsupportedError(f"TAMIS_GPU_KERNEL=gluon, and {general}")


def few_rows(q_len: int) -> str | None:
    """The same for calls of few rows, of which tiles would be half empty."""
    return f"the Gluon kernel is for {geometry.TILE_ROWS} query rows or more" if q_len < geometry.TILE_ROWS else None


def programs(device: torch.device, items: int) -> int:
    """Programs to start: one on each processor, for there is no room for two."""
    many = _PROCESSORS
    if device.type == "cuda":
        many = torch.cuda.get_device_properties(device).multi_processor_count
    return min(many, items)


class Done(NamedTuple):
    """What the kernel leaves.

    Attributes:
        counts: fp64 `[batch, heads, tiles of `rows` rows, 3]`.
        flags: which items met values at the edges that are not finite, int32 `[batch, heads, tiles of `flag_rows`]`;
            None if nothing is masked, or if values are in e4m3, where 0 * NaN may show.
    """

    counts: Tensor
    flags: Tensor | None
    rows: int
    flag_rows: int


def attend(
    inputs: Operands,
    output: Tensor,
    lse: Tensor,
    lists: tuple[Tensor | None, Tensor | None],
    pv_threshold: Tensor | None,
    *,
    kv_len: int,
    block_size: tuple[int, int],
    causal: bool,
    factor: float,
) -> Done:
    """Fill output and lse; factor = scale * log2(e), pv_threshold in fp32, e4m3 values with shuffled keys."""
    from tamis.backends.triton.kernels.gluon_api import descriptor
    from tamis.backends.triton.kernels.hopper import hopper_kernel

    batch, heads, q_len, value_dim = output.shape
    if lists[0] is not None and lists[0].stride(2) != 1:
        lists = (lists[0].contiguous(), lists[1])
    precision = "full" if inputs.q_scale is None else "fp8" if inputs.products == "fp8" else "int8"
    tiles = cut(precision, inputs.width, value_dim, block_size[0])
    assert tiles is not None
    q, k, v, sound, v_flags = _tensors(inputs, mends=causal and precision != "fp8")
    q_tiles = geometry.num_blocks(q_len, tiles.rows)
    counts = torch.empty((batch, heads, geometry.num_blocks(q_len, _ROWS), 3), dtype=torch.float64, device=q.device)
    flags = None if v_flags is None else torch.empty((batch, heads, q_tiles), dtype=torch.int32, device=q.device)
    part = tiles.value_dim if tiles.value_dim <= 128 else 64
    v_box = [1, 1, part, tiles.keys] if precision == "fp8" else [1, 1, tiles.keys, part]
    items, section = q_tiles * heads * batch, _section(k, v, heads, batch)
    many = programs(q.device, geometry.num_blocks(items, 2) if tiles.split else items)
    launch.run(
        hopper_kernel,
        (many,),
        *(descriptor(q, [1, 1, _ROWS, tiles.dim]), descriptor(k, [1, 1, tiles.keys, tiles.dim])),
        *(descriptor(v, v_box), descriptor(sound, v_box), output, lse, counts),
        *(lse if t is None else t for t in (flags, v_flags, inputs.q_scale, inputs.k_scale, inputs.v_scale)),
        *(lse if t is None else t for t in (inputs.q_shift, *lists, pv_threshold)),
        *_list_places(lists),
        *(q_len, kv_len, kv_len - q_len, heads, k.shape[1], heads // k.shape[1], batch * heads),
        *(q_tiles, counts.shape[2], geometry.num_blocks(kv_len, block_size[1]), kv_len // block_size[1]),
        *(geometry.num_blocks(kv_len, TILE), items, section, section * q_tiles, many),
        0 if inputs.k_scale is None else inputs.k_scale.shape[2],
        factor,
        device=q.device,
        warps=_WARPS,
        D=tiles.dim,
        DV=tiles.value_dim,
        VALUE_DIM=value_dim,
        V_SCALES=0 if inputs.v_scale is None else inputs.v_scale.shape[2],
        BLOCK_KV=block_size[1],
        TILE_K=tiles.keys,
        STAGES=tiles.stages,
        CAUSAL=causal,
        SPLIT=tiles.split,
        LISTS=list_bits(lists),
        STAGE2=pv_threshold is not None,
        MENDS=flags is not None,
        # P in e4m3 has 17 powers of two below its largest number.
        HEADROOM=8 if precision == "fp8" else 0,
    )
    return Done(counts, flags, _ROWS, tiles.rows)


def _tensors(inputs: Operands, mends: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Query, key, value, value for the edges, and which of its tiles differ: as the copy engine can take them."""
    q, k, v = inputs.q, inputs.k, inputs.v
    if inputs.products == "fp8":
        v = v.transpose(2, 3)
    if 0 in k.shape:  # which a descriptor may not say; nobody reads it
        k, v = (x.new_zeros([size or 16 for size in x.shape]) for x in (k, v))
    sound, flags = sound_values(v) if mends else (v, None)
    q, k, v = (_aligned(x) for x in (q, k, v))
    return q, k, v, sound if mends else v, flags


def _aligned(x: Tensor) -> Tensor:
    """x, or a copy if the copy engine can't read it: it wants rows in one piece, and 16 bytes from start to start."""
    grain = 16 // x.element_size()
    steps = [stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    good = all(step > 0 and step % grain == 0 for step in steps) and (x.stride(-1) == 1 or x.shape[-1] == 1)
    if good and x.data_ptr() % 16 == 0:
        return x
    width = (x.shape[-1] + grain - 1) // grain * grain
    return x.new_empty((*x.shape[:-1], width))[..., : x.shape[-1]].copy_(x)


def _section(k: Tensor, v: Tensor, heads: int, batch: int) -> int:
    """Heads that are worked on at a time: those whose keys and values fit the L2 cache together, or one key head's."""
    of_head = max(1, k.shape[2] * (k.shape[3] * k.element_size() + v.shape[3] * v.element_size()))
    return min(max(1, _NEAR // of_head) * (heads // k.shape[1]), heads * batch)


def _list_places(lists: tuple[Tensor | None, Tensor | None]) -> tuple[int, ...]:
    """Strides of counts by batch and head, of indices by batch, head and tile, and the room of a list."""
    num, indices = lists
    if num is None or indices is None:
        return (0,) * 6
    return (*num.stride()[:2], *indices.stride()[:3], indices.shape[3])


def list_bits(lists: tuple[Tensor | None, Tensor | None]) -> int:
    """0 without lists; else how many bits it takes to say where in them something is."""
    if lists[1] is None:
        return 0
    last = max(
        sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        for t in lists
        if t is not None
    )
    return 32 if last < 2**31 else 64
