"""The five operations every backend offers, as torch ops, and the choice of a backend.

Each op `tamis::NAME(..., str backend)` calls the function of that name in the backend's module, so that compiled and
exported graphs hold one opaque node. Backends are found by name: a module `tamis.backends.NAME` is all it takes.
"""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from tamis import geometry
from tamis.call import LARGEST, SMALLEST, Call
from tamis.errors import unsupported
from tamis.mixing import neighbours
from tamis.stats import Formats

BACKENDS = ("cpu", "triton", "reference")


class Backend(Protocol):
    """What a backend's module holds; the operations take the arguments of the ops below, without `backend`."""

    NAME: str
    MIXES: bool  # whether its keys in 8 bits are mixed, as `tamis.mixing` does

    def reasons(self, call: Call) -> list[str]:
        """Why this backend can't serve the call; empty if it can."""

    def target(self, device: torch.device) -> str | None:
        """The instruction set or kind of device in use, if there is a choice."""

    def formats(self, precision: str, dtype: torch.dtype, packed: bool, device: torch.device) -> Formats:
        """Number formats of the two products; `dtype` is that of the query, `packed` whether key is a `PackedKV`."""

    def key_mean(self, key: Tensor, segments: Tensor | None, used: Tensor | None) -> Tensor: ...

    def summarize(
        self, x: Tensor, block: int, mean: Tensor | None, segments: Tensor | None
    ) -> tuple[Tensor, Tensor]: ...

    def select(
        self,
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
    ) -> tuple[Tensor, Tensor]: ...

    def pack_kv(self, key: Tensor, value: Tensor, mean: Tensor, segments: Tensor | None) -> list[Tensor]: ...

    def attend(
        self,
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
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`prepared` is what this backend's own `predict` returned for the same inputs, or empty."""


_SCHEMAS = (
    "key_mean(Tensor key, Tensor? segments, Tensor? used, str backend) -> Tensor",
    "summarize(Tensor x, int block, Tensor? mean, Tensor? segments, str backend) -> (Tensor, Tensor)",
    "select(Tensor q_means, Tensor q_similarity, Tensor k_means, Tensor k_similarity, float scale, Tensor? cdf, "
    "Tensor? topk, Tensor similarity, bool sink, bool causal, SymInt? window, SymInt q_len, SymInt kv_len, "
    "int block_q, int block_kv, Tensor? q_bounds, Tensor? kv_bounds, Tensor? visible, Tensor? must, bool trim, "
    "str backend) -> (Tensor, Tensor)",
    "predict(Tensor query, Tensor key, Tensor? q_segments, Tensor? kv_segments, float scale, Tensor? cdf, "
    "Tensor? topk, Tensor similarity, bool sink, bool causal, SymInt? window, int block_q, int block_kv, "
    "Tensor? q_bounds, Tensor? kv_bounds, Tensor? visible, Tensor? must, bool trim, str precision, str backend) "
    "-> (Tensor, Tensor, Tensor[])",
    "pack_kv(Tensor key, Tensor value, Tensor mean, Tensor? segments, str backend) -> Tensor[]",
    "attend(Tensor query, Tensor? key, Tensor? value, Tensor[] packed, Tensor? kv_num_blocks, Tensor? kv_indices, "
    "int block_q, int block_kv, bool causal, SymInt? window, float scale, Tensor? attn_mask, Tensor? q_positions, "
    "Tensor? kv_positions, Tensor? q_segments, Tensor? kv_segments, Tensor? q_bounds, Tensor? kv_bounds, "
    "Tensor? visible, float? softcap, Tensor? sink_logits, str precision, Tensor? pv_threshold, Tensor[] prepared, "
    "str backend) "
    "-> (Tensor output, Tensor lse, Tensor counts)",
)
_ATTEND_NAMES = re.findall(r"(\w+)(?:,|\))", _SCHEMAS[-1].split(" -> ")[0])
_library: Any = torch.library.Library("tamis", "FRAGMENT")  # type: ignore[no-untyped-call]
_ops: Any = torch.ops.tamis
_loaded: dict[str, Backend] = {}
_warned: list[bool] = []
_MEMORY = """\
tamis: the memory of the device ran out in {}; the inputs are as they were. Call with fewer heads or a smaller batch at
a time. precision="full" makes no 8-bit copies: "int8" takes a byte per element of query and key, "fp8" of value too.
Predicted lists take 4 bytes per head and pair of blocks, half of that with block_size=(128, 128)."""


def load(name: str) -> Backend:
    """The backend's module."""
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None, got {name!r}")
    if name not in _loaded:
        _loaded[name] = cast(Backend, importlib.import_module(f"tamis.backends.{name}"))
    return _loaded[name]


def choose(call: Call, backend: str | None) -> str:
    """Name the backend that serves the call: the one asked for, or the first that can.

    Raises:
        UnsupportedError: it can't, or none can; the message lists every backend's reasons.
    """
    wanted = BACKENDS if backend is None else (backend,)
    for name in wanted:
        if not load(name).reasons(call):
            if backend is None and name == "reference" and not torch.compiler.is_compiling():
                _warn_of_plain_torch(call)
            return name
    reasons = {name: load(name).reasons(call) for name in BACKENDS}
    what = "no backend can" if backend is None else f"backend {backend!r} can't"
    raise unsupported(f"{what} serve this call", reasons)


def _warn_of_plain_torch(call: Call) -> None:
    """Say once per process that a GPU's tensors land where nobody wants them."""
    if call.query.device.type != "cuda" or _warned:
        return
    _warned.append(True)
    why = "; ".join(load("triton").reasons(call))
    warnings.warn(
        f"this call and others like it run in plain torch, right and very slow, because the triton backend can't "
        f"serve them: {why}",
        RuntimeWarning,
        stacklevel=4,
    )


def description(name: str, call: Call) -> tuple[str | None, Formats]:
    """The backend's target and the number formats of its two products; fixed in a compiled graph."""
    device = call.query.device
    made = _description(name, call.precision, call.query.dtype, bool(call.packed), device.type, device.index)
    return cast(tuple[str | None, Formats], made)


def kernel_reason(name: str, call: Call) -> tuple[str | None, str | None]:
    """Why a backend with a kernel for the machine at hand does not use it, with few query rows and with many."""
    module = cast(Any, load(name))
    if not hasattr(module, "kernel_reason"):
        return None, None
    return cast("tuple[str | None, str | None]", module.kernel_reason(call))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _description(
    name: str, precision: str, dtype: torch.dtype, packed: bool, kind: str, index: int | None
) -> tuple[str | None, Formats]:
    device = torch.device(kind) if index is None else torch.device(kind, index)
    return load(name).target(device), load(name).formats(precision, dtype, packed, device)


def key_mean(key: Tensor, segments: Tensor | None, used: Tensor | None, backend: str) -> Tensor:
    """Mean key of every head over its finite tokens with a segment >= 0 in the used 64-key blocks, fp32."""
    return cast(Tensor, _ops.key_mean(key, segments, used, backend))


def summarize(
    x: Tensor, block: int, mean: Tensor | None, segments: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    """Mean row and self-similarity of every block of x - mean, fp32."""
    return cast("tuple[Tensor, Tensor]", _ops.summarize(x, block, mean, segments, backend))


def select(*arguments: object) -> tuple[Tensor, Tensor]:
    """Choose key blocks from block means and similarities; the arguments are those of the op."""
    return cast("tuple[Tensor, Tensor]", _ops.select(*arguments))


def predict(*arguments: object) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Both summaries and the selection in one op: the lists, and what `attend` in `precision` need not read again."""
    return cast("tuple[Tensor, Tensor, list[Tensor]]", _ops.predict(*arguments))


def pack_kv(key: Tensor, value: Tensor, mean: Tensor, segments: Tensor | None, backend: str) -> list[Tensor]:
    """Quantise key (less its mean) and value."""
    return cast("list[Tensor]", _ops.pack_kv(key, value, mean, segments, backend))


def mixed(dim: int, backend: str) -> int:
    """How many neighbours of a key's channels `pack_kv` mixes."""
    return neighbours(dim) if load(backend).MIXES else 1


def attend(call: Call, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Run a call: output, log-sum-exp, and counts of visible, QK and PV block products per query block."""
    result = _ops.attend(
        call.query,
        call.key,
        call.value,
        list(call.packed),
        call.kv_num_blocks,
        call.kv_indices,
        *call.block_size,
        call.causal,
        call.window,
        call.scale,
        call.attn_mask,
        call.q_positions,
        call.kv_positions,
        call.q_segments,
        call.kv_segments,
        call.q_bounds,
        call.kv_bounds,
        call.visible,
        call.softcap,
        call.sink_logits,
        call.precision,
        call.pv_threshold,
        list(call.prepared),
        backend,
    )
    return cast("tuple[Tensor, Tensor, Tensor]", result)


def _fake_key_mean(key: Tensor, segments: Tensor | None, used: Tensor | None, backend: str) -> Tensor:
    return key.new_empty((key.shape[0], key.shape[1], key.shape[3]), dtype=torch.float32)


def _fake_summarize(
    x: Tensor, block: int, mean: Tensor | None, segments: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    batch, heads, length, dim = x.shape
    blocks = geometry.traced_blocks(length, block)
    return (
        x.new_empty((batch, heads, blocks, dim), dtype=torch.float32),
        x.new_empty((batch, heads, blocks), dtype=torch.float32),
    )


def _fake_select(q_means: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
    k_means, trim = cast(Tensor, arguments[1]), arguments[-2]
    batch, heads, q_blocks, _ = q_means.shape
    # A trimmed width depends on the data; callers trim only outside of traced graphs.
    width = torch.library.get_ctx().new_dynamic_size() if trim else k_means.shape[2]
    return (
        q_means.new_empty((batch, heads, q_blocks), dtype=torch.int32),
        q_means.new_empty((batch, heads, q_blocks, width), dtype=torch.int32),
    )


def _fake_predict(query: Tensor, key: Tensor, *arguments: object) -> tuple[Tensor, Tensor, list[Tensor]]:
    block_q, block_kv, trim = cast(int, arguments[9]), cast(int, arguments[10]), arguments[-3]
    precision, module = cast(str, arguments[-2]), cast(Any, load(cast(str, arguments[-1])))
    lead = (query.shape[0], query.shape[1], geometry.traced_blocks(query.shape[2], block_q))
    width = torch.library.get_ctx().new_dynamic_size() if trim else geometry.traced_blocks(key.shape[2], block_kv)
    prepared = module.room(query, key, block_kv, precision) if hasattr(module, "room") else []
    return query.new_empty(lead, dtype=torch.int32), query.new_empty((*lead, width), dtype=torch.int32), prepared


def _fake_pack_kv(key: Tensor, value: Tensor, mean: Tensor, segments: Tensor | None, backend: str) -> list[Tensor]:
    batch, heads, length, dim = key.shape
    blocks, padded, value_dim = geometry.num_blocks(length, 64), (dim + 3) // 4 * 4, value.shape[3]
    shapes: list[tuple[tuple[int, ...], torch.dtype]] = [
        ((batch, heads, blocks, 64, padded), torch.int8),
        ((batch, heads, blocks), torch.float32),
        ((batch, heads, blocks, 64), torch.int32),
        ((batch, heads, blocks, value_dim, 64), torch.int8),
        ((batch, heads, blocks, value_dim), torch.float32),
        ((batch, heads, blocks, value_dim), torch.int32),
    ]
    return [key.new_empty(shape, dtype=dtype) for shape, dtype in shapes]


def _fake_attend(
    query: Tensor, key: Tensor | None, value: Tensor | None, packed: list[Tensor], *arguments: object
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, q_len, _ = query.shape
    value_dim = packed[4].shape[-1] if value is None else value.shape[-1]
    q_blocks = geometry.traced_blocks(q_len, cast(int, arguments[2]))
    return (
        query.new_empty((batch, heads, q_len, value_dim)),
        query.new_empty((batch, heads, q_len), dtype=torch.float32),
        query.new_empty((batch, heads, q_blocks, 3), dtype=torch.float64),
    )


def _check_values(*arguments: object) -> None:
    """Shapes and values of an `attend` op when it runs: a compiled graph passed the door with other ones.

    Native code trusts these shapes, so nothing may reach it without this.
    """
    call = dict(zip(_ATTEND_NAMES, arguments, strict=False))
    query = cast(Tensor, call["query"])
    batch, heads, q_len, _ = query.shape
    q_blocks = geometry.num_blocks(q_len, cast(int, call["block_q"]))
    num, indices = cast("Tensor | None", call["kv_num_blocks"]), cast("Tensor | None", call["kv_indices"])
    if num is not None and indices is not None:
        if num.shape != (batch, heads, q_blocks) or indices.shape[:3] != num.shape:
            raise ValueError(
                f"block_mask has lists {tuple(num.shape)} and {tuple(indices.shape)}, expected "
                f"({batch}, {heads}, {q_blocks}) and ({batch}, {heads}, {q_blocks}, max_blocks)"
            )
        if num.dtype != torch.int32 or indices.dtype != torch.int32:
            raise TypeError(f"block_mask must hold int32 lists, got {num.dtype} and {indices.dtype}")
    softcap, scale = cast("float | None", call["softcap"]), cast(float, call["scale"])
    if softcap is not None and not (SMALLEST <= softcap <= LARGEST):
        raise ValueError(f"softcap must be finite and > 0, got {softcap}")
    if not abs(scale) <= LARGEST:
        raise ValueError(f"scale must be finite, got {scale}")
    for name in ("pv_threshold", "sink_logits"):
        setting = cast("Tensor | None", call[name])
        if setting is not None and setting.shape != (heads,):
            raise ValueError(f"{name} must be [{heads}] (query heads), got {tuple(setting.shape)}")
    threshold = cast("Tensor | None", call["pv_threshold"])
    if threshold is not None and threshold.device.type == "cpu" and not bool((threshold > 0).all()):
        raise ValueError(f"pv_threshold must be > 0 (None turns it off), got {threshold.tolist()}")


def _predict_in_steps(module: Any, *arguments: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    """`predict` of a backend that has the three functions and no shortcut through them."""
    query, key, q_segments, kv_segments, *choice, block_q, block_kv = arguments[:13]
    mean = module.key_mean(key, kv_segments, None)
    q_summary = module.summarize(query, block_q, None, q_segments)
    k_summary = module.summarize(key, block_kv, mean, kv_segments)
    lengths = (query.shape[2], key.shape[2])
    lists = module.select(*q_summary, *k_summary, *choice, *lengths, block_q, block_kv, *arguments[13:-1])
    return *cast("tuple[Tensor, Tensor]", lists), []


def _register() -> None:
    fakes: dict[str, Callable[..., object]] = {
        "key_mean": _fake_key_mean,
        "summarize": _fake_summarize,
        "select": _fake_select,
        "predict": _fake_predict,
        "pack_kv": _fake_pack_kv,
        "attend": _fake_attend,
    }
    for schema in _SCHEMAS:
        name = schema.split("(")[0]

        def run(*arguments: object, _name: str = name) -> object:
            if _name == "attend":
                _check_values(*arguments)
            module = load(cast(str, arguments[-1]))
            try:
                if _name == "predict" and not hasattr(module, "predict"):
                    return _predict_in_steps(module, *arguments[:-1])
                return getattr(module, _name)(*arguments[:-1])
            except torch.OutOfMemoryError as error:
                raise torch.OutOfMemoryError(f"{error}\n{_MEMORY.format(_name)}") from error

        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"tamis::{name}", fakes[name], lib=_library)


_register()
for _name in BACKENDS:
    load(_name)
