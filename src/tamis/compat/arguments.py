"""What the authors' arguments mean here: layouts, settings per head, units of thresholds, and their block masks."""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

from tamis import geometry
from tamis.backends.base import BACKENDS
from tamis.block_mask import BlockMask
from tamis.errors import UnsupportedError
from tamis.predictors import Sparge

LAYOUTS = ("HND", "NHD")
MASK_BLOCKS = ((128, 64), (64, 128))  # (query, key): the authors' kernels, and those for sm_90
BACKEND = "TAMIS_COMPAT_BACKEND"
LN2 = math.log(2.0)
_NOTHING = 1e-9  # as cdf or topk: of every row only the largest block

Number = float | Tensor


def to_heads_first(tensor_layout: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Bring `[.., seq, heads, dim]` (NHD) to `[.., heads, seq, dim]` (HND), without a copy."""
    if tensor_layout not in LAYOUTS:
        raise ValueError(f"tensor_layout must be 'HND' or 'NHD', got {tensor_layout!r}")
    for name, tensor in zip("qkv", tensors, strict=False):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dim() < 3:
            raise ValueError(f"{name} must have heads, a sequence and a head dim, got shape {tuple(tensor.shape)}")
    return tensors if tensor_layout == "HND" else tuple(tensor.transpose(-2, -3) for tensor in tensors)


def flag(value: bool, name: str) -> bool:
    """A bool, or 0 or 1: anything else, a string perhaps, stands in another argument's place."""
    if not isinstance(value, (bool, int)) or value not in (0, 1):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def asked_backend() -> str | None:
    """What the environment says every call must run on, or raise; None lets tamis choose, as far as plain torch.

    Raises:
        ValueError: it names no backend.
    """
    asked = os.environ.get(BACKEND, "")
    if asked not in ("", *BACKENDS):
        raise ValueError(f"{BACKEND} must be one of {', '.join(BACKENDS)} or empty, got {asked!r}")
    return asked or None


def check_smooth_k(smooth_k: bool) -> None:
    """Refuse what int8 has not: keys are always rounded less their mean, which leaves the softmax as it is."""
    if not flag(smooth_k, "smooth_k"):
        raise UnsupportedError("smooth_k must be True: tamis always subtracts the mean key before rounding")


def settings(setting: Number, name: str, num_heads: int) -> float | list[float]:
    """A number, or a tensor of one or of one per head, as finite plain numbers."""
    if isinstance(setting, bool) or not isinstance(setting, (int, float, Tensor)):
        raise TypeError(f"{name} must be a number or a tensor with one per head, got {type(setting).__name__}")
    if isinstance(setting, Tensor) and setting.dim() == 1:
        found = setting.double().tolist()
        if len(found) != num_heads:
            raise ValueError(f"{name} must be one number or one per head ({num_heads}), got {len(found)}")
    elif isinstance(setting, Tensor) and setting.dim() > 1:
        raise ValueError(f"{name} must be one number or one per head ({num_heads}), got {tuple(setting.shape)}")
    else:
        found = [float(setting)]
    if not all(map(math.isfinite, found)):
        raise ValueError(f"{name} must be finite, got {found}")
    return found if isinstance(setting, Tensor) and setting.dim() == 1 else found[0]


def natural_threshold(pvthreshd: Number, num_heads: int) -> float | list[float]:
    """pvthreshd, in units of log2, as a `pv_threshold` in units of the natural logarithm."""
    found = settings(pvthreshd, "pvthreshd", num_heads)
    several = found if isinstance(found, list) else [found]
    if min(several, default=1.0) <= 0:
        raise ValueError(f"pvthreshd must be above 0: 0 would skip everything, got {found}")
    return [value * LN2 for value in found] if isinstance(found, list) else found * LN2


def predictor_of(
    simthreshd1: Number, cdfthreshd: Number | None, topk: Number | None, attention_sink: bool, num_heads: int
) -> Sparge:
    """The predictor with the authors' settings.

    simthreshd1 of 1 or more and cdfthreshd of 1 or more mean what they do there: the head keeps all blocks.
    """
    if (cdfthreshd is None) == (topk is None):
        raise ValueError(f"give one of cdfthreshd and topk, and None for the other: got {cdfthreshd} and {topk}")
    similarity = settings(simthreshd1, "simthreshd1", num_heads)
    name, setting = ("cdfthreshd", cdfthreshd) if topk is None else ("topk", topk)
    assert setting is not None
    kept = settings(setting, name, num_heads)
    for value in kept if isinstance(kept, list) else [kept]:
        if value <= 0 or (name == "topk" and value > 1):
            raise ValueError(f"{name} must be above 0{' and at most 1' if name == 'topk' else ''}, got {value}")
    if not isinstance(similarity, list) and not isinstance(kept, list):
        dense = similarity >= 1 or kept >= 1
        if dense:
            return Sparge(topk=1.0, similarity=-1.0, sink=attention_sink)
        cdf, share = (kept, None) if topk is None else (None, kept)
        return Sparge(cdf=cdf, topk=share, similarity=max(similarity, -1.0), sink=attention_sink)
    similarities = similarity if isinstance(similarity, list) else [similarity] * num_heads
    keeps = kept if isinstance(kept, list) else [kept] * num_heads
    dense_heads = [theta >= 1 or keep >= 1 for theta, keep in zip(similarities, keeps, strict=True)]
    sparse = [_NOTHING if dense else keep for dense, keep in zip(dense_heads, keeps, strict=True)]
    whole = [1.0 if dense else _NOTHING for dense in dense_heads]
    return Sparge(
        cdf=sparse if topk is None else None,
        topk=whole if topk is None else [max(pair) for pair in zip(sparse, whole, strict=True)],
        similarity=[
            -1.0 if dense else max(theta, -1.0) for dense, theta in zip(dense_heads, similarities, strict=True)
        ],
        sink=attention_sink,
    )


def block_mask_of(mask_id: Tensor, lengths: tuple[int, int], attention_sink: bool) -> BlockMask:
    """The authors' mask of blocks, `[batch, heads, q_blocks, kv_blocks]` of 0 and 1; its shape tells which blocks."""
    if not isinstance(mask_id, Tensor):
        raise TypeError(f"mask_id must be a tensor, got {type(mask_id).__name__}")
    grids: dict[tuple[int, ...], tuple[int, int]] = {}
    for sizes in MASK_BLOCKS:  # where both make the same grid, there is one block
        grids.setdefault(tuple(map(geometry.num_blocks, lengths, sizes)), sizes)
    if mask_id.dim() != 4 or tuple(mask_id.shape[2:]) not in grids:
        expected = " or ".join(f"{list(grid)} (blocks of {sizes[0]} x {sizes[1]})" for grid, sizes in grids.items())
        raise ValueError(
            f"mask_id must be [batch, heads, q_blocks, kv_blocks] with blocks {expected} for {lengths[0]} queries and "
            f"{lengths[1]} keys, got {list(mask_id.shape)}"
        )
    kept = mask_id != 0
    if attention_sink:
        kept = kept.clone()
        kept[..., :1] = True
    return BlockMask.from_dense(kept, grids[tuple(mask_id.shape[2:])], lengths)


def output_type(output_dtype: torch.dtype | None, query: Tensor) -> torch.dtype:
    """The dtype of the output: the query's, unless another floating one is asked for."""
    if output_dtype is None:
        return query.dtype
    if not isinstance(output_dtype, torch.dtype) or not output_dtype.is_floating_point:
        raise TypeError(f"output_dtype must be a floating torch.dtype, got {output_dtype!r}")
    return output_dtype
