"""Mode "ring": every rank keeps its queries, and keys and values go around.

Tokens are first brought to chunks that begin at whole blocks (two chunks a rank, zig-zag, if the call is causal),
unless they already are there. Then, as often as there are ranks, a rank attends its queries to the keys it holds, and
passes them on; what it got it merges by log-sum-exp:

    output = sum_j exp(lse_j - lse) output_j,   lse = log sum_j exp(lse_j)

The blocks are chosen once, over the whole sequence (`ring_masks`), and every pair of chunks gets its part of them.

In int8 the bytes that go around are those of a `PackedKV`, made with one mean key for all ranks: key and value are in
8 bit on every device, also for one rank.

Source: Ring Attention (arXiv 2310.01889), section 3; zig-zag: Striped Attention's aim (arXiv 2311.09431) in two chunks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import NoneType
from typing import NamedTuple

import torch
from torch import Tensor

from tamis import geometry
from tamis.attend import attend
from tamis.block_mask import BlockMask, block_lists, may_trim
from tamis.errors import UnsupportedError
from tamis.merge import merge
from tamis.packed import PackedKV
from tamis.parallel.layout import Layout, Run
from tamis.parallel.places import Places, places_of
from tamis.parallel.request import Request
from tamis.parallel.ring_masks import Kept, kept_blocks
from tamis.parallel.smoothing import TILE, backend_of, mean_over_ranks, packed_with, unpacked, used_tiles
from tamis.parallel.wire import Peers
from tamis.predictors import Sparge, Window
from tamis.stats import AttentionOutput

ALIGN = 128  # every block size divides it


def attend_ring(
    query: Tensor, key: Tensor, value: Tensor, request: Request, peers: Peers, *, lse: bool
) -> AttentionOutput:
    """Attention of this rank's tokens; the log-sum-exp goes back to them only if asked for (else it is empty)."""
    given = request.layouts
    layouts = ring_layouts(given, peers.size, request.causal)
    query = move(query, given[0], layouts[0], peers)
    key, value = (move(tensor, given[1], layouts[1], peers) for tensor in (key, value))
    output, logs, stats = _around(query, key, value, request, layouts, peers)
    if request.sink_logits is not None:
        joined = torch.logaddexp(logs, request.sink_logits.to(torch.float32)[:, None])
        output = output * torch.where(logs == float("-inf"), 0.0, torch.exp(logs - joined))[..., None]
        logs = joined
    output = move(output.to(query.dtype), layouts[0], given[0], peers)
    logs = move(logs[..., None], layouts[0], given[0], peers)[..., 0] if lse else logs[:, :0, :0]
    return AttentionOutput(output, logs, stats)


def refuse(request: Request) -> None:
    """Raise for what would depend on the number of ranks, also where there is one."""
    if request.pv_threshold is not None:
        raise UnsupportedError(
            "pv_threshold compares scores with the largest so far, which in a ring depends on the number of ranks: "
            "give pv_threshold=None, or mode='heads'"
        )
    if request.precision == "fp8":
        raise UnsupportedError("precision 'fp8' has scales of all keys, which no rank sees: use 'int8' or mode='heads'")
    if not isinstance(request.predictor, (Sparge, Window, NoneType)):
        raise UnsupportedError(
            f"mode 'ring' gathers what Sparge and Window need, and {type(request.predictor).__name__} reads all keys: "
            "use mode='heads'"
        )


@lru_cache(maxsize=64)
def ring_layouts(given: tuple[Layout, Layout], ranks: int, causal: bool) -> tuple[Layout, Layout]:
    """Where queries and keys have to be: zig-zag under causality, else where they are if that cuts no block."""
    lengths = (given[0].length, given[1].length)
    if not causal and _whole_blocks(given[0]) and _whole_blocks(given[1]):
        return given
    make = Layout.zigzag if causal else Layout.blocks
    q_layout = make(lengths[0], ranks, multiple=ALIGN)
    return q_layout, q_layout if lengths[0] == lengths[1] else make(lengths[1], ranks, multiple=ALIGN)


def _whole_blocks(layout: Layout) -> bool:
    """Whether every rank's blocks of tokens are blocks of the sequence."""
    for runs in layout.ranks:
        if any(run.start % ALIGN for run in runs) or any(run.length % ALIGN for run in runs[:-1]):
            return False
        if runs and runs[-1].length % ALIGN and sum(runs[-1]) != layout.length:
            return False
    return True


def move(x: Tensor, source: Layout, target: Layout, peers: Peers) -> Tensor:
    """Bring tokens `[batch, heads, own tokens, dim]` from one layout to another."""
    if source == target:
        return x
    batch, heads, _, dim = x.shape
    rows = x.permute(2, 0, 1, 3)
    width = batch * heads * dim
    leaving, coming = _routes(source, target, peers.rank)
    parts = [rows[piece.source : piece.source + piece.length].reshape(-1) for some in leaving for piece in some]
    sizes = [[width * sum(piece.length for piece in some) for some in pieces] for pieces in (leaving, coming)]
    tokens = target.lengths[peers.rank]
    send = torch.cat(parts) if parts else x.new_zeros(0)
    received = peers.all_to_all(send, (sizes[0], sizes[1]), "order").view(tokens, batch, heads, dim)
    out = x.new_empty(tokens, batch, heads, dim)
    start = 0
    for piece in (piece for some in coming for piece in some):
        out[piece.target : piece.target + piece.length] = received[start : start + piece.length]
        start += piece.length
    return out.permute(1, 2, 0, 3)


@lru_cache(maxsize=64)
def _routes(source: Layout, target: Layout, rank: int) -> tuple[list[list[Piece]], list[list[Piece]]]:
    """What a rank sends to every rank, and what it gets from each."""
    leaving = [overlaps(source.ranks[rank], runs) for runs in target.ranks]
    return leaving, [overlaps(runs, target.ranks[rank]) for runs in source.ranks]


class Piece(NamedTuple):
    """Tokens that two ranks' runs have in common: where they are in each rank's own order."""

    source: int
    target: int
    length: int


def overlaps(source: Sequence[Run], target: Sequence[Run]) -> list[Piece]:
    """What two ranks have in common, in an order that both find."""
    pieces, source_at = [], 0
    for one in source:
        target_at = 0
        for other in target:
            first, last = max(one.start, other.start), min(sum(one), sum(other))
            if first < last:
                place = (source_at + first - one.start, target_at + first - other.start)
                pieces.append(Piece(*place, last - first))
            target_at += other.length
        source_at += one.length
    return pieces


def _around(
    query: Tensor, key: Tensor, value: Tensor, request: Request, layouts: tuple[Layout, Layout], peers: Peers
) -> AttentionOutput:
    """The ring itself; the output is fp32."""
    q_layout, kv_layout = layouts
    whole = places_of(q_layout.length, kv_layout.length, request.segments, query.device)
    own = whole.of(q_layout.positions(peers.rank, query.device), None)
    kept = kept_blocks(query, key, own, request, kv_layout, peers)
    held = _held(key, value, own, kept, request, kv_layout, peers)
    parcel = held.parcel
    result: AttentionOutput | None = None
    for step in range(peers.size):
        at = (peers.rank - step) % peers.size
        coming = None
        if step + 1 < peers.size:
            coming = peers.shift(parcel, held.size(kv_layout.lengths[at - 1]), "ring")
        try:
            part = _pair(query, held.open(parcel, kv_layout.lengths[at]), own, kept, request, kv_layout, at)
        except Exception:
            if coming is not None:
                coming()  # what was posted ends, or the next call of this group would meet it
            raise
        exact = part.output.to(torch.float32)
        result = part._replace(output=exact) if result is None else _merged(result, exact, part)
        if coming is not None:
            parcel = coming()
    assert result is not None
    return result


def _merged(result: AttentionOutput, output: Tensor, part: AttentionOutput) -> AttentionOutput:
    assert result.stats is not None and part.stats is not None
    both = merge([result.output, output], [result.lse, part.lse])
    return both._replace(stats=result.stats.with_counts(result.stats.counts + part.stats.counts))


def _pair(
    query: Tensor,
    held: tuple[Tensor | PackedKV, Tensor | None],
    own: Places,
    kept: Kept,
    request: Request,
    layout: Layout,
    at: int,
) -> AttentionOutput:
    """Own queries with the keys of a rank."""
    keys = layout.positions(at, query.device)
    places = own.of(None, keys)
    mask = None
    if kept.table is not None:
        table = kept.table[..., keys[:: kept.block_size[1]] // kept.block_size[1]]
        lists = block_lists(table, trim=may_trim(query.device))
        mask = BlockMask(*lists, kept.block_size, (query.shape[2], len(keys)))
    ordered = request.causal or request.window is not None
    segments = None if places.q_segments is None else (places.q_segments, places.kv_segments)
    return attend(
        query,
        *held,
        mask,
        causal=request.causal,
        window=request.window,
        scale=request.scale,
        positions=(places.q_positions, places.kv_positions) if ordered else None,
        segments=segments,
        softcap=request.softcap,
        precision=request.precision,
        compensate=request.compensate,
        backend=request.backend,
    )


@dataclass(frozen=True)
class _Held:
    """A rank's keys and values as the bytes that go around, and how to read another rank's.

    `shapes` are those of this rank's tensors; the third size is its tokens, or its 64-key tiles if `mean` is there.
    """

    parcel: Tensor
    shapes: Sequence[tuple[torch.Size, torch.dtype]]
    mean: Tensor | None
    backend: str

    def size(self, tokens: int) -> int:
        """Bytes of a rank with so many tokens."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self._of(tokens))

    def open(self, parcel: Tensor, tokens: int) -> tuple[Tensor | PackedKV, Tensor | None]:
        """Key and value of a rank with so many tokens."""
        tensors, start = [], 0
        for shape, dtype in self._of(tokens):
            end = start + math.prod(shape) * dtype.itemsize
            tensors.append(parcel[start:end].view(dtype).view(shape))
            start = end
        if self.mean is None:
            return tensors[0], tensors[1]
        return unpacked([*tensors, self.mean], tokens, self.backend), None

    def _of(self, tokens: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        number = tokens if self.mean is None else geometry.num_blocks(tokens, TILE)
        return [((*shape[:2], number, *shape[3:]), dtype) for shape, dtype in self.shapes]


def _held(key: Tensor, value: Tensor, own: Places, kept: Kept, request: Request, layout: Layout, peers: Peers) -> _Held:
    """This rank's keys and values, rounded if the call is in int8."""
    tensors, mean = [key, value], None
    name = backend_of(key, key, value, request.precision, request.backend)
    if request.precision == "int8":
        at = layout.positions(peers.rank, key.device)
        segments = own.of(None, at).kv_segments
        mean = torch.zeros(*key.shape[:2], key.shape[3], dtype=torch.float32, device=key.device)
        if request.softcap is None:
            used = _used(key.shape, own, kept, request, layout, peers)
            mean = mean_over_ranks(key, segments, used[..., at[::TILE] // TILE], peers)
            # Any number near the mean smooths as well, and one with few digits is the same in any order of summing.
            mean = mean.to(torch.bfloat16).to(torch.float32)
        tensors = list(packed_with(key, value, mean, segments, name).tensors[:6])
    parcel = torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in tensors])
    return _Held(parcel, [(tensor.shape, tensor.dtype) for tensor in tensors], mean, name)


def _used(shape: Sequence[int], own: Places, kept: Kept, request: Request, layout: Layout, peers: Peers) -> Tensor:
    """64-key tiles of the whole sequence that some rank's queries visit, uint8 `[batch, kv_heads, tiles]`."""
    visits = own.seen(kept.block_size, request.causal, request.window)
    visits = visits if kept.table is None else visits & kept.table
    visits = visits.expand(shape[0], kept.heads, -1, -1)
    used = used_tiles(visits, shape[1], kept.block_size[1], layout.length)
    return peers.all_reduce(used.contiguous(), "summaries", largest=True)
