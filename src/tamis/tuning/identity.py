"""What decides the results of a run, as a checksum: weights, inputs, settings.

Every part is preceded by its kind and its length, so that parts cannot run into each other.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tamis.tuning.calls import LayerCall


class Unidentified(TypeError):
    """What a value holds cannot be told apart from what others of its type hold."""


class Digest:
    """SHA-256 of parts."""

    def __init__(self) -> None:
        self._sha = hashlib.sha256()

    def add(self, part: str | bytes | memoryview) -> None:
        data = part.encode() if isinstance(part, str) else part
        self._sha.update(f"{len(data)}:".encode())
        self._sha.update(data)

    def hexdigest(self) -> str:
        return self._sha.hexdigest()

    def tensor(self, tensor: Tensor) -> None:
        """Dtype, shape and bytes; nothing is copied that lies on the CPU in one piece.

        Raises:
            Unidentified: its numbers are not stored as a plain array (sparse, quantised, meta).
        """
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise Unidentified(f"a {tensor.layout} tensor on {tensor.device}")
        self.add(f"{tensor.dtype} {tuple(tensor.shape)}")
        plain = tensor.detach().cpu().contiguous()
        size = plain.numel() * plain.element_size()
        # Not by numpy, which torch may be without.
        self.add(memoryview((ctypes.c_char * size).from_address(plain.data_ptr())) if size else b"")

    def value(self, value: Any) -> None:
        """A tensor, an array of numpy, text, a number, or a mapping, list or tuple of such.

        Raises:
            Unidentified: it is something else, such as a function.
        """
        if isinstance(value, Tensor):
            self.tensor(value)
        elif isinstance(value, Mapping):
            self.add(f"mapping of {len(value)}")
            for name, item in value.items():
                self.value(name)
                self.value(item)
        elif isinstance(value, (list, tuple)):
            self.add(f"{type(value).__name__} of {len(value)}")
            for item in value:
                self.value(item)
        elif isinstance(value, (str, bytes, int, float, bool, type(None))):
            self.add(f"{type(value).__name__} {value!r}")
        elif type(value).__module__ == "numpy" and not value.dtype.hasobject:
            self.add(f"numpy {value.dtype.str} {value.shape}")
            self.add(value.tobytes())
        else:
            raise Unidentified(type(value).__qualname__)

    def model(self, model: nn.Module) -> None:
        """Class, configuration, and every parameter and buffer by its name."""
        self.add(f"{type(model).__module__}.{type(model).__qualname__} {'training' if model.training else ''}")
        self.add(str(getattr(model, "config", "")))
        for kind in (model.named_parameters(), model.named_buffers()):
            for name, tensor in kind:
                self.add(name)
                self.tensor(tensor)

    def call(self, call: LayerCall) -> None:
        """One attention call, with its tensors."""
        self.value((call.layer, call.step, call.batch, call.causal, call.window, call.scale))
        self.value((call.query, call.key, call.value))


def of_settings(settings: Any) -> str:
    """A short checksum of plain settings: numbers, text, and sequences of them."""
    digest = Digest()
    digest.value(settings)
    return digest.hexdigest()[:16]
