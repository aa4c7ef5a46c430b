"""The structures of csrc/attend.h, and how tensors become their fields."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

ABI_VERSION = 5
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_MASK_DTYPES = {**DTYPES, torch.bool: 3}
_NO_MEMORY, _CORRUPT_MASK = 1, 2


class TensorArg(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("stride", c_int64 * 4), ("dtype", c_int32)]


class Geometry(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in ("q_len", "kv_len", "block_q", "block_kv")),
        ("causal", c_int32),
        ("window", c_int64),
        *((name, c_void_p) for name in ("q_pos", "kv_pos", "q_seg", "kv_seg")),
        *((name, c_int64) for name in ("q_batch_stride", "kv_batch_stride")),
        *((name, c_void_p) for name in ("q_bounds", "kv_bounds")),
        *((name, c_int64) for name in ("q_bounds_stride", "kv_bounds_stride")),
        ("visible", c_void_p),
        ("visible_stride", c_int64 * 4),
    ]


class Packed(ctypes.Structure):
    _fields_ = [
        ("capacity", c_int64),
        ("dim4", c_int64),
        ("mixed", c_int64),
        *(
            (name, c_void_p)
            for name in ("key", "key_scale", "key_sum", "value", "value_scale", "value_sum", "key_mean")
        ),
    ]


class Attend(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in ("batch", "heads", "kv_heads", "head_dim", "value_dim")),
        *((name, TensorArg) for name in ("query", "key", "value")),
        ("packed", Packed),
        ("pack_segments", c_void_p),
        ("pack_segment_stride", c_int64),
        ("geometry", Geometry),
        ("kv_num_blocks", c_void_p),
        ("kv_indices", c_void_p),
        ("num_stride", c_int64 * 3),
        ("idx_stride", c_int64 * 3),
        ("max_blocks", c_int64),
        ("scale", c_float),
        ("softcap", c_float),
        ("attn_mask", TensorArg),
        ("sink_logits", c_void_p),
        ("pv_threshold", c_void_p),
        ("int8", c_int32),
        ("bf16_products", c_int32),
        ("output", c_void_p),
        ("lse", c_void_p),
        ("counts", c_void_p),
        ("threads", c_int32),
    ]


class Summarize(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in ("batch", "heads", "seq", "dim", "block")),
        ("x", TensorArg),
        ("mean", c_void_p),
        ("segments", c_void_p),
        ("segment_stride", c_int64),
        ("used", c_void_p),
        ("means", c_void_p),
        ("similarity", c_void_p),
        ("threads", c_int32),
    ]


class Pack(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in ("batch", "kv_heads", "seq", "head_dim", "value_dim", "first_block")),
        ("key", TensorArg),
        ("value", TensorArg),
        ("segments", c_void_p),
        ("segment_stride", c_int64),
        ("used", c_void_p),
        ("packed", Packed),
        ("threads", c_int32),
    ]


class Select(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in ("batch", "heads", "kv_heads", "head_dim")),
        *((name, c_void_p) for name in ("q_means", "q_similarity", "k_means", "k_similarity")),
        ("scale", c_float),
        *((name, c_void_p) for name in ("cdf", "topk", "similarity")),
        ("sink", c_int32),
        ("geometry", Geometry),
        ("must", c_void_p),
        ("must_stride", c_int64 * 4),
        ("bits", c_void_p),
        ("kv_num_blocks", c_void_p),
        ("threads", c_int32),
    ]


class Predict(ctypes.Structure):
    _fields_ = [
        *((name, Summarize) for name in ("key_mean", "query", "key")),
        ("select", Select),
        ("max_blocks", c_int64),
        ("threads", c_int32),
    ]


_FUNCTIONS = {
    "predict": Predict,
    "attend": Attend,
    "key_mean": Summarize,
    "summarize": Summarize,
    "pack_kv": Pack,
    "select": Select,
}


def load(path: Path) -> ctypes.CDLL | str:
    """The library with its signatures declared, or why it cannot be used."""
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as error:
        return f"the native library does not load: {error}"
    lib.tamis_abi_version.restype = c_int32
    if lib.tamis_abi_version() != ABI_VERSION:
        return (
            f"the native library has ABI {lib.tamis_abi_version()}, this package wants {ABI_VERSION}: reinstall tamis"
        )
    for name, structure in _FUNCTIONS.items():
        function = getattr(lib, f"tamis_{name}")
        function.argtypes, function.restype = [ctypes.c_char_p, ctypes.POINTER(structure)], c_int32
    for name in ("tamis_targets", "tamis_built_targets"):
        getattr(lib, name).restype = ctypes.c_char_p
    lib.tamis_expand.argtypes = [c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int32]
    return lib


def check(status: int) -> None:
    """Raise what a status of the library means.

    Raises:
        ValueError: the block mask is corrupt.
        MemoryError: a scratch buffer could not be allocated.
    """
    if status == _CORRUPT_MASK:
        raise ValueError(
            "block_mask is corrupt: kv_indices must ascend strictly within the key blocks, and kv_num_blocks must not "
            "exceed their last axis; block_mask.validate() names the place"
        )
    if status == _NO_MEMORY:
        raise MemoryError("tamis could not allocate its scratch buffers")
    if status:
        raise RuntimeError(f"the native library returned status {status}")


def tensor(t: Tensor) -> TensorArg:
    """Pointer, strides in elements and dtype of a 4-D tensor."""
    arg = TensorArg()
    arg.data, arg.dtype = t.data_ptr(), _MASK_DTYPES[t.dtype]
    arg.stride[:] = t.stride()
    return arg


def pointer(t: Tensor | None) -> int | None:
    """Address of a dense tensor's first element; the caller keeps the tensor alive."""
    return None if t is None else t.data_ptr()


def batch_stride(t: Tensor | None) -> int:
    """Stride of the leading axis, 0 where the batch shares one."""
    return 0 if t is None or t.shape[0] == 1 else t.stride(0)


def broadcast_strides(t: Tensor) -> list[int]:
    """Strides of a 4-D table, 0 along axes of size 1."""
    return [0 if size == 1 else stride for size, stride in zip(t.shape, t.stride(), strict=True)]


def fill_geometry(
    to: Geometry,
    lengths: tuple[int, int],
    block_size: tuple[int, int],
    causal: bool,
    window: int | None,
    places: tuple[Tensor | None, ...],
    q_bounds: Tensor | None,
    kv_bounds: Tensor | None,
    visible: Tensor | None,
) -> list[Tensor | None]:
    """Fill the structure; returns the tensors it points to, for the caller to keep alive."""
    to.q_len, to.kv_len = lengths
    to.block_q, to.block_kv = block_size
    to.causal, to.window = causal, window or 0
    if visible is not None:
        to.visible = visible.data_ptr()
        to.visible_stride[:] = broadcast_strides(visible)
    given = (*places, q_bounds, kv_bounds)
    if all(t is None for t in given):
        return [visible]
    dense = [None if t is None else t.to(torch.int64).contiguous() for t in given]
    # Positions and segments of a side share one batch stride: where one has a batch, so does the other.
    for pair in ((0, 2), (1, 3)):
        batch = max((t.shape[0] for t in (dense[i] for i in pair) if t is not None), default=1)
        for i in pair:
            t = dense[i]
            dense[i] = None if t is None else t.expand(batch, -1).contiguous()
    to.q_batch_stride = lengths[0] if any(t is not None and t.shape[0] > 1 for t in dense[0:3:2]) else 0
    to.kv_batch_stride = lengths[1] if any(t is not None and t.shape[0] > 1 for t in dense[1:4:2]) else 0
    to.q_pos, to.kv_pos, to.q_seg, to.kv_seg, to.q_bounds, to.kv_bounds = (pointer(t) for t in dense)
    to.q_bounds_stride, to.kv_bounds_stride = batch_stride(dense[4]), batch_stride(dense[5])
    return [*dense, visible]
