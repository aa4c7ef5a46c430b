"""Random calls against the reference backend: `python tests/fuzz.py --seconds 60 [--seed N]`.

Shapes, strides, dtypes, options and block masks at random, corrupt masks among them, on every target of this machine.
Run it on a library built with sanitizers (`make sanitize`): then reading out of bounds is seen too. The seed of a case
that fails is printed and repeats it.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from typing import Any

import torch
from engines import Engine, engines
from torch import Tensor

import tamis

# Relative to the mean size of the output. int8: two roundings of the same formulas, which flip a step here and there;
# one flip moves a score by a 127th of the largest query entry times the largest key entry, or the other way round.
LIMITS = {("full", torch.float32): 1e-4, ("full", torch.bfloat16): 2e-2, ("full", torch.float16): 4e-3}
INT8_LIMIT = 2e-2


def length(rng: random.Random) -> int:
    return rng.choice([1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, rng.randint(1, 330)])


def size(rng: random.Random) -> int:
    return rng.choice([1, 3, 4, 15, 16, 17, 63, 64, 65, 80, 96, 128, 129, 255, 256, rng.randint(1, 256)])


def strided(rng: random.Random, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Random values in memory of another order, with gaps of NaN, or repeated."""
    order = rng.sample(range(4), 4)
    room = [shape[i] + rng.choice([0, 0, 1, 5]) for i in order]
    tensor = torch.full(room, float("nan"), dtype=dtype).permute([order.index(i) for i in range(4)])
    tensor = tensor[tuple(slice(0, n) for n in shape)]
    tensor.copy_(torch.randn(shape) * rng.choice([0.1, 1.0, 1.0, 4.0]))
    if shape[1] > 1 and rng.random() < 0.1:
        tensor = tensor[:, :1].expand(shape)
    return tensor


def options(rng: random.Random, heads: int, q_len: int, kv_len: int) -> dict[str, Any]:
    found: dict[str, Any] = {"causal": rng.random() < 0.5}
    if rng.random() < 0.2:
        found["window"] = rng.randint(1, kv_len + 3)
    if rng.random() < 0.2:
        found["scale"] = rng.choice([-0.3, 0.0, 1e-6, 1.0])
    if rng.random() < 0.2:
        found["softcap"] = rng.choice([0.5, 30.0])
    if rng.random() < 0.2:
        found["sink_logits"] = torch.randn(heads)
    if rng.random() < 0.2:
        mask = torch.randn(rng.choice([(kv_len,), (q_len, kv_len), (1, heads, q_len, kv_len)]))
        found["attn_mask"] = mask > -0.5 if rng.random() < 0.5 else mask.masked_fill(mask > 1, -torch.inf)
    if rng.random() < 0.2:
        found["segments"] = (torch.randint(-1, 3, (q_len,)), torch.randint(-1, 3, (kv_len,)).sort().values)
    if rng.random() < 0.2:
        found["positions"] = (torch.randint(0, kv_len, (q_len,)), torch.randperm(kv_len))
    if rng.random() < 0.2:
        found["pv_threshold"] = rng.choice([1e3, 1e4])  # far enough not to depend on rounding
    return found


def block_mask(rng: random.Random, heads: int, q_len: int, kv_len: int) -> tamis.BlockMask:
    block_size = (rng.choice([64, 128]), rng.choice([64, 128]))
    blocks = [-(-n // block) for n, block in zip((q_len, kv_len), block_size, strict=True)]
    kept = torch.rand(1, rng.choice([1, heads]), *blocks) < rng.choice([0.0, 0.3, 0.8, 1.0])
    return tamis.BlockMask.from_dense(kept, block_size, (q_len, kv_len))


def corrupted(rng: random.Random, mask: tamis.BlockMask) -> tamis.BlockMask:
    """Entries that lie outside, or not in order, or too many of them."""
    num, indices = mask.kv_num_blocks.clone(), mask.kv_indices.clone()
    at = tuple(rng.randrange(n) for n in num.shape)
    if rng.random() < 0.5:
        num[at] = rng.choice([-1, indices.shape[-1] + 1, 2**31 - 1, -(2**31)])
    else:
        num[at] = max(1, int(num[at]))
        indices[(*at, 0)] = rng.choice([-1, 2**31 - 1, -(2**31), 10**6])
    return tamis.BlockMask(num, indices, mask.block_size, mask.seq_lens)


def flip(q: Tensor, k: Tensor, scale: float | None) -> float:
    largest = float(q.float().abs().max()) * float(k.float().abs().max())
    return 2 / 127 * largest * abs(q.shape[-1] ** -0.5 if scale is None else scale)


def compare(ours: Any, theirs: Any, limit: float) -> None:
    assert torch.equal(ours.lse.isneginf(), theirs.lse.isneginf()), "other rows are empty"
    seen = ~theirs.lse.isneginf()
    assert bool((ours.lse[seen] - theirs.lse[seen]).abs().le(limit * (1 + theirs.lse[seen].abs())).all()), "lse"
    a, b = ours.output.double(), theirs.output.double()
    assert bool(a.isfinite().all()), "not finite"
    assert float((a - b).abs().mean()) <= limit * float(b.abs().mean()) + 1e-12, "output"


def one(rng: random.Random, tested: list[Engine], reference: Engine) -> None:
    batch, kv_heads, group = rng.choice([1, 1, 2]), rng.randint(1, 3), rng.choice([1, 1, 2, 4])
    q_len, kv_len, dim, value_dim = length(rng), length(rng), size(rng), size(rng)
    dtype = rng.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16])
    heads = kv_heads * group
    q = strided(rng, (batch, heads, q_len, dim), dtype)
    k = strided(rng, (batch, kv_heads, kv_len, dim), dtype)
    v = strided(rng, (batch, kv_heads, kv_len, value_dim), dtype)
    chosen = options(rng, heads, q_len, kv_len)
    mask = block_mask(rng, heads, q_len, kv_len) if rng.random() < 0.6 else None
    engine, precision = rng.choice(tested), rng.choice(["full", "int8"])
    if mask is not None and mask.kv_num_blocks.numel() and rng.random() < 0.2:
        try:
            engine.attend(q, k, v, corrupted(rng, mask), precision=precision, **chosen)
        except ValueError:
            return
        raise AssertionError("a corrupt mask was accepted")
    ours = engine.attend(q, k, v, mask, precision=precision, **chosen)
    theirs = reference.attend(q, k, v, mask, precision=precision, **chosen)
    rounding = INT8_LIMIT + flip(q, k, chosen.get("scale")) if precision == "int8" else LIMITS[precision, dtype]
    compare(ours, theirs, rounding)
    predictor = tamis.Sparge(topk=rng.choice([None, 0.3]), similarity=rng.choice([-1.0, 0.1, 0.6]))
    shown = {
        name: chosen[name] for name in ("causal", "window", "attn_mask", "positions", "segments") if name in chosen
    }
    engine.predict(predictor, q, k, **shown).validate()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="of processor time: the same work beside others")
    parser.add_argument("--seed", type=int, default=None, help="run this one case")
    arguments = parser.parse_args()
    reference, *tested = engines()
    if not tested:
        print("no native backend to test")
        return 1
    seeds = iter([arguments.seed]) if arguments.seed is not None else iter(range(10**9))
    start, number, seed = time.process_time(), 0, 0
    try:
        for seed in seeds:
            if time.process_time() - start > arguments.seconds:
                break
            torch.manual_seed(seed)
            one(random.Random(seed), tested, reference)
            number += 1
    except Exception:
        print(f"case {seed} failed: python {sys.argv[0]} --seed {seed}", file=sys.stderr)
        raise
    print(f"{number} cases on {', '.join(str(engine) for engine in tested)}: all right")
    return 0


if __name__ == "__main__":
    sys.exit(main())
