"""What the workers of a pool are asked to do; a small module, since each of them imports it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path


def dies_once(marker: Path) -> str:
    """Lose the first worker."""
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return "found"
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("alive")


def waits_for(log: Path, markers: Sequence[Path]) -> int:
    """Outlive the workers that are lost over other jobs; how often this was begun."""
    with log.open("a", encoding="ascii") as file:
        file.write("x")
    while not all(marker.exists() for marker in markers):
        time.sleep(0.01)
    return len(log.read_text(encoding="ascii"))
