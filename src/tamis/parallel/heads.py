"""Mode "heads" (Ulysses): every rank computes some of the heads over the whole sequence.

    query, key, value [batch, all heads, own tokens]  --all-to-all-->  [batch, own heads, all tokens]
    attention as in one process
    output            [batch, own heads, all tokens]  --all-to-all-->  [batch, all heads, own tokens]

Heads are independent, so the result is that of one process, whatever chooses the blocks. Query heads are cut as evenly
as they go; a key head goes to every rank that has one of its query heads. Where a rank's share begins or ends inside a
group of query heads, the group's parts are calls of their own.

Source: DeepSpeed-Ulysses (arXiv 2309.14509).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from tamis import geometry
from tamis.block_mask import BlockMask
from tamis.call import per_head
from tamis.parallel.layout import Layout
from tamis.parallel.places import places_of
from tamis.parallel.request import Request
from tamis.parallel.smoothing import TILE
from tamis.parallel.wire import Peers
from tamis.predictors import Sparge
from tamis.stats import AttentionOutput


class Share(NamedTuple):
    """Query heads and the key heads they need."""

    query: slice
    key: slice


def share_of(rank: int, ranks: int, heads: int, kv_heads: int) -> Share:
    """The heads of a rank."""
    first, last = rank * heads // ranks, (rank + 1) * heads // ranks
    group = heads // max(1, kv_heads)
    if first == last:
        return Share(slice(first, first), slice(0, 0))
    return Share(slice(first, last), slice(first // group, -(-last // group)))


def calls_of(share: Share, group: int) -> list[Share]:
    """A share as calls in which every key head has equally many query heads: at most three."""
    first, last = share.query.start, share.query.stop
    inner = (min(last, -(-first // group) * group), max(first, last // group * group))
    bounds = sorted({first, last, *(inner if inner[0] <= inner[1] else ())})
    pairs = itertools.pairwise(bounds)
    return [Share(slice(a, b), slice(a // group, -(-b // group))) for a, b in pairs]


def attend_heads(
    query: Tensor, key: Tensor, value: Tensor, request: Request, peers: Peers, *, lse: bool
) -> AttentionOutput:
    """Attention of this rank's tokens; the log-sum-exp is sent back only if it is asked for (else it is empty)."""
    heads, kv_heads = query.shape[1], key.shape[1]
    shares = [share_of(rank, peers.size, heads, kv_heads) for rank in range(peers.size)]
    q_layout, kv_layout = request.layouts
    own = shares[peers.rank]
    queries = _to_heads(query, [share.query for share in shares], q_layout, peers)
    keys = _to_heads(key, [share.key for share in shares], kv_layout, peers)
    values = _to_heads(value, [share.key for share in shares], kv_layout, peers)
    result = _compute(queries, keys, values, request, (own, heads, kv_heads), peers)
    sizes = [share.query.stop - share.query.start for share in shares]
    output = _to_tokens(result.output, sizes, q_layout, peers)
    logs = _to_tokens(result.lse[..., None], sizes, q_layout, peers)[..., 0] if lse else result.lse[:, :0, :0]
    return AttentionOutput(output, logs, result.stats)


def _to_heads(x: Tensor, heads: Sequence[slice], layout: Layout, peers: Peers) -> Tensor:
    """From all heads of own tokens to own heads of all tokens, in the order of the whole sequence."""
    batch, _, _, dim = x.shape
    own = heads[peers.rank]
    number = own.stop - own.start
    by_head = x.transpose(0, 1)
    parts = [by_head[some] for some in heads]
    send = torch.cat([part.reshape(-1) for part in parts])
    sizes = [number * batch * tokens * dim for tokens in layout.lengths]
    received = peers.all_to_all(send, ([part.numel() for part in parts], sizes), "heads")
    shards = [
        part.view(number, batch, tokens, dim)
        for part, tokens in zip(torch.split(received, sizes), layout.lengths, strict=True)
    ]
    return layout.put(shards).transpose(0, 1)


def _to_tokens(x: Tensor, heads: Sequence[int], layout: Layout, peers: Peers) -> Tensor:
    """From own heads of all tokens to all heads of own tokens."""
    batch, _, _, dim = x.shape
    by_head = x.transpose(0, 1)
    parts = [layout.take(by_head, rank) for rank in range(peers.size)]
    send = torch.cat([part.reshape(-1) for part in parts])
    tokens = layout.lengths[peers.rank]
    sizes = [number * batch * tokens * dim for number in heads]
    received = peers.all_to_all(send, ([part.numel() for part in parts], sizes), "output")
    return received.view(sum(heads), batch, tokens, dim).transpose(0, 1)


def _compute(
    query: Tensor, key: Tensor, value: Tensor, request: Request, heads: tuple[Share, int, int], peers: Peers
) -> AttentionOutput:
    """Own heads over the whole sequence."""
    own, total, kv_heads = heads
    group = total // max(1, kv_heads)
    calls = []
    for share in calls_of(own, group):
        q, at = query[:, _within(share.query, own.query)], _within(share.key, own.key)
        calls.append(_Call(share, q, key[:, at], value[:, at], request.of_heads(share.query, total)))
    predicted = [call.request.predict(call.query, call.key) for call in calls]
    if _decide_together(request, peers.size, (total, kv_heads), query):
        visited = _visited(calls, [mask for mask, _ in predicted], request, (key, kv_heads), peers)
        results = [
            _with_witness(call, mask, visited[:, call.share.key])
            for call, (mask, _) in zip(calls, predicted, strict=True)
        ]
    else:
        results = [
            call.request.attend(call.query, call.key, call.value, mask, prepared=prepared)
            for call, (mask, prepared) in zip(calls, predicted, strict=True)
        ]
    if not results:  # more ranks than heads: there is nothing to do here
        plain = Request(request.layouts, precision=request.precision, backend=request.backend)
        return plain.attend(query, key, value, None)
    return joined_heads(results)


class _Call(NamedTuple):
    share: Share
    query: Tensor
    key: Tensor
    value: Tensor
    request: Request


def _within(part: slice, whole: slice) -> slice:
    return slice(part.start - whole.start, part.stop - whole.start)


def _decide_together(request: Request, ranks: int, heads: tuple[int, int], query: Tensor) -> bool:
    """Whether ranks must tell each other which keys they visit.

    What is rounded to 8 bit depends on the keys that all query heads of a group visit, on several ranks perhaps.
    Not after `Sparge` on a GPU, which has rounded by all keys when it predicted.
    """
    total, kv_heads = heads
    sparse = request.predictor is not None or request.block_mask is not None
    by_all = isinstance(request.predictor, Sparge) and not query.is_cpu
    split = any(rank * total // ranks % (total // kv_heads) for rank in range(ranks))
    return sparse and split and request.precision != "full" and not by_all


def _visited(
    calls: Sequence[_Call],
    masks: Sequence[BlockMask | None],
    request: Request,
    keys: tuple[Tensor, int],
    peers: Peers,
) -> Tensor:
    """For every 64-key tile some 64 query rows of its group that visit it, on any rank, counted from 1; 0 for none.

    int32 `[batch, kv_heads, tiles]`; `keys` are the key of this rank's heads and how many heads there are on all.
    """
    q_layout, kv_layout = request.layouts
    key, kv_heads = keys
    places = places_of(q_layout.length, kv_layout.length, request.segments, key.device)
    found = torch.zeros(
        key.shape[0], kv_heads, geometry.num_blocks(kv_layout.length, TILE), dtype=torch.int32, device=key.device
    )
    for call, mask in zip(calls, masks, strict=True):
        assert mask is not None
        block_q, block_kv = mask.block_size
        kept = mask.to_dense() & places.seen(mask.block_size, request.causal, request.window)
        by_group = torch.unflatten(kept.expand(*call.query.shape[:2], -1, -1), 1, (call.key.shape[1], -1)).any(2)
        rows = torch.arange(mask.grid[0], dtype=torch.int32, device=key.device) * (block_q // TILE) + 1
        last = torch.where(by_group, rows[:, None], 0).amax(2).repeat_interleave(block_kv // TILE, -1)
        own = found[:, call.share.key]
        torch.maximum(own, last[..., : own.shape[2]], out=own)
    return peers.all_reduce(found, "summaries", largest=True)


def _with_witness(call: _Call, mask: BlockMask | None, visited: Tensor) -> AttentionOutput:
    """The call with one more query head in every group, which visits once what the group visits on any rank.

    The engine then rounds keys and values by all that the group visits, and the witness is thrown away.
    """
    assert mask is not None
    (batch, heads, _, _), kv_heads, device = call.query.shape, call.key.shape[1], call.query.device
    q_blocks, kv_blocks = mask.grid
    rows = torch.where(visited > 0, (visited - 1) * TILE // mask.block_size[0], q_blocks)
    columns = torch.arange(visited.shape[2], device=device) * TILE // mask.block_size[1]
    table = torch.zeros(batch, kv_heads, (q_blocks + 1) * kv_blocks, dtype=torch.bool, device=device)
    table = table.scatter(2, rows.to(torch.int64) * kv_blocks + columns, True)
    table = torch.unflatten(table, 2, (q_blocks + 1, kv_blocks))[:, :, :q_blocks]

    def beside(own: Tensor, witness: Tensor, dim: int = 1) -> Tensor:
        by_group = torch.unflatten(own, dim, (kv_heads, -1))
        return torch.cat([by_group, witness.unsqueeze(dim + 1)], dim + 1).flatten(dim, dim + 1)

    def without(both: Tensor) -> Tensor:
        return torch.unflatten(both, 1, (kv_heads, -1))[:, :, :-1].flatten(1, 2)

    request = call.request
    if request.pv_threshold is not None:
        threshold = per_head(request.pv_threshold, heads, "pv_threshold", device)
        request = replace(request, pv_threshold=beside(threshold, threshold.new_ones(kv_heads), 0))
    if request.sink_logits is not None:
        sinks = request.sink_logits
        request = replace(request, sink_logits=beside(sinks, sinks.new_zeros(kv_heads), 0))
    dense = beside(mask.to_dense().expand(batch, heads, -1, -1), table)
    query = beside(call.query, torch.zeros_like(call.query[:, :kv_heads]))
    both = BlockMask.from_dense(dense, mask.block_size, mask.seq_lens)
    result = request.attend(query, call.key, call.value, both)
    assert result.stats is not None
    stats = result.stats.with_counts(without(result.stats.counts))
    return AttentionOutput(without(result.output), without(result.lse), stats)


def joined_heads(results: Sequence[AttentionOutput]) -> AttentionOutput:
    """Results of some heads after those of others."""
    if len(results) == 1:
        return results[0]
    output, lse = torch.cat([result.output for result in results], 1), torch.cat([result.lse for result in results], 1)
    first = results[0].stats
    assert first is not None
    counts = torch.cat([result.stats.counts for result in results if result.stats is not None], 1)
    return AttentionOutput(output, lse, first.with_counts(counts))
