"""Mixing of channels: orthogonal, and the same as the textbook's matrix."""

from __future__ import annotations

import oracle
import pytest
import torch

from tamis import mixing


@pytest.mark.parametrize(
    ("dim", "number"), [(1, 1), (30, 2), (40, 8), (64, 64), (96, 16), (128, 64), (256, 256), (512, 256), (1000, 8)]
)
def test_matrix(dim: int, number: int) -> None:
    assert mixing.neighbours(dim) == number
    x = torch.randn(3, 5, dim)
    mixed = mixing.mix(x, number)
    torch.testing.assert_close(mixed.double(), x.double() @ oracle.mixer(dim), rtol=0, atol=2e-6)
    torch.testing.assert_close(mixing.unmix(mixed, number), x, rtol=0, atol=2e-6)
    torch.testing.assert_close((mixed * mixed).sum(-1), (x * x).sum(-1), rtol=1e-5, atol=0)
    torch.testing.assert_close(oracle.mixer(dim) @ oracle.mixer(dim).T, torch.eye(dim, dtype=torch.float64))


def test_nothing_is_changed_by_one() -> None:
    x = torch.randn(7)
    assert torch.equal(mixing.mix(x, 1), x)
    assert torch.equal(mixing.unmix(x, 1), x)


def test_a_large_channel_is_spread() -> None:
    x = torch.zeros(64)
    x[5] = 8.0
    assert torch.equal(mixing.mix(x, 64).abs(), torch.ones(64))


@pytest.mark.parametrize("dim", [8, 16, 32, 64, 128, 256, 512])
def test_what_channels_have_in_common_is_not_gathered(dim: int) -> None:
    """Any row of the Walsh-Hadamard matrix, as a constant and an alternating one are: no entry grows."""
    number = mixing.neighbours(dim)
    places = torch.arange(number)
    walsh = torch.tensor([[1.0 - 2.0 * ((int(a) & int(b)).bit_count() % 2) for b in places] for a in places])
    rows = walsh.repeat(1, dim // number)
    assert float(mixing.mix(rows, number).abs().max()) <= (2**0.5 if dim == 8 else 1) + 1e-5


def test_nothing_overflows() -> None:
    largest = torch.full((64,), torch.finfo(torch.float32).max) * mixing.signs(64)
    shares = mixing.mix_shares(largest, 64)
    assert shares.isfinite().all()
    assert float(shares[0]) == float(largest[0])
