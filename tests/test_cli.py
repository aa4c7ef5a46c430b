"""The `tamis` command: what it prints, where errors go, which exit code it returns."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import tamis
from tamis import cli, demo
from tamis.bench import cpu
from tamis.demo import measure
from tamis.version import installed

BENCHMARKS = (
    *("cpu", "gpu", "gpu-static", "decode", "limits", "scale"),
    *("models", "ablation", "defaults", "tune", "compensate", "frontier", "perplexity", "order", "audit"),
)


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
        *(
            (["bench", name, "--json", "/nowhere/file.json"], "--json: the folder of /nowhere/file.json is not there")
            for name in BENCHMARKS
        ),
        (["demo", "--report", "/"], "--report: / is a folder, give a file in it"),
        (["bench", "compensate", "--tokens", "0"], "expected a whole number above 0, got '0'"),
        (["bench", "limits", "--roofline", "/nowhere/a.svg"], "--roofline: the folder of /nowhere/a.svg is not there"),
        (["bench", "cpu", "--density", "2"], r"expected a number in (0, 1], got '2'"),
        (["bench", "scale", "--precision", "int8"], "--precision is for --plan"),
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


def test_the_list_of_benchmarks_is_whole(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["bench", "--help"])
    listed = re.findall(r"^    (\S+)", capsys.readouterr().out.partition("BENCHMARK\n")[2], re.MULTILINE)
    assert tuple(listed) == BENCHMARKS


def test_repeats_are_honoured_where_it_is_quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[cpu.CpuOptions] = []
    monkeypatch.setattr(cpu, "run", lambda options: seen.append(options) or {})
    monkeypatch.setattr(cpu, "table", str)
    for words in ([], ["--quick"], ["--quick", "--repeats", "5"], ["--repeats", "5"]):
        assert cli.main(["bench", "cpu", *words, "--json", str(tmp_path / "cpu.json")]) == 0
    assert [options.repeats for options in seen] == [9, 3, 5, 5]


@pytest.mark.parametrize("module", ["tamis", "tamis.cli"])
def test_it_is_a_module_to_run(
    module: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["here", "--version"])
    monkeypatch.delitem(sys.modules, f"{module}.__main__", raising=False)  # another test may have loaded it
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(module, run_name="__main__")
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"tamis {installed() or '(not installed)'}\n"


def test_help_and_info_load_only_what_they_need() -> None:
    """In a fresh process: help adds nothing to `import tamis` but the command itself."""
    program = (
        "import contextlib, io, sys, tamis; before = set(sys.modules); from tamis import cli\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit): cli.main(['--help'])\n"
        "helped = set(sys.modules) - before\n"
        "with contextlib.redirect_stdout(io.StringIO()): assert cli.main(['info']) == 0\n"
        "print(*helped); print(*{name.split('.')[0] for name in sys.modules})"
    )
    places = [str(Path(tamis.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    helped, informed = (set(line.split()) for line in done.stdout.splitlines())
    outside = {name for name in helped if name.split(".")[0] not in sys.stdlib_module_names}
    assert "tamis.cli.bench.engine" in outside
    assert {name for name in outside if not name.startswith("tamis.cli")} == set()
    heavy = {"accelerate", "av", "diffusers", "gguf", "matplotlib", "onnx", "PIL", "ray", "skimage", "transformers"}
    assert informed & heavy == set()


def test_versions_of_packages() -> None:
    assert installed("torch") is not None
    assert installed("no-such-package-of-anybody") is None
