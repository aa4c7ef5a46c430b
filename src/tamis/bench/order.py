"""What the order of a video's tokens does to block-sparse attention: the paper's table of permutations, on a proxy.

No pretrained video model comes inside a package. The stand-in is an image model's query, key and value of the frames of
a real clip, joined to one sequence (`layers.video_layers`). Every order permutes the same tokens, so dense attention is
the same but for the permutation; what differs is which tokens share a block.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from tamis import order
from tamis.backends import base
from tamis.bench.frontier import measure
from tamis.bench.layers import Layer, video_layers
from tamis.bench.record import commit
from tamis.demo import clip
from tamis.demo.image import PATCH
from tamis.demo.machine import machine
from tamis.demo.progress import Progress, note
from tamis.geometry import DEFAULT_BLOCK_SIZE
from tamis.predictors.sparge import DEFAULT_CDF, DEFAULT_SIMILARITY, Sparge
from tamis.version import installed

CDFS = (0.7, 0.8, 0.9, 0.95, 0.98, DEFAULT_CDF)
JUDGES = {"judged": DEFAULT_SIMILARITY, "unjudged": -1.0}
_BACKEND = "reference"  # of the similarities: exact on every machine


@dataclass(frozen=True)
class OrderOptions:
    """What to measure.

    Attributes:
        clips: names of `demo.clip.CLIPS`.
        frames, stride: how many frames of each, and how far apart: video models see time at a quarter of its rate.
        rows: height of a frame in tokens; the width follows from the clip.
        every: take each so many-th layer.
    """

    clips: tuple[str, ...] = tuple(clip.CLIPS)
    frames: int = 13
    stride: int = 4
    rows: int = 16
    every: int = 3


def run(options: OrderOptions) -> dict[str, Any]:
    """Similarities, and density and error at every setting, of every order and clip; plain values.

    Raises:
        AssetError: the weights or a clip cannot be fetched.
        ValueError: a clip is unknown or too short.
    """
    return {
        "model": "DINOv2 ViT-S/14",
        "proxy": "single frames through an image model, joined to one sequence; no position in time",
        "block_size": list(DEFAULT_BLOCK_SIZE),
        "stride": options.stride,
        "every": options.every,
        "clips": [_clip(name, options) for name in options.clips],
        "machine": machine(),
        "versions": {name: installed(name) for name in ("transformers", "av")},
        "commit": commit(),
    }


def _clip(name: str, options: OrderOptions) -> dict[str, Any]:
    frames = clip.frames(name, options.frames, stride=options.stride, rows=options.rows)
    height, width = (pixels // PATCH for pixels in frames[0].shape[-2:])
    grid = (len(frames), height, width)
    layers = video_layers(frames, options.every)
    note(f"{name}: {' x '.join(map(str, grid))} tokens")
    with Progress(len(order.KINDS) * len(JUDGES) * len(CDFS), f"orders of {name}") as progress:
        orders = [_order(layers, order.tokens(kind, grid), progress.advance) for kind in order.KINDS]
    return {
        "clip": name,
        "grid": list(grid),
        "tokens": height * width * len(frames),
        "layers": [layer.captured.index for layer in layers],
        "heads": sum(layer.exact.shape[1] for layer in layers),
        "orders": orders,
    }


def _order(layers: list[Layer], way: order.TokenOrder, advance: Callable[[], None]) -> dict[str, Any]:
    permuted = [_permuted(layer, way) for layer in layers]
    q_similarity, k_similarity = similarities(permuted)
    sweeps: dict[str, list[dict[str, float]]] = {}
    for name, similarity in JUDGES.items():
        sweeps[name] = []
        for cdf in CDFS:
            sweeps[name].append({"cdf": cdf} | measure(permuted, Sparge(cdf=cdf, similarity=similarity)))
            advance()
    return {"order": way.kind, "q_similarity": q_similarity, "k_similarity": k_similarity, **sweeps}


def _permuted(layer: Layer, way: order.TokenOrder) -> Layer:
    c = layer.captured
    query, key, value, exact = (way.apply(x, 2) for x in (c.query, c.key, c.value, layer.exact))
    return Layer(replace(c, query=query, key=key, value=value), exact)


def similarities(layers: list[Layer]) -> tuple[float, float]:
    """Mean self-similarity of query blocks and of key blocks, as `Sparge` judges them: keys less their mean."""
    block_q, block_kv = DEFAULT_BLOCK_SIZE
    found = []
    with torch.inference_mode():
        for layer in layers:
            query, key = layer.captured.query, layer.captured.key
            mean = base.key_mean(key, None, None, _BACKEND)
            _, of_query = base.summarize(query, block_q, None, None, _BACKEND)
            _, of_key = base.summarize(key, block_kv, mean, None, _BACKEND)
            found.append((float(of_query.mean()), float(of_key.mean())))
    of_query_mean, of_key_mean = (statistics.fmean(column) for column in zip(*found, strict=True))
    return of_query_mean, of_key_mean
