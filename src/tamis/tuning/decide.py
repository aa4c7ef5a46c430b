"""From what trials showed to the stages of a profile."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from tamis.profile import Evidence, LayerSettings, Stage
from tamis.tuning.candidates import predictor_of
from tamis.tuning.evaluate import DENSE_RUN, Trial
from tamis.tuning.run import Place, Results


class Decision(NamedTuple):
    """What a layer gets: settings for all heads, the precision they run in, and what they did when they were tried.

    With `DENSE_RUN` as its precision the layer runs dense.
    """

    trial: Trial
    precision: str
    evidence: Evidence


def decide(tried: Sequence[Trial], picks: Tensor, found: Mapping[str, Tensor], precision: str) -> Decision:
    """The decision that gives each head one of the trials.

    Args:
        picks: number of the trial for each head.
        found: what the trials did, `[samples, trials, heads]` each.
    """
    heads = range(picks.shape[0])
    numbers = picks.tolist()
    trial = Trial(
        tuple(tried[numbers[head]].heads[head] for head in heads),
        tuple(tried[numbers[head]].thresholds[head] for head in heads),
    )
    l1, density = (found[name][:, picks, heads] for name in ("l1", "density"))
    evidence = Evidence(_tuple(density.mean(0)), _tuple(l1.mean(0)), _tuple(l1.amax(0)), l1.shape[0])
    return Decision(trial, precision, evidence)


def with_held_out(decision: Decision, found: Mapping[str, Tensor]) -> Decision:
    """A decision with what its settings did on other inputs, `[samples, 1, heads]`."""
    l1, density = found["l1"][:, 0], found["density"][:, 0]
    evidence = replace(
        decision.evidence,
        held_out_density=_tuple(density.mean(0)),
        held_out_l1=_tuple(l1.mean(0)),
        held_out_l1_worst=_tuple(l1.amax(0)),
        held_out_samples=l1.shape[0],
    )
    return decision._replace(evidence=evidence)


def stages(
    decisions: Mapping[Place, Decision], held_out: Results, bounds: Sequence[int]
) -> dict[str, tuple[Stage, ...]]:
    """The layers of a profile; a stage in which a layer was not seen runs dense."""
    ends = [0, *bounds, None]
    layers: dict[str, tuple[Stage, ...]] = {}
    for layer in dict.fromkeys(place.layer for place in decisions):
        found = []
        for number, (first, last) in enumerate(itertools.pairwise(ends)):
            place = Place(layer, number)
            assert first is not None
            if place not in decisions:
                found.append(Stage(LayerSettings(None), first, last))
                continue
            decision = decisions[place]
            if place in held_out:
                decision = with_held_out(decision, held_out[place])
            found.append(Stage(_settings(decision), first, last, decision.evidence))
        layers[layer] = tuple(found)
    return layers


def _settings(decision: Decision) -> LayerSettings:
    if decision.precision == DENSE_RUN:
        return LayerSettings(None)
    heads, thresholds = decision.trial
    return LayerSettings(predictor_of(heads), None if decision.trial.off else thresholds, decision.precision)


def _tuple(values: Tensor) -> tuple[float, ...]:
    return tuple(float(torch.round(value, decimals=6)) for value in values)
