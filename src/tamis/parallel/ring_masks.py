"""Which blocks a ring computes: chosen over the whole sequence, from summaries that are small enough to gather.

A rank's blocks are whole blocks of the sequence, so the mean and the similarity of a block are computed by one rank,
and each rank chooses for its own queries among all keys. What is chosen is what one process chooses.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch
from torch import Tensor

from tamis import geometry
from tamis.backends import base
from tamis.block_mask import dense_blocks, may_trim
from tamis.call import per_head
from tamis.parallel.layout import Layout
from tamis.parallel.places import Places
from tamis.parallel.request import Request
from tamis.parallel.smoothing import backend_of, mean_over_ranks
from tamis.parallel.wire import Peers
from tamis.predictors import Sparge, Window
from tamis.predictors.base import Keep, touched_blocks


class Kept(NamedTuple):
    """Blocks that own queries visit, bool `[batch | 1, heads | 1, own q_blocks, kv_blocks]`, or None for all."""

    table: Tensor | None
    block_size: tuple[int, int]
    heads: int


def kept_blocks(query: Tensor, key: Tensor, own: Places, request: Request, kv_layout: Layout, peers: Peers) -> Kept:
    """The blocks of own queries, among all keys."""
    heads, predictor, mask = query.shape[1], request.predictor, request.block_mask
    if predictor is None and mask is None:
        return Kept(None, geometry.DEFAULT_BLOCK_SIZE, heads)
    if predictor is None and mask is not None:
        rows = _block_numbers(own.q_positions - _first(request), mask.block_size[0])
        table = dense_blocks(mask.kv_num_blocks[:, :, rows], mask.kv_indices[:, :, rows], mask.grid[1])
        return Kept(table, mask.block_size, heads)
    block_size = geometry.DEFAULT_BLOCK_SIZE
    if isinstance(predictor, Sparge):
        table = _sparge(predictor, query, key, own, request, kv_layout, peers)
    else:
        assert isinstance(predictor, Window)  # or it was refused
        table = _window(predictor, query, key, own, request)
    return Kept(table, block_size, heads)


def _first(request: Request) -> int:
    """Position of the first query of the whole sequence."""
    return request.layouts[1].length - request.layouts[0].length


def _block_numbers(tokens: Tensor, block: int) -> Tensor:
    """Blocks that own tokens `[1, tokens]` fill."""
    return tokens[0, ::block] // block


def _must(keep: Keep | None, own: Places, request: Request, block_size: tuple[int, int], *, diagonal: bool) -> Tensor:
    """Blocks that are kept whatever their score, bool `[batch | 1, 1, own q_blocks, kv_blocks]`."""
    keep = Keep() if keep is None else keep
    (q_len, kv_len), device = (layout.length for layout in request.layouts), own.q_positions.device
    rows = touched_blocks(keep.queries, q_len, block_size[0], device)
    rows = rows[_block_numbers(own.q_positions - _first(request), block_size[0])]
    columns = touched_blocks(keep.keys, kv_len, block_size[1], device)
    table = (rows[:, None] | columns)[None]
    if diagonal:
        table = table | geometry.same_position_blocks(*own, block_size)
    return table[:, None]


def _window(predictor: Window, query: Tensor, key: Tensor, own: Places, request: Request) -> Tensor:
    """`Window` reads no token: keys that are not here are of no matter to it."""
    block_size = geometry.DEFAULT_BLOCK_SIZE
    keep = predictor.keep if isinstance(predictor.keep, Keep) else Keep()
    keys = key.new_zeros(1).expand(*key.shape[:2], request.layouts[1].length, key.shape[3])
    segments = None if own.q_segments is None else (own.q_segments, own.kv_segments)
    mask = dataclasses.replace(predictor, keep=Keep(keys=keep.keys))(
        query,
        keys,
        causal=request.causal,
        window=request.window,
        positions=(own.q_positions, own.kv_positions),
        segments=segments,
        backend=request.backend,
    )
    seen = own.seen(block_size, request.causal, request.window)
    return mask.to_dense() | (_must(Keep(queries=keep.queries), own, request, block_size, diagonal=False) & seen)


def _sparge(
    predictor: Sparge, query: Tensor, key: Tensor, own: Places, request: Request, kv_layout: Layout, peers: Peers
) -> Tensor:
    """The steps of `Sparge`, with key means and similarities from all ranks."""
    block_q, block_kv = block_size = geometry.DEFAULT_BLOCK_SIZE
    name = backend_of(query, key, key, "full", request.backend)
    segments = own.of(None, kv_layout.positions(peers.rank, key.device)).kv_segments
    mean = mean_over_ranks(key, segments, None, peers)
    summary = base.summarize(key, block_kv, mean, segments, name)
    k_means, k_similarity = _gathered(summary, kv_layout, block_kv, peers)
    q_means, q_similarity = base.summarize(query, block_q, None, own.q_segments, name)
    heads, device = query.shape[1], query.device
    cdf, topk = (
        None if setting is None else per_head(setting, heads, label, device)
        for setting, label in ((predictor.cdf, "cdf"), (predictor.topk, "topk"))
    )
    keep = predictor.keep if isinstance(predictor.keep, Keep) else None
    lists = base.select(
        q_means,
        q_similarity,
        k_means,
        k_similarity,
        request.scale if request.scale is not None else 1.0 / math.sqrt(query.shape[3]),
        cdf,
        topk,
        per_head(predictor.similarity, heads, "similarity", device),
        predictor.sink,
        request.causal,
        request.window,
        query.shape[2],
        kv_layout.length,
        block_q,
        block_kv,
        *own.bounds(block_size),
        None,
        _must(keep, own, request, block_size, diagonal=request.causal),
        may_trim(device),
        name,
    )
    return dense_blocks(*lists, k_means.shape[2])


def _gathered(summary: tuple[Tensor, Tensor], layout: Layout, block: int, peers: Peers) -> tuple[Tensor, Tensor]:
    """Means and similarities of the key blocks of all ranks, in the order of the sequence."""
    means, similarity = summary
    both = torch.cat([means, similarity[..., None]], -1).movedim(2, 0).contiguous()
    width = math.prod(both.shape[1:])
    numbers = [geometry.num_blocks(tokens, block) for tokens in layout.lengths]
    shards = peers.all_gather(both.view(-1), [number * width for number in numbers], "summaries")
    blocks = torch.cat([shard.view(number, *both.shape[1:]) for number, shard in zip(numbers, shards, strict=True)])
    at = torch.cat([layout.positions(rank, both.device)[::block] // block for rank in range(peers.size)])
    ordered = torch.empty_like(blocks)
    ordered[at] = blocks
    ordered = ordered.movedim(0, 2)
    return ordered[..., :-1].contiguous(), ordered[..., -1].contiguous()
