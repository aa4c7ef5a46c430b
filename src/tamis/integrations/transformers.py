"""The place where a transformers model lets an attention function in.

`TransformersHook` hands every attention call of a model to a function of ours, as one `Request` in which masks have
been reduced to what they mean (causal, window, padding).

transformers has two registries, one for attention functions and one for mask functions. Both are needed: without the
second, masks silently become None, padding included.
"""

from __future__ import annotations

import inspect
import itertools
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
_NO_WINDOW = 2**31 - 1
_names = (f"tamis_{number}" for number in itertools.count())
# For every name that was ever ours what it stood in for, by the class of the configuration: configurations are copied
# and shared, and may hold a name that nobody answers to any more.
_stood_for: dict[str, dict[str, str]] = {}
_models: WeakValueDictionary[str, nn.Module] = WeakValueDictionary()


class TransformersHook(Hook):
    """A function installed in a transformers model, which keeps it: what is here goes when the model goes."""

    def __init__(self, model: nn.Module, function: Callable[[Request], Tensor], *, means: bool = False) -> None:
        checked = _check_model(model)
        self._name = next(_names)
        self._configs = _configs(model)
        self._parts = [weakref.ref(part) for part in _pretrained(model)]
        _models[self._name] = model
        _stood_for[self._name] = {type(config).__name__: own for config, own in self._configs}
        self._means: list[RemovableHandle] = []
        attention = _Attention(function, {module: name for name, module in model.named_modules()})
        _register(self._name, _Weak(attention))
        weakref.finalize(attention, _restore, self._name, self._configs).atexit = False
        try:
            checked.set_attn_implementation(self._name)
            kept = [type(config).__name__ for config, _ in self._configs if config._attn_implementation != self._name]
            if kept:
                raise UnsupportedError(f"{type(model).__name__} does not take an attention function (for {kept})")
            for part in _pretrained(model):
                part.__dict__[f"_{self._name}"] = _Kept(attention)
            if means:
                self._means = _keep_means(model)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Restore the attention that was there before; safe to call twice."""
        _restore(self._name, self._configs)
        for handle in self._means:
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
        self._name = name
        _register(name, _Attention(function, {}))

    def remove(self) -> None:
        """Forget the name; models that still ask for it cannot run. Safe to call twice."""
        _unregister(self._name)


def _restore(name: str, configs: list[tuple[Any, str]]) -> None:
    """Give configurations back what they asked for, and forget a name."""
    for config, implementation in configs:
        if config._attn_implementation == name:
            config._attn_implementation_internal = implementation
    _unregister(name)


def _register(name: str, attention: _Attention | _Weak) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, _mask_function)


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
        strange = bool(self._layers) and module not in self._layers
        mask, window, segments = _read_mask(attention_mask, query.shape[2], key.shape[2])
        if attention_mask is None and causal:
            window = extra.get("sliding_window")
        sinks = extra.get("s_aux")
        request = Request(
            layer=self._layers.get(module) or _layer_name(module),
            module=module,
            query=query,
            key=key,
            value=value,
            mask=mask,
            causal=causal and mask is None,
            window=window,
            segments=segments,
            scale=scaling,
            softcap=extra.get("softcap"),
            sink_logits=None if sinks is None else sinks.reshape(-1).float(),
            dropout=dropout,
            obstacle=_obstacle(query, key, value, mask, dropout, extra),
            library=partial(_library, {name: item for name, item in extra.items() if name not in _HONOURED}),
            means=getattr(key, "tamis_means", None),
        )
        # A model that shares the configuration of ours, or was copied from it: nobody asked for anything there.
        answer = dense if strange else self._function
        return answer(request).transpose(1, 2).contiguous(), None


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

    _check_model(model)
    found: dict[type, bool] = {}
    for module in model.modules():
        kind = type(module)
        if kind not in found:
            functions = [item for base in kind.__mro__ for item in vars(base).values() if inspect.isfunction(item)]
            # Models name the registry itself; PreTrainedModel does so too, to check names.
            found[kind] = not isinstance(module, PreTrainedModel) and any(
                "ALL_ATTENTION_FUNCTIONS" in inspect.unwrap(function).__code__.co_names for function in functions
            )
    return [name for name, module in model.named_modules() if found[type(module)]]


def _check_model(model: Any) -> Any:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model must be a transformers PreTrainedModel, got {type(model).__name__} (which is no diffusers model "
            "or pipeline either)"
        )
    return model


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


def _mask_function(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """What transformers asks for before a forward pass: None for plain causal, key codes for causal with a window or
    padding, and the complete bool mask for everything else.

    Key codes are int32 `[batch, 1, 1, kv_len]`: 0 for padding, else the window (`_NO_WINDOW` without one). Their dtype
    tells them from masks, whose dtypes are bool or floating.
    """
    from transformers.masking_utils import causal_mask_function, prepare_padding_mask, sdpa_mask

    pattern: Callable[..., Any] = causal_mask_function if mask_function is None else mask_function
    aligned = not isinstance(q_offset, Tensor) and q_offset + q_length == kv_offset + kv_length
    window = local_size if local_size is not None and kv_length > local_size else None
    if torch.compiler.is_compiling():
        if allow_is_causal_skip and aligned and attention_mask is None and local_size is None:
            return None
    elif (
        allow_is_causal_skip
        and aligned
        and _is_causal(pattern, (batch_size, q_length, kv_length), kv_offset, window, device)
    ):
        padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
        tokens = None if padding is None else padding[:, kv_offset : kv_offset + kv_length].to(torch.bool)
        if tokens is None or bool(tokens.all()):
            if window is None:
                return None
            tokens = torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
        codes = tokens.to(torch.int32) * (_NO_WINDOW if window is None else window)
        return codes[:, None, None, :]
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,  # type: ignore[arg-type]  # a tensor with static caches
        kv_offset=kv_offset,
        mask_function=pattern,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        device=device,
        **kwargs,
    )


def _is_causal(
    pattern: Callable[..., Tensor],
    sizes: tuple[int, int, int],
    offset: int,
    window: int | None,
    device: torch.device | str,
) -> bool:
    """Whether a pattern is causal, with a window if one is given, judged by its last two rows of every text.

    The other pattern with a local size, attention in chunks, agrees with a window in at most one of two adjacent rows.
    """
    batch, queries, keys = sizes
    last = offset + keys - 1
    texts = torch.arange(batch, device=device)[:, None, None]
    zero = torch.zeros((), dtype=torch.long, device=device)
    rows = torch.arange(last - min(queries, 2) + 1, last + 1, device=device)[:, None]
    columns = torch.arange(offset, offset + keys, device=device)[None, :]
    distance = rows - columns
    expected = (distance >= 0) & (distance < (keys + 1 if window is None else window))
    return bool((pattern(texts, zero, rows, columns) == expected).all())


def _read_mask(
    mask: Tensor | None, queries: int, keys: int
) -> tuple[Tensor | None, int | None, tuple[Tensor, Tensor] | None]:
    """Split what `_mask_function` returned into a complete mask, a window and segments."""
    if mask is None or mask.dtype != torch.int32:
        return mask, None, None
    codes = mask[:, 0, 0, :keys]
    window = int(codes.max())
    segments = (codes > 0).to(torch.int32) - 1
    padded = bool((segments < 0).any())
    return (
        None,
        None if window in (0, _NO_WINDOW) else window,
        (segments[:, keys - queries :], segments) if padded else None,
    )


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
    parts = set(model.modules())
    others = [other for _, own in _configs(model) if (other := _models.get(own)) is not None]
    return any(other not in parts and model not in set(other.modules()) for other in others)
