"""What only a GPU can show: streams, graphs, compilation, several devices, and that no length compiles anew."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from engines import DEVICE
from samples import qkv
from torch import Tensor

import tamis

pytestmark = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: make test-gpu")


def on_device(**options: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv(dtype=torch.bfloat16, **options)
    return q.to(DEVICE), k.to(DEVICE), v.to(DEVICE)


def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    predictor = tamis.Sparge(topk=0.5, similarity=-1)
    output = tamis.sparse_attention(q, k, v, is_causal=True, predictor=predictor, precision="int8")
    assert isinstance(output, Tensor)
    return output


def test_the_best_backend_is_chosen() -> None:
    q, k, v = on_device(q_len=300)
    assert tamis.attend(q, k, v).stats.backend == "triton"


def test_another_stream() -> None:
    """The kernels run where torch's current stream is: behind a long one, and nowhere else."""
    q, k, v = on_device(q_len=512)
    expected = run(q, k, v)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.zeros_like(q)
        torch.cuda._sleep(100_000_000)
        late += q
        output = run(late, k, v)
    stream.synchronize()
    assert torch.equal(output, expected)


def test_nothing_waits_for_the_device() -> None:
    q, k, v = on_device(q_len=512)
    run(q, k, v)
    torch.cuda.set_sync_debug_mode("error")
    try:
        output = run(q, k, v)
        tamis.attend(q, k, v, causal=True, precision="int8")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert output.isfinite().all()


def test_in_a_cuda_graph() -> None:
    q, k, v = on_device(q_len=512)
    expected = run(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run(q, k, v)
    other = [x.clone() for x in on_device(q_len=512)]
    graph.replay()
    assert torch.equal(output, expected)
    for mine, new in zip((q, k, v), other, strict=True):
        mine.copy_(new)
    graph.replay()
    assert torch.equal(output, run(*other))


def test_compiled() -> None:
    compiled = torch.compile(run, fullgraph=True)
    for length in (256, 300):
        q, k, v = on_device(q_len=length)
        assert torch.equal(compiled(q, k, v), run(q, k, v))


def test_lengths_compile_nothing_anew() -> None:
    from tamis.backends.triton.kernels import attend as kernel

    def made() -> int:
        return sum(len(cache[0]) for cache in kernel.attend_kernel.device_caches.values())

    run(*on_device(q_len=1000))
    before = made()
    for length in (1001, 1024, 2047, 333):
        run(*on_device(q_len=length))
    assert made() == before


def test_every_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    q, k, v = on_device(q_len=300)
    there = [x.to("cuda:1") for x in (q, k, v)]
    assert torch.equal(run(*there).cpu(), run(q, k, v).cpu())


def test_offsets_beyond_32_bits() -> None:
    """Heads whose elements lie beyond 2^31: 2,300,000 tokens of 8 heads of 128."""
    if torch.cuda.get_device_properties(0).total_memory < 60e9:
        pytest.skip("needs 60 GB")
    key = torch.randn(1, 8, 2_300_000, 128, dtype=torch.bfloat16, device=DEVICE)
    query = torch.randn(1, 8, 64, 128, dtype=torch.bfloat16, device=DEVICE)
    blocks = -(-key.shape[2] // 64)
    dense = torch.zeros(1, 8, 1, blocks, dtype=torch.bool, device=DEVICE)
    dense[..., -100:] = True
    mask = tamis.BlockMask.from_dense(dense, seq_lens=(64, key.shape[2]))
    for precision in ("full", "int8"):
        output = tamis.attend(query, key, key, mask, precision=precision).output[:, -1:]
        tail = key[:, -1:, (blocks - 100) * 64 :].double().cpu()
        expected = oracle.attention(query[:, -1:].double().cpu(), tail, tail).output
        assert oracle.relative_l1(output.cpu(), expected) < 0.02


def test_memory_ends_and_the_next_call_is_fine() -> None:
    """There is room for the inputs, not for their 8-bit copies and the output."""
    small = on_device(q_len=512)
    expected = run(*small)
    large = [x.repeat(1, 64, 16, 1) for x in on_device(q_len=4096)]
    before = [float(x.double().sum()) for x in large]
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    # The limit counts what this process has reserved; half of the inputs is less than copies and output take.
    room = torch.cuda.memory_reserved() + sum(x.numel() * x.element_size() for x in large) // 6
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.mem_get_info()[1])
    try:
        with pytest.raises(torch.OutOfMemoryError):
            run(*large)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert [float(x.double().sum()) for x in large] == before
    assert torch.equal(run(*small), expected)
