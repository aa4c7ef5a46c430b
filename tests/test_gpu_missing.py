"""What is said where the triton backend cannot run, or falls back, or memory ends: each with a remedy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import types
import warnings
from pathlib import Path

import pytest
import torch
from samples import qkv
from torch._subclasses import FakeTensorMode

import tamis
from tamis import cli
from tamis.backends import base
from tamis.backends.triton import chips
from tamis.call import Call, make_call


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process: no compiler found yet, nobody warned; and a GPU that is not there."""
    monkeypatch.setattr(chips, "_compilers", [])
    monkeypatch.setattr(base, "_warned", [])
    monkeypatch.setattr(chips, "name_of", lambda device: "sm_90")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("CC", raising=False)


def triton(version: str) -> types.ModuleType:
    module = types.ModuleType("triton")
    module.__version__ = version  # type: ignore[attr-defined]
    return module


@pytest.fixture
def new_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", triton("3.6.0"))


def missing() -> str:
    return chips.missing("cuda", 0) or "nothing"


def gpu_call(precision: str = "full") -> Call:
    """A call on tensors of a GPU, without their numbers."""
    with FakeTensorMode():
        token = torch.empty(1, 1, 4, 8, device="cuda", dtype=torch.bfloat16)
        return make_call(token, token, token, precision=precision)


def test_tensors_of_a_cpu_are_to_be_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is to be installed, for that would be in vain."""
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(tamis.UnsupportedError) as error:
        tamis.attend(*qkv(), backend="triton")
    lines = str(error.value).splitlines()
    assert lines[0] == "backend 'triton' can't serve this call"
    assert "  triton: query is on cpu: move query, key and value to a GPU" in lines
    assert "not xpu" in str(chips.missing("xpu", 0))


@pytest.mark.parametrize(
    ("hip", "remedy"), [(None, "pip install 'torch>=2.10'"), ("6.4", "newer ROCm build of torch")], ids=["cuda", "hip"]
)
def test_triton_is_there_and_new_enough(monkeypatch: pytest.MonkeyPatch, hip: str | None, remedy: str) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert missing().startswith("Triton is not installed: ")
    assert remedy in missing()
    assert ("triton>=3.6" in missing()) == (hip is None), "NVIDIA's Triton is not for ROCm"
    for version in ("2.1.0", "3.5.1"):
        monkeypatch.setitem(sys.modules, "triton", triton(version))
        assert missing().startswith(f"Triton {version[:3]} is here, and 3.6 or newer is needed: ")
        assert remedy in missing()
    for version in ("3.6.0", "3.10.0", "4.0.0+git1"):
        monkeypatch.setitem(sys.modules, "triton", triton(version))
        assert missing() == "nothing"


def test_a_compiler_is_what_triton_takes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, new_triton: None) -> None:
    """gcc or clang, or what CC names; never cc. What is mended while the process lives is seen."""
    program = tmp_path / "cc"
    program.write_text("#!/bin/sh\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "install gcc or clang" in missing()
    monkeypatch.setenv("CC", "/nowhere/gcc")
    assert "CC=/nowhere/gcc is not a program" in missing()
    monkeypatch.setenv("CC", str(program))
    assert missing() == "nothing"
    chips._compilers.clear()
    monkeypatch.delenv("CC")
    program.rename(tmp_path / "clang")
    assert missing() == "nothing"


def test_headers_of_python_are_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, new_triton: None) -> None:
    real = sysconfig.get_path("include")
    monkeypatch.setattr(chips.sysconfig, "get_path", lambda name, scheme: str(tmp_path))
    assert f"{tmp_path} has no Python.h: install python3-dev or python3-devel" in missing()
    monkeypatch.setenv("CPATH", f"/nowhere:{real}")
    assert missing() == "nothing"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("sm_75", "this GPU is sm_75, and the kernels need sm_80 or newer: without backend='triton'"),
        ("sm_130", "this GPU is sm_130, and the kernels are made for sm_80, sm_86, .*gfx942: without backend='triton'"),
        ("gfx90a", "this GPU is gfx90a, and the kernels are made for"),
    ],
)
def test_an_unknown_gpu_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    """Whatever else is missing, which would be installed in vain."""
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(chips, "name_of", lambda device: name)
    assert "interpreter" not in missing()
    with pytest.raises(RuntimeError, match=text) as error:
        chips.of(torch.device("cuda", 0))
    assert missing() == str(error.value)


def test_relatives_keep_their_names(monkeypatch: pytest.MonkeyPatch, new_triton: None) -> None:
    for name, elder in (("sm_87", "sm_86"), ("sm_103", "sm_100"), ("sm_121", "sm_120")):
        monkeypatch.setattr(chips, "name_of", lambda device, name=name: name)
        assert missing() == "nothing"
        assert chips.of(torch.device("cuda", 0)).name == elder
    monkeypatch.setattr(chips, "name_of", lambda device: "sm_103")
    (reason,) = base.load("triton").reasons(gpu_call(precision="int8"))
    assert reason == "precision 'int8' needs Triton 3.9 or newer on sm_103: use precision='full'"
    monkeypatch.setitem(sys.modules, "triton", triton("3.9.0"))
    assert base.load("triton").reasons(gpu_call(precision="int8")) == []
    monkeypatch.setattr(chips, "name_of", lambda device: "sm_87")
    (reason,) = base.load("triton").reasons(gpu_call(precision="fp8"))
    assert reason == "precision 'fp8' needs sm_89 or newer, and this GPU is sm_87: use precision='int8'"


@pytest.mark.parametrize("word", ["1", "true", "ON"])
def test_the_interpreter_is_for_tests(monkeypatch: pytest.MonkeyPatch, word: str, new_triton: None) -> None:
    """On a GPU too, where a variable left set would silently make everything slow and wrong."""
    monkeypatch.setenv("TRITON_INTERPRET", word)
    monkeypatch.setattr(chips, "interpreter_is_mended", False)
    for kind in ("cpu", "cuda"):
        assert "TRITON_INTERPRET is set" in str(chips.missing(kind, 0))
        assert "unset it" in str(chips.missing(kind, 0))
    monkeypatch.setattr(chips, "interpreter_is_mended", True)
    assert chips.missing("cpu", 0) is None


def test_plain_torch_on_a_gpu_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chips, "name_of", lambda device: "sm_75")
    with pytest.warns(RuntimeWarning, match=r"plain torch, right and very slow.*this GPU is sm_75") as caught:
        assert [base.choose(gpu_call(), None) for _ in range(2)] == ["reference"] * 2
    assert len(caught) == 1
    base._warned.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert base.choose(gpu_call(), "reference") == "reference"
        monkeypatch.setattr(base.load("cpu"), "reasons", lambda call: ["it is Sunday"])
        token = torch.zeros(1, 1, 4, 8)
        assert base.choose(make_call(token, token, token), None) == "reference"
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert base.choose(gpu_call(), None) == "reference"


def test_fp8_without_a_gpu_names_the_remedy() -> None:
    with pytest.raises(tamis.UnsupportedError, match="reference: precision 'fp8' needs a GPU: use precision='int8'"):
        tamis.attend(*qkv(), precision="fp8")


@pytest.mark.parametrize("op", ["attend", "key_mean"])
def test_memory_ends_with_a_remedy(monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    """The error keeps its type and what torch said; compiled calls raise it too, and work when memory is back."""
    q, k, v = qkv(q_len=130)
    before = [x.clone() for x in (q, k, v)]

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return tamis.sparse_attention(q, k, v, predictor=tamis.Sparge(topk=0.5), backend="reference")

    def full(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")

    expected = call(q, k, v)
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    for run in (call, compiled):
        with monkeypatch.context() as patch:
            patch.setattr(base.load("reference"), op, full)
            with pytest.raises(torch.OutOfMemoryError) as error:
                run(q, k, v)
        step = "attend" if op == "attend" else "predict"
        assert str(error.value).startswith("CUDA out of memory. Tried to allocate 1.00 GiB.\ntamis: ")
        assert f"ran out in {step}; the inputs are as they were" in str(error.value)
        assert "fewer heads or a smaller batch" in str(error.value)
        assert torch.equal(run(q, k, v), expected)
    assert all(torch.equal(mine, old) for mine, old in zip((q, k, v), before, strict=True))


def gpus(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """GPUs of these architectures; one named "broken" fails, and nothing may be put on any."""

    def name_of(device: torch.device) -> str:
        if names[device.index] == "broken":
            raise RuntimeError("CUDA error: an illegal memory access\nmore lines")
        return names[device.index]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index}")
    monkeypatch.setattr(chips, "name_of", name_of)


def info(capsys: pytest.CaptureFixture[str]) -> tuple[list[str], dict[str, object]]:
    assert cli.main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert cli.main(["info", "--json"]) == 0
    return lines, json.loads(capsys.readouterr().out)


def test_info_says_what_runs_on_every_gpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, new_triton: None
) -> None:
    gpus(monkeypatch, "sm_75", "sm_80", "broken", "sm_103")
    lines, found = info(capsys)
    assert "backend triton: available" in lines
    first = next(number for number, line in enumerate(lines) if line.startswith("gpu card 0"))
    assert lines[first].startswith("gpu card 0 (sm_75): this GPU is sm_75, and the kernels need sm_80 or newer")
    assert lines[first + 1].startswith("gpu card 1 (sm_80): its kernels are compiled and checked, but were never run")
    assert lines[first + 2].startswith("  precisions: full yes; int8 yes; fp8 no (precision 'fp8' needs sm_89 or newer")
    assert lines[first + 3] == "gpu cuda:2 (unknown): torch cannot use it: CUDA error: an illegal memory access"
    assert lines[first + 4].startswith("gpu card 3 (sm_103): its kernels")
    assert "full yes; int8 no (precision 'int8' needs Triton 3.9" in lines[first + 5]
    _, ampere, broken, blackwell = found["gpus"]  # type: ignore[misc]
    assert ampere["precisions"]["int8"] is None and ampere["usable"]
    assert not broken["usable"] and set(broken["precisions"]) == {"full", "int8", "fp8"}
    assert "Triton 3.9" in blackwell["precisions"]["fp8"]


def test_info_without_a_gpu_asks_for_one(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    gpus(monkeypatch)
    lines, found = info(capsys)
    (line,) = (line for line in lines if line.startswith("backend triton"))
    assert line.startswith(
        f"backend triton: it needs a GPU that torch can use, and torch {torch.__version__} sees none"
    )
    assert found["gpus"] == []
    gpus(monkeypatch, "sm_70", "sm_70")
    lines, _ = info(capsys)
    (line,) = (line for line in lines if line.startswith("backend triton"))
    assert line.count("this GPU is sm_70") == 1


def test_a_reader_that_leaves_is_no_failure() -> None:
    """`tamis info | head -1`: more is printed than anybody reads."""
    program = "import sys; from tamis import cli; sys.exit(cli.main(['info']))"
    reading, writing = os.pipe()
    os.close(reading)
    places = [str(Path(tamis.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=writing, stderr=subprocess.PIPE, text=True, env=environment
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_command_without_triton_names_the_same_remedy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise ModuleNotFoundError("no", name="triton.backends")

    from tamis.bench import gpu_static

    monkeypatch.setattr(gpu_static, "architectures", fail)
    assert cli.main(["bench", "gpu-static"]) == 1
    assert capsys.readouterr().err == f"tamis: triton.backends is not installed: {chips.how_to_install()}\n"
