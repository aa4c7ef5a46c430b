"""A fresh result of `tamis bench cpu` against committed ones of the same processor and target, as ratios to torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MOVED = 0.10
_RATIOS = ("ratio_sdpa_fp32", "ratio_sdpa_bf16", "ratio_full_sdpa_fp32", "ratio_full_bf16_sdpa_bf16", "ratio_flex")


def baseline(folder: Path, new: dict[str, Any]) -> tuple[Path, dict[str, Any]] | None:
    """Of the same processor, cores and target the result with most rows in common, the newest of those; or None."""
    found = []
    machine = new["machine"]
    for path in folder.glob("cpu-*.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        if all(result["machine"][name] == machine[name] for name in ("cpu", "cores", "threads", "target")):
            found.append((len(_rows(result).keys() & _rows(new).keys()), result["machine"]["date"], path, result))
    return max(found, key=lambda entry: entry[:2])[2:] if found else None


def _rows(result: dict[str, Any]) -> dict[tuple[int, int, float], dict[str, Any]]:
    return {(row["tokens"], row["head_dim"], row["density"]): row for row in result["rows"]}


def moved(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One line for each ratio to torch that moved by more than `MOVED`; a spread beside it says how sure that is."""
    before = _rows(old)
    lines = []
    for key, row in _rows(new).items():
        for name in _RATIOS:
            if key not in before or name not in row or name not in before[key]:
                continue
            was, now = before[key][name]["median"], row[name]["median"]
            if abs(now / was - 1) > MOVED:
                lines.append(
                    f"{key[0]:7} tokens, d={key[1]}, density {key[2]:.3f}: {name} {was:.2f} -> {now:.2f} "
                    f"({now / was - 1:+.0%}; now {row[name]['min']:.2f} to {row[name]['max']:.2f})"
                )
    return lines


def report(folder: Path, new: dict[str, Any]) -> str:
    """What moved, or that nothing did, or that there is nothing to compare with."""
    found = baseline(folder, new)
    if found is None:
        return f"{folder} has no result of this processor, number of threads and target: nothing to compare with"
    path, old = found
    lines = moved(old, new)
    rows = len(_rows(old).keys() & _rows(new).keys())
    head = f"against {path.name}, {rows} rows in common: {len(lines)} ratios moved by more than {MOVED:.0%}"
    return "\n".join([head, *lines])
