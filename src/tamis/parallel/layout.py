"""Which rank holds which tokens: sequence parallelism's one description of where things are.

A rank's tokens are runs of the whole sequence, one after another. Everything is a case of this: equal or unequal
shards, joint text and video (each rank holds its share of the text, then its share of the video), and zig-zag.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


class Run(NamedTuple):
    """`length` tokens from `start` on, in the order of the whole sequence."""

    start: int
    length: int


@dataclass(frozen=True)
class Layout:
    """Runs of the whole sequence that each rank holds, in the rank's own order.

    Args:
        ranks: for every rank its runs (start, length); together they cover the sequence exactly once.

    Make one with `contiguous`, `parts` or `zigzag`, or exchange one between the ranks with `exchange_layout`.

    Raises:
        ValueError: runs overlap, leave something out, or are negative.

    Example:
        >>> from tamis.parallel import Layout
        >>> Layout.parts([(2, 3), (1, 3)]).ranks  # text, then video: first the text of all ranks, then all video
        ((Run(start=0, length=2), Run(start=3, length=3)), (Run(start=2, length=1), Run(start=6, length=3)))
    """

    ranks: tuple[tuple[Run, ...], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranks", tuple(_joined(runs) for runs in self.ranks))
        if not self.ranks:
            raise ValueError("a layout needs at least one rank")
        end = 0
        for start, length in sorted(run for runs in self.ranks for run in runs):
            if start != end or length < 0:
                raise ValueError(
                    f"runs must cover the sequence once: one of length {length} starts at {start}, not {end}"
                )
            end = start + length

    @staticmethod
    def contiguous(lengths: Sequence[int]) -> Layout:
        """Shards of these lengths, one rank after another."""
        return Layout.parts([(length,) for length in lengths])

    @staticmethod
    def parts(lengths: Sequence[Sequence[int]]) -> Layout:
        """Each rank holds its share of every part, e.g. of text and of video, whose lengths are `lengths[rank]`.

        The whole sequence is the first part of all ranks, then the second part of all ranks, and so on.
        """
        if len({len(own) for own in lengths}) > 1:
            raise ValueError(f"every rank must have the same parts, got {[tuple(own) for own in lengths]}")
        start, ranks = 0, [list[Run]() for _ in lengths]
        for part in zip(*lengths, strict=True):
            for runs, length in zip(ranks, part, strict=True):
                runs.append(Run(start, length))
                start += length
        return Layout(tuple(map(tuple, ranks)))

    @staticmethod
    def even(length: int, ranks: int) -> Layout:
        """Shards as `torch.chunk` and DTensor's `Shard` cut them: equal ones, then shorter and empty ones."""
        size = -(-length // ranks)
        return Layout.contiguous([min(size, max(0, length - rank * size)) for rank in range(ranks)])

    @staticmethod
    def zigzag(length: int, ranks: int, *, multiple: int = 128) -> Layout:
        """Rank r holds chunks r and 2 * ranks - 1 - r: under causality every rank then has the same work.

        Chunks begin at multiples of `multiple` tokens, so that no block of a mask is cut.
        """
        bounds = _cuts(length, 2 * ranks, multiple)
        chunks = [Run(start, stop - start) for start, stop in itertools.pairwise(bounds)]
        return Layout(tuple((chunks[rank], chunks[-1 - rank]) for rank in range(ranks)))

    @staticmethod
    def blocks(length: int, ranks: int, *, multiple: int = 128) -> Layout:
        """Equal shards that begin at multiples of `multiple` tokens."""
        bounds = _cuts(length, ranks, multiple)
        return Layout.contiguous([stop - start for start, stop in itertools.pairwise(bounds)])

    @cached_property
    def length(self) -> int:
        """Tokens of the whole sequence."""
        return sum(self.lengths)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of every rank."""
        return tuple(sum(run.length for run in runs) for runs in self.ranks)

    def take(self, whole: Tensor, rank: int, dim: int = -2) -> Tensor:
        """A rank's tokens of a whole sequence, which runs along `dim`."""
        return torch.cat([whole.narrow(dim, *run) for run in self.ranks[rank] or (Run(0, 0),)], dim)

    def put(self, shards: Sequence[Tensor], dim: int = -2) -> Tensor:
        """The whole sequence from the tokens of all ranks."""
        pieces = {}
        for runs, shard in zip(self.ranks, shards, strict=True):
            at = 0
            for start, length in runs:
                pieces[start] = shard.narrow(dim, at, length)
                at += length
        ordered = [pieces[start] for start in sorted(pieces)] or [shards[0]]
        return ordered[0] if len(ordered) == 1 else torch.cat(ordered, dim)

    def positions(self, rank: int, device: torch.device) -> Tensor:
        """Where a rank's tokens stand in the whole sequence, int64 `[tokens]`."""
        runs = [torch.arange(start, start + length, device=device) for start, length in self.ranks[rank]]
        return torch.cat(runs) if runs else torch.zeros(0, dtype=torch.int64, device=device)


def _joined(runs: Sequence[tuple[int, int]]) -> tuple[Run, ...]:
    """The same tokens in as few runs as can be: layouts that say the same are equal."""
    joined: list[Run] = []
    for start, length in runs:
        if joined and length and sum(joined[-1]) == start:
            joined[-1] = Run(joined[-1].start, joined[-1].length + length)
        elif length:
            joined.append(Run(start, length))
    return tuple(joined)


def _cuts(length: int, chunks: int, multiple: int) -> list[int]:
    """Bounds of nearly equal chunks at multiples of a number."""
    whole = -(-length // multiple)
    return [min(length, chunk * whole // chunks * multiple) for chunk in range(chunks)] + [length]
