"""From a public call to its mode: checks, where the tokens are, and the shards of DTensors."""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Sequence
from types import NoneType
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from tamis.block_mask import BlockMask
from tamis.call import DTYPES, refuse_gradients
from tamis.packed import check_tensor
from tamis.parallel.heads import attend_heads
from tamis.parallel.layout import Layout
from tamis.parallel.request import Request, threshold_of
from tamis.parallel.ring import attend_ring, refuse
from tamis.parallel.step import step_of, watched
from tamis.parallel.wire import Peers, peers
from tamis.stats import AttentionOutput

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

Layouts: TypeAlias = "Layout | tuple[Layout, Layout]"
MODES = ("heads", "ring")
_MOST_PARTS = 8
_DECLINED = -1  # in the place of a checksum, which is never negative
Where: TypeAlias = "tuple[Peers, str, Layouts | None, Sequence[int] | None]"
Inputs: TypeAlias = "tuple[Tensor, Tensor, Tensor]"


def run(
    inputs: Inputs,
    made: dict[str, Any],
    segments: tuple[Tensor, Tensor] | None,
    where: Where,
    *,
    lse: bool,
    stats: bool,
) -> AttentionOutput:
    """The call in its mode, on this rank's tokens; `made` are arguments of `Request`.

    An error that all ranks raise leaves them in step; after one of this rank alone they raise in the next call.
    """
    with watched(where[0].group):
        return _run(inputs, made, segments, where, lse=lse, stats=stats)


def _run(
    inputs: Inputs,
    made: dict[str, Any],
    segments: tuple[Tensor, Tensor] | None,
    where: Where,
    *,
    lse: bool,
    stats: bool,
) -> AttentionOutput:
    at, mode, layout, parts = where
    if any(_is_sharded(tensor) for tensor in inputs):
        return _run_sharded(inputs, made, segments, where, lse=lse, stats=stats)
    try:
        made = made | {"pv_threshold": threshold_of(made["pv_threshold"], mode)}
        _check(inputs, segments, mode)
        mask = made.get("block_mask")
        if not isinstance(mask, (BlockMask, NoneType)):
            raise TypeError(f"block_mask must be a tamis.BlockMask or None, got {type(mask).__name__}")
        _check_parts(inputs, layout, parts)
    except Exception:
        if layout is None and at.size > 1:
            decline(at)
        raise
    alone = at.size == 1 and layout is None and parts is None
    if alone and not (mode == "ring" and made["precision"] != "full"):
        given = (Layout.contiguous([inputs[0].shape[2]]), Layout.contiguous([inputs[1].shape[2]]))
        request = Request(given, segments=segments, **made)
        if mode == "ring":
            refuse(request)
        result = request.here(*inputs)
        return result if stats else result._replace(stats=None)
    told = {**made, "segments": _rows(segments), "log-sum-exp": lse, "return_stats": stats}
    layouts = _layouts(inputs, mode, layout, parts, at, told)
    _check_request(made, inputs, layouts)
    request = Request(layouts, segments=_whole_segments(segments, layouts, at), **made)
    if mode == "ring":
        refuse(request)
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


def _check(inputs: Inputs, segments: tuple[Tensor, Tensor] | None, mode: str) -> None:
    """What a rank can see of its own arguments."""
    query = inputs[0]
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    for name, tensor in zip(("query", "key", "value"), inputs, strict=True):
        check_tensor(tensor, name)
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be [batch, heads, tokens, dim], got shape {tuple(tensor.shape)}")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} must be float32, bfloat16 or float16, got {tensor.dtype}")
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} must be {query.dtype} as query, got {tensor.dtype}")
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
    for index, own in enumerate(segments or ()):
        if own.dtype.is_floating_point or own.dtype == torch.bool:
            raise TypeError(f"segments[{index}] must be integers, got {own.dtype}")
        tokens = inputs[index].shape[2]
        if own.dim() not in (1, 2) or own.shape[-1] != tokens:
            raise ValueError(f"segments[{index}] must be [tokens] or [batch | 1, {tokens}], got {tuple(own.shape)}")


def _check_parts(inputs: Inputs, layout: Layouts | None, parts: Sequence[int] | None) -> None:
    if parts is None:
        return
    if layout is not None:
        raise ValueError("parts and layout name the same thing: give one of the two")
    lengths = (inputs[0].shape[2], inputs[1].shape[2])
    if sum(parts) != lengths[0] or sum(parts) != lengths[1]:
        raise ValueError(f"parts {tuple(parts)} must add up to the tokens of query and key, {lengths}")
    if len(parts) > _MOST_PARTS or any(tokens < 0 for tokens in parts):
        raise ValueError(f"parts must be at most {_MOST_PARTS} numbers of tokens, got {tuple(parts)}")


def _rows(segments: tuple[Tensor, Tensor] | None) -> list[int]:
    """Texts for which segments are given: 1 for all alike."""
    return [1 if own.dim() == 1 else own.shape[0] for own in segments or ()]


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    if isinstance(value, BlockMask):
        return f"{value.block_size} {value.seq_lens} {tuple(value.kv_num_blocks.shape)}"
    text = repr(value)
    return type(value).__name__ if " at 0x" in text else text  # an address says nothing elsewhere


def _check_request(made: dict[str, Any], inputs: Inputs, layouts: tuple[Layout, Layout]) -> None:
    """What is cut by rank must be whole before: a slice of too much or too little would not be noticed."""
    heads, mask, sinks = inputs[0].shape[1], made.get("block_mask"), made.get("sink_logits")
    if mask is not None:
        lengths = (layouts[0].length, layouts[1].length)
        if mask.seq_lens != lengths:
            raise ValueError(f"block_mask is for lengths {mask.seq_lens}, the whole query and key have {lengths}")
        if mask.kv_num_blocks.shape[1] not in (1, heads):
            raise ValueError(f"block_mask has {mask.kv_num_blocks.shape[1]} heads, query has {heads}: 1 or as many")
    if sinks is not None and (not isinstance(sinks, Tensor) or tuple(sinks.shape) != (heads,)):
        raise ValueError(f"sink_logits must be a tensor of one number per query head ({heads}), got {_shown(sinks)}")


def _layouts(
    inputs: Inputs, mode: str, layout: Layouts | None, parts: Sequence[int] | None, at: Peers, told: dict[str, Any]
) -> tuple[Layout, Layout]:
    """Where the tokens are: as given, or as the ranks tell each other, together with what must be alike."""
    lengths = (inputs[0].shape[2], inputs[1].shape[2])
    if layout is not None:
        pair = (layout, layout) if isinstance(layout, Layout) else layout
        for name, one, length in zip(("query", "key"), pair, lengths, strict=True):
            if len(one.ranks) != at.size or one.lengths[at.rank] != length:
                raise ValueError(
                    f"layout gives {name} {one.lengths} tokens on {len(one.ranks)} ranks, but rank {at.rank} of "
                    f"{at.size} has {length}"
                )
        if step_of(at.group).failed:
            at.tell("again", [])
        return pair
    own = (lengths[0],) if parts is None else tuple(parts)
    query, key, value = inputs
    alike = {
        "batch": query.shape[0],
        "heads": query.shape[1],
        "head_dim": query.shape[3],
        "key heads": key.shape[1],
        "value_dim": value.shape[3],
        "dtype": query.dtype,
        "mode": mode,
        "parts": f"{len(own)} of the query, {1 if parts is None else len(own)} of the key",
    }
    return exchange(own, None if parts is not None else (lengths[1],), alike | told, at)


def exchange(
    own: tuple[int, ...], keys: tuple[int, ...] | None, alike: dict[str, Any], at: Peers
) -> tuple[Layout, Layout]:
    """Tell every rank the own tokens of all parts, and check that what must be alike is.

    Raises:
        ValueError: on every rank: one of them declines, or their arguments differ.
    """
    if len(own) > _MOST_PARTS or any(tokens < 0 for tokens in own):
        raise ValueError(f"parts must be at most {_MOST_PARTS} numbers of tokens, got {own}")
    keys = own if keys is None else keys
    shown = json.dumps({name: _shown(value) for name, value in alike.items()})
    question = "call" if alike else "layout"
    rows = at.tell(question, _message(own, keys, zlib.crc32(shown.encode())))
    declined = [rank for rank, row in enumerate(rows) if row[0] == _DECLINED]
    if declined:
        step_of(at.group).settled = True
        raise ValueError(f"rank {declined[0]} cannot take part in this call: its own error says why")
    if any(row[:3] != rows[0][:3] for row in rows):
        named = {"parts": f"{len(own)} of the query, {len(keys)} of the key"}
        texts = at.tell_text("difference", json.dumps(named) if not alike else shown)
        step_of(at.group).settled = True
        raise ValueError(f"ranks disagree: arguments must be alike on all of them; {_differences(texts)}")
    parts = [[row[3 + side * _MOST_PARTS :][: row[1 + side]] for row in rows] for side in range(2)]
    q_layout = Layout.parts(parts[0])
    return q_layout, q_layout if parts[0] == parts[1] else Layout.parts(parts[1])


def _message(own: tuple[int, ...], keys: tuple[int, ...], told: int) -> list[int]:
    """A checksum of what must be alike, numbers of parts, and their tokens."""
    sides = [[*some, *[0] * (_MOST_PARTS - len(some))] for some in (own, keys)]
    return [told, len(own), len(keys), *sides[0], *sides[1]]


def _differences(texts: Sequence[str]) -> str:
    """What differs, with the ranks that are not as most are."""
    told = [json.loads(text) for text in texts]
    said = []
    for name in dict.fromkeys(name for own in told for name in own):
        values = [own.get(name, "not an argument of this function") for own in told]
        usual, many = Counter(values).most_common(1)[0]
        odd = [f"{value} on rank {rank}" for rank, value in enumerate(values) if value != usual]
        if odd:
            rest = "the others" if many > 1 else f"rank {values.index(usual)}"
            said.append(f"{name}: {', '.join(odd)}, {usual} on {rest}")
    return "; ".join(said)


def decline(at: Peers) -> None:
    """Take part in the exchange that begins a call, so that the other ranks get an error and do not wait."""
    at.tell("call", _message((0,), (0,), _DECLINED))
    step_of(at.group).settled = True


def _whole_segments(
    segments: tuple[Tensor, Tensor] | None, layouts: tuple[Layout, Layout], at: Peers
) -> tuple[Tensor, Tensor] | None:
    """Segments of the whole sequence, int64 `[batch | 1, tokens]`."""
    if segments is None:
        return None
    whole = []
    for own, layout in zip(segments, layouts, strict=True):
        own = (own[None] if own.dim() == 1 else own).to(torch.int64)
        batch = own.shape[0]
        shards = at.all_gather(own.reshape(-1), [batch * tokens for tokens in layout.lengths], "lengths")
        whole.append(layout.put([shard.view(batch, -1) for shard in shards], dim=-1))
    return whole[0], whole[1]


def _is_sharded(tensor: Tensor) -> bool:
    if type(tensor) is Tensor:  # the import below takes a second, once
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def peers_of(query: Tensor, mesh: DeviceMesh | None, group: ProcessGroup | None) -> Peers:
    """The ranks that a call names, or those of its DTensors."""
    if _is_sharded(query) and mesh is None and group is None:
        mesh = query.device_mesh  # type: ignore[attr-defined]
    return peers(mesh, group)


def _run_sharded(
    inputs: Inputs,
    made: dict[str, Any],
    segments: tuple[Tensor, Tensor] | None,
    where: Where,
    *,
    lse: bool,
    stats: bool,
) -> AttentionOutput:
    """The call on the shards of DTensors, however they are cut: what torch cuts is a case of what a caller may."""
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
    query = inputs[0]
    shards = tuple(tensor.to_local() for tensor in inputs)  # type: ignore[attr-defined]
    result = run(shards, made, segments, (at, mode, None, None), lse=lse, stats=stats)

    def sharded(shard: Tensor, *last: int) -> Tensor:
        # The whole shape is named: from shards of unequal lengths it cannot be guessed.
        shape = torch.Size((*query.shape[:3], *last))
        strides = torch.empty(shape, device="meta").stride()
        mesh = query.device_mesh  # type: ignore[attr-defined]
        return DTensor.from_local(shard.contiguous(), mesh, (Shard(2),), shape=shape, stride=strides)

    output = sharded(result.output, result.output.shape[3])
    return AttentionOutput(output, sharded(result.lse) if lse else result.lse, result.stats)
