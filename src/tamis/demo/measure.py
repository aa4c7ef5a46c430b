"""Attention alone, dense and sparse, on the query, key and value that a model really computes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, scaled_dot_product_attention

from tamis.attend import sparse_attention
from tamis.predictors.base import Predictor
from tamis.stats import AttentionStats

Seconds = float


@dataclass(frozen=True)
class Settings:
    """How the sparse side runs: the arguments of `sparse_attention`."""

    predictor: Predictor
    pv_threshold: float | None
    precision: str = "int8"
    backend: str | None = None
    compensate: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain values for a report."""
        predictor = {name: _plain(value) for name, value in vars(self.predictor).items()}
        rest = {"precision": self.precision, "pv_threshold": _plain(self.pv_threshold), "compensate": self.compensate}
        return {"predictor": type(self.predictor).__name__, **predictor, **rest}


@dataclass(frozen=True)
class LayerMeasure:
    """One layer: seconds of the attention call, and per query head the densities and the relative L1 error."""

    dense_seconds: Seconds
    sparse_seconds: Seconds
    density: list[float]
    qk_density: list[float]
    pv_density: list[float]
    relative_l1: list[float]
    backend: str
    target: str | None

    def as_json(self, layer: int) -> dict[str, Any]:
        """The layer's entry of a report."""
        return {
            "layer": layer,
            "density": self.density,
            "qk_density": self.qk_density,
            "pv_density": self.pv_density,
            "relative_l1": self.relative_l1,
            "dense_seconds": self.dense_seconds,
            "sparse_seconds": self.sparse_seconds,
        }


@dataclass(frozen=True)
class DenseKind:
    """The number format in which torch's dense attention is fastest here, and the seconds of each."""

    name: str
    seconds: dict[str, Seconds]

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype."""
        return _DTYPES[self.name]


_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def seconds(function: Callable[[], object]) -> Seconds:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def interleaved(functions: Sequence[Callable[[], object]], repeats: int) -> list[list[Seconds]]:
    """Seconds of each function, `repeats` times in turn, so that a slow moment of the machine meets all of them."""
    runs: list[list[Seconds]] = [[] for _ in functions]
    for _ in range(repeats):
        for times, function in zip(runs, functions, strict=True):
            times.append(seconds(function))
    return runs


def torch_dense(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float | None) -> Tensor:
    """Torch's attention at its best: no mask tensor, shared heads not repeated."""
    shared = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scale, enable_gqa=shared)


def probe_dense(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float | None, repeats: int = 3
) -> DenseKind:
    """Time torch's dense attention in fp32 and bf16 on the same inputs and choose the faster one."""
    calls = []
    for dtype in _DTYPES.values():
        q, k, v = (tensor.to(dtype) for tensor in (query, key, value))
        calls.append(lambda q=q, k=k, v=v: torch_dense(q, k, v, causal=causal, scale=scale))
    times = [min(runs) for runs in interleaved(calls, repeats)]
    found = dict(zip(_DTYPES, times, strict=True))
    return DenseKind(min(found, key=lambda name: found[name]), found)


def measure_layer(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool,
    scale: float | None,
    settings: Settings,
    dense_kind: DenseKind,
    repeats: int = 3,
) -> tuple[LayerMeasure, Tensor]:
    """Time both kinds of attention in turn (medians) and compare their outputs; returns the fp32 dense output too.

    The dense side gets its inputs already in its number format; the sparse side gets them as the model made them, and
    prediction, quantisation and everything else is in its time.
    """
    exact = torch_dense(query, key, value, causal=causal, scale=scale)
    q, k, v = (tensor.to(dense_kind.dtype) for tensor in (query, key, value))
    sparse, stats = run_sparse(query, key, value, causal=causal, scale=scale, settings=settings)
    dense_times, sparse_times = interleaved(
        (
            lambda: torch_dense(q, k, v, causal=causal, scale=scale),
            lambda: run_sparse(query, key, value, causal=causal, scale=scale, settings=settings),
        ),
        repeats,
    )
    measure = LayerMeasure(
        dense_seconds=statistics.median(dense_times),
        sparse_seconds=statistics.median(sparse_times),
        density=stats.density_per_head.tolist(),
        qk_density=stats.qk_density_per_head.tolist(),
        pv_density=stats.pv_density_per_head.tolist(),
        relative_l1=relative_l1(sparse, exact).tolist(),
        backend=stats.backend,
        target=stats.target,
    )
    return measure, exact


def run_sparse(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float | None, settings: Settings
) -> tuple[Tensor, AttentionStats]:
    """`sparse_attention` with these settings, output and stats."""
    result = sparse_attention(
        query,
        key,
        value,
        is_causal=causal,
        scale=scale,
        enable_gqa=True,
        predictor=settings.predictor,
        precision=settings.precision,
        pv_threshold=settings.pv_threshold,
        compensate=settings.compensate,
        backend=settings.backend,
        return_stats=True,
    )
    assert isinstance(result, tuple)
    return result


def relative_l1(output: Tensor, exact: Tensor) -> Tensor:
    """sum|O - O'| / sum|O| of every head, `[heads]`; the batch counts as one long sequence."""
    error = (output.float() - exact.float()).abs().sum(dim=(0, 2, 3), dtype=torch.float64)
    return error / exact.float().abs().sum(dim=(0, 2, 3), dtype=torch.float64).clamp(min=1e-30)


def cosine(output: Tensor, exact: Tensor) -> Tensor:
    """Cosine of the angle between O and O' of every head, `[heads]`; batch, tokens and channels are one long vector."""
    ours, truth = (x.double().transpose(0, 1).flatten(1) for x in (output, exact))
    return cosine_similarity(ours, truth, dim=1)


def summary(layers: list[LayerMeasure]) -> dict[str, Any]:
    """Figures over all layers and heads, as they stand in the report."""
    dense = sum(layer.dense_seconds for layer in layers)
    sparse = sum(layer.sparse_seconds for layer in layers)
    errors = [error for layer in layers for error in layer.relative_l1]
    return {
        "attention_seconds_dense": dense,
        "attention_seconds_sparse": sparse,
        "attention_ratio": dense / sparse,
        "density": _mean(head for layer in layers for head in layer.density),
        "qk_density": _mean(head for layer in layers for head in layer.qk_density),
        "pv_density": _mean(head for layer in layers for head in layer.pv_density),
        "relative_l1_median": statistics.median(errors),
        "relative_l1_mean": statistics.fmean(errors),
        "relative_l1_worst": max(errors),
        "layers": [layer.as_json(index) for index, layer in enumerate(layers)],
    }


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value
