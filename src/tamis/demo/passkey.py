"""Passkey retrieval: a number hidden at several depths of a text, asked for at its end."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from tamis.demo.measure import Settings
from tamis.demo.passes import applied
from tamis.demo.progress import Progress

TOKENS = 3072  # the longest context, in steps of 1,024, at which dense SmolLM2-135M finds the number at all five depths
NUMBERS = {0.1: 48213, 0.3: 73905, 0.5: 16482, 0.7: 95037, 0.9: 30671}
_BEFORE = "There is an important number hidden inside a lot of irrelevant text. Find it and memorize it.\n\n"
_HIDDEN = "\n\nThe secret number is {number}. Remember it: the secret number is {number}.\n\n"
_QUESTION = "\n\nThe secret number is"
_ANSWER_TOKENS = 8


def run(model: Any, tokenizer: Any, text: str, tokens: int, settings: Settings) -> list[dict[str, Any]]:
    """Whether the dense and the sparse prefill let the model find each number: `[{depth, dense, sparse}]`."""
    found: list[dict[str, Any]] = []
    with Progress(2 * len(NUMBERS), f"passkey in {tokens} tokens") as progress:
        for depth, number in NUMBERS.items():
            ids = prompt(tokenizer, text, tokens, depth, number)
            entry: dict[str, Any] = {"depth": depth}
            for kind in ("dense", "sparse"):
                entry[kind] = str(number) in answer(model, tokenizer, ids, settings if kind == "sparse" else None)
                progress.advance()
            found.append(entry)
    return found


def prompt(tokenizer: Any, text: str, tokens: int, depth: float, number: int) -> Tensor:
    """A text of exactly `tokens` tokens with a number at `depth` and the question at the end, `[1, tokens]`."""
    before, hidden, question, body = (
        tokenizer(part, add_special_tokens=False, verbose=False).input_ids
        for part in (_BEFORE, _HIDDEN.format(number=number), _QUESTION, text)
    )
    room = tokens - len(before) - len(hidden) - len(question)
    if room < 0 or room > len(body):
        raise ValueError(f"a passkey needs a text of at least {room} tokens and {tokens - room} more, got {len(body)}")
    cut = int(room * depth)
    return torch.tensor([[*before, *body[:cut], *hidden, *body[cut:room], *question]])


def answer(model: Any, tokenizer: Any, ids: Tensor, settings: Settings | None) -> str:
    """Greedy continuation after a dense prefill (no settings) or a sparse one; decoding itself is dense."""
    handle = None if settings is None else applied(model, settings)
    with nullcontext() if handle is None else handle, torch.inference_mode():
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=_ANSWER_TOKENS, do_sample=False, use_cache=True
        )
    if handle is not None and not handle.calls["sparse"]:
        raise RuntimeError(f"the prefill did not run sparse: {dict(handle.dense_reasons)}")
    return str(tokenizer.decode(output[0, ids.shape[1] :]))
