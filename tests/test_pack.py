"""pack_kv and PackedKV: quantise once, attend many times, append while decoding."""

from __future__ import annotations

import math
from typing import Any

import oracle
import pytest
import torch
from engines import DEVICE, Engine, value_step
from samples import assert_reordered, block_mask, qkv
from torch import Tensor

import tamis

BLOCKS = 6  # the tensors of a PackedKV that have one entry per block, before the mean and the length


def pack(engine: Engine, key: Tensor, value: Tensor) -> Any:
    """Packed by the engine; on a GPU by a CPU."""
    with engine.selected():
        return tamis.pack_kv(key, value, backend=engine.backend if DEVICE == "cpu" else None)


def stored(packed: Any) -> list[Tensor]:
    """What is stored for the blocks in use."""
    blocks = -(-packed.length // 64)
    return [x[:, :, :blocks] for x in packed.tensors[:BLOCKS]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("length", "dim", "value_dim"), [(1, 32, 32), (200, 40, 24), (128, 7, 5), (65, 256, 1)])
def test_attending_to_packed_is_attending(
    engine: Engine, dtype: torch.dtype, length: int, dim: int, value_dim: int
) -> None:
    q, k, v = qkv(batch=2, heads=4, kv_heads=2, q_len=70, kv_len=length, dim=dim, value_dim=value_dim, dtype=dtype)
    packed = pack(engine, k, v)
    engine.check_int8(q, k, v, packed=packed, formulas={"mean": oracle.key_mean(k)}, causal=True)
    at_once = engine.attend(q, k, v, precision="int8")
    again = engine.attend(q, packed, None, precision="int8")
    if (
        dtype == torch.float32 and at_once.stats.pv_dtype != "bfloat16"
    ):  # which a pack's values are only in the second place
        assert_reordered(again, at_once, length)


def test_every_option_works_on_packed(engine: Engine) -> None:
    q, k, v = qkv(batch=2, heads=4, kv_heads=2, q_len=130, kv_len=200)
    packed = pack(engine, k, v)
    cases: list[dict[str, Any]] = [
        {"window": 70, "causal": True},
        {"attn_mask": torch.rand(130, 200) > 0.3},
        {"attn_mask": torch.randn(2, 4, 130, 200)},
        {"segments": (torch.randint(0, 2, (130,)), torch.randint(-1, 2, (200,)))},
        {"positions": (torch.randperm(200)[:130], torch.randperm(200)), "causal": True},
        {"sink_logits": torch.randn(4)},
        {"scale": 0.3},
    ]
    for options in cases:
        formulas: dict[str, Any] = {"mean": oracle.key_mean(k)}
        if "segments" in options:  # packing knows no segments: every key counts for its scales
            seen = oracle.visible(130, 200, segments=options["segments"]).expand(2, 4, 130, 200)
            formulas |= {"segments": None, "attn_mask": seen}
        engine.check_int8(q, k, v, packed=packed, formulas=formulas, **options)
    mask = block_mask((130, 200), batch=2, heads=4)
    engine.check_int8(q, k, v, packed=packed, formulas={"mean": oracle.key_mean(k)}, block_mask=mask)


def test_softcap_on_packed(engine: Engine) -> None:
    """A softcap cares about the mean that packing took away, so it is put back first."""
    q, k, v = qkv(q_len=70, kv_len=200)
    k = k + 3 * torch.randn(32)
    packed = pack(engine, k, v)
    engine.check_int8(q, k, v, packed=packed, softcap=2.0)


@pytest.mark.parametrize("steps", [[1] * 70, [63, 1, 1], [64, 64], [200], [5, 60, 70]], ids=str)
@pytest.mark.parametrize("start", [1, 64, 100])
def test_append_is_packing_the_whole(engine: Engine, start: int, steps: list[int]) -> None:
    """Given the same mean, the same integers and the same scales, however the tokens came."""
    total = start + sum(steps)
    _, k, v = qkv(batch=2, kv_len=total, dim=20, value_dim=12)
    packed = pack(engine, k[:, :, :start], v[:, :, :start])
    at = start
    with engine.selected():
        for step in steps:
            packed = packed.append(k[:, :, at : at + step], v[:, :, at : at + step])
            at += step
    assert packed.length == total
    with engine.selected():
        whole = torch.ops.tamis.pack_kv(k, v, packed.tensors[6], None, engine.backend)
    torch.testing.assert_close(packed.tensors[6].double(), oracle.key_mean(k[:, :, :start]), rtol=0, atol=1e-6)
    for ours, theirs in zip(stored(packed), whole, strict=True):
        assert torch.equal(ours, theirs)


def test_append_never_requantises_full_blocks(engine: Engine) -> None:
    _, k, v = qkv(kv_len=200)
    packed = pack(engine, k[:, :, :130], v[:, :, :130])
    before = [x[:, :, :2].clone() for x in packed.tensors[:BLOCKS]]
    with engine.selected():
        packed = packed.append(1e3 * k[:, :, 130:], 1e3 * v[:, :, 130:])
    for ours, theirs in zip(packed.tensors[:BLOCKS], before, strict=True):
        assert torch.equal(ours[:, :, :2], theirs)


def test_decoding_token_by_token(engine: Engine) -> None:
    """One query against a growing cache, every step within the error of the formulas."""
    q, k, v = qkv(batch=2, heads=4, kv_heads=1, q_len=150, dim=20)
    packed = pack(engine, k[:, :, :60], v[:, :, :60])
    mean = oracle.key_mean(k[:, :, :60])
    for n in range(61, 150, 1 if engine.backend == "cpu" else 11):
        with engine.selected():
            packed = packed.append(k[:, :, packed.length : n], v[:, :, packed.length : n])
        query = q[:, :, n - 1 : n]
        if n % 12 == 0:
            engine.check_int8(query, k[:, :, :n], v[:, :, :n], packed=packed, formulas={"mean": mean}, causal=True)
        else:
            assert engine.attend(query, packed, None, causal=True, precision="int8").output.isfinite().all()


def test_room_behind_the_length_is_never_read(engine: Engine) -> None:
    q, k, v = qkv(q_len=3, kv_len=130)
    packed = pack(engine, k, v)
    with engine.selected():
        packed = packed.append(k[:, :, :1], v[:, :, :1])
        while -(-packed.length // 64) == packed.tensors[0].shape[2]:
            packed = packed.append(k[:, :, :64], v[:, :, :64])
    clean = engine.attend(q, packed, None, precision="int8")
    used = -(-packed.length // 64)
    assert packed.tensors[0].shape[2] > used
    for x in packed.tensors[:BLOCKS]:
        x[:, :, used:] = math.nan if x.is_floating_point() else torch.iinfo(x.dtype).max
    result = engine.attend(q, packed, None, precision="int8")
    assert torch.equal(result.output, clean.output)
    assert torch.equal(result.lse, clean.lse)


@pytest.mark.parametrize("mixed", [1, 8], ids=["as on a GPU", "as on a CPU"])
def test_packs_of_other_backends(engine: Engine, mixed: int) -> None:
    """Keys with a mean and a large channel, whose channels are mixed or not, whatever this engine does itself."""
    q, k, v = qkv(heads=4, kv_heads=2, q_len=70, kv_len=200, dim=40)
    k = k * torch.tensor([5.0] + 39 * [1.0]) + torch.randn(40)
    as_packed = k if mixed > 1 else (k.double() @ oracle.mixer(40).T).float()
    packed = tamis.pack_kv(as_packed, v, backend="reference")
    tensors = [*packed.tensors[:6], k.mean(2)]
    packed = tamis.PackedKV(tensors, 200, mixed, packed._tail, "reference")
    result, formulas = engine.check_int8(q, k, v, packed=packed, formulas={"mixes": mixed > 1}, causal=True)
    assert oracle.relative_l1(result.output, formulas.output) <= 1e-3 + value_step(result.stats)


@pytest.mark.parametrize("dim", [1, 7, 20, 40, 64, 80, 96, 128, 192, 256, 320])
def test_packs_are_those_of_the_reference(engine: Engine, dim: int) -> None:
    """Bit for bit: of rows that are whole vectors, or whole tiles, or neither; the last block is not full."""
    if engine.backend != "cpu":
        pytest.skip("compared with the reference")
    _, k, v = qkv(kv_heads=2, kv_len=150, dim=dim, value_dim=dim)
    # Sums of 16ths are the same in any order, and so is their mean: 3.
    k = torch.round(k * 16) / 16
    k = 3 + torch.cat([k[:, :, :75], -k[:, :, :75]], 2)
    v[..., dim // 2] = 0
    expected = tamis.pack_kv(k, v, backend="reference")
    for ours, reference in zip(stored(pack(engine, k, v)), stored(expected), strict=True):
        assert torch.equal(ours, reference)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_what_is_broken_is_packed_as_zeros(engine: Engine, broken: float) -> None:
    """With a NaN for a scale, and sums that are those of the bytes."""
    if engine.backend != "cpu":
        pytest.skip("about the bytes of one backend")
    _, k, v = qkv(heads=1, kv_heads=1, kv_len=150, dim=40, value_dim=24)
    k[0, 0, 70, 3] = v[0, 0, 70, 20] = broken
    key, key_scale, key_sum, value, value_scale, value_sum = stored(pack(engine, k, v))
    assert key_scale[0, 0].isnan().tolist() == [False, True, False]
    assert value_scale[0, 0].isnan().nonzero().tolist() == [[1, 20]]
    assert not key[0, 0, 1].any()
    assert not value[0, 0, 1, 20].any()
    assert torch.equal(key.sum(-1, dtype=torch.int32), key_sum)
    assert torch.equal(value.sum(-1, dtype=torch.int32), value_sum)


def test_packed_is_small() -> None:
    """A quarter of fp32 plus scales and sums: what a cache is kept quantised for."""
    _, k, v = qkv(heads=2, kv_len=4096, dim=64)
    packed = tamis.pack_kv(k, v)
    size = sum(x.numel() * x.element_size() for x in packed.tensors)
    assert size < 0.31 * (k.numel() + v.numel()) * 4


def test_append_does_not_double_the_memory(engine: Engine) -> None:
    """One key more than 64 full blocks: an eighth of room at most, and the same integers as packing the whole."""
    _, k, v = qkv(heads=1, kv_len=4097, dim=8)
    packed = pack(engine, k[:, :, :4096], v[:, :, :4096])
    with engine.selected():
        packed = packed.append(k[:, :, 4096:], v[:, :, 4096:])
        whole = torch.ops.tamis.pack_kv(k, v, packed.tensors[6], None, engine.backend)
    assert 4097 <= packed.capacity <= 4096 * 9 / 8
    for ours, theirs in zip(stored(packed), whole, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("inside", [False, True], ids=["append outside", "append inside"])
def test_inference_mode_may_end_between_packing_and_appending(engine: Engine, inside: bool) -> None:
    """Room is left in the last block, so that append writes into what packing made; then it grows."""
    q, k, v = qkv(q_len=3, kv_len=200)
    with torch.inference_mode(not inside):
        packed = pack(engine, k[:, :, :100], v[:, :, :100])
    for start, stop in ((100, 110), (110, 200)):
        with torch.inference_mode(inside), engine.selected():
            packed = packed.append(k[:, :, start:stop], v[:, :, start:stop])
        with torch.inference_mode(not inside), engine.selected():
            whole = torch.ops.tamis.pack_kv(k[:, :, :stop], v[:, :, :stop], packed.tensors[6], None, engine.backend)
        for ours, theirs in zip(stored(packed), whole, strict=True):
            assert torch.equal(ours, theirs)
    assert engine.attend(q, packed, None).output.isfinite().all()


def test_packing_does_not_alias(engine: Engine) -> None:
    q, k, v = qkv(q_len=3, kv_len=130)
    packed = pack(engine, k, v)
    before = engine.attend(q, packed, None, precision="int8").output
    k.fill_(math.nan)
    v.fill_(math.nan)
    assert torch.equal(engine.attend(q, packed, None, precision="int8").output, before)
    with engine.selected():
        packed = packed.append(torch.ones(1, 2, 1, 32), torch.ones(1, 2, 1, 32))
    assert engine.attend(q, packed, None, precision="int8").output.isfinite().all()


def test_a_pack_says_its_precision() -> None:
    q, k, v = qkv(q_len=3, kv_len=130)
    packed = tamis.pack_kv(k, v)
    result = tamis.attend(q, packed, None)
    assert result.stats is not None
    assert result.stats.qk_dtype == "int8"
    assert torch.equal(result.output, tamis.attend(q, packed, None, precision="int8").output)


def test_refusals() -> None:
    q, k, v = qkv(q_len=3, kv_len=130)
    packed = tamis.pack_kv(k, v)
    with pytest.raises(ValueError, match="value"):
        tamis.attend(q, packed, v, precision="int8")
    with pytest.raises(ValueError, match="precision"):
        tamis.attend(q, packed, None, precision="fp8")
    with pytest.raises(ValueError, match="precision"):
        tamis.pack_kv(k, v, precision="full")
    with pytest.raises(ValueError, match="head_dim"):
        tamis.attend(q[..., :8], packed, None, precision="int8")
    with pytest.raises(ValueError, match="heads"):
        tamis.attend(torch.randn(1, 3, 3, 32), packed, None, precision="int8")
    with pytest.raises(ValueError, match="batch"):
        tamis.attend(torch.randn(2, 2, 3, 32), packed, None, precision="int8")
    with pytest.raises(ValueError, match="block_mask"):
        tamis.attend(q, packed, None, block_mask((3, 131)), precision="int8")
    with pytest.raises(ValueError, match="key"):
        packed.append(k[..., :8], v)
    with pytest.raises(ValueError, match="value"):
        packed.append(k[:, :, :5], v[:, :, :4])
    with pytest.raises(TypeError, match="key"):
        packed.append(k.bfloat16(), v.bfloat16())
    with pytest.raises(ValueError, match="key"):
        packed.append(k[:, :1], v[:, :1])
    with pytest.raises(TypeError, match=r"key.*None"):
        packed.append(None, v)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"value.*list"):
        packed.append(k, [1.0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"value.*strided"):
        packed.append(k, v.to_sparse())
    with pytest.raises(ValueError, match=r"key.*32"):
        packed.append(k[0, 0, 0], v[0, 0, 0])
    assert packed.length == 130, "a refused append changes nothing"


def test_append_of_nothing(engine: Engine) -> None:
    q, k, v = qkv(q_len=3, kv_len=130)
    packed = pack(engine, k, v)
    before = engine.attend(q, packed, None, precision="int8").output
    with engine.selected():
        packed = packed.append(k[:, :, :0], v[:, :, :0])
    assert packed.length == 130
    assert torch.equal(engine.attend(q, packed, None, precision="int8").output, before)


def test_repr_says_what_it_holds() -> None:
    _, k, v = qkv(kv_len=130)
    assert "130" in repr(tamis.pack_kv(k, v))
