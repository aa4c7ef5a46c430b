"""`tamis tune` on a tiny random model and on captured calls, and the arithmetic of `tamis bench tune`; no network."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_demo import llama, tokenizer

from tamis import cli
from tamis.bench import tuning as bench
from tamis.integrations.capture import Captures, record
from tamis.profile import Profile
from tamis.tuning.sources import CaptureSource

pytest.importorskip("transformers")
pytest.importorskip("safetensors")


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def written(tmp_path: Path) -> list[str]:
    files = [tmp_path / f"{number}.txt" for number in range(3)]
    for number, path in enumerate(files):
        path.write_text("".join(chr(97 + (place * place + number) % 26) for place in range(900)))
    return list(map(str, files))


def test_a_model_is_tuned(
    model_folder: Path, written: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, journal = tmp_path / "profile.json", tmp_path / "journal"
    arguments = ["tune", "--model", str(model_folder), "--text", *written, "--held-out", "1", "--tokens", "256"]
    arguments += ["--out", str(out), "--resume", str(journal), "--l1", "0.04"]
    assert cli.main(arguments) == 0
    profile = Profile.load(out)
    assert profile.budget == {"l1": 0.04, "pv_l1": pytest.approx(0.045)}
    assert len(profile.layers) == 3
    for stages in profile.layers.values():
        assert stages[0].evidence is not None
        assert (stages[0].evidence.samples, stages[0].evidence.held_out_samples) == (2, 1)
        assert max(stages[0].evidence.l1_worst) <= 0.045
    printed = capsys.readouterr()
    assert printed.out == f"{profile}\nprofile: {out}\n"
    assert "held out: 1 of 1 inputs done" in printed.err
    before = out.read_bytes()
    assert cli.main(arguments) == 0
    assert out.read_bytes() == before
    assert cli.main([*arguments, "--tokens", "200"]) == cli.FAILED
    assert "is of another run (other held out, inputs)" in capsys.readouterr().err


def capture(folder: Path, numbers: range, heads: list[int] | None = None) -> None:
    model = llama()
    for number in numbers:
        ids = torch.randint(model.config.vocab_size, (1, 256), generator=torch.Generator().manual_seed(number))
        record(model, lambda ids=ids: model.model(ids, use_cache=False), folder, input=number, heads=heads)


def test_captured_calls_are_tuned_as_the_model_would_be(tmp_path: Path) -> None:
    capture(tmp_path / "a", range(2))
    capture(tmp_path / "b", range(7, 8))
    out = tmp_path / "profile.json"
    arguments = ["tune", "--captures", str(tmp_path / "a"), "--held-out-captures", str(tmp_path / "b")]
    assert cli.main([*arguments, "--out", str(out)]) == 0
    profile = Profile.load(out)
    assert profile.model == "LlamaForCausalLM"
    assert list(profile.layers) == [f"model.layers.{number}.self_attn" for number in range(3)]
    evidence = profile.layers["model.layers.1.self_attn"][0].evidence
    assert evidence is not None
    assert (evidence.samples, evidence.held_out_samples) == (2, 1)


def test_some_heads_make_no_profile(tmp_path: Path) -> None:
    capture(tmp_path / "a", range(1), heads=[0])
    with pytest.raises(ValueError, match=r"holds 2 of the 4 heads of model\.layers\.0\.self_attn"):
        CaptureSource(Captures(tmp_path / "a"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--out"),
        (["--out", "/nowhere/deep/p.json"], "--out: the folder of /nowhere/deep/p.json is not there"),
        (["--out", "p", "--resume", "/nowhere/deep/j"], "--resume: the folder of /nowhere/deep/j is not there"),
        (["--out", "p", "--model", "/nowhere"], "--model must be one of smollm2, dinov2, whisper or a folder"),
        (["--out", "p", "--captures", "x", "--tokens", "9"], "--tokens and --captures exclude each other"),
        (["--out", "p", "--held-out-captures", "x"], "--held-out-captures needs --captures"),
        (["--out", "p", "--text", __file__], "--held-out 5 leaves none of 1 texts to tune on: the last so many of"),
        (["--out", "p", "--captures", "/", "--end-l1", ".1"], "--end-l1 and --captures exclude each other: captured"),
        (["--out", "p", "--captures", "/nowhere"], "--captures: the folder /nowhere is not there"),
        (["--out", "p", "--captures", "/", "--held-out-captures", "/."], "--held-out-captures is the folder of"),
        (["--out", "p", "--model", "dinov2", "--end-perplexity", ".1"], "dinov2 takes --end-l1"),
        (["--out", "p", "--end-l1", "0.1", "--l1", "0.05"], "l1 and pv_l1 bound every head, end_l1 stands instead"),
        (["--out", "p", "--model", "whisper", "--tokens", "9"], "whisper reads no text"),
        (["--out", "p", "--l1", "0.1", "--pv-l1", "0.05"], "pv_l1 must be at least l1"),
        (["--out", "p", "--end-l1", "0.1", "--end-perplexity", "0.05"], "exclude each other"),
        (["--out", "p", "--workers", "many"], "expected a whole number above 0"),
        (["--out", "p", "--ray", ""], "expected the address of a Ray cluster, as HOST:PORT, or auto"),
        (["--out", "p", "--ray", "127.0.0.1:1"], "workers: no Ray cluster answers at 127.0.0.1:1: "),
        (["--out", "p", "--ray", "auto", "--workers", "2"], "not allowed with argument"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = cli.main(["tune", *arguments])
    except SystemExit as stop:
        code = int(stop.code or 0)
    assert code == cli.USAGE
    assert message in capsys.readouterr().err


def rows(*pairs: tuple[float, float]) -> list[dict[str, Any]]:
    return [{"density": density, "end_l1": error} for density, error in pairs]


def test_density_at_an_error() -> None:
    measured = rows((0.8, 0.01), (0.2, 0.04))
    assert bench.at_error(measured, 0.01) == pytest.approx(0.8)
    assert bench.at_error(measured, 0.02) == pytest.approx(0.4), "the middle, in logarithms"
    assert bench.at_error(measured, 0.05) is None, "nothing is said beyond what was measured"


def test_gains_are_shares_of_density() -> None:
    result = {
        "one setting": rows((0.8, 0.01), (0.2, 0.04)),
        "one bound": rows((0.6, 0.01), (0.15, 0.04)),
        "the end": rows((0.3, 0.02), (0.5, 0.005)),
    }
    found = bench.gains(result)
    assert found[0]["below one setting"] == pytest.approx(0.25)
    assert found[0]["below one bound"] == pytest.approx(0)
    assert "below one bound" not in found[1]
    assert result["one bound"][0]["below one setting"] == pytest.approx(0.25)


def test_the_judge_measures_the_end() -> None:
    """Density and error of a model with known settings: everything kept, in full precision and in int8."""
    import tamis
    from tamis.profile import LayerSettings, Stage
    from tamis.tuning.sources import ModelSource

    model = llama()
    ids = torch.randint(model.config.vocab_size, (1, 256), generator=torch.Generator().manual_seed(0))
    judge = bench.Judge(ModelSource(model, [ids]))
    everything = tamis.Sparge(topk=1.0, similarity=-1.0)
    names = [f"model.layers.{number}.self_attn" for number in range(3)]
    exact = judge(Profile({name: (Stage(LayerSettings(everything, None, "full")),) for name in names}))
    assert exact["density"] == 1
    assert exact["end_l1"] is not None
    assert exact["end_l1"] < 1e-5
    assert exact["perplexity_change"] == pytest.approx(0, abs=1e-5)
    half = judge(tamis.Sparge(topk=0.3, similarity=-1.0))
    assert half["density"] is not None
    assert half["density"] < 1
    assert half["end_l1"] is not None
    assert half["end_l1"] > 1e-4
    assert half["perplexity_change"] is not None
    assert math.isfinite(half["perplexity_change"])


def test_the_docs_say_what_was_measured() -> None:
    root = Path(__file__).parents[1]
    saved = json.loads((root / "benchmarks" / "results" / "tune-smollm2.json").read_text(encoding="utf-8"))
    assert bench.table(saved) in (root / "docs" / "tuning.md").read_text(encoding="utf-8")
    assert saved["lower"] == bench.gains(saved)
