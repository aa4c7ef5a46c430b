"""The native CPU backend: ctypes onto csrc/attend.h.

One library serves every torch and every x86-64 processor; the instruction set is chosen at run time. Set
`TAMIS_CPU_TARGET` to one of `available_targets()` to force one. Threads: `torch.get_num_threads()` OpenMP threads from
the pool torch uses. Stage 2 skips groups of 16 query rows.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

import tamis
from tamis import geometry
from tamis.backends import native
from tamis.call import Call
from tamis.stats import Formats

NAME = "cpu"
PACK_BLOCK = 64
_forced: list[str] = []


@functools.cache
def library() -> ctypes.CDLL | str:
    """The native library, or why there is none; `TAMIS_CPU_LIBRARY` names another build of it, e.g. with sanitizers."""
    if named := os.environ.get("TAMIS_CPU_LIBRARY"):
        return native.load(Path(named)) if Path(named).is_file() else f"TAMIS_CPU_LIBRARY={named} is not a file"
    # An editable install keeps the library in another folder than the sources: both are on the package's path.
    for folder in tamis.__path__:
        for name in ("libtamis_cpu.so", "libtamis_cpu.dylib"):
            path = Path(folder) / name
            if path.exists():
                return native.load(path)
    return "the native library is not there: install tamis with a C++17 compiler at hand"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def missing() -> str | None:
    """Why there is no native library, or None; a constant, since a graph compiler cannot look into ctypes."""
    found = library()
    return found if isinstance(found, str) else None


def built_targets() -> list[str]:
    """Targets that were compiled in, best first."""
    found = library()
    return [] if isinstance(found, str) else found.tamis_built_targets().decode().split()


def available_targets() -> list[str]:
    """Targets that this processor can run, best first."""
    return list(_available())


@functools.cache
def _available() -> tuple[str, ...]:
    found = library()
    return () if isinstance(found, str) else tuple(found.tamis_targets().decode().split())


@contextlib.contextmanager
def force_target(name: str) -> Iterator[None]:
    """Run with one target, whatever the environment says; for tests and comparisons."""
    _forced.append(name)
    try:
        target()
        yield
    finally:
        _forced.pop()


def target(device: torch.device | None = None) -> str | None:
    """The instruction set in use: the forced one, or the best this processor has.

    Raises:
        ValueError: the target asked for cannot run here.
    """
    available = _available()
    if not available:
        return None
    wanted = _forced[-1] if _forced else os.environ.get("TAMIS_CPU_TARGET", "")
    if wanted and wanted not in available:
        raise ValueError(f"TAMIS_CPU_TARGET must be one of {', '.join(available)} on this processor, got {wanted!r}")
    return wanted or available[0]


def formats(precision: str, dtype: torch.dtype, packed: bool, device: torch.device) -> Formats:
    """Number formats of the two products."""
    few = ("int8", "uint8 x int8") if precision == "int8" else ("float32", "float32")
    if target() != "amx" or not (dtype == torch.bfloat16 or precision == "int8"):
        return Formats(few, few)
    return Formats(few, ("int8" if precision == "int8" else "bfloat16", "bfloat16"))


def reasons(call: Call) -> list[str]:
    """Why this backend can't serve the call; empty if it can."""
    found = []
    why = missing()
    if why is not None:
        return [why]
    tensors = (call.query, call.key, call.value, call.attn_mask, call.kv_num_blocks, *call.packed)
    if any(t is not None and t.device.type != "cpu" for t in tensors):
        found.append("it runs on CPU tensors")
    if call.query.dtype not in native.DTYPES:
        found.append(f"it takes float32, bfloat16 and float16, not {call.query.dtype}")
    if call.precision not in ("full", "int8"):
        found.append(f"it has precision 'full' and 'int8', not {call.precision!r}")
    return found


def _threads(work: int) -> int:
    """Threads for so many multiplications: as many as have work for longer than starting them takes."""
    return max(1, min(torch.get_num_threads(), work // 500_000))


def _run(name: str, args: ctypes.Structure) -> None:
    lib, chosen = library(), target()
    if isinstance(lib, str) or chosen is None:
        raise RuntimeError(f"the cpu backend cannot run: {lib}")
    native.check(getattr(lib, f"tamis_{name}")(chosen.encode(), ctypes.byref(args)))


def _segments(args: native.Summarize | native.Pack | native.Attend, segments: Tensor | None) -> Tensor | None:
    """Attach segments; the caller keeps the returned tensor alive."""
    dense = None if segments is None else segments.to(torch.int64).contiguous()
    prefix = "pack_segment" if isinstance(args, native.Attend) else "segment"
    setattr(args, f"{prefix}s", native.pointer(dense))
    setattr(args, f"{prefix}_stride", native.batch_stride(dense))
    return dense


def _summarize_args(x: Tensor) -> native.Summarize:
    args = native.Summarize()
    args.batch, args.heads, args.seq, args.dim = x.shape
    args.x = native.tensor(x)
    args.threads = _threads(x.numel())
    return args


def key_mean(key: Tensor, segments: Tensor | None, used: Tensor | None) -> Tensor:
    """Mean key of each head over finite tokens of used blocks, fp32 `[batch, kv_heads, head_dim]`."""
    args = _summarize_args(key)
    kept = _segments(args, segments)
    dense_used = None if used is None else used.expand(*key.shape[:2], used.shape[-1]).contiguous()
    mean = torch.empty((*key.shape[:2], key.shape[3]), dtype=torch.float32)
    args.used, args.means = native.pointer(dense_used), mean.data_ptr()
    _run("key_mean", args)
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
    kept = _segments(args, segments)
    means, similarity = _summaries(args, block)
    dense_mean = None if mean is None else mean.contiguous()
    args.mean = native.pointer(dense_mean)
    _run("summarize", args)
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
    _run("select", args)
    num, bits = kept[:2]
    assert num is not None and bits is not None
    kv_blocks = k_means.shape[2]
    width = kv_blocks if not trim else max(1, int(num.max())) if num.numel() else 1
    return num, _expand(bits, num, kv_blocks, width, args.threads)


_Choice = tuple[
    float, Tensor | None, Tensor | None, Tensor, bool, bool, int | None, Tensor | None, Tensor | None
]  # scale, cdf, topk, similarity, sink, causal, window, visible, must


def _select_args(
    args: native.Select,
    summaries: tuple[Tensor, Tensor, Tensor, Tensor],
    choice: _Choice,
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
    args.threads = _threads(batch * heads * q_blocks * kv_blocks * (head_dim + 64))
    return [num, bits, must, *dense, *kept]


def _expand(bits: Tensor, num: Tensor, kv_blocks: int, width: int, threads: int) -> Tensor:
    """Bits as lists of indices."""
    indices = torch.empty((*num.shape, width), dtype=torch.int32)
    lib = library()
    assert not isinstance(lib, str)
    native.check(
        lib.tamis_expand(bits.data_ptr(), num.numel(), kv_blocks, width, indices.data_ptr(), ctypes.c_int32(threads))
    )
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
    args = native.Predict()
    args.key_mean, args.query, args.key = _summarize_args(key), _summarize_args(query), _summarize_args(key)
    mean = torch.empty((*key.shape[:2], key.shape[3]), dtype=torch.float32)
    args.key_mean.means = args.key.mean = mean.data_ptr()
    kept = [_segments(args.query, q_segments), _segments(args.key, kv_segments), _segments(args.key_mean, kv_segments)]
    summaries = (*_summaries(args.query, block_q), *_summaries(args.key, block_kv))
    choice = (scale, cdf, topk, similarity, sink, causal, window, visible, must)
    lengths = (query.shape[2], key.shape[2])
    kept += _select_args(args.select, summaries, choice, lengths, (block_q, block_kv), (q_bounds, kv_bounds))
    num, bits = kept[3:5]
    assert num is not None and bits is not None
    _run("predict", args)
    kv_blocks = summaries[2].shape[2]
    width = max(1, args.max_blocks) if trim else kv_blocks
    return num, _expand(bits, num, kv_blocks, width, args.select.threads), []


def _packed_struct(packed: list[Tensor]) -> native.Packed:
    """key8, key_scale, key_sum, value8, value_scale, value_sum, mean."""
    args = native.Packed()
    args.capacity, args.dim4 = packed[0].shape[2], packed[0].shape[4]
    args.key, args.key_scale, args.key_sum, args.value, args.value_scale, args.value_sum, args.key_mean = (
        t.data_ptr() for t in packed[:7]
    )
    return args


def pack_kv(
    key: Tensor, value: Tensor, mean: Tensor, segments: Tensor | None, used: Tensor | None = None
) -> list[Tensor]:
    """Quantise key (less its mean) and value in blocks of 64 keys; layout in csrc/attend.h."""
    batch, heads, length, dim = key.shape
    value_dim = value.shape[3]
    blocks = -(-length // PACK_BLOCK)
    lead = (batch, heads, blocks)
    packed = [
        torch.empty((*lead, PACK_BLOCK, (dim + 3) // 4 * 4), dtype=torch.int8),
        torch.empty(lead, dtype=torch.float32),
        torch.empty((*lead, PACK_BLOCK), dtype=torch.int32),
        torch.empty((*lead, value_dim, PACK_BLOCK), dtype=torch.int8),
        torch.empty((*lead, value_dim), dtype=torch.float32),
        torch.empty((*lead, value_dim), dtype=torch.int32),
    ]
    dense_mean = mean.to(torch.float32).contiguous()
    dense_used = None if used is None else used.expand(lead).contiguous()
    args = native.Pack()
    args.batch, args.kv_heads, args.seq, args.head_dim, args.value_dim = batch, heads, length, dim, value_dim
    args.key, args.value = native.tensor(key), native.tensor(value)
    kept = _segments(args, segments)
    args.used, args.packed = native.pointer(dense_used), _packed_struct([*packed, dense_mean])
    args.threads = _threads(2 * (key.numel() + value.numel()))
    _run("pack_kv", args)
    del kept
    return packed


def attend(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    packed: list[Tensor],
    kv_num_blocks: Tensor | None,
    kv_indices: Tensor | None,
    block_q: int,
    block_kv: int,
    causal: bool,
    window: int | None,
    scale: float,
    attn_mask: Tensor | None,
    q_positions: Tensor | None,
    kv_positions: Tensor | None,
    q_segments: Tensor | None,
    kv_segments: Tensor | None,
    q_bounds: Tensor | None,
    kv_bounds: Tensor | None,
    visible: Tensor | None,
    softcap: float | None,
    sink_logits: Tensor | None,
    precision: str,
    pv_threshold: Tensor | None,
    prepared: list[Tensor],
    bf16_products: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run attention; see `tamis.backends.base`. `bf16_products`: whether they are allowed, None: by the rows."""
    batch, heads, q_len, head_dim = query.shape
    kv_heads = (packed[0] if key is None else key).shape[1]
    differs_by_head = (kv_num_blocks, attn_mask, sink_logits, pv_threshold, visible)
    differs_by_row = (window, q_positions, kv_positions, q_segments, kv_segments)
    if q_len == 1 and heads > kv_heads > 0 and all(x is None for x in (*differs_by_head, *differs_by_row)):
        # Decoding: heads that share a key are rows of one block and read it once. The last query sees every key.
        rows = query.reshape(batch, kv_heads, heads // kv_heads, head_dim)
        absent = (
            *("kv_num_blocks", "kv_indices", "window", "attn_mask", "q_positions", "kv_positions", "q_segments"),
            *("kv_segments", "q_bounds", "kv_bounds", "visible", "sink_logits", "pv_threshold"),
        )
        none: dict[str, None] = dict.fromkeys(absent)
        # However many heads there are, it is one row of each: key and value are read once, which no tile repays.
        options: dict[str, object] = {
            "bf16_products": False,
            "block_q": block_q,
            "block_kv": block_kv,
            "scale": scale,
            "softcap": softcap,
            "precision": precision,
            "prepared": [],
        }
        output, lse, counts = attend(rows, key, value, packed, causal=False, **options, **none)  # type: ignore[arg-type]
        counts = counts[:, :, :1].repeat_interleave(heads // kv_heads, 1)
        return output.reshape(batch, heads, 1, output.shape[-1]), lse.reshape(batch, heads, 1), counts
    args = native.Attend()
    args.batch, args.heads, args.head_dim, args.query = batch, heads, head_dim, native.tensor(query)
    args.int8 = precision == "int8"
    args.bf16_products = q_len >= geometry.TILE_ROWS if bf16_products is None else bf16_products
    if packed:
        packed = [t.contiguous() for t in packed]
        args.packed = _packed_struct(packed)
        args.kv_heads, kv_len, args.value_dim = packed[0].shape[1], int(packed[7]), packed[3].shape[3]
    else:
        assert key is not None and value is not None
        args.key, args.value = native.tensor(key), native.tensor(value)
        args.kv_heads, kv_len, args.value_dim = key.shape[1], key.shape[2], value.shape[3]
    places = (q_positions, kv_positions, q_segments, kv_segments)
    kept = native.fill_geometry(
        args.geometry, (q_len, kv_len), (block_q, block_kv), causal, window, places, q_bounds, kv_bounds, visible
    )
    if kv_num_blocks is not None and kv_indices is not None:
        if kv_indices.stride(-1) != 1:
            kv_indices = kv_indices.contiguous()
        args.kv_num_blocks, args.kv_indices = kv_num_blocks.data_ptr(), kv_indices.data_ptr()
        args.num_stride[:], args.idx_stride[:] = kv_num_blocks.stride(), kv_indices.stride()[:3]
        args.max_blocks = kv_indices.shape[-1]
    args.scale, args.softcap = scale, softcap or 0.0
    if attn_mask is not None:
        args.attn_mask = native.tensor(attn_mask)
    dense_sinks = None if sink_logits is None else sink_logits.to(torch.float32).contiguous()
    dense_threshold = None if pv_threshold is None else pv_threshold.to(torch.float32).contiguous()
    args.sink_logits, args.pv_threshold = native.pointer(dense_sinks), native.pointer(dense_threshold)
    output = torch.empty((batch, heads, q_len, args.value_dim), dtype=query.dtype)
    lse = torch.empty((batch, heads, q_len), dtype=torch.float32)
    counts = torch.empty((batch, heads, -(-q_len // block_q), 3), dtype=torch.float64)
    args.output, args.lse, args.counts = output.data_ptr(), lse.data_ptr(), counts.data_ptr()
    args.threads = _threads(batch * heads * q_len * kv_len * (head_dim + args.value_dim) // 8)
    pack_segments = None
    if precision == "int8" and not packed:
        pack_segments = _segments(args, geometry.without_hidden(attn_mask, kv_segments))
    _run("attend", args)
    del kept, pack_segments
    return output, lse, counts
