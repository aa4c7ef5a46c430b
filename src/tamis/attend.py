"""The engine: check a call, choose a backend, run it, report what was computed."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeAlias, TypedDict

import torch
from torch import Tensor
from torch.nn.attention.bias import CausalBias, CausalVariant

from tamis import known
from tamis.backends import base
from tamis.block_mask import BlockMask
from tamis.call import DTYPES, Call, PerHead, Prepared, flatten, make_call, refuse_gradients
from tamis.compensate import add_centroids
from tamis.errors import UnsupportedError
from tamis.packed import PackedKV, check_layout, check_tensor, tails
from tamis.predictors.base import Predictor
from tamis.predictors.sparge import Sparge
from tamis.stats import AttentionOutput, AttentionStats

IntPair: TypeAlias = "tuple[Tensor | None, Tensor | None]"


class Seen(TypedDict):
    """What a predictor and the engine must be told alike."""

    causal: bool
    attn_mask: Tensor | None
    scale: float | None
    positions: IntPair | None
    backend: str | None


# 3.5 would do for the language model of `tamis bench defaults`, but costs an image model a percent (docs/defaults.md).
DEFAULT_PV_THRESHOLD = 5.0
_SPARGE = Sparge()


def attend(
    query: Tensor,
    key: Tensor | PackedKV,
    value: Tensor | None,
    block_mask: BlockMask | None = None,
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    positions: IntPair | None = None,
    segments: IntPair | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    precision: str = "full",
    pv_threshold: PerHead | None = None,
    compensate: str | None = None,
    backend: str | None = None,
) -> AttentionOutput:
    """Attention over the key blocks that a mask keeps.

    A score is s = scale * q.k, then softcap * tanh(s / softcap), then + attn_mask; invisible pairs get -inf. A row
    that sees no key returns 0 with lse -inf.

    Args:
        query: `[batch, heads, q_len, head_dim]`, float32, bfloat16 or float16, any strides. Leading dims beyond two are
            flattened, missing ones added; the result has the query's.
        key: `[batch, kv_heads, kv_len, head_dim]`; heads must be a multiple of kv_heads. Or a `PackedKV`.
        value: `[batch, kv_heads, kv_len, value_dim]`; None with a `PackedKV`.
        block_mask: the key blocks each query block visits; None visits all that are visible.
        causal: row i sees keys at positions up to its own. By default the last query is at the last key's position
            (bottom-right), so chunked prefill and decoding are exact.
        window: |query position - key position| < window.
        scale: factor of q.k, by default 1 / sqrt(head_dim).
        attn_mask: bool (True = visible) or floating (added to the scores; -inf = not visible), broadcastable to
            `[batch, heads, q_len, kv_len]`.
        positions: (query's, key's) integer positions `[seq]` or `[batch, seq]`; None for a side's default.
        segments: (query's, key's) integers; a row sees a key only if they are equal and not negative.
        softcap: Gemma 2's soft limit of the scores, > 0.
        sink_logits: GPT-OSS's `[heads]`: the score of one more key, seen by every row, of value zero; part of lse.
        precision: "full" (fp32 accumulation), "int8" (query and key in 8 bit, keys smoothed by their mean; value in
            8 bit or bf16, on a GPU 16 bit: stats tell) or "fp8" (query and key in int8, value in e4m3; GPU). A
            `PackedKV` is in int8, and so is then the call.
        pv_threshold: leave out the value product of a group of 16 rows and 64 keys (on a GPU of a tile) if every score
            is at least this far (natural log units, > 0) below its row's maximum so far; one number or one per head;
            None = off.
        compensate: what stands in for skipped blocks; None drops them. "centroid": the mean key of a block with its
            mean value joins the softmax as often as the block has tokens (padding is none; an additive mask adds its
            mean), and lse includes it. A row gets only blocks that it sees whole, and none whose mean is not finite.
        backend: "cpu", "triton" or "reference", which never falls back; None takes the first that can serve the call.

    Returns:
        `AttentionOutput(output, lse, stats)`: output in the query's dtype, lse fp32 `[batch, heads, q_len]`.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype, device or value.
        UnsupportedError: no backend (or not the named one) can serve the call, or an input requires grad.

    Source: SpargeAttn (arXiv 2502.18137), sections 3.2 to 3.4; SageAttention (arXiv 2410.02367) for int8.

    Example:
        >>> import torch, tamis
        >>> query = torch.randn(1, 8, 1000, 64)
        >>> key, value = torch.randn(1, 2, 1000, 64), torch.randn(1, 2, 1000, 64)
        >>> mask = tamis.Window(256)(query, key, causal=True)
        >>> output, lse, stats = tamis.attend(query, key, value, mask, causal=True)
        >>> output.shape, lse.shape, stats.density < 1
        (torch.Size([1, 8, 1000, 64]), torch.Size([1, 8, 1000]), True)
    """
    return _attend(
        query,
        key,
        value,
        block_mask,
        causal=causal,
        window=window,
        scale=scale,
        attn_mask=attn_mask,
        positions=positions,
        segments=segments,
        softcap=softcap,
        sink_logits=sink_logits,
        precision=precision,
        pv_threshold=pv_threshold,
        compensate=compensate,
        backend=backend,
    )


def _attend(
    query: Tensor,
    key: Tensor | PackedKV,
    value: Tensor | None,
    block_mask: BlockMask | None,
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    positions: IntPair | None = None,
    segments: IntPair | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    precision: str = "full",
    pv_threshold: PerHead | None = None,
    compensate: str | None = None,
    backend: str | None = None,
    prepared: Prepared | None = None,
) -> AttentionOutput:
    """`attend`, with what a prediction on the same inputs has prepared."""
    form = None
    if attn_mask is None and positions is None and segments is None and sink_logits is None and compensate is None:
        settings = (causal, window, scale, softcap, precision, pv_threshold)
        form = known.form(query, key, value, block_mask, backend, settings)
    if (record := known.RECORDS.get(form)) is not None:
        return record.run(query, key, value, block_mask)
    packed = key if isinstance(key, PackedKV) else None
    if packed is not None and value is not None:
        raise ValueError("value must be None when key is a PackedKV, which holds it")
    if packed is None and value is None:
        raise TypeError("value must be a tensor, got None (it is None only when key is a PackedKV)")
    if block_mask is not None and not isinstance(block_mask, BlockMask):
        raise TypeError(f"block_mask must be a tamis.BlockMask or None, got {type(block_mask).__name__}")
    plain_key = None if isinstance(key, PackedKV) else key
    for name, tensor in (("query", query), ("key", plain_key), ("value", value), ("attn_mask", attn_mask)):
        check_layout(tensor, name)
    check_layout(sink_logits, "sink_logits")
    if packed is not None and precision == "full":
        precision = "int8"
    refuse_gradients(query=query, key=plain_key, value=value, attn_mask=attn_mask, sink_logits=sink_logits)
    call = make_call(
        query,
        plain_key,
        value,
        packed=packed,
        block_mask=block_mask,
        causal=causal,
        window=window,
        scale=scale,
        attn_mask=attn_mask,
        positions=positions,
        segments=segments,
        softcap=softcap,
        sink_logits=sink_logits,
        precision=precision,
        pv_threshold=pv_threshold,
        compensate=compensate,
    )
    output, lse, stats = _run(call, backend, prepared)
    known.RECORDS.offer(form, stats.backend, lambda: known.Known.of(call, stats))
    lead = query.shape[:-1]
    return AttentionOutput(output.reshape(*lead, output.shape[-1]), lse.reshape(lead), stats)


def _run(call: Call, backend: str | None, prepared: Prepared | None) -> tuple[Tensor, Tensor, AttentionStats]:
    name = base.choose(call, backend)
    if prepared is not None and prepared.backend == name:
        call = replace(call, prepared=prepared.tensors)
    output, lse, counts = base.attend(call, name)
    skips = call.kv_indices is not None
    if call.compensate is not None and skips:
        add_centroids(call, name, output, lse)
    target, formats = base.description(name, call)
    stats = AttentionStats(
        counts,
        backend=name,
        target=target,
        formats=formats,
        rows=call.query.shape[2],
        dense_reason=None if skips else "no block mask was given",
        compensate=call.compensate if skips else None,
        kernel_reasons=base.kernel_reason(name, call),
    )
    return output, lse, stats


def attend_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    block_mask: BlockMask | None = None,
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    precision: str = "full",
    pv_threshold: PerHead | None = None,
    compensate: str | None = None,
    backend: str | None = None,
) -> AttentionOutput:
    """Attention over sequences of different lengths, packed one after another.

    Args:
        query: `[total_q, heads, head_dim]`. key: `[total_kv, kv_heads, head_dim]`. value: `[total_kv, kv_heads,
            value_dim]`.
        cu_seqlens_q: int32 `[batch + 1]`: sequence b has the queries cu_seqlens_q[b] .. cu_seqlens_q[b + 1] - 1.
        cu_seqlens_kv: the same for keys and values.
        block_mask: over the packed token axis: its lengths are (total_q, total_kv).
        causal, window: inside each sequence, whose last query is at its last key's position.
        scale, precision, pv_threshold, compensate, backend: as in `attend`.

    Returns:
        `AttentionOutput` with output `[total_q, heads, value_dim]` and lse fp32 `[heads, total_q]`.

    Raises:
        ValueError: offsets do not start at 0, do not ascend, or do not end at the total (in a compiled graph offsets
            are not read; tokens outside of them see nothing). Otherwise as `attend`.

    Example:
        >>> import torch, tamis
        >>> query, key, value = (torch.randn(300, 4, 64) for _ in range(3))
        >>> offsets = torch.tensor([0, 100, 300], dtype=torch.int32)
        >>> tamis.attend_varlen(query, key, value, offsets, offsets, causal=True).output.shape
        torch.Size([300, 4, 64])
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dim() != 3:
            raise ValueError(f"{name} must be [total, heads, head_dim], got shape {tuple(tensor.shape)}")
    _check_offsets(cu_seqlens_q, "cu_seqlens_q", query)
    _check_offsets(cu_seqlens_kv, "cu_seqlens_kv", key)
    if cu_seqlens_q.shape != cu_seqlens_kv.shape:
        raise ValueError(
            f"cu_seqlens_q has {cu_seqlens_q.shape[0]} offsets and cu_seqlens_kv {cu_seqlens_kv.shape[0]}: "
            "they must agree"
        )
    lengths = (cu_seqlens_kv.diff() - cu_seqlens_q.diff()).to(torch.int64)
    q_segments, q_positions = _places(cu_seqlens_q, query.shape[0], lengths)
    kv_segments, kv_positions = _places(cu_seqlens_kv, key.shape[0], torch.zeros_like(lengths))
    result = attend(
        query.transpose(0, 1)[None],
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        block_mask,
        causal=causal,
        window=window,
        scale=scale,
        positions=(q_positions, kv_positions) if causal or window is not None else None,
        segments=(q_segments, kv_segments),
        precision=precision,
        pv_threshold=pv_threshold,
        compensate=compensate,
        backend=backend,
    )
    return AttentionOutput(result.output[0].transpose(0, 1), result.lse[0], result.stats)


def _check_offsets(offsets: Tensor, name: str, tokens: Tensor) -> None:
    if not isinstance(offsets, Tensor) or offsets.dtype not in (torch.int32, torch.int64):
        kind = offsets.dtype if isinstance(offsets, Tensor) else type(offsets).__name__
        raise TypeError(f"{name} must be an int32 tensor, got {kind}")
    if offsets.dim() != 1 or offsets.shape[0] < 1:
        raise ValueError(f"{name} must be [batch + 1], got shape {tuple(offsets.shape)}")
    if offsets.device != tokens.device:
        raise ValueError(f"{name} is on {offsets.device} and its tokens on {tokens.device}: they must agree")
    if torch.compiler.is_compiling() or offsets.device.type != "cpu":
        return
    values = offsets.tolist()
    if values[0] != 0 or values[-1] != tokens.shape[0]:
        raise ValueError(f"{name} must run from 0 to {tokens.shape[0]}, got {values[0]} to {values[-1]}")
    if values != sorted(values):
        raise ValueError(f"{name} must ascend, got {values}")


def _places(offsets: Tensor, total: int, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Sequence number and position in the sequence of every packed token; -1 outside of all sequences."""
    index = torch.arange(total, device=offsets.device)
    offsets = offsets.to(torch.int64)
    sequences = offsets.shape[0] - 1
    if sequences == 0:
        return torch.full_like(index, -1), index
    segment = torch.searchsorted(offsets[1:].contiguous(), index, right=True)
    inside = (segment < sequences) & (index >= offsets[0])
    segment = segment.clamp(max=sequences - 1)
    return torch.where(inside, segment, -1), index - offsets[segment] + shift[segment]


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    predictor: Predictor | None = None,
    precision: str = "int8",
    pv_threshold: PerHead | None = DEFAULT_PV_THRESHOLD,
    compensate: str | None = None,
    backend: str | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, AttentionStats]:
    """`torch.nn.functional.scaled_dot_product_attention`, sparse: predict the blocks that matter, compute those.

    Args:
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa: as torch's. is_causal is top-left;
            `causal_upper_left` and `causal_lower_right` are accepted as attn_mask; fewer key heads need enable_gqa.
            Unlike in torch a row that sees no key returns 0.
        predictor: what chooses the blocks; None = `Sparge()`.
        precision, pv_threshold, compensate, backend: as in `attend`; the defaults are the measured ones.
        return_stats: also return what was computed.

    Returns:
        The output, `[.., q_len, value_dim]` in the query's dtype; with return_stats (output, `AttentionStats`).

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype, device or value.
        UnsupportedError: dropout_p > 0, an input requires grad, or no backend can serve the call.

    Source: SpargeAttn (arXiv 2502.18137).

    Example:
        >>> import torch, tamis
        >>> query, key, value = (torch.randn(1, 4, 1024, 64) for _ in range(3))
        >>> output, stats = tamis.sparse_attention(query, key, value, is_causal=True, return_stats=True)
        >>> output.shape, 0 < stats.density <= 1
        (torch.Size([1, 4, 1024, 64]), True)
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(tensor, name)
    check_layout(attn_mask, "attn_mask")
    if not isinstance(is_causal, bool):
        raise TypeError(f"is_causal must be True or False, got {type(is_causal).__name__}")
    if dropout_p != 0.0:
        raise UnsupportedError(f"dropout_p must be 0: no backend drops attention at random, got {dropout_p}")
    if not enable_gqa:
        _check_equal_heads(query, key)
    refuse_gradients(query=query, key=key, value=value)
    causal, top_left = is_causal, is_causal
    if attn_mask is not None and is_causal:
        raise ValueError("attn_mask must be None when is_causal=True: give one of the two")
    if isinstance(attn_mask, CausalBias):
        sizes = (attn_mask.seq_len_q, attn_mask.seq_len_kv)
        if sizes != (query.shape[-2], key.shape[-2]):
            raise ValueError(f"attn_mask is for lengths {sizes}, got {(query.shape[-2], key.shape[-2])}")
        causal, top_left = True, attn_mask.variant == CausalVariant.UPPER_LEFT
        attn_mask = None
    positions: IntPair | None = None
    if top_left and query.shape[-2] != key.shape[-2]:
        positions = (torch.arange(query.shape[-2], device=query.device), None)
    predictor = _SPARGE if predictor is None else predictor
    if isinstance(predictor, type):
        raise TypeError(
            f"predictor must be an object such as {predictor.__name__}(), got the class {predictor.__name__}"
        )
    if not callable(predictor):
        raise TypeError(f"predictor must be callable as Sparge() is, got {type(predictor).__name__}")
    seen: Seen = {
        "causal": causal,
        "attn_mask": attn_mask,
        "scale": scale,
        "positions": positions,
        "backend": backend,
    }
    output, _, stats = predict_and_attend(
        query, key, value, predictor, seen, precision=precision, pv_threshold=pv_threshold, compensate=compensate
    )
    assert stats is not None
    return (output, stats) if return_stats else output


def predict_and_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    predictor: Predictor,
    seen: Seen,
    *,
    precision: str,
    pv_threshold: PerHead | None,
    compensate: str | None = None,
) -> AttentionOutput:
    """Attention over the blocks that a predictor keeps; what `Sparge` reads and rounds is not read again."""
    prepared = None
    if isinstance(predictor, Sparge):
        block_mask, prepared = predictor.prepare(query, key, **seen, precision=precision)
    else:
        block_mask = predictor(query, key, **seen)
    return _attend(
        query,
        key,
        value,
        block_mask,
        **seen,
        precision=precision,
        pv_threshold=pv_threshold,
        compensate=compensate,
        prepared=prepared,
    )


def _check_equal_heads(query: Tensor, key: Tensor) -> None:
    if min(query.dim(), key.dim()) > 2 and query.shape[-3] != key.shape[-3]:
        raise ValueError(
            f"key has {key.shape[-3]} heads and query {query.shape[-3]}: unequal heads need enable_gqa=True"
        )


def pack_kv(key: Tensor, value: Tensor, precision: str = "int8", *, backend: str | None = None) -> PackedKV:
    """Quantise key and value once, to use them in many calls of `attend(.., precision="int8")`.

    Args:
        key: `[batch, kv_heads, kv_len, head_dim]`, float32, bfloat16 or float16.
        value: `[batch, kv_heads, kv_len, value_dim]`.
        precision: "int8".
        backend: None (the first that can), "cpu", "triton" or "reference", as in `attend`; any of them can read it.

    Returns:
        A `PackedKV`, about a quarter of the size of float32 (plus scales; from head_dim 64 on); `.append` adds to it.

    Raises:
        TypeError, ValueError: as `attend`. UnsupportedError: precision "full" or "fp8", or an input requires grad.

    Source: SageAttention (arXiv 2410.02367), section 4.2 (smoothing), and the sources of `tamis.mixing`; value scales
    per channel and block are ours.

    Example:
        >>> import torch, tamis
        >>> key, value = torch.randn(1, 2, 1000, 64), torch.randn(1, 2, 1000, 64)
        >>> packed = tamis.pack_kv(key, value)
        >>> query = torch.randn(1, 8, 1, 64)
        >>> tamis.attend(query, packed, None, causal=True, precision="int8").output.shape
        torch.Size([1, 8, 1, 64])
    """
    if precision != "int8":
        if precision in ("full", "fp8"):
            raise UnsupportedError(f"precision must be 'int8': key and value are packed in no other, got {precision!r}")
        raise ValueError(f"precision must be 'int8', got {precision!r}")
    _check_pack(key, value)
    refuse_gradients(key=key, value=value)
    # A call without queries has the same checks and the same choice of a backend.
    call = make_call(key, key, value, precision="int8")
    assert call.key is not None
    assert call.value is not None
    name = base.choose(call, backend)
    mean = base.key_mean(call.key, None, None, name)
    tensors = base.pack_kv(call.key, call.value, mean, None, name)
    mixed = base.mixed(key.shape[-1], name)
    return PackedKV([*tensors, mean], call.kv_len, mixed, tails(call.key, call.value), name)


def _check_pack(key: Tensor, value: Tensor) -> None:
    """What `make_call` would say of a query, which packing has none of."""
    for name, tensor in (("key", key), ("value", value)):
        check_tensor(tensor, name)
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} must be float32, bfloat16 or float16, got {tensor.dtype}")
    if value.dtype != key.dtype:
        raise TypeError(f"value is {value.dtype} and key {key.dtype}: they must agree")
    if value.device != key.device:
        raise ValueError(f"value is on {value.device} and key on {key.device}: they must agree")
    if value.dim() != key.dim():
        raise ValueError(f"value has {value.dim()} dimensions and key {key.dim()}: they must agree")
    batches = flatten(key).shape[0], flatten(value).shape[0]
    if batches[1] not in (1, batches[0]):
        raise ValueError(f"value has batch {batches[1]} and key {batches[0]}: they must agree, or value have 1")
    if key.shape[-1] < 1 or value.shape[-1] < 1:
        raise ValueError(f"head dims must be at least 1: key has {key.shape[-1]}, value {value.shape[-1]}")
