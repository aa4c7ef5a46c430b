"""`tamis bench decode`: one query a head against a long key, tamis against torch's SDPA, in one process and in turn.

Query heads share keys four to one. "full" reads key and value as they are; "packed" reads a `PackedKV`; "append" also
appends a token to it first, as each step of a decoder does. Ratios are medians over repetitions of peer / tamis in the
same repetition; the peer is the faster of fp32 and bf16.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from tamis.attend import attend, pack_kv
from tamis.bench.cpu import spread
from tamis.bench.record import commit
from tamis.demo.machine import machine
from tamis.demo.measure import interleaved
from tamis.demo.progress import Progress

HEADS = ((32, 8), (8, 2))
HEAD_DIMS = (64, 128)


def run(tokens: int = 32768, repeats: int = 21) -> dict[str, Any]:
    """All head counts and head sizes, as plain values."""
    shapes = [(heads, kv_heads, dim) for heads, kv_heads in HEADS for dim in HEAD_DIMS]
    rows = []
    with Progress(len(shapes), "bench decode") as progress, torch.inference_mode():
        for heads, kv_heads, dim in shapes:
            rows.append(_row(tokens, heads, kv_heads, dim, repeats))
            progress.advance()
    return {"rows": rows, "machine": machine(), "commit": commit()}


def _row(tokens: int, heads: int, kv_heads: int, dim: int, repeats: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(dim)
    q = torch.randn(1, heads, 1, dim, generator=generator)
    k, v = (torch.randn(1, kv_heads, tokens, dim, generator=generator) for _ in range(2))
    q16, k16, v16 = (tensor.bfloat16() for tensor in (q, k, v))
    packed, growing = pack_kv(k, v), pack_kv(k, v)

    def append() -> None:
        growing.append(k[:, :, :1], v[:, :, :1])
        attend(q, growing, None, causal=True)

    calls: dict[str, Callable[[], object]] = {
        "sdpa_fp32": lambda: scaled_dot_product_attention(q, k, v, enable_gqa=True),
        "sdpa_bf16": lambda: scaled_dot_product_attention(q16, k16, v16, enable_gqa=True),
        "full_fp32": lambda: attend(q, k, v, causal=True),
        "full_bf16": lambda: attend(q16, k16, v16, causal=True),
        "packed": lambda: attend(q, packed, None, causal=True),
        "append": append,
    }
    interleaved(list(calls.values()), 1)
    times = dict(zip(calls, interleaved(list(calls.values()), repeats), strict=True))
    row: dict[str, Any] = {"tokens": tokens, "heads": heads, "kv_heads": kv_heads, "head_dim": dim}
    peer = [min(pair) for pair in zip(times["sdpa_fp32"], times["sdpa_bf16"], strict=True)]
    for name, seconds in times.items():
        row[f"seconds_{name}"] = statistics.median(seconds)
        if not name.startswith("sdpa"):
            row[f"ratio_{name}"] = spread([a / b for a, b in zip(peer, seconds, strict=True)])
    return row


def table(result: dict[str, Any]) -> str:
    """The result as text; ratios above 1 are in favour of tamis."""
    lines = [
        f"{'tokens':>7}{'heads':>8}{'dim':>5}{'sdpa ms':>9}{'full x':>8}{'bf16 x':>8}{'packed x':>10}{'append x':>10}"
    ]
    for row in result["rows"]:
        peer = min(row["seconds_sdpa_fp32"], row["seconds_sdpa_bf16"]) * 1e3
        ratios = [row[f"ratio_{name}"]["median"] for name in ("full_fp32", "full_bf16", "packed", "append")]
        heads = f"{row['heads']}:{row['kv_heads']}"
        lines.append(
            f"{row['tokens']:7}{heads:>8}{row['head_dim']:5}{peer:9.2f}{ratios[0]:8.2f}{ratios[1]:8.2f}"
            f"{ratios[2]:10.2f}{ratios[3]:10.2f}"
        )
    return "\n".join(lines)
