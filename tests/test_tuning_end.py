"""A budget for the end of a model: held on all inputs, by the model's own figures, whatever runs around it."""

from __future__ import annotations

import math
from statistics import fmean, stdev
from typing import Any

import pytest
import torch
from test_tuning import Calls, planted, texts, tiny
from torch import Tensor

import tamis
from tamis.integrations.hook import install
from tamis.integrations.request import dense
from tamis.profile import LayerSettings, Profile, Stage
from tamis.tuning import ending, run, whole
from tamis.tuning.calls import exact_output
from tamis.tuning.candidates import DENSE, GRID, Candidate
from tamis.tuning.ending import End, perplexity, weights
from tamis.tuning.evaluate import Trial
from tamis.tuning.journal import Journal
from tamis.tuning.run import Place, Run
from tamis.tuning.settings import Tuning
from tamis.tuning.sources import ModelSource

transformers = pytest.importorskip("transformers")

NAME = "model.layers.0.self_attn"


def everything(model: Any) -> Profile:
    """All blocks of all layers, in full precision."""
    settings = LayerSettings(tamis.Sparge(topk=1.0, similarity=-1.0), None, "full")
    return Profile({f"model.layers.{n}.self_attn": (Stage(settings),) for n in range(model.config.num_hidden_layers)})


def test_the_budget_holds_on_all_inputs_though_the_first_are_easy() -> None:
    """One token over and over needs no attention: a price that was looked for there says nothing of the others."""
    model = tiny(2)
    inputs = [*(torch.full((1, 384), 7) for _ in range(2)), *texts(3, 384)]
    held_out = texts(5, 384)[3:]
    profile = tamis.tune(model, inputs, end_l1=0.05, held_out=held_out)
    errors = End(ModelSource(model, inputs), "l1", None)(profile)
    assert fmean(errors) <= 0.05
    assert profile.evidence["end_l1"] == pytest.approx(fmean(errors), rel=1e-4)
    assert profile.evidence["end_l1_worst"] == pytest.approx(max(errors), rel=1e-4)
    elsewhere = End(ModelSource(model, held_out), "l1", None)(profile)
    assert profile.evidence["held_out_end_l1"] == pytest.approx(fmean(elsewhere), rel=1e-4)
    assert profile.evidence["held_out_end_l1_worst"] == pytest.approx(max(elsewhere), rel=1e-4)


def choices(count: int = 40) -> tuple[dict[Place, list[Trial]], dict[Place, dict[str, Tensor]]]:
    """One head with many settings: error falls with density."""
    density = torch.linspace(0.02, 1, count, dtype=torch.float64)
    square = torch.logspace(0, -8, count, dtype=torch.float64)
    tried = [Trial((Candidate(topk=float(x)),), (math.inf,)) for x in density]
    found = {"density": density[None, :, None], "square": square[None, :, None], "l1": square[None, :, None]}
    return {Place("a", 0): tried}, {Place("a", 0): found}


def density_of(profile: Profile) -> float:
    evidence = profile.layers["a"][0].evidence
    assert evidence is not None
    return evidence.density[0]


@pytest.mark.parametrize("weight", [1e-9, 1.0, 1e9])
@pytest.mark.parametrize("factors", [(1.0, 1.0), (1e-9, 1e-9, 5.0, 9.0)])
def test_the_price_is_found_wherever_it_is(weight: float, factors: tuple[float, ...]) -> None:
    """First order may be wrong by far, and the first two inputs easy by far; all count, with their spread."""
    tried, outcome = choices()
    asked: list[tuple[float, int | None]] = []

    def errors(profile: Profile, inputs: int | None) -> list[float]:
        asked.append((density_of(profile), inputs))
        return [0.1 * (1 - density_of(profile)) * factor for factor in factors[:inputs]]

    heads = {Place("a", 0): torch.tensor([weight], dtype=torch.float64)}
    decisions, found = whole.settle(tried, outcome, heads, 0.05, errors, (), "int8")
    density = decisions[Place("a", 0)].evidence.density[0]
    likely = fmean(factors) + stdev(factors) / math.sqrt(len(factors))
    assert found == [pytest.approx(0.1 * (1 - density) * factor, abs=1e-6) for factor in factors]
    assert fmean(found) + stdev(found) / math.sqrt(len(found)) <= 0.05
    # A rung of the 40 and a half of the narrowest bracket beyond the sparsest that holds.
    assert density <= max(1 - 0.5 / likely, 0) + 0.08
    assert len(asked) < 60


@pytest.mark.parametrize("error", [1.0, math.nan, math.inf])
def test_a_budget_out_of_reach_is_an_error(error: float) -> None:
    tried, outcome = choices()
    heads = {Place("a", 0): torch.ones(1, dtype=torch.float64)}
    with pytest.raises(ValueError, match=r"no settings in precision 'int8' reach an error of 0.05 .*precision='full'"):
        whole.settle(tried, outcome, heads, 0.05, lambda profile, inputs: [error], (), "int8")


def test_errors_that_are_no_numbers_are_never_chosen() -> None:
    tried, outcome = choices(5)
    place = Place("a", 0)
    heads = {place: torch.ones(1, dtype=torch.float64)}
    outcome[place]["square"][0, :2] = torch.tensor([[math.nan], [math.inf]])
    decisions, _ = whole.settle(tried, outcome, heads, 0.5, lambda profile, inputs: [0.0], (), "int8")
    assert decisions[place].evidence.density[0] == pytest.approx(0.51), "the sparsest with an error"
    outcome[place]["square"][0] = math.nan
    with pytest.raises(ValueError, match="layer a: no setting of a head has an error that is finite"):
        whole.settle(tried, outcome, heads, 0.5, lambda profile, inputs: [0.0], (), "int8")


def test_rungs_lie_around_the_expected_price() -> None:
    """Six settings that differ, from sparse to dense, with the one between them whose expected error is the budget."""
    square = torch.linspace(1, 0, len(GRID), dtype=torch.float64)[None, :, None] ** 4
    density = torch.linspace(0, 1, len(GRID), dtype=torch.float64)[None, :, None]
    place = Place("a", 0)
    surveyed = {place: {"density": density, "square": square}}
    heads = {place: torch.ones(1, dtype=torch.float64)}
    ((rung,),) = whole.rungs(surveyed, heads, 0.1).values()
    numbers = [GRID.index(candidate) for candidate in rung]
    assert numbers == sorted(set(numbers))
    assert rung[-1] == DENSE
    errors = [math.sqrt(float(square[0, number, 0])) for number in numbers]
    assert errors[2] <= 0.1 < math.sqrt(float(square[0, numbers[2] - 1, 0]))


def test_a_model_whose_output_is_not_finite_is_refused() -> None:
    model = tiny(1)
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    with pytest.raises(ValueError, match="own output for input 0"):
        End(ModelSource(model, texts(1, 200)), "l1", None)(everything(model))


def small(kind: str, **options: Any) -> Any:
    """A random language model, with logits far from even."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, f"{kind}Config")(**shape, initializer_range=0.5, **options)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Granite", {"logits_scaling": 8.0}),
        ("Cohere", {"logit_scale": 0.0625}),
        ("Gemma2", {"final_logit_softcapping": 5.0, "head_dim": 8}),
        ("Llama", {}),
    ],
)
def test_perplexity_is_the_models_own(kind: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a model does to its logits; a few rows at a time, of every text of a batch."""
    monkeypatch.setattr(ending, "_ROWS", 50)
    model, ids = small(kind, **options), torch.cat(texts(2, 130))
    found = perplexity(model, ModelSource(model, [ids]).run(0), ids)
    with torch.no_grad():
        loss = model(ids, labels=ids).loss
        expected = math.exp(float(loss))
        after = float(model(ids, labels=ids).loss)
    assert found == pytest.approx(expected, rel=1e-5)
    assert after == float(loss), "the model runs as before"


def test_models_without_such_logits_have_no_perplexity() -> None:
    ids = texts(1, 130)[0]
    config = transformers.OPTConfig(
        hidden_size=32,
        ffn_dim=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=64,
        max_position_embeddings=200,
        word_embed_proj_dim=32,
    )
    for model, given, message in (
        (transformers.OPTForCausalLM(config).eval(), ids, "does not run its base model as a whole"),
        (tiny(1).model, ids, "language model with its head"),
        (tiny(1), ids.float(), "token ids"),
    ):
        with pytest.raises(tamis.UnsupportedError, match=message):
            perplexity(model, ModelSource(model, [ids]).run(0), given)
    with pytest.raises(ValueError, match="two tokens"):
        perplexity(tiny(1), None, ids[:, :1])


def test_perplexity_counts_whichever_way_it_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the mean over the inputs is that of sizes."""
    model = tiny(1)
    falling = iter([10.0, 20.0, 9.0, 22.0])
    monkeypatch.setattr(ending, "perplexity", lambda *of: next(falling))
    error = End(ModelSource(model, texts(2, 130)), "perplexity", None)
    order: list[float] = [*error(everything(model), 1)]
    assert order == [pytest.approx(1.0)], "20 for 10"
    assert ending._distance(9.0, 10.0) == pytest.approx(0.1)


def test_the_end_is_measured_against_dense_attention() -> None:
    """Not against what runs in the model just now."""
    model, ids = tiny(2), texts(1, 640)[0]
    with install(model, lambda request: dense(request) * 0.5):
        (error,) = End(ModelSource(model, [ids]), "l1", None)(everything(model))
    assert error < 1e-5, "fp32, two layers"


def tuning(source: ModelSource, bounds: tuple[int, ...], places: list[Place]) -> Tuning:
    return Tuning(Run(Journal(None, {}), bounds, 1, 1, None), source, {place: {} for place in places}, "int8", None)


def test_weights_of_a_stage_are_those_of_all_its_calls() -> None:
    """Calls that cannot be judged count as steps and have no weight."""
    model = tiny(1)
    one, two = texts(2, 150)

    def twice() -> Any:
        model(one[:, :64])
        first, second = model.model(one).last_hidden_state, model.model(two).last_hidden_state
        return first + second

    source = ModelSource(model, [texts(3, 150)[2], twice])
    single = weights(source, 1)
    assert sorted(single) == [(NAME, 1), (NAME, 2)]
    sums = tuning(source, (1,), [Place(NAME, 0), Place(NAME, 1)])._weights(source)
    torch.testing.assert_close(sums[Place(NAME, 1)], single[NAME, 1] + single[NAME, 2])
    torch.testing.assert_close(sums[Place(NAME, 0)], weights(source, 0)[NAME, 0])
    with pytest.raises(ValueError, match="layer elsewhere has no call of 128 queries"):
        tuning(source, (), [Place("elsewhere", 0)])._weights(source)


def test_weights_look_at_the_first_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny(1), texts(1, 300)[0]
    monkeypatch.setattr(ending, "_TOKENS", 200)
    short = weights(ModelSource(model, [ids]), 0)[NAME, 0]
    torch.testing.assert_close(short, weights(ModelSource(model, [ids[:, :200]]), 0)[NAME, 0])


def test_inference_mode_around_the_run_or_around_the_model() -> None:
    model, ids = tiny(1), texts(1, 150)
    expected = weights(ModelSource(model, ids), 0)[NAME, 0]
    with torch.inference_mode():
        torch.testing.assert_close(weights(ModelSource(model, ids), 0)[NAME, 0], expected)
        built = tiny(1)
    with pytest.raises(tamis.UnsupportedError, match=r"built or loaded inside of torch\.inference_mode"):
        weights(ModelSource(built, ids), 0)


def test_the_callers_autocast_changes_no_measure() -> None:
    asked = planted(0)
    tried = [Trial((DENSE, GRID[0]), (math.inf, math.inf))]
    plain = run.survey(asked, 16, None), run.trial(asked, tried, "full", None)
    exact = exact_output(asked)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(exact_output(asked), exact)
        assert (run.survey(asked, 16, None), run.trial(asked, tried, "full", None)) == plain


def test_a_budget_for_the_end_needs_models() -> None:
    model = tiny(1)
    with pytest.raises(ValueError, match="end_l1 needs a model"):
        tamis.tuning.tune_source(
            ModelSource(model, texts(1, 150)), Calls([[planted(0, NAME)]]), tamis.tuning.Budget(end_l1=0.1)
        )


def test_the_search_for_a_price_is_not_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_TELL_SECONDS", 0.0)
    told: list[tuple[str, int, int, str]] = []
    tamis.tune(tiny(1), texts(1, 150), end_l1=0.2, progress=lambda *at: told.append(at))
    assert ("end of the model", 0, 1, "runs with settings that might do") in told
