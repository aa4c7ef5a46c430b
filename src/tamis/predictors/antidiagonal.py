"""Antidiagonal: score blocks by sums along strided antidiagonals of the map (XAttention)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tamis import geometry
from tamis.predictors.rules import Ranked, keep_by_rule
from tamis.predictors.search import SearchOp, search_op
from tamis.predictors.view import View, filled_blocks


@dataclass(frozen=True, kw_only=True)
class Antidiagonal(Ranked):
    """XAttention: the mean score of an antidiagonal stands for a patch of `stride` x `stride` scores.

    Queries and keys are cut into groups of `stride`. The score of two groups is the mean of stride scores, query
    stride - 1 - i with key i: a line that crosses every vertical of the patch and every slash of an odd distance
    (row - key; those of an even one pass between its points). Their softmax over the visible groups, summed over the
    groups of a block, is the block's share.

    Args:
        cdf: mass to keep, in (0, 1]; per row of blocks the fewest largest blocks that reach it. By default the
            paper's .9, or off if `topk` or `floor` is given.
        topk: share of the visible blocks of each row to keep, in (0, 1], rounded up.
        floor: keep the blocks with at least this share, in (0, 1]. Several rules: the union.
        stride: 1, 2, 4, .. 64; the cost is 1 / stride of the query-key product.
        sink: always keep the first key block.
        keep: further ranges, as in `Sparge`.

    cdf, topk and floor are one number or one per query head. At least one block is kept per row, and the diagonal
    under `causal`. Of an attn_mask only what it hides counts. Missing tokens of a group (padding, the end of the
    sequence) count as the mean of the others.

    Raises:
        ValueError, TypeError: a setting is out of its range.

    Source: XAttention (arXiv 2503.16428), section 2.1 and algorithm 1.

    Example:
        >>> import torch, tamis
        >>> query, key = torch.randn(1, 4, 1024, 64), torch.randn(1, 4, 1024, 64)
        >>> tamis.Antidiagonal(topk=0.25, sink=False)(query, key).density()
        0.25
    """

    DEFAULT: ClassVar[tuple[str, float]] = ("cdf", 0.9)
    COUNTS: ClassVar[dict[str, tuple[int, int]]] = {"stride": (1, 64)}
    OP: ClassVar[SearchOp]

    stride: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if 64 % self.stride:
            raise ValueError(f"stride must divide 64, got {self.stride}")


def _antidiagonal(view: View, counts: Sequence[int]) -> Tensor:
    (stride,) = counts
    queries = _filled_groups(view.query, view.q_counts, stride).flip(3).flatten(3) * (view.scale / stride)
    keys = _filled_groups(view.key, view.kv_counts, stride).flatten(3)
    q_bounds = geometry.token_bounds(view.q_positions, view.q_segments, stride)
    kv_bounds = geometry.token_bounds(view.kv_positions, view.kv_segments, stride)
    q_present = filled_blocks(view.q_counts, stride)[..., None]
    kv_present = filled_blocks(view.kv_counts, stride)[:, :, None]
    per_block = view.block_size[0] // stride
    step = max(1, view.tile(keys.shape[2]) // per_block)
    sums = []
    for first in range(0, view.seen.shape[2], step):
        rows = slice(first * per_block, (first + step) * per_block)
        reach = slice(0, geometry.num_blocks(view.reach(min(view.lens[0], rows.stop * stride) - 1), stride))
        scores = torch.matmul(queries[:, :, rows], keys[:, :, reach].transpose(-1, -2))
        seen = geometry.visible_blocks(q_bounds[:, rows], kv_bounds[:, reach], view.causal, view.window)[:, None]
        seen = seen & q_present[:, :, rows] & kv_present[..., reach]
        if view.attn_mask is not None:
            mask = view.attn_mask[:, :, rows.start * stride : rows.stop * stride, : reach.stop * stride]
            seen = seen & geometry.mask_blocks(mask, *mask.shape[2:], stride, stride)
        weights = torch.softmax(scores.masked_fill_(~seen, float("-inf")), -1)
        by_column = _by_block(weights, view.block_size[1] // stride, 3, view.seen.shape[3])
        by_column = by_column.masked_fill(~seen.any(-1, keepdim=True), 0.0)
        sums.append(_by_block(by_column, per_block, 2, geometry.num_blocks(by_column.shape[2], per_block)))
    return keep_by_rule(torch.cat(sums, 2), view)


def _filled_groups(x: Tensor, counts: Tensor, stride: int) -> Tensor:
    """Tokens by groups, `[batch, heads, groups, stride, head_dim]`; those that do not count are their group's mean."""
    padding = -x.shape[2] % stride
    x = torch.unflatten(F.pad(x, (0, 0, 0, padding)), 2, (-1, stride))
    counts = torch.unflatten(F.pad(counts, (0, padding)), 2, (-1, stride))[..., None]
    x = torch.where(counts, x, 0.0)
    mean = x.sum(3, keepdim=True) / counts.sum(3, keepdim=True).clamp(min=1)
    return torch.where(counts, x, mean)


def _by_block(weights: Tensor, groups: int, dim: int, blocks: int) -> Tensor:
    """Sums of so many neighbours along a dimension, as so many blocks; what is missing at the end counts as zeros."""
    missing = blocks * groups - weights.shape[dim]
    if missing:
        weights = F.pad(weights, (0, 0) * (weights.dim() - 1 - dim) + (0, missing))
    return torch.unflatten(weights, dim, (blocks, groups)).sum(dim + 1)


Antidiagonal.OP = search_op("antidiagonal", _antidiagonal)
