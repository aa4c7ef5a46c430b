"""The public calls: attention whose sequence is spread over the ranks of a process group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from tamis.block_mask import BlockMask
from tamis.call import DTYPES, PerHead, refuse_gradients
from tamis.packed import check_tensor
from tamis.parallel.heads import attend_heads
from tamis.parallel.layout import Layout
from tamis.parallel.request import MEASURED, Request, threshold_of
from tamis.parallel.ring import attend_ring
from tamis.parallel.wire import Peers, peers
from tamis.predictors import Sparge
from tamis.predictors.base import Predictor
from tamis.profile.layers import LayerSettings
from tamis.stats import AttentionOutput

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

Layouts: TypeAlias = "Layout | tuple[Layout, Layout]"
MODES = ("heads", "ring")
_MOST_PARTS = 8


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
        "pv_threshold": threshold_of(pv_threshold, mode),
        "compensate": compensate,
        "causal": causal,
        "window": window,
        "scale": scale,
        "backend": backend,
    }
    where = (_peers(query, mesh, group), mode, layout, parts)
    result = _run((query, key, value), made, segments, where, lse=False, stats=return_stats)
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
    if block_mask is not None and not isinstance(block_mask, BlockMask):
        raise TypeError(f"block_mask must be a tamis.BlockMask or None, got {type(block_mask).__name__}")
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
    where = (_peers(query, mesh, group), mode, layout, parts)
    return _run((query, key, value), made, segments, where, lse=True, stats=return_stats)


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
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    segments: tuple[Tensor, Tensor] | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One layer of a model with its settings of a `Profile`, whose numbers per head go to the ranks of the heads.

    The arguments are those of `attend`. A layer without a predictor runs dense.

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
    where = (_peers(query, mesh, group), mode, layout, None)
    return _run((query, key, value), made, segments, where, lse=False, stats=False).output


def exchange_layout(
    tokens: int | Sequence[int], *, mesh: DeviceMesh | None = None, group: ProcessGroup | None = None
) -> Layout:
    """The layout of a sequence of which this rank holds so many tokens, or so many of every part, e.g. (text, video).

    Every rank of the group must call it at the same time, and again when any rank's number of tokens has changed.

    Raises:
        ValueError: a number is negative, or ranks have different numbers of parts.
    """
    own = (tokens,) if isinstance(tokens, int) else tuple(tokens)
    return _exchange(own, None, (), peers(mesh, group))[0]


_Where: TypeAlias = "tuple[Peers, str, Layouts | None, Sequence[int] | None]"
_Inputs: TypeAlias = "tuple[Tensor, Tensor, Tensor]"


def _run(
    inputs: _Inputs,
    made: dict[str, Any],
    segments: tuple[Tensor, Tensor] | None,
    where: _Where,
    *,
    lse: bool,
    stats: bool,
) -> AttentionOutput:
    at, mode, layout, parts = where
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if any(_is_sharded(tensor) for tensor in inputs):
        return _run_sharded(inputs, made, segments, where, lse=lse, stats=stats)
    _check(inputs)
    if at.size == 1 and not (mode == "ring" and made["precision"] != "full"):
        given = (Layout.contiguous([inputs[0].shape[2]]), Layout.contiguous([inputs[1].shape[2]]))
        result = Request(given, segments=segments, **made).here(*inputs)
        return result if stats else result._replace(stats=None)
    layouts = _layouts(inputs, mode, layout, parts, at)
    request = Request(layouts, segments=_whole_segments(segments, layouts, at), **made)
    run = attend_heads if mode == "heads" else attend_ring
    result = run(*inputs, request, at, lse=lse)
    assert result.stats is not None
    if not stats:
        return result._replace(stats=None)
    heads, own = inputs[0].shape[1], result.stats.counts.sum(2, keepdim=True)
    counts = own.new_zeros(own.shape[0], heads, 1, 3)
    first = at.rank * heads // at.size if mode == "heads" else 0
    counts[:, first : first + own.shape[1]] = own
    return result._replace(stats=result.stats.with_counts(at.all_reduce(counts, "stats")))


def _check(inputs: _Inputs) -> None:
    query = inputs[0]
    for name, tensor in zip(("query", "key", "value"), inputs, strict=True):
        check_tensor(tensor, name)
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be [batch, heads, tokens, dim], got shape {tuple(tensor.shape)}")
        if tensor.dtype not in DTYPES or tensor.dtype != query.dtype:
            raise TypeError(f"{name} must be float32, bfloat16 or float16 as query, {query.dtype}, got {tensor.dtype}")
        if tensor.shape[0] != query.shape[0]:
            raise ValueError(f"{name} has batch {tensor.shape[0]} and query {query.shape[0]}: they must agree")
    _, key, value = inputs
    if key.shape[1:3] != value.shape[1:3]:
        raise ValueError(f"value has heads and tokens {tuple(value.shape[1:3])} and key {tuple(key.shape[1:3])}")
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"key has {key.shape[1]} heads and query {query.shape[1]}: query heads must be a multiple of key heads"
        )
    if key.shape[3] != query.shape[3]:
        raise ValueError(f"key has head_dim {key.shape[3]} and query {query.shape[3]}: they must agree")
    refuse_gradients(query=query, key=key, value=value)


def _layouts(
    inputs: _Inputs, mode: str, layout: Layouts | None, parts: Sequence[int] | None, at: Peers
) -> tuple[Layout, Layout]:
    """Where the tokens are: as given, or as the ranks tell each other, together with what must be alike."""
    lengths = (inputs[0].shape[2], inputs[1].shape[2])
    if layout is not None:
        if parts is not None:
            raise ValueError("parts and layout name the same thing: give one of the two")
        pair = (layout, layout) if isinstance(layout, Layout) else layout
        for name, one, length in zip(("query", "key"), pair, lengths, strict=True):
            if len(one.ranks) != at.size or one.lengths[at.rank] != length:
                raise ValueError(
                    f"layout gives {name} {one.lengths} tokens on {len(one.ranks)} ranks, but rank {at.rank} of "
                    f"{at.size} has {length}"
                )
        return pair
    if parts is not None and (sum(parts) != lengths[0] or sum(parts) != lengths[1]):
        raise ValueError(f"parts {tuple(parts)} must add up to the tokens of query and key, {lengths}")
    own = (lengths[0],) if parts is None else tuple(parts)
    query, key, value = inputs
    alike = (
        *query.shape[:2],
        query.shape[3],
        key.shape[1],
        value.shape[3],
        DTYPES.index(query.dtype),
        MODES.index(mode),
    )
    return _exchange(own, None if parts is not None else (lengths[1],), alike, at)


def _exchange(
    own: tuple[int, ...], keys: tuple[int, ...] | None, alike: tuple[int, ...], at: Peers
) -> tuple[Layout, Layout]:
    """Tell every rank the own tokens of all parts, and check that what must be alike is."""
    if len(own) > _MOST_PARTS or any(tokens < 0 for tokens in own):
        raise ValueError(f"parts must be at most {_MOST_PARTS} numbers of tokens, got {own}")
    keys = own if keys is None else keys
    message = [len(own), len(keys)]
    for some in (own, keys):
        message += [*some, *[0] * (_MOST_PARTS - len(some))]
    message += alike
    device = torch.device("cpu")
    if torch.distributed.get_backend(at.group) == "nccl":
        device = torch.device("cuda", torch.cuda.current_device())
    sent = torch.tensor(message, dtype=torch.int64, device=device)
    rows = [row.tolist() for row in at.all_gather(sent, [len(message)] * at.size, "lengths")]
    first = 2 + 2 * _MOST_PARTS
    if any(row[:2] != message[:2] or row[first:] != message[first:] for row in rows):
        fields = "batch, heads, head_dim, key heads, value_dim, dtype, mode"
        shown = [(row[:2], row[first:]) for row in rows]
        raise ValueError(f"ranks disagree: numbers of parts and ({fields}) must be alike, got {shown}")
    parts = [[row[2 + side * _MOST_PARTS :][: row[side]] for row in rows] for side in range(2)]
    q_layout = Layout.parts(parts[0])
    return q_layout, q_layout if parts[0] == parts[1] else Layout.parts(parts[1])


def _whole_segments(
    segments: tuple[Tensor, Tensor] | None, layouts: tuple[Layout, Layout], at: Peers
) -> tuple[Tensor, Tensor] | None:
    """Segments of the whole sequence, int64 `[batch | 1, tokens]`."""
    if segments is None:
        return None
    whole = []
    for index, (own, layout) in enumerate(zip(segments, layouts, strict=True)):
        own = (own[None] if own.dim() == 1 else own).to(torch.int64)
        if own.dim() != 2 or own.shape[1] != layout.lengths[at.rank]:
            raise ValueError(
                f"segments[{index}] must be [batch | 1, {layout.lengths[at.rank]}], got {tuple(own.shape)}"
            )
        batch = own.shape[0]
        shards = at.all_gather(own.reshape(-1), [batch * tokens for tokens in layout.lengths], "lengths")
        whole.append(layout.put([shard.view(batch, -1) for shard in shards], dim=-1))
    return whole[0], whole[1]


def _is_sharded(tensor: Tensor) -> bool:
    if type(tensor) is Tensor:  # the import below takes a second, once
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def _peers(query: Tensor, mesh: DeviceMesh | None, group: ProcessGroup | None) -> Peers:
    if _is_sharded(query) and mesh is None and group is None:
        mesh = query.device_mesh  # type: ignore[attr-defined]
    return peers(mesh, group)


def _run_sharded(
    inputs: _Inputs,
    made: dict[str, Any],
    segments: tuple[Tensor, Tensor] | None,
    where: _Where,
    *,
    lse: bool,
    stats: bool,
) -> AttentionOutput:
    """The call on the shards of DTensors, which know where their tokens are: nothing is exchanged for that."""
    from torch.distributed.tensor import DTensor, Shard

    at, mode, layout, parts = where
    if layout is not None or parts is not None:
        raise ValueError("layout and parts are for plain tensors: DTensors know where their tokens are")
    for name, tensor in zip(("query", "key", "value"), inputs, strict=True):
        if not isinstance(tensor, DTensor):
            raise TypeError(f"{name} must be a DTensor as the others are, got {type(tensor).__name__}")
        if tensor.device_mesh.ndim != 1 or tensor.device_mesh.size() != at.size:
            raise ValueError(f"{name} is on the mesh {tensor.device_mesh}: it must be one of {at.size} ranks in a row")
        if tensor.placements != (Shard(2),):
            raise ValueError(f"{name} must be sharded over the sequence, (Shard(2),), got {tensor.placements}")
    query, key, _ = inputs
    layouts = (Layout.even(query.shape[2], at.size), Layout.even(key.shape[2], at.size))
    shards = tuple(tensor.to_local() for tensor in inputs)  # type: ignore[attr-defined]
    result = _run(shards, made, segments, (at, mode, layouts, None), lse=lse, stats=stats)

    def sharded(shard: Tensor, *last: int) -> Tensor:
        # The whole shape is named: from shards of unequal lengths it cannot be guessed.
        shape = torch.Size((*query.shape[:3], *last))
        strides = torch.empty(shape, device="meta").stride()
        mesh = query.device_mesh  # type: ignore[attr-defined]
        return DTensor.from_local(shard.contiguous(), mesh, (Shard(2),), shape=shape, stride=strides)

    output = sharded(result.output, result.output.shape[3])
    return AttentionOutput(output, sharded(result.lse) if lse else result.lse, result.stats)
