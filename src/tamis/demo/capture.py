"""Run a model densely and hand every layer's query, key and value to a function, one layer at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tamis.integrations.hook import Hook, Request


@dataclass(frozen=True)
class Captured:
    """What one attention layer was asked: tensors `[1, heads, seq, head_dim]`."""

    index: int
    name: str
    query: Tensor
    key: Tensor
    value: Tensor
    causal: bool
    scale: float | None


def capture(model: Any, run: Callable[[], Any], visit: Callable[[Captured], Tensor]) -> Any:
    """Run `run()` while `visit` computes the output of every attention layer of `model`; returns what `run` returned.

    Raises:
        ValueError: the model asks for more than causal or full attention (windows, padding, sinks, softcap).
    """
    count = 0

    def attend(request: Request) -> Tensor:
        nonlocal count
        masks = (request.mask, request.window, request.segments, request.obstacle)
        if any(extra is not None for extra in (*masks, request.softcap, request.sink_logits)):
            raise ValueError(f"{request.layer} asks for more than causal or full attention, which is not measured")
        captured = Captured(
            index=count,
            name=request.layer,
            query=request.query.contiguous(),
            key=request.key.contiguous(),
            value=request.value.contiguous(),
            causal=request.causal,
            scale=request.scale,
        )
        count += 1
        return visit(captured)

    with Hook(model, attend), torch.inference_mode():
        return run()
