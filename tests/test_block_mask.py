"""BlockMask: the layout, its checks, density, the picture, and FlexAttention's form."""

from __future__ import annotations

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from samples import block_mask, blocks_needed
from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask
from torch.nn.attention.flex_attention import create_block_mask

import tamis

SIZES = [(64, 64), (64, 128), (128, 64), (128, 128)]


@given(
    lengths=st.tuples(st.integers(1, 700), st.integers(1, 700)),
    size=st.sampled_from(SIZES),
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
)
def test_round_trip(lengths: tuple[int, int], size: tuple[int, int], batch: int, heads: int, density: float) -> None:
    dense = torch.rand(batch, heads, *blocks_needed(lengths, size)) < density
    mask = tamis.BlockMask.from_dense(dense, block_size=size, seq_lens=lengths)
    mask.validate()
    assert torch.equal(mask.to_dense(), dense)
    assert torch.equal(oracle.blocks_of(mask), dense)
    assert mask.kv_num_blocks.dtype == mask.kv_indices.dtype == torch.int32
    assert torch.equal(mask.kv_num_blocks, dense.sum(-1).int())
    assert mask.kv_indices.shape[-1] == max(1, int(dense.sum(-1).max())), (
        "on a CPU the list is as long as its longest row"
    )


def test_garbage_behind_the_counts_is_ignored() -> None:
    counts = torch.tensor([[[1, 0]]], dtype=torch.int32)
    indices = torch.tensor([[[[2, -7], [2**31 - 1, 99]]]], dtype=torch.int32)
    mask = tamis.BlockMask(counts, indices, (64, 64), (100, 300))
    mask.validate()
    assert mask.to_dense().int().tolist() == [[[[0, 0, 1, 0, 0], [0, 0, 0, 0, 0]]]]
    assert mask.density() == pytest.approx(1 / 10)


def test_from_dense_takes_fewer_dims() -> None:
    dense = torch.rand(4, 8) < 0.5
    for table in (dense, dense[None], dense[None, None]):
        mask = tamis.BlockMask.from_dense(table, seq_lens=(500, 500))
        assert mask.block_size == (128, 64)
        assert torch.equal(mask.to_dense(), dense[None, None])
    heads = torch.rand(3, 4, 8) < 0.5
    assert torch.equal(tamis.BlockMask.from_dense(heads, seq_lens=(500, 500)).to_dense(), heads[None])
    whole = tamis.BlockMask.from_dense(dense)
    assert whole.seq_lens == (512, 512)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("lengths", [(500, 500), (130, 700), (700, 130), (1, 65)])
def test_density_counts_visible_blocks(size: tuple[int, int], lengths: tuple[int, int]) -> None:
    mask = block_mask(lengths, batch=2, heads=3, block_size=size)
    kept = oracle.blocks_of(mask)
    seen = oracle.visible_blocks(oracle.visible(*lengths, causal=True), size)
    assert mask.density() == pytest.approx(float(kept.double().mean()))
    assert mask.density(causal=True) == pytest.approx(float((kept & seen).sum() / (6 * seen.sum())))


def test_density_bounds() -> None:
    nothing = block_mask((300, 300), density=0.0)
    everything = block_mask((300, 300), density=1.1)
    assert (nothing.density(), nothing.density(causal=True)) == (0.0, 0.0)
    assert (everything.density(), everything.density(causal=True)) == (1.0, 1.0)


def test_picture() -> None:
    """One line per row of blocks, dark where kept and blank where not, under a line of facts."""
    dense = torch.ones(6, 12, dtype=torch.bool).tril()
    mask = tamis.BlockMask.from_dense(dense, block_size=(128, 64), seq_lens=(768, 768))
    assert repr(mask) == str(mask)
    facts, *rows = str(mask).splitlines()
    assert "768" in facts
    assert f"{mask.density():.3f}" in facts
    assert len(rows) == 6
    assert [row.rstrip() for row in rows] == ["█" * (i + 1) for i in range(6)]
    large = str(block_mask((100_000, 100_000), heads=2, density=0.01))
    assert max(map(len, large.splitlines()[1:])) <= 100
    assert len(large.splitlines()) <= 60
    assert str(block_mask((300, 300), density=0.0)).splitlines()[1].strip() == ""


def test_picture_never_hides_a_kept_block() -> None:
    dense = torch.zeros(400, 800, dtype=torch.bool)
    dense[200, 17] = True
    rows = str(tamis.BlockMask.from_dense(dense)).splitlines()[1:]
    assert any(row.strip() for row in rows)


@pytest.mark.parametrize(
    ("counts", "indices", "match"),
    [
        (torch.zeros(1, 1, 3, dtype=torch.int32), torch.zeros(1, 1, 3, 1, dtype=torch.int32), "kv_num_blocks"),
        (torch.zeros(1, 2, dtype=torch.int32), torch.zeros(1, 1, 2, 1, dtype=torch.int32), "kv_num_blocks"),
        (torch.zeros(1, 1, 2, dtype=torch.int32), torch.zeros(1, 1, 2, dtype=torch.int32), "kv_indices"),
        (torch.zeros(1, 1, 2, dtype=torch.int32), torch.zeros(2, 1, 2, 1, dtype=torch.int32), "kv_indices"),
        (torch.zeros(1, 1, 2), torch.zeros(1, 1, 2, 1, dtype=torch.int32), "kv_num_blocks"),
        (torch.zeros(1, 1, 2, dtype=torch.int32), torch.zeros(1, 1, 2, 1, dtype=torch.int64), "kv_indices"),
    ],
)
def test_malformed_lists(counts: torch.Tensor, indices: torch.Tensor, match: str) -> None:
    with pytest.raises((TypeError, ValueError), match=match):
        tamis.BlockMask(counts, indices, (64, 64), (100, 300))


@pytest.mark.parametrize("size", [(32, 64), (64, 256), (64,), (64, 64, 64), (0, 64)])
def test_block_sizes_that_do_not_exist(size: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="block_size"):
        tamis.BlockMask.from_dense(torch.ones(2, 2, dtype=torch.bool), block_size=size)  # type: ignore[arg-type]


def test_dense_table_must_fit() -> None:
    with pytest.raises(ValueError, match="dense"):
        tamis.BlockMask.from_dense(torch.ones(2, 2, dtype=torch.bool), seq_lens=(500, 500))
    with pytest.raises(TypeError, match="dense"):
        tamis.BlockMask.from_dense(torch.ones(4, 8), seq_lens=(500, 500))


def flex_keeps(mask: FlexBlockMask, q_len: int, kv_len: int) -> torch.Tensor:
    """What a FlexAttention mask keeps, per token: full blocks whole, partial ones by its rule."""
    q_size, kv_size = mask.BLOCK_SIZE
    shape = mask.kv_num_blocks.shape[:2]
    kept = torch.zeros(*shape, q_len, kv_len, dtype=torch.bool)
    index = (torch.arange(q_len)[:, None], torch.arange(kv_len)[None])
    for b in range(shape[0]):
        for h in range(shape[1]):
            rule = torch.as_tensor(mask.mask_mod(torch.tensor(b), torch.tensor(h), *index)).expand(q_len, kv_len)
            for counts, lists, whole in (
                (mask.kv_num_blocks, mask.kv_indices, False),
                (mask.full_kv_num_blocks, mask.full_kv_indices, True),
            ):
                if counts is None or lists is None:
                    continue
                for i, count in enumerate(counts[b, h].tolist()):
                    for j in lists[b, h, i, :count].tolist():
                        patch = (slice(i * q_size, (i + 1) * q_size), slice(j * kv_size, (j + 1) * kv_size))
                        kept[b, h][patch] = True if whole else rule[patch]
    return kept


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("lengths", [(300, 300), (130, 400), (400, 130)])
def test_to_flex(causal: bool, size: tuple[int, int], lengths: tuple[int, int]) -> None:
    """The same token pairs; blocks without a causal edge are full ones, so that no rule runs there."""
    mask = block_mask(lengths, batch=2, heads=2, block_size=size)
    flex = mask.to_flex(causal=causal)
    assert tuple(flex.BLOCK_SIZE) == size
    seen = oracle.visible(*lengths, blocks=oracle.blocks_of(mask), block_size=size, causal=causal)
    assert torch.equal(flex_keeps(flex, *lengths), seen)
    whole = ~oracle.visible_blocks(~oracle.visible(*lengths, causal=causal), size)
    assert flex.full_kv_num_blocks is not None
    assert torch.equal(flex.full_kv_num_blocks, (oracle.blocks_of(mask) & whole).sum(-1).int())
    again = tamis.BlockMask.from_flex(flex, causal=causal)
    visible = oracle.visible_blocks(oracle.visible(*lengths, causal=causal), size)
    assert (again.block_size, again.seq_lens) == (mask.block_size, mask.seq_lens)
    assert torch.equal(oracle.blocks_of(again), oracle.blocks_of(mask) & visible)


def test_from_flex_honours_or_raises() -> None:
    causal = create_block_mask(lambda b, h, q, kv: q >= kv, None, None, 300, 300, device="cpu", BLOCK_SIZE=128)
    lower = torch.ones(3, 3, dtype=torch.bool).tril()
    assert torch.equal(tamis.BlockMask.from_flex(causal, causal=True).to_dense()[0, 0], lower)
    with pytest.raises(ValueError, match="partial block"):
        tamis.BlockMask.from_flex(causal, causal=False)
    window = create_block_mask(
        lambda b, h, q, kv: (q >= kv) & (q - kv < 100), None, None, 300, 300, device="cpu", BLOCK_SIZE=128
    )
    with pytest.raises(ValueError, match="partial block"):
        tamis.BlockMask.from_flex(window, causal=True)
    whole = create_block_mask(lambda b, h, q, kv: q >= 0, None, None, 300, 300, device="cpu", BLOCK_SIZE=128)
    assert tamis.BlockMask.from_flex(whole).density() == 1.0
    with pytest.raises(ValueError, match="full block"):
        tamis.BlockMask.from_flex(whole, causal=True)
    small = create_block_mask(lambda b, h, q, kv: q >= 0, None, None, 300, 300, device="cpu", BLOCK_SIZE=32)
    with pytest.raises(ValueError, match="block_size"):
        tamis.BlockMask.from_flex(small)


def test_from_flex_per_head() -> None:
    """A rule that differs between heads is read for each of them."""
    mixed = create_block_mask(
        lambda b, h, q, kv: (h > 0) | (q // 128 >= kv // 128), None, 2, 512, 512, device="cpu", BLOCK_SIZE=128
    )
    made = tamis.BlockMask.from_flex(mixed).to_dense()
    assert torch.equal(made[0, 0], torch.ones(4, 4, dtype=torch.bool).tril())
    assert made[0, 1].all()
