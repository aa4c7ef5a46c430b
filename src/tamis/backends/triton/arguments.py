"""Bringing tensors into the form in which kernels take them: strides, where one entry may stand for all, and tables."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def batch_stride(x: Tensor | None) -> int:
    """Elements from one batch to the next; 0 where one stands for all."""
    return 0 if x is None or x.shape[0] == 1 else x.stride(0)


def table_strides(x: Tensor | None) -> tuple[int, int]:
    """Batch and head strides of a table of blocks that may have one entry for all."""
    return (0, 0) if x is None else (batch_stride(x), 0 if x.shape[1] == 1 else x.stride(1))


def bounds(q_bounds: Tensor | None, kv_bounds: Tensor | None, visible: Tensor | None) -> tuple[Any, ...]:
    """The tables that say which blocks meet, and their strides."""
    return (
        None if q_bounds is None else q_bounds.contiguous(),
        None if kv_bounds is None else kv_bounds.contiguous(),
        None if visible is None else visible.contiguous(),
        *(batch_stride(q_bounds), batch_stride(kv_bounds), *table_strides(visible)),
    )
