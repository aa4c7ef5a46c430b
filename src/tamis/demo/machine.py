"""The machine and the software that figures belong to, and what tamis can use of it."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch

from tamis.backends import base
from tamis.call import PRECISIONS, make_call
from tamis.version import installed

# What holds torch's own kernels to older instructions, so that a comparison is that of another machine.
_PEER_LIMITS = ("ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA")
_OPTIONAL = ("triton", "transformers", "accelerate", "gguf", "onnx", "numpy", "scikit-image", "av")


def machine() -> dict[str, Any]:
    """Processor, threads, what holds torch back, versions and date, as plain values."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "target": base.load("cpu").target(torch.device("cpu")),
        "peer_limits": {name: os.environ[name] for name in _PEER_LIMITS if name in os.environ},
        "torch": torch.__version__,
        "python": platform.python_version(),
        "tamis": installed(),
        "platform": platform.platform(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def info() -> dict[str, Any]:
    """What `tamis info` shows: backends with their reasons, GPUs, CPU targets, threads, versions."""
    cpu = cast(ModuleType, base.load("cpu"))
    built, runnable = cpu.built_targets(), cpu.available_targets()
    problem = None
    try:
        target = cpu.target()
    except ValueError as error:
        target, problem = None, str(error)
    token = torch.zeros(1, 1, 1, 8)
    gpus = _gpus()
    backends = {}
    for name in base.BACKENDS:
        reasons = _no_gpu(gpus) if name == "triton" else base.load(name).reasons(make_call(token, token, token))
        if name == "cpu" and problem is not None:
            reasons = [*reasons, problem]
        backends[name] = {"available": not reasons, "reasons": reasons}
    return {
        "tamis": installed(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "backends": backends,
        "gpus": gpus,
        "cpu_target": target,
        "cpu_targets": {name: _why_not(name, target, built, runnable) for name in built},
        "packages": {name: installed(name) for name in _OPTIONAL},
    }


def _gpus() -> list[dict[str, Any]]:
    """Name, architecture and standing of every GPU that torch sees; nothing is put on them, for they may be full."""
    return [_gpu(index) for index in range(torch.cuda.device_count())]


def _gpu(index: int) -> dict[str, Any]:
    """One GPU; `precisions` has None for what runs on it, and else the reason."""
    from tamis.backends import triton
    from tamis.backends.triton import chips

    device = torch.device("cuda", index)
    found: dict[str, Any] = {"name": f"cuda:{index}", "target": None}
    try:
        found |= {"name": torch.cuda.get_device_name(device), "target": chips.name_of(device)}
        problem = chips.missing("cuda", index)
        measured = problem is None and chips.of(device).measured
        precisions = {name: problem or triton.lacks(name, "cuda", index) for name in PRECISIONS}
    except (RuntimeError, AssertionError) as error:  # a driver that is too old, or a card that has failed
        problem = f"torch cannot use it: {str(error).splitlines()[0]}"
        return found | {"state": problem, "usable": False, "precisions": dict.fromkeys(PRECISIONS, problem)}
    never = "its kernels are compiled and checked, but were never run by tamis' authors"
    state = problem or ("in use" if measured else never)
    return found | {"state": state, "usable": problem is None, "precisions": precisions}


def _no_gpu(gpus: list[dict[str, Any]]) -> list[str]:
    """Why the triton backend runs on no GPU here; empty if it runs on one."""
    if not gpus:
        return [
            f"it needs a GPU that torch can use, and torch {torch.__version__} sees none: run it on a machine with "
            "one, with torch's CUDA or ROCm build"
        ]
    return [] if any(gpu["usable"] for gpu in gpus) else list(dict.fromkeys(gpu["state"] for gpu in gpus))


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
