"""What one call takes beyond its inputs, measured in a fresh process (Linux): peak memory and seconds."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

_HEAD_DIM = 64


class Usage(NamedTuple):
    """Bytes by which the resident set grew at most during one call, its result included, and the call's seconds."""

    peak_extra_bytes: int
    seconds: float


def peak_extra_bytes(tokens: int, density: float) -> int | None:
    """Peak memory of `sparse_attention` on one head at this density; None where it can't be told."""
    usage = sparse(tokens, density)
    return None if usage is None else usage.peak_extra_bytes


def sparse(tokens: int, density: float) -> Usage | None:
    """`sparse_attention` on one head, prediction and quantisation included; None where memory can't be told.

    Raises:
        RuntimeError: the process failed.
    """
    return _fresh("sparse", tokens, density)


def packing(tokens: int, kv_heads: int) -> Usage | None:
    """`pack_kv` of so many heads; None where memory can't be told.

    Raises:
        RuntimeError: the process failed.
    """
    return _fresh("packing", tokens, kv_heads)


def _fresh(kind: str, tokens: int, amount: float) -> Usage | None:
    if not Path("/proc/self/clear_refs").exists():
        return None
    command = [sys.executable, "-m", "tamis.bench.memory", kind, str(tokens), str(amount)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"the memory measurement failed: {result.stderr.strip()[-500:]}")
    peak, seconds = result.stdout.split()
    return Usage(int(peak), float(seconds))


def _resident(field: str) -> int:
    """VmRSS (now) or VmHWM (peak since the last reset) of this process in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _measure(call: Callable[[], object]) -> tuple[object, Usage]:
    # What was freed before and is still held would be taken first, and not count.
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # 5 resets the peak
    start = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    return result, Usage(_resident("VmHWM") - before, seconds)


def main(kind: str, tokens: int, amount: float) -> Usage:
    """Measure in this process."""
    import torch

    import tamis

    with torch.inference_mode():
        if kind == "packing":
            tamis.pack_kv(*torch.randn(2, 1, 1, 1024, _HEAD_DIM))  # whatever is loaded once
            key, value = (torch.randn(1, int(amount), tokens, _HEAD_DIM) for _ in range(2))
            return _measure(lambda: tamis.pack_kv(key, value))[1]
        predictor = tamis.Sparge(topk=amount, similarity=-1.0, sink=False)
        small = torch.randn(1, 1, 1024, _HEAD_DIM)
        tamis.sparse_attention(small, small, small, predictor=predictor)
        query, key, value = (torch.randn(1, 1, tokens, _HEAD_DIM) for _ in range(3))
        output, usage = _measure(lambda: tamis.sparse_attention(query, key, value, predictor=predictor))
    assert isinstance(output, torch.Tensor)
    assert output.isfinite().all()
    return usage


if __name__ == "__main__":
    print(*main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))
