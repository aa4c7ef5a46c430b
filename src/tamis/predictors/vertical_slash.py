"""VerticalSlash: columns and diagonals that the last queries point at (MInference)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tamis.predictors.base import Setting
from tamis.predictors.rules import share_of
from tamis.predictors.search import Search, SearchOp, search_op
from tamis.predictors.view import View


@dataclass(frozen=True)
class VerticalSlash(Search):
    """MInference's vertical-slash pattern: what the last queries attend to, every query attends to.

    The attention of the last `rows` queries is summed over columns (verticals) and over distances (slashes), and the
    largest of both are kept for all queries. The paper gathers single columns; here a block is the least that can be
    kept, so that columns and diagonals of blocks are ranked.

    Args:
        vertical: share of the columns of blocks to keep, in [0, 1], rounded up.
        slash: share of the diagonals of blocks to keep, in [0, 1], rounded up.
        rows: how many of the last queries are asked, 1 to 1024; the paper's 64.
        sink: always keep the first key block.
        keep: further ranges, as in `Sparge`.

    vertical and slash are one number or one per query head. The diagonal is kept under `causal`. Padding is no query;
    of packed sequences the last one is asked for all. Distances are counted in tokens, also with `positions`.

    Raises:
        ValueError, TypeError: a setting is out of its range.

    Source: MInference (arXiv 2407.02490), section 3.2 and algorithm 2.

    Example:
        >>> import torch, tamis
        >>> query, key = torch.randn(1, 4, 1024, 64), torch.randn(1, 4, 1024, 64)
        >>> tamis.VerticalSlash(vertical=0.25, slash=0, sink=False)(query, key).density()
        0.25
    """

    SHARES: ClassVar[dict[str, str]] = {"vertical": "in [0, 1]", "slash": "in [0, 1]"}
    COUNTS: ClassVar[dict[str, tuple[int, int]]] = {"rows": (1, 1024)}
    OP: ClassVar[SearchOp]

    vertical: Setting
    slash: Setting
    rows: int = 64


class Lines(NamedTuple):
    """Attention by columns `[batch, group, kv_blocks]` and by diagonals of blocks `[batch, group, diagonals]`.

    Which of them hold a visible block is bool in `column_seen` and `diagonal_seen`; `of_block` `[q_blocks, kv_blocks]`
    is the diagonal of every block.
    """

    columns: Tensor
    diagonals: Tensor
    column_seen: Tensor
    diagonal_seen: Tensor
    of_block: Tensor

    def table(self, columns: Tensor, diagonals: Tensor) -> Tensor:
        """The blocks of chosen columns and diagonals, bool `[batch, group, q_blocks, kv_blocks]`."""
        return columns[:, :, None] | diagonals[:, :, self.of_block]


def _vertical_slash(view: View, counts: Sequence[int]) -> Tensor:
    vertical, slash = (setting[:, None] for setting in view.settings)
    lines = find_lines(view, last_rows(view, counts[0]))
    unknown = lines.columns.sum(-1) == 0
    return unknown[..., None, None] | lines.table(
        _largest(lines.columns, lines.column_seen, vertical), _largest(lines.diagonals, lines.diagonal_seen, slash)
    )


def _largest(sums: Tensor, seen: Tensor, share: Tensor) -> Tensor:
    """The largest entries, so many that they are a share of those seen; bool."""
    order = torch.where(seen, sums, -1.0).sort(dim=-1, descending=True, stable=True).indices
    place = torch.arange(sums.shape[-1], device=sums.device)
    kept = (place < share_of(share, seen.sum(-1, keepdim=True))).expand(sums.shape)
    return torch.zeros_like(kept, memory_format=torch.contiguous_format).scatter(-1, order, kept)


def last_rows(view: View, number: int) -> Tensor:
    """The last tokens that are no padding, ascending `[batch | 1, rows]`; padding again if there are fewer."""
    q_len = view.lens[0]
    place = torch.arange(q_len, device=view.query.device)[None]
    if view.q_segments is not None:
        # Padding goes before everything else and stays in order.
        place = torch.where(view.q_segments >= 0, place + q_len, place)
    return place.sort(dim=-1).values[:, -number:] % q_len if q_len else place


def find_lines(view: View, rows: Tensor) -> Lines:
    """Sum the attention of token rows `[batch | 1, rows]` over columns and diagonals of blocks."""
    q_len, kv_len = view.lens
    batch, group = view.query.shape[:2]
    by_key = view.query.new_zeros((batch, group, kv_len))
    by_distance = view.query.new_zeros((batch, group, q_len + kv_len - 1))
    # Entry e of by_distance holds the pairs with row - key = e - (kv_len - 1).
    entry = torch.arange(q_len + kv_len - 1, device=rows.device)
    step = view.tile(q_len + kv_len)
    for first in range(0, rows.shape[1], step):
        some = rows[:, first : first + step]
        # NaN: rows that see nothing or hold no numbers; they have nothing to say.
        weights = torch.softmax(view.scores(some, kv_len), -1).nan_to_num_(0.0)
        by_key += weights.sum(2)
        key = some[:, :, None] + (kv_len - 1) - entry
        inside = (key >= 0) & (key < kv_len)
        picked = torch.take_along_dim(weights, key.clamp(0, kv_len - 1)[:, None], 3)
        by_distance += picked.masked_fill(~inside[:, None], 0.0).sum(2)
    return Lines(view.by_key_block(by_key), *_diagonals(view, by_distance))


def _diagonals(view: View, by_distance: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums over the distances that a diagonal of blocks holds; which columns and diagonals are visible; whose is whose.

    Query block i and key block j are on diagonal (i * block_q - j * block_kv) / grain, counted from the lowest, and
    hold the distances row - key from i * block_q - (j + 1) * block_kv + 1 to (i + 1) * block_q - 1 - j * block_kv.
    """
    (block_q, block_kv), device = view.block_size, by_distance.device
    q_blocks, kv_blocks = view.seen.shape[2:]
    grain = min(view.block_size)
    lowest = (kv_blocks - 1) * (block_kv // grain)
    i, j = torch.arange(q_blocks, device=device)[:, None], torch.arange(kv_blocks, device=device)
    of_block = (i * block_q - j * block_kv) // grain + lowest
    number = (q_blocks - 1) * (block_q // grain) + lowest + 1
    start = (torch.arange(number, device=device) - lowest) * grain + view.lens[1] - 1
    sums = F.pad(by_distance.cumsum(-1, dtype=torch.float64), (1, 0))
    low, high = ((start + shift).clamp(0, sums.shape[-1] - 1) for shift in (1 - block_kv, block_q))
    diagonals = (sums[..., high] - sums[..., low]).clamp(min=0.0).to(torch.float32)
    seen = view.seen
    flat = seen.flatten(2)
    diagonal_seen = torch.zeros((*seen.shape[:2], number), dtype=torch.int32, device=device)
    index = of_block.flatten().expand(flat.shape)
    diagonal_seen = diagonal_seen.scatter_add(2, index, flat.to(torch.int32)) > 0
    return diagonals, seen.any(2), diagonal_seen, of_block


VerticalSlash.OP = search_op("vertical_slash", _vertical_slash)
