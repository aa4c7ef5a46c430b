"""The authors' functions: their names and argument lists, tamis underneath.

What differs from theirs, on purpose:
- causal holds for every token, and is aligned at the ends of both sequences: the last query sees the last key;
- attn_mask, dropout_p, output_dtype and smooth_k are honoured or refused, where theirs are ignored (or crash);
- topk is a share of the blocks that a row sees; scale counts in the prediction too; rows without a block return 0;
- sparsity counts both products and only what is visible: see `return_sparsity`;
- any head dim, length and number of key heads, fp32 stays fp32, on a CPU as well.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from tamis.attend import attend, predict_and_attend
from tamis.compat.arguments import (
    Number,
    asked_backend,
    block_mask_of,
    check_smooth_k,
    flag,
    natural_threshold,
    output_type,
    predictor_of,
    to_heads_first,
)
from tamis.errors import UnsupportedError
from tamis.stats import AttentionOutput

Result: TypeAlias = "Tensor | tuple[Tensor, float] | tuple[Tensor, Tensor]"
_PRECISION = "int8"


def spas_sage2_attn_meansim_topk_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | str | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    smooth_k: bool = True,
    simthreshd1: Number = -0.1,
    cdfthreshd: Number | None = None,
    topk: Number | None = 0.35,
    pvthreshd: Number = 50,
    attention_sink: bool = False,
    tensor_layout: str = "HND",
    output_dtype: torch.dtype | None = None,
    return_sparsity: bool = False,
    return_lse: bool = False,
) -> Result:
    """Sparse attention that keeps a share `topk` of the blocks of every row.

    Args:
        q: `[batch, heads, seq, head_dim]`, or with tensor_layout "NHD" `[batch, seq, heads, head_dim]`.
        k, v: the same, possibly with fewer heads and another length.
        attn_mask: bool or additive mask, as torch's. (The string "HND", which LightX2V passes in this place, is its
            tensor_layout and taken as such.)
        dropout_p: 0.
        is_causal: row i sees keys up to its own; both sequences end together.
        scale: of the scores, by default head_dim ** -.5; the prediction uses it too.
        smooth_k: True.
        simthreshd1: blocks whose mean cosine similarity is below are kept whole; 1 or more: all blocks.
        cdfthreshd: instead of topk: the softmax mass that every row of blocks keeps; 1 or more: all blocks.
        topk: share of the blocks that a row sees.
        pvthreshd: skips a product with the values where no weight of a group of rows is larger than 2 ** -pvthreshd of
            its row's largest. Units of log2: 50 is a `pv_threshold` of 34.7.
        attention_sink: keep the first key block.
        tensor_layout: "HND" or "NHD", of inputs and output.
        output_dtype: of the output; None, other than in theirs, for that of q.
        return_sparsity: also return skipped / visible block products, queries with keys and weights with values
            together, those that pvthreshd skips among them. Reading it waits for the device.
        return_lse: also return the log-sum-exp of the scores, natural logarithm, fp32 `[batch, heads, seq]`.

    simthreshd1, cdfthreshd, topk and pvthreshd are numbers, or tensors with one per query head.

    Raises:
        TypeError, ValueError: an argument is wrong; both of cdfthreshd and topk, or of return_sparsity and return_lse.
        UnsupportedError: dropout, smooth_k=False, gradients, or no backend can serve the call.

    Source: SpargeAttn (arXiv 2502.18137); names and arguments of the authors' package `spas_sage_attn`.

    Example:
        >>> import torch
        >>> from tamis.compat import spas_sage2_attn_meansim_topk_cuda
        >>> q, k, v = (torch.randn(1, 512, 4, 64) for _ in range(3))
        >>> output, sparsity = spas_sage2_attn_meansim_topk_cuda(
        ...     q, k, v, topk=0.5, tensor_layout="NHD", return_sparsity=True
        ... )
        >>> output.shape, sparsity
        (torch.Size([1, 512, 4, 64]), 0.5)
    """
    wanted = _wanted(dropout_p, smooth_k, return_sparsity, return_lse)
    if isinstance(attn_mask, str):
        if attn_mask != "HND" or tensor_layout != "HND":
            raise TypeError(f"attn_mask must be a tensor or None, got {attn_mask!r}: name tensor_layout")
        attn_mask = None
    query, key, value = to_heads_first(tensor_layout, q, k, v)
    dtype, heads = output_type(output_dtype, query), query.shape[-3]
    result = predict_and_attend(
        query,
        key,
        value,
        predictor_of(simthreshd1, cdfthreshd, topk, flag(attention_sink, "attention_sink"), heads),
        {
            "causal": flag(is_causal, "is_causal"),
            "attn_mask": attn_mask,
            "scale": scale,
            "positions": None,
            "backend": asked_backend(),
        },
        precision=_PRECISION,
        pv_threshold=natural_threshold(pvthreshd, heads),
    )
    return _finish(result, tensor_layout, dtype, wanted)


def spas_sage2_attn_meansim_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | str | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    smooth_k: bool = True,
    simthreshd1: Number = 0.6,
    cdfthreshd: Number = 0.98,
    pvthreshd: Number = 50,
    attention_sink: bool = False,
    tensor_layout: str = "HND",
    output_dtype: torch.dtype | None = None,
    return_sparsity: bool = False,
    return_lse: bool = False,
) -> Result:
    """Sparse attention that keeps a softmax mass `cdfthreshd` of every row of blocks.

    Arguments, results and errors are those of `spas_sage2_attn_meansim_topk_cuda`, which has `topk` besides.

    Example:
        >>> import torch
        >>> from tamis.compat import spas_sage2_attn_meansim_cuda
        >>> q, k, v = (torch.randn(1, 4, 512, 64) for _ in range(3))
        >>> spas_sage2_attn_meansim_cuda(q, k, v, is_causal=True).shape
        torch.Size([1, 4, 512, 64])
    """
    return spas_sage2_attn_meansim_topk_cuda(
        q, k, v, attn_mask, dropout_p, is_causal, scale, smooth_k, simthreshd1, cdfthreshd, None, pvthreshd,
        attention_sink, tensor_layout, output_dtype, return_sparsity, return_lse,
    )  # fmt: skip


def block_sparse_sage2_attn_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask_id: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    smooth_k: bool = True,
    pvthreshd: Number = 50,
    attention_sink: bool = False,
    tensor_layout: str = "HND",
    output_dtype: torch.dtype | None = None,
    return_sparsity: bool = False,
    return_lse: bool = False,
) -> Result:
    """Attention over the blocks that a mask keeps; never causal.

    Args:
        mask_id: `[batch | 1, heads | 1, q_blocks, kv_blocks]`, 0 for what is skipped, of any dtype. Blocks are 128
            queries by 64 keys or, as for the authors' kernels for sm_90, 64 by 128: its shape tells. None = all.
        q, k, v, dropout_p, scale, smooth_k, pvthreshd, attention_sink, tensor_layout, output_dtype, return_sparsity,
            return_lse: as in `spas_sage2_attn_meansim_topk_cuda`.

    Raises:
        TypeError, ValueError, UnsupportedError: as there; and mask_id has the shape of neither kind of blocks.

    Example:
        >>> import torch
        >>> from tamis.compat import block_sparse_sage2_attn_cuda
        >>> q, k, v = (torch.randn(1, 4, 512, 64) for _ in range(3))
        >>> mask = torch.eye(4).repeat_interleave(2, 1).expand(1, 4, 4, 8)
        >>> block_sparse_sage2_attn_cuda(q, k, v, mask, return_sparsity=True)[1]
        0.75
    """
    wanted = _wanted(dropout_p, smooth_k, return_sparsity, return_lse)
    query, key, value = to_heads_first(tensor_layout, q, k, v)
    dtype, sink = output_type(output_dtype, q), flag(attention_sink, "attention_sink")
    lengths = (query.shape[-2], key.shape[-2])
    result = attend(
        query,
        key,
        value,
        None if mask_id is None else block_mask_of(mask_id, lengths, sink),
        scale=scale,
        precision=_PRECISION,
        pv_threshold=natural_threshold(pvthreshd, query.shape[-3]),
        backend=asked_backend(),
    )
    return _finish(result, tensor_layout, dtype, wanted)


def _wanted(dropout_p: float, smooth_k: bool, return_sparsity: bool, return_lse: bool) -> tuple[bool, bool]:
    """What is returned beside the output, (sparsity, log-sum-exp), after checks that all functions have."""
    if dropout_p != 0.0:
        raise UnsupportedError(f"dropout_p must be 0: no backend drops attention at random, got {dropout_p}")
    check_smooth_k(smooth_k)
    wanted = (flag(return_sparsity, "return_sparsity"), flag(return_lse, "return_lse"))
    if all(wanted):
        raise ValueError("return_sparsity and return_lse exclude each other, as in the authors' code: ask for one")
    return wanted


def _finish(result: AttentionOutput, tensor_layout: str, dtype: torch.dtype, wanted: tuple[bool, bool]) -> Result:
    output = result.output.to(dtype)
    output = output if tensor_layout == "HND" else output.transpose(-2, -3)
    sparsity, lse = wanted
    if sparsity:
        assert result.stats is not None
        return output, 1.0 - result.stats.density
    return (output, result.lse) if lse else output
