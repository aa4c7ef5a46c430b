"""Global memory: every access is held against the bounds of the tensor that the pointer came from."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from emulator.values import TRITON, KernelError, Type, Value, common_layout, poison, raw, reindex, valued


class Memory:
    """A tensor of the host, flat, and who wrote what of it."""

    def __init__(self, tensor: Tensor, name: str) -> None:
        self.name = name
        size = tensor.untyped_storage().nbytes() // tensor.itemsize
        self.flat = torch.as_strided(tensor, (size,), (1,), 0)
        ends = [(size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
        self.low = tensor.storage_offset()
        self.high = self.low + sum(ends) + 1 if tensor.numel() else self.low
        self.writers = torch.zeros(0, dtype=torch.int32)

    def check(self, offsets: Tensor, verb: str) -> None:
        """Raise unless all these elements are the tensor's."""
        outside = (offsets < self.low) | (offsets >= self.high)
        if outside.any():
            place = int(offsets[outside][0]) - self.low
            raise KernelError(f"the kernel {verb} element {place} of {self.name}, which has {self.high - self.low}")

    def write(self, offsets: Tensor, data: Tensor, writer: int) -> None:
        """Raise if another program or partition wrote something else there: which of the two stays would be chance."""
        self.check(offsets, "writes")
        flat = raw(self.flat)
        if self.writers.numel() == 0:
            self.writers = torch.zeros(flat.numel(), dtype=torch.int32)
        others, old = self.writers[offsets], flat[offsets]
        differs = (old != data) & ((old == old) | (data == data))
        if ((others != 0) & (others != writer) & differs).any():
            raise KernelError(f"two partitions or programs write the same elements of {self.name}")
        self.writers[offsets] = writer
        flat[offsets] = data


class Pointer:
    """Pointers into one tensor."""

    def __init__(self, memory: Memory, data: Tensor, layout: Any = None) -> None:
        self.memory, self.data, self.layout = memory, data, layout

    @property
    def dtype(self) -> Any:
        return tl.pointer_type(TRITON[self.memory.flat.dtype])

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    @property
    def type(self) -> Type:
        return Type(self.dtype, tuple(self.data.shape), self.layout)

    def viewed(self, data: Tensor, layout: Any) -> Pointer:
        return Pointer(self.memory, data, layout)

    def __getitem__(self, index: Any) -> Pointer:
        return reindex(self, index)

    def __add__(self, other: Any) -> Pointer:
        step = valued(other)
        if step.data.dtype.is_floating_point:
            raise KernelError("a pointer moves by integers")
        return Pointer(self.memory, self.data + step.data.long(), common_layout(self, step))

    __radd__ = __add__

    def __sub__(self, other: Any) -> Pointer:
        return self + -valued(other)

    def load(self, mask: Any = None, other: Any = None) -> Value:
        """What is masked is `other`, or poison if there is none."""
        layout = common_layout(self, mask)
        memory = self.memory
        dtype = memory.flat.dtype
        if mask is None:
            memory.check(self.data, "reads")
            return Value(raw(memory.flat)[self.data].view(dtype), layout)
        offsets, wanted = torch.broadcast_tensors(self.data, valued(mask).data)
        memory.check(offsets[wanted], "reads")
        result = torch.full(offsets.shape, poison(dtype), dtype=raw(memory.flat).dtype)
        if other is not None:
            fill = valued(other).data.to(dtype)
            result = raw(fill).expand(offsets.shape).clone()
        result[wanted] = raw(memory.flat)[offsets[wanted]]
        return Value(result.view(dtype), layout)

    def store(self, value: Any, mask: Any, writer: int) -> None:
        memory = self.memory
        common_layout(self, value, mask)
        data = raw(valued(value).data.to(memory.flat.dtype))
        shown = torch.tensor(True) if mask is None else valued(mask).data
        offsets, data, wanted = torch.broadcast_tensors(self.data, data, shown)
        memory.write(offsets[wanted], data[wanted], writer)
