"""What predictors share: the contract, must-keep ranges, and the geometry of a call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from tamis import geometry
from tamis.block_mask import BlockMask
from tamis.call import Call
from tamis.errors import UnsupportedError
from tamis.packed import check_layout

Range: TypeAlias = "tuple[int | None, int | None]"
Setting: TypeAlias = "float | Sequence[float] | Tensor"


class Predictor(Protocol):
    """Chooses the blocks that matter from query and key; it never sees the value."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        *,
        causal: bool = False,
        window: int | None = None,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
        block_size: tuple[int, int] | None = None,
        positions: tuple[Tensor | None, Tensor | None] | None = None,
        segments: tuple[Tensor | None, Tensor | None] | None = None,
        backend: str | None = None,
    ) -> BlockMask: ...


@dataclass(frozen=True)
class Keep:
    """Tokens whose blocks are always kept, e.g. the text of an image or video model.

    Args:
        keys: ranges (start, stop) of keys that every row keeps.
        queries: ranges of queries that keep every key.

    Ranges are read as Python slices: negative numbers count from the end, None is open.

    Example:
        >>> from tamis.predictors import Keep
        >>> Keep(keys=[(0, 226)], queries=[(0, 226)])
        Keep(keys=((0, 226),), queries=((0, 226),))
    """

    keys: Sequence[Range] = ()
    queries: Sequence[Range] = ()

    def __post_init__(self) -> None:
        for name in ("keys", "queries"):
            given = getattr(self, name)
            if not isinstance(given, Sequence):
                raise TypeError(f"keep: {name} must be ranges (start, stop), got {type(given).__name__}")
            object.__setattr__(self, name, tuple(_range(item, name) for item in given))


_OPEN = 2**62


def _range(item: Range, name: str) -> Range:
    if not isinstance(item, Sequence):
        raise TypeError(f"keep: {name} must be ranges (start, stop), got {item!r}")
    ends = tuple(item)
    whole = all(end is None or (isinstance(end, int) and not isinstance(end, bool)) for end in ends)
    if len(ends) != 2 or not whole:
        raise ValueError(f"keep: {name} must be ranges (start, stop) of integers or None, got {ends}")
    if any(end is not None and not -_OPEN <= end <= _OPEN for end in ends):
        raise ValueError(f"keep: {name} must have ends within -2**62 .. 2**62, got {ends}")
    return ends[0], ends[1]


def as_keep(keep: Keep | Mapping[str, Sequence[Range]] | None) -> Keep | None:
    """Accept a mapping with "keys" and "queries" for a `Keep`."""
    if keep is None or isinstance(keep, Keep):
        return keep
    if not isinstance(keep, Mapping):
        raise TypeError(f"keep must be a Keep, a mapping or None, got {type(keep).__name__}")
    unknown = [name for name in keep if name not in ("keys", "queries")]
    if unknown:
        raise ValueError(f"keep knows 'keys' and 'queries', got {unknown}")
    return Keep(**keep)


def also_keep(predictor: Predictor, keep: Keep) -> Predictor:
    """A predictor that keeps these tokens as well.

    Raises:
        UnsupportedError: it has no setting `keep`.
    """
    known: Any = predictor
    if not hasattr(known, "keep"):
        raise UnsupportedError(f"{type(predictor).__name__} has no setting 'keep', which the model's text tokens need")
    own = as_keep(known.keep) or Keep()
    both: Predictor = replace(known, keep=Keep((*own.keys, *keep.keys), (*own.queries, *keep.queries)))
    return both


_INTERVALS: dict[str, Callable[[float], bool]] = {
    "in (0, 1]": lambda value: 0 < value <= 1,
    "in [0, 1]": lambda value: 0 <= value <= 1,
    "in [-1, 1)": lambda value: -1 <= value < 1,
}


def numbers(setting: Setting, name: str, allowed: str) -> float | tuple[float, ...]:
    """A setting as plain numbers, so that a predictor can be compared, hashed and saved."""
    if isinstance(setting, Tensor):
        setting = setting.tolist()
    if not isinstance(setting, (int, float, Sequence)) or isinstance(setting, str):
        raise TypeError(f"{name} must be a number or one per query head, got {setting!r}")
    values = [setting] if isinstance(setting, (int, float)) else list(setting)
    if not values:
        raise ValueError(f"{name} must be a number or one per query head, got an empty sequence")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number or one per query head, got {value!r}")
        if not _INTERVALS[allowed](value):
            raise ValueError(f"{name} must be {allowed}, got {value}")
    return float(values[0]) if isinstance(setting, (int, float)) else tuple(float(value) for value in values)


def detached(tensor: Tensor, name: str) -> Tensor:
    """A predictor's input without its gradient, which a mask has none of; what is no tensor `make_call` refuses."""
    check_layout(tensor, name)
    return tensor.detach() if isinstance(tensor, Tensor) else tensor


def must_blocks(call: Call, keep: Keep | None, *, diagonal: bool) -> Tensor:
    """Blocks kept whatever their score, bool `[batch | 1, 1, q_blocks, kv_blocks]`.

    Those of `keep`, and with `diagonal` those that hold a key at a row's own position.
    """
    keep = Keep() if keep is None else keep
    table: Tensor = _must_blocks(
        call.query.new_empty(0),
        call.q_len,
        call.kv_len,
        *call.block_size,
        _flat(keep.queries),
        _flat(keep.keys),
        diagonal,
        call.q_positions,
        call.kv_positions,
        call.q_segments,
        call.kv_segments,
    )
    return table


def touched_blocks(ranges: Sequence[Range], length: int, block: int, device: torch.device) -> Tensor:
    """Blocks that overlap one of the ranges of so many tokens, bool `[blocks]`."""
    return _touched(_flat(ranges), length, block, device)


def _flat(ranges: Sequence[Range]) -> list[int]:
    """Ranges as start, stop, start, stop, ..; an op's list holds integers only, so an open end becomes a huge one."""
    return [end for start, stop in ranges for end in (0 if start is None else start, _OPEN if stop is None else stop)]


@torch.library.custom_op("tamis::must_blocks", mutates_args=())
def _must_blocks(
    like: Tensor,
    q_len: int,
    kv_len: int,
    block_q: int,
    block_kv: int,
    query_ranges: Sequence[int],
    key_ranges: Sequence[int],
    diagonal: bool,
    q_positions: Tensor | None,
    kv_positions: Tensor | None,
    q_segments: Tensor | None,
    kv_segments: Tensor | None,
) -> Tensor:
    rows = _touched(query_ranges, q_len, block_q, like.device)
    columns = _touched(key_ranges, kv_len, block_kv, like.device)
    table = (rows[:, None] | columns)[None]
    if diagonal:
        if q_positions is None or kv_positions is None:
            q_positions, kv_positions = geometry.default_positions(q_len, kv_len, like.device)
        table = table | geometry.same_position_blocks(
            q_positions, kv_positions, q_segments, kv_segments, (block_q, block_kv)
        )
    return table[:, None]


@_must_blocks.register_fake
def _fake_must_blocks(
    like: Tensor,
    q_len: int,
    kv_len: int,
    block_q: int,
    block_kv: int,
    query_ranges: Sequence[int],
    key_ranges: Sequence[int],
    diagonal: bool,
    *per_token: Tensor | None,
) -> Tensor:
    given = [tensor.shape[0] for tensor in per_token if tensor is not None] if diagonal else []
    grid = (geometry.traced_blocks(q_len, block_q), geometry.traced_blocks(kv_len, block_kv))
    return like.new_empty((max(given, default=1), 1, *grid), dtype=torch.bool)


def _touched(ranges: Sequence[int], length: int, block: int, device: torch.device) -> Tensor:
    """Blocks that overlap a range, bool `[blocks]`."""
    first = torch.arange(geometry.num_blocks(length, block), device=device) * block
    touched = torch.zeros_like(first, dtype=torch.bool)
    for start, stop in zip(ranges[::2], ranges[1::2], strict=True):
        low = start if start >= 0 else start + length
        high = stop if stop >= 0 else stop + length
        touched = touched | ((first < high) & (first + block > low) & (low < min(high, length)))
    return touched
