"""The triton backend where it differs from the others: formats, tiles, packing, and what a prediction hands over.

It runs under Triton's interpreter (`make test-triton`) or on a GPU (`make test-gpu`), as do the tests that all engines
share.
"""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from engines import Engine
from samples import block_mask, qkv
from torch import Tensor

import tamis
from tamis.backends.triton import launch, prepare, settings

FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 90},
    "softcap, sinks": {"softcap": 2.0, "sink_logits": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    "segments, positions": {
        "causal": True,
        "segments": (torch.arange(150) // 60 - 1, torch.arange(200) // 80 - 1),
        "positions": (torch.arange(150) * 3 % 200, torch.arange(200) * 7 % 200),
    },
}


def check(engine: Engine, precision: str, q: Tensor, k: Tensor, v: Tensor, mask: Any = None, **options: Any) -> Any:
    """Hold a call against its formulas in fp64, at the usual bound."""
    result = engine.attend(q, k, v, mask, precision=precision, **options)
    if mask is not None:
        options |= {"blocks": oracle.blocks_of(mask), "block_size": mask.block_size}
    truth = oracle.attention(q, k, v, **options)
    form = getattr(torch, result.stats.pv_dtype)
    plain = oracle.attention(q, k, v, **options, dtype=torch.float32 if precision != "full" else q.dtype)
    formulas = oracle.attention_gpu(q, k, v, weights=form, values=form, rounds=precision != "full", **options)
    oracle.assert_within(result.output, truth.output, formulas.output, plain.output)
    oracle.assert_within(result.lse, truth.lse, formulas.lse, plain.lse, what="lse")
    return result, oracle.relative_l1(result.output, truth.output)


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("precision", ["full", "int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_formats(engine: Engine, dtype: torch.dtype, precision: str, features: str) -> None:
    q, k, v = qkv(heads=4, kv_heads=2, q_len=150, kv_len=200, dim=40, value_dim=24, dtype=dtype)
    mask = block_mask((150, 200), heads=4, density=0.7)
    result, _ = check(engine, precision, q, k + 2, v, mask, **FEATURES[features])
    assert result.stats.qk_dtype == (str(dtype).removeprefix("torch.") if precision == "full" else "int8")


@pytest.mark.parametrize("block_size", [(64, 64), (64, 128), (128, 128)], ids=str)
@pytest.mark.parametrize("precision", ["full", "int8", "fp8"])
def test_block_sizes(engine: Engine, precision: str, block_size: tuple[int, int]) -> None:
    """Lengths that end inside the first and inside the second tile of a block."""
    for kv_len in (130, 250):
        q, k, v = qkv(heads=2, q_len=100, kv_len=kv_len, dim=16)
        mask = block_mask((100, kv_len), heads=2, block_size=block_size, density=0.6)
        check(engine, precision, q, k, v, mask, causal=True)
        check(engine, precision, q, k, v)


@pytest.mark.parametrize("precision", ["full", "int8", "fp8"])
@pytest.mark.parametrize(("dim", "value_dim"), [(1, 3), (17, 64), (96, 80), (128, 128), (256, 200)])
def test_head_dims(engine: Engine, precision: str, dim: int, value_dim: int) -> None:
    q, k, v = qkv(heads=1, q_len=20, kv_len=90, dim=dim, value_dim=value_dim)
    check(engine, precision, q, k, v, causal=True)


@pytest.mark.parametrize("dim", [72, 136])
def test_wide_heads_read_no_more_of_the_query(engine: Engine, dim: int) -> None:
    """fp32 goes in slices of channels; what lies behind a query's own would be 0 * NaN."""
    q, k, v = qkv(heads=1, q_len=20, kv_len=90, dim=dim, value_dim=40)
    room = torch.full((1, 1, 20, 256), float("nan"), device=q.device)
    room[..., :dim] = q
    assert room[..., :dim].stride(2) == 256
    check(engine, "full", room[..., :dim], k, v, causal=True)


@pytest.mark.parametrize(("precision", "limit"), [("int8", 0.016), ("fp8", 0.05)])
@pytest.mark.parametrize("dim", [64, 128])
def test_error_on_normals(engine: Engine, precision: str, limit: float, dim: int) -> None:
    q, k, v = qkv(heads=1, q_len=64, kv_len=512, dim=dim, dtype=torch.bfloat16)
    _, error = check(engine, precision, q, k, v)
    assert error <= limit


def test_fp8_keeps_the_mass_of_long_flat_rows(engine: Engine) -> None:
    """One key 14 above 500 others: against the running maximum, each of those would be 0 in e4m3."""
    q, k = torch.zeros(1, 1, 2, 32), torch.zeros(1, 1, 64 * 9, 32)
    q[..., 0], k[..., 0] = 14.0, -0.5
    k[:, :, 0, 0] = 0.5
    v = torch.ones(1, 1, 64 * 9, 16)
    v[:, :, 64:] = 1e6
    truth = oracle.attention(q, k, v, scale=1.0)
    output = engine.attend(q, k, v, scale=1.0, precision="fp8").output
    torch.testing.assert_close(output.double(), truth.output, rtol=0.1, atol=0)


def test_fp8_broken_values(engine: Engine) -> None:
    """A row that sees a NaN or an infinity gives NaN; what is padding or kept by nobody touches nothing."""
    q, k, v = qkv(heads=1, q_len=70, kv_len=200, dim=16)
    mask = tamis.BlockMask.from_dense(torch.tensor([[True, False, True, True]]), (128, 64), (70, 200))
    segments = (torch.zeros(70, dtype=torch.int64), torch.where(torch.arange(200) < 20, -1, 0))
    clean = engine.attend(q, k, v, mask, precision="fp8", segments=segments).output
    for bad in (float("nan"), float("inf"), 1e30):
        key, value = k.clone(), v.clone()
        key[:, :, 64:128], value[:, :, 64:128], key[:, :, :20], value[:, :, :20] = bad, bad, bad, bad
        assert torch.equal(engine.attend(q, key, value, mask, precision="fp8", segments=segments).output, clean)
    value = v.clone()
    value[0, 0, 150, 3] = float("inf")
    output = engine.attend(q, k, value, mask, precision="fp8", segments=segments).output
    assert output[..., 3].isnan().all()
    assert output[..., :3].isfinite().all()


@pytest.mark.parametrize("segments", [None, torch.where(torch.arange(150) % 7 == 0, -1, 0)[None]], ids=["", "padded"])
def test_packs_as_the_reference_does(engine: Engine, segments: Tensor | None) -> None:
    _, k, v = qkv(kv_len=150, dim=19, value_dim=21)
    k[:, :, 70:90], v[..., 4] = 0, 0
    mean = torch.ops.tamis.key_mean(k, segments, None, "reference")
    ours = engine.op("pack_kv", k, v, mean, segments)
    for mine, theirs in zip(ours, torch.ops.tamis.pack_kv(k, v, mean, segments, "reference"), strict=True):
        assert mine.shape == theirs.shape
        torch.testing.assert_close(mine.float(), theirs.float(), rtol=1e-6, atol=1 if mine.dtype == torch.int8 else 8)
        assert (mine.float() - theirs.float()).abs().gt(1e-3 * theirs.float().abs()).float().mean() < 1e-3


@pytest.mark.parametrize("precision", ["full", "int8", "fp8"])
@pytest.mark.parametrize("block_kv", [64, 128])
def test_a_prediction_rounds_for_attention(engine: Engine, precision: str, block_kv: int) -> None:
    """What `predict` hands over is what `attend` would make of keys that are all kept, to the bit."""
    q, k, v = qkv(heads=4, kv_heads=2, q_len=150, kv_len=330, dim=40, dtype=torch.bfloat16)
    one = torch.ones(4)
    choice = (1.0, one, None, -one, True, True, None, 128, block_kv, None, None, None, None, False)
    num, indices, prepared = engine.op("predict", q, k, None, None, *choice, precision)
    assert len(prepared) == (0 if precision == "full" else 5)
    rest = (128, block_kv, True, None, 0.2, *(None,) * 10, precision, None)
    args = (q, k, v, [], num, indices, *rest)
    own, shared = engine.op("attend", *args, []), engine.op("attend", *args, prepared)
    for mine, theirs in zip(own, shared, strict=True):
        assert torch.equal(mine, theirs)


def test_sparse_attention_reads_the_key_twice(engine: Engine) -> None:
    """Once for its mean and once for all else, and the query once; a call without a prediction does no more."""
    q, k, v = (x.to("cpu") for x in qkv(q_len=200))
    for precision in ("full", "int8", "fp8"):
        for call in (tamis.sparse_attention, tamis.attend):
            with launch.note() as launches:
                call(q, k, v, precision=precision, backend="triton")
            names = [item.kernel.fn.__name__ for item in launches]
            predicts, rounds = call is tamis.sparse_attention, precision != "full"
            assert names.count("digest_kernel") == int(predicts or rounds)
            assert readers(launches, k) == ["columns_kernel", "digest_kernel"] * int(predicts or rounds)
            assert readers(launches, v) == ["columns_kernel", "value_fp8_kernel"] * int(precision == "fp8")
            # The scales of value come with the mean of key where both are wanted.
            assert names.count("columns_kernel") == int(predicts or rounds) + int(predicts and precision == "fp8")


def readers(launches: list[launch.Launch], x: Tensor) -> list[str]:
    """The kernels that are given a tensor, but for attention itself."""
    return [
        item.kernel.fn.__name__
        for item in launches
        if "FLAG_ROWS" not in item.constants
        and any(isinstance(t, Tensor) and t.data_ptr() == x.data_ptr() for t in item.arguments)
    ]


def test_wide_offsets_are_the_same(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """64-bit places inside a tile, which only strides of millions need, change no bit."""
    q, k, v = qkv(q_len=100, kv_len=200, dtype=torch.float16)
    plain = launch.run

    def wide(kernel: Any, grid: Any, *arguments: Any, **options: Any) -> None:
        plain(kernel, grid, *arguments, **(options | ({"WIDE": True} if "WIDE" in options else {})))

    for precision in ("full", "int8", "fp8"):
        narrow = engine.attend(q, k, v, causal=True, precision=precision)
        with monkeypatch.context() as patch:
            patch.setattr(launch, "run", wide)
            assert torch.equal(engine.attend(q, k, v, causal=True, precision=precision).output, narrow.output)


@pytest.mark.parametrize("cut", [(16, 32), (128, 128), (32, 16)], ids=str)
def test_tiles_of_every_size(engine: Engine, monkeypatch: pytest.MonkeyPatch, cut: tuple[int, int]) -> None:
    """The tiles of other GPUs and head dims: parts of a block, and two scales of keys at once."""
    q, k, v = qkv(heads=1, q_len=70, kv_len=330, dim=20, dtype=torch.bfloat16)
    mask = block_mask((70, 330), block_size=(128, 128), density=0.7)
    packed = tamis.pack_kv(k.float(), v.float())
    options: dict[str, Any] = {"causal": True, "window": 250, "pv_threshold": 3.0}
    places = (torch.arange(70) + 260, torch.arange(330))
    for precision in ("full", "int8", "fp8", "packed"):
        inputs = (packed, None) if precision == "packed" else (k, v)
        precision = precision.replace("packed", "int8")
        for more in ({}, {"positions": places}):
            expected = engine.attend(q, *inputs, mask, precision=precision, **options, **more)
            exact = oracle.attention(
                q, k, v, blocks=oracle.blocks_of(mask), block_size=(128, 128), causal=True, window=250
            )
            with monkeypatch.context() as patch:
                made = settings.Tiles(*(cut if inputs[1] is not None else (cut[0], min(cut[1], 64))), 4, 1)
                patch.setattr("tamis.backends.triton.engine.tiles", lambda *args, made=made, **kwargs: made)
                result = engine.attend(q, *inputs, mask, precision=precision, **options, **more)
            errors = [oracle.relative_l1(r.output, exact.output) for r in (expected, result)]
            assert errors[1] <= 1.5 * errors[0] + 0.01  # stage 2 skips by tiles
            torch.testing.assert_close(result.lse, expected.lse, rtol=1e-5, atol=1e-5)
            assert result.stats.qk_density == expected.stats.qk_density


def test_values_broken_at_the_edge_of_a_large_tile(engine: Engine) -> None:
    """Mending has smaller tiles: a block that all rows of a small one see may be an edge of attention's own."""
    q, k, v = qkv(heads=1, q_len=192, dim=16)
    for token in (3, 70, 130):
        value = v.clone()
        value[:, :, token] = float("nan")
        output = engine.attend(q, k, value, causal=True).output
        assert output[:, :, token:].isnan().all()
        assert torch.equal(output[:, :, :token], engine.attend(q, k, v, causal=True).output[:, :, :token])


def test_no_queries_no_keys_no_heads(engine: Engine) -> None:
    for q_len, kv_len, heads in ((0, 10, 2), (10, 0, 2), (10, 10, 0)):
        q, k, v = qkv(heads=heads, q_len=q_len, kv_len=kv_len, dim=16)
        for precision in ("full", "int8", "fp8"):
            result = engine.attend(q, k, v, precision=precision)
            assert (result.output == 0).all()
            assert (result.lse == -torch.inf).all()
            engine.sparse_attention(q, k, v, precision=precision)


def test_segments_with_any_strides(engine: Engine) -> None:
    """Expanded, transposed and stepped: what predicts and what packs reads them as they are meant."""
    _, k, v = qkv(batch=2, heads=1, q_len=200, dim=8)
    base = torch.randint(-1, 2, (200, 4))
    for segments in (base[:, 0].expand(2, -1), base[:, :2].t(), base.t()[:2, :], base[:1, 0].expand(200)[None]):
        plain = segments.contiguous()
        assert torch.equal(engine.op("key_mean", k, segments, None), engine.op("key_mean", k, plain, None))
        for ours, theirs in zip(
            engine.op("summarize", k, 64, None, segments), engine.op("summarize", k, 64, None, plain), strict=True
        ):
            assert torch.equal(ours, theirs)
        mean = torch.zeros(2, 1, 8)
        for ours, theirs in zip(
            engine.op("pack_kv", k, v, mean, segments), engine.op("pack_kv", k, v, mean, plain), strict=True
        ):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("precision", ["full", "int8", "fp8"])
@pytest.mark.parametrize(
    ("kv_len", "count", "listed"),
    [(65, 2, [1, 0]), (30, 1, [-1]), (129, 3, [2, 2, 1]), (129, 2**31 - 1, [10**6, 2, 1]), (129, 3, [2, 1, 0])],
)
def test_wild_lists_stay_inside(engine: Engine, precision: str, kv_len: int, count: int, listed: list[int]) -> None:
    """A list out of order or range names a partial block among whole ones: nothing outside of the tensors is read."""
    q, k, v = qkv(heads=1, q_len=64, kv_len=kv_len, dim=16)
    lists = torch.tensor([[[count]]], dtype=torch.int32), torch.tensor([[[listed]]], dtype=torch.int32)
    for block_size in ((64, 64), (64, 128)):
        mask = tamis.BlockMask(*lists, block_size, (64, kv_len))
        for options in ({}, {"causal": True}, {"causal": True, "window": 20}):
            engine.attend(q, k, v, mask, precision=precision, **options)


def test_numbers_near_the_end_of_fp32(engine: Engine) -> None:
    q, k, v = qkv(q_len=20, kv_len=70, dim=24)
    for sink in (2.4e38, 3.4e38, float("inf"), -3.4e38, -float("inf")):
        result = engine.attend(q, k, v, sink_logits=torch.tensor([sink, 0.0]))
        expected = tamis.attend(q, k, v, sink_logits=torch.tensor([sink, 0.0]), backend="reference")
        torch.testing.assert_close(result.output, expected.output, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(result.lse, expected.lse, rtol=1e-6, atol=1e-6)
    check(engine, "full", q, k, v, softcap=3.4e38)


def test_grids_have_one_axis(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others end at 65,535, which many small windows exceed."""
    grids: list[Any] = []
    plain = launch.run

    def spy(kernel: Any, grid: Any, *arguments: Any, **options: Any) -> None:
        grids.append(grid)
        plain(kernel, grid, *arguments, **options)

    monkeypatch.setattr(launch, "run", spy)
    q, k, v = qkv(q_len=70, dim=16)
    for precision in ("full", "int8", "fp8"):
        engine.sparse_attention(q, k, v, precision=precision)
    engine.op("pack_kv", k, v, torch.zeros(1, 2, 16), None)
    assert len(grids) > 15
    assert {len(grid) for grid in grids} == {1}


@pytest.mark.parametrize("settings_of", [{"cdf": 0.6}, {"topk": 0.3}, {"cdf": 0.3, "topk": [0.1, 0.7]}], ids=str)
def test_chooses_what_the_reference_chooses(engine: Engine, settings_of: dict[str, Any]) -> None:
    q, k, _ = qkv(heads=2, q_len=200, kv_len=330, dim=20)
    k[:, :, 64:128] = k[:, :, 128:192]  # two blocks with the same score: the first stays
    predictor = tamis.Sparge(**settings_of, similarity=0.01, keep={"keys": [(-70, None)]})
    for options in ({}, {"causal": True}, {"window": 120, "block_size": (64, 128)}):
        ours = engine.predict(predictor, q, k, **options)
        theirs = predictor(q, k, backend="reference", **options)
        assert torch.equal(ours.to_dense(), theirs.to_dense())
        assert torch.equal(ours.validate().kv_num_blocks, theirs.kv_num_blocks)


@pytest.mark.parametrize("dim", [136, 133])
def test_wide_rows_that_are_copied_give_what_others_give(engine: Engine, dim: int) -> None:
    """Means, scales, similarities and 8 bits of rows of 136 channels, at 144 from each other or at less."""
    q, k, v = qkv(heads=4, kv_heads=2, q_len=70, kv_len=100, dim=dim, value_dim=dim)
    longer = [torch.nn.functional.pad(x, (0, 144 - dim))[..., :136] for x in (q, k, v)]
    columns, digests = [], []
    for query, key, value in ((q, k, v), longer):
        columns.append(prepare.columns(key, value, None, None))
        rounded = prepare.Rounded(*prepare.room(query, key, prepare.TILE, "int8"))
        digests.append([*prepare.digest(query, key, columns[-1][0], None, None, pools=True, rounded=rounded), *rounded])
    (mean, scale), (mean_longer, scale_longer) = columns
    assert torch.equal(mean, mean_longer[..., :dim])
    assert torch.equal(scale, scale_longer)
    for ours, theirs in zip(*digests, strict=True):
        many = dim if ours.dim() == 4 and theirs.shape[3] == 136 else None
        torch.testing.assert_close(ours.float(), theirs.float()[..., :many] if many else theirs.float())
