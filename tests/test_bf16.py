"""precision="full" of bf16 inputs: scores of every size and order, broken numbers, and what a row may not notice.

Engines that multiply in bf16 keep weights relative to a power of two that follows a row's scores only where it must;
these are the places where it has to.
"""

from __future__ import annotations

import math
from typing import Any

import oracle
import pytest
import torch
from engines import Engine
from samples import qkv, same
from torch import Tensor

NAN, INF = float("nan"), float("inf")


def inputs(**shape: Any) -> tuple[Tensor, Tensor, Tensor]:
    return qkv(**shape, dtype=torch.bfloat16)


def steep(*heights: float) -> tuple[Tensor, Tensor, Tensor]:
    """64 keys a height: row i scores about `height` (natural logarithm) times a factor near 1 against them."""
    q = torch.randn(1, 1, 70, 32) * 0.1
    q[..., 0] = 1 + torch.arange(70) / 700
    k = torch.randn(1, 1, 64 * len(heights), 32) * 0.1
    k[..., 0] = torch.tensor(heights).repeat_interleave(64)
    return q.bfloat16(), k.bfloat16(), torch.randn(1, 1, 64 * len(heights), 16).bfloat16()


@pytest.mark.parametrize(
    "heights",
    [
        (0, 20, 40, 60),
        (0, 27, 28, 29, 55, 56),
        (100, 0, -100),
        (-200, -100, 0),
        (0, 300, 0),
        (-3e4, 3e4, 0),
        (2e5, 0, 2e5),
    ],
    ids=str,
)
def test_scores_that_rise_and_fall(engine: Engine, heights: tuple[float, ...]) -> None:
    """Over the headroom in steps and at once, and over all that fits beside a whole power of two."""
    q, k, v = steep(*heights)
    engine.check(q, k, v, scale=1.0)
    engine.check(q, k, v, scale=1.0, causal=True)
    engine.check(-q, k, v, scale=-1.0)


@pytest.mark.parametrize("size", [10.0, 1000.0, 1e9, 1e30])
@pytest.mark.parametrize("row", [5, 21, 69])
def test_a_row_far_above_the_others(engine: Engine, row: int, size: float) -> None:
    """One row outgrows its power or the plain arithmetic, the others do not: no bit of theirs changes."""
    q, k, v = inputs(heads=8, q_len=70, kv_len=1000, dim=32)
    plain = engine.attend(q, k, v)
    q[:, :, row] *= size
    result = engine.attend(q, k, v)
    if size < 1e6:
        engine.check(q, k, v)
    others = torch.arange(70) != row
    assert torch.equal(result.output[:, :, others], plain.output[:, :, others])
    assert torch.equal(result.lse[:, :, others], plain.lse[:, :, others])


@pytest.mark.parametrize("broken", [NAN, INF, -INF])
def test_what_a_row_does_not_see(engine: Engine, broken: float) -> None:
    """Keys and values of the future, broken or not, change no bit of the past, also inside a block."""
    q, k, v = inputs(q_len=200, kv_len=200, dim=64)
    plain = engine.attend(q, k, v, causal=True)
    for start in (70, 128, 199):
        for changed in ((k, v), (v,), (k,)):
            new_k, new_v = k.clone(), v.clone()
            if any(t is k for t in changed):
                new_k[:, :, start:, ::3] = broken
            if any(t is v for t in changed):
                new_v[:, :, start:, ::3] = broken
            result = engine.attend(q, new_k, new_v, causal=True)
            assert torch.equal(result.output[:, :, :start], plain.output[:, :, :start])
            assert torch.equal(result.lse[:, :, :start], plain.lse[:, :, :start])


@pytest.mark.parametrize("broken", [NAN, INF, -INF])
def test_what_a_row_sees(engine: Engine, broken: float) -> None:
    """Broken values break their channel; a broken query its row; a broken key each row whose score is no number."""
    q, k, v = inputs(heads=1, q_len=70, kv_len=130, dim=16)
    bad = v.clone()
    bad[0, 0, 100, 3] = broken
    output = engine.attend(q, k, bad).output
    assert not output[..., 3].isfinite().any()
    assert output[..., :3].isfinite().all()
    bad = q.clone()
    bad[0, 0, 33, 2] = broken
    output = engine.attend(bad, k, v).output
    assert output[0, 0, 33].isnan().all()
    assert output[0, 0, torch.arange(70) != 33].isfinite().all()
    bad = k.clone()
    bad[0, 0, 100, 2] = broken
    scores = q[0, 0].double() @ bad[0, 0, 100].double()  # NaN, inf or -inf: a -inf only hides the key
    output = engine.attend(q, bad, v).output[0, 0]
    assert output[scores != -INF].isnan().all()
    assert output[scores == -INF].isfinite().all()


def test_products_beyond_fp32(engine: Engine) -> None:
    """Entries whose sums of products overflow: what is no number in fp32 is none in the output."""
    q, k, v = inputs(heads=1, q_len=70, kv_len=130, dim=16)
    k[0, 0, 7] = 3e38
    q[0, 0, 3] = torch.tensor([3e38, -3e38] * 8)
    output = engine.attend(q, k, v).output
    assert output[0, 0, 3].isnan().all()


def test_strides_and_expanded_heads(engine: Engine) -> None:
    q, k, v = inputs(batch=2, heads=4, kv_heads=2, q_len=150, kv_len=200, dim=40)
    expected = engine.check(q, k, v, causal=True)
    for turn in (
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
        lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
        lambda t: torch.stack([t, t], -1)[..., 0],
    ):
        assert same(engine.attend(turn(q), turn(k), turn(v), causal=True), expected)


@pytest.mark.parametrize("q_len", [15, 16, 17, 32, 33, 48, 127, 128, 129])
@pytest.mark.parametrize("kv_len", [1, 63, 64, 65, 200])
def test_rows_and_keys_of_every_count(engine: Engine, q_len: int, kv_len: int) -> None:
    q, k, v = inputs(heads=1, q_len=q_len, kv_len=kv_len, dim=24, value_dim=20)
    engine.check(q, k, v)
    engine.check(q, k, v, causal=True)


def test_threshold_skips_what_is_far_below(engine: Engine) -> None:
    """16 rows that score 9 less against a block than before skip its values; the denominator keeps the weights."""
    q, k, v = steep(0, -9, -3)
    threshold = 5.0
    result = engine.attend(q, k, v, scale=1.0, pv_threshold=threshold)
    assert torch.equal(result.lse, engine.attend(q, k, v, scale=1.0).lse)
    assert result.stats.pv_density == pytest.approx(2 / 3)
    without = engine.attend(q, k, v.clone().index_fill_(2, torch.arange(64, 128), 0), scale=1.0)
    assert same(result, without)


def test_error_is_that_of_bf16(engine: Engine) -> None:
    """No further from the truth than twice plain torch in bf16, on normals at a length that averages luck away."""
    q, k, v = inputs(heads=1, q_len=256, kv_len=2048, dim=64)
    truth = oracle.attention(q, k, v).output
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    ours = oracle.relative_l1(engine.attend(q, k, v).output, truth)
    assert ours <= 2 * oracle.relative_l1(plain, truth)
    assert ours <= 2**-8 * math.sqrt(2)


def test_negative_nan(engine: Engine) -> None:
    """The NaN that a processor makes of inf - inf has its sign bit set; so may one that comes in."""
    q, k, v = inputs(heads=1, q_len=70, kv_len=130, dim=40)
    for tensor, row in ((q, 33), (k, 100)):
        bits = tensor.view(torch.int16)
        before = bits[0, 0, row, 37].clone()
        bits[0, 0, row, 37] = -64  # 0xffc0
        output = engine.attend(q, k, v).output[0, 0]
        assert output[33].isnan().all()
        if tensor is k:
            assert output.isnan().all()
        else:
            assert output[torch.arange(70) != 33].isfinite().all()
        bits[0, 0, row, 37] = before


@pytest.mark.parametrize("precision", ["full", "int8"])
@pytest.mark.parametrize("low", [-6e4, -6.8e4, -7e4, -1e5, -1.36e5, -1.4e5, -1e9])
def test_what_lies_far_below(engine: Engine, precision: str, low: float) -> None:
    """A score a hundred thousand below its row's reference weighs nothing, as a mask or by itself."""
    q, k, v = inputs(heads=1, q_len=70, kv_len=128, dim=32)
    mask = torch.zeros(70, 128)
    mask[:, 64:] = low
    hidden = engine.attend(q, k, v, attn_mask=mask == 0, precision=precision)
    result = engine.attend(q, k, v, attn_mask=mask, precision=precision)
    torch.testing.assert_close(result.output, hidden.output, rtol=0, atol=0.02)
    q, k = torch.zeros(1, 1, 70, 32), torch.zeros(1, 1, 128, 32)
    q[..., 0], k[:, :, 64:, 0] = 1, low
    result = engine.attend(q.bfloat16(), k.bfloat16(), v, scale=1.0, precision=precision)
    expected = v[:, :, :64].float().mean(2, keepdim=True).expand(1, 1, 70, 32)
    torch.testing.assert_close(result.output.float(), expected, rtol=0, atol=0.02)


def test_large_scores_everywhere(engine: Engine) -> None:
    """Queries and keys of 100: each row has one key, and no NaN."""
    q, k, v = inputs(heads=4, q_len=256, kv_len=256, dim=128)
    for size in (100, 200, 400):
        engine.check(q * size, k * size, v)


def test_values_near_the_end_of_bf16(engine: Engine) -> None:
    """Weights may exceed 1 on the way; what is left of the range of values is documented, and it is most."""
    q, k, v = steep(0, 5, 20, 0)
    plain = engine.attend(q, k, v, scale=1.0).output
    for size in (2.0**100, 2.0**105):
        torch.testing.assert_close(engine.attend(q, k, v * size, scale=1.0).output / size, plain, rtol=0, atol=0)


def test_a_scale_at_the_end_of_fp32(engine: Engine) -> None:
    _, k, v = inputs(heads=1, q_len=70, kv_len=128, dim=32)
    result = engine.attend(torch.zeros(1, 1, 70, 32).bfloat16(), k, v, scale=2e36)
    torch.testing.assert_close(result.lse, torch.full((1, 1, 70), math.log(128)), rtol=0, atol=1e-5)


def test_values_that_bf16_cannot_hold(engine: Engine) -> None:
    """fp32 values beyond bf16's largest, hidden: nobody's output changes."""
    q, k, v = qkv(heads=1, q_len=64, kv_len=64, dim=32)
    v[:, :, 63] = torch.finfo(torch.float32).max
    assert engine.attend(q, k, v, causal=True, precision="int8").output[:, :, :63].isfinite().all()


@pytest.mark.parametrize("threshold", [5.0, 60.0, 90.0, 100.0, 200.0])
def test_thresholds_of_any_size(engine: Engine, threshold: float) -> None:
    q, k, v = steep(0, -1000, -150)
    result = engine.attend(q, k, v, scale=1.0, pv_threshold=threshold)
    assert result.stats.pv_density == pytest.approx((1 + (threshold > 150)) / 3)


def test_a_future_query_changes_nothing(engine: Engine) -> None:
    """Whatever a wild row needs, its neighbours keep theirs; a weight in some hundred blocks would show."""
    q, k, v = inputs(heads=8, q_len=2048, kv_len=2048, dim=64)
    before = engine.attend(q, k, v, causal=True)
    for factor in (1e4, NAN, 1e16):
        new = [x.clone() for x in (q, k, v)]
        for x in new:
            x[:, :, 2036] *= factor
        after = engine.attend(*new, causal=True)
        assert torch.equal(after.output[:, :, :2036], before.output[:, :, :2036])
        assert torch.equal(after.lse[:, :, :2036], before.lse[:, :, :2036])
