"""Positions and segments of some queries and some keys of a sequence, and which of their blocks can see which."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tamis import geometry


class Places(NamedTuple):
    """Positions int64 `[1, tokens]` and segments int64 `[batch | 1, tokens]` (for both sides or for none)."""

    q_positions: Tensor
    kv_positions: Tensor
    q_segments: Tensor | None
    kv_segments: Tensor | None

    def bounds(self, block_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Bounds of the blocks of both sides, as `geometry` has them."""
        return (
            geometry.token_bounds(self.q_positions, self.q_segments, block_size[0]),
            geometry.token_bounds(self.kv_positions, self.kv_segments, block_size[1]),
        )

    def seen(self, block_size: tuple[int, int], causal: bool, window: int | None) -> Tensor:
        """Block pairs that may hold a visible pair, bool `[batch | 1, 1, q_blocks, kv_blocks]`."""
        return geometry.visible_blocks(*self.bounds(block_size), causal, window)[:, None]

    def of(self, queries: Tensor | None, keys: Tensor | None) -> Places:
        """Those of some queries and keys, by their numbers."""
        q_at, kv_at = (slice(None) if index is None else index for index in (queries, keys))
        return Places(
            self.q_positions[:, q_at],
            self.kv_positions[:, kv_at],
            None if self.q_segments is None else self.q_segments[:, q_at],
            None if self.kv_segments is None else self.kv_segments[:, kv_at],
        )


def places_of(q_len: int, kv_len: int, segments: tuple[Tensor, Tensor] | None, device: torch.device) -> Places:
    """Those of whole sequences: the last query is at the last key's position."""
    q_segments, kv_segments = (None, None) if segments is None else segments
    return Places(*geometry.default_positions(q_len, kv_len, device), q_segments, kv_segments)
