"""What must not be looked at holds NaN, infinities or garbage, and nothing of it comes out."""

from __future__ import annotations

import math
from typing import Any

import oracle
import pytest
import torch
from engines import Engine
from samples import assert_reordered, block_mask, blocks_needed, full_mask, qkv, same

import tamis

BAD = [math.nan, math.inf, -math.inf]


def poisoned(x: torch.Tensor, tokens: torch.Tensor, bad: float) -> torch.Tensor:
    """A copy whose given tokens hold `bad`."""
    return x.masked_fill(tokens[:, None], bad)


@pytest.mark.parametrize("bad", BAD)
def test_skipped_blocks(engine: Engine, bad: float) -> None:
    """Key block 1 is kept by no row, block 3 by no row of the first query block."""
    q, k, v = qkv(q_len=200, kv_len=300, dim=20)
    dense = torch.ones(1, 1, *blocks_needed((200, 300), (128, 64)), dtype=torch.bool)
    dense[..., 1] = False
    dense[..., 0, 3] = False
    mask = tamis.BlockMask.from_dense(dense, block_size=(128, 64), seq_lens=(200, 300))
    clean = engine.attend(q, k, v, mask)
    block = torch.arange(300) // 64
    unseen = block == 1
    assert same(engine.attend(q, poisoned(k, unseen, bad), poisoned(v, unseen, bad), mask), clean)
    seen = engine.attend(q, poisoned(k, block == 3, bad), poisoned(v, block == 3, bad), mask)
    assert torch.equal(seen.output[:, :, :128], clean.output[:, :, :128])
    assert torch.equal(seen.lse[:, :, :128], clean.lse[:, :, :128])
    assert seen.output[:, :, 128:].isnan().all()


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("kind", ["segments", "bool mask", "additive mask", "window", "causal", "positions"])
def test_invisible_keys_in_kept_blocks(engine: Engine, kind: str, bad: float) -> None:
    q, k, v = qkv(q_len=60, kv_len=300, dim=20)
    hidden = torch.rand(300) < 0.5
    position = torch.arange(300)
    cases: dict[str, tuple[torch.Tensor, dict[str, Any]]] = {
        "segments": (hidden, {"segments": (torch.zeros(60, dtype=torch.int64), torch.where(hidden, -1, 0))}),
        "bool mask": (hidden, {"attn_mask": ~hidden[None]}),
        "additive mask": (hidden, {"attn_mask": torch.where(hidden, -math.inf, 0.5)[None]}),
        "window": (position < 215, {"window": 25}),
        "causal": (position > 270, {"causal": True, "positions": (torch.arange(60) + 211, position)}),
        "positions": (hidden, {"causal": True, "positions": (torch.arange(60), torch.where(hidden, 100, -1))}),
    }
    unseen, options = cases[kind]
    for mask in (None, full_mask((60, 300), (64, 128))):
        clean = engine.attend(q, k, v, mask, **options)
        assert clean.output.isfinite().all()
        assert same(engine.attend(q, poisoned(k, unseen, bad), poisoned(v, unseen, bad), mask, **options), clean)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bad_numbers_touch_only_rows_that_see_them(engine: Engine, bad: float, dtype: torch.dtype) -> None:
    q, k, v = qkv(q_len=200, dim=20, dtype=dtype)
    token = torch.arange(200)
    clean = engine.attend(q, k, v, causal=True)
    for bad_key, bad_value in ((True, False), (False, True)):
        key = poisoned(k, token == 77, bad) if bad_key else k
        value = poisoned(v, token == 77, bad) if bad_value else v
        result = engine.attend(q, key, value, causal=True)
        assert torch.equal(result.output[:, :, :77], clean.output[:, :, :77])
        assert torch.equal(result.lse[:, :, :77], clean.lse[:, :, :77])
        theirs = oracle.attention(q, key, value, causal=True)
        if bad_value or math.isnan(bad):  # an infinite key entry makes scores of either sign, and -inf is a fine score
            assert not result.output[:, :, 77:].isfinite().any()
        assert torch.equal(result.output[:, :, 77:].isnan(), theirs.output[:, :, 77:].isnan())
    result = engine.attend(poisoned(q, token == 77, bad), k, v, causal=True)
    assert result.output[:, :, 77].isnan().all()
    others = token != 77
    assert torch.equal(result.output[:, :, others], clean.output[:, :, others])
    assert torch.equal(result.lse[:, :, others], clean.lse[:, :, others])


def test_infinite_value_of_no_weight(engine: Engine) -> None:
    """0 * inf is NaN, as in torch: in the block of the row's largest score, and in one before and after it."""
    q, k, v = qkv(q_len=130, kv_len=200, dim=20)
    k[..., 0], q[..., 0] = -100.0, 50.0
    k[:, :, 100, 0] = 100.0
    for token in (3, 99, 101, 199):
        value = v.clone()
        value[:, :, token] = math.inf
        assert torch.nn.functional.scaled_dot_product_attention(q, k, value).isnan().all()
        assert engine.attend(q, k, value).output.isnan().all()


@pytest.mark.parametrize("bad", BAD)
def test_one_bad_channel_of_a_value(engine: Engine, bad: float) -> None:
    """Other channels, and other heads of the same batch, stay what they were."""
    q, k, v = qkv(batch=2, heads=2, q_len=130, dim=20)
    clean = engine.attend(q, k, v)
    value = v.clone()
    value[1, 0, 100, 7] = bad
    result = engine.attend(q, k, value)
    expected = clean.output.clone()
    expected[1, 0, :, 7] = bad
    assert torch.equal(result.output.nan_to_num(0.5), expected.nan_to_num(0.5))
    assert torch.equal(result.lse, clean.lse)


@pytest.mark.parametrize("precision", ["full", "int8"])
@pytest.mark.parametrize("bad", BAD)
def test_row_without_keys_ignores_its_query(engine: Engine, bad: float, precision: str) -> None:
    q, k, v = qkv(q_len=130, kv_len=70, dim=20)
    result = engine.attend(poisoned(q, torch.arange(130) < 60, bad), k, v, causal=True, precision=precision)
    assert (result.output[:, :, :60] == 0).all()
    assert (result.lse[:, :, :60] == -math.inf).all()
    assert result.output[:, :, 60:].isfinite().all()


@pytest.mark.parametrize("huge", [1e30, math.nan, math.inf])
def test_int8_skipped_blocks_and_padding(engine: Engine, huge: float) -> None:
    """What no row keeps, and padding, counts neither for a scale nor for the key mean: the bits stay."""
    q, k, v = qkv(heads=4, kv_heads=2, q_len=200, kv_len=300, dim=20)
    dense = torch.rand(1, 4, *blocks_needed((200, 300), (128, 64))) < 0.6
    dense[..., 1] = False
    dense[..., 2] = True
    mask = tamis.BlockMask.from_dense(dense, block_size=(128, 64), seq_lens=(200, 300))
    unseen = torch.arange(300) // 64 == 1
    clean = engine.attend(q, k, v, mask, precision="int8")
    assert clean.output.isfinite().all()
    assert same(engine.attend(q, poisoned(k, unseen, huge), poisoned(v, unseen, huge), mask, precision="int8"), clean)

    padding = torch.rand(300) < 0.4
    segments = (torch.zeros(200, dtype=torch.int64), torch.where(padding, -1, 0))
    for block in (None, mask):
        clean = engine.attend(q, k, v, block, precision="int8", segments=segments)
        assert clean.output.isfinite().all()
        bad = (poisoned(k, padding, huge), poisoned(v, padding, huge))
        assert same(engine.attend(q, *bad, block, precision="int8", segments=segments), clean)


@pytest.mark.parametrize("huge", [1e30, math.nan])
@pytest.mark.parametrize("kind", ["window", "causal", "segments", "bool mask", "positions"])
def test_int8_blocks_that_no_row_sees(engine: Engine, kind: str, huge: float) -> None:
    """Without a block mask as well: the key mean is that of visible keys, by block."""
    q, k, v = qkv(q_len=60, kv_len=320, dim=20)
    position, zeros = torch.arange(320), torch.zeros(60, dtype=torch.int64)
    early, late = position < 128, position >= 192
    cases: dict[str, tuple[torch.Tensor, dict[str, Any]]] = {
        "window": (early, {"window": 100}),
        "causal": (late, {"causal": True, "positions": (torch.arange(60) + 130, position)}),
        "segments": (early, {"segments": (zeros, torch.where(early, 1, 0))}),
        "bool mask": (late, {"attn_mask": ~late[None]}),
        "positions": (early, {"window": 50, "positions": (torch.arange(60) + 200, position)}),
    }
    unseen, options = cases[kind]
    clean = engine.attend(q, k, v, precision="int8", **options)
    assert clean.output.isfinite().all()
    dirty = (poisoned(k, unseen, huge), poisoned(v, unseen, huge))
    assert same(engine.attend(q, *dirty, precision="int8", **options), clean)


def test_int8_bad_numbers_do_not_cross_heads_or_blocks(engine: Engine) -> None:
    """Isolation inside a block is promised for full precision only; another block, head or channel is never touched."""
    q, k, v = qkv(heads=2, q_len=300, dim=20)
    dense = torch.ones(1, 1, *blocks_needed((300, 300), (64, 64)), dtype=torch.bool).tril()
    mask = tamis.BlockMask.from_dense(dense, block_size=(64, 64), seq_lens=(300, 300))
    clean = engine.attend(q, k, v, mask, causal=True, precision="int8")
    value = v.clone()
    value[0, 1, 150, 7] = math.nan
    result = engine.attend(q, k, value, mask, causal=True, precision="int8")
    untouched = torch.ones_like(clean.output, dtype=torch.bool)
    untouched[0, 1, 128:, 7] = False
    assert torch.equal(result.output[untouched], clean.output[untouched])
    assert result.output[0, 1, 192:, 7].isnan().all()


@pytest.mark.parametrize("precision", ["full", "int8"])
@pytest.mark.parametrize("garbage", [-1, 2**31 - 1, -(2**31), 0])
def test_tail_of_kv_indices(engine: Engine, precision: str, garbage: int) -> None:
    q, k, v = qkv(q_len=300, dim=20)
    mask = block_mask((300, 300), heads=2, density=0.5)
    width = blocks_needed((300, 300), (128, 64))[1]
    beyond = torch.arange(width) >= mask.kv_num_blocks[..., None]
    indices = torch.full((*mask.kv_num_blocks.shape, width), garbage, dtype=torch.int32)
    indices[..., : mask.kv_indices.shape[-1]] = mask.kv_indices
    dirty = tamis.BlockMask(mask.kv_num_blocks, indices.masked_fill(beyond, garbage), (128, 64), (300, 300))
    dirty.validate()
    expected = engine.attend(q, k, v, mask, precision=precision)
    assert same(engine.attend(q, k, v, dirty, precision=precision), expected)


@pytest.mark.parametrize("precision", ["full", "int8"])
def test_strided_lists(engine: Engine, precision: str) -> None:
    """The lists of a mask may be views, with garbage between their entries."""
    q, k, v = qkv(q_len=300, dim=20)
    mask = block_mask((300, 300), heads=2, density=0.5)
    counts, indices = (
        torch.stack([x, torch.full_like(x, 2**31 - 1)], -1)[..., 0] for x in (mask.kv_num_blocks, mask.kv_indices)
    )
    assert indices.stride(-1) == 2
    views = tamis.BlockMask(counts, indices, mask.block_size, mask.seq_lens)
    expected = engine.attend(q, k, v, mask, precision=precision)
    assert same(engine.attend(q, k, v, views, precision=precision), expected)


CORRUPT = {
    "index past the end": ([2], [[0, 5]]),
    "negative index": ([2], [[-1, 2]]),
    "descending": ([2], [[2, 1]]),
    "repeated": ([2], [[1, 1]]),
    "count beyond the width": ([3], [[0, 1]]),
    "huge count": ([2**31 - 1], [[0, 1]]),
    "negative count": ([-1], [[0, 1]]),
    "huge index": ([2], [[0, 2**31 - 1]]),
}


@pytest.mark.parametrize("precision", ["full", "int8"])
@pytest.mark.parametrize("kind", CORRUPT)
def test_corrupt_masks_raise(engine: Engine, kind: str, precision: str) -> None:
    """In the last of several rows, so that the check cannot look at the first row alone."""
    q, k, v = qkv(heads=2, q_len=120, kv_len=300, dim=20)
    count, index = CORRUPT[kind]
    counts = torch.tensor([[[2, 2], [2, *count]]], dtype=torch.int32)
    indices = torch.tensor([[[[0, 1], [2, 4]], [[1, 3], *index]]], dtype=torch.int32)
    mask = tamis.BlockMask(counts, indices, (64, 64), (120, 300))
    if engine.backend == "triton":
        # Reading the lists would synchronise the device: what comes out is undefined, but nothing outside is touched
        # (the interpreter watches), and the next call is fine.
        engine.attend(q, k, v, mask, precision=precision)
        assert engine.attend(q, k, v, precision=precision).output.isfinite().all()
    else:
        with pytest.raises(ValueError, match=r"block_mask|kv_indices|kv_num_blocks"):
            engine.attend(q, k, v, mask, precision=precision)
    with pytest.raises(ValueError, match=r"block_mask|kv_indices|kv_num_blocks"):
        mask.validate()


@pytest.mark.parametrize("precision", ["full", "int8"])
def test_memory_around_the_inputs(engine: Engine, precision: str) -> None:
    """Inputs are views into NaN: rows after the last, channels after the last, heads between."""
    q, k, v = qkv(batch=2, heads=2, q_len=70, kv_len=131, dim=19, value_dim=21)
    clean = engine.attend(q, k, v, causal=True, precision=precision)
    views = []
    for x in (q, k, v):
        room = torch.full((2, 5, x.shape[2] + 70, x.shape[3] + 45), math.nan)
        view = room[:, 1:5:2, 3 : 3 + x.shape[2], 2 : 2 + x.shape[3]]
        views.append(view.copy_(x))
    assert_reordered(engine.attend(*views, causal=True, precision=precision), clean, 131)


@pytest.mark.parametrize("precision", ["full", "int8"])
def test_a_mask_that_adds_no_number_shows_in_its_row_alone(engine: Engine, precision: str) -> None:
    """To one score of a row that has others, as in plain torch."""
    q, k, v = qkv(q_len=70, kv_len=130)
    mask = torch.zeros(70, 130)
    mask[3, 5] = math.nan
    mask[40, 129] = math.inf
    result = engine.attend(q, k, v, attn_mask=mask, precision=precision)
    broken = torch.zeros(70, dtype=torch.bool)
    broken[[3, 40]] = True
    assert result.output[:, :, broken].isnan().all()
    assert result.lse[:, :, broken].isnan().all()
    assert result.output[:, :, ~broken].isfinite().all()


def test_a_cap_does_not_hide_scores_that_are_no_numbers(engine: Engine) -> None:
    """In 8 bits 0 times a scale that overflowed: beside it stand infinite scores, which the cap makes finite."""
    q, k = torch.zeros(1, 1, 40, 16), torch.zeros(1, 1, 64, 16)
    q[..., 0] = k[..., 0, 0] = 1e23
    k[..., 1, 0] = -1e23
    result = engine.attend(q, k, torch.randn(1, 1, 64, 16), softcap=1.0, precision="int8")
    assert not result.output.isfinite().any()
    assert result.lse.isnan().all()
