"""sparse_attention: torch's signature, torch's meaning; with every block kept, torch's result."""

from __future__ import annotations

import inspect
import math
from typing import Any

import oracle
import pytest
import torch
from engines import Engine
from samples import block_mask, qkv
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.nn.functional import scaled_dot_product_attention as sdpa

import tamis

DENSE = {"predictor": tamis.Sparge(topk=1.0), "precision": "full", "pv_threshold": None}


class Recorder:
    """A predictor that keeps every block and remembers how it was asked."""

    def __init__(self) -> None:
        self.asked: dict[str, Any] = {}

    def __call__(self, query: Tensor, key: Tensor, **options: Any) -> Any:
        self.asked = {"query": query, "key": key, **options}
        lengths = (query.shape[-2], key.shape[-2])
        dense = torch.ones(1, 1, -(-lengths[0] // 128), -(-lengths[1] // 64), dtype=torch.bool)
        return tamis.BlockMask.from_dense(dense, block_size=(128, 64), seq_lens=lengths)


def check(engine: Engine, q: Tensor, k: Tensor, v: Tensor, *arguments: Any, **options: Any) -> None:
    """Same arguments, and the same answer as torch in fp64; torch at the input's precision is the yardstick."""
    output, stats = engine.sparse_attention(q, k, v, *arguments, **options, **DENSE)
    assert output.dtype == q.dtype
    assert stats.density == 1.0

    def wide(x: Any) -> Any:
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

    truth = sdpa(q.double(), k.double(), v.double(), *map(wide, arguments), **{n: wide(x) for n, x in options.items()})
    plain = sdpa(q, k, v, *arguments, **options)
    oracle.assert_within(output, truth, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("q_len", "kv_len"), [(200, 200), (70, 300)])
def test_density_one_is_torch(engine: Engine, dtype: torch.dtype, q_len: int, kv_len: int) -> None:
    q, k, v = qkv(batch=2, q_len=q_len, kv_len=kv_len, value_dim=16, dtype=dtype)
    check(engine, q, k, v)
    check(engine, q, k, v, scale=0.5)
    check(engine, q, k, v, is_causal=True)
    check(engine, q, k, v, torch.rand(q_len, kv_len) > 0.3)
    check(engine, q, k, v, torch.rand(2, 1, 1, kv_len) > 0.3)
    check(engine, q, k, v, torch.randn(1, 2, q_len, kv_len).to(dtype))


def test_is_causal_is_top_left(engine: Engine) -> None:
    """As in torch, with more queries than keys and with fewer."""
    for q_len, kv_len in ((70, 300), (300, 70)):
        q, k, v = qkv(q_len=q_len, kv_len=kv_len)
        check(engine, q, k, v, is_causal=True)
        output, _ = engine.sparse_attention(q, k, v, is_causal=True, **DENSE)
        torch.testing.assert_close(output[:, :, 0], v[:, :, 0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("bias", [causal_lower_right, causal_upper_left])
def test_causal_bias_objects(engine: Engine, bias: Any) -> None:
    q, k, v = qkv(q_len=70, kv_len=300)
    options = {"attn_mask": bias(70, 300)}
    output, _ = engine.sparse_attention(q, k, v, **options, **DENSE)
    truth = sdpa(q.double(), k.double(), v.double(), **options)
    oracle.assert_within(output, truth, sdpa(q, k, v, **options))
    with pytest.raises(ValueError, match="attn_mask"):
        engine.sparse_attention(q, k, v, attn_mask=bias(70, 299), **DENSE)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 2)], ids=["two", "three", "five"])
def test_leading_dims(engine: Engine, shape: tuple[int, ...]) -> None:
    q, k, v = torch.randn(*shape, 70, 24), torch.randn(*shape, 130, 24), torch.randn(*shape, 130, 8)
    output, _ = engine.sparse_attention(q, k, v, is_causal=True, **DENSE)
    oracle.assert_within(
        output, sdpa(q.double(), k.double(), v.double(), is_causal=True), sdpa(q, k, v, is_causal=True)
    )


def test_grouped_heads_need_to_be_asked_for(engine: Engine) -> None:
    q, k, v = qkv(heads=6, kv_heads=2, q_len=70)
    check(engine, q, k, v, enable_gqa=True)
    with pytest.raises(ValueError, match="enable_gqa"):
        engine.sparse_attention(q, k, v, **DENSE)


def test_signature_is_torchs() -> None:
    parameters = list(inspect.signature(tamis.sparse_attention).parameters.values())
    names = ["query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"]
    assert [p.name for p in parameters[:8]] == names
    assert [p.default for p in parameters[3:8]] == [None, 0.0, False, None, False]
    ours = ["predictor", "precision", "pv_threshold", "compensate", "backend", "return_stats"]
    assert [p.name for p in parameters[8:]] == ours
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in parameters[8:])
    assert inspect.signature(tamis.sparse_attention).parameters["precision"].default == "int8"


def test_positional_arguments_as_in_torch(engine: Engine) -> None:
    q, k, v = qkv(heads=4, kv_heads=2, q_len=70)
    output, _ = engine.sparse_attention(q, k, v, None, 0.0, True, 0.3, True, **DENSE)
    expected = sdpa(q.double(), k.double(), v.double(), None, 0.0, True, scale=0.3, enable_gqa=True)
    oracle.assert_within(output, expected, sdpa(q, k, v, None, 0.0, True, scale=0.3, enable_gqa=True))


def test_refusals(any_engine: Engine) -> None:
    q, k, v = qkv(q_len=70)
    mask = torch.ones(70, 70, dtype=torch.bool)
    with pytest.raises(ValueError, match="dropout_p"):
        any_engine.sparse_attention(q, k, v, dropout_p=0.1)
    with pytest.raises(ValueError, match=r"attn_mask.*is_causal|is_causal.*attn_mask"):
        any_engine.sparse_attention(q, k, v, attn_mask=mask, is_causal=True)


def test_returns_a_tensor_or_a_pair() -> None:
    q, k, v = qkv(q_len=70)
    alone = tamis.sparse_attention(q, k, v)
    output, stats = tamis.sparse_attention(q, k, v, return_stats=True)
    assert isinstance(alone, Tensor)
    assert isinstance(stats, tamis.AttentionStats)
    assert torch.equal(alone, output)
    assert stats.qk_dtype == "int8"


def test_defaults_are_sparse_and_near(engine: Engine) -> None:
    """On keys that cluster the default skips blocks, and stays within the paper's bound for a language model, .08."""
    n = 1024
    centres = torch.randn(1, 2, n // 64, 32).repeat_interleave(64, 2)
    q, k, v = qkv(q_len=n)
    q, k = q * 0.2 + 3 * centres, k * 0.2 + 3 * centres
    output, stats = engine.sparse_attention(q, k, v, is_causal=True)
    assert 0 < stats.qk_density < 0.6
    assert oracle.relative_l1(output, sdpa(q.double(), k.double(), v.double(), is_causal=True)) < 0.08


def test_mask_and_attend_are_what_it_does(engine: Engine) -> None:
    """The two halves, called apart, are the whole."""
    q, k, v = qkv(heads=4, kv_heads=2, q_len=600)
    predictor = tamis.Sparge(topk=0.3, similarity=-1.0)
    output, stats = engine.sparse_attention(
        q, k, v, is_causal=True, enable_gqa=True, predictor=predictor, precision="full", pv_threshold=2.0
    )
    mask = engine.predict(predictor, q, k, causal=True)
    apart = engine.attend(q, k, v, mask, causal=True, pv_threshold=2.0)
    assert torch.equal(apart.output, output)
    assert torch.equal(apart.stats.counts, stats.counts)
    assert stats.density < 1


def test_what_a_predictor_is_told(any_engine: Engine) -> None:
    """All that decides what is visible, and the scale: a predictor that is not told predicts another attention."""
    q, k, v = qkv(q_len=70, kv_len=130)
    predictor = Recorder()
    options = {"precision": "full", "predictor": predictor, "pv_threshold": None}
    mask = torch.rand(70, 130) > 0.3
    any_engine.sparse_attention(q, k, v, mask, scale=0.3, **options)
    assert predictor.asked["scale"] == 0.3
    assert predictor.asked["attn_mask"] is not None
    assert not predictor.asked.get("causal", False)
    output, _ = any_engine.sparse_attention(q, k, v, is_causal=True, **options)
    assert predictor.asked["causal"] is True
    q_pos, kv_pos = predictor.asked["positions"]
    assert q_pos.flatten().tolist() == list(range(70))
    assert kv_pos is None or kv_pos.flatten().tolist() == list(range(130))
    oracle.assert_within(
        output, sdpa(q.double(), k.double(), v.double(), is_causal=True), sdpa(q, k, v, is_causal=True)
    )
    assert predictor.asked["query"].shape == q.shape


def test_rows_without_keys(engine: Engine) -> None:
    q, k, v = qkv(q_len=130, kv_len=70)
    mask = torch.ones(130, 70, dtype=torch.bool)
    mask[::3] = False
    for precision in ("full", "int8"):
        output, _ = engine.sparse_attention(q, k, v, mask, precision=precision)
        assert (output[:, :, ::3] == 0).all()
        assert output.isfinite().all()


def test_attend_is_bottom_right_where_sparse_attention_is_top_left(engine: Engine) -> None:
    q, k, v = qkv(q_len=70, kv_len=130)
    lower, _ = engine.sparse_attention(q, k, v, causal_lower_right(70, 130), **DENSE)
    torch.testing.assert_close(engine.attend(q, k, v, causal=True).output, lower, rtol=0, atol=2e-6)
    upper, _ = engine.sparse_attention(q, k, v, is_causal=True, **DENSE)
    assert not torch.allclose(upper, lower, atol=1e-2)


@pytest.mark.large
def test_numbers_beyond_defaults(engine: Engine) -> None:
    """Settings reach the engine: a lower pv_threshold skips more, a lower topk keeps less."""
    q, k, v = qkv(q_len=600)
    options: dict[str, Any] = {"precision": "full", "is_causal": True}
    q = q * 4
    loose, tight = (
        engine.sparse_attention(q, k, v, predictor=tamis.Sparge(topk=1.0), pv_threshold=t, **options)[1]
        for t in (50.0, 0.5)
    )
    assert loose.pv_density == loose.qk_density == tight.qk_density == 1.0
    assert tight.pv_density < 0.99
    assert tight.density == pytest.approx((1 + tight.pv_density) / 2)
    assert math.isclose(tight.density, float(tight.density_per_head.mean()), rel_tol=1e-9)


def test_predictor_may_be_a_mask_maker_of_any_kind(engine: Engine) -> None:
    q, k, v = qkv(q_len=300)
    mask = block_mask((300, 300), heads=2)
    output, stats = engine.sparse_attention(
        q, k, v, predictor=lambda query, key, **options: mask, precision="full", pv_threshold=None
    )
    assert torch.equal(output, engine.attend(q, k, v, mask).output)
    assert stats.density == pytest.approx(mask.density())
