"""Keys in 8 bit have one mean, however many ranks share them.

Smoothing subtracts from every key of a head the mean of those that some query of its group visits. Where no rank sees
all of these queries, or all of these keys, the ranks agree on it first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tamis import geometry
from tamis.backends import base
from tamis.call import make_call
from tamis.packed import PackedKV
from tamis.parallel.wire import Peers

TILE = 64


def backend_of(query: Tensor, key: Tensor, value: Tensor, precision: str, backend: str | None) -> str:
    """The backend that serves such a call."""
    few = (tensor[:, :, : geometry.TILE_ROWS] for tensor in (query, key, value))
    return base.choose(make_call(*few, precision=precision), backend)


def used_tiles(kept: Tensor, kv_heads: int, block_kv: int, kv_len: int) -> Tensor:
    """64-key tiles that a query block of a group visits, uint8 `[batch, kv_heads, tiles]`; `kept` is a block table."""
    used = torch.unflatten(kept.any(2), 1, (kv_heads, -1)).any(2)
    return used.repeat_interleave(block_kv // TILE, -1)[..., : geometry.num_blocks(kv_len, TILE)].to(torch.uint8)


def mean_over_ranks(key: Tensor, segments: Tensor | None, used: Tensor | None, peers: Peers) -> Tensor:
    """Mean of the finite keys of all ranks with a segment >= 0 in used tiles, fp32 `[batch, kv_heads, head_dim]`.

    `key`, `segments` and `used` are of this rank's keys, whose tiles are whole tiles of the sequence.
    """
    x = key.to(torch.float32)
    counts = x.isfinite().all(-1)
    if segments is not None:
        counts = counts & (segments >= 0)[:, None]
    if used is not None:
        counts = counts & (used > 0).repeat_interleave(TILE, -1)[..., : key.shape[2]]
    # In fp64: the order of the ranks then moves the mean by less than fp32 can show.
    total = torch.where(counts[..., None], x, 0.0).sum(2, dtype=torch.float64)
    both = torch.cat([total, counts.sum(2, dtype=torch.float64)[..., None]], -1)
    both = peers.all_reduce(both, "summaries")
    return (both[..., :-1] / both[..., -1:].clamp(min=1)).to(torch.float32)


def packed_with(key: Tensor, value: Tensor, mean: Tensor, segments: Tensor | None, backend: str) -> PackedKV:
    """Key and value in 8 bit, the key less this mean; for reading only, since it keeps no unfinished block."""
    tensors = base.pack_kv(key, value, mean, segments, backend)
    return unpacked([*tensors, mean], key.shape[2], backend)


def unpacked(tensors: list[Tensor], length: int, backend: str) -> PackedKV:
    """A `PackedKV` of tensors that came from one."""
    empty = tensors[6].new_zeros(0)
    return PackedKV(tensors, length, base.mixed(tensors[6].shape[-1], backend), (empty, empty), backend)
