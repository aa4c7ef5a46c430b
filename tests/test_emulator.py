"""The emulator of Gluon pipelines: a small kernel runs right on it, and each bug put into that kernel is found."""

from __future__ import annotations

from typing import Any, NamedTuple

import emulator
import oracle
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tamis.backends.triton import launch
from tamis.bench import gpu_static

SEEDS = range(6)
LOG2E = gl.constexpr(1.4426950408889634)


@gluon.jit
def produce(k_desc, v_desc, k_room, v_room, ready, empty, tiles, STAGES: gl.constexpr, KEYS: gl.constexpr):
    for j in range(tiles):
        slot = j % STAGES
        mbarrier.wait(empty.index(slot), (j // STAGES & 1) ^ 1)
        mbarrier.expect(ready.index(slot), k_desc.block_type.nbytes + v_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(k_desc, [j * KEYS, 0], ready.index(slot), k_room.index(slot))
        tma.async_copy_global_to_shared(v_desc, [j * KEYS, 0], ready.index(slot), v_room.index(slot))


@gluon.jit
def consume(given, who: gl.constexpr, STAGES: gl.constexpr, KEYS: gl.constexpr, D: gl.constexpr):
    q, o_desc, q_room, k_room, v_room, o_room, ready, empty, kv_len, tiles, factor = given
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    rows = who * 64 + gl.arange(0, 64, gl.SliceLayout(1, OUT))
    d = gl.arange(0, D, gl.SliceLayout(0, OUT))
    q_room.index(who).store(gl.load(q + rows[:, None] * D + d[None, :]))
    fence_async_shared()
    n = gl.arange(0, KEYS, gl.SliceLayout(0, S))
    m = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, S))
    total = gl.zeros([64], gl.float32, gl.SliceLayout(1, S))
    o = gl.zeros([64, D], gl.float32, OUT)
    for j in range(tiles):
        slot = j % STAGES
        mbarrier.wait(ready.index(slot), j // STAGES & 1)
        scores = gl.zeros([64, KEYS], gl.float32, S)
        s = warpgroup_mma(q_room.index(who), k_room.index(slot).permute((1, 0)), scores, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s])
        s = gl.where((j * KEYS + n < kv_len)[None, :], s * factor, float("-inf"))
        m_next = gl.maximum(m, gl.max(s, 1))
        decay = gl.exp2(m - m_next)
        p = gl.exp2(s - m_next[:, None])
        total = total * decay + gl.sum(p, 1)
        m = m_next
        weights = gl.convert_layout(p.to(gl.bfloat16), gl.DotOperandLayout(0, OUT, 2))
        o = o * gl.convert_layout(decay, gl.SliceLayout(1, OUT))[:, None]
        o = warpgroup_mma(weights, v_room.index(slot), o, is_async=True)
        o = warpgroup_mma_wait(0, deps=[o])
        mbarrier.arrive(empty.index(slot))
    o = o / gl.convert_layout(total, gl.SliceLayout(1, OUT))[:, None]
    o_room.index(who).store(o.to(gl.bfloat16))
    fence_async_shared()
    tma.async_copy_shared_to_global(o_desc, [who * 64, 0], o_room.index(who))
    tma.store_wait(0)


@gluon.jit
def toy_kernel(
    q, k_desc, v_desc, o_desc, kv_len, factor, STAGES: gl.constexpr, KEYS: gl.constexpr, D: gl.constexpr
):  # fmt: skip
    q_room = gl.allocate_shared_memory(gl.bfloat16, [2, 64, D], o_desc.layout)
    o_room = gl.allocate_shared_memory(gl.bfloat16, [2, 64, D], o_desc.layout)
    k_room = gl.allocate_shared_memory(gl.bfloat16, [STAGES, KEYS, D], k_desc.layout)
    v_room = gl.allocate_shared_memory(gl.bfloat16, [STAGES, KEYS, D], v_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    tiles = gl.cdiv(kv_len, KEYS)
    given = (q, o_desc, q_room, k_room, v_room, o_room, ready, empty, kv_len, tiles, factor)
    gl.warp_specialize(
        [
            (consume, (given, 0, STAGES, KEYS, D)),
            (consume, (given, 1, STAGES, KEYS, D)),
            (produce, (k_desc, v_desc, k_room, v_room, ready, empty, tiles, STAGES, KEYS)),
        ],
        [4, 1],
        [240, 24],
    )


def described(x: Tensor, box: list[int]) -> Any:
    return TensorDescriptor.from_tensor(x, box, gl.NVMMASharedLayout.get_default_for(box, gl.bfloat16))


def run(seed: int, change: tuple[str, str] | None = None, races: bool = True, stages: int = 2) -> tuple[Tensor, Tensor]:
    """The toy's output, its source changed by one substitution, and attention in fp64."""
    torch.manual_seed(0)
    kv_len, dim = 270, 64
    q, k, v = (torch.randn(n, dim).to(torch.bfloat16) for n in (128, kv_len, kv_len))
    output = torch.empty(128, dim, dtype=torch.bfloat16)
    found = 0

    def mutation(name: str, text: str) -> str:
        nonlocal found
        found += text.count(change[0]) if change else 0
        return text.replace(*change) if change else text

    emulator.run(
        toy_kernel,
        (1,),
        *(q, described(k, [32, dim]), described(v, [32, dim]), described(output, [64, dim])),
        *(kv_len, dim**-0.5 * LOG2E.value),
        STAGES=stages,
        KEYS=32,
        D=dim,
        seed=seed,
        races=races,
        source=emulator.Source(mutation),
    )
    assert change is None or found == 1, f"{change[0]!r} stands {found} times in the toy"
    return output, oracle.attention(q[None, None], k[None, None], v[None, None]).output[0, 0]


def test_the_toy_is_gluon() -> None:
    """It compiles, and takes the shared memory that it allocates."""
    q, k = torch.zeros(128, 64, dtype=torch.bfloat16), torch.zeros(270, 64, dtype=torch.bfloat16)
    arguments = q, described(k, [32, 64]), described(k, [32, 64]), described(q, [64, 64]), 270, 0.1
    item = launch.Launch(toy_kernel, arguments, {"STAGES": 2, "KEYS": 32, "D": 64}, 4, 1)
    rooms = 2 * 2 * 64 * 64 * 2 + 2 * 2 * 32 * 64 * 2
    assert rooms < gpu_static.compile_launch(item, "sm_90").metadata.shared < rooms + 1024


def error(results: tuple[Tensor, Tensor]) -> float:
    return oracle.relative_l1(*results)


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_the_toy_is_right(stages: int) -> None:
    """To the bit the same in whatever order things happen; weights, values and output are bf16, of 2^-9 each."""
    first = run(0, stages=stages)
    assert error(first) < 2**-8
    for seed in SEEDS:
        assert torch.equal(run(seed, stages=stages)[0], first[0])
        assert torch.equal(run(seed, stages=stages, races=False)[0], first[0])


class Bug(NamedTuple):
    """A substitution in the toy, and what the emulator says of it."""

    old: str
    new: str
    message: str

    @property
    def change(self) -> tuple[str, str]:
        return self.old, self.new


UNWRITTEN = "is read before something was written to it"
STUCK = "everybody waits"
BUGS = {
    "no wait for data": Bug(
        "mbarrier.wait(ready.index(slot), j // STAGES & 1)",
        "pass",
        rf"race: k_room\[0\] is (read while one of the copies of ready\[0\]|overwritten while one of)|{UNWRITTEN}",
    ),
    "phase of ready": Bug(
        "j // STAGES & 1)\n", "(j // STAGES & 1) ^ 1)\n", rf"race: k_room\[0\] is read while|{STUCK}|{UNWRITTEN}"
    ),
    "phase of empty": Bug("(j // STAGES & 1) ^ 1", "j // STAGES & 1", rf"{STUCK}: .*produce 2 waits for parity 0"),
    "phase beyond parity": Bug("(j // STAGES & 1) ^ 1)", "j // STAGES + 1)", "there are 0 and 1"),
    "no wait for room": Bug(
        "mbarrier.wait(empty.index(slot), (j // STAGES & 1) ^ 1)",
        "pass",
        r"race: k_room\[0\] is overwritten while one of the (products of consume|copies)|1 arrive at ready",
    ),
    "one stage off": Bug(
        "j % STAGES\n        mbarrier.wait(ready", "(j + 1) % STAGES\n        mbarrier.wait(ready", "."
    ),
    "stage out of range": Bug(
        "slot = j % STAGES\n        mbarrier.wait(empty", "slot = j\n        mbarrier.wait(empty", "has 2 entries"
    ),
    "room of another stage": Bug("v_room.index(slot), o,", "v_room.index(slot ^ 1), o,", f"race: v_room|{UNWRITTEN}"),
    "released before use": Bug(
        "        scores = gl.zeros",
        "        mbarrier.arrive(empty.index(slot))\n        scores = gl.zeros",
        rf"race: .*is overwritten while one of the products of consume \d reads|race: .*one of the copies|{STUCK}",
    ),
    "released twice": Bug(
        "        s = gl.where((j",
        "        mbarrier.arrive(empty.index(slot))\n        s = gl.where((j",
        f"arrive at empty|race: .*is overwritten while|race: .*while one of the copies|{STUCK}",
    ),
    "never released": Bug("        mbarrier.arrive(empty.index(slot))\n", "", f"{STUCK}.*2 of 2 arrivals missing"),
    "accumulator too early": Bug("s = warpgroup_mma_wait(0, deps=[s])", "pass", "before warpgroup_mma_wait"),
    "waits for older products": Bug(
        "o = warpgroup_mma_wait(0,", "o = warpgroup_mma_wait(1,", "race|before warpgroup_mma_wait"
    ),
    "no fence for q": Bug(
        "[None, :]))\n    fence_async_shared()",
        "[None, :]))",
        "fence_async_shared is missing between writing q_room",
    ),
    "no fence for the output": Bug(
        "o.to(gl.bfloat16))\n    fence_async_shared()",
        "o.to(gl.bfloat16))",
        "fence_async_shared is missing between writing o_room",
    ),
    "no store_wait": Bug("tma.store_wait(0)", "pass", "store_wait is missing"),
    "too few bytes": Bug(
        " + v_desc.block_type.nbytes", "", f"expects 4096 bytes, and copies bring 8192|race: v_room|v_room.*{UNWRITTEN}"
    ),
    "too many bytes": Bug("nbytes)\n", "nbytes + 8)\n", f"{STUCK}.*8 of 8200 bytes missing"),
    "count of arrivals": Bug("count=2", "count=1", f"race|1 arrive at empty|{STUCK}"),
    "initialised twice": Bug("mbarrier.init(empty.index(i), count=2)", "mbarrier.init(ready.index(i), 1)", "twice"),
    "no barrier": Bug("mbarrier.init(empty.index(i), count=2)", "pass", "init is missing"),
    "q outside": Bug("who * 64 + gl.arange", "who * 65 + gl.arange", "reads element .* of q"),
    "layouts": Bug("gl.convert_layout(decay, gl.SliceLayout(1, OUT))", "decay", "layouts differ"),
    "layout of the other axis": Bug(
        "64, gl.SliceLayout(1, OUT))", "64, gl.SliceLayout(0, OUT))", "no dimension 1 to gain"
    ),
    "product never waited for": Bug(
        "    o = o / gl",
        "    warpgroup_mma(q_room.index(who), k_room.index(0).permute((1, 0)), scores, is_async=True)\n    o = o / gl",
        "consume . ends while its products are under way",
    ),
    "registers": Bug("[240, 24],", "[240, 20],", r"workers of \[4, 1\] warps and \[240, 20\] registers can't be"),
    "warps": Bug("[4, 1],", "[4],", "2 workers, 1 warps and 2 registers"),
    "layout of an operand": Bug(
        "gl.DotOperandLayout(0, OUT, 2)", "gl.DotOperandLayout(0, OUT, 4)", "can't take an operand"
    ),
    "layout of the sum": Bug(
        "gl.zeros([64, KEYS], gl.float32, S)", "gl.zeros([64, KEYS], gl.float32)", "can't add in the layout"
    ),
    "box of another size": Bug("k_room.index(slot))\n", "k_room.index(slot).slice(0, 16))\n", "the copy brings"),
    "no layout of shared memory": Bug("[2, 64, D], o_desc.layout)\n    o_room", "[2, 64, D], 5)\n    o_room", "layout"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_finds(bug: str) -> None:
    """By an error that names the bug, for every seed."""
    for seed in SEEDS:
        with pytest.raises(emulator.KernelError, match=BUGS[bug].message):
            run(seed, BUGS[bug].change)


WRONG = {
    "tail not masked": ("j * KEYS + n < kv_len", "j * KEYS + n < kv_len + 64"),
    "stale index of values": ("v_desc, [j * KEYS, 0]", "v_desc, [(j - 1) * KEYS, 0]"),
    "sum not decayed": ("total * decay + ", "total + "),
    "other half": ("o_desc, [who * 64, 0]", "o_desc, [who * 64 - 1, 0]"),
}


@pytest.mark.parametrize("bug", WRONG)
def test_shows_wrong_numbers(bug: str) -> None:
    try:
        results = run(0, WRONG[bug])
    except emulator.KernelError as found:
        assert bug == "other half" and "two partitions" in str(found)  # noqa: PT017
    else:
        assert not error(results) < 2**-5


@pytest.mark.parametrize("bug", ["no wait for data", "no wait for room", "released before use"])
def test_poison_shows_it_too(bug: str) -> None:
    """With the check for races off, some order of events gives numbers that are wrong, or NaN."""

    def wrong(seed: int) -> bool:
        try:
            return not error(run(seed, BUGS[bug].change, races=False)) < 2**-8
        except emulator.KernelError:
            return True

    assert any(wrong(seed) for seed in range(12))


def test_a_seed_is_one_order() -> None:
    """The same seed fails in the same way, and seeds differ."""

    def message(seed: int) -> str:
        with pytest.raises(emulator.KernelError) as raised:
            run(seed, ("count=2", "count=1"))
        return str(raised.value)

    messages = [message(seed) for seed in range(8)]
    assert messages == [message(seed) for seed in range(8)]
    assert len(set(messages)) > 1
