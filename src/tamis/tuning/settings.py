"""From a survey to the settings of every layer: what is tried, and what of it is taken."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tamis.tuning import whole
from tamis.tuning.candidates import DENSE
from tamis.tuning.choose import best, trials, within
from tamis.tuning.decide import Decision, decide
from tamis.tuning.ending import End, weights
from tamis.tuning.evaluate import DENSE_RUN, Trial
from tamis.tuning.run import Place, Results, Run, Task, trial
from tamis.tuning.sources import ModelSource, Source


@dataclass(frozen=True)
class Tuning:
    """What follows from a survey."""

    run: Run
    source: Source
    surveyed: Results
    precision: str
    backend: str | None

    def read(self, phase: str, tried: Mapping[Place, Sequence[Trial]], precision: str, why: str = "") -> Results:
        tasks = {place: self._task(trials, precision) for place, trials in tried.items()}
        return self.run.read(phase, self.source, tasks, why) if tasks else {}

    def _task(self, trials: Sequence[Trial], precision: str) -> Task:
        return Task(trial, (tuple(trials), precision, self.backend))

    def by_head(self, l1: float, pv_l1: float) -> dict[Place, Decision]:
        """Decisions that keep every head within the budget; what rounding alone takes beyond it runs in full precision,
        and what that takes beyond it runs dense.
        """
        tried = {place: trials(within(found["l1"], found["density"], l1)) for place, found in self.surveyed.items()}
        decisions: dict[Place, Decision] = {}
        for kind in dict.fromkeys((self.precision, "full")):
            left = {place: found for place, found in tried.items() if place not in decisions}
            for place, found in self.read("trial", left, kind, self._again(left, kind)).items():
                picks = best(found["l1"], found["density"], l1, pv_l1)
                if picks is not None:
                    decisions[place] = decide(tried[place], picks, found, kind)
        left = {place: [_dense(found[0])] for place, found in tried.items() if place not in decisions}
        for place, found in self.read("trial", left, DENSE_RUN, self._again(left, DENSE_RUN)).items():
            picks = torch.zeros(found["density"].shape[2], dtype=torch.long)
            decisions[place] = decide(left[place], picks, found, DENSE_RUN)
        return {place: decisions[place] for place in self.surveyed}

    def _again(self, left: Mapping[Place, object], kind: str) -> str:
        if kind == self.precision:
            return ""
        how = "dense" if kind == DENSE_RUN else "in full precision"
        return f"{len({place.layer for place in left})} layers {how}: rounding takes a head beyond the budget"

    def by_the_end(self, source: ModelSource, metric: str, size: float) -> tuple[dict[Place, Decision], list[float]]:
        """Decisions for a budget at the end of the model, and its error with them on every input."""
        error = End(source, metric, self.backend, self.run.murmur)
        heads = self._weights(source)
        tried = {place: trials(found) for place, found in whole.rungs(self.surveyed, heads, size).items()}
        outcome = self.read("trial", tried, self.precision)
        return whole.settle(tried, outcome, heads, size, error, self.run.bounds, self.precision)

    def _weights(self, source: ModelSource) -> dict[Place, Tensor]:
        """Weights of the heads of every place, each from the first input that gets there."""
        heads: dict[Place, Tensor] = {}
        for number in range(len(source)):
            if len(heads) == len(self.surveyed):
                break
            found: dict[Place, Tensor] = {}
            for (layer, call), weight in weights(source, number).items():
                place = Place(layer, self.run.stage(call))
                found[place] = found[place] + weight if place in found else weight
            heads = {place: weight for place, weight in found.items() if place in self.surveyed} | heads
        missing = [place.layer for place in self.surveyed if place not in heads]
        if missing:
            raise ValueError(f"layer {missing[0]} has no call of 128 queries within an input's first 1024 tokens")
        return heads

    def held_out(self, source: Source, decisions: Mapping[Place, Decision]) -> Results:
        """What the settings do on other inputs."""
        tasks = {place: self._task([found.trial], found.precision) for place, found in decisions.items()}
        return self.run.read("held out", source, tasks, whole=True)


def _dense(trial: Trial) -> Trial:
    """The same heads, all of them dense."""
    return Trial((DENSE,) * len(trial.heads), (math.inf,) * len(trial.heads))
