"""The public calls: attention whose sequence is spread over the ranks of a process group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tamis.block_mask import BlockMask
from tamis.call import PerHead
from tamis.parallel.dispatch import Layouts, exchange, peers_of, run
from tamis.parallel.layout import Layout
from tamis.parallel.request import MEASURED
from tamis.parallel.wire import peers
from tamis.predictors import Sparge
from tamis.predictors.base import Predictor
from tamis.profile.layers import LayerSettings
from tamis.stats import AttentionOutput

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mesh: DeviceMesh | None = None,
    group: ProcessGroup | None = None,
    mode: str = "heads",
    layout: Layouts | None = None,
    parts: Sequence[int] | None = None,
    predictor: Predictor | None = None,
    precision: str = "int8",
    pv_threshold: PerHead | str | None = MEASURED,
    compensate: str | None = None,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    segments: tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, Any]:
    """Sparse attention of a sequence whose tokens are spread over ranks: what one process would compute.

    Every rank of the group calls it, with the same arguments but for the tensors.

    Args:
        query, key, value: this rank's tokens, `[batch, heads, tokens, dim]`; or DTensors sharded over the sequence
            (`Shard(2)`) of a mesh with one dimension. Ranks may hold unequal numbers of tokens, also none.
        mesh, group: the ranks, one of the two; by default all processes.
        mode: "heads" (all-to-all: each rank computes some heads over all tokens) or "ring" (key and value go around).
        layout: where the tokens of all ranks are: one `Layout`, or (the query's, the key's). By default the ranks
            tell each other how many tokens they have, in every call: make it once with `exchange_layout` to save that.
        parts: how many of this rank's tokens belong to each part, e.g. (text, video), if each rank holds its share of
            every part; `keep` of a predictor and the blocks then refer to all text followed by all video.
        predictor: what chooses the blocks; None = `Sparge()`. Mode "ring" takes `Sparge` and `Window`.
        pv_threshold: as in `attend`; "measured" is the measured default in mode "heads" and off in "ring".
        precision, compensate, causal, window, scale, backend: as in `attend`.
        segments: (the query's, the key's) integers of this rank's tokens, `[tokens]` or `[batch, tokens]`; as in
            `attend`.
        return_stats: also return what all ranks computed, which costs a small exchange.

    Returns:
        The output for this rank's queries, `[batch, heads, tokens, value_dim]`, a DTensor if the query is one; with
        return_stats (output, `AttentionStats`).

    Raises:
        TypeError, ValueError: an argument is wrong, or the ranks' shapes or arguments do not fit together.
        UnsupportedError: the mode cannot honour an argument, or no backend can serve the call.
        RuntimeError: an exchange failed, because a rank has died or is late by more than the group's timeout.

    Source: DeepSpeed-Ulysses (arXiv 2309.14509), Ring Attention (arXiv 2310.01889), SpargeAttn (arXiv 2502.18137).

    Example:
        >>> import os, tempfile, torch, tamis.parallel
        >>> store = "file://" + os.path.join(tempfile.mkdtemp(), "store")
        >>> torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        >>> query, key, value = (torch.randn(1, 4, 1024, 64) for _ in range(3))
        >>> tamis.parallel.sparse_attention(query, key, value, causal=True).shape
        torch.Size([1, 4, 1024, 64])
        >>> torch.distributed.destroy_process_group()
    """
    made: dict[str, Any] = {
        "predictor": Sparge() if predictor is None else predictor,
        "precision": precision,
        "pv_threshold": pv_threshold,
        "compensate": compensate,
        "causal": causal,
        "window": window,
        "scale": scale,
        "backend": backend,
    }
    where = (peers_of(query, mesh, group), mode, layout, parts)
    result = run((query, key, value), made, segments, where, lse=False, stats=return_stats)
    return (result.output, result.stats) if return_stats else result.output


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask | None = None,
    *,
    mesh: DeviceMesh | None = None,
    group: ProcessGroup | None = None,
    mode: str = "heads",
    layout: Layouts | None = None,
    parts: Sequence[int] | None = None,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    segments: tuple[Tensor, Tensor] | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    precision: str = "full",
    pv_threshold: PerHead | None = None,
    compensate: str | None = None,
    backend: str | None = None,
    return_stats: bool = False,
) -> AttentionOutput:
    """Attention, dense or by a given mask, of a sequence whose tokens are spread over ranks.

    Args:
        block_mask: of the whole sequence, the same on every rank; None is dense.
        softcap, sink_logits, precision, pv_threshold, compensate: as in `tamis.attend`; of all heads.
        return_stats: fill `stats` with what all ranks computed, which costs a small exchange; else it is None.

    The others are as in `sparse_attention`.

    Returns:
        `AttentionOutput` for this rank's queries.

    Raises:
        As `sparse_attention`.

    Example:
        >>> import os, tempfile, torch, tamis, tamis.parallel
        >>> store = "file://" + os.path.join(tempfile.mkdtemp(), "store")
        >>> torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        >>> query, key, value = (torch.randn(1, 4, 512, 32) for _ in range(3))
        >>> tamis.parallel.attend(query, key, value, mode="ring").lse.shape
        torch.Size([1, 4, 512])
        >>> torch.distributed.destroy_process_group()
    """
    made: dict[str, Any] = {
        "block_mask": block_mask,
        "precision": precision,
        "pv_threshold": pv_threshold,
        "compensate": compensate,
        "causal": causal,
        "window": window,
        "scale": scale,
        "softcap": softcap,
        "sink_logits": sink_logits,
        "backend": backend,
    }
    where = (peers_of(query, mesh, group), mode, layout, parts)
    return run((query, key, value), made, segments, where, lse=True, stats=return_stats)


def layer_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    settings: LayerSettings,
    *,
    mesh: DeviceMesh | None = None,
    group: ProcessGroup | None = None,
    mode: str = "heads",
    layout: Layouts | None = None,
    parts: Sequence[int] | None = None,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    segments: tuple[Tensor, Tensor] | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One layer of a model with its settings of a `Profile`, whose numbers per head go to the ranks of the heads.

    The arguments are those of `sparse_attention` and `attend`. A layer without a predictor runs dense.

    Raises:
        As `sparse_attention`.
    """
    made: dict[str, Any] = {
        "predictor": settings.predictor,
        "precision": settings.precision,
        "pv_threshold": settings.pv_threshold,
        "compensate": settings.compensate,
        "causal": causal,
        "window": window,
        "scale": scale,
        "softcap": softcap,
        "sink_logits": sink_logits,
        "backend": backend,
    }
    where = (peers_of(query, mesh, group), mode, layout, parts)
    return run((query, key, value), made, segments, where, lse=False, stats=False).output


def exchange_layout(
    tokens: int | Sequence[int], *, mesh: DeviceMesh | None = None, group: ProcessGroup | None = None
) -> Layout:
    """The layout of a sequence of which this rank holds so many tokens, or so many of every part, e.g. (text, video).

    Every rank of the group must call it at the same time, and again when any rank's number of tokens has changed.

    Raises:
        ValueError: a number is negative, or ranks have different numbers of parts.
    """
    own = (tokens,) if isinstance(tokens, int) else tuple(tokens)
    return exchange(own, None, {}, peers(mesh, group))[0]
