"""Writes the attention calls that a model makes to a folder of captures, those that were chosen."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tamis.integrations.capture_files import (
    DTYPES,
    INDEX,
    TENSORS,
    Entry,
    Index,
    Skipped,
    query_heads,
    read_index,
    write_index,
    write_whole,
)
from tamis.integrations.request import Request, dense

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Calls:
    """Numbers layers in the order of first calls, and counts the calls of each."""

    def __init__(self, layers: list[str]) -> None:
        self.layers = layers
        self.made: Counter[str] = Counter()

    def count(self, layer: str) -> tuple[int, int]:
        """Number of the layer, and how many calls of it came before."""
        if layer not in self.layers:
            self.layers.append(layer)
        self.made[layer] += 1
        return self.layers.index(layer), self.made[layer] - 1


@dataclass(frozen=True)
class Choice:
    """The arguments of `record`, checked."""

    input: int
    layers: Sequence[int | str] | None
    heads: Sequence[int] | None
    steps: Sequence[int] | None
    dtype: torch.dtype | None
    max_bytes: int

    def __post_init__(self) -> None:
        numbers = [item for item in self.layers or () if not isinstance(item, str)]
        for name, found in (("layers", numbers), ("heads", self.heads), ("steps", self.steps), ("input", [self.input])):
            if any(isinstance(item, bool) or not isinstance(item, int) or item < 0 for item in found or ()):
                raise ValueError(f"{name} must be whole numbers of at least 0, got {getattr(self, name)!r}")
        for name in ("layers", "heads", "steps"):
            if isinstance(chosen := getattr(self, name), str) or (chosen is not None and not chosen):
                raise ValueError(f"{name} must be a list with something in it, or None for all, got {chosen!r}")
        if self.dtype is not None and self.dtype not in _NAMES:
            raise ValueError(f"dtype must be one of {', '.join(map(str, _NAMES))} or None, got {self.dtype}")
        if self.max_bytes <= 0:
            raise ValueError(f"max_bytes must be above 0, got {self.max_bytes}")

    def takes(self, number: int, layer: str, step: int) -> bool:
        """Whether a call is part of the sample."""
        wanted = self.layers is None or number in self.layers or layer in self.layers
        return wanted and (self.steps is None or step in self.steps)


class Recorder:
    """Computes attention densely and writes the chosen calls."""

    def __init__(self, folder: Path, index: Index, choice: Choice) -> None:
        self.folder = folder
        self.index = index
        self.choice = choice
        self._calls = Calls(index.layers)
        self._kept = 0
        self._reasons: list[str] = []

    def attend(self, request: Request) -> Tensor:
        number, step = self._calls.count(request.layer)
        if self.choice.takes(number, request.layer, step):
            reason = _unfit(request)
            if reason is None:
                self._write(request, number, step)
            else:
                self._reasons.append(f"{request.layer}: {reason}")
                self.index.skipped.append(Skipped(request.layer, self.choice.input, step, reason))
                write_index(self.folder, self.index)
        return dense(request)

    def finish(self) -> None:
        """Write the names of all layers, and complain of what was asked for and never came."""
        write_index(self.folder, self.index)
        called = self._calls.made
        for wanted in self.choice.layers or ():
            if wanted not in called and wanted not in [self.index.layers.index(name) for name in called]:
                raise ValueError(f"layers has {wanted!r}, which was not called: {_listing(self.index.layers)}")
        most = max(called.values(), default=0)
        for step in self.choice.steps or ():
            if step >= most:
                raise ValueError(f"steps has {step}, and no layer was called more than {most} times")
        if not self._kept:
            why = self._reasons[0] if self._reasons else f"calls by layer: {dict(self._calls.made)}"
            raise ValueError(f"no attention call could be captured ({why})")

    def _write(self, request: Request, number: int, step: int) -> None:
        from safetensors.torch import save

        place = (self.choice.input, step, request.layer)
        if any(entry.place == place for entry in self.index.entries):
            raise ValueError(
                f"{self.folder} holds step {step} of {request.layer} for input {self.choice.input} already: "
                "choose another input number or another folder"
            )
        heads, kv_heads = self._sample(request)
        tensors = self._tensors(request, heads, kv_heads)
        content = save(tensors)
        self._check_room(len(content), request.layer)
        entry = Entry(
            file=f"input{self.choice.input:03d}-step{step:03d}-layer{number:03d}.safetensors",
            layer=request.layer,
            input=self.choice.input,
            step=step,
            causal=request.causal,
            window=request.window,
            scale=None if request.scale is None else float(request.scale),
            num_heads=request.query.shape[1],
            num_kv_heads=request.key.shape[1],
            heads=heads,
            kv_heads=kv_heads,
            shapes={name: tuple(tensor.shape) for name, tensor in tensors.items()},
            dtype=_NAMES[tensors["query"].dtype],
            bytes=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
        )
        write_whole(self.folder / entry.file, content)
        self.index.entries.append(entry)
        write_index(self.folder, self.index)
        self._kept += 1

    def _sample(self, request: Request) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The query heads and key heads to keep: whole groups."""
        heads, kv_heads = request.query.shape[1], request.key.shape[1]
        wanted = range(heads) if self.choice.heads is None else self.choice.heads
        if max(wanted) >= heads:
            raise ValueError(f"heads has {max(wanted)}, and {request.layer} has {heads} heads")
        group = heads // kv_heads
        kept = tuple(sorted({head // group for head in wanted}))
        return query_heads(kept, group), kept

    def _tensors(self, request: Request, heads: tuple[int, ...], kv_heads: tuple[int, ...]) -> dict[str, Tensor]:
        tensors = {}
        for name, kept in zip(TENSORS, (heads, kv_heads, kv_heads), strict=True):
            original: Tensor = getattr(request, name)[:, list(kept)].cpu()  # a copy: safetensors takes no shared memory
            stored = original if self.choice.dtype is None else original.to(self.choice.dtype)
            if not stored.isfinite().all() and original.isfinite().all():
                raise ValueError(
                    f"{name} of {request.layer} reaches {original.abs().max():.3g}, too large for {stored.dtype}: "
                    "use bf16 or fp32"
                )
            tensors[name] = stored
        return tensors

    def _check_room(self, size: int, layer: str) -> None:
        if self.index.bytes + size > self.choice.max_bytes:
            raise ValueError(
                f"capturing {layer} would bring {self.folder} to {(self.index.bytes + size) / 1e9:.3g} GB, over the "
                f"{self.choice.max_bytes / 1e9:.3g} GB allowed; what is there can be read. Choose fewer layers, heads, "
                "steps or tokens, a 16-bit dtype, or allow more"
            )


def open_folder(folder: Path, model: nn.Module) -> Index:
    """The index of a folder to write to: the one that is there, or a new one."""
    name = type(model).__name__
    if (folder / INDEX).exists():
        index = read_index(folder)
        if index.model != name:
            raise ValueError(f"{folder} holds captures of {index.model}, not {name}: choose another folder")
        return index
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty and holds no captures: choose a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    index = Index(name)
    write_index(folder, index)
    return index


def beyond(request: Request) -> str | None:
    """What a call asks for besides causal, full or window attention, or None."""
    if request.obstacle is not None:
        return request.obstacle
    asked = {
        "a mask": request.mask,
        "packed documents" if request.packed else "padding": request.segments,
        "softcap": request.softcap,
        "sink logits": request.sink_logits,
    }
    return next((name for name, found in asked.items() if found is not None), None)


def _unfit(request: Request) -> str | None:
    """Why the format cannot hold a call, or None."""
    query, key, value = request.query, request.key, request.value
    if (reason := beyond(request)) is not None:
        return reason
    if query.shape[0] != 1:
        return f"a batch of {query.shape[0]}, not one input"
    if not query.dtype == key.dtype == value.dtype:
        return f"dtypes {query.dtype}, {key.dtype} and {value.dtype}"
    empty = 0 in (*query.shape, *key.shape, *value.shape)
    return "no tokens" if empty else None


def _listing(names: list[str]) -> str:
    return ", ".join(f"{number} {name}" for number, name in enumerate(names)) or "none was"
