"""The machine and the software that figures belong to, and what tamis can use of it."""

from __future__ import annotations

import datetime
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch

from tamis.backends import base
from tamis.call import make_call

_OPTIONAL = ("transformers", "accelerate", "gguf", "onnx", "numpy", "scikit-image")


def machine() -> dict[str, Any]:
    """Processor, threads, versions and date, as plain values."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "target": base.load("cpu").target(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "tamis": _version("tamis"),
        "platform": platform.platform(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def info() -> dict[str, Any]:
    """What `tamis info` shows: backends with their reasons, CPU targets, threads, versions."""
    cpu = cast(ModuleType, base.load("cpu"))
    built, runnable = cpu.built_targets(), cpu.available_targets()
    problem = None
    try:
        target = cpu.target()
    except ValueError as error:
        target, problem = None, str(error)
    backends = {}
    for name in base.BACKENDS:
        token = torch.zeros(1, 1, 1, 8)
        reasons = base.load(name).reasons(make_call(token, token, token))
        if name == "cpu" and problem is not None:
            reasons = [*reasons, problem]
        backends[name] = {"available": not reasons, "reasons": reasons}
    return {
        "tamis": _version("tamis"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "backends": backends,
        "cpu_target": target,
        "cpu_targets": {name: _why_not(name, target, built, runnable) for name in built},
        "packages": {name: _version(name) for name in _OPTIONAL},
    }


def _why_not(name: str, target: str | None, built: list[str], runnable: list[str]) -> str:
    """Why a target that was built is in use or not; `built` is ordered best first."""
    if name == target:
        return "in use"
    if name not in runnable:
        return "this processor lacks its instructions"
    forced = os.environ.get("TAMIS_CPU_TARGET")
    if target is None or built.index(name) < built.index(target):
        return f"TAMIS_CPU_TARGET={forced} asks for another"
    return "a better one is in use"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
