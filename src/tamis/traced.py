"""What torch.compile is told of our functions, without loading it: it takes as long as torch itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable[..., object])


def constant(function: F) -> F:
    """What `torch.compiler.assume_constant_result` does: a graph holds the answer, and does not look inside."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
