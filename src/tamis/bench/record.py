"""Where benchmark results go, and which commit they belong to."""

from __future__ import annotations

import datetime
import json
import subprocess
from pathlib import Path
from typing import Any


def commit() -> str | None:
    """The commit of the working tree that this file is part of, with `+` if it has changes; None outside of one."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        result = subprocess.run(["git", *arguments], cwd=here.parent, capture_output=True, text=True, check=True)
        return result.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def default_path(name: str) -> Path:
    """NAME-DATE.json, in `benchmarks/results` if the current folder has that, else right here."""
    folder = Path("benchmarks", "results")
    return (folder if folder.is_dir() else Path()) / f"{name}-{datetime.date.today().isoformat()}.json"


def write(path: Path, result: dict[str, Any]) -> None:
    """Write a result as JSON; the file is replaced at once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    part.replace(path)
