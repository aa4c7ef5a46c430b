"""Triton's interpreter, mended and watched, so that a kernel's numbers can be believed on a machine without a GPU.

Mended, for Triton 3.6: products and casts of bf16 and e4m3 (wrong, or rounded otherwise than torch and the hardware
do), loop bounds under numpy 2.4 (an error), 8-bit products (exact, but by a loop instead of BLAS), and what it does
again and again to no effect. Watched: an access outside of the kernel's own tensors, which would read whatever lies
there, raises and names the kernel.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch

_TORCH = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e4b8": torch.float8_e4m3fnuz,
}
_spans: list[np.ndarray] = []
_patched: list[set[frozenset[str]]] = []


def install() -> None:
    """Mend and watch; `TRITON_INTERPRET=1` must have been set before Triton was imported."""
    import triton.language as tl
    from triton.runtime import interpreter

    from tamis.backends.triton import chips

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    handle, numpy_dtype = interpreter.TensorHandle, interpreter._get_np_dtype

    def cast(src: Any, to: Any) -> Any:
        source, goal = src.dtype.scalar, to.scalar
        numbers = _numbers(src.data, source.name)
        if goal.name in _TORCH:
            return handle(_bits(numbers.to(_TORCH[goal.name]), numpy_dtype(to)), goal)
        return handle(numbers.numpy().astype(numpy_dtype(to)), goal)

    def dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        if a.dtype.is_floating():
            product = (_numbers(a.data, a.dtype.name).float() @ _numbers(b.data, b.dtype.name).float()).numpy()
        else:
            # Sums of at most 256 products of int8 are exact in fp32.
            product = (a.data.astype(np.float32) @ b.data.astype(np.float32)).astype(np.int32)
        return handle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)

    def load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        _check(pointers, mask, "reads")
        return plain_load(self, pointers, mask, *rest)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        _check(pointers, mask, "writes")
        return plain_store(self, pointers, value, mask, *rest)

    def patch(tensor: Any, scope: Any) -> None:
        plain_patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def call(self: Any, *arguments: Any, **options: Any) -> None:
        tensors = [x for x in (*arguments, *options.values()) if isinstance(x, torch.Tensor)]
        spans = [(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in tensors]
        _spans.append(np.array(sorted({(start, start + size) for start, size in spans}), dtype=np.uint64))
        _patched.append(set())
        try:
            with np.errstate(all="ignore"), warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # of the maximum of nothing but NaN
                plain_call(self, *arguments, **options)
        finally:
            _spans.pop()
            _patched.pop()

    def patch_once(function: Any) -> Any:
        # Triton patches its language anew for every call of a device function, which takes a third of the time.
        seen = frozenset(name for name, value in function.__globals__.items() if value is tl or value is tl.core)
        if seen in _patched[-1]:
            return None
        _patched[-1].add(seen)
        return plain_patch_lang(function)

    def quick_dtype(kind: Any) -> Any:
        if isinstance(kind, tl.pointer_type) or kind.is_block():
            return numpy_dtype(kind)
        if kind.name not in sizes:
            sizes[kind.name] = numpy_dtype(kind)
        return sizes[kind.name]

    def block_init(self: Any, element: Any, shape: Any) -> None:
        # Every value has a type of its own, and the shape's checks and names are most of what making one takes.
        numbers = tuple(s.value if isinstance(s, tl.constexpr) else s for s in shape)
        self.element_ty, key = element, (numbers, element.name)
        if key not in blocks:
            plain_block(self, element, shape)
            blocks[key] = self.shape, self.numel, self.name
        self.shape, self.numel, self.name = blocks[key]

    def tensor_init(self: Any, handle: Any, kind: Any) -> None:
        self.handle, self.type, self.dtype = handle, kind, kind.scalar
        numbers = tuple(kind.shape) if kind.is_block() else ()
        if numbers not in shapes:
            shapes[numbers] = tl.core.tuple([tl.constexpr(n) for n in numbers]), tl.constexpr(math.prod(numbers))
        self.shape, self.numel = shapes[numbers]

    sizes: dict[str, Any] = {}
    blocks: dict[Any, Any] = {}
    shapes: dict[tuple[int, ...], Any] = {}
    plain_block = tl.core.block_type.__init__
    plain_load, plain_store = builder.create_masked_load, builder.create_masked_store
    plain_patch, plain_call = interpreter._patch_lang_tensor, executor.__call__
    plain_patch_lang = interpreter._patch_lang
    for name, made in {
        "cast_impl": lambda self, src, to: cast(src, to),
        "create_fp_to_fp": lambda self, src, to, rounding: cast(src, to),
        "create_dot": dot,
        "create_masked_load": load,
        "create_masked_store": store,
    }.items():
        setattr(builder, name, made)
    interpreter._patch_lang_tensor, executor.__call__ = patch, call
    interpreter._patch_lang, interpreter._get_np_dtype = patch_once, quick_dtype
    tl.core.block_type.__init__, tl.core.tensor.__init__ = block_init, tensor_init
    chips.interpreter_is_mended = True


def _numbers(data: np.ndarray, name: str) -> torch.Tensor:
    """What numpy's bits stand for. The name is not to be trusted: a comparison carries that of what it compared."""
    tensor = torch.from_numpy(np.ascontiguousarray(data))
    return tensor.view(_TORCH[name]) if name in _TORCH and data.dtype.kind == "u" else tensor


def _bits(tensor: torch.Tensor, dtype: np.dtype) -> np.ndarray:
    return tensor.view(getattr(torch, dtype.name)).numpy() if dtype.kind == "u" else tensor.numpy()


def _check(pointers: Any, mask: Any, verb: str) -> None:
    """Raise IndexError unless every pointer that is not masked lies in a tensor the kernel was given."""
    used = pointers.data[np.broadcast_to(mask.data.astype(bool), pointers.data.shape)]
    if used.size == 0:
        return
    spans = _spans[-1]
    size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    owner = np.searchsorted(spans[:, 0], used, side="right").astype(np.int64) - 1
    outside = (owner < 0) | (used + np.uint64(size) > spans[np.maximum(owner, 0), 1])
    if outside.any():
        raise IndexError(f"the kernel {verb} outside of its tensors, at {int(used[outside][0]):#x}")
