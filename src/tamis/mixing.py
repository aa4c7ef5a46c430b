"""Mixing of the channels of query and key before they are rounded to 8 bits.

Both are multiplied by the same orthogonal matrix, which leaves their products alone: H / sqrt(n) for every n
neighbours, H the Walsh-Hadamard matrix. A channel that is far larger than the others, as language models have them, is
spread over n, and the step of 8 bits, which follows the largest entry of a row, becomes smaller for all.

Source: QuaRot (arXiv 2404.00456); FlashAttention-3 (arXiv 2407.08608), section 3.3, for attention in fp8.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def neighbours(dim: int) -> int:
    """How many neighbours of `dim` channels are mixed: the largest power of two that divides it."""
    return dim & -dim


def mix(x: Tensor, number: int) -> Tensor:
    """Every `number` neighbours of the last axis times H / sqrt(number); twice gives back what came.

    Args:
        x: fp32 `[.., dim]`.
        number: a power of two that divides dim; 1 changes nothing.
    """
    return mix_shares(x, number) * math.sqrt(number)


def mix_shares(x: Tensor, number: int) -> Tensor:
    """The same without the square root: times H / number, which overflows nowhere. Bit for bit as in csrc/mix.h."""
    mixed = torch.unflatten(x / number, -1, (-1, number))
    apart = 1
    while apart < number:
        pairs = torch.unflatten(mixed, -1, (-1, 2, apart))
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        mixed = torch.stack([first + second, first - second], -2).flatten(-3)
        apart *= 2
    return mixed.flatten(-2)
