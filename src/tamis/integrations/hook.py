"""A function installed in a model in place of its attention, whatever library the model comes from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

from torch import Tensor, nn

from tamis.errors import UnsupportedError
from tamis.integrations.request import Request
from tamis.integrations.spread import Spread
from tamis.order import KINDS

_Self = TypeVar("_Self", bound="Hook")


class Hook(ABC):
    """A function installed in a model; `remove` puts the model's own attention back. Also a context manager."""

    @abstractmethod
    def remove(self) -> None:
        """Restore the attention that was there before; safe to call twice."""

    def follow_steps(self, tell: Callable[[int], None]) -> None:  # noqa: B027
        """Tell a function the number of every step of a diffusion model, if it is known; by default it is not."""

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def install(
    model: Any,
    function: Callable[[Request], Tensor],
    *,
    means: bool = False,
    order: str | None = None,
    named: bool = True,
    spread: Spread | None = None,
) -> Hook:
    """Hand every attention call of a model to a function until `.remove()`, or inside a `with` block.

    Args:
        model: of transformers or diffusers, or a pipeline of diffusers.
        means: let the caches that a transformers model is called with keep the mean key of every block, for `Decode`.
        order: a token order for the model of an image or video, as in `tamis.apply`.
        named: whether the function has to know a call's layer in compiled graphs too.
        spread: where the ranks are that hold the other tokens.

    Raises:
        TypeError: the model comes from no library that tamis knows.
        UnsupportedError: the model does not take attention functions, or its tokens have no order that tamis knows.
        ValueError: there is no such order, or the model has a function already.
    """
    if order is not None and order not in KINDS:
        raise ValueError(f"order must be one of {', '.join(KINDS)}, or None, got {order!r}")
    if _from_diffusers(model):
        from tamis.integrations import diffusers

        if means:
            raise UnsupportedError(f"decode must be None with {type(model).__name__}, which has no cache of keys")
        return diffusers.install(model, function, order, named, spread)
    from tamis.integrations.transformers import TransformersHook

    if order is not None:
        raise UnsupportedError(f"order must be None with {type(model).__name__}: only tokens of diffusers have another")
    return TransformersHook(model, function, means=means, shards=None if spread is None else spread.shards)


def cut_by(model: Any) -> tuple[Any, str] | None:
    """Mesh and mode of a diffusers model, or of a pipeline's models, that `enable_parallelism` has cut; else None.

    Raises:
        ValueError: a pipeline's models are not all cut alike.
        UnsupportedError: they are cut in both ways at once.
    """
    if not _from_diffusers(model):
        return None
    from tamis.integrations.diffusers import cut
    from tamis.parallel import from_diffusers

    configs = [cut.cut_by(part) for part in models_of(model).values()]
    if all(config is None for config in configs):
        return None
    ways = [None if config is None else from_diffusers(config, 0) for config in configs]
    found = [None if way is None else (way["mesh"], way["mode"]) for way in ways]
    if any(one != found[0] for one in found) or found[0] is None:
        raise ValueError(f"{type(model).__name__} has models that enable_parallelism has cut in other ways, or not")
    return found[0]


def shares_a_hook(model: Any) -> bool:
    """Whether another model's hook answers for this one too, because they share a configuration (transformers)."""
    if _from_diffusers(model):
        return False
    from tamis.integrations import transformers

    return transformers.shares_a_hook(model)


def attention_layers(model: Any) -> list[str]:
    """Qualified names of a model's attention layers, in the order of `named_modules`.

    Of a diffusers model these are the layers in which image or video tokens attend to each other.

    Raises:
        TypeError: the model comes from no library that tamis knows.
    """
    if _from_diffusers(model):
        from tamis.integrations import diffusers

        return diffusers.attention_layers(model)
    from tamis.integrations import transformers

    return transformers.attention_layers(model)


def models_of(model: Any) -> dict[str, nn.Module]:
    """A model by an empty name, or the transformers of a diffusers pipeline by what stands before their layers' names.

    Raises:
        UnsupportedError: a pipeline has no transformer.
    """
    if isinstance(model, nn.Module):
        return {"": getattr(model, "_orig_mod", model)}
    if not _from_diffusers(model):
        return {}
    from tamis.integrations.diffusers.pipeline import parts

    return parts(model)


def _from_diffusers(model: Any) -> bool:
    kinds = type(getattr(model, "_orig_mod", model)).__mro__
    return any(kind.__module__.split(".")[0] == "diffusers" for kind in kinds)
