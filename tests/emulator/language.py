"""The functions of Triton's and Gluon's language, on `Value`s, by the names that kernels call them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._layouts import DistributedLayout

from emulator import hopper, shared
from emulator.machine import current
from emulator.pointers import Pointer
from emulator.values import TORCH, KernelError, Value, common_layout, paired, scalar, valued


def _laid_out(layout: Any) -> Any:
    if layout is not None and not isinstance(layout, DistributedLayout):
        raise KernelError(f"{layout} is no layout of registers")
    return layout


def _sizes(shape: Any) -> list[int]:
    sizes = [int(size) for size in shape]
    if any(size & (size - 1) for size in sizes):
        raise KernelError(f"sizes must be powers of two, not {sizes}")
    return sizes


def arange(start: int, end: int, layout: Any = None) -> Value:
    _sizes([end - start])
    return Value(torch.arange(start, end, dtype=torch.int32), _laid_out(layout))


def full(shape: Any, value: Any, dtype: Any, layout: Any = None) -> Value:
    data = valued(value).data.to(TORCH[dtype])
    return Value(data.expand(_sizes(shape)).clone(), _laid_out(layout))


def zeros(shape: Any, dtype: Any, layout: Any = None) -> Value:
    return full(shape, 0, dtype, layout)


def zeros_like(x: Value) -> Value:
    return full(x.shape, 0, x.dtype, x.layout)


def convert_layout(value: Value, layout: Any, assert_trivial: bool = False) -> Value:
    return Value(value.data, _laid_out(layout))


def load(pointer: Pointer, mask: Any = None, other: Any = None, **hints: Any) -> Value:
    return pointer.load(mask, other)


def store(pointer: Pointer, value: Any, mask: Any = None, **hints: Any) -> None:
    pointer.store(value, mask, current().writer)


def to_tensor(x: Any) -> Any:
    return x if isinstance(x, (Value, Pointer)) else valued(x)


def where(condition: Any, x: Any, y: Any) -> Value:
    layout = common_layout(condition, x, y)
    left, right = paired(x, y)
    return Value(torch.where(valued(condition).data.bool(), left, right), layout)


def _joined(x: Any, y: Any, function: Callable[..., Tensor]) -> Value:
    layout = common_layout(x, y)
    return Value(function(*paired(x, y)), layout)


def maximum(x: Any, y: Any) -> Value:
    """NaN gives way to a number, as on the device."""
    return _joined(x, y, torch.fmax)


def minimum(x: Any, y: Any) -> Value:
    return _joined(x, y, torch.fmin)


def _unary(function: Callable[[Tensor], Tensor]) -> Callable[[Any], Value]:
    def run(x: Any) -> Value:
        value = valued(x)
        return Value(function(value.data), value.layout)

    return run


def fma(x: Any, y: Any, z: Any) -> Value:
    """Rounded once."""
    layout = common_layout(x, y, z)
    parts = [valued(part).data for part in (x, y, z)]
    a, b, c = (part.double() for part in parts)
    return Value((a * b + c).to(parts[0].dtype), layout)


def cdiv(x: Any, div: Any) -> Any:
    return (x + div - 1) // div


def _narrowed(layout: Any, axis: int) -> Any:
    return None if layout is None else gl.SliceLayout(axis, layout)


def _widened(data: Tensor) -> Tensor:
    """Sums and maxima are taken in 32 bits at least."""
    if data.dtype.is_floating_point:
        return data.float() if data.dtype.itemsize < 4 else data
    return data.to(torch.int32) if data.dtype.itemsize < 4 else data


def _extreme(input: Value, axis: int | None, keep_dims: bool, sign: int) -> Value:
    data = _widened(input.data) * sign
    dims = tuple(range(data.dim())) if axis is None else (axis,)
    if data.dtype.is_floating_point:
        numbers = torch.where(data.isnan(), -torch.inf, data)
        result = torch.where(
            data.isnan().all(dims[0]) if len(dims) == 1 else data.isnan().all(), torch.nan, numbers.amax(dims)
        )
    else:
        result = data.amax(dims)
    if keep_dims:
        return Value(result.unsqueeze(dims[0]) * sign, input.layout)
    return Value(result * sign, None if axis is None else _narrowed(input.layout, axis))


def greatest(input: Value, axis: int | None = None, keep_dims: bool = False) -> Value:
    """`max`: of nothing but NaN it is NaN, else that of the numbers."""
    return _extreme(input, axis, keep_dims, 1)


def least(input: Value, axis: int | None = None, keep_dims: bool = False) -> Value:
    return _extreme(input, axis, keep_dims, -1)


def total(input: Value, axis: int | None = None, keep_dims: bool = False, dtype: Any = None) -> Value:
    """`sum`; integers of fewer than 32 bits in 32."""
    data = input.data if input.data.dtype.is_floating_point else _widened(input.data)
    data = data if dtype is None else data.to(TORCH[dtype])
    if axis is None:
        return Value(data.sum(dtype=data.dtype))
    result = data.sum(axis, keepdim=keep_dims, dtype=data.dtype)
    return Value(result, input.layout if keep_dims else _narrowed(input.layout, axis))


def cumsum(input: Value, axis: int = 0) -> Value:
    data = _widened(input.data)
    return Value(data.cumsum(axis, dtype=data.dtype), input.layout)


def expand_dims(input: Any, axis: int) -> Any:
    index: list[Any] = [slice(None)] * len(input.shape)
    index.insert(axis, None)
    return input[tuple(index)]


def reshape(input: Value, *shape: Any) -> Value:
    return input.reshape(*shape)


def permute(input: Value, *order: Any) -> Value:
    return input.permute(*order)


def broadcast_to(input: Value, *shape: Any) -> Value:
    sizes = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
    return Value(input.data.expand(_sizes(sizes)), input.layout)


def trans(input: Value) -> Value:
    return Value(input.data.transpose(-1, -2))


def dot(input: Value, other: Value, acc: Any = None, input_precision: Any = None, **options: Any) -> Value:
    """Triton's product; exact for int8 of up to 256 terms, else in fp32."""
    product = input.data.float() @ other.data.float()
    product = product if input.data.dtype.is_floating_point else product.to(torch.int32)
    return Value(product if acc is None else product + acc.data)


def program_id(axis: int) -> Value:
    return scalar(current().program if int(axis) == 0 else 0)


def num_programs(axis: int) -> Value:
    return scalar(current().programs if int(axis) == 0 else 1)


def multiple_of(input: Any, values: Any) -> Any:
    """A promise to the compiler, which had better be kept."""
    of = [values] if isinstance(values, int) else [int(value) for value in values]
    data = input.data if isinstance(input, (Value, Pointer)) else torch.tensor(input)
    if data.dim() == 0 and int(data) % of[0]:
        raise KernelError(f"{int(data)} is no multiple of {of[0]}")
    return input


def static_assert(condition: Any, message: str = "") -> None:
    if not condition:
        raise KernelError(f"static_assert: {message}")


def device_assert(condition: Any, message: str = "", mask: Any = None) -> None:
    if not valued(condition).data.all():
        raise KernelError(f"device_assert: {message}")


def warp_specialize(functions_and_args: Any, worker_num_warps: Any, worker_num_regs: Any) -> Any:
    """The first runs in the warps that call, each other in warps of its own."""
    warps, registers = [int(n) for n in worker_num_warps], [int(n) for n in worker_num_regs]
    if not len(functions_and_args) - 1 == len(warps) == len(registers):
        raise KernelError(f"{len(functions_and_args) - 1} workers, {len(warps)} warps and {len(registers)} registers")
    if any(n % 8 or not 24 <= n <= 256 for n in registers) or any(n not in (1, 2, 4, 8) for n in warps):
        raise KernelError(f"workers of {warps} warps and {registers} registers can't be")
    return current().specialize([(function, tuple(given)) for function, given in functions_and_args])


def span(*bounds: Any, disable_licm: bool = False) -> Iterator[Value]:
    """`range`, whose turns are numbers of the device; what the compiler is to leave alone is no matter here."""
    dtype = tl.int64 if any(isinstance(x, Value) and x.data.dtype == torch.int64 for x in bounds) else tl.int32
    return (scalar(at, dtype) for at in range(*(int(x) for x in bounds)))


def static_range(*bounds: Any) -> range:
    if any(isinstance(x, Value) for x in bounds):
        raise KernelError("static_range needs constants")
    return range(*bounds)


def _same(x: Any, *rest: Any, **hints: Any) -> Any:
    return x


def _nothing(*rest: Any, **hints: Any) -> None:
    return None


_MATHS = {
    "abs": torch.abs,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "log": torch.log,
    "log2": torch.log2,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "floor": torch.floor,
    "ceil": torch.ceil,
    "sin": torch.sin,
    "cos": torch.cos,
    "erf": torch.erf,
}

# By the last part of the name of the module that has them, or "" for the language itself.
FUNCTIONS: dict[str, dict[str, Any]] = {
    "": {
        **{name: _unary(function) for name, function in _MATHS.items()},
        **dict.fromkeys(("max_contiguous", "max_constancy"), _same),
        **dict.fromkeys(("assume", "thread_barrier", "debug_barrier", "static_print", "device_print"), _nothing),
        "max": greatest,
        "min": least,
        "sum": total,
        "allocate_shared_memory": shared.allocate,
        "fence_async_shared": shared.fence,
        "warpgroup_mma": hopper.warpgroup_mma,
        "warpgroup_mma_wait": hopper.warpgroup_mma_wait,
        "warpgroup_mma_init": hopper.warpgroup_mma_init,
        "cast": lambda x, dtype, bitcast=False: valued(x).to(dtype, bitcast),
        "add": lambda x, y: x + y,
        "sub": lambda x, y: x - y,
        "mul": lambda x, y: x * y,
        "fdiv": lambda x, y: x / y,
        "num_ctas": lambda: 1,
        **{
            function.__name__: function
            for function in (
                *(arange, full, zeros, zeros_like, convert_layout, load, store, to_tensor, where, maximum, minimum),
                *(fma, cdiv, cumsum, expand_dims, reshape, broadcast_to, dot, program_id, num_programs),
                *(static_assert, device_assert, warp_specialize, static_range, trans, permute, multiple_of),
            )
        },
    },
    "mbarrier": {
        "init": hopper.init,
        "invalidate": hopper.invalidate,
        "expect": hopper.expect,
        "arrive": hopper.arrive,
        "wait": hopper.wait,
    },
    "tma": {
        "async_copy_global_to_shared": hopper.load,
        "async_load": hopper.load,
        "async_copy_shared_to_global": hopper.store,
        "async_store": hopper.store,
        "store_wait": hopper.store_wait,
    },
}
