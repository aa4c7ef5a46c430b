"""What the attention layers of a model were asked: handed over one call at a time, written to disk, and read again.

`capture` shows every call to a function, `record` writes a chosen sample of them to a folder, `Captures` reads it.
Reading needs torch and safetensors alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tamis.integrations.capture_files import Entry, Skipped, read_index, read_tensors
from tamis.integrations.capture_writer import Calls, Choice, Recorder, beyond, open_folder
from tamis.integrations.hook import install
from tamis.integrations.request import Request


@dataclass(frozen=True)
class Captured:
    """What one attention layer was asked: tensors `[1, heads, seq, head_dim]`, their ends aligned.

    Attributes:
        index, name: number of the layer in the order of first calls, and qualified name of its module.
        causal, window, scale: as in `tamis.attend`.
        input, step: which input of the model, and how many calls of this layer came before in it.
        heads: which of the model's `num_heads` query heads these are; None for all of them.
    """

    index: int
    name: str
    query: Tensor
    key: Tensor
    value: Tensor
    causal: bool
    scale: float | None
    window: int | None = None
    input: int = 0
    step: int = 0
    heads: tuple[int, ...] | None = None
    num_heads: int | None = None


def capture(model: nn.Module, run: Callable[[], Any], visit: Callable[[Captured], Tensor]) -> Any:
    """Run `run()` while `visit` computes the output of every attention call of `model`; returns what `run` returned.

    Raises:
        TypeError: `model` is no transformers model.
        ValueError: the model asks for more than causal or full attention (windows, padding, sinks, softcap).
    """
    calls = Calls([])

    def attend(request: Request) -> Tensor:
        if beyond(request) is not None or request.window is not None:
            raise ValueError(f"{request.layer} asks for more than causal or full attention, which is not measured")
        index, step = calls.count(request.layer)
        captured = Captured(
            index=index,
            name=request.layer,
            query=request.query.contiguous(),
            key=request.key.contiguous(),
            value=request.value.contiguous(),
            causal=request.causal,
            scale=request.scale,
            step=step,
        )
        return visit(captured)

    with install(model, attend), torch.inference_mode():
        return run()


def record(
    model: nn.Module,
    run: Callable[[], Any],
    folder: Path | str,
    *,
    input: int = 0,
    layers: Sequence[int | str] | None = None,
    heads: Sequence[int] | None = None,
    steps: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    max_bytes: int = 2 * 10**9,
) -> None:
    """Run `run()` densely and write what chosen attention layers of a model were asked.

    A new or empty folder is filled, one with captures of the same model is added to. Every call is on disk before the
    next one starts, so what was captured before an interruption can be read. Calls that the format cannot hold
    (padding, other masks, sinks, softcap, batches) are listed in the index as skipped, with the reason.

    Args:
        model: a `PreTrainedModel` whose attention goes through `AttentionInterface`, or a transformer of diffusers.
        run: calls the model once, or many times as when generating or denoising.
        folder: where to write; docs/captures.md describes the files.
        input: number of this input in the folder.
        layers: numbers in the order of first calls, or names of attention modules; None for all.
        heads: query heads; with GQA each brings all heads of its group. None for all.
        steps: which calls of each layer, counted from 0; None for all.
        dtype: fp32, bf16 or fp16; None for that of the model.
        max_bytes: largest size of all captured files in the folder together.

    Raises:
        TypeError: `model` is no transformers model.
        ValueError: an argument is wrong, the folder holds something else or this call already, a layer or head is not
            there, nothing could be captured, a value does not fit the dtype, or `max_bytes` would be exceeded.

    Example:
        >>> import tempfile, torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        ...                      num_key_value_heads=2, vocab_size=64)
        >>> model = LlamaForCausalLM(config).eval()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     record(model, lambda: model(torch.zeros(1, 20, dtype=torch.long)), folder, layers=[1], heads=[0])
        ...     [captured.query.shape for captured in Captures(folder)]
        [torch.Size([1, 2, 20, 8])]
    """
    choice = Choice(input, layers, heads, steps, dtype, max_bytes)
    with install(model, lambda request: recorder.attend(request)), torch.inference_mode():
        modules = {name for name, _ in model.named_modules()}
        if unknown := [name for name in choice.layers or () if isinstance(name, str) and name not in modules]:
            raise ValueError(f"layers has {unknown[0]!r}, and {type(model).__name__} has no module of that name")
        recorder = Recorder(Path(folder), open_folder(Path(folder), model), choice)
        run()
    recorder.finish()


class Captures:
    """The captures of a folder, read one call at a time; iterating gives every `Captured` by input, step and layer.

    Attributes:
        folder, model: where it is, and the class of the model.
        entries: what the index says of each call, by input, step and layer; nothing is loaded for that.
        skipped: calls that were not captured, with reasons.

    Raises:
        ValueError: the folder holds no captures, or its index is not valid.

    Example:
        >>> for captured in Captures("captures"):                          # doctest: +SKIP
        ...     print(captured.name, captured.query.shape)
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        index = read_index(self.folder)
        self.model = index.model
        self._numbers = {name: number for number, name in enumerate(index.layers)}
        ordered = sorted(index.entries, key=lambda e: (e.input, e.step, self._numbers[e.layer]))
        self.entries: tuple[Entry, ...] = tuple(ordered)
        self.skipped: tuple[Skipped, ...] = tuple(index.skipped)
        self._places = {entry.place: entry for entry in ordered}

    @property
    def layers(self) -> list[str]:
        """Names of the layers that were captured, in the order of first calls."""
        return sorted({entry.layer for entry in self.entries}, key=lambda name: self._numbers[name])

    @property
    def inputs(self) -> list[int]:
        """Numbers of the inputs that were captured."""
        return sorted({entry.input for entry in self.entries})

    @property
    def steps(self) -> list[int]:
        """Numbers of the steps that were captured, of any layer and input."""
        return sorted({entry.step for entry in self.entries})

    def load(self, layer: str | int, input: int = 0, step: int = 0) -> Captured:
        """One call, by name or number of its layer; tensors on the CPU.

        Raises:
            ValueError: it was not captured, or its file is missing, cut short or altered.
        """
        names = {number: name for name, number in self._numbers.items()}
        name = names.get(layer, str(layer)) if isinstance(layer, int) else layer
        entry = self._places.get((input, step, name))
        if entry is None:
            raise ValueError(
                f"{self.folder} holds no layer {layer!r} of input {input}, step {step}: "
                f"layers {self.layers}, inputs {self.inputs}, steps {self.steps}"
            )
        return Captured(
            index=self._numbers[name],
            name=name,
            **read_tensors(self.folder, entry),
            causal=entry.causal,
            scale=entry.scale,
            window=entry.window,
            input=input,
            step=step,
            heads=entry.heads,
            num_heads=entry.num_heads,
        )

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[Captured]:
        return (self.load(entry.layer, entry.input, entry.step) for entry in self.entries)
