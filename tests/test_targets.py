"""CPU targets: which of them run here, that they are what stats say, and how to force one."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engines import Engine, cpu_targets, engines
from samples import qkv

import tamis

ALL = ["baseline", "neon_dot", "avx2", "avx512", "avx_vnni", "avx512_vnni", "amx"]
NEEDS = {
    "baseline": set(),
    "neon_dot": {"asimddp", "atomics", "asimdrdm", "crc32"},
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "avx_vnni": {"avx2", "fma", "f16c", "avx_vnni"},
    "avx512_vnni": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"},
    "amx": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "amx_tile", "amx_int8"},
}


def flags() -> set[str]:
    """The processor's own list."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        pytest.skip("needs /proc/cpuinfo to know what the processor can do")
    line = next((x for x in path.read_text(encoding="utf-8").splitlines() if x.startswith(("flags", "Features"))), "")
    return set(line.split())


@pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="only the baseline is built elsewhere")
def test_every_target_the_processor_has_is_there() -> None:
    """So no suite is green because the native backend was not there to be tested."""
    assert set(cpu_targets()) == {name for name in ALL if NEEDS[name] <= flags()}


def test_stats_name_the_target(engine: Engine) -> None:
    """`Engine` itself asserts it on every call; here for the reference, which has none."""
    stats = engine.attend(*qkv()).stats
    assert (stats.backend, stats.target) == (engine.backend, engine.target)
    assert engine.backend in repr(stats)
    assert engine.target is None or engine.target in repr(stats)


def test_the_default_is_the_best() -> None:
    stats = tamis.attend(*qkv()).stats
    assert stats is not None
    assert (stats.backend, stats.target) == (engines()[-1].backend, engines()[-1].target)
    by_rank = [name for name in ALL if name in cpu_targets()]
    assert by_rank == cpu_targets()


def test_targets_do_different_things() -> None:
    """Another instruction set, another order of sums: were all bits the same, one target would run under every name."""
    q, k, v = qkv(q_len=300, dim=80)
    outputs = {str(engine): engine.attend(q, k, v).output for engine in engines() if engine.backend == "cpu"}
    if {"cpu-baseline", "cpu-avx2"} <= set(outputs):
        assert not torch.equal(outputs["cpu-baseline"], outputs["cpu-avx2"])


def run_python(code: str, target: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TAMIS_CPU_TARGET": target}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


CODE = "import torch, tamis; x = torch.randn(1, 1, 70, 8); print(tamis.attend(x, x, x, backend='cpu').stats.target)"


@pytest.mark.parametrize("target", cpu_targets())
def test_environment_forces_a_target(target: str) -> None:
    result = run_python(CODE, target)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == target


@pytest.mark.skipif(not cpu_targets(), reason="no native backend")
def test_environment_with_a_wrong_name() -> None:
    result = run_python(CODE, "pentium")
    assert result.returncode != 0
    assert "TAMIS_CPU_TARGET" in result.stderr
    assert "pentium" in result.stderr


@pytest.mark.parametrize("broken", [False, True], ids=["missing", "broken"])
def test_without_the_native_library(tmp_path: Path, broken: bool) -> None:
    """A package without it, or with one that does not load, runs on the reference and says why not on the cpu."""
    package = tmp_path / "tamis"
    shutil.copytree(
        Path(tamis.__file__).parent, package, ignore=shutil.ignore_patterns("*.so", "*.dylib", "__pycache__")
    )
    if broken:
        (package / "libtamis_cpu.so").write_bytes(b"not a library")
    code = f"""
import sys
# An editable install finds the package before the path does.
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__]
sys.path.insert(0, {str(tmp_path)!r})
import torch, tamis
assert tamis.__file__.startswith({str(tmp_path)!r}), tamis.__file__
x = torch.randn(1, 1, 70, 8)
print(tamis.attend(x, x, x).stats.backend)
try:
    tamis.attend(x, x, x, backend="cpu")
except tamis.UnsupportedError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    ran, *reasons = result.stdout.splitlines()
    assert ran == "reference"
    assert any(line.strip().startswith("cpu: ") and "library" in line for line in reasons)
    assert any(line.strip().startswith("reference: ") for line in reasons)


@pytest.mark.skipif(not cpu_targets(), reason="no native backend")
def test_force_target_ends() -> None:
    from tamis.backends import cpu

    best = cpu.target()
    with cpu.force_target("baseline"):
        assert cpu.target() == "baseline"
        with cpu.force_target(cpu_targets()[-1]):
            assert cpu.target() == cpu_targets()[-1]
        assert cpu.target() == "baseline"
    assert cpu.target() == best
    with pytest.raises(ValueError, match="pentium"), cpu.force_target("pentium"):
        pass
    assert cpu.target() == best
