"""The oracle against torch's own attention, and its meaning of "not visible"."""

from __future__ import annotations

import math
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

# Two fp64 summation orders of at most a few hundred terms of size about 1.
ROUNDING: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-13}


def tensors(
    heads: int = 4, kv_heads: int = 2, q_len: int = 37, kv_len: int = 70, dim: int = 24, value_dim: int = 10
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(2, heads, q_len, dim, dtype=torch.float64),
        torch.randn(2, kv_heads, kv_len, dim, dtype=torch.float64),
        torch.randn(2, kv_heads, kv_len, value_dim, dtype=torch.float64),
    )


def test_dense_is_torch() -> None:
    q, k, v = tensors()
    torch.testing.assert_close(oracle.attention(q, k, v).output, sdpa(q, k, v, enable_gqa=True), **ROUNDING)
    scaled = oracle.attention(q, k, v, scale=0.7).output
    torch.testing.assert_close(scaled, sdpa(q, k, v, scale=0.7, enable_gqa=True), **ROUNDING)


def test_masks_are_torch() -> None:
    q, k, v = tensors()
    for mask in (torch.rand(1, 70) > 0.3, torch.rand(2, 1, 37, 70) > 0.3, torch.randn(4, 1, 70, dtype=torch.float64)):
        expected = sdpa(q, k, v, attn_mask=mask, enable_gqa=True)
        torch.testing.assert_close(oracle.attention(q, k, v, attn_mask=mask).output, expected, **ROUNDING)


def test_causal_is_bottom_right() -> None:
    q, k, v = tensors()
    mask = torch.ones(37, 70, dtype=torch.bool).tril(70 - 37)
    expected = sdpa(q, k, v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(oracle.attention(q, k, v, causal=True).output, expected, **ROUNDING)


def test_square_causal_is_torch() -> None:
    q, k, v = tensors(q_len=70)
    expected = sdpa(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(oracle.attention(q, k, v, causal=True).output, expected, **ROUNDING)


def test_window_positions_and_segments_token_by_token() -> None:
    q_pos, kv_pos = torch.randperm(20), torch.randperm(31)
    q_seg, kv_seg = torch.randint(-1, 3, (2, 20)), torch.randint(-1, 3, (2, 31))
    seen = oracle.visible(20, 31, causal=True, window=9, positions=(q_pos, kv_pos), segments=(q_seg, kv_seg))
    for b in range(2):
        for i in range(20):
            for j in range(31):
                near = 0 <= q_pos[i] - kv_pos[j] < 9
                together = q_seg[b, i] == kv_seg[b, j] and q_seg[b, i] >= 0
                assert bool(seen[b, 0, i, j]) == bool(near and together)


def test_window_is_two_sided_without_causal() -> None:
    seen = oracle.visible(3, 5, window=2)[0, 0]  # row i stands at position i + 2
    assert seen.int().tolist() == [[0, 1, 1, 1, 0], [0, 0, 1, 1, 1], [0, 0, 0, 1, 1]]


def test_lse_softcap_and_sink() -> None:
    q, k, v = tensors(kv_heads=4)
    scores = 3.0 * torch.tanh(q @ k.transpose(-1, -2) * 0.3 / 3.0)
    sink = torch.randn(4, dtype=torch.float64)
    total = scores.exp().sum(-1) + sink.exp()[:, None]
    result = oracle.attention(q, k, v, scale=0.3, softcap=3.0, sink_logits=sink)
    torch.testing.assert_close(result.lse, total.log(), **ROUNDING)
    torch.testing.assert_close(result.output, scores.exp() @ v / total[..., None], **ROUNDING)


def test_block_mask_per_token() -> None:
    blocks = torch.tensor([[True, False, True], [False, True, False]])
    mask = oracle.token_mask(blocks, (128, 64), 130, 150)
    assert mask.shape == (130, 150)
    for i, j in ((0, 0), (127, 63), (127, 64), (128, 64), (129, 149), (5, 128)):
        assert bool(mask[i, j]) == bool(blocks[i // 128, j // 64])


def test_row_without_keys() -> None:
    q, k, v = tensors()
    mask = torch.ones(37, 70, dtype=torch.bool)
    mask[5] = False
    result = oracle.attention(q, k, v, attn_mask=mask)
    assert (result.output[:, :, 5] == 0).all()
    assert (result.lse[:, :, 5] == -math.inf).all()
    with_sink = oracle.attention(q, k, v, attn_mask=mask, sink_logits=torch.full((4,), 0.25))
    assert (with_sink.output[:, :, 5] == 0).all()
    assert (with_sink.lse[:, :, 5] == 0.25).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_touches_only_rows_that_see_it(bad: float) -> None:
    q, k, v = tensors()
    mask = torch.rand(37, 70) > 0.3
    clean = oracle.attention(q, k, v, attn_mask=mask)
    for poisoned in ((k.clone(), v), (k, v.clone())):
        for x, y in ((poisoned[0], k), (poisoned[1], v)):
            if x is not y:
                x[:, :, 11, 3] = bad
        result = oracle.attention(q, *poisoned, attn_mask=mask)
        blind = ~mask[:, 11]
        torch.testing.assert_close(result.output[:, :, blind], clean.output[:, :, blind], **ROUNDING)
        touched = result.output[:, :, ~blind]
        theirs = sdpa(q, *poisoned, attn_mask=mask, enable_gqa=True)[:, :, ~blind]
        if poisoned[0] is k:
            torch.testing.assert_close(touched, theirs, equal_nan=True, **ROUNDING)
        elif math.isnan(bad):
            assert touched.isnan().all()


def test_int8_without_rounding_is_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """With very fine steps the int8 algorithm is attention, lse included: nothing but rounding tells the two apart."""

    def fine(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        return x, torch.ones_like(x.amax(dims, keepdim=True))

    monkeypatch.setattr(oracle, "_quantise", fine)
    monkeypatch.setattr(torch, "round", lambda x: x)
    q, k, v = tensors(q_len=130, kv_len=200)
    options: dict[str, Any] = {"causal": True, "window": 90, "sink_logits": torch.randn(4, dtype=torch.float64)}
    mean = torch.randn(2, 2, 24, dtype=torch.float64)
    expected = oracle.attention(q, k, v, **options)
    actual = oracle.attention_int8(q, k, v, mean=mean, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    blocks = torch.rand(1, 4, 2, 4) > 0.3
    expected = oracle.attention(q, k, v, blocks=blocks)
    torch.testing.assert_close(oracle.attention_int8(q, k, v, blocks=blocks), expected, rtol=1e-10, atol=1e-10)


def test_int8_errs_as_published() -> None:
    """One V scale per channel and key block gives a relative L1 of about .015 on normals; finer Q scales only help."""
    q, k, v = (torch.randn(1, 1, 1024, 64) for _ in range(3))
    error = oracle.relative_l1(oracle.attention_int8(q, k, v).output, oracle.attention(q, k, v).output)
    assert 0.010 < error < 0.0152


def test_key_mean_counts_finite_visible_tokens() -> None:
    key = torch.tensor([[[[1.0], [3.0], [math.nan], [100.0]]]])
    segments = torch.tensor([0, 5, 0, -1])
    assert oracle.key_mean(key, segments).tolist() == [[[2.0]]]
    assert oracle.key_mean(key, torch.full((4,), -1)).tolist() == [[[0.0]]]


def test_stage2_skips_nothing_at_a_large_threshold() -> None:
    q, k, v = tensors(q_len=130, kv_len=200)
    blocks = torch.rand(1, 1, 3, 4) > 0.4
    arguments: dict[str, Any] = {"blocks": blocks, "block_size": (64, 64), "causal": True}
    expected = oracle.attention(q, k, v, **arguments)
    result = oracle.attention_stage2(q, k, v, pv_threshold=torch.full((4,), 1e3), **arguments)
    torch.testing.assert_close((result.output, result.lse), tuple(expected), **ROUNDING)


def test_stage2_by_hand() -> None:
    """One row, key blocks that score 10, 0 and 9: at threshold 5 the middle product is skipped, its mass stays."""
    key = torch.zeros(1, 1, 192, 1, dtype=torch.float64)
    key[:, :, :64], key[:, :, 128:] = 10.0, 9.0
    value = torch.ones_like(key)
    result = oracle.attention_stage2(
        torch.ones(1, 1, 1, 1),
        key,
        value,
        pv_threshold=torch.tensor([5.0]),
        blocks=torch.ones(1, 1, 1, 3, dtype=torch.bool),
        block_size=(64, 64),
    )
    mass = 64 * (math.exp(10) + math.exp(9))
    total = mass + 64
    assert float(result.output) == pytest.approx(mass / total, rel=1e-12)
    assert float(result.lse) == pytest.approx(math.log(total), rel=1e-12)
    assert float(result.pv_density) == pytest.approx(2 / 3)
    assert result.margin == pytest.approx(4.0)  # the third block is 1 below, the second 10, the first 0


def test_bound_rejects_what_it_should() -> None:
    q, k, v = (x.float() for x in tensors())
    truth, plain = oracle.attention(q, k, v).output, oracle.attention(q, k, v, dtype=torch.float32).output
    oracle.assert_within(plain, truth, plain)
    with pytest.raises(AssertionError, match="mean"):
        oracle.assert_within(plain + 1e-6, truth, plain)
    one_row = plain.clone()
    one_row[0, 0, 5, 0] += 5e-6
    with pytest.raises(AssertionError, match="largest"):
        oracle.assert_within(one_row, truth, plain)
    with pytest.raises(AssertionError, match="not finite"):
        oracle.assert_within(plain.index_fill(2, torch.tensor([3]), math.nan), truth, plain)
    with pytest.raises(AssertionError):
        oracle.assert_within(plain, truth.index_fill(2, torch.tensor([3]), math.nan), plain)
