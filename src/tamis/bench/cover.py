"""Few rows that hold every pair of what they may hold, and a share of them drawn by a seed."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeAlias

Row: TypeAlias = "dict[str, str]"
Axes: TypeAlias = "dict[str, tuple[str, ...]]"


def cover(axes: Axes, parts: Sequence[Row], possible: Callable[[Row], bool], *, pairs: bool = True) -> list[Row]:
    """Rows, of a value for every axis, that hold all the parts given and, if wanted, every pair of values.

    Each part and pair that no row holds yet becomes one, of which the other values are those that make the most new
    pairs, of equals the rarest. `possible` says of a part of a row whether its values go together.
    """
    every_pair = ({a: x, b: y} for a, b in itertools.combinations(axes, 2) for x in axes[a] for y in axes[b])
    rows: list[Row] = []
    held: set[frozenset[tuple[str, str]]] = set()
    times: Counter[tuple[str, str]] = Counter()
    for part in (*parts, *(every_pair if pairs else ())):
        if not possible(part) or any(part.items() <= row.items() for row in rows):
            continue
        row = dict(part)
        for axis in axes:
            if axis not in row:
                values = [value for value in axes[axis] if possible(row | {axis: value})]
                gains = {value: (-len(_pairs(row | {axis: value}) - held), times[axis, value]) for value in values}
                row[axis] = min(values, key=gains.__getitem__)
        rows.append({axis: row[axis] for axis in axes})
        held |= _pairs(row)
        times.update(row.items())
    return rows


def _pairs(row: Row) -> set[frozenset[tuple[str, str]]]:
    return {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}


def some(rows: Sequence[Row], first: Sequence[Row], drawn: int, seed: str) -> list[Row]:
    """Of a list those that hold one of the first, and as many of the others as are to be drawn."""
    wanted = [row for row in rows if any(part.items() <= row.items() for part in first)]
    others = [row for row in rows if row not in wanted]
    return wanted + random.Random(seed).sample(others, min(drawn, len(others)))
