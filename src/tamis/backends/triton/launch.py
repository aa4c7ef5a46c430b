"""Starting kernels: on the right device and stream, or only noting what would have been started."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch


class Launch(NamedTuple):
    """A kernel with all that decides its machine code."""

    kernel: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    warps: int
    stages: int
    registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """What Triton takes beside arguments and constants."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return options if self.registers is None else options | {"maxnreg": self.registers}


_noted: list[list[Launch]] = []


@contextlib.contextmanager
def note() -> Iterator[list[Launch]]:
    """Inside, kernels are not run but listed: what `tamis bench gpu-static` compiles."""
    launches: list[Launch] = []
    _noted.append(launches)
    try:
        yield launches
    finally:
        _noted.pop()


def run(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    device: torch.device,
    warps: int = 4,
    stages: int = 1,
    registers: int | None = None,
    **constants: Any,
) -> None:
    """Start a kernel on the current stream of `device`; a grid with a zero in it starts nothing.

    registers: the most that a thread may have. Unless it is said, NVIDIA's assembler rather spills a few bytes than let
    fewer programs share a processor.
    """
    item = Launch(kernel, arguments, constants, warps, stages, registers)
    if _noted:
        _noted[-1].append(item)
        return
    if 0 in grid:
        return
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*arguments, **constants, **item.options)


def power(size: int, least: int = 16) -> int:
    """The next power of two, which tiles are made of."""
    return max(least, 1 << (size - 1).bit_length())
