"""Which settings are worth running for a head, and which of those it gets."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tamis.tuning.candidates import DENSE, EVERYTHING, GRID, LADDERS, Candidate, between
from tamis.tuning.evaluate import Trial

# Natural log units: a skipped weight was at most exp(-threshold) of its row's largest.
THRESHOLDS = (math.inf, 12.0, 8.0, 6.0, 5.0, 4.0, 3.0, 2.0)


def trials(heads: Sequence[Sequence[Candidate]]) -> list[Trial]:
    """Every rung of the heads' candidates, all heads of a layer together, with every threshold.

    A dense head is dense: with stage 2 its rung is EVERYTHING.
    """
    found = []
    for rung in zip(*heads, strict=True):
        skipping = tuple(EVERYTHING if head == DENSE else head for head in rung)
        for threshold in THRESHOLDS:
            found.append(Trial(rung if threshold == math.inf else skipping, (threshold,) * len(rung)))
    return found


def within(l1: Tensor, density: Tensor, budget: float) -> list[list[Candidate]]:
    """Six candidates for each head, from sparse to DENSE, around the sparsest that stays within a budget.

    Rounding adds to the errors of masks: two safer ones follow. The grid is coarse: two that lie between it and its
    sparser neighbour stand before it.

    Args:
        l1, density: of the candidates of GRID, `[samples, candidates, heads]`.
    """
    worst, mean = l1.amax(0), density.mean(0)
    return [_within(worst[:, head], mean[:, head], budget) for head in range(worst.shape[1])]


def _within(worst: Tensor, density: Tensor, budget: float) -> list[Candidate]:
    def sparsest(share: float) -> Candidate:
        held = worst <= budget * share
        held[-1] = True
        found = int(torch.where(held, density, torch.inf).argmin())
        return GRID[found] if density[found] < density[-1] else DENSE

    best = sparsest(1.0)
    if best == DENSE:
        return [*(sparsest(share) for share in (2.0, 1.5, 1.3, 1.2, 1.1)), DENSE]
    ladder = next(ladder for ladder in LADDERS if best in ladder)
    before = ladder[max(0, ladder.index(best) - 1)]
    finer = [best if before == best else between(before, best, share) for share in (1 / 3, 2 / 3)]
    return [*finer, best, sparsest(0.85), sparsest(0.65), DENSE]


def priced(density: Tensor, harm: Tensor, price: float) -> Tensor:
    """For each head the row with the least density + price * harm, `[heads]`; none whose harm is not finite.

    With one price for all heads no other choice has both a lower density and less harm in sum (Lagrange; Everett 1963).

    Args:
        density, harm: of what can be chosen, `[choices, heads]`; each head has a choice of finite harm.
    """
    return torch.where(harm.isfinite(), density + price * harm, torch.inf).argmin(0)


def best(l1: Tensor, density: Tensor, budget: float, pv_budget: float) -> Tensor | None:
    """For each head the trial with the lowest density within the budgets, `[heads]`; None if a head has none.

    An error that is not a number is within no budget.

    Args:
        l1, density: of `trials`, `[samples, trials, heads]`.
        budget: of the largest error over the samples by the mask alone.
        pv_budget: the same with stage 2.
    """
    worst, mean = l1.amax(0), density.mean(0)
    count = len(THRESHOLDS)
    alone = worst[::count].repeat_interleave(count, 0)  # the same candidates with stage 2 off
    held = (alone <= budget) & (worst <= pv_budget)
    return torch.where(held, mean, torch.inf).argmin(0) if bool(held.any(0).all()) else None
