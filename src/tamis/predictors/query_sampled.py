"""QuerySampled: per head block means or vertical lines, whichever a sample of queries supports (FlexPrefill)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tamis import geometry
from tamis.predictors.base import Setting
from tamis.predictors.search import Search, SearchOp, search_op
from tamis.predictors.vertical_slash import find_lines, last_rows
from tamis.predictors.view import View


@dataclass(frozen=True)
class QuerySampled(Search):
    """FlexPrefill: a head whose block means agree with a sample of its queries is pruned by them, others by lines.

    The sample is the last block of queries. Its exact attention by key block and the one estimated from block means
    are compared by the square root of their Jensen-Shannon divergence. Below `divergence` the softmax of all block
    means, over the whole map of the head at once, is kept up to its mass `cdf`. Else the columns, and the diagonals,
    that hold `cdf` of the sample's attention are kept for all queries.

    Args:
        cdf: mass to keep, in (0, 1]; the paper's gamma, .9 to .95.
        divergence: the paper's tau, in [0, 1]; 0 takes lines for every head, 1 block means (the largest possible
            value is sqrt(ln 2) = .83).
        sink: always keep the first key block.
        keep: further ranges, as in `Sparge`.

    Both are one number or one per query head. The diagonal is kept under `causal`. The paper's least budget of 1,024
    tokens a row is not applied. Padding is no query; of packed sequences the last one is the sample for all. Diagonals
    are those of `VerticalSlash`.

    Raises:
        ValueError, TypeError: a setting is out of its range.

    Source: FlexPrefill (arXiv 2502.20766), section 3 and algorithms 1 to 4.

    Example:
        >>> import torch, tamis
        >>> query, key = torch.randn(1, 4, 1024, 64), torch.randn(1, 4, 1024, 64)
        >>> tamis.QuerySampled(1.0)(query, key, causal=True).density(causal=True)
        1.0
    """

    SHARES: ClassVar[dict[str, str]] = {"cdf": "in (0, 1]", "divergence": "in [0, 1]"}
    OP: ClassVar[SearchOp]

    cdf: Setting = 0.9
    divergence: Setting = 0.1


def _query_sampled(view: View, counts: Sequence[int]) -> Tensor:
    cdf, divergence = view.settings
    rows = last_rows(view, view.block_size[0])
    lines = find_lines(view, rows)
    sampled = lines.columns / lines.columns.sum(-1, keepdim=True)
    estimated = _estimate(view, rows)
    alike = _divergence(sampled, estimated).sqrt() < divergence
    tau = cdf[:, None]
    diagonals = lines.diagonals.masked_fill(~lines.diagonal_seen, 0.0)
    by_lines = lines.table(_reach(lines.columns, tau), _reach(diagonals, tau))
    means = _mean_map(view)
    by_means = torch.unflatten(_reach(means.flatten(2), tau), 2, means.shape[2:])
    unknown = ~(sampled + estimated).isfinite().all(-1)
    return torch.where(alike[..., None, None], by_means, by_lines) | unknown[..., None, None]


def _reach(mass: Tensor, cdf: Tensor) -> Tensor:
    """The fewest largest entries of `[batch, group, entries]` that hold a share of their sum, bool."""
    ordered, order = mass.sort(dim=-1, descending=True, stable=True)
    ordered = ordered.to(torch.float64)
    before = ordered.cumsum(-1) - ordered
    kept = (before < cdf * ordered.sum(-1, keepdim=True)) | (cdf >= 1) | ordered.isnan()
    return torch.zeros_like(kept).scatter(-1, order, kept)


def _estimate(view: View, rows: Tensor) -> Tensor:
    """The sample's attention by key block as block means see it, `[batch, group, kv_blocks]`."""
    batch, group, _, dim = view.query.shape
    index = rows[:, None].expand(batch, group, -1)
    counts = view.q_counts.gather(2, index)[..., None]
    picked = view.query.gather(2, index[..., None].expand(-1, -1, -1, dim))
    mean = torch.where(counts, picked, 0.0).sum(2) / counts.sum(2).clamp(min=1)
    scores = torch.matmul(mean * view.scale, _means(view.key, view.kv_counts, view.block_size[1])[:, 0].transpose(1, 2))
    # What the sample can see: the blocks that the query blocks of its rows can.
    blocks = torch.zeros((rows.shape[0], view.seen.shape[2]), dtype=torch.bool, device=rows.device)
    blocks = blocks.scatter(1, rows // view.block_size[0], True)
    seen = (view.seen & blocks[:, None, :, None]).any(2)
    return torch.softmax(scores.masked_fill(~seen, float("-inf")), -1)


def _mean_map(view: View) -> Tensor:
    """Softmax of scores between block means, 0 where nothing is visible, `[batch, group, q_blocks, kv_blocks]`."""
    queries = _means(view.query, view.q_counts, view.block_size[0])
    keys = _means(view.key, view.kv_counts, view.block_size[1])
    scores = torch.matmul(queries * view.scale, keys.transpose(-1, -2)).masked_fill(~view.seen, float("-inf"))
    return torch.softmax(scores, -1).masked_fill(~view.seen, 0.0)


def _means(x: Tensor, counts: Tensor, block: int) -> Tensor:
    """Mean of the tokens of each block that count, `[batch, heads, blocks, head_dim]`."""
    blocks = geometry.num_blocks(x.shape[2], block)
    padding = blocks * block - x.shape[2]
    x = F.pad(torch.where(counts[..., None], x, 0.0), (0, 0, 0, padding))
    counts = torch.unflatten(F.pad(counts, (0, padding)), 2, (blocks, block))
    return torch.unflatten(x, 2, (blocks, block)).sum(3) / counts.sum(3).clamp(min=1)[..., None]


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence in nats, `[batch, group]`; 0 log 0 = 0."""
    middle = (p + q) / 2
    parts = [torch.xlogy(x, x / middle.clamp(min=1e-30)).sum(-1) / 2 for x in (p, q)]
    return (parts[0] + parts[1]).clamp(min=0.0)


QuerySampled.OP = search_op("query_sampled", _query_sampled)
