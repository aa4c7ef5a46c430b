"""Decoding: one query a head. Heads that share a key may be computed together, which nobody may notice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engines import Engine
from samples import assert_reordered, qkv
from torch import Tensor

import tamis

HEADS, KV_HEADS, KEYS = 12, 3, 200


def inputs(**sizes: Any) -> tuple[Tensor, Tensor, Tensor]:
    return qkv(batch=2, heads=HEADS, kv_heads=KV_HEADS, q_len=1, kv_len=KEYS, dim=24, value_dim=40, **sizes)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "scale": {"scale": -0.3},
    "softcap": {"softcap": 2.0},
    "window": {"causal": True, "window": 70},
    "sinks": {"sink_logits": torch.linspace(-3, 4, HEADS)},
    "mask of each head": {"attn_mask": torch.randn(1, HEADS, 1, KEYS, generator=torch.Generator().manual_seed(1))},
    "bool mask": {"attn_mask": torch.arange(KEYS) % 3 > 0},
    "positions": {"causal": True, "positions": (torch.tensor([120]), torch.arange(KEYS))},
    "segments": {"segments": (torch.tensor([[1], [2]]), torch.arange(KEYS) // 80)},
    "blocks of each head": {
        "block_mask": tamis.BlockMask.from_dense(
            torch.rand(2, HEADS, 1, 4, generator=torch.Generator().manual_seed(2)) < 0.6, seq_lens=(1, KEYS)
        )
    },
}


@pytest.mark.parametrize("name", OPTIONS)
def test_against_the_oracle(engine: Engine, name: str) -> None:
    engine.check(*inputs(), **OPTIONS[name])
    engine.check_int8(*inputs(), **OPTIONS[name])


@pytest.mark.parametrize("precision", ["full", "int8"])
@pytest.mark.parametrize("name", [*OPTIONS, "pv_threshold"])
def test_equals_heads_with_keys_of_their_own(engine: Engine, name: str, precision: str) -> None:
    q, k, v = inputs()
    own = [x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v)]
    options = OPTIONS.get(name, {"pv_threshold": torch.linspace(0.5, 3, HEADS)}) | {"precision": precision}
    shared, apart = engine.attend(q, k, v, **options), engine.attend(q, *own, **options)
    assert shared.output.shape == apart.output.shape
    if (name, precision) == ("blocks of each head", "int8"):
        # Keys are smoothed by the mean of what any head of their group visits: another mean, another rounding.
        assert (shared.output - apart.output).abs().mean() < 0.02 * apart.output.abs().mean()
    else:
        assert_reordered(shared, apart, KEYS)
    assert torch.equal(shared.stats.counts, apart.stats.counts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loop_over_a_growing_pack(engine: Engine, dtype: torch.dtype) -> None:
    """Each step sees what was appended: against packing everything anew with the same mean, bit for bit."""
    q, k, v = qkv(heads=4, kv_heads=2, q_len=40, kv_len=160, dim=16, dtype=dtype)
    with engine.selected():
        packed = tamis.pack_kv(k[:, :, :120], v[:, :, :120])
    for step in range(120, 160):
        with engine.selected():
            packed.append(k[:, :, step : step + 1], v[:, :, step : step + 1])
        row = q[:, :, step - 120 : step - 119]
        result = engine.attend(row, packed, None, causal=True)
        exact = torch.nn.functional.scaled_dot_product_attention(
            row.double(), k[:, :, : step + 1].double(), v[:, :, : step + 1].double(), enable_gqa=True
        )
        assert (result.output - exact).abs().mean() < 0.02 * exact.abs().mean() + torch.finfo(dtype).eps


def test_strided_query(engine: Engine) -> None:
    """A query as models make it: heads behind tokens."""
    q, k, v = inputs()
    strided = q.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(engine.attend(strided, k, v).output, engine.attend(q, k, v).output)
    expanded = q[:, :1].expand(-1, HEADS, -1, -1)
    assert torch.equal(engine.attend(expanded, k, v).output, engine.attend(expanded.clone(), k, v).output)


def test_empty_batch(engine: Engine) -> None:
    q, k, v = inputs()
    result = engine.attend(q[:0], k[:0], v[:0])
    assert result.output.shape == (0, HEADS, 1, 40)
    assert result.lse.shape == (0, HEADS, 1)


@pytest.mark.parametrize("precision", ["full", "int8"])
def test_many_heads_of_one_key_head_are_still_one_row(engine: Engine, precision: str) -> None:
    """Folding makes a tile's worth of rows; stats and formats stay those of a single one."""
    q, k, v = qkv(heads=40, kv_heads=1, q_len=1, kv_len=300, dim=64, dtype=torch.bfloat16)
    result = engine.attend(q, k, v, precision=precision)
    one = engine.attend(q[:, :1], k, v, precision=precision)
    assert (result.stats.qk_dtype, result.stats.pv_dtype) == (one.stats.qk_dtype, one.stats.pv_dtype)
    assert_reordered(tamis.AttentionOutput(result.output[:, :1], result.lse[:, :1]), one, 300)
