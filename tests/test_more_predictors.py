"""The predictors that search the map, each against the plainest loops that say the same."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import oracle
import pytest
import torch
from samples import qkv
from torch import Tensor

import tamis

NEAR = 1e-5  # fp32 sums of softmax terms: a block this near to the cut may go either way
NEAR_INT8 = 0.005  # the same where scores are those of int8 attention: shares of these inputs are off by up to .004
SEARCHING = [
    tamis.Oracle(cdf=0.8),
    tamis.Probe(floor=0.05),
    tamis.Antidiagonal(cdf=0.8),
    tamis.VerticalSlash(0.2, 0.2),
    tamis.QuerySampled(0.7),
    tamis.QuerySampled(0.7, divergence=0.0),
    tamis.Random(0.3),
]
RANKED: list[Any] = [tamis.Oracle, tamis.Probe, tamis.Antidiagonal]


def structured(q_len: int, kv_len: int, *, heads: int = 4, kv_heads: int = 2, dim: int = 32) -> tuple[Tensor, Tensor]:
    """Query and key that attend unevenly."""
    q, k, _ = qkv(batch=2, heads=heads, kv_heads=kv_heads, q_len=q_len, kv_len=kv_len, dim=dim)
    for x in (q, k):
        block = torch.arange(x.shape[2]) // 48
        x += 1.2 * torch.randn(2, x.shape[1], int(block[-1]) + 1, dim)[:, :, block]
    return q, k


def map_of(q: Tensor, k: Tensor, scale: float | None = None, bias: Tensor | None = None, **masks: Any) -> Tensor:
    """The attention map token by token in fp64; rows that see nothing are 0."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q.double() @ k.double().transpose(-1, -2) * scale
    scores = scores if bias is None else scores + bias
    seen = oracle.visible(q.shape[2], k.shape[2], **masks)
    return torch.softmax(scores.masked_fill(~seen, -math.inf), -1).nan_to_num(0.0)


def by_blocks(p: Tensor, block_size: tuple[int, int] = (128, 64)) -> Tensor:
    """A map summed over blocks, each row of blocks then divided by its sum."""
    rows = torch.stack([part.sum(-2) for part in torch.split(p, block_size[0], -2)], -2)
    shares = torch.stack([part.sum(-1) for part in torch.split(rows, block_size[1], -1)], -1)
    return shares / shares.sum(-1, keepdim=True)


def seen_blocks(q_len: int, kv_len: int, block_size: tuple[int, int] = (128, 64), **masks: Any) -> Tensor:
    return oracle.visible_blocks(oracle.visible(q_len, kv_len, **masks), block_size)


def own_position(q_len: int, kv_len: int, block_size: tuple[int, int] = (128, 64)) -> Tensor:
    distance = torch.arange(q_len)[:, None] + (kv_len - q_len) - torch.arange(kv_len)
    return oracle.visible_blocks(distance == 0, block_size)


def ruled(
    shares: Tensor,
    seen: Tensor,
    cdf: float | None = None,
    topk: float | None = None,
    floor: float | None = None,
    near: float = NEAR,
) -> tuple[Tensor, Tensor]:
    """What rules keep of shares, and where that is certain; one row of blocks after another."""
    keep, certain = torch.zeros_like(shares, dtype=torch.bool), torch.ones_like(shares, dtype=torch.bool)
    for at in torch.cartesian_prod(*(torch.arange(size) for size in shares.shape[:-1])).tolist():
        row, row_seen = shares[tuple(at)].tolist(), seen.expand(shares.shape)[tuple(at)]
        blocks = sorted(row_seen.nonzero()[:, 0].tolist(), key=lambda j: -row[j])
        wanted = max(1, 0 if topk is None else math.ceil(topk * len(blocks) - 1e-9))
        before = 0.0
        for place, j in enumerate(blocks):
            keep[(*at, j)] = (
                place < wanted or (cdf is not None and before < cdf) or (floor is not None and row[j] >= floor)
            )
            rival = blocks[wanted if place < wanted else wanted - 1] if wanted < len(blocks) else None
            certain[(*at, j)] = not (
                (cdf is not None and abs(before - cdf) < near)
                or (floor is not None and abs(row[j] - floor) < near)
                or (rival is not None and abs(row[j] - row[rival]) < near)
            )
            before += row[j]
    return keep, certain


def agree(mask: Any, keep: Tensor, certain: Tensor) -> None:
    mask.validate()
    assert certain.double().mean() > 0.9
    assert 0.05 < keep.double().mean() < 0.95
    assert torch.equal(oracle.blocks_of(mask)[certain], keep[certain])


RULES: list[dict[str, float]] = [{"cdf": 0.7}, {"topk": 0.3}, {"floor": 0.08}, {"cdf": 0.4, "topk": 0.2, "floor": 0.2}]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("q_len", "kv_len"), [(300, 300), (130, 521)])
def test_oracle_is_the_map(rule: dict[str, float], causal: bool, q_len: int, kv_len: int) -> None:
    q, k = structured(q_len, kv_len)
    seen = seen_blocks(q_len, kv_len, causal=causal)
    keep, certain = ruled(by_blocks(map_of(q, k, causal=causal)), seen, **rule)
    always = own_position(q_len, kv_len) if causal else torch.tensor(False)
    agree(tamis.Oracle(**rule, sink=False)(q, k, causal=causal), (keep | always) & seen, certain)  # type: ignore[arg-type]


def masks_of(q_len: int, kv_len: int) -> list[dict[str, Any]]:
    hole = torch.ones(q_len, kv_len, dtype=torch.bool)
    hole[:, 64:200] = False
    return [
        {"window": 100},
        {"causal": True, "window": 150},
        {"attn_mask": hole},
        {"attn_mask": torch.where(hole, 0.0, -math.inf), "causal": True},
        {"segments": (torch.arange(q_len) // 100, torch.arange(kv_len) // 150)},
        {"segments": (torch.zeros(q_len).long(), torch.where(torch.arange(kv_len) < kv_len - 90, 0, -1))},
        {"positions": (torch.arange(q_len) + 100, torch.arange(kv_len).flip(0)), "causal": True},
    ]


@pytest.mark.parametrize("which", range(len(masks_of(1, 1))))
def test_oracle_sees_what_attention_sees(which: int) -> None:
    q, k = structured(300, 520)
    masks = masks_of(300, 520)[which]
    mask = oracle.blocks_of(tamis.Oracle(topk=0.4, sink=False)(q, k, **masks))
    seen = seen_blocks(300, 520, **masks)
    keep, certain = ruled(by_blocks(map_of(q, k, **masks)).nan_to_num(0.0), seen, topk=0.4)
    always = torch.zeros_like(keep)
    if "positions" in masks:
        always |= oracle.visible_blocks(masks["positions"][0][:, None] == masks["positions"][1], (128, 64))
    elif "causal" in masks:
        always |= own_position(300, 520)
    keep = (keep | always) & seen
    assert torch.equal(mask[certain & (keep | seen)], keep[certain & (keep | seen)])
    assert not (mask & ~seen).any()


def test_oracle_counts_what_a_mask_adds_and_the_scale() -> None:
    q, k = structured(300, 520)
    bias = 3 * torch.randn(300, 520)
    keep, certain = ruled(by_blocks(map_of(q, k, 0.5, bias)), torch.tensor(True), topk=0.3)
    agree(tamis.Oracle(topk=0.3, sink=False)(q, k, attn_mask=bias, scale=0.5), keep, certain)


def test_a_row_sees_its_own_key() -> None:
    """The last key holds nearly all attention: no other block is needed for half of it."""
    q, k = 0.1 * torch.randn(1, 1, 1, 64), 0.1 * torch.randn(1, 1, 1000, 64)
    k[:, :, -1] = q[:, :, 0] * 16 / q.square().sum() * 8
    mask = oracle.blocks_of(tamis.Oracle(cdf=0.5, sink=False)(q, k, causal=True))
    assert mask[0, 0, 0].nonzero()[:, 0].tolist() == [15]


@pytest.mark.parametrize("kind", RANKED)
def test_topk_is_a_share_of_what_is_visible(kind: Any) -> None:
    q, k = structured(256, 640)
    shown = torch.ones(256, 640, dtype=torch.bool)
    shown[:128, 256:] = False
    mask = oracle.blocks_of(kind(topk=0.5, sink=False)(q, k, attn_mask=shown))
    assert (mask.sum(-1) == torch.tensor([2, 5])).all()


def test_what_is_unknown_is_kept() -> None:
    """Rows that are asked and see nothing, and scores that no fp32 holds."""
    q, k = structured(256, 640)
    shown = torch.ones(256, 640, dtype=torch.bool)
    shown[1:128] = False
    shown[0, :128] = False
    mask = oracle.blocks_of(tamis.Probe(floor=0.5, sink=False)(q, k, attn_mask=shown))
    assert mask[:, :, 0].int().tolist() == [[[0, 0, 1, 1, 1, 1, 1, 1, 1, 1]] * 4] * 2
    assert not mask[:, :, 1].all()
    q[:, :, 128:] *= 1e20
    for kind in (tamis.Oracle, tamis.Antidiagonal):
        huge = oracle.blocks_of(kind(topk=0.1, sink=False)(q, k * 1e20))
        assert huge[:, :, 1].all()


@pytest.mark.parametrize("block_size", [(64, 64), (64, 128)])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_probing_every_row_is_the_oracle(block_size: tuple[int, int], rule: dict[str, float]) -> None:
    q, k = structured(320, 520)
    options: dict[str, Any] = {"causal": True, "block_size": block_size}
    seen = seen_blocks(320, 520, block_size, causal=True)
    shares = by_blocks(map_of(q, k, causal=True), block_size)
    keep, certain = ruled(shares, seen, **rule, near=NEAR_INT8)
    mask = tamis.Probe(rows=64, sink=False, **rule)(q, k, **options)  # type: ignore[arg-type]
    agree(mask, (keep | own_position(320, 520, block_size)) & seen, certain)


@pytest.mark.parametrize("rows", [1, 4])
def test_probe_asks_evenly_spaced_rows(rows: int) -> None:
    q, k = structured(300, 520)
    tokens = [
        block * 128 + (2 * i + 1) * size // (2 * rows) for block, size in enumerate((128, 128, 44)) for i in range(rows)
    ]
    p = map_of(q, k, causal=True)[:, :, tokens]
    seen = seen_blocks(300, 520, causal=True)
    keep, certain = ruled(by_blocks(p, (rows, 64)), seen, floor=0.06, near=NEAR_INT8)
    agree(
        tamis.Probe(floor=0.06, rows=rows, sink=False)(q, k, causal=True),
        (keep | own_position(300, 520)) & seen,
        certain,
    )


def test_probe_counts_what_a_mask_adds() -> None:
    q, k = structured(256, 520)
    bias = 2 * torch.randn(256, 520)
    p = map_of(q, k, bias=bias)[:, :, [16, 48, 80, 112, 144, 176, 208, 240]]
    keep, certain = ruled(by_blocks(p, (4, 64)), torch.tensor(True), topk=0.4, near=NEAR_INT8)
    mask = oracle.blocks_of(tamis.Probe(topk=0.4, sink=False)(q, k, attn_mask=bias))
    assert certain.double().mean() > 0.7
    assert torch.equal(mask[certain], keep[certain])


def test_probe_asks_no_padding_and_trusts_no_mixed_block() -> None:
    q, k = structured(512, 512)
    padded = torch.where(torch.arange(512) % 128 < 100, -1, 0)
    mask = tamis.Probe(floor=0.06, rows=2)(q, k, segments=(padded, torch.zeros(512).long()))
    tokens = [128 * block + 100 + row for block in range(4) for row in (7, 21)]
    keep, certain = ruled(
        by_blocks(map_of(q, k)[:, :, tokens], (2, 64)), torch.tensor(True), floor=0.06, near=NEAR_INT8
    )
    keep[..., 0] = True
    agree(mask, keep, certain)
    two = (torch.arange(512) >= 300).long()
    both = oracle.blocks_of(tamis.Probe(floor=0.9)(q, k, segments=(two, two)))
    seen = seen_blocks(512, 512, segments=(two, two))
    assert both[:, :, 2].all()
    assert not both[:, :, 1][..., seen[0, 0, 1]].all()


def test_probe_joins_keys_beyond_one_call() -> None:
    """The engine is asked for 64 key blocks at a time: the shares of 4,160 keys are those of the whole row."""
    q, k = structured(128, 4160, heads=2, kv_heads=1, dim=16)
    k[..., -64:, :] *= 1.5
    shares = by_blocks(map_of(q, k)[:, :, [16, 48, 80, 112]], (4, 64))
    keep, certain = ruled(shares, torch.tensor(True), floor=0.02, near=0.002)
    mask = oracle.blocks_of(tamis.Probe(floor=0.02, sink=False)(q, k))
    assert certain.double().mean() > 0.9
    assert keep[..., -1].any(), "a block of the second call"
    assert keep[..., :-1].any()
    assert torch.equal(mask[certain], keep[certain])


def test_probed_rows_that_see_nothing_do_not_count() -> None:
    """A mask hides everything from the first 64 of 128 queries: the other rows decide."""
    q, k = structured(128, 512)
    keep, certain = ruled(
        by_blocks(map_of(q, k)[:, :, [80, 112]], (2, 64)), torch.tensor(True), floor=0.1, near=NEAR_INT8
    )
    agree(tamis.Probe(floor=0.1, sink=False)(q, k, attn_mask=torch.arange(128)[:, None] >= 64), keep, certain)


@pytest.mark.parametrize("stride", [4, 16])
@pytest.mark.parametrize("causal", [False, True])
def test_antidiagonals(stride: int, causal: bool) -> None:
    """Patch by patch: the mean of query (stride - 1 - i) with key i, softmax over the patches of a row."""
    q, k = structured(256, 320)
    scores = (q.double() @ k.double().repeat_interleave(2, 1).transpose(-1, -2)) / 32**0.5
    patches = scores.unflatten(-1, (-1, stride)).unflatten(-3, (-1, stride)).transpose(-2, -3)
    line = patches.flip(-2).diagonal(dim1=-2, dim2=-1).mean(-1)
    seen = oracle.visible_blocks(oracle.visible(256, 320, causal=causal), (stride, stride))
    p = torch.softmax(line.masked_fill(~seen, -math.inf), -1)
    seen = seen_blocks(256, 320, causal=causal)
    keep, certain = ruled(by_blocks(p, (128 // stride, 64 // stride)), seen, cdf=0.6)
    always = own_position(256, 320) if causal else torch.tensor(False)
    agree(tamis.Antidiagonal(cdf=0.6, stride=stride, sink=False)(q, k, causal=causal), (keep | always) & seen, certain)


def test_antidiagonals_of_masked_patches() -> None:
    """Patches that a mask hides from some queries have no share there: as if those keys were not there."""
    q, k = structured(256, 512)
    hole = torch.ones(512, dtype=torch.bool)
    hole[64:128] = False
    for block in (3, 4, 5, 6):  # three of the four patches of a block
        hole[64 * block + 16 : 64 * block + 64] = False
    shown = torch.ones(256, 512, dtype=torch.bool)
    shown[:128] = hole
    predictor = tamis.Antidiagonal(cdf=0.5, stride=16, sink=False)
    ours = oracle.blocks_of(predictor(q, k, attn_mask=shown))
    without = oracle.blocks_of(predictor(q, k, segments=(torch.zeros(256).long(), hole.long() - 1)))
    whole = oracle.blocks_of(predictor(q, k))
    assert torch.equal(ours[:, :, 0], without[:, :, 0])
    assert torch.equal(ours[:, :, 1], whole[:, :, 1])
    assert not torch.equal(whole[:, :, 0], without[:, :, 0])


def test_a_group_with_missing_tokens_is_its_mean() -> None:
    """Ends that no group fills, and padding inside: as if the missing tokens were the mean of the others."""
    q, k = structured(253, 318)
    gone = torch.arange(318) % 8 == 5
    whole = [
        torch.cat([x, x[:, :, -tail:].mean(2, keepdim=True).expand(-1, -1, 8 - tail, -1)], 2)
        for x, tail in ((q, 5), (k, 6))
    ]
    group = torch.arange(320) // 8
    filled = whole[1].clone()
    for i in range(39):
        filled[:, :, group == i] = torch.where(
            torch.arange(8)[:, None] == 5,
            k[:, :, 8 * i : 8 * i + 8][:, :, torch.arange(8) != 5].mean(2, keepdim=True),
            k[:, :, 8 * i : 8 * i + 8],
        )
    filled[:, :, 312:] = torch.where((torch.arange(8) < 5)[:, None], k[:, :, 312:317].mean(2, keepdim=True), 0)[
        :, :, :1
    ] * 0 + torch.cat([k[:, :, 312:317], k[:, :, 312:317].mean(2, keepdim=True).expand(-1, -1, 3, -1)], 2)
    predictor = tamis.Antidiagonal(topk=0.3, stride=8)
    segments = (torch.zeros(253).long(), torch.where(gone, -1, 0))
    ours = oracle.blocks_of(predictor(q, k.masked_fill(gone[:, None], math.nan), segments=segments))
    assert torch.equal(ours, oracle.blocks_of(predictor(whole[0], filled)))


def lines_of(p: Tensor, seen: Tensor, block_size: tuple[int, int]) -> tuple[dict[int, float], dict[int, float]]:
    """The mass of each visible column of blocks, and of each visible diagonal, of a map `[q_len, kv_len]` of one head.

    A diagonal is named by the distance of the first tokens of its blocks; pairs at any distance that one of its blocks
    holds count.
    """
    bq, bk = block_size
    by_distance: dict[int, float] = {}
    for row, weights in enumerate(p.tolist()):
        for key, weight in enumerate(weights):
            by_distance[row - key] = by_distance.get(row - key, 0.0) + weight
    columns = {j: float(p[:, j * bk : (j + 1) * bk].sum()) for j in seen.any(0).nonzero()[:, 0].tolist()}
    names = {i * bq - j * bk for i, j in seen.nonzero().tolist()}
    diagonals = {d: sum(by_distance.get(e, 0.0) for e in range(d - bk + 1, d + bq)) for d in names}
    return columns, diagonals


def largest(mass: dict[int, float], share: float) -> set[int]:
    return set(sorted(mass, key=lambda name: -mass[name])[: math.ceil(share * len(mass) - 1e-9)])


def reaching(mass: dict[int, float], cdf: float) -> set[int]:
    chosen: set[int] = set()
    for name in sorted(mass, key=lambda name: -mass[name]):
        if sum(mass[other] for other in chosen) >= cdf * sum(mass.values()):
            break
        chosen.add(name)
    return chosen


def table_of(columns: set[int], diagonals: set[int], seen: Tensor, block_size: tuple[int, int]) -> Tensor:
    table = torch.zeros_like(seen)
    for i, j in seen.nonzero().tolist():
        table[i, j] = j in columns or i * block_size[0] - j * block_size[1] in diagonals
    return table


@pytest.mark.parametrize("block_size", [(128, 64), (64, 128), (128, 128)])
@pytest.mark.parametrize(("vertical", "slash"), [(0.3, 0.0), (0.0, 0.2), (0.2, 0.1)])
def test_vertical_and_slash(block_size: tuple[int, int], vertical: float, slash: float) -> None:
    q, k = structured(300, 520)
    p = map_of(q, k, causal=True)
    p[:, :, :268] = 0.0
    seen = seen_blocks(300, 520, block_size, causal=True)[0, 0]
    predictor = tamis.VerticalSlash(vertical, slash, rows=32, sink=False)
    mask = oracle.blocks_of(predictor(q, k, causal=True, block_size=block_size))
    for b in range(2):
        for h in range(4):
            columns, diagonals = lines_of(p[b, h], seen, block_size)
            table = table_of(largest(columns, vertical), largest(diagonals, slash), seen, block_size)
            assert torch.equal(mask[b, h], (table | own_position(300, 520, block_size)) & seen)


def test_the_last_queries_are_no_padding() -> None:
    """Trailing padding, another number in each batch: the same lines as without it."""
    q, k = structured(400, 400)
    segments = torch.zeros(2, 400).long()
    segments[0, 390:], segments[1, 300:] = -1, -1
    for predictor in (tamis.VerticalSlash(0.2, 0.1), tamis.QuerySampled(0.5, divergence=0.0)):
        mask = oracle.blocks_of(predictor(q, k, causal=True, segments=(segments, segments)))
        for b, length in enumerate((390, 300)):
            alone = oracle.blocks_of(predictor(q[b : b + 1, :, :length], k[b : b + 1, :, :length], causal=True))
            blocks = alone.shape[2:]
            # Shares are of what is visible, and blocks of padding are not.
            assert torch.equal(mask[b : b + 1, :, : blocks[0], : blocks[1]], alone)


def test_queries_asked_in_vain() -> None:
    """Last queries that see nothing point nowhere: everything is kept."""
    q, k = structured(300, 400)
    shown = torch.ones(4, 300, 400, dtype=torch.bool)
    shown[1, 128:] = False
    for predictor in (tamis.VerticalSlash(0.2, 0.1), tamis.QuerySampled(0.5, divergence=0.0)):
        mask = oracle.blocks_of(predictor(q, k, attn_mask=shown))
        assert mask[:, 1, 0].all()
        assert not mask[:, 1, 1:].any()
        assert not mask[:, 0, 0].all()


def block_means(x: Tensor, block: int) -> Tensor:
    return torch.stack([part.double().mean(2) for part in torch.split(x, block, 2)], 2)


def test_only_queries_that_see_something_are_asked() -> None:
    """Of two query blocks one sees nothing, and of the other only 32 rows do."""
    q, k = structured(256, 520)
    shown = torch.zeros(256, 520, dtype=torch.bool)
    shown[128:160] = True
    p = map_of(q, k, attn_mask=shown)
    seen = seen_blocks(256, 520, attn_mask=shown)[0, 0]
    scores = block_means(q, 128)[:, :, 1:] @ block_means(k, 64).repeat_interleave(2, 1).transpose(-1, -2) / 32**0.5
    means = torch.softmax(scores, -1)[:, :, 0]
    for divergence in (0.0, 1.0):
        predictor = tamis.QuerySampled(0.5, divergence=divergence, sink=False)
        mask = oracle.blocks_of(predictor(q, k, attn_mask=shown))
        for b in range(2):
            for h in range(4):
                columns, diagonals = lines_of(p[b, h], seen, (128, 64))
                table = table_of(reaching(columns, 0.5), reaching(diagonals, 0.5), seen, (128, 64))
                if divergence:
                    table = torch.zeros_like(seen)
                    table[1, list(reaching(dict(enumerate(means[b, h].tolist())), 0.5))] = True
                assert torch.equal(mask[b, h], table)


@pytest.mark.parametrize("masks", [{}, {"causal": True}, {"window": 150}], ids=str)
def test_query_sampled_by_the_book(masks: dict[str, Any]) -> None:
    q, k = structured(300, 521)
    seen = seen_blocks(300, 521, **masks)[0, 0]
    always = own_position(300, 521) if masks.get("causal") else torch.tensor(False)
    p = map_of(q, k, **masks)
    p[:, :, :172] = 0.0
    keys = block_means(k, 64).repeat_interleave(2, 1)
    scores = block_means(q, 128) @ keys.transpose(-1, -2) / 32**0.5
    means = torch.softmax(scores.masked_fill(~seen, -math.inf), -1).masked_fill(~seen, 0.0)
    # The sample is rows 172 to 299, of the second and third block of queries.
    estimated = (q[:, :, 172:].double().mean(2, keepdim=True) @ keys.transpose(-1, -2))[:, :, 0] / 32**0.5
    estimate = torch.softmax(estimated.masked_fill(~seen[1:].any(0), -math.inf), -1)
    sampled = by_blocks(p[:, :, 172:])[:, :, 0]
    middle = (sampled + estimate) / 2
    apart = sum(torch.xlogy(x, x / middle.clamp(min=1e-30)).sum(-1) / 2 for x in (sampled, estimate))
    distance = torch.as_tensor(apart).sqrt()
    between = float(distance.median())
    for divergence in (0.0, between + 1e-6, 1.0):
        predictor = tamis.QuerySampled(0.6, divergence=divergence, sink=False)
        mask = oracle.blocks_of(predictor(q, k, **masks))
        for b in range(2):
            for h in range(4):
                if distance[b, h] < divergence:
                    mass = {n: float(x) for n, x in enumerate(means[b, h].flatten()) if seen.flatten()[n]}
                    table = torch.zeros_like(seen).flatten()
                    table[list(reaching(mass, 0.6))] = True
                    table = table.view_as(seen)
                else:
                    columns, diagonals = lines_of(p[b, h], seen, (128, 64))
                    table = table_of(reaching(columns, 0.6), reaching(diagonals, 0.6), seen, (128, 64))
                assert torch.equal(mask[b, h], (table | always) & seen), (divergence, b, h)


def test_random_has_its_density_and_its_seed() -> None:
    q, k = structured(1000, 1000)
    for density in (0.1, 0.25, 0.7, 1.0):
        mask = oracle.blocks_of(tamis.Random(density, sink=False)(q, k))
        assert (mask.sum(-1) == math.ceil(density * 16 - 1e-9)).all()
    causal = oracle.blocks_of(tamis.Random(0.5)(q, k, causal=True))
    seen = seen_blocks(1000, 1000, causal=True)
    assert torch.equal(
        causal.sum(-1), torch.ceil(seen.sum(-1) * 0.5).long().clamp(min=3).minimum(seen.sum(-1)).expand(2, 4, -1)
    )
    mask = oracle.blocks_of(tamis.Random(0.25)(q, k))
    assert torch.equal(mask, oracle.blocks_of(tamis.Random(0.25)(q * 2, -k)))
    assert not torch.equal(mask, oracle.blocks_of(tamis.Random(0.25, seed=1)(q, k)))
    assert len({tuple(mask[b, h].flatten().tolist()) for b in range(2) for h in range(4)}) == 8


@pytest.mark.parametrize("predictor", SEARCHING, ids=lambda p: repr(p)[:40])
@pytest.mark.parametrize("which", range(len(masks_of(1, 1))))
def test_masks_are_never_seen_through(predictor: Any, which: int) -> None:
    q, k = structured(300, 520)
    masks = masks_of(300, 520)[which]
    mask = oracle.blocks_of(predictor(q, k, **masks).validate())
    seen = seen_blocks(300, 520, **masks)
    assert not (mask & ~seen).any()
    if masks.get("causal"):
        positions = masks.get("positions", (torch.arange(300) + 220, torch.arange(520)))
        own = oracle.visible_blocks((positions[0][:, None] == positions[1]), (128, 64)) & seen
        assert mask[own.expand_as(mask)].all()


@pytest.mark.parametrize("predictor", SEARCHING, ids=lambda p: repr(p)[:40])
def test_lengths_and_shapes(predictor: Any) -> None:
    for q_len, kv_len in ((1, 1), (1, 1000), (1000, 1), (65, 63), (63, 65), (0, 5), (5, 0)):
        q, k = qkv(batch=2, heads=4, kv_heads=2, q_len=q_len, kv_len=kv_len, dim=40)[:2]
        for causal in (False, True):
            mask = predictor(q, k, causal=causal).validate()
            assert mask.seq_lens == (q_len, kv_len)
            seen = seen_blocks(q_len, kv_len, causal=causal) if q_len and kv_len else torch.zeros(1, 1, 0, 0).bool()
            kept = oracle.blocks_of(mask)
            if q_len and kv_len:
                assert kept.any(-1)[seen.any(-1).expand(2, 4, -1)].all()
    q, k = structured(100, 100)
    assert predictor(q[:0], k[:0]).kv_num_blocks.shape == (0, 4, 1)
    assert predictor(q[0, 0], k[0, 0]).kv_num_blocks.shape == (1, 1, 1)


@pytest.mark.parametrize("predictor", SEARCHING[:-1], ids=lambda p: repr(p)[:40])
def test_grouped_heads_strides_and_dtypes(predictor: Any) -> None:
    q, k = structured(500, 700)
    mask = oracle.blocks_of(predictor(q, k, causal=True))
    assert torch.equal(oracle.blocks_of(predictor(q, k.repeat_interleave(2, 1), causal=True)), mask)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    assert torch.equal(oracle.blocks_of(predictor(*strided, causal=True)), mask)
    for dtype in (torch.bfloat16, torch.float16):
        x, y = q.to(dtype), k.to(dtype)
        expected = oracle.blocks_of(predictor(x.float(), y.float(), causal=True))
        assert torch.equal(oracle.blocks_of(predictor(x, y, causal=True)), expected)
    assert torch.equal(oracle.blocks_of(predictor(q.requires_grad_(), k, causal=True)), mask)


@pytest.mark.parametrize("predictor", SEARCHING[:-1], ids=lambda p: repr(p)[:40])
def test_scale_is_a_factor_of_the_query(predictor: Any) -> None:
    q, k = structured(500, 700)
    at_4 = oracle.blocks_of(predictor(q * 16, k, scale=0.25))
    assert torch.equal(oracle.blocks_of(predictor(q, k, scale=4.0)), at_4)
    assert not torch.equal(oracle.blocks_of(predictor(q, k, scale=0.05)), at_4)


@pytest.mark.parametrize("predictor", SEARCHING, ids=lambda p: repr(p)[:40])
def test_padding_does_not_count(predictor: Any) -> None:
    q, k = structured(500, 500)
    segment = torch.where(torch.arange(500) % 97 < 80, 0, -1)
    clean = oracle.blocks_of(predictor(q, k, causal=True, segments=(segment, segment)))
    for bad in (math.nan, math.inf, 1e20):
        dirty = [x.masked_fill((segment < 0)[:, None], bad) for x in (q, k)]
        assert torch.equal(oracle.blocks_of(predictor(*dirty, causal=True, segments=(segment, segment))), clean)


@pytest.mark.parametrize("predictor", SEARCHING, ids=lambda p: repr(p)[:40])
def test_bad_blocks_are_kept(predictor: Any) -> None:
    q, k = structured(500, 500)
    q[:, :, 200], k[:, :, 300] = math.nan, math.inf
    mask = oracle.blocks_of(predictor(q, k))
    assert mask[:, :, 1].all()
    assert mask[..., 4].all()
    assert not mask[:, :, 0].all()
    assert not mask[:, :, 2:].all()


@pytest.mark.parametrize("predictor", SEARCHING, ids=lambda p: repr(p)[:40])
def test_sink_and_ranges(predictor: Any) -> None:
    q, k = structured(1000, 1000)
    k[:, :, :64] = -8 * q.mean((1, 2), keepdim=True)
    plain = oracle.blocks_of(dataclasses.replace(predictor, sink=False)(q, k))
    with_sink = oracle.blocks_of(predictor(q, k))
    assert with_sink[..., 0].all()
    ranges: Any = {"keys": [(100, 130)], "queries": [(250, 260)]}
    kept = oracle.blocks_of(dataclasses.replace(predictor, keep=ranges)(q, k))
    assert kept[..., [1, 2]].all()
    assert kept[:, :, [1, 2]].all()
    assert not kept.all()
    if not isinstance(predictor, tamis.Random):
        assert torch.equal(with_sink[..., 1:], plain[..., 1:])
        kept[..., [1, 2]], kept[:, :, [1, 2]] = with_sink[..., [1, 2]], with_sink[:, :, [1, 2]]
        assert torch.equal(kept, with_sink)


@pytest.mark.parametrize("kind", RANKED)
def test_settings_per_head(kind: Any) -> None:
    q, k = structured(500, 700)
    for rule, values in (
        ("cdf", [0.3, 0.9, 0.6, 1.0]),
        ("topk", [0.1, 0.2, 0.5, 1.0]),
        ("floor", [0.5, 0.1, 0.05, 0.01]),
    ):
        mask = oracle.blocks_of(kind(**{rule: values})(q, k, causal=True))
        for head, value in enumerate(values):
            alone = oracle.blocks_of(kind(**{rule: value})(q, k, causal=True))
            assert torch.equal(mask[:, head], alone[:, head])
        counts = mask.sum((0, 2, 3)).tolist()
        assert counts[0] < counts[-1]
    # Three sizes that say how much, each of which does something of its own.
    together = oracle.blocks_of(kind(cdf=0.4, topk=0.2, floor=0.1)(q, k))
    parts = [
        oracle.blocks_of(kind(**{rule: value})(q, k)) for rule, value in (("cdf", 0.4), ("topk", 0.2), ("floor", 0.1))
    ]
    assert torch.equal(together, parts[0] | parts[1] | parts[2])


def test_lines_and_draws_per_head() -> None:
    q, k = structured(500, 700)
    for make in (
        lambda x: tamis.VerticalSlash(x, [0.1] * 4 if isinstance(x, list) else 0.1),
        lambda x: tamis.QuerySampled(x),
        lambda x: tamis.Random(x),
    ):
        values = [0.1, 0.3, 0.5, 0.9]
        mask = oracle.blocks_of(make(values)(q, k, causal=True))
        for head, value in enumerate(values):
            assert torch.equal(mask[:, head], oracle.blocks_of(make(value)(q, k, causal=True))[:, head])
    with pytest.raises(ValueError, match=r"density must be one number or one per query head \(4\), got \(3,\)"):
        tamis.Random([0.1, 0.2, 0.3])(q, k)


@pytest.mark.parametrize(
    "predictor",
    [
        *(kind(**{rule: 1.0}) for kind in RANKED for rule in ("cdf", "topk")),
        tamis.QuerySampled(1.0, divergence=0.0),
        tamis.QuerySampled(1.0, divergence=1.0),
        tamis.VerticalSlash(1.0, 0.0),
        tamis.VerticalSlash(0.0, 1.0),
        tamis.Random(1.0),
    ],
    ids=lambda p: repr(p)[:40],
)
def test_a_full_setting_keeps_everything_visible(predictor: Any) -> None:
    """Also blocks whose share is nothing in fp32: the scores here are that far apart."""
    q, k = structured(500, 700)
    mask = predictor(q, k, causal=True, scale=20.0)
    assert mask.density(causal=True) == 1.0
    assert not (oracle.blocks_of(mask) & ~seen_blocks(500, 700, causal=True)).any()


def planted(kind: str, distance: int = 301) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and the blocks `[8, 16]` where a single token, diagonal or patch draws nearly all attention."""
    q, k = 0.1 * torch.randn(1, 1, 1024, 64), 0.1 * torch.randn(1, 1, 1024, 64)
    blocks = torch.zeros(8, 16, dtype=torch.bool)
    if kind == "stripe":  # one key that every query looks at
        q[..., 0] += 12
        k[:, :, 400, 0] += 12
        blocks[:, 6] = True
    elif (
        kind == "slash"
    ):  # every query looks at the key so many tokens before it: antidiagonals meet odd distances alone
        code = torch.nn.functional.normalize(torch.randn(1024, 64), dim=-1) * 24
        k += code
        q[:, :, distance:] += code[:-distance]
        for row in range(distance, 1024):
            blocks[row // 128, (row - distance) // 64] = True
    else:  # the queries of one block look at the keys of one other
        q[:, :, 512:640, 0] += 10
        k[:, :, 128:192, 0] += 10
        blocks[4, 2] = True
    return q, k, blocks


@pytest.mark.parametrize(
    ("kind", "predictor"),
    [
        ("stripe", tamis.VerticalSlash(0.1, 0.0)),
        ("slash", tamis.VerticalSlash(0.0, 0.2)),
        ("stripe", tamis.QuerySampled(0.7, divergence=0.0)),
        ("block", tamis.QuerySampled(0.5, divergence=1.0)),
        ("stripe", tamis.Antidiagonal(topk=0.15, stride=8)),
        ("slash", tamis.Antidiagonal(topk=0.25, stride=8)),
        ("block", tamis.Antidiagonal(topk=0.15, stride=8)),
        ("stripe", tamis.Probe(floor=0.3)),
        ("slash", tamis.Probe(floor=0.1, rows=8)),
        ("block", tamis.Probe(floor=0.3)),
        ("stripe", tamis.Oracle(floor=0.3)),
        ("slash", tamis.Oracle(floor=0.001)),
        ("block", tamis.Oracle(floor=0.3)),
    ],
    ids=lambda x: repr(x)[:40],
)
def test_planted_structure_is_found(kind: str, predictor: Any) -> None:
    q, k, blocks = planted(kind)
    mask = oracle.blocks_of(dataclasses.replace(predictor, sink=False)(q, k))[0, 0]
    if kind == "slash" and isinstance(predictor, tamis.Probe):
        # Eight rows cannot meet a block that the slash only grazes.
        blocks &= map_blocks(q, k) > 0.13
    assert mask[blocks].all()
    assert mask.double().mean() < 0.6


@pytest.mark.parametrize("distance", [257, 319])
def test_a_slash_at_the_edge_of_blocks(distance: int) -> None:
    """Distances that a diagonal of blocks holds in one corner only: three of the 30 diagonals, all as heavy."""
    q, k, blocks = planted("slash", distance)
    mask = oracle.blocks_of(tamis.VerticalSlash(0.0, 0.1, sink=False)(q, k))[0, 0]
    assert mask[blocks].all()


def map_blocks(q: Tensor, k: Tensor) -> Tensor:
    return by_blocks(map_of(q, k))[0, 0]


def test_a_single_key_vanishes_in_a_mean() -> None:
    """Why probing wins: the stripe's key is one of 64, and a few exact rows see it where block means do not."""
    q, k, blocks = planted("stripe")
    k[:, :, 384:448, 0] -= 12 / 64 * 1.5
    means = oracle.blocks_of(tamis.Sparge(topk=0.15, similarity=-1.0, sink=False)(q, k))[0, 0]
    assert not means[blocks].any()
    assert oracle.blocks_of(tamis.Probe(topk=0.15, rows=1, sink=False)(q, k))[0, 0][blocks].all()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: tamis.Oracle(cdf=0.0), ValueError, r"cdf must be in \(0, 1\], got 0.0"),
        (lambda: tamis.Probe(floor=1.5), ValueError, r"floor must be in \(0, 1\], got 1.5"),
        (lambda: tamis.Probe(rows=0), ValueError, "rows must be at least 1 and at most 64, got 0"),
        (lambda: tamis.Probe(rows=2.0), TypeError, r"rows must be an integer, got 2.0 \(float\)"),
        (lambda: tamis.Antidiagonal(topk="half"), TypeError, "topk must be a number or one per query head, got 'half'"),
        (lambda: tamis.Antidiagonal(stride=12), ValueError, "stride must divide 64, got 12"),
        (lambda: tamis.Antidiagonal(stride=128), ValueError, "stride must be at least 1 and at most 64, got 128"),
        (lambda: tamis.VerticalSlash(-0.1, 0.1), ValueError, r"vertical must be in \[0, 1\], got -0.1"),
        (lambda: tamis.VerticalSlash(0.1, 1.1), ValueError, r"slash must be in \[0, 1\], got 1.1"),
        (lambda: tamis.VerticalSlash(0.1, 0.1, rows=0), ValueError, "rows must be at least 1"),
        (lambda: tamis.QuerySampled(0.0), ValueError, r"cdf must be in \(0, 1\], got 0.0"),
        (lambda: tamis.QuerySampled(0.9, [0.1, 2.0]), ValueError, r"divergence must be in \[0, 1\], got 2.0"),
        (lambda: tamis.Random(0.0), ValueError, r"density must be in \(0, 1\], got 0.0"),
        (lambda: tamis.Random(0.5, seed=-1), ValueError, "seed must be at least 0"),
        (lambda: tamis.Random(0.5, sink=1), TypeError, "sink must be True or False, got int"),
        (lambda: tamis.Oracle(keep={"rows": []}), ValueError, "keep knows 'keys' and 'queries'"),
    ],
)
def test_errors_name_the_argument(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("predictor", SEARCHING, ids=lambda p: repr(p)[:40])
def test_calls_are_checked_and_settings_frozen(predictor: Any) -> None:
    q, k = structured(100, 100)
    with pytest.raises(ValueError, match="key has 3 heads and query 4"):
        predictor(q, torch.randn(2, 3, 100, 32))
    with pytest.raises(ValueError, match="backend must be one of"):
        predictor(q, k, backend="abacus")
    with pytest.raises(TypeError):
        predictor(q, k, softcap=3.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        predictor.sink = False
    assert predictor == dataclasses.replace(predictor)
    assert hash(predictor) == hash(dataclasses.replace(predictor))


def test_defaults_are_one_rule() -> None:
    assert tamis.Probe() == tamis.Probe(floor=tamis.Probe().floor)
    assert tamis.Probe(topk=0.5).floor is None
    assert tamis.Antidiagonal() == tamis.Antidiagonal(cdf=0.9)
    assert tamis.Oracle() == tamis.Oracle(cdf=0.95)


@pytest.mark.parametrize("predictor", SEARCHING, ids=lambda p: repr(p)[:40])
def test_attention_runs_with_it(predictor: Any) -> None:
    q, k, v = qkv(heads=4, kv_heads=2, q_len=300, dim=32)
    output, stats = tamis.sparse_attention(
        q, k, v, is_causal=True, enable_gqa=True, predictor=predictor, pv_threshold=None, return_stats=True
    )  # type: ignore[misc]
    mask = predictor(q, k, causal=True)
    assert stats.density == pytest.approx(mask.density(causal=True))
    assert torch.equal(output, tamis.attend(q, k, v, mask, causal=True, precision="int8").output)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("predictor", SEARCHING, ids=lambda p: repr(p)[:40])
def test_it_compiles(predictor: Any) -> None:
    torch._dynamo.reset()
    q, k = structured(300, 300)

    def lists(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        mask = predictor(q, k, causal=True)
        return mask.kv_num_blocks, mask.kv_indices

    counts, indices = torch.compile(lists, fullgraph=True, backend="eager")(q, k)
    made = tamis.BlockMask(counts, indices, (128, 64), (300, 300))
    assert torch.equal(oracle.blocks_of(made), oracle.blocks_of(predictor(q, k, causal=True)))


class Attention(torch.nn.Module):
    """Predict, then attend: what an exported model does."""

    def __init__(self, predictor: Any) -> None:
        super().__init__()
        self.predictor = predictor

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return tamis.attend(q, k, v, self.predictor(q, k, causal=True), causal=True).output


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    "predictor", [tamis.Probe(floor=0.05), tamis.VerticalSlash(0.2, 0.2)], ids=lambda p: repr(p)[:40]
)
def test_it_exports_with_a_dynamic_length(predictor: Any) -> None:
    torch._dynamo.reset()
    model = Attention(predictor)
    shapes = {name: {2: torch.export.Dim("length", min=2, max=4096)} for name in ("q", "k", "v")}
    with torch.no_grad():
        program = torch.export.export(model, qkv(q_len=200), dynamic_shapes=shapes).module()
        for n in (200, 77, 450):
            inputs = qkv(q_len=n)
            assert torch.equal(program(*inputs), model(*inputs))
