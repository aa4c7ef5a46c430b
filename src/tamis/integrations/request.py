"""One attention call of a model, and its two answers: sparse through tamis, and dense."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tamis.attend import attend
from tamis.errors import UnsupportedError
from tamis.predictors.base import Keep, Predictor, also_keep
from tamis.profile import LayerSettings
from tamis.stats import AttentionOutput

if TYPE_CHECKING:
    from tamis.integrations.decoding import KeyMeans


@dataclass(frozen=True)
class Request:
    """One attention call of a model; tensors are `[batch, heads, seq, head_dim]`, keys may have fewer heads.

    Attributes:
        layer: qualified name of the attention module, or what else tells kinds of calls apart.
        module: None where a call belongs to no module.
        mask: a complete mask, bool or additive, broadcastable to `[batch, heads, q_len, kv_len]`, or None.
        causal: row i sees keys up to its own, both sequences aligned at their ends. False with a complete mask.
        segments: 0 for tokens and -1 for padding, `[batch, q_len]` and `[batch, kv_len]`, or None.
        packed: segments number documents instead, none of which sees another.
        obstacle: why this call can only run dense, or None.
        library: dense attention as the model's own library runs it, given the request, a mask and whether it is causal.
        means: of the key's blocks, where the cache keeps them (`Decode`).
        original: the very call that the model made, where that is known; None if not.
        keep: tokens that sparse attention must keep, such as the text of an image model.
        parts: where tokens are spread over ranks, how many of this rank's belong to each part of the whole sequence.
        whole: where tokens are spread over ranks, whether this call's keys are all here, as those of cross-attention.
    """

    layer: str
    module: nn.Module | None
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    causal: bool
    window: int | None
    segments: tuple[Tensor, Tensor] | None
    scale: float | None
    softcap: float | None
    sink_logits: Tensor | None
    dropout: float
    obstacle: str | None
    library: Callable[[Request, Tensor | None, bool], Tensor] = field(default_factory=lambda: torch_attention)
    means: KeyMeans | None = None
    original: Callable[[], Tensor] | None = None
    keep: Keep | None = None
    packed: bool = False
    parts: tuple[int, ...] | None = None
    whole: bool = False


def complete_mask(request: Request) -> Tensor | None:
    """The mask that says what causal, window, padding and documents say, bool `[batch, 1, q_len, kv_len]`."""
    if request.mask is not None:
        return request.mask
    queries, keys = request.query.shape[2], request.key.shape[2]
    device = request.query.device
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    visible = distance >= 0 if request.causal else torch.ones_like(distance, dtype=torch.bool)
    if request.window is not None:
        visible = visible & (distance.abs() < request.window)
    visible = visible[None, None]
    if request.segments is not None:
        rows, columns = (numbers[:, None] for numbers in request.segments)
        # Rows of padding are nobody's: they see what the others see, as in the models, and are not NaN.
        visible = (
            visible & (columns >= 0)[:, :, None] & ((rows[..., None] == columns[:, :, None]) | (rows < 0)[..., None])
        )
    return visible


def sparse(request: Request, settings: LayerSettings, backend: str | None) -> AttentionOutput:
    """Sparse attention of a request.

    Raises:
        UnsupportedError: no backend can serve it, or the predictor cannot be told which tokens to keep.
    """
    geometry: dict[str, Any] = {
        "causal": request.causal,
        "window": request.window,
        "scale": request.scale,
        "attn_mask": request.mask,
        "segments": request.segments,
        "backend": backend,
    }
    assert settings.predictor is not None
    predictor: Predictor = settings.predictor if request.keep is None else also_keep(settings.predictor, request.keep)
    return attend(
        request.query,
        request.key,
        request.value,
        predictor(request.query, request.key, **geometry),
        softcap=request.softcap,
        sink_logits=request.sink_logits,
        precision=settings.precision,
        pv_threshold=settings.pv_threshold,
        compensate=settings.compensate,
        **geometry,
    )


def dense(request: Request) -> Tensor:
    """Dense attention of a request: the model's own call if there is one, else torch where torch can, and tamis for
    window, softcap, sinks and aligned ends.

    Raises:
        UnsupportedError: softcap or sinks together with what no backend does, such as gradients.
    """
    if request.original is not None:
        return request.original()
    ours_alone = request.softcap is not None or request.sink_logits is not None
    aligned = not request.causal or request.query.shape[2] in (1, request.key.shape[2])
    if not ours_alone and aligned and request.window is None and request.segments is None:
        return request.library(request, request.mask, request.causal)
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
    return request.library(request, complete_mask(request), False)


def torch_attention(request: Request, mask: Tensor | None, causal: bool) -> Tensor:
    """Dense attention by `scaled_dot_product_attention`."""
    return F.scaled_dot_product_attention(
        request.query,
        request.key,
        request.value,
        mask,
        request.dropout,
        causal,
        scale=request.scale,
        enable_gqa=request.query.shape[1] != request.key.shape[1],
    )
