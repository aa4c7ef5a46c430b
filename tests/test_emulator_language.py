"""The emulator's arithmetic, memory and copies, one rule of Triton or of the hardware at a time."""

from __future__ import annotations

import contextlib
from typing import Any

import emulator
import oracle
import pytest
import torch
from samples import block_mask, qkv

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

import tamis
from tamis.backends.triton import chips, launch
from tamis.bench import gpu_static


@triton.jit
def apply_kernel(x, y, out, RULE: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    a, b = tl.load(x + at), tl.load(y + at)
    if RULE == "quotient":
        made = a // b
    elif RULE == "remainder":
        made = a % b
    elif RULE == "true quotient":
        made = a / b
    elif RULE == "sum":
        made = a + b
    elif RULE == "twice":
        made = a * 2
    elif RULE == "half":
        made = a * 0.5
    elif RULE == "maximum":
        made = tl.maximum(a, b)
    elif RULE == "largest":
        made = tl.max(a, 0) + b * 0
    elif RULE == "total":
        made = tl.sum(a, 0) + b * 0
    elif RULE == "chosen":
        made = tl.where(a > 0, b, 1.5)
    elif RULE == "bits":
        made = a.to(tl.int32, bitcast=True)
    else:
        made = a.to(RULE)
    tl.store(out + at, made.to(out.dtype.element_ty))
    tl.static_assert(made.dtype == out.dtype.element_ty, "type of the result")


NAN = float("nan")
RULES: list[tuple[Any, torch.dtype, list[float], torch.dtype, list[float], torch.dtype, list[float]]] = [
    ("quotient", torch.int32, [-7, 7], torch.int32, [2, 2], torch.int32, [-3, 3]),
    ("remainder", torch.int32, [-7, 7], torch.int32, [2, 2], torch.int32, [-1, 1]),
    ("true quotient", torch.int32, [1, 3], torch.int32, [2, 4], torch.float32, [0.5, 0.75]),
    ("true quotient", torch.float16, [1, 3], torch.float16, [3, 4], torch.float32, [1 / 3, 0.75]),
    ("sum", torch.int32, [2**31 - 1, 1], torch.int32, [1, 1], torch.int32, [-(2**31), 2]),
    ("sum", torch.int8, [100, 1], torch.int32, [100, 1], torch.int32, [200, 2]),
    ("sum", torch.int64, [1, 2], torch.int32, [1, 1], torch.int64, [2, 3]),
    ("sum", torch.bfloat16, [1, 2], torch.float16, [1, 1], torch.float16, [2, 3]),
    ("sum", torch.bfloat16, [1, 256], torch.bfloat16, [1, 1], torch.bfloat16, [2, 256]),
    ("sum", torch.int32, [1, 2], torch.float16, [0.5, 0.5], torch.float16, [1.5, 2.5]),
    ("twice", torch.int8, [100, 1], torch.int8, [0, 0], torch.int8, [-56, 2]),
    ("half", torch.int32, [1, 2], torch.int32, [0, 0], torch.float32, [0.5, 1]),
    ("half", torch.bfloat16, [1, 2], torch.int32, [0, 0], torch.bfloat16, [0.5, 1]),
    ("maximum", torch.float32, [NAN, 1], torch.float32, [1, NAN], torch.float32, [1, 1]),
    ("largest", torch.float32, [NAN, 1], torch.float32, [0, 0], torch.float32, [1, 1]),
    ("largest", torch.float32, [NAN, NAN], torch.float32, [0, 0], torch.float32, [NAN, NAN]),
    ("largest", torch.bfloat16, [1, 2], torch.bfloat16, [0, 0], torch.float32, [2, 2]),
    ("total", torch.int8, [100, 100], torch.int8, [0, 0], torch.int32, [200, 200]),
    ("chosen", torch.int32, [1, -1], torch.float32, [3, 3], torch.float32, [3, 1.5]),
    ("bits", torch.float32, [1, -1], torch.int32, [0, 0], torch.int32, [0x3F800000, 0x3F800000 - 2**31]),
    (tl.float8e4nv, torch.float32, [17, 18.5], torch.int32, [0, 0], torch.float8_e4m3fn, [16, 18]),
    (tl.int8, torch.float32, [-1.9, 1.9], torch.int32, [0, 0], torch.int8, [-1, 1]),
]


@pytest.mark.parametrize(("rule", "x_type", "x", "y_type", "y", "out_type", "out"), RULES)
def test_numbers(
    rule: Any,
    x_type: torch.dtype,
    x: list[float],
    y_type: torch.dtype,
    y: list[float],
    out_type: torch.dtype,
    out: list[float],
) -> None:
    """Values and, by an assertion in the kernel, types."""
    made = torch.zeros(2).to(out_type)
    emulator.run(apply_kernel, (1,), torch.tensor(x).to(x_type), torch.tensor(y).to(y_type), made, RULE=rule, SIZE=2)
    torch.testing.assert_close(made.double(), torch.tensor(out).to(out_type).double(), rtol=0, atol=0, equal_nan=True)


@triton.jit
def copy_kernel(x, out, first, number, out_first, MASKED: tl.constexpr, FILLED: tl.constexpr):
    at = tl.arange(0, 8)
    mask = at < number if MASKED else None
    if FILLED:
        values = tl.load(x + first + at, mask=mask, other=7.0)
    else:
        values = tl.load(x + first + at, mask=mask)
    tl.store(out + out_first + at, values)


def copied(x: torch.Tensor, first: int, number: int, masked: bool, filled: bool, out_first: int = 0) -> torch.Tensor:
    out = torch.zeros(8)
    emulator.run(copy_kernel, (1,), x, out, first, number, out_first, MASKED=masked, FILLED=filled)
    return out


def test_memory() -> None:
    """Inside of the tensor that a pointer came from, and of no other part of its storage."""
    storage = torch.arange(32.0)
    x = storage[8:24]
    assert copied(x, 8, 8, False, False).tolist() == storage[16:24].tolist()
    assert copied(x, 12, 4, True, True).tolist() == [20, 21, 22, 23, 7, 7, 7, 7]
    assert copied(x, 12, 4, True, False)[4:].isnan().all()
    for first in (-1, 9):
        with pytest.raises(emulator.KernelError, match=r"reads element .* of x, which has 16"):
            copied(x, first, 8, False, False)
    with pytest.raises(emulator.KernelError, match="reads element 16 of x"):
        copied(x, 12, 5, True, True)
    with pytest.raises(emulator.KernelError, match="writes element 8 of out, which has 8"):
        copied(x, 0, 8, False, False, out_first=1)


@triton.jit
def claim_kernel(out, SAME: tl.constexpr):
    tl.store(out, tl.program_id(0) if SAME == 0 else SAME)


def test_two_programs_write_one_place() -> None:
    out = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(emulator.KernelError, match="two partitions or programs write the same elements of out"):
        emulator.run(claim_kernel, (3,), out, SAME=0)
    emulator.run(claim_kernel, (3,), out, SAME=5)
    assert out.item() == 5


@triton.jit
def order_kernel(flag, out):
    program = tl.program_id(0)
    if program == 0:
        tl.store(flag, 1)
    tl.store(out + program, tl.load(flag))


def test_programs_run_in_any_order() -> None:
    def seen(seed: int) -> int:
        out = torch.zeros(6, dtype=torch.int32)
        emulator.run(order_kernel, (6,), torch.zeros(1, dtype=torch.int32), out, seed=seed)
        return int(out.sum())

    assert len({seen(seed) for seed in range(8)}) > 3


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


@gluon.jit
def unknown_kernel(x):
    gl.atomic_add(x, 1)


def test_what_it_cannot_do() -> None:
    with pytest.raises(NotImplementedError, match="atomic_add"):
        emulator.run(unknown_kernel, (1,), torch.zeros(1))
    with pytest.raises(emulator.KernelError, match="one axis"):
        emulator.run(unknown_kernel, (1, 1), torch.zeros(1))


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


@pytest.mark.parametrize("precision", ["full", "int8", "fp8"])
def test_whole_calls_of_triton(precision: str) -> None:
    """The kernels of plain Triton too: what reads keys and values, the lists, and attention."""
    q, k, v = qkv(heads=4, kv_heads=2, q_len=150, kv_len=200, dim=40, value_dim=24, dtype=torch.bfloat16)
    mask = block_mask((150, 200), heads=4, density=0.7)
    with chips.assume("sm_90"), emulator.installed() as ran:
        result = tamis.attend(q, k + 2, v, mask, causal=True, window=90, precision=precision, backend="triton")
    assert "attend_kernel" in ran
    options = {"blocks": oracle.blocks_of(mask), "causal": True, "window": 90}
    truth = oracle.attention(q, k + 2, v, **options)
    form = getattr(torch, result.stats.pv_dtype)
    plain = oracle.attention(q, k + 2, v, **options, dtype=torch.float32 if precision != "full" else q.dtype)
    formulas = oracle.attention_gpu(q, k + 2, v, weights=form, values=form, rounds=precision != "full", **options)
    oracle.assert_within(result.output, truth.output, formulas.output, plain.output)
    oracle.assert_within(result.lse, truth.lse, formulas.lse, plain.lse, what="lse")
