"""What settings do when they really run: the kernel, in its precision, against dense attention in fp32."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm

from tamis.attend import attend
from tamis.tuning.calls import LayerCall, dense_output, exact_output, refuse_not_finite
from tamis.tuning.candidates import Candidate, predictor_of

DENSE_RUN = "dense"  # in place of a precision: the model's own attention


class Trial(NamedTuple):
    """Settings of all heads of a layer: a candidate and a pv_threshold (inf = off) for each."""

    heads: tuple[Candidate, ...]
    thresholds: tuple[float, ...]

    @property
    def off(self) -> bool:
        """Whether no head has stage 2."""
        return all(threshold == math.inf for threshold in self.thresholds)


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
    """Run every trial on a call; trials with the same candidates that follow each other share their prediction.

    Args:
        precision: as in `attend`, or `DENSE_RUN`: dense attention as the model has it, whatever the trials say.

    Raises:
        ValueError: the dense output is not finite, or the trials are for another number of heads.
    """
    heads = {len(trial.heads) for trial in trials}
    if heads != {call.query.shape[1]}:
        raise ValueError(
            f"layer {call.layer} has {call.query.shape[1]} heads in input {call.input} (counted from 0), and "
            f"{max(heads)} where it was tuned: these are calls of another model"
        )
    exact = exact_output(call)
    size = _sum_of_sizes(exact)
    refuse_not_finite(call, size)
    size = size.clamp(min=torch.finfo(torch.float64).tiny)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for output, density in _run(call, trials, precision, backend):
        error = output.float() - exact
        square = vector_norm(error, 2, dim=3).double().square().sum((0, 2)) / error[:, 0].numel()
        found.append(((_sum_of_sizes(error) / size).cpu(), square.cpu(), density.cpu()))
    return Outcome(*(torch.stack(column) for column in zip(*found, strict=True)))


def _run(
    call: LayerCall, trials: Sequence[Trial], precision: str, backend: str | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Output and density of every trial."""
    if precision == DENSE_RUN:
        output = dense_output(call)
        for _ in trials:
            yield output, torch.ones(output.shape[1], dtype=torch.float64)
        return
    geometry: dict[str, Any] = {
        "causal": call.causal,
        "window": call.window,
        "scale": call.scale,
        "backend": backend,
    }
    block_mask, predicted = None, None
    for trial in trials:
        if predicted != trial.heads:
            block_mask = predictor_of(trial.heads)(call.query, call.key, **geometry)
            predicted = trial.heads
        result = attend(
            call.query,
            call.key,
            call.value,
            block_mask,
            precision=precision,
            pv_threshold=None if trial.off else trial.thresholds,
            **geometry,
        )
        assert result.stats is not None
        yield result.output, result.stats.density_per_head


def _sum_of_sizes(x: Tensor) -> Tensor:
    """sum|x| of every head, float64 `[heads]`; in fp32 along the short axis, which is many times as fast."""
    rows: Tensor = vector_norm(x, 1, dim=3)
    return rows.sum((0, 2), dtype=torch.float64)
