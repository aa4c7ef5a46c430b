"""A profile head by head: settings, evidence, and names that fit under a chart."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tamis.predictors import Sparge
from tamis.predictors.base import Predictor
from tamis.profile import Evidence, LayerSettings, Profile, Stage

OFF = 1e-6  # a cdf or topk so small keeps only the largest block of every row
_ROUNDING = 5e-7  # evidence is written to six places


@dataclass(frozen=True)
class Measured:
    """What one head did on some inputs: density, mean and largest relative L1; None where nobody looked."""

    density: float | None = None
    l1: float | None = None
    worst: float | None = None


@dataclass(frozen=True)
class Head:
    """One head of a layer.

    Attributes:
        layer: its name as a reader knows it.
        settings: in words.
        dense: it keeps all its blocks, by its settings.
    """

    layer: str
    number: int
    settings: str
    dense: bool
    tuned: Measured
    held: Measured

    @property
    def name(self) -> str:
        return f"layer {self.layer}, head {self.number}"


@dataclass(frozen=True)
class Layer:
    """One layer in one range of steps.

    Attributes:
        name: qualified name;  short: what tells it from the others.
        stage: number of the range among those of the layer.
    """

    name: str
    short: str
    stage: int
    precision: str
    samples: int
    heads: tuple[Head, ...]


@dataclass(frozen=True)
class Steps:
    """All layers that have settings of their own for a range of steps: first .. last - 1, or to the end."""

    first: int
    last: int | None
    layers: tuple[Layer, ...]

    @property
    def title(self) -> str:
        return f"Steps {self.first} to {self.last - 1}" if self.last is not None else f"Steps from {self.first} on"


def steps_of(profile: Profile) -> list[Steps]:
    """The ranges of steps of a profile in their order, each with its layers; most profiles have one.

    Raises:
        ValueError: evidence is impossible.
    """
    shorts = dict(zip(profile.layers, short_names(list(profile.layers)), strict=True))
    ranges: dict[tuple[int, int | None], list[Layer]] = {}
    for name, stages in profile.layers.items():
        for number, stage in enumerate(stages):
            heads = tuple(_heads(spoken(name, shorts[name]), stage))
            _check(name, heads)
            samples = 0 if stage.evidence is None else stage.evidence.samples
            layer = Layer(name, shorts[name], number, stage.settings.precision, samples, heads)
            ranges.setdefault((stage.first, stage.last), []).append(layer)
    order = sorted(ranges, key=lambda ends: (ends[0], math.inf if ends[1] is None else ends[1]))
    return [Steps(*ends, tuple(ranges[ends])) for ends in order]


def every_head(parts: Sequence[Steps]) -> list[Head]:
    return [head for part in parts for layer in part.layers for head in layer.heads]


def limit_of(profile: Profile) -> float | None:
    """The largest error of a head that was accepted, or None if the budget is for the model's end."""
    return positive(profile.budget.get("pv_l1", profile.budget.get("l1")))


def positive(size: float | None) -> float | None:
    return size if size is not None and size > 0 else None


def beyond(error: float | None, limit: float | None) -> bool:
    return error is not None and limit is not None and error > limit + _ROUNDING


def short_names(names: Sequence[str]) -> list[str]:
    """Names without the dotted parts that all share at either end; numbers where these are long.

    Example:
        >>> short_names(["model.layers.0.self_attn", "model.layers.11.self_attn"])
        ['0', '11']
    """
    parts = [name.split(".") for name in names]
    front, back = _shared(parts), _shared([part[::-1] for part in parts])
    found = [".".join(part[front : len(part) - back]) for part in parts]
    fits = len(names) > 1 and all(0 < len(short) <= 6 for short in found) and len(set(found)) == len(found)
    return found if fits else [str(number) for number in range(len(names))]


def spoken(name: str, short: str) -> str:
    """What to call a layer in a sentence: the short name if it is a part of the name, or else the name."""
    return short if f".{short}." in f".{name}." else name


def _shared(parts: Sequence[Sequence[str]]) -> int:
    """How many leading entries all lists share, short of a whole list."""
    most = min(map(len, parts), default=1) - 1
    return next((i for i in range(most) if len({part[i] for part in parts}) > 1), most)


def _heads(layer: str, stage: Stage) -> Iterator[Head]:
    tuned, held = measured(stage.evidence, ""), measured(stage.evidence, "held_out_")
    for number in range(_head_count(stage)):
        yield Head(
            layer,
            number,
            words(stage.settings, number),
            is_dense(stage.settings, number),
            tuned[number] if number < len(tuned) else Measured(),
            held[number] if number < len(held) else Measured(),
        )


def _check(layer: str, heads: Sequence[Head]) -> None:
    for head in heads:
        for found in (head.tuned, head.held):
            errors = [error for error in (found.l1, found.worst) if error is not None]
            if not 0 <= (found.density or 0.0) <= 1 or min(errors, default=0.0) < 0:
                raise ValueError(
                    f"the profile's evidence for layer {layer!r}, head {head.number} is impossible: {found}"
                )


def measured(evidence: Evidence | None, prefix: str) -> list[Measured]:
    """What the heads of a layer did on the inputs that evidence names so."""
    if evidence is None:
        return []
    lists = (getattr(evidence, prefix + name) for name in ("density", "l1", "l1_worst"))
    return [Measured(*values) for values in zip(*lists, strict=False)]


def _head_count(stage: Stage) -> int:
    """Heads of a layer: those of its evidence, or those of its settings; 1 if both speak of all heads alike."""
    if stage.evidence is not None and stage.evidence.density:
        return len(stage.evidence.density)
    given = [stage.settings.pv_threshold, *vars(stage.settings.predictor or Sparge()).values()]
    return max((len(value) for value in given if is_per_head(value)), default=1)


def is_per_head(value: object) -> bool:
    return isinstance(value, tuple) and all(isinstance(item, (int, float)) for item in value)


def of_head(value: object, head: int) -> object:
    """What a setting is for a head: one for all, or one of each."""
    if not isinstance(value, tuple) or not is_per_head(value):
        return value
    return value[head] if head < len(value) else None


def is_dense(settings: LayerSettings, head: int) -> bool:
    return settings.predictor is None or of_head(getattr(settings.predictor, "topk", None), head) == 1.0


def words(settings: LayerSettings, head: int) -> str:
    """The settings of a head: "cdf 0.92, similarity 0.1, pv threshold 5"."""
    if settings.predictor is None:
        return "dense"
    said = _predictor_words(settings.predictor, head)
    threshold = of_head(settings.pv_threshold, head)
    if isinstance(threshold, (int, float)) and math.isfinite(threshold):
        said.append(f"pv threshold {threshold:.4g}")
    if settings.precision != "int8":
        said.append(f"{settings.precision} precision")
    if settings.compensate is not None:
        said.append(f"compensate {settings.compensate}")
    return ", ".join(said)


def _predictor_words(predictor: Predictor, head: int) -> list[str]:
    own = {name: of_head(value, head) for name, value in vars(predictor).items()}
    if not isinstance(predictor, Sparge):
        return [type(predictor).__name__, *(f"{name} {value}" for name, value in own.items() if value is not None)]
    rest = [] if own["sink"] else ["no sink"]
    return [candidate_words(own["cdf"], own["topk"], own["similarity"]), *rest, *(["keep"] if own["keep"] else [])]


def candidate_words(cdf: object, topk: object, similarity: object) -> str:
    """What `Sparge` is told about a head, without what does nothing."""
    if topk == 1.0:
        return "all blocks (topk 1)"
    said = [
        f"{name} {value:.5g}"
        for name, value in (("cdf", cdf), ("topk", topk))
        if isinstance(value, (int, float)) and value > OFF
    ]
    if isinstance(similarity, (int, float)) and similarity > -1:
        said.append(f"similarity {similarity:.4g}")
    return ", ".join(said) or "the largest block of every row"
