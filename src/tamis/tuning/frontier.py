"""Error and density of many masks of one attention call from one pass over its blocks.

For a block of query rows i and every key block j, with p_ij = exp(s_ij - max of the row over all keys),

    N_ij = p_ij V_j     D_ij = row sums of p_ij     output of a mask = sum of kept N_ij / sum of kept D_ij

so that scores, exponentials and products with the values are computed once, and a mask costs one more row of a small
matrix product: (masks x key blocks) times (key blocks x rows * value_dim).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm

from tamis import geometry
from tamis.tuning.calls import LayerCall, refuse_not_finite

_BLOCK_Q, _BLOCK_KV = geometry.DEFAULT_BLOCK_SIZE


class Frontier(NamedTuple):
    """What masks cost and spare, float64 `[masks, heads]`.

    Attributes:
        l1: sum|O - O'| / sum|O| over the rows looked at.
        square: mean of (O - O')^2 over their entries.
        density: kept / visible blocks.
    """

    l1: Tensor
    square: Tensor
    density: Tensor


def sample_rows(call: LayerCall, most: int) -> list[int]:
    """Rows of query blocks to look at: all, or `most` of them evenly spread, the last one always among them."""
    blocks = geometry.num_blocks(call.query.shape[2], _BLOCK_Q)
    if blocks <= most:
        return list(range(blocks))
    return sorted({blocks - 1 - (index * blocks) // most for index in range(most)})


def frontier(call: LayerCall, masks: Tensor, rows: Sequence[int]) -> Frontier:
    """Error and density of masks of visible blocks, `[masks, heads, rows, kv_blocks]`, over some rows of blocks.

    Raises:
        ValueError: the dense output is not finite.
    """
    call = call.full()
    heads, groups, count = call.query.shape[1], call.groups, masks.shape[0]
    wrong, square, kept = (torch.zeros(count, heads, dtype=torch.float64) for _ in range(3))
    size, visible = (torch.zeros(heads, dtype=torch.float64) for _ in range(2))
    entries = 0
    for place, row in enumerate(rows):
        visible += _seen(call, row).sum()
        kept += masks[:, :, place].sum(-1)
        for kv_head in range(call.key.shape[1]):
            mine = slice(kv_head * groups, (kv_head + 1) * groups)
            weights = masks[:, mine, place].float()
            exact, outputs = _outputs(call, row, kv_head, weights.transpose(0, 1))
            error = outputs.sub_(exact[:, None])
            size[mine] += vector_norm(exact, 1, dim=(1, 2))
            wrong[:, mine] += vector_norm(error, 1, dim=(2, 3)).T
            square[:, mine] += vector_norm(error, 2, dim=(2, 3)).T.double().square()
        entries += exact.shape[1] * exact.shape[2]
    refuse_not_finite(call, size)
    tiny = torch.finfo(torch.float64).tiny
    return Frontier(wrong / size.clamp(min=tiny), square / max(entries, 1), kept / visible.clamp(min=1))


def _seen(call: LayerCall, row: int) -> Tensor:
    """Key blocks of which a row of query blocks sees a token, bool `[kv_blocks]`."""
    queries, keys = call.query.shape[2], call.key.shape[2]
    q_bounds = geometry.default_bounds(queries, _BLOCK_Q, keys - queries, call.query.device)[:, row : row + 1]
    kv_bounds = geometry.default_bounds(keys, _BLOCK_KV, 0, call.query.device)
    return geometry.visible_blocks(q_bounds, kv_bounds, call.causal, call.window)[0, 0]


def _outputs(call: LayerCall, row: int, kv_head: int, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The dense output `[group, rows, value_dim]` and that of every mask, `[group, masks, rows, value_dim]`.

    weights: what the masks keep, `[group, masks, kv_blocks]`.
    """
    first, last = row * _BLOCK_Q, min((row + 1) * _BLOCK_Q, call.query.shape[2])
    length = call.key.shape[2]
    if call.causal:  # keys beyond the last row's own are seen by none
        length = max(1, min(length, last + length - call.query.shape[2]))
    blocks = geometry.num_blocks(length, _BLOCK_KV)
    probabilities = _probabilities(call, first, last, kv_head, blocks)  # [group * rows, blocks, BLOCK_KV]
    group, rows = weights.shape[0], last - first
    value = call.value[0, kv_head, :length]
    value = torch.nn.functional.pad(value, (0, 0, 0, blocks * _BLOCK_KV - length)).view(blocks, _BLOCK_KV, -1)
    products = torch.bmm(probabilities.transpose(0, 1), value).view(blocks, group, -1).transpose(0, 1)
    sums = probabilities.sum(-1).view(group, rows, blocks)
    kept = weights[:, :, :blocks]
    tiny = torch.finfo(torch.float32).tiny
    exact = products.sum(1).view(group, rows, -1) / sums.sum(-1, keepdim=True).clamp(min=tiny)
    outputs = torch.bmm(kept, products).view(group, kept.shape[1], rows, -1)
    return exact, outputs.div_(torch.bmm(kept, sums.transpose(1, 2)).clamp_(min=tiny)[..., None])


def _probabilities(call: LayerCall, first: int, last: int, kv_head: int, blocks: int) -> Tensor:
    """exp(score - largest score of the row), `[group * rows, blocks, BLOCK_KV]`; 0 for what is not visible."""
    groups, keys = call.groups, min(blocks * _BLOCK_KV, call.key.shape[2])
    query = call.query[0, kv_head * groups : (kv_head + 1) * groups, first:last].reshape(-1, call.query.shape[3])
    scores = query.new_full((query.shape[0], blocks * _BLOCK_KV), -torch.inf)
    scores[:, :keys] = (query * call.factor) @ call.key[0, kv_head, :keys].T
    visible = call.visible(first, last, keys)
    if visible is not None:
        scores[:, :keys].view(groups, last - first, keys).masked_fill_(~visible, -torch.inf)
    top = scores.amax(-1, keepdim=True)
    scores.sub_(top.masked_fill(top == -torch.inf, 0)).exp_()
    return scores.view(query.shape[0], blocks, _BLOCK_KV)
