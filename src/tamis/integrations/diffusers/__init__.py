"""Image and video models of diffusers, on its attention dispatcher or not: one path for all, and a table of models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tamis.integrations.diffusers.model import ModelHook, image_layers
from tamis.integrations.diffusers.pipeline import PipelineHook, pipeline_layers
from tamis.integrations.hook import Hook
from tamis.integrations.request import Request
from tamis.integrations.spread import Spread


def install(
    model: Any, function: Callable[[Request], Tensor], order: str | None, named: bool, spread: Spread | None
) -> Hook:
    """Hand every attention call of a model, or of all transformers of a pipeline, to a function.

    Raises:
        UnsupportedError: there is no attention to take over, it goes through something else than torch, or the order
            of the model's tokens is not known.
        ValueError: the model has a function already.
    """
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, nn.Module):
        return ModelHook(model, function, order, named, spread=spread)
    return PipelineHook(model, function, order, named, spread)


def attention_layers(model: Any) -> list[str]:
    """Qualified names of the layers in which image tokens attend to each other.

    Those of a pipeline's first transformer are its own, those of others begin with the name of their part.
    """
    model = getattr(model, "_orig_mod", model)
    return image_layers(model) if isinstance(model, nn.Module) else pipeline_layers(model)
