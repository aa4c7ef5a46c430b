"""`tamis bench frontier` on tiny random models, its tables and its picture."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch

import tamis
from tamis import cli
from tamis.bench import frontier, frontier_report, layers

pytest.importorskip("transformers")
from test_demo_bench import tiny_layers

ROOT = Path(__file__).parent.parent
ROWS = [
    {"setting": 3.0, "density": 0.1, "l1_mean": 0.5},
    {"setting": 2.0, "density": 0.3, "l1_mean": 0.1},
    {"setting": 1.0, "density": 0.7, "l1_mean": 0.02},
]


def test_errors_are_read_off_between_settings() -> None:
    assert frontier.error_at(ROWS, 0.2) == pytest.approx(0.3)
    assert frontier.error_at(ROWS, 0.6) == pytest.approx(0.04)
    assert frontier.error_at(ROWS, 0.1) == 0.5
    assert frontier.error_at(ROWS, 0.05) is None
    assert frontier.error_at(ROWS, 0.8) is None
    assert frontier.density_for(ROWS, 0.05) == pytest.approx(0.55)
    assert frontier.density_for(ROWS, 0.01) is None
    assert frontier.density_for(ROWS, 0.6) is None


def test_run(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def some_layers(tokens: int, start: int) -> list[layers.Layer]:
        asked.append((tokens, start))
        return tiny_layers(tokens)

    monkeypatch.setattr(frontier, "language_layers", some_layers)
    families = (
        frontier.Family("random", lambda x: tamis.Random(x), (1.0, 0.2)),
        frontier.Family("oracle, floor", lambda x: tamis.Oracle(floor=x), (0.2, 0.01)),
    )
    result = frontier.run(600, 7, 2, families)
    assert asked == [(600, 7)]
    assert (result["layers"], result["heads"]) == (1, 4)
    lots, true = result["families"]
    assert [row["setting"] for row in lots["rows"]] == [0.2, 1.0], "sparse to dense"
    assert lots["rows"][1]["density"] == 1.0
    assert lots["rows"][1]["l1_worst"] < 1e-5, "everything kept, in full precision"
    assert lots["rows"][0]["l1_mean"] > 0.05
    assert true["rows"][0]["l1_median"] <= true["rows"][0]["l1_worst"]
    assert true["cost"] > lots["cost"] > 0, "the oracle computes the whole map"
    json.dumps(result, allow_nan=False)


def test_layers_from_a_token_on(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[torch.Tensor] = []
    config = type("Config", (), {"num_hidden_layers": 1})
    model = type("Model", (), {"config": config})()
    monkeypatch.setattr(layers, "load_language_model", lambda _folder: (model, None, "tiny"))
    monkeypatch.setattr(layers, "encode", lambda _tokenizer, _text, tokens: torch.arange(tokens)[None])
    monkeypatch.setattr(layers, "backbone", lambda _model, ids: read.append(ids))
    monkeypatch.setattr(layers, "capture", lambda _model, run, _visit: run())
    assert layers.language_layers(5, 3) == []
    assert read[0].tolist() == [[3, 4, 5, 6, 7]]


def result_of(rows: list[dict[str, float]]) -> dict[str, Any]:
    families = [{"name": "oracle, floor", "rows": rows, "cost": 4.0}, {"name": "random", "rows": rows, "cost": 0.25}]
    return {"heads": 9, "tokens": 4096, "families": families}


def test_table() -> None:
    lines = frontier_report.markdown(result_of(ROWS)).splitlines()
    assert lines[0].startswith("| predictor | 0.15 | 0.2 |")
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2] == "| oracle, floor | 0.400 | 0.300 | 0.200 | 0.100 | 0.080 | 0.060 | 0.55 | 400% |"
    assert lines[3].endswith("| 25% |")
    assert "| - |" in frontier_report.markdown(result_of(ROWS[1:]))


def test_picture() -> None:
    drawn = ET.fromstring(frontier_report.svg(result_of(ROWS)))
    svg = "{http://www.w3.org/2000/svg}"
    curves = drawn.findall(f"{svg}polyline")
    assert len(curves) == 2
    # Densities outside of the picture are left out, and the smaller error is lower.
    (left, high), (right, low) = ([float(x) for x in at.split(",")] for at in str(curves[0].get("points")).split())
    assert left < right
    assert high < low
    assert {"oracle, floor", "random"} <= {text.text for text in drawn.iter(f"{svg}text")}


def test_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[Any] = []

    def run(*options: int) -> dict[str, Any]:
        asked.append(options)
        return result_of(ROWS)

    monkeypatch.setattr(frontier, "run", run)
    out, picture = tmp_path / "out.json", tmp_path / "out.svg"
    arguments = ["--tokens", "512", "--start", "0", "--every", "3", "--json", str(out), "--picture", str(picture)]
    assert cli.main(["bench", "frontier", *arguments]) == 0
    assert asked == [(512, 0, 3)]
    assert json.loads(out.read_text()) == result_of(ROWS)
    assert picture.read_text() == frontier_report.svg(result_of(ROWS))
    capsys.readouterr()
    assert cli.main(["bench", "frontier", "--markdown", str(out)]) == 0
    assert capsys.readouterr().out == frontier_report.markdown(result_of(ROWS)) + "\n"
    assert len(asked) == 1, "nothing is measured again"
    assert cli.main(["bench", "frontier", "--picture", "/nowhere/a.svg"]) == cli.USAGE


def test_the_docs_show_the_committed_result() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "frontier-smollm2.json").read_text(encoding="utf-8"))
    assert frontier_report.markdown(result) in (ROOT / "docs" / "predictors.md").read_text(encoding="utf-8")
    assert (ROOT / "docs" / "frontier.svg").read_text(encoding="utf-8") == frontier_report.svg(result)
