"""Tensors of a kernel, on torch tensors, with Triton's rules for mixed types and integer division."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl

TORCH = {
    tl.int1: torch.bool,
    tl.int8: torch.int8,
    tl.uint8: torch.uint8,
    tl.int16: torch.int16,
    tl.int32: torch.int32,
    tl.int64: torch.int64,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
    tl.float8e4nv: torch.float8_e4m3fn,
}
TRITON = {torch_type: triton_type for triton_type, torch_type in TORCH.items()}
_BYTE = {torch.float8_e4m3fn: torch.uint8}  # torch neither indexes nor chooses in this type


class KernelError(AssertionError):
    """What the kernel does is wrong, or would be on some run."""


def raw(x: Tensor) -> Tensor:
    """The same bits in a type that torch can move about."""
    return x.view(_BYTE[x.dtype]) if x.dtype in _BYTE else x


def poison(dtype: torch.dtype) -> Any:
    """What stands in a place that nothing was written to, as `raw` holds it: NaN, or bytes of 0x80."""
    if dtype in _BYTE:
        return 0x7F
    if dtype.is_floating_point:
        return float("nan")
    return True if dtype == torch.bool else 0x80 if dtype == torch.uint8 else torch.iinfo(dtype).min


class Type:
    """What kernels ask of `x.type` and `descriptor.block_type`."""

    def __init__(self, element: Any, shape: Any, layout: Any) -> None:
        self.element_ty = self.scalar = element
        self.shape, self.layout = list(shape), layout

    def __repr__(self) -> str:
        return f"{self.element_ty} {self.shape}"

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * TORCH[self.element_ty].itemsize

    def is_block(self) -> bool:
        return bool(self.shape)


class Value:
    """A tensor, or of no dimension a scalar, in registers."""

    def __init__(self, data: Tensor, layout: Any = None) -> None:
        self.data = data
        self.layout = None if isinstance(layout, gl.AutoLayout) else layout

    @property
    def dtype(self) -> Any:
        return TRITON[self.data.dtype]

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    @property
    def numel(self) -> int:
        return self.data.numel()

    @property
    def type(self) -> Type:
        return Type(self.dtype, self.data.shape, self.layout)

    def viewed(self, data: Tensor, layout: Any) -> Value:
        return Value(data, layout)

    def to(self, dtype: Any, bitcast: bool = False, fp_downcast_rounding: Any = None) -> Value:
        assert fp_downcast_rounding is None
        goal = TORCH[dtype]
        if bitcast:
            return Value(self.data.view(goal), self.layout)
        if goal == torch.bool:
            return Value(self.data != 0, self.layout)
        return Value(self.data.to(goal), self.layout)

    cast = to

    def __repr__(self) -> str:
        return f"Value({self.data})"

    def __bool__(self) -> bool:
        if self.data.dim():
            raise KernelError("a condition must be a scalar")
        return bool(self.data)

    def __index__(self) -> int:
        if self.data.dim() or self.data.dtype.is_floating_point:
            raise KernelError("an index must be a whole scalar")
        return int(self.data)

    __int__ = __index__

    def __getitem__(self, index: Any) -> Value:
        return reindex(self, index)

    def item(self) -> Value:
        """The only entry, as a scalar."""
        if self.data.numel() != 1:
            raise KernelError("of more entries than one none is the item")
        return Value(self.data.reshape(()))

    def reshape(self, *shape: Any) -> Value:
        sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], (list, tuple)) else shape
        return Value(self.data.reshape([int(size) for size in sizes]))

    def permute(self, *order: Any) -> Value:
        axes = order[0] if len(order) == 1 and isinstance(order[0], (list, tuple)) else order
        return Value(self.data.permute(tuple(axes)))

    def __add__(self, other: Any) -> Any:
        return _binary(torch.add, self, other)

    def __radd__(self, other: Any) -> Any:
        return _binary(torch.add, other, self)

    def __sub__(self, other: Any) -> Any:
        return _binary(torch.sub, self, other)

    def __rsub__(self, other: Any) -> Any:
        return _binary(torch.sub, other, self)

    def __mul__(self, other: Any) -> Any:
        return _binary(torch.mul, self, other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        return _binary(torch.div, self, other, divides=True)

    def __rtruediv__(self, other: Any) -> Any:
        return _binary(torch.div, other, self, divides=True)

    def __floordiv__(self, other: Any) -> Any:
        return _binary(_whole_quotient, self, other, divides=True)

    def __rfloordiv__(self, other: Any) -> Any:
        return _binary(_whole_quotient, other, self, divides=True)

    def __mod__(self, other: Any) -> Any:
        return _binary(torch.fmod, self, other, divides=True)

    def __rmod__(self, other: Any) -> Any:
        return _binary(torch.fmod, other, self, divides=True)

    def __and__(self, other: Any) -> Any:
        return _binary(torch.bitwise_and, self, other)

    __rand__ = __and__

    def __or__(self, other: Any) -> Any:
        return _binary(torch.bitwise_or, self, other)

    __ror__ = __or__

    def __xor__(self, other: Any) -> Any:
        return _binary(torch.bitwise_xor, self, other)

    __rxor__ = __xor__

    def __lshift__(self, other: Any) -> Any:
        return _binary(torch.bitwise_left_shift, self, other)

    def __rlshift__(self, other: Any) -> Any:
        return _binary(torch.bitwise_left_shift, other, self)

    def __rshift__(self, other: Any) -> Any:
        return _binary(torch.bitwise_right_shift, self, other)

    def __eq__(self, other: object) -> Any:
        return _binary(torch.eq, self, other)

    def __ne__(self, other: object) -> Any:
        return _binary(torch.ne, self, other)

    def __lt__(self, other: Any) -> Any:
        return _binary(torch.lt, self, other)

    def __le__(self, other: Any) -> Any:
        return _binary(torch.le, self, other)

    def __gt__(self, other: Any) -> Any:
        return _binary(torch.gt, self, other)

    def __ge__(self, other: Any) -> Any:
        return _binary(torch.ge, self, other)

    __hash__ = None  # type: ignore[assignment]

    def __neg__(self) -> Value:
        return Value(-self.data, self.layout)

    def __invert__(self) -> Value:
        return Value(~self.data, self.layout)


def scalar(number: Any, dtype: Any = None) -> Value:
    """A number of the host as a kernel's argument: int32 or int64, fp32, or a truth."""
    if dtype is None:
        whole = tl.int32 if isinstance(number, int) and -(2**31) <= number < 2**31 else tl.int64
        dtype = tl.int1 if isinstance(number, bool) else whole if isinstance(number, int) else tl.float32
    return Value(torch.tensor(number, dtype=TORCH[dtype]))


def valued(x: Any) -> Value:
    return x if isinstance(x, Value) else scalar(x)


def _whole_quotient(a: Tensor, b: Tensor) -> Tensor:
    """Towards zero, as C divides."""
    if a.dtype.is_floating_point:
        raise KernelError("// is for integers")
    return torch.div(a, b, rounding_mode="trunc")


def _rank(dtype: torch.dtype) -> int:
    return 0 if dtype == torch.bool else 2 if dtype.is_floating_point else 1


def _common(a: Value, b: Value, divides: bool) -> torch.dtype:
    """`computation_type_impl` of triton/language/semantic.py for two tensors."""
    left, right = a.data.dtype, b.data.dtype
    if _rank(left) == _rank(right) == 2:
        both = {left, right}
        if torch.float64 in both or torch.float32 in both:
            return torch.float64 if torch.float64 in both else torch.float32
        if divides:
            return torch.float32
        return torch.float16 if torch.float16 in both else left if len(both) == 1 else torch.float32
    if _rank(left) != _rank(right):
        return left if _rank(left) > _rank(right) else right
    return left if left.itemsize >= right.itemsize else right


def paired(a: Any, b: Any, divides: bool = False) -> tuple[Tensor, Tensor]:
    """Both operands in the type that Triton computes in."""
    for one, other in ((a, b), (b, a)):
        if isinstance(one, numbers.Number) and isinstance(other, Value):
            least = 0 if isinstance(one, bool) else 1 if isinstance(one, int) else 2
            if least <= _rank(other.data.dtype):
                dtype = other.data.dtype
                if divides and dtype in (torch.float16, torch.bfloat16):
                    dtype = torch.float32
                if not dtype.is_floating_point and dtype != torch.bool:
                    limits = torch.iinfo(dtype)
                    if not limits.min <= int(one) <= limits.max:  # type: ignore[call-overload]
                        raise KernelError(f"{one} does not fit {dtype}")
                made = torch.tensor(one, dtype=dtype), other.data.to(dtype)
                return made if one is a else (made[1], made[0])
    left, right = valued(a), valued(b)
    dtype = _common(left, right, divides)
    return left.data.to(dtype), right.data.to(dtype)


def common_layout(*values: Any) -> Any:
    """The layout of the tensors among these, which must be one."""
    layout = None
    for value in values:
        own = value.layout if hasattr(value, "layout") and value.shape else None
        if layout is not None and own is not None and own != layout:
            raise KernelError(f"layouts differ: {layout} and {own}")
        layout = own if layout is None else layout
    return layout


def _binary(function: Any, a: Any, b: Any, divides: bool = False) -> Any:
    if not all(isinstance(x, (Value, numbers.Number)) for x in (a, b)):
        return NotImplemented
    layout = common_layout(a, b)
    left, right = paired(a, b, divides)
    if function is torch.div and not left.dtype.is_floating_point:
        left, right = left.float(), right.float()
    if left.dtype == torch.bool and function in (torch.add, torch.sub, torch.mul):
        raise KernelError("arithmetic on truths: cast them first")
    return Value(function(left, right), layout)


def reindex(x: Any, index: Any) -> Any:
    """`x[:, None]` and the like, of values and of pointers."""
    items = index if isinstance(index, tuple) else (index,)
    if any(item is not None and item != slice(None) for item in items):
        raise KernelError("a tensor can be indexed by : and None alone")
    layout = x.layout
    for axis, item in enumerate(items):
        if item is None and layout is not None:
            if not isinstance(layout, gl.SliceLayout) or layout.dim != axis:
                raise KernelError(f"a tensor of layout {layout} has no dimension {axis} to gain")
            layout = layout.parent
    return x.viewed(x.data[items], layout)
