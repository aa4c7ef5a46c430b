"""The one oracle: what tamis must compute, in plain torch, from the contract and from no backend.

`attention` is attention written down token by token; in fp64 it is the truth, and in another dtype "plain torch at that
precision", whose error against the truth is the yardstick of every bound in this suite (`assert_within`):

    mean err(ours) <= 2 * mean err(plain torch) + rounding of the result, and the largest error within 4 times

`attention_int8` is the quantised algorithm, and `attention_stage2` the algorithm that skips, each in fp64 and spelled
out whole, so that a backend has to agree with them up to fp32 rounding.

Keys that a row does not see are excluded, never multiplied by zero: a NaN there touches nothing.

What is asked again for the same tensors, as for every engine, is remembered.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from remember import remember
from torch import Tensor

Pair = tuple[Tensor, Tensor]
KEY_BLOCK = 64  # the grain of the int8 scales, whatever the block size of the mask


class Result(NamedTuple):
    """Output `[batch, heads, q_len, value_dim]` and log-sum-exp `[batch, heads, q_len]`, in the dtype computed in."""

    output: Tensor
    lse: Tensor


class Skipped(NamedTuple):
    """Like Result, with the share of visible P V block products done, and how near the closest decision was."""

    output: Tensor
    lse: Tensor
    pv_density: Tensor
    margin: float


@remember
def blocks_of(mask: Any) -> Tensor:
    """A BlockMask as bool `[batch, heads, q_blocks, kv_blocks]`, read entry by entry from its two tensors."""
    q_blocks, kv_blocks = (-(-n // b) for n, b in zip(mask.seq_lens, mask.block_size, strict=True))
    batch, heads = mask.kv_num_blocks.shape[:2]
    dense = torch.zeros(batch, heads, q_blocks, kv_blocks, dtype=torch.bool)
    counts, indices = mask.kv_num_blocks.tolist(), mask.kv_indices.tolist()
    for b in range(batch):
        for h in range(heads):
            for i in range(q_blocks):
                for j in indices[b][h][i][: counts[b][h][i]]:
                    dense[b, h, i, j] = True
    return dense


def token_mask(blocks: Tensor, block_size: tuple[int, int], q_len: int, kv_len: int) -> Tensor:
    """A block mask spelled out per token."""
    rows = blocks.repeat_interleave(block_size[0], -2)[..., :q_len, :]
    return rows.repeat_interleave(block_size[1], -1)[..., :kv_len]


def _default_positions(q_len: int, kv_len: int) -> Pair:
    return torch.arange(q_len) + (kv_len - q_len), torch.arange(kv_len)


def visible(
    q_len: int,
    kv_len: int,
    *,
    blocks: Tensor | None = None,
    block_size: tuple[int, int] = (128, 64),
    causal: bool = False,
    window: int | None = None,
    attn_mask: Tensor | None = None,
    positions: Pair | None = None,
    segments: Pair | None = None,
) -> Tensor:
    """Bool, broadcastable to `[batch, heads, q_len, kv_len]`: does the row see the key?"""
    seen = torch.ones(1, 1, q_len, kv_len, dtype=torch.bool)
    q_pos, kv_pos = (p.long() for p in (_default_positions(q_len, kv_len) if positions is None else positions))
    if causal:
        seen = seen & (q_pos[..., :, None] >= kv_pos[..., None, :]).reshape(-1, 1, q_len, kv_len)
    if window is not None:
        distance = (q_pos[..., :, None] - kv_pos[..., None, :]).abs()
        seen = seen & (distance < window).reshape(-1, 1, q_len, kv_len)
    if segments is not None:
        q_seg, kv_seg = segments
        same = (q_seg[..., :, None] == kv_seg[..., None, :]) & (q_seg[..., :, None] >= 0)
        seen = seen & same.reshape(-1, 1, q_len, kv_len)
    if attn_mask is not None:
        seen = seen & (attn_mask if attn_mask.dtype == torch.bool else attn_mask != -torch.inf)
    if blocks is not None:
        seen = seen & token_mask(blocks, block_size, q_len, kv_len)
    return seen


def visible_blocks(seen: Tensor, block_size: tuple[int, int]) -> Tensor:
    """Block pairs that hold a visible pair of tokens, bool `[.., q_blocks, kv_blocks]`."""
    rows = torch.stack([part.any(-2) for part in torch.split(seen, block_size[0], -2)], -2)
    return torch.stack([part.any(-1) for part in torch.split(rows, block_size[1], -1)], -1)


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[1], 1)


def _products(query: Tensor, key: Tensor) -> Tensor:
    """query @ key^T; in fp32 term by term, the order that anyone may take (matmul keeps several partial sums)."""
    if query.dtype != torch.float32:
        return query @ key.transpose(-1, -2)
    total = query.new_zeros(*query.shape[:3], key.shape[2])
    for c in range(query.shape[-1]):
        total.addcmul_(query[..., c, None], key[..., None, :, c])
    return total


def _scores(
    query: Tensor, key: Tensor, *, scale: float | None, softcap: float | None, attn_mask: Tensor | None, seen: Tensor
) -> Tensor:
    """scale * q.k, then softcap, then the additive mask, then -inf where the row does not see the key."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = _products(query, key) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        scores = scores + attn_mask.to(scores.dtype)
    return scores.masked_fill(~seen, -torch.inf)


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax, 0 in a row of nothing but -inf, and its log-sum-exp."""
    largest = scores.amax(-1, keepdim=True)
    powers = torch.exp(scores - largest.masked_fill(largest == -torch.inf, 0))
    total = powers.sum(-1, keepdim=True)
    return powers / total.masked_fill(total == 0, 1), (largest + total.log()).squeeze(-1)


def _weighted_values(weights: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    """weights @ value in which a non-finite value reaches only the rows that see its key."""
    finite = value.isfinite()
    output = weights @ value.masked_fill(~finite, 0)
    broken = (~finite).any(-1).any(0).any(0).nonzero().flatten().tolist()
    for j in broken:
        # 0 * inf is NaN as in torch, but only for rows that see key j.
        odd = value[..., j, :].masked_fill(finite[..., j, :], 0)[..., None, :]
        term = weights[..., j, None] * odd
        output = output + term.masked_fill(~seen[..., j, None], 0)
    return output


@remember
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    blocks: Tensor | None = None,
    block_size: tuple[int, int] = (128, 64),
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    positions: Pair | None = None,
    segments: Pair | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Result:
    """Attention of `[batch, heads, seq, head_dim]` tensors, computed in `dtype`.

    A sink logit is one more key that every row sees, of value 0.
    """
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    key, value = _repeat_heads(key, query.shape[1]), _repeat_heads(value, query.shape[1])
    seen = visible(
        query.shape[2],
        key.shape[2],
        blocks=blocks,
        block_size=block_size,
        causal=causal,
        window=window,
        attn_mask=attn_mask,
        positions=positions,
        segments=segments,
    ).expand(*query.shape[:3], key.shape[2])
    scores = _scores(query, key, scale=scale, softcap=softcap, attn_mask=attn_mask, seen=seen)
    if sink_logits is not None:
        sink = sink_logits.to(dtype).reshape(1, -1, 1, 1).expand(*query.shape[:3], 1)
        scores = torch.cat([scores, sink], -1)
    weights, lse = _softmax(scores)
    return Result(_weighted_values(weights[..., : key.shape[2]], value, seen), lse)


def _quantise(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Round to 127 steps of the largest entry over `dims`; the quantised integers and the step, both in fp64."""
    step = x.abs().amax(dims, keepdim=True) / 127
    return torch.round(x / torch.where(step == 0, 1.0, step)).clamp(-127, 127), step


def key_mean(key: Tensor, kv_segments: Tensor | None = None, used: Tensor | None = None) -> Tensor:
    """fp64 `[batch, kv_heads, head_dim]`: the mean over finite keys of non-negative segment in used 64-key blocks."""
    key = key.double()
    counts = key.isfinite().all(-1)
    if kv_segments is not None:
        counts = counts & (kv_segments.reshape(-1, 1, key.shape[2]) >= 0)
    if used is not None:
        counts = counts & used.repeat_interleave(KEY_BLOCK, -1)[..., : key.shape[2]]
    total = key.masked_fill(~counts[..., None], 0).sum(2)
    return total / counts.sum(2, keepdim=True).clamp(min=1)


def used_key_blocks(blocks: Tensor, block_size: tuple[int, int], kv_heads: int, kv_len: int) -> Tensor:
    """bool `[batch, kv_heads, ceil(kv_len / 64)]`: 64-key blocks that a row of a query head of the group keeps."""
    used = torch.unflatten(blocks.any(-2), 1, (kv_heads, -1)).any(2)
    return used.repeat_interleave(block_size[1] // KEY_BLOCK, -1)[..., : -(-kv_len // KEY_BLOCK)]


def mixer(dim: int) -> Tensor:
    """fp64 `[dim, dim]`, orthogonal: D H / sqrt(n) of every n neighbours, the largest such n in `dim`."""
    size = max(n for n in (1, 2, 4, 8, 16, 64, 256) if dim % n == 0)
    places = torch.arange(size)
    both = places[:, None] & places
    odd = torch.stack([both >> bit & 1 for bit in range(size.bit_length())]).sum(0) % 2
    walsh = torch.block_diag(*[(1.0 - 2.0 * odd.double()) / size**0.5] * (dim // size))
    digits = torch.arange(dim)[:, None] % 256 >> torch.arange(9) & 1
    return walsh * (1.0 - 2.0 * ((digits[:, 1:] * digits[:, :-1]).sum(1) % 2))[:, None] if size > 1 else walsh


class _Scores(NamedTuple):
    """What both 8-bit schemes start from, all heads repeated, fp64."""

    scores: Tensor  # [batch, heads, q_len, kv_len], of rounded query and key, hidden ones -inf
    shift: Tensor  # [batch, heads, q_len]: what smoothing took from a row's scores
    value: Tensor  # zero where padded


def _int8_scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    blocks: Tensor | None = None,
    block_size: tuple[int, int] = (128, 64),
    scale: float | None = None,
    softcap: float | None = None,
    attn_mask: Tensor | None = None,
    segments: Pair | None = None,
    mean: Tensor | None = None,
    rounds: bool = True,
    mixes: bool = True,
    **masks: Any,
) -> _Scores:
    """Q one step per row, K less its mean one per 64 keys, of `mixed` channels; without `rounds` both as they are."""
    heads, q_len, kv_len, dim = query.shape[1], query.shape[2], key.shape[2], query.shape[3]
    scale = dim**-0.5 if scale is None else scale
    seen = visible(
        q_len, kv_len, blocks=blocks, block_size=block_size, attn_mask=attn_mask, segments=segments, **masks
    ).expand(*query.shape[:3], kv_len)
    if mean is None:
        used = used_key_blocks(visible_blocks(seen, block_size), block_size, key.shape[1], kv_len)
        mean = key_mean(key, None if segments is None else segments[1], used)
        mean = torch.zeros_like(mean) if softcap is not None or not rounds else mean
    query, key, value = query.double(), key.double() - mean[:, :, None], value.double()
    if segments is not None:
        padding = (segments[1] < 0).reshape(-1, 1, kv_len, 1)
        key, value = key.masked_fill(padding, 0), value.masked_fill(padding, 0)
    query_rounded, key_rounded = query, _repeat_heads(key, heads)
    if rounds:
        mixing = mixer(dim) if mixes else torch.eye(dim, dtype=torch.float64)
        query_int, query_step = _quantise(query @ mixing, (-1,))
        key_int, key_step = _quantise(_key_blocks(key @ mixing), (-2, -1))
        query_rounded, key_rounded = query_int * query_step, _repeat_heads((key_int * key_step).flatten(2, 3), heads)
    scores = _scores(
        query_rounded, key_rounded[:, :, :kv_len], scale=scale, softcap=softcap, attn_mask=attn_mask, seen=seen
    )
    shift = _repeat_heads(mean[:, :, None], heads) @ query.transpose(-1, -2) * scale  # [batch, heads, 1, q_len]
    return _Scores(scores, shift.squeeze(2), _repeat_heads(value, heads))


def _key_blocks(x: Tensor) -> Tensor:
    """`[.., kv_len, dim]` to `[.., blocks, 64, dim]`, padded with zeros."""
    return torch.unflatten(F.pad(x, (0, 0, 0, -x.shape[2] % KEY_BLOCK)), 2, (-1, KEY_BLOCK))


def _lse(scores: Tensor, shift: Tensor, sink_logits: Tensor | None) -> Tensor:
    """Over the last axis of smoothed scores, without the shift put back."""
    if sink_logits is None:
        return torch.logsumexp(scores, -1)
    sink = sink_logits.double().reshape(1, -1, 1) - shift
    return torch.logsumexp(torch.cat([scores, sink[..., None]], -1), -1)


@remember
def attention_int8(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    words: bool = False,
    sink_logits: Tensor | None = None,
    **options: Any,
) -> Result:
    """The int8 algorithm in fp64.

    Steps: Q one per row, K less its mean one per 64 keys, both of mixed channels, V one per channel and 64 keys,
    P 1/254 of its row's largest in the 64 keys.

    `words`: P, before it is rounded to 1/254, is a multiple of 1/32512 and, but for that, a whole power of 2^(1/64);
    the denominator is the sum of these weights.
    """
    scores, shift, values = _int8_scores(query, key, value, **options)
    value_int, value_step = _quantise(_key_blocks(values), (-2,))
    per_block = torch.unflatten(F.pad(scores, (0, -key.shape[2] % KEY_BLOCK), value=-torch.inf), -1, (-1, KEY_BLOCK))
    local = per_block.amax(-1)  # [batch, heads, q_len, key blocks]
    local = local.masked_fill(local == -torch.inf, 0)
    if words:
        exact = _in_words(per_block - local[..., None])
        weights = torch.floor(exact / 128 + 0.5)
        totals = torch.log(exact.sum(-1) / 32512) + local
    else:
        weights, totals = torch.round(254 * torch.exp(per_block - local[..., None])), scores
    products = torch.einsum("bhqjk,bhjkc->bhqjc", weights, value_int) * value_step.transpose(-3, -2) / 254
    lse = _lse(totals, shift, sink_logits)
    shares = torch.exp(local - lse.masked_fill(lse == -torch.inf, 0)[..., None])
    return Result((shares[..., None] * products).sum(-2), lse + shift)


def _in_words(x: Tensor) -> Tensor:
    """32512 e^x for x <= 0, as AVX-512 has it in integers of 16 bits."""
    below = torch.round(-x * (64 * math.log2(math.e))).clamp(max=65535)
    whole = torch.floor(below / 64)
    return torch.floor(torch.round(32512 * torch.exp2(whole - below / 64)) / torch.exp2(whole))


@remember
def attention_bf16(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    sink_logits: Tensor | None = None,
    rounds: bool = True,
    packed: bool = False,
    **options: Any,
) -> Result:
    """The algorithm with values in bf16, in fp64.

    Steps: Q and K as in `attention_int8` if `rounds`, else as they are; V in bf16, after 8 bits if `packed`.

    P is a bf16 whose logarithm, base 2, is a multiple of 1/128; the denominator is the sum of these very weights.
    """
    scores, shift, values = _int8_scores(query, key, value, rounds=rounds, **options)
    if packed:
        value_int, value_step = _quantise(_key_blocks(values), (-2,))
        values = (value_int * value_step).flatten(2, 3)[:, :, : key.shape[2]]
    values = values.to(torch.bfloat16).double()
    top = scores.amax(-1, keepdim=True)
    top = top.masked_fill(top.isinf(), 0)
    log2e = math.log2(math.e)
    # The grid is anchored at whole powers, or at the largest score where it is beyond 3e4 of them.
    anchor = torch.where(top.abs() * log2e < 3e4, 0.0, top)
    steps = torch.round((scores - anchor) * (128 * log2e))
    largest = steps.amax(-1, keepdim=True)
    power = torch.floor(steps / 128)
    mantissa = torch.round(128 * (torch.exp2(steps / 128 - power) - 1))
    base = torch.floor(largest / 128).masked_fill(largest == -torch.inf, 0)
    weights = torch.where(steps == -torch.inf, 0.0, torch.exp2(power - base) * (1 + mantissa / 128))
    total = torch.log(weights.sum(-1)) + (base / log2e + anchor).squeeze(-1)
    lse = _lse(total[..., None], shift, sink_logits)
    scaled = torch.exp((base / log2e + anchor).squeeze(-1) - lse.masked_fill(lse == -torch.inf, 0))
    return Result((weights @ values) * scaled[..., None], lse + shift)


@remember
def attention_gpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    weights: torch.dtype,
    values: torch.dtype,
    rounds: bool = True,
    packed: bool = False,
    mixes: bool = False,
    sink_logits: Tensor | None = None,
    **options: Any,
) -> Result:
    """The algorithms of GPU kernels in fp64.

    Steps: Q and K as in `attention_int8` if `rounds`, mixed only if `mixes`, else as they are. P in the type `weights`
    against its row's maximum so far, 64 keys at a time, which e4m3 takes over the 64 keys alone and brings to 256. V in
    the type `values`: e4m3 has 448 steps of the largest entry of a channel; a `packed` one is as in `attention_int8`.
    The denominator is not rounded.
    """
    scores, shift, v = _int8_scores(query, key, value, rounds=rounds, mixes=mixes, **options)
    if packed:
        value_int, value_step = _quantise(_key_blocks(v), (-2,))
        v = (value_int * value_step).flatten(2, 3)[:, :, : key.shape[2]]
    elif values == torch.float8_e4m3fn:
        step = v.abs().amax(-2, keepdim=True) / 448
        v = (v / torch.where(step == 0, 1.0, step)).float().to(values).double() * step
    else:
        v = v.to(values).double()
    per_block = torch.unflatten(F.pad(scores, (0, -key.shape[2] % KEY_BLOCK), value=-torch.inf), -1, (-1, KEY_BLOCK))
    local = per_block.amax(-1, keepdim=True)
    top = local if weights == torch.float8_e4m3fn else local.cummax(-2).values
    top = torch.where(top == -torch.inf, 0.0, top)
    size = 256 if weights == torch.float8_e4m3fn else 1
    p = (size * torch.exp(per_block - top)).float().to(weights).double() / size
    lse = _lse(scores, shift, sink_logits)
    share = torch.exp(top - lse.masked_fill(lse == -torch.inf, 0)[..., None, None])
    p = (p * share).flatten(-2)[..., : key.shape[2]]
    return Result(p @ v, lse + shift)


@remember
def attention_stage2(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    pv_threshold: Tensor,
    blocks: Tensor,
    block_size: tuple[int, int],
    scale: float | None = None,
    group: int = 16,
    keys: int = KEY_BLOCK,
    whole_first: bool = False,
    **masks: Any,
) -> Skipped:
    """Attention without P V of a row group and `keys` keys if all rows score `pv_threshold` below their maxima so far.

    Groups are `group` consecutive rows inside a query block; the denominator keeps every key. A group that sees none of
    the keys has nothing to skip and counts as done. Keys come in order or, `whole_first`, blocks that all rows of a
    group see whole before the others. `pv_density` is per batch and head, `margin` the distance of the closest decision
    from its threshold.
    """
    heads, q_len, kv_len = query.shape[1], query.shape[2], key.shape[2]
    query, key, value = query.double(), _repeat_heads(key.double(), heads), _repeat_heads(value.double(), heads)
    may_see = visible(q_len, kv_len, **masks).expand(*query.shape[:3], kv_len)
    possible = visible_blocks(may_see, block_size)
    kept = possible & blocks
    seen = may_see & token_mask(blocks, block_size, q_len, kv_len)
    scores = _scores(query, key, scale=scale, softcap=None, attn_mask=masks.get("attn_mask"), seen=seen)
    weights, lse = _softmax(scores)
    margin = torch.inf
    done = kept.double()
    limit = pv_threshold.double()
    for start in range(0, q_len, block_size[0]):
        stop = min(q_len, start + block_size[0])
        for first in range(start, stop, group):
            rows = slice(first, min(stop, first + group))
            running = torch.full(scores[:, :, rows, 0].shape, -torch.inf, dtype=torch.float64)
            for columns, block, share in _turns(may_see[:, :, rows], block_size[1], keys, whole_first):
                local = scores[:, :, rows, columns].amax(-1)
                running = torch.maximum(running, local)
                nearest = torch.where(local == -torch.inf, torch.inf, running - local).amin(-1)  # [batch, heads]
                skip = (nearest >= limit) & (nearest < torch.inf)
                margin = min([margin, *(nearest - limit).abs()[nearest < torch.inf].tolist()])
                weights[:, :, rows, columns] *= ~skip[..., None, None]
                done[:, :, start // block_size[0], block] -= skip.double() * (
                    share * (rows.stop - rows.start) / (stop - start)
                )
    total = possible.sum((-1, -2)).clamp(min=1)
    return Skipped(_weighted_values(weights, value, seen), lse, done.sum((-1, -2)) / total, margin)


def _turns(may_see: Tensor, block: int, keys: int, whole_first: bool) -> list[tuple[slice, int, float]]:
    """Columns that are judged together, in turn: their block, and their share of it."""
    kv_len = may_see.shape[-1]
    turns = []
    for at in range(-(-kv_len // block)):
        last = min(kv_len, (at + 1) * block)
        parts = [slice(first, min(last, first + keys)) for first in range(at * block, last, keys)]
        whole = last == (at + 1) * block and bool(may_see[..., at * block : last].all())
        turns += [(whole_first and not whole, part, at, 1 / len(parts)) for part in parts]
    return [(part, at, share) for _, part, at, share in sorted(turns, key=lambda turn: turn[0])]


def relative_l1(actual: Tensor, expected: Tensor) -> float:
    """sum |actual - expected| / sum |expected|."""
    return float((actual.double() - expected.double()).abs().sum() / expected.double().abs().sum())


def assert_within(actual: Tensor, expected: Tensor, *plains: Tensor, what: str = "output") -> None:
    """Mean err(actual) <= 2 * mean err(plain) + rounding, all against the fp64 `expected`; the largest within 4 times.

    Rounding is one unit in the last place (of the dtype of `actual`) of the mean, or largest, magnitude. The largest of
    a few thousand errors is a matter of luck (in fp32 up to 2.8 times plain torch's where the mean is 1.3 times), hence
    its double room. Where two things err, e.g. quantising and fp32, each has its `plain`, and their errors add up.
    Infinities and NaN must stand in the same places.
    """
    assert actual.shape == expected.shape, f"{what} has shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    finite = expected.isfinite()
    torch.testing.assert_close(actual[~finite].double(), expected[~finite], equal_nan=True, rtol=0, atol=0)
    assert actual[finite].isfinite().all(), f"{what} is not finite where it must be"
    if not finite.any():
        return
    ours = (actual[finite].double() - expected[finite]).abs()
    theirs = [(plain[finite].double() - expected[finite]).abs() for plain in plains]
    magnitude = expected[finite].abs()
    eps = torch.finfo(actual.dtype).eps
    for name, factor, reduce in (("mean", 2, torch.mean), ("largest", 4, torch.max)):
        limit = float(factor * sum(reduce(error) for error in theirs) + eps * reduce(magnitude))
        error = float(reduce(ours))
        assert error <= limit, (
            f"{name} error of the {what} is {error:.3g}; {factor} * plain + rounding allows {limit:.3g}"
        )
