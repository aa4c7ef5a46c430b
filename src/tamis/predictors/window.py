"""Window: keep the first keys and those near the diagonal, whatever they hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tamis import geometry
from tamis.backends import base
from tamis.block_mask import BlockMask, block_lists, may_trim
from tamis.call import make_call
from tamis.predictors.base import Keep, Range, as_keep, detached, must_blocks


@dataclass(frozen=True)
class Window:
    """Sink and sliding window: the first keys, and those less than `size` positions away.

    Whole blocks are kept, so a row may see more than `size` keys; for an exact window give `window` to `attend`.

    Args:
        size: blocks with a pair of |query position - key position| < size are kept, at least 1.
        sink: number of first keys that every row keeps, 0 for none.
        keep: further ranges, as in `Sparge`.

    Raises:
        ValueError, TypeError: a setting is out of its range.

    Source: StreamingLLM (arXiv 2309.17453), section 3.2.

    Example:
        >>> import torch, tamis
        >>> query, key = torch.randn(1, 4, 1024, 64), torch.randn(1, 4, 1024, 64)
        >>> tamis.Window(128)(query, key, causal=True).density(causal=True)
        0.5
    """

    size: int
    sink: int = 64
    keep: Keep | Mapping[str, Sequence[Range]] | None = None

    def __post_init__(self) -> None:
        for name, least in (("size", 1), ("sink", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer, got {value!r} ({type(value).__name__})")
            if not least <= value <= 2**62:
                raise ValueError(f"{name} must be at least {least} and at most 2**62, got {value}")
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
        """Make the `BlockMask`; the arguments are those of `attend`. Every backend's mask is the same."""
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
        must = must_blocks(call, Keep((*keep.keys, (0, self.sink)), keep.queries), diagonal=False)
        counts, indices = _window_lists(
            must,
            call.q_len,
            call.kv_len,
            *call.block_size,
            call.causal,
            call.window,
            self.size,
            call.q_bounds,
            call.kv_bounds,
            call.visible,
            may_trim(must.device),
        )
        batch, heads = call.query.shape[:2]
        return BlockMask(
            counts.expand(batch, heads, -1),
            indices.expand(batch, heads, -1, -1),
            call.block_size,
            (call.q_len, call.kv_len),
        )


@torch.library.custom_op("tamis::window_lists", mutates_args=())
def _window_lists(
    must: Tensor,
    q_len: int,
    kv_len: int,
    block_q: int,
    block_kv: int,
    causal: bool,
    window: int | None,
    size: int,
    q_bounds: Tensor | None,
    kv_bounds: Tensor | None,
    visible: Tensor | None,
    trim: bool,
) -> tuple[Tensor, Tensor]:
    if q_bounds is None or kv_bounds is None:
        q_bounds = geometry.default_bounds(q_len, block_q, kv_len - q_len, must.device)
        kv_bounds = geometry.default_bounds(kv_len, block_kv, 0, must.device)
    seen = geometry.visible_blocks(q_bounds, kv_bounds, causal, window)[:, None]
    near = geometry.visible_blocks(q_bounds, kv_bounds, causal, size)[:, None]
    kept = (near | must) & (seen if visible is None else seen & visible)
    return block_lists(kept, trim)


@_window_lists.register_fake
def _fake_window_lists(must: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
    batches = [must, *(table for table in arguments if isinstance(table, Tensor))]
    visible = arguments[-2]
    heads = visible.shape[1] if isinstance(visible, Tensor) else 1
    shape = (max(table.shape[0] for table in batches), heads, *must.shape[2:])
    return must.new_empty(shape[:3], dtype=torch.int32), must.new_empty(shape, dtype=torch.int32)
