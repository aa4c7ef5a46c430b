"""Random: blocks drawn by lot, what any method has to beat."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tamis.predictors.base import Setting
from tamis.predictors.rules import share_of
from tamis.predictors.search import Search, SearchOp, search_op
from tamis.predictors.view import View


@dataclass(frozen=True)
class Random(Search):
    """Keep a share of each row's visible blocks, chosen by lot.

    What is always kept (diagonal, sink, ranges) is part of the share, and more than the share if there is more of it.

    Args:
        density: share of the visible blocks of each row to keep, in (0, 1], rounded up; one number or one per head.
        seed: same seed, same mask, on every device.
        sink: always keep the first key block.
        keep: further ranges, as in `Sparge`.

    Raises:
        ValueError, TypeError: a setting is out of its range.

    Example:
        >>> import torch, tamis
        >>> query, key = torch.randn(1, 4, 1024, 64), torch.randn(1, 4, 1024, 64)
        >>> tamis.Random(0.25)(query, key).density()
        0.25
    """

    SHARES: ClassVar[dict[str, str]] = {"density": "in (0, 1]"}
    COUNTS: ClassVar[dict[str, tuple[int, int]]] = {"seed": (0, 2**62)}
    OP: ClassVar[SearchOp]

    density: Setting
    seed: int = 0


def _random(view: View, counts: Sequence[int]) -> Tensor:
    density = view.settings[0][:, None, None]
    # One stream per seed and key head; torch's CPU generator is the same everywhere.
    seed = random.Random(f"{counts[0]} {view.heads.start}").getrandbits(63)
    lots = torch.rand(view.seen.shape, generator=torch.Generator().manual_seed(seed)).to(view.seen.device)
    lots = torch.where(view.seen, lots + view.must, -1.0)
    order = lots.sort(dim=-1, descending=True, stable=True).indices
    number = share_of(density, view.seen.sum(-1, keepdim=True))
    kept = (torch.arange(lots.shape[-1], device=lots.device) < number).expand(lots.shape)
    return torch.zeros_like(view.seen, memory_format=torch.contiguous_format).scatter(-1, order, kept)


Random.OP = search_op("random", _random)
