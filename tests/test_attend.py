"""attend in full precision over the shapes, layouts and dtypes that torch's attention takes."""

from __future__ import annotations

import math
from typing import Any

import oracle
import pytest
import torch
from engines import Engine
from samples import assert_reordered, block_mask, full_mask, qkv, same

import tamis


@pytest.mark.parametrize(
    ("q_len", "kv_len"),
    [(1, 1), (1, 65), (65, 1), (63, 63), (63, 1000), (1000, 63), (64, 128), (65, 65), (1000, 1000), (1, 1000)],
)
def test_lengths(engine: Engine, q_len: int, kv_len: int) -> None:
    q, k, v = qkv(q_len=q_len, kv_len=kv_len, dim=40)
    engine.check(q, k, v)
    engine.check(q, k, v, causal=True)
    engine.check(q, k, v, causal=True, block_mask=block_mask((q_len, kv_len), heads=2))


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (6, 3), (4, 1)])
def test_grouped_queries(engine: Engine, heads: int, kv_heads: int) -> None:
    q, k, v = qkv(batch=2, heads=heads, kv_heads=kv_heads, q_len=70, kv_len=150)
    engine.check(q, k, v, causal=True)
    engine.check(q, k, v, block_mask=block_mask((70, 150), batch=2, heads=heads, block_size=(64, 64)))


@pytest.mark.parametrize(
    ("dim", "value_dim"),
    [(1, 1), (40, 40), (80, 80), (96, 96), (256, 256), (64, 16), (40, 96), (7, 5), (8, 256), (33, 1)],
)
def test_head_dims(engine: Engine, dim: int, value_dim: int) -> None:
    q, k, v = qkv(q_len=65, kv_len=130, dim=dim, value_dim=value_dim)
    engine.check(q, k, v)
    engine.check(q, k, v, causal=True, block_mask=block_mask((65, 130)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [40, 64])
def test_dtypes(engine: Engine, dtype: torch.dtype, dim: int) -> None:
    q, k, v = qkv(heads=4, kv_heads=2, q_len=130, kv_len=300, dim=dim, dtype=dtype)
    engine.check(q, k, v)
    engine.check(q, k, v, causal=True, block_mask=block_mask((130, 300), heads=4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_is_rounded_once(engine: Engine, dtype: torch.dtype) -> None:
    """Sums are fp32 inside: the output is the exact one rounded to nearest, give or take the fp32 error before."""
    if engine.backend == "triton":
        pytest.skip("weights are rounded with the inputs' type; test_triton.py has the formulas")
    q, k, v = qkv(q_len=130, kv_len=300, dtype=dtype)
    truth = oracle.attention(q, k, v, causal=True).output
    before = 4 * float((oracle.attention(q, k, v, causal=True, dtype=torch.float32).output - truth).abs().max())
    result = engine.attend(q, k, v, causal=True)
    output = result.output.double()
    if result.stats.pv_dtype == "bfloat16":
        truth = oracle.attention_bf16(q, k, v, causal=True, rounds=False).output
    tiny = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    exact = (output - truth).abs() <= truth.abs() * torch.finfo(dtype).eps / 2 + before + tiny
    # A weight in bf16 takes the next step, .54% away, where fp32 rounding moves its logarithm over the middle: rare.
    assert exact.all() if result.stats.pv_dtype == "float32" else exact.double().mean() > 0.999


def test_half_keeps_its_range(engine: Engine) -> None:
    """Scores of up to 1e5 overflow fp16, and bf16 values of 1e30 overflow fp16: neither may pass through it."""
    q, k, v = qkv(q_len=65, dim=64, dtype=torch.float16)
    engine.check(q * 100, k * 100, v, yardstick=torch.float32)
    q, k, v = qkv(q_len=65, dim=64, dtype=torch.bfloat16)
    result = engine.attend(q, k, v * 1e30)
    assert result.output.isfinite().all()
    torch.testing.assert_close(result.lse, engine.attend(q, k, v).lse, rtol=0, atol=0)


@pytest.mark.parametrize("block_size", [(64, 64), (64, 128), (128, 64), (128, 128)])
def test_block_sizes(engine: Engine, block_size: tuple[int, int]) -> None:
    q, k, v = qkv(heads=3, q_len=300, kv_len=330, dim=16)
    mask = block_mask((300, 330), heads=3, block_size=block_size)
    engine.check(q, k, v, block_mask=mask)
    engine.check(q, k, v, block_mask=mask, causal=True)


def test_mask_broadcasts_over_batch_and_heads(engine: Engine) -> None:
    q, k, v = qkv(batch=2, heads=4, kv_heads=2, q_len=150, kv_len=200, dim=16)
    for batch in (1, 2):
        for heads in (1, 4):
            engine.check(q, k, v, block_mask=block_mask((150, 200), batch=batch, heads=heads))


def test_strided_inputs(engine: Engine) -> None:
    """Heads after tokens, a fused projection, every other channel, channels before tokens, a slice of a longer one."""
    q, k, v = qkv(batch=2, heads=4, q_len=70, kv_len=130, dim=24)
    dense = engine.attend(q, k, v, causal=True)
    tokens_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert_reordered(engine.attend(*tokens_first, causal=True), dense, 130)
    fused = torch.cat([k, v], -1)
    assert_reordered(engine.attend(q, fused[..., :24], fused[..., 24:], causal=True), dense, 130)
    strided = [torch.stack([x, torch.full_like(x, math.nan)], -1)[..., 0] for x in (q, k, v)]
    assert strided[0].stride(-1) == 2
    assert_reordered(engine.attend(*strided, causal=True), dense, 130)
    columns = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (q, k, v)]
    assert columns[0].stride(-2) == 1
    assert_reordered(engine.attend(*columns, causal=True), dense, 130)
    cache = [torch.full((2, 4, 200, 24), math.nan).index_copy(2, torch.arange(130) + 7, x) for x in (k, v)]
    assert_reordered(engine.attend(q, *(x[:, :, 7:137] for x in cache), causal=True), dense, 130)


def test_expanded_inputs(engine: Engine) -> None:
    q, k, v = qkv(batch=1, heads=1, q_len=70, kv_len=130, dim=24)
    wide = [x.expand(2, 3, -1, -1) for x in (q, k, v)]
    assert_reordered(engine.attend(*wide), engine.attend(*(x.contiguous() for x in wide)), 130)
    constant = k[:, :, :1].expand(1, 1, 130, 24)
    assert_reordered(engine.attend(q, constant, v), engine.attend(q, constant.contiguous(), v), 130)


def test_one_key_and_value_for_all_batches(engine: Engine) -> None:
    q, k, v = qkv(batch=3, q_len=70, kv_len=130, dim=24)
    for precision in ("full", "int8"):
        shared = engine.attend(q, k[:1], v[:1], causal=True, precision=precision)
        expanded = engine.attend(
            q, k[:1].expand(3, -1, -1, -1), v[:1].expand(3, -1, -1, -1), causal=True, precision=precision
        )
        assert_reordered(shared, expanded, 130)


def test_inputs_are_left_alone(engine: Engine) -> None:
    inputs = qkv(q_len=70, dim=24)
    copies = [x.clone() for x in inputs]
    for precision in ("full", "int8"):
        engine.attend(*inputs, causal=True, precision=precision)
        assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies, strict=True))


@pytest.mark.parametrize("precision", ["full", "int8"])
def test_empty_batch(engine: Engine, precision: str) -> None:
    q, k, v = qkv(batch=0, q_len=70, kv_len=130, value_dim=5)
    for mask in (None, block_mask((70, 130), heads=2)):
        result = engine.attend(q, k, v, mask, precision=precision)
        assert result.output.shape == (0, 2, 70, 5)
        assert result.lse.shape == (0, 2, 70)


@pytest.mark.parametrize("precision", ["full", "int8"])
def test_empty_rows(engine: Engine, precision: str) -> None:
    """0 and -inf for rows without a visible key: no block, before the first key, in a padding segment, masked out."""
    q, k, v = qkv(q_len=200, kv_len=100, dim=24)
    dense = torch.tensor([[True, True], [False, False]])
    mask = tamis.BlockMask.from_dense(dense, block_size=(128, 64), seq_lens=(200, 100))
    padding = torch.where(torch.arange(200) % 3 == 0, -1, 0)
    hole = torch.ones(200, 100, dtype=torch.bool)
    hole[11] = False
    early = torch.arange(200)
    cases: list[tuple[dict[str, Any], torch.Tensor]] = [
        ({"block_mask": mask}, early >= 128),
        ({"causal": True}, early < 100),
        ({"segments": (padding, torch.zeros(100, dtype=torch.int64))}, padding < 0),
        ({"attn_mask": hole}, early == 11),
    ]
    for options, empty in cases:
        result = engine.attend(q, k, v, precision=precision, **options)
        assert (result.output[:, :, empty] == 0).all()
        assert (result.lse[:, :, empty] == -math.inf).all()
        assert result.lse[:, :, ~empty].isfinite().all()
        assert result.output[:, :, ~empty].isfinite().all()
        assert (result.output[:, :, ~empty] != 0).any(-1).all()


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 2)], ids=["two", "three", "five"])
def test_leading_dims(engine: Engine, shape: tuple[int, ...]) -> None:
    q, k, v = torch.randn(*shape, 70, 24), torch.randn(*shape, 130, 24), torch.randn(*shape, 130, 8)
    heads = shape[-1] if shape else 1
    expected = oracle.attention(*(x.reshape(-1, heads, *x.shape[-2:]) for x in (q, k, v)), causal=True)
    result = engine.attend(q, k, v, causal=True)
    assert result.output.shape == (*shape, 70, 8)
    assert result.lse.shape == (*shape, 70)
    flat = [x.reshape(-1, heads, *x.shape[-2:]) for x in (q, k, v)]
    plain = oracle.attention(*flat, causal=True, dtype=torch.float32)
    oracle.assert_within(result.output.reshape(expected.output.shape), expected.output, plain.output)


@pytest.mark.parametrize(
    "shape", [(70, 130), (2, 70, 130), (3, 1, 1, 130), (2, 1, 1, 70, 130), (1, 1, 1, 70, 1), (2, 3, 2, 70, 130)]
)
def test_masks_of_five_dims(engine: Engine, shape: tuple[int, ...]) -> None:
    """As in torch a mask broadcasts against all leading dims."""
    q, k, v = torch.randn(2, 3, 2, 70, 24), torch.randn(2, 3, 2, 130, 24), torch.randn(2, 3, 2, 130, 8)
    mask = torch.rand(shape) > 0.3
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    spread: dict[str, Any] = {"attn_mask": mask.expand(2, 3, 2, 70, 130).flatten(0, 1)}
    truth = oracle.attention(*flat, **spread).output
    output = engine.attend(q, k, v, attn_mask=mask).output.flatten(0, 1)
    oracle.assert_within(output, truth, oracle.attention(*flat, **spread, dtype=torch.float32).output)


def test_scale(engine: Engine) -> None:
    q, k, v = qkv(q_len=70, dim=24)
    for scale in (1.0, 0.01, 3.0, -0.5, 0.0):
        engine.check(q, k, v, scale=scale)


def test_int_scale_and_keyword_arguments(engine: Engine) -> None:
    q, k, v = qkv(q_len=70, dim=24)
    by_name = engine.attend(query=q, key=k, value=v, block_mask=None, scale=1)
    assert same(by_name, engine.attend(q, k, v, scale=1.0))


def test_large_logits(engine: Engine) -> None:
    """At logits of +-1e4 attention is a look-up: the row's winner, and an lse that is its logit."""
    q, k, v = qkv(q_len=130, dim=32)
    engine.check(q * 100, k * 100, v, causal=True)


def test_result_is_a_named_tuple(any_engine: Engine) -> None:
    q, k, v = qkv(q_len=65)
    result = any_engine.attend(q, k, v)
    output, lse, stats = result
    assert isinstance(result, tamis.AttentionOutput)
    assert isinstance(stats, tamis.AttentionStats)
    assert output is result.output
    assert lse is result.lse
    assert result.output.is_contiguous()


def test_stats_name_what_ran(engine: Engine) -> None:
    q, k, v = qkv(q_len=130, kv_len=300, dtype=torch.bfloat16)
    dense = engine.attend(q, k, v).stats
    assert (dense.density, dense.qk_density, dense.pv_density) == (1.0, 1.0, 1.0)
    assert "int8" not in dense.qk_dtype
    int8 = engine.attend(q, k, v, precision="int8").stats
    few = engine.attend(q[:, :, :3], k, v).stats
    assert int8.qk_dtype == "int8"
    if engine.backend != "triton":
        assert (few.qk_dtype, few.pv_dtype) == ("float32", "float32")
    if engine.target == "amx" or engine.backend == "triton":
        assert (dense.qk_dtype, dense.pv_dtype, int8.pv_dtype) == ("bfloat16",) * 3
    else:
        assert "8" in int8.pv_dtype
        assert dense.pv_dtype == "float32"


def test_density_counts_visible_blocks(engine: Engine) -> None:
    """Kept over visible, per pair of blocks: invisible blocks count neither above nor below the line."""
    q, k, v = qkv(q_len=512, dim=8)
    mask = block_mask((512, 512), heads=2, block_size=(128, 128))
    kept = oracle.blocks_of(mask)[0]
    lower = torch.ones(4, 4, dtype=torch.bool).tril()
    dense, causal = engine.attend(q, k, v, mask).stats, engine.attend(q, k, v, mask, causal=True).stats
    assert dense.density == pytest.approx(float(kept.double().mean()))
    assert causal.density == pytest.approx(float((kept & lower).sum() / (2 * 10)))
    assert causal.qk_density == causal.pv_density == causal.density
    assert engine.attend(q, k, v, causal=True).stats.density == 1.0


@pytest.mark.parametrize("lengths", [(300, 300), (65, 513), (513, 65), (1, 1000), (640, 200)])
@pytest.mark.parametrize("block_size", [(64, 64), (128, 64), (64, 128)])
def test_visible_blocks_are_those_of_the_tokens(
    any_engine: Engine, lengths: tuple[int, int], block_size: tuple[int, int]
) -> None:
    """Consecutive positions are counted as a range: the oracle looks at every token."""
    q, k, v = qkv(heads=1, q_len=lengths[0], kv_len=lengths[1], dim=8)
    mask = full_mask(lengths, block_size)
    for causal in (False, True):
        for window in (None, 1, 63, 64, 65, 130, 10**6, 2**63 - 1):
            seen = oracle.visible(*lengths, causal=causal, window=window)
            expected = oracle.visible_blocks(seen, block_size)
            counts = any_engine.attend(q, k, v, mask, causal=causal, window=window).stats.counts
            assert torch.equal(counts[0, 0, :, 0], expected.reshape(-1, *expected.shape[-2:])[0].double().sum(-1))


def test_zero_lengths(engine: Engine) -> None:
    """No query: nothing comes back. No key: every row is empty."""
    q, k, v = qkv(q_len=5, kv_len=7)
    for precision in ("full", "int8"):
        assert engine.attend(q[:, :, :0], k, v, precision=precision).output.shape == (1, 2, 0, 32)
        result = engine.attend(q, k[:, :, :0], v[:, :, :0], precision=precision)
        assert (result.output == 0).all()
        assert (result.lse == -math.inf).all()
