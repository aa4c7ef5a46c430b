"""What `compensate="centroid"` does to the error of real attention maps, and what it costs.

Error: every head of SmolLM2-135M reading the demo's text and of DINOv2 looking at the demo's photograph; the same
predictions with and without means, in full precision (what skipping alone costs) and as `sparse_attention` runs by
default. Cost: random inputs and masks, since time does not depend on the values.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from tamis.attend import DEFAULT_PV_THRESHOLD, attend
from tamis.bench.layers import Layer, evaluate, image_layers, language_layers
from tamis.bench.record import commit
from tamis.block_mask import BlockMask
from tamis.demo.machine import machine
from tamis.demo.measure import Settings, torch_dense
from tamis.demo.progress import Progress
from tamis.geometry import DEFAULT_BLOCK_SIZE, num_blocks
from tamis.predictors.sparge import Sparge

TOKENS = 4096
PREDICTORS = {"topk .1": Sparge(topk=0.1), "topk .25": Sparge(topk=0.25), "topk .5": Sparge(topk=0.5), "cdf": Sparge()}
KINDS = {"full": ("full", None), "int8": ("int8", DEFAULT_PV_THRESHOLD)}
COST_TOKENS, COST_DENSITY = 8192, 0.25
COST_HEADS, COST_KV_HEADS, COST_DIM = 9, 3, 64  # as the language model has

Row = dict[str, Any]


def run(tokens: int = TOKENS, repeats: int = 5) -> dict[str, Any]:
    """All measurements as plain values."""
    models: dict[str, Callable[[], list[Layer]]] = {
        "SmolLM2-135M": lambda: language_layers(tokens),
        "DINOv2 ViT-S/14": image_layers,
    }
    errors = []
    for model, load in models.items():
        layers = load()
        with Progress(2 * len(PREDICTORS) * len(KINDS), model) as progress:
            for kind, (precision, threshold) in KINDS.items():
                for name, predictor in PREDICTORS.items():
                    settings = Settings(predictor, threshold, precision)
                    row = _errors(layers, settings, progress.advance)
                    errors.append(
                        {"model": model, "tokens": layers[0].exact.shape[2], "mask": name, "kind": kind, **row}
                    )
    return {
        "errors": errors,
        "cost": [
            _cost(causal, dtype, repeats) for causal in (False, True) for dtype in (torch.float32, torch.bfloat16)
        ],
        "machine": machine(),
        "commit": commit(),
    }


def _errors(layers: list[Layer], settings: Settings, advance: Callable[[], None]) -> Row:
    """Relative L1 without and with means: over all heads, and the mean over the heads of every layer."""
    found = []
    for compensate in (None, "centroid"):
        found.append(evaluate(layers, replace(settings, compensate=compensate)))
        advance()
    without, beside = (outcome.errors for outcome in found)
    heads = len(without) // len(layers)

    def by_layer(errors: list[float]) -> list[float]:
        return [statistics.fmean(errors[first : first + heads]) for first in range(0, len(errors), heads)]

    return {
        "density": found[0].qk_density,
        "l1_without": statistics.fmean(without),
        "l1_with": statistics.fmean(beside),
        "worst_without": max(without),
        "worst_with": max(beside),
        "heads": len(without),
        "heads_better": sum(b < a for a, b in zip(without, beside, strict=True)),
        "layers_without": by_layer(without),
        "layers_with": by_layer(beside),
    }


def _cost(causal: bool, dtype: torch.dtype, repeats: int) -> Row:
    """Median CPU seconds, on one thread, of int8 calls without and with means and of torch's dense attention."""
    torch.manual_seed(0)
    query = torch.randn(1, COST_HEADS, COST_TOKENS, COST_DIM).to(dtype)
    key, value = (torch.randn(1, COST_KV_HEADS, COST_TOKENS, COST_DIM).to(dtype) for _ in range(2))
    grid = (num_blocks(COST_TOKENS, block) for block in DEFAULT_BLOCK_SIZE)
    kept = torch.rand(1, COST_HEADS, *grid) < COST_DENSITY
    mask = BlockMask.from_dense(kept, DEFAULT_BLOCK_SIZE, (COST_TOKENS, COST_TOKENS))

    def sparse(compensate: str | None) -> None:
        attend(query, key, value, mask, causal=causal, precision="int8", compensate=compensate)

    calls: dict[str, Callable[[], object]] = {
        "without": lambda: sparse(None),
        "with": lambda: sparse("centroid"),
        "dense": lambda: torch_dense(query, key, value, causal=causal, scale=None),
    }
    runs = _cpu_seconds(calls, repeats)
    shares = [(b - a) / dense for a, b, dense in zip(*runs.values(), strict=True)]
    return {
        "causal": causal,
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": COST_TOKENS,
        "density": COST_DENSITY,
        **{f"cpu_seconds_{name}": statistics.median(times) for name, times in runs.items()},
        "share_of_dense": statistics.median(shares),
    }


def _cpu_seconds(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """CPU time on one thread, calls in turn, once to warm up and then `repeats` times: a busy machine counts little."""
    runs: dict[str, list[float]] = {name: [] for name in calls}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(1 + repeats):
            for name, call in calls.items():
                start = time.process_time()
                call()
                runs[name].append(time.process_time() - start)
    finally:
        torch.set_num_threads(threads)
    return {name: times[1:] for name, times in runs.items()}


def table(result: dict[str, Any]) -> str:
    """The result as Markdown, as it stands in docs/compensate.md."""
    lines = [
        "| model, tokens | precision | mask | QK density | relative L1 | with means | change | better heads |"
        " worst head | with means |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["errors"]:
        without, beside = row["l1_without"], row["l1_with"]
        lines.append(
            f"| {row['model']}, {row['tokens']:,} | {row['kind']} | {row['mask']} | {row['density']:.3f} |"
            f" {without:.4f} | {beside:.4f} | {beside / without - 1:+.1%} | {row['heads_better']} of {row['heads']} |"
            f" {row['worst_without']:.3f} | {row['worst_with']:.3f} |"
        )
    lines += [
        "",
        "| inputs | causal | int8, CPU ms | with means | dense | means, share of dense |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["cost"]:
        times = " | ".join(f"{row[f'cpu_seconds_{name}'] * 1e3:.1f}" for name in ("without", "with", "dense"))
        lines.append(f"| {row['dtype']} | {'yes' if row['causal'] else 'no'} | {times} | {row['share_of_dense']:.1%} |")
    return "\n".join(lines)
