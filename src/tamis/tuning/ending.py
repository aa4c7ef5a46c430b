"""The end of a model: what it puts out, how far that is from what it should be, and which head moves it how much."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
_LARGEST_LOG = 700.0  # exp of more is no double


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
        watch: called with (phase, inputs done, inputs, a word) before every run of the model.
    """

    def __init__(
        self,
        source: ModelSource,
        metric: str,
        backend: str | None,
        watch: Callable[[str, int, int, str], None] | None = None,
    ) -> None:
        self._source, self._metric, self._backend = source, metric, backend
        self._watch = watch
        self._exact: dict[int, Any] = {}

    def __call__(self, profile: Profile, inputs: int | None = None) -> list[float]:
        """The error with a profile on each of the first `inputs`, or of all.

        Raises:
            ValueError: without the profile the model's output is not finite, or not of fixed shape.
            UnsupportedError: there is no perplexity.
        """
        numbers = range(len(self._source) if inputs is None else min(inputs, len(self._source)))
        for number in numbers:
            if number not in self._exact:
                with install(self._source.model, dense):
                    self._exact[number] = self._judge(number, len(numbers))
                if not torch.as_tensor(self._exact[number]).isfinite().all():
                    raise ValueError(f"the model's own output for input {number} (counted from 0) is not finite")
        with apply(self._source.model, profile, backend=self._backend):
            return [_distance(self._judge(number, len(numbers)), self._exact[number]) for number in numbers]

    def _judge(self, number: int, inputs: int) -> Tensor | float:
        if self._watch is not None:
            self._watch("end of the model", number, inputs, "runs with settings that might do")
        result = self._source.run(number)
        if self._metric == "l1":
            return output_of(result).float()
        return perplexity(self._source.model, result, self._source.inputs[number])


def _distance(found: Tensor | float, exact: Tensor | float) -> float:
    if isinstance(found, Tensor) and isinstance(exact, Tensor):
        if found.shape != exact.shape:
            raise ValueError(f"the model's output has another shape in every run: {found.shape} and {exact.shape}")
        return float((found - exact).abs().sum(dtype=torch.float64) / exact.abs().sum(dtype=torch.float64))
    return abs(float(found) / float(exact) - 1)


def perplexity(model: nn.Module, result: Any, ids: Any) -> float:
    """exp of the mean negative log-likelihood of every token but the first.

    Logits are the model's own, with whatever it does to them, for a few tokens at a time.

    Args:
        result: what the model without its head returned for the ids.

    Raises:
        UnsupportedError: the model has no head for tokens, or none that can be asked for a few tokens, or the input is
            no tensor of token ids.
        ValueError: there is one token only.
    """
    inner = getattr(model, "base_model", model)
    if inner is model or not isinstance(ids, Tensor) or ids.is_floating_point():
        raise UnsupportedError("perplexity needs a language model with its head, and tensors of token ids as inputs")
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise UnsupportedError(f"perplexity needs logits a few at a time: {type(model).__name__} has no logits_to_keep")
    if ids.shape[1] < 2:
        raise ValueError("perplexity needs texts of two tokens or more")
    total, last = 0.0, ids.shape[1] - 1
    with torch.inference_mode(), _returning(inner, result) as asked:
        for start in range(0, last, _ROWS):
            rows = torch.arange(start, min(start + _ROWS, last), device=ids.device)
            logits = model(input_ids=ids, logits_to_keep=rows, use_cache=False).logits.float()
            if not asked:
                raise UnsupportedError(f"perplexity: {type(model).__name__} does not run its base model as a whole")
            targets = ids[:, rows + 1].flatten()
            total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="sum"))
    return _exp(total / (last * ids.shape[0]))


def _exp(mean: float) -> float:
    return math.exp(mean) if mean < _LARGEST_LOG else math.inf


@contextmanager
def _returning(module: nn.Module, result: Any) -> Iterator[list[None]]:
    """A module that gives this result instead of running; the list counts how often it was asked."""
    asked: list[None] = []

    def forward(*_: Any, **__: Any) -> Any:
        asked.append(None)
        return result

    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield asked
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def weights(source: ModelSource, number: int, draws: int = 2) -> dict[tuple[str, int], Tensor]:
    """|J_h|^2 / |y|^2 of every head by layer and call, float64 `[heads]`, on one input; see whole.py.

    Raises:
        UnsupportedError: the model's output cannot be differentiated.
    """
    model = source.model
    if any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers())):
        raise UnsupportedError(
            "an error at the end needs the derivative of the model, and this one was built or loaded inside of "
            "torch.inference_mode(): do that outside, under torch.no_grad() if need be"
        )
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            return _weights(source, number, draws)
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def _weights(source: ModelSource, number: int, draws: int) -> dict[tuple[str, int], Tensor]:
    calls: Counter[str] = Counter()
    leaves: dict[tuple[str, int], Tensor] = {}

    def attend(request: Request) -> Tensor:
        output = dense(request)
        place = request.layer, calls[request.layer]
        calls[request.layer] += 1
        if unfit(request) not in (None, "gradients"):
            return output
        leaves[place] = torch.zeros_like(output, requires_grad=True)
        return output + leaves[place]

    with install(source.model, attend):
        output = output_of(source.call(number, _TOKENS)).float()
    if not leaves:
        return {}
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
