"""How the package is built: which module may import which, what is imported when, and what is public."""

from __future__ import annotations

import ast
import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tamis

ROOT = Path(tamis.__file__).parent

# A module may import its own package and what stands before it; modules of one line do not know each other.
ORDER = [
    {"errors", "call", "geometry", "mixing", "traced", "version"},
    {"block_mask", "merge", "stats", "packed"},
    {"backends", "predictors"},
    {"compensate", "known"},
    {"attend"},
    {"profile", "order"},
    {"parallel"},
    {"integrations", "report"},
    {"tuning"},
    {"compat"},
    {"demo", "bench"},
    {"cli"},
    {"__main__"},
]
ONE_LINE_BUT_ALLOWED = {
    ("call", "errors"),
    ("call", "geometry"),
    ("merge", "stats"),
    ("predictors", "backends"),  # backends/base and backends/replay, see below
    ("demo", "bench"),
    ("bench", "demo"),
}
LAZY_ROOMS = {"demo", "bench", "cli", "integrations", "parallel", "report", "tuning"}
PUBLIC = {
    "attend",
    "attend_varlen",
    "sparse_attention",
    "merge",
    "pack_kv",
    "BlockMask",
    "AttentionOutput",
    "AttentionStats",
    "PackedKV",
    "Profile",
    "Antidiagonal",
    "Oracle",
    "Probe",
    "QuerySampled",
    "Random",
    "Sparge",
    "VerticalSlash",
    "Window",
    "apply",
    "sdpa",
    "tune",
    "UnsupportedError",
}
KERNELS = {
    f"backends.triton.kernels.{name}"
    for name in ("attend", "choose", "gluon_api", "hopper", "pack", "pool", "sight", "values")
}


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports(path: Path, *, module_level: bool = False) -> set[str]:
    """Full names of what a file imports: anywhere, or only what runs when the file is imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped: set[ast.AST] = set()
    if module_level:
        for node in ast.walk(tree):
            guarded = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            if guarded or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                skipped.update(ast.walk(node))
    found: set[str] = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import: name the module"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def rank(room: str) -> int:
    return next(i for i, rooms in enumerate(ORDER) if room in rooms)


def breaches(path: Path) -> list[str]:
    own = name_of(path).split(".")[0]
    if own == "":
        return []
    found = []
    for target in sorted(imports(path)):
        if target.split(".")[0] != "tamis":
            continue
        room = target.split(".")[1] if "." in target else ""
        if room in ("", own) or not ((ROOT / room).is_dir() or (ROOT / f"{room}.py").exists()):
            continue
        if rank(room) < rank(own) or (own, room) in ONE_LINE_BUT_ALLOWED:
            continue
        found.append(f"{name_of(path)} imports {target}")
    return found


def test_every_module_has_its_place() -> None:
    for path in modules():
        own = name_of(path).split(".")[0]
        assert own == "" or any(own in rooms for rooms in ORDER), f"{own} is not in ORDER"


def test_imports_run_one_way() -> None:
    assert [breach for path in modules() for breach in breaches(path)] == []


def test_the_walk_finds_a_breach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside a function as well."""
    copy = tmp_path / "block_mask.py"
    copy.write_text("def f():\n    from tamis.attend import attend\n    return attend\n", encoding="utf-8")
    (tmp_path / "attend.py").write_text("", encoding="utf-8")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert breaches(copy) == ["block_mask imports tamis.attend.attend"]


def test_backends_and_predictors_keep_apart() -> None:
    """Predictors know what backends share and no backend; a backend knows neither another backend nor a predictor."""
    names = {
        path.stem for path in (ROOT / "backends").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    names -= {"__init__", "base", "replay"}
    for path in modules():
        name = name_of(path)
        targets = {target for target in imports(path) if target.startswith("tamis.backends")}
        concrete = {other for other in names for target in targets if re.match(rf"tamis\.backends\.{other}\b", target)}
        if name.startswith("predictors"):
            assert concrete == set(), name
        if name.startswith("backends.") and name != "backends.replay":  # which serves one backend
            assert concrete <= {name.split(".")[1]}, name
            assert not any(target.startswith("tamis.predictors") for target in imports(path)), name


@pytest.mark.parametrize("path", [p for p in modules() if name_of(p).split(".")[0] not in LAZY_ROOMS], ids=name_of)
def test_torch_is_the_only_dependency_of_the_core(path: Path) -> None:
    outside = {target.split(".")[0] for target in imports(path, module_level=True)}
    allowed = {"torch", "tamis"} | ({"triton"} if name_of(path) in KERNELS else set())
    assert outside - set(sys.stdlib_module_names) <= allowed


def test_kernels_are_loaded_where_they_are_used() -> None:
    """What imports Triton is imported inside functions, by its own backend alone."""
    for path in modules():
        found = {target for target in imports(path, module_level=True) for kernel in KERNELS if kernel in target}
        assert not found or name_of(path) in KERNELS, name_of(path)


def test_import_loads_no_other_package() -> None:
    """In a fresh process: what `import tamis` adds to `import torch`."""
    code = "import sys, torch; before = set(sys.modules); import tamis; print(sorted(set(sys.modules) - before))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules_loaded = ast.literal_eval(result.stdout)
    assert "tamis.parallel" not in modules_loaded
    loaded = {name.split(".")[0] for name in modules_loaded} - set(sys.stdlib_module_names)
    torchs_own = {"torch", "numpy", "sympy", "mpmath", "cython_runtime", "triton"}  # what ops make torch load
    assert {name for name in loaded if not name.startswith("_")} <= {"tamis", *torchs_own}


def test_public_names() -> None:
    assert set(tamis.__all__) - {"__version__"} == PUBLIC
    assert all(hasattr(tamis, name) for name in tamis.__all__)
    assert list(tamis.__all__) == sorted(tamis.__all__)


def test_public_names_are_documented() -> None:
    for name in tamis.__all__:
        if name == "__version__":
            continue
        thing = getattr(tamis, name)
        assert thing.__doc__, name
        if name not in ("AttentionOutput", "AttentionStats", "UnsupportedError", "PackedKV"):
            assert ">>>" in thing.__doc__, f"{name} has no example"


@pytest.mark.parametrize("path", [p for p in modules() if name_of(p).split(".")[0] not in LAZY_ROOMS], ids=name_of)
def test_examples_run(path: Path) -> None:
    """Every example of the core does what its docstring says, to the letter."""
    module = importlib.import_module(f"tamis.{name_of(path)}".rstrip("."))
    results = doctest.testmod(module)
    assert results.failed == 0


def test_unsupported_is_a_value_error() -> None:
    assert issubclass(tamis.UnsupportedError, ValueError)
