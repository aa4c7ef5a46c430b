"""What settings do when they really run: the kernel, in its precision, against dense attention in fp32."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm

from tamis.attend import attend
from tamis.tuning.calls import LayerCall, exact_output
from tamis.tuning.candidates import Candidate, predictor_of


class Trial(NamedTuple):
    """Settings of all heads of a layer: a candidate and a pv_threshold (inf = off) for each."""

    heads: tuple[Candidate, ...]
    thresholds: tuple[float, ...]


class Outcome(NamedTuple):
    """What trials cost and spared, float64 `[trials, heads]`.

    Attributes:
        l1: sum|O - O'| / sum|O|.
        square: mean of (O - O')^2 over rows and channels.
        density: computed / visible block products.
    """

    l1: Tensor
    square: Tensor
    density: Tensor


def evaluate(call: LayerCall, trials: Sequence[Trial], precision: str, backend: str | None) -> Outcome:
    """Run every trial on a call; trials with the same candidates that follow each other share their prediction."""
    exact = exact_output(call)
    size = _sum_of_sizes(exact).clamp(min=torch.finfo(torch.float64).tiny)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    block_mask, predicted = None, None
    for trial in trials:
        if predicted != trial.heads:
            block_mask = predictor_of(trial.heads)(
                call.query, call.key, causal=call.causal, window=call.window, scale=call.scale, backend=backend
            )
            predicted = trial.heads
        off = all(threshold == math.inf for threshold in trial.thresholds)
        result = attend(
            call.query,
            call.key,
            call.value,
            block_mask,
            causal=call.causal,
            window=call.window,
            scale=call.scale,
            precision=precision,
            pv_threshold=None if off else trial.thresholds,
            backend=backend,
        )
        assert result.stats is not None
        error = result.output.float() - exact
        square = vector_norm(error, 2, dim=3).double().square().sum((0, 2)) / error[:, 0].numel()
        found.append(((_sum_of_sizes(error) / size).cpu(), square.cpu(), result.stats.density_per_head.cpu()))
    return Outcome(*(torch.stack(column) for column in zip(*found, strict=True)))


def _sum_of_sizes(x: Tensor) -> Tensor:
    """sum|x| of every head, float64 `[heads]`; in fp32 along the short axis, which is many times as fast."""
    rows: Tensor = vector_norm(x, 1, dim=3)
    return rows.sum((0, 2), dtype=torch.float64)
