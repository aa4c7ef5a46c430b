"""Profile: the settings of every attention layer of one model, with the evidence for each, as a JSON file.

    {"format": "tamis profile", "version": 1, "tamis": "0.1.0", "model": "LlamaForCausalLM", "run": "",
     "budget": {"l1": 0.08, "pv_l1": 0.09}, "evidence": {},
     "layers": {"model.layers.0.self_attn": [
        {"steps": [0, null],
         "predictor": {"name": "Sparge", "cdf": [0.97, 0.9], "topk": [1e-09, 1e-09], ..},
         "pv_threshold": [5.0, null], "precision": "int8", "compensate": null,
         "evidence": {"density": [..], "l1": [..], "l1_worst": [..], "samples": 5, "held_out_l1": [..], ..}}]}}

Numbers in lists are those of the query heads. Nothing in a file is executed, and a file that does not hold exactly this
is refused whole.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tamis.profile import files
from tamis.profile.layers import Evidence, LayerSettings, Stage

__all__ = ["Evidence", "LayerSettings", "Profile", "Stage"]


@dataclass(frozen=True)
class Profile:
    """Settings for every attention layer of a model, by the layer's exact qualified name.

    Args:
        layers: for each layer its stages in the order of their steps, without gaps between them.
        model: class name of the model they were found on.
        budget: the error that was accepted, e.g. `{"l1": 0.08, "pv_l1": 0.09}`.
        library: version of tamis that evaluated the settings.
        evidence: what the settings did all together, e.g. `{"end_l1": 0.019}`.
        run: tells the journal they came from (`tamis.tune(resume=)`); "" without one.

    Raises:
        ValueError: a layer has no stage, or stages that overlap or leave a gap.

    Example:
        >>> import tamis
        >>> from tamis.profile import LayerSettings, Stage
        >>> profile = tamis.Profile({"layers.0": (Stage(LayerSettings(tamis.Sparge(topk=0.25))),)}, model="Tiny")
        >>> profile.at("layers.0").predictor.topk
        0.25
    """

    layers: Mapping[str, tuple[Stage, ...]]
    model: str = ""
    budget: Mapping[str, float] = field(default_factory=dict)
    library: str = ""
    evidence: Mapping[str, float] = field(default_factory=dict)
    run: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        for name, stages in self.layers.items():
            if not stages:
                raise ValueError(f"profile: layer {name!r} has no settings")
            ends = [stage.last for stage in stages[:-1]]
            if ends != [stage.first for stage in stages[1:]] or any(
                stage.first < 0 or (stage.last is not None and stage.last <= stage.first) for stage in stages
            ):
                raise ValueError(f"profile: the steps of layer {name!r} overlap or leave a gap")
        object.__setattr__(self, "layers", {name: tuple(s) for name, s in self.layers.items()})
        object.__setattr__(self, "budget", dict(self.budget))
        object.__setattr__(self, "evidence", dict(self.evidence))

    def at(self, layer: str, step: int = 0) -> LayerSettings:
        """Settings of a layer at a step; before its first stage and after its last the layer runs dense.

        Raises:
            KeyError: the profile does not know the layer.
        """
        for stage in self.layers[layer]:
            if stage.first <= step and (stage.last is None or step < stage.last):
                return stage.settings
        return LayerSettings(None)

    def check(self, names: Iterable[str]) -> None:
        """Refuse a profile for layers that a model does not have; names are compared exactly.

        Raises:
            ValueError: it names the layers, and the nearest names of the model.
        """
        known = list(names)
        strange = [name for name in self.layers if name not in known]
        if strange:
            near = difflib.get_close_matches(strange[0], known, 3)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise ValueError(f"the profile has layers that the model does not have: {', '.join(strange[:5])}{hint}")

    def merge(self, other: Profile) -> Profile:
        """Both profiles' layers; what was measured of each as a whole is true of neither any more, and left out.

        Raises:
            ValueError: a layer has different settings in the two, or they are for different models.
        """
        _check_type(other)
        if self.model != other.model:
            raise ValueError(f"the profiles are for different models: {self.model!r} and {other.model!r}")
        clashes = [name for name in self.layers if name in other.layers and self.layers[name] != other.layers[name]]
        if clashes:
            raise ValueError(f"the profiles differ in layers that both have: {', '.join(clashes[:5])}")
        budget = self.budget if self.budget == other.budget else {}
        library = self.library if self.library == other.library else ""
        run = self.run if self.run == other.run else ""
        return Profile({**self.layers, **other.layers}, self.model, budget, library, run=run)

    def diff(self, other: Profile) -> list[str]:
        """What differs between two profiles, a line each; empty if nothing does."""
        _check_type(other)
        lines = [
            f"{name}: {getattr(self, name)!r} -> {getattr(other, name)!r}"
            for name in ("model", "budget", "library", "evidence")
            if getattr(self, name) != getattr(other, name)
        ]
        lines += [f"{name}: only in the first" for name in self.layers if name not in other.layers]
        lines += [f"{name}: only in the second" for name in other.layers if name not in self.layers]
        for name in self.layers:
            if name in other.layers:
                lines += _differences(name, self.layers[name], other.layers[name])
        return lines

    def save(self, path: str | Path) -> None:
        """Write the profile as JSON; an existing file is replaced whole or not at all."""
        names = {"tamis": self.library, "model": self.model, "run": self.run}
        head: dict[str, Any] = {**names, "budget": self.budget, "evidence": self.evidence}
        files.write(Path(path), head, self.layers)

    @staticmethod
    def load(path: str | Path) -> Profile:
        """Read a profile.

        Raises:
            ValueError: the file is no profile, is cut off or damaged, or is of a newer version; nothing is half-used.
            OSError: it cannot be read.
        """
        head, layers = files.read(Path(path))
        try:
            return Profile(layers, head["model"], head["budget"], head["tamis"], head["evidence"], head["run"])
        except ValueError as error:
            raise ValueError(f"{path} is no profile that tamis can use: {error}") from error

    def __str__(self) -> str:
        """A line for what was tuned, and one for what held-out inputs say of it."""
        known = [stage.evidence for stages in self.layers.values() for stage in stages if stage.evidence is not None]
        budget = ", ".join(f"{name} {value:.4g}" for name, value in self.budget.items())
        parts = [f"{len(self.layers)} layers", *([f"budget {budget}"] if budget else [])]
        density = [number for evidence in known for number in evidence.density]
        if density:
            worst = max(number for evidence in known for number in evidence.l1_worst)
            parts += [
                f"{len(density)} heads",
                f"mean density {sum(density) / len(density):.3f}",
                f"worst L1 {worst:.3f}",
            ]
        parts += [f"{name} {value:.4g}" for name, value in self.evidence.items()]
        text = f"Profile of {self.model or 'a model'}: {', '.join(parts)}"
        held = [number for evidence in known for number in evidence.held_out_l1]
        if not held:
            return text
        bound = max((value for name, value in self.budget.items() if name in ("l1", "pv_l1")), default=None)
        within = (
            "" if bound is None else f"{sum(x <= bound for x in held) / len(held):.0%} of heads within {bound:.4g}, "
        )
        worst = max(number for evidence in known for number in evidence.held_out_l1_worst)
        return f"{text}\nheld out: {within}mean L1 {sum(held) / len(held):.3f}, worst on one input {worst:.3f}"


def _check_type(other: object) -> None:
    if not isinstance(other, Profile):
        raise TypeError(f"other must be a Profile, got {type(other).__name__}: tamis.Profile.load reads a file")


def _differences(name: str, first: tuple[Stage, ...], second: tuple[Stage, ...]) -> list[str]:
    ranges = [[(stage.first, stage.last) for stage in stages] for stages in (first, second)]
    if ranges[0] != ranges[1]:
        return [f"{name}: steps {ranges[0]} -> {ranges[1]}"]
    lines = []
    for one, two in zip(first, second, strict=True):
        old, new = _flat(files.stage_json(one)), _flat(files.stage_json(two))
        where = name if len(first) == 1 else f"{name} from step {one.first}"
        for key in [*old, *(key for key in new if key not in old)]:
            if old.get(key) != new.get(key):
                lines.append(f"{where}: {key} {_change(old.get(key), new.get(key))}")
    return lines


def _change(old: Any, new: Any) -> str:
    """What became of a value; of lists of equal length only the heads that changed."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(head, pair) for head, pair in enumerate(zip(old, new, strict=True)) if pair[0] != pair[1]]
        return "; ".join(f"head {head}: {files.inline(a)} -> {files.inline(b)}" for head, (a, b) in pairs)
    return f"{files.inline(old)} -> {files.inline(new)}"


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, item in value.items():
        found.update(_flat(item, f"{prefix}{key}.") if isinstance(item, Mapping) else {prefix + key: item})
    return found
