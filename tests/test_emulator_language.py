"""The emulator's arithmetic and memory, one rule of Triton at a time, and whole calls of Triton's kernels."""

from __future__ import annotations

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

import tamis
from tamis.backends.triton import chips


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
def unknown_kernel(x):
    gl.atomic_add(x, 1)


def test_what_it_cannot_do() -> None:
    with pytest.raises(NotImplementedError, match="atomic_add"):
        emulator.run(unknown_kernel, (1,), torch.zeros(1))
    with pytest.raises(emulator.KernelError, match="one axis"):
        emulator.run(unknown_kernel, (1, 1), torch.zeros(1))


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
