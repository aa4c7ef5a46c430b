"""What tuning is worth: density at equal error at the end of the model, on texts that were not tuned on.

Three ways to spend an error: one setting for all heads; one bound for every head (the published rule: per head the
lowest density within the bound on every input); and one bound for the end of the model.
"""

from __future__ import annotations

import itertools
import math
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tamis.attend import DEFAULT_PV_THRESHOLD
from tamis.bench.record import commit
from tamis.demo.machine import machine
from tamis.demo.progress import note
from tamis.demo.tuning import TuneOptions, load
from tamis.integrations.applied import Applied
from tamis.integrations.apply import apply
from tamis.integrations.hook import install
from tamis.integrations.request import dense
from tamis.predictors.sparge import Sparge
from tamis.profile import Profile
from tamis.tuning import Budget, tune_source
from tamis.tuning.ending import output_of, perplexity
from tamis.tuning.sources import ModelSource

BOUNDS = (0.08, 0.05, 0.12)  # for every head
GLOBAL = (0.96, 0.975, 0.99, 0.995)  # cdf for all heads
PERPLEXITY = (0.005, 0.003)
MAIN = 0.08
_STAGE_2 = 1.125  # what stage 2 may add: .09 of .08


def run(options: TuneOptions, journal: Path | None) -> dict[str, Any]:
    """Tune and compare; the figures as plain values.

    Args:
        options: the model and its inputs; its budget is not looked at.
        journal: keeps what tuning found, for a run that goes on or for another.
    """
    model, inputs = load(options)
    first = len(inputs) - options.held_out
    tuned, held_out = ModelSource(model, inputs[:first]), ModelSource(model, inputs[first:])
    judge = Judge(held_out)
    anew = journal is None or not journal.exists()
    main, seconds = _tuned(tuned, held_out, Budget(MAIN, MAIN * _STAGE_2), journal)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
    result: dict[str, Any] = {
        "model": tuned.name,
        "inputs": len(tuned),
        "held_out": len(held_out),
        "tokens": int(judge.tokens),
        "seconds": seconds if anew else None,
        "gigabytes": memory,
        "heads": _heads(main, MAIN * _STAGE_2),
        "one setting": [{"cdf": cdf, **judge(Sparge(cdf=cdf))} for cdf in GLOBAL],
        "one bound": [],
        "the end": [],
        "perplexity": [],
        "machine": machine(),
        "commit": commit(),
    }
    for bound in BOUNDS:
        budget = Budget(bound, bound * _STAGE_2)
        profile = main if bound == MAIN else _tuned(tuned, held_out, budget, journal)[0]
        row = {"l1": bound, **judge(profile)}
        result["one bound"].append(row)
        note(str(row))
        if bound != MAIN:
            continue
        profile, spent = _tuned(tuned, held_out, Budget(end_l1=row["end_l1"]), journal)
        result["the end"].append({"end_l1_asked": row["end_l1"], "seconds": spent, **judge(profile)})
    if isinstance(inputs[0], Tensor) and not inputs[0].is_floating_point():
        for change in PERPLEXITY:
            profile, spent = _tuned(tuned, held_out, Budget(end_perplexity=change), journal)
            row = {"end_perplexity_asked": change, "on_tuning_inputs": profile.evidence["end_perplexity"]}
            result["perplexity"].append({**row, "seconds": spent, **judge(profile)})
    result["lower"] = gains(result)
    return result


def _tuned(tuned: ModelSource, held_out: ModelSource, budget: Budget, journal: Path | None) -> tuple[Profile, float]:
    start = time.perf_counter()

    def tell(phase: str, done: int, total: int, said: str) -> None:
        note(f"{budget.as_json()} {phase} {done}/{total} {said}, {time.perf_counter() - start:.0f} s")

    profile = tune_source(tuned, held_out, budget, resume=journal, progress=tell)
    return profile, time.perf_counter() - start


def _heads(profile: Profile, bound: float) -> dict[str, Any]:
    """How the heads of a profile did on held-out inputs."""
    found = [stage.evidence for stages in profile.layers.values() for stage in stages if stage.evidence is not None]
    errors = [error for evidence in found for error in evidence.held_out_l1]
    return {
        "count": len(errors),
        "density": statistics.fmean(x for evidence in found for x in evidence.density),
        "held_out_density": statistics.fmean(x for evidence in found for x in evidence.held_out_density),
        "held_out_l1_mean": statistics.fmean(errors),
        "held_out_l1_worst_head": max(errors),
        "held_out_l1_worst_input": max(x for evidence in found for x in evidence.held_out_l1_worst),
        "bound": bound,
        "within": sum(error <= bound for error in errors) / len(errors),
    }


class Judge:
    """Density, relative L1 of the output, and change of perplexity, mean over inputs."""

    def __init__(self, source: ModelSource) -> None:
        self._source = source
        self._exact: list[tuple[Tensor, float | None]] = []
        for number in range(len(source)):
            with install(source.model, dense):
                result = source.run(number)
            self._exact.append((output_of(result), self._perplexity(result, number)))
        self.tokens = statistics.fmean(states.shape[1] for states, _ in self._exact)

    def _perplexity(self, result: Any, number: int) -> float | None:
        given = self._source.inputs[number]
        if not isinstance(given, Tensor) or given.is_floating_point():
            return None
        return perplexity(self._source.model, result, given)

    def __call__(self, settings: Profile | Sparge) -> dict[str, float | None]:
        """The figures with these settings."""
        densities, errors, changes = [], [], []
        for number, (exact, plain) in enumerate(self._exact):
            options: dict[str, Any] = {} if isinstance(settings, Profile) else {"pv_threshold": DEFAULT_PV_THRESHOLD}
            with apply(self._source.model, settings, **options) as handle:
                result = self._source.run(number)
            states = output_of(result)
            densities.append(_density(handle))
            errors.append(float((states - exact).abs().sum(dtype=torch.float64) / exact.abs().sum(dtype=torch.float64)))
            found = self._perplexity(result, number)
            changes.append(None if plain is None or found is None else math.log(found / plain))
        known = [change for change in changes if change is not None]
        return {
            "density": statistics.fmean(densities),
            "end_l1": statistics.fmean(errors),
            "perplexity_change": math.expm1(statistics.fmean(known)) if known else None,
        }


def _density(handle: Applied) -> float:
    """Mean over all heads; a layer that ran dense counts as 1."""
    layers = handle.stats().values()
    return statistics.fmean(1.0 if layer.last is None else layer.last.density for layer in layers)


def gains(result: dict[str, Any]) -> list[dict[str, float]]:
    """How much lower density is at the same error at the end, as a share; interpolated in the logarithms of both."""
    found = []
    for row in result["the end"]:
        line = {"end_l1": row["end_l1"], "density": row["density"]}
        for name in ("one setting", "one bound"):
            other = at_error(result[name], row["end_l1"])
            line[f"below {name}"] = math.nan if other is None else 1 - row["density"] / other
        found.append({key: value for key, value in line.items() if not math.isnan(value)})
    for row in result["one bound"]:
        other = at_error(result["one setting"], row["end_l1"])
        row |= {} if other is None else {"below one setting": 1 - row["density"] / other}
    return found


def at_error(rows: Sequence[dict[str, Any]], error: float) -> float | None:
    """The density that rows of measurements have at an error; None outside of what was measured."""
    ordered = sorted((row["end_l1"], row["density"]) for row in rows)
    for (low, dense_low), (high, dense_high) in itertools.pairwise(ordered):
        if low <= error <= high:
            share = 0.0 if high == low else math.log(error / low) / math.log(high / low)
            return math.exp((1 - share) * math.log(dense_low) + share * math.log(dense_high))
    return None


def table(result: dict[str, Any]) -> str:
    """The figures for a terminal, and as markdown for the docs."""
    heads = result["heads"]
    spent = "" if result["seconds"] is None else f"{result['seconds'] / 60:.1f} minutes, "
    lines = [
        f"{result['model']}: {result['inputs']} inputs of {result['tokens']} tokens to tune, {result['held_out']} held "
        f"out. Bound {MAIN} ({heads['bound']:.2f} with stage 2) for each of {heads['count']} heads: "
        f"{spent}{result['gigabytes']:.1f} GB, density {heads['held_out_density']:.3f}; "
        f"on held-out inputs {heads['within']:.1%} of heads within the bound, mean {heads['held_out_l1_mean']:.3f}, "
        f"worst head {heads['held_out_l1_worst_head']:.3f}, worst on one input {heads['held_out_l1_worst_input']:.3f}.",
        "",
        "| settings | density | L1 of the output | perplexity |",
        "|---|---|---|---|",
    ]
    for name, key in (
        ("one setting", "cdf"),
        ("one bound", "l1"),
        ("the end", "end_l1_asked"),
        ("perplexity", "end_perplexity_asked"),
    ):
        for row in result[name]:
            change = row["perplexity_change"]
            said = "" if change is None else f"{change:+.2%}"
            lines.append(f"| {name}, {key} {row[key]:.4g} | {row['density']:.3f} | {row['end_l1']:.4f} | {said} |")
    lines += ["", "Density below that of another way at the same L1 of the output:", ""]
    for line in result["lower"]:
        parts = [
            f"{line[f'below {name}']:.1%} below {name}"
            for name in ("one setting", "one bound")
            if f"below {name}" in line
        ]
        where = f"L1 {line['end_l1']:.4f}, density {line['density']:.3f}"
        lines.append(f"- the end, {where}: {', '.join(parts) or 'outside'}")
    for row in result["one bound"]:
        if "below one setting" in row:
            lines.append(f"- one bound, l1 {row['l1']}: {row['below one setting']:.1%} below one setting")
    return "\n".join(lines)


def options_of(model: str | None, inputs: int, held_out: int, tokens: int | None) -> TuneOptions:
    """What to tune."""
    return replace(TuneOptions(model, Budget()), inputs=inputs, held_out=held_out, tokens=tokens)
