"""`tamis bench models` on tiny models, and the page that it stands on."""

from __future__ import annotations

import json
import math
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch

from tamis.bench import models as bench

DOCS = Path(__file__).parent.parent / "docs" / "transformers.md"
RESULT = Path(__file__).parent.parent / "benchmarks" / "results" / "models-xeon-amx.json"


def test_rows_say_what_was_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole passes agree with the models called by hand; dense ways change nothing, sparse ones do."""
    tokens = 64 * 18
    language = tiny_models.language("Llama", max_position_embeddings=2048)
    ids = tiny_models.tokens(1, tokens)
    vision = tiny_models.image("Dinov2")
    monkeypatch.setattr(bench, "NEW_TOKENS", 6)
    monkeypatch.setattr(bench.models, "load_language_model", lambda folder: (language, None, "tiny"))
    monkeypatch.setattr(bench.models, "encode", lambda *_: ids)
    monkeypatch.setattr(bench, "fetch", lambda asset: asset)
    monkeypatch.setattr(bench.image, "load_image_model", lambda path: vision)
    photo = torch.randn(1, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(bench.image, "load_photo", lambda name, pixels: (photo, ""))
    handles = []
    apply = bench.apply

    def watched(*arguments: Any, **settings: Any) -> Any:
        handles.append(apply(*arguments, **settings))
        return handles[-1]

    monkeypatch.setattr(bench, "apply", watched)
    result = bench.run(tokens, pixels=112, rounds=1)
    overhead, prefill = handles[:42], handles[42:44]
    assert all(handle.calls["sparse"] == 0 < handle.calls["dense"] for handle in overhead)
    assert all(handle.calls["dense"] == 0 < handle.calls["sparse"] for handle in prefill)
    rows = {row["what"]: row for row in result["rows"]}
    assert list(rows) == [
        "128 tokens, dense",
        f"SmolLM2-135M, prefill of {tokens}",
        f"a token after {tokens - 6}, dense",
        *(f"a token after {tokens - 6}, {share} of the cache" for share in ("0.25", "0.125", "0.0625")),
        "DINOv2 ViT-S/14, 197 tokens",
    ]
    with torch.no_grad():
        logits = language(ids).logits[0]
    own = math.exp(float(torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:])))
    prefill_row = rows[f"SmolLM2-135M, prefill of {tokens}"]
    # Sums of fp32 in another order differ by 2e-7 here, int8 by 8e-5.
    assert prefill_row["perplexity"] == pytest.approx(own, rel=1e-5)
    assert abs(prefill_row["perplexity_change"]) > 2e-5
    last = math.exp(float(torch.nn.functional.cross_entropy(logits[-6:-1], ids[0, -5:])))
    dense = rows[f"a token after {tokens - 6}, dense"]
    assert dense["perplexity"] == pytest.approx(last, rel=0.05)  # the cache was filled sparsely, by both ways
    assert abs(dense["perplexity_change"]) < 1e-5
    assert abs(rows[f"a token after {tokens - 6}, 0.25 of the cache"]["perplexity_change"]) > 1e-5
    assert 0.9 < rows["DINOv2 ViT-S/14, 197 tokens"]["feature_cosine"] < 1
    assert all(row["ratio"]["median"] > 0 for row in result["rows"])
    json.dumps(result, allow_nan=False)


def test_ways_run_in_turn_and_the_first_round_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is first in one round is last in the next. By the clock of this test the n-th pass takes n seconds."""
    ran: list[str] = []
    clock = [0.0]
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def step() -> torch.Tensor:
        clock[0] += len(ran)
        return torch.tensor(len(ran))

    ways = {name: lambda model, name=name: nullcontext(ran.append(name)) for name in ("a", "b")}
    times, last = bench._in_turn(ways, None, step, rounds=3)
    assert ran == ["b", "a", "a", "b", "b", "a", "a", "b"]
    assert times == {"a": [3, 6, 7], "b": [4, 5, 8]}
    assert {name: int(output) for name, output in last.items()} == {"a": 7, "b": 8}


def test_ratios_are_of_the_same_round_and_above_one_where_tamis_wins() -> None:
    found = bench._ratio({"own": [2.0, 8.0, 3.0], "tamis": [1.0, 2.0, 6.0]}, "own", "tamis")
    assert found == {
        "own_seconds": 3,
        "seconds": 2,
        "ratio": {"median": 2, "min": 0.5, "max": 4, "low": 1.25, "high": 3},
    }


def test_the_documented_table_is_the_measured_one() -> None:
    assert bench.table(json.loads(RESULT.read_text(encoding="utf-8"))) in DOCS.read_text(encoding="utf-8")


def test_what_the_page_shows_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 3
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    for block in blocks:
        exec(block, names)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "{'sparse': 2, 'dense': 0} Counter()"
    assert printed[1] == "{'sparse': 16, 'dense': 0}"  # two prefills, and seven tokens by two layers


def test_times_are_readable() -> None:
    assert [bench._time(seconds) for seconds in (12.345, 0.0126)] == ["12.35 s", "12.6 ms"]
    machine = {"cpu": "C", "threads": 2, "torch": "2"}
    row = {
        "what": "w",
        "own_seconds": 2.0,
        "seconds": 1.0,
        "ratio": {"median": 2.0, "low": 1.5, "high": 2.25},
        "feature_cosine": 0.5,
    }
    text = bench.table({"machine": machine, "dtype": "float32", "rows": [row]})
    assert text.endswith("| w | 2.00 s | 1.00 s | 2.00x (1.50 to 2.25) | feature cosine 0.5000 |")
