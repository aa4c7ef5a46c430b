"""A stand-in for the part of hypothesis that the shared tests use, for machines with a GPU and little else.

Seeded draws, five a test, and no shrinking: what hypothesis finds elsewhere, with less.
"""

from __future__ import annotations

import functools
import inspect
import random
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

EXAMPLES = 5


class Strategy:
    """Something that can be drawn."""

    def __init__(self, *choices: Callable[[random.Random], Any]) -> None:
        self._choices = choices

    def __or__(self, other: Strategy) -> Strategy:
        return Strategy(*self._choices, *other._choices)

    def draw(self, source: random.Random) -> Any:
        return source.choice(self._choices)(source)


class DataObject:
    """What a test draws from while it runs."""

    def __init__(self, source: random.Random) -> None:
        self._source = source

    def draw(self, strategy: Strategy) -> Any:
        return strategy.draw(self._source)


def integers(low: int, high: int) -> Strategy:
    """An integer, both ends more often than others."""
    return Strategy(lambda source: source.choice([low, high, *(source.randint(low, high) for _ in range(6))]))


def floats(low: float, high: float, *, width: int = 64) -> Strategy:
    """A number; `width` is hypothesis' own."""
    assert width in (32, 64)
    return Strategy(lambda source: source.choice([low, high, *(source.uniform(low, high) for _ in range(6))]))


def sampled_from(values: Sequence[Any]) -> Strategy:
    """One of some values."""
    return Strategy(lambda source: source.choice(values))


def booleans() -> Strategy:
    """True or False."""
    return sampled_from([True, False])


def none() -> Strategy:
    """None."""
    return Strategy(lambda _: None)


def nothing() -> Strategy:
    """No value at all: it is only there to be joined."""
    return Strategy()


def tuples(*parts: Strategy) -> Strategy:
    """A tuple of draws."""
    return Strategy(lambda source: tuple(part.draw(source) for part in parts))


def lists(part: Strategy, *, min_size: int, max_size: int) -> Strategy:
    """A list of draws."""
    return Strategy(lambda source: [part.draw(source) for _ in range(source.randint(min_size, max_size))])


def data() -> Strategy:
    """A `DataObject`."""
    return Strategy(DataObject)


def given(**strategies: Strategy) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test with several draws of its named arguments."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(**fixtures: Any) -> None:
            for seed in range(EXAMPLES):
                source = random.Random(f"{test.__qualname__} {seed}")
                test(**fixtures, **{name: strategy.draw(source) for name, strategy in strategies.items()})

        signature = inspect.signature(test)
        left = [parameter for name, parameter in signature.parameters.items() if name not in strategies]
        run.__signature__ = signature.replace(parameters=left)  # type: ignore[attr-defined]
        return run

    return decorate


def install() -> None:
    """Let `import hypothesis` find this."""
    package, strategies = types.ModuleType("hypothesis"), types.ModuleType("hypothesis.strategies")
    for strategy in (booleans, data, floats, integers, lists, none, nothing, sampled_from, tuples):
        setattr(strategies, strategy.__name__, strategy)
    strategies.DataObject = DataObject  # type: ignore[attr-defined]
    package.given, package.strategies = given, strategies  # type: ignore[attr-defined]
    sys.modules |= {"hypothesis": package, "hypothesis.strategies": strategies}
