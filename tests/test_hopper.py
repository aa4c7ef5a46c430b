"""The Gluon kernel for sm_90 on the emulator, through its own launcher: against the oracle and the Triton kernel.

Whatever order its warps, copies and products come in, it gives the same bits; and bugs put into its source are found.
"""

from __future__ import annotations

import functools
import math
import os
from typing import Any, NamedTuple
from unittest import mock

import emulator
import oracle
import pytest
import torch
from samples import block_mask, full_mask, qkv, same
from torch import Tensor

pytest.importorskip("triton")

import tamis
from tamis.backends.triton import chips, hopper, prepare

PRECISIONS = ("full", "int8", "fp8")


def attend(
    *inputs: Any,
    kernel: str = "gluon",
    seed: int = 0,
    programs: int = 2,
    mutation: Any = None,
    **options: Any,
) -> Any:
    """`tamis.attend` as on sm_90, with so many programs at most; it shows which kernel ran."""
    with (
        chips.assume("sm_90"),
        emulator.installed(seed, mutation=mutation) as ran,
        mock.patch.dict(os.environ, {"TAMIS_GPU_KERNEL": kernel}),
        mock.patch.object(hopper, "programs", lambda device, items: min(programs, items)),
    ):
        result = tamis.attend(*inputs, backend="triton", **options)
    assert ("hopper_kernel" in ran) == (kernel == "gluon")
    return result


def check(
    q: Tensor, k: Tensor, v: Tensor, mask: Any = None, *, seed: int = 0, programs: int = 2, **options: Any
) -> Any:
    """Hold a call against its formulas in fp64 at the usual bound, and against the Triton kernel."""
    result = attend(q, k, v, mask, seed=seed, programs=programs, **options)
    theirs = attend(q, k, v, mask, kernel="triton", **options)
    rounds = options.pop("precision") != "full"
    if mask is not None:
        options |= {"blocks": oracle.blocks_of(mask), "block_size": mask.block_size}
    truth = oracle.attention(q, k, v, **options)
    form = getattr(torch, result.stats.pv_dtype)
    plain = oracle.attention(q, k, v, **options, dtype=torch.float32 if rounds else q.dtype)
    formulas = oracle.attention_gpu(q, k, v, weights=form, values=form, rounds=rounds, **options)
    oracle.assert_within(result.output, truth.output, formulas.output, plain.output)
    oracle.assert_within(result.lse, truth.lse, formulas.lse, plain.lse, what="lse")
    assert_agree(result, theirs)
    return result


def assert_agree(ours: Any, theirs: Any) -> None:
    """The same numbers but for fp32 rounding, by which a weight here and there rounds to its other neighbour."""
    torch.testing.assert_close(ours.lse, theirs.lse, rtol=4e-7, atol=4e-6)
    assert torch.equal(ours.output == 0, theirs.output == 0)
    # Half of a bf16's mean rounding: tiles of another size round their weights against another maximum.
    assert float((ours.output - theirs.output).abs().sum()) <= 2**-10 * float(theirs.output.abs().sum()) + 1e-30
    assert torch.equal(ours.stats.counts[..., :2].sum(2), theirs.stats.counts[..., :2].sum(2))


class Case(NamedTuple):
    """Lengths, heads and mask of a call."""

    q_len: int = 150
    kv_len: int = 200
    causal: bool = False
    block_size: tuple[int, int] | None = None
    heads: tuple[int, int] = (2, 1)
    batch: int = 1
    programs: int = 2


CASES = {
    "dense": Case(),
    "causal": Case(causal=True),
    "lists": Case(block_size=(128, 64)),
    "lists, causal": Case(q_len=330, kv_len=400, causal=True, block_size=(128, 64)),
    "64 x 64": Case(block_size=(64, 64)),
    "64 x 64, causal": Case(q_len=193, kv_len=210, causal=True, block_size=(64, 64), programs=1),
    "64 x 128, causal": Case(causal=True, block_size=(64, 128)),
    "128 x 128": Case(kv_len=300, causal=True, block_size=(128, 128)),
    "whole blocks": Case(q_len=128, kv_len=192),
    "one block": Case(q_len=33, kv_len=1, heads=(1, 1)),
    "rows before the keys": Case(q_len=300, kv_len=70, causal=True),
    "rows after": Case(q_len=40, kv_len=300, causal=True),
    "many heads": Case(q_len=130, kv_len=65, heads=(6, 2), batch=2, programs=5),
}


def inputs(case: Case, dim: int = 64, value_dim: int | None = None, dtype: torch.dtype = torch.bfloat16) -> Any:
    q, k, v = qkv(
        batch=case.batch,
        heads=case.heads[0],
        kv_heads=case.heads[1],
        q_len=case.q_len,
        kv_len=case.kv_len,
        dim=dim,
        value_dim=value_dim,
        dtype=dtype,
    )
    lengths = case.q_len, case.kv_len
    if case.block_size is None:
        return q, k + 1, v, None
    mask = block_mask(lengths, batch=case.batch, heads=case.heads[0], block_size=case.block_size, density=0.6)
    mask.kv_num_blocks[0, 0, -1] = 0  # rows that see nothing
    return q, k + 1, v, mask


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", CASES)
def test_agrees(name: str, precision: str) -> None:
    case = CASES[name]
    seed = list(CASES).index(name) * 3 + PRECISIONS.index(precision)
    check(*inputs(case), seed=seed, programs=case.programs, causal=case.causal, precision=precision)


@pytest.mark.parametrize(
    ("dim", "value_dim", "precision", "dtype", "block_q"),
    [
        (40, 24, "full", torch.float16, 128),
        (17, 80, "fp8", torch.bfloat16, 64),
        (128, 128, "full", torch.bfloat16, 64),
        (128, 128, "fp8", torch.float32, 128),
        (96, 64, "int8", torch.float16, 128),
        (80, 192, "fp8", torch.bfloat16, 128),
        (192, 192, "int8", torch.float32, 64),
        (256, 256, "full", torch.bfloat16, 128),
        (256, 192, "fp8", torch.float16, 64),
        (200, 256, "int8", torch.bfloat16, 128),
    ],
)
def test_head_dims(dim: int, value_dim: int, precision: str, dtype: torch.dtype, block_q: int) -> None:
    """One program does all, so that the places of queries are used again, be they held in registers or not."""
    q, k, v, mask = inputs(Case(q_len=70, kv_len=130, block_size=(block_q, 64)), dim, value_dim, dtype)
    check(q, k, v, mask, causal=True, precision=precision, programs=1, seed=dim)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("block_size", [(128, 64), (64, 128)], ids=str)
def test_every_order_gives_the_same_bits(precision: str, block_size: tuple[int, int]) -> None:
    """Of warps, copies, products and programs; and however many programs share the work."""
    q, k, v, mask = inputs(Case(q_len=300, kv_len=270, block_size=block_size))
    first = attend(q, k, v, mask, causal=True, precision=precision)
    for seed, programs in ((0, 2), (1, 1), (2, 3), (3, 2), (4, 100)):
        again = attend(q, k, v, mask, seed=seed, programs=programs, causal=True, precision=precision)
        assert same(again, first)
        assert torch.equal(again.stats.counts, first.stats.counts)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_that_see_nothing(precision: str) -> None:
    q, k, v, _ = inputs(Case(q_len=200, kv_len=70))
    mask = full_mask((200, 70))
    result = attend(q, k, v, mask, causal=True, precision=precision)
    assert (result.output[:, :, :130] == 0).all()
    assert (result.lse[:, :, :130] == -math.inf).all()
    assert result.lse[:, :, 130:].isfinite().all()
    mask.kv_num_blocks[:] = 0
    result = attend(q, k, v, mask, precision=precision)
    assert (result.output == 0).all()
    assert (result.lse == -math.inf).all()
    assert result.stats.qk_density == 0


def steep(q_len: int, kv_len: int) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks of keys that score up to 5 below one another: some products are worth skipping."""
    q, k, v = qkv(q_len=q_len, kv_len=kv_len, heads=2, kv_heads=1, dim=64, dtype=torch.bfloat16)
    q[..., 0] = 4.0
    k[..., 0] += torch.tensor([2.0, -9.0, 3.0, -12.0, 9.0, -6.0, 0.0])[torch.arange(kv_len) // 64]
    return q, k, v


@pytest.mark.parametrize("block_size", [(128, 64), (64, 64), (128, 128)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_skips_by_the_book(block_size: tuple[int, int], causal: bool) -> None:
    """64 rows and 64 keys at a time: the count is exact, the lse untouched, and what is left out is left out."""
    q, k, v = steep(200, 400)
    mask = block_mask((200, 400), heads=2, block_size=block_size, density=0.8)
    thresholds = torch.tensor([0.7, 2.0])
    options = {"blocks": oracle.blocks_of(mask), "block_size": block_size, "causal": causal}
    expected = oracle.attention_stage2(q, k, v, pv_threshold=thresholds, group=64, keys=64, **options)
    assert expected.margin > 1e-5
    result = attend(q, k, v, mask, pv_threshold=thresholds, causal=causal, precision="full", seed=5)
    unskipped = attend(q, k, v, mask, causal=causal, precision="full")
    assert torch.equal(result.lse, unskipped.lse)
    torch.testing.assert_close(result.stats.pv_density_per_head, expected.pv_density.mean(0), rtol=0, atol=1e-9)
    assert float(expected.pv_density.mean()) < unskipped.stats.pv_density == unskipped.stats.qk_density
    truth = oracle.attention(q, k, v, **options)
    plain = oracle.attention(q, k, v, **options, dtype=torch.bfloat16)
    room = truth.output - expected.output
    oracle.assert_within(result.output.double() + room, truth.output, plain.output)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_stage_2_in_8_bits(precision: str) -> None:
    """Scores within rounding of the exact ones: nearly the same products fall, as in the Triton kernel."""
    q, k, v = steep(128, 400)
    options: dict[str, Any] = {"pv_threshold": 2.0, "precision": precision}
    mask = full_mask((128, 400), (64, 64))
    ours, theirs = (attend(q, k, v, mask, kernel=kernel, **options) for kernel in ("gluon", "triton"))
    assert ours.stats.pv_density < ours.stats.qk_density
    assert_agree(ours, theirs)
    assert torch.equal(ours.stats.counts, theirs.stats.counts)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_reads_no_more_than_its_tensors(precision: str) -> None:
    """Parts of larger tensors full of NaN, with heads before tokens or after, at starts that copies can't take."""
    q, k, v, _ = inputs(Case(q_len=70, kv_len=130), dim=40, value_dim=24)
    expected = attend(q, k, v, causal=True, precision=precision)
    for order, start in (((0, 1, 2, 3), 0), ((0, 2, 1, 3), 8), ((0, 2, 1, 3), 3), ((3, 1, 2, 0), 1)):
        parts = []
        for x in (q, k, v):
            room = torch.full([x.shape[axis] + 16 for axis in order], math.nan, dtype=x.dtype)
            place = room.permute([order.index(axis) for axis in range(4)])
            part = place[tuple(slice(start, start + size) for size in x.shape)]
            parts.append(part.copy_(x))
        assert same(attend(*parts, causal=True, precision=precision), expected)


def test_broken_values_stay_where_they_are_seen() -> None:
    """A value that is not finite reaches the rows that see its key and no other, to the bit."""
    q, k, v, _ = inputs(Case(q_len=200, kv_len=200))
    clean = attend(q, k, v, causal=True, precision="full")
    for token, bad in ((3, math.nan), (70, math.inf), (130, math.nan), (199, -math.inf)):
        value = v.clone()
        value[:, :, token] = bad
        output = attend(q, k, value, causal=True, precision="full", seed=token).output
        assert torch.equal(output[:, :, :token], clean.output[:, :, :token])
        assert not output[:, :, token:].isfinite().any()


def test_sound_tiles_come_from_the_values_themselves() -> None:
    """The copy holds those alone that are not: of the others nothing is written, and nothing read."""
    q, k, v, _ = inputs(Case(q_len=200, kv_len=200))
    v[:, :, 199] = math.nan
    expected = attend(q, k, v, causal=True, precision="full").output.nan_to_num()
    flagged = []

    def poisoned(value: Tensor) -> tuple[Tensor, Tensor]:
        copy, flags = prepare.sound_values(value)
        of_token = flags.repeat_interleave(64, -1)[..., : value.shape[2]] > 0
        assert torch.equal(copy[of_token], value[of_token].nan_to_num(0, 0, 0))
        flagged.append(flags)
        copy[~of_token] = math.nan
        return copy, flags

    with mock.patch.object(hopper, "sound_values", poisoned):
        assert torch.equal(attend(q, k, v, causal=True, precision="full").output.nan_to_num(), expected)
    assert (flagged[0] == torch.tensor([0, 0, 0, 1])).all()
    assert (expected != 0)[:, :, :199].any(-1).all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_future_does_not_matter(precision: str) -> None:
    q, k, v, _ = inputs(Case(q_len=140, kv_len=140))
    before = attend(q, k, v, causal=True, precision="full")
    k[:, :, 100:], v[:, :, 100:] = torch.randn(40, 64), torch.randn(40, 64)
    assert torch.equal(attend(q, k, v, causal=True, precision="full").output[:, :, :100], before.output[:, :, :100])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("kv_len", "count", "listed"),
    [(65, 2, [1, 0]), (30, 1, [-1]), (129, 3, [2, 2, 1]), (129, 2**31 - 1, [10**6, 2, 1]), (129, -5, [2, 1, 0])],
)
def test_wild_lists_stay_inside(precision: str, kv_len: int, count: int, listed: list[int]) -> None:
    """A list out of order or range: nothing outside of the tensors is read, and nobody waits for ever."""
    q, k, v, _ = inputs(Case(q_len=64, kv_len=kv_len, heads=(1, 1)))
    lists = torch.tensor([[[count]]], dtype=torch.int32), torch.tensor([[[listed]]], dtype=torch.int32)
    for block_size in ((64, 64), (128, 128)):
        mask = tamis.BlockMask(*lists, block_size, (64, kv_len))
        for causal in (False, True):
            attend(q, k, v, mask, causal=causal, precision=precision, seed=count % 7)


class Mutant(NamedTuple):
    """A bug: in one function, a text that stands there at least once is replaced, and a line left out."""

    function: str
    old: str
    new: str
    without: str = ""
    causal: bool = True
    dim: int = 64


MUTANTS = {
    "no wait for keys": Mutant("_scores", "mbarrier.wait(k_ready.index(slot), turn // STAGES & 1)", "pass"),
    "no wait for values": Mutant("_visit", "mbarrier.wait(v_ready.index(slot), turn // STAGES & 1)", "pass"),
    "no wait for room": Mutant("_produce", "mbarrier.wait(k_empty.index(slot), phase)", "pass"),
    "no wait for queries": Mutant("_consume", "mbarrier.wait(q_ready.index(who), item & 1)", "pass"),
    "phase of keys": Mutant("_scores", "turn // STAGES & 1", "(turn // STAGES & 1) ^ 1"),
    "phase of values": Mutant("_visit", "turn // STAGES & 1)", "turn // STAGES & 1 ^ 1)"),
    "phase of room": Mutant("_produce", "(turn // STAGES & 1) ^ 1", "turn // STAGES & 1"),
    "phase by item and not by turn": Mutant("_produce", "turn // STAGES & 1", "step // STAGES & 1"),
    "phase of queries": Mutant("_produce", "(item & 1) ^ 1", "1"),
    # Of an item's first tile; the others are safe, for values of the tile before are released later than these keys.
    "keys released before they are read": Mutant(
        "_consume",
        "            s = warpgroup_mma_wait(0, deps=[_scores(",
        "            mbarrier.arrive(k_empty.index(slot))\n            s = warpgroup_mma_wait(0, deps=[_scores(",
        without="            mbarrier.arrive(k_empty.index(slot))\n",
    ),
    "values released before they are read": Mutant(
        "_visit",
        "    if STAGE2:\n",
        "    mbarrier.arrive(v_empty.index(slot))\n    if STAGE2:\n",
        without="    mbarrier.arrive(v_empty.index(slot))\n",
    ),
    "values never released": Mutant("_visit", "    mbarrier.arrive(v_empty.index(slot))\n", ""),
    "queries released before they are in registers": Mutant(
        "_consume",
        "            q = q.load(",
        "            mbarrier.arrive(q_empty.index(who))\n            q = q.load(",
        without="            mbarrier.arrive(q_empty.index(who))\n",
    ),
    "no fence behind reading queries": Mutant("_consume", "fence_async_shared()", "pass"),
    "queries released before they are read": Mutant(
        "_consume",
        "        if HELD:\n",
        "        if not HELD:\n            mbarrier.arrive(q_empty.index(who))\n        if HELD:\n",
        without="            if not HELD:\n                mbarrier.arrive(q_empty.index(who))\n",
        dim=192,
    ),
    "one stage off": Mutant("_visit", "slot = base + turn % STAGES", "slot = base + (turn + 1) % STAGES"),
    "keys of this turn": Mutant("_visit", "after = base + (turn + 1) % STAGES", "after = base + turn % STAGES"),
    "scores used too early": Mutant("_visit", "s = warpgroup_mma_wait(0, deps=[coming])", "s = coming"),
    "too few bytes": Mutant("_produce", "nbytes * PARTS", "nbytes * PARTS - 16"),
    "only one consumer counts": Mutant("hopper_kernel", "count=1 if SPLIT else 2", "count=1"),
    "stale block": Mutant("_consume", "block = following", "block = block"),
    "stale keys": Mutant("_produce", "k_desc, [batch, kv_head, start,", "k_desc, [batch, kv_head, start - TILE_K,"),
    "tail not masked": Mutant("_visit", "limit = kv_len - start", "limit = kv_len - start + 64", causal=False),
    "diagonal one off": Mutant("_visit", "ahead + 1 - start", "ahead + 2 - start"),
    "edge taken for whole": Mutant("_item", "gl.maximum(low + 1, 0) // BLOCK_KV", "end"),
    "heads of queries for those of keys": Mutant("_produce", "kv_head = head // kv_group", "kv_head = head % kv_group"),
    "output not decayed": Mutant("_add", "o[part] * decay[:, None]", "o[part]"),
    "rows of the other consumer": Mutant("_consume", "(0 if SPLIT else who * 64)", "(0 if SPLIT else 64 - who * 64)"),
}  # fmt: skip


class Mutation:
    """Changes the source of one function, and counts the places."""

    def __init__(self, mutant: Mutant) -> None:
        self.mutant = mutant
        self.found = 0

    def __call__(self, name: str, text: str) -> str:
        if name != self.mutant.function:
            return text
        less = text.replace(self.mutant.without, "", 1)
        self.found += min(text.count(self.mutant.without), less.count(self.mutant.old))
        return less.replace(self.mutant.old, self.mutant.new)


@functools.cache
def problem(causal: bool, dim: int) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """A call with lists, edges and several items for each program, and what it gives without a bug."""
    torch.manual_seed(0)
    given = inputs(Case(q_len=300, kv_len=333, block_size=(128, 64), heads=(2, 1)), dim=dim, value_dim=64)
    options = {"causal": causal, "precision": "fp8"}
    return given, options, attend(*given, **options)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(("causal", "dim"), sorted({(mutant.causal, mutant.dim) for mutant in MUTANTS.values()}))
def test_without_a_bug(causal: bool, dim: int, seed: int) -> None:
    given, options, expected = problem(causal, dim)
    assert same(attend(*given, seed=seed, **options), expected)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", MUTANTS)
def test_bugs_are_found(name: str, seed: int) -> None:
    """By an error, or by results that are wrong beyond any rounding."""
    mutant = MUTANTS[name]
    given, options, expected = problem(mutant.causal, mutant.dim)
    mutation = Mutation(mutant)
    try:
        result = attend(*given, seed=seed, mutation=mutation, **options)
    except emulator.KernelError:
        pass
    else:
        error = oracle.relative_l1(result.output, expected.output)
        seen = expected.lse.isfinite()
        error_of_lse = oracle.relative_l1(result.lse[seen], expected.lse[seen])
        assert not (error < 1e-3 and error_of_lse < 1e-3)
    assert mutation.found > 0, f"{mutant.old!r} is no longer in {mutant.function}"
