"""The benchmarks on tiny random models and with stand-ins for what takes minutes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tamis
from tamis.bench import ablation, compare, compensate, cpu, decode, defaults, layers, memory, record
from tamis.demo import language, measure
from tamis.integrations.capture import Captured, capture

transformers = pytest.importorskip("transformers")


def tiny_layers(tokens: int) -> list[layers.Layer]:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=4096, initializer_range=0.5,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 64, (1, tokens))
    found: list[layers.Layer] = []

    def visit(layer: Captured) -> torch.Tensor:
        exact = measure.torch_dense(layer.query, layer.key, layer.value, causal=layer.causal, scale=layer.scale)
        found.append(layers.Layer(layer, exact))
        return exact

    capture(model, lambda: language.backbone(model, ids), visit)
    return found


def test_percentile() -> None:
    assert layers.percentile([3.0, 1.0, 2.0, 4.0], 0.5) == 2.0
    assert layers.percentile([3.0, 1.0, 2.0, 4.0], 0.95) == 4.0
    assert layers.percentile([7.0], 0.01) == 7.0


def test_everything_kept_has_no_error_and_a_cut_layer_is_a_prefix() -> None:
    whole = tiny_layers(400)
    everything = measure.Settings(tamis.Sparge(topk=1.0, similarity=-1.0), None, precision="full")
    for chosen in (whole, [layer.first(150) for layer in whole]):
        outcome = layers.evaluate(chosen, everything)
        assert outcome.density == outcome.qk_density == outcome.pv_density == 1.0
        assert len(outcome.errors) == 8
        assert max(outcome.errors) < 1e-5
        assert min(outcome.cosines) == pytest.approx(1, abs=1e-9)


def test_ablation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablation, "language_layers", tiny_layers)
    result = ablation.run(2048)
    neither, first, second, both = result["stages"]
    assert neither["density"] == 1.0
    assert first["pv_density"] == first["qk_density"] <= 1.0
    assert second["qk_density"] == 1.0
    assert both["density"] <= min(first["density"], second["density"])
    densities = [judge["with"]["density"] for judge in result["judge"]]
    assert result["judge"][0]["without"]["density"] <= densities[0] <= densities[1] <= densities[2]
    assert [row["tokens"] for row in result["lengths"]] == [1024, 2048]
    assert "judge off" in ablation.table(result)
    json.dumps(result, allow_nan=False)
    with pytest.raises(ValueError, match="tokens must be at least 1024, got 100"):
        ablation.run(100)


def test_compensate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compensate, "language_layers", tiny_layers)
    monkeypatch.setattr(compensate, "image_layers", lambda: tiny_layers(300))
    monkeypatch.setattr(compensate, "PREDICTORS", {"window": tamis.Window(64), "all": tamis.Sparge(topk=1.0)})
    monkeypatch.setattr(compensate, "COST_TOKENS", 300)
    result = compensate.run(600, 1)
    window, everything = result["errors"][:2]
    assert window["l1_with"] != window["l1_without"]
    assert window["layers_with"] != window["layers_without"]
    assert len(window["layers_with"]) == 2
    assert 0 < window["heads_better"] <= window["heads"] == 8
    assert everything["l1_with"] == everything["l1_without"]
    assert (everything["density"], everything["heads_better"]) == (1.0, 0)
    assert [row["tokens"] for row in result["errors"]] == [600] * 4 + [300] * 4
    assert [(row["causal"], row["dtype"]) for row in result["cost"]][1:3] == [(False, "bfloat16"), (True, "float32")]
    assert "| full | window |" in compensate.table(result)
    json.dumps(result, allow_nan=False)


def test_the_documented_table_is_the_measured_one() -> None:
    root = Path(__file__).parent.parent
    found = json.loads((root / "benchmarks" / "results" / "compensate-smollm2-dinov2.json").read_text(encoding="utf-8"))
    assert compensate.table(found) in (root / "docs" / "compensate.md").read_text(encoding="utf-8")


class Perplexities:
    """Stands in for the model: sparse reads are worse the less is kept."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def __call__(self, settings: measure.Settings | None, start: int) -> float:
        self.asked.append(settings)
        if settings is None:
            return 10.0
        assert isinstance(settings.predictor, tamis.Sparge)
        return 10.0 + (0.996 - float(settings.predictor.cdf or 0))  # type: ignore[arg-type]


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Perplexities:
    reader = Perplexities()
    monkeypatch.setattr(defaults, "language_layers", lambda _tokens: tiny_layers(600))
    monkeypatch.setattr(defaults, "_reader", lambda: reader)
    monkeypatch.setattr(defaults, "PERPLEXITY_BUDGET", 0.0005)
    monkeypatch.setattr(defaults, "CDF", (0.98, 0.99, 0.995))
    monkeypatch.setattr(defaults, "SIMILARITY", (0.1, 0.3))
    monkeypatch.setattr(defaults, "PV_THRESHOLD", (4.0, None))
    return reader


def test_the_defaults_stay_in_both_budgets(study: Perplexities, tmp_path: Path) -> None:
    path = tmp_path / "defaults.json"
    result = defaults.run(path)
    chosen = result["chosen"]
    assert chosen["cdf"] == 0.995
    assert chosen["l1_mean"] <= defaults.L1_BUDGET
    sparser = [row for row in result["rows"] if row["density"] < chosen["density"]]
    assert all(row["cdf"] < 0.995 or row["l1_mean"] > defaults.L1_BUDGET for row in sparser)
    assert len(result["rows"]) == 12
    assert "chosen: cdf=0.995" in defaults.table(result)
    asked = len(study.asked)
    assert defaults.run(path)["chosen"] == chosen
    assert len(study.asked) == asked, "what is in the file is not measured again"


def test_an_interrupted_study_continues(study: Perplexities, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "defaults.json"
    real, calls = layers.evaluate, []

    def interrupted(chosen: list[layers.Layer], settings: measure.Settings) -> layers.Outcome:
        calls.append(settings)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(chosen, settings)

    monkeypatch.setattr(defaults, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        defaults.run(path)
    assert len(json.loads(path.read_text())["rows"]) == 5
    defaults.run(path)
    assert len(calls) == 13


def test_random_masks_have_the_density_asked_for() -> None:
    for density in (1.0, 0.5, 0.25, 0.1):
        mask = cpu.random_mask(4096, density, torch.Generator().manual_seed(0))
        assert mask.density() == pytest.approx(density, abs=1 / 64)


def test_a_wrong_output_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = cpu.attend

    def wrong(*arguments: Any, **options: Any) -> Any:
        result = real(*arguments, **options)
        return result._replace(output=result.output * 1.2)

    monkeypatch.setattr(cpu, "attend", wrong)
    with pytest.raises(RuntimeError, match=r"relative L1 .* nothing was timed"):
        cpu.run(cpu.CpuOptions(lengths=(256,), head_dims=(32,), densities=(0.5,), repeats=1, memory=False))


def test_peak_memory_grows_with_the_output() -> None:
    small, large = (memory.peak_extra_bytes(tokens, 0.1) for tokens in (2048, 16384))
    if small is None or large is None:
        pytest.skip("this system does not tell peak memory")
    assert large > 16384 * 64 * 4, "the output alone is larger"


def test_records(tmp_path: Path) -> None:
    record.write(tmp_path / "a" / "b.json", {"x": 1})
    assert json.loads((tmp_path / "a" / "b.json").read_text()) == {"x": 1}
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.json"]
    with pytest.raises(ValueError):
        record.write(tmp_path / "a" / "b.json", {"x": float("nan")})
    assert json.loads((tmp_path / "a" / "b.json").read_text()) == {"x": 1}


def result_with(ratio: float, date: str, cpu_name: str = "one") -> dict[str, Any]:
    spread = {"median": ratio, "min": ratio - 1, "max": ratio + 1}
    row = {"tokens": 1024, "head_dim": 64, "density": 0.5, "ratio_sdpa_fp32": spread, "ratio_sdpa_bf16": spread}
    machine = {"cpu": cpu_name, "cores": 2, "threads": 2, "target": "avx2", "date": date}
    return {"rows": [row], "machine": machine}


def test_compare_says_what_moved(tmp_path: Path) -> None:
    (tmp_path / "cpu-old.json").write_text(json.dumps(result_with(9.0, "2026-01-01")), encoding="utf-8")
    (tmp_path / "cpu-new.json").write_text(json.dumps(result_with(4.0, "2026-02-01")), encoding="utf-8")
    (tmp_path / "cpu-else.json").write_text(json.dumps(result_with(1.0, "2026-03-01", "two")), encoding="utf-8")
    assert "2 ratios moved" in compare.report(tmp_path, result_with(3.0, "2026-04-01"))
    assert "4.00 -> 3.00 (-25%" in compare.report(tmp_path, result_with(3.0, "2026-04-01"))
    assert "1 rows in common: 0 ratios moved" in compare.report(tmp_path, result_with(4.2, "2026-04-01"))
    assert "nothing to compare with" in compare.report(tmp_path, result_with(4.0, "2026-04-01", "three"))


def test_compare_reads_the_committed_results() -> None:
    folder = Path(__file__).parent.parent / "benchmarks" / "results"
    for path in folder.glob("cpu-*.json"):
        committed = json.loads(path.read_text(encoding="utf-8"))
        found = compare.baseline(folder, committed)
        assert found is not None
        assert compare.moved(committed, committed) == []


def test_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "HEADS", ((4, 2),))
    monkeypatch.setattr(decode, "HEAD_DIMS", (16,))
    result = decode.run(tokens=200, repeats=2)
    (row,) = result["rows"]
    assert row["ratio_append"]["min"] > 0
    assert "4:2" in decode.table(result)
    json.dumps(result)
