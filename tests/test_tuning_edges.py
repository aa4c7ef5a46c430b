"""What tuning does at its edges: budgets out of reach, numbers that are none, steps, workers, wrong arguments."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from test_tuning import Calls, planted, texts, tiny

import tamis
from tamis import report
from tamis.integrations.schedule import Schedule
from tamis.profile import Evidence, Profile
from tamis.tuning import Budget, choose, pool, run, surveys, tune_source
from tamis.tuning.calls import LayerCall
from tamis.tuning.candidates import DENSE, EVERYTHING, GRID, masks
from tamis.tuning.decide import stages
from tamis.tuning.evaluate import Trial, evaluate
from tamis.tuning.frontier import frontier
from tamis.tuning.sources import ModelSource

NAME = "model.layers.0.self_attn"


def evidence_of(profile: Profile, layer: str) -> Evidence:
    evidence = profile.layers[layer][0].evidence
    assert evidence is not None
    return evidence


def bfloat16(call: LayerCall) -> LayerCall:
    return replace(call, query=call.query.bfloat16(), key=call.key.bfloat16(), value=call.value.bfloat16())


def test_a_layer_that_no_setting_brings_within_the_budget_is_dense_in_the_profile(tmp_path: Path) -> None:
    """bf16 rounds its output by more than the budget, fp32 does not."""
    inputs = [[planted(0, "a"), bfloat16(planted(0, "b"))]]
    held = [[planted(1, "a"), bfloat16(planted(1, "b"))]]
    path = tmp_path / "journal"
    profile = tune_source(Calls(inputs), Calls(held), Budget(5e-4, 5e-4), resume=path)
    assert profile.at("a").predictor is not None
    assert profile.at("a").precision == "full"
    assert profile.at("b").predictor is None
    found = evidence_of(profile, "b")
    call = inputs[0][1]
    plain = torch.nn.functional.scaled_dot_product_attention(call.query, call.key, call.value).double()
    truth = oracle.attention(*(t.float() for t in (call.query, call.key, call.value))).output
    error = (plain - truth).abs().sum((0, 2, 3)) / truth.abs().sum((0, 2, 3))
    # Six places, and fp32 sums instead of fp64.
    assert found.l1 == pytest.approx(error.tolist(), abs=2e-6)
    assert min(found.l1) > 5e-4
    assert found.density == found.held_out_density == (1.0, 1.0)
    assert (found.samples, found.held_out_samples) == (1, 1)
    densities = [*evidence_of(profile, "a").density, 1.0, 1.0]
    assert f"mean density {sum(densities) / 4:.3f}" in str(profile), "dense layers count"
    profile.save(tmp_path / "p.json")
    assert Profile.load(tmp_path / "p.json") == profile
    assert "dense" in report.write_tuning(tmp_path / "p.html", profile, surveys.read(path)).read_text(encoding="utf-8")


def test_a_model_out_of_reach_runs_dense() -> None:
    model, ids = tiny(1), texts(1, 200)[0]
    profile = tamis.tune(model, [ids], l1=1e-12)
    with torch.no_grad(), tamis.apply(model, profile) as handle:
        model(ids)
    assert handle.dense_reasons == {"dense in the profile": 1}


def test_int8_is_tried_first() -> None:
    assert tune_source(Calls([[planted(0)]]), None, Budget(0.05, 0.06)).at("layer").precision == "int8"


def test_attention_that_is_not_finite_is_refused() -> None:
    bad = planted(1)
    bad.key[0, 1, 5] = math.nan
    message = "dense attention of layer layer is not finite .* in call 0 of input 1"
    with pytest.raises(ValueError, match=message):
        tune_source(Calls([[planted(0)], [bad]]), None, Budget())
    with pytest.raises(ValueError, match=message):
        evaluate(bad, [Trial((DENSE, DENSE), (math.inf, math.inf))], "full", None)
    bad = planted(1)
    bad.value[0, 0, 3] = math.inf
    with pytest.raises(ValueError, match=message):
        frontier(bad, masks(bad, GRID[:2], [0], None), [0])


def test_an_error_that_is_no_number_is_within_no_budget() -> None:
    count = len(choose.THRESHOLDS)
    l1 = torch.full((1, 2 * count, 1), 0.01, dtype=torch.float64)
    l1[:, :count] = math.nan
    density = torch.linspace(0.1, 0.9, 2 * count, dtype=torch.float64)[None, :, None]
    assert choose.best(l1, density, 0.08, 0.09) == torch.tensor([count])
    assert choose.best(l1 * math.nan, density, 0.08, 0.09) is None


def test_large_scores_do_not_overflow() -> None:
    """exp of scores in the hundreds is no fp32 number."""
    asked = planted(0)
    asked = replace(asked, query=asked.query * 40)
    rows = list(range(8))
    found = frontier(asked, masks(asked, [DENSE, GRID[-2]], rows, None), rows)
    assert found.l1[0].tolist() == pytest.approx([0, 0], abs=1e-6), "fp32"
    assert bool(found.l1.isfinite().all())


def test_the_worst_input_makes_the_candidates_and_the_mean_their_order() -> None:
    l1 = torch.zeros(2, len(GRID), 1, dtype=torch.float64)
    density = torch.full((2, len(GRID), 1), 0.9, dtype=torch.float64)
    density[:, -1] = 1
    density[:, 5], l1[1, 5] = 0.1, 0.15  # sparsest, and within the budget in the mean only
    density[0, 20], density[1, 20] = 0.2, 0.6  # 0.4 in the mean
    density[:, 21] = 0.5
    (head,) = choose.within(l1, density, 0.08)
    assert head[2] == GRID[20]


def test_a_dense_head_has_no_stage_2() -> None:
    """What keeps all blocks and lets stage 2 skip is another setting, which nothing calls dense."""
    tried = choose.trials([[GRID[0], DENSE], [GRID[1], GRID[2]]])
    assert len(tried) == 2 * len(choose.THRESHOLDS)
    for trial in tried:
        for head, threshold in zip(trial.heads, trial.thresholds, strict=True):
            assert head != DENSE or threshold == math.inf
    assert tried[-1].heads == (EVERYTHING, GRID[2])
    assert tried[-1].thresholds == (choose.THRESHOLDS[-1],) * 2
    asked = planted(0)
    assert masks(asked, [EVERYTHING], [0, 1], None)[0, 1].all()


def test_a_stage_in_which_a_layer_was_not_seen_is_dense() -> None:
    late = [planted(0, "b", step=step) for step in (0, 1)]
    profile = tune_source(Calls([[planted(0, "a"), *late]]), None, Budget(0.05, 0.06), steps=[1])
    first, second = profile.layers["a"]
    assert (first.first, first.last, second.first, second.last) == (0, 1, 1, None)
    assert first.settings.predictor is not None
    assert second.settings.predictor is None
    assert second.evidence is None
    assert [stage.evidence is None for stage in profile.layers["b"]] == [False, False]
    assert stages({}, {}, (1,)) == {}


def test_steps_are_those_of_apply() -> None:
    """Every call counts, those that cannot be judged too; calls_per_step of them are a step."""
    model = tiny(1)
    ids = texts(1, 200)[0]

    def denoise() -> Any:
        for length in (200, 64, 200, 64, 200, 200):
            model(ids[:, :length])

    for calls_per_step, samples in ((1, [1, 3]), (2, [2, 2])):
        profile = tamis.tune(model, [denoise], steps=[2], calls_per_step=calls_per_step)
        found = profile.layers[NAME]
        assert [stage.evidence and stage.evidence.samples for stage in found] == samples
        seen = []
        schedule = Schedule(calls_per_step=calls_per_step)
        with torch.no_grad(), tamis.apply(model, profile, schedule=schedule) as handle:
            for length in (200, 64, 200, 64, 200, 200):
                model(ids[:, :length])
                last = handle.stats()[NAME].last
                seen.append(None if last is None or length < 128 else last.density_per_head.tolist())
        used = [number for number, density in enumerate(seen) if density is not None]
        assert [sum(number // calls_per_step < 2 for number in used), sum(n // calls_per_step >= 2 for n in used)] == (
            samples
        )


def test_an_input_without_a_call_that_counts_is_refused() -> None:
    model = tiny(1)
    good, short = texts(1, 200)[0], texts(1, 64)[0]
    message = r"no attention call of input 1 \(counted from 0\) of LlamaForCausalLM can be judged: "
    with pytest.raises(ValueError, match=f"survey: {message}" + r"\{'fewer than 128 queries': 1\}"):
        tamis.tune(model, [good, short])
    with pytest.raises(ValueError, match=f"survey: {message}it made none"):
        tamis.tune(model, [good, lambda: None])
    with pytest.raises(ValueError, match=f"held out: {message}"):
        tamis.tune(model, [good], held_out=[good, short])
    with pytest.raises(ValueError, match=r"held out: .* of other layers only"):
        tune_source(Calls([[planted(0)]]), Calls([[planted(0, "another")]]), Budget())
    other = planted(0)
    other = replace(other, query=other.query[:, :1], key=other.key[:, :1], value=other.value[:, :1])
    with pytest.raises(ValueError, match=r"layer layer has 1 heads in input 0 .* and 2 where it was tuned"):
        tune_source(Calls([[planted(0)]]), Calls([[other]]), Budget())


def test_watchers_hear_what_is_going_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_TELL_SECONDS", 0.0)
    inputs = [[planted(0, "a"), bfloat16(planted(0, "b"))]]

    def told(**options: Any) -> list[tuple[str, int, int, str]]:
        found: list[tuple[str, int, int, str]] = []
        tune_source(Calls(inputs), None, Budget(5e-4, 5e-4), progress=lambda *at: found.append(at), **options)
        return found

    path = tmp_path / "journal"
    found = told(resume=path)
    assert found[:3] == [
        ("survey", 0, 1, "1 calls of input 1, now a"),
        ("survey", 0, 1, "2 calls of input 1, now b"),
        ("survey", 1, 1, ""),
    ]
    assert ("trial", 1, 1, "2 layers in full precision: rounding takes a head beyond the budget") in found
    assert found[-1] == ("trial", 1, 1, "1 layers dense: rounding takes a head beyond the budget")
    assert {said for *_, said in told(resume=path)} == {"from the journal"}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"precision": "int4"}, ValueError, "precision must be one of full, int8"),
        ({"rows": 0}, ValueError, "rows must be at least 1"),
        ({"rows": 1.5}, TypeError, "rows must be an integer"),
        ({"calls_per_step": 0}, ValueError, "calls_per_step must be at least 1"),
        ({"held_out": iter([1])}, TypeError, "held_out must be a list or tuple of inputs, got list_iterator"),
        (
            {"held_out": torch.zeros(2, 1, 200).long()},
            TypeError,
            r"held_out must be a list .* got Tensor: \[held_out\]",
        ),
        ({"held_out": ["text"]}, TypeError, r"held_out\[0\] must be a tensor of token ids or pixels, .* got str"),
        ({"inputs": torch.zeros(1, 200).long()}, TypeError, r"inputs must be a list .* got Tensor: \[inputs\]"),
        ({"inputs": {"input_ids": 1}}, TypeError, r"inputs must be a list .* got dict: \[inputs\] for one input"),
        ({"inputs": "some text"}, TypeError, "inputs must be a list or tuple of inputs, got str"),
        ({"inputs": [torch.zeros(200).long()]}, ValueError, r"inputs\[0\] must be token ids \[batch, tokens\]"),
        ({"inputs": [None]}, TypeError, r"inputs\[0\] must be .* got NoneType"),
        ({"model": None}, TypeError, "model must be a .* got NoneType"),
        ({"l1": 0.1, "end_l1": 0.1}, ValueError, "l1 and pv_l1 bound every head, end_l1 stands instead"),
        ({"pv_l1": 0.1, "end_perplexity": 0.1}, ValueError, "end_perplexity stands instead"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    def untouched(*_: Any) -> None:
        raise AssertionError("it ran")

    given: dict[str, Any] = {"model": tiny(1), "inputs": texts(1, 200), "progress": untouched} | arguments
    with pytest.raises(error, match=message):
        tamis.tune(given.pop("model"), given.pop("inputs"), **given)


def test_stage_2_may_add_an_eighth() -> None:
    assert Budget().as_json() == {"l1": 0.08, "pv_l1": pytest.approx(0.09)}
    assert Budget(l1=0.1).as_json() == {"l1": 0.1, "pv_l1": pytest.approx(0.1125)}
    assert Budget(pv_l1=0.2).heads == (0.08, 0.2)


def test_a_run_opens_its_workers_once(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[pool.Pool] = []

    class Counted(pool.Inline):
        def __init__(self, done: Callable[[str, Any], None]) -> None:
            super().__init__(done)
            opened.append(self)

    monkeypatch.setattr(pool, "Inline", Counted)
    tune_source(Calls([[planted(0)], [planted(1)]]), Calls([[planted(2)]]), Budget(1e-5, 1e-5))
    assert len(opened) == 1


def process_number() -> int:
    return os.getpid()


@pytest.mark.filterwarnings("default")
def test_a_worker_that_is_lost_while_it_waits_is_replaced() -> None:
    found: list[int] = []
    workers = pool.Processes(1, lambda key, number: found.append(number))
    try:
        workers.submit("first", process_number)
        workers.drain()
        os.kill(found[0], signal.SIGKILL)
        time.sleep(0.5)  # the pool hears of it from another thread; before or after, the job must be done
        workers.submit("second", process_number)
        workers.drain()
    finally:
        workers.close()
    assert len(found) == 2
    assert found[0] != found[1]


def test_a_script_without_a_guard_is_told_so(tmp_path: Path) -> None:
    """Its workers cannot start: they would run the script again."""
    script = tmp_path / "script.py"
    script.write_text(
        "import operator\n"
        "from tamis.tuning.pool import Processes\n"
        "workers = Processes(1, print)\n"
        "workers.submit('sum', operator.add, 1, 2)\n"
        "workers.drain()\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    last = done.stderr[done.stderr.rindex("RuntimeError: the worker") :]
    assert last.startswith(f"RuntimeError: {pool.GUARD.splitlines()[0]}")
    assert 'if __name__ == "__main__":' in last


def test_left_out_calls_are_named() -> None:
    source = ModelSource(tiny(1), texts(1, 64))
    source.visit(0, lambda call: None)
    assert source.left_out == {"fewer than 128 queries": 1}
