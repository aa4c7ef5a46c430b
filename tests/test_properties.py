"""What must hold for any attention, whatever computes it."""

from __future__ import annotations

import math
from typing import Any

import oracle
import pytest
import torch
from engines import Engine, engines
from hypothesis import given
from hypothesis import strategies as st
from samples import assert_reordered, block_mask, blocks_needed, full_mask, qkv, same

import tamis


@pytest.mark.parametrize("precision", ["full", "int8"])
@pytest.mark.parametrize("block_size", [(64, 64), (128, 128)])
def test_full_mask_is_dense(engine: Engine, precision: str, block_size: tuple[int, int]) -> None:
    q, k, v = qkv(heads=4, kv_heads=2, q_len=150, kv_len=290, dim=20)
    for causal in (False, True):
        dense = engine.attend(q, k, v, causal=causal, precision=precision)
        full = engine.attend(q, k, v, full_mask((150, 290), block_size), causal=causal, precision=precision)
        assert_reordered(full, dense, 290)
        assert full.stats.density == 1.0


def test_disjoint_masks_merge_to_their_union(engine: Engine) -> None:
    q, k, v = qkv(heads=2, q_len=300, kv_len=400, dim=20)
    owner = torch.randint(0, 4, (1, 2, *blocks_needed((300, 400), (128, 64))))
    owner[:, 0, 1] = 3  # rows that no part has
    options: dict[str, Any] = {"causal": True, "window": 350}
    parts = []
    for part in range(3):
        mask = tamis.BlockMask.from_dense(owner == part, block_size=(128, 64), seq_lens=(300, 400))
        parts.append(engine.attend(q, k, v, mask, **options))
    union = tamis.BlockMask.from_dense(owner < 3, block_size=(128, 64), seq_lens=(300, 400))
    merged = tamis.merge([part.output for part in parts], [part.lse for part in parts])
    assert_reordered(merged, engine.check(q, k, v, block_mask=union, **options), 400)
    assert (merged.output[:, 0, 128:256] == 0).all()
    assert (merged.lse[:, 0, 128:256] == -math.inf).all()


def test_split_keys_merge_to_the_whole(engine: Engine) -> None:
    """Two shards of the keys, one of which carries the sink; the first rows see nothing of the second shard."""
    q, k, v = qkv(heads=2, q_len=200, dim=20)
    sinks, position = torch.tensor([0.3, -2.0]), torch.arange(200)
    whole = engine.attend(q, k, v, causal=True, sink_logits=sinks)
    for carrier in (0, 1):
        parts = [
            engine.attend(
                q,
                k[:, :, part],
                v[:, :, part],
                causal=True,
                positions=(position, position[part]),
                sink_logits=sinks if index == carrier else None,
            )
            for index, part in enumerate((slice(0, 130), slice(130, 200)))
        ]
        merged = tamis.merge([part.output for part in parts], [part.lse for part in parts])
        assert_reordered(merged, whole, 200)


@pytest.mark.parametrize("change", [math.nan, 1e30, 0.0])
@pytest.mark.parametrize(("q_len", "kv_len"), [(200, 200), (70, 300)])
def test_the_future_changes_nothing(engine: Engine, change: float, q_len: int, kv_len: int) -> None:
    """Bit for bit in full precision, inside a kept block as much as outside."""
    q, k, v = qkv(heads=2, q_len=q_len, kv_len=kv_len, dim=20)
    for mask in (None, block_mask((q_len, kv_len), heads=2, density=0.7)):
        before = engine.attend(q, k, v, mask, causal=True)
        for row in (0, 1, q_len // 2 + 3, q_len - 2):
            future = kv_len - q_len + row + 1
            later = [x.clone() for x in (k, v)]
            for x in later:
                x[:, :, future:] = change
            after = engine.attend(q, *later, mask, causal=True)
            assert torch.equal(after.output[:, :, : row + 1], before.output[:, :, : row + 1])
            assert torch.equal(after.lse[:, :, : row + 1], before.lse[:, :, : row + 1])


def test_the_future_stays_within_the_error_in_int8(engine: Engine) -> None:
    """Shared scales and the key mean may move a past output, but not beyond twice the error of the formulas."""
    q, k, v = qkv(heads=2, q_len=300, dim=32)
    later = [x.clone() for x in (k, v)]
    for x in later:
        x[:, :, 150:] *= 3
    truth = oracle.attention(q, k, v, causal=True).output[:, :, :150]
    for inputs in ((q, k, v), (q, *later)):
        ours = engine.attend(*inputs, causal=True, precision="int8").output[:, :, :150]
        formulas = oracle.attention_int8(*inputs, causal=True).output[:, :, :150]
        oracle.assert_within(ours, truth, formulas)


def test_permuted_tokens_with_their_positions(engine: Engine) -> None:
    q, k, v = qkv(batch=2, heads=2, q_len=200, dim=20)
    order, position, segment = torch.randperm(200), torch.arange(200), torch.arange(200) // 90
    options: dict[str, Any] = {"causal": True, "window": 120}
    plain = engine.attend(q, k, v, segments=(segment, segment), **options)
    moved = engine.attend(
        *(x[:, :, order] for x in (q, k, v)),
        positions=(position[order], position[order]),
        segments=(segment[order], segment[order]),
        **options,
    )
    expected = tamis.AttentionOutput(plain.output[:, :, order], plain.lse[:, :, order])
    assert_reordered(moved, expected, 200)


@pytest.mark.parametrize("precision", ["full", "int8"])
def test_default_positions_and_segments(engine: Engine, precision: str) -> None:
    q, k, v = qkv(q_len=130, kv_len=200, dim=20)
    plain = engine.attend(q, k, v, causal=True, window=70, precision=precision)
    position = (torch.arange(130) + 70, torch.arange(200))
    segment = (torch.zeros(130, dtype=torch.int32), torch.zeros(200, dtype=torch.int32))
    explicit = engine.attend(q, k, v, causal=True, window=70, positions=position, segments=segment, precision=precision)
    assert_reordered(explicit, plain, 200)


@pytest.mark.parametrize("precision", ["full", "int8"])
def test_values_scale_linearly(engine: Engine, precision: str) -> None:
    """By a power of two nothing rounds differently, so the bits are the same."""
    q, k, v = qkv(q_len=130, dim=20)
    plain = engine.attend(q, k, v, causal=True, precision=precision)
    for factor in (4.0, -0.5, 2.0**40):
        scaled = engine.attend(q, k, v * factor, causal=True, precision=precision)
        assert torch.equal(scaled.output, plain.output * factor)
        assert torch.equal(scaled.lse, plain.lse)


@pytest.mark.parametrize("precision", ["full", "int8"])
def test_shifted_keys_change_only_the_lse(engine: Engine, precision: str) -> None:
    """q.(k + c) = q.k + q.c: the softmax stays, the lse moves by scale * q.c."""
    q, k, v = qkv(heads=1, q_len=130, dim=20)
    shift = torch.randn(20) * 3
    plain = engine.attend(q, k, v, precision=precision)
    moved = engine.attend(q, k + shift, v, precision=precision)
    run = oracle.attention if precision == "full" else oracle.attention_int8
    dtype: dict[str, Any] = {"dtype": torch.float32} if precision == "full" else {}
    truth = oracle.attention(q, k, v)
    # Rounding k + c to fp32 is part of plain torch's error on the shifted keys as well.
    oracle.assert_within(moved.output, truth.output, run(q, k + shift, v, **dtype).output)
    expected = truth.lse + (q.double() @ shift.double()) * 20**-0.5
    oracle.assert_within(moved.lse, expected, run(q, k + shift, v, **dtype).lse, what="lse")
    if precision == "int8":
        assert oracle.relative_l1(moved.output, plain.output) < 1e-3  # smoothing takes the shift out before rounding


@pytest.mark.parametrize("precision", ["full", "int8"])
def test_heads_and_batches_are_independent(engine: Engine, precision: str) -> None:
    q, k, v = qkv(batch=2, heads=4, kv_heads=2, q_len=130, kv_len=200, dim=20)
    mask = block_mask((130, 200), batch=2, heads=4)
    whole = engine.attend(q, k, v, mask, causal=True, precision=precision)
    dense = oracle.blocks_of(mask)
    for b in range(2):
        for h in range(0, 4, 2):
            pick = (slice(b, b + 1), slice(h, h + 2))
            alone = engine.attend(
                q[pick],
                k[b : b + 1, h // 2 : h // 2 + 1],
                v[b : b + 1, h // 2 : h // 2 + 1],
                tamis.BlockMask.from_dense(dense[pick], block_size=(128, 64), seq_lens=(130, 200)),
                causal=True,
                precision=precision,
            )
            assert_reordered(alone, tamis.AttentionOutput(whole.output[pick], whole.lse[pick]), 200)


@pytest.mark.parametrize("precision", ["full", "int8"])
def test_chunked_prefill_equals_one_pass(engine: Engine, precision: str) -> None:
    """Bottom-right causality: the last rows of a longer pass are the pass of the last rows."""
    q, k, v = qkv(q_len=200, dim=20)
    whole = engine.attend(q, k, v, causal=True, precision=precision)
    for start in (0, 70, 199):
        chunk = engine.attend(q[:, :, start:], k, v, causal=True, precision=precision)
        same_rows = tamis.AttentionOutput(whole.output[:, :, start:], whole.lse[:, :, start:])
        if chunk.stats.pv_dtype == whole.stats.pv_dtype:
            assert_reordered(chunk, same_rows, 200)
        else:  # a single row is quantised in another way; either is as close to the truth as int8 is
            assert precision == "int8"
            assert oracle.relative_l1(chunk.output, same_rows.output) <= 2 * 0.0152
            assert start == 199


@pytest.mark.parametrize("precision", ["full", "int8"])
def test_same_inputs_same_bits(engine: Engine, precision: str) -> None:
    q, k, v = qkv(heads=4, kv_heads=2, q_len=300, dim=20)
    mask = block_mask((300, 300), heads=4)
    first = engine.attend(q, k, v, mask, causal=True, precision=precision, pv_threshold=3.0)
    for _ in range(3):
        again = engine.attend(q, k, v, mask, causal=True, precision=precision, pv_threshold=3.0)
        assert same(again, first)
        assert torch.equal(again.stats.counts, first.stats.counts)


@given(data=st.data())
@pytest.mark.parametrize("target", engines(), ids=str)
def test_any_shape(target: Engine, data: st.DataObject) -> None:
    """Random shapes, dtypes, masks and block sizes against the oracle."""
    draw = data.draw
    groups, kv_heads = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    q_len, kv_len = draw(st.integers(1, 150)), draw(st.integers(1, 270))
    torch.manual_seed(draw(st.integers(0, 99)))
    q, k, v = qkv(
        batch=draw(st.integers(1, 2)),
        heads=groups * kv_heads,
        kv_heads=kv_heads,
        q_len=q_len,
        kv_len=kv_len,
        dim=draw(st.integers(1, 70)),
        value_dim=draw(st.integers(1, 70)),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
    )
    options: dict[str, Any] = {"causal": draw(st.booleans()), "window": draw(st.none() | st.integers(1, 100))}
    if draw(st.booleans()):
        size = draw(st.sampled_from([(64, 64), (64, 128), (128, 64), (128, 128)]))
        options["block_mask"] = block_mask((q_len, kv_len), heads=groups * kv_heads, block_size=size)
    if draw(st.booleans()):
        options["segments"] = tuple(torch.randint(-1, 3, (n,)) for n in (q_len, kv_len))
    target.check(q, k, v, **options)


@given(data=st.data())
@pytest.mark.parametrize("target", engines(), ids=str)
def test_any_shape_int8(target: Engine, data: st.DataObject) -> None:
    draw = data.draw
    heads, kv_heads = draw(st.sampled_from([(1, 1), (4, 2), (3, 1)]))
    q_len, kv_len = draw(st.integers(1, 150)), draw(st.integers(1, 270))
    torch.manual_seed(draw(st.integers(0, 99)))
    q, k, v = qkv(
        batch=draw(st.integers(1, 2)),
        heads=heads,
        kv_heads=kv_heads,
        q_len=q_len,
        kv_len=kv_len,
        dim=draw(st.integers(1, 70)),
        value_dim=draw(st.integers(1, 70)),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
    )
    options: dict[str, Any] = {"causal": draw(st.booleans()), "window": draw(st.none() | st.integers(1, 100))}
    if draw(st.booleans()):
        size = draw(st.sampled_from([(64, 64), (64, 128), (128, 64), (128, 128)]))
        options["block_mask"] = block_mask((q_len, kv_len), heads=heads, block_size=size)
    target.check_int8(q, k, v, **options)
