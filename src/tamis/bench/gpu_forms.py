"""Which calls `tamis bench gpu-static` compiles the kernels of, out of the many that there are.

What a call may be falls into axes: head dims, block sizes, who sees whom, and so on. Of every two axes all pairs of
values occur in some call (sm_86, which shares settings and instructions with sm_89, does without). Beyond that, each
way in which settings.py cuts a kernel into tiles occurs with every kind of products and head dim, in the usual call,
under a window, and with all masks at a time; of the kernel made for sm_90, whose registers are all taken, each cut
with lists and without, causal or not, with stage 2 or without; and a prediction with all that it may have to look at,
for every head dim and for short, long and vast rows of scores.

That is the whole list, of which a share is compiled unless more is asked for: on all chips but sm_86 every cut of
attention by the kernel for all GPUs; of all other calls the usual or fullest ones, predictions for one head dim alone
on sm_86, sm_89 and sm_100; and a few drawn from the rest by a seed, others for each architecture.

The backend is called as on that GPU, and what it would have started is compiled. tests/test_gpu_forms.py holds the list
against the kernels' sources: each kernel must be there, and each condition that the compiler decides, both ways.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import tamis
from tamis.backends.triton import chips, hopper, launch, operands, prepare, settings
from tamis.bench.cover import Axes, Row, cover, some
from tamis.packed import tails

DIMS = (64, 128, 256)
# The first value of an axis is the usual one; what is usual and goes without saying is "".
_ATTENTION: Axes = {
    "rows": ("", "64 rows", "few rows"),
    "keys": ("", "128 keys"),
    "sight": (
        *("causal", "plain", "window", "causal window"),
        *("positions", "segments", "mask", "bias", "all masks"),
    ),
    "lists": ("", "no lists"),
    "stage 2": ("", "stage 2"),
    "scores": ("", "softcap", "sinks", "vast softcap"),
    "shape": ("", "odd", "narrow values", "narrow keys"),
    "layout": ("", "columns", "wide"),
}
_GLUON: Axes = {
    "rows": ("", "64 rows"),
    "keys": ("", "128 keys"),
    "sight": ("causal", "plain"),
    "lists": ("lists", "no lists", "vast lists"),
    "stage 2": ("", "stage 2"),
    "shape": ("", "odd", "narrow values", "narrow keys"),
}
_PREDICTION: Axes = {
    "rows": ("", "64 rows"),
    "keys": ("", "128 keys"),
    "sight": ("causal", "plain", "window", "segments", "mask"),
    "rule": ("cdf", "topk", "cdf topk"),
    "keep": ("", "keep"),
    "sink": ("", "no sink"),
    "long": ("", "long"),
    "shape": ("", "odd", "narrow values", "narrow keys"),
    "layout": ("", "columns"),
}
_DTYPES = ("", "fp16", "fp32")  # "": bf16
_LENGTH = 250  # no multiple of a block, so that there is an edge; what is compiled is the same for every length
_FEW = 16
_LENGTHS = {"": _LENGTH, "long": 128 * 256 + 1, "vast": 128 * 2048 + 1}  # of rows that lists.chunk_of tells apart
_FAMILIES = ("sm_80", "sm_90", "sm_120", "gfx942")  # one of each family of settings.py
_CUT = (*_FAMILIES, "sm_89", "sm_100")  # and what has cuts of its own in them, or instructions
_DRAWN = 3
_HEADS, _KV_HEADS = 4, 2


class Call(NamedTuple):
    """What a call is called, the kinds of product that attention must hold, and the kernels that it would start."""

    what: str
    products: set[str]
    launches: list[launch.Launch]


def calls(name: str, dims: Sequence[int] = DIMS, *, whole: bool = True) -> Iterator[Call]:
    """Everything that is compiled for an architecture: the whole list, or a share of it."""
    seen: set[tuple[object, ...]] = set()
    for call in _calls(name, dims, whole):
        fresh = []
        for item in call.launches:
            if not (news := _news(item)) <= seen:
                seen |= news
                fresh.append(item)
        if fresh:
            yield call._replace(launches=fresh)


def _calls(name: str, dims: Sequence[int], whole: bool) -> Iterator[Call]:
    def rows(all_of: Sequence[Row], first: Sequence[Row]) -> Sequence[Row]:
        return all_of if whole else some(all_of, first, _DRAWN, name)

    first = cut_rows(name, dims) if name in _CUT else plain_rows(name, dims)
    for row in rows(attention_rows(name, dims), first):
        yield Call(words(row), _products(row), attention(name, row))
    if name == "sm_90":
        for row in rows(gluon_rows(dims), plain_gluon_rows(dims)):
            yield Call(words(row), _products(row), gluon(row))
    for row in rows(prediction_rows(name, dims), fullest_rows(name, dims if name in _FAMILIES else dims[:1])):
        yield Call("predict " + words(row), set(), prediction(name, row))


def _news(item: launch.Launch) -> set[tuple[object, ...]]:
    """What a launch may show first: of attention's first pass the whole, of others each constant, type and
    width, and of those before attention which arguments there are.
    """
    name, constants, types = item.kernel.fn.__name__, item.constants, forms(item)
    if name in ("attend_kernel", "hopper_kernel") and not constants.get("FLAG_ROWS"):
        return {(name, *sorted(constants.items()), *item.options.items(), *types)}
    width = max(constants.get(size, 0) for size in ("D", "DV", "DIM_PAD", "VALUE_PAD"))
    kept = {(constant, value == width if "DIM" in constant else value) for constant, value in constants.items()}
    named = {(parameter.name, form[0]) for parameter, form in zip(_arguments(item), types, strict=True)}
    news: set[tuple[object, ...]] = {(name, *pair) for pair in (("width", width), *kept, *named)}
    if name != "attend_kernel":
        news.add((name, *(value is None for value in item.arguments)))
    return news


def forms(item: launch.Launch) -> tuple[Any, ...]:
    """Types of the arguments as Triton specialises on them: some also on being 1, or a multiple of 16."""
    import triton
    from triton.backends.compiler import BaseBackend

    specialize = triton.runtime.jit.native_specialize_impl
    return tuple(
        specialize(BaseBackend, value, False, not parameter.do_not_specialize, True)
        for value, parameter in zip(item.arguments, _arguments(item), strict=True)
    )


def _arguments(item: launch.Launch) -> list[Any]:
    """The kernel's parameters that are no constants."""
    return [parameter for parameter in item.kernel.params if not parameter.is_constexpr]


def _words_of(dims: Sequence[int]) -> tuple[str, ...]:
    return tuple(f"d={dim}" for dim in dims)


def words(row: Row) -> str:
    """A call in words."""
    return " ".join(value for value in row.values() if value)


def kinds(name: str) -> tuple[str, ...]:
    """Precisions that an architecture takes; "packed" is int8 with a `PackedKV`."""
    chip = chips.CHIPS[name]
    return ("full", *(("int8", "packed") if chip.int8 else ()), *(("fp8",) if chip.int8 and chip.fp8 else ()))


def usual(kind: str, dim: int, *, gluon: bool = False) -> Row:
    """The most usual call: causal bf16 over lists, or one of the kernel made for sm_90."""
    axes = _GLUON if gluon else _ATTENTION
    return {"kind": kind, "dtype": "", "dim": f"d={dim}", **{axis: values[0] for axis, values in axes.items()}}


def plain_rows(name: str, dims: Sequence[int] = DIMS) -> list[Row]:
    """The usual calls of each precision, without stage 2 and with it; fp32 inputs where these make other products."""
    forms = [(kind, dtype) for kind in kinds(name) for dtype in ("", "fp32") if not dtype or kind == "full"]
    varied = itertools.product(_ATTENTION["stage 2"], forms, dims)
    return [usual(kind, dim) | {"dtype": dtype, "stage 2": skips} for skips, (kind, dtype), dim in varied]


def attention_rows(name: str, dims: Sequence[int] = DIMS) -> list[Row]:
    """Calls of attention by the kernel for all GPUs."""
    axes = {"kind": kinds(name), "dtype": _DTYPES, "dim": _words_of(dims), **_ATTENTION}
    return cover(axes, cut_rows(name, dims), _possible, pairs=name != "sm_86")


def cut_rows(name: str, dims: Sequence[int] = DIMS) -> list[Row]:
    """Parts of calls that hold every cut: in the usual call, under a window, and with all masks."""
    forms = [(kind, dtype) for kind in kinds(name) for dtype in ("", "fp32") if not dtype or kind in ("full", "int8")]
    parts, cuts = plain_rows(name, dims), []
    for (kind, dtype), dim, sight in itertools.product(
        forms, _words_of(dims), ("causal", "causal window", "all masks")
    ):
        for rows in _ATTENTION["rows"] if (kind, dtype) != ("int8", "fp32") else ("",):
            part = {"kind": kind, "dim": dim, "rows": rows, "sight": sight, "shape": "", "layout": "", "dtype": dtype}
            if sight != "all masks":
                part |= dict.fromkeys(("keys", "lists", "stage 2", "scores"), "")
            for whole in _with_stage2(name, part):
                if (cut := (kind, dtype, dim, sight, _cut(name, whole))) not in cuts:
                    cuts.append(cut)
                    parts.append(whole)
    return parts


def _with_stage2(name: str, part: Row) -> list[Row]:
    """A part of a call, or where that is cut in another way two: without stage 2 and with it."""
    without, with_it = part | {"stage 2": ""}, part | {"stage 2": "stage 2"}
    return [part] if _cut(name, without) == _cut(name, with_it) else [without, with_it]


def _cut(name: str, row: Row) -> settings.Tiles:
    """How the kernel is cut for a call."""
    full = "fp32" if row["dtype"] == "fp32" else "half"
    dim, rows = int(row["dim"][2:]), 64 if row["rows"] == "64 rows" else 128
    kind, q_len = full if row["kind"] == "full" else row["kind"], _FEW if row["rows"] == "few rows" else _LENGTH
    sight = {"regular": row["sight"] != "all masks", "window": "window" in row["sight"]}
    skips = row.get("stage 2") == "stage 2"
    return settings.tiles(chips.CHIPS[name], kind, dim, dim, rows, 64, q_len, **sight, skips=skips)


def plain_gluon_rows(dims: Sequence[int] = DIMS) -> list[Row]:
    """The usual calls of the kernel made for sm_90; a head dim of 192 is cut in a way of its own, 96 padded to 128."""
    dims = (64, 128, 192, 256) if tuple(dims) == DIMS else tuple(dims)
    varied = itertools.product(_GLUON["stage 2"], ("full", "int8", "fp8"), dims)
    return [usual(kind, dim, gluon=True) | {"stage 2": skips} for skips, kind, dim in varied]


def gluon_rows(dims: Sequence[int] = DIMS) -> list[Row]:
    """Calls of the kernel made for sm_90."""
    parts = plain_gluon_rows(dims)
    axes = {"kind": ("full", "int8", "fp8"), "dtype": _DTYPES, "dim": tuple({row["dim"]: 0 for row in parts}), **_GLUON}
    compiled = ("kind", "dim", "rows", "sight", "lists", "stage 2")
    every = itertools.product(*(axes[axis][:2] if axis == "lists" else axes[axis] for axis in compiled))
    parts += [dict(zip(compiled, values, strict=True)) | {"shape": ""} for values in every]
    return cover(axes, parts, _fits)


def fullest_rows(name: str, dims: Sequence[int] = DIMS) -> list[Row]:
    """Parts of predictions with all that a kernel may have to look at."""
    parts = [{"kind": kind, "dim": dim, "long": ""} for kind in kinds(name)[:2] for dim in _words_of(dims)]
    parts += [{"dtype": "", "dim": f"d={dims[0]}", "long": long, "layout": ""} for long in ("long", "vast")]
    return [part | {"rule": "cdf topk", "keep": "keep", "sight": "segments"} for part in parts]


def prediction_rows(name: str, dims: Sequence[int] = DIMS) -> list[Row]:
    """Calls of a prediction, with 8-bit copies or without, and of packing."""
    axes = {"kind": kinds(name)[:2], "dtype": _DTYPES, "dim": _words_of(dims), **_PREDICTION}
    return cover(axes, fullest_rows(name, dims), lambda row: True)


def _possible(row: Row) -> bool:
    """Without lists blocks are 128 rows by 64 keys, and a `PackedKV` is laid out in one way."""
    if row.get("lists") == "no lists" and (row.get("rows") == "64 rows" or row.get("keys") == "128 keys"):
        return False
    return row.get("kind") != "packed" or not row.get("layout")


def _fits(row: Row) -> bool:
    """What the kernel made for sm_90 takes."""
    if not _possible(row) or (row.get("kind") == "full" and row.get("dtype") == "fp32"):
        return False
    if not {"kind", "dim", "shape"} <= row.keys():
        return True
    block_q, bits = 64 if row.get("rows") == "64 rows" else 128, 64 if row.get("lists") == "vast lists" else 32
    return hopper.cut(row["kind"], *_dims(row), block_q, bits) is not None


def _products(row: Row) -> set[str]:
    if row["kind"] == "full":
        return {"tf32" if row["dtype"] == "fp32" else "half"}
    return {"int8", "fp8" if row["kind"] == "fp8" else "half"}


def attention(name: str, row: Row) -> list[launch.Launch]:
    """What a call starts where the kernel for all GPUs runs."""
    with _kernel("triton"), chips.assume(name), _wide(row["layout"] == "wide"), launch.note() as launches:
        _attend(row)
    return launches


def gluon(row: Row) -> list[launch.Launch]:
    """What a call starts where the kernel made for sm_90 runs."""
    with _kernel("gluon"), chips.assume("sm_90"), launch.note() as launches:
        _attend(row)
    vast = {"LISTS": 64} if row["lists"] == "vast lists" else {}
    return [item._replace(constants=item.constants | (vast if "LISTS" in item.constants else {})) for item in launches]


@contextlib.contextmanager
def _wide(wide: bool) -> Iterator[None]:
    """Inside, keys and values seem to have strides of 2^24 and more, for which there is no memory here."""
    before = operands.Operands.wide
    if wide:
        operands.Operands.wide = property(lambda self: True)  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        operands.Operands.wide = before  # type: ignore[method-assign]


@contextlib.contextmanager
def _kernel(name: str) -> Iterator[None]:
    before = os.environ.get("TAMIS_GPU_KERNEL")
    os.environ["TAMIS_GPU_KERNEL"] = name
    try:
        yield
    finally:
        del os.environ["TAMIS_GPU_KERNEL"]
        if before is not None:
            os.environ["TAMIS_GPU_KERNEL"] = before


def _attend(row: Row) -> None:
    q_len = _FEW if row["rows"] == "few rows" else _LENGTH
    query, key, value = _inputs(row, q_len, _LENGTH)
    options = _sight(row["sight"], q_len, _LENGTH)
    scores = row.get("scores", "")
    if "softcap" in scores:
        options["softcap"] = 30.0 if scores == "softcap" else 2e38
    mask = None
    if row["lists"] != "no lists":
        block_q, block_kv = _block_size(row)
        blocks = torch.ones(1, _HEADS, -(-q_len // block_q), -(-_LENGTH // block_kv), dtype=torch.bool)
        mask = tamis.BlockMask.from_dense(blocks, (block_q, block_kv), (q_len, _LENGTH))
    packed = row["kind"] == "packed"
    tamis.attend(
        query,
        _packed(key, value) if packed else key,
        None if packed else value,
        mask,
        backend="triton",
        precision="int8" if packed else row["kind"],
        sink_logits=torch.zeros(_HEADS) if scores == "sinks" else None,
        pv_threshold=5.0 if row["stage 2"] else None,
        **options,
    )


def prediction(name: str, row: Row) -> list[launch.Launch]:
    """What a prediction starts, and packing, and the means that stand in for skipped blocks."""
    length = _LENGTHS[row["long"]]
    query, key, value = _inputs(row, _LENGTH, length)
    rule = dict.fromkeys(row["rule"].split(), 0.5)
    predictor = tamis.Sparge(
        cdf=rule.get("cdf"),
        topk=rule.get("topk"),
        sink=not row["sink"],
        keep={"keys": [(0, 70)]} if row["keep"] else None,
    )
    blocks, options = _block_size(row), _sight(row["sight"], _LENGTH, length)
    with chips.assume(name), launch.note() as launches:
        predictor.prepare(query, key, block_size=blocks, backend="triton", precision=row["kind"], **options)
        prepare.summarize(value, blocks[1], None, None)
        segments = torch.zeros(1, length, dtype=torch.int64) if row["sight"] == "segments" else None
        if "fp8" in kinds(name):
            prepare.columns(None, value, segments, None)  # what attention reads after a prediction
        _packed(key, value, segments)
    return launches


def _packed(key: Tensor, value: Tensor, segments: Tensor | None = None) -> tamis.PackedKV:
    mean = prepare.key_mean(key, segments, None)
    tensors = [*prepare.pack_kv(key, value, mean, segments), mean]
    return tamis.PackedKV(tensors, key.shape[2], 1, tails(key, value), "triton")


def _block_size(row: Row) -> tuple[int, int]:
    return 64 if row["rows"] == "64 rows" else 128, 128 if row["keys"] else 64


def _dims(row: Row) -> tuple[int, int]:
    """Head dims of query and value: "odd" is neither a power of two nor, in bytes, a multiple of 16."""
    dim = int(row["dim"][2:])
    return {
        "": (dim, dim),
        "odd": (dim - 23, dim - 23),
        "narrow values": (dim, dim // 2),
        "narrow keys": (dim // 2, dim),
    }[row["shape"]]


def _inputs(row: Row, q_len: int, kv_len: int) -> tuple[Tensor, Tensor, Tensor]:
    dtype = {"": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[row["dtype"]]
    dim, value_dim = _dims(row)
    shapes = ((_HEADS, q_len, dim), (_KV_HEADS, kv_len, dim), (_KV_HEADS, kv_len, value_dim))
    inputs = tuple(torch.zeros(1, *shape, dtype=dtype) for shape in shapes)
    if row.get("layout") == "columns":
        inputs = tuple(x.mT.contiguous().mT for x in inputs)
    query, key, value = inputs
    return query, key, value


def _sight(sight: str, q_len: int, kv_len: int) -> dict[str, Any]:
    """The arguments of `attend` that say who sees whom."""
    everything = sight == "all masks"
    options: dict[str, Any] = {"causal": everything or sight in ("causal", "causal window", "positions", "bias")}
    if everything or sight in ("window", "causal window", "positions"):
        options["window"] = 100
    places = torch.arange(kv_len)[-q_len:], torch.arange(kv_len)
    if everything or sight == "positions":
        options["positions"] = places
    if everything or sight == "segments":
        options["segments"] = tuple(x // 100 for x in places)
    if everything or sight in ("mask", "bias"):
        options["attn_mask"] = torch.ones(q_len, kv_len, dtype=torch.bool if sight == "mask" else torch.float32)
    return options
