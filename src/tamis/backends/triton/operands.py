"""What the kernels of attention multiply: query, key and value as they are, or rounded to 8 bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tamis.backends.triton import launch
from tamis.backends.triton.prepare import TILE, Rounded, columns, digest, fp8_values, int8_queries, room


@dataclass(frozen=True)
class Operands:
    """Query, key and value as the kernel multiplies them.

    Attributes:
        kind: what the tiles depend on, see settings.py.
        products: of weights and values: "input" in the values' own type, "bf16", "fp8" or "packed".
        even: whether rows of k are as long as the kernel's.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_scale: Tensor | None
    k_scale: Tensor | None
    v_scale: Tensor | None
    q_shift: Tensor | None
    kind: str
    products: str
    width: int
    even: bool

    @property
    def wide(self) -> bool:
        """Whether places inside a tile of keys or values need 64 bits."""
        return max(128 * abs(x.stride(2)) + 256 * abs(x.stride(3)) for x in (self.k, self.v)) >= 2**31


def operands(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    packed: list[Tensor],
    prepared: list[Tensor],
    precision: str,
    counted: Tensor | None,
    used: Callable[[], Tensor | None],
    shuffled: bool,
) -> Operands:
    """Round what has to be rounded; `used` tells which tiles of keys count for a mean or a scale.

    What is not in rows of one piece is copied: every tile of queries reads keys and values again, and its own pointer
    for each entry of a tile would take the registers.

    `shuffled`: keys of e4m3 values are in the order that hopper.py wants.
    """
    dim, width = query.shape[3], launch.power(query.shape[3], 16 if precision == "full" else 32)
    if key is None or value is None:
        packed = [t.contiguous() for t in packed]
        k, k_scale = packed[0].flatten(2, 3), packed[1]
        q, q_scale, q_shift = int8_queries(query, packed[6])
        even = packed[0].shape[4] == width
        return Operands(q, k, packed[3], q_scale, k_scale, packed[4], q_shift, "packed", "packed", width, even)
    if precision == "full":
        kind = "fp32" if query.dtype == torch.float32 else "half"
        q, k, v = (_in_rows(x) for x in (query, key, value))
        return Operands(q, k, v, None, None, None, None, kind, "input", width, width == dim)
    tiles_used = None if prepared and precision == "int8" else used()
    fp8 = precision == "fp8"
    mean, v_scale = None, None
    if fp8 or not prepared:
        mean, v_scale = columns(None if prepared else key, value if fp8 else None, counted, tiles_used)
    if not prepared:
        prepared = room(query, key, TILE, precision)
        digest(query, key, mean, None, counted, rounded=Rounded(*prepared))
    q, q_scale, q_shift, key8, k_scale = prepared
    v, products = _in_rows(value), "input" if query.dtype == torch.float16 else "bf16"
    if v_scale is not None:
        v = fp8_values(value, v_scale, counted, tiles_used, shuffled).transpose(2, 3)
        products = "fp8"
    return Operands(q, key8.flatten(2, 3), v, q_scale, k_scale, v_scale, q_shift, precision, products, width, True)


def _in_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
