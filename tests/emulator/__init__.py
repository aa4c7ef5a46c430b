"""Gluon kernels on a CPU: a kernel's own source runs on emulated Hopper hardware, which finds faults in its protocol.

    values.py    tensors, with Triton's rules for types
    pointers.py  global memory and its bounds
    machine.py   partitions that take turns in an order drawn from a seed, and who knows what to be done
    shared.py    shared memory, races, barriers
    hopper.py    copies (TMA), products (wgmma), and the operations on barriers
    language.py  the functions that kernels call
    kernels.py   from a kernel to a Python function, and launching it

Layouts are carried along and compared, not computed: that they exist and fit is for the compiler to say. Plain Triton
kernels run too, so that a whole call of the backend can. Not modelled: clusters, registers, the speed of anything, and
what the threads of one partition do to one another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from emulator.kernels import Mutation, Source, run
from emulator.machine import Deadlock
from emulator.values import KernelError

__all__ = ["Deadlock", "KernelError", "Source", "installed", "run"]


@contextlib.contextmanager
def installed(seed: int = 0, races: bool = True, mutation: Mutation | None = None) -> Iterator[list[str]]:
    """Inside, the triton backend's kernels are emulated; gives the names of those that ran."""
    from tamis.backends.triton import launch

    ran: list[str] = []
    source = Source(mutation)
    plain = launch.run

    def start(
        kernel: Any,
        grid: tuple[int, ...],
        *arguments: Any,
        device: torch.device,
        warps: int = 4,
        stages: int = 1,
        registers: int | None = None,
        **constants: Any,
    ) -> None:
        if launch._noted:
            options = {"warps": warps, "stages": stages, "registers": registers}
            plain(kernel, grid, *arguments, device=device, **options, **constants)
        elif 0 not in grid:
            ran.append(kernel.fn.__name__)
            run(kernel, grid, *arguments, seed=seed, races=races, source=source, **constants)

    with mock.patch.object(launch, "run", start):
        yield ran
