"""What a GPU can do, and whether Triton can be used on it; imports no Triton, so that asking is always possible."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import shutil
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

OLDEST_TRITON = (3, 6)


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
# Set by the tests' interpreter.py, which mends what Triton's interpreter gets wrong; without it numbers are not right.
interpreter_is_mended = False
_compilers: list[bool] = []  # filled once there is one: searching for it takes longer than starting a kernel


@contextlib.contextmanager
def assume(name: str) -> Iterator[None]:
    """Prepare calls as for this target, whatever the machine; to compile kernels for a GPU that is not there."""
    _assumed.append(name)
    try:
        yield
    finally:
        _assumed.pop()


def interpreting() -> bool:
    """Whether Triton runs its kernels in Python, on CPU tensors: the words are those that Triton takes for yes."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on")


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
    if (why := _unknown(name)) is not None:
        raise RuntimeError(why)
    return CHIPS[_SAME.get(name, name)]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def missing(kind: str, index: int) -> str | None:
    """Why the backend can't run on a device, or None; a constant, since a graph compiler cannot look into it.

    What nobody can mend comes first, and a refusal is never remembered: it may be mended while the process lives.
    """
    if _assumed:
        return None
    if interpreting():
        if not interpreter_is_mended:
            return "TRITON_INTERPRET is set, and Triton's interpreter is for the tests of tamis alone: unset it"
        return _no_triton()
    if kind == "cpu":
        return "query is on cpu: move query, key and value to a GPU"
    if kind != "cuda":
        return f"it runs on cuda and hip tensors, not {kind}"
    return _unknown(name_of(torch.device(kind, index))) or _no_triton() or _no_compiler()


def triton_version() -> tuple[int, int] | None:
    """Major and minor version of the Triton that is imported here, or None."""
    try:
        found = importlib.import_module("triton")
    except ImportError:
        return None
    numbers = re.match(r"(\d+)\.(\d+)", getattr(found, "__version__", ""))
    return None if numbers is None else (int(numbers[1]), int(numbers[2]))


def how_to_install() -> str:
    """The way to a Triton that fits the torch that is here."""
    if torch.version.hip is not None:  # triton of the package index is NVIDIA's
        return "install a newer ROCm build of torch, which brings its own"
    return "pip install 'torch>=2.10', whose CUDA build brings Triton 3.6, or pip install 'triton>=3.6'"


def _unknown(name: str) -> str | None:
    if _SAME.get(name, name) in CHIPS:
        return None
    known = ", ".join(chip.name for chip in CHIPS.values() if chip.kind != "cpu")
    plain = "without backend='triton' calls run in plain torch, right and very slow"
    if re.fullmatch(r"sm_[1-7]\d", name):
        return f"this GPU is {name}, and the kernels need sm_80 or newer: {plain}"
    return f"this GPU is {name}, and the kernels are made for {known}: {plain}"


def _no_triton() -> str | None:
    version = triton_version()
    if version is None:
        return f"Triton is not installed: {how_to_install()}"
    if version < OLDEST_TRITON:
        return f"Triton {version[0]}.{version[1]} is here, and 3.6 or newer is needed: {how_to_install()}"
    return None


def _no_compiler() -> str | None:
    """What Triton compiles its launchers with: the program that CC names, or gcc or clang, and Python's headers."""
    if _compilers:
        return None
    named = os.environ.get("CC")
    if named is not None and shutil.which(named) is None:
        return f"CC={named} is not a program, and Triton would start kernels with it: unset CC, or name a C compiler"
    if named is None and not (shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler to start kernels: install gcc or clang, or name another in CC"
    # As Triton does: Debian's own scheme names a folder that pip installs to.
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    own = sysconfig.get_path("include", scheme)
    more = [folder for name in ("CPATH", "C_INCLUDE_PATH") for folder in os.environ.get(name, "").split(os.pathsep)]
    if not any(Path(folder, "Python.h").is_file() for folder in (own, *filter(None, more))):
        return f"Triton needs Python's headers, and {own} has no Python.h: install python3-dev or python3-devel"
    _compilers.append(True)
    return None
