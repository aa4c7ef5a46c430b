"""One test for each known defect of the authors' code that can exist on a CPU, under its number in the specification.

(14's temporaries are in test_memory.py as well, 16 is about tuning, which is not here yet.)
"""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from engines import Engine
from samples import full_mask, qkv
from torch._dynamo.testing import CompileCounter

import tamis


def test_01_causal_masks_whole_blocks_only(engine: Engine) -> None:
    """Queries saw up to 127 future tokens. Here none: perturb them, and the past keeps its bits."""
    q, k, v = qkv(q_len=300)
    mask = engine.predict(tamis.Sparge(topk=0.6, similarity=-1.0), q, k, causal=True)
    before = engine.attend(q, k, v, mask, causal=True)
    for row in range(0, 299, 23):
        later = [x.clone() for x in (k, v)]
        for x in later:
            x[:, :, row + 1 :] = 1e6
        after = engine.attend(q, *later, mask, causal=True)
        assert torch.equal(after.output[:, :, : row + 1], before.output[:, :, : row + 1])


def test_02_causal_map_is_top_left_aligned(engine: Engine) -> None:
    """Queries at the end of the keys predict what the whole would have predicted for them, and attend to the same."""
    q, k, v = qkv(q_len=512)
    predictor = tamis.Sparge(topk=0.4, similarity=-1.0)
    whole = oracle.blocks_of(engine.predict(predictor, q, k, causal=True))
    for start in (128, 384):
        chunk = engine.predict(predictor, q[:, :, start:], k, causal=True)
        assert torch.equal(oracle.blocks_of(chunk), whole[:, :, start // 128 :])
        engine.check(q[:, :, start:], k, v, block_mask=chunk, causal=True)
    last = engine.predict(predictor, q[:, :, -1:], k, causal=True)
    assert oracle.blocks_of(last).sum() > 1, "a decoding step sees every key, not only the first"


def test_03_arguments_accepted_and_ignored(engine: Engine) -> None:
    """attn_mask is honoured, dropout_p raises, and there is no argument that does nothing."""
    q, k, v = qkv(q_len=130)
    mask = torch.rand(130, 130) > 0.5
    output, _ = engine.sparse_attention(
        q, k, v, attn_mask=mask, predictor=tamis.Sparge(topk=1.0), precision="full", pv_threshold=None
    )
    expected = oracle.attention(q, k, v, attn_mask=mask)
    oracle.assert_within(output, expected.output, oracle.attention(q, k, v, attn_mask=mask, dtype=torch.float32).output)
    with pytest.raises(ValueError, match="dropout_p"):
        engine.sparse_attention(q, k, v, dropout_p=0.5)
    with pytest.raises(TypeError, match="output_dtype"):
        engine.sparse_attention(q, k, v, output_dtype=torch.float32)


@pytest.mark.parametrize("precision", ["full", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_04_dtype_and_range_are_narrowed(engine: Engine, dtype: torch.dtype, precision: str) -> None:
    """fp32 came back as fp16, and bf16 values went through fp16, whose range ends at 65504.

    A power of two changes no bit of a fraction.
    """
    q, k, v = qkv(q_len=130, dtype=dtype)
    size = 1.0 if dtype == torch.float16 else 2.0**100
    output = engine.attend(q, k, v * size, precision=precision).output
    assert output.dtype == dtype
    assert output.isfinite().all()
    assert torch.equal(output / size, engine.attend(q, k, v, precision=precision).output)


def test_05_unsmoothed_keys_crash(engine: Engine) -> None:
    """With a softcap keys are not smoothed: that path works."""
    q, k, v = qkv(q_len=130)
    engine.check_int8(q, k, v, softcap=5.0, causal=True)


def test_06_prediction_ignores_scale(engine: Engine) -> None:
    """At scale 0 every block weighs the same: half the mass is half the blocks. At a large one the best has it all."""
    q, k, _ = qkv(heads=1, q_len=128, kv_len=1024)
    k += torch.randn(16, 32).repeat_interleave(64, 0)
    predictor = tamis.Sparge(cdf=0.5, similarity=-1.0, sink=False)
    counts = [int(engine.predict(predictor, q, k, scale=scale).kv_num_blocks) for scale in (0.0, 1e4)]
    assert counts == [8, 1]


@pytest.mark.parametrize("precision", ["full", "int8"])
def test_07_rows_without_a_block_are_uninitialised(engine: Engine, precision: str) -> None:
    """torch.empty hands out NaN in this suite, so whatever is not written is seen."""
    q, k, v = qkv(q_len=300)
    dense = torch.zeros(1, 1, 3, 5, dtype=torch.bool)
    dense[0, 0, 1, 2] = True
    result = engine.attend(
        q, k, v, tamis.BlockMask.from_dense(dense, block_size=(128, 64), seq_lens=(300, 300)), precision=precision
    )
    for rows in (slice(0, 128), slice(256, 300)):
        assert (result.output[:, :, rows] == 0).all()
        assert (result.lse[:, :, rows] == -math.inf).all()
    assert result.lse[:, :, 128:256].isfinite().all()


def test_08_a_zero_channel_gives_nan(engine: Engine) -> None:
    q, k, v = qkv(q_len=130)
    v[..., 3] = 0
    output = engine.attend(q, k, v, precision="int8").output
    assert (output[..., 3] == 0).all()
    assert output.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_09_cumulative_sum_in_half_precision(engine: Engine, dtype: torch.dtype) -> None:
    """600 blocks of equal weight: each adds 1/600, which half precision no longer adds to a sum near 1."""
    q = torch.zeros(1, 1, 64, 8, dtype=dtype)
    k = torch.randn(1, 1, 64 * 600, 8).to(dtype)
    mask = engine.predict(tamis.Sparge(cdf=0.95, similarity=-1.0, sink=False), q, k, block_size=(64, 64))
    assert abs(int(mask.kv_num_blocks) - 570) <= 1


def test_10_tail_blocks_and_zero_rows_become_dense(engine: Engine) -> None:
    """A tail of one row is similar to itself, and a block with one zero row hardly less than without."""
    q, k, _ = qkv(heads=1, q_len=641, kv_len=641)
    k = k[:, :, :1] + torch.randn(1, 1, 11, 32).repeat_interleave(64, 2)[:, :, :641]
    q = q[:, :, :1].expand(-1, -1, 641, -1).clone()
    q[:, :, 100] = 0
    predictor = tamis.Sparge(topk=0.1, similarity=0.9, sink=False)
    kept = oracle.blocks_of(engine.predict(predictor, q, k))
    assert (kept.sum(-1) == math.ceil(0.1 * 11)).all()
    zeros = engine.predict(predictor, torch.zeros_like(q), k)
    assert zeros.density() == 1.0, "rows that are all zero are similar to nothing: nothing is known, everything is kept"


def test_11_grouped_heads_fail_in_prediction(engine: Engine) -> None:
    q, k, v = qkv(heads=6, kv_heads=2, q_len=300)
    predictor = tamis.Sparge(topk=0.5, similarity=-1.0)
    mask = engine.predict(predictor, q, k, causal=True)
    alone = engine.predict(predictor, q[:, 3:], k[:, 1:], causal=True)
    assert torch.equal(oracle.blocks_of(mask)[:, 3:], oracle.blocks_of(alone))
    engine.check(q, k, v, block_mask=mask, causal=True)


@pytest.mark.parametrize(("dim", "q_len"), [(40, 300), (80, 300), (96, 127), (256, 5), (3, 1)])
def test_12_few_head_dims_and_long_queries_only(engine: Engine, dim: int, q_len: int) -> None:
    q, k, v = qkv(q_len=q_len, kv_len=300, dim=dim)
    mask = engine.predict(tamis.Sparge(cdf=0.9), q, k, causal=True)
    engine.check(q, k, v, block_mask=mask, causal=True)
    engine.check_int8(q, k, v, block_mask=mask, causal=True)


def test_13_no_lse_no_varlen_no_cpu_graph_breaks(engine: Engine) -> None:
    """The whole, as users call it, is one graph. Every `check` looks at the lse; a backward raises (test_errors.py)."""
    q, k, v = qkv(q_len=300)

    def run(query: torch.Tensor) -> torch.Tensor:
        output = tamis.sparse_attention(query, k, v, is_causal=True, backend=engine.backend)
        assert isinstance(output, torch.Tensor)
        return output

    with engine.selected():
        torch._dynamo.reset()
        compiled = torch.compile(run, fullgraph=True, backend="eager")
        assert torch.equal(compiled(q), run(q))


def test_14_each_length_compiles_anew(any_engine: Engine) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()

    def run(query: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = tamis.attend(query, query, query, causal=True, backend=any_engine.backend).output
        return output

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=counter)
    for n in (300, 301, 512, 1000):
        compiled(torch.randn(1, 2, n, 16))
    assert counter.frame_count == 1


@pytest.mark.real_memory
def test_14_offsets_overflow_32_bits(any_engine: Engine) -> None:
    """Rows so far apart that the last ones begin after element 2^31; nothing between them is ever touched."""
    step = 2**31 // 60
    try:
        room = torch.empty(70 * step, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("this machine does not hand out 5 GB of addresses")
    view = room.as_strided((1, 1, 70, 8), (0, 0, step, 1))
    for x in qkv(heads=1, q_len=70, dim=8, dtype=torch.bfloat16):
        for precision in ("full", "int8"):
            expected = any_engine.attend(x, x, x, precision=precision).output
            assert torch.equal(any_engine.attend(*(view.copy_(x),) * 3, precision=precision).output, expected)


def test_15_sparsity_is_reported_wrongly(engine: Engine) -> None:
    """The denominator is what is visible, and stage 2's skips count."""
    q, k, v = qkv(q_len=512)
    assert engine.attend(q, k, v, full_mask((512, 512)), causal=True).stats.density == 1.0
    assert engine.attend(q, k, v, full_mask((512, 512))).stats.density == 1.0
    half = torch.zeros(1, 1, 4, 8, dtype=torch.bool)
    half[..., ::2] = True
    mask = tamis.BlockMask.from_dense(half, block_size=(128, 64), seq_lens=(512, 512))
    assert mask.density() == 0.5
    assert engine.attend(q, k, v, mask).stats.density == 0.5
    assert engine.attend(q, k, v, mask, causal=True).stats.density == pytest.approx(mask.density(causal=True)) == 0.5
    k[:, :, :64, 0], q[..., 0] = 30.0, 10.0
    stats = engine.attend(q, k, v, pv_threshold=5.0).stats
    assert stats.qk_density == 1.0
    assert stats.pv_density == pytest.approx(1 / 8)
    assert stats.density == pytest.approx((1 + 1 / 8) / 2)
