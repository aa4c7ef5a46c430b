"""Defects that were found once, each by the input that showed it."""

from __future__ import annotations

import sys
from typing import Any

import oracle
import pytest
import torch
from engines import Engine
from samples import qkv
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.nn.functional import scaled_dot_product_attention

import tamis


def test_keys_that_a_mask_hides_do_not_coarsen_int8(engine: Engine) -> None:
    """Padding inside a block that is used entered the key mean and the scales of the block: relative L1 was .74."""
    q, k, v = qkv(heads=1, q_len=130, kv_len=300, dim=64)
    shown = torch.arange(300) < 270
    options: dict[str, Any] = {"attn_mask": shown[None], "precision": "int8"}
    clean = engine.attend(q, k, v, **options)
    k[:, :, ~shown], v[:, :, ~shown] = 1e3, 1e3
    assert torch.equal(engine.attend(q, k, v, **options).output, clean.output)
    assert oracle.relative_l1(clean.output, oracle.attention(q, k, v, attn_mask=shown[None]).output) < 0.02


def test_a_window_without_an_end(engine: Engine) -> None:
    """sys.maxsize overflowed when a position was added to it."""
    q, k, v = qkv(q_len=200)
    unlimited = engine.attend(q, k, v, causal=True)
    for window in (sys.maxsize, 2**70):
        assert torch.equal(engine.attend(q, k, v, causal=True, window=window).output, unlimited.output)


@pytest.mark.parametrize("cap", [50.0, 1e4, 1e30])
def test_large_softcaps(engine: Engine, cap: float) -> None:
    """(1 - t) / (1 + t) cancelled where scores are far below the cap: the error grew with it."""
    q, k, v = qkv(q_len=100)
    engine.check(q, k, v, softcap=cap)


def test_bias_objects_are_no_masks() -> None:
    """Their memory is uninitialised: as an additive mask they showed every token the future."""
    q, k, v = qkv(q_len=100)
    for bias in (causal_upper_left(100, 100), causal_lower_right(100, 100)):
        with pytest.raises(TypeError, match="attn_mask"):
            tamis.attend(q, k, v, attn_mask=bias)
        with pytest.raises(TypeError, match="attn_mask"):
            tamis.Sparge()(q, k, attn_mask=bias)
        expected = scaled_dot_product_attention(q, k, v, is_causal=True)
        output = tamis.sparse_attention(
            q, k, v, attn_mask=bias, predictor=tamis.Sparge(cdf=1.0), precision="full", pv_threshold=None
        )
        torch.testing.assert_close(output, expected)


def test_lists_of_another_length_in_a_compiled_graph() -> None:
    """The door cannot look at shapes while a graph is traced: native code read behind the end of the lists."""

    def run(q: torch.Tensor, num: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        mask = tamis.BlockMask(num, indices, (64, 64), (q.shape[2], q.shape[2]))
        return tamis.attend(q, q, q, mask).output

    compiled = torch.compile(run, fullgraph=True, backend="eager", dynamic=True)
    q = torch.randn(1, 1, 512, 16)
    num, indices = torch.ones(1, 1, 8, dtype=torch.int32), torch.arange(8, dtype=torch.int32).view(1, 1, 8, 1)
    assert compiled(q, num, indices).isfinite().all()
    with pytest.raises(ValueError, match="block_mask"):
        compiled(q, num[:, :, :2], indices[:, :, :2])


def test_numbers_in_a_compiled_graph() -> None:
    q = torch.randn(1, 2, 70, 16)
    softcap = torch.compile(lambda x, c: tamis.attend(x, x, x, softcap=c).output, fullgraph=True, backend="eager")
    softcap(q, 4.0)
    with pytest.raises(ValueError, match="softcap"):
        softcap(q, -5.0)
    threshold = torch.compile(
        lambda x, t: tamis.attend(x, x, x, pv_threshold=t).output, fullgraph=True, backend="eager"
    )
    with pytest.raises(ValueError, match="pv_threshold"):
        threshold(q, torch.tensor([-5.0, float("nan")]))


@pytest.mark.parametrize(
    ("name", "value"), [("softcap", 1e-50), ("pv_threshold", 1e-50), ("scale", 1e300), ("pv_threshold", "3")]
)
def test_numbers_that_are_none_in_fp32(name: str, value: object) -> None:
    q = torch.randn(1, 1, 10, 8)
    options: dict[str, Any] = {name: value}
    with pytest.raises((ValueError, TypeError), match=name):
        tamis.attend(q, q, q, **options)


def test_leading_dimensions_are_not_exchanged() -> None:
    a, b = torch.randn(2, 3, 2, 16, 8), torch.randn(3, 2, 2, 16, 8)
    with pytest.raises(ValueError, match="key has leading"):
        tamis.attend(a, b, b)


def test_ties_are_no_reason_to_keep_more(engine: Engine) -> None:
    """Half of 100 equal blocks is 50 of them; another order of summation made it 51."""
    mask = engine.predict(tamis.Sparge(cdf=0.5, similarity=-1), torch.zeros(1, 1, 128, 16), torch.randn(1, 1, 6400, 16))
    assert int(mask.kv_num_blocks) == 50


def test_keys_near_the_end_of_the_range(engine: Engine) -> None:
    """The sum of 64 of them is infinite in fp32, their mean is not."""
    k = torch.full((1, 1, 128, 4), 3e37) + torch.randn(1, 1, 128, 4) * 1e36
    q, v = torch.randn(1, 1, 128, 4) * 1e-37, torch.randn(1, 1, 128, 4)
    assert engine.attend(q, k, v, precision="int8").output.isfinite().all()
