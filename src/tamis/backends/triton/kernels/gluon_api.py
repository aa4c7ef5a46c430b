"""The few calls of Gluon that its versions name differently, found by looking rather than by version number."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

_KINDS = {
    torch.int8: language.int8,
    torch.float16: language.float16,
    torch.bfloat16: language.bfloat16,
    torch.float8_e4m3fn: language.float8e4nv,
}


def resolve(module: Any) -> dict[str, Any]:
    """The calls that the kernels make, from a module laid out like `gluon.language.nvidia.hopper` of any version.

    Raises:
        ImportError: one of them has no name known here.
    """
    names = {
        "load_tile": ("tma.async_load", "tma.async_copy_global_to_shared"),
        "mbarrier": ("mbarrier",),
        "warpgroup_mma": ("warpgroup_mma",),
        "warpgroup_mma_wait": ("warpgroup_mma_wait",),
        "fence_async_shared": ("fence_async_shared",),
    }
    return {name: _first(module, candidates) for name, candidates in names.items()}


def _first(module: Any, candidates: tuple[str, ...]) -> Any:
    for candidate in candidates:
        found = module
        for part in candidate.split("."):
            found = getattr(found, part, None)
        if found is not None:
            return found
    raise ImportError(
        f"this Triton's Gluon has none of {', '.join(candidates)}; tamis knows those of Triton 3.6 to 3.9"
    )


_found = resolve(hopper)
load_tile = _found["load_tile"]
mbarrier = _found["mbarrier"]
warpgroup_mma = _found["warpgroup_mma"]
warpgroup_mma_wait = _found["warpgroup_mma_wait"]
fence_async_shared = _found["fence_async_shared"]


def descriptor(x: Tensor, box: list[int]) -> Any:
    """How the copy engine finds boxes of x, of which every row starts at a multiple of 16 bytes."""
    layout = language.NVMMASharedLayout.get_default_for(box, _KINDS[x.dtype])
    strides = [stride if size > 1 else 16 for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], box, layout)
