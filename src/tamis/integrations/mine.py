"""Hooks of ours in a model that may be copied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Mine:
    """A function of ours that a module calls; copies and files of the module call one that changes nothing."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __reduce__(self) -> Any:
        return Mine, (_nothing,)


def _nothing(*_: Any) -> None:
    return None
