"""Stage 2, pv_threshold: leaving out P V where a group of rows scores far below its maximum, and nothing else.

The oracle decides by the same rule in fp64. A decision nearer to the threshold than MARGIN could fall either way in
fp32; the seeds are such that there is none, and the tests say so.
"""

from __future__ import annotations

import math
from typing import Any

import oracle
import pytest
import torch
from engines import Engine
from samples import block_mask, full_mask, qkv, same

MARGIN = 1e-5


def steep(q_len: int, kv_len: int, **options: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Blocks of keys that score up to 5 below one another: some products are worth skipping."""
    q, k, v = qkv(q_len=q_len, kv_len=kv_len, **options)
    block = torch.arange(kv_len) // 64
    level = torch.tensor([2.0, -3.0, 1.0, -4.0, 3.0, -2.0, 0.0])[block]
    q[..., 0] = 4.0
    k[..., 0] += level
    return q, k, v


@pytest.mark.parametrize("block_size", [(128, 64), (64, 64), (128, 128)])
@pytest.mark.parametrize("masks", [{}, {"causal": True}, {"causal": True, "window": 150}, {"window": 90}], ids=str)
@pytest.mark.parametrize("threshold", [0.7, 3.0])
def test_skips_by_the_book(
    engine: Engine, block_size: tuple[int, int], masks: dict[str, Any], threshold: float
) -> None:
    """The same products left out, so the same output and count and, the denominator being whole, the exact lse."""
    q, k, v = steep(300, 400, heads=4, kv_heads=2)
    mask = block_mask((300, 400), heads=4, block_size=block_size, density=0.8)
    blocks = oracle.blocks_of(mask)
    thresholds, grain = torch.full((4,), threshold), engine.grain(q, v, block_size)
    expected = oracle.attention_stage2(
        q, k, v, **grain, pv_threshold=thresholds, blocks=blocks, block_size=block_size, **masks
    )
    assert expected.margin > MARGIN
    result = engine.attend(q, k, v, mask, pv_threshold=threshold, **masks)
    unskipped = engine.attend(q, k, v, mask, **masks)
    truth = oracle.attention(q, k, v, blocks=blocks, block_size=block_size, **masks)
    plain = oracle.attention(q, k, v, blocks=blocks, block_size=block_size, **masks, dtype=torch.float32)
    # The rounding of the products that remain is no larger than that of all of them.
    room = truth.output - expected.output
    oracle.assert_within(result.output + room.float(), truth.output, plain.output)
    assert torch.equal(result.lse, unskipped.lse)
    torch.testing.assert_close(result.stats.pv_density_per_head, expected.pv_density.mean(0), rtol=0, atol=1e-9)
    assert unskipped.stats.pv_density == unskipped.stats.qk_density
    if threshold < 1 or grain["group"] == 16:  # a large tile is rarely that far below in all of its rows
        assert float(expected.pv_density.mean()) < unskipped.stats.pv_density
    assert result.stats.qk_density == unskipped.stats.qk_density
    assert result.stats.density == pytest.approx((result.stats.qk_density + result.stats.pv_density) / 2)


@pytest.mark.parametrize("block_size", [(128, 64), (64, 64), (128, 128)])
@pytest.mark.parametrize("masks", [{"causal": True, "window": 290}, {"window": 160}], ids=str)
def test_order_under_a_window(engine: Engine, block_size: tuple[int, int], masks: dict[str, Any]) -> None:
    """Wide enough for blocks that are seen whole: on a GPU those come before the edges, and maxima grow otherwise."""
    q, k, v = steep(300, 440, heads=4, kv_heads=2)
    mask = block_mask((300, 440), heads=4, block_size=block_size, density=0.8)
    given = {"pv_threshold": torch.full((4,), 0.7), "blocks": oracle.blocks_of(mask), "block_size": block_size, **masks}
    grain = engine.grain(q, v, block_size)
    expected = oracle.attention_stage2(q, k, v, **grain, **given)
    assert expected.margin > MARGIN
    result = engine.attend(q, k, v, mask, pv_threshold=0.7, **masks)
    torch.testing.assert_close(result.stats.pv_density_per_head, expected.pv_density.mean(0), rtol=0, atol=1e-9)
    assert oracle.relative_l1(result.output, expected.output) < 1e-5
    other = oracle.attention_stage2(q, k, v, **grain | {"whole_first": not grain.get("whole_first", False)}, **given)
    assert not torch.equal(other.pv_density, expected.pv_density)


def test_error_is_the_skipped_mass(engine: Engine) -> None:
    """With values of 1 the output is the mass that was kept: what is missing lay e^-threshold below the maximum."""
    q, k, _ = steep(200, 400)
    v = torch.ones(1, 2, 400, 8)
    for threshold in (1.0, 4.0, 9.0):
        output = engine.attend(q, k, v, pv_threshold=threshold).output
        assert (output <= 1 + 1e-5).all()
        assert (output >= 1 - 400 * math.exp(-threshold)).all()
    assert float(engine.attend(q, k, v, pv_threshold=1.0).output.min()) < 0.95


def test_off_and_out_of_reach_are_the_same(engine: Engine) -> None:
    q, k, v = steep(200, 300)
    for precision in ("full", "int8"):
        off = engine.attend(q, k, v, causal=True, precision=precision)
        assert same(engine.attend(q, k, v, causal=True, precision=precision, pv_threshold=1e4), off)
        assert off.stats.pv_density == 1.0


def test_threshold_per_head(engine: Engine) -> None:
    q, k, v = steep(200, 300, heads=4, kv_heads=2)
    both = [1e4, 1.0, 2.0, 1e4]
    for given in (both, torch.tensor(both), tuple(both)):
        result = engine.attend(q, k, v, causal=True, pv_threshold=given)
        for head, threshold in enumerate(both):
            alone = engine.attend(q, k, v, causal=True, pv_threshold=threshold)
            assert torch.equal(result.output[:, head], alone.output[:, head])
            assert result.stats.pv_density_per_head[head] == alone.stats.pv_density_per_head[head]
    per_head = result.stats.pv_density_per_head
    assert per_head[0] == per_head[3] == 1.0
    assert per_head[1] <= per_head[2] < 1.0
    assert per_head[1] < per_head[2] or engine.grain(q, v)["group"] > 16


def test_rows_without_a_key_so_far(engine: Engine) -> None:
    """No -inf minus -inf: rows that see nothing, at first or at all, beside rows that do, in one group."""
    q, k, v = steep(200, 300)
    mask = torch.rand(200, 300) > 0.3
    mask[::2, :128] = False
    mask[5] = False
    mask[64:96] = False
    mask[100:110, 64:] = False
    for precision in ("full", "int8"):
        result = engine.attend(q, k, v, full_mask((200, 300)), attn_mask=mask, precision=precision, pv_threshold=1.0)
        blind = ~mask.any(-1)
        assert result.output.isfinite().all()
        assert (result.output[:, :, blind] == 0).all()
        assert (result.lse[:, :, blind] == -math.inf).all()
        assert result.lse[:, :, ~blind].isfinite().all()
        assert result.stats.pv_density < result.stats.qk_density
    expected = oracle.attention_stage2(
        q,
        k,
        v,
        pv_threshold=torch.ones(2),
        blocks=torch.ones(1, 1, 2, 5, dtype=torch.bool),
        block_size=(128, 64),
        attn_mask=mask,
        **engine.grain(q, v, regular=False),
    )
    assert expected.margin > MARGIN
    result = engine.attend(q, k, v, attn_mask=mask, pv_threshold=1.0)
    # fp32 rounding of sums of a few hundred terms of size about 1, as everywhere; a wrong skip is 1e4 times that.
    torch.testing.assert_close(result.output.double(), expected.output, rtol=0, atol=1e-5)


def test_int8_skips_the_same(engine: Engine) -> None:
    """Int8 scores are near the exact ones, so nearly the same products fall, and the lse does not move at all."""
    q, k, v = steep(300, 400)
    mask = block_mask((300, 400), heads=2, density=0.8)
    plain = engine.attend(q, k, v, mask, causal=True, precision="int8")
    skipping = engine.attend(q, k, v, mask, causal=True, precision="int8", pv_threshold=1.0)
    full = engine.attend(q, k, v, mask, causal=True, pv_threshold=1.0)
    assert torch.equal(skipping.lse, plain.lse)
    assert skipping.stats.pv_density == pytest.approx(full.stats.pv_density, abs=0.02)
    assert skipping.stats.pv_density < 0.9 * plain.stats.pv_density


def test_nan_is_not_skipped(engine: Engine) -> None:
    """A comparison with NaN is false: a group that holds one computes its products."""
    q, k, v = steep(64, 300)
    v[:, :, :64] = 1.0
    k[:, :, 10] = math.nan
    output = engine.attend(q, k, v, pv_threshold=0.5).output
    assert output.isnan().all()


def test_skipped_values_do_not_leak(engine: Engine) -> None:
    """All rows skip the last block: whatever its values are."""
    q, k, v = qkv(q_len=100, kv_len=256)
    q[..., 0], k[..., 0] = 10.0, 0.0
    k[:, :, :64, 0] = 20.0
    clean = engine.attend(q, k, v, pv_threshold=5.0)
    assert clean.stats.pv_density == pytest.approx(1 / 4)
    for bad in (math.nan, math.inf):
        dirty = v.clone()
        dirty[:, :, 192:] = bad
        assert torch.equal(engine.attend(q, k, dirty, pv_threshold=5.0).output, clean.output)


@pytest.mark.parametrize("threshold", [0.0, -1.0, math.nan, [1.0, 0.0], torch.tensor([1.0, -1.0])], ids=str)
def test_threshold_must_be_positive(any_engine: Engine, threshold: Any) -> None:
    with pytest.raises(ValueError, match="pv_threshold"):
        any_engine.attend(*qkv(), pv_threshold=threshold)
