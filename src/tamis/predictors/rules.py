"""Three rules that turn estimated shares of attention into blocks: cdf, topk and floor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tamis.predictors.base import Setting
from tamis.predictors.search import Search
from tamis.predictors.view import View


@dataclass(frozen=True, kw_only=True)
class Ranked(Search):
    """A predictor that estimates every block's share of its rows' attention and keeps by `cdf`, `topk` or `floor`.

    The settings are those of the predictors made from it; several together keep the union.
    """

    SHARES: ClassVar[dict[str, str]] = {"cdf": "in (0, 1]", "topk": "in (0, 1]", "floor": "in (0, 1]"}
    DEFAULT: ClassVar[tuple[str, float]]

    cdf: Setting | None = None
    topk: Setting | None = None
    floor: Setting | None = None

    def __post_init__(self) -> None:
        if self.cdf is None and self.topk is None and self.floor is None:
            object.__setattr__(self, *self.DEFAULT)
        super().__post_init__()


def keep_by_rule(shares: Tensor, view: View) -> Tensor:
    """Blocks to keep, bool, from shares `[batch, group, q_blocks, kv_blocks]` and settings cdf, topk, floor.

    Shares need not add up to 1. A row of which nothing is known, NaN or no share at all, keeps all its blocks.
    """
    shares = torch.where(view.seen, shares, 0.0)
    shares = shares / shares.sum(-1, keepdim=True)
    kept = ~shares.isfinite()
    shares = torch.where(view.seen, shares, -1.0)
    largest = shares.amax(-1, keepdim=True)
    cdf, topk, floor = (setting[:, None, None] for setting in view.settings)
    kept |= shares >= (torch.minimum(largest, floor) if view.given[2] else largest)
    if not (view.given[0] or view.given[1]):
        return kept
    ordered, order = shares.sort(dim=-1, descending=True, stable=True)
    by_order = torch.zeros_like(kept)
    if view.given[0]:
        mass = ordered.clamp(min=0.0)
        by_order |= ((mass.cumsum(-1) - mass) < cdf) | (cdf >= 1)
    if view.given[1]:
        place = torch.arange(shares.shape[-1], device=shares.device)
        by_order |= place < share_of(topk, view.seen.sum(-1, keepdim=True))
    return kept | torch.zeros_like(kept).scatter(-1, order, by_order)


def share_of(share: Tensor, number: Tensor) -> Tensor:
    """`share` of a number, rounded up, fp64."""
    # The small term takes back what fp32 adds to decimal fractions: 0.1 of 30 is 3 blocks, not 4.
    return torch.ceil((share.to(torch.float64) - 1e-6) * number)
