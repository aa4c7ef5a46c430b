"""The audit of `tamis.apply`: what its intervals hold on a real model, and what it costs on random tensors."""

from __future__ import annotations

import math
import statistics
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tamis.bench.cpu import spread
from tamis.bench.record import commit
from tamis.demo.language import backbone
from tamis.demo.machine import machine
from tamis.demo.models import encode, load_language_model
from tamis.demo.progress import Progress, note
from tamis.demo.text import default_text
from tamis.integrations.audit import Audit, Auditor, LayerAudit
from tamis.integrations.hook import install
from tamis.integrations.request import Request, sparse, torch_attention
from tamis.integrations.settings import uniform

SEEDS = (0, 1, 2)


class Shape(NamedTuple):
    """A causal call whose audit is timed."""

    tokens: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    share: float


SHAPES = (
    Shape(4096, 9, 64, torch.float32, 0.005),
    Shape(2048, 16, 128, torch.float32, 0.01),
    Shape(4096, 9, 64, torch.bfloat16, 0.005),
)


def run(tokens: int = 4096, rounds: int = 9) -> dict[str, Any]:
    """Intervals of every layer of the demo's language model under the defaults, and the time of three shapes.

    Raises:
        AssetError: weights cannot be fetched.
        ValueError: the text is too short for so many tokens.
    """
    model, tokenizer, _ = load_language_model(None)
    layers = intervals(model, encode(tokenizer, default_text(), tokens))
    cost = []
    for shape in SHAPES:
        note(f"time at {shape.tokens} tokens, {shape.heads} heads of {shape.head_dim}, {shape.dtype}")
        cost.append(seconds(shape, rounds))
    return {"tokens": tokens, "layers": layers, "cost": cost, "machine": machine(), "commit": commit()}


def intervals(model: Any, ids: Tensor) -> list[dict[str, Any]]:
    """Of every layer its relative L1 error, and what an audit by each of `SEEDS` makes of the same call."""
    auditors = [Auditor(Audit(seed=seed, budget=math.inf)) for seed in SEEDS]
    settings = uniform(None, None, "default", None)
    truths: dict[str, dict[str, Any]] = {}
    with Progress(model.config.num_hidden_layers, "auditing") as progress:

        def look(request: Request) -> Tensor:
            output = sparse(request, settings, None).output
            exact = torch_attention(request, request.mask, request.causal)
            errors = (exact.double() - output.double()).abs().sum() / exact.double().abs().sum()
            truths[request.layer] = {"error": float(errors), "all_rows": request.query.shape[2] * output.shape[1]}
            for auditor in auditors:
                auditor.look(request, output)
            progress.advance()
            return output

        with torch.inference_mode(), install(model, look):
            backbone(model, ids)
    reports = [auditor.report() for auditor in auditors]
    return [
        {"layer": name, **truth, "audits": [_plain(report[name]) for report in reports]}
        for name, truth in truths.items()
    ]


def _plain(found: LayerAudit) -> dict[str, Any]:
    """As JSON can hold it: None for an estimate that is unknown, and for the upper end of an interval without one."""
    kept = {"estimate": found.estimate, "low": found.low, "high": found.high, "rows": found.rows, "share": found.share}
    return {name: number if math.isfinite(number) else None for name, number in kept.items()}


def seconds(shape: Shape, rounds: int) -> dict[str, Any]:
    """Time of a call's audit over that of torch's dense attention, in turn, after a round that is not counted."""
    made = torch.randn(3, 1, shape.heads, shape.tokens, shape.head_dim, generator=torch.Generator().manual_seed(0))
    request = _call(*made.to(shape.dtype))
    auditor = Auditor(Audit(share=shape.share, seed=0, budget=math.inf))
    ratios = []
    with torch.inference_mode():
        for _ in range(rounds + 1):
            start = time.perf_counter()
            output = torch_attention(request, None, True)
            middle = time.perf_counter()
            auditor.look(request, output)
            ratios.append((time.perf_counter() - middle) / (middle - start))
    work = auditor.report()[request.layer].share
    return {**shape._asdict(), "dtype": str(shape.dtype), "work": work, "time": spread(ratios[1:])}


def _call(query: Tensor, key: Tensor, value: Tensor) -> Request:
    return Request(
        layer="random",
        module=None,
        query=query,
        key=key,
        value=value,
        mask=None,
        causal=True,
        window=None,
        segments=None,
        scale=None,
        softcap=None,
        sink_logits=None,
        dropout=0.0,
        obstacle=None,
    )


def markdown(result: dict[str, Any]) -> str:
    """The result as it stands in docs/in-production.md: what intervals hold, then what the audit costs."""
    layers = result["layers"]
    audits = [(layer["error"], audit) for layer in layers for audit in layer["audits"]]
    rows = [audit["rows"] for _, audit in audits]
    ends = [math.inf if audit["high"] is None else audit["high"] for _, audit in audits]
    held = sum(audit["low"] <= error <= high for (error, audit), high in zip(audits, ends, strict=True))
    half = statistics.median(
        high / audit["estimate"] - 1 if audit["estimate"] else math.inf
        for (_, audit), high in zip(audits, ends, strict=True)
    )
    lines = [
        f"{result['tokens']:,} tokens, {len(layers)} layers, {len(SEEDS)} seeds: {min(rows)} to {max(rows)} of a",
        f"layer's {layers[0]['all_rows']:,} rows gave intervals of +- {half:.0%} of the estimate (median), and {held}",
        f"of {len(audits)} held the true error.",
        "",
        "| tokens | heads | dtype | work | time |",
        "|---|---|---|---|---|",
    ]
    for row in result["cost"]:
        heads, dtype = f"{row['heads']} of {row['head_dim']}", row["dtype"].removeprefix("torch.")
        lines.append(f"| {row['tokens']:,} | {heads} | {dtype} | {row['work']:.2%} | {row['time']['median']:.1%} |")
    return "\n".join(lines)
