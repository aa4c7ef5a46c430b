"""`tamis bench perplexity` on a tiny model, and the table that comes of it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

import tamis
from tamis.bench import perplexity as bench
from tamis.predictors import Window

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "perplexity-smollm2.json"
DOCS = (ROOT / "docs" / "predictors.md").read_text(encoding="utf-8")


def test_rows_are_what_the_model_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against logits by hand: dense, and under a predictor through tamis.apply."""
    model, ids = tiny_models.language("Llama"), tiny_models.tokens(1, 400)
    monkeypatch.setattr(bench, "load_language_model", lambda _folder: (model, None, "tiny"))
    monkeypatch.setattr(bench, "encode", lambda _tokenizer, _text, tokens: ids[:, :tokens])
    monkeypatch.setattr(bench, "PREDICTORS", {"all": tamis.Sparge(topk=1.0, similarity=-1.0), "near": Window(64, 0)})
    asked: list[dict[str, Any]] = []

    def watched(*arguments: Any, **settings: Any) -> Any:
        asked.append(settings)
        return tamis.apply(*arguments, **settings)

    monkeypatch.setattr(bench, "apply", watched)
    result = bench.run(tokens=300, start=100)
    # In 300 tokens the default threshold would skip nothing.
    assert asked == [{"precision": "int8", "pv_threshold": None}] * 2
    part = ids[:, 100:]

    def by_hand() -> float:
        with torch.no_grad():
            return math.exp(float(torch.nn.functional.cross_entropy(model(part).logits[0, :-1], part[0, 1:])))

    everything, near = result["rows"]
    dense = by_hand()
    assert result["perplexity"] == pytest.approx(dense, rel=1e-5)  # of fp32 sums in another order
    with tamis.apply(model, Window(64, 0), pv_threshold=None) as handle:
        sparse = by_hand()
        (first, second) = (calls.last.density for calls in handle.stats().values() if calls.last is not None)
    assert near["perplexity"] == pytest.approx(sparse, rel=1e-5)
    assert abs(sparse / dense - 1) > 1e-4
    assert near["density"] == pytest.approx((first + second) / 2)
    assert 0 < near["density"] < everything["density"] == 1
    assert (result["heads"], result["tokens"], result["start"]) == (8, 300, 100)
    json.dumps(result, allow_nan=False)


def test_changes_are_written_short() -> None:
    rows = [
        {"name": name, "density": density, "perplexity": found}
        for name, density, found in (("a", 0.5678, 8.044), ("b", 1.0, 7.98), ("c", 0.4, 8.376))
    ]
    assert bench.markdown({"perplexity": 8.0, "rows": rows}).splitlines() == [
        "against 8.000 dense:",
        "",
        "| | density | perplexity |",
        "|---|---|---|",
        "| a | .568 | +.55% |",
        "| b | 1.000 | -.25% |",
        "| c | .400 | +4.7% |",
    ]


def test_the_documented_rows_are_those_that_are_measured() -> None:
    """Their figures too, once the result is there."""
    table = DOCS[DOCS.index("Perplexity asks for more") :]
    assert re.findall(r"^\| (`.+?) \| \.", table, re.MULTILINE) == list(bench.PREDICTORS)
    if not RESULT.exists():
        pytest.skip(f"not measured yet: tamis bench perplexity --json benchmarks/results/{RESULT.name}")
    assert bench.markdown(json.loads(RESULT.read_text(encoding="utf-8"))) in DOCS
