"""The native library: where it is, which instruction set runs, how many threads; ctypes onto csrc/attend.h.

One library serves every torch and every x86-64 processor; the instruction set is chosen at run time. Set
`TAMIS_CPU_TARGET` to one of `available_targets()` to force one. Threads: `torch.get_num_threads()` OpenMP threads from
the pool torch uses.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import tamis
from tamis.backends.cpu import native

_forced: list[str] = []


@functools.cache
def load() -> ctypes.CDLL | str:
    """The native library, or why there is none; `TAMIS_CPU_LIBRARY` names another build of it, e.g. with sanitizers."""
    if named := os.environ.get("TAMIS_CPU_LIBRARY"):
        return native.load(Path(named)) if Path(named).is_file() else f"TAMIS_CPU_LIBRARY={named} is not a file"
    # An editable install keeps the library in another folder than the sources: both are on the package's path.
    for folder in tamis.__path__:
        for name in ("libtamis_cpu.so", "libtamis_cpu.dylib"):
            path = Path(folder) / name
            if path.exists():
                return native.load(path)
    return "the native library is not there: install tamis with a C++17 compiler at hand"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def missing() -> str | None:
    """Why there is no native library, or None; a constant, since a graph compiler cannot look into ctypes."""
    found = load()
    return found if isinstance(found, str) else None


def built_targets() -> list[str]:
    """Targets that were compiled in, best first."""
    found = load()
    return [] if isinstance(found, str) else found.tamis_built_targets().decode().split()


def available_targets() -> list[str]:
    """Targets that this processor can run, best first."""
    return list(_available())


@functools.cache
def _available() -> tuple[str, ...]:
    found = load()
    return () if isinstance(found, str) else tuple(found.tamis_targets().decode().split())


@contextlib.contextmanager
def force_target(name: str) -> Iterator[None]:
    """Run with one target, whatever the environment says; for tests and comparisons."""
    _forced.append(name)
    try:
        target()
        yield
    finally:
        _forced.pop()


def target(device: torch.device | None = None) -> str | None:
    """The instruction set in use: the forced one, or the best this processor has.

    Raises:
        ValueError: the target asked for cannot run here.
    """
    available = _available()
    if not available:
        return None
    wanted = _forced[-1] if _forced else os.environ.get("TAMIS_CPU_TARGET", "")
    if wanted and wanted not in available:
        raise ValueError(f"TAMIS_CPU_TARGET must be one of {', '.join(available)} on this processor, got {wanted!r}")
    return wanted or available[0]


@functools.cache
def _sleeps() -> bool:
    """Whether threads sleep when they wait, and take longer to start than those that spin."""
    return os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive"


def threads(work: int, *, asleep: int = 1_000_000) -> int:
    """Threads for so many multiplications: as many as have work for longer than starting them takes.

    asleep: how many are worth waking a thread that sleeps: of fast products more.
    """
    return max(1, min(torch.get_num_threads(), work // (asleep if _sleeps() else 250_000)))


def run(name: str, args: ctypes.Structure) -> None:
    """Call a function of the library with the target in use."""
    function, chosen = entry(name)
    native.check(function(chosen, ctypes.byref(args)))


def entry(name: str) -> tuple[Callable[[bytes, object], int], bytes]:
    """A function of the library, and the target in use as it wants it."""
    lib, chosen = load(), target()
    if isinstance(lib, str) or chosen is None:
        raise RuntimeError(f"the cpu backend cannot run: {lib}")
    return getattr(lib, f"tamis_{name}"), chosen.encode()


def expand(bits: int, num: Tensor, kv_blocks: int, width: int, indices: Tensor, workers: int) -> None:
    """Write rows of bits, at an address, as lists of indices."""
    lib = load()
    assert not isinstance(lib, str)
    native.check(lib.tamis_expand(bits, num.numel(), kv_blocks, width, indices.data_ptr(), ctypes.c_int32(workers)))


def attach_segments(args: native.Summarize | native.Pack | native.Attend, segments: Tensor | None) -> Tensor | None:
    """Attach segments; the caller keeps the returned tensor alive."""
    dense = None if segments is None else segments.to(torch.int64).contiguous()
    prefix = "pack_segment" if isinstance(args, native.Attend) else "segment"
    setattr(args, f"{prefix}s", native.pointer(dense))
    setattr(args, f"{prefix}_stride", native.batch_stride(dense))
    return dense
