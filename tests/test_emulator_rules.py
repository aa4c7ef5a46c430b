"""The emulator's copies, barriers and products, one rule of the hardware at a time."""

from __future__ import annotations

import contextlib
from typing import Any

import emulator
import pytest
import torch

pytest.importorskip("triton")

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tamis.backends.triton import launch
from tamis.bench import gpu_static


@gluon.jit
def box_kernel(desc, out, row, column, promised, LAYOUT: gl.constexpr):
    room = gl.allocate_shared_memory(desc.dtype, desc.block_type.shape, desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=1)
    mbarrier.expect(ready, desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [row, column], ready, room)
    mbarrier.wait(ready, 0)
    at = gl.arange(0, 8, gl.SliceLayout(1, LAYOUT))[:, None] * 16 + gl.arange(0, 16, gl.SliceLayout(0, LAYOUT))[None, :]
    gl.store(out + gl.multiple_of(promised, 8) * 0 + at, room.load(LAYOUT))


def boxed(row: int, column: int, promised: int = 8) -> torch.Tensor:
    x, out = torch.arange(1.0, 12 * 32 + 1).view(12, 32)[:, :20], torch.zeros(8, 16)
    layout = gl.NVMMASharedLayout.get_default_for([8, 16], gl.float32)
    desc = TensorDescriptor(x, list(x.shape), list(x.stride()), [8, 16], layout)
    registers = gl.BlockedLayout([1, 1], [2, 16], [4, 1], [1, 0])
    emulator.run(box_kernel, (1,), desc, out, row, column, promised, LAYOUT=registers)
    padded = torch.nn.functional.pad(x, (16, 16, 8, 8))
    assert torch.equal(out, padded[row + 8 : row + 16, column + 16 : column + 32])
    return out


@pytest.mark.parametrize(("row", "column"), [(0, 0), (4, 4), (8, 8), (-3, -5), (12, 0), (3, 20)])
def test_boxes_end_in_zeros(row: int, column: int) -> None:
    """Rows go on after the tensor's last column in memory: those are outside too."""
    boxed(row, column)


def test_broken_promises() -> None:
    with pytest.raises(emulator.KernelError, match="12 is no multiple of 8"):
        boxed(0, 0, promised=12)


@gluon.jit
def solo_kernel(desc, out, RULE: gl.constexpr, LAYOUT: gl.constexpr):
    room = gl.allocate_shared_memory(desc.dtype, desc.block_type.shape, desc.layout)
    other = gl.allocate_shared_memory(desc.dtype, desc.block_type.shape, desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=1)
    if RULE == "arrives beyond":
        mbarrier.arrive(ready, count=2)
    elif RULE == "expects twice":
        mbarrier.expect(ready, desc.block_type.nbytes)
        mbarrier.expect(ready, desc.block_type.nbytes)
    elif RULE == "another box":
        mbarrier.expect(ready, desc.block_type.nbytes)
        tma.async_copy_global_to_shared(desc, [0, 0], ready, room)
        tma.async_copy_global_to_shared(desc, [0, 0], ready, other)
        mbarrier.wait(ready, 0)
    elif RULE == "ends early":
        mbarrier.expect(ready, desc.block_type.nbytes)
        tma.async_copy_global_to_shared(desc, [0, 0], ready, room)
    elif RULE == "nobody arrives":
        mbarrier.wait(ready, 0)
    elif RULE == "an older phase":
        mbarrier.wait(ready, 1)
    elif RULE == "invalidated":
        mbarrier.invalidate(ready)
        mbarrier.init(ready, count=1)
        mbarrier.invalidate(ready)
        mbarrier.arrive(ready)
    elif RULE == "for ever":
        while out is not None:
            mbarrier.wait(ready, 1)
    elif RULE == "rows of two copies":
        for row in gl.static_range(2):
            mbarrier.expect(ready, desc.block_type.nbytes)
            tma.async_copy_global_to_shared(desc, [row, 0], ready, room)
            if row == 0:
                mbarrier.wait(ready, 0)
        at = gl.arange(0, 8, gl.SliceLayout(1, LAYOUT))[:, None] * 16
        gl.store(out + at + gl.arange(0, 16, gl.SliceLayout(0, LAYOUT))[None, :], room.load(LAYOUT))
        mbarrier.wait(ready, 1)


def alone(rule: str, seed: int = 0, races: bool = True) -> torch.Tensor:
    x, out = torch.arange(256.0).view(16, 16), torch.zeros(8, 16)
    layout = gl.NVMMASharedLayout.get_default_for([8, 16], gl.float32)
    registers = gl.BlockedLayout([1, 1], [2, 16], [4, 1], [1, 0])
    desc = TensorDescriptor.from_tensor(x, [8, 16], layout)
    emulator.run(solo_kernel, (1,), desc, out, RULE=rule, LAYOUT=registers, seed=seed, races=races)
    return out


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("arrives beyond", "2 arrive at ready, which waits for 1 of 1"),
        ("expects twice", "1 arrive at ready, which waits for 0 of 1"),
        ("another box", "ready expects (0|512) bytes, and copies bring (512|1024)|the program ends while copies"),
        ("ends early", "the program ends while copies into its shared memory are under way"),
        ("nobody arrives", "the kernel waits for parity 0 of ready .in phase 0, 1 of 1 arrivals missing"),
        ("invalidated", "ready is no barrier"),
        ("for ever", "no end after 100000 steps"),
    ],
)
def test_rules_of_barriers(rule: str, message: str) -> None:
    for seed in range(1 if rule == "for ever" else 4):
        with pytest.raises(emulator.KernelError, match=message):
            alone(rule, seed)


def test_the_phase_before_the_first_is_over() -> None:
    alone("an older phase")


def test_a_place_is_poison_until_the_copy_lands() -> None:
    """Neither what stood there nor a mixture: the new rows, or NaN."""
    with pytest.raises(emulator.KernelError, match="race: room is read while one of the copies of ready writes it"):
        alone("rows of two copies")
    seen = [alone("rows of two copies", seed, races=False) for seed in range(16)]
    late = torch.arange(16.0, 16 + 128).view(8, 16)
    assert all(torch.equal(rows, late) or rows.isnan().all() for rows in seen)
    assert any(rows.isnan().all() for rows in seen)
    assert any(torch.equal(rows, late) for rows in seen)


@gluon.jit
def product_kernel(
    out, TYPE: gl.constexpr, SUMS: gl.constexpr, ROWS: gl.constexpr, TURNED: gl.constexpr, DEEP: gl.constexpr
):
    SUM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, DEEP])
    ROOM: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], TYPE)
    one = gl.full([64, 64], 1, TYPE, SUM)
    a = gl.allocate_shared_memory(TYPE, [64, 64], ROOM, one)
    b = gl.allocate_shared_memory(TYPE, [64, 64], ROOM, one)
    fence_async_shared()
    if TURNED:
        b = b.permute((1, 0))
    made = warpgroup_mma(a.slice(0, ROWS), b, gl.zeros([ROWS, 64], SUMS, SUM))
    at = gl.arange(0, ROWS, gl.SliceLayout(1, SUM))[:, None] * 64 + gl.arange(0, 64, gl.SliceLayout(0, SUM))[None, :]
    gl.store(out + at, made.to(gl.float32))


@pytest.mark.parametrize(
    ("form", "sums", "rows", "turned", "deep", "message"),
    [
        (gl.bfloat16, gl.float32, 64, False, 16, None),
        (gl.bfloat16, gl.float32, 64, True, 16, None),
        (gl.int8, gl.int32, 64, True, 32, None),
        (gl.float8e4nv, gl.float32, 64, True, 32, None),
        (gl.int8, gl.int32, 64, False, 32, "8-bit operands of wgmma must have the summed dimension contiguous"),
        (gl.float8e4nv, gl.float32, 64, False, 32, "8-bit operands"),
        (gl.int8, gl.float32, 64, True, 32, r"wgmma can't add to torch.float32 \[64, 64\]"),
        (gl.bfloat16, gl.float32, 32, True, 16, r"wgmma can't multiply \[32, 64\] and \[64, 64\]"),
        (gl.float32, gl.float32, 64, True, 8, "wgmma can't multiply fp32 and fp32"),
        (gl.int8, gl.int32, 64, True, 16, "wgmma takes 32 bytes at a time"),
    ],
)
def test_rules_of_products(form: Any, sums: Any, rows: int, turned: bool, deep: int, message: str | None) -> None:
    out = torch.zeros(64, 64)
    with pytest.raises(emulator.KernelError, match=message) if message else contextlib.nullcontext():
        emulator.run(product_kernel, (1,), out, TYPE=form, SUMS=sums, ROWS=rows, TURNED=turned, DEEP=deep)
        assert (out == 64).all()


def test_boxes_have_limits() -> None:
    layout = gl.NVMMASharedLayout.get_default_for([8, 16], gl.float32)
    wide, thin = torch.zeros(512, 16), torch.zeros(8, 16, dtype=torch.int8)
    for tensor, box in ((wide, [512, 16]), (thin, [8, 8])):
        desc = TensorDescriptor.from_tensor(tensor, box, layout)
        with pytest.raises(emulator.KernelError, match="a copy can't bring a box of"):
            emulator.run(box_kernel, (1,), desc, wide, 0, 0, 8, LAYOUT=None)


@gluon.jit
def giver(desc, room, ready, empty):
    for turn in range(2):
        mbarrier.wait(empty, (turn & 1) ^ 1)
        mbarrier.expect(ready, desc.block_type.nbytes)
        tma.async_copy_global_to_shared(desc, [turn, 0], ready, room)


@gluon.jit
def taker(out, room, ready, empty, LATE: gl.constexpr, FENCED: gl.constexpr, LAYOUT: gl.constexpr):
    at = gl.arange(0, 8, gl.SliceLayout(1, LAYOUT))[:, None] * 16 + gl.arange(0, 16, gl.SliceLayout(0, LAYOUT))[None, :]
    for turn in range(2):
        mbarrier.wait(ready, turn & 1)
        if LATE:
            mbarrier.arrive(empty)
        gl.store(out + at, room.load(LAYOUT))
        if FENCED:
            fence_async_shared()
        if not LATE:
            mbarrier.arrive(empty)


@gluon.jit
def duet_kernel(desc, out, LATE: gl.constexpr, FENCED: gl.constexpr, LAYOUT: gl.constexpr):
    room = gl.allocate_shared_memory(desc.dtype, desc.block_type.shape, desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=1)
    mbarrier.init(empty, count=1)
    gl.warp_specialize(
        [(taker, (out, room, ready, empty, LATE, FENCED, LAYOUT)), (giver, (desc, room, ready, empty))], [1], [24]
    )


@pytest.mark.parametrize(
    ("late", "fenced", "message"),
    [
        (False, True, None),
        (True, True, "race: room is (overwritten while taker|read while one of the)"),
        (False, False, "fence_async_shared is missing between reading room and its use"),
    ],
)
def test_threads_that_read(late: bool, fenced: bool, message: str | None) -> None:
    """What a copy will overwrite: before they release it, and with a fence."""
    x, out = torch.arange(256.0).view(16, 16), torch.zeros(8, 16)
    layout = gl.NVMMASharedLayout.get_default_for([8, 16], gl.float32)
    registers = gl.BlockedLayout([1, 1], [2, 16], [4, 1], [1, 0])
    desc = TensorDescriptor.from_tensor(x, [8, 16], layout)
    for seed in range(6):
        with pytest.raises(emulator.KernelError, match=message) if message else contextlib.nullcontext():
            emulator.run(duet_kernel, (1,), desc, out, LATE=late, FENCED=fenced, LAYOUT=registers, seed=seed)
            assert torch.equal(out, x[1:9])


@pytest.mark.parametrize("name", ["box", "two copies", "duet", "product", "product of int8"])
def test_kernels_of_this_file_are_gluon(name: str) -> None:
    """The emulator takes more of Python than the compiler: what is right here compiles."""
    x, out, registers = torch.zeros(16, 16), torch.zeros(64, 64), gl.BlockedLayout([1, 1], [2, 16], [4, 1], [1, 0])
    desc = TensorDescriptor.from_tensor(x, [8, 16], gl.NVMMASharedLayout.get_default_for([8, 16], gl.float32))
    kernel, arguments, constants = {
        "box": (box_kernel, (desc, out, 0, 0, 8), {"LAYOUT": registers}),
        "two copies": (solo_kernel, (desc, out), {"RULE": "rows of two copies", "LAYOUT": registers}),
        "duet": (duet_kernel, (desc, out), {"LATE": False, "FENCED": True, "LAYOUT": registers}),
        "product": (product_kernel, (out,), {"TYPE": gl.bfloat16, "SUMS": gl.float32, "TURNED": False, "DEEP": 16}),
        "product of int8": (product_kernel, (out,), {"TYPE": gl.int8, "SUMS": gl.int32, "TURNED": True, "DEEP": 32}),
    }[name]
    if kernel is product_kernel:
        constants["ROWS"] = 64
    gpu_static.compile_launch(launch.Launch(kernel, arguments, constants, 4, 1), "sm_90")
