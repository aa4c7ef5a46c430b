"""attend_varlen: sequences of different lengths packed one after another, each as if it were alone."""

from __future__ import annotations

import math
from typing import Any

import oracle
import pytest
import torch
from engines import Engine
from hypothesis import given
from hypothesis import strategies as st
from samples import block_mask
from torch import Tensor

import tamis


def offsets(lengths: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def packed(
    q_lens: list[int], kv_lens: list[int], *, heads: int = 4, kv_heads: int = 2, dim: int = 20, value_dim: int = 12
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(sum(q_lens), heads, dim),
        torch.randn(sum(kv_lens), kv_heads, dim),
        torch.randn(sum(kv_lens), kv_heads, value_dim),
    )


def check(engine: Engine, q_lens: list[int], kv_lens: list[int], **options: Any) -> Any:
    """Against the oracle on every sequence alone."""
    q, k, v = packed(q_lens, kv_lens)
    dtype = options.pop("dtype", torch.float32)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    result = engine.attend_varlen(q, k, v, offsets(q_lens), offsets(kv_lens), **options)
    assert result.output.shape == (sum(q_lens), 4, 12)
    assert result.output.dtype == dtype
    assert result.lse.shape == (4, sum(q_lens))
    q_at = kv_at = 0
    for q_len, kv_len in zip(q_lens, kv_lens, strict=True):
        rows, keys = slice(q_at, q_at + q_len), slice(kv_at, kv_at + kv_len)
        alone = [x.transpose(0, 1)[None] for x in (q[rows], k[keys], v[keys])]
        if q_len and kv_len:
            expected = oracle.attention(*alone, **options)
            plain = oracle.attention(*alone, **options, dtype=dtype)
            plains = [oracle.attention(*alone, **options, dtype=torch.float32).lse]
            if result.stats.pv_dtype == "bfloat16":
                plains.append(oracle.attention_bf16(*alone, **options, rounds=False).lse)
            oracle.assert_within(result.output[rows].transpose(0, 1)[None], expected.output, plain.output)
            oracle.assert_within(result.lse[None, :, rows], expected.lse, *plains, what="lse")
        q_at, kv_at = q_at + q_len, kv_at + kv_len
    return result


@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"window": 30}, {"causal": True, "window": 30, "scale": 0.5}], ids=str
)
def test_every_sequence_alone(engine: Engine, options: dict[str, Any]) -> None:
    check(engine, [70, 1, 129], [70, 1, 129], **options)
    check(engine, [1, 1, 1, 1], [5, 200, 64, 1], **options)
    check(engine, [200, 3, 64], [1, 140, 64], **options)


def test_half(engine: Engine) -> None:
    check(engine, [70, 30], [100, 30], causal=True, dtype=torch.bfloat16)
    check(engine, [70, 30], [100, 30], dtype=torch.float16)


def test_empty_sequences(engine: Engine) -> None:
    """Sequences without queries, without keys, without either."""
    result = check(engine, [5, 0, 7, 0, 3], [5, 9, 0, 0, 3], causal=True)
    assert (result.output[5:12] == 0).all()
    assert (result.lse[:, 5:12] == -math.inf).all()


@given(
    lengths=st.lists(st.tuples(st.integers(0, 90), st.integers(0, 90)), min_size=1, max_size=6), causal=st.booleans()
)
def test_any_lengths(lengths: list[tuple[int, int]], causal: bool) -> None:
    q_lens, kv_lens = ([max(x, 1) if i == 0 else x for i, x in enumerate(side)] for side in zip(*lengths, strict=True))
    for engine in (Engine("reference", None), *best()):
        check(engine, q_lens, kv_lens, causal=causal)


def best() -> list[Engine]:
    from engines import engines

    return engines()[-1:]


def test_one_sequence_is_attend(engine: Engine) -> None:
    q, k, v = packed([130], [200])
    varlen = engine.attend_varlen(q, k, v, offsets([130]), offsets([200]), causal=True)
    plain = engine.attend(*(x.transpose(0, 1)[None] for x in (q, k, v)), causal=True)
    torch.testing.assert_close(varlen.output.transpose(0, 1), plain.output[0], rtol=0, atol=2e-6)
    torch.testing.assert_close(varlen.lse, plain.lse[0], rtol=0, atol=2e-6)


def test_block_mask_is_over_the_packed_axis(engine: Engine) -> None:
    q_lens, kv_lens = [130, 70], [100, 200]
    q, k, v = packed(q_lens, kv_lens)
    mask = block_mask((200, 300), heads=4, density=0.6)
    result = engine.attend_varlen(q, k, v, offsets(q_lens), offsets(kv_lens), mask, causal=True)
    inputs = [x.transpose(0, 1)[None] for x in (q, k, v)]
    segments = (torch.tensor([0] * 130 + [1] * 70), torch.tensor([0] * 100 + [1] * 200))
    positions = (
        torch.cat([torch.arange(130) - 30, torch.arange(70) + 130]),
        torch.cat([torch.arange(100), torch.arange(200)]),
    )
    options: dict[str, Any] = {
        "causal": True,
        "segments": segments,
        "positions": positions,
        "blocks": oracle.blocks_of(mask),
    }
    expected = oracle.attention(*inputs, **options)
    plain = oracle.attention(*inputs, **options, dtype=torch.float32)
    oracle.assert_within(result.output.transpose(0, 1)[None], expected.output, plain.output)


def test_int8(engine: Engine) -> None:
    q_lens, kv_lens = [130, 70], [100, 200]
    q, k, v = packed(q_lens, kv_lens)
    result = engine.attend_varlen(q, k, v, offsets(q_lens), offsets(kv_lens), causal=True, precision="int8")
    inputs = [x.transpose(0, 1)[None] for x in (q, k, v)]
    segments = (torch.tensor([0] * 130 + [1] * 70), torch.tensor([0] * 100 + [1] * 200))
    positions = (
        torch.cat([torch.arange(130) - 30, torch.arange(70) + 130]),
        torch.cat([torch.arange(100), torch.arange(200)]),
    )
    options: dict[str, Any] = {"causal": True, "segments": segments, "positions": positions}
    expected, formulas = oracle.attention(*inputs, **options), oracle.attention_int8(*inputs, **options)
    plain = oracle.attention(*inputs, **options, dtype=torch.float32)
    oracle.assert_within(result.output.transpose(0, 1)[None], expected.output, formulas.output, plain.output)
    oracle.assert_within(result.lse[None], expected.lse, formulas.lse, plain.lse, what="lse")
    assert result.stats.qk_dtype == "int8"


def test_no_sequence_sees_another(engine: Engine) -> None:
    q, k, v = packed([70, 60], [70, 60])
    cu = offsets([70, 60])
    clean = engine.attend_varlen(q, k, v, cu, cu)
    for bad in (math.nan, math.inf):
        result = engine.attend_varlen(
            q, k.index_fill(0, torch.tensor([69]), bad), v.index_fill(0, torch.tensor([69]), bad), cu, cu
        )
        assert torch.equal(result.output[70:], clean.output[70:])
        assert torch.equal(result.lse[:, 70:], clean.lse[:, 70:])
        assert result.output[:70].isnan().all()


def test_strided_and_wide_offsets(engine: Engine) -> None:
    q, k, v = packed([70, 60], [70, 60], heads=2, kv_heads=2, value_dim=20)
    cu = offsets([70, 60])
    expected = engine.attend_varlen(q, k, v, cu, cu, causal=True)
    fused = torch.stack([q, k, v], 1)
    views = engine.attend_varlen(fused[:, 0], fused[:, 1], fused[:, 2], cu.long(), cu.long(), causal=True)
    torch.testing.assert_close(views.output, expected.output, rtol=0, atol=2e-6)


def test_density_counts_blocks_that_meet(engine: Engine) -> None:
    """Blocks of sequences that never meet are not visible: a dense call has density 1, and so has a full mask."""
    q, k, v = packed([128, 128], [128, 128])
    cu = offsets([128, 128])
    assert engine.attend_varlen(q, k, v, cu, cu).stats.density == 1.0
    mask = block_mask((256, 256), density=1.1)
    assert engine.attend_varlen(q, k, v, cu, cu, mask).stats.density == 1.0


@pytest.mark.parametrize(
    ("cu", "error"),
    [
        ([0, 80, 70, 130], ValueError),
        ([0, 70, 129], ValueError),
        ([0, 70, 131], ValueError),
        ([1, 70, 130], ValueError),
        ([-1, 70, 130], ValueError),
        ([[0, 130]], ValueError),
        ([0.0, 130.0], TypeError),
        ([], (TypeError, ValueError)),
    ],
    ids=str,
)
@pytest.mark.parametrize("side", ["cu_seqlens_q", "cu_seqlens_kv"])
def test_bad_offsets(cu: list[Any], error: Any, side: str) -> None:
    q, k, v = packed([130], [130])
    wrong = torch.tensor(cu)
    wrong = wrong if wrong.is_floating_point() else wrong.int()
    right = torch.linspace(0, 130, max(len(cu), 2)).int()
    both: dict[str, Any] = {"cu_seqlens_q": right, "cu_seqlens_kv": right} | {side: wrong}
    with pytest.raises(error, match=side):
        tamis.attend_varlen(q, k, v, **both)


def test_offsets_must_agree_and_tensors_be_packed() -> None:
    q, k, v = packed([130], [130])
    with pytest.raises(ValueError, match="cu_seqlens"):
        tamis.attend_varlen(q, k, v, offsets([130]), offsets([100, 30]))
    with pytest.raises(ValueError, match="query"):
        tamis.attend_varlen(q[None], k, v, offsets([130]), offsets([130]))
    with pytest.raises(TypeError, match="cu_seqlens_q"):
        tamis.attend_varlen(q, k, v, [0, 130], offsets([130]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="block_mask"):
        tamis.attend_varlen(q, k, v, offsets([130]), offsets([130]), block_mask((131, 130)))
