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


class Search:
    """The state of a search.

    Args:
        l1: largest relative L1 of a head by its mask, and pv_l1 with stage 2.
        thresholds: of stage 2 that are tried, natural units.
    """

    def __init__(self, l1: float, pv_l1: float, thresholds: Sequence[float] = THRESHOLDS) -> None:
        self._l1, self._pv_l1, self._thresholds = l1, pv_l1, tuple(thresholds)
        self._worst: Tensor | None = None
        self._failed: list[set[tuple[Candidate, float]]] = []

    def add(self, call: LayerCall) -> list[Found]:
        """Look at a call and settle every head.

        Raises:
            ValueError: the call has another number of heads than those before.
        """
        rows = sample_rows(call, _ROWS)
        survey = frontier(call, masks(call, CANDIDATES, rows, None), rows)
        heads = survey.l1.shape[1]
        if self._worst is None:
            self._worst, self._failed = survey.l1, [set() for _ in range(heads)]
        elif self._worst.shape[1] != heads:
            raise ValueError(f"this call has {heads} heads, those before had {self._worst.shape[1]}")
        self._worst = torch.maximum(self._worst, survey.l1)
        rungs = [self._rungs(self._worst[:, head], survey.density[:, head]) for head in range(heads)]
        return self._try(call, rungs)

    def _rungs(self, worst: Tensor, density: Tensor) -> list[Candidate]:
        """The sparsest candidate within each share of the bound, and DENSE."""
        found = []
        for share in _SHARES:
            held = worst <= self._l1 * share
            held[-1] = True
            found.append(CANDIDATES[int(torch.where(held, density, torch.inf).argmin())])
        return [*found, DENSE]

    def _try(self, call: LayerCall, rungs: Sequence[Sequence[Candidate]]) -> list[Found]:
        alone = math.inf in self._thresholds
        trials = [
            Trial(tuple(rung), (threshold,) * len(rung))
            for rung in zip(*rungs, strict=True)
            for threshold in self._thresholds
        ]
        outcome = evaluate(call, trials, "int8", None)
        found = []
        for head, failed in enumerate(self._failed):
            best = Found(DENSE, math.inf, 1.0)
            for trial, l1, density in zip(
                trials, outcome.l1[:, head].tolist(), outcome.density[:, head].tolist(), strict=True
            ):
                candidate, threshold = trial.heads[head], trial.thresholds[head]
                if l1 > (self._l1 if threshold == math.inf or not alone else self._pv_l1):
                    failed.add((candidate, threshold))
                ok = not failed & {(candidate, threshold), (candidate, math.inf)}
                if ok and density < best.density:
                    best = Found(candidate, threshold, density)
            found.append(best)
        return found
