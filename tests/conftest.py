"""Shared fixtures: fixed seeds, poisoned memory, warnings as errors, and every engine of the machine."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import interpreter
import pytest
import torch
from engines import Engine, engines

hypothesis.settings.register_profile("tamis", derandomize=True, deadline=None, max_examples=20, database=None)
hypothesis.settings.load_profile("tamis")


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        interpreter.install()
    config.addinivalue_line("filterwarnings", "error")
    config.addinivalue_line("markers", "real_memory: leave torch.empty as it is")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "engine" in metafunc.fixturenames:
        metafunc.parametrize("engine", engines(), ids=str)


@pytest.fixture(autouse=True)
def one_seed_and_one_thread() -> None:
    """Small tensors are fastest on one thread; test_threads.py is about several."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """`torch.empty` hands out NaN (and the largest integers), so that whatever is never written shows up."""
    if request.node.get_closest_marker("real_memory"):
        yield
        return
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def any_engine() -> Engine:
    """The best engine of the machine, for tests whose subject is not the arithmetic."""
    return engines()[-1]
