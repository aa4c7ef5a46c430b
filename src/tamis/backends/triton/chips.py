"""What a GPU can do, and whether Triton can be used on it; imports no Triton, so that asking is always possible."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Chip:
    """One kind of GPU.

    Attributes:
        name: what stats call it, e.g. "sm_90".
        kind: "cuda", "hip" or "cpu" (Triton's interpreter).
        shared: bytes of shared memory that one program may use.
        fp8: the e4m3 that its matrix units take, or None if they take none.
        int8: whether Triton's int8 products run on matrix units.
        measured: whether tamis has run there; the others are compiled and checked, never run.
    """

    name: str
    kind: str
    shared: int
    fp8: torch.dtype | None
    int8: bool = True
    measured: bool = False

    @property
    def dot32(self) -> str:
        """Products of fp32: three of tf32 are as exact and run on matrix units, where there is tf32."""
        return "tf32x3" if self.kind == "cuda" else "ieee"


# Shared memory per program: CUDA C++ Programming Guide, table of technical specifications; LDS of CDNA 3.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("sm_80", "cuda", 166_912, None),
        Chip("sm_86", "cuda", 101_376, None),
        Chip("sm_89", "cuda", 101_376, torch.float8_e4m3fn),
        Chip("sm_90", "cuda", 232_448, torch.float8_e4m3fn),
        Chip("sm_100", "cuda", 232_448, torch.float8_e4m3fn, int8=False),
        Chip("sm_120", "cuda", 101_376, torch.float8_e4m3fn),
        Chip("gfx942", "hip", 65_536, torch.float8_e4m3fnuz),
        Chip("interpreter", "cpu", 2**31, torch.float8_e4m3fn),
    )
}
# Chips of one family run the code of their elder.
_SAME = {"sm_87": "sm_86", "sm_103": "sm_100", "sm_121": "sm_120"}
_assumed: list[str] = []


@contextlib.contextmanager
def assume(name: str) -> Iterator[None]:
    """Prepare calls as for this target, whatever the machine; to compile kernels for a GPU that is not there."""
    _assumed.append(name)
    try:
        yield
    finally:
        _assumed.pop()


def interpreting() -> bool:
    """Whether Triton runs its kernels in Python, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def name_of(device: torch.device) -> str:
    """The architecture's name, known to tamis or not."""
    if _assumed:
        return _assumed[-1]
    if interpreting():
        return "interpreter"
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def of(device: torch.device) -> Chip:
    """The target of a device.

    Raises:
        RuntimeError: tamis does not know it.
    """
    name = name_of(device)
    name = _SAME.get(name, name)
    if name not in CHIPS:
        raise RuntimeError(f"the triton backend knows {', '.join(CHIPS)}, not {name}")
    return CHIPS[name]


@functools.cache
def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install 'triton>=3.6'"
    if not interpreting() and not any(
        shutil.which(name) for name in (os.environ.get("CC", "cc"), "cc", "gcc", "clang")
    ):
        return "Triton needs a C compiler to start kernels: install gcc or clang, or set CC"
    return None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def missing(kind: str, index: int) -> str | None:
    """Why the backend can't run on a device, or None; a constant, since a graph compiler cannot look into it."""
    if _assumed:
        return None
    if (why := _missing()) is not None:
        return why
    if kind == "cpu":
        return None if interpreting() else "it runs on GPU tensors"
    if kind != "cuda":
        return f"it runs on cuda and hip tensors, not {kind}"
    if interpreting():
        return None
    name = name_of(torch.device(kind, index))
    name = _SAME.get(name, name)
    return None if name in CHIPS else f"it knows {', '.join(sorted(CHIPS))}, and this GPU is {name}"
