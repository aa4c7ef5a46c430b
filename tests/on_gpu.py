"""The suite on a GPU, several files at a time; needs torch, triton, numpy and pytest, and no installed tamis.

Run it from the source tree: `make test-gpu`, or `PYTHONPATH=src python3 tests/on_gpu.py`. Every process compiles the
kernels its tests need, which is most of the time. Where NVIDIA's compute-sanitizer is at hand, the smallest cases run
under it as well. Exits with 1 if anything failed, and says what ran.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
FILES = (
    "attend",
    "masks",
    "stage2",
    "int8",
    "poison",
    "properties",
    "select",
    "predictors",
    "varlen",
    "pack",
    "decode",
)
FILES = (*FILES, "sparse_attention", "defects", "regressions", "gpu")
PARTS = 6  # of the backend's own tests, which start some 390 different kernels: seconds of compiling each
SMALLEST = ("test_triton.py::test_block_sizes", "test_triton.py::test_head_dims")
LIMIT = 420.0  # seconds in all: a lent machine has minutes


def run(name: str, command: list[str], seconds: float, sample: str, part: str = "0/1") -> tuple[str, bool, str]:
    """One process; its name, whether all passed, and the end of what it said."""
    environment = os.environ | {
        "TAMIS_TEST_DEVICE": "cuda",
        "TAMIS_TEST_SAMPLE": sample,
        "TAMIS_TEST_PART": part,
        "PYTHONPATH": os.pathsep.join([str(HERE.parent / "src"), str(HERE), os.environ.get("PYTHONPATH", "")]),
    }
    try:
        done = subprocess.run(
            command, cwd=HERE.parent, env=environment, capture_output=True, text=True, timeout=max(seconds, 1)
        )
    except subprocess.TimeoutExpired as late:
        said = late.stdout.decode(errors="replace") if isinstance(late.stdout, bytes) else late.stdout or ""
        return name, False, f"{said[-1500:]}\nstopped after {seconds:.0f} s"
    return name, done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def main() -> int:
    """Run everything and print a line for each file, with the failures."""
    import torch

    if not torch.cuda.is_available():
        print("no GPU: tests/on_gpu.py needs one that torch can see", file=sys.stderr)
        return 1
    print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    if importlib.util.find_spec("hypothesis") is None:
        print("hypothesis is not here: seeded draws take its place", flush=True)
    start = time.monotonic()
    sample = os.environ.get("TAMIS_TEST_SAMPLE", "4")
    pytest = [sys.executable, "-m", "pytest", "-q", "-x", "--maxfail=20", "-p", "no:cacheprovider", "--tb=short"]
    failed = 0
    # Compiling, on the processor, is most of the time: as many processes as there are cores.
    with ThreadPoolExecutor(min(16, os.cpu_count() or 2)) as pool:
        own = [*pytest, str(HERE / "test_triton.py")]
        jobs = [
            pool.submit(run, f"triton {part + 1}/{PARTS}", own, LIMIT, sample, f"{part}/{PARTS}")
            for part in range(PARTS)
        ]
        jobs += [pool.submit(run, name, [*pytest, str(HERE / f"test_{name}.py")], LIMIT, sample) for name in FILES]
        for job in jobs:
            name, passed, said = job.result()
            failed += not passed
            print(
                f"{'passed' if passed else 'FAILED'}  {name}: {said.strip().splitlines()[-1] if said else ''}",
                flush=True,
            )
            if not passed:
                print(said, flush=True)
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        print("compute-sanitizer is not here: nothing ran under it")
    else:
        watched = [sanitizer, "--tool", "memcheck", "--error-exitcode", "9", *pytest]
        left = LIMIT + 60 - (time.monotonic() - start)
        name, passed, said = run("memcheck", [*watched, *(str(HERE / case) for case in SMALLEST)], left, "1")
        failed += not passed
        print(f"{'passed' if passed else 'FAILED'}  under compute-sanitizer\n{'' if passed else said}")
    print(
        f"{time.monotonic() - start:.0f} s; {failed} failed"
        if failed
        else f"{time.monotonic() - start:.0f} s; all passed"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
