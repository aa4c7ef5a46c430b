"""A function installed in a model in place of its attention, whatever library the model comes from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

from torch import Tensor, nn

from tamis.integrations.request import Request

_Self = TypeVar("_Self", bound="Hook")


class Hook(ABC):
    """A function installed in a model; `remove` puts the model's own attention back. Also a context manager."""

    @abstractmethod
    def remove(self) -> None:
        """Restore the attention that was there before; safe to call twice."""

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def install(model: nn.Module, function: Callable[[Request], Tensor], *, means: bool = False) -> Hook:
    """Hand every attention call of a model to a function until `.remove()`, or inside a `with` block.

    Args:
        means: let the caches that the model is called with keep the mean key of every block, for `Decode`.

    Raises:
        TypeError: the model comes from no library that tamis knows.
        UnsupportedError: the model does not take attention functions.
    """
    from tamis.integrations.transformers import TransformersHook

    return TransformersHook(model, function, means=means)


def attention_layers(model: nn.Module) -> list[str]:
    """Qualified names of a model's attention layers, in the order of `named_modules`.

    Raises:
        TypeError: the model comes from no library that tamis knows.
    """
    from tamis.integrations import transformers

    return transformers.attention_layers(model)
