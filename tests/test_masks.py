"""Every way to say which keys a row sees, alone and together, against the oracle."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from engines import Engine
from samples import assert_reordered, block_mask, qkv

from tamis import geometry

BATCH, HEADS, KV_HEADS = 2, 4, 2

ALONE = ["bool mask", "additive mask", "causal", "window", "positions", "segments", "softcap", "sinks"]
TOGETHER = [
    ["causal", "window"],
    ["causal", "bool mask"],
    ["causal", "positions", "segments"],
    ["window", "positions"],
    ["segments", "window", "sinks"],
    ["additive mask", "softcap", "sinks", "causal"],
    ["bool mask", "segments", "softcap"],
    ["additive mask", "positions", "causal", "window"],
    ALONE[1:],
]
CASES = [[name] for name in ALONE] + TOGETHER


def options_for(names: list[str], q_len: int, kv_len: int) -> dict[str, Any]:
    """The arguments of attend that the names stand for; segments and positions one per token in no order."""
    additive = torch.randn(BATCH, 1, q_len, kv_len)
    additive[torch.rand_like(additive) < 0.2] = -math.inf
    every: dict[str, dict[str, Any]] = {
        "bool mask": {"attn_mask": torch.rand(BATCH, HEADS, q_len, kv_len) > 0.3},
        "additive mask": {"attn_mask": additive},
        "causal": {"causal": True},
        "window": {"window": 90},
        "positions": {
            "positions": (
                torch.randperm(kv_len)[:q_len] if q_len <= kv_len else torch.randperm(q_len),
                torch.randperm(kv_len),
            )
        },
        "segments": {"segments": (torch.randint(-1, 3, (BATCH, q_len)), torch.randint(-1, 3, (BATCH, kv_len)))},
        "softcap": {"softcap": 2.5},
        "sinks": {"sink_logits": torch.randn(HEADS)},
    }
    chosen: dict[str, Any] = {}
    for name in names:
        chosen |= every[name]
    return chosen


@pytest.mark.parametrize("names", CASES, ids="+".join)
def test_against_the_oracle(engine: Engine, names: list[str]) -> None:
    for q_len, kv_len in ((130, 200), (200, 130)):
        q, k, v = qkv(batch=BATCH, heads=HEADS, kv_heads=KV_HEADS, q_len=q_len, kv_len=kv_len, dim=20)
        options = options_for(names, q_len, kv_len)
        engine.check(q, k, v, **options)
        mask = block_mask((q_len, kv_len), batch=BATCH, heads=HEADS, block_size=(64, 64), density=0.6)
        engine.check(q, k, v, block_mask=mask, **options)


@pytest.mark.parametrize(
    "shape", [(130, 200), (1, 200), (130, 1), (1, 1, 1, 200), (4, 130, 200), (2, 1, 1, 200), (2, 4, 130, 1)]
)
@pytest.mark.parametrize("kind", ["bool", "float32", "bfloat16"])
def test_attn_mask_broadcasts(engine: Engine, shape: tuple[int, ...], kind: str) -> None:
    dtype = torch.float32 if kind == "bool" else getattr(torch, kind)
    q, k, v = qkv(batch=2, heads=4, kv_heads=2, q_len=130, kv_len=200, dim=20, dtype=dtype)
    attn_mask = torch.rand(shape) > 0.3 if kind == "bool" else (torch.randn(shape) * 3).to(dtype)
    engine.check(q, k, v, attn_mask=attn_mask)


def test_strided_attn_mask(engine: Engine) -> None:
    q, k, v = qkv(q_len=130, kv_len=200, dim=20)
    for mask in (torch.rand(200, 130).T > 0.3, torch.randn(130, 400)[:, ::2], torch.randn(2, 200, 130).transpose(1, 2)):
        engine.check(q, k, v, attn_mask=mask, causal=True)


@pytest.mark.parametrize("window", [1, 2, 64, 65, 128, 1000])
def test_windows(engine: Engine, window: int) -> None:
    q, k, v = qkv(q_len=150, kv_len=290, dim=20)
    engine.check(q, k, v, window=window)
    engine.check(q, k, v, window=window, causal=True)
    engine.check(q, k, v, window=window, causal=True, block_mask=block_mask((150, 290), heads=2, density=0.7))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("batched", [False, True], ids=["shared", "per batch"])
def test_positions(engine: Engine, dtype: torch.dtype, batched: bool) -> None:
    """Positions may repeat, have gaps, be negative, or lie far from 0 and beyond 32 bits of distance."""
    q, k, v = qkv(batch=2, q_len=130, kv_len=200, dim=20)
    lead = (2,) if batched else ()
    q_pos, kv_pos = (torch.randint(-300, 300, (*lead, n)).to(dtype) for n in (130, 200))
    for window in (None, 50):
        engine.check(q, k, v, causal=True, window=window, positions=(q_pos, kv_pos))
    extreme = torch.iinfo(dtype)
    far = torch.where(kv_pos > 0, extreme.max - 1, kv_pos)
    engine.check(q, k, v, causal=True, positions=(q_pos, far))


def test_one_side_by_default(engine: Engine) -> None:
    """None stands for a side's default: the usual positions, segment 0."""
    q, k, v = qkv(q_len=130, kv_len=200, dim=20)
    q_pos, kv_pos = torch.arange(130) + 70, torch.arange(200)
    segment, zeros = torch.randint(-1, 2, (200,)), torch.zeros(130, dtype=torch.int64)
    whole = engine.attend(q, k, v, causal=True, positions=(q_pos, kv_pos), segments=(zeros, segment))
    for given in ((None, kv_pos), (q_pos, None), (None, None), None):
        result = engine.attend(q, k, v, causal=True, positions=given, segments=(None, segment))
        assert_reordered(result, whole, 200)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_masks_of_the_most_negative_number(engine: Engine, dtype: torch.dtype) -> None:
    """A stand-in for -inf: it hides a key among others, but a row of nothing else is still a softmax, as in torch."""
    q, k, v = qkv(q_len=70, kv_len=130, dim=20, dtype=dtype)
    lowest = torch.finfo(dtype).min
    mask = torch.zeros(70, 130, dtype=dtype).masked_fill(torch.rand(70, 130) < 0.4, lowest)
    mask[7] = lowest
    engine.check(q, k, v, attn_mask=mask, yardstick=torch.float32)


def test_window_between_extreme_positions(engine: Engine) -> None:
    """A distance that does not fit the integers of the positions is still a distance, never a wrapped one."""
    q, k, v = qkv(q_len=3, kv_len=70, dim=20)
    q_pos = torch.tensor([-(2**31), 2**31 - 1, 0], dtype=torch.int32)
    kv_pos = torch.arange(70, dtype=torch.int32)
    kv_pos[3:6] = torch.tensor([2**31 - 1, -(2**31), 2**31 - 5], dtype=torch.int32)
    for causal in (False, True):
        engine.check(q, k, v, causal=causal, window=10, positions=(q_pos, kv_pos))


@pytest.mark.parametrize("batched", [False, True], ids=["shared", "per batch"])
def test_padding_segments(engine: Engine, batched: bool) -> None:
    """A negative segment sees nothing and is seen by nothing, not even by its own kind."""
    q, k, v = qkv(batch=2, q_len=200, dim=20)
    segment = torch.where(torch.arange(200) < 130, 0, -1)
    segment = torch.stack([segment, torch.full_like(segment, 7)]) if batched else segment
    result = engine.check(q, k, v, causal=True, segments=(segment, segment))
    assert (result.lse[0, :, 130:] == -math.inf).all()


def test_packed_documents_equal_separate_calls(engine: Engine) -> None:
    q, k, v = qkv(q_len=200, dim=20)
    lengths = [70, 1, 129]
    segment = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    packed = engine.attend(q, k, v, causal=True, segments=(segment, segment))
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        alone = engine.check(q[:, :, part], k[:, :, part], v[:, :, part], causal=True)
        # The two group the same sums into different key blocks: some fp32 rounding of values of size about 1.
        torch.testing.assert_close(packed.output[:, :, part], alone.output, rtol=0, atol=2e-6)
        start += length


def test_sink_is_a_key_of_value_zero(engine: Engine) -> None:
    q, k, v = qkv(heads=4, kv_heads=2, q_len=70, kv_len=130, dim=20)
    sinks = torch.tensor([-2.0, 0.0, 3.0, 50.0])
    plain, sunk = engine.attend(q, k, v), engine.check(q, k, v, sink_logits=sinks)
    share = torch.sigmoid(plain.lse - sinks[:, None])[..., None]
    torch.testing.assert_close(sunk.output, plain.output * share, rtol=1e-5, atol=1e-6)
    none = engine.attend(q, k, v, sink_logits=torch.full((4,), -math.inf))
    torch.testing.assert_close(none.output, plain.output, rtol=0, atol=1e-6)


def test_rows_that_see_only_the_sink(engine: Engine) -> None:
    """Such a row returns 0, and as lse its sink, so that merging with another part stays exact."""
    q, k, v = qkv(q_len=130, kv_len=70, dim=20)
    sinks = torch.tensor([0.5, -1.0])
    result = engine.check(q, k, v, causal=True, sink_logits=sinks)
    assert (result.output[:, :, :60] == 0).all()
    assert (result.lse[0, :, :60] == sinks[:, None]).all()


@pytest.mark.parametrize("softcap", [0.5, 50.0])
def test_softcap(engine: Engine, softcap: float) -> None:
    q, k, v = qkv(q_len=130, dim=20)
    engine.check(q * 2, k * 2, v, softcap=softcap, causal=True)


@pytest.mark.parametrize("names", CASES, ids="+".join)
def test_int8_against_its_formulas(engine: Engine, names: list[str]) -> None:
    q, k, v = qkv(batch=BATCH, heads=HEADS, kv_heads=KV_HEADS, q_len=130, kv_len=200, dim=20)
    options = options_for(names, 130, 200)
    mask = block_mask((130, 200), batch=BATCH, heads=HEADS, block_size=(64, 128), density=0.6)
    engine.check_int8(q, k, v, block_mask=mask, **options)


@pytest.mark.parametrize("lengths", [(1, 4099), (3000, 1), (3000, 4099)], ids=str)
def test_a_mask_is_reduced_in_few_steps(lengths: tuple[int, int]) -> None:
    """However many blocks it has: on a GPU each step is a kernel. None of them copies the mask."""
    mask = torch.rand(1, 2, *lengths) > 0.999
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        seen = geometry.mask_blocks(mask, 3000, 4099, 128, 64)
    steps = [event for event in profile.events() if event.name in ("aten::amax", "aten::cat", "aten::copy_")]
    assert 0 < len(steps) <= 8
    assert max(event.cpu_memory_usage for event in profile.events()) <= max(mask.numel() // 8, seen.numel())
    rows, keys = (geometry.num_blocks(length, block) for length, block in ((3000, 128), (4099, 64)))
    assert seen.shape == (1, 2, rows, keys)
    for row in range(rows):
        for key in (0, 1, keys - 1):
            part = mask.expand(1, 2, 3000, 4099)[..., row * 128 : row * 128 + 128, key * 64 : key * 64 + 64]
            assert torch.equal(seen[..., row, key], part.any(-1).any(-1))
