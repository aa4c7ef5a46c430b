"""The door: every argument is checked once, here, and becomes a `Call`, which every backend receives.

A score is s = scale * q.k, then softcap * tanh(s / softcap), then + attn_mask, then -inf where not visible. A sink
logit is one more key that every row sees, of value zero: it is part of the softmax and of the log-sum-exp.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.nn.attention.bias import CausalBias

from tamis import geometry
from tamis.errors import UnsupportedError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST, SMALLEST = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny  # numbers become fp32
PRECISIONS = ("full", "int8", "fp8")
COMPENSATIONS = ("centroid",)

PerHead: TypeAlias = "float | Sequence[float] | Tensor"
Pair: TypeAlias = "tuple[Tensor | None, Tensor | None]"


class MaskLike(Protocol):
    """What the door needs of a `BlockMask`."""

    @property
    def kv_num_blocks(self) -> Tensor: ...
    @property
    def kv_indices(self) -> Tensor: ...
    @property
    def block_size(self) -> tuple[int, int]: ...
    @property
    def seq_lens(self) -> tuple[int, int]: ...


class PackedLike(Protocol):
    """What the door needs of a `PackedKV`."""

    @property
    def tensors(self) -> tuple[Tensor, ...]: ...
    @property
    def length(self) -> int: ...


class Prepared(NamedTuple):
    """What a backend's prediction leaves for its `attend` on the same inputs: they are read and rounded once."""

    backend: str
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Call:
    """One validated attention call; every tensor 4-D, `[batch, heads, seq, dim]`.

    Exactly one of `key` and `packed` is filled. `value` is None when a predictor asks. Positions, segments and bounds
    (int64, `[batch | 1, ..]`) are given for both sides or for none; without them queries are aligned to the end of
    the keys. `visible` is bool `[batch | 1, heads | 1, q_blocks, kv_blocks]`: what attn_mask leaves visible, by block.
    `prepared` is what the backend's prediction left for the same inputs, if anything.
    """

    query: Tensor
    key: Tensor | None
    value: Tensor | None
    packed: tuple[Tensor, ...]
    kv_len: int
    num_kv_heads: int
    value_dim: int
    kv_num_blocks: Tensor | None
    kv_indices: Tensor | None
    block_size: tuple[int, int]
    causal: bool
    window: int | None
    scale: float
    attn_mask: Tensor | None
    q_positions: Tensor | None
    kv_positions: Tensor | None
    q_segments: Tensor | None
    kv_segments: Tensor | None
    q_bounds: Tensor | None
    kv_bounds: Tensor | None
    visible: Tensor | None
    softcap: float | None
    sink_logits: Tensor | None
    precision: str
    pv_threshold: Tensor | None
    compensate: str | None
    prepared: tuple[Tensor, ...] = ()

    @property
    def q_len(self) -> int:
        return self.query.shape[2]

    @property
    def num_heads(self) -> int:
        return self.query.shape[1]


def make_call(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    *,
    packed: PackedLike | None = None,
    block_mask: MaskLike | None = None,
    block_size: tuple[int, int] | None = None,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    positions: Pair | None = None,
    segments: Pair | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    precision: str = "full",
    pv_threshold: PerHead | None = None,
    compensate: str | None = None,
) -> Call:
    """Check the public arguments and bring them into one form."""
    _check_inputs(query, key, value)
    lead = query.shape[:-2]
    query = flatten(query)
    batch, _, q_len, head_dim = query.shape
    key = None if key is None else _match_batch(flatten(key), batch, "key")
    value = None if value is None else _match_batch(flatten(value), batch, "value")
    num_kv_heads, kv_len, value_dim = _check_sizes(query, key, value, packed, precision)

    if block_mask is not None:
        block_size = block_mask.block_size
    block_size = check_block_size(geometry.DEFAULT_BLOCK_SIZE if block_size is None else block_size)
    lists: tuple[Tensor | None, Tensor | None] = (None, None)
    if block_mask is not None:
        lists = _expand_lists(block_mask, query, kv_len)

    window = _check_window(window)
    lens = (q_len, kv_len)
    q_positions, kv_positions = _pair(positions, "positions", query, lens)
    q_segments, kv_segments = _pair(segments, "segments", query, lens)
    q_bounds, kv_bounds = _bounds(q_positions, kv_positions, q_segments, kv_segments, query.device, lens, block_size)
    mask, visible = (None, None) if attn_mask is None else _expand_mask(attn_mask, query, lead, kv_len, block_size)

    return Call(
        query=query,
        key=key,
        value=value,
        packed=() if packed is None else packed.tensors,
        kv_len=kv_len,
        num_kv_heads=num_kv_heads,
        value_dim=value_dim,
        kv_num_blocks=lists[0],
        kv_indices=lists[1],
        block_size=block_size,
        causal=_check_flag(causal, "causal"),
        window=window,
        scale=_check_number(scale, "scale") if scale is not None else 1.0 / math.sqrt(head_dim),
        attn_mask=mask,
        q_positions=q_positions,
        kv_positions=kv_positions,
        q_segments=q_segments,
        kv_segments=kv_segments,
        q_bounds=q_bounds,
        kv_bounds=kv_bounds,
        visible=visible,
        softcap=None if softcap is None else _check_number(softcap, "softcap", positive=True),
        sink_logits=None if sink_logits is None else _check_sinks(sink_logits, query),
        precision=_check_choice(precision, "precision", PRECISIONS),
        pv_threshold=None if pv_threshold is None else _check_threshold(pv_threshold, query),
        compensate=None if compensate is None else _check_choice(compensate, "compensate", COMPENSATIONS),
    )


def flatten(tensor: Tensor) -> Tensor:
    """Bring `[.., seq, dim]` to `[batch, heads, seq, dim]`: missing leading dims are added, extra ones flattened."""
    if tensor.dim() == 4:
        return tensor
    if tensor.dim() > 4:
        return tensor.flatten(0, -4)
    return tensor[(None,) * (4 - tensor.dim())]


def per_head(setting: PerHead, num_heads: int, name: str, device: torch.device) -> Tensor:
    """A setting as fp32 `[heads]`: one number for all query heads, or one per head."""
    if isinstance(setting, Tensor):
        tensor = setting.to(device=device, dtype=torch.float32)
    elif not isinstance(setting, (int, float, Sequence)) or isinstance(setting, (str, bytes)):
        raise TypeError(f"{name} must be one number or one per query head, got {type(setting).__name__}")
    elif isinstance(setting, (int, float)):
        # Filled on the device: a copy from the host would wait for it, and break the capture of a graph.
        return torch.full((num_heads,), setting, dtype=torch.float32, device=device)
    else:
        tensor = _numbers(tuple(setting), device)
    if tensor.dim() == 0:
        return tensor.expand(num_heads).contiguous()
    if tensor.dim() != 1 or tensor.shape[0] != num_heads:
        raise ValueError(f"{name} must be one number or one per query head ({num_heads}), got {tuple(tensor.shape)}")
    return tensor


def _numbers(values: tuple[float, ...], device: torch.device) -> Tensor:
    if device.type == "cpu" or torch.compiler.is_compiling():
        return torch.tensor(values, dtype=torch.float32, device=device)
    return _kept_numbers(values, device)


@functools.lru_cache(maxsize=1024)
def _kept_numbers(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Copied to a device once, which waits for it; a call before a graph is captured makes it ready for that."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device)


def refuse_gradients(**tensors: Tensor | None) -> None:
    """Raise if an input wants a gradient: every backend is forward-only."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            raise UnsupportedError(
                f"{name} requires grad and every backend is forward-only: call under torch.no_grad(), or pass "
                f"{name}.detach()"
            )


def check_block_size(block_size: Sequence[int]) -> tuple[int, int]:
    """A mask's grain: two of 64 and 128."""
    sizes = tuple(block_size) if isinstance(block_size, Sequence) else (block_size,)
    if len(sizes) != 2 or any(not isinstance(size, int) or size not in geometry.BLOCK_SIZES for size in sizes):
        raise ValueError(f"block_size must be (query, key) with each 64 or 128, got {sizes}")
    return sizes[0], sizes[1]


def _check_inputs(query: Tensor, key: Tensor | None, value: Tensor | None) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor is None and name != "query":
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dim() < 2:
            raise ValueError(f"{name} must be [.., seq, dim], got shape {tuple(tensor.shape)}")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} must be float32, bfloat16 or float16, got {tensor.dtype}")
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} is {tensor.dtype} and query {query.dtype}: they must agree")
        if tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device} and query on {query.device}: they must agree")
        if tensor.dim() != query.dim():
            raise ValueError(f"{name} has {tensor.dim()} dimensions and query {query.dim()}: they must agree")
        if tensor.dim() > 4 and tensor.shape[:-3] != query.shape[:-3]:
            raise ValueError(
                f"{name} has leading dimensions {tuple(tensor.shape[:-3])} and query {tuple(query.shape[:-3])}: "
                "they must agree"
            )


def _match_batch(tensor: Tensor, batch: int, name: str) -> Tensor:
    if tensor.shape[0] == batch:
        return tensor
    if tensor.shape[0] != 1:
        raise ValueError(f"{name} has batch {tensor.shape[0]} and query {batch}: they must agree, or {name} have 1")
    return tensor.expand(batch, -1, -1, -1)


def _check_sizes(
    query: Tensor, key: Tensor | None, value: Tensor | None, packed: PackedLike | None, precision: str
) -> tuple[int, int, int]:
    """Return key heads, key length and value dim."""
    batch, num_heads, _, head_dim = query.shape
    if packed is not None:
        if precision != "int8":
            raise ValueError(f"precision must be 'int8' when key is a PackedKV, got {precision!r}")
        mean, value_scale = packed.tensors[6], packed.tensors[4]
        key_batch, num_kv_heads, key_dim = mean.shape
        kv_len, value_dim = packed.length, value_scale.shape[-1]
        if key_batch != batch:
            raise ValueError(f"key (packed) has batch {key_batch} and query {batch}: they must agree")
        if mean.device != query.device:
            raise ValueError(f"key (packed) is on {mean.device} and query on {query.device}: they must agree")
    elif key is not None:
        _, num_kv_heads, kv_len, key_dim = key.shape
        value_dim = head_dim if value is None else value.shape[-1]
    else:
        raise TypeError("key must be a tensor, got None")
    if head_dim < 1 or value_dim < 1:
        raise ValueError(f"head dims must be at least 1: query has {head_dim}, value {value_dim}")
    if key_dim != head_dim:
        raise ValueError(f"key has head_dim {key_dim} and query {head_dim}: they must agree")
    if num_heads % num_kv_heads if num_kv_heads else num_heads:
        raise ValueError(
            f"key has {num_kv_heads} heads and query {num_heads}: query heads must be a multiple of key heads"
        )
    if value is not None and (value.shape[1] != num_kv_heads or value.shape[2] != kv_len):
        raise ValueError(
            f"value has {value.shape[1]} heads and length {value.shape[2]}, key {num_kv_heads} and {kv_len}: "
            "they must agree"
        )
    return num_kv_heads, kv_len, value_dim


def _expand_lists(mask: MaskLike, query: Tensor, kv_len: int) -> tuple[Tensor, Tensor]:
    batch, num_heads, q_len, _ = query.shape
    if mask.seq_lens[0] != q_len or mask.seq_lens[1] != kv_len:
        raise ValueError(f"block_mask is for lengths {tuple(mask.seq_lens)}, query and key have ({q_len}, {kv_len})")
    if mask.kv_indices.device != query.device:
        raise ValueError(f"block_mask is on {mask.kv_indices.device} and query on {query.device}: they must agree")
    for name, dim, size in (("batch", 0, batch), ("heads", 1, num_heads)):
        found = mask.kv_num_blocks.shape[dim]
        if not _broadcasts(found, size):
            raise ValueError(f"block_mask has {name} {found}, query has {size}: expected 1 or {size}")
    return mask.kv_num_blocks.expand(batch, num_heads, -1), mask.kv_indices.expand(batch, num_heads, -1, -1)


def _pair(pair: Pair | None, name: str, query: Tensor, lens: tuple[int, int]) -> tuple[Tensor | None, Tensor | None]:
    """Positions or segments of both sides as int64 `[batch | 1, seq]`; a side left None gets its default."""
    if pair is None:
        return None, None
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(f"{name} must be a pair (query's, key's), got {type(pair).__name__}")
    if pair[0] is None and pair[1] is None:
        return None, None
    sides = []
    for index, (side, length) in enumerate(zip(pair, lens, strict=True)):
        if side is None:
            default = geometry.default_positions(*lens, query.device)[index]
            sides.append(default if name == "positions" else torch.zeros_like(default))
            continue
        label = f"{name}[{index}]"
        if not isinstance(side, Tensor) or side.dtype.is_floating_point or side.dtype == torch.bool:
            kind = side.dtype if isinstance(side, Tensor) else type(side).__name__
            raise TypeError(f"{label} must be an integer tensor, got {kind}")
        if side.device != query.device:
            raise ValueError(f"{label} is on {side.device} and query on {query.device}: they must agree")
        if side.dim() not in (1, 2) or side.shape[-1] != length:
            raise ValueError(f"{label} must be [{length}] or [batch, {length}], got {tuple(side.shape)}")
        side = side.to(torch.int64) if side.dim() == 2 else side.to(torch.int64)[None]
        if not _broadcasts(side.shape[0], query.shape[0]):
            raise ValueError(f"{label} has batch {side.shape[0]} and query {query.shape[0]}: expected 1 or the same")
        sides.append(side)
    return sides[0], sides[1]


def _bounds(
    q_positions: Tensor | None,
    kv_positions: Tensor | None,
    q_segments: Tensor | None,
    kv_segments: Tensor | None,
    device: torch.device,
    lens: tuple[int, int],
    block_size: tuple[int, int],
) -> tuple[Tensor | None, Tensor | None]:
    if q_positions is None and q_segments is None:
        return None, None
    if q_positions is None or kv_positions is None:
        q_positions, kv_positions = geometry.default_positions(*lens, device)
    q_bounds = geometry.token_bounds(q_positions, q_segments, block_size[0])
    return q_bounds, geometry.token_bounds(kv_positions, kv_segments, block_size[1])


def _expand_mask(
    mask: Tensor, query: Tensor, lead: Sequence[int], kv_len: int, block_size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """The mask as a `[batch, heads, q_len, kv_len]` view, and what it leaves visible by block, reduced first."""
    if not isinstance(mask, Tensor) or isinstance(mask, CausalBias):
        # Torch's bias objects hold no numbers: they are for sparse_attention, which reads what they stand for.
        hint = ": give causal=True, or call sparse_attention" if isinstance(mask, CausalBias) else ""
        raise TypeError(f"attn_mask must be a plain tensor, got {type(mask).__name__}{hint}")
    if mask.dtype != torch.bool and mask.dtype not in DTYPES:
        raise TypeError(f"attn_mask must be bool, float32, bfloat16 or float16, got {mask.dtype}")
    if mask.device != query.device:
        raise ValueError(f"attn_mask is on {mask.device} and query on {query.device}: they must agree")
    batch, num_heads, q_len, _ = query.shape
    full = (*lead, q_len, kv_len)
    shape = (1,) * (len(full) - mask.dim()) + tuple(mask.shape)
    if len(shape) > len(full) or not all(_broadcasts(*sizes) for sizes in zip(shape, full, strict=True)):
        raise ValueError(f"attn_mask of shape {tuple(mask.shape)} does not broadcast to {full}")
    mask = mask.reshape(shape)
    if any(size != 1 for size in shape[:-3]):
        mask = mask.expand(*lead[:-1], *shape[-3:])
    elif mask.dim() > 4:
        mask = mask[(0,) * (mask.dim() - 4)]
    mask = flatten(mask)
    visible = geometry.mask_blocks(mask.detach(), q_len, kv_len, *block_size)
    return mask.expand(batch, num_heads, q_len, kv_len), visible


def _broadcasts(size: int, want: int) -> bool:
    # Not `in (1, want)`: symbols of a traced graph are found by == only.
    return size == 1 or size == want


def _check_sinks(sink_logits: Tensor, query: Tensor) -> Tensor:
    if not isinstance(sink_logits, Tensor) or not sink_logits.dtype.is_floating_point:
        kind = sink_logits.dtype if isinstance(sink_logits, Tensor) else type(sink_logits).__name__
        raise TypeError(f"sink_logits must be a floating point tensor, got {kind}")
    if sink_logits.dim() != 1 or sink_logits.shape[0] != query.shape[1]:
        raise ValueError(f"sink_logits must be [{query.shape[1]}] (query heads), got {tuple(sink_logits.shape)}")
    if sink_logits.device != query.device:
        raise ValueError(f"sink_logits is on {sink_logits.device} and query on {query.device}: they must agree")
    return sink_logits.to(torch.float32)


def _check_threshold(pv_threshold: PerHead, query: Tensor) -> Tensor:
    threshold = per_head(pv_threshold, query.shape[1], "pv_threshold", query.device)
    if isinstance(pv_threshold, (int, float)):
        if not pv_threshold >= SMALLEST:
            raise ValueError(f"pv_threshold must be > 0 (None turns it off), got {pv_threshold}")
    elif torch.compiler.is_compiling() or (isinstance(pv_threshold, Tensor) and pv_threshold.device.type != "cpu"):
        pass  # Reading values would synchronise a device and break a traced graph: they are taken as they are.
    elif not all(value >= SMALLEST for value in list(map(float, pv_threshold))):
        raise ValueError(f"pv_threshold must be > 0 (None turns it off), got {list(map(float, pv_threshold))}")
    return threshold


def _check_number(value: float, name: str, *, positive: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if torch.compiler.is_compiling():
        return value  # May be a symbol there, which has no value to check.
    if not abs(value) <= LARGEST or (positive and value < SMALLEST):
        raise ValueError(f"{name} must be finite{' and > 0' if positive else ''}, got {value}")
    return float(value)


def _check_window(window: int | None) -> int | None:
    if window is None:
        return None
    if isinstance(window, bool) or not isinstance(window, int):
        raise TypeError(f"window must be an integer, got {type(window).__name__}")
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    return min(window, 2**62)  # no distance is larger, and sums with it fit 64 bits


def _check_flag(value: bool, name: str) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__}")
    return value


def _check_choice(value: str, name: str, choices: Sequence[str]) -> str:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    return value
