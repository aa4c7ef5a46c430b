"""Which settings a layer runs with: from one predictor or a profile, and from a schedule over steps and layers."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from tamis.errors import UnsupportedError
from tamis.integrations.settings import check_predictor
from tamis.predictors.base import Predictor
from tamis.predictors.sparge import Sparge
from tamis.profile import LayerSettings, Profile


@dataclass(frozen=True)
class Schedule:
    """What runs dense, or with another predictor, depending on the layer and on the step of a diffusion model.

    Args:
        dense_steps: the first so many steps run dense.
        dense_layers: the first so many attention layers of the model, or the named ones, run dense.
        predictors: from a step on, another predictor, as `{step: predictor}`; a number in (0, 1] stands for
            `Sparge(topk=number)`. Before the first of these steps the predictor given to `apply` runs.
        calls_per_step: how often a layer is called in one step (2 where the guided and the unguided image are separate
            calls), so that steps are counted from the calls since `handle.start()`. None: the steps are set with
            `handle.step = i`, or known from the scheduler of a diffusers pipeline. A language model has one step, 0.

    Raises:
        TypeError, ValueError: a setting has the wrong type or is out of its range.

    Example:
        >>> from tamis.integrations.schedule import Schedule
        >>> schedule = Schedule(dense_steps=2, dense_layers=1, predictors={10: 0.25}, calls_per_step=2)
        >>> schedule.predictors[10].topk
        0.25
    """

    dense_steps: int = 0
    dense_layers: int | Sequence[str] = 0
    predictors: Mapping[int, Predictor | float] = field(default_factory=dict)
    calls_per_step: int | None = None

    def __post_init__(self) -> None:
        _check_count(self.dense_steps, "dense_steps", 0)
        if self.calls_per_step is not None:
            _check_count(self.calls_per_step, "calls_per_step", 1)
        if isinstance(self.dense_layers, (int, str)) or not isinstance(self.dense_layers, Sequence):
            _check_count(self.dense_layers, "dense_layers", 0)
        else:
            object.__setattr__(self, "dense_layers", tuple(self.dense_layers))
        if not isinstance(self.predictors, Mapping):
            raise TypeError(f"predictors must be a mapping from steps, got {type(self.predictors).__name__}")
        found: dict[int, Predictor] = {}
        for step, given in self.predictors.items():
            _check_count(step, "predictors: a step", 0)
            found[step] = Sparge(topk=given) if isinstance(given, (int, float)) else given
            if not callable(found[step]):
                raise TypeError(f"predictors: step {step} must have a predictor or a number, got {given!r}")
            check_predictor(found[step], f"predictors: step {step}")
        object.__setattr__(self, "predictors", dict(sorted(found.items())))

    def at(self, step: int) -> Predictor | None:
        """The predictor of a step; None before the first that has its own."""
        chosen = None
        for first, predictor in self.predictors.items():
            chosen = predictor if first <= step else chosen
        assert chosen is None or callable(chosen)
        return chosen


def _check_count(number: object, name: str, least: int) -> None:
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"{name} must be an integer, got {number!r}")
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")


@dataclass(frozen=True)
class Choice:
    """Settings of a call, or why it runs dense."""

    settings: LayerSettings
    dense: str | None = None


class Chooser:
    """Chooses the settings of every call of a model.

    Args:
        source: one set of settings for all layers, or a profile.
        schedule: None for none.
        layers: names of the model's attention layers, in the order in which they run.

    Raises:
        ValueError: a name is not a layer of the model, or both source and schedule choose predictors.
    """

    def __init__(self, source: LayerSettings | Profile, schedule: Schedule | None, layers: Sequence[str]) -> None:
        if schedule is not None and not isinstance(schedule, Schedule):
            raise TypeError(f"schedule must be a Schedule, got {type(schedule).__name__}")
        self.source = source
        self.schedule = Schedule() if schedule is None else schedule
        self.step: int | None = None
        self._told = False
        self._calls: Counter[str] = Counter()
        self._by_step = bool(self.schedule.dense_steps or self.schedule.predictors)
        if isinstance(source, Profile):
            source.check(layers)
            if self.schedule.predictors:
                raise ValueError("schedule: predictors must be empty with a profile, which has its own for every step")
            self._by_step = self._by_step or any(
                len(stages) > 1 or stages[0].first > 0 or stages[-1].last is not None
                for stages in source.layers.values()
            )
        given = self.schedule.dense_layers
        if isinstance(given, int) and given > len(layers):
            raise ValueError(f"schedule: dense_layers is {given}, the model has {len(layers)} attention layers")
        self._dense = frozenset(layers[:given] if isinstance(given, int) else given)
        for name in self._dense.difference(layers):
            near = difflib.get_close_matches(name, layers, 3)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise ValueError(f"schedule: the model has no attention layer {name!r}{hint}")

    @property
    def by_layer(self) -> bool:
        """Whether settings or what is counted depend on the layer."""
        return isinstance(self.source, Profile) or bool(self._dense) or self.schedule.calls_per_step is not None

    def start(self) -> None:
        """Count steps from here on, and forget a step that was set."""
        self.step = 0 if self._told else None
        self._calls.clear()

    def tell(self, step: int) -> None:
        """The step that runs now, from someone who tells every one of them."""
        self.step, self._told = step, True

    def choose(self, layer: str) -> Choice:
        """Settings of the next call of a layer.

        Raises:
            ValueError: they depend on the step, and nobody tells it.
            UnsupportedError: they depend on counted steps inside of a compiled graph.
        """
        step = self._next_step(layer) if self._by_step else 0
        if isinstance(self.source, LayerSettings):
            predictor = self.schedule.at(step)
            settings = self.source if predictor is None else replace(self.source, predictor=predictor)
        elif layer not in self.source.layers:
            return Choice(LayerSettings(None), "not in the profile")
        else:
            settings = self.source.at(layer, step)
            if settings.predictor is None:
                return Choice(settings, "dense in the profile")
        if layer in self._dense:
            return Choice(settings, "a dense layer of the schedule")
        if step < self.schedule.dense_steps:
            return Choice(settings, f"one of the first {self.schedule.dense_steps} steps")
        return Choice(settings)

    def _next_step(self, layer: str) -> int:
        if self.step is not None:
            return self.step
        if self.schedule.calls_per_step is None:
            raise ValueError(
                "the settings depend on the step: set handle.step before each step, or give "
                "Schedule(calls_per_step=..) to have calls counted"
            )
        if torch.compiler.is_compiling():
            raise UnsupportedError("calls are not counted in a compiled graph: set handle.step before each step")
        self._calls[layer] += 1
        return (self._calls[layer] - 1) // self.schedule.calls_per_step
