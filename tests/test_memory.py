"""Memory grows with the tokens, never with their square: peak resident memory of fresh processes."""

from __future__ import annotations

import mmap
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engines import engines

import tamis

BACKENDS = sorted({engine.backend for engine in engines()})
pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="needs /proc/self/status for the peak of a process"
)

PRELUDE = """
import re, torch, tamis
from pathlib import Path

torch.set_num_threads(2)
n = LENGTH
q, k, v = (torch.randn(1, 1, n, 32) for _ in range(3))


def peak() -> float:
    '''Largest resident memory so far, MiB.'''
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1)) / 1024


tamis.attend(q[:, :, :300], k[:, :, :300], v[:, :, :300], backend=BACKEND)  # whatever is loaded once
before = peak()
"""

CASES = {
    "sparse, predicted": """
        predictor = tamis.Sparge(topk=0.01, similarity=-1)
        out = tamis.sparse_attention(q, k, v, is_causal=True, backend=BACKEND, predictor=predictor)
    """,
    "window": """
        mask = tamis.Window(256)(q, k, causal=True)
        out = tamis.attend(q, k, v, mask, causal=True, window=256, backend=BACKEND).output
    """,
    "means of skipped blocks": """
        mask = tamis.Window(256)(q, k, causal=True)
        out = tamis.attend(q, k, v, mask, causal=True, compensate="centroid", backend=BACKEND).output
    """,
    "dense, one row of queries": """
        out = tamis.attend(q[:, :, -1:], k, v, causal=True, precision="int8", backend=BACKEND).output
    """,
    "positions and segments": """
        segment, position = torch.arange(n) // 512, torch.arange(n) % 512
        seen = dict(causal=True, positions=(position, position), segments=(segment, segment), backend=BACKEND)
        mask = tamis.Sparge(topk=0.05, similarity=-1)(q, k, **seen)
        out = tamis.attend(q, k, v, mask, **seen).output
    """,
    "broadcast mask": """
        padding = torch.rand(1, 1, 1, n) > 0.1
        mask = tamis.Sparge(topk=0.01, similarity=-1)(q, k, attn_mask=padding, backend=BACKEND)
        out = tamis.attend(q, k, v, mask, attn_mask=padding, precision="int8", backend=BACKEND).output
    """,
    "many sequences": """
        offsets = torch.arange(0, n + 1, 256, dtype=torch.int32)
        x, y, z = (t[0].transpose(0, 1) for t in (q, k, v))
        out = tamis.attend_varlen(x, y, z, offsets, offsets, causal=True, backend=BACKEND).output
    """,
}


# The reference goes from tile to tile in Python: a shorter sequence, and one case of each kind.
LENGTHS = {"cpu": 32768, "reference": 16384}
FEW = ("sparse, predicted", "broadcast mask")


def growth(backend: str, length: int, codes: list[str]) -> list[float]:
    """MiB above the start at the peak of a fresh process, after each of the pieces of code."""
    code = PRELUDE + "".join(
        textwrap.dedent(x) + "assert out.isfinite().all()\nprint(peak() - before)\n" for x in codes
    )
    code = code.replace("BACKEND", repr(backend)).replace("LENGTH", str(length))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return [float(line) for line in result.stdout.split()]


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_square_of_the_length(backend: str) -> None:
    """A bool per pair of tokens is 256 MiB at 16k and 1 GiB at 32k. Copies of 4 MiB tensors are allowed."""
    cases = {name: code for name, code in CASES.items() if backend != "reference" or name in FEW}
    for name, grown in zip(cases, growth(backend, LENGTHS[backend], list(cases.values())), strict=True):
        assert grown < 64, name


def test_the_measure_sees_a_square() -> None:
    """What this file guards against, done on purpose."""
    assert growth("reference", 16384, ["out = torch.ones(n, n, dtype=torch.bool)\n"])[0] > 200


@pytest.mark.real_memory
def test_a_long_output_is_written_in_large_pages() -> None:
    """Page by page of 4 KiB an output of 64 MiB takes 16,384 visits to the system."""
    resource = pytest.importorskip("resource")
    if "cpu" not in BACKENDS or not hasattr(mmap, "MADV_HUGEPAGE"):
        pytest.skip("needs the native backend on Linux")

    def faults(call: Callable[[], object]) -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        call()
        return int(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

    chunk = bytes(1 << 20)

    def by_hand() -> None:
        with mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE) as memory:
            memory.madvise(mmap.MADV_HUGEPAGE)
            for _ in range(64):
                memory.write(chunk)

    if faults(by_hand) > 4096:
        pytest.skip("this system gives no large pages")
    n = 1 << 18
    query = torch.zeros(1, 1, n, 64)
    key, value = torch.zeros(2, 1, 1, 64, 64)
    tamis.attend(query[:, :, :256], key, value, backend="cpu")
    assert faults(lambda: tamis.attend(query, key, value, backend="cpu")) < 4096 + 1024
