"""What the kernels of attention multiply: query, key and value as they are, or rounded to 8 bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tamis.backends.triton import launch
from tamis.backends.triton.arguments import by_16_bytes, in_rows, widened
from tamis.backends.triton.prepare import TILE, Rounded, columns, digest, fp8_values, int8_queries, room
from tamis.mixing import mix


@dataclass(frozen=True)
class Operands:
    """Query, key and value as the kernel multiplies them.

    Attributes:
        kind: what the tiles depend on, see settings.py.
        products: of weights and values: "input" in the values' own type, "bf16", "fp8" or "packed".
        k_even, v_even: whether rows of k and v are as long as the kernel's.
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
    k_even: bool
    v_even: bool

    @property
    def wide(self) -> bool:
        """Whether places inside a tile of keys or values need 64 bits."""
        return max(128 * abs(x.stride(2)) + 256 * abs(x.stride(3)) for x in (self.k, self.v)) >= 2**31

    @property
    def scattered(self) -> bool:
        """Whether keys are loaded entry by entry: those of a `PackedKV`, which is not copied, may be."""
        return self.kind == "packed" and self.k.shape[3] % 16 != 0


def operands(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    packed: list[Tensor],
    prepared: list[Tensor],
    precision: str,
    counted: Tensor | None,
    used: Callable[[], Tensor | None],
    gluon: bool,
) -> Operands:
    """Round what has to be rounded; `used` tells which tiles of keys count for a mean or a scale.

    Every tile of queries reads keys and values again, so what loads of 16 bytes cannot take is copied first: a pointer
    for each entry of a tile would take the registers.

    `gluon`: as hopper.py wants them, which copies for itself, and has its own order of keys for e4m3 values.
    """
    width = launch.power(query.shape[3], 16 if precision == "full" else 32)
    if key is None or value is None:
        packed = [t.contiguous() for t in packed]
        k, k_scale = packed[0].flatten(2, 3), packed[1]
        taken_off, mixed = packed[6], int(packed[7][1])
        if mixed > 1:  # it was packed by another backend
            query, taken_off = mix(query.to(torch.float32), mixed), mix(taken_off, mixed)
        q, q_scale, q_shift = int8_queries(query, taken_off)
        even = packed[0].shape[4] == width
        return Operands(q, k, packed[3], q_scale, k_scale, packed[4], q_shift, "packed", "packed", width, even, False)
    value_width = launch.power(value.shape[3])
    if precision == "full":
        kind = "fp32" if query.dtype == torch.float32 else "half"
        q, k, v = in_rows(query), _loadable(key, width, gluon), _loadable(value, value_width, gluon)
        k_even, v_even = k.shape[3] == width, v.shape[3] == value_width
        return Operands(q, k, v, None, None, None, None, kind, "input", width, k_even, v_even)
    tiles_used = None if prepared and precision == "int8" else used()
    fp8 = precision == "fp8"
    mean, v_scale = None, None
    if fp8 or not prepared:
        mean, v_scale = columns(None if prepared else key, value if fp8 else None, counted, tiles_used)
    if not prepared:
        prepared = room(query, key, TILE, precision)
        digest(query, key, mean, None, counted, rounded=Rounded(*prepared))
    q, q_scale, q_shift, key8, k_scale = prepared
    if v_scale is not None:
        v, products = fp8_values(value, v_scale, counted, tiles_used, gluon).transpose(2, 3), "fp8"
    else:
        products = "input" if query.dtype == torch.float16 else "bf16"
        v = _loadable(value if products == "input" else value.to(torch.bfloat16), value_width, gluon)
    k, v_even = key8.flatten(2, 3), v.shape[3] == value_width
    return Operands(q, k, v, q_scale, k_scale, v_scale, q_shift, precision, products, width, True, v_even)


def _loadable(x: Tensor, width: int, gluon: bool) -> Tensor:
    """x, or a copy in rows of `width` if it can't be loaded by 16 bytes."""
    if gluon:
        return in_rows(x)
    return x if by_16_bytes(x) else widened(x, width)
