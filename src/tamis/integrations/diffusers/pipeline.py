"""A diffusers pipeline: the transformers in it, and the step that its scheduler is at."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tamis.errors import UnsupportedError
from tamis.integrations.diffusers.model import ModelHook, image_layers
from tamis.integrations.hook import Hook
from tamis.integrations.request import Request
from tamis.integrations.spread import Spread

_PARTS = ("transformer", "transformer_2", "transformer_3", "unet")


class PipelineHook(Hook):
    """A function installed in all transformers of a pipeline."""

    def __init__(
        self,
        pipeline: Any,
        function: Callable[[Request], Tensor],
        order: str | None,
        named: bool,
        spread: Spread | None,
    ) -> None:
        self._scheduler = pipeline.scheduler if hasattr(pipeline, "scheduler") else None
        self._watched: list[Watched] = []
        self._hooks: list[ModelHook] = []
        try:
            for prefix, model in parts(pipeline).items():
                self._hooks.append(ModelHook(model, function, order, named, prefix, spread))
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Restore the attention that was there before; safe to call twice."""
        for hook in self._hooks:
            hook.remove()
        for watched in self._watched:
            watched.remove()

    def follow_steps(self, tell: Callable[[int], None]) -> None:
        """Tell a function the number of every step: how often the scheduler has stepped since it was set."""
        scheduler = self._scheduler
        if scheduler is None or not hasattr(scheduler, "set_timesteps") or not hasattr(scheduler, "step"):
            return
        step = 0

        def begin() -> None:
            nonlocal step
            step = 0
            tell(step)

        def go_on() -> None:
            nonlocal step
            step += 1
            tell(step)

        self._watched = [Watched(scheduler, "set_timesteps", begin), Watched(scheduler, "step", go_on)]
        tell(step)


class Watched:
    """A method of an object that tells when it has been called; a copy of the object has its own method, untold."""

    def __init__(self, owner: Any, name: str, told: Callable[[], None]) -> None:
        self._owner, self._name, self._told = owner, name, told
        self._before = owner.__dict__.get(name)
        self._method = getattr(owner, name)
        owner.__dict__[name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self._method(*args, **kwargs)
        self._told()
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        owner = memo.get(id(self._owner), self._owner)
        if self._before is not None:
            return copy.deepcopy(self._before, memo)
        return getattr(type(owner), self._name).__get__(owner)

    def __reduce__(self) -> Any:
        return getattr, (self._owner, self._name)

    def remove(self) -> None:
        """Give the object its own method back; safe to call twice."""
        if self._owner.__dict__.get(self._name) is self:
            del self._owner.__dict__[self._name]
            if self._before is not None:
                self._owner.__dict__[self._name] = self._before


def parts(pipeline: Any) -> dict[str, nn.Module]:
    """The transformers of a pipeline, by what stands before the names of their layers: nothing for the first.

    Raises:
        UnsupportedError: it has none.
    """
    found: dict[str, nn.Module] = {}
    for name in _PARTS:
        part = getattr(pipeline, name, None)
        model = getattr(part, "_orig_mod", part)
        if isinstance(model, nn.Module):
            found[f"{name}." if found else ""] = model
    if not found:
        raise UnsupportedError(f"{type(pipeline).__name__} has none of {', '.join(_PARTS)}")
    return found


def pipeline_layers(pipeline: Any) -> list[str]:
    """Names of the attention layers of all transformers of a pipeline."""
    return [prefix + name for prefix, model in parts(pipeline).items() for name in image_layers(model)]
