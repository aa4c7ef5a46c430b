"""Hopper's asynchronous units: barriers, copies by descriptor (TMA), and products of warpgroups (wgmma).

A copy lands at a time drawn from the seed, before its barrier completes; a product reads its operands at a time between
its issue and the wait for it. What lies outside of a tensor arrives as zero, and is not written.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl

from emulator.machine import Partition, current, join
from emulator.pointers import Memory
from emulator.shared import Barrier, Shared
from emulator.values import TORCH, TRITON, KernelError, Type, Value, common_layout, raw, scalar


class Descriptor:
    """A tensor of the host as copies see it: boxes of one size, at any place."""

    def __init__(
        self, memory: Memory, shape: list[int], strides: list[int], block_shape: list[int], layout: Any
    ) -> None:
        self.memory, self.layout = memory, layout
        self.sizes, self.steps = [int(size) for size in shape], [int(step) for step in strides]
        self.block_shape = [int(size) for size in block_shape]
        self.dtype = TRITON[memory.flat.dtype]
        if max(self.block_shape) > 256 or self.block_shape[-1] * memory.flat.itemsize < 16:
            raise KernelError(f"a copy can't bring a box of {self.block_shape} elements of {self.dtype}")
        if self.steps[-1] != 1 or any(step * memory.flat.itemsize % 16 for step in self.steps[:-1]):
            raise KernelError(f"a copy can't follow the strides {self.steps} of {self.dtype}")

    @property
    def shape(self) -> list[Value]:
        return [scalar(size) for size in self.sizes]

    @property
    def strides(self) -> list[Value]:
        return [scalar(step, tl.int64) for step in self.steps]

    @property
    def block_type(self) -> Any:
        return Type(self.dtype, self.block_shape, self.layout)

    def places(self, coordinates: Any) -> tuple[Tensor, Tensor]:
        """Elements of a box in the flat tensor, and which of them exist."""
        offsets, inside = torch.tensor(self.memory.low), torch.tensor(True)
        rank = len(self.sizes)
        if len(coordinates) != rank:
            raise KernelError(f"{rank} coordinates are needed, not {len(coordinates)}")
        for axis, (first, size, step) in enumerate(zip(coordinates, self.block_shape, self.steps, strict=True)):
            at = (int(first) + torch.arange(size)).view([-1] + [1] * (rank - 1 - axis))
            inside = inside & (at >= 0) & (at < self.sizes[axis])
            offsets = offsets + at * step
        return offsets, inside

    def read(self, coordinates: Any) -> Tensor:
        offsets, inside = self.places(coordinates)
        self.memory.check(offsets[inside], "copies")
        flat = raw(self.memory.flat)
        return torch.where(
            inside, flat[torch.where(inside, offsets, self.memory.low)], torch.zeros((), dtype=flat.dtype)
        )

    def write(self, coordinates: Any, data: Tensor, writer: int) -> None:
        offsets, inside = self.places(coordinates)
        self.memory.write(offsets[inside], raw(data)[inside], writer)


def barrier_of(view: Shared) -> Barrier:
    place = view.data.storage_offset()
    if view.numel != 1 or place not in view.of.barriers:
        raise KernelError(f"{view.name} is no barrier: mbarrier.init is missing")
    return view.of.barriers[place]


def init(mbarrier: Shared, count: int) -> None:
    current().switch()
    place = mbarrier.data.storage_offset()
    if mbarrier.dtype != tl.int64 or mbarrier.numel != 1 or int(count) < 1:
        raise KernelError("a barrier is one int64, for one arrival or more")
    if place in mbarrier.of.barriers:
        raise KernelError(f"{mbarrier.name} is initialised twice")
    mbarrier.of.barriers[place] = Barrier(mbarrier.name, int(count))


def invalidate(mbarrier: Shared) -> None:
    barrier_of(mbarrier)
    del mbarrier.of.barriers[mbarrier.data.storage_offset()]


def expect(mbarrier: Shared, bytes: int, pred: Any = True) -> None:
    current().switch()
    if pred:
        barrier_of(mbarrier).expect(int(bytes))


def arrive(mbarrier: Shared, *, count: int = 1, pred: Any = True) -> None:
    current().switch()
    if pred:
        barrier_of(mbarrier).arrive(int(count))


def wait(mbarrier: Shared, phase: Any, pred: Any = True, deps: Any = ()) -> None:
    machine, parity = current(), int(phase)
    machine.switch()
    if not pred:
        return
    if parity not in (0, 1):
        raise KernelError(f"{mbarrier.name} is waited for with phase {parity}: there are 0 and 1")
    barrier = barrier_of(mbarrier)
    machine.wait(
        lambda: barrier.phase % 2 != parity, lambda: f"parity {parity} of {barrier.name} ({barrier.missing()})"
    )
    join(machine.here.clock, barrier.known)


def load(tensor_desc: Descriptor, coord: Any, barrier: Shared, result: Shared, pred: Any = True) -> None:
    """`tma.async_copy_global_to_shared`."""
    machine = current()
    machine.switch()
    if not pred:
        return
    if result.shape != tensor_desc.block_shape or result.dtype != tensor_desc.dtype:
        raise KernelError(f"{result.name} is {result.type}, and the copy brings {tensor_desc.block_type}")
    if not result.data.is_contiguous():
        raise KernelError(f"{result.name} does not lie in one piece")
    place, where = barrier_of(barrier), [int(x) for x in coord]
    result.fenced("writing", "reading")
    result.access(("copies", place), place.phase + 1, machine.here.clock, write=True)
    result.coming()

    def land() -> None:
        machine.copies -= 1
        result.put(tensor_desc.read(where))
        place.land(tensor_desc.block_type.nbytes)

    machine.copies += 1
    machine.later(land)
    place.issue(tensor_desc.block_type.nbytes)


def store(tensor_desc: Descriptor, coord: Any, src: Shared) -> None:
    """`tma.async_copy_shared_to_global`."""
    machine = current()
    machine.switch()
    here, writer, where = machine.here, machine.writer, [int(x) for x in coord]
    if src.shape != tensor_desc.block_shape or src.dtype != tensor_desc.dtype:
        raise KernelError(f"{src.name} is {src.type}, and the copy takes {tensor_desc.block_type}")
    src.fenced("writing")
    here.stored += 1
    src.access(("stores", here), here.stored, here.clock, write=False)
    under_way = _Unit(lambda: tensor_desc.write(where, src.contents(), writer), here.stored)
    here.stores.append(under_way)
    machine.later(under_way.run)


def store_wait(pendings: int) -> None:
    current().switch()
    _retire(current().here, "stores", current().here.stores, int(pendings))


class _Unit:
    """Work that is done once, at the latest when it is waited for."""

    def __init__(self, work: Any, number: int) -> None:
        self.work, self.number = work, number
        self.ran = self.waited = False

    def run(self) -> None:
        if not self.ran:
            self.ran = True
            self.work()


def _retire(here: Partition, kind: str, under_way: list[Any], left: int) -> None:
    while len(under_way) > left:
        oldest = under_way.pop(0)
        oldest.run()
        oldest.waited = True
        here.clock[kind, here] = oldest.number


class Product(_Unit):
    """An accumulator that the matrix units are still at work on."""

    def __init__(self, operands: tuple[Any, Any, Any], number: int) -> None:
        super().__init__(self._multiply, number)
        self.a, self.b, self.acc = operands
        self.result: Tensor | None = None

    @property
    def layout(self) -> Any:
        return None if self.acc is None else self.acc.layout

    def _multiply(self) -> None:
        a, b = (x.contents() if isinstance(x, Shared) else x.data for x in (self.a, self.b))
        product = a.float() @ b.float()  # sums of 256 products of int8 are exact in fp32
        if a.dtype == torch.int8:
            product = product.to(torch.int32)
        if isinstance(self.acc, Product):
            assert self.acc.result is not None
            product = product + self.acc.result
        elif self.acc is not None:
            product = product + self.acc.data
        self.result = product

    def value(self) -> Value:
        assert self.result is not None
        return Value(self.result, self.layout)

    def __getattr__(self, name: str) -> Any:
        raise KernelError(f"an accumulator is used ({name}) before warpgroup_mma_wait")


def _too_early(self: Product, *others: Any) -> Any:
    raise KernelError("an accumulator is used before warpgroup_mma_wait")


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "neg", "getitem", "lt", "gt"):
    setattr(Product, f"__{_name}__", _too_early)

_SUMS = {torch.int8: torch.int32, torch.float8_e4m3fn: torch.float32, torch.bfloat16: torch.float32}
_SUMS[torch.float16] = torch.float32


def _check_product(a: Any, b: Shared, acc: Any) -> None:
    """Shapes, types and, for 8-bit operands, the order in memory that wgmma takes."""
    left, right = TORCH[a.dtype], TORCH[b.dtype]
    if left != right or left not in _SUMS:
        raise KernelError(f"wgmma can't multiply {a.dtype} and {b.dtype}")
    (rows, inner), (inner_b, columns) = a.shape, b.shape
    if inner != inner_b or rows % 64 or columns % 8 or columns > 256 or inner * left.itemsize % 32:
        raise KernelError(f"wgmma can't multiply {a.shape} and {b.shape}")
    shared = [(x, axis) for x, axis in ((a, 1), (b, 0)) if isinstance(x, Shared)]
    if left.itemsize == 1 and any(x.data.stride(axis) != 1 for x, axis in shared):
        raise KernelError("8-bit operands of wgmma must have the summed dimension contiguous")
    _check_layouts(a, acc, left.itemsize)
    sums = acc.data.dtype if isinstance(acc, Value) else _SUMS[left]
    sizes = acc.shape if isinstance(acc, Value) else [rows, columns]
    if sums != _SUMS[left] or sizes != [rows, columns]:
        raise KernelError(f"wgmma can't add to {sums} {sizes}")


def _check_layouts(a: Any, acc: Any, size: int) -> None:
    """An instruction takes 32 bytes of each row, of which a thread holds 4 and 4 next to each other."""
    sums = acc.layout
    if not isinstance(sums, gl.NVMMADistributedLayout) or list(sums.version) != [3, 0]:
        raise KernelError(f"wgmma can't add in the layout {sums}")
    if sums.instr_shape[-1] * size != 32:
        raise KernelError(f"wgmma takes 32 bytes at a time, not {sums.instr_shape[-1]} of {size}")
    if isinstance(a, Value):
        held = a.layout
        good = isinstance(held, gl.DotOperandLayout) and held.operand_index == 0 and held.parent == sums
        if not good or held.k_width * size != 4:
            raise KernelError(f"wgmma can't take an operand from the layout {held}")


def warpgroup_mma(
    a: Any,
    b: Shared,
    acc: Any,
    *,
    use_acc: Any = True,
    precision: Any = None,
    max_num_imprecise_acc: Any = None,
    is_async: bool = False,
) -> Any:
    """acc + a b, or a b; asynchronous ones return an accumulator to wait for."""
    machine = current()
    machine.switch()
    here = machine.here
    _check_product(a, b, acc)
    here.issued += 1
    for operand in (a, b):
        if isinstance(operand, Shared):
            operand.fenced("writing")
            operand.access(("products", here), here.issued, here.clock, write=False)
    product = Product((a, b, acc), here.issued)
    if not use_acc:
        product.acc = Value(torch.zeros((), dtype=_SUMS[TORCH[a.dtype]]), acc.layout)
    here.products.append(product)
    if not is_async:
        _retire(here, "products", here.products, 0)
        return product.value()

    def one_more() -> None:
        for under_way in here.products:  # in the order of issue
            if not under_way.ran:
                return under_way.run()
        return None

    machine.later(one_more)
    return product


def warpgroup_mma_wait(num_outstanding: int = 0, deps: Any = None) -> Any:
    """Wait until so many products are under way at most; accumulators that are done become tensors."""
    if deps is None:
        raise KernelError("warpgroup_mma_wait needs deps")
    machine = current()
    machine.switch()
    _retire(machine.here, "products", machine.here.products, int(num_outstanding))
    done = [x.value() if isinstance(x, Product) and x.waited else x for x in deps]
    return done[0] if len(done) == 1 else tuple(done)


def warpgroup_mma_init(value: Value) -> Value:
    common_layout(value)
    return value
