"""Mixing of channels: orthogonal, its own inverse, and the same as the textbook's matrix."""

from __future__ import annotations

import oracle
import pytest
import torch

from tamis import mixing


@pytest.mark.parametrize(("dim", "number"), [(1, 1), (30, 2), (40, 8), (64, 64), (96, 32), (256, 256), (1000, 8)])
def test_matrix(dim: int, number: int) -> None:
    assert mixing.neighbours(dim) == number
    x = torch.randn(3, 5, dim)
    mixed = mixing.mix(x, number)
    torch.testing.assert_close(mixed.double(), x.double() @ oracle.mixer(dim), rtol=0, atol=2e-6)
    torch.testing.assert_close(mixing.mix(mixed, number), x, rtol=0, atol=2e-6)
    torch.testing.assert_close((mixed * mixed).sum(-1), (x * x).sum(-1), rtol=1e-5, atol=0)


def test_a_large_channel_is_spread() -> None:
    x = torch.zeros(64)
    x[5] = 8.0
    assert torch.equal(mixing.mix(x, 64).abs(), torch.ones(64))


def test_nothing_overflows() -> None:
    largest = torch.full((64,), torch.finfo(torch.float32).max)
    shares = mixing.mix_shares(largest, 64)
    assert shares.isfinite().all()
    assert float(shares[0]) == float(largest[0])
