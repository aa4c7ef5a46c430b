"""Profiles: what is written comes back, and what is damaged in any way is refused whole."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

import tamis
from tamis.profile import Evidence, LayerSettings, Profile, Stage, files

EVIDENCE = Evidence((0.25, 1.0), (0.05, 0.01), (0.07, 0.02), 5, (0.26, 1.0), (0.06, 0.01), (0.09, 0.02), 4)


def profile(**changes: Any) -> Profile:
    """Two layers, one of them with two stages and a dense rest."""
    sparse = LayerSettings(
        tamis.Sparge(cdf=(0.97, 1e-9), topk=(1e-9, 1.0), keep={"keys": [(0, 77)], "queries": [(None, -5)]}),
        (5.0, math.inf),
    )
    layers = {
        "model.layers.1.attn": (Stage(sparse, evidence=EVIDENCE),),
        "model.layers.10.attn": (
            Stage(LayerSettings(None), 0, 5),
            Stage(LayerSettings(tamis.Window(128), None, "full"), 5, 20),
        ),
    }
    return Profile(**({"layers": layers, "model": "Tiny", "budget": {"l1": 0.08}, "library": "0.1.0"} | changes))


def test_saved_and_loaded(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    profile().save(path)
    assert Profile.load(path) == profile()
    assert profile().diff(Profile.load(path)) == []
    text = path.read_text(encoding="utf-8")
    assert '"pv_threshold": [5.0, null]' in text, "off for a head; JSON has no infinity"
    assert '"l1": [0.05, 0.01]' in text, "a list of numbers stands in one line"
    assert list(tmp_path.iterdir()) == [path], "nothing is left of writing"


def test_settings_at_a_step() -> None:
    made = profile()
    assert made.at("model.layers.10.attn", 4).predictor is None
    assert made.at("model.layers.10.attn", 5).precision == "full"
    assert made.at("model.layers.10.attn", 20) == LayerSettings(None), "after the last stage: dense"
    assert made.at("model.layers.1.attn", 999).pv_threshold == (5.0, math.inf)
    with pytest.raises(KeyError):
        made.at("model.layers.0.attn")


def test_names_are_compared_exactly() -> None:
    profile().check(["model.layers.1.attn", "model.layers.10.attn", "more"])
    with pytest.raises(ValueError, match=r"does not have: model\.layers\.1\.attn; did you mean .*model\.layers\.11"):
        profile().check(["model.layers.10.attn", "model.layers.11.attn"])


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.9, 0.999])
def test_a_cut_file_is_refused(tmp_path: Path, share: float) -> None:
    path = tmp_path / "profile.json"
    profile().save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole.rstrip()) * share)])
    with pytest.raises(ValueError, match="no profile that tamis can use"):
        Profile.load(path)


def damaged() -> dict[str, tuple[Any, str]]:
    """What is put where, and what the error says."""
    stage = ("layers", "model.layers.1.attn", 0)
    return {
        "format": ((("format",), "other"), "format"),
        "newer": ((("version",), 2), "use a newer tamis"),
        "version": ((("version",), True), "version is True"),
        "extra": ((("surprise",), 1), "unknown ['surprise']"),
        "budget": ((("budget", "l1"), "a lot"), "budget.l1 must be a number"),
        "layers": ((("layers",), []), "layers must be an object"),
        "no stage": ((("layers", "model.layers.1.attn"), []), "has no settings"),
        "gap": ((("layers", "model.layers.10.attn", 0, "steps"), [0, 4]), "leave a gap"),
        "steps": (((*stage, "steps"), [0, -1]), "steps must be"),
        "predictor": (((*stage, "predictor", "name"), "Keep"), "predictor must be one of"),
        "unknown setting": (((*stage, "predictor", "tau"), 0.9), "unknown ['tau']"),
        "range": (((*stage, "predictor", "cdf"), [0.97, 1.5]), "cdf must be in (0, 1]"),
        "threshold": (((*stage, "pv_threshold"), [5.0, 0]), "above 0"),
        "precision": (((*stage, "precision"), "int4"), "precision must be one of"),
        "compensate": (((*stage, "compensate"), 3), "compensate must be text"),
        "evidence": (((*stage, "evidence", "l1"), [0.05]), "one number per query head"),
        "samples": (((*stage, "evidence", "samples"), 2.5), "whole number"),
    }


@pytest.mark.parametrize("name", damaged())
def test_a_damaged_file_is_refused(tmp_path: Path, name: str) -> None:
    (place, value), message = damaged()[name]
    path = tmp_path / "profile.json"
    profile().save(path)
    data = json.loads(path.read_text(encoding="utf-8"))
    inside = data
    for step in place[:-1]:
        inside = inside[step]
    inside[place[-1]] = value
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        Profile.load(path)
    assert "profile.json" in str(caught.value)


@pytest.mark.parametrize("text", ['{"format": 1, "format": 2}', '{"version": NaN}', "[" * 100_000, "\x80", "null"])
def test_strange_json_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "profile.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match="no profile that tamis can use"):
        Profile.load(path)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "profile.json"
    profile().save(path)
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        profile(model="Other").save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_merge_and_diff() -> None:
    more = Profile({"z": (Stage(LayerSettings(None)),)}, "Tiny", {"l1": 0.05}, "0.1.0")
    both = profile().merge(more)
    assert set(both.layers) == {*profile().layers, "z"}
    assert both.budget == {}, "two budgets are none"
    assert both.merge(profile()).layers == both.layers
    with pytest.raises(ValueError, match="different models"):
        profile().merge(profile(model="Other"))
    changed = profile(layers={**profile().layers, "model.layers.1.attn": (Stage(LayerSettings(tamis.Sparge()), 0),)})
    with pytest.raises(ValueError, match=r"differ in layers that both have: model\.layers\.1\.attn"):
        profile().merge(changed)
    lines = profile().diff(changed)
    assert any("predictor.cdf [0.97, 1e-09] -> 0.995" in line for line in lines), lines
    assert profile().diff(both)[-1] == "z: only in the second"


def test_stages_must_follow_each_other() -> None:
    one = Stage(LayerSettings(None), 0, 5)
    for stages in ([], [one, Stage(LayerSettings(None), 4)], [Stage(LayerSettings(None), 3, 3)], [one, one]):
        with pytest.raises(ValueError, match="profile:"):
            Profile({"a": tuple(stages)})


def test_unknown_predictors_are_not_written(tmp_path: Path) -> None:
    class Mine(tamis.Window):
        pass

    with pytest.raises(ValueError, match="got Mine"):
        Profile({"a": (Stage(LayerSettings(Mine(3))),)}).save(tmp_path / "x.json")
