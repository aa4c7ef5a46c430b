"""Attention of `transformers` models through tamis: sparse where possible, dense with a counted reason elsewhere."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tamis.attend import DEFAULT_PV_THRESHOLD, attend
from tamis.errors import UnsupportedError
from tamis.integrations.hook import Hook, Request, complete_mask
from tamis.predictors.base import Predictor
from tamis.predictors.sparge import Sparge
from tamis.stats import AttentionStats


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
        predictor: Predictor,
        *,
        precision: str,
        pv_threshold: float | Tensor | None,
        backend: str | None,
        min_queries: int,
    ) -> None:
        self.predictor = predictor
        self.precision = precision
        self.pv_threshold = pv_threshold
        self.backend = backend
        self.min_queries = min_queries
        self._calls: dict[str, LayerCalls] = {}
        super().__init__(model, self._attend)

    def __enter__(self) -> Applied:
        return self

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

    def reset(self) -> None:
        """Forget the counts."""
        self._calls.clear()

    def _attend(self, request: Request) -> Tensor:
        reason = request.obstacle
        queries = request.query.shape[2]
        if reason is None and queries < self.min_queries:
            reason = "decoding" if queries == 1 else f"fewer than {self.min_queries} queries"
        if reason is None:
            try:
                return self._sparse(request)
            except UnsupportedError as error:
                if self.backend is not None:
                    raise
                reason = str(error).splitlines()[0]
        self._count(request, reason, None)
        return dense(request)

    def _sparse(self, request: Request) -> Tensor:
        geometry: dict[str, Any] = {
            "causal": request.causal,
            "window": request.window,
            "scale": request.scale,
            "attn_mask": request.mask,
            "segments": request.segments,
            "backend": self.backend,
        }
        block_mask = self.predictor(request.query, request.key, **geometry)
        result = attend(
            request.query,
            request.key,
            request.value,
            block_mask,
            softcap=request.softcap,
            sink_logits=request.sink_logits,
            precision=self.precision,
            pv_threshold=self.pv_threshold,
            **geometry,
        )
        self._count(request, None, result.stats)
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
    predictor: Predictor | None = None,
    *,
    precision: str = "int8",
    pv_threshold: float | Tensor | None = DEFAULT_PV_THRESHOLD,
    backend: str | None = None,
    min_queries: int = 128,
) -> Applied:
    """Run the attention of a transformers model through tamis until `.remove()`, or inside a `with` block.

    Calls with at least `min_queries` queries (prefill, whole or in chunks) run sparse. Decoding, and calls that ask for
    something sparse attention does not do (dropout, gradients, additive masks, arguments it does not know), run dense,
    and `dense_reasons` counts why.

    Args:
        model: a `PreTrainedModel` whose attention goes through `AttentionInterface` (Llama, Mistral, Qwen, DINOv2, ..).
        predictor: which blocks to keep; `Sparge()` by default.
        precision: "int8" or "full", as in `attend`.
        pv_threshold: as in `attend`.
        backend: run there or raise; None lets tamis choose, and calls that no backend can serve run dense.
        min_queries: shorter calls run dense.

    Returns:
        A handle with `.calls`, `.dense_reasons`, `.stats()` by layer, `.reset()` and `.remove()`.

    Raises:
        TypeError: `model` is no transformers model.
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
    return Applied(
        model,
        Sparge() if predictor is None else predictor,
        precision=precision,
        pv_threshold=pv_threshold,
        backend=backend,
        min_queries=min_queries,
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
