"""Threads: their number does not change the result, and several may call at once."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import oracle
import pytest
import torch
from engines import Engine
from samples import assert_reordered, block_mask, qkv, same

import tamis
from tamis.backends.cpu import library


@pytest.fixture(autouse=True)
def restore_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    monkeypatch.setattr(library, "_sleeps", lambda: False)  # or these calls would be too small for a second thread
    yield
    torch.set_num_threads(before)


def run_with(threads: int, engine: Engine, *inputs: Any, **options: Any) -> Any:
    torch.set_num_threads(threads)
    return engine.attend(*inputs, **options)


@pytest.mark.parametrize("precision", ["full", "int8"])
def test_number_of_threads(engine: Engine, precision: str) -> None:
    q, k, v = qkv(batch=2, heads=4, kv_heads=2, q_len=400, dim=24)
    mask = block_mask((400, 400), batch=2, heads=4)
    options: dict[str, Any] = {"causal": True, "precision": precision, "pv_threshold": 3.0}
    one = run_with(1, engine, q, k, v, mask, **options)
    for threads in (2, 3, 7):
        first = run_with(threads, engine, q, k, v, mask, **options)
        assert_reordered(first, one, 400)
        assert torch.equal(first.stats.counts, one.stats.counts)
        for _ in range(5):
            assert same(run_with(threads, engine, q, k, v, mask, **options), first)


@pytest.mark.parametrize(
    ("asleep", "precision", "alone", "together"),
    [(False, "int8", 64, 128), (False, "full", 64, 128), (True, "int8", 192, 256), (True, "full", 128, 192)],
)
def test_no_thread_is_started_for_little(
    monkeypatch: pytest.MonkeyPatch, asleep: bool, precision: str, alone: int, together: int
) -> None:
    """Two heads of 64 channels: a second thread from the length on where it is worth starting, or waking."""
    torch.set_num_threads(2)
    monkeypatch.setattr(library, "_sleeps", lambda: asleep)
    asked, started = library.threads, []
    monkeypatch.setattr(library, "threads", lambda *a, **k: started.append(asked(*a, **k)) or started[-1])
    for tokens, expected in ((alone, 1), (together, 2)):
        started.clear()
        with library.force_target("baseline"):
            tamis.attend(*qkv(heads=2, q_len=tokens, dim=64), precision=precision, backend="cpu")
        assert set(started) == {expected}  # asked twice where the form of the call came before


@pytest.mark.parametrize("heavy", [slice(0, 1), slice(2, 4), slice(-1, None)])
def test_rows_of_very_different_work(engine: Engine, heavy: slice) -> None:
    """Threads take large rows first: every row is still computed once, whoever takes it and when."""
    q, k, v = qkv(batch=2, heads=3, q_len=700, kv_len=900, dim=24)
    kept = torch.zeros(2, 3, 6, 15, dtype=torch.bool)
    kept[..., 3], kept[:, 1, heavy], kept[1, 2, 4] = True, True, False
    mask = tamis.BlockMask.from_dense(kept, (128, 64), (700, 900))
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        engine.check(q, k, v, block_mask=mask)
        counts = engine.attend(q, k, v, mask, precision="int8").stats.counts
        assert torch.equal(counts[..., 1], kept.double().sum(-1))


def test_more_threads_than_work(engine: Engine) -> None:
    q, k, v = qkv(heads=1, q_len=3, kv_len=5)
    one = run_with(1, engine, q, k, v)
    assert_reordered(run_with(16, engine, q, k, v), one, 5)
    q, k, v = qkv(batch=0, q_len=3)
    assert run_with(4, engine, q, k, v, precision="int8").output.numel() == 0


def test_prediction(engine: Engine) -> None:
    # Long enough that the native backend does share the work: it uses fewer threads for little of it.
    q, k, _ = qkv(heads=4, kv_heads=2, q_len=6000, dim=24)
    predictor = tamis.Sparge(cdf=0.7, topk=0.1, similarity=0.05)
    torch.set_num_threads(1)
    one = oracle.blocks_of(engine.predict(predictor, q, k, causal=True))
    for threads in (2, 5):
        torch.set_num_threads(threads)
        assert torch.equal(oracle.blocks_of(engine.predict(predictor, q, k, causal=True)), one)


def test_packing(engine: Engine) -> None:
    _, k, v = qkv(heads=4, kv_heads=2, kv_len=6000, dim=24)
    packed = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        with engine.selected():
            packed.append(tamis.pack_kv(k, v).tensors)
    for other in packed[1:]:
        assert all(torch.equal(x, y) for x, y in zip(packed[0], other, strict=True))


def test_concurrent_calls(any_engine: Engine) -> None:
    """Eight calls from four Python threads, of different shapes: each gets its own answer."""
    calls = []
    for n in (65, 130, 200, 300) * 2:
        q, k, v = qkv(heads=2, q_len=n, dim=24)
        calls.append((q, k, v, block_mask((n, n), heads=2)))

    def run(call: tuple[Any, ...]) -> Any:
        return [tamis.attend(*call, causal=True, precision=p, backend=any_engine.backend) for p in ("full", "int8")]

    torch.set_num_threads(2)
    alone = [run(call) for call in calls]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for ours, theirs in zip(pool.map(run, calls), alone, strict=True):
                assert all(same(x, y) for x, y in zip(ours, theirs, strict=True))


def test_corrupt_mask_in_one_of_many_rows(engine: Engine) -> None:
    """A worker that finds a corrupt row reports it, whichever it is; afterwards all is well."""
    q, k, v = qkv(batch=2, heads=4, q_len=400, dim=24)
    mask = block_mask((400, 400), batch=2, heads=4, density=0.7)
    torch.set_num_threads(4)
    expected = engine.attend(q, k, v, mask)
    for place in ((0, 0, 0), (1, 2, 3), (1, 3, 0)):
        indices = mask.kv_indices.clone()
        indices[place][0] = 99
        broken = tamis.BlockMask(mask.kv_num_blocks.clamp(min=1), indices, mask.block_size, mask.seq_lens)
        with pytest.raises(ValueError, match=r"block_mask|kv_indices"):
            engine.attend(q, k, v, broken)
    assert same(engine.attend(q, k, v, mask), expected)
