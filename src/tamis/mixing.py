"""Mixing of the channels of query and key before they are rounded to 8 bits.

Both are multiplied by the same orthogonal matrix, which leaves their products alone: D H / sqrt(n) for every n
neighbours, H the Walsh-Hadamard matrix, D a diagonal of signs. A channel that is far larger than the others, as
language models have them, is spread over n, and the step of 8 bits, which follows the largest entry of a row, becomes
smaller for all. H alone would gather what channels have in common, a constant or an alternating one, in a single entry.
The signs of Rudin and Shapiro prevent that: where n is a power of four, any row of H times them comes out of H in
entries of one size.

Source: QuaRot (arXiv 2404.00456); FlashAttention-3 (arXiv 2407.08608), section 3.3, for attention in fp8.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MOST = 256  # channels that are mixed


def neighbours(dim: int) -> int:
    """How many neighbours of `dim` channels are mixed: 256, 64, 16, 8, 4, 2 or 1, the largest that divides it."""
    number = min(dim & -dim, MOST)
    return number // 2 if number in (32, 128) else number


def signs(dim: int) -> Tensor:
    """-1 where the binary digits of a channel's number modulo 256 hold an odd number of pairs of ones."""
    odd = [(channel & channel >> 1).bit_count() % 2 for channel in (channel % MOST for channel in range(dim))]
    return torch.tensor([1.0 - 2.0 * one for one in odd])


def mix(x: Tensor, number: int) -> Tensor:
    """Every `number` neighbours of the last axis times D H / sqrt(number).

    Args:
        x: fp32 `[.., dim]`.
        number: a power of two that divides dim; 1 changes nothing.
    """
    return mix_shares(x, number) * math.sqrt(number)


def mix_shares(x: Tensor, number: int) -> Tensor:
    """The same without the square root: times D H / number, which overflows nowhere. Bit for bit as in csrc/mix.h."""
    return x if number == 1 else _shares(x * signs(x.shape[-1]).to(x.device), number)


def unmix(x: Tensor, number: int) -> Tensor:
    """What `mix` was given."""
    return x if number == 1 else _shares(x, number) * math.sqrt(number) * signs(x.shape[-1]).to(x.device)


def _shares(x: Tensor, number: int) -> Tensor:
    mixed = torch.unflatten(x / number, -1, (-1, number))
    apart = 1
    while apart < number:
        pairs = torch.unflatten(mixed, -1, (-1, 2, apart))
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        mixed = torch.stack([first + second, first - second], -2).flatten(-3)
        apart *= 2
    return mixed.flatten(-2)
