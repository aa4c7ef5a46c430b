"""Searching predictors: methods that score blocks in plain torch, one key head at a time, as one op each.

A method is a function from a `View` to the blocks it wants. Everything else is here: the arguments, what is always
kept, what is never kept, and the op that makes the method one node of a compiled graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor

from tamis import geometry
from tamis.backends import base
from tamis.block_mask import BlockMask, block_lists, may_trim
from tamis.call import make_call, per_head
from tamis.predictors.base import Keep, Range, as_keep, detached, must_blocks, numbers
from tamis.predictors.view import View, filled_blocks

Method: TypeAlias = "Callable[[View, Sequence[int]], Tensor]"
SearchOp: TypeAlias = "Callable[..., tuple[Tensor, Tensor]]"


@dataclass(frozen=True, kw_only=True)
class Search:
    """What searching predictors share: sink, must-keep ranges, and the call.

    A subclass names its op, its settings per head (`SHARES`, with their intervals; at least one) and its integers
    (`COUNTS`, with their least and greatest values).
    """

    OP: ClassVar[SearchOp]
    SHARES: ClassVar[dict[str, str]]
    COUNTS: ClassVar[dict[str, tuple[int, int]]] = {}

    sink: bool = True
    keep: Keep | Mapping[str, Sequence[Range]] | None = None

    def __post_init__(self) -> None:
        for name, allowed in self.SHARES.items():
            if getattr(self, name) is not None:
                object.__setattr__(self, name, numbers(getattr(self, name), name, allowed))
        for name, (least, most) in self.COUNTS.items():
            _check_count(getattr(self, name), name, least, most)
        if not isinstance(self.sink, bool):
            raise TypeError(f"sink must be True or False, got {type(self.sink).__name__}")
        object.__setattr__(self, "keep", as_keep(self.keep))

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
    ) -> BlockMask:
        """Predict a `BlockMask` for every query head; the arguments are those of `attend`.

        With every backend the mask is the same, but for rounding in `Probe`.
        """
        call = make_call(
            detached(query, "query"),
            detached(key, "key"),
            None,
            block_size=block_size,
            causal=causal,
            window=window,
            scale=scale,
            attn_mask=attn_mask,
            positions=positions,
            segments=segments,
        )
        base.choose(call, backend)
        keep = self.keep if isinstance(self.keep, Keep) else Keep()
        if self.sink:
            keep = Keep((*keep.keys, (0, 1)), keep.queries)
        device = call.query.device
        given = {name: getattr(self, name) for name in self.SHARES}
        settings = [
            per_head(0.0 if value is None else value, call.num_heads, name, device) for name, value in given.items()
        ]
        counts, indices = type(self).OP(
            call.query,
            call.key,
            torch.stack(settings),
            [value is not None for value in given.values()],
            [getattr(self, name) for name in self.COUNTS],
            must_blocks(call, keep, diagonal=call.causal and call.q_bounds is not None),
            call.scale,
            call.causal,
            call.window,
            *call.block_size,
            call.attn_mask,
            call.q_positions,
            call.kv_positions,
            call.q_segments,
            call.kv_segments,
            call.q_bounds,
            call.kv_bounds,
            call.visible,
            may_trim(device),
            backend,
        )
        return BlockMask(counts, indices, call.block_size, (call.q_len, call.kv_len))


def _check_count(value: int, name: str, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r} ({type(value).__name__})")
    if not least <= value <= most:
        raise ValueError(f"{name} must be at least {least} and at most {most}, got {value}")


class Arguments(NamedTuple):
    """What a search op was given, as in `Call`."""

    query: Tensor
    key: Tensor
    settings: Tensor
    given: tuple[bool, ...]
    must: Tensor
    scale: float
    causal: bool
    window: int | None
    block_size: tuple[int, int]
    attn_mask: Tensor | None
    q_positions: Tensor | None
    kv_positions: Tensor | None
    q_segments: Tensor | None
    kv_segments: Tensor | None
    q_bounds: Tensor | None
    kv_bounds: Tensor | None
    visible: Tensor | None
    backend: str | None


def search_op(name: str, method: Method) -> SearchOp:
    """Make the op `tamis::NAME_lists` of a method; the method's table holds the blocks that it wants kept."""

    @torch.library.custom_op(f"tamis::{name}_lists", mutates_args=())
    def lists(
        query: Tensor,
        key: Tensor,
        settings: Tensor,
        given: Sequence[bool],
        counts: Sequence[int],
        must: Tensor,
        scale: float,
        causal: bool,
        window: int | None,
        block_q: int,
        block_kv: int,
        attn_mask: Tensor | None,
        q_positions: Tensor | None,
        kv_positions: Tensor | None,
        q_segments: Tensor | None,
        kv_segments: Tensor | None,
        q_bounds: Tensor | None,
        kv_bounds: Tensor | None,
        visible: Tensor | None,
        trim: bool,
        backend: str | None,
    ) -> tuple[Tensor, Tensor]:
        arguments = Arguments(
            query, key, settings, tuple(given), must, scale, causal, window, (block_q, block_kv), attn_mask,
            q_positions, kv_positions, q_segments, kv_segments, q_bounds, kv_bounds, visible, backend,
        )  # fmt: skip
        return block_lists(_kept(method, counts, arguments), trim)

    lists.register_fake(_fake_lists)
    return lists


def _kept(method: Method, counts: Sequence[int], given: Arguments) -> Tensor:
    """The blocks that a method wants and those that must be, of what is visible: bool, as a whole map."""
    batch, heads, q_len, _ = given.query.shape
    kv_len, device = given.key.shape[2], given.query.device
    q_bounds, kv_bounds = given.q_bounds, given.kv_bounds
    if q_bounds is None or kv_bounds is None:
        q_bounds = geometry.default_bounds(q_len, given.block_size[0], kv_len - q_len, device)
        kv_bounds = geometry.default_bounds(kv_len, given.block_size[1], 0, device)
    seen = geometry.visible_blocks(q_bounds, kv_bounds, given.causal, given.window)[:, None]
    seen = (seen if given.visible is None else seen & given.visible).expand(batch, heads, -1, -1)
    must = given.must
    if given.causal and given.q_bounds is None:  # the diagonal of default positions; `must` has that of others
        starts_before = kv_bounds[:, None, :, 0] <= q_bounds[:, :, None, 1]
        must = must | (starts_before & (kv_bounds[:, None, :, 1] >= q_bounds[:, :, None, 0]))[:, None]
    must = must.expand(batch, heads, -1, -1)
    counted = geometry.without_hidden(given.attn_mask, given.kv_segments)
    kept = torch.zeros_like(seen, memory_format=torch.contiguous_format)
    group = heads // max(1, given.key.shape[1])
    for head in range(given.key.shape[1]) if seen.numel() else ():
        shared = slice(head * group, (head + 1) * group)
        view, broken = _view(given, head, shared, counted, seen[:, shared], must[:, shared])
        kept[:, shared] = (method(view, counts) | view.must | broken) & view.seen
    return kept


def _view(
    given: Arguments, head: int, shared: slice, counted: Tensor | None, seen: Tensor, must: Tensor
) -> tuple[View, Tensor]:
    """What a method sees of a key head and the query heads that share it, and the blocks that hold no numbers."""
    query, key = given.query[:, shared], given.key[:, head : head + 1]
    q_counts, q_broken = _tokens(query, given.q_segments)
    kv_counts, kv_broken = _tokens(key, counted)
    q_positions, kv_positions = given.q_positions, given.kv_positions
    if q_positions is None or kv_positions is None:
        q_positions, kv_positions = geometry.default_positions(query.shape[2], key.shape[2], query.device)
    view = View(
        heads=shared,
        query=query.to(torch.float32),
        key=key.to(torch.float32),
        q_counts=q_counts,
        kv_counts=kv_counts,
        seen=seen,
        must=must & seen,
        settings=given.settings[:, shared],
        given=given.given,
        block_size=given.block_size,
        scale=given.scale,
        causal=given.causal,
        window=given.window,
        attn_mask=None if given.attn_mask is None else given.attn_mask[:, shared],
        q_positions=q_positions,
        kv_positions=kv_positions,
        q_segments=given.q_segments,
        kv_segments=given.kv_segments,
        plain=given.q_bounds is None,
        backend=given.backend,
    )
    q_blocks, kv_blocks = filled_blocks(q_broken, view.block_size[0]), filled_blocks(kv_broken, view.block_size[1])
    return view, q_blocks[..., None] | kv_blocks[..., None, :]


def _tokens(x: Tensor, segments: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which tokens count, and which would if they held numbers; bool `[batch, heads, tokens]`."""
    # One pass. A finite sum needs finite parts; large ones that overflow could not be compared by their scores either.
    whole = x.sum(-1, dtype=torch.float32).isfinite()
    present = torch.ones_like(whole) if segments is None else (segments >= 0)[:, None].expand_as(whole)
    return present & whole, present & ~whole


def _fake_lists(query: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
    must, trim = arguments[4], arguments[-2]
    assert isinstance(must, Tensor)
    shape = (*query.shape[:2], *must.shape[2:])
    width = torch.library.get_ctx().new_dynamic_size() if trim else shape[3]
    return (
        query.new_empty(shape[:3], dtype=torch.int32),
        query.new_empty((*shape[:3], width), dtype=torch.int32),
    )
