"""Sparge and Window: from query and key to a BlockMask, against an independent fp64 computation of the method."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import oracle
import pytest
import torch
from engines import Engine, engines
from samples import qkv
from torch import Tensor

import tamis

NEAR = 1e-5  # fp32 sums of a few dozen softmax terms: a block this near to the cut may go either way


def pooled(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Mean row and mean pairwise cosine similarity of every block, by the Gram matrix; zero rows are like nothing."""
    means, similarities = [], []
    for part in torch.split(x.double(), block, 2):
        unit = torch.nn.functional.normalize(part, dim=-1)
        means.append(part.mean(2))
        similarities.append((unit @ unit.transpose(-1, -2)).mean((-1, -2)))
    return torch.stack(means, 2), torch.stack(similarities, 2)


def expected_mask(
    q: Tensor,
    k: Tensor,
    *,
    cdf: float | None,
    topk: float | None,
    theta: float,
    seen: Tensor,
    always: Tensor,
    block_size: tuple[int, int] = (128, 64),
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The mask by the book, and where it is certain: blocks that are not within rounding of a cut."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k = k.double() - k.double().mean(2, keepdim=True)
    q_means, q_similarity = pooled(q, block_size[0])
    k_means, k_similarity = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in pooled(k, block_size[1]))
    q_similar, k_similar = q_similarity >= theta, k_similarity >= theta
    scores = (q_means @ k_means.transpose(-1, -2)) * scale
    p = torch.softmax(scores.masked_fill(~(seen & k_similar[..., None, :]), -math.inf), -1).nan_to_num(0.0)
    ordered, order = p.sort(-1, descending=True)
    keep, certain = torch.zeros_like(ordered, dtype=torch.bool), torch.ones_like(ordered, dtype=torch.bool)
    if cdf is not None:
        before = ordered.cumsum(-1) - ordered
        keep |= before < cdf
        certain &= (before - cdf).abs() > NEAR
        keep[..., 0] = True
    if topk is not None:
        wanted = torch.ceil(topk * seen.expand_as(p).sum(-1) - 1e-9).long()[..., None]
        keep |= torch.arange(p.shape[-1]) < wanted
        cut = ordered.gather(-1, (wanted - 1).clamp(min=0))
        certain &= ((ordered - cut).abs() > NEAR) | (ordered == cut)
    keep = torch.zeros_like(keep).scatter(-1, order, keep & (ordered > 0))
    certain = torch.zeros_like(certain).scatter(-1, order, certain)
    certain &= ((q_similarity - theta).abs() > NEAR)[..., None] & ((k_similarity - theta).abs() > NEAR)[..., None, :]
    keep = keep | ~q_similar[..., None] | ~k_similar[..., None, :] | always
    return keep & seen, certain


def structured(q_len: int, kv_len: int, *, heads: int = 4, kv_heads: int = 2, dim: int = 32) -> tuple[Tensor, Tensor]:
    """Query and key whose blocks range from alike to unlike, and attend unevenly."""
    q, k, _ = qkv(batch=2, heads=heads, kv_heads=kv_heads, q_len=q_len, kv_len=kv_len, dim=dim)
    for x in (q, k):
        block = torch.arange(x.shape[2]) // 64
        common = torch.randn(2, x.shape[1], int(block[-1]) + 1, dim)[:, :, block]
        strength = torch.rand(int(block[-1]) + 1)[block] * 3
        x += strength[:, None] * common
    return q, k + 1.5


def visible_by_tokens(q_len: int, kv_len: int, block_size: tuple[int, int], **masks: Any) -> Tensor:
    """Block pairs of which one token pair is visible."""
    return oracle.visible_blocks(oracle.visible(q_len, kv_len, **masks), block_size)


def own_position(q_len: int, kv_len: int, block_size: tuple[int, int]) -> Tensor:
    distance = torch.arange(q_len)[:, None] + (kv_len - q_len) - torch.arange(kv_len)
    return oracle.visible_blocks(distance == 0, block_size)


@pytest.mark.parametrize("settings", [{"cdf": 0.9}, {"topk": 0.3}, {"cdf": 0.6, "topk": 0.2}], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("q_len", "kv_len"), [(1000, 1000), (300, 1100)])
def test_sparge_by_the_book(engine: Engine, settings: dict[str, Any], causal: bool, q_len: int, kv_len: int) -> None:
    q, k = structured(q_len, kv_len)
    predictor = tamis.Sparge(**({"cdf": None} | settings), similarity=0.4, sink=False)
    mask = engine.predict(predictor, q, k, causal=causal)
    assert (mask.block_size, mask.seq_lens) == ((128, 64), (q_len, kv_len))
    assert mask.kv_num_blocks.shape[:2] == (2, 4)
    mask.validate()
    seen = visible_by_tokens(q_len, kv_len, (128, 64), causal=causal)
    always = own_position(q_len, kv_len, (128, 64)) if causal else torch.tensor(False)
    keep, certain = expected_mask(
        q, k, cdf=settings.get("cdf"), topk=settings.get("topk"), theta=0.4, seen=seen, always=always
    )
    assert certain.double().mean() > 0.9
    assert 0.05 < keep.double().mean() < 0.95
    assert torch.equal(oracle.blocks_of(mask)[certain], keep[certain])


@pytest.mark.parametrize("block_size", [(64, 64), (64, 128), (128, 128)])
def test_block_size(engine: Engine, block_size: tuple[int, int]) -> None:
    q, k = structured(500, 700)
    mask = engine.predict(tamis.Sparge(cdf=0.8, similarity=-1.0, sink=False), q, k, block_size=block_size)
    assert mask.block_size == block_size
    seen = visible_by_tokens(500, 700, block_size)
    keep, certain = expected_mask(
        q, k, cdf=0.8, topk=None, theta=-1.0, seen=seen, always=torch.tensor(False), block_size=block_size
    )
    assert torch.equal(oracle.blocks_of(mask)[certain], keep[certain])


def test_topk_alone_turns_cdf_off(any_engine: Engine) -> None:
    q, k = structured(1000, 1000)
    sparse = tamis.Sparge(topk=0.1, similarity=-1.0, sink=False)
    mask = oracle.blocks_of(any_engine.predict(sparse, q, k))
    assert (mask.sum(-1) == math.ceil(0.1 * 16)).all()


@pytest.mark.large
def test_topk_one_keeps_everything_visible(engine: Engine) -> None:
    q, k = structured(500, 700)
    for masks in ({}, {"causal": True}, {"window": 200}, {"causal": True, "window": 200}):
        mask = engine.predict(tamis.Sparge(topk=1.0), q, k, **masks)
        seen = visible_by_tokens(500, 700, (128, 64), **masks)
        assert torch.equal(oracle.blocks_of(mask), seen.expand(2, 4, -1, -1))


@pytest.mark.large
def test_sink(engine: Engine) -> None:
    q, k = structured(1000, 1000)
    k[:, :, :64] = -q.mean((1, 2), keepdim=True)
    settings: dict[str, Any] = {"topk": 0.1, "similarity": -1.0}
    without = oracle.blocks_of(engine.predict(tamis.Sparge(**settings, sink=False), q, k))
    with_sink = oracle.blocks_of(engine.predict(tamis.Sparge(**settings, sink=True), q, k))
    assert not without[..., 0].all()
    without[..., 0] = True
    assert torch.equal(with_sink, without)


def test_similarity_above_every_block_is_dense(engine: Engine) -> None:
    q, k = structured(500, 700)
    mask = engine.predict(tamis.Sparge(cdf=0.1, similarity=0.99, sink=False), q, k, causal=True)
    seen = visible_by_tokens(500, 700, (128, 64), causal=True)
    assert torch.equal(oracle.blocks_of(mask), seen.expand(2, 4, -1, -1))


@pytest.mark.large
def test_prediction_honours_scale(engine: Engine) -> None:
    """A small scale flattens the softmax: more blocks reach the mass. scale = s is the query times s."""
    q, k = structured(1000, 1000)
    predictor = tamis.Sparge(cdf=0.9, similarity=-1.0, sink=False)
    masks = [oracle.blocks_of(engine.predict(predictor, q, k, scale=scale)) for scale in (0.01, 0.25, 4.0)]
    counts = [int(mask.sum()) for mask in masks]
    assert counts[0] > 1.2 * counts[1] > 1.2 * 1.2 * counts[2]
    assert torch.equal(oracle.blocks_of(engine.predict(predictor, q * 16, k, scale=0.25)), masks[2])
    default = oracle.blocks_of(engine.predict(predictor, q, k))
    assert torch.equal(oracle.blocks_of(engine.predict(predictor, q, k, scale=32**-0.5)), default)


def test_grouped_heads_equal_repeated_keys(engine: Engine) -> None:
    q, k = structured(500, 700)
    predictor = tamis.Sparge(cdf=0.8, similarity=0.4)
    grouped = engine.predict(predictor, q, k, causal=True)
    repeated = engine.predict(predictor, q, k.repeat_interleave(2, 1), causal=True)
    assert torch.equal(oracle.blocks_of(grouped), oracle.blocks_of(repeated))


@pytest.mark.large
def test_settings_per_head(engine: Engine) -> None:
    q, k = structured(1000, 1000)
    cdf, theta = [0.3, 0.9, 0.6, 0.6], [-1.0, -1.0, 0.2, 0.5]
    mask = oracle.blocks_of(engine.predict(tamis.Sparge(cdf=cdf, similarity=theta), q, k, causal=True))
    for head in range(4):
        alone = tamis.Sparge(cdf=cdf[head], similarity=theta[head])
        assert torch.equal(mask[:, head], oracle.blocks_of(engine.predict(alone, q, k, causal=True))[:, head])
    topk = oracle.blocks_of(engine.predict(tamis.Sparge(topk=[0.1, 0.2, 0.3, 1.0], similarity=-1.0, sink=False), q, k))
    assert topk[0, :, 0].sum(-1).tolist() == [math.ceil(f * 16) for f in (0.1, 0.2, 0.3, 1.0)]


@pytest.mark.parametrize("settings", [{"cdf": 0.5}, {"topk": 0.1}], ids=str)
@pytest.mark.large
def test_keep_ranges(engine: Engine, settings: dict[str, Any]) -> None:
    """Key ranges that every row keeps, query ranges that keep every key: the rest is chosen as before."""
    q, k = structured(1000, 1000)
    plain = oracle.blocks_of(engine.predict(tamis.Sparge(**settings, similarity=-1.0), q, k))
    kept = keep_argument([(100, 130), (700, 701)], [(250, 260)])
    mask = oracle.blocks_of(engine.predict(tamis.Sparge(**settings, similarity=-1.0, keep=kept), q, k))
    columns = torch.zeros(16, dtype=torch.bool)
    columns[[1, 2, 10]] = True
    rows = torch.zeros(8, dtype=torch.bool)
    rows[[1, 2]] = True
    assert torch.equal(mask, plain | columns | rows[:, None])
    causal = oracle.blocks_of(engine.predict(tamis.Sparge(**settings, similarity=-1.0, keep=kept), q, k, causal=True))
    seen = visible_by_tokens(1000, 1000, (128, 64), causal=True)
    assert not (causal & ~seen).any()
    assert causal[(seen & (columns | rows[:, None])).expand_as(causal)].all()


@pytest.mark.large
def test_keep_ranges_are_slices(any_engine: Engine) -> None:
    """Negative numbers count from the end, None is open, what lies outside is nothing."""
    q, k = structured(1000, 1000)
    plain = oracle.blocks_of(any_engine.predict(tamis.Sparge(topk=0.1, similarity=-1.0), q, k))
    for span in ((None, 100), (-100, None), (-100, -30), (900, 5000), (500, 400), (1000, 1100), (None, None)):
        columns = torch.zeros(16, dtype=torch.bool)
        columns[torch.arange(1000)[slice(*span)] // 64] = True
        sparse = tamis.Sparge(topk=0.1, similarity=-1.0, keep=keep_argument([span], []))
        assert torch.equal(oracle.blocks_of(any_engine.predict(sparse, q, k)), plain | columns)


def keep_argument(keys: list[Any], queries: list[Any]) -> Any:
    """Key ranges and query ranges as `keep` takes them."""
    return {"keys": keys, "queries": queries}


@pytest.mark.parametrize(
    "predictor", [tamis.Sparge(cdf=0.7, similarity=0.3), tamis.Sparge(topk=0.3, similarity=-1.0)], ids=str
)
def test_masks_are_never_seen_through(engine: Engine, predictor: Any) -> None:
    """Blocks nobody may see are not kept, and every row that sees a key keeps one it sees."""
    q, k = structured(300, 520)
    segment = (torch.arange(300) // 100, torch.arange(520) // 180)
    padding = (torch.zeros(300, dtype=torch.int64), torch.where(torch.arange(520) < 400, 0, -1))
    hole = torch.ones(300, 520, dtype=torch.bool)
    hole[:, 128:256] = False
    for masks in (
        {"segments": segment},
        {"segments": padding, "causal": True},
        {"attn_mask": hole},
        {"attn_mask": torch.where(hole, 0.0, -math.inf), "causal": True},
        {"positions": (torch.arange(300) + 100, torch.arange(520)), "causal": True},
        {"window": 150},
    ):
        mask = oracle.blocks_of(engine.predict(predictor, q, k, **masks))
        seen = visible_by_tokens(300, 520, (128, 64), **masks)
        assert not (mask & ~seen).any()
        assert mask.any(-1)[seen.any(-1).expand(2, 4, -1)].all()


def test_padding_does_not_count(engine: Engine) -> None:
    """Whatever stands in padding tokens, of queries and keys, the mask is the same."""
    q, k = structured(500, 500)
    segment = torch.where(torch.arange(500) % 97 < 80, 0, -1)
    predictor = tamis.Sparge(cdf=0.7, similarity=0.3)
    clean = engine.predict(predictor, q, k, causal=True, segments=(segment, segment))
    for bad in (math.nan, 1e20, 0.0):
        dirty = [x.masked_fill((segment < 0)[:, None], bad) for x in (q, k)]
        mask = engine.predict(predictor, *dirty, causal=True, segments=(segment, segment))
        assert torch.equal(oracle.blocks_of(mask), oracle.blocks_of(clean))


def test_partial_tail_blocks_are_judged_by_what_they_hold(engine: Engine) -> None:
    """A tail of one token is as similar as can be; zero rows after it would make it dissimilar and so dense."""
    q, k = structured(1025, 1025)
    predictor = tamis.Sparge(topk=0.1, similarity=0.9, sink=False)
    q[:, :, :1024] = q[:, :, :1] + 1e-3 * q[:, :, :1024]
    k[:, :, :1024] = k[:, :, :1] + torch.randn(2, 2, 16, 32).repeat_interleave(64, 2) + 1e-3 * k[:, :, :1024]
    mask = oracle.blocks_of(engine.predict(predictor, q, k))
    assert mask.sum(-1).max() == math.ceil(0.1 * 17)


def test_bad_blocks_are_kept(engine: Engine) -> None:
    q, k = structured(500, 500)
    predictor = tamis.Sparge(topk=0.2, similarity=0.3)
    q[:, :, 200], k[:, :, 300] = math.nan, math.inf
    mask = oracle.blocks_of(engine.predict(predictor, q, k))
    assert mask[:, :, 1].all()
    assert mask[..., 4].all()
    assert not mask.all()


def test_explicit_positions_move_the_diagonal(engine: Engine) -> None:
    """Reversed keys: the block that holds a row's own position is at the other end, and is kept."""
    q, k = structured(512, 512)
    position = torch.arange(512)
    predictor = tamis.Sparge(topk=0.01, similarity=-1.0, sink=False)
    mask = oracle.blocks_of(engine.predict(predictor, q, k, causal=True, positions=(position, position.flip(0))))
    for i in range(4):
        assert mask[:, :, i, 7 - 2 * i].all()
        assert mask[:, :, i, 6 - 2 * i].all()


@pytest.mark.large
def test_strides_and_dtypes(engine: Engine) -> None:
    q, k = structured(500, 500)
    predictor = tamis.Sparge(cdf=0.8, similarity=0.3)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, y = q.to(dtype), k.to(dtype)
        expected = engine.predict(predictor, x.float(), y.float(), causal=True)
        strided = [z.transpose(1, 2).contiguous().transpose(1, 2) for z in (x, y)]
        for mask in (engine.predict(predictor, x, y, causal=True), engine.predict(predictor, *strided, causal=True)):
            assert torch.equal(oracle.blocks_of(mask), oracle.blocks_of(expected))


@pytest.mark.large
def test_short_and_empty(engine: Engine) -> None:
    for q_len, kv_len in ((1, 1), (1, 1000), (1000, 1), (65, 63)):
        q, k = structured(q_len, kv_len)
        for causal in (False, True):
            mask = engine.predict(tamis.Sparge(), q, k, causal=causal)
            seen = visible_by_tokens(q_len, kv_len, (128, 64), causal=causal)
            assert mask.seq_lens == (q_len, kv_len)
            assert oracle.blocks_of(mask).any(-1)[seen.any(-1).expand(2, 4, -1)].all()
    q, k = structured(100, 100)
    assert engine.predict(tamis.Sparge(), q[:0], k[:0]).kv_num_blocks.shape == (0, 4, 1)


@pytest.mark.large
def test_engines_agree() -> None:
    q, k = structured(1000, 1000)
    for predictor in (tamis.Sparge(), tamis.Sparge(cdf=0.7, topk=0.1, similarity=0.4), tamis.Window(256)):
        first, *others = (oracle.blocks_of(e.predict(predictor, q, k, causal=True)) for e in engines())
        assert all(torch.equal(other, first) for other in others)


def test_value_is_never_asked_for() -> None:
    with pytest.raises(TypeError):
        tamis.Sparge()(*qkv())  # type: ignore[call-arg, arg-type]


def test_settings_are_frozen_and_comparable() -> None:
    predictor = tamis.Sparge(cdf=0.9)
    assert dataclasses.is_dataclass(predictor)
    with pytest.raises(dataclasses.FrozenInstanceError):
        predictor.cdf = 0.5  # type: ignore[misc]
    assert predictor == tamis.Sparge(cdf=0.9)
    assert "cdf=0.9" in repr(predictor)


@pytest.mark.parametrize("causal", [False, True])
def test_window_predictor(engine: Engine, causal: bool) -> None:
    """The sink block and the blocks within the window of some row, whatever query and key hold."""
    q, k = structured(1000, 1000)
    mask = oracle.blocks_of(engine.predict(tamis.Window(200), q, k, causal=causal))
    near = visible_by_tokens(1000, 1000, (128, 64), causal=causal, window=200)
    assert torch.equal(
        oracle.blocks_of(engine.predict(tamis.Window(200, sink=0), q, k, causal=causal)), near.expand_as(mask)
    )
    near[..., 0] = True
    assert torch.equal(mask, near.expand_as(mask))
    kept = tamis.Window(200, sink=65, keep=keep_argument([(700, 701)], []))
    near[..., [1, 10]] = True
    near &= visible_by_tokens(1000, 1000, (128, 64), causal=causal)
    assert torch.equal(oracle.blocks_of(engine.predict(kept, q, k, causal=causal)), near.expand_as(mask))


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_one_op_is_its_steps(engine: Engine, trim: bool, padded: bool) -> None:
    """`predict` chooses what key_mean, summarize and select choose one after another."""
    q, k, _ = qkv(batch=2, heads=4, kv_heads=2, q_len=500, kv_len=700, dim=40)
    # A mean that hides the differences if it stays, and padding that moves it if it counts.
    k = k + 2 * torch.randn(40)
    k[:, :, 650:] *= 50
    segments = torch.zeros(2, 700, dtype=torch.int64)
    segments[:, 650:] = -1
    kv_segments = segments if padded else None
    topk, similarity = torch.tensor([0.2, 0.4, 0.6, 1.0]), torch.tensor([-1.0, 0.01, 0.016, 0.1])
    choice = (0.2, None, topk, similarity, True, False, None)  # not causal: no row keeps the padded block as its own
    rest = (None, None, None, None, trim)
    *together, prepared = engine.op("predict", q, k, None, kv_segments, *choice, 128, 64, *rest, "full")
    mean = engine.op("key_mean", k, kv_segments, None)
    summaries = (*engine.op("summarize", q, 128, None, None), *engine.op("summarize", k, 64, mean, kv_segments))
    apart = engine.op("select", *summaries, *choice, 500, 700, 128, 64, *rest)
    assert engine.backend == "triton" or not prepared
    for ours, theirs in zip(together, apart, strict=True):
        assert torch.equal(ours, theirs)
