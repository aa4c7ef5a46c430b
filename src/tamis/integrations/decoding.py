"""Decoding that reads a share of the key blocks, chosen by the mean key of each, which is kept beside the cache.

Blocks are ranked by q . mean(block), the first stage of SpargeAttn with a single query (arXiv 2502.18137, section 3.2).
The query heads that share a key head read the same blocks, so that each is read once. Bounds from per-channel minima
and maxima (Quest, arXiv 2406.10774) rank far worse on SmolLM2.
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
class KeyMeans:
    """The mean key of every block of 64, fp32 `[batch, kv_heads, room, head_dim]`.

    Attributes:
        length: tokens they are of. Behind its blocks there may be room, which is never read.
    """

    means: Tensor
    length: int

    @classmethod
    def of(cls, key: Tensor) -> KeyMeans:
        """Means of a key `[batch, kv_heads, length, head_dim]`."""
        found = cls(key.new_empty(*key.shape[:2], 0, key.shape[3], dtype=torch.float32), 0)
        found.extend(key)
        return found

    def extend(self, key: Tensor) -> None:
        """Take in the tokens that a key has grown by; its first `length` tokens are as they were."""
        first, blocks = self.length // BLOCK, geometry.num_blocks(key.shape[2], BLOCK)
        if blocks > self.means.shape[2]:
            more = max(blocks, blocks * 9 // 8) - self.means.shape[2]
            self.means = torch.cat([self.means, self.means.new_empty(*key.shape[:2], more, key.shape[3])], dim=2)
        fresh = key[:, :, first * BLOCK :]
        whole = fresh.shape[2] // BLOCK
        if whole:
            tiles = fresh[:, :, : whole * BLOCK].reshape(*fresh.shape[:2], whole, BLOCK, fresh.shape[3])
            self.means[:, :, first : first + whole] = tiles.mean(dim=3, dtype=torch.float32)
        if whole * BLOCK < fresh.shape[2]:
            self.means[:, :, blocks - 1] = fresh[:, :, whole * BLOCK :].mean(dim=2, dtype=torch.float32)
        self.length = key.shape[2]

    def select(self, query: Tensor, kept: int) -> Tensor:
        """Blocks for queries `[batch, kv_heads, rows, head_dim]`: int32 `[batch, kv_heads, 1, kept]`, ascending."""
        blocks = geometry.num_blocks(self.length, BLOCK)
        score = (query.float() @ self.means[:, :, :blocks].transpose(2, 3)).amax(dim=2)
        score[:, :, 0] = score[:, :, -2:] = torch.inf
        return score.topk(kept, dim=2).indices.sort(dim=2).values.to(torch.int32)[:, :, None]


def decode_obstacle(request: Request, decode: Decode | None) -> str | None:
    """Why one query cannot be answered from a part of the cache; None where it can."""
    if decode is None:
        return "decoding"
    if request.means is None:
        return "decoding: the cache keeps no means"
    if request.mask is not None or request.window is not None or request.segments is not None:
        return "decoding: under a mask, a window or padding"
    if request.sink_logits is not None:
        return "decoding: with sinks"  # they differ by query head, and the query heads of a key head are rows here
    if request.means.length != request.key.shape[2]:
        return "decoding: the cache was changed behind its means"
    blocks = geometry.num_blocks(request.key.shape[2], BLOCK)
    return None if decode.kept(blocks) < blocks else "decoding: every block is kept"


def attend_selected(request: Request, decode: Decode, backend: str | None) -> AttentionOutput:
    """Attention of one query `[batch, heads, 1, head_dim]` over the key blocks whose mean scores most."""
    assert request.means is not None
    batch, heads, _, dim = request.query.shape
    kv_heads, length = request.key.shape[1:3]
    # The query heads of a key head as rows of one block: what it reads is read once for all of them.
    rows = request.query.reshape(batch, kv_heads, heads // kv_heads, dim)
    kept = decode.kept(geometry.num_blocks(length, BLOCK))
    indices = request.means.select(rows, kept)
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
