"""Bringing tensors into the form in which kernels take them: strides, where one entry may stand for all, and tables."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def batch_stride(x: Tensor | None) -> int:
    """Elements from one batch to the next; 0 where one stands for all."""
    return 0 if x is None or x.shape[0] == 1 else x.stride(0)


def in_rows(x: Tensor) -> Tensor:
    """x, or a copy if its rows are not in one piece."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def by_16_bytes(x: Tensor) -> bool:
    """Whether Triton loads x by 16 bytes: rows in one piece, of whole 16 bytes, that start at multiples of 16 entries.

    Of strides that are no such multiples it assumes nothing.
    """
    even = x.stride(3) == 1 and x.shape[3] * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0
    return even and all(stride % 16 == 0 for stride in x.stride()[:3])


def widened(x: Tensor, width: int) -> Tensor:
    """A copy in rows of `width`, with zeros behind."""
    copy = x.new_zeros((*x.shape[:-1], width))
    copy[..., : x.shape[-1]] = x
    return copy


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
