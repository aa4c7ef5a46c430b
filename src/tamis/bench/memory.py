"""Peak memory of one sparse attention call beyond its inputs, measured in a fresh process (Linux)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_HEAD_DIM = 64


def peak_extra_bytes(tokens: int, density: float) -> int | None:
    """Bytes by which the resident set grew at most during one call, output included; None where it can't be told.

    Raises:
        RuntimeError: the process failed.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    command = [sys.executable, "-m", "tamis.bench.memory", str(tokens), str(density)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"the memory measurement failed: {result.stderr.strip()[-500:]}")
    return int(result.stdout)


def _resident(field: str) -> int:
    """VmRSS (now) or VmHWM (peak since the last reset) of this process in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def main(tokens: int, density: float) -> int:
    """Measure in this process."""
    import torch

    import tamis

    predictor = tamis.Sparge(topk=density, similarity=-1.0, sink=False)
    with torch.inference_mode():
        small = torch.randn(1, 1, 1024, _HEAD_DIM)
        tamis.sparse_attention(small, small, small, predictor=predictor)
        query, key, value = (torch.randn(1, 1, tokens, _HEAD_DIM) for _ in range(3))
        before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # 5 resets the peak
        output = tamis.sparse_attention(query, key, value, predictor=predictor)
        peak = _resident("VmHWM")
    assert isinstance(output, torch.Tensor)
    assert output.isfinite().all()
    return peak - before


if __name__ == "__main__":
    print(main(int(sys.argv[1]), float(sys.argv[2])))
