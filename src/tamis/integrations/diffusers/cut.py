"""A diffusers model whose tokens are cut among ranks inside of it, as the model's own plan says.

Every rank calls the model with the same arguments and gets the whole output. Between the first block and `proj_out` it
holds its part of the image's tokens and, in models that attend to text and image together, its part of the text; the
text of cross-attention stays whole on every rank. Who cuts is diffusers: by the model's `enable_parallelism`, or asked
by `Cut`. Its hooks and the plan are private; what is tested is diffusers 0.42.1.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tamis.errors import UnsupportedError
from tamis.integrations.diffusers.adapters import Adapter
from tamis.integrations.diffusers.layout import Layout
from tamis.integrations.mine import Mine
from tamis.integrations.request import Request
from tamis.integrations.spread import Spread

if TYPE_CHECKING:
    from tamis.parallel.wire import Peers

_TEXTS = ("encoder_hidden_states", "encoder_attention_mask")


class Cut:
    """Tokens of a model cut among ranks until `remove`.

    Args:
        model: with a context-parallel plan, or cut already by `enable_parallelism`.
        adapter: what is known of its tokens.

    Raises:
        UnsupportedError: the model has no plan, its tokens are not known, or its text is cut apart from the image.
    """

    def __init__(self, model: Any, adapter: Adapter | None, spread: Spread) -> None:
        plan, kind = getattr(model, "_cp_plan", None), type(model).__name__
        if adapter is None or plan is None:
            raise UnsupportedError(
                f"mesh must be None with {kind}: how its tokens can be cut is not known "
                f"({'the model has no context-parallel plan' if plan is None else 'tamis does not know its tokens'})"
            )
        self._model, self._spread, self._adapter = model, spread, adapter
        self._processors: list[tuple[Any, Any]] = []
        self._plan: dict[str, Any] = {}
        self._handles: list[RemovableHandle] = []
        if cut_by(model) is None:
            try:
                self._cut(plan if adapter.text is not None else _without_text(plan), spread.peers)
            except BaseException:
                self.remove()
                raise
        elif adapter.text is None and _without_text(plan) != plan:
            raise UnsupportedError(
                f"{kind} cuts the text of its cross-attention too: leave enable_parallelism out and give mesh"
            )
        self._handles.append(model.register_forward_hook(Mine(self._leave), always_call=True))
        # The library's own exchange around attention is left out: ours is in its place.
        for module in () if self._plan else model.modules():
            processor: Any = getattr(module, "processor", None)
            if getattr(processor, "_parallel_config", None) is not None:
                self._processors.append((processor, processor._parallel_config))
                processor._parallel_config = None

    def _cut(self, plan: dict[str, Any], peers: Peers) -> None:
        """Shards where the plan has inputs, the whole where it has outputs: diffusers' needs equal shards on gloo."""
        self._plan = {place: entry for place, entry in plan.items() if isinstance(entry, dict)}
        mesh = SimpleNamespace(get_group=lambda: peers.group, size=lambda: peers.size)
        config: Any = SimpleNamespace(ulysses_anything=True, ring_anything=False, _mesh=mesh, _flattened_mesh=mesh)
        _hooks().apply_context_parallel(self._model, config, self._plan)
        for place in plan.keys() - self._plan.keys():
            gather = partial(_gathered, peers, plan[place].gather_dim)
            self._handles.append(self._model.get_submodule(place).register_forward_hook(Mine(gather)))

    def _leave(self, module: object, args: object, output: object) -> None:
        if output is None:  # the run failed
            self._spread.peers.failed()

    def remove(self) -> None:
        """Put back what was there before; safe to call twice."""
        for processor, config in self._processors:
            processor._parallel_config = config
        if self._plan:
            _hooks().remove_context_parallel(self._model, self._plan)
        for handle in self._handles:
            handle.remove()
        self._processors, self._plan = [], {}

    def request(self, request: Request, among_images: bool, layout: Layout | None) -> Request:
        """A call, and what of its keys is where."""
        if not among_images:
            return replace(request, whole=True)
        if layout is None or self._adapter.text is None:
            return replace(request, parts=(request.query.shape[2],))
        shards = torch.arange(layout.tokens).tensor_split(self._spread.peers.size)
        image = len(shards[self._spread.peers.rank])
        text = request.query.shape[2] - image
        parts = (text, image) if self._adapter.text == "before" else (image, text)
        return replace(request, parts=parts, keep=layout.keep)


def cut_by(model: nn.Module) -> Any:
    """The context-parallel configuration that a model was given by `enable_parallelism`, or None."""
    return getattr(getattr(model, "_parallel_config", None), "context_parallel_config", None)


def _gathered(peers: Peers, dim: int, module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """The tokens of all ranks, which run along `dim`."""
    own = output.movedim(dim, 0).contiguous()
    width = math.prod(own.shape[1:])
    lengths = [row[0] for row in peers.tell("output", [own.shape[0]])]
    shards = peers.all_gather(own.view(-1), [length * width for length in lengths], "output")
    whole = [shard.view(length, *own.shape[1:]) for length, shard in zip(lengths, shards, strict=True)]
    return torch.cat(whole).movedim(0, dim)


def _hooks() -> Any:
    from diffusers.hooks import context_parallel

    return context_parallel


def _without_text(plan: dict[str, Any]) -> dict[str, Any]:
    """A plan that leaves the text of cross-attention whole."""
    left = {}
    for place, inputs in plan.items():
        if isinstance(inputs, dict):
            inputs = {name: how for name, how in inputs.items() if name not in _TEXTS}
        if inputs:
            left[place] = inputs
    return left
