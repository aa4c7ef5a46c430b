"""precision="int8": how far from the truth, and right answers where quantising is easy to get wrong.

Where a bound is a number it comes from the published measurement: relative L1 .0152 on random normals with one V scale
per channel and key block. Everything else is held against the formulas in fp64 (`oracle.attention_int8`), which leave a
backend only fp32 rounding.
"""

from __future__ import annotations

import math
from typing import Any

import oracle
import pytest
import torch
from engines import Engine, engines, in_words, value_step
from samples import block_mask, qkv
from torch import Tensor

import tamis

# A number that lies within fp32 rounding of the middle of two steps may be rounded to either. At a relative rounding of
# about 1e-6 that happens to 254e-6 of the probabilities, each worth 1/254 of its block's maximum: far below 1e-4 of the
# output. Of the query and key entries about 127 * 2 * 1e-7 flip, each worth 1/127 of a largest entry in one of head_dim
# terms of a score: below 1e-3 of one row.
FLIPS = 1e-3
# Of a row alone: one probability that flips moves the mean of 65 values, which is small, by 8e-4 of itself. With
# AVX-512 one may flip between 64ths of an octave, by 1.1%, which moves it by 2.2e-3.
FLIPS_OF_A_ROW = 3e-3


def check(
    engine: Engine, q: Tensor, k: Tensor, v: Tensor, *, block_mask: Any = None, size: float = 0.0, **options: Any
) -> Any:
    """Against the formulas, and against the truth with the formulas as the yardstick; `size`: of the largest scores."""
    result, formulas = engine.check_int8(q, k, v, block_mask=block_mask, **options)
    rounding = torch.finfo(q.dtype).eps + size * 2**-23
    flips = FLIPS_OF_A_ROW if q.shape[2] == 1 else FLIPS
    assert oracle.relative_l1(result.output, formulas.output) <= flips + rounding
    return result


@pytest.mark.parametrize("length", [1000, 2048])
def test_error_on_normals(engine: Engine, length: int) -> None:
    q, k, v = qkv(heads=1, q_len=length if engine.backend == "cpu" else 256, kv_len=length, dim=64)
    result = check(engine, q, k, v)
    error = oracle.relative_l1(result.output, oracle.attention(q, k, v).output)
    assert error <= 0.0152, "the published error of this scheme"
    assert result.stats.qk_dtype == "int8"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("dim", "value_dim"), [(64, 64), (40, 96), (1, 1), (256, 7), (3, 256), (80, 80)])
def test_dtypes_and_head_dims(engine: Engine, dtype: torch.dtype, dim: int, value_dim: int) -> None:
    q, k, v = qkv(heads=4, kv_heads=2, q_len=70, kv_len=200, dim=dim, value_dim=value_dim, dtype=dtype)
    result = check(engine, q, k, v, causal=True)
    assert result.output.dtype == dtype


@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (1, 65), (65, 1), (63, 63), (200, 300), (300, 200)])
def test_lengths(engine: Engine, q_len: int, kv_len: int) -> None:
    q, k, v = qkv(q_len=q_len, kv_len=kv_len)
    check(engine, q, k, v)
    check(engine, q, k, v, causal=True)


@pytest.mark.parametrize("block_size", [(64, 64), (64, 128), (128, 64), (128, 128)])
def test_block_masks(engine: Engine, block_size: tuple[int, int]) -> None:
    q, k, v = qkv(batch=2, heads=4, kv_heads=2, q_len=300, kv_len=330)
    check(engine, q, k, v, block_mask=block_mask((300, 330), batch=2, heads=4, block_size=block_size), causal=True)
    check(engine, q, k, v, block_mask=block_mask((300, 330), block_size=block_size, density=0.2))


def test_single_token_is_its_value(engine: Engine) -> None:
    """One key: each scale is the entry / 127, so the output is the value up to fp32 rounding, and the lse the score."""
    q, k, v = qkv(batch=2, q_len=3, kv_len=1)
    result = engine.attend(q, k, v, precision="int8")
    torch.testing.assert_close(result.output, v.expand(2, 2, 3, 32), rtol=value_step(result.stats), atol=0)
    expected = (q.double() * k.double()).sum(-1) * 32**-0.5
    torch.testing.assert_close(result.lse.double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dim", [64, 128, 256, 1000])
def test_sums_as_large_as_they_get(engine: Engine, dim: int) -> None:
    """Query and key whose bytes are all 127 or -127: the sum of the products is 127 * 127 * dim."""
    dim = dim if engine.backend == "cpu" else min(dim, 256)
    q, k = engine.unmixed(torch.ones(1, 1, 40, dim)), engine.unmixed(torch.ones(1, 1, 130, dim))
    k[:, :, ::2] *= -1
    k[:, :, 5::7] *= 0.9
    check(engine, q, k, torch.randn(1, 1, 130, 16), scale=2 / dim)
    check(engine, q, k, torch.randn(1, 1, 130, 16), scale=-2 / dim)


@pytest.mark.parametrize("odd", [4.0, 0.0, 3e37, math.nan, math.inf])
def test_a_row_is_its_own(engine: Engine, odd: float) -> None:
    """Whatever its neighbours in a vector hold, a row's bits are those it has beside others."""
    q, k, v = qkv(q_len=64, kv_len=300, dim=64)
    alone = engine.attend(q, k, v, precision="int8")
    q[:, :, ::20] *= odd
    beside = engine.attend(q, k, v, precision="int8")
    others = torch.arange(64) % 20 != 0
    assert torch.equal(beside.output[:, :, others], alone.output[:, :, others])
    assert torch.equal(beside.lse[:, :, others], alone.lse[:, :, others])


def test_zero_channels_give_zero(engine: Engine) -> None:
    q, k, v = qkv(q_len=130)
    v[..., 5], v[:, 1] = 0, 0
    output = check(engine, q, k, v).output
    assert (output[..., 5] == 0).all()
    assert (output[:, 1] == 0).all()
    zeros = engine.attend(torch.zeros_like(q), torch.zeros_like(k), v, precision="int8")
    torch.testing.assert_close(zeros.lse, torch.full_like(zeros.lse, math.log(130)), rtol=0, atol=1e-6)
    check(engine, q, torch.zeros_like(k), v)
    check(engine, torch.zeros_like(q), k, v)


def test_channels_of_different_size(engine: Engine) -> None:
    """Value channels over 60 orders of magnitude, each with its own scale: each as good as the others."""
    q, k, v = qkv(q_len=130, dim=16)
    size = 10.0 ** torch.arange(-30, 30, 60 / 16)
    plain = engine.attend(q, k, v, precision="int8")
    scaled = engine.attend(q, k, v * size, precision="int8").output
    # A flip moves v by 1/127 of its maximum of 3. In bf16 every value is rounded anew, by 2^-9 of itself at most.
    rounding = 2 * 2**-9 * float(v.abs().mean()) if plain.stats.pv_dtype == "bfloat16" else 0
    torch.testing.assert_close(scaled / size, plain.output, rtol=0, atol=2e-3 + rounding)


def test_constant_rows(engine: Engine) -> None:
    """Equal keys: smoothing leaves zeros, every weight is 1/n exactly, and a constant value comes back."""
    q, k, v = qkv(q_len=70, kv_len=130)
    result = check(engine, q, k[:, :, :1].expand(-1, -1, 130, -1), v)
    constant = v[:, :, :1].expand(-1, -1, 130, -1)
    if result.stats.pv_dtype == "bfloat16":
        constant = constant.bfloat16().float()
    result = engine.attend(q, k[:, :, :1].expand(-1, -1, 130, -1), constant, precision="int8")
    torch.testing.assert_close(result.output, constant[:, :, :70], rtol=2e-6, atol=0)
    # Any weights average a constant; P is rounded to 1/254, so its sum is off by at most half a step per key.
    result = engine.attend(q, k, constant, precision="int8")
    torch.testing.assert_close(result.output, constant[:, :, :70], rtol=0.5 / 254 * 130 / 10, atol=0)


@pytest.mark.parametrize("step", [-60.0, -9.0, 9.0, 60.0])
def test_maxima_that_fall_and_rise(engine: Engine, step: float) -> None:
    """Block maxima that lie far apart, in both orders: what was added must fade or stay, and nothing overflow."""
    q = torch.randn(1, 1, 70, 16)
    q[..., 0] = 4
    k = torch.randn(1, 1, 5 * 64, 16) * 0.1
    k[..., 0] = step * torch.tensor([0.0, 1, 2, 1, 3]).repeat_interleave(64)
    v = torch.randn(1, 1, 5 * 64, 8)
    plain = check(engine, q, k, v)
    size = torch.tensor([1e-20, 1, 1e15, 1, 1, 1, 1, 1e25])
    large = engine.attend(q, k, v * size, precision="int8")
    torch.testing.assert_close(large.output / size, plain.output, rtol=0, atol=2e-3)
    skipping = engine.attend(q, k, v * size, precision="int8", pv_threshold=3.0)
    assert torch.equal(skipping.lse, plain.lse)
    # What is skipped weighs e^-3 of the largest weight at most.
    assert float((skipping.output / size - plain.output).abs().max()) < math.exp(-3) * 64 * 5


def test_long_flat_rows_keep_their_mass(engine: Engine) -> None:
    """One key 8 above 2,000 equal ones, which hold 40%: against the running maximum each would round to 0 of 254."""
    k = torch.zeros(1, 1, 2048, 16)
    k[..., 0] = -1.0
    k[:, :, 0, 0] = 1.0
    q = torch.zeros(1, 1, 2, 16)
    q[..., 0] = 16.0
    v = torch.ones(1, 1, 2048, 16)
    v[:, :, 0] = -1.0
    share = math.exp(8) / (math.exp(8) + 2047)
    result = engine.attend(q, k, v, precision="int8")
    assert float(oracle.attention(q, k, v).output[0, 0, 0, 0]) == pytest.approx(1 - 2 * share)
    assert float(result.output[0, 0, 0, 0]) == pytest.approx(1 - 2 * share, abs=0.02)
    check(engine, q, k, v)


def test_logits_of_ten_thousand(engine: Engine) -> None:
    """Row i looks up key 7i: logit 1e4 against -1e4, in any block, masked or not."""
    codes = engine.unmixed(torch.randint(0, 2, (130, 32)).float() * 2 - 1)
    k = codes[None, None].clone()
    rows = torch.arange(0, 130, 7)
    q = codes[rows][None, None] * (1e4 * 32**0.5 / 32)
    v = torch.randn(1, 1, 130, 16)
    result = engine.attend(q, k, v, precision="int8")
    expected = oracle.attention(q, k, v)
    assert float((expected.lse - 1e4).abs().max()) < 1e-3
    # One key has all the weight: what is left is the rounding of its value, half of 1/127 of a channel's maximum, 4.
    torch.testing.assert_close(result.output.double(), expected.output, rtol=0, atol=4 / 254)
    torch.testing.assert_close(result.lse.double(), expected.lse, rtol=1 / 127, atol=0)
    flipped = engine.attend(-q, k, v, precision="int8", attn_mask=torch.eye(130, dtype=torch.bool)[rows])
    torch.testing.assert_close(flipped.output.double(), expected.output, rtol=0, atol=4 / 254)
    torch.testing.assert_close(flipped.lse.double(), -expected.lse, rtol=1 / 127, atol=0)


def test_lse(engine: Engine) -> None:
    """Of the unsmoothed, unquantised scores: a large key mean does not show in its error."""
    q, k, v = qkv(heads=4, kv_heads=2, q_len=130, kv_len=300)
    k = k + 5 * torch.randn(1, 2, 1, 32)
    truth = oracle.attention(q, k, v, causal=True).lse
    result = check(engine, q, k, v, causal=True)
    # A score errs by the rounding of q and k (steps 3/127 and 4/127, std step / sqrt(12)) in 32 terms, over sqrt(32).
    assert float((result.lse.double() - truth).abs().max()) < 5 * 0.011


def test_engines_agree() -> None:
    """What separates two engines with the same weights is fp32 rounding, never a formula."""
    q, k, v = qkv(heads=4, kv_heads=2, q_len=260, kv_len=300, dim=40)
    mask = block_mask((260, 300), heads=4)
    results = [e.attend(q, k, v, mask, causal=True, precision="int8", pv_threshold=4.0) for e in engines()]
    for first in results:
        for other in results:
            torch.testing.assert_close(other.stats.counts, first.stats.counts, rtol=0, atol=0.02)
            if _formats(other) == _formats(first):
                assert oracle.relative_l1(other.output, first.output) <= FLIPS
                torch.testing.assert_close(other.lse, first.lse, rtol=0, atol=1e-4)


def _formats(result: Any) -> str:
    """What the second product is in: all kinds of 8 bits are the same numbers, of two kinds of exponentials."""
    if result.stats.pv_dtype == "bfloat16":
        return "bfloat16"
    return "8 bits, in words" if in_words(result.stats) else "8 bits"


def test_smoothing_earns_its_keep(engine: Engine) -> None:
    """Keys with a mean ten times their spread: unsmoothed int8 would be off by several times."""
    q, k, v = qkv(q_len=130, kv_len=300)
    shifted = k + 10 * torch.randn(32)
    truth = oracle.attention(q, shifted, v).output
    ours = oracle.relative_l1(engine.attend(q, shifted, v, precision="int8").output, truth)
    zero = torch.zeros(1, 2, 32, dtype=torch.float64)
    unsmoothed = oracle.relative_l1(oracle.attention_int8(q, shifted, v, mean=zero).output, truth)
    assert ours < 0.02
    assert unsmoothed > 3 * ours


@pytest.mark.parametrize(("dim", "bound"), [(64, 0.04), (128, 0.04), (96, 0.06), (40, 0.08)])
def test_mixing_earns_its_keep(engine: Engine, dim: int, bound: float) -> None:
    """A channel that is 30 times as large as the others in the keys, and as much smaller in the queries."""
    if engine.backend == "triton":
        pytest.skip("the GPU's kernels do not mix channels")
    q, k, v = qkv(q_len=130, kv_len=300, dim=dim)
    q[..., 3] /= 30
    k[..., 3] *= 30
    truth = oracle.attention(q, k, v).output
    ours = oracle.relative_l1(check(engine, q, k, v).output, truth)
    unmixed = oracle.relative_l1(oracle.attention_int8(q, k, v, mixes=False).output, truth)
    assert ours < bound
    assert unmixed > 2 * ours


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("shared", ["query", "key", "alternating", "positive"])
def test_what_channels_have_in_common_costs_little(engine: Engine, dim: int, shared: str) -> None:
    """Rows around a constant, or an alternating one: nothing that mixing would make the largest entry of."""
    q, k, v = qkv(q_len=130, kv_len=256, dim=dim)
    if shared == "query":
        q = q + 3
    elif shared == "key":
        k = k + 3 * torch.randn(1, 2, 256, 1)
    elif shared == "alternating":
        q = q + 5 * torch.tensor([1.0, -1.0]).repeat(dim // 2)
    else:
        q, k = 4 * torch.rand_like(q), 4 * torch.rand_like(k)
    truth = oracle.attention(q, k, v).output
    ours = oracle.relative_l1(check(engine, q, k, v).output, truth)
    assert ours < 1.6 * oracle.relative_l1(oracle.attention_int8(q, k, v, mixes=False).output, truth) + 2e-3


@pytest.mark.parametrize("dim", [64, 256])
def test_tiny_queries_of_large_keys(engine: Engine, dim: int) -> None:
    """Entries near the end of fp32 on either side, whose products are of an ordinary size."""
    if engine.backend == "triton":
        pytest.skip("the GPU's kernels take such queries for zero")
    q, k, v = qkv(q_len=40, kv_len=130, dim=dim)
    check(engine, q * 1e-36, k * 1e36, v)


@pytest.mark.parametrize("size", [100.0, 1000.0, 10000.0])
def test_scores_far_from_zero(engine: Engine, size: float) -> None:
    """Rows whose largest scores are that large, and others within a few units of them, by steps that 8 bits have."""
    q, _, v = qkv(heads=1, q_len=70, kv_len=256, dim=256)
    q = q + size / 16
    signs = torch.tensor([1.0, -1.0]).repeat(128)
    k = signs[:, None].repeat(1, 1, 1, 256)
    k[..., 0] *= 1 - torch.randint(20, (256,)) / 127
    near = (scores := q.double() @ k.double().mT / 16) > scores.amax(-1, keepdim=True) - 3
    assert (scores.amax(-1) > size * 0.9).all()
    assert (near.sum(-1) > 30).all()
    check(engine, engine.unmixed(q), engine.unmixed(k), v, size=size)


def test_the_lowest_mask_means_almost_never(engine: Engine) -> None:
    """A row masked with the most negative number everywhere, as padding often is: the mean of the values."""
    q, k, v = qkv(heads=1, q_len=70, kv_len=130, dim=16)
    mask = torch.zeros(70, 130)
    mask[3] = torch.finfo(torch.float32).min
    mask[40, 1:] = -3e38
    result = engine.attend(q, k, v, precision="int8", attn_mask=mask)
    torch.testing.assert_close(result.output[:, :, 3], v.mean(2), rtol=0, atol=0.02)
    torch.testing.assert_close(result.output[:, :, 40], v[:, :, 0], rtol=0, atol=0.02)
    assert float(result.lse[0, 0, 3]) < -3e38
    check(engine, q[:, :, 4:40], k, v, attn_mask=mask[4:40])


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_broken_row_is_alone(engine: Engine, broken: float) -> None:
    q, k, v = qkv(heads=1, q_len=70, kv_len=130, dim=16)
    plain = engine.attend(q, k, v, precision="int8")
    for row in (0, 5, 69):
        bad = q.clone()
        bad[0, 0, row, 2] = broken
        output = engine.attend(bad, k, v, precision="int8").output
        others = torch.arange(70) != row
        assert output[:, :, row].isnan().all()
        torch.testing.assert_close(output[:, :, others], plain.output[:, :, others], rtol=0, atol=1e-3)


def test_values_of_all_sizes(engine: Engine) -> None:
    """Blocks of which the lower one holds far larger values, and sums near the end of fp32."""
    q = torch.zeros(1, 1, 1, 64)
    q[..., 0] = 15.6
    k = torch.zeros(1, 1, 128, 64)
    k[:, :, :64, 0], k[:, :, 64:, 0] = 1, -1
    v = torch.ones(1, 1, 128, 4)
    v[:, :, 64:] = 1e20
    exact = oracle.attention(q, k, v, scale=1.0).output
    result = engine.attend(q, k, v, scale=1.0, precision="int8").output.double()
    torch.testing.assert_close(result, exact, rtol=2e-2, atol=0)
    flat = engine.attend(q * 0, torch.zeros(1, 1, 2560, 64), torch.full((1, 1, 2560, 4), 3e33), precision="int8")
    torch.testing.assert_close(
        flat.output, torch.full((1, 1, 1, 4), 3e33), rtol=max(1e-5, value_step(flat.stats)), atol=0
    )


def test_zero_keys_among_others_in_a_pack(engine: Engine) -> None:
    """Key blocks equal to the mean, whose scale is 0, far below another block: they weigh what they weigh."""
    zeros, ones = torch.zeros(1, 1, 64, 64), torch.ones(1, 1, 64, 64)
    large, small = torch.full((1, 1, 64, 4), 100.0), torch.ones(1, 1, 64, 4)
    with engine.selected():
        packed = tamis.pack_kv(zeros, large).append(5 * ones, small).append(zeros, large)
    result = engine.attend(ones[:, :, :1], packed, None)
    torch.testing.assert_close(result.output, torch.ones(1, 1, 1, 4), rtol=0, atol=1e-4)
