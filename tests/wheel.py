"""A built wheel, tried where nothing of this repository is: `python tests/wheel.py dist/tamis-*.whl`."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"
TRY = """
import pathlib, sys, torch, tamis
assert pathlib.Path(tamis.__file__).is_relative_to(sys.prefix), tamis.__file__
query, key, value = (torch.randn(1, 4, 1000, 64) for _ in range(3))
output, stats = tamis.sparse_attention(query, key, value, is_causal=True, return_stats=True, backend="cpu")
exact = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
assert (output - exact).abs().mean() < 0.05 * exact.abs().mean()
print(stats)
"""


def main(wheel: Path) -> None:
    """Raise unless the wheel serves every Python and Linux of its kind, and attention runs from it."""
    assert re.fullmatch(r"tamis-[^-]+-py3-none-(manylinux\w+\.?)+", wheel.stem), f"{wheel.name} is for one Python only"
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.endswith("libtamis_cpu.so") for name in names), "the native library is not in the wheel"
    assert not any("gomp" in name for name in names), "the wheel brings a second OpenMP runtime"
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = str(Path(folder, "bin", "python"))
        pip = [python, "-m", "pip", "install", "--quiet", "--no-compile", "--constraint", str(CONSTRAINTS)]
        subprocess.run([*pip, "torch", "numpy"], check=True)
        subprocess.run([*pip, str(wheel)], check=True)
        subprocess.run([python, "-c", TRY], check=True, cwd=folder)
    print(f"{wheel.name}: all right")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
