"""Settings from an error budget: what every layer and head may skip.

sources.py     attention calls, from a model that reads inputs or from files
candidates.py  the settings that are tried;  frontier.py  all of them in one pass over a call's blocks
evaluate.py    settings in the real kernel;  choose.py  which are tried there, and which are taken
whole.py       one error for the whole model;  ending.py  its end, and which head moves it how much
run.py         the readings;  journal.py  results on disk;  pool.py  several processes;  decide.py  the outcome
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tamis.profile import Profile
from tamis.tuning import whole
from tamis.tuning.candidates import GRID
from tamis.tuning.choose import best, trials, within
from tamis.tuning.decide import Decision, decide, stages
from tamis.tuning.ending import End, weights
from tamis.tuning.evaluate import Trial
from tamis.tuning.journal import Journal
from tamis.tuning.run import Place, Progress, Results, Run, Task, survey, trial
from tamis.tuning.sources import ModelSource, Source

__all__ = ["Budget", "tune"]

Read = Callable[[str, Source, Mapping[Place, Sequence[Trial]], str], Results]
_END_INPUTS = 2  # that are read while the price is looked for; the error that is reported is that of all


@dataclass(frozen=True)
class Budget:
    """The error that is accepted.

    Args:
        l1: relative L1 of every head by its mask, on every tuning input.
        pv_l1: the same with stage 2 on top.
        end_l1: instead of both: relative L1 of the model's output, mean over the inputs.
        end_perplexity: instead of all: relative change of a language model's perplexity.
    """

    l1: float = 0.08
    pv_l1: float = 0.09
    end_l1: float | None = None
    end_perplexity: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be above 0, got {value}")
        if self.pv_l1 < self.l1:
            raise ValueError(f"pv_l1 must be at least l1: it counts what stage 2 adds, got {self.pv_l1} and {self.l1}")
        if self.end_l1 is not None and self.end_perplexity is not None:
            raise ValueError("end_l1 and end_perplexity exclude each other: give one")

    @property
    def end(self) -> tuple[str, float] | None:
        """Metric and size of a budget for the end of the model."""
        if self.end_l1 is not None:
            return "l1", self.end_l1
        return None if self.end_perplexity is None else ("perplexity", self.end_perplexity)

    def as_json(self) -> dict[str, float]:
        """Those that count, by name."""
        if self.end is not None:
            return {f"end_{self.end[0]}": self.end[1]}
        return {"l1": self.l1, "pv_l1": self.pv_l1}


def tune(
    model: nn.Module,
    inputs: Sequence[Any],
    *,
    l1: float = 0.08,
    pv_l1: float = 0.09,
    end_l1: float | None = None,
    end_perplexity: float | None = None,
    held_out: Sequence[Any] = (),
    steps: Sequence[int] = (),
    precision: str = "int8",
    backend: str | None = None,
    workers: int | str = 1,
    resume: str | Path | None = None,
    rows: int = 16,
    progress: Progress | None = None,
) -> Profile:
    """Find for every layer and head of a model the sparsest settings whose error stays within a budget.

    A head that cannot be sparse keeps all its blocks (topk 1); a layer of which a head exceeds the budget even so, by
    rounding alone, runs in full precision. Every setting that is returned was run, on every input.

    Args:
        model: a transformers model.
        inputs: what it reads: tensors of token ids or pixels, mappings of arguments, or functions of no arguments that
            call the model. As varied as what it will read later: five do for a language model.
        l1: largest relative L1, sum|O - O'| / sum|O|, of any head on any input by leaving out blocks (and rounding).
        pv_l1: the same with stage 2 (`pv_threshold`) on top; at least l1.
        end_l1: instead of both, the relative L1 of the model's output, mean over the inputs: density goes where it
            spares the most error there. The model must be differentiable.
        end_perplexity: instead, the relative change of perplexity, for a language model and token ids.
        held_out: more inputs, on which the settings are evaluated at the end; they decide nothing.
        steps: for diffusion: the steps at which new settings begin; a step is one call of a layer. () = one range.
        precision: that the settings will run in.
        backend: as in `attend`.
        workers: processes that share the work; "ray": a Ray cluster, the connected one or this machine; or
            "ray@ADDRESS": the one there. What a worker that is lost looked at is looked at again, by another.
        resume: a file for what has been found; a run with the same model and inputs goes on from it.
        rows: blocks of 128 query rows of a call that the first survey looks at; what is tried later sees all.
        progress: called with (phase, inputs done, inputs).

    Returns:
        A `Profile` for `tamis.apply`. Layers whose calls tuning cannot judge (masks, padding, softcap, sinks, fewer
        than 128 queries) are not in it and run dense.

    Raises:
        ValueError, TypeError: an argument is wrong, a budget cannot be reached, the file is of another run or damaged,
            or no call could be judged; the message says why.
        RuntimeError: several workers were lost over the same call.
        UnsupportedError: the model takes no attention functions, or has no derivative for a budget at the end.

    Source: SpargeAttn (arXiv 2502.18137), section 3.6, for the budget per head; the rest is ours (docs/tuning.md).

    Example:
        >>> import torch, tamis
        >>> from transformers import LlamaConfig, LlamaModel
        >>> config = LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        ...                      num_key_value_heads=1, vocab_size=64)
        >>> model = LlamaModel(config).eval()
        >>> texts = [torch.randint(64, (1, 512)) for _ in range(2)]
        >>> profile = tamis.tune(model, texts, l1=0.05, pv_l1=0.06)
        >>> max(profile.layers["layers.0.self_attn"][0].evidence.l1_worst) <= 0.06
        True
    """
    if not isinstance(inputs, Sequence) or not inputs:
        raise ValueError("inputs must be a sequence with at least one input for the model")
    budget = Budget(l1, pv_l1, end_l1, end_perplexity)
    source = ModelSource(model, inputs)
    return tune_source(
        source,
        ModelSource(model, held_out) if held_out else None,
        budget,
        steps=steps,
        precision=precision,
        backend=backend,
        workers=workers,
        resume=resume,
        rows=rows,
        progress=progress,
    )


def tune_source(
    source: Source,
    held_out: Source | None,
    budget: Budget,
    *,
    steps: Sequence[int] = (),
    precision: str = "int8",
    backend: str | None = None,
    workers: int | str = 1,
    resume: str | Path | None = None,
    rows: int = 16,
    progress: Progress | None = None,
) -> Profile:
    """`tune` for any source of attention calls; a budget for the end of the model needs a `ModelSource`."""
    head = {
        "tamis": _version(),
        "torch": torch.__version__,
        "inputs": source.identity(),
        "held out": None if held_out is None else held_out.identity(),
        "grid": [list(candidate) for candidate in GRID],
        "steps": list(steps),
        "rows": rows,
    }
    journal = Journal(None if resume is None else Path(resume), head)
    with closing(Run(journal, _check_steps(steps), workers, progress)) as run:
        return _tuned(run, source, held_out, budget, precision=precision, backend=backend, rows=rows)


def _tuned(
    run: Run,
    source: Source,
    held_out: Source | None,
    budget: Budget,
    *,
    precision: str,
    backend: str | None,
    rows: int,
) -> Profile:
    """The three readings, and what follows from them."""
    surveyed = run.read("survey", source, lambda _: Task(survey, (rows, backend)))
    if not surveyed:
        raise ValueError(f"no attention call of {source.name} can be judged: {dict(source.left_out) or 'it made none'}")

    def read(phase: str, where: Source, tried: Mapping[Place, Sequence[Trial]], precision: str) -> Results:
        def task(place: Place) -> Task | None:
            return Task(trial, (tried[place], precision, backend)) if place in tried else None

        return run.read(phase, where, task, f"{budget.as_json()} {precision}") if tried else {}

    if budget.end is None:
        end: dict[str, float] = {}
        decisions = _by_head(source, surveyed, budget, read, precision)
    else:
        decisions, end = _by_the_end(run, source, surveyed, budget.end, read, precision, backend)
    held: Results = {}
    for kind in dict.fromkeys(decision.precision for decision in decisions.values()):
        settled = {place: [found.trial] for place, found in decisions.items() if found.precision == kind}
        held |= read("held out", held_out, settled, kind) if held_out is not None else {}
    return Profile(stages(decisions, held, run.bounds), source.name, budget.as_json(), _version(), end)


def _by_head(source: Source, surveyed: Results, budget: Budget, read: Read, precision: str) -> dict[Place, Decision]:
    """Decisions that keep every head within the budget; what rounding alone takes beyond it runs in full precision."""
    tried = {place: trials(within(found["l1"], found["density"], budget.l1)) for place, found in surveyed.items()}
    decisions: dict[Place, Decision] = {}
    for kind in dict.fromkeys((precision, "full")):
        left = {place: found for place, found in tried.items() if place not in decisions}
        for place, found in read("trial", source, left, kind).items():
            picks = best(found["l1"], found["density"], budget.l1, budget.pv_l1)
            if picks is not None:
                decisions[place] = decide(tried[place], picks, found, kind)
    return decisions


def _by_the_end(
    run: Run,
    source: Source,
    surveyed: Results,
    budget: tuple[str, float],
    read: Read,
    precision: str,
    backend: str | None,
) -> tuple[dict[Place, Decision], dict[str, float]]:
    """Decisions for a budget at the end of the model, and what its error was with them."""
    metric, size = budget
    if not isinstance(source, ModelSource):
        raise ValueError(f"end_{metric} needs a model: captured calls do not tell what comes after them")
    error = End(source, metric, backend)
    heads: dict[Place, Tensor] = {}
    for (layer, step), weight in weights(source).items():
        place = Place(layer, run.stage(step))
        heads[place] = heads.get(place, torch.zeros_like(weight)) + weight
    tried = {place: trials(found) for place, found in whole.rungs(surveyed, heads, size).items()}
    outcome = read("trial", source, tried, precision)
    decisions = whole.settle(
        tried, outcome, heads, size, lambda profile: error(profile, _END_INPUTS), run.bounds, precision
    )
    found = error(Profile(stages(decisions, {}, run.bounds)))
    return decisions, {f"end_{metric}": found}


def _check_steps(steps: Sequence[int]) -> Sequence[int]:
    whole_numbers = all(isinstance(step, int) and not isinstance(step, bool) for step in steps)
    if not whole_numbers or list(steps) != sorted(set(steps)) or any(step < 1 for step in steps):
        raise ValueError(f"steps must be ascending integers above 0, got {list(steps)}")
    return steps


def _version() -> str:
    try:
        return version("tamis")
    except PackageNotFoundError:
        return ""
