"""torch.compile without graph breaks, torch.export with a dynamic length, and torch's own checks of every op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from engines import Engine, engines
from samples import assert_reordered, block_mask, qkv
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import tamis

BACKENDS = sorted({engine.backend for engine in engines()})

# Reading the key of a dict of tensors, tracing and inductor warn about themselves; tamis has no part in it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*:UserWarning"),
]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def sparse(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    result = tamis.sparse_attention(q, k, v, is_causal=True, enable_gqa=True, backend=backend)
    assert isinstance(result, Tensor)
    return result


def sparse_cross(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    half = q[:, :, : q.shape[2] // 2]
    result = tamis.sparse_attention(half, k, v, is_causal=True, enable_gqa=True, precision="full", backend=backend)
    assert isinstance(result, Tensor)
    return result


def full(q: Tensor, k: Tensor, v: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    result = tamis.attend(q, k, v, causal=True, window=100, softcap=3.0, backend=backend)
    return result.output, result.lse


def int8(q: Tensor, k: Tensor, v: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    result = tamis.attend(q, k, v, causal=True, precision="int8", pv_threshold=2.0, backend=backend)
    return result.output, result.lse


def predicted(q: Tensor, k: Tensor, v: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    mask = tamis.Sparge(topk=0.5, keep={"keys": [(0, 10)]})(q, k, causal=True, backend=backend)
    result = tamis.attend(q, k, v, mask, causal=True, backend=backend)
    return result.output, result.lse


def windowed(q: Tensor, k: Tensor, v: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    result = tamis.attend(q, k, v, tamis.Window(70)(q, k, causal=True), causal=True, backend=backend)
    return result.output, result.lse


def with_tensors(q: Tensor, k: Tensor, v: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    n = q.shape[2]
    position, sinks = torch.arange(n), torch.linspace(-1, 1, q.shape[1])
    segment = torch.where(position < n // 3, 0, 1)
    mask = position[:, None] - position < 90
    options: dict[str, Any] = {"positions": (position, position), "segments": (segment, segment), "attn_mask": mask}
    kept = tamis.Sparge(cdf=0.7)(q, k, causal=True, backend=backend, **options)
    result = tamis.attend(q, k, v, kept, causal=True, sink_logits=sinks, backend=backend, **options)
    return result.output, result.lse


def compensated(q: Tensor, k: Tensor, v: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    kept = tamis.Sparge(topk=0.3, similarity=-1.0)(q, k, causal=True, backend=backend)
    result = tamis.attend(q, k, v, kept, causal=True, softcap=3.0, compensate="centroid", backend=backend)
    return result.output, result.lse


def merged(q: Tensor, k: Tensor, v: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    parts = [tamis.attend(q, k[:, :, part], v[:, :, part], backend=backend) for part in (slice(0, 70), slice(70, None))]
    result = tamis.merge([part.output for part in parts], [part.lse for part in parts])
    return result.output, result.lse


def varlen(q: Tensor, k: Tensor, v: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    n = q.shape[2]
    offsets = torch.tensor([0, 50, n], dtype=torch.int32)
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    result = tamis.attend_varlen(q, k, v, offsets, offsets, causal=True, backend=backend)
    return result.output, result.lse


FUNCTIONS = [sparse, sparse_cross, full, int8, predicted, windowed, with_tensors, compensated, merged, varlen]


def flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def inputs(n: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    return qkv(heads=4, kv_heads=2, q_len=n, dim=16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_compiles_whole(function: Callable[..., Any], backend: str) -> None:
    q, k, v = inputs()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(flat(compiled(q, k, v, backend)), flat(function(q, k, v, backend)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_new_length_does_not_recompile(function: Callable[..., Any], backend: str) -> None:
    """From two blocks on: a size of 1 is a case of its own in any torch graph."""
    counter = CompileCounter()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for n in (600, 733, 530, 768):
        q, k, v = inputs(n)
        for ours, theirs in zip(flat(compiled(q, k, v, backend)), flat(function(q, k, v, backend)), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", [sparse, compensated])
def test_inductor(function: Callable[..., Any], backend: str) -> None:
    q, k, v = inputs()
    compiled = torch.compile(lambda q, k, v: flat(function(q * 1.5, k, v, backend))[0] + 1, fullgraph=True)
    expected = flat(function(q * 1.5, k, v, backend))[0] + 1
    torch.testing.assert_close(compiled(q, k, v), expected, rtol=0, atol=0)


class Attention(torch.nn.Module):
    """A model's attention layer: projections around one of the functions above."""

    def __init__(self, function: Callable[..., Any], backend: str) -> None:
        super().__init__()
        self.function, self.backend = function, backend

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return self.function(q * 0.5, k, v, self.backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", [sparse, full, int8, predicted, with_tensors, compensated])
def test_exports_with_a_dynamic_length(function: Callable[..., Any], backend: str) -> None:
    model = Attention(function, backend)
    length = torch.export.Dim("length", min=2, max=4096)
    shapes = {name: {2: length} for name in ("q", "k", "v")}
    with torch.no_grad():
        program = torch.export.export(model, inputs(200), dynamic_shapes=shapes).module()
        for n in (200, 77, 450):
            q, k, v = inputs(n)
            for ours, theirs in zip(flat(program(q, k, v)), flat(model(q, k, v)), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_exported_graph_holds_one_node_per_op() -> None:
    program = torch.export.export(Attention(sparse, BACKENDS[0]), inputs(200))
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    for op, count in (("attend", 1), ("predict", 1)):
        assert sum(name.startswith(f"tamis.{op}") for name in names) == count
    assert not any(name.startswith(("aten.item", "aten._local_scalar")) for name in names)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_key_mean_and_summarize(backend: str) -> None:
    _, k, _ = qkv(batch=2, kv_len=150, dim=8)
    segments, used = torch.randint(-1, 2, (2, 150)), torch.rand(2, 2, 3) < 0.5
    for arguments in (
        (k, None, None),
        (k.bfloat16(), segments, used),
        (k.transpose(1, 2).contiguous().transpose(1, 2), None, used),
    ):
        torch.library.opcheck(torch.ops.tamis.key_mean.default, (*arguments, backend))
    mean = torch.randn(2, 2, 8)
    for x, segment, centre in ((k, None, None), (k.half(), segments, mean)):
        torch.library.opcheck(torch.ops.tamis.summarize.default, (x, 64, centre, segment, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_select(backend: str) -> None:
    heads = torch.full((2,), 0.5)
    arguments = (
        torch.randn(1, 2, 3, 8),
        torch.rand(1, 2, 3),
        torch.randn(1, 2, 5, 8),
        torch.rand(1, 2, 5),
        0.3,
        heads,
        heads,
        heads,
        True,
        True,
        None,
        300,
        300,
        128,
        64,
        None,
        None,
        None,
        None,
        False,
        backend,
    )
    torch.library.opcheck(torch.ops.tamis.select.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trim", [False, True])
def test_opcheck_predict(backend: str, trim: bool) -> None:
    q, k, _ = qkv(heads=4, kv_heads=2, q_len=300, kv_len=300, dim=8)
    heads = torch.full((4,), 0.5)
    options = (0.3, heads, None, heads, True, True, None, 128, 64, None, None, None, None, trim, "int8", backend)
    # A width that depends on the data cannot be traced with dynamic shapes; callers trim only outside of traced graphs.
    checks = {"test_utils": ("test_schema", "test_faketensor")} if trim else {}
    torch.library.opcheck(torch.ops.tamis.predict.default, (q, k, None, None, *options), **checks)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_pack_kv(backend: str) -> None:
    _, k, v = qkv(kv_len=150, dim=7, value_dim=5)
    for segments in (None, torch.randint(-1, 2, (1, 150))):
        torch.library.opcheck(torch.ops.tamis.pack_kv.default, (k, v, torch.zeros(1, 2, 7), segments, backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("precision", ["full", "int8"])
def test_opcheck_attend(backend: str, precision: str) -> None:
    q, k, v = qkv(heads=4, kv_heads=2, q_len=70, kv_len=150, dim=8, value_dim=5)
    mask = block_mask((70, 150), heads=4)
    lists = (mask.kv_num_blocks, mask.kv_indices.expand(1, 4, -1, -1))
    segment = torch.zeros(1, 70, dtype=torch.int64), torch.zeros(1, 150, dtype=torch.int64)
    for dense in (True, False):
        torch.library.opcheck(
            torch.ops.tamis.attend.default,
            (
                q,
                k,
                v,
                [],
                *((None, None) if dense else lists),
                128,
                64,
                True,
                None if dense else 90,
                0.3,
                None if dense else torch.randn(1, 4, 70, 150),
                None,
                None,
                *((None, None) if dense else segment),
                None,
                None,
                None,
                None,
                torch.randn(4),
                precision,
                None if dense else torch.full((4,), 3.0),
                [],
                backend,
            ),
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_add_centroids(backend: str) -> None:
    q, k, v = qkv(heads=4, kv_heads=2, q_len=170, kv_len=250, dim=8, value_dim=5)
    mask = block_mask((170, 250), heads=4)
    lists = (mask.kv_num_blocks, mask.kv_indices)
    torch.library.opcheck(
        torch.ops.tamis.add_centroids.default,
        (
            *(torch.randn(1, 4, 170, 5), torch.randn(1, 4, 170)),
            *(q, k, v, []),
            *lists,
            *(128, 64, True, 90, 0.3),
            torch.randn(1, 1, 170, 250).expand(1, 4, -1, -1),
            *(None, None),
            *(torch.zeros(1, 170, dtype=torch.int64), torch.zeros(1, 250, dtype=torch.int64)),
            *(2.0, backend),
        ),
    )


def test_packed_compiles(any_engine: Engine) -> None:
    """Attending to a PackedKV; appending is Python's business."""
    q, k, v = inputs()
    packed = tamis.pack_kv(k, v)

    def run(query: Tensor) -> Tensor:
        result = tamis.attend(query, packed, None, causal=True, precision="int8", backend=any_engine.backend)
        return result.output

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q), run(q))


def test_block_mask_crosses_the_border_of_a_graph(any_engine: Engine) -> None:
    """A mask made outside enters a compiled function as it is."""
    q, k, v = inputs()
    mask = block_mask((200, 200), heads=4)

    def run(query: Tensor, kept: Any) -> tuple[Tensor, Tensor]:
        result = tamis.attend(query, k, v, kept, causal=True, backend=any_engine.backend)
        return result.output, result.lse

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    ours, theirs = compiled(q, mask), run(q, mask)
    assert_reordered(tamis.AttentionOutput(*ours), tamis.AttentionOutput(*theirs), 200)


def test_corrupt_mask_in_a_graph(any_engine: Engine) -> None:
    """Values are not seen when a graph is made, so the op itself looks at them."""
    if any_engine.backend == "triton":
        pytest.skip("lists are not read before they are used: test_poison.py has what that means")
    q, k, v = inputs()

    def run(query: Tensor, counts: Tensor, indices: Tensor) -> Tensor:
        mask = tamis.BlockMask(counts, indices, (64, 64), (200, 200))
        return tamis.attend(query, k, v, mask, backend=any_engine.backend).output

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    counts, indices = torch.full((1, 1, 4), 2, dtype=torch.int32), torch.tensor([0, 3], dtype=torch.int32)
    indices = indices.repeat(1, 1, 4, 1)
    assert torch.equal(compiled(q, counts, indices), run(q, counts, indices))
    for place, value in (((0, 0, 3, 1), 4), ((0, 0, 0, 0), -1), ((0, 0, 2, 1), 0)):
        wrong = indices.clone()
        wrong[place] = value
        with pytest.raises(ValueError, match=r"block_mask|kv_indices"):
            compiled(q, counts, wrong)
    with pytest.raises(ValueError, match=r"block_mask|kv_num_blocks"):
        compiled(q, counts + 1, indices)


@pytest.mark.parametrize("backend", BACKENDS)
def test_wrong_offsets_in_a_graph(backend: str) -> None:
    """Offsets are not read in a graph: whatever they are, no memory outside the tensors is, and stray tokens get 0."""
    q, k, v = (x[0].transpose(0, 1) for x in inputs())

    def run(query: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        result = tamis.attend_varlen(query, k, v, offsets, offsets, causal=True, backend=backend)
        return result.output, result.lse

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for values in ([0, 50, 200], [0, 50, 9999], [10, 50, 150], [0, 300, 200], [-40, 50, 200], [2**31 - 1, -(2**31), 0]):
        output, lse = compiled(q, torch.tensor(values, dtype=torch.int32))
        assert output.isfinite().all()
        assert (output[(lse == -torch.inf).T] == 0).all()
        if values == [10, 50, 150]:
            assert (lse == -torch.inf).all(0).nonzero().flatten().tolist() == [*range(10), *range(150, 200)]
