"""Whole passes of a model: one that measures every layer, and several in turn that are only timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tamis.demo.maps import Gallery
from tamis.demo.measure import DenseKind, LayerMeasure, Settings, measure_layer, probe_dense, summary, torch_dense
from tamis.demo.progress import Progress
from tamis.integrations.applied import Applied
from tamis.integrations.apply import apply
from tamis.integrations.capture import Captured, capture
from tamis.integrations.hook import install
from tamis.integrations.request import Request


@dataclass(frozen=True)
class Measured:
    """What a measuring pass found, and the output of that pass, which ran dense in fp32."""

    kind: DenseKind
    layers: list[LayerMeasure]
    gallery: Gallery
    output: Tensor

    def as_json(self) -> dict[str, Any]:
        """Figures over layers, the maps, and how the dense side ran."""
        return {
            **summary(self.layers),
            "dense_kind": self.kind.name,
            "dense_probe_seconds": self.kind.seconds,
            "maps": self.gallery.pictures(),
        }


@dataclass(frozen=True)
class Timed:
    """Seconds of whole passes, and the output of the last sparse one."""

    dense: list[float]
    sparse: list[float]
    output: Tensor

    def as_json(self) -> dict[str, Any]:
        """Medians, their ratio, and every run."""
        dense, sparse = statistics.median(self.dense), statistics.median(self.sparse)
        return {
            "total_seconds_dense": dense,
            "total_seconds_sparse": sparse,
            "total_ratio": dense / sparse,
            "total_seconds_dense_runs": self.dense,
            "total_seconds_sparse_runs": self.sparse,
        }


def measure_layers(model: Any, run: Callable[[], Tensor], settings: Settings, repeats: int) -> Measured:
    """One dense fp32 pass during which every layer's attention is timed, compared and pictured.

    Only one layer's tensors are held at a time.
    """
    layers = len(blocks(model))
    gallery = Gallery(layers)
    measures: list[LayerMeasure] = []
    kinds: list[DenseKind] = []
    with Progress(layers, "attention, layer by layer") as progress:

        def visit(layer: Captured) -> Tensor:
            q, k, v, causal, scale = layer.query, layer.key, layer.value, layer.causal, layer.scale
            if not kinds:
                kinds.append(probe_dense(q, k, v, causal=causal, scale=scale))
            measure, exact = measure_layer(
                q, k, v, causal=causal, scale=scale, settings=settings, dense_kind=kinds[0], repeats=repeats
            )
            measures.append(measure)
            gallery.consider(
                len(measures) - 1,
                q,
                k,
                settings.predictor(q, k, causal=causal, scale=scale, backend=settings.backend),
                density=measure.density,
                relative_l1=measure.relative_l1,
                causal=causal,
                scale=scale,
            )
            progress.advance()
            return exact

        output = capture(model, run, visit)
    if not kinds:
        raise ValueError(f"{type(model).__name__} made no attention call that can be measured")
    return Measured(kinds[0], measures, gallery, output)


def alternate(model: Any, run: Callable[[], Tensor], settings: Settings, kind: DenseKind, rounds: int) -> Timed:
    """Time whole passes, dense and sparse in turn, each kind going first every other round."""

    def dense(request: Request) -> Tensor:
        q, k, v = (tensor.to(kind.dtype) for tensor in (request.query, request.key, request.value))
        return torch_dense(q, k, v, causal=request.causal, scale=request.scale).to(request.query.dtype)

    times: dict[bool, list[float]] = {False: [], True: []}
    output = torch.empty(0)
    parts = blocks(model)
    with Progress(2 * rounds * len(parts), "whole passes, dense and sparse") as progress:
        ticks = [part.register_forward_hook(lambda *_: progress.advance()) for part in parts]
        try:
            for number in range(2 * rounds):
                sparse = number % 4 in (1, 2)
                with applied(model, settings) if sparse else install(model, dense), torch.inference_mode():
                    start = time.perf_counter()
                    result = run()
                    times[sparse].append(time.perf_counter() - start)
                output = result if sparse else output
        finally:
            for tick in ticks:
                tick.remove()
    return Timed(times[False], times[True], output)


def applied(model: Any, settings: Settings) -> Applied:
    """`tamis.apply` with the demo's settings."""
    return apply(
        model,
        settings.predictor,
        precision=settings.precision,
        pv_threshold=settings.pv_threshold,
        compensate=settings.compensate,
        backend=settings.backend,
    )


def blocks(model: Any) -> list[nn.Module]:
    """The repeated blocks of a model: the longest list of modules in it."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=[])
