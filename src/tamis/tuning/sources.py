"""Where attention calls come from: a model that reads inputs, or files of what it was asked."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tamis.integrations.capture import Captures
from tamis.integrations.hook import install
from tamis.integrations.request import Request, dense
from tamis.tuning.calls import LayerCall, exact_output

MIN_QUERIES = 128  # a block of rows; shorter calls run dense
Visit = Callable[[LayerCall], None]


class Source(Protocol):
    """Attention calls by input.

    Attributes:
        name: of the model's class.
        left_out: why calls were not looked at, and how many.
    """

    name: str
    left_out: Counter[str]

    def __len__(self) -> int:
        """Number of inputs."""

    def visit(self, number: int, function: Visit) -> None:
        """Hand every attention call of an input to a function, in the order in which they were made."""

    def identity(self) -> str:
        """A checksum of everything that decides what the calls hold."""


class ModelSource:
    """A transformers model and its inputs: tensors of token ids or pixels, mappings of arguments, or functions.

    A tensor of integers goes to the model without its head, for whose logits nobody asks; a function is called without
    arguments and has to call the model.
    """

    def __init__(self, model: nn.Module, inputs: Sequence[Any]) -> None:
        self.model, self.inputs = model, inputs
        self.name = type(model).__name__
        self.left_out: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self.inputs)

    def run(self, number: int) -> Any:
        """What the model returns for an input."""
        with torch.inference_mode():
            return self.call(number)

    def call(self, number: int, tokens: int | None = None) -> Any:
        """`run` in the present gradient mode; of a tensor of token ids only the first `tokens`."""
        given, model = self.inputs[number], self.model
        if not isinstance(given, Tensor):
            return model(**given) if isinstance(given, Mapping) else given()
        if given.is_floating_point():
            return model(given)
        inner = getattr(model, "base_model", model)
        options = {"use_cache": False} if hasattr(inner.config, "use_cache") else {}
        return inner(given[:, :tokens], **options)

    def visit(self, number: int, function: Visit) -> None:
        steps: Counter[str] = Counter()

        def attend(request: Request) -> Tensor:
            reason = unfit(request)
            if reason is not None:
                self.left_out[reason] += 1
                return dense(request)
            step = steps[request.layer]
            steps[request.layer] += 1
            outputs = []
            for batch in range(request.query.shape[0]):
                q, k, v = (t[batch : batch + 1] for t in (request.query, request.key, request.value))
                place = (request.layer, number, step, batch)
                call = LayerCall(*place, q, k, v, request.causal, request.window, request.scale)
                function(call)
                outputs.append(exact_output(call).to(q.dtype))
            return torch.cat(outputs)

        with install(self.model, attend):
            self.run(number)

    def identity(self) -> str:
        digest = hashlib.sha256(str(getattr(self.model, "config", self.name)).encode())
        for name, parameter in self.model.state_dict().items():
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.double().sum().item()!r}".encode())
        for given in self.inputs:
            for part in _parts(given):
                digest.update(part)
        return digest.hexdigest()


class CaptureSource:
    """Files of what attention layers were asked, as `tamis capture` writes them.

    Raises:
        ValueError: the captures hold some heads of a layer only, which make no profile.
    """

    def __init__(self, captures: Captures) -> None:
        self._captures = captures
        self.name = captures.model
        self.left_out: Counter[str] = Counter(call.reason for call in captures.skipped)
        self._inputs = captures.inputs
        for entry in captures.entries:
            if entry.heads is not None and len(entry.heads) != entry.num_heads:
                raise ValueError(
                    f"{captures.folder} holds {len(entry.heads)} of the {entry.num_heads} heads of {entry.layer}, and "
                    "settings are for all: capture without heads"
                )

    def __len__(self) -> int:
        return len(self._inputs)

    def visit(self, number: int, function: Visit) -> None:
        for entry in self._captures.entries:
            if entry.input == self._inputs[number]:
                found = self._captures.load(entry.layer, entry.input, entry.step)
                place = (found.name, number, found.step, 0)
                tensors = (found.query, found.key, found.value)
                if found.query.shape[2] < MIN_QUERIES:
                    self.left_out[f"fewer than {MIN_QUERIES} queries"] += 1
                    continue
                function(LayerCall(*place, *tensors, found.causal, found.window, found.scale))

    def identity(self) -> str:
        said = [
            (entry.place, entry.sha256, entry.causal, entry.window, entry.scale) for entry in self._captures.entries
        ]
        return hashlib.sha256(repr(said).encode()).hexdigest()


def unfit(request: Request) -> str | None:
    """Why a call is left as it is, or None."""
    if request.obstacle is not None:
        return request.obstacle
    if request.query.shape[2] < MIN_QUERIES:
        return f"fewer than {MIN_QUERIES} queries"
    kinds = {
        "mask": request.mask,
        "padding": request.segments,
        "softcap": request.softcap,
        "sinks": request.sink_logits,
    }
    return next((name for name, value in kinds.items() if value is not None), None)


def _parts(given: Any) -> Iterator[bytes]:
    """Everything in an input that can be told apart; what a function does cannot, but for what it was given."""
    if isinstance(given, Tensor):
        flat = given.detach().cpu().contiguous().flatten()
        yield f"{given.dtype} {tuple(given.shape)}".encode() + flat.view(torch.uint8).numpy().tobytes()
    elif isinstance(given, partial):
        yield from _parts((given.args, given.keywords))
    elif isinstance(given, (Mapping, list, tuple)):
        for item in given.items() if isinstance(given, Mapping) else given:
            yield from _parts(item)
    elif isinstance(given, (str, int, float, bool, type(None))):
        yield repr(given).encode()
    else:
        yield type(given).__qualname__.encode()
