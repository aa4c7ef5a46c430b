"""A language model reads a long text twice, with dense and with sparse attention."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tamis.demo import passkey
from tamis.demo.measure import Settings
from tamis.demo.models import check_length, encode, load_language_model
from tamis.demo.passes import alternate, measure_layers
from tamis.demo.progress import Progress
from tamis.demo.text import read_text

_LOGIT_ROWS = 512  # rows of logits in memory at a time: 8,192 x 49,152 in fp32 would take 1.6 GB


@dataclass(frozen=True)
class LanguageOptions:
    """What to read, with which model; `rounds` is how often each kind of attention reads the whole text."""

    tokens: int = 8192
    text: Path | None = None
    model: Path | None = None
    rounds: int = 2
    repeats: int = 3
    passkey_tokens: int = passkey.TOKENS


def run(options: LanguageOptions, settings: Settings) -> dict[str, Any]:
    """Measure everything about the language model; the result is the `language` object of the report.

    Raises:
        ValueError: text or model cannot be used.
        AssetError: the weights cannot be fetched.
    """
    text = read_text(options.text)
    model, tokenizer, name = load_language_model(options.model)
    check_length(model, options.tokens)
    ids = encode(tokenizer, text, options.tokens)
    measured = measure_layers(model, lambda: backbone(model, ids), settings, options.repeats)
    timed = alternate(model, lambda: backbone(model, ids), settings, measured.kind, options.rounds)
    passkey_tokens = min(options.passkey_tokens, options.tokens)
    return {
        "model": name,
        "text": "documentation of the Python standard library" if options.text is None else options.text.name,
        "tokens": options.tokens,
        **timed.as_json(),
        **measured.as_json(),
        "perplexity_dense": perplexity(model, measured.output, ids, "perplexity, dense"),
        "perplexity_sparse": perplexity(model, timed.output, ids, "perplexity, sparse"),
        "passkey": passkey.run(model, tokenizer, text, passkey_tokens, settings),
        "passkey_tokens": passkey_tokens,
        "settings": settings.as_json(),
    }


def backbone(model: Any, ids: Tensor) -> Tensor:
    """Last hidden states of a prefill, `[1, tokens, width]`, without the logits."""
    with torch.inference_mode():
        states: Tensor = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return states


def perplexity(model: Any, hidden: Tensor, ids: Tensor, label: str) -> float:
    """exp of the mean negative log-likelihood of every token but the first, a few rows of logits at a time."""
    head = model.get_output_embeddings()
    total = 0.0
    targets = ids[0, 1:]
    with Progress(len(targets), label) as progress, torch.inference_mode():
        for start in range(0, len(targets), _LOGIT_ROWS):
            chunk = targets[start : start + _LOGIT_ROWS]
            logits = head(hidden[0, start : start + len(chunk)]).float()
            total += float(torch.nn.functional.cross_entropy(logits, chunk, reduction="sum"))
            progress.advance(len(chunk))
    return math.exp(total / len(targets))
