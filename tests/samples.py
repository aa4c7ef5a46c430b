"""Inputs that several test files share."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import tamis


def qkv(
    *,
    batch: int = 1,
    heads: int = 2,
    kv_heads: int | None = None,
    q_len: int = 200,
    kv_len: int | None = None,
    dim: int = 32,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Random normal query, key and value."""
    kv_heads = heads if kv_heads is None else kv_heads
    kv_len = q_len if kv_len is None else kv_len
    value_dim = dim if value_dim is None else value_dim
    return (
        torch.randn(batch, heads, q_len, dim).to(dtype),
        torch.randn(batch, kv_heads, kv_len, dim).to(dtype),
        torch.randn(batch, kv_heads, kv_len, value_dim).to(dtype),
    )


def blocks_needed(seq_lens: tuple[int, int], block_size: tuple[int, int]) -> tuple[int, int]:
    return -(-seq_lens[0] // block_size[0]), -(-seq_lens[1] // block_size[1])


def block_mask(
    seq_lens: tuple[int, int],
    *,
    batch: int = 1,
    heads: int = 1,
    block_size: tuple[int, int] = (128, 64),
    density: float = 0.5,
) -> Any:
    """A random BlockMask."""
    dense = torch.rand(batch, heads, *blocks_needed(seq_lens, block_size)) < density
    return tamis.BlockMask.from_dense(dense, block_size=block_size, seq_lens=seq_lens)


def full_mask(seq_lens: tuple[int, int], block_size: tuple[int, int] = (128, 64)) -> Any:
    """A BlockMask that keeps everything."""
    dense = torch.ones(1, 1, *blocks_needed(seq_lens, block_size), dtype=torch.bool)
    return tamis.BlockMask.from_dense(dense, block_size=block_size, seq_lens=seq_lens)


def assert_reordered(actual: Any, expected: Any, terms: int) -> None:
    """Equal up to the order of fp32 sums of `terms` terms: twice sqrt(terms) roundings of the largest value."""
    for ours, theirs in ((actual.output, expected.output), (actual.lse, expected.lse)):
        finite = theirs.isfinite()
        assert torch.equal(ours[~finite], theirs[~finite])
        limit = 2 * torch.finfo(torch.float32).eps * math.sqrt(terms) * float(theirs[finite].abs().max())
        assert float((ours[finite] - theirs[finite]).abs().max()) <= limit


def same(actual: Any, expected: Any) -> bool:
    """Output and lse are the same bits."""
    return torch.equal(actual.output, expected.output) and torch.equal(actual.lse, expected.lse)
