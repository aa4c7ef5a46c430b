"""Profiles and surveys to make pages of, real-looking and not."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tamis.predictors import Sparge, Window
from tamis.profile import Evidence, LayerSettings, Profile, Stage
from tamis.tuning.candidates import GRID
from tamis.tuning.journal import Journal
from tamis.tuning.surveys import Surveys

EVIL = "\"'></script><script>alert(1)</script><img src=x onerror=alert(2)>\u2028"
OFF = 1e-9


def make_stage(heads: int, rng: random.Random, first: int = 0, last: int | None = None, held: int = 2) -> Stage:
    """Settings of every kind; the last head of a stage is dense."""
    dense = [head == heads - 1 for head in range(heads)]
    density = tuple(1.0 if full else round(rng.uniform(0.1, 0.95), 6) for full in dense)
    l1 = tuple(0.01 if full else round(rng.uniform(0.02, 0.07), 6) for full in dense)
    worst = tuple(round(error * 1.2, 6) for error in l1)
    evidence = Evidence(density, l1, worst, 2)
    if held:
        others = tuple(round(error * rng.uniform(0.8, 1.8), 6) for error in worst)
        evidence = replace(
            evidence, held_out_density=density, held_out_l1=l1, held_out_l1_worst=others, held_out_samples=held
        )
    sparge = Sparge(
        cdf=tuple(OFF if full else 0.9 + head / 1000 for head, full in enumerate(dense)),
        topk=tuple(1.0 if full else OFF for full in dense),
        similarity=tuple(-1.0 if full else 0.1 for full in dense),
    )
    thresholds = tuple(float("inf") if full else 5.0 for full in dense)
    return Stage(LayerSettings(sparge, thresholds), first, last, evidence)


def make_profile(layers: int = 6, heads: int = 4, bounds: tuple[int, ...] = (), held: int = 2) -> Profile:
    rng = random.Random(layers * heads)
    ends = [0, *bounds, None]
    ranges = [(first or 0, last) for first, last in itertools.pairwise(ends)]
    return Profile(
        {
            f"model.layers.{n}.self_attn": tuple(make_stage(heads, rng, *ends, held) for ends in ranges)
            for n in range(layers)
        },
        "LlamaForCausalLM",
        {"l1": 0.08, "pv_l1": 0.09},
        "0.1.0",
    )


def make_survey(profile: Profile, bounds: tuple[int, ...] = ()) -> Surveys:
    """What might have been surveyed: error falls with density, with noise in both."""
    found = {}
    for name, stages in profile.layers.items():
        for number, stage in enumerate(stages):
            assert stage.evidence is not None
            shape = (stage.evidence.samples, len(GRID), len(stage.evidence.density))
            density = torch.rand(shape, dtype=torch.float64).clamp(0.05, 0.95)
            l1 = (1 - density) ** 2 * torch.rand(shape, dtype=torch.float64).clamp(0.2)
            density[:, -1], l1[:, -1] = 1, 0
            found[name, number] = {"l1": l1, "square": l1**2, "density": density}
    return Surveys(GRID, bounds, found)


def write_journal(path: Path, survey: Surveys, **head: Any) -> Path:
    """The file of a run that surveyed so, as `Run.read` writes it."""
    written = {"grid": [list(candidate) for candidate in survey.grid], "steps": list(survey.bounds), **head}
    journal = Journal(path, written)
    samples = len(next(iter(survey.found.values()))["l1"])
    for sample in range(samples):
        keys = []
        for (layer, stage), arrays in survey.found.items():
            step = [0, *survey.bounds][stage]
            key = f"survey /{sample}/{layer}/{step}/0"
            keys.append([key, layer, stage])
            journal.put(key, {name: array[sample].tolist() for name, array in arrays.items()})
        journal.put(f"survey /{sample}", keys)
    journal.put("trial {} int8/0", [])
    journal.close()
    return path


def hostile() -> Profile:
    """Markup in every string that a file may hold."""
    made = make_profile(2, 2)
    layers = {f"{EVIL}.{n}": stages for n, stages in enumerate(made.layers.values())}
    return Profile(layers, EVIL, {"l1": 0.08, EVIL: 0.1}, EVIL, {"end_l1": 0.02, EVIL: 0.3})


def bare() -> Profile:
    """Settings without evidence, of every kind a profile can hold."""
    stages = (
        Stage(LayerSettings(None), 0, 2),
        Stage(LayerSettings(Window(256), 4.0, "full", "centroid"), 2, 5),
        Stage(LayerSettings(Sparge(cdf=(0.9, 0.95), keep={"keys": [(0, 4)]})), 5, None),
    )
    return Profile({"a": stages, "b": stages[:1]})


def end_budget() -> Profile:
    return replace(make_profile(3, 3), budget={"end_l1": 0.02}, evidence={"end_l1": 0.0193})


def extreme() -> Profile:
    """Numbers that a file may hold and no run would find."""
    shares, sizes = (0.0, 1.0, 0.5, 5e-324), (0.0, 1e308, 3.0, 5e-324)
    evidence = Evidence(shares, sizes, sizes, 1, shares[:3], sizes[:2], sizes[:3], 1)
    stage = Stage(LayerSettings(Sparge(topk=(0.5, 1.0))), evidence=evidence)
    return Profile({"a": (stage,), "b": (stage,)}, budget={"l1": 0.0, "pv_l1": 5e-324}, evidence={"end_l1": 1e308})


PROFILES: dict[str, Profile] = {
    "whole": make_profile(30, 9),
    "no held out": make_profile(held=0),
    "one head": make_profile(1, 1),
    "stages": make_profile(4, 3, bounds=(2, 7)),
    "large": make_profile(80, 64),
    "hostile": hostile(),
    "bare": bare(),
    "end budget": end_budget(),
    "extreme": extreme(),
    "nothing": Profile({}),
}
SURVEYED = {"whole": (), "one head": (), "stages": (2, 7), "hostile": (), "end budget": (), "extreme": (), "large": ()}
