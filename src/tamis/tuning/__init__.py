"""Settings from an error budget: what every layer and head may skip.

budget.py      what error is accepted
sources.py     attention calls, from a model that reads inputs or from files
candidates.py  the settings that are tried;  frontier.py  all of them in one pass over a call's blocks
evaluate.py    settings in the real kernel;  choose.py  which are tried there, and which are taken
whole.py       one error for the whole model;  ending.py  its end, and which head moves it how much
run.py         the readings;  pool.py  several processes;  settings.py  what follows from them;  decide.py  the outcome
journal.py     results on disk;  identity.py  what they are results of
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tamis.backends import cpu
from tamis.call import PRECISIONS
from tamis.profile import Profile
from tamis.tuning.budget import Budget
from tamis.tuning.candidates import GRID
from tamis.tuning.decide import Decision, stages
from tamis.tuning.ending import End
from tamis.tuning.journal import Journal, fingerprint
from tamis.tuning.pool import check_reachable, check_workers
from tamis.tuning.run import Place, Progress, Run, Task, survey
from tamis.tuning.settings import Tuning
from tamis.tuning.sources import ModelSource, Source
from tamis.version import installed

__all__ = ["Budget", "tune"]


def tune(
    model: nn.Module,
    inputs: Sequence[Any],
    *,
    l1: float | None = None,
    pv_l1: float | None = None,
    end_l1: float | None = None,
    end_perplexity: float | None = None,
    held_out: Sequence[Any] = (),
    steps: Sequence[int] = (),
    calls_per_step: int = 1,
    precision: str = "int8",
    backend: str | None = None,
    workers: int | str = 1,
    resume: str | Path | None = None,
    rows: int = 16,
    progress: Progress | None = None,
) -> Profile:
    """Find for every layer and head of a model the sparsest settings whose error stays within a budget.

    A head that cannot be sparse runs dense (topk 1, no stage 2); a layer of which a head exceeds the budget even so, by
    rounding alone, runs in full precision, and if that is not enough by the model's own dense attention. All of them
    are in the profile, with what they did: every setting that is returned was run, on every input.

    Args:
        model: of transformers, or a transformer of diffusers.
        inputs: a list of what it reads: tensors of token ids `[batch, tokens]` or pixels, mappings of arguments, or
            functions of no arguments that call the model. As varied as what it will read later: five do for a language
            model.
        l1: largest relative L1, sum|O - O'| / sum|O|, of any head on any input by leaving out blocks (and rounding);
            .08 by default.
        pv_l1: the same with stage 2 (`pv_threshold`) on top; at least l1, and 1.125 * l1 by default.
        end_l1: instead of both, the relative L1 of the model's output, mean over the inputs and one standard error of
            that mean: density goes where it spares the most error there. The model must be differentiable.
        end_perplexity: instead, the relative change of perplexity, either way, the same mean; for a language model and
            token ids.
        held_out: more inputs, on which the settings are evaluated at the end; they decide nothing.
        steps: for diffusion: the steps at which new settings begin. () = one range.
        calls_per_step: how often a layer is called in one step; every call counts, as with `Schedule(calls_per_step=)`.
        precision: that the settings will run in.
        backend: as in `attend`.
        workers: processes that share the work; "ray": a Ray cluster, the connected one or one of this machine that ends
            with the run; or "ray@ADDRESS": the one there. What a worker that is lost looked at is looked at again, by
            another. Processes begin by reading the calling script: see `if __name__ == "__main__":` in docs/tuning.md.
        resume: a file for what has been found; a run with the same model and inputs goes on from it. They are told by
            their bytes; inputs that are functions or unknown objects by the calls they make, for which they are run.
        rows: blocks of 128 query rows of a call that the first survey looks at; what is tried later sees all.
        progress: called with (phase, inputs done, inputs, a word on what is going on), after every input and every few
            seconds.

    Returns:
        A `Profile` for `tamis.apply`. Its evidence counts calls (`samples`): inputs times steps times batch. With a
        budget for the end, its own evidence has the mean over the inputs and the worst of them, of the tuning inputs
        and of those held out. Layers whose calls tuning cannot judge (masks, padding, softcap, sinks, fewer than 128
        queries) are not in it and run dense.

    Raises:
        ValueError, TypeError: an argument is wrong, a budget for the end cannot be reached, the file is no journal, of
            another run, damaged or in use, no call of an input could be judged, or attention is not finite somewhere.
        RuntimeError: workers could not start, or several were lost over the same call.
        UnsupportedError: the model takes no attention functions, has no derivative for a budget at the end, or no
            logits for a perplexity.

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
    budget = Budget(l1, pv_l1, end_l1, end_perplexity)
    source, further = ModelSource(model, inputs), ModelSource(model, held_out, "held_out")
    if not inputs:
        raise ValueError("inputs must be a sequence with at least one input for the model")
    return tune_source(
        source,
        further if held_out else None,
        budget,
        steps=steps,
        calls_per_step=calls_per_step,
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
    calls_per_step: int = 1,
    precision: str = "int8",
    backend: str | None = None,
    workers: int | str = 1,
    resume: str | Path | None = None,
    rows: int = 16,
    progress: Progress | None = None,
) -> Profile:
    """`tune` for any source of attention calls; a budget for the end of the model needs `ModelSource`s."""
    _check_counts(rows=rows, calls_per_step=calls_per_step)
    _check_steps(steps)
    check_workers(workers)
    check_reachable(workers)
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    head: dict[str, Any] = {}
    if resume is not None:
        about = {"steps": list(steps), "calls per step": calls_per_step, "rows": rows, "backend": backend or "auto"}
        head = _about(source, held_out) | about
    journal = Journal(None if resume is None else Path(resume), head)
    with closing(Run(journal, steps, calls_per_step, workers, progress)) as run:
        surveyed = run.read("survey", source, Task(survey, (rows, backend)), whole=True)
        tuning = Tuning(run, source, surveyed, precision, backend)
        decisions, end = _decide(tuning, budget, held_out)
        held = {} if held_out is None else tuning.held_out(held_out, decisions)
    name = fingerprint(head) if head else ""
    return Profile(stages(decisions, held, steps), source.name, budget.as_json(), installed() or "", end, name)


def _decide(tuning: Tuning, budget: Budget, held_out: Source | None) -> tuple[dict[Place, Decision], dict[str, float]]:
    """The settings, and with a budget for the end what its error is with them, on other inputs too."""
    if budget.end is None:
        return tuning.by_head(*budget.heads), {}
    metric, size = budget.end
    source = tuning.source
    if not isinstance(source, ModelSource) or not isinstance(held_out, (ModelSource, type(None))):
        raise ValueError(f"end_{metric} needs a model: captured calls do not tell what comes after them")
    decisions, errors = tuning.by_the_end(source, metric, size)
    end = _mean_and_worst(f"end_{metric}", errors)
    if held_out is not None:
        settled = Profile(stages(decisions, {}, tuning.run.bounds))
        end |= _mean_and_worst(
            f"held_out_end_{metric}", End(held_out, metric, tuning.backend, tuning.run.murmur)(settled)
        )
    return decisions, end


def _about(source: Source, held_out: Source | None) -> dict[str, Any]:
    """What the results in a journal depend on, besides settings; each of them is beside its result."""
    return {
        "tamis": installed() or "",
        "torch": torch.__version__,
        "cpu": cpu.target() or "",
        "inputs": source.identity(),
        "held out": None if held_out is None else held_out.identity(),
        "grid": [list(candidate) for candidate in GRID],
    }


def _mean_and_worst(name: str, errors: Sequence[float]) -> dict[str, float]:
    return {name: statistics.fmean(errors), f"{name}_worst": max(errors)}


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int):
            raise TypeError(f"{name} must be an integer, got {count!r}")
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")


def _check_steps(steps: Sequence[int]) -> None:
    whole_numbers = all(isinstance(step, int) and not isinstance(step, bool) for step in steps)
    if not whole_numbers or list(steps) != sorted(set(steps)) or any(step < 1 for step in steps):
        raise ValueError(f"steps must be ascending integers above 0, got {list(steps)}")
