"""What `tamis bench gpu` times: shapes, inputs, random masks, and the calls of torch and tamis on them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from tamis import geometry
from tamis.attend import attend, sparse_attention
from tamis.bench import gpu_traffic
from tamis.bench.gpu_report import NOT_MEASURED, PEERS
from tamis.block_mask import BlockMask
from tamis.call import Prepared
from tamis.predictors.sparge import Sparge
from tamis.stats import AttentionOutput

BACKEND = "triton"
BLOCK_SIZE = (128, 64)
PRECISIONS = ("full", "int8", "fp8")


@dataclass(frozen=True)
class Shape:
    """One attention layer of a model."""

    name: str
    batch: int
    heads: int
    kv_heads: int
    tokens: int
    head_dim: int
    causal: bool = False


SHAPES = (
    Shape("cogvideox", 2, 30, 30, 17776, 64),
    Shape("mochi", 1, 24, 24, 22528, 128),
    Shape("llama-32k", 1, 32, 8, 32768, 128, causal=True),
    Shape("flux", 1, 24, 24, 4608, 128),
    Shape("llama-128k", 1, 32, 8, 131072, 128, causal=True),
)
QUICK = ("llama-32k", "flux")


class Inputs(NamedTuple):
    """One set of tensors `[batch, heads, tokens, head_dim]`."""

    query: Tensor
    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class Candidate:
    """Something to time: what its row says of it, the call, and the blocks an exact computation must keep."""

    name: str
    precision: str
    density: float
    call: Callable[[Inputs], Any]
    mask: Callable[[Inputs], BlockMask | None] = lambda _inputs: None

    @property
    def ours(self) -> bool:
        """Whether it is tamis that runs, not torch."""
        return self.name not in PEERS

    @property
    def title(self) -> str:
        """What messages call it."""
        return f"{self.name} {self.precision}, density {self.density:g}"


def normals(shape: Shape, generator: torch.Generator) -> Inputs:
    """One set of inputs, bf16."""

    def some(heads: int) -> Tensor:
        size = (shape.batch, heads, shape.tokens, shape.head_dim)
        return torch.randn(size, generator=generator, device=generator.device, dtype=torch.bfloat16)

    return Inputs(some(shape.heads), some(shape.kv_heads), some(shape.kv_heads))


def random_mask(shape: Shape, density: float, generator: torch.Generator) -> BlockMask:
    """Every query block of every head keeps this share of the key blocks it sees, at random, and its diagonal."""
    block_q, block_kv = BLOCK_SIZE
    q_blocks, kv_blocks = (geometry.num_blocks(shape.tokens, block) for block in BLOCK_SIZE)
    device = generator.device
    order = torch.rand(1, shape.heads, q_blocks, kv_blocks, generator=generator, device=device)
    first = torch.arange(q_blocks, device=device)[:, None] * block_q
    keys = torch.arange(kv_blocks, device=device) * block_kv
    last = (first + block_q - 1).clamp(max=shape.tokens - 1)
    visible, least = torch.ones_like(first <= keys), torch.ones_like(first[:, 0])
    if shape.causal:
        visible = keys <= last
        diagonal = visible & (keys + block_kv > first)
        order = order.masked_fill(diagonal, -1.0).masked_fill(~visible, 2.0)
        least = diagonal.sum(-1)
    kept = (density * visible.sum(-1)).round().to(torch.int64).maximum(least)
    limit = order.sort(dim=-1).values.gather(-1, (kept - 1)[:, None].expand(*order.shape[:3], 1))
    return BlockMask.from_dense(order <= limit, BLOCK_SIZE, (shape.tokens, shape.tokens))


def candidates(shape: Shape, masks: dict[float, BlockMask], *, flex: bool) -> Iterator[Candidate]:
    """Everything that is timed on a shape."""
    for name, kind in (("sdpa flash", SDPBackend.FLASH_ATTENTION), ("sdpa cudnn", SDPBackend.CUDNN_ATTENTION)):
        yield Candidate(name, "bf16", 1.0, partial(_sdpa, kind, shape))
    for precision in PRECISIONS:
        yield Candidate("dense", precision, 1.0, partial(_attend, shape, precision, None))
    compiled = _flex(shape) if flex else None
    for density, mask in masks.items():
        kept = partial(_given, mask)
        if compiled is not None:
            yield Candidate("flex", "bf16", density, compiled(mask), kept)
        for precision in PRECISIONS:
            yield Candidate("mask", precision, density, partial(_attend, shape, precision, mask), kept)
    for density in masks:
        for precision in PRECISIONS[1:]:
            how = (shape, Sparge(topk=density, similarity=-1), precision)
            yield Candidate("total", precision, density, partial(_total, *how), partial(_predicted, *how))
            yield Candidate("predict", precision, density, partial(_predict, *how))
    yield Candidate("quantise value", "fp8", 1.0, _quantise_value)


def moved(shape: Shape, candidate: Candidate, density: float) -> tuple[int, int] | None:
    """Bytes that a prediction, or the rounding of value, asks for, and the least; None of other calls."""
    call = _prologue(shape, density)
    if candidate.name == "quantise value":
        return gpu_traffic.total(gpu_traffic.values(call)), gpu_traffic.least_values(call)
    if candidate.name == "predict":
        return gpu_traffic.total(gpu_traffic.prediction(call)), gpu_traffic.least_prediction(call)
    return None


def _prologue(shape: Shape, density: float) -> gpu_traffic.Prologue:
    call = gpu_traffic.Prologue(
        *(shape.batch, shape.heads, shape.kv_heads, *(shape.tokens,) * 2, *(shape.head_dim,) * 2),
        block_size=BLOCK_SIZE,
    )
    return replace(call, kept=round(density * shape.batch * shape.heads * call.visible(shape.causal)))


def traffic_markdown() -> str:
    """Bytes before attention at density .25, kernel by kernel, as the table of docs/performance-gpu.md."""
    kernels = ("columns", "join", "digest", "scores", "choose", "value_fp8")
    lines = [f"| | | {' | '.join(kernels)} | all | least | GB/s |", "|---" * 11 + "|"]
    for shape in SHAPES:
        call = _prologue(shape, 0.25)
        for step, parts, least in (
            ("prediction", gpu_traffic.prediction(call), gpu_traffic.least_prediction(call)),
            ("value to e4m3", gpu_traffic.values(call), gpu_traffic.least_values(call)),
        ):
            by_name = {kernel: f"{(read + written) / 1e9:.3f}" for kernel, read, written in parts}
            cells = " | ".join(by_name.get(f"{kernel}_kernel", "-") for kernel in kernels)
            sums = f"{gpu_traffic.total(parts) / 1e9:.3f} | {least / 1e9:.3f}"
            lines.append(f"| {shape.name} | {step} | {cells} | {sums} | {NOT_MEASURED} |")
    return "\n".join(lines)


def _given(mask: BlockMask, _inputs: Inputs) -> BlockMask:
    return mask


def _sdpa(kind: SDPBackend, shape: Shape, inputs: Inputs) -> Tensor:
    with sdpa_kernel(kind):
        return scaled_dot_product_attention(*inputs, is_causal=shape.causal, enable_gqa=shape.heads != shape.kv_heads)


def _attend(shape: Shape, precision: str, mask: BlockMask | None, inputs: Inputs) -> AttentionOutput:
    return attend(*inputs, mask, causal=shape.causal, precision=precision, backend=BACKEND)


def _total(shape: Shape, predictor: Sparge, precision: str, inputs: Inputs) -> object:
    return sparse_attention(
        *inputs,
        is_causal=shape.causal,
        enable_gqa=True,
        predictor=predictor,
        precision=precision,
        backend=BACKEND,
        return_stats=True,
    )


def _predict(shape: Shape, predictor: Sparge, precision: str, inputs: Inputs) -> tuple[BlockMask, Prepared]:
    return predictor.prepare(inputs.query, inputs.key, causal=shape.causal, backend=BACKEND, precision=precision)


def _predicted(shape: Shape, predictor: Sparge, precision: str, inputs: Inputs) -> BlockMask:
    return _predict(shape, predictor, precision, inputs)[0]


def _quantise_value(inputs: Inputs) -> object:
    """What "fp8" adds to the rounding of query and key, which is part of a prediction."""
    from tamis.backends.triton import prepare

    _, scale = prepare.columns(None, inputs.value, None, None)
    assert scale is not None
    return prepare.fp8_values(inputs.value, scale, None, None)


def _flex(shape: Shape) -> Callable[[BlockMask], Callable[[Inputs], Tensor]]:
    """FlexAttention on the same blocks; the masks of a shape share one compilation."""
    compiled = compiled_flex()
    # Its own tiles may be wider than our blocks, which it then refuses.
    tiles = {"BLOCK_M": BLOCK_SIZE[0], "BLOCK_N": BLOCK_SIZE[1]}

    def with_mask(mask: BlockMask) -> Callable[[Inputs], Tensor]:
        blocks = functools.cache(partial(mask.to_flex, shape.causal))

        def call(inputs: Inputs) -> Tensor:
            gqa = shape.heads != shape.kv_heads
            output: Tensor = compiled(*inputs, block_mask=blocks(), enable_gqa=gqa, kernel_options=tiles)
            return output

        return call

    return with_mask


def compiled_flex() -> Callable[..., Any]:
    """FlexAttention, compiled anew: past its limit of shapes torch would run it uncompiled."""
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)
