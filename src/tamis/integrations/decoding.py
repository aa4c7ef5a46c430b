"""Decoding that reads a share of the key blocks, chosen from bounds that are kept beside the cache.

For a query q and a key block with per-channel minima and maxima lo, hi, no key of the block scores more than
`relu(q) . hi - relu(-q) . lo`. The blocks with the largest bounds are read (Quest, arXiv 2406.10774, section 3.2), one
choice for the query heads that share a key head: they share what is read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tamis import geometry
from tamis.attend import attend
from tamis.block_mask import BlockMask
from tamis.integrations.request import Request
from tamis.stats import AttentionOutput

BLOCK = 64


@dataclass(frozen=True)
class Decode:
    """How a single query reads a long cache.

    Args:
        share: share of the key blocks of 64 that is read, in (0, 1].
        least: blocks that are read at least; the first and the last two are always among them. Caches that have no
            more run dense.

    Raises:
        TypeError, ValueError: a setting has the wrong type or is out of its range.

    Example:
        >>> from tamis.integrations.decoding import Decode
        >>> Decode(share=0.1).kept(512)
        52
    """

    share: float = 0.25
    least: int = 16

    def __post_init__(self) -> None:
        if isinstance(self.share, bool) or not isinstance(self.share, (int, float)):
            raise TypeError(f"decode: share must be a number, got {self.share!r}")
        if not 0 < self.share <= 1:
            raise ValueError(f"decode: share must be in (0, 1], got {self.share}")
        if isinstance(self.least, bool) or not isinstance(self.least, int):
            raise TypeError(f"decode: least must be an integer, got {self.least!r}")
        if self.least < 3:
            raise ValueError(f"decode: least must be at least 3, for the first and the last two, got {self.least}")

    def kept(self, blocks: int) -> int:
        """Of so many blocks, how many are read."""
        return min(blocks, max(self.least, math.ceil(self.share * blocks)))


@dataclass
class KeyBounds:
    """Smallest and largest key of every block of 64, per channel: `[batch, kv_heads, room, head_dim]` each.

    Attributes:
        length: tokens they are of. Behind its blocks there may be room, which is never read.
    """

    low: Tensor
    high: Tensor
    length: int

    @classmethod
    def of(cls, key: Tensor) -> KeyBounds:
        """Bounds of a key `[batch, kv_heads, length, head_dim]`."""
        bounds = cls(key.new_empty(*key.shape[:2], 0, key.shape[3]), key.new_empty(*key.shape[:2], 0, key.shape[3]), 0)
        bounds.extend(key)
        return bounds

    def extend(self, key: Tensor) -> None:
        """Take in the tokens that a key has grown by; its first `length` tokens are as they were."""
        first, blocks = self.length // BLOCK, geometry.num_blocks(key.shape[2], BLOCK)
        if blocks > self.low.shape[2]:
            room = key.new_empty(*key.shape[:2], max(blocks, blocks * 9 // 8) - self.low.shape[2], key.shape[3])
            self.low, self.high = torch.cat([self.low, room], dim=2), torch.cat([self.high, room], dim=2)
        fresh = key[:, :, first * BLOCK :]
        whole = fresh.shape[2] // BLOCK * BLOCK
        for store, extreme in ((self.low, torch.amin), (self.high, torch.amax)):
            if whole:
                tiles = fresh[:, :, :whole].reshape(*fresh.shape[:2], -1, BLOCK, fresh.shape[3])
                store[:, :, first : first + whole // BLOCK] = extreme(tiles, dim=3)
            if whole < fresh.shape[2]:
                store[:, :, blocks - 1] = extreme(fresh[:, :, whole:], dim=2)
        self.length = key.shape[2]

    def select(self, query: Tensor, kept: int) -> Tensor:
        """Blocks for queries `[batch, kv_heads, rows, head_dim]`: int32 `[batch, kv_heads, 1, kept]`, ascending."""
        blocks = geometry.num_blocks(self.length, BLOCK)
        low, high = self.low[:, :, :blocks].transpose(2, 3), self.high[:, :, :blocks].transpose(2, 3)
        bound = (query.relu() @ high - (-query).relu() @ low).amax(dim=2)
        bound[:, :, 0] = bound[:, :, -2:] = torch.inf
        return bound.topk(kept, dim=2).indices.sort(dim=2).values.to(torch.int32)[:, :, None]


def decode_obstacle(request: Request, decode: Decode | None) -> str | None:
    """Why one query cannot be answered from a part of the cache; None where it can."""
    if decode is None:
        return "decoding"
    if request.bounds is None:
        return "decoding: the cache keeps no bounds"
    if request.mask is not None or request.window is not None or request.segments is not None:
        return "decoding: under a mask, a window or padding"
    if request.sink_logits is not None:
        return "decoding: with sinks"  # they differ by query head, and the query heads of a key head are rows here
    if request.bounds.length != request.key.shape[2]:
        return "decoding: the cache was changed behind its bounds"
    blocks = geometry.num_blocks(request.key.shape[2], BLOCK)
    return None if decode.kept(blocks) < blocks else "decoding: every block is kept"


def attend_selected(request: Request, decode: Decode, backend: str | None) -> AttentionOutput:
    """Attention of one query `[batch, heads, 1, head_dim]` over the key blocks with the largest bounds."""
    assert request.bounds is not None
    batch, heads, _, dim = request.query.shape
    kv_heads, length = request.key.shape[1:3]
    # The query heads of a key head as rows of one block: what it reads is read once for all of them.
    rows = request.query.reshape(batch, kv_heads, heads // kv_heads, dim)
    kept = decode.kept(geometry.num_blocks(length, BLOCK))
    indices = request.bounds.select(rows.to(request.key.dtype), kept)
    counts = torch.full(indices.shape[:3], kept, dtype=torch.int32, device=indices.device)
    result = attend(
        rows,
        request.key,
        request.value,
        BlockMask(counts, indices, (BLOCK, BLOCK), (heads // kv_heads, length)),
        scale=request.scale,
        softcap=request.softcap,
        backend=backend,
    )
    return AttentionOutput(
        result.output.reshape(batch, heads, 1, -1), result.lse.reshape(batch, heads, 1), result.stats
    )
