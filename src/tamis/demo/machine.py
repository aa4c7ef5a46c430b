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

_OPTIONAL = ("triton", "transformers", "accelerate", "gguf", "onnx", "numpy", "scikit-image")


def machine() -> dict[str, Any]:
    """Processor, threads, versions and date, as plain values."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "target": base.load("cpu").target(torch.device("cpu")),
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
        device = "cuda" if name == "triton" and torch.cuda.is_available() else "cpu"
        token = torch.zeros(1, 1, 1, 8, device=device)
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
        "gpus": _gpus(),
        "cpu_target": target,
        "cpu_targets": {name: _why_not(name, target, built, runnable) for name in built},
        "packages": {name: _version(name) for name in _OPTIONAL},
    }


def _gpus() -> list[dict[str, str]]:
    """Name, architecture and standing of every GPU that torch sees."""
    from tamis.backends.triton import chips

    found = []
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        problem = chips.missing("cuda", index)
        standing = problem
        if problem is None:
            measured = chips.of(device).measured
            standing = (
                "in use" if measured else "its kernels are compiled and checked, but were never run by tamis' authors"
            )
        found.append(
            {"name": torch.cuda.get_device_name(device), "target": chips.name_of(device), "state": standing or ""}
        )
    return found


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
