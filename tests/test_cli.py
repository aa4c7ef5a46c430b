"""The `tamis` command: what it prints, where errors go, which exit code it returns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tamis import cli, demo
from tamis.demo import measure


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert "backend reference: available" in printed
    assert cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["backends"]["reference"] == {"available": True, "reasons": []}
    assert list(found["cpu_targets"].values()).count("in use") == (1 if found["cpu_target"] else 0)


def test_info_says_why_a_better_target_is_not_used(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["info", "--json"]) == 0
    best = json.loads(capsys.readouterr().out)["cpu_target"]
    if best in (None, "baseline"):
        pytest.skip("this machine has no target above baseline")
    monkeypatch.setenv("TAMIS_CPU_TARGET", "baseline")
    assert cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cpu_target"] == "baseline"
    assert found["cpu_targets"][best] == "TAMIS_CPU_TARGET=baseline asks for another"
    monkeypatch.setenv("TAMIS_CPU_TARGET", "abacus")
    assert cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert not found["backends"]["cpu"]["available"]
    assert "abacus" in found["backends"]["cpu"]["reasons"][0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["dance"], "invalid choice"),
        (["demo", "--tokens", "0"], "expected a whole number above 0, got '0'"),
        (["demo", "--only", "sound"], "invalid choice"),
        (["demo", "--text", "/nowhere/text"], "--text: /nowhere/text is not there"),
        (["demo", "--json", "/nowhere/file.json"], "--json: the folder of /nowhere/file.json is not there"),
        (["bench"], "BENCHMARK"),
        (["demo", "--pixels", "3"], "--pixels must be 14 or more"),
        (["bench", "decode", "--json", "/nowhere/file.json"], "--json: the folder of /nowhere/file.json is not there"),
        (["bench", "compensate", "--tokens", "0"], "expected a whole number above 0, got '0'"),
        (["bench", "limits", "--roofline", "/nowhere/a.svg"], "--roofline: the folder of /nowhere/a.svg is not there"),
        (["bench", "cpu", "--density", "2"], r"expected a number in (0, 1], got '2'"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = cli.main(arguments)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    captured = capsys.readouterr()
    assert code == cli.USAGE
    assert message in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("the text is short"), cli.FAILED, "tamis: the text is short"),
        (OSError("disk full"), cli.FAILED, "tamis: disk full"),
        (ModuleNotFoundError("no", name="gguf"), cli.FAILED, "gguf is not installed: pip install 'tamis[demo]'"),
        (KeyboardInterrupt(), cli.INTERRUPTED, "tamis: interrupted"),
    ],
)
def test_failures(
    error: BaseException,
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(_options: demo.DemoOptions) -> None:
        raise error

    monkeypatch.setattr(demo, "run", fail)
    assert cli.main(["demo"]) == code
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err


def test_a_missing_module_of_ours_is_no_usage_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_options: demo.DemoOptions) -> None:
        raise ModuleNotFoundError("no", name="tamis.nothing")

    monkeypatch.setattr(demo, "run", fail)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["demo"])


def test_demo_options_arrive(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[demo.DemoOptions] = []

    def run(options: demo.DemoOptions) -> dict[str, object]:
        seen.append(options)
        return {"machine": {}}

    monkeypatch.setattr(demo, "run", run)
    out = tmp_path / "out.json"
    assert cli.main(["demo", "--only", "image", "--json", str(out), "--tokens", "512", "--pixels", "518"]) == 0
    (options,) = seen
    assert (options.only, options.json, options.pixels) == ("image", out, 518)
    assert options.language.tokens == 512
    assert isinstance(options.settings, measure.Settings)


def test_bench_cpu_writes_a_record(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["bench", "cpu", "--json", str(tmp_path / "deep" / "cpu.json")]) == 2
    assert "--json: the folder of" in capsys.readouterr().err
    assert cli.main(["bench", "cpu", "--compare", str(tmp_path / "deep")]) == 2
    assert "is not a folder" in capsys.readouterr().err
    out = tmp_path / "cpu.json"
    small = ["--n", "256", "--head-dim", "32", "--density", "1", "0.5", "--quick"]
    assert cli.main(["bench", "cpu", *small, "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert [(row["tokens"], row["head_dim"], row["density"]) for row in found["rows"]] == [
        (256, 32, 1.0),
        (256, 32, 0.5),
    ]
    for row in found["rows"]:
        assert row["ratio_sdpa_fp32"]["min"] <= row["ratio_sdpa_fp32"]["median"] <= row["ratio_sdpa_fp32"]["max"]
        assert 0 < row["relative_l1_int8"] < 0.05
        assert row["relative_l1_full"] < 1e-5
    assert {"machine", "commit", "memory"} <= set(found)
    assert "x fp32" in capsys.readouterr().out
