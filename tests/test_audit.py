"""The audit: exact rows against the oracle, honest statistics in seeded trials, and models that do not notice it.

Trials are seeded, so that a test passes always or never. Tolerances of shares over n trials are three standard
deviations of the binomial distribution, of means three standard errors as estimated from the trials.
"""

from __future__ import annotations

import math
import re
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from samples import block_mask, qkv

import tamis
from tamis.integrations import rows
from tamis.integrations.apply import apply
from tamis.integrations.audit import Audit, Auditor, LayerAudit, _Layer
from tamis.integrations.request import Request

DEFAULTS: dict[str, Any] = {
    "layer": "layer",
    "module": torch.nn.Identity(),
    "mask": None,
    "causal": False,
    "window": None,
    "segments": None,
    "scale": None,
    "softcap": None,
    "sink_logits": None,
    "dropout": 0.0,
    "obstacle": None,
}
Calls = list[tuple[Request, torch.Tensor]]


def request(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **settings: Any) -> Request:
    return Request(query=query, key=key, value=value, **{**DEFAULTS, **settings})


@torch.no_grad()
def truth_of(call: Request, **settings: Any) -> torch.Tensor:
    return oracle.attention(
        call.query,
        call.key,
        call.value,
        causal=call.causal,
        window=call.window,
        scale=call.scale,
        attn_mask=call.mask,
        segments=call.segments,
        softcap=call.softcap,
        sink_logits=call.sink_logits,
        **settings,
    ).output


def segments(batch: int, q_len: int, kv_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Padding on the left of the second sequence."""
    codes = torch.zeros(batch, kv_len, dtype=torch.int32)
    codes[1, : kv_len - q_len // 2] = -1
    return codes[:, kv_len - q_len :], codes


CASES: dict[str, Callable[[], Request]] = {
    "plain": lambda: request(*qkv(batch=2, heads=4, q_len=65, dim=24)),
    "one row": lambda: request(*qkv(q_len=1, kv_len=77)),
    "causal": lambda: request(*qkv(heads=4, kv_heads=2, q_len=201), causal=True),
    "causal, chunk": lambda: request(*qkv(batch=2, heads=4, kv_heads=1, q_len=63, kv_len=200), causal=True),
    "causal, more queries": lambda: request(*qkv(q_len=200, kv_len=63), causal=True),
    "window": lambda: request(*qkv(heads=4, kv_heads=2, q_len=201), causal=True, window=30),
    "window, both sides": lambda: request(*qkv(q_len=111, kv_len=150), window=17),
    "padding": lambda: request(*qkv(batch=2, q_len=90, kv_len=130), causal=True, segments=segments(2, 90, 130)),
    "mask": lambda: request(*qkv(batch=2, q_len=90, kv_len=130), mask=torch.rand(2, 1, 90, 130) < 0.1),
    "mask of one row": lambda: request(*qkv(batch=2, q_len=90, kv_len=130), mask=torch.rand(1, 2, 1, 130) < 0.02),
    "softcap": lambda: request(*qkv(q_len=100), causal=True, softcap=0.7),
    "sinks": lambda: request(*qkv(heads=4, q_len=100), causal=True, sink_logits=torch.randn(4) * 3),
    "sinks alone": lambda: request(*qkv(heads=2, q_len=64, kv_len=9), causal=True, sink_logits=torch.randn(2)),
    "scale and value_dim": lambda: request(*qkv(q_len=100, value_dim=12), scale=1.0),
    "bf16": lambda: request(*qkv(heads=4, kv_heads=2, q_len=150, dtype=torch.bfloat16), causal=True),
}


@pytest.mark.parametrize("name", list(CASES))
def test_rows_are_exact(name: str) -> None:
    call = CASES[name]()
    generator = torch.Generator().manual_seed(3)
    drawn = rows.draw(rows.Shape.of(call), call.query.shape[0], 1.0, generator)
    assert drawn is not None
    places = drawn[0]
    found = rows.exact(call, places)
    index = places.flatten(2)[..., None]
    expected, plain = (truth_of(call, dtype=kind).take_along_dim(index, 2) for kind in (torch.float64, torch.float32))
    # The yardstick adds a row's terms one by one; a matrix product's order differs by as much.
    oracle.assert_within(found.reshape(expected.shape), expected, plain)


def test_rows_are_exact_under_autocast() -> None:
    call = CASES["causal"]()
    places = torch.arange(200).reshape(1, 1, 100, 2).expand(1, 4, 100, 2)
    expected = rows.exact(call, places)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(rows.exact(call, places), expected)


def test_scores_in_many_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few scores may be held at a time, the rows are the same up to the order of sums."""
    call = CASES["window"]()
    places = torch.arange(200).reshape(1, 1, 100, 2).expand(1, 4, 100, 2)
    expected = rows.exact(call, places)
    monkeypatch.setattr(rows, "SCORES", 1)
    assert len(rows.Shape.of(call).products(100)) == 100
    torch.testing.assert_close(rows.exact(call, places), expected, rtol=0, atol=1e-6)  # values of size 1, sums of 30


SHAPES = [
    rows.Shape(heads, q_len, kv_len, causal, window)
    for heads, q_len, kv_len in ((1, 1, 1), (2, 7, 300), (8, 128, 128), (8, 1000, 1000), (4, 300, 900), (2, 200, 63))
    for causal in (False, True)
    for window in (None, 1, 48)
] + [rows.Shape(9, 65_536, 65_536, True, None), rows.Shape(9, 8_192, 8_192, False, None)]


@pytest.mark.parametrize("shape", SHAPES[:-2], ids=str)
def test_work_is_what_is_visible(shape: rows.Shape) -> None:
    seen = oracle.visible(shape.q_len, shape.kv_len, causal=shape.causal, window=shape.window)
    assert shape.work == int(seen.expand(1, 1, shape.q_len, shape.kv_len).sum())
    for row in range(shape.q_len):
        low, high = shape.keys(row, row + 1)
        assert not seen[0, 0, row % seen.shape[2], :low].any()
        assert not seen[0, 0, row % seen.shape[2], high:].any()


@pytest.mark.parametrize("share", [0.0005, 0.005, 0.1, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_mean_cost_is_the_share_at_most(shape: rows.Shape, share: float) -> None:
    probability, pairs = rows.plan(shape, share)
    assert 0 <= probability <= 1
    few, more = int(pairs), pairs - int(pairs)
    cost = probability * ((1 - more) * shape.cost(few) + (more * shape.cost(few + 1) if more else 0))
    assert cost <= share * shape.work * (1 + 1e-9)
    if shape.work and share <= 0.1:
        assert cost >= share * shape.work * (1 - 1e-9)


@pytest.mark.parametrize("shape", [rows.Shape(2, 100, 100, True, None), rows.Shape(2, 33, 100, False, None)], ids=str)
def test_every_row_is_drawn_equally_often(shape: rows.Shape) -> None:
    """Weighted by 1 / probability, counts of a row are 2 pairs / q_len a call, with a Poisson-like spread at most."""
    generator = torch.Generator().manual_seed(0)
    share, calls = 0.2, 4000
    weights = torch.zeros(2, shape.q_len, dtype=torch.float64)
    squares = torch.zeros_like(weights)
    for _ in range(calls):
        drawn = rows.draw(shape, 1, share, generator)
        if drawn is None:
            continue
        places, probability = drawn
        weight = shape.q_len / (2 * places.shape[2] * probability)
        once = torch.zeros_like(weights)
        once.scatter_add_(1, places[0].flatten(1), torch.full_like(places[0].flatten(1), 1).double() * weight)
        weights, squares = weights + once, squares + once**2
    deviation = ((squares / calls - (weights / calls) ** 2) / calls).sqrt()
    # 200 rows: the largest of 200 normal deviates exceeds 4.5 once in 700 times.
    assert ((weights / calls - 1).abs() <= 4.5 * deviation).all()


def population(seed: int, calls: int, length: int) -> Calls:
    """Sparse calls of unlike error, GQA and causality included."""
    torch.manual_seed(seed)
    found = []
    for number in range(calls):
        query, key, value = qkv(heads=4, kv_heads=2, q_len=length, dim=16)
        query = query * (1 + number % 3)
        mask = block_mask((length, length), heads=4, block_size=(64, 64), density=0.6)
        output = tamis.attend(query, key, value, mask, causal=True, precision="int8").output
        found.append((request(query, key, value, causal=True), output))
    return found


def relative_l1(calls: Calls) -> float:
    pairs = [(truth_of(call), output.double()) for call, output in calls]
    return float(
        sum((truth - output).abs().sum() for truth, output in pairs) / sum(truth.abs().sum() for truth, _ in pairs)
    )


def audited(calls: Calls, **settings: Any) -> LayerAudit:
    auditor = Auditor(Audit(**{"budget": math.inf, "seed": 0, **settings}))
    for call, output in calls:
        auditor.look(call, output)
    return auditor.report()["layer"]


# Calls of which every one is audited, and many short ones of which few are: the two parts of the variance.
@pytest.mark.parametrize(("calls", "length", "share"), [(3, 320, 0.12), (60, 64, 0.1)], ids=["long", "short"])
def test_intervals_cover_the_truth_in_95_of_100_trials(calls: int, length: int, share: float) -> None:
    many = population(1, calls, length)
    truth = relative_l1(many)
    trials = 200
    found = [audited(many, share=share, seed=seed) for seed in range(trials)]
    every = all(audit.audited == calls for audit in found)
    assert every == (length == 320)
    covered = sum(audit.low <= truth <= audit.high for audit in found) / trials
    assert abs(covered - 0.95) <= 3 * math.sqrt(0.95 * 0.05 / trials)
    estimates = [audit.estimate for audit in found]
    assert abs(statistics.mean(estimates) - truth) <= 3 * statistics.stdev(estimates) / math.sqrt(trials)
    # The interval says something: it is no wider than that of the estimates' true spread by more than a fifth.
    widths = statistics.median(audit.high - audit.low for audit in found)
    assert widths <= 1.2 * 2 * 1.96 * statistics.stdev(estimates)
    shares = [audit.share for audit in found]
    # What cannot be divided: one pair of rows a head, or one call.
    assert statistics.mean(shares) <= share + 3 * statistics.stdev(shares) / math.sqrt(trials)
    call = rows.Shape.of(many[0][0])
    pairs = int(rows.plan(call, share)[1])
    assert max(shares) <= share + (call.cost(pairs + 1) - call.cost(pairs)) / call.work if every else True
    assert found[0].rows > 0
    assert found[0].calls == calls


@pytest.mark.parametrize("lengths", [[128], [128] + [64, 48] * 12], ids=["one call", "some of many calls"])
def test_estimate_and_interval_by_the_formulas(lengths: list[int]) -> None:
    """R, the two parts of the variance and the degrees of freedom, spelled out on the same rows."""
    share, seed = 0.3, 5
    torch.manual_seed(2)
    many = [call for number, length in enumerate(lengths) for call in population(number, 1, length)]
    audit = audited(many, share=share, seed=seed)
    generator = Auditor(Audit(seed=seed))._generator("layer")
    drawn = [(call, output, rows.draw(rows.Shape.of(call), 1, share, generator)) for call, output in many]
    chosen = [(call, output, found) for call, output, found in drawn if found is not None]
    assert audit.audited == len(chosen)
    sums = []
    for call, output, (places, probability) in chosen:
        index = places.flatten(2)[..., None]
        truth, got = (tensor.double().take_along_dim(index, 2) for tensor in (truth_of(call), output))
        weight = call.query.shape[2] / (2 * places.shape[2]) / probability
        y, x = (part.abs().sum(-1).reshape(places.shape) * weight for part in (truth - got, truth))
        sums.append((probability, y, x))
    ratio = float(sum(y.sum() for _, y, _ in sums) / sum(x.sum() for _, _, x in sums))
    within = torch.cat([p * (y - ratio * x).diff(dim=-1).flatten() ** 2 for p, y, x in sums])
    parts = [(within, 1.0, math.inf)]
    some = [(p, y, x) for p, y, x in sums if p < 1]
    if some:
        between = torch.stack([(1 - p) * (y - ratio * x).sum() ** 2 for p, y, x in some])
        parts.append((between, len(some) / (len(some) - 1), len(some) - 1))
    variance = sum(float(squares.sum()) * factor for squares, factor, _ in parts)
    spread = sum(
        (float(squares.sum()) * factor) ** 2 / min(float(3 * squares.sum() ** 2 / (squares**2).sum() - 2), most)
        for squares, factor, most in parts
    )
    half = STUDENT(variance**2 / spread) * math.sqrt(variance) / float(sum(x.sum() for _, _, x in sums))
    # y and x of the audit are in fp32, sums of 16 terms of size 1; from 3 degrees of freedom on t is good to 1.5e-3.
    assert variance**2 / spread > 3
    assert audit.estimate == pytest.approx(ratio, rel=1e-5)
    assert audit.high - audit.low == pytest.approx(2 * half, rel=1.6e-3)


def STUDENT(freedom: float) -> float:
    """The 97.5% point of Student's t by bisecting its distribution, integrated by Simpson's rule."""

    def upper(t: float) -> float:
        # With x = sqrt(freedom) tan(a) the density is proportional to cos(a) ** (freedom - 1).
        def area(end: float) -> float:
            steps = 2000
            at = [math.cos(end * i / steps) ** (freedom - 1) for i in range(steps + 1)]
            return end / steps / 3 * (at[0] + at[-1] + 4 * sum(at[1:-1:2]) + 2 * sum(at[2:-1:2]))

        return 0.5 - 0.5 * area(math.atan(t / math.sqrt(freedom))) / area(math.pi / 2 * (1 - 1e-12))

    low, high = 0.0, 20.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if upper(middle) > 0.025 else (low, middle)
    return low


def test_student() -> None:
    from tamis.integrations.audit import _student

    for freedom, error in ((2, 9e-3), (3, 1.5e-3), (8, 2e-5), (17, 2e-6), (400, 1e-6)):
        assert _student(0.025, freedom) == pytest.approx(STUDENT(freedom), rel=error)


def test_samples_depend_on_the_seed_and_on_nothing_else() -> None:
    many = population(2, 3, 128)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = audited(many, share=0.1, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(100)
    assert audited(many, share=0.1, seed=7) == first
    assert audited(many, share=0.1, seed=8).estimate != first.estimate
    auditor = Auditor(Audit(share=0.1, seed=7, budget=math.inf))
    for _ in range(2):
        for call, output in many:
            auditor.look(call, output)
        assert auditor.report()["layer"] == first
        auditor.reset()


def test_too_few_rows_claim_nothing() -> None:
    """One call that might not have been audited says nothing about the others; one row has no spread."""
    many = population(3, 40, 64)
    seeds = (seed for seed in range(100) if audited(many, share=0.005, seed=seed).audited == 1)
    audit = audited(many, share=0.005, seed=next(seeds))
    assert (audit.low, audit.high) == (0.0, math.inf)
    assert audit.estimate > 0
    none = audited(many[:1], share=1e-6)
    assert (none.calls, none.audited, none.rows, none.low, none.high) == (1, 0, 0, 0.0, math.inf)
    single = request(*qkv(heads=1, q_len=1, kv_len=70))
    audit = audited([(single, truth_of(single).float() + 0.1)], share=1.0)
    assert audit.high == math.inf


def test_the_callback_is_called_exactly_once_per_layer_and_only_beyond_the_budget() -> None:
    many = population(1, 6, 256)
    truth = relative_l1(many)
    calls: list[tuple[str, LayerAudit]] = []
    for budget, expected in ((0.5 * truth, 1), (2 * truth, 0)):
        calls.clear()
        auditor = Auditor(Audit(share=0.1, seed=0, budget=budget, on_exceeded=lambda *seen: calls.append(seen)))
        for call, output in many:
            auditor.look(call, output)
        assert [name for name, _ in calls] == ["layer"] * expected
        assert auditor.report()["layer"].exceeded == bool(expected)
    auditor = Auditor(Audit(share=0.1, seed=0, budget=0.5 * truth, on_exceeded=lambda *seen: calls.append(seen)))
    auditor.look(*many[0])
    ((_, audit),) = calls
    assert audit.exceeded
    assert audit.low > 0.5 * truth
    auditor.reset()
    auditor.look(*many[0])
    assert len(calls) == 2


def test_false_alarms_are_rare_however_long_the_use() -> None:
    """At a budget of the very error, five looks each: at most 2.5% of the trials, and three standard deviations."""
    many = population(1, 16, 128)
    # What a look sees is the error of the calls so far: no look's own error may exceed the budget.
    budget = max(relative_l1(many[: 2**look]) for look in range(5))
    trials = 200

    def alarms(budget: float) -> float:
        found = [audited(many, share=0.15, seed=seed, budget=budget, on_exceeded=print) for seed in range(trials)]
        return sum(audit.exceeded for audit in found) / trials

    assert alarms(budget) <= 0.025 + 3 * math.sqrt(0.025 * 0.975 / trials)
    assert alarms(0.8 * budget) > 0.5


def test_without_a_callback_it_warns_once() -> None:
    many = population(1, 4, 256)
    auditor = Auditor(Audit(share=0.1, seed=0, budget=0.01))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for call, output in many:
            auditor.look(call, output)
    (warning,) = caught
    assert re.match(r"layer: relative L1 error .* exceeds the budget of 0.01: run", str(warning.message))


def test_values_that_are_not_finite_are_flagged() -> None:
    query, key, value = qkv(heads=2, q_len=128, dim=16)
    call = request(query, key, value)
    good = truth_of(call).float() * 1.01
    bad = good.clone()
    bad[0, 1, 64:] = torch.nan
    with pytest.warns(UserWarning, match="layer: .* audited rows are not finite"):
        audit = audited([(call, bad)], share=0.3)
    assert 0 < audit.nonfinite < audit.rows
    assert audit.undefined == 0
    assert audit.exceeded
    # Rows that are finite still count: all of them err by 1%, up to fp32.
    assert audit.estimate == pytest.approx(0.01, rel=1e-3)
    value = value.clone()
    value[0, 0, 5] = torch.inf
    call = request(query, key, value)
    for output in (good, truth_of(call).float()):
        audit = audited([(call, output)], share=0.3)
        assert (audit.nonfinite, audit.exceeded) == (0, False)
        assert 0 < audit.undefined < audit.rows


def test_inference_mode_may_come_and_go() -> None:
    many = population(4, 3, 128)
    auditor = Auditor(Audit(share=0.3, budget=math.inf, seed=0))
    for number, (call, output) in enumerate(many):
        with torch.inference_mode(number % 2 == 0):
            auditor.look(call, output)
    assert auditor.report()["layer"] == audited(many, share=0.3)


def test_every_handle_looks_at_other_rows() -> None:
    """A seed of one's own repeats itself; without one, short lives of a model add up."""
    torch.manual_seed(6)
    many = population(0, calls=3, length=300)
    assert len({audited(many, share=0.1, seed=3).estimate for _ in range(4)}) == 1
    assert len({audited(many, share=0.1, seed=None).estimate for _ in range(4)}) > 1
    auditor = Auditor(Audit(share=0.1, budget=math.inf))
    found = set()
    for _ in range(4):
        for call, output in many:
            auditor.look(call, output)
        found.add(auditor.report()["layer"].estimate)
        auditor.reset()
    assert len(found) > 1


def test_what_was_not_looked_at_is_unknown() -> None:
    many = population(0, calls=1, length=300)
    audit = next(found for seed in range(100) if not (found := audited(many, share=0.0005, seed=seed)).audited)
    assert math.isnan(audit.estimate)
    assert (audit.low, audit.high, audit.rows, audit.calls) == (0.0, math.inf, 0, 1)


def test_looks_share_the_chance_of_a_false_alarm(monkeypatch: pytest.MonkeyPatch) -> None:
    """After 1, 2, 4, 8 audited calls, with tails that sum up to no more than 2.5% however long it goes on."""
    looks = []
    real = _Layer.summary

    def watch(self: _Layer, *tail: float) -> LayerAudit:
        looks.extend((self.audited, chance) for chance in tail)
        return real(self, *tail)

    monkeypatch.setattr(_Layer, "summary", watch)
    audited(population(0, calls=9, length=200), share=1.0, budget=1e9)
    assert looks == [(2**n, pytest.approx(0.025 / ((n + 1) * (n + 2)))) for n in range(4)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": 0}, r"share must be in \(0, 1\], got 0"),
        ({"share": 1.5}, r"share must be in \(0, 1\], got 1.5"),
        ({"share": True}, "share must be a number, got bool"),
        ({"budget": 0.0}, "budget must be > 0, got 0.0"),
        ({"seed": 0.5}, "seed must be an integer or None, got float"),
        ({"on_exceeded": 3}, "on_exceeded must be callable or None, got int"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        Audit(**settings)


transformers = pytest.importorskip("transformers")


def tiny(name: str = "Llama", **settings: Any) -> Any:
    torch.manual_seed(0)
    small: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    return getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**{**small, **settings})
    ).eval()


def tokens(batch: int = 1, length: int = 400) -> torch.Tensor:
    return torch.randint(2, 64, (batch, length), generator=torch.Generator().manual_seed(1))


MODELS = {
    "llama": tiny,
    "gemma2": lambda: tiny("Gemma2", head_dim=8, sliding_window=96, attn_logit_softcapping=5.0),
    "gpt_oss": lambda: tiny("GptOss", head_dim=8, sliding_window=96, num_local_experts=2, num_experts_per_tok=1),
}


@pytest.mark.parametrize("name", list(MODELS))
def test_a_model_does_not_notice(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit the same logits; and what is reported holds against the oracle on what the layers really did."""
    from tamis.integrations import applied as room

    model = MODELS[name]()
    mask = torch.ones(2, 400, dtype=torch.long)
    mask[1, :150] = 0
    inputs = {"input_ids": tokens(2), "attention_mask": mask}
    with torch.no_grad(), apply(model, tamis.Window(40), precision="full", pv_threshold=None) as handle:
        expected = model(**inputs).logits
        with pytest.raises(ValueError, match=r"there is no audit: give audit=0.005"):
            handle.audit()
    seen: dict[str, Calls] = {}
    sparse = room.sparse

    def record(call: Request, *rest: Any) -> Any:
        result = sparse(call, *rest)
        seen.setdefault(call.layer, []).append((call, result.output))
        return result

    monkeypatch.setattr(room, "sparse", record)
    audit = Audit(share=0.3, budget=math.inf, seed=0)
    with torch.no_grad(), apply(model, tamis.Window(40), precision="full", pv_threshold=None, audit=audit) as handle:
        logits = model(**inputs).logits
        report = handle.audit()
        assert torch.equal(logits, expected)
        handle.reset()
        assert handle.audit() == {}
    assert list(report) == [f"model.layers.{number}.self_attn" for number in range(2)]
    for layer, found in report.items():
        truth = relative_l1(seen[layer])
        assert (found.calls, found.audited, found.nonfinite, found.undefined) == (1, 1, 0, 0)
        # A 95% interval: at this seed all six hold.
        assert found.low <= truth <= found.high
        assert 0 < found.share <= 0.3 + 1e-6 + 2 / 100


def test_dense_calls_are_not_audited() -> None:
    model = tiny()
    with torch.no_grad(), apply(model, tamis.Window(64), audit=1.0, min_queries=10**6) as handle:
        model(tokens())
    assert handle.calls == {"sparse": 0, "dense": 2}
    assert handle.audit() == {}


def test_a_compiled_graph_is_not_audited() -> None:
    model = tiny()
    with torch.no_grad(), apply(model, tamis.Window(64), precision="full", audit=Audit(budget=math.inf)) as handle:
        expected = model(tokens(), use_cache=False).logits
        assert handle.audit()["model.layers.0.self_attn"].calls == 1
        handle.reset()
        with warnings.catch_warnings():
            logits = torch.compile(model, fullgraph=True, backend="aot_eager")(tokens(), use_cache=False).logits
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)  # as in test_transformers.py
    assert handle.audit() == {}
