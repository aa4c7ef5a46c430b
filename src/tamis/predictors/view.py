"""What a searching predictor sees of a call: one key head and the query heads that share it.

One head at a time bounds the memory. Tokens that are padding, or that hold a NaN or an infinity, do not count: they are
seen by nothing. The blocks of the latter are kept whole, as what cannot be judged is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tamis import geometry

TILE = 1 << 20  # scores in memory at a time: 4 MB in fp32, what a core's cache still holds


@dataclass(frozen=True, eq=False)
class View:
    """Tensors of one key head; `heads` says which query heads these are.

    query `[batch, group, q_len, head_dim]` and key `[batch, 1, kv_len, head_dim]` are fp32. `q_counts` and `kv_counts`
    `[batch, group or 1, tokens]` tell which tokens count. `seen` and `must` are bool
    `[batch, group, q_blocks, kv_blocks]`, `settings` is `[settings, group]`, of which `given` are on. Positions and
    segments are int64 `[batch | 1, tokens]`; `plain` if there were none, so that distances are those of the tokens.
    `backend` is the one asked for, if any.
    """

    heads: slice
    query: Tensor
    key: Tensor
    q_counts: Tensor
    kv_counts: Tensor
    seen: Tensor
    must: Tensor
    settings: Tensor
    given: tuple[bool, ...]
    block_size: tuple[int, int]
    scale: float
    causal: bool
    window: int | None
    attn_mask: Tensor | None
    q_positions: Tensor
    kv_positions: Tensor
    q_segments: Tensor | None
    kv_segments: Tensor | None
    plain: bool
    backend: str | None

    @property
    def lens(self) -> tuple[int, int]:
        """(q_len, kv_len)."""
        return self.query.shape[2], self.key.shape[2]

    def reach(self, row: int) -> int:
        """Number of first keys that rows up to this one can see at all, as far as that is known without reading."""
        q_len, kv_len = self.lens
        return max(0, min(kv_len, row + 1 + kv_len - q_len)) if self.plain and self.causal else kv_len

    def tile(self, width: int) -> int:
        """How many rows of `width` scores, of all heads here, fit in memory at a time; at least one."""
        return max(1, TILE // max(1, width * self.query.shape[0] * self.query.shape[1]))

    def scores(self, rows: Tensor, keys: int) -> Tensor:
        """Scores of token rows (indices `[batch | 1, rows]`) and the first keys, -inf where not visible.

        fp32 `[batch, group, rows, keys]`, with attn_mask.
        """
        batch, group, _, dim = self.query.shape
        picked = self.query.gather(2, rows[:, None, :, None].expand(batch, group, -1, dim))
        # One product for all heads that share the key.
        products = torch.matmul(picked.reshape(batch, -1, dim) * self.scale, self.key[:, 0, :keys].transpose(-1, -2))
        scores = products.reshape(batch, group, rows.shape[1], keys)
        if self.attn_mask is not None:
            mask = torch.take_along_dim(self.attn_mask[..., :keys], rows[:, None, :, None], 2)
            hidden = ~mask if mask.dtype == torch.bool else mask == float("-inf")
            scores = scores if mask.dtype == torch.bool else scores + mask
            scores = scores.masked_fill(hidden, float("-inf"))
        return scores.masked_fill_(self._hidden(rows, keys), float("-inf"))

    def _hidden(self, rows: Tensor, keys: int) -> Tensor:
        """Pairs that are not visible or do not count, bool `[batch | 1, group | 1, rows, keys]`."""
        q_segments = None if self.q_segments is None else at_rows(self.q_segments, rows)
        kv_segments = None if self.kv_segments is None else self.kv_segments[:, :keys]
        seen = geometry.visible_pairs(
            at_rows(self.q_positions, rows),
            self.kv_positions[:, :keys],
            q_segments,
            kv_segments,
            causal=self.causal,
            window=self.window,
        )[:, None]
        return ~(seen & self.kv_counts[:, :, None, :keys])

    def shares(self, rows: Tensor, keys: int) -> Tensor:
        """Share of every key block in the attention of token rows, fp32 `[batch, group, rows, kv_blocks]`.

        A row that sees nothing has zeros; a score that is no number makes all shares of its row NaN.
        """
        scores = self.scores(rows, keys)
        summed = self.by_key_block(torch.softmax(scores, -1))
        if keys == 0:
            return summed
        return summed.masked_fill_(scores.amax(-1, keepdim=True) == float("-inf"), 0.0)

    def by_key_block(self, weights: Tensor) -> Tensor:
        """Sums over key blocks of `[.., keys]`, as `[.., kv_blocks]`; keys left out at the end count as zeros."""
        block = self.block_size[1]
        blocks = geometry.num_blocks(weights.shape[-1], block)
        missing = blocks * block - weights.shape[-1]
        whole = F.pad(weights, (0, missing)) if missing else weights
        summed = torch.unflatten(whole, -1, (blocks, block)).sum(-1)
        return F.pad(summed, (0, self.seen.shape[-1] - blocks))


def at_rows(tokens: Tensor, rows: Tensor) -> Tensor:
    """Values `[batch | 1, tokens]` at indices `[batch | 1, rows]`."""
    batch = max(tokens.shape[0], rows.shape[0])
    return tokens.expand(batch, -1).gather(1, rows.expand(batch, -1))


def filled_blocks(flags: Tensor, block: int) -> Tensor:
    """Blocks of which a token is flagged: bool `[.., tokens]` to `[.., blocks]`."""
    blocks = geometry.num_blocks(flags.shape[-1], block)
    return torch.unflatten(F.pad(flags, (0, blocks * block - flags.shape[-1])), -1, (blocks, block)).any(-1)
