"""Where attention calls come from: a model that reads inputs, or files of what it was asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tamis.integrations.capture import Captures
from tamis.integrations.hook import attention_layers, install
from tamis.integrations.request import Request, dense
from tamis.tuning.calls import LayerCall, exact_output
from tamis.tuning.identity import Digest, Unidentified, of_settings

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

    Raises:
        TypeError, ValueError: it is no model that tamis knows, or an input is none; messages name it `what`.
    """

    def __init__(self, model: nn.Module, inputs: Sequence[Any], what: str = "inputs") -> None:
        attention_layers(model)
        _check_inputs(inputs, what)
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
            step = steps[request.layer]
            steps[request.layer] += 1
            reason = unfit(request)
            if reason is not None:
                self.left_out[reason] += 1
                return dense(request)
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
        """The model's weights and the inputs; an input that is a function or an unknown object is run, and is what the
        attention calls hold that it makes.
        """
        digest = Digest()
        digest.model(self.model)
        for number, given in enumerate(self.inputs):
            part = Digest()
            try:
                part.value(given)
            except Unidentified:
                part = Digest()
                self.visit(number, part.call)
            digest.add(part.hexdigest())
        self.left_out.clear()
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
        return of_settings(said)


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


def _check_inputs(inputs: Any, what: str) -> None:
    if isinstance(inputs, (str, bytes, Tensor)) or not isinstance(inputs, Sequence):
        hint = f": [{what}] for one input" if isinstance(inputs, (Tensor, Mapping)) else ""
        raise TypeError(f"{what} must be a list or tuple of inputs, got {type(inputs).__name__}{hint}")
    for number, given in enumerate(inputs):
        if isinstance(given, Tensor):
            if not given.is_floating_point() and given.ndim != 2:
                raise ValueError(
                    f"{what}[{number}] must be token ids [batch, tokens], got {list(given.shape)}: a text alone is "
                    "ids[None]"
                )
        elif not isinstance(given, Mapping) and not callable(given):
            raise TypeError(
                f"{what}[{number}] must be a tensor of token ids or pixels, a mapping of the model's arguments, or a "
                f"function of no arguments that calls it, got {type(given).__name__}"
            )
