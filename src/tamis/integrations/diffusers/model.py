"""A function in place of the attention of one diffusers model.

Every attention module runs with an `Interception` of its own, which knows the module's name; the forward of the model
tells before how its tokens lie. What is replaced is the attribute `forward` of these modules, which torch.compile
watches, and for a token order there are hooks on the first block, on what makes position embeddings, and on `proj_out`.
"""

from __future__ import annotations

import copy
import inspect
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tamis.errors import UnsupportedError
from tamis.integrations.diffusers import adapters
from tamis.integrations.diffusers.cut import Cut
from tamis.integrations.diffusers.layout import Indices, Layout, count, indices_of
from tamis.integrations.hook import Hook
from tamis.integrations.intercept import Asked, Interception, as_asked, request_of
from tamis.integrations.mine import Mine
from tamis.integrations.request import Request
from tamis.integrations.spread import Spread

# Backends of diffusers that call scaled_dot_product_attention.
_TORCHS = frozenset(("native", "_native_cudnn", "_native_efficient", "_native_flash", "_native_math"))
_OURS = ("forward", "__deepcopy__", "__getstate__")  # what stands in a module while it runs through tamis
_hooked: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class ModelHook(Hook):
    """A function installed in a model of diffusers."""

    def __init__(
        self,
        model: nn.Module,
        function: Callable[[Request], Tensor],
        order: str | None,
        named: bool,
        prefix: str = "",
        spread: Spread | None = None,
    ) -> None:
        self._adapter = adapters.find(model)
        modules = _attention_modules(model)
        _check(model, modules, self._adapter, order, parallel=spread is not None)
        self._cut = None if spread is None else Cut(model, self._adapter, spread)
        self._function, self._order = function, order
        self._named = named
        self._names = list(inspect.signature(type(model).forward).parameters)[1:]
        self._run_now = threading.local()
        self._on = True
        self._undo: list[Callable[[], None]] = [partial(_hooked.discard, model)]
        _hooked.add(model)
        try:
            images = image_layers(model)
            for name, module in modules.items():
                answer = partial(self._answer, prefix + name, name in images, module)
                self._replace(module, partial(self._attention, Interception(answer)))
            self._replace(model, partial(self._run, model))
            if order is not None and self._adapter is not None:
                self._change_order(model, self._adapter)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Restore the attention that was there before; safe to call twice."""
        if self._on:
            self._on = False
            for undo in self._undo:
                undo()
            self._undo.clear()  # a handle that is done with holds no weights
            if self._cut is not None:
                self._cut.remove()
                self._cut = None

    @property
    def _layout(self) -> Layout | None:
        """Of the run that this thread is in."""
        return getattr(self._run_now, "layout", None)

    def _replace(self, module: nn.Module, function: Callable[..., Any]) -> None:
        """Put a function in place of a module's forward, which it is given first."""
        before: Any = module.forward
        owned = "forward" in module.__dict__

        def forward(*args: Any, **kwargs: Any) -> Any:
            # Whoever replaced it after us still calls us when we are gone.
            return function(before, args, kwargs) if self._on else before(*args, **kwargs)

        def without(memo: dict[int, Any]) -> Any:
            """A deep copy has the forward of its own class: ours would compute with the weights of this module."""
            ours: dict[str, Any] = {name: module.__dict__.pop(name) for name in _OURS if name in module.__dict__}
            try:
                return copy.deepcopy(module, memo)
            finally:
                module.__dict__ |= ours

        def state() -> dict[str, Any]:
            """What a file of the module holds: it is then without tamis."""
            kept = {name: item for name, item in module.__dict__.items() if name not in _OURS}
            return {**kept, "forward": before} if owned else kept

        def undo() -> None:
            for name in ("__deepcopy__", "__getstate__"):
                module.__dict__.pop(name, None)
            if module.__dict__.get("forward") is forward:
                del module.__dict__["forward"]
                if owned:
                    module.__dict__["forward"] = before

        module.__dict__["forward"] = forward
        module.__dict__["__deepcopy__"] = without
        module.__dict__["__getstate__"] = state
        self._undo.append(undo)

    @staticmethod
    def _attention(mode: Interception, before: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        with mode:
            return before(*args, **kwargs)

    def _run(self, model: nn.Module, before: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        checkpoints = torch.is_grad_enabled() and getattr(model, "is_gradient_checkpointing", False)
        if self._order is not None and checkpoints:
            raise UnsupportedError("order must be None with gradient checkpointing, which runs blocks again without it")
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        self._run_now.layout = self._layout_of(model.config, given)
        try:
            return before(*self._arguments(given, args), **{name: given[name] for name in kwargs})
        finally:
            self._run_now.layout = None

    def _layout_of(self, config: Any, given: dict[str, Any]) -> Layout | None:
        adapter = self._adapter
        if adapter is None or "hidden_states" not in given or (self._order is None and adapter.text is None):
            return None
        tokens = adapter.tokens(config, given)
        indices = None if self._order is None else indices_of(self._order, tokens, given["hidden_states"].device)
        return Layout(count(tokens), adapter.text, indices, outside=not adapter.around(config, given))

    def _arguments(self, given: dict[str, Any], args: Any) -> Any:
        """The positional arguments, with those that go by token in the layout's order; `given` is changed as well."""
        layout = self._layout
        if layout is not None and layout.indices is not None and layout.outside and self._adapter is not None:
            for rotary in self._adapter.rotary:
                if given.get(rotary.place) is not None:
                    given[rotary.place] = _moved(given[rotary.place], rotary, layout)
        return tuple(given[name] for name in self._names[: len(args)])

    def _answer(self, name: str, among_images: bool, module: nn.Module, asked: Asked) -> Tensor:
        # A graph that asks for no name serves all blocks, where they are compiled one by one.
        request = request_of(asked, name if self._named or not torch.compiler.is_compiling() else "", module)
        length, layout = request.query.shape[2], self._layout
        if self._cut is not None:
            return as_asked(self._function(self._cut.request(request, among_images, layout)), asked)
        if length != request.key.shape[2]:
            request = replace(request, obstacle="cross-attention")
        elif not among_images:
            request = replace(request, obstacle="not among image tokens")
        if request.obstacle is not None or layout is None:
            return as_asked(self._function(request), asked)
        request = replace(request, keep=layout.keep)
        around = layout.around(length)
        if around is None:
            return as_asked(self._function(request), asked)
        output = self._function(_reordered(request, around))
        return as_asked(output.index_select(2, around[1]), asked)

    def _change_order(self, model: nn.Module, adapter: adapters.Adapter) -> None:
        self._hook(model.get_submodule(adapter.block).register_forward_pre_hook(Mine(self._enter), with_kwargs=True))
        for rotary in adapter.rotary:
            if rotary.place not in self._names:
                module = model.get_submodule(rotary.place)
                self._hook(module.register_forward_hook(Mine(partial(self._turn, rotary))))
        self._hook(model.get_submodule("proj_out").register_forward_hook(Mine(self._leave)))

    def _hook(self, handle: RemovableHandle) -> None:
        self._undo.append(handle.remove)

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        layout = self._layout
        if layout is None or layout.indices is None or not layout.outside:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        layout.check(hidden.shape[1])
        layout.entered = True
        hidden = _taken(hidden, 1, layout.indices[0])
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def _turn(self, rotary: adapters.Rotary, module: nn.Module, args: Any, output: Any) -> Any:
        layout = self._layout
        return output if layout is None or not layout.outside else _moved(output, rotary, layout)

    def _leave(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        layout = self._layout
        if layout is None or layout.indices is None or not layout.entered:
            return output
        return _taken(output, 1, layout.indices[1])


def image_layers(model: nn.Module) -> list[str]:
    """Names of the attention layers in which image tokens attend to each other.

    Of a model that is not known these are all but those that say they are cross-attention.
    """
    adapter = adapters.find(model)
    patterns = ("*",) if adapter is None else adapter.layers
    return [
        name
        for name, module in _attention_modules(model).items()
        if any(fnmatchcase(name, pattern) for pattern in patterns)
        and not (adapter is None and getattr(module, "is_cross_attention", False))
    ]


def _attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Attention modules by name: those to which diffusers gives processors."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "processor")}


def _check(
    model: nn.Module,
    modules: dict[str, nn.Module],
    adapter: adapters.Adapter | None,
    order: str | None,
    *,
    parallel: bool,
) -> None:
    kind = type(model).__name__
    if model in _hooked:
        raise ValueError(f"{kind} runs through tamis already: .remove() that handle first")
    if not modules:
        raise UnsupportedError(f"{kind} has no attention modules with processors")
    if order is not None and adapter is None:
        raise UnsupportedError(
            f"order must be None with {kind}: the order of tokens is known of {', '.join(adapters.TABLE)}"
        )
    for name, module in modules.items():
        backend = _backend(module)
        if backend not in _TORCHS:
            raise UnsupportedError(
                f"{name} of {kind} uses the attention backend {backend!r}, which does not call "
                "scaled_dot_product_attention: call model.set_attention_backend('native') first"
            )
        if not parallel and getattr(getattr(module, "processor", None), "_parallel_config", None) is not None:
            raise UnsupportedError(f"{name} of {kind} runs in parallel, which tamis does not take over")


def _backend(module: nn.Module) -> str:
    """Name of the backend that diffusers' dispatcher would choose for a module."""
    chosen = getattr(getattr(module, "processor", None), "_attention_backend", None)
    if chosen is None and hasattr(type(getattr(module, "processor", None)), "_attention_backend"):
        from diffusers.models.attention_dispatch import _AttentionBackendRegistry

        registry: Any = _AttentionBackendRegistry
        chosen = registry.get_active_backend()[0]
    return "native" if chosen is None else str(getattr(chosen, "value", chosen))


def _taken(x: Tensor, dim: int, index: Tensor) -> Tensor:
    # With parts of the model on other devices, tokens need not be where the model's arguments were.
    return x.index_select(dim, index.to(x.device))


def _moved(output: Any, rotary: adapters.Rotary, layout: Layout) -> Any:
    """Position embeddings in the layout's order: a tensor, or a tuple of which one item or all go by token."""
    if isinstance(output, Tensor):
        extra = output.shape[rotary.dim] - layout.tokens
        forward, _ = layout.wide(extra, 0) if layout.text == "before" else layout.wide(0, extra)
        return _taken(output, rotary.dim, forward)
    return tuple(
        _moved(item, rotary, layout) if rotary.item in (None, index) else item for index, item in enumerate(output)
    )


def _reordered(request: Request, indices: Indices) -> Request:
    """A request with its tokens in another order; so is what its own call returns."""
    forward = indices[0]
    mask, original = request.mask, request.original
    if mask is not None:
        for dim in (2, 3):
            mask = mask.index_select(dim, forward) if mask.shape[dim] > 1 else mask
    segments = request.segments
    return replace(
        request,
        query=request.query.index_select(2, forward),
        key=request.key.index_select(2, forward),
        value=request.value.index_select(2, forward),
        mask=mask,
        segments=None if segments is None else (segments[0], segments[1].index_select(1, forward)),
        original=None if original is None else lambda: original().index_select(2, forward),
    )
