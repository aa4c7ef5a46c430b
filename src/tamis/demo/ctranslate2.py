"""Reads the weights of a CTranslate2 model: one binary file of named tensors, version 6.

Little endian throughout. Text is a 16-bit length and that many bytes, the last one zero. The file holds
  32-bit version, text: name of the specification, 32-bit revision,
  32-bit count of variables, each: text: name, 8-bit rank, 32-bit sizes, 8-bit dtype, 32-bit length, the bytes;
  32-bit count of aliases, each: text: alias, text: name of a variable.
"""

from __future__ import annotations

import math
import struct

import torch
from torch import Tensor

_VERSION = 6
_DTYPES = (torch.float32, torch.int8, torch.int16, torch.int32, torch.float16, torch.bfloat16)


def read_variables(content: bytearray) -> dict[str, Tensor]:
    """The tensors of a model by name, aliases included.

    Raises:
        ValueError: the content is not of version 6, cut short, or followed by something else.
    """
    reader = _Reader(content)
    if (version := reader.number("I")) != _VERSION:
        raise ValueError(f"the CTranslate2 model has version {version}, expected {_VERSION}")
    reader.text()
    reader.number("I")
    variables = dict(reader.variable() for _ in range(reader.number("I")))
    for _ in range(reader.number("I")):
        alias, name = reader.text(), reader.text()
        if name not in variables:
            raise ValueError(f"{alias} stands for {name}, which the CTranslate2 model does not hold")
        variables[alias] = variables[name]
    if reader.offset != len(content):
        raise ValueError(f"the CTranslate2 model ends at byte {reader.offset} of {len(content)}")
    return variables


class _Reader:
    """Reads from the front of a buffer."""

    def __init__(self, content: bytearray) -> None:
        self._content = content
        self.offset = 0

    def _take(self, size: int) -> int:
        """Step over `size` bytes; where they start."""
        start = self.offset
        if start + size > len(self._content):
            raise ValueError(
                f"the CTranslate2 model is cut short: {start + size} bytes or more, got {len(self._content)}"
            )
        self.offset += size
        return start

    def number(self, kind: str) -> int:
        """An unsigned number: "B", "H" or "I" for 8, 16 or 32 bits."""
        start = self._take(struct.calcsize(f"<{kind}"))
        value: int = struct.unpack_from(f"<{kind}", self._content, start)[0]
        return value

    def text(self) -> str:
        """A text without the zero at its end."""
        start = self._take(self.number("H"))
        return self._content[start : self.offset].rstrip(b"\0").decode("utf-8")

    def variable(self) -> tuple[str, Tensor]:
        """One tensor with its name."""
        name = self.text()
        shape = [self.number("I") for _ in range(self.number("B"))]
        kind, size = self.number("B"), self.number("I")
        if kind >= len(_DTYPES) or math.prod(shape) * _DTYPES[kind].itemsize != size:
            raise ValueError(f"{name} of the CTranslate2 model has shape {shape}, dtype {kind} and {size} bytes")
        start = self._take(size)
        # A copy: torch takes no address that is not a multiple of the item size.
        data = self._content[start : start + size]
        return name, torch.frombuffer(data, dtype=_DTYPES[kind]).view(shape)
