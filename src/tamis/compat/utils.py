"""The one helper of the authors' `utils` that LightX2V names when it is imported."""

from __future__ import annotations

import torch
from torch import Tensor

from tamis import geometry

__all__ = ["get_vanilla_qk_quant"]


def get_vanilla_qk_quant(
    q: Tensor, k: Tensor, km: Tensor | None = None, BLKQ: int = 128, BLKK: int = 64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Round q, and k less km, to int8 with one scale per block of rows.

    Args:
        q, k: `[batch, heads, seq, head_dim]`. km: `[batch, heads, 1, head_dim]`, subtracted from k before.
        BLKQ, BLKK: rows of a block of q and of k.

    Returns:
        (q_int8, q_scale, k_int8, k_scale): int8 of the inputs' shapes, and fp32 `[batch, heads, blocks]`, the largest
        size in a block / 127.

    Raises:
        ValueError: a block has no rows, or km is not one mean for every head of k.

    Source: SageAttention (arXiv 2410.02367), section 4.3.

    Example:
        >>> import torch
        >>> from tamis.compat.utils import get_vanilla_qk_quant
        >>> q_int8, q_scale, _, _ = get_vanilla_qk_quant(torch.full((1, 1, 200, 64), 2.54), torch.ones(1, 1, 200, 64))
        >>> q_int8.unique().item(), q_scale.shape
        (127, torch.Size([1, 1, 2]))
    """
    for name, rows in (("BLKQ", BLKQ), ("BLKK", BLKK)):
        if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
            raise ValueError(f"{name} must be a number of rows above 0, got {rows!r}")
    if km is not None and km.shape != (*k.shape[:-2], 1, k.shape[-1]):
        raise ValueError(f"km must be {[*k.shape[:-2], 1, k.shape[-1]]} for k of {list(k.shape)}, got {list(km.shape)}")
    return (*_rounded(q.float(), BLKQ), *_rounded(k.float() if km is None else k.float() - km.float(), BLKK))


def _rounded(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    rows = x.abs().amax(-1)
    blocks = geometry.num_blocks(rows.shape[-1], block)
    padded = torch.nn.functional.pad(rows, (0, blocks * block - rows.shape[-1]))
    scale = padded.unflatten(-1, (blocks, block)).amax(-1) / 127  # type: ignore[no-untyped-call]
    per_row = scale.repeat_interleave(block, -1)[..., : rows.shape[-1], None]
    # A block of zeros has scale 0 and stays 0.
    return (x / per_row.clamp(min=torch.finfo(torch.float32).tiny)).round().to(torch.int8), scale
