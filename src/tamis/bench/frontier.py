"""Which predictor loses least at the same density, on the attention maps of the demo's language model.

Every predictor makes masks at several settings; attention over them runs in full precision, so that what differs from
dense attention is the mask alone. Errors at the same density are read off between the settings.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from tamis.attend import attend
from tamis.bench.layers import Layer, language_layers, percentile
from tamis.bench.record import commit
from tamis.demo.machine import machine
from tamis.demo.measure import relative_l1
from tamis.demo.progress import Progress
from tamis.predictors import Antidiagonal, Oracle, Predictor, Probe, QuerySampled, Random, Sparge, VerticalSlash, Window

DENSITIES = (0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
TIMED_LAYERS, REPEATS = 6, 3
_FLOORS = (0.05, 0.025, 0.013, 0.007, 0.004, 0.002, 0.001)
_CDFS = (0.5, 0.7, 0.82, 0.9, 0.95, 0.98, 0.992)
_SHARES = (0.03, 0.08, 0.14, 0.2, 0.28, 0.38, 0.5)


@dataclass(frozen=True)
class Family:
    """A predictor with one setting left open, and the values to try from sparse to dense."""

    name: str
    make: Callable[[float], Predictor]
    settings: tuple[float, ...]


FAMILIES = (
    Family("oracle, floor", lambda x: Oracle(floor=x), _FLOORS),
    Family("oracle, cdf", lambda x: Oracle(cdf=x), _CDFS),
    Family("probe, floor", lambda x: Probe(floor=x), _FLOORS),
    Family("probe, 1 row, floor", lambda x: Probe(floor=x, rows=1), _FLOORS),
    Family("probe, cdf", lambda x: Probe(cdf=x), _CDFS),
    Family("antidiagonal, floor", lambda x: Antidiagonal(floor=x), _FLOORS),
    Family("antidiagonal, cdf", lambda x: Antidiagonal(cdf=x), _CDFS),
    Family("sparge, cdf", lambda x: Sparge(cdf=x), _CDFS),
    Family("sparge, cdf, no judge", lambda x: Sparge(cdf=x, similarity=-1.0), _CDFS),
    Family("sparge, topk", lambda x: Sparge(topk=x), _SHARES),
    Family("query sampled", lambda x: QuerySampled(x), (0.3, 0.5, 0.65, 0.78, 0.88, 0.95)),
    Family("vertical slash", lambda x: VerticalSlash(x, x), (0.01, 0.04, 0.08, 0.13, 0.2, 0.3)),
    Family("window and sink", lambda x: Window(int(x)), (128, 250, 450, 750, 1100, 1500)),
    Family("random", lambda x: Random(x), (0.05, 0.15, 0.25, 0.35, 0.45, 0.55)),
)


def run(tokens: int, start: int, every: int = 1, families: tuple[Family, ...] = FAMILIES) -> dict[str, Any]:
    """Measure every family on each `every`-th layer; plain values."""
    layers = language_layers(tokens, start)[::every]
    found: list[dict[str, Any]] = []
    with Progress(sum(len(family.settings) for family in families), "density and error") as progress:
        for family in families:
            rows: list[dict[str, float]] = []
            for setting in family.settings:
                rows.append({"setting": setting} | measure(layers, family.make(setting)))
                progress.advance()
            found.append({"name": family.name, "rows": sorted(rows, key=lambda row: row["density"])})
    shares = _cost(layers, families)
    for entry, share in zip(found, shares, strict=True):
        entry["cost"] = share
    return {
        "tokens": tokens,
        "start": start,
        "layers": len(layers),
        "heads": sum(layer.exact.shape[1] for layer in layers),
        "families": found,
        "machine": machine(),
        "commit": commit(),
    }


def measure(layers: list[Layer], predictor: Predictor) -> dict[str, float]:
    """Mean density and relative L1 over all heads, in full precision: what differs from dense is the mask alone."""
    densities: list[float] = []
    errors: list[float] = []
    with torch.inference_mode():
        for layer in layers:
            c = layer.captured
            mask = predictor(c.query, c.key, causal=c.causal, scale=c.scale)
            output, _, stats = attend(c.query, c.key, c.value, mask, causal=c.causal, scale=c.scale)
            assert stats is not None
            densities += stats.density_per_head.tolist()
            errors += relative_l1(output, layer.exact).tolist()
    return {
        "density": statistics.fmean(densities),
        "l1_mean": statistics.fmean(errors),
        "l1_median": statistics.median(errors),
        "l1_p95": percentile(errors, 0.95),
        "l1_worst": max(errors),
    }


def _cost(layers: list[Layer], families: tuple[Family, ...]) -> list[float]:
    """CPU seconds of each family's prediction relative to those of dense int8 attention, medians of turns.

    Seconds of all threads together: other work on the machine disturbs them less than it does the wall clock.
    """
    totals = [0.0] * (1 + len(families))
    chosen = layers[:: max(1, len(layers) // TIMED_LAYERS)]
    with torch.inference_mode(), Progress(len(chosen), "seconds of prediction") as progress:
        for layer in chosen:
            c = layer.captured
            dense = partial(attend, c.query, c.key, c.value, causal=c.causal, scale=c.scale, precision="int8")
            calls: list[Callable[[], object]] = [dense]
            for family in families:
                predictor = family.make(family.settings[len(family.settings) // 2])
                calls.append(partial(predictor, c.query, c.key, causal=c.causal, scale=c.scale))
            for call in calls:
                call()
            runs = [[_cpu_seconds(call) for call in calls] for _ in range(REPEATS)]
            totals = [
                total + statistics.median(times) for total, times in zip(totals, zip(*runs, strict=True), strict=True)
            ]
            progress.advance()
    return [total / totals[0] for total in totals[1:]]


def _cpu_seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def error_at(rows: list[dict[str, float]], density: float) -> float | None:
    """Mean relative L1 at a density, on the line between the nearest settings; None outside of what was measured."""
    for low, high in itertools.pairwise(rows):
        if low["density"] <= density <= high["density"]:
            width = high["density"] - low["density"]
            part = (density - low["density"]) / width if width else 0.0
            return low["l1_mean"] + part * (high["l1_mean"] - low["l1_mean"])
    return None


def density_for(rows: list[dict[str, float]], error: float) -> float | None:
    """The density at which the mean relative L1 falls to a bound, on the same lines; None if it does not."""
    for low, high in itertools.pairwise(rows):
        if low["l1_mean"] >= error >= high["l1_mean"]:
            drop = low["l1_mean"] - high["l1_mean"]
            part = (low["l1_mean"] - error) / drop if drop else 0.0
            return low["density"] + part * (high["density"] - low["density"])
    return None
