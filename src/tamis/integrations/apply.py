"""`tamis.apply`: a model's attention sparse in one line."""

from __future__ import annotations

import re
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

from torch import nn

from tamis.call import PerHead
from tamis.errors import UnsupportedError
from tamis.integrations.applied import Applied
from tamis.integrations.audit import Audit
from tamis.integrations.decoding import Decode
from tamis.integrations.hook import attention_layers, cut_by, install, models_of, shares_a_hook
from tamis.integrations.schedule import Chooser, Schedule
from tamis.integrations.settings import check_backend, check_min_queries, uniform
from tamis.integrations.spread import Spread
from tamis.predictors.base import Predictor
from tamis.predictors.sparge import Sparge
from tamis.profile import LayerSettings, Profile, Stage

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

# Modules of models that run through tamis, and whose handle they are.
_applied: WeakKeyDictionary[nn.Module, weakref.ref[Applied]] = WeakKeyDictionary()


def apply(
    model: Any,
    predictor: Predictor | Profile | None = None,
    *,
    precision: str | None = None,
    pv_threshold: PerHead | Literal["default"] | None = "default",
    compensate: str | None = None,
    backend: str | None = None,
    min_queries: int | Literal["auto"] = 128,
    schedule: Schedule | None = None,
    audit: float | Audit | None = None,
    decode: float | Decode | None = None,
    mesh: DeviceMesh | ProcessGroup | None = None,
    mode: Literal["heads", "ring"] = "heads",
    order: str | None = None,
) -> Applied:
    """Run the attention of a transformers or diffusers model through tamis until `.remove()`, or in a `with` block.

    Calls with at least `min_queries` queries (prefill, whole or in chunks) run sparse. Decoding, cross-attention of
    diffusers, and calls that ask for something sparse attention does not do (dropout, gradients, additive masks,
    arguments it does not know), run dense, and `dense_reasons` counts why.

    Args:
        model: a `PreTrainedModel` whose attention goes through `AttentionInterface` (Llama, Mistral, Qwen, DINOv2, ..),
            a transformer of diffusers (Wan, Flux, ..), or a pipeline that has one (docs/diffusers.md); compiled or not.
        predictor: which blocks to keep, in all layers, by default `Sparge()`; or a `Profile` with the settings of every
            layer, by its exact name. Layers that the profile does not name run dense.
        precision: "int8" or "full", as in `attend`; "int8" by default. Not with a profile, which has its own.
        pv_threshold: as in `attend`, or "default" for its measured default, and for none in mode "ring", which takes no
            other. Not with a profile, but for None in mode "ring", which computes what its thresholds would skip.
        compensate: as in `attend`. Not with a profile.
        backend: run there or raise; None lets tamis choose, and calls that no backend can serve run dense.
        min_queries: shorter calls run dense. "auto": calls run dense that are shorter than the length from which on
            sparse attention is faster, measured in seconds at the first call of its kind and kept for this machine.
            In a compiled graph everything runs dense if the model has not been called before.
        schedule: which steps and layers run dense or with other predictors (`tamis.integrations.schedule`).
        decode: what one query at a time reads of a long cache: the share of its key blocks whose mean key scores most,
            e.g. .25, or a `Decode` (`tamis.integrations.decoding`). None: everything, densely. For
            decoders of transformers with growing caches, without padding.
        mesh: the ranks, a mesh of one dimension or a process group. Every rank calls a model of transformers with its
            part of the tokens and their `position_ids`, in the order of the ranks and without a cache, and gets its
            part of the output. A model of diffusers is cut inside: every rank gives and gets the whole; one that
            `enable_parallelism` has cut runs on the ranks of that. `min_queries` does not count, and calls that
            cannot run spread raise on all ranks.
        mode: with a mesh: "heads" or "ring", as in `tamis.parallel.attend`.
        audit: check so large a share of the work against dense attention while the model runs, e.g. .005, or an
            `Audit` (`tamis.integrations.audit`). It changes no output; `handle.audit()` reports.
        order: in which order the tokens of an image or video stand inside of a diffusers model, "hilbert" or another of
            `tamis.order.KINDS`; None leaves them row by row. The output's tokens stand as ever.

    Returns:
        A handle with `.calls`, `.traced`, `.dense_reasons`, `.stats()` by layer, `.audit()`, `.step`, `.start()`,
        `.reset()` and `.remove()`.

    Raises:
        TypeError: `model` is of neither library, or an argument has the wrong type.
        ValueError: the profile is of another class of models or number of heads, it or the schedule names a layer that
            the model does not have, an argument is given beside a profile that has its own, or is out of its range.
            The model runs through tamis already, or shares its configuration with one that does.
        UnsupportedError: the model does not take attention functions, or its tokens have no order that tamis knows.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        ...                      num_key_value_heads=1, vocab_size=64)
        >>> model = LlamaForCausalLM(config).eval()
        >>> with torch.no_grad(), apply(model) as handle:
        ...     _ = model(torch.zeros(1, 256, dtype=torch.long))
        >>> handle.calls
        {'sparse': 1, 'dense': 0}
    """
    by_itself, way = cut_by(model), str(mode)
    if by_itself is not None:
        if mesh is not None:
            raise ValueError(f"mesh must be None: enable_parallelism has cut {type(model).__name__} already")
        mesh, way = by_itself
    if mesh is not None and way == "ring":
        predictor, pv_threshold = _without_threshold(predictor, pv_threshold)
    source = _source(predictor, precision, pv_threshold, compensate)
    check_backend(backend)
    check_min_queries(min_queries)
    if isinstance(source, Profile):
        _check_profile(source, model)
    if mesh is not None and (audit is not None or decode is not None or order is not None):
        raise ValueError("audit, decode and order must be None with a mesh: they look at the whole sequence")
    if mode not in ("heads", "ring"):
        raise ValueError(f"mode must be 'heads' or 'ring', got {mode!r}")
    spread = None if mesh is None else Spread(mesh, way)
    layers = attention_layers(model)
    chooser = Chooser(source, schedule, layers)
    if applied(model) is not None:
        raise ValueError(
            f"{type(model).__name__} runs through tamis already: .remove() that handle first "
            "(tamis.integrations.apply.applied(model) has it)"
        )
    if shares_a_hook(model):
        raise ValueError(
            f"{type(model).__name__} shares its configuration with a model that runs through tamis: give it a copy"
        )
    handle = Applied(
        partial(install, model, means=decode is not None, order=order, named=chooser.by_layer, spread=spread),
        chooser,
        backend=backend,
        min_queries=min_queries,
        audit=audit if audit is None or isinstance(audit, Audit) else Audit(share=audit),
        decode=None if decode is None else decode if isinstance(decode, Decode) else Decode(share=decode),
        spread=spread,
    )
    if isinstance(source, Profile) and (missing := _left_out(source, layers)):
        warnings.warn(
            f"the profile has no settings for {len(missing)} of the model's {len(layers)} attention layers, which run "
            f"dense: {', '.join(missing[:3])}{', ..' if len(missing) > 3 else ''}. Tune this model, or say so with "
            "LayerSettings(None)",
            RuntimeWarning,
            stacklevel=2,
        )
    _applied.update((module, weakref.ref(handle)) for module in _modules(model))
    return handle


def applied(model: Any) -> Applied | None:
    """The handle of a model that runs through tamis, for whoever did not keep what `apply` returned; None if none does.

    A model keeps its handle itself, and takes it along when it goes.

    Args:
        model: as in `apply`. Of a model that has handles on several of its parts, the first.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from tamis.integrations.apply import applied, apply
        >>> config = LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        ...                      num_key_value_heads=1, vocab_size=64)
        >>> model = LlamaForCausalLM(config)
        >>> _ = apply(model)
        >>> applied(model).remove()
        >>> applied(model) is None
        True
    """
    handles = (known() for module in _modules(model) if (known := _applied.get(module)) is not None)
    return next((handle for handle in handles if handle is not None and not handle.removed), None)


def _modules(model: Any) -> list[nn.Module]:
    return [module for part in models_of(model).values() for module in part.modules()]


def register(
    name: str = "tamis",
    predictor: Predictor | None = None,
    *,
    precision: str | None = None,
    pv_threshold: PerHead | Literal["default"] | None = "default",
    compensate: str | None = None,
    backend: str | None = None,
    min_queries: int | Literal["auto"] = 128,
) -> Applied:
    """Let transformers models be made with `attn_implementation="tamis"`, all with the same settings.

    Args:
        name: what models ask for. `transformers.AttentionInterface().valid_keys()` has it while it is known.
        predictor, precision, pv_threshold, compensate, backend, min_queries: as in `apply`.

    Returns:
        A handle over all models that use the name; layers are named by their class and number. `.remove()` forgets the
        name: models that still ask for it cannot run.

    Raises:
        ValueError: the name is registered already or one that `apply` uses, or an argument is out of its range.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from tamis.integrations.apply import register
        >>> config = LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        ...                      num_key_value_heads=1, vocab_size=64, attn_implementation="tamis")
        >>> with register() as handle, torch.no_grad():
        ...     _ = LlamaForCausalLM(config).eval()(torch.zeros(1, 256, dtype=torch.long))
        >>> handle.calls
        {'sparse': 1, 'dense': 0}
    """
    from tamis.integrations.transformers import NamedHook

    check_backend(backend)
    check_min_queries(min_queries)
    chooser = Chooser(uniform(predictor, precision, pv_threshold, compensate), None, ())
    return Applied(partial(NamedHook, name), chooser, backend=backend, min_queries=min_queries)


def _left_out(profile: Profile, layers: Sequence[str]) -> list[str]:
    """Layers that a profile of a whole model does not name, though it names others that differ in the number alone.

    Layers that tuning could not see, such as all of a decoder that writes token by token, are not among them.
    """
    kinds = {re.sub(r"\d+", "#", name) for name in profile.layers} if profile.model else set()
    return [name for name in layers if name not in profile.layers and re.sub(r"\d+", "#", name) in kinds]


def _check_profile(profile: Profile, model: Any) -> None:
    """Refuse a profile of another class of models, or of layers with other heads, as far as both say."""
    models = models_of(model)
    kinds = [type(part).__name__ for part in models.values()]
    if kinds and profile.model not in ("", *kinds):
        raise ValueError(f"the profile is for {profile.model}, the model is {' and '.join(kinds)}: tune this one")
    modules = {prefix + name: module for prefix, part in models.items() for name, module in part.named_modules()}
    for layer, stages in profile.layers.items():
        heads, found = _heads(modules.get(layer)), {size for stage in stages for size in _sizes(stage)}
        if heads is not None and found - {heads}:
            raise ValueError(f"the profile has settings for {max(found)} heads in {layer}, the model has {heads} there")


def _without_threshold(
    predictor: Predictor | Profile | None, pv_threshold: PerHead | Literal["default"] | None
) -> tuple[Predictor | Profile | None, PerHead | Literal["default"] | None]:
    """Both for mode "ring", where a threshold would depend on the number of ranks: none, or an error right here."""
    default = isinstance(pv_threshold, str) and pv_threshold == "default"
    if not isinstance(predictor, Profile):
        if not default and pv_threshold is not None:
            raise UnsupportedError(
                "pv_threshold must be None in mode 'ring', where it would depend on the number of ranks: leave it out, "
                "or use mode='heads'"
            )
        return predictor, None
    bare: dict[str, tuple[Stage, ...]] = {}
    for layer, stages in predictor.layers.items():
        bare[layer] = tuple(replace(stage, settings=replace(stage.settings, pv_threshold=None)) for stage in stages)
        if default and any(_is_set(stage.settings.pv_threshold) for stage in stages):
            raise UnsupportedError(
                f"the profile has a pv_threshold in {layer}, which in mode 'ring' would depend on the number of ranks: "
                "use mode='heads', or give pv_threshold=None to compute what it would skip"
            )
    given = not default and pv_threshold is not None
    return replace(predictor, layers=bare), pv_threshold if given else "default"


def _is_set(pv_threshold: float | tuple[float, ...] | None) -> bool:
    numbers = pv_threshold if isinstance(pv_threshold, tuple) else (pv_threshold,)
    return any(number is not None and number != float("inf") for number in numbers)


def _heads(module: nn.Module | None) -> int | None:
    """Query heads of an attention layer, where it says how many."""
    places = [(module, name) for name in ("num_heads", "num_attention_heads", "heads")]
    places.append((getattr(module, "config", None), "num_attention_heads"))
    return next((found for place, name in places if isinstance(found := getattr(place, name, None), int)), None)


def _sizes(stage: Stage) -> set[int]:
    """Lengths of what a stage gives by the head."""
    predictor = stage.settings.predictor
    per_head: list[Any] = [stage.settings.pv_threshold]
    if isinstance(predictor, Sparge):
        per_head += [predictor.cdf, predictor.topk, predictor.similarity]
    if stage.evidence is not None:
        per_head.append(stage.evidence.density)
    return {len(numbers) for numbers in per_head if isinstance(numbers, tuple)}


def _source(
    predictor: Predictor | Profile | None,
    precision: str | None,
    pv_threshold: PerHead | str | None,
    compensate: str | None,
) -> LayerSettings | Profile:
    """What settings come from; a profile has its own of everything."""
    if predictor is not None and not isinstance(predictor, (Profile, str, Path)) and not callable(predictor):
        raise TypeError(f"predictor must be a predictor or a Profile, got {type(predictor).__name__}")
    if not isinstance(predictor, Profile):
        return uniform(predictor, precision, pv_threshold, compensate)
    for name, given in (
        ("precision", precision is not None),
        ("pv_threshold", not (isinstance(pv_threshold, str) and pv_threshold == "default")),
        ("compensate", compensate is not None),
    ):
        if given:
            raise ValueError(f"{name} must not be given with a profile, which has its own for every layer")
    return predictor
