"""`tamis bench audit` on a tiny model, and what it prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

import tamis
from tamis.bench import audit as bench
from tamis.integrations.audit import Audit, LayerAudit

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "audit-smollm2.json"


def test_layers_have_their_error_and_the_audits_of_apply(monkeypatch: pytest.MonkeyPatch) -> None:
    """The audits are those that `apply` gives with the same seeds; a whole audit finds the error itself."""
    model, ids = tiny_models.language("Llama"), tiny_models.tokens(1, 400)
    found = bench.intervals(model, ids)
    assert [layer["layer"] for layer in found] == [f"model.layers.{number}.self_attn" for number in range(2)]
    for place, seed in enumerate(bench.SEEDS):
        with torch.inference_mode(), tamis.apply(model, audit=Audit(seed=seed, budget=1e9)) as handle:
            model(ids)
            report = handle.audit()
        for layer in found:
            assert layer["audits"][place] == bench._plain(report[layer["layer"]])
    audits: dict[str, list[LayerAudit]] = {layer["layer"]: [] for layer in found}
    for seed in range(10):
        with torch.inference_mode(), tamis.apply(model, audit=Audit(share=1.0, seed=seed, budget=1e9)) as handle:
            model(ids)
            for name, report in handle.audit().items():
                audits[name].append(report)
    for layer in found:
        # A whole audit draws 400 of 400 rows with replacement: one interval in twenty may miss the error, the mean of
        # ten estimates is a sixth of an interval's half wide.
        whole = audits[layer["layer"]]
        half = sum(audit.high - audit.estimate for audit in whole) / len(whole)
        assert sum(audit.estimate for audit in whole) / len(whole) == pytest.approx(layer["error"], abs=0.8 * half)
        assert half < 0.05 * layer["error"]
        assert layer["error"] > 0 and layer["all_rows"] == 1600
        assert sum(audit.low <= layer["error"] <= audit.high for audit in whole) >= 6
    json.dumps(found, allow_nan=False)


def test_time_is_the_audits_over_dense_attentions(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock on which dense attention takes 2 s and an audit 1, but 9 in the round that is not counted."""
    steps = iter([2.0, 9.0, *[2.0, 1.0] * 3])
    clock = [0.0]

    def after(function: Any) -> Any:
        def timed(*arguments: Any) -> Any:
            clock[0] += next(steps)
            return function(*arguments)

        return timed

    monkeypatch.setattr(bench, "torch_attention", after(bench.torch_attention))
    monkeypatch.setattr(bench.Auditor, "look", after(bench.Auditor.look))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])
    row = bench.seconds(bench.Shape(256, 2, 16, torch.bfloat16, 0.2), rounds=3)
    assert row["time"] == {"median": 0.5, "min": 0.5, "max": 0.5}
    assert 0.1 < row["work"] < 0.4 and row["dtype"] == "torch.bfloat16"
    json.dumps(row, allow_nan=False)


def layer(error: float, *audits: tuple[float | None, float, float | None, int]) -> dict[str, Any]:
    names = ("estimate", "low", "high", "rows")
    return {"error": error, "all_rows": 36864, "audits": [dict(zip(names, found, strict=True)) for found in audits]}


def test_text_and_table() -> None:
    layers = [
        layer(0.5, (0.4, 0.35, 0.45, 150), (0.5, 0.4, 0.6, 162), (0.5, 0.5, 0.9, 144)),
        layer(0.1, (None, 0.0, None, 150), (0.2, 0.11, 0.22, 150), (0.1, 0.09, 0.12, 150)),
    ]
    cost = {"tokens": 4096, "heads": 9, "head_dim": 64, "dtype": "torch.float32", "work": 0.0049}
    text = bench.markdown({"tokens": 4096, "layers": layers, "cost": [{**cost, "time": {"median": 0.024}}]})
    prose, _, table = text.partition("\n\n")
    assert prose.replace("\n", " ") == (
        "4,096 tokens, 2 layers, 3 seeds: 144 to 162 of a layer's 36,864 rows gave intervals of +- 20% of the "
        "estimate (median), and 4 of 6 held the true error."
    )
    assert table.splitlines()[2:] == ["| 4,096 | 9 of 64 | float32 | 0.49% | 2.4% |"]


def test_the_docs_show_the_committed_result() -> None:
    if not RESULT.exists():
        pytest.skip(f"not measured yet: tamis bench audit --json benchmarks/results/{RESULT.name}")
    text = (ROOT / "docs" / "in-production.md").read_text(encoding="utf-8")
    assert bench.markdown(json.loads(RESULT.read_text(encoding="utf-8"))) in text
