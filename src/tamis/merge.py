"""Putting partial attention results together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tamis.stats import AttentionOutput


def merge(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> AttentionOutput:
    """Merge attention over disjoint sets of keys into attention over their union.

    With weights w_i = exp(lse_i - max lse): output = sum w_i output_i / sum w_i, lse = max lse + log sum w_i. Exact up
    to rounding (fp32). Rows that are empty in every part stay 0 with lse -inf. Where sink logits are used, exactly one
    part must carry them.

    Args:
        outputs: partial results `[.., q_len, value_dim]`, all of one shape and dtype.
        lses: their log-sum-exps `[.., q_len]`.

    Returns:
        `AttentionOutput` with the dtype of the parts, and no stats.

    Raises:
        TypeError: not two sequences of tensors.
        ValueError: the lists are empty, of different lengths, or the shapes do not fit.

    Source: FlashAttention (arXiv 2205.14135), section 3.1.

    Example:
        >>> import torch, tamis
        >>> query, key, value = (torch.randn(1, 2, 128, 32) for _ in range(3))
        >>> left = tamis.attend(query, key[:, :, :50], value[:, :, :50])
        >>> right = tamis.attend(query, key[:, :, 50:], value[:, :, 50:])
        >>> both = tamis.merge([left.output, right.output], [left.lse, right.lse])
        >>> torch.allclose(both.output, tamis.attend(query, key, value).output, atol=1e-5)
        True
    """
    for name, parts in (("outputs", outputs), ("lses", lses)):
        if not isinstance(parts, (Sequence, Tensor)):
            raise TypeError(f"{name} must be a sequence of tensors, got {type(parts).__name__}")
        for index, part in enumerate(parts):
            if not isinstance(part, Tensor):
                raise TypeError(f"{name}[{index}] must be a tensor, got {type(part).__name__}")
    if len(outputs) == 0 or len(outputs) != len(lses):
        raise ValueError(
            f"outputs and lses must be of one length, at least 1: got {len(outputs)} outputs and {len(lses)} lses"
        )
    for index, (output, lse) in enumerate(zip(outputs, lses, strict=True)):
        if output.shape != outputs[0].shape or output.dtype != outputs[0].dtype:
            raise ValueError(
                f"outputs[{index}] is {output.dtype} {tuple(output.shape)}, expected as outputs[0]: "
                f"{outputs[0].dtype} {tuple(outputs[0].shape)}"
            )
        if lse.shape != output.shape[:-1]:
            raise ValueError(f"lses[{index}] has shape {tuple(lse.shape)}, expected {tuple(output.shape[:-1])}")
    logs = torch.stack([lse.to(torch.float32) for lse in lses])
    largest = logs.amax(0)
    # An empty row has lse -inf everywhere: subtracting 0 keeps exp() at 0 where -inf - -inf would be NaN.
    weights = torch.exp(logs - torch.where(largest == float("-inf"), 0.0, largest))
    total = weights.sum(0)
    merged = torch.zeros(outputs[0].shape, dtype=torch.float32, device=outputs[0].device)
    for output, weight in zip(outputs, weights, strict=True):
        share = torch.where(weight == 0, 0.0, weight / total)[..., None]
        merged = merged + torch.where(share == 0, 0.0, share * output.to(torch.float32))
    return AttentionOutput(merged.to(outputs[0].dtype), largest + torch.log(total))
