"""Calls of a form that came before skip the door: the same numbers, the same errors, and whoever listens hears them."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import tamis
from tamis import known
from tamis.backends import cpu, replay
from tamis.predictors import sparge

pytestmark = pytest.mark.skipif(cpu.missing() is not None, reason="needs the native library")


@pytest.fixture(autouse=True)
def _forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test starts knowing nothing."""
    monkeypatch.setattr(known.RECORDS, "_records", {})
    monkeypatch.setattr(sparge._RECORDS, "_records", {})


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def three(
    shape: tuple[int, ...] = (1, 4, 200, 32), kv: int | None = None, **more: Any
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, length, dim = shape
    shapes = (shape, *((batch, kv or heads, max(length, 200), dim),) * 2)
    q, k, v = (drawn(*s, seed=i, **more) for i, s in enumerate(shapes))
    return q, k, v


def closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on the door is shut: only what is known gets in."""

    def shut(*_: object, **__: object) -> None:
        raise AssertionError("the call went the whole way")

    for module in ("tamis.attend", "tamis.predictors.sparge"):
        monkeypatch.setattr(sys.modules[module], "make_call", shut)


def same(a: Any, b: Any) -> None:
    assert torch.equal(a.output, b.output)
    assert torch.equal(a.lse, b.lse)
    assert torch.equal(a.stats.counts, b.stats.counts)
    assert repr(a.stats) == repr(b.stats)
    assert (a.output.shape, a.output.stride(), a.output.dtype) == (b.output.shape, b.output.stride(), b.output.dtype)


def mask(flipped: bool = False) -> tamis.BlockMask:
    """Two masks of one form that keep different blocks."""
    keep = torch.tensor([[True, True, False, False], [True, False, True, False]])
    return tamis.BlockMask.from_dense(keep.flip(1) if flipped else keep, (128, 64), (200, 200))


CALLS: dict[str, Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]] = {
    "dense": lambda: (three(), {}),
    "int8": lambda: (three(), {"precision": "int8"}),
    "bf16": lambda: (three(dtype=torch.bfloat16), {"precision": "int8", "causal": True}),
    "options": lambda: (three(), {"causal": True, "window": 50, "scale": 0.3, "softcap": 20.0, "pv_threshold": 2.0}),
    "per-head": lambda: (three(), {"pv_threshold": (1.0, 2.0, 3.0, 4.0), "precision": "int8"}),
    "grouped heads": lambda: (three(kv=2), {"causal": True}),
    "a query each": lambda: (three((2, 4, 1, 32), kv=2), {"causal": True, "precision": "int8"}),
    "strides": lambda: (tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in three()), {"precision": "int8"}),
    "shared key": lambda: ((three((2, 4, 200, 32))[0], *(t[:1] for t in three()[1:])), {}),
    "mask": lambda: ((*three(), mask()), {"precision": "int8"}),
    "packed": lambda: ((three()[0], tamis.pack_kv(*three()[1:]), None), {"causal": True}),
    "packed, a query each": lambda: ((three((1, 4, 1, 32))[0], tamis.pack_kv(*three(kv=2)[1:]), None), {}),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_third_call_says_what_the_first_did(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, options = CALLS[name]()
    first, second = (tamis.attend(*arguments, **options) for _ in range(2))
    closed(monkeypatch)
    third = tamis.attend(*arguments, **options)
    same(first, second)
    same(first, third)


@pytest.mark.parametrize("name", ["int8", "a query each", "mask", "packed"])
def test_other_tensors_of_the_form_are_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not those that were recorded: against the whole way with the same numbers."""
    arguments, options = CALLS[name]()
    query, key, value, *masked = arguments
    if isinstance(key, tamis.PackedKV):
        other = (query.flip(-1), tamis.pack_kv(*(t.flip(1) for t in three()[1:])), None)
    else:
        other = (query.flip(-1), key.flip(1), value.flip(2), *(mask(flipped=True) for _ in masked))
    whole = tamis.attend(*other, **options)
    known.RECORDS._records.clear()
    for _ in range(2):
        tamis.attend(*arguments, **options)
    closed(monkeypatch)
    same(whole, tamis.attend(*other, **options))


def test_masks_of_any_width_are_one_form(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = three((2, 4, 200, 32))
    draw = torch.Generator().manual_seed(0)
    masks = []
    for width in (4, 1, 2, 3):
        keep = torch.rand(2, 1, 2, 4, generator=draw).argsort(-1) < width  # one table for all heads
        masks.append(tamis.BlockMask.from_dense(keep, (128, 64), (200, 200)))
    assert [m.kv_indices.shape[-1] for m in masks] == [4, 1, 2, 3]
    whole = [tamis.attend(q, k, v, m) for m in masks]
    closed(monkeypatch)
    for m, first in zip(masks, whole, strict=True):
        same(first, tamis.attend(q, k, v, m))


def test_lists_with_other_strides_are_another_form() -> None:
    q, k, v = three()
    rows = mask()
    columns = rows.kv_indices.transpose(2, 3).contiguous().transpose(2, 3)
    assert columns.stride(3) != 1
    turned = tamis.BlockMask(rows.kv_num_blocks, columns, (128, 64), (200, 200))
    first = tamis.attend(q, k, v, rows)
    for blocks in (rows, rows, turned, turned, turned):
        same(first, tamis.attend(q, k, v, blocks))


def blocks_alike(heads: int, seed: int) -> Tensor:
    """600 tokens whose blocks of 64 are alike inside, but for one: something is left out, and one is kept whole."""
    centres = 2 * drawn(1, heads, 10, 32, seed=seed + 20).repeat_interleave(64, 2)[:, :, :600]
    noise = drawn(1, heads, 600, 32, seed=seed) / 4
    noise[:, :, 192:256] *= 28
    return centres + noise


@pytest.mark.parametrize(
    ("predictor", "options"),
    [
        (None, {}),
        (tamis.Sparge(topk=0.3), {"is_causal": True}),
        (tamis.Sparge(cdf=(0.9, 0.8, 0.7, 0.6), keep={"keys": [(0, 70)]}), {"precision": "full"}),
        (tamis.Sparge(cdf=0.9), {"enable_gqa": True}),
    ],
    ids=["default", "causal", "per-head", "grouped"],
)
def test_predictions_too(predictor: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    heads = 2 if "enable_gqa" in options else 4
    draws = [
        (blocks_alike(4, i), blocks_alike(heads, i + 2) + 3 * drawn(1, 1, 1, 32, seed=i), drawn(1, heads, 600, 32))
        for i in range(2)
    ]

    def run(tensors: Any) -> tuple[Tensor, Any]:
        return tamis.sparse_attention(*tensors, predictor=predictor, return_stats=True, **options)  # type: ignore[return-value]

    first = [run(tensors) for tensors in draws]
    assert all(stats.density < 0.9 for _, stats in first)
    closed(monkeypatch)
    for tensors, (output, stats) in zip(draws, first, strict=True):
        again, its = run(tensors)
        assert torch.equal(output, again)
        assert torch.equal(stats.counts, its.counts)


WRONG: dict[str, dict[str, Any]] = {
    "causal": {"causal": 1},
    "window": {"window": True},
    "scale": {"scale": "1"},
    "precision": {"precision": "int9"},
    "block_mask": {"block_mask": 7},
    "softcap": {"softcap": -1.0},
}


@pytest.mark.parametrize("name", WRONG)
def test_what_the_door_refuses_is_refused_later_too(name: str) -> None:
    q, k, v = three()
    good = {"causal": True, "window": 1, "scale": 1.0, "pv_threshold": 1.0, "softcap": 1.0}
    for _ in range(3):
        tamis.attend(q, k, v, **good)  # type: ignore[arg-type]
    wrong = WRONG[name]
    with pytest.raises((TypeError, ValueError), match=name):
        tamis.attend(q, k, v, **{**good, **wrong})


def test_inputs_that_want_gradients_are_refused() -> None:
    q, k, v = three()
    for _ in range(3):
        tamis.attend(q, k, v)
    with pytest.raises(tamis.UnsupportedError, match="requires grad"):
        tamis.attend(q.clone().requires_grad_(), k, v)
    with torch.no_grad():
        same(tamis.attend(q.clone().requires_grad_(), k, v), tamis.attend(q, k, v))


def test_a_corrupt_mask_is_found() -> None:
    q, k, v = three()
    blocks = mask()
    for _ in range(3):
        tamis.attend(q, k, v, blocks)
    blocks.kv_indices.fill_(9)
    with pytest.raises(ValueError, match="corrupt"):
        tamis.attend(q, k, v, blocks)


class Heard(TorchDispatchMode):
    """Which operators ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_modes_hear_the_operator() -> None:
    q, k, v = three()
    for _ in range(3):
        tamis.attend(q, k, v)
    with Heard() as heard:
        tamis.attend(q, k, v)
    assert "tamis.attend.default" in heard.names


def test_profilers_see_the_operator() -> None:
    q, k, v = three()
    for _ in range(3):
        tamis.attend(q, k, v)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        tamis.attend(q, k, v)
    assert "tamis::attend" in {event.name for event in profile.events()}


def test_batched_tensors_of_vmap_go_the_whole_way() -> None:
    q, k, v = three()
    forms: list[object] = []

    def one(q: Tensor) -> Tensor:
        forms.append(known.form(q, k, v, None, None, ()))
        return q

    torch.func.vmap(one)(torch.stack([q, q]))
    assert forms == [None]


@pytest.mark.parametrize("warm", [0, 3])
def test_transformations_see_plain_tensors_go_the_whole_way(warm: int) -> None:
    """Inside of them memory is not where it seems: what a call makes is wrapped."""
    q, k, v = three()
    predictor = tamis.Sparge()

    def weighted(w: Tensor) -> Tensor:
        outputs = [tamis.attend(q, k, v).output.sum() for _ in range(3)]
        counts = [predictor(q, k).kv_num_blocks.sum() for _ in range(3)]
        return w * (sum(outputs) + sum(counts))  # type: ignore[no-any-return]

    for _ in range(warm):
        tamis.sparse_attention(q, k, v)
        tamis.attend(q, k, v)
        predictor(q, k)
    one = torch.ones(())
    slope = torch.func.grad(weighted)(one)
    assert torch.isfinite(slope)
    assert torch.equal(torch.func.functionalize(weighted)(one), slope)
    torch._enable_functionalization(reapply_views=False)  # type: ignore[attr-defined]
    try:
        assert known.form(q, k, v, None, None, ()) is None
    finally:
        torch._disable_functionalization()  # type: ignore[attr-defined]


def test_negated_views_are_not_taken_for_their_memory() -> None:
    q, k, v = three()
    for _ in range(3):
        tamis.attend(q, k, v)
    lazy = torch._neg_view(q)  # type: ignore[attr-defined]
    same(tamis.attend(lazy, k, v), tamis.attend(-q, k, v))


def test_subclasses_go_the_whole_way() -> None:
    q, k, v = three()
    for _ in range(3):
        tamis.attend(q, k, v)
    assert known.form(torch.nn.Parameter(q, requires_grad=False), k, v, None, None, ()) is None
    assert known.form(q, torch.nn.Parameter(k, requires_grad=False), v, None, None, ()) is None
    assert known.form(q.to("meta"), k, v, None, None, ()) is None
    assert known.form(q[0], k[0], v[0], None, None, ()) is None


def test_a_default_device_does_not_move_results() -> None:
    q, k, v = three()
    with torch.device("meta"):
        for _ in range(3):
            assert tamis.attend(q, k, v).output.device.type == "cpu"


def test_threads_and_targets_are_part_of_the_form() -> None:
    q, k, v = three()
    before, threads = known.form(q, k, v, None, None, ()), torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert known.form(q, k, v, None, None, ()) != before
    finally:
        torch.set_num_threads(threads)
    for _ in range(3):
        tamis.attend(q, k, v, precision="int8")
    with cpu.force_target(cpu.available_targets()[-1]):
        other = tamis.attend(q, k, v, precision="int8").stats
    assert other is not None
    assert other.target == cpu.available_targets()[-1]


def test_results_of_inference_mode_stay_there() -> None:
    q, k, v = three()
    for _ in range(3):
        with torch.inference_mode():
            assert tamis.attend(q, k, v).output.is_inference()
    assert not tamis.attend(q, k, v).output.is_inference()


def test_nothing_of_the_caller_is_kept_alive() -> None:
    q, k, v = three()
    blocks = mask()
    for _ in range(3):
        tamis.attend(q, k, v, blocks, pv_threshold=3.0)
        tamis.sparse_attention(q, k, v)
    refs = [weakref.ref(t) for t in (q, k, v, blocks.kv_indices)]
    del q, k, v, blocks
    gc.collect()
    assert [ref() for ref in refs] == [None] * 4


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "_LIMIT", 4)
    for length in range(64, 76):
        q = drawn(1, 1, length, 16)
        for _ in range(2):
            tamis.attend(q, q, q)
    assert 0 < len(known.RECORDS._records) <= 4


def test_forms_that_another_thread_forgets() -> None:
    """Between a look and the next."""
    memory: replay.Memory[str] = replay.Memory()

    class Forgetful(dict[Any, Any]):
        def __contains__(self, key: object) -> bool:
            found = super().__contains__(key)
            self.clear()
            return found

    memory._records = Forgetful()
    for _ in range(3):
        memory.offer((1,), "cpu", lambda: "record")
    assert memory.get((1,)) == "record"


def test_recording_allocates_no_second_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """There may be no room for it."""
    q, k, v = three((1, 1, 4000, 64))
    known.RECORDS.offer(known.form(q, k, v, None, None, (False, None, None, None, "full", None)), "cpu", lambda: None)
    made: list[int] = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **o: made.append(1) or empty(*a, **o))
    tamis.attend(q, k, v)
    assert len(known.RECORDS._records) == 1
    assert known.RECORDS.get(next(iter(known.RECORDS._records))) is not None
    assert len(made) == 4  # three results, and the counts of nothing in what is remembered of the stats


def test_no_large_table_is_kept() -> None:
    q = drawn(1, 1, 40000, 16)
    keeping = tamis.Sparge(topk=0.01, keep={"keys": [(0, 64)]})
    for _ in range(3):
        keeping(q, q)
    assert [sparge._RECORDS.get(form) for form in sparge._RECORDS._records] == [None]


def test_an_unknown_target_hides_no_other_error(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = three()
    monkeypatch.setenv("TAMIS_CPU_TARGET", "abacus")
    with pytest.raises(tamis.UnsupportedError, match="fp8"):
        tamis.attend(q, k, v, precision="fp8", backend="cpu")
    with pytest.raises(ValueError, match="abacus"):
        tamis.attend(q, k, v)


def test_calls_of_many_threads_at_once() -> None:
    """Each has its own tensors of one form, and gets its own answer."""
    draws = [tuple(drawn(1, 2, 256, 32, seed=3 * i + j) for j in range(3)) for i in range(8)]
    want = [F.scaled_dot_product_attention(*tensors) for tensors in draws]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(30):
            if not torch.allclose(tamis.attend(*draws[i]).output, want[i], atol=1e-4):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []
