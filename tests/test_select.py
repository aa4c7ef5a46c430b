"""The ops beneath the predictors: key_mean, summarize, select. Every engine against the definition in fp64."""

from __future__ import annotations

import math
from typing import Any

import oracle
import pytest
import torch
from engines import Engine, engines
from hypothesis import given
from hypothesis import strategies as st
from samples import qkv
from torch import Tensor

HEADS = 3
# Two fp32 sums of the same few hundred softmax terms differ by less: a block this near to the cut may go either way.
NEAR = 1e-5


def bounds(length: int, block: int, offset: int = 0) -> tuple[Tensor, Tensor]:
    """First and last position of every block of consecutive tokens."""
    first = torch.arange(0, length, block)
    return first + offset, (first + block - 1).clamp(max=length - 1) + offset


def visible_blocks(q_len: int, kv_len: int, block_q: int, block_kv: int, causal: bool, window: int | None) -> Tensor:
    """Block pairs with a visible pair of tokens, bool `[q_blocks, kv_blocks]`."""
    q_first, q_last = (x[:, None] for x in bounds(q_len, block_q, kv_len - q_len))
    k_first, k_last = bounds(kv_len, block_kv)
    seen = torch.ones(len(q_first), len(k_first), dtype=torch.bool)
    if causal:
        seen &= q_last >= k_first
    if window is not None:
        seen &= (q_first - k_last < window) & (k_first - q_last < window)
    return seen


def chosen(
    q_means: Tensor,
    q_similarity: Tensor,
    k_means: Tensor,
    k_similarity: Tensor,
    *,
    scale: float = 0.2,
    q_len: int,
    kv_len: int,
    block_q: int = 128,
    block_kv: int = 64,
    causal: bool = False,
    window: int | None = None,
    similarity: float | list[float] = -1.0,
    cdf: float | list[float] | None = None,
    topk: float | list[float] | None = None,
    sink: bool = False,
    visible: Tensor | None = None,
    must: Tensor | None = None,
    engine: Engine,
    trim: bool = True,
) -> Tensor:
    """Run the op; its lists, checked, as bool `[batch, heads, q_blocks, kv_blocks]`."""
    heads = q_means.shape[1]

    def setting(x: float | list[float] | None) -> Tensor | None:
        return None if x is None else torch.tensor(x, dtype=torch.float32).expand(heads).contiguous()

    counts, indices = engine.op(
        "select",
        q_means=q_means,
        q_similarity=q_similarity,
        k_means=k_means,
        k_similarity=k_similarity,
        scale=scale,
        cdf=setting(cdf),
        topk=setting(topk),
        similarity=setting(similarity),
        sink=sink,
        causal=causal,
        window=window,
        q_len=q_len,
        kv_len=kv_len,
        block_q=block_q,
        block_kv=block_kv,
        q_bounds=None,
        kv_bounds=None,
        visible=visible,
        must=must,
        trim=trim,
    )
    kv_blocks = k_means.shape[2]
    assert counts.dtype == indices.dtype == torch.int32
    assert indices.shape == (*counts.shape, max(1, int(counts.max())) if trim else kv_blocks)
    dense = torch.zeros(*counts.shape, kv_blocks, dtype=torch.bool)
    for position in torch.ones_like(counts, dtype=torch.bool).nonzero().tolist():
        place = tuple(position)
        row = indices[place][: counts[place]].tolist()
        assert row == sorted(set(row)), "indices must ascend strictly"
        dense[place][row] = True
    return dense


def summaries(q_len: int, kv_len: int, *, batch: int = 1, kv_heads: int = HEADS) -> dict[str, Any]:
    q_blocks, kv_blocks = -(-q_len // 128), -(-kv_len // 64)
    return {
        "q_means": torch.randn(batch, HEADS, q_blocks, 16),
        "k_means": torch.randn(batch, kv_heads, kv_blocks, 16),
        "q_similarity": torch.rand(batch, HEADS, q_blocks),
        "k_similarity": torch.rand(batch, kv_heads, kv_blocks),
        "q_len": q_len,
        "kv_len": kv_len,
    }


def probabilities(inputs: dict[str, Any], seen: Tensor, theta: Tensor, scale: float) -> Tensor:
    """Softmax of the compressed scores, over similar visible key blocks, fp64; a row without any is 0."""
    repeat = HEADS // inputs["k_means"].shape[1]
    k_means = inputs["k_means"].double().repeat_interleave(repeat, 1)
    k_similarity = inputs["k_similarity"].repeat_interleave(repeat, 1)
    scores = inputs["q_means"].double() @ k_means.transpose(-1, -2) * scale
    open_ = seen & (k_similarity >= theta[:, None])[..., None, :]
    return torch.softmax(scores.masked_fill(~open_, -math.inf), -1).nan_to_num(0.0)


@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (True, 400), (False, 300)])
@pytest.mark.parametrize(("q_len", "kv_len"), [(700, 1500), (1500, 700), (1000, 1000), (1, 1000), (5, 3)])
@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.5, 1.0])
def test_topk_counts_visible_blocks(
    engine: Engine, fraction: float, q_len: int, kv_len: int, causal: bool, window: int | None
) -> None:
    inputs = summaries(q_len, kv_len)
    kept = chosen(**inputs, topk=fraction, causal=causal, window=window, engine=engine)
    seen = visible_blocks(q_len, kv_len, 128, 64, causal, window)
    p = probabilities(inputs, seen, torch.full((HEADS,), -1.0), 0.2)
    wanted = torch.ceil(fraction * seen.sum(-1).double() - 1e-6).long()
    diagonal = diagonal_blocks(q_len, kv_len) if causal else torch.zeros_like(seen)
    assert not (kept & ~seen).any()
    for h in range(HEADS):
        for i in range(seen.shape[0]):
            extra = kept[0, h, i] & diagonal[i] & seen[i]
            best = p[0, h, i].sort(descending=True).values
            cut = float(best[wanted[i] - 1]) if wanted[i] else math.inf
            must = (p[0, h, i] > cut + NEAR) & seen[i]
            may = (p[0, h, i] >= cut - NEAR) & seen[i]
            assert kept[0, h, i][must].all()
            assert not (kept[0, h, i] & ~may & ~extra).any()
            top = int((kept[0, h, i] & ~(extra & ~may)).sum())
            assert wanted[i] <= top <= wanted[i] + int((extra & ~must).sum())


@pytest.mark.parametrize("scale", [0.0, 1e3, 1e30])
def test_topk_counts_blocks_without_mass(engine: Engine, scale: float) -> None:
    """Of a softmax so peaked that all but one block underflow to 0, and of one so flat that all are equal."""
    kept = chosen(**summaries(1000, 1500), topk=0.5, scale=scale, engine=engine)
    assert (kept.sum(-1) == 12).all()
    union = chosen(**summaries(1000, 1500), topk=0.5, cdf=0.1, scale=scale, engine=engine).sum(-1)
    ties = 3 if scale == 0 else 0  # the tenth of the mass may be other blocks than the half of the blocks
    assert ((union >= 12) & (union <= 12 + ties)).all()


def diagonal_blocks(q_len: int, kv_len: int) -> Tensor:
    """Key blocks that hold the own position of a row of the query block."""
    q_first, q_last = (x[:, None] for x in bounds(q_len, 128, kv_len - q_len))
    k_first, k_last = bounds(kv_len, 64)
    return (q_first <= k_last) & (q_last >= k_first)


@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (True, 400)])
@pytest.mark.parametrize("tau", [1e-6, 0.3, 0.9, 0.98, 1.0])
def test_cdf_keeps_the_fewest_that_reach_it(engine: Engine, tau: float, causal: bool, window: int | None) -> None:
    inputs = summaries(1000, 1500)
    kept = chosen(**inputs, cdf=tau, causal=causal, window=window, engine=engine)
    seen = visible_blocks(1000, 1500, 128, 64, causal, window)
    p = probabilities(inputs, seen, torch.full((HEADS,), -1.0), 0.2)
    diagonal = diagonal_blocks(1000, 1500) if causal else torch.zeros_like(seen)
    assert not (kept & ~seen).any()
    assert (kept.sum(-1) >= 1).all()
    for h in range(HEADS):
        for i in range(seen.shape[0]):
            row, mask = p[0, h, i], kept[0, h, i]
            order = row.argsort(descending=True)
            before = row[order].cumsum(0) - row[order]  # mass of everything larger
            must, may = torch.zeros_like(mask), torch.zeros_like(mask)
            must[order] = before < tau - NEAR
            may[order] = before < tau + NEAR
            must[order[0]] = may[order[0]] = True
            assert mask[must & seen[i]].all()
            assert not (mask & ~may & ~diagonal[i]).any()


@pytest.mark.large
def test_cdf_and_topk_are_a_union(engine: Engine) -> None:
    inputs = summaries(1000, 1500)
    for causal in (False, True):
        options: dict[str, Any] = {"causal": causal}
        cdf = chosen(**inputs, cdf=0.7, engine=engine, **options)
        topk = chosen(**inputs, topk=0.3, engine=engine, **options)
        assert (cdf & ~topk).any()
        assert (topk & ~cdf).any()
        assert torch.equal(chosen(**inputs, cdf=0.7, topk=0.3, engine=engine, **options), cdf | topk)


def test_dissimilar_blocks_are_fixed(engine: Engine) -> None:
    """A dissimilar query block keeps its row; a dissimilar key block its column, and it is out of the softmax."""
    inputs = summaries(1000, 1500)
    inputs["k_means"][:, :, 3] *= 100  # would have all the mass, were it not dissimilar
    inputs["k_similarity"][:, :, 3] = 0.1
    kept = chosen(**inputs, cdf=0.5, similarity=0.3, causal=True, engine=engine)
    seen = visible_blocks(1000, 1500, 128, 64, True, None)
    p = probabilities(inputs, seen, torch.full((HEADS,), 0.3), 0.2)
    rows, columns = inputs["q_similarity"] < 0.3, inputs["k_similarity"] < 0.3
    fixed = seen & (rows[..., None] | columns[..., None, :])
    assert kept[fixed].all()
    free = ~rows[..., None] & seen & ~columns[..., None, :] & ~diagonal_blocks(1000, 1500)
    largest = p.argsort(-1, descending=True)
    before = torch.zeros_like(p).scatter(-1, largest, p.gather(-1, largest).cumsum(-1) - p.gather(-1, largest))
    sure = free & ((before - 0.5).abs() > NEAR)
    assert torch.equal(kept[sure], (before < 0.5)[sure])
    assert torch.equal(chosen(**inputs, cdf=0.5, similarity=-1.0, engine=engine)[:, :, :, 3].any(), torch.tensor(True))


def test_nan_similarity_keeps_the_block(engine: Engine) -> None:
    """A block with a non-finite row cannot be judged, so it is kept and poisons no other block's choice."""
    inputs = summaries(1000, 1500)
    clean = chosen(**inputs, topk=0.2, similarity=0.3, engine=engine)
    inputs["k_means"][:, :, 5], inputs["k_similarity"][:, :, 5] = math.nan, math.nan
    inputs["q_means"][:, :, 2], inputs["q_similarity"][:, :, 2] = math.nan, math.nan
    kept = chosen(**inputs, topk=0.2, similarity=0.3, engine=engine)
    assert kept[:, :, :, 5].all()
    assert kept[:, :, 2].all()
    assert kept.sum() < 1.2 * clean.sum() + kept.shape[1] * (kept.shape[2] + kept.shape[3])


def test_all_key_blocks_dissimilar(engine: Engine) -> None:
    inputs = summaries(1000, 1500)
    inputs["k_similarity"][:] = 0.0
    seen = visible_blocks(1000, 1500, 128, 64, True, None)
    kept = chosen(**inputs, cdf=0.5, similarity=0.3, causal=True, engine=engine)
    assert torch.equal(kept, seen.expand_as(kept))


def test_sink_and_diagonal(engine: Engine) -> None:
    inputs = summaries(1000, 1500)
    inputs["k_means"][:, :, 0] = -100 * inputs["q_means"].mean(2)
    without = chosen(**inputs, topk=0.05, causal=True, engine=engine)
    with_sink = chosen(**inputs, topk=0.05, causal=True, sink=True, engine=engine)
    first = torch.zeros_like(without)
    first[..., 0] = True
    assert not without[..., 0].all()
    assert torch.equal(with_sink, without | first)
    diagonal = diagonal_blocks(1000, 1500)
    assert without[:, :, diagonal].all()
    dense = chosen(**inputs, topk=0.05, engine=engine)
    assert not dense[:, :, diagonal].all(), "the diagonal is a rule of causal attention only"


def test_sink_outside_the_window_is_not_kept(engine: Engine) -> None:
    kept = chosen(**summaries(1000, 1500), topk=0.1, causal=True, window=200, sink=True, engine=engine)
    seen = visible_blocks(1000, 1500, 128, 64, True, 200)
    assert not (kept & ~seen).any()


@pytest.mark.large
def test_must_and_visible(engine: Engine) -> None:
    inputs = summaries(1000, 1500, batch=2)
    must = torch.rand(2, HEADS, 8, 24) < 0.1
    visible = torch.rand(2, 1, 8, 24) < 0.7
    kept = chosen(**inputs, topk=0.2, must=must, visible=visible, causal=True, engine=engine)
    seen = visible & visible_blocks(1000, 1500, 128, 64, True, None)
    assert kept[must & seen].all()
    assert not (kept & ~seen).any()
    alone = chosen(**inputs, topk=0.2, visible=visible, causal=True, engine=engine)
    assert torch.equal(kept, alone | (must & seen))


def test_rows_that_see_no_block(engine: Engine) -> None:
    kept = chosen(**summaries(500, 200), topk=0.5, causal=True, sink=True, engine=engine)
    seen = visible_blocks(500, 200, 128, 64, True, None)
    assert (~seen.any(-1)).any()
    assert not kept[:, :, ~seen.any(-1)].any()


def test_settings_per_head(engine: Engine) -> None:
    inputs = summaries(1000, 1500)
    kept = chosen(**inputs, topk=[0.1, 0.5, 1.0], similarity=[-1.0, 0.5, -1.0], engine=engine)
    for head, (fraction, theta) in enumerate([(0.1, -1.0), (0.5, 0.5), (1.0, -1.0)]):
        alone = chosen(**inputs, topk=fraction, similarity=theta, engine=engine)
        assert torch.equal(kept[:, head], alone[:, head])


def test_grouped_heads(engine: Engine) -> None:
    inputs = summaries(1000, 1500, kv_heads=1)
    repeated = inputs | {
        name: inputs[name].expand(1, HEADS, *inputs[name].shape[2:]) for name in ("k_means", "k_similarity")
    }
    options: dict[str, Any] = {"cdf": 0.6, "similarity": 0.2, "engine": engine}
    assert torch.equal(chosen(**inputs, **options), chosen(**repeated, **options))


def test_untrimmed_is_the_same_mask(engine: Engine) -> None:
    inputs = summaries(1000, 1500)
    trimmed = chosen(**inputs, topk=0.2, causal=True, engine=engine)
    assert torch.equal(chosen(**inputs, topk=0.2, causal=True, trim=False, engine=engine), trimmed)


@pytest.mark.large
def test_engines_agree() -> None:
    """Same summaries, same mask, but for blocks within fp32 rounding of the cut; with these seeds there is none."""
    for block_q, block_kv in ((64, 64), (128, 128)):
        inputs = summaries(1000, 1500)
        inputs["q_means"] = torch.randn(1, HEADS, -(-1000 // block_q), 16)
        inputs["q_similarity"] = torch.rand(1, HEADS, -(-1000 // block_q))
        inputs["k_means"] = torch.randn(1, HEADS, -(-1500 // block_kv), 16)
        inputs["k_similarity"] = torch.rand(1, HEADS, -(-1500 // block_kv))
        options: dict[str, Any] = {
            "block_q": block_q,
            "block_kv": block_kv,
            "causal": True,
            "similarity": 0.2,
            "sink": True,
        }
        first, *others = (chosen(**inputs, cdf=0.8, topk=0.1, engine=e, **options) for e in engines())
        for other in others:
            assert torch.equal(other, first)


@given(data=st.data())
def test_engines_agree_on_anything(data: st.DataObject) -> None:
    """Random settings and shapes: where two engines differ the block lies within rounding of the cut."""
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 99)))
    q_len, kv_len = draw(st.integers(1, 700)), draw(st.integers(1, 2000))
    inputs = summaries(q_len, kv_len, kv_heads=draw(st.sampled_from([1, 3])))
    options: dict[str, Any] = {
        "causal": draw(st.booleans()),
        "window": draw(st.none() | st.integers(1, 900)),
        "scale": draw(st.sampled_from([0.01, 0.2, 1.0])),
        "similarity": draw(st.sampled_from([-1.0, 0.2])),
        "sink": draw(st.booleans()),
        "cdf": draw(st.none() | st.floats(0.015625, 1.0, width=32)),
    }
    options["topk"] = draw(st.floats(0.015625, 1.0, width=32) | (st.nothing() if options["cdf"] is None else st.none()))
    first, *others = (chosen(**inputs, engine=engine, **options) for engine in engines())
    seen = visible_blocks(q_len, kv_len, 128, 64, options["causal"], options["window"])
    p = probabilities(inputs, seen, torch.full((HEADS,), options["similarity"]), options["scale"])
    ordered = p.sort(-1, descending=True).values
    for other in others:
        for _, head, row, block in (first != other).nonzero().tolist():
            place = (0, head, row)
            mass = float(p[place][block])
            near = [abs(float(x) - (options["cdf"] or 2.0)) < NEAR for x in ordered[place].cumsum(0)]
            tied = (ordered[place] - mass).abs() < NEAR
            assert any(near) or int(tied.sum()) > 1
        if options["cdf"] is None:
            assert torch.equal(first.sum(-1), other.sum(-1))


def test_cumulative_sum_holds_at_length(engine: Engine) -> None:
    """4,096 equal blocks: .98 of the mass is .98 of the blocks. In half precision the sum would stall at 1/8."""
    inputs = summaries(128, 64 * 4096)
    inputs["q_means"][:] = 0
    count = chosen(**inputs, cdf=0.98, engine=engine).sum(-1)
    assert ((count - 0.98 * 4096).abs() <= 2).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("length", "block", "dim"), [(1, 64, 5), (200, 128, 40), (129, 64, 64), (300, 64, 256)])
def test_summarize(engine: Engine, dtype: torch.dtype, length: int, block: int, dim: int) -> None:
    """Block means, and the squared norm of the mean unit row, of x - mean: the last block by the rows it has."""
    x = qkv(batch=2, heads=3, q_len=length, dim=dim, dtype=dtype)[0] + 1
    for mean in (None, torch.randn(2, 3, dim)):
        means, similarity = engine.op("summarize", x, block, mean, None)
        assert means.dtype == similarity.dtype == torch.float32
        rows = x.double() if mean is None else x.double() - mean.double()[:, :, None]
        unit = torch.nn.functional.normalize(rows, dim=-1)
        for i, start in enumerate(range(0, length, block)):
            part = slice(start, start + block)
            # Every number meets at most n + 1 roundings of fp32, in whatever order they are added: less the mean, n - 1
            # sums, over n. Half-precision numbers less one mean share their last digits: their errors do not cancel.
            number = rows[:, :, part].shape[2]
            bound = (number + 1) * 2**-24 * rows[:, :, part].abs().mean(2)
            assert ((means[:, :, i].double() - rows[:, :, part].mean(2)).abs() <= bound).all()
            # Unit rows share no digits, so that the errors of at most 128 entries of size 1 or less stay near one's.
            expected = unit[:, :, part].mean(2).square().sum(-1)
            torch.testing.assert_close(similarity[:, :, i].double(), expected, rtol=0, atol=2e-6)


def test_summarize_odd_rows(engine: Engine) -> None:
    """Zero rows are similar to nothing, padding rows do not count, an empty block is similar, a NaN row shows."""
    x = torch.ones(1, 1, 320, 8)
    x[:, :, :32] = 0  # block 0: half of it zero rows
    x[:, :, 100:128] = math.nan  # block 1: padding from row 100
    x[:, :, 128:192] = math.nan  # block 2: nothing but padding
    x[:, :, 200] = math.inf  # block 3: a bad row
    segments = torch.zeros(1, 320, dtype=torch.int64)
    segments[:, 100:192] = -1
    means, similarity = engine.op("summarize", x, 64, None, segments)
    torch.testing.assert_close(similarity[0, 0, [0, 1, 2, 4]], torch.tensor([0.25, 1.0, 1.0, 1.0]))
    torch.testing.assert_close(means[0, 0, [0, 1, 2, 4], 0], torch.tensor([0.5, 1.0, 0.0, 1.0]))
    assert similarity[0, 0, 3].isnan()
    zeros = engine.op("summarize", torch.zeros(1, 1, 64, 8), 64, None, None)
    assert (zeros[0] == 0).all()
    assert (zeros[1] == 0).all()


def test_summarize_extreme_magnitudes(engine: Engine) -> None:
    """Rows too small or too large to square in fp32 still have a direction."""
    row = torch.randn(1, 1, 1, 16).expand(1, 1, 64, 16)
    for size in (1e-36, 1e-30, 1e-15, 1.0, 1e15, 1e20, 1e35):
        similarity = engine.op("summarize", row * size, 64, None, None)[1]
        torch.testing.assert_close(similarity, torch.ones(1, 1, 1), rtol=0, atol=1e-5)


def test_summarize_strided(engine: Engine) -> None:
    x = qkv(batch=2, heads=3, q_len=200, dim=40)[0]
    expected = engine.op("summarize", x, 64, None, None)
    for view in (
        x.transpose(1, 2).contiguous().transpose(1, 2),
        x.transpose(2, 3).contiguous().transpose(2, 3),
        torch.stack([x, x * math.nan], -1)[..., 0],
    ):
        for ours, theirs in zip(engine.op("summarize", view, 64, None, None), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_key_mean(engine: Engine, dtype: torch.dtype) -> None:
    """Over finite tokens of a non-negative segment in used 64-key blocks; zeros where there is none."""
    key = qkv(batch=2, heads=3, q_len=300, dim=40, dtype=dtype)[1] + 2
    key[:, :, 70, 3], key[:, :, 71] = math.inf, math.nan
    segments = torch.randint(-1, 2, (2, 300))
    used = torch.rand(2, 3, 5) < 0.6
    used[0, 0] = False
    for segment in (None, segments, segments[:1]):
        for blocks in (None, used):
            mean = engine.op("key_mean", key, segment, blocks)
            assert mean.dtype == torch.float32
            # 300 fp32 numbers of size 2 in any order.
            torch.testing.assert_close(mean.double(), oracle.key_mean(key, segment, blocks), rtol=0, atol=2e-6)
    assert (engine.op("key_mean", key, torch.full((1, 300), -1), None) == 0).all()
