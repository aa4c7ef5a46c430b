"""Probe: a few rows of every query block look at all keys, and speak for their block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tamis import geometry
from tamis.backends import base
from tamis.call import make_call
from tamis.predictors.rules import Ranked, keep_by_rule
from tamis.predictors.search import SearchOp, search_op
from tamis.predictors.view import View, at_rows

# On SmolLM2-135M at 4,096 tokens: perplexity .2% worse than dense at density .46; .004 was 2.6% worse at .37.
DEFAULT_FLOOR = 0.002
_COLUMNS = 64  # key blocks in one call of the engine: values as wide as usual heads


@dataclass(frozen=True, kw_only=True)
class Probe(Ranked):
    """The exact attention of a few rows of each query block decides for the block.

    Keys are not averaged. On language models that is what makes block means lose: a single key that takes most of a
    row's attention vanishes in the mean of 64, while neighbouring queries mostly agree (docs/predictors.md).

    Args:
        floor: keep the blocks that hold at least this share of the rows' attention, in (0, 1]; the budget then goes
            to the rows and heads that need it. By default the measured .002, or off if `cdf` or `topk` is given.
        cdf: mass to keep, in (0, 1]; per row of blocks the fewest largest blocks that reach it.
        topk: share of the visible blocks of each row to keep, in (0, 1], rounded up. Several rules: the union.
        rows: how many rows of a query block are probed, 1 to 64, evenly spaced. The products are rows / 128 of
            those of dense int8 attention at the default block size; what that takes is in docs/predictors.md.
        sink: always keep the first key block.
        keep: further ranges, as in `Sparge`.

    cdf, topk and floor are one number or one per query head. At least one block is kept per row, and the diagonal
    under `causal`. A query block of several segments keeps all its blocks: the rows need not have met them all.

    Raises:
        ValueError, TypeError: a setting is out of its range.

    Source: ours; rows as samples of the map are also how SampleAttention (arXiv 2406.15486) finds columns.

    Example:
        >>> import torch, tamis
        >>> query, key = torch.randn(1, 4, 1024, 64), torch.randn(1, 4, 1024, 64)
        >>> tamis.Probe(topk=0.25, sink=False)(query, key).density()
        0.25
    """

    DEFAULT: ClassVar[tuple[str, float]] = ("floor", DEFAULT_FLOOR)
    COUNTS: ClassVar[dict[str, tuple[int, int]]] = {"rows": (1, 64)}
    OP: ClassVar[SearchOp]

    rows: int = 4


def _probe(view: View, counts: Sequence[int]) -> Tensor:
    (number,) = counts
    shares = _shares(view, _picked_rows(view, number))
    by_block = torch.unflatten(shares, 2, (view.seen.shape[2], number)).sum(3)
    return keep_by_rule(by_block, view) | _mixed(view)[..., None]


def _shares(view: View, rows: Tensor) -> Tensor:
    """Share of every key block in the attention of token rows, fp32 `[batch, group, rows, kv_blocks]`.

    This is dense attention, so the engine computes it, in int8: the value of a key is 1 in the column of its block and
    0 elsewhere, and the output its block's share. 64 blocks at a time, joined by their log-sum-exps.
    """
    batch, group, _, dim = view.query.shape
    query = view.query.gather(2, rows[:, None, :, None].expand(batch, group, -1, dim))
    q_segments = torch.zeros_like(view.q_positions) if view.q_segments is None else view.q_segments
    kv_segments = torch.zeros_like(view.kv_positions) if view.kv_segments is None else view.kv_segments
    kv_segments = torch.where(view.kv_counts[:, 0], kv_segments, -1)
    indicator = torch.eye(_COLUMNS, device=query.device).repeat_interleave(view.block_size[1], 0)[None, None]
    outputs, lses = [], []
    for first in range(0, view.lens[1], len(indicator[0, 0])):
        keys = slice(first, first + len(indicator[0, 0]))
        mask = None
        if view.attn_mask is not None:
            mask = torch.take_along_dim(view.attn_mask[..., keys], rows[:, None, :, None], 2)
        key = view.key[:, :, keys]
        call = make_call(
            query,
            key,
            indicator[:, :, : key.shape[2]],
            block_size=(64, 64),
            causal=view.causal,
            window=view.window,
            scale=view.scale,
            attn_mask=mask,
            positions=(at_rows(view.q_positions, rows), view.kv_positions[:, keys]),
            segments=(at_rows(q_segments, rows), kv_segments[:, keys]),
            precision="int8",
        )
        output, lse, _ = base.attend(call, base.choose(call, view.backend))
        outputs.append(output[..., : geometry.num_blocks(key.shape[2], view.block_size[1])])
        lses.append(lse)
    parts = torch.stack(lses, -1)
    # A row that sees nothing has no weights: 0, not NaN, which is for rows that hold no numbers.
    weights = torch.softmax(parts, -1).masked_fill((parts == float("-inf")).all(-1, keepdim=True), 0.0)
    return torch.cat([output * weight for output, weight in zip(outputs, torch.split(weights, 1, -1), strict=True)], -1)


def _picked_rows(view: View, number: int) -> Tensor:
    """Evenly spaced rows of every query block among those that are no padding: `[batch | 1, q_blocks * number]`."""
    q_len, block = view.lens[0], view.block_size[0]
    blocks = geometry.num_blocks(q_len, block)
    segments = view.q_segments
    present = torch.ones(1, q_len, dtype=torch.bool, device=view.query.device) if segments is None else segments >= 0
    present = torch.unflatten(F.pad(present, (0, blocks * block - q_len)), 1, (blocks, block))
    present_first = (~present).to(torch.uint8).sort(dim=-1, stable=True).indices
    middles = 2 * torch.arange(number, device=present.device) + 1
    at = middles * present.sum(-1, keepdim=True) // (2 * number)
    start = torch.arange(blocks, device=present.device)[:, None] * block
    return (present_first.gather(-1, at) + start).flatten(1)


def _mixed(view: View) -> Tensor:
    """Query blocks that hold tokens of several segments, bool `[batch | 1, 1, q_blocks]`."""
    if view.q_segments is None:
        return torch.zeros(1, 1, view.seen.shape[2], dtype=torch.bool, device=view.query.device)
    bounds: Tensor = geometry.token_bounds(view.q_positions, view.q_segments, view.block_size[0])
    return bounds[:, None, :, 2] < bounds[:, None, :, 3]


Probe.OP = search_op("probe", _probe)
