"""Settings of one attention module from the calls it gets, one after the other: no call is kept.

Of every call all candidates' errors by their masks are surveyed and the worst so far is kept; of those that have held
on all calls a few run on the present one, in the kernel, with every threshold. A head gets the sparsest setting that

- held the first bound by its mask on every call so far, and
- never exceeded a bound in the kernel on a call on which it was tried,

or, if there is none, all blocks. `tamis.tune` tries every setting on every input, and is the better choice where the
model's attention can be hooked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tamis.tuning.calls import LayerCall
from tamis.tuning.candidates import DENSE, GRID, Candidate, masks
from tamis.tuning.choose import THRESHOLDS
from tamis.tuning.evaluate import Trial, evaluate
from tamis.tuning.frontier import frontier, sample_rows

# The authors' state has no topk: candidates with a mass, from sparse to dense.
CANDIDATES: tuple[Candidate, ...] = (*(candidate for candidate in GRID if candidate.topk < 1e-6), DENSE)
_SHARES = (1.0, 0.85, 0.7, 0.5)  # of the bound: rounding and stage 2 need room
_ROWS = 16


class Found(NamedTuple):
    """What a head gets: a candidate, a threshold in natural units (inf = off), and its density on the last call."""

    candidate: Candidate
    threshold: float
    density: float


class Bounds(NamedTuple):
    """Largest relative L1 of a head by its mask, the same with stage 2, and which thresholds of it are tried."""

    l1: float
    pv_l1: float
    thresholds: tuple[float, ...] = THRESHOLDS

    def of(self, threshold: float) -> float:
        """The bound of a trial with this threshold."""
        return self.l1 if threshold == math.inf or math.inf not in self.thresholds else self.pv_l1


class Search:
    """What is known of the calls so far; bounds may change from one to the next."""

    def __init__(self) -> None:
        self._worst: Tensor | None = None
        self._tried: list[dict[tuple[Candidate, float], float]] = []

    def add(self, call: LayerCall, bounds: Bounds) -> list[Found]:
        """Look at a call and settle every head.

        Raises:
            ValueError: the call has another number of heads than those before.
        """
        rows = sample_rows(call, _ROWS)
        survey = frontier(call, masks(call, CANDIDATES, rows, None), rows)
        heads = survey.l1.shape[1]
        if self._worst is None:
            self._worst, self._tried = survey.l1, [{} for _ in range(heads)]
        elif self._worst.shape[1] != heads:
            raise ValueError(f"this call has {heads} heads, those before had {self._worst.shape[1]}")
        self._worst = torch.maximum(self._worst, survey.l1)
        rungs = [_rungs(self._worst[:, head], survey.density[:, head], bounds.l1) for head in range(heads)]
        return self._try(call, rungs, bounds)

    def _try(self, call: LayerCall, rungs: Sequence[Sequence[Candidate]], bounds: Bounds) -> list[Found]:
        trials = [
            Trial(tuple(rung), (threshold,) * len(rung))
            for rung in zip(*rungs, strict=True)
            for threshold in bounds.thresholds
        ]
        outcome = evaluate(call, trials, "int8", None)
        found = []
        for head, worst in enumerate(self._tried):
            best = Found(DENSE, math.inf, 1.0)
            for trial, l1, density in zip(
                trials, outcome.l1[:, head].tolist(), outcome.density[:, head].tolist(), strict=True
            ):
                candidate, threshold = trial.heads[head], trial.thresholds[head]
                worst[candidate, threshold] = max(l1, worst.get((candidate, threshold), 0.0))
                ok = all(worst.get((candidate, some), 0.0) <= bounds.of(some) for some in (threshold, math.inf))
                if ok and density < best.density:
                    best = Found(candidate, threshold, density)
            found.append(best)
        return found


def _rungs(worst: Tensor, density: Tensor, l1: float) -> list[Candidate]:
    """The sparsest candidate within each share of the bound, and DENSE."""
    found = []
    for share in _SHARES:
        held = worst <= l1 * share
        held[-1] = True
        found.append(CANDIDATES[int(torch.where(held, density, torch.inf).argmin())])
    return [*found, DENSE]
