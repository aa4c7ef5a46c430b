"""Shared fixtures: fixed seeds, poisoned memory, warnings as errors, and every engine of the machine.

The engines are those of the CPU; with TRITON_INTERPRET=1 the triton backend in Triton's interpreter, with
TAMIS_TEST_DEVICE=cuda the one on a GPU. Of products of parameters those cases run that hold every pair of values
(pairs.py), and with TAMIS_TEST_WHOLE=1 all of them. TAMIS_TEST_SAMPLE=N runs N parametrisations, evenly spread, of
every test, and TAMIS_TEST_PART=I/N what is I more than a multiple of N among the tests that are left.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from browser import Browser, find_chromium
from engines import DEVICE, Engine, engines
from pairs import pairs

INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore = [] if INTERPRETS or DEVICE != "cpu" else ["test_triton.py", "test_triton_real.py"]
collect_ignore += [] if INTERPRETS else ["test_traffic.py"]  # which counts what the interpreter does
try:
    import hypothesis
except ModuleNotFoundError:  # a GPU machine that has little more than torch
    import draws

    draws.install()
    collect_ignore += ["test_block_mask.py", "test_report.py"]
else:
    examples = 3 if INTERPRETS else 20
    hypothesis.settings.register_profile("tamis", derandomize=True, deadline=None, max_examples=examples, database=None)
    hypothesis.settings.load_profile("tamis")


def pytest_configure(config: pytest.Config) -> None:
    if INTERPRETS:
        import interpreter

        interpreter.install()
    config.addinivalue_line("filterwarnings", "error" if DEVICE == "cpu" else "default")
    config.addinivalue_line("markers", "real_memory: leave torch.empty as it is")
    config.addinivalue_line("markers", "large: takes the interpreter a minute or more; it runs everywhere else")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    most = int(os.environ.get("TAMIS_TEST_SAMPLE", "0"))
    by_test: dict[str, list[pytest.Item]] = {}
    for item in items:
        if not (INTERPRETS and item.get_closest_marker("large")):
            by_test.setdefault(item.nodeid.split("[")[0], []).append(item)
    kept = set()
    for test, cases in by_test.items():
        found = cases if os.environ.get("TAMIS_TEST_WHOLE") == "1" else pairs(cases)
        whole = not most or (INTERPRETS and "test_triton" in test)
        number = len(found) if whole else min(most, len(found))
        kept.update(found[index * len(found) // number] for index in range(number))
    part, _, parts = os.environ.get("TAMIS_TEST_PART", "0/1").partition("/")
    mine = set([item for item in items if item in kept][int(part) :: int(parts)])
    config.hook.pytest_deselected(items=[item for item in items if item not in mine])
    items[:] = [item for item in items if item in mine]


@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Engines last: the same inputs go to one after the other, and the oracle remembers them."""
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
    torch.use_deterministic_algorithms(True, warn_only=DEVICE != "cpu")
    assert torch.empty(1, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    executable = find_chromium()
    if executable is None:
        pytest.skip("no Chromium or Chrome on this machine: install Debian's chromium to run the browser tests")
    with Browser(executable, tmp_path_factory.mktemp("browser") / "profile") as running:
        yield running


@pytest.fixture
def any_engine() -> Engine:
    """The best engine of the machine, for tests whose subject is not the arithmetic."""
    return engines()[-1]
