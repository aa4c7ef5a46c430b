"""Oracle: the true share of every block, at the cost of computing the whole map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tamis.predictors.rules import Ranked, keep_by_rule
from tamis.predictors.search import SearchOp, search_op
from tamis.predictors.view import View


@dataclass(frozen=True, kw_only=True)
class Oracle(Ranked):
    """The blocks that really hold the most attention: what a predictor could know at best; for research.

    Every row's softmax is computed, a few rows at a time: O(q_len x kv_len) operations, O(kv_len) memory. A block's
    share is the mean of its rows' attention that it holds.

    Args:
        cdf: mass to keep, in (0, 1]; per row of blocks the fewest largest blocks that reach it. By
            default .95, or off if another rule is given.
        topk: share of the visible blocks of each row to keep, in (0, 1], rounded up.
        floor: keep the blocks with at least this share of their rows' attention, in (0, 1]; the budget then goes to
            the rows and heads that need it. Several rules: the union.
        sink: always keep the first key block.
        keep: further ranges, as in `Sparge`.

    cdf, topk and floor are one number or one per query head. At least one block is kept per row, and the diagonal
    under `causal`.

    Raises:
        ValueError, TypeError: a setting is out of its range.

    Example:
        >>> import torch, tamis
        >>> query, key = torch.randn(1, 4, 1024, 64), torch.randn(1, 4, 1024, 64)
        >>> tamis.Oracle(topk=0.25, sink=False)(query, key).density()
        0.25
    """

    DEFAULT: ClassVar[tuple[str, float]] = ("cdf", 0.95)
    OP: ClassVar[SearchOp]


def _oracle(view: View, counts: Sequence[int]) -> Tensor:
    return keep_by_rule(true_shares(view), view)


def true_shares(view: View) -> Tensor:
    """Attention of the rows of a query block to each key block, summed: `[batch, group, q_blocks, kv_blocks]`."""
    q_len, block = view.lens[0], view.block_size[0]
    sums = []
    for first in range(0, q_len, block):
        last = min(q_len, first + block)
        keys = view.reach(last - 1)
        rows = torch.arange(first, last, device=view.query.device)[None]
        parts = [view.shares(some, keys).sum(2) for some in torch.split(rows, view.tile(keys), 1)]
        sums.append(torch.stack(parts).sum(0))
    return torch.stack(sums, 2)


Oracle.OP = search_op("oracle", _oracle)
