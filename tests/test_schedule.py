"""Profiles, schedules and the measured break-even of `tamis.apply`, on tiny models."""

from __future__ import annotations

import doctest
import importlib
import json
import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tamis
from tamis.integrations import break_even as room
from tamis.integrations.applied import Applied
from tamis.integrations.apply import apply
from tamis.integrations.break_even import BreakEven
from tamis.integrations.hook import attention_layers
from tamis.integrations.schedule import Schedule
from tamis.profile import LayerSettings, Profile, Stage

transformers = pytest.importorskip("transformers")

FIRST, SECOND, THIRD = NAMES = [f"model.layers.{number}.self_attn" for number in range(3)]


def make(layers: int = 3) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        initializer_range=0.3,
    )
    return transformers.LlamaForCausalLM(config).eval()


def run(model: Any, times: int = 1, tokens: int = 300) -> torch.Tensor:
    ids = torch.randint(2, 64, (1, tokens), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for _ in range(times):
            logits = model(ids, use_cache=False).logits
    return logits


def ran(handle: Applied) -> dict[str, tuple[int, int]]:
    return {name: (layer.sparse, layer.dense) for name, layer in handle.stats().items()}


def profile(**layers: LayerSettings) -> Profile:
    return Profile({f"model.layers.{name[1:]}.self_attn": (Stage(settings),) for name, settings in layers.items()})


def test_attention_layers_are_those_that_are_called() -> None:
    model = make()
    with apply(model, min_queries=10**6) as handle:
        run(model)
    assert attention_layers(model) == list(handle.stats()) == NAMES
    config = transformers.Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28)
    images = transformers.Dinov2Model(config).eval()
    with apply(images) as handle, torch.no_grad():
        images(pixel_values=torch.randn(1, 3, 28, 28))
    assert attention_layers(images) == list(handle.stats())


def test_a_profile_gives_each_layer_its_own() -> None:
    model = make()
    settings = LayerSettings(tamis.Window(20), pv_threshold=(9.0, 8.0, 7.0, float("inf")), precision="full")
    given = profile(_0=settings, _1=LayerSettings(None), _2=LayerSettings(tamis.Window(100), None, "int8"))
    with apply(model, given) as handle:
        logits = run(model)
    stats = handle.stats()
    assert ran(handle) == {FIRST: (1, 0), SECOND: (0, 1), THIRD: (1, 0)}
    assert handle.dense_reasons == {"dense in the profile": 1}
    assert (stats[FIRST].last.qk_dtype, stats[THIRD].last.qk_dtype) == ("float32", "int8")
    assert stats[FIRST].last.density < stats[THIRD].last.density
    # The same, put together from uniform settings by a schedule.
    with apply(
        model,
        profile(_0=replace(settings, predictor=tamis.Window(20)), _2=LayerSettings(tamis.Window(100), None, "int8")),
    ) as handle:
        assert torch.equal(run(model), logits)
    assert handle.dense_reasons == {"not in the profile": 1}


def test_pv_thresholds_of_a_profile_are_honoured() -> None:
    """Per head and one for all; a tiny threshold skips what a huge one keeps."""
    model = make()
    densities = []
    for threshold in (0.01, (0.01,) * 4, (0.01, 50.0, 50.0, 50.0), None):
        with apply(model, profile(_0=LayerSettings(tamis.Window(300), threshold, "full"))) as handle:
            run(model)
        densities.append(handle.stats()[FIRST].last.pv_density)
    assert densities[0] == densities[1] < densities[2] < densities[3] == 1


def test_a_profile_must_fit_the_model() -> None:
    model = make()
    wrong = Profile({"model.layers.0.attn": (Stage(LayerSettings(None)),)})
    with pytest.raises(ValueError, match=r"does not have: model.layers.0.attn; did you mean .*layers.0.self_attn"):
        apply(model, wrong)
    with pytest.raises(ValueError, match=r"does not have: model.layers.3.self_attn"):
        apply(model, profile(_3=LayerSettings(None)))
    # A module that is no attention layer is no match either.
    with pytest.raises(ValueError, match=r"does not have: model.layers.0.mlp"):
        apply(model, Profile({"model.layers.0.mlp": (Stage(LayerSettings(None)),)}))
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "arguments", [{"precision": "int8"}, {"pv_threshold": 5.0}, {"pv_threshold": None}, {"compensate": "centroid"}]
)
def test_settings_beside_a_profile_are_refused(arguments: dict[str, Any]) -> None:
    (name,) = arguments
    with pytest.raises(ValueError, match=f"{name} must not be given with a profile"):
        apply(make(), profile(_0=LayerSettings(None)), **arguments)


def test_thresholds_beside_a_predictor() -> None:
    model = make()
    found = []
    for given in ({}, {"pv_threshold": "default"}, {"pv_threshold": 5.0}, {"pv_threshold": torch.full((4,), 5.0)}):
        with apply(model, tamis.Window(64), **given):
            found.append(run(model))
    assert all(torch.equal(logits, found[0]) for logits in found)
    with apply(model, tamis.Window(64), pv_threshold=[0.05] * 4):
        assert not torch.equal(run(model), found[0])
    with pytest.raises(ValueError, match="pv_threshold must be a number, one per head, None or 'default', got 'off'"):
        apply(model, pv_threshold="off")  # type: ignore[arg-type]


@pytest.mark.parametrize("first", [1, (FIRST,), [FIRST]])
def test_dense_layers(first: Any) -> None:
    model = make()
    with apply(model, tamis.Window(64), schedule=Schedule(dense_layers=first)) as handle:
        run(model, 2)
    assert ran(handle) == {FIRST: (0, 2), SECOND: (2, 0), THIRD: (2, 0)}
    assert handle.dense_reasons == {"a dense layer of the schedule": 2}


def test_unknown_dense_layers() -> None:
    with pytest.raises(ValueError, match=r"no attention layer 'model.layers.7.self_attn'; did you mean model.layers"):
        apply(make(), schedule=Schedule(dense_layers=["model.layers.7.self_attn"]))


def test_steps_that_are_set() -> None:
    model = make()
    with apply(model, tamis.Window(64), schedule=Schedule(dense_steps=2)) as handle:
        with pytest.raises(
            ValueError, match=r"set handle.step before each step, or give Schedule\(calls_per_step=..\)"
        ):
            run(model)
        for step in range(5):
            handle.step = step
            assert handle.step == step
            run(model, 2)
        assert handle.calls == {"sparse": 18, "dense": 12}
        assert handle.dense_reasons == {"one of the first 2 steps": 12}
        handle.start()
        assert handle.step is None
        with pytest.raises(ValueError, match="step must be an integer of at least 0, got -1"):
            handle.step = -1


def test_steps_that_are_counted() -> None:
    model = make()
    with apply(model, tamis.Window(64), schedule=Schedule(dense_steps=2, calls_per_step=2)) as handle:
        run(model, 7)
        assert ran(handle)[SECOND] == (3, 4)
        handle.start()
        run(model, 5)
        assert ran(handle)[SECOND] == (4, 8)
        handle.reset()
        run(model, 5)
        assert ran(handle)[SECOND] == (1, 4)


def test_predictors_by_step() -> None:
    model = make()
    schedule = Schedule(predictors={2: tamis.Window(40), 1: 0.25}, calls_per_step=1)
    assert list(schedule.predictors) == [1, 2]
    densities = []
    with apply(model, tamis.Window(300), schedule=schedule, pv_threshold=None) as handle:
        for _ in range(4):
            run(model)
            densities.append(handle.stats()[FIRST].last.density)
    for step, predictor in ((0, tamis.Window(300)), (1, tamis.Sparge(topk=0.25)), (2, tamis.Window(40))):
        with apply(model, predictor, pv_threshold=None) as handle:
            run(model)
        assert densities[step] == handle.stats()[FIRST].last.density
    assert densities[2] == densities[3] < densities[0]


def test_a_profile_of_several_steps() -> None:
    model = make()
    stages = (Stage(LayerSettings(tamis.Window(300), None), 1, 2), Stage(LayerSettings(tamis.Window(40), None), 2, 3))
    given = Profile({FIRST: stages})
    settings = LayerSettings(tamis.Window(40))
    two = (Stage(settings, 0, 2), Stage(LayerSettings(None), 2))
    for unclear in (
        given,
        *(Profile({SECOND: some}) for some in (two, (Stage(settings, 1),), (Stage(settings, 0, 1),))),
    ):
        with apply(model, unclear), pytest.raises(ValueError, match="the settings depend on the step"):
            run(model)
    densities = {}
    with apply(model, given, schedule=Schedule(calls_per_step=1)) as handle:
        for step in range(4):
            run(model)
            layer = handle.stats()[FIRST]
            densities[step] = None if layer.dense + layer.sparse != step + 1 or layer.last is None else layer.last
        assert ran(handle)[FIRST] == (2, 2)
    assert densities[0] is None
    assert densities[1].density > densities[2].density
    with pytest.raises(ValueError, match="predictors must be empty with a profile"):
        apply(model, given, schedule=Schedule(predictors={0: 0.5}))


def test_counted_steps_are_refused_in_a_graph_and_set_ones_work() -> None:
    model = make(1)
    with apply(model, tamis.Window(64), precision="full", schedule=Schedule(dense_steps=1)) as handle:
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        ids = torch.zeros(1, 200, dtype=torch.long)
        for step in range(2):
            handle.step = step
            with torch.no_grad():
                found = compiled(ids, use_cache=False).logits
                expected = model(ids, use_cache=False).logits
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)  # as in test_transformers.py
    torch._dynamo.reset()
    schedule = Schedule(dense_steps=1, calls_per_step=1)
    with apply(model, tamis.Window(64), schedule=schedule), pytest.raises(Exception, match="not counted in a compiled"):
        torch.compile(model, fullgraph=True, backend="aot_eager")(ids, use_cache=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dense_steps": -1}, "dense_steps must be at least 0, got -1"),
        ({"dense_steps": 1.0}, "dense_steps must be an integer, got 1.0"),
        ({"dense_layers": "model"}, "dense_layers must be an integer, got 'model'"),
        ({"calls_per_step": 0}, "calls_per_step must be at least 1, got 0"),
        ({"predictors": [0.5]}, "predictors must be a mapping from steps, got list"),
        ({"predictors": {"1": 0.5}}, "predictors: a step must be an integer, got '1'"),
        ({"predictors": {1: "half"}}, "predictors: step 1 must have a predictor or a number, got 'half'"),
        ({"predictors": {1: 1.5}}, r"topk must be in \(0, 1\], got 1.5"),
    ],
)
def test_schedules_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        Schedule(**settings)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, an empty memory, and a short ladder."""
    monkeypatch.delenv("TAMIS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(room, "_known", {})
    monkeypatch.setattr(room, "LENGTHS", (64, 128, 192))
    monkeypatch.setattr(room, "ROUNDS", (1, 1))
    return tmp_path / "tamis" / "break-even"


def clock(monkeypatch: pytest.MonkeyPatch, dense: float, sparse: tuple[float, float]) -> Counter[str]:
    """Time that passes as told: dense takes `dense` per query, sparse `sparse[0]` and `sparse[1]` per query, and at
    first a tenth of a second more."""
    from tamis.integrations import applied

    now, calls = [0.0], Counter[str]()
    really = applied.dense, applied.sparse

    def slow_dense(request: Any) -> Any:
        now[0] += dense * request.query.shape[2]
        calls["dense"] += 1
        return really[0](request)

    def slow_sparse(request: Any, *rest: Any) -> Any:
        now[0] += sparse[0] + sparse[1] * request.query.shape[2]
        now[0] += 0.0 if calls[f"sparse {request.query.shape[2]}"] else 0.1
        calls["sparse"] += 1
        calls[f"sparse {request.query.shape[2]}"] += 1
        return really[1](request, *rest)

    monkeypatch.setattr(applied, "dense", slow_dense)
    monkeypatch.setattr(applied, "sparse", slow_sparse)
    monkeypatch.setattr(room.time, "perf_counter", lambda: now[0])
    return calls


@pytest.mark.parametrize(
    ("sparse", "expected"),
    [
        ((0.0, 0.5e-5), BreakEven(64, 128)),
        ((80e-5, 0.1e-5), BreakEven(128, 192)),  # at 128 queries 92.8 to 128, at 64 86.4 to 64
        ((0.0, 0.95e-5), BreakEven(None, 192)),  # faster, but by less than what is asked
    ],
)
def test_the_break_even_is_where_sparse_becomes_faster(
    sparse: tuple[float, float], expected: BreakEven, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock(monkeypatch, 1e-5, sparse)
    model = make()
    with apply(model, min_queries="auto") as handle:
        run(model, tokens=100)
        assert list(room._known.values()) == [expected]
        assert handle.calls["sparse"] == (3 if expected.queries == 64 else 0)
        run(model, tokens=150)
        assert handle.calls["sparse"] == {64: 6, 128: 3, None: 0}[expected.queries]
        run(model, tokens=1)
    reasons = {
        64: {"decoding": 3},
        128: {"shorter than the break-even of 128 queries": 3, "decoding": 3},
        None: {"dense is faster up to 192 queries, the most that was measured": 6, "decoding": 3},
    }
    assert handle.dense_reasons == reasons[expected.queries]


def test_measuring_is_bounded_in_time(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = clock(monkeypatch, 1.0, (0.0, 2.0))
    model = make()
    with apply(model, min_queries="auto"):
        run(model, tokens=100)
    # One length takes longer than all may: measured once and after warming up, then the three layers run.
    assert (calls["dense"], calls["sparse"]) == (2 + 3, 2)
    assert list(room._known.values()) == [BreakEven(None, 64)]


def test_it_is_measured_once_and_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []
    really = room._measure
    monkeypatch.setattr(room, "_measure", lambda *call: measured.append(call) or really(*call))
    model = make()
    for _ in range(2):
        with apply(model, min_queries="auto"):
            run(model, 2)
    (file,) = cache.iterdir()
    assert len(measured) == 1
    held = json.loads(file.read_text(encoding="utf-8"))
    assert held["key"]["threads"] == torch.get_num_threads()
    (known,) = room._known.values()
    assert (held["queries"], held["longest"]) == (known.queries, known.longest)
    # Another process reads the file; another number format or another kind of call is another measurement.
    room._known.clear()
    with apply(model, min_queries="auto"):
        run(model)
    assert len(measured) == 1
    assert list(room._known.values()) == [known]
    with apply(model, min_queries="auto", precision="full"):
        run(model)
    assert len(measured) == 2
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace('"threads": 1', '"threads": 7'),
        lambda text: text.replace('"longest"', '"longer"'),
        lambda text: json.dumps({**json.loads(text), "queries": 5}),
        lambda text: json.dumps({**json.loads(text), "longest": True}),
    ],
)
def test_a_damaged_file_is_measured_again(damage: Any, cache: Path) -> None:
    model = make()
    with apply(model, min_queries="auto"):
        run(model)
    (file,) = cache.iterdir()
    good = file.read_text(encoding="utf-8")
    assert damage(good) != good
    file.write_text(damage(good), encoding="utf-8")
    room._known.clear()
    with apply(model, min_queries="auto"):
        run(model)
    held = json.loads(file.read_text(encoding="utf-8"))
    assert held["key"] == json.loads(good)["key"]
    (known,) = room._known.values()
    assert (held["queries"], held["longest"]) == (known.queries, known.longest)
    assert type(known.longest) is int and known.longest in room.LENGTHS
    assert known.queries in (None, *room.LENGTHS)
    assert list(cache.iterdir()) == [file]


def test_a_folder_that_cannot_be_written(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a file").write_text("", encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a file"))
    model = make()
    with apply(model, min_queries="auto") as handle:
        run(model)
    assert len(room._known) == 1
    assert sum(handle.calls.values()) == 3

    def no_space(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setenv("TAMIS_CACHE", str(tmp_path / "full"))
    monkeypatch.setattr(os, "replace", no_space)
    room._known.clear()
    with apply(model, min_queries="auto"):
        run(model)
    assert len(room._known) == 1
    assert list((tmp_path / "full" / "break-even").iterdir()) == []


def test_writers_and_readers_at_once(tmp_path: Path) -> None:
    """What is read is one of the measurements, never a part of one; threads stand for processes."""
    file, key = tmp_path / "one.json", {"threads": 1}
    kinds = [BreakEven(128, 192), BreakEven(None, 256)]
    room._write(file, key, kinds[0])

    def write(number: int) -> None:
        for _ in range(100):
            room._write(file, key, kinds[number])

    with ThreadPoolExecutor(2) as writers:
        done = [writers.submit(write, number) for number in range(2)]
        found = [room._read(file, key) for _ in range(500)]
        assert [item.result() for item in done] == [None, None]
    assert set(found) <= set(kinds)
    assert list(tmp_path.iterdir()) == [file]


def test_no_measuring_inside_of_a_graph(cache: Path) -> None:
    model = make(1)
    with apply(model, tamis.Window(64), precision="full", min_queries="auto"):
        ids = torch.zeros(1, 200, dtype=torch.long)
        with torch.no_grad():
            found = torch.compile(model, fullgraph=True, backend="aot_eager")(ids, use_cache=False).logits
    assert not room._known
    assert not cache.exists()
    with torch.no_grad():
        torch.testing.assert_close(found, model(ids, use_cache=False).logits, atol=2e-5, rtol=1e-4)  # it ran dense


def test_measuring_leaves_the_random_state_alone(cache: Path) -> None:
    model = make()
    state = torch.get_rng_state()
    with apply(model, min_queries="auto"):
        run(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(room._known) == 1


def test_min_queries_is_checked() -> None:
    with pytest.raises(TypeError, match="min_queries must be an integer or 'auto', got 'always'"):
        apply(make(), min_queries="always")  # type: ignore[arg-type]


def test_what_no_backend_does_runs_dense_with_auto_too(cache: Path) -> None:
    model = make()
    with apply(model, precision="fp8", min_queries="auto") as handle:
        run(model)
    assert handle.calls == {"sparse": 0, "dense": 3}
    assert not room._known


def test_the_guide_runs(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every block of docs/in-production.md; what it says is printed, is."""
    text = (Path(__file__).parent.parent / "docs" / "in-production.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 5
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
        printed = capsys.readouterr().out.strip()
        for expected in re.findall(r"^print\(.*\)  # (?!e\.g\.)(.*)$", block, re.MULTILINE):
            assert printed == expected


def test_examples_run() -> None:
    for name in ("audit", "schedule", "apply", "decoding"):
        module = importlib.import_module(f"tamis.integrations.{name}")
        results = doctest.testmod(module)
        assert results.failed == 0 < results.attempted, name
