"""What stands in for skipped blocks: the mean key of a block with its mean value, as one more key of n tokens.

For every block of n tokens, mean key k and mean value v that a row sees whole and that its query block did not keep:

    s  = scale * q.k,  softcap,  + mean of attn_mask over the block
    l' = l + sum n exp(s),            l = exp(lse) of what was computed, O its output
    O' = (O l + sum n exp(s) v) / l'

which is `merge` of the sparse result with attention over the means. A block that a row sees in part only (the causal
diagonal, the edge of a window or of a document) is left out for this row: its mean would tell of tokens that the row
must not see. So is a block whose mean is not finite: nothing leaks from what is skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from tamis import geometry
from tamis.backends import base
from tamis.block_mask import dense_blocks
from tamis.call import Call
from tamis.mixing import unmix

TILE = 64  # keys of a `PackedKV` that share a scale
# Bytes of scores at a time: on a CPU what its caches hold, elsewhere what keeps a device busy.
CPU_BUDGET, BUDGET = 4 * 2**20, 32 * 2**20
LARGEST = 1e18  # entry of a mean with which products with any sane query stay inside the range of fp32
LOG2E = 1.4426950408889634
_MINUS_INF = float("-inf")

Place: TypeAlias = "tuple[int, slice, slice]"  # sample of the batch, query heads, query rows


def add_centroids(call: Call, backend: str, output: Tensor, lse: Tensor) -> None:
    """Approximate what a sparse call has skipped, in its output and log-sum-exp."""
    assert call.kv_num_blocks is not None
    assert call.kv_indices is not None
    _add_centroids(
        output,
        lse,
        call.query,
        call.key,
        call.value,
        list(call.packed),
        call.kv_num_blocks,
        call.kv_indices,
        *call.block_size,
        call.causal,
        call.window,
        call.scale,
        call.attn_mask,
        call.q_positions,
        call.kv_positions,
        call.q_segments,
        call.kv_segments,
        call.softcap,
        backend,
    )


@torch.library.custom_op("tamis::add_centroids", mutates_args=("output", "lse"))
def _add_centroids(
    output: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    packed: list[Tensor],
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    block_q: int,
    block_kv: int,
    causal: bool,
    window: int | None,
    scale: float,
    attn_mask: Tensor | None,
    q_positions: Tensor | None,
    kv_positions: Tensor | None,
    q_segments: Tensor | None,
    kv_segments: Tensor | None,
    softcap: float | None,
    backend: str,
) -> None:
    kv_len = int(packed[7][0]) if key is None else key.shape[2]
    if query.numel() == 0 or kv_len == 0:
        return
    # Keys that a mask hides from every row are padding: no mean holds them.
    counted = geometry.without_hidden(attn_mask, kv_segments)
    sight = _sight(
        query,
        kv_len,
        block_kv,
        causal=causal,
        window=window,
        attn_mask=attn_mask,
        positions=(q_positions, kv_positions),
        q_segments=q_segments,
        counted=counted,
    )
    if key is not None and value is not None:
        k_means, v_means = (base.summarize(x, block_kv, None, counted, backend)[0] for x in (key, value))
    else:
        k_means, v_means = _packed_means(packed, kv_len, block_kv, counted)
    numbers = _numbers(counted, kv_len, block_kv, query.device)
    means = _means(k_means, v_means, numbers, scale=scale, heads=query.shape[1])
    for at in _places(query, block_q, numbers.shape[1]):
        lists = (*at[:2], slice(at[2].start // block_q, geometry.num_blocks(at[2].stop, block_q)))
        # A GPU has not looked into the lists: what is out of range there must not become an error of its own.
        indices = kv_indices[lists].clamp(0, max(0, numbers.shape[1] - 1))
        skipped = ~dense_blocks(kv_num_blocks[lists], indices, numbers.shape[1])
        scores = _scores(query[at], at, means, sight, skipped, softcap)
        if scores.shape[-1] > 0:
            _join(output[at], lse[at], scores, at, means)


def _places(query: Tensor, block_q: int, kv_blocks: int) -> Iterator[Place]:
    """Parts of the query whose scores fit the budget (at least one block of one head); an unfinished block is alone."""
    batch, heads, q_len, _ = query.shape
    budget = CPU_BUDGET if query.device.type == "cpu" else BUDGET
    fits = budget // (4 * block_q * max(1, kv_blocks))
    some = max(1, min(heads, fits))
    whole = q_len // block_q * block_q
    edges = sorted({*range(0, whole, block_q * max(1, fits // some)), whole, q_len})
    for sample in range(batch):
        for start, stop in pairwise(edges):
            for head in range(0, heads, some):
                yield sample, slice(head, min(heads, head + some)), slice(start, stop)


@dataclass(frozen=True)
class _Means:
    """What stands for the key blocks, one of each for every query head, for scores in units of log 2.

    keys: scale * mean key, `[batch, heads, head_dim, blocks]`. values: sum of the values, `[batch, heads, blocks,
    value_dim]`. numbers: tokens, `[batch | 1, blocks]`. usable: bool `[batch, heads, blocks]`; the others are zero.
    """

    keys: Tensor
    values: Tensor
    numbers: Tensor
    usable: Tensor


def _means(keys: Tensor, values: Tensor, numbers: Tensor, *, scale: float, heads: int) -> _Means:
    keys, values = keys * (scale * LOG2E), values * numbers[:, None, :, None]
    usable = (numbers > 0)[:, None] & (keys.abs().amax(-1) < LARGEST) & (values.abs().amax(-1) < LARGEST)
    group = heads // max(1, keys.shape[1])
    keys = torch.where(usable[..., None], keys, 0.0).repeat_interleave(group, 1).transpose(-1, -2)
    values = torch.where(usable[..., None], values, 0.0).repeat_interleave(group, 1)
    return _Means(keys, values, numbers, usable.repeat_interleave(group, 1))


def _numbers(counted: Tensor | None, kv_len: int, block: int, device: torch.device) -> Tensor:
    """Tokens of every block, fp32 `[batch | 1, blocks]`."""
    if counted is None:
        counted = torch.zeros(1, kv_len, device=device)
    return _by_block((counted >= 0).to(torch.float32), block).sum(-1)


def _packed_means(packed: list[Tensor], kv_len: int, block: int, counted: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean key and mean value of every block of a `PackedKV`, from its 8 bits."""
    tiles = geometry.num_blocks(kv_len, TILE)
    key8, key_scale, _, value8, value_scale = (part[:, :, :tiles] for part in packed[:5])
    if counted is None:
        counted = torch.zeros(1, kv_len, device=key8.device)
    inside = _by_block((counted >= 0).to(torch.int8), TILE)[:, None]
    number = inside.sum(-1)[..., None]
    mean = packed[6][:, :, None]
    # Factors 0 and 1, and sums of 64: exact integers.
    keys = (key8 * inside[..., None]).sum(3, dtype=torch.int32)[..., : mean.shape[-1]] * key_scale[..., None]
    values = (value8 * inside[..., None, :]).sum(4, dtype=torch.int32) * value_scale
    keys = unmix(keys, int(packed[7][1])) + mean * number
    keys, values, number = (_tile_sums(part, block) for part in (keys, values, number))
    return keys / number.clamp(min=1), values / number.clamp(min=1)


def _tile_sums(tiles: Tensor, block: int) -> Tensor:
    """Sums over the tiles of a block, `[batch, heads, blocks, dim]`."""
    return _by_block(tiles.transpose(-1, -2), block // TILE).sum(-1).transpose(-1, -2)


def _by_block(tokens: Tensor, block: int) -> Tensor:
    """The last axis as `[blocks, block]`, the last block filled up with zeros."""
    return torch.unflatten(F.pad(tokens, (0, -tokens.shape[-1] % block)), -1, (-1, block))


@dataclass(frozen=True)
class _Sight:
    """Which key blocks a row sees whole.

    added: mean of attn_mask over every block, -inf if it hides a token, `[batch | 1, heads | 1, rows | 1, blocks]`.
    plain: positions are the default and nothing but causality hides a key. The others are as in a `Call`.
    """

    lengths: tuple[int, int]
    block_kv: int
    causal: bool
    window: int | None
    added: Tensor | None
    q_positions: Tensor
    q_segments: Tensor | None
    kv_bounds: Tensor
    plain: bool

    def columns(self, rows: slice) -> tuple[int, int]:
        """How many blocks each of these rows sees whole, and how many at least one of them may: the first ones."""
        blocks = self.kv_bounds.shape[1]
        if not self.plain:
            return 0, blocks
        return (self._reach(rows.start), self._reach(rows.stop - 1)) if self.causal else (blocks, blocks)

    def _reach(self, row: int) -> int:
        q_len, kv_len = self.lengths
        last = row + kv_len - q_len
        return self.kv_bounds.shape[1] if last >= kv_len - 1 else max(0, last + 1) // self.block_kv

    def hide(self, scores: Tensor, at: Place, first: int) -> None:
        """Write -inf for what a row does not see whole; the scores are those of the blocks from `first` on."""
        sample, heads, rows = at
        blocks = slice(first, first + scores.shape[-1])
        segments = None if self.q_segments is None else _of(self.q_segments, sample)[None, rows]
        seen = geometry.sees_whole(
            _of(self.q_positions, sample)[None, rows],
            segments,
            _of(self.kv_bounds, sample)[None, blocks],
            causal=self.causal,
            window=self.window,
        )
        if self.added is not None:
            added = _of(self.added, sample)
            added = added[heads if added.shape[0] > 1 else slice(None)]
            added = added[:, rows if added.shape[1] > 1 else slice(None), blocks]
            seen = seen & added.isfinite()
            scores += torch.where(added.isfinite(), added * LOG2E, 0.0)
        _allow(scores, seen)


def _sight(
    query: Tensor,
    kv_len: int,
    block_kv: int,
    *,
    causal: bool,
    window: int | None,
    attn_mask: Tensor | None,
    positions: tuple[Tensor | None, Tensor | None],
    q_segments: Tensor | None,
    counted: Tensor | None,
) -> _Sight:
    lengths, device = (query.shape[2], kv_len), query.device
    q_positions, kv_positions = positions
    given = q_positions is not None
    if q_positions is None or kv_positions is None:
        q_positions, kv_positions = geometry.default_positions(*lengths, device)
    bounds = geometry.default_bounds(kv_len, block_kv, 0, device)
    if given or counted is not None:
        bounds = geometry.token_bounds(kv_positions, counted, block_kv)
    return _Sight(
        lengths=lengths,
        block_kv=block_kv,
        causal=causal,
        window=window,
        added=None if attn_mask is None else _mask_means(attn_mask, counted, block_kv),
        q_positions=q_positions,
        q_segments=q_segments,
        kv_bounds=bounds,
        plain=not given and counted is None and window is None,
    )


def _mask_means(attn_mask: Tensor, counted: Tensor | None, block: int) -> Tensor:
    """Mean of what a mask adds over the tokens that count of every block, -inf where one is hidden, fp32."""
    for dim in range(3):
        if attn_mask.stride(dim) == 0:  # an expanded axis says the same everywhere
            attn_mask = attn_mask.narrow(dim, 0, 1)
    kv_len = attn_mask.shape[3]
    inside = torch.ones(1, kv_len, dtype=torch.bool, device=attn_mask.device) if counted is None else counted >= 0
    number = _by_block(inside.to(torch.float32), block).sum(-1).clamp(min=1)[:, None, None]
    rows = max(1, CPU_BUDGET // (4 * max(1, attn_mask[:, :, :1].numel())))
    parts = []
    for part in torch.split(attn_mask, rows, 2):
        bias = torch.where(part, 0.0, _MINUS_INF) if part.dtype == torch.bool else part.to(torch.float32)
        parts.append(_by_block(torch.where(inside[:, None, None], bias, 0.0), block).sum(-1) / number)
    return torch.cat(parts, 2)


def _of(tensor: Tensor, sample: int) -> Tensor:
    """One sample of a tensor `[batch | 1, ..]`."""
    return tensor[min(sample, tensor.shape[0] - 1)]


def _allow(scores: Tensor, allowed: Tensor) -> None:
    """Write -inf where not allowed, many times as fast as masked_fill on a CPU; what is allowed becomes finite."""
    torch.minimum(scores, torch.where(allowed, LARGEST, _MINUS_INF), out=scores)


def _scores(query: Tensor, at: Place, means: _Means, sight: _Sight, skipped: Tensor, softcap: float | None) -> Tensor:
    """log2(e) times the scores of the means, fp32 `[heads, rows, blocks]`; -inf for what has no part in the softmax."""
    sample, heads, rows = at
    by_all, by_some = sight.columns(rows)
    scores = query.to(torch.float32) @ means.keys[sample, heads, :, :by_some]
    if softcap is not None:
        scores = torch.tanh(scores / (softcap * LOG2E)) * (softcap * LOG2E)
    if by_all < by_some:
        sight.hide(scores[..., by_all:], at, by_all)
    joins = skipped[..., :by_some] & means.usable[sample, heads, None, :by_some]
    _allow(torch.unflatten(scores, 1, (joins.shape[1], -1)), joins[:, :, None])
    return scores


def _join(output: Tensor, lse: Tensor, scores: Tensor, at: Place, means: _Means) -> None:
    """Bring the means into the result of some rows, `[heads, rows, value_dim]` and `[heads, rows]`, by their scores."""
    sample, heads, _ = at
    blocks = scores.shape[-1]
    top = _finite_or_zero(torch.maximum(lse, scores.amax(-1) / LOG2E))
    # exp2: torch's exp takes forty times as long on a CPU where it underflows.
    weights = scores.sub_((top * LOG2E)[..., None]).exp2_()
    kept = torch.exp(lse - top)
    total = kept + weights @ _of(means.numbers, sample)[:blocks]
    lse.copy_(top + torch.log(total))
    exact = output.to(torch.float32)  # the output itself if it is fp32
    exact.mul_(kept[..., None]).baddbmm_(weights, means.values[sample, heads, :blocks])
    exact.mul_(torch.where(total == 0, 0.0, 1 / total)[..., None])
    if exact is not output:
        output.copy_(exact)


def _finite_or_zero(maximum: Tensor) -> Tensor:
    """Where there is nothing the maximum is -inf; subtracting 0 keeps exp() at 0."""
    return torch.where(maximum == _MINUS_INF, 0.0, maximum)
