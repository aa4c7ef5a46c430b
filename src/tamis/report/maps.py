"""Attention maps beside the blocks that were kept, as small PNG pictures with one palette for each colour scheme."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tamis.report import colour, numbers
from tamis.report.markup import Markup, element

MAP_SIZE = 128
PAPER, KEPT, UNSEEN = 0, colour.STEPS - 1, colour.STEPS


def attention_map(entry: Mapping[str, Any], causal: bool) -> Markup | None:
    """What dense attention looked at, beside the blocks that were kept; None if the maps are unusable."""
    attention, kept = grid(entry.get("attention")), grid(entry.get("kept"))
    if attention is None or kept is None:
        return None
    where = f"layer {entry.get('layer', '?')}, head {entry.get('head', '?')}"
    mass = mass_kept(entry, attention, kept)
    facts = [f"density {numbers.unit(entry.get('density'))}", f"relative L1 {numbers.plain(entry.get('relative_l1'))}"]
    if mass is not None:
        facts.append(f"kept blocks hold {numbers.percent(mass)} of the attention")
    small_attention, small_kept = shrink(attention), shrink(kept)
    return element(
        "figure",
        element(
            "div",
            picture(shade(small_attention, causal), f"attention of {where}", "attention"),
            picture(paint(small_kept, causal), f"blocks kept for {where}: {facts[0]}", "kept"),
            class_="pair",
        ),
        element("figcaption", element("strong", where.capitalize()), element("span", " · ".join(facts))),
        class_="map",
    )


def grid(rows: object) -> list[list[float]] | None:
    """A rectangular list of finite numbers (anything else counts as 0), or None."""
    if not isinstance(rows, (list, tuple)) or not rows or not all(isinstance(row, (list, tuple)) for row in rows):
        return None
    width = len(rows[0])
    if not width or any(len(row) != width for row in rows):
        return None
    return [[float(v) if isinstance(v, bool) else numbers.finite(v) or 0.0 for v in row] for row in rows]


def shrink(rows: Sequence[Sequence[float]], most: int = MAP_SIZE) -> list[list[float]]:
    """At most `most` x `most` cells, each the mean of those it stands for."""

    def edges(length: int) -> list[tuple[int, int]]:
        parts = min(length, most)
        return [(part * length // parts, (part + 1) * length // parts) for part in range(parts)]

    columns = edges(len(rows[0]))
    return [
        [
            sum(sum(row[left:right]) for row in rows[top:bottom]) / ((bottom - top) * (right - left))
            for left, right in columns
        ]
        for top, bottom in edges(len(rows))
    ]


def mass_kept(
    entry: Mapping[str, Any], attention: Sequence[Sequence[float]], kept: Sequence[Sequence[float]]
) -> float | None:
    """The share of attention inside kept blocks; only where the map still has one cell per block, else None."""
    tokens, block = numbers.finite(entry.get("tokens")), entry.get("block_size")
    if not tokens or not isinstance(block, (list, tuple)) or len(block) != 2:
        return None
    shape = tuple(math.ceil(tokens / (numbers.finite(size) or math.inf)) for size in block)
    if shape != (len(attention), len(attention[0])) or shape != (len(kept), len(kept[0])):
        return None
    total = sum(map(sum, attention))
    inside = sum(a * k for mass, keep in zip(attention, kept, strict=True) for a, k in zip(mass, keep, strict=True))
    return inside / total if total > 0 else None


def unseen(row: int, column: int, rows: int, columns: int) -> bool:
    """Whether a cell lies in the future of its whole row: it begins after the row's last token."""
    return column * rows >= (row + 1) * columns


def shade(rows: Sequence[Sequence[float]], causal: bool) -> list[bytes]:
    """Palette indices: the square root of each cell over the largest of its row, so that faint parts stay visible."""
    lines = []
    for r, row in enumerate(rows):
        largest = max(row)
        steps = [colour.step_of(math.sqrt(v / largest)) if largest > 0 and v > 0 else PAPER for v in row]
        lines.append(cover(steps, row, r, len(rows), causal))
    return lines


def paint(rows: Sequence[Sequence[float]], causal: bool) -> list[bytes]:
    return [
        cover([round(min(max(v, 0), 1) * KEPT) for v in row], row, r, len(rows), causal) for r, row in enumerate(rows)
    ]


def cover(steps: list[int], row: Sequence[float], place: int, rows: int, causal: bool) -> bytes:
    """Marks what causality hides, unless the data says that something is there."""
    hidden = (causal and v <= 0 and unseen(place, c, rows, len(row)) for c, v in enumerate(row))
    return bytes(UNSEEN if hide else step for step, hide in zip(steps, hidden, strict=True))


def picture(rows: Sequence[bytes], alt: str, caption: str) -> Markup:
    """The same pixels with a palette for each colour scheme."""
    light = colour.png(rows, [*colour.LIGHT, colour.LIGHT_UNSEEN])
    dark = colour.png(rows, [*colour.DARK, colour.DARK_UNSEEN])
    return element(
        "div",
        element(
            "picture",
            element("source", media="(prefers-color-scheme: dark)", srcset=dark),
            element("img", src=light, alt=alt, title=alt, width=len(rows[0]), height=len(rows)),
        ),
        element("span", caption, class_="small"),
    )
