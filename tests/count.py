"""What kernels do in Triton's interpreter, counted: bytes and accesses, and sums, of each kernel that is started."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from tamis.backends.triton import launch


@dataclass
class Work:
    """Of one kernel: bytes, how many loads, stores and reductions ran."""

    read: int = 0
    written: int = 0
    loads: int = 0
    stores: int = 0
    reductions: int = 0


@contextlib.contextmanager
def counted() -> Iterator[dict[str, Work]]:
    """Inside, every kernel that is started adds to its entry; a lane that is masked moves nothing."""
    from triton.runtime import interpreter

    found: dict[str, Work] = {}
    running: list[Work] = []
    builder = interpreter.InterpreterBuilder
    plain_run, load, store = launch.run, builder.create_masked_load, builder.create_masked_store
    reduce = interpreter.ReduceOps.apply_impl

    def run(kernel: Any, *rest: Any, **options: Any) -> None:
        running.append(found.setdefault(kernel.fn.__name__, Work()))
        plain_run(kernel, *rest, **options)
        running.pop()

    def size(pointers: Any, mask: Any) -> int:
        lanes = int(np.broadcast_to(mask.data.astype(bool), pointers.data.shape).sum())
        return lanes * max(1, pointers.get_element_ty().primitive_bitwidth // 8)

    def counting_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        running[-1].read += size(pointers, mask)
        running[-1].loads += 1
        return load(self, pointers, mask, *rest)

    def counting_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        running[-1].written += size(pointers, mask)
        running[-1].stores += 1
        return store(self, pointers, value, mask, *rest)

    def counting_reduce(self: Any, values: Any) -> Any:
        running[-1].reductions += 1
        return reduce(self, values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "run", run)
        patch.setattr(builder, "create_masked_load", counting_load)
        patch.setattr(builder, "create_masked_store", counting_store)
        patch.setattr(interpreter.ReduceOps, "apply_impl", counting_reduce)
        yield found
