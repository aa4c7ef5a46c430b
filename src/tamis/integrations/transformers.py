"""Attention of `transformers` models through tamis: sparse where possible, dense with a counted reason elsewhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tamis.attend import DEFAULT_PV_THRESHOLD, attend
from tamis.call import PerHead
from tamis.errors import UnsupportedError
from tamis.integrations.audit import Audit, Auditor, LayerAudit
from tamis.integrations.break_even import BreakEven, break_even, can_measure
from tamis.integrations.hook import Hook, Request, attention_layers, complete_mask
from tamis.integrations.schedule import Chooser, Schedule
from tamis.predictors.base import Predictor
from tamis.predictors.sparge import Sparge
from tamis.profile import LayerSettings, Profile
from tamis.stats import AttentionOutput, AttentionStats


@dataclass
class LayerCalls:
    """What one attention layer did since the model was hooked: counts, and the stats of its last sparse call."""

    sparse: int = 0
    dense: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    last: AttentionStats | None = None


class Applied(Hook):
    """A model whose attention runs through tamis. Not counted while a graph is compiled."""

    def __init__(
        self,
        model: nn.Module,
        chooser: Chooser,
        *,
        backend: str | None,
        min_queries: int | Literal["auto"],
        audit: Audit | None,
    ) -> None:
        self.backend = backend
        self.min_queries = min_queries
        self._chooser = chooser
        self._auditor = None if audit is None else Auditor(audit)
        self._calls: dict[str, LayerCalls] = {}
        self._break_even: dict[str, tuple[tuple[object, ...], BreakEven]] = {}
        super().__init__(model, self._attend)

    def __enter__(self) -> Applied:
        return self

    @property
    def step(self) -> int | None:
        """The step of a diffusion model that runs now; None while it is counted from the calls."""
        return self._chooser.step

    @step.setter
    def step(self, step: int) -> None:
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ValueError(f"step must be an integer of at least 0, got {step!r}")
        self._chooser.step = step

    def start(self) -> None:
        """Begin a new image or video: steps count from 0 again. Counts and audit go on."""
        self._chooser.start()

    @property
    def calls(self) -> dict[str, int]:
        """Number of calls that ran sparse and dense, over all layers."""
        layers = self._calls.values()
        return {"sparse": sum(layer.sparse for layer in layers), "dense": sum(layer.dense for layer in layers)}

    @property
    def dense_reasons(self) -> Counter[str]:
        """How many calls ran dense for which reason."""
        return sum((layer.reasons for layer in self._calls.values()), Counter())

    def stats(self) -> dict[str, LayerCalls]:
        """Counts and last stats by the qualified name of the layer."""
        return dict(self._calls)

    def audit(self) -> dict[str, LayerAudit]:
        """Estimated error of every layer since the model was hooked or `reset`, by its qualified name.

        Raises:
            ValueError: no audit was asked for.
        """
        if self._auditor is None:
            raise ValueError("there is no audit: give apply(.., audit=0.005)")
        return self._auditor.report()

    def reset(self) -> None:
        """Forget the counts, the steps and the audit's samples."""
        self._calls.clear()
        self._chooser.start()
        if self._auditor is not None:
            self._auditor.reset()

    def _attend(self, request: Request) -> Tensor:
        choice = self._chooser.choose(request.layer)
        reason = request.obstacle or self._too_few(request.query.shape[2]) or choice.dense
        if reason is None:
            try:
                reason = self._too_slow(request, choice.settings) if self.min_queries == "auto" else None
                if reason is None:
                    return self._sparse(request, choice.settings)
            except UnsupportedError as error:
                if self.backend is not None:
                    raise
                reason = str(error).splitlines()[0]
        self._count(request, reason, None)
        return dense(request)

    def _too_few(self, queries: int) -> str | None:
        least = 2 if self.min_queries == "auto" else self.min_queries
        if queries >= least:
            return None
        return "decoding" if queries == 1 else f"fewer than {least} queries"

    def _too_slow(self, request: Request, settings: LayerSettings) -> str | None:
        known = self._break_even.get(request.layer)
        if can_measure(request.query.device):
            # What of a layer's calls may change; the whole key takes as long as a short call.
            query, threads = request.query, torch.get_num_threads()
            kind = (id(settings.predictor), query.dtype, query.device, request.causal, request.window, threads)
            if known is None or known[0] != kind:
                known = kind, break_even(request, settings, self.backend, dense, sparse)
                self._break_even[request.layer] = known
        if known is None:
            return "the break-even is not known inside of a graph: call the model once before"
        return known[1].reason(request.query.shape[2])

    def _sparse(self, request: Request, settings: LayerSettings) -> Tensor:
        result = sparse(request, settings, self.backend)
        self._count(request, None, result.stats)
        if self._auditor is not None and can_measure(request.query.device):
            self._auditor.look(request, result.output)
        return result.output

    def _count(self, request: Request, reason: str | None, stats: AttentionStats | None) -> None:
        if torch.compiler.is_compiling():
            return
        layer = self._calls.setdefault(request.layer, LayerCalls())
        if reason is None:
            layer.sparse += 1
            layer.last = stats
        else:
            layer.dense += 1
            layer.reasons[reason] += 1


def apply(
    model: nn.Module,
    predictor: Predictor | Profile | None = None,
    *,
    precision: str | None = None,
    pv_threshold: PerHead | Literal["default"] | None = "default",
    compensate: str | None = None,
    backend: str | None = None,
    min_queries: int | Literal["auto"] = 128,
    schedule: Schedule | None = None,
    audit: float | Audit | None = None,
) -> Applied:
    """Run the attention of a transformers model through tamis until `.remove()`, or inside a `with` block.

    Calls with at least `min_queries` queries (prefill, whole or in chunks) run sparse. Decoding, and calls that ask for
    something sparse attention does not do (dropout, gradients, additive masks, arguments it does not know), run dense,
    and `dense_reasons` counts why.

    Args:
        model: a `PreTrainedModel` whose attention goes through `AttentionInterface` (Llama, Mistral, Qwen, DINOv2, ..).
        predictor: which blocks to keep, in all layers, by default `Sparge()`; or a `Profile` with the settings of every
            layer, by its exact name. Layers that the profile does not name run dense.
        precision: "int8" or "full", as in `attend`; "int8" by default. Not with a profile, which has its own.
        pv_threshold: as in `attend`, or "default" for its measured default. Not with a profile.
        compensate: as in `attend`. Not with a profile.
        backend: run there or raise; None lets tamis choose, and calls that no backend can serve run dense.
        min_queries: shorter calls run dense. "auto": calls run dense that are shorter than the length from which on
            sparse attention is faster, measured in seconds at the first call of its kind and kept for this machine.
            In a compiled graph everything runs dense if the model has not been called before.
        schedule: which steps and layers run dense or with other predictors (`tamis.integrations.schedule`).
        audit: check so large a share of the work against dense attention while the model runs, e.g. .005, or an
            `Audit` (`tamis.integrations.audit`). It changes no output; `handle.audit()` reports.

    Returns:
        A handle with `.calls`, `.dense_reasons`, `.stats()` by layer, `.audit()`, `.step`, `.start()`, `.reset()` and
        `.remove()`.

    Raises:
        TypeError: `model` is no transformers model, or an argument has the wrong type.
        ValueError: the profile or the schedule names a layer that the model does not have, an argument is given beside
            a profile that has its own, or is out of its range.
        UnsupportedError: the model does not take attention functions.

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
    if isinstance(predictor, Profile):
        for name, given in (
            ("precision", precision is not None),
            ("pv_threshold", not (isinstance(pv_threshold, str) and pv_threshold == "default")),
            ("compensate", compensate is not None),
        ):
            if given:
                raise ValueError(f"{name} must not be given with a profile, which has its own for every layer")
        source: LayerSettings | Profile = predictor
    else:
        source = _uniform(predictor, precision, pv_threshold, compensate)
    if isinstance(min_queries, str) and min_queries != "auto":
        raise ValueError(f"min_queries must be an integer or 'auto', got {min_queries!r}")
    if audit is not None and not isinstance(audit, Audit):
        audit = Audit(share=audit)
    return Applied(
        model,
        Chooser(source, schedule, attention_layers(model)),
        backend=backend,
        min_queries=min_queries,
        audit=audit,
    )


def _uniform(
    predictor: Predictor | None,
    precision: str | None,
    pv_threshold: PerHead | str | None,
    compensate: str | None,
) -> LayerSettings:
    """The same settings for every layer."""
    if isinstance(pv_threshold, str) and pv_threshold != "default":
        raise ValueError(f"pv_threshold must be a number, one per head, None or 'default', got {pv_threshold!r}")
    return LayerSettings(
        Sparge() if predictor is None else predictor,
        pv_threshold=_plain(pv_threshold),
        precision="int8" if precision is None else precision,
        compensate=compensate,
    )


def _plain(pv_threshold: Any) -> float | tuple[float, ...] | None:
    """As settings hold it; what is no threshold `attend` refuses."""
    if isinstance(pv_threshold, str):
        return DEFAULT_PV_THRESHOLD
    if isinstance(pv_threshold, Tensor):
        pv_threshold = pv_threshold.tolist()
    return tuple(pv_threshold) if isinstance(pv_threshold, Sequence) else pv_threshold


def sparse(request: Request, settings: LayerSettings, backend: str | None) -> AttentionOutput:
    """Sparse attention of a request."""
    geometry: dict[str, Any] = {
        "causal": request.causal,
        "window": request.window,
        "scale": request.scale,
        "attn_mask": request.mask,
        "segments": request.segments,
        "backend": backend,
    }
    assert settings.predictor is not None
    return attend(
        request.query,
        request.key,
        request.value,
        settings.predictor(request.query, request.key, **geometry),
        softcap=request.softcap,
        sink_logits=request.sink_logits,
        precision=settings.precision,
        pv_threshold=settings.pv_threshold,
        compensate=settings.compensate,
        **geometry,
    )


def dense(request: Request) -> Tensor:
    """Dense attention of a request: torch where torch can, tamis for window, softcap, sinks and aligned ends.

    Raises:
        UnsupportedError: softcap or sinks together with what no backend does, such as gradients.
    """
    ours_alone = request.softcap is not None or request.sink_logits is not None
    aligned = not request.causal or request.query.shape[2] in (1, request.key.shape[2])
    if not ours_alone and aligned and request.window is None and request.segments is None:
        return _torch_attention(request, request.mask, request.causal)
    if ours_alone or request.obstacle is None:
        try:
            return attend(
                request.query,
                request.key,
                request.value,
                causal=request.causal,
                window=request.window,
                scale=request.scale,
                attn_mask=request.mask,
                segments=request.segments,
                softcap=request.softcap,
                sink_logits=request.sink_logits,
            ).output
        except UnsupportedError:
            if ours_alone:
                raise
    return _torch_attention(request, complete_mask(request), False)


def _torch_attention(request: Request, mask: Tensor | None, causal: bool) -> Tensor:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    output, _ = sdpa_attention_forward(
        request.module,
        request.query,
        request.key,
        request.value,
        mask,
        dropout=request.dropout,
        scaling=request.scale,
        is_causal=causal,
        **request.extra,
    )
    return output.transpose(1, 2)
