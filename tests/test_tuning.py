"""Tuning: the survey against brute force, known optima, interruptions, several processes, and the end of a model."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean as mean
from typing import Any

import mortal
import oracle
import pytest
import torch
from torch import Tensor

import tamis
from tamis import cli
from tamis.integrations.capture import record
from tamis.profile import LayerSettings, Profile, Stage
from tamis.tuning import Budget, candidates, choose, pool, tune_source, whole
from tamis.tuning.calls import LayerCall, exact_output
from tamis.tuning.candidates import DENSE, GRID, Candidate
from tamis.tuning.decide import decide
from tamis.tuning.ending import End, weights
from tamis.tuning.evaluate import Trial, evaluate
from tamis.tuning.frontier import frontier, sample_rows
from tamis.tuning.journal import Journal
from tamis.tuning.run import Place, survey
from tamis.tuning.sources import ModelSource

SHAPES: dict[str, dict[str, Any]] = {
    "square": {"lengths": (300, 300)},
    "causal": {"lengths": (300, 300), "causal": True},
    "chunk": {"lengths": (130, 333), "causal": True},
    "more queries than keys": {"lengths": (290, 70), "causal": True},
    "window": {"lengths": (400, 400), "causal": True, "window": 90},
    "both sides": {"lengths": (257, 129), "window": 50, "scale": 0.3},
}


def call(
    lengths: tuple[int, int], causal: bool = False, window: int | None = None, scale: float | None = None
) -> LayerCall:
    q, k, v = (torch.randn(1, heads, n, 16) for heads, n in ((4, lengths[0]), (2, lengths[1]), (2, lengths[1])))
    return LayerCall("layer", 0, 0, 0, 2 * q, k + 1, v, causal, window, scale)


@pytest.mark.parametrize("shape", SHAPES)
def test_survey_is_what_each_mask_would_cost(shape: str) -> None:
    """Masks are those of `Sparge`; error and density those of a call with the mask, one at a time."""
    asked = call(**SHAPES[shape])
    rows = sample_rows(asked, 1000)
    found = candidates.masks(asked, GRID, rows, None)
    survey = frontier(asked, found, rows)
    options: dict[str, Any] = {"causal": asked.causal, "window": asked.window, "scale": asked.scale}
    truth = oracle.attention(asked.query, asked.key, asked.value, **options).output
    torch.testing.assert_close(exact_output(asked).double(), truth.nan_to_num(), atol=1e-5, rtol=1e-5)
    for number in range(0, len(GRID), 5):
        predictor = candidates.predictor_of([GRID[number]] * 4)
        mask = predictor(asked.query, asked.key, **options)
        assert torch.equal(mask.to_dense()[0], found[number])
        result = tamis.attend(asked.query, asked.key, asked.value, mask, **options)
        error = (result.output.double() - truth).abs().sum((0, 2, 3)) / truth.abs().sum((0, 2, 3))
        # fp32 sums of a few hundred terms in two orders.
        torch.testing.assert_close(survey.l1[number], error, atol=2e-6, rtol=1e-4)
        square = (result.output.double() - truth).square().mean((0, 2, 3))
        torch.testing.assert_close(survey.square[number], square, atol=1e-9, rtol=1e-3)
        assert result.stats is not None
        torch.testing.assert_close(survey.density[number], result.stats.density_per_head)


def test_some_rows_stand_for_all() -> None:
    asked = call((4000, 4000), causal=True)
    assert sample_rows(asked, 1000) == list(range(32))
    for most in (1, 3, 7, 31):
        rows = sample_rows(asked, most)
        assert len(rows) == most
        assert rows[-1] == 31, "the longest row"
    rows, number = sample_rows(asked, 5), 4
    mask = candidates.predictor_of([GRID[number]] * 4)(asked.query, asked.key, causal=True)
    output = tamis.attend(asked.query, asked.key, asked.value, mask, causal=True).output
    looked_at = torch.cat([torch.arange(row * 128, min(row * 128 + 128, 4000)) for row in rows])
    exact = exact_output(asked)[:, :, looked_at]
    error = (output[:, :, looked_at] - exact).abs().sum((0, 2, 3)) / exact.abs().sum((0, 2, 3))
    survey = frontier(asked, candidates.masks(asked, GRID, rows, None), rows)
    torch.testing.assert_close(survey.l1[number], error.double(), atol=2e-6, rtol=1e-4)


def test_between_two_candidates() -> None:
    low, high = Candidate(cdf=0.9, similarity=0.1), Candidate(cdf=0.99, similarity=0.1)
    middle = candidates.between(low, high, 0.5)
    assert middle.cdf == pytest.approx(1 - 0.1**1.5)
    assert middle.similarity == 0.1
    assert candidates.between(Candidate(topk=0.1), Candidate(topk=0.4), 0.5).topk == pytest.approx(0.2)
    assert candidates.between(Candidate(topk=0.1), Candidate(topk=0.4), 1).topk == pytest.approx(0.4)


class Calls:
    """A source of prepared calls."""

    name = "Planted"

    def __init__(self, inputs: Sequence[Sequence[LayerCall]]) -> None:
        self._inputs = inputs
        self.left_out: Counter[str] = Counter()
        self.visits = 0

    def __len__(self) -> int:
        return len(self._inputs)

    def visit(self, number: int, function: Callable[[LayerCall], None]) -> None:
        self.visits += 1
        for asked in self._inputs[number]:
            function(asked)

    def identity(self) -> str:
        return "planted"


def planted(number: int, layer: str = "layer", step: int = 0) -> LayerCall:
    """Head 0 looks at one block of 64 keys per block of 128 queries, head 1 at all keys alike.

    Queries of block i and keys of blocks 2i and 2i + 1 share a direction; in head 0 only the first of the two is long.
    """
    generator = torch.Generator().manual_seed(number)
    blocks, dim = 8, 32
    directions = torch.eye(dim)[torch.randperm(dim, generator=generator)[:blocks]]
    query = torch.zeros(1, 2, blocks * 128, dim)
    key = torch.zeros(1, 2, blocks * 128, dim)
    query[0, 0] = directions.repeat_interleave(128, 0) * 12
    key[0, 0].view(blocks, 2, 64, dim)[:, 0] = directions[:, None] * 12
    query[0, 1] = torch.randn(blocks * 128, dim, generator=generator) * 0.01
    key[0, 1] = torch.randn(blocks * 128, dim, generator=generator) * 0.01
    value = torch.randn(1, 2, blocks * 128, dim, generator=generator)
    return LayerCall(layer, number, step, 0, query, key, value, False, None, None)


def test_planted_structure_gets_its_optimum_and_a_dense_head_is_dense() -> None:
    profile = tune_source(Calls([[planted(0)], [planted(1)]]), Calls([[planted(2)]]), Budget(0.05, 0.06))
    (stage,) = profile.layers["layer"]
    assert stage.evidence is not None
    assert stage.settings.predictor is not None
    # One block of 16 in every row and the sink, which is another one in all rows but the first: 15 of 128.
    optimum = (8 + 7) / (8 * 16)
    assert stage.evidence.density[0] == pytest.approx(optimum, abs=1e-6)
    assert stage.evidence.held_out_density[0] == pytest.approx(optimum, abs=1e-6)
    assert candidates.DENSE.topk == stage.settings.predictor.topk[1] == 1.0
    assert stage.evidence.density[1] == 1.0
    assert max(stage.evidence.l1_worst) <= 0.06
    assert (stage.evidence.samples, stage.evidence.held_out_samples) == (2, 1)


def test_every_setting_was_run() -> None:
    """What the evidence says is what a call with the settings does."""
    inputs = [[planted(0)], [planted(1)]]
    profile = tune_source(Calls(inputs), None, Budget(0.05, 0.06))
    settings, evidence = profile.at("layer"), profile.layers["layer"][0].evidence
    assert evidence is not None
    errors = []
    for (asked,) in inputs:
        truth = oracle.attention(asked.query, asked.key, asked.value).output
        output = tamis.sparse_attention(
            asked.query,
            asked.key,
            asked.value,
            predictor=settings.predictor,
            precision=settings.precision,
            pv_threshold=settings.pv_threshold,
        )
        assert isinstance(output, Tensor)
        errors.append((output - truth).abs().sum((0, 2, 3)) / truth.abs().sum((0, 2, 3)))
    assert torch.stack(errors).amax(0).tolist() == pytest.approx(evidence.l1_worst, abs=2e-6)
    assert torch.stack(errors).mean(0).tolist() == pytest.approx(evidence.l1, abs=2e-6)


def test_stages_have_settings_of_their_own() -> None:
    """Steps 0 and 1 are planted, later ones dense in both heads: one setting for all would be dense everywhere."""
    late = [planted(0, step=step) for step in (2, 3)]
    late = [
        LayerCall("layer", 0, x.step, 0, x.query[:, [1, 1]], x.key[:, [1, 1]], x.value, False, None, None) for x in late
    ]
    source = Calls([[planted(0, step=0), planted(0, step=1), *late]])
    profile = tune_source(source, None, Budget(0.05, 0.06), steps=[2])
    first, second = profile.layers["layer"]
    assert [(stage.first, stage.last) for stage in (first, second)] == [(0, 2), (2, None)]
    assert first.evidence is not None
    assert second.evidence is not None
    assert first.evidence.density[0] < 0.2
    assert second.evidence.density[0] == 1
    assert first.evidence.samples == 2
    with pytest.raises(ValueError, match="steps must be ascending"):
        tune_source(source, None, Budget(), steps=[2, 2])


def test_rounding_beyond_the_budget_runs_in_full_precision() -> None:
    profile = tune_source(Calls([[planted(0)]]), None, Budget(1e-5, 1e-5))
    assert profile.at("layer").precision == "full"
    (stage,) = profile.layers["layer"]
    assert stage.evidence is not None
    assert max(stage.evidence.l1_worst) <= 1e-5


class Stopped(Exception):
    """A process that was killed, as far as a test can do it."""


def journal_lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def test_an_interrupted_run_finds_what_an_uninterrupted_one_finds(tmp_path: Path) -> None:
    inputs = [[planted(n, "a"), planted(n, "b")] for n in range(2)]
    held = [[planted(5, "a"), planted(5, "b")]]
    path, budget = tmp_path / "journal", Budget(0.05, 0.06)
    whole_run = tune_source(Calls(inputs), Calls(held), budget, resume=path)
    lines = journal_lines(path)
    assert len(lines) == 1 + 2 * (2 * 2 + 2) + 2 + 1, "head; survey and trial of two inputs, held out"
    for kept in range(0, len(lines), 3):
        for rest in (b"", lines[kept][: len(lines[kept]) // 2]):
            path.write_bytes(b"".join(lines[:kept]) + rest)
            source = Calls(inputs)
            assert tune_source(source, Calls(held), budget, resume=path) == whole_run
            assert journal_lines(path) == lines
    again = Calls(inputs)
    assert tune_source(again, Calls(held), budget, resume=path) == whole_run
    assert again.visits == 0, "nothing is left to do"


def test_a_journal_of_another_run_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path, {"inputs": "a"})
    journal.put("x", [1.5])
    journal.close()
    again = Journal(path, {"inputs": "a"})
    assert again["x"] == [1.5]
    again.close()
    with pytest.raises(ValueError, match=r"of another run \(other inputs\)"):
        Journal(path, {"inputs": "b"})
    path.write_bytes(path.read_bytes().replace(b"1.5", b"2.5"))
    with pytest.raises(ValueError, match="damaged in line 2"):
        Journal(path, {"inputs": "a"})


def mortal_survey(call: LayerCall, most_rows: int, backend: str | None) -> dict[str, Any]:
    """The survey; over one call its process is killed, the first time."""
    if (call.layer, call.input) == ("b", 1):
        try:
            Path(os.environ["TAMIS_TEST_MARKER"]).touch(exist_ok=False)
        except FileExistsError:
            pass
        else:
            die()
    return survey(call, most_rows, backend)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def marker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("TAMIS_TEST_MARKER", str(tmp_path / "killed"))
    return tmp_path / "killed"


@pytest.fixture(params=["processes", "ray"])
def two_workers(request: pytest.FixtureRequest, marker: Path) -> Iterator[int | str]:
    """Two processes, or a local Ray cluster of two nodes with a core each, by its address."""
    if request.param == "processes":
        yield 2
        return
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the nodes do not have this file
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        yield f"ray@{cluster.address}"
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.filterwarnings("default")
def test_two_workers_find_the_same_though_one_is_killed(
    monkeypatch: pytest.MonkeyPatch, two_workers: int | str, marker: Path
) -> None:
    """And what costs worker after worker is an error."""
    monkeypatch.setattr(tamis.tuning, "survey", mortal_survey)
    inputs = [[planted(n, "a"), planted(n, "b"), planted(n, "c")] for n in range(2)]
    found = tune_source(Calls(inputs), None, Budget(0.05, 0.06), workers=two_workers)
    assert marker.exists(), "nobody was killed"
    if isinstance(two_workers, str):
        assert not pytest.importorskip("ray").is_initialized(), "the cluster that was joined is left"
    alone = tune_source(Calls(inputs), None, Budget(0.05, 0.06))
    assert found == alone
    monkeypatch.setattr(pool, "MOST_LOSSES", 0)
    doomed = pool.open_pool(two_workers, lambda key, result: None)
    doomed.submit("the call", die)
    with pytest.raises(RuntimeError, match="1 workers were lost over the call: they were killed from outside"):
        doomed.drain()
    if isinstance(two_workers, str):
        with pytest.raises(ValueError, match="this process has joined the Ray cluster at"):
            pool.open_pool("ray@127.0.0.1:1", lambda key, result: None)
    doomed.close()
    if isinstance(two_workers, str):
        captured_calls_on(two_workers.partition("@")[2], marker.parent)


@pytest.mark.filterwarnings("default")
def test_a_lost_worker_is_charged_to_its_own_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two jobs lose a worker each, as a job may; one that runs beside them has lost none, and runs once."""
    monkeypatch.setattr(pool, "MOST_LOSSES", 1)
    found: dict[str, Any] = {}
    workers = pool.open_pool(2, found.__setitem__)
    markers = [tmp_path / "first", tmp_path / "second"]
    try:
        workers.submit("patient", mortal.waits_for, tmp_path / "log", markers)
        for marker in markers:
            workers.submit(marker.name, mortal.dies_once, marker)
        workers.drain()
    finally:
        workers.close()
    assert found == {"patient": 1, "first": "found", "second": "found"}


def captured_calls_on(address: str, folder: Path) -> None:
    """`tamis tune --ray ADDRESS` on files finds what it finds without."""
    pytest.importorskip("safetensors")
    model = tiny()
    for number, ids in enumerate(texts(2, 256)):
        record(model, lambda ids=ids: model.model(ids, use_cache=False), folder / "captures", input=number)
    arguments = ["tune", "--captures", str(folder / "captures"), "--out"]
    assert cli.main([*arguments, str(folder / "far.json"), "--ray", address]) == 0
    assert cli.main([*arguments, str(folder / "here.json")]) == 0
    assert Profile.load(folder / "far.json") == Profile.load(folder / "here.json")


def test_workers_are_a_number_or_ray() -> None:
    for wrong in (0, True, "rays", "2"):
        with pytest.raises(ValueError, match="workers must be a number of processes above 0, 'ray' or 'ray@ADDRESS'"):
            pool.open_pool(wrong, lambda key, result: None)


def test_one_price_is_the_best_use_of_density() -> None:
    """Against all choices of three heads: none has less harm at no more density."""
    density, harm = torch.rand(5, 3, dtype=torch.float64), torch.rand(5, 3, dtype=torch.float64)
    assert torch.equal(choose.priced(density, harm, 0.0), density.argmin(0))
    assert torch.equal(choose.priced(density, harm, 1e9), harm.argmin(0))
    heads = torch.arange(3)
    everything = [torch.tensor(rows) for rows in itertools.product(range(5), repeat=3)]
    for price in (0.1, 0.5, 1.0, 2.0, 10.0):
        found = choose.priced(density, harm, price)
        spent, left = density[found, heads].sum(), harm[found, heads].sum()
        for other in everything:
            if density[other, heads].sum() < spent - 1e-12:
                assert harm[other, heads].sum() >= left


def tiny(layers: int = 2) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=2048,
        initializer_range=0.3,
    )
    return transformers.LlamaForCausalLM(config).eval()


def texts(count: int, length: int = 640) -> list[Tensor]:
    return [torch.randint(64, (1, length), generator=torch.Generator().manual_seed(n)) for n in range(count)]


def test_weights_are_those_of_the_derivative() -> None:
    """|J_h|^2 by finite differences in every entry of a head's output, one at a time."""
    model = tiny(1)
    ids = torch.randint(64, (1, 128), generator=torch.Generator().manual_seed(3))
    found = weights(ModelSource(model, [ids]), 0, draws=300)["model.layers.0.self_attn", 0]
    attention, inner = model.model.layers[0].self_attn, model.model
    with torch.no_grad():
        exact = inner(ids).last_hidden_state.double()
        expected = torch.zeros(4, dtype=torch.float64)
        for head in range(4):
            for place in range(0, 128, 16):
                for channel in range(8):

                    def nudge(_: Any, inputs: tuple[Tensor], p: int = place, c: int = head * 8 + channel) -> Any:
                        moved = inputs[0].clone()
                        moved[0, p, c] += 1e-2
                        return (moved,)

                    with attention.o_proj.register_forward_pre_hook(nudge):
                        delta = inner(ids).last_hidden_state.double() - exact
                    expected[head] += (delta / 1e-2).square().sum() * 16  # one place of 16
        expected /= exact.square().sum()
    # 300 draws of random signs, every 16th place, and a nudge that is not infinitely small.
    torch.testing.assert_close(found, expected, rtol=0.25, atol=0)
    assert all(parameter.requires_grad for parameter in model.parameters()), "as they were"


def test_a_budget_for_the_end_is_met_and_spares_more_than_one_bound() -> None:
    model, inputs = tiny(3), texts(2)
    model_error = End(ModelSource(model, inputs), "l1", None)
    even = tamis.tune(model, inputs, l1=0.1, pv_l1=0.1)
    reached = mean(model_error(even))
    spread = tamis.tune(model, inputs, end_l1=reached)
    assert spread.evidence["end_l1"] == pytest.approx(mean(model_error(spread)), rel=1e-4)
    assert spread.evidence["end_l1"] <= reached * 1.001
    assert mean_density(spread) <= mean_density(even) * 1.02


def mean_density(profile: Profile) -> float:
    found = [stages[0].evidence.density for stages in profile.layers.values() if stages[0].evidence is not None]
    assert len(found) == len(profile.layers)
    return sum(map(sum, found)) / sum(map(len, found))


def test_perplexity_as_the_budget() -> None:
    model, inputs = tiny(2), texts(2)
    profile = tamis.tune(model, inputs, end_perplexity=0.01)
    assert profile.budget == {"end_perplexity": 0.01}
    assert profile.evidence["end_perplexity"] <= 0.01
    with pytest.raises(tamis.UnsupportedError, match="token ids"):
        tamis.tune(model, [{"input_ids": inputs[0]}], end_perplexity=0.01)


def test_a_profile_of_tune_fits_its_model(tmp_path: Path) -> None:
    model, inputs = tiny(), texts(2)
    tamis.tune(model, inputs, l1=0.05, pv_l1=0.06, held_out=texts(3)[2:]).save(tmp_path / "p.json")
    profile = Profile.load(tmp_path / "p.json")
    assert set(profile.layers) == {f"model.layers.{n}.self_attn" for n in range(2)}
    with torch.no_grad(), tamis.apply(model, profile) as handle:
        model(inputs[0])
    assert handle.calls == {"sparse": 2, "dense": 0}
    for name, layer in handle.stats().items():
        evidence = profile.layers[name][0].evidence
        assert evidence is not None
        assert layer.last is not None
        # Evidence is the mean over two inputs, of which this is one.
        assert layer.last.density_per_head.tolist() == pytest.approx(evidence.density, abs=0.15)
        assert evidence.held_out_samples == 1


def test_calls_that_cannot_be_judged_are_named() -> None:
    model = tiny()
    with pytest.raises(ValueError, match="fewer than 128 queries': 2"):
        tamis.tune(model, texts(1, 100))
    padded = torch.ones(1, 640, dtype=torch.long)
    padded[:, :5] = 0
    with pytest.raises(ValueError, match="padding"):
        tamis.tune(model, [{"input_ids": texts(1)[0], "attention_mask": padded}])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"l1": 0}, "l1 must be above 0"),
        ({"l1": float("nan")}, "l1 must be above 0"),
        ({"l1": 0.1, "pv_l1": 0.05}, "pv_l1 must be at least l1"),
        ({"end_l1": 0.1, "end_perplexity": 0.1}, "exclude each other"),
        ({"workers": 0}, "workers must be"),
        ({"steps": [0]}, "steps must be"),
        ({"inputs": []}, "at least one input"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"inputs": texts(1)} | arguments
    with pytest.raises(ValueError, match=message):
        tamis.tune(tiny(), given.pop("inputs"), **given)


def test_the_end_of_captured_calls_is_unknown() -> None:
    with pytest.raises(ValueError, match="end_l1 needs a model"):
        tune_source(Calls([[planted(0)]]), None, Budget(end_l1=0.1))


def test_progress_is_told() -> None:
    told: list[tuple[str, int, int, str]] = []
    tune_source(Calls([[planted(0)]]), None, Budget(), progress=lambda *at: told.append(at))
    assert told == [("survey", 1, 1, ""), ("trial", 1, 1, "")]


def test_rungs_reach_from_sparse_to_dense() -> None:
    """Whatever the survey says, DENSE is among what is tried."""
    l1 = torch.linspace(1, 0, len(GRID), dtype=torch.float64)[None, :, None].expand(2, -1, 3)
    density = torch.linspace(0, 1, len(GRID), dtype=torch.float64)[None, :, None].expand(2, -1, 3)
    for budget in (1e-9, 0.05, 0.5, 2.0):
        for head in choose.within(l1, density, budget):
            assert head[-1] == DENSE
            assert len(head) == 6
    for head in choose.within(l1 + 1, density, 0.5):  # nothing holds
        assert set(head) == {DENSE}
    place = Place("a", 0)
    surveyed = {place: {"density": density, "square": l1**2}}
    found = whole.rungs(surveyed, {place: torch.ones(3, dtype=torch.float64)}, 0.1)
    assert all(head[-1] == DENSE and len(head) == 6 for head in found[place])


def test_the_worst_input_decides() -> None:
    """Two candidates: the sparser one holds on one input of two only, the other on both; stage 2 has its own bound."""
    count = len(choose.THRESHOLDS)
    l1 = torch.full((2, 2 * count, 1), 0.05, dtype=torch.float64)
    l1[1, :count] = 0.2
    l1[0, count + 3 :] = 0.085
    l1[0, count + 5 :] = 0.095
    density = torch.linspace(0.3, 0.1, count, dtype=torch.float64).repeat(2)[None, :, None].expand(2, -1, 1).clone()
    density[:, count:] += 0.4
    assert choose.best(l1, density, 0.08, 0.09) == torch.tensor([count + 4])
    assert choose.best(l1, density, 0.08, 0.08) == torch.tensor([count + 2])
    assert choose.best(l1, density, 0.01, 0.09) is None


def test_every_head_gets_its_own_trial() -> None:
    tried = [
        Trial((Candidate(topk=0.1), Candidate(topk=0.2)), (4.0, 5.0)),
        Trial((Candidate(topk=0.3), Candidate(topk=0.4)), (6.0, 7.0)),
    ]
    found = {
        "l1": torch.tensor([[[0.01, 0.02], [0.03, 0.04]], [[0.05, 0.06], [0.07, 0.08]]]),
        "density": torch.tensor([[[0.1, 0.2], [0.3, 0.4]]] * 2),
    }
    made = decide(tried, torch.tensor([1, 0]), found, "int8")
    assert made.trial == Trial((Candidate(topk=0.3), Candidate(topk=0.2)), (6.0, 5.0))
    assert made.evidence.l1 == pytest.approx((0.05, 0.04))
    assert made.evidence.l1_worst == pytest.approx((0.07, 0.06))
    assert made.evidence.density == pytest.approx((0.3, 0.2))


def test_trials_run_as_they_will_be_used() -> None:
    """Candidates, thresholds of their own and precision: error and density of each are those of `sparse_attention`."""
    asked = call((700, 700), causal=True)
    heads = (Candidate(topk=0.3), DENSE, Candidate(cdf=0.8), Candidate(cdf=0.9, similarity=0.3))
    tried = [Trial(heads, (math.inf,) * 4), Trial(heads, (math.inf, 1.0, 2.0, 0.5)), Trial((DENSE,) * 4, (3.0,) * 4)]
    truth = oracle.attention(asked.query, asked.key, asked.value, causal=True).output
    for precision in ("int8", "full"):
        found = evaluate(asked, tried, precision, None)
        for number, trial in enumerate(tried):
            output, stats = tamis.sparse_attention(
                asked.query,
                asked.key,
                asked.value,
                is_causal=True,
                enable_gqa=True,
                predictor=candidates.predictor_of(trial.heads),
                pv_threshold=None if number == 0 else trial.thresholds,
                precision=precision,
                return_stats=True,
            )
            assert torch.equal(found.density[number], stats.density_per_head)
            error = (output - truth).abs().sum((0, 2, 3)) / truth.abs().sum((0, 2, 3))
            assert found.l1[number].tolist() == pytest.approx(error.tolist(), abs=2e-6)
            square = (output - truth).square().mean((0, 2, 3))
            assert found.square[number].tolist() == pytest.approx(square.tolist(), rel=1e-3, abs=1e-12)
        assert found.density[1].sum() < found.density[0].sum(), "stage 2 was at work"


def test_a_profile_remembers_its_end(tmp_path: Path) -> None:
    made = Profile({"a": (Stage(LayerSettings(None)),)}, evidence={"end_l1": 0.02})
    made.save(tmp_path / "p.json")
    assert json.loads((tmp_path / "p.json").read_text(encoding="utf-8"))["evidence"] == {"end_l1": 0.02}
