"""`tamis bench cpu`: tamis against torch's SDPA (fp32, bf16) and FlexAttention, in one process, in turn.

Attention is not causal, batch x heads = 2, and block masks are random with the stated density. "total" is everything
from (query, key, value) to the output: a prediction (whose mask is then replaced by the random one, so that its density
is known), quantisation and the kernel. Ratios are medians over repetitions of peer / total in the same repetition, with
their smallest and largest value beside them. A correctness gate runs first, on the same inputs.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tamis.attend import attend, pack_kv
from tamis.bench.memory import peak_extra_bytes
from tamis.bench.record import commit
from tamis.block_mask import BlockMask
from tamis.demo.machine import machine
from tamis.demo.measure import interleaved
from tamis.demo.progress import Progress
from tamis.predictors.sparge import Sparge

LENGTHS = (1024, 4096, 8192, 32768)
HEAD_DIMS = (64, 128)
DENSITIES = (1.0, 0.5, 0.25, 0.1)
HEADS = 2
BLOCK_SIZE = (128, 64)
MEMORY_TOKENS, MEMORY_DENSITY = 131072, 0.05
_GATE_BLOCKS = 4  # query blocks that the gate computes exactly, in fp64
# Relative L1. int8 on normals: .015, doubled and rounded up for short rows; bf16: its unit, 2^-8, with room for P's.
_GATE_LIMIT = {"int8": 0.05, "full": 1e-4, "full_bf16": 2**-7}
_MOST_SECONDS = 20.0  # per configuration and function: fewer repetitions where one call is long


@dataclass(frozen=True)
class CpuOptions:
    """What to run; `flex` adds FlexAttention, which is compiled for every length and head_dim."""

    lengths: tuple[int, ...] = LENGTHS
    head_dims: tuple[int, ...] = HEAD_DIMS
    densities: tuple[float, ...] = DENSITIES
    repeats: int = 9
    flex: bool = False
    memory: bool = True


def run(options: CpuOptions) -> dict[str, Any]:
    """All configurations and the memory row, as plain values.

    Raises:
        RuntimeError: an output is wrong; nothing is timed then.
    """
    rows: list[dict[str, Any]] = []
    pairs = [(length, dim) for length in options.lengths for dim in options.head_dims]
    with Progress(len(pairs) + options.memory, "bench cpu") as progress, torch.inference_mode():
        for length, dim in pairs:
            rows += _shape(length, dim, options)
            progress.advance()
        memory = None
        if options.memory:
            memory = {
                "tokens": MEMORY_TOKENS,
                "heads": 1,
                "head_dim": 64,
                "density": MEMORY_DENSITY,
                "peak_extra_bytes": peak_extra_bytes(MEMORY_TOKENS, MEMORY_DENSITY),
            }
            progress.advance()
    return {"rows": rows, "memory": memory, "machine": machine(), "commit": commit()}


def random_mask(length: int, density: float, generator: torch.Generator, heads: int = HEADS) -> BlockMask:
    """Each query block of each head keeps the same number of key blocks, chosen at random."""
    q_blocks, kv_blocks = -(-length // BLOCK_SIZE[0]), -(-length // BLOCK_SIZE[1])
    kept = max(1, round(density * kv_blocks))
    order = torch.rand(1, heads, q_blocks, kv_blocks, generator=generator).argsort(dim=-1)
    return BlockMask.from_dense(order < kept, BLOCK_SIZE, (length, length))


def _shape(length: int, dim: int, options: CpuOptions) -> list[dict[str, Any]]:
    """One length and head_dim: the peers once, tamis at every density, all in turn."""
    generator = torch.Generator().manual_seed(length + dim)
    q, k, v = (torch.randn(1, HEADS, length, dim, generator=generator) for _ in range(3))
    q16, k16, v16 = (tensor.bfloat16() for tensor in (q, k, v))
    masks = {density: random_mask(length, density, generator) for density in options.densities}
    errors = {
        (density, precision): gate(q, k, v, mask, precision)
        for density, mask in masks.items()
        for precision in ("int8", "full")
    }
    for density, mask in masks.items():
        errors[density, "full_bf16"] = gate(q16, k16, v16, mask, "full")
    predictor = Sparge()
    packed = pack_kv(k, v)
    calls: dict[str, Callable[[], object]] = {
        "sdpa_fp32": lambda: scaled_dot_product_attention(q, k, v),
        "sdpa_bf16": lambda: scaled_dot_product_attention(q16, k16, v16),
        "predict": lambda: predictor(q, k, block_size=BLOCK_SIZE),
        "quantise": lambda: pack_kv(k, v),
    }
    for density, mask in masks.items():

        def total(mask: BlockMask = mask) -> None:
            predictor(q, k, block_size=BLOCK_SIZE)
            attend(q, k, v, mask, precision="int8")

        calls[f"total {density}"] = total
        calls[f"kernel {density}"] = partial(attend, q, packed, None, mask, precision="int8")
        calls[f"full {density}"] = partial(attend, q, k, v, mask)
        calls[f"full_bf16 {density}"] = partial(attend, q16, k16, v16, mask)
        if options.flex:
            calls[f"flex {density}"] = _flex(q, k, v, mask)
    slowest = max(runs[0] for runs in interleaved(list(calls.values()), 1))  # also the warm-up
    repeats = max(3, min(options.repeats, int(_MOST_SECONDS / slowest)))
    times = dict(zip(calls, interleaved(list(calls.values()), repeats), strict=True))
    return [_row(length, dim, density, masks[density].density(), times, errors) for density in masks]


def _row(
    length: int,
    dim: int,
    density: float,
    actual: float,
    times: dict[str, list[float]],
    errors: dict[tuple[float, str], float],
) -> dict[str, Any]:
    total = times[f"total {density}"]
    seconds = statistics.median(total)
    operations = 4 * HEADS * length * length * dim
    kernel = statistics.median(times[f"kernel {density}"])
    row: dict[str, Any] = {
        "tokens": length,
        "head_dim": dim,
        "heads": HEADS,
        "density": actual,
        "repeats": len(total),
        "seconds_total": seconds,
        "seconds_kernel": kernel,
        "seconds_full": statistics.median(times[f"full {density}"]),
        "seconds_full_bf16": statistics.median(times[f"full_bf16 {density}"]),
        "executed_gops": operations * actual / seconds / 1e9,
        "dense_equivalent_gops": operations / seconds / 1e9,
        "kernel_executed_gops": operations * actual / kernel / 1e9,
        "share_predict": statistics.median(times["predict"]) / seconds,
        "share_quantise": statistics.median(times["quantise"]) / seconds,
        "relative_l1_int8": errors[density, "int8"],
        "relative_l1_full": errors[density, "full"],
        "relative_l1_full_bf16": errors[density, "full_bf16"],
    }
    for peer in ("sdpa_fp32", "sdpa_bf16", f"flex {density}"):
        if peer in times:
            name = peer.split()[0]
            row[f"seconds_{name}"] = statistics.median(times[peer])
            row[f"ratio_{name}"] = spread([a / b for a, b in zip(times[peer], total, strict=True)])
    for name, peer in (("full", "sdpa_fp32"), ("full_bf16", "sdpa_bf16")):
        row[f"ratio_{name}_{peer}"] = spread(
            [a / b for a, b in zip(times[peer], times[f"{name} {density}"], strict=True)]
        )
    return row


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def gate(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, precision: str) -> float:
    """Relative L1 error on some query blocks against fp64; raises if it is too large or anything is not finite."""
    output = attend(q, k, v, mask, precision=precision).output
    block_q, block_kv = mask.block_size
    kept = mask.to_dense().repeat_interleave(block_kv, dim=-1)[..., : k.shape[2]]
    count = kept.shape[2]
    error = size = 0.0
    for block in sorted({round(step * (count - 1) / max(1, _GATE_BLOCKS - 1)) for step in range(_GATE_BLOCKS)}):
        rows = slice(block * block_q, min((block + 1) * block_q, q.shape[2]))
        exact = scaled_dot_product_attention(
            q[:, :, rows].double(), k.double(), v.double(), attn_mask=kept[:, :, block, None, :]
        )
        error += float((output[:, :, rows] - exact).abs().sum())
        size += float(exact.abs().sum())
    relative = error / size
    limit = _GATE_LIMIT["full_bf16" if precision == "full" and q.dtype == torch.bfloat16 else precision]
    if not bool(output.isfinite().all()) or not relative <= limit:
        raise RuntimeError(
            f"precision {precision!r}, {q.shape[2]} tokens, head_dim {q.shape[3]}: relative L1 {relative:.2e} is above "
            f"{limit:.0e}: nothing was timed"
        )
    return relative


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Callable[[], object]:
    """FlexAttention on the same blocks, compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    flex_mask = mask.to_flex()
    return lambda: compiled(q, k, v, block_mask=flex_mask)


def table(result: dict[str, Any]) -> str:
    """The result as text; ratios above 1 are in favour of tamis."""
    lines = [
        f"{'tokens':>7}{'dim':>5}{'density':>9}{'total':>9}{'kernel':>9}{'x fp32':>8}{'(spread)':>14}{'x bf16':>8}"
        f"{'x flex':>8}{'full x':>8}{'bf16 x':>8}{'GOPS':>7}{'equiv.':>8}{'pred.':>7}{'quant.':>8}{'L1':>8}"
    ]
    legend = [
        "",
        "total: prediction, quantisation and int8 kernel, seconds. kernel: of a PackedKV. x fp32, x bf16, x flex:",
        "torch's SDPA and FlexAttention / total, with the smallest and largest of the repetitions; above 1 tamis is",
        "faster, and a wide spread says that the machine was busy. full x: SDPA / precision 'full', both in fp32;",
        "bf16 x: both in bf16. GOPS: done; equiv.: what a dense call would have done. pred., quant.: shares of total.",
        "L1: relative error of int8.",
    ]
    for row in result["rows"]:
        fp32 = row["ratio_sdpa_fp32"]
        flex = f"{row['ratio_flex']['median']:8.2f}" if "ratio_flex" in row else f"{'-':>8}"
        extent = f"{fp32['min']:.1f}-{fp32['max']:.1f}"
        lines.append(
            f"{row['tokens']:7}{row['head_dim']:5}{row['density']:9.3f}{row['seconds_total']:9.4f}"
            f"{row['seconds_kernel']:9.4f}{fp32['median']:8.2f}{extent:>14}{row['ratio_sdpa_bf16']['median']:8.2f}{flex}"
            f"{row['ratio_full_sdpa_fp32']['median']:8.2f}{row['ratio_full_bf16_sdpa_bf16']['median']:8.2f}"
            f"{row['executed_gops']:7.0f}{row['dense_equivalent_gops']:8.0f}"
            f"{row['share_predict']:7.1%}{row['share_quantise']:8.1%}{row['relative_l1_int8']:8.4f}"
        )
    if (memory := result["memory"]) is not None:
        lines.append(
            f"peak extra memory, {memory['tokens']:,} tokens, 1 head, density {memory['density']}: "
            f"{memory['peak_extra_bytes'] / 1e6:.0f} MB"
        )
    return "\n".join(lines + legend)
