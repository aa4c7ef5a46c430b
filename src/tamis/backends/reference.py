"""The reference backend: the method in plain torch, on any device, block by block like the kernels.

For a block of queries and one tile of 64 keys after another (ascending, kept and visible ones only):

    S       = scale * Q K^T, softcap, + mask, -inf where not visible
    m_local = row max of S,  m' = max(m, m_local),  P = exp(S - m_local)
    l       = l * exp(m - m') + rowsum(P) * exp(m_local - m')
    O       = O * exp(m - m') + (P V)     * exp(m_local - m')
    output  = O / l,  lse = m + log l

Stage 2 leaves out P V for a group of 16 rows if max(m_local - m') over the group is <= -pv_threshold; l is updated all
the same. In int8 channels of query and key are mixed first (`tamis.mixing`); every query row, every 64-key block, and
every value channel of a 64-key block has its own scale, P is rounded to 0..254 against the row's maximum in its own
tile, and all integer products are exact in fp32.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tamis import geometry
from tamis.block_mask import block_lists, check_lists, dense_blocks
from tamis.call import Call
from tamis.mixing import mix_shares, neighbours
from tamis.stats import Formats

NAME = "reference"
MIXES = True
TILE = 64
ROW_GROUP = 16
_MINUS_INF = float("-inf")


def reasons(call: Call) -> list[str]:
    """Why this backend can't serve the call; empty if it can."""
    return ["precision 'fp8' needs a GPU: use precision='int8'"] if call.precision == "fp8" else []


def target(device: torch.device) -> str | None:
    """Plain torch has no targets of its own."""
    return None


def formats(precision: str, dtype: torch.dtype, packed: bool, device: torch.device) -> Formats:
    """Number formats of the two products."""
    both = ("int8", "int8") if precision == "int8" else ("float32", "float32")
    return Formats(both, both)


def key_mean(key: Tensor, segments: Tensor | None, used: Tensor | None) -> Tensor:
    """Mean key of every head over its finite tokens with a segment >= 0 in the used 64-key blocks, fp32."""
    x = key.to(torch.float32)
    counts = x.isfinite().all(-1)
    if segments is not None:
        counts = counts & (segments >= 0)[:, None]
    if used is not None:
        counts = counts & used.repeat_interleave(TILE, -1)[..., : key.shape[2]]
    number = counts.sum(2, keepdim=True).clamp(min=1)
    # In fp64: the sum of keys near the end of the fp32 range does not fit there.
    return (torch.where(counts[..., None], x, 0.0).sum(2, dtype=torch.float64) / number).to(torch.float32)


def summarize(x: Tensor, block: int, mean: Tensor | None, segments: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean row and self-similarity (squared norm of the mean unit row) of every block of x - mean, fp32."""
    length = x.shape[2]
    blocks = geometry.num_blocks(length, block)
    rows = x.to(torch.float32) if mean is None else x.to(torch.float32) - mean[:, :, None]
    counts = torch.ones(1, length, dtype=torch.bool, device=x.device) if segments is None else segments >= 0
    counts = _blocks(counts, blocks, block)[:, None, :, :, None]
    rows = torch.where(counts, _blocks(rows, blocks, block, dim=2), 0.0)
    number = counts.sum(3)
    top = rows.abs().amax(-1, keepdim=True)
    near_one = torch.where(top == 0, 0.0, rows / top)  # whose squares neither overflow nor vanish
    unit = torch.where(top == 0, 0.0, near_one / torch.linalg.vector_norm(near_one, dim=-1, keepdim=True))
    similarity = (unit.sum(3) / number.clamp(min=1)).square().sum(-1)
    similarity = torch.where(number[..., 0] == 0, 1.0, similarity)
    broken = (~rows.isfinite()).flatten(3).any(-1)
    means = (rows.sum(3) / number.clamp(min=1)).masked_fill(broken[..., None], float("nan"))
    return means, similarity.masked_fill(broken, float("nan"))


def select(
    q_means: Tensor,
    q_similarity: Tensor,
    k_means: Tensor,
    k_similarity: Tensor,
    scale: float,
    cdf: Tensor | None,
    topk: Tensor | None,
    similarity: Tensor,
    sink: bool,
    causal: bool,
    window: int | None,
    q_len: int,
    kv_len: int,
    block_q: int,
    block_kv: int,
    q_bounds: Tensor | None,
    kv_bounds: Tensor | None,
    visible: Tensor | None,
    must: Tensor | None,
    trim: bool,
) -> tuple[Tensor, Tensor]:
    """Choose key blocks from block means and similarities."""
    group = q_means.shape[1] // max(1, k_means.shape[1])
    k_means, k_similarity = k_means.repeat_interleave(group, 1), k_similarity.repeat_interleave(group, 1)
    threshold = similarity[:, None]
    # Written so that a NaN similarity counts as dissimilar.
    q_mixed, k_mixed = ~(q_similarity >= threshold), ~(k_similarity >= threshold)

    scores = scale * (q_means @ k_means.transpose(-1, -2))
    default = q_bounds is None or kv_bounds is None
    if q_bounds is None or kv_bounds is None:
        q_bounds = geometry.default_bounds(q_len, block_q, kv_len - q_len, q_means.device)
        kv_bounds = geometry.default_bounds(kv_len, block_kv, 0, q_means.device)
    seen = geometry.visible_blocks(q_bounds, kv_bounds, causal, window)[:, None]
    seen = (seen if visible is None else seen & visible).expand(scores.shape)

    broken = ~scores.isfinite()  # too large to compare: kept, as what cannot be judged is
    scores = torch.where(seen & ~k_mixed[:, :, None] & ~broken, scores, _MINUS_INF)
    kept = _choose(scores, seen.sum(-1), cdf, topk) | broken
    kept = kept | q_mixed[..., None] | k_mixed[:, :, None]
    if sink and kept.shape[-1] > 0:
        kept[..., 0] = True
    if causal and default:
        q_first, q_last = q_bounds[:, None, :, None, 0], q_bounds[:, None, :, None, 1]
        kept = kept | ((kv_bounds[:, None, None, :, 0] <= q_last) & (kv_bounds[:, None, None, :, 1] >= q_first))
    if must is not None:
        kept = kept | must
    return block_lists(kept & seen, trim)


def _choose(scores: Tensor, visible: Tensor, cdf: Tensor | None, topk: Tensor | None) -> Tensor:
    """Entries that `cdf` or `topk` keeps; scores of -inf hold no mass."""
    ordered, order = scores.sort(dim=-1, descending=True, stable=True)
    kept = torch.zeros_like(scores, dtype=torch.bool)
    if cdf is not None:
        mass = torch.softmax(ordered, -1).nan_to_num(0.0)
        before = mass.cumsum(-1) - mass
        tau = cdf[:, None, None]
        kept = kept | (before < tau) | (tau >= 1)
    if topk is not None:
        # The small term takes back what fp32 adds to decimal fractions: 0.1 of 30 is 3 blocks, not 4.
        number = torch.ceil((topk.to(torch.float64)[:, None] - 1e-6) * visible).clamp(min=1)
        kept = kept | (torch.arange(scores.shape[-1], device=scores.device) < number[..., None])
    return torch.zeros_like(kept).scatter(-1, order, kept)


def pack_kv(key: Tensor, value: Tensor, mean: Tensor, segments: Tensor | None) -> list[Tensor]:
    """Quantise key (less its mean) and value by 64-key blocks, in the layout of `PackedKV`."""
    blocks = geometry.num_blocks(key.shape[2], TILE)
    counts = torch.ones(1, key.shape[2], dtype=torch.bool, device=key.device) if segments is None else segments >= 0
    counts = _blocks(counts, blocks, TILE)[:, None, :, :, None]
    keys = _blocks(key.to(torch.float32) - mean[:, :, None], blocks, TILE, dim=2)
    key8, key_scale = _quantise_mixed(torch.where(counts, keys, 0.0), (3, 4), neighbours(key.shape[3]))
    key8 = F.pad(key8, (0, -key.shape[3] % 4))
    values = _blocks(value.to(torch.float32), blocks, TILE, dim=2)
    value8, value_scale = _quantise(torch.where(counts, values, 0.0), (3,))
    return [
        key8.to(torch.int8),
        key_scale[:, :, :, 0, 0].clone(),
        key8.sum(-1, dtype=torch.int32),
        value8.transpose(3, 4).to(torch.int8).contiguous(),
        value_scale[:, :, :, 0].clone(),
        value8.sum(3, dtype=torch.int32),
    ]


def attend(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    packed: list[Tensor],
    kv_num_blocks: Tensor | None,
    kv_indices: Tensor | None,
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
    q_bounds: Tensor | None,
    kv_bounds: Tensor | None,
    visible: Tensor | None,
    softcap: float | None,
    sink_logits: Tensor | None,
    precision: str,
    pv_threshold: Tensor | None,
    prepared: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Block-sparse attention: output, log-sum-exp, counts of visible, QK and PV block products per query block."""
    batch, heads, q_len, _ = query.shape
    kv_len, mixed = (key.shape[2], neighbours(key.shape[3])) if key is not None else packed[7].tolist()
    if q_positions is None or kv_positions is None:
        q_positions, kv_positions = geometry.default_positions(q_len, kv_len, query.device)
    if q_bounds is None or kv_bounds is None:
        q_bounds = geometry.default_bounds(q_len, block_q, kv_len - q_len, query.device)
        kv_bounds = geometry.default_bounds(kv_len, block_kv, 0, query.device)
    seen_blocks = geometry.visible_blocks(q_bounds, kv_bounds, causal, window)[:, None]
    seen_blocks = seen_blocks if visible is None else seen_blocks & visible
    seen_blocks = seen_blocks.expand(batch, heads, -1, -1)
    kept = seen_blocks
    if kv_num_blocks is not None and kv_indices is not None:
        check_lists(kv_num_blocks, kv_indices, seen_blocks.shape[-1])
        kept = kept & dense_blocks(kv_num_blocks, kv_indices, seen_blocks.shape[-1])

    operands: _Operands
    if precision == "int8":
        if key is not None and value is not None:
            counted = geometry.without_hidden(attn_mask, kv_segments)
            mean = key_mean(key, counted, _used_tiles(kept, key.shape[1], block_kv, kv_len))
            mean = torch.zeros_like(mean) if softcap is not None else mean
            packed = [*pack_kv(key, value, mean, counted), mean]
        operands = _Int8(query, packed, mixed, scale, shift_scores=softcap is not None)
    else:
        assert key is not None
        assert value is not None
        operands = _Full(query, key, value, scale)

    value_dim = packed[4].shape[-1] if value is None else value.shape[-1]
    output = query.new_zeros((batch, heads, q_len, value_dim))
    lse = query.new_full((batch, heads, q_len), _MINUS_INF, dtype=torch.float32)
    pv_done = kept.to(torch.float64)
    for q_block in range(kept.shape[2]):
        rows = slice(q_block * block_q, min(q_len, (q_block + 1) * block_q))
        state = _Rows(batch, heads, rows.stop - rows.start, value_dim, query.device)
        for start in range(0, kv_len, TILE):
            kv_block = start // block_kv
            head_keeps = kept[:, :, q_block, kv_block]
            if not bool(head_keeps.any()):
                continue
            keys = slice(start, min(kv_len, start + TILE))
            scores = operands.scores(rows, keys)
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            seen = geometry.visible_pairs(
                q_positions[:, rows],
                kv_positions[:, keys],
                None if q_segments is None else q_segments[:, rows],
                None if kv_segments is None else kv_segments[:, keys],
                causal=causal,
                window=window,
            )[:, None]
            seen = seen & head_keeps[..., None, None]
            if attn_mask is not None:
                tile = attn_mask[:, :, rows, keys]
                seen = seen & (tile if tile.dtype == torch.bool else tile != _MINUS_INF)
                scores = scores if tile.dtype == torch.bool else scores + tile
            skipped = state.update(torch.where(seen, scores, _MINUS_INF), seen, keys, operands, pv_threshold)
            tiles = min(block_kv // TILE, geometry.num_blocks(kv_len - kv_block * block_kv, TILE))
            pv_done[:, :, q_block, kv_block] -= skipped / tiles
        row_output, row_lse = state.finish(operands.lse_shift(rows), sink_logits)
        output[:, :, rows], lse[:, :, rows] = row_output.to(query.dtype), row_lse
    counts = torch.stack([table.sum(-1, dtype=torch.float64) for table in (seen_blocks, kept, pv_done)], -1)
    return output, lse, counts


class _Operands(Protocol):
    """The two products of attention in one precision."""

    def scores(self, rows: slice, keys: slice) -> Tensor:
        """scale * Q K^T of a tile, fp32 `[batch, heads, rows, keys]`."""

    def weighted(self, weights: Tensor, seen: Tensor, keys: slice) -> Tensor:
        """P V of a tile, fp32 `[batch, heads, rows, value_dim]`; weights in [0, 1]."""

    def lse_shift(self, rows: slice) -> Tensor | float:
        """What smoothing took from the scores of each row."""


class _Full:
    """Products of the inputs as they are, in fp32."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        self.query, self.key, self.value, self.scale = query, key, value, scale

    def scores(self, rows: slice, keys: slice) -> Tensor:
        query, key = self.query[:, :, rows].to(torch.float32), self.key[:, :, keys].to(torch.float32)
        return _by_group(query, key.transpose(-1, -2)) * self.scale

    def weighted(self, weights: Tensor, seen: Tensor, keys: slice) -> Tensor:
        value = self.value[:, :, keys].to(torch.float32)
        finite = value.isfinite()
        product = _by_group(weights, torch.where(finite, value, 0.0))
        if bool(finite.all()):
            return product
        # 0 * NaN is NaN: a value that is not finite may enter only the rows that see it.
        positive = (weights > 0).to(torch.float32)
        for members, bad, result in (
            (positive, value == float("inf"), float("inf")),
            (positive, value == _MINUS_INF, _MINUS_INF),
            (seen.to(torch.float32) - positive, value.isinf(), float("nan")),
            (seen.to(torch.float32), value.isnan(), float("nan")),
        ):
            hit = _by_group(members.expand_as(weights), bad.to(torch.float32)) > 0
            product = product + torch.where(hit, result, 0.0)
        return product

    def lse_shift(self, rows: slice) -> Tensor | float:
        return 0.0


class _Int8:
    """Products of int8 numbers; keys had their mean subtracted, and so many neighbours were mixed."""

    def __init__(self, query: Tensor, packed: list[Tensor], mixed: int, scale: float, shift_scores: bool) -> None:
        rows = query.to(torch.float32)
        self.query8, self.query_scale = _quantise_mixed(rows, (3,), mixed)
        self.key8, self.key_scale, _, self.value8, self.value_scale, _, mean = packed[:7]
        self.scale, self.shift_scores = scale, shift_scores
        self.shift = scale * _by_group(rows, mean[..., None])

    def scores(self, rows: slice, keys: slice) -> Tensor:
        tile, number = keys.start // TILE, keys.stop - keys.start
        key = self.key8[:, :, tile, :number, : self.query8.shape[-1]].to(torch.float32)
        product = _by_group(self.query8[:, :, rows], key.transpose(-1, -2))
        key_scale = self.key_scale[:, :, tile].repeat_interleave(product.shape[1] // max(1, key.shape[1]), 1)
        scores = product * (self.query_scale[:, :, rows] * key_scale[..., None, None] * self.scale)
        return scores + self.shift[:, :, rows] if self.shift_scores else scores

    def weighted(self, weights: Tensor, seen: Tensor, keys: slice) -> Tensor:
        tile, number = keys.start // TILE, keys.stop - keys.start
        value = self.value8[:, :, tile].transpose(-1, -2)[:, :, :number].to(torch.float32)
        product = _by_group((weights * 254).round(), value)
        group = product.shape[1] // max(1, value.shape[1])
        return product * (self.value_scale[:, :, tile, None].repeat_interleave(group, 1) / 254)

    def lse_shift(self, rows: slice) -> Tensor | float:
        return 0.0 if self.shift_scores else self.shift[:, :, rows, 0]


class _Rows:
    """Online softmax of one block of query rows."""

    def __init__(self, batch: int, heads: int, rows: int, value_dim: int, device: torch.device) -> None:
        self.most = torch.full((batch, heads, rows, 1), _MINUS_INF, device=device)
        self.total = torch.zeros((batch, heads, rows, 1), device=device)
        self.output = torch.zeros((batch, heads, rows, value_dim), device=device)

    def update(
        self, scores: Tensor, seen: Tensor, keys: slice, operands: _Operands, pv_threshold: Tensor | None
    ) -> Tensor:
        """Take in one tile; return which share of the rows stage 2 skipped, `[batch, heads]`."""
        local = scores.amax(-1, keepdim=True)
        most = torch.maximum(self.most, local)
        weights = torch.exp(scores - _finite_or_zero(local))
        gain, decay = (torch.exp(old - _finite_or_zero(most)) for old in (local, self.most))
        self.total = self.total * decay + weights.sum(-1, keepdim=True) * gain
        takes = seen.any(-1, keepdim=True)
        skips = torch.zeros_like(takes)
        if pv_threshold is not None:
            skips = self._skipped(local - _finite_or_zero(most), takes, pv_threshold)
        product = operands.weighted(weights, seen, keys) * gain
        self.output = self.output * decay + torch.where(takes & ~skips, product, 0.0)
        self.most = most
        return skips.to(torch.float64).mean((-1, -2))

    def finish(self, shift: Tensor | float, sink_logits: Tensor | None) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of the rows."""
        empty = self.total == 0
        output = torch.where(empty, 0.0, self.output / self.total)
        lse = torch.where(empty, _MINUS_INF, self.most + torch.log(self.total))[..., 0] + shift
        lse = torch.where(empty[..., 0], _MINUS_INF, lse)
        if sink_logits is not None:
            joined = torch.logaddexp(lse, sink_logits[:, None])
            output = torch.where(empty, 0.0, output * torch.exp(lse - joined)[..., None])
            lse = joined
        return output, lse

    @staticmethod
    def _skipped(behind: Tensor, takes: Tensor, pv_threshold: Tensor) -> Tensor:
        """Rows in groups that stage 2 skips; a group in which no row sees a key has nothing to skip."""
        rows = behind.shape[2]
        groups = geometry.num_blocks(rows, ROW_GROUP)
        pad = (0, 0, 0, groups * ROW_GROUP - rows)
        nearest = torch.unflatten(F.pad(behind, pad, value=_MINUS_INF), 2, (groups, ROW_GROUP)).amax(3)
        skips = (nearest <= -pv_threshold[:, None, None]) & torch.unflatten(
            F.pad(takes, pad), 2, (groups, ROW_GROUP)
        ).any(3)
        return skips.repeat_interleave(ROW_GROUP, 2)[:, :, :rows]


def _finite_or_zero(maximum: Tensor) -> Tensor:
    """A row that has seen nothing has maximum -inf; subtracting 0 from its scores keeps exp() at 0."""
    return torch.where(maximum == _MINUS_INF, 0.0, maximum)


def _by_group(left: Tensor, right: Tensor) -> Tensor:
    """Matrix product per head, `right` having one head for each group of `left`'s."""
    if left.shape[1] == right.shape[1]:
        return left @ right
    return (torch.unflatten(left, 1, (right.shape[1], -1)) @ right[:, :, None]).flatten(1, 2)


def _blocks(x: Tensor, blocks: int, block: int, dim: int = 1) -> Tensor:
    """Split `dim` into blocks, the last one padded with zeros."""
    pad = [0, 0] * (x.dim() - 1 - dim) + [0, blocks * block - x.shape[dim]]
    return torch.unflatten(F.pad(x, pad), dim, (blocks, block))


def _quantise(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Symmetric int8 (as fp32) with one scale over `dims`; the scale is NaN where an entry is not finite."""
    finite = x.isfinite()
    top = torch.where(finite, x, 0.0).abs().amax(dims, keepdim=True)
    enlarged = torch.where(top < 1e-36, 2.0**40, 1.0)
    inverse = torch.full_like(top, 127.0) / (top * enlarged)  # `127 / x` would be rounded twice: 127 * (1 / x)
    # All zeros, or so small that 127 / top overflows: 0.
    whole = torch.where(finite & inverse.isfinite(), x * enlarged * inverse, 0.0).round().clamp(-127, 127)
    broken = (~finite).any(dims[0], keepdim=True).any(dims[-1], keepdim=True)
    return whole, (top / 127).masked_fill(broken, float("nan"))


def _quantise_mixed(x: Tensor, dims: tuple[int, ...], mixed: int) -> tuple[Tensor, Tensor]:
    """The same of `mixed` neighbours in the last axis."""
    whole, scale = _quantise(mix_shares(x, mixed), dims)
    return whole, scale * mixed**0.5


def _used_tiles(kept: Tensor, num_kv_heads: int, block_kv: int, kv_len: int) -> Tensor:
    """64-key tiles that some query block of some head of a group keeps, bool `[batch, kv heads, tiles]`."""
    used = kept.any(2)
    used = torch.unflatten(used, 1, (num_kv_heads, -1)).any(2) if num_kv_heads else used
    return used.repeat_interleave(block_kv // TILE, -1)[..., : geometry.num_blocks(kv_len, TILE)]
