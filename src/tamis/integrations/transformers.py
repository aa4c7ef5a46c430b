"""The place where a transformers model lets an attention function in.

`TransformersHook` hands every attention call of a model to a function of ours, as one `Request` in which masks have
been reduced to what they mean (causal, window, padding, packed documents).

transformers has two registries, one for attention functions and one for mask functions. Both are needed: without the
second, masks silently become None, padding included.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import re
import sys
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tamis.call import DTYPES
from tamis.errors import UnsupportedError
from tamis.integrations.hook import Hook
from tamis.integrations.request import Request, dense
from tamis.integrations.shards import Shards
from tamis.integrations.transformers_masks import OFFSETS, Sight, mask_function, packed, read_mask

# Arguments that reach attention functions and say nothing about what attention computes.
_HARMLESS = frozenset(
    [
        "position_ids",
        "cache_position",
        "use_cache",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "logits_to_keep",
        "labels",
        "num_items_in_batch",
        "position_embeddings",
        "past_key_values",
    ]
)
_HONOURED = frozenset(("sliding_window", "softcap", "s_aux"))
_INSTEAD = "; `with tamis.sdpa():` around its calls takes over what it computes by torch's scaled_dot_product_attention"
_names = (f"tamis_{number}" for number in itertools.count())
# For every name that was ever ours what it stood in for, by the class of the configuration: configurations are copied
# and shared, and may hold a name that nobody answers to any more.
_stood_for: dict[str, dict[str, str]] = {}
_BASES = (
    "torch.",
    "transformers.modeling_",
    "transformers.generation",
    "transformers.utils",
    "transformers.integrations",
)
_registered: set[str] = set()  # names of `register`
_models: WeakValueDictionary[str, nn.Module] = WeakValueDictionary()


class TransformersHook(Hook):
    """A function installed in a transformers model, which keeps it: what is here goes when the model goes."""

    def __init__(
        self,
        model: Any,
        function: Callable[[Request], Tensor],
        *,
        means: bool = False,
        shards: Shards | None = None,
    ) -> None:
        model = _check_model(model)
        layers = attention_layers(model)
        if not layers:
            raise UnsupportedError(f"{type(model).__name__} does not take an attention function{_INSTEAD}")
        for layer in layers:
            _check_module(layer, model.get_submodule(layer))
        self._name = next(_names)
        self._configs = _configs(model)
        if taken := [own for _, own in self._configs if own in _registered]:
            raise ValueError(
                f"{type(model).__name__} runs through tamis already, by the name {taken[0]!r} of register(..): call "
                "model.set_attn_implementation('sdpa') first"
            )
        self._parts = [weakref.ref(part) for part in _pretrained(model)]
        _models[self._name] = model
        _stood_for[self._name] = {type(config).__name__: own for config, own in self._configs}
        self._handles: list[RemovableHandle] = []
        attention = _Attention(function, {module: name for name, module in model.named_modules()})
        whole_masks = any(_says(module, "allow_is_causal_skip") for module in model.modules())
        masks = partial(mask_function, shards=shards is not None, packing=not whole_masks)
        _register(self._name, _Weak(attention), masks)
        weakref.finalize(attention, _restore, self._name, self._configs).atexit = False
        try:
            model.set_attn_implementation(self._name)
            kept = [type(config).__name__ for config, _ in self._configs if config._attn_implementation != self._name]
            if kept:
                raise UnsupportedError(
                    f"{type(model).__name__} does not take an attention function (for {kept}){_INSTEAD}"
                )
            for config, own in self._configs:
                config._attn_implementation_internal = _Name(self._name, own)
            for part in _pretrained(model):
                part.__dict__[f"_{self._name}"] = _Kept(attention)
            if means:
                self._handles += _keep_means(model)
            if shards is not None:
                self._handles += shards.follow(model)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Restore the attention that was there before; safe to call twice."""
        _restore(self._name, self._configs)
        for handle in self._handles:
            handle.remove()
        for part in self._parts:
            if (module := part()) is not None:
                module.__dict__.pop(f"_{self._name}", None)


class NamedHook(Hook):
    """A function registered under a name, for models that are made with `attn_implementation=name`."""

    def __init__(self, name: str, function: Callable[[Request], Tensor]) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface

        if name in AttentionInterface._global_mapping or name in AttentionMaskInterface._global_mapping:
            raise ValueError(f"name must be new to transformers, {name!r} is registered already")
        if re.fullmatch(r"tamis_\d+", name):
            raise ValueError(f"name must not be of the kind that tamis.apply uses, got {name!r}")
        self._name = name
        _registered.add(name)
        _register(name, _Attention(function, {}), mask_function)

    def remove(self) -> None:
        """Forget the name; models that still ask for it cannot run. Safe to call twice."""
        _registered.discard(self._name)
        _unregister(self._name)


def _restore(name: str, configs: list[tuple[Any, str]]) -> None:
    """Give configurations back what they asked for, and forget a name."""
    for config, implementation in configs:
        if config._attn_implementation == name:
            config._attn_implementation_internal = implementation
    _unregister(name)


def _register(name: str, attention: _Attention | _Weak, masks: Callable[..., Tensor | None]) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, masks)


def _unregister(name: str) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface._global_mapping.pop(name, None)
    AttentionMaskInterface._global_mapping.pop(name, None)


def _keep_means(model: nn.Module) -> list[RemovableHandle]:
    from tamis.integrations.cache import keep_means

    return [module.register_forward_pre_hook(keep_means, with_kwargs=True) for module in _pretrained(model)]


def _pretrained(model: nn.Module) -> list[nn.Module]:
    from transformers import PreTrainedModel

    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]


class _Name(str):
    """A name of ours in a configuration; copies of the model, and files of it, have what stood there before."""

    own: str

    def __new__(cls, name: str, own: str) -> _Name:
        made = super().__new__(cls, name)
        made.own = own
        return made

    def __reduce__(self) -> Any:
        return str, (str(self.own),)


class _Kept:
    """What a model keeps of ours; copies of the model, and files of it, have None in its place."""

    def __init__(self, attention: _Attention) -> None:
        self.attention = attention

    def __reduce__(self) -> Any:
        return type(None), ()


class _Weak:
    """What the registries of transformers hold, so that they keep no model alive."""

    def __init__(self, attention: _Attention) -> None:
        self._attention = weakref.ref(attention)

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        attention = self._attention()
        assert attention is not None, "its name goes when it goes"
        return attention(*args, **kwargs)


class _Attention:
    """An attention function as transformers calls it, for a function of ours."""

    def __init__(self, function: Callable[[Request], Tensor], layers: dict[nn.Module, str]) -> None:
        self._function = function
        self._layers = layers

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        is_causal: bool | None = None,
        **extra: Any,
    ) -> tuple[Tensor, None]:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if extra.get("output_attentions") or _collects_weights():
            raise UnsupportedError(
                "output_attentions must be False: sparse attention has no whole map of weights. Call .remove() and "
                "model.set_attn_implementation('eager') before such a call"
            )
        if not self._layers and not torch.compiler.is_compiling():
            _check_module(_layer_name(module), module)  # of a model by name, which was never at the door
        strange = bool(self._layers) and module not in self._layers
        sight = read_mask(attention_mask, query.shape[2], key.shape[2])
        window = extra.get("sliding_window") if attention_mask is None and causal else sight.window
        if (documents := packed(sight, query, key, extra)) is not None:
            sight = Sight(None, window, (documents, documents), packed=True)
            extra = {name: item for name, item in extra.items() if name not in OFFSETS}
        sinks = extra.get("s_aux")
        request = Request(
            layer=self._layers.get(module) or _layer_name(module),
            module=module,
            query=query,
            key=key,
            value=value,
            mask=sight.mask,
            causal=causal and sight.mask is None,
            window=window,
            segments=sight.segments,
            packed=sight.packed,
            scale=scaling,
            softcap=extra.get("softcap"),
            sink_logits=None if sinks is None else sinks.reshape(-1).float(),
            dropout=dropout,
            obstacle=_obstacle(query, key, value, sight.mask, dropout, extra),
            library=partial(_library, {name: item for name, item in extra.items() if name not in _HONOURED}),
            means=getattr(key, "tamis_means", None),
        )
        # A model that shares the configuration of ours, or was copied from it: nobody asked for anything there.
        answer = dense if strange else self._function
        return answer(request).transpose(1, 2).contiguous(), None


def _collects_weights() -> bool:
    """Whether the model that is running was asked for its attention weights, in whatever way it was asked."""
    capturing = sys.modules.get("transformers.utils.output_capturing")
    if capturing is None or torch.compiler.is_compiling():
        return False
    return any("attentions" in name for name in capturing._active_collector.get() or ())


def _layer_name(module: nn.Module) -> str:
    """A name for a layer whose model is not known: its class, and its number in the model if it has one."""
    number = getattr(module, "layer_idx", None)
    return type(module).__name__ if number is None else f"{type(module).__name__}.{number}"


def _library(extra: dict[str, Any], request: Request, mask: Tensor | None, causal: bool) -> Tensor:
    """Dense attention as transformers' own "sdpa" runs it, with the arguments that tamis does not read."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    assert request.module is not None
    output, _ = sdpa_attention_forward(
        request.module,
        request.query,
        request.key,
        request.value,
        mask,
        dropout=request.dropout,
        scaling=request.scale,
        is_causal=causal,
        **extra,
    )
    return output.transpose(1, 2)


def attention_layers(model: nn.Module) -> list[str]:
    """Qualified names of the modules whose code calls an attention function, in the order of `named_modules`.

    Raises:
        TypeError: `model` is no transformers model.
    """
    from transformers import PreTrainedModel

    model = _check_model(model)
    # Models name the registry itself; PreTrainedModel does so too, to check names.
    return [
        name
        for name, module in model.named_modules()
        if not isinstance(module, PreTrainedModel) and _says(module, "ALL_ATTENTION_FUNCTIONS")
    ]


def _check_module(name: str, module: nn.Module) -> None:
    """Refuse attention that chooses tokens by itself, in a way that only attention of some names is told of.

    Raises:
        UnsupportedError: it asks for the name "sdpa", or appends compressed keys that no mask knows of.
    """
    if _says(module, "sdpa") or hasattr(module, "compressor"):
        raise UnsupportedError(
            f"{name}: {type(module).__name__} chooses by itself what its tokens see: leave it as it is"
        )


def _says(module: nn.Module, word: str) -> bool:
    kind: Any = type(module)
    return _mentions(kind, word)


@functools.cache
def _mentions(kind: Any, word: str) -> bool:
    """Whether the code of a model's class, not that of the library's base classes, has a name or a constant."""
    bases = [base for base in kind.__mro__ if not base.__module__.startswith(_BASES) and base is not object]
    functions = [item for base in bases for item in vars(base).values() if inspect.isfunction(item)]
    return any(_holds(inspect.unwrap(function).__code__, word) for function in functions)


def _holds(part: Any, word: str) -> bool:
    if inspect.iscode(part):
        return word in part.co_names or any(_holds(constant, word) for constant in part.co_consts)
    return any(_holds(item, word) for item in part) if isinstance(part, tuple) else bool(part == word)


def _check_model(model: Any) -> Any:
    """The model itself, of a compiled one what was compiled."""
    from transformers import PreTrainedModel

    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model must be a transformers PreTrainedModel, got {type(model).__name__} (which is no diffusers model "
            f"or pipeline either){_advice(model)}"
        )
    return model


def _advice(model: Any) -> str:
    """What to give instead of something that holds a model, or is none of transformers."""
    from transformers import PreTrainedModel

    parts = model.named_modules() if isinstance(model, nn.Module) else [("model", getattr(model, "model", None))]
    inner = next(((name, part) for name, part in parts if isinstance(part, PreTrainedModel)), None)
    if inner is not None:
        return f": give its .{inner[0]}, which is a {type(inner[1]).__name__}"
    return _INSTEAD if isinstance(model, nn.Module) else ""


def _obstacle(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, extra: dict[str, Any]
) -> str | None:
    if dropout > 0:
        return "dropout"
    if query.dtype not in DTYPES:
        return f"dtype {query.dtype}"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value)):
        return "gradients"
    for name, item in extra.items():
        if name not in _HONOURED and name not in _HARMLESS and item is not None and item is not False:
            return f"argument {name}"
    return "additive mask" if mask is not None and mask.dtype != torch.bool else None


def _configs(model: nn.Module) -> list[tuple[Any, str]]:
    """Every configuration inside a model once, with its present attention implementation."""
    found: dict[int, Any] = {}
    pending: list[Any] = [module.config for module in _pretrained(model)]
    while pending:
        config = pending.pop()
        if id(config) not in found:
            found[id(config)] = config
            pending += [inner for name in config.sub_configs if (inner := getattr(config, name, None)) is not None]
    return [(config, _own(config)) for config in found.values()]


def _own(config: Any) -> str:
    """What a configuration asks for; where that is a name of ours that is gone, what it stood for."""
    from transformers import AttentionInterface

    name: str = config._attn_implementation
    while name in _stood_for and name not in AttentionInterface._global_mapping:
        name = _stood_for[name].get(type(config).__name__, "sdpa")
    return name


def shares_a_hook(model: nn.Module) -> bool:
    """Whether a configuration of a model asks for a function that is installed in another model, no part of it."""
    model = getattr(model, "_orig_mod", model)
    parts = set(model.modules())
    others = [other for _, own in _configs(model) if (other := _models.get(own)) is not None]
    return any(other not in parts and model not in set(other.modules()) for other in others)
