"""Where the result of a benchmark goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write(path: Path | None, name: str, result: dict[str, Any]) -> None:
    """As JSON to `path`, else to a file of the benchmark's name and today's date; says where."""
    from tamis.bench import record

    path = path or record.default_path(name)
    record.write(path, result)
    print(f"written: {path}")
