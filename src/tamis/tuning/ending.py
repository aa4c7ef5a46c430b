"""The end of a model: what it puts out, how far that is from what it should be, and which head moves it how much."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from tamis.errors import UnsupportedError
from tamis.integrations.apply import apply
from tamis.integrations.hook import install
from tamis.integrations.request import Request, dense
from tamis.profile import Profile
from tamis.tuning.sources import ModelSource, unfit

_TOKENS = 1024  # of a text, for the derivative: its memory grows with them, and a head's weight hardly changes
_ROWS = 512  # of logits at a time


def output_of(result: Any) -> Tensor:
    """The tensor that a model is judged by: its last hidden state, its logits, or the first thing it returns."""
    if isinstance(result, Tensor):
        return result
    for name in ("last_hidden_state", "logits", "sample"):
        found = getattr(result, name, None)
        if isinstance(found, Tensor):
            return found
    if isinstance(result, (tuple, list)) and result and isinstance(result[0], Tensor):
        return result[0]
    raise ValueError(f"the model returned {type(result).__name__}, in which there is no output to compare")


class End:
    """The error of a model at its end, against itself with dense attention.

    Args:
        metric: "l1", the relative L1 of its output, or "perplexity", the relative change of perplexity, for which
            inputs must be tensors of token ids.
    """

    def __init__(self, source: ModelSource, metric: str, backend: str | None) -> None:
        self._source, self._metric, self._backend = source, metric, backend
        self._exact: dict[int, Any] = {}

    def __call__(self, profile: Profile, inputs: int | None = None) -> float:
        """The error with a profile, mean over the first `inputs`, or all."""
        numbers = range(len(self._source) if inputs is None else min(inputs, len(self._source)))
        for number in numbers:
            if number not in self._exact:
                with install(self._source.model, dense):
                    self._exact[number] = self._judge(number)
        with apply(self._source.model, profile, backend=self._backend):
            errors = [_distance(self._judge(number), self._exact[number]) for number in numbers]
        return sum(errors) / len(errors)

    def _judge(self, number: int) -> Tensor | float:
        states = output_of(self._source.run(number))
        if self._metric == "l1":
            return states.float()
        return perplexity(self._source.model, states, self._source.inputs[number])


def _distance(found: Tensor | float, exact: Tensor | float) -> float:
    if isinstance(found, Tensor) and isinstance(exact, Tensor):
        return float((found - exact).abs().sum(dtype=torch.float64) / exact.abs().sum(dtype=torch.float64))
    return abs(float(found) / float(exact) - 1)


def perplexity(model: nn.Module, states: Tensor, ids: Any) -> float:
    """exp of the mean negative log-likelihood of every token but the first, from the last hidden states.

    Raises:
        UnsupportedError: the model has no head for tokens, or the input is no tensor of token ids.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None or not isinstance(ids, Tensor) or ids.is_floating_point():
        raise UnsupportedError("perplexity needs a language model with its head, and tensors of token ids as inputs")
    total, targets = 0.0, ids[:, 1:].reshape(-1)
    states = states[:, :-1].reshape(-1, states.shape[-1])
    with torch.inference_mode():
        for start in range(0, len(targets), _ROWS):
            logits = head(states[start : start + _ROWS]).float()
            chunk = targets[start : start + _ROWS]
            total += float(torch.nn.functional.cross_entropy(logits, chunk, reduction="sum"))
    return math.exp(total / len(targets))


def weights(source: ModelSource, draws: int = 2) -> dict[tuple[str, int], Tensor]:
    """|J_h|^2 / |y|^2 of every head by layer and step, float64 `[heads]`; see whole.py.

    Raises:
        UnsupportedError: the model's output cannot be differentiated.
    """
    parameters = [parameter for parameter in source.model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad():
            return _weights(source, draws)
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def _weights(source: ModelSource, draws: int) -> dict[tuple[str, int], Tensor]:
    steps: Counter[str] = Counter()
    leaves: dict[tuple[str, int], Tensor] = {}

    def attend(request: Request) -> Tensor:
        output = dense(request)
        if unfit(request) not in (None, "gradients"):
            return output
        leaf = torch.zeros_like(output, requires_grad=True)
        leaves[request.layer, steps[request.layer]] = leaf
        steps[request.layer] += 1
        return output + leaf

    with install(source.model, attend):
        output = output_of(source.call(0, _TOKENS)).float()
    if not output.requires_grad:
        raise UnsupportedError(
            f"an error at the end needs the derivative of {type(source.model).__name__}: it has none"
        )
    generator = torch.Generator().manual_seed(0)
    found = {place: torch.zeros(leaf.shape[1], dtype=torch.float64) for place, leaf in leaves.items()}
    for draw in range(draws):
        signs = (torch.randint(0, 2, output.shape, generator=generator) * 2 - 1).to(output)
        gradients = torch.autograd.grad(output, list(leaves.values()), signs, retain_graph=draw < draws - 1)
        for place, gradient in zip(leaves, gradients, strict=True):
            found[place] += gradient.double().square().sum((0, 2, 3)).cpu() / draws
    size = float(output.detach().double().square().sum())
    return {place: value / size for place, value in found.items()}
