"""Frontiers: what the survey says about every other choice.

Of the candidates that were surveyed for a head, those count of which no other is both sparser and more exact. A layer's
frontier, and the model's, is what its heads have in mean if each takes the sparsest candidate within one bound.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from tamis.profile import Profile, Stage


class Survey(Protocol):
    """What a tuning run's survey found: `tamis.tuning.surveys.read`.

    Attributes:
        grid: cdf, topk and similarity of the candidates.
        bounds: the steps at which a new stage starts, without 0.
        found: l1 and density by layer and stage, `[samples, candidates, heads]`.
        run: tells the run, as in the profiles that came from it.
    """

    @property
    def grid(self) -> Sequence[tuple[float, float, float]]: ...
    @property
    def bounds(self) -> Sequence[int]: ...
    @property
    def found(self) -> Mapping[tuple[str, int], Mapping[str, Tensor]]: ...
    @property
    def run(self) -> str: ...


class Point(NamedTuple):
    """A candidate for a head: mean density, mean and largest error over the inputs, and its number in the grid."""

    density: float
    mean: float
    worst: float
    candidate: int


Frontier = list[Point]  # from sparse to dense


def frontiers(found: Mapping[str, Tensor], by: str = "worst") -> list[Frontier]:
    """The frontier of every head of a layer, by the "worst" or by the "mean" of the errors over the inputs."""
    l1 = found["l1"].double()
    columns = [t.T.tolist() for t in (found["density"].double().mean(0), l1.mean(0), l1.amax(0))]
    heads = []
    for density, mean, worst in zip(*columns, strict=True):
        points = [Point(*values, number) for number, values in enumerate(zip(density, mean, worst, strict=True))]
        kept: Frontier = []
        for point in sorted(points, key=lambda point: (point.density, getattr(point, by))):
            if not kept or getattr(point, by) < getattr(kept[-1], by):
                kept.append(point)
        heads.append(kept)
    return heads


def density_within(heads: Sequence[Frontier], bounds: Sequence[float], by: str = "worst") -> list[float]:
    """For each bound the mean density if every head takes its sparsest candidate within it, or its most exact one."""
    total = [0.0] * len(bounds)
    for frontier in heads:
        errors = [-getattr(point, by) for point in frontier]  # ascending
        for index, bound in enumerate(bounds):
            total[index] += frontier[min(bisect.bisect_left(errors, -bound), len(frontier) - 1)].density
    return [size / len(heads) for size in total]


def check(profile: Profile, survey: Survey) -> None:
    """Refuse a survey that is not the one a profile came from.

    Raises:
        ValueError: it lacks a layer, or is of other heads, inputs or steps.
    """
    if profile.run and profile.run != survey.run:
        raise _strange("its model, inputs, grid or version of tamis is another")
    starts = [0, *survey.bounds]
    for name, stages in profile.layers.items():
        if [stage.first for stage in stages] != starts:
            raise _strange(f"its ranges of steps start at {starts}")
        for number, stage in enumerate(stages):
            if stage.evidence is not None:
                _check_stage(name, number, stage, survey)


def _check_stage(name: str, number: int, stage: Stage, survey: Survey) -> None:
    assert stage.evidence is not None
    if (name, number) not in survey.found:
        raise _strange(f"it has no survey of layer {name!r}")
    samples, _, heads = survey.found[name, number]["l1"].shape
    expected = (stage.evidence.samples, len(stage.evidence.density))
    if (samples, heads) != expected:
        raise _strange(
            f"of layer {name!r} it has {samples} samples of {heads} heads, the profile {expected[0]} of {expected[1]}"
        )


def _strange(reason: str) -> ValueError:
    return ValueError(f"the journal is of another run than the profile: {reason}")
