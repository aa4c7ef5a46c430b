"""Which blocks matter: means and similarities of blocks, and the choice among them, in native code."""

from __future__ import annotations

import torch
from torch import Tensor

from tamis.backends.cpu import library, native


def _summarize_args(x: Tensor) -> native.Summarize:
    args = native.Summarize()
    args.batch, args.heads, args.seq, args.dim = x.shape
    args.x = native.tensor(x)
    args.threads = library.threads(x.numel())
    return args


def key_mean(key: Tensor, segments: Tensor | None, used: Tensor | None) -> Tensor:
    """Mean key of each head over finite tokens of used blocks, fp32 `[batch, kv_heads, head_dim]`."""
    args = _summarize_args(key)
    kept = library.attach_segments(args, segments)
    dense_used = None if used is None else used.expand(*key.shape[:2], used.shape[-1]).contiguous()
    mean = torch.empty((*key.shape[:2], key.shape[3]), dtype=torch.float32)
    args.used, args.means = native.pointer(dense_used), mean.data_ptr()
    library.run("key_mean", args)
    del kept
    return mean


def _summaries(args: native.Summarize, block: int) -> tuple[Tensor, Tensor]:
    """Room for the means and similarities of all blocks, and `args` pointing to it."""
    lead = (args.batch, args.heads, -(-args.seq // block))
    means = torch.empty((*lead, args.dim), dtype=torch.float32)
    similarity = torch.empty(lead, dtype=torch.float32)
    args.block, args.means, args.similarity = block, means.data_ptr(), similarity.data_ptr()
    return means, similarity


def summarize(x: Tensor, block: int, mean: Tensor | None, segments: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean row and self-similarity of every block of x - mean, fp32."""
    args = _summarize_args(x)
    kept = library.attach_segments(args, segments)
    means, similarity = _summaries(args, block)
    dense_mean = None if mean is None else mean.contiguous()
    args.mean = native.pointer(dense_mean)
    library.run("summarize", args)
    del kept
    return means, similarity


def select(
    q_means: Tensor,
    q_similarity: Tensor,
    k_means: Tensor,
    k_similarity: Tensor,
    scale: float,
    cdf: Tensor | None,
    topk: Tensor | None,
    similarity: Tensor,
    sink: bool,
    causal: bool,
    window: int | None,
    q_len: int,
    kv_len: int,
    block_q: int,
    block_kv: int,
    q_bounds: Tensor | None,
    kv_bounds: Tensor | None,
    visible: Tensor | None,
    must: Tensor | None,
    trim: bool,
) -> tuple[Tensor, Tensor]:
    """Choose key blocks; see `tamis.backends.base`."""
    choice = (scale, cdf, topk, similarity, sink, causal, window, visible, must)
    args = native.Select()
    kept = _select_args(
        args,
        (q_means, q_similarity, k_means, k_similarity),
        choice,
        (q_len, kv_len),
        (block_q, block_kv),
        (q_bounds, kv_bounds),
    )
    library.run("select", args)
    num, bits = kept[:2]
    assert num is not None and bits is not None
    kv_blocks = k_means.shape[2]
    width = kv_blocks if not trim else max(1, int(num.max())) if num.numel() else 1
    return num, _expand(bits.data_ptr(), num, kv_blocks, width)


Choice = tuple[
    float, Tensor | None, Tensor | None, Tensor, bool, bool, int | None, Tensor | None, Tensor | None
]  # scale, cdf, topk, similarity, sink, causal, window, visible, must


def _select_args(
    args: native.Select,
    summaries: tuple[Tensor, Tensor, Tensor, Tensor],
    choice: Choice,
    lengths: tuple[int, int],
    block_size: tuple[int, int],
    bounds: tuple[Tensor | None, Tensor | None],
) -> list[Tensor | None]:
    """Fill `args`. Returns the counts and bits it will write, and whatever else must stay alive."""
    scale, cdf, topk, similarity, sink, causal, window, visible, must = choice
    batch, heads, q_blocks, head_dim = summaries[0].shape
    kv_heads, kv_blocks = summaries[2].shape[1:3]
    dense = [None if t is None else t.to(torch.float32).contiguous() for t in (*summaries, similarity, cdf, topk)]
    kept = native.fill_geometry(args.geometry, lengths, block_size, causal, window, (None,) * 4, *bounds, visible)
    args.batch, args.heads, args.kv_heads, args.head_dim = batch, heads, kv_heads, head_dim
    args.q_means, args.q_similarity, args.k_means, args.k_similarity = (native.pointer(t) for t in dense[:4])
    args.similarity, args.cdf, args.topk = (native.pointer(t) for t in dense[4:])
    args.scale, args.sink = scale, sink
    if must is not None:
        args.must = must.data_ptr()
        args.must_stride[:] = native.broadcast_strides(must)
    num = torch.empty((batch, heads, q_blocks), dtype=torch.int32)
    bits = torch.empty((batch, heads, q_blocks, -(-kv_blocks // 64)), dtype=torch.int64)
    args.bits, args.kv_num_blocks = bits.data_ptr(), num.data_ptr()
    args.threads = library.threads(batch * heads * q_blocks * kv_blocks * (head_dim + 64))
    return [num, bits, must, *dense, *kept]


def _expand(bits: int, num: Tensor, kv_blocks: int, width: int) -> Tensor:
    """Rows of bits at an address as lists of indices."""
    indices = torch.empty((*num.shape, width), dtype=torch.int32)
    library.expand(bits, num, kv_blocks, width, indices, library.threads(4 * indices.numel()))
    return indices


def predict(
    query: Tensor,
    key: Tensor,
    q_segments: Tensor | None,
    kv_segments: Tensor | None,
    scale: float,
    cdf: Tensor | None,
    topk: Tensor | None,
    similarity: Tensor,
    sink: bool,
    causal: bool,
    window: int | None,
    block_q: int,
    block_kv: int,
    q_bounds: Tensor | None,
    kv_bounds: Tensor | None,
    visible: Tensor | None,
    must: Tensor | None,
    trim: bool,
    precision: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """All of a prediction in one native call; see `tamis.backends.base`."""
    choice = (scale, cdf, topk, similarity, sink, causal, window, visible, must)
    args, kept = predict_args(query, key, (q_segments, kv_segments), choice, (block_q, block_kv), (q_bounds, kv_bounds))
    num, bits = kept[:2]
    assert num is not None and bits is not None
    library.run("predict", args)
    return num, indices(args, bits.data_ptr(), num, trim), []


def indices(args: native.Predict, bits: int, num: Tensor, trim: bool) -> Tensor:
    """The lists of a prediction that has run; trimmed, as wide as the longest."""
    kv_blocks = -(-args.key.seq // args.key.block)
    return _expand(bits, num, kv_blocks, max(1, args.max_blocks) if trim else kv_blocks)


WRITTEN = range(7)


def predict_args(
    query: Tensor,
    key: Tensor,
    segments: tuple[Tensor | None, Tensor | None],
    choice: Choice,
    block_size: tuple[int, int],
    bounds: tuple[Tensor | None, Tensor | None],
) -> tuple[native.Predict, list[Tensor | None]]:
    """The native arguments, and what must stay alive: at `WRITTEN` what the prediction writes, in this order: counts,
    bits, the mean key, means and similarities of query blocks, the same of key blocks.
    """
    args = native.Predict()
    args.key_mean, args.query, args.key = _summarize_args(key), _summarize_args(query), _summarize_args(key)
    mean = torch.empty((*key.shape[:2], key.shape[3]), dtype=torch.float32)
    args.key_mean.means = args.key.mean = mean.data_ptr()
    attached = [
        library.attach_segments(part, side)
        for part, side in ((args.query, segments[0]), (args.key, segments[1]), (args.key_mean, segments[1]))
    ]
    summaries = (*_summaries(args.query, block_size[0]), *_summaries(args.key, block_size[1]))
    lengths = (query.shape[2], key.shape[2])
    kept = _select_args(args.select, summaries, choice, lengths, block_size, bounds)
    chosen = args.select
    judged = chosen.batch * chosen.heads * summaries[0].shape[2] * summaries[2].shape[2] * (chosen.head_dim + 64)
    args.threads = library.threads(2 * query.numel() + 3 * key.numel() + judged)
    num, bits, *settings = kept
    return args, [num, bits, mean, *summaries, *settings, *attached]
