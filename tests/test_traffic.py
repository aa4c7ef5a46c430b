"""Bytes before attention: the formulas of `tamis bench gpu` against every load and store, and work that is the same
whatever is chosen.
"""

from __future__ import annotations

import pytest
import torch
from count import Work, counted
from engines import Engine
from samples import qkv

from tamis.backends.triton import lists, prepare
from tamis.bench import gpu_traffic


def found(work: dict[str, Work]) -> dict[str, tuple[int, int]]:
    return {name: (one.read, one.written) for name, one in work.items()}


def told(moved: list[gpu_traffic.Moved]) -> dict[str, tuple[int, int]]:
    return {kernel: (read, written) for kernel, read, written in moved}


@pytest.mark.parametrize(
    ("dtype", "precision", "dims", "block_size", "cdf"),
    [
        (torch.bfloat16, "int8", (40, 24), (128, 64), False),
        (torch.float32, "full", (64, 144), (64, 128), True),
        (torch.float16, "fp8", (20, 64), (128, 128), True),
    ],
    ids=str,
)
def test_the_formulas_are_what_kernels_do(
    engine: Engine, dtype: torch.dtype, precision: str, dims: tuple[int, int], block_size: tuple[int, int], cdf: bool
) -> None:
    """Lengths that end inside a tile, a half of a block, and a chunk of tiles."""
    q, k, v = qkv(batch=2, heads=4, kv_heads=2, q_len=190, kv_len=450, dim=dims[0], value_dim=dims[1], dtype=dtype)
    some = torch.full((4,), 0.5)
    choice = (0.2, some if cdf else None, some, -torch.ones(4), True, False, None, *block_size)
    with counted() as work:
        num, *_ = engine.op("predict", q, k, None, None, *choice, None, None, None, None, False, precision)
    call = gpu_traffic.Prologue(
        *(2, 4, 2, 190, 450, *dims, dtype.itemsize),
        rounds=precision != "full",
        kept=int(num.sum()),
        cdf=cdf,
        block_size=block_size,
    )
    moved = gpu_traffic.prediction(call)
    assert found(work) == told(moved)
    assert gpu_traffic.least_prediction(call) < gpu_traffic.total(moved)
    with counted() as work:
        _, scale = prepare.columns(None, v, None, None)
        assert scale is not None
        prepare.fp8_values(v, scale, None, None)
    assert found(work) == told(gpu_traffic.values(call))
    assert gpu_traffic.least_values(call) < gpu_traffic.total(gpu_traffic.values(call))


def test_values_are_copied_where_they_are_not_finite(engine: Engine) -> None:
    """One tile of 64 keys of the two heads' eight; the rest is read, and a flag written for each."""
    value = qkv(batch=1, kv_heads=2, kv_len=250, value_dim=40, dtype=torch.float16)[2]
    value[0, 1, 70, 3] = torch.inf
    with counted() as work:
        copy, flags = prepare.sound_values(value)
    assert flags.tolist() == [[[0, 0, 0, 0], [0, 1, 0, 0]]]
    assert torch.equal(copy[0, 1, 64:128], value[0, 1, 64:128].nan_to_num(posinf=0))
    assert found(work) == {"sound_values_kernel": (2 * 250 * 40 * 2, 64 * 40 * 2 + 8 * 4)}


def chosen(engine: Engine, cdf: float, topk: float, visible: bool, scale: float) -> tuple[dict[str, Work], int]:
    """What a choice of blocks does, and how many blocks it keeps."""
    q, k, _ = qkv(heads=1, q_len=100, kv_len=300, dim=16)
    summaries = (*engine.op("summarize", q, 64, None, None), *engine.op("summarize", k, 64, None, None))
    choice = (scale, torch.full((1,), cdf), torch.full((1,), topk), -torch.ones(1), False, False, None)
    seen = torch.full((1, 1, 2, 5), visible)
    with counted() as work:
        num, _ = engine.op("select", *summaries, *choice, 100, 300, 64, 64, None, None, seen, None, False)
    return work, int(num.sum())


@pytest.mark.parametrize("chunk", [256, 4], ids=["whole rows", "rows in chunks"])
def test_a_choice_costs_the_same_whatever_it_is(engine: Engine, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """All kept, all dropped, one dominating block, blocks that tie: as many loads, stores and sums."""
    monkeypatch.setattr(lists, "chunk_of", lambda kv_blocks: chunk)
    every, kept = chosen(engine, cdf=1.0, topk=1.0, visible=True, scale=0.1)
    assert kept == 2 * 5
    sums = every["choose_kernel"].reductions
    assert sums > 2 * 2 * 32, "32 halvings for each of 2 rows, twice"
    for cdf, topk, visible, scale, expected in (
        (1.0, 1.0, False, 0.1, 0),
        (0.01, 0.01, True, 1e4, 2),
        (0.5, 0.4, True, 0.0, 2 * 3),
    ):
        other, kept = chosen(engine, cdf, topk, visible, scale)
        assert kept == expected
        for name, work in every.items():
            lists_less = 4 * (10 - kept) if name == "choose_kernel" else 0
            assert other[name] == Work(work.read, work.written - lists_less, work.loads, work.stores, work.reductions)


def test_long_rows_are_read_as_the_formula_says(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of four scores in the place of 2,048."""
    for module in (lists, gpu_traffic):
        monkeypatch.setattr(module, "chunk_of", lambda kv_blocks: 4)
    work, kept = chosen(engine, cdf=0.5, topk=0.4, visible=True, scale=0.1)
    call = gpu_traffic.Prologue(1, 1, 1, 100, 300, 16, 16, kept=kept, cdf=True, block_size=(64, 64))
    choose = next(kernel for kernel in gpu_traffic.prediction(call) if kernel.kernel == "choose_kernel")
    assert (work["choose_kernel"].read, work["choose_kernel"].written) == choose[1:]
