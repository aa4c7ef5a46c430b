"""Of a test's product of three or more parameters, the few cases that hold every pair of values, engines among them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import pytest

Value = tuple[str | int, ...]  # a parameter and which of its values


def pairs(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """The cases of one test that hold every pair of values which all of `items` hold, in their order.

    So every value meets every engine, and every other value; only what takes three particular values at once can go
    unseen. A parameter given together with another (`parametrize(("a", "b"), ...)`) is one with it.
    """
    values = [_values(item) for item in items]
    if not values or len(values[0]) < 3:
        return list(items)
    held = [{frozenset(pair) for pair in combinations(case, 2)} for case in values]
    missing, left, kept = set().union(*held), dict(enumerate(held)), set()
    while missing:
        best = max(left, key=lambda case: len(left[case] & missing))
        kept.add(best)
        missing -= left.pop(best)
    return [item for case, item in enumerate(items) if case in kept]


def _values(item: pytest.Item) -> list[Value]:
    """One value for each `parametrize`, and the engine; values are told apart as the objects they are."""
    callspec = getattr(item, "callspec", None)
    if callspec is None:
        return []
    given = [mark.args[0] for mark in item.iter_markers("parametrize")]
    together = [names.split(",") if isinstance(names, str) else names for names in given]
    if "engine" in callspec.params:
        together.append(["engine"])
    return [(names[0], *(id(callspec.params[name.strip()]) for name in names)) for names in together]
