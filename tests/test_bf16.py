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


def test_a_row_far_above_the_others(engine: Engine) -> None:
    """One row of sixteen outgrows its power, the others do not: theirs stays, and so do their outputs."""
    q, k, v = inputs(q_len=70, kv_len=300, dim=32)
    plain = engine.attend(q, k, v)
    q[:, :, 5] *= 1000
    result = engine.check(q, k, v)
    others = torch.arange(70) != 5
    assert torch.equal(result.output[:, :, others], plain.output[:, :, others])
    assert torch.equal(result.lse[:, :, others], plain.lse[:, :, others])


@pytest.mark.parametrize("broken", [NAN, -NAN, INF, -INF])
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


@pytest.mark.parametrize("broken", [NAN, -NAN, INF, -INF])
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
