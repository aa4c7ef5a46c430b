"""Heat maps: one cell for each layer (across) and head (down)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from tamis.report import axes, colour
from tamis.report.markup import Markup, element, join

CROWDED = 40  # columns or rows beyond which cells are too small for a gap between them


class Cell(NamedTuple):
    """A step of the colour ramp or another class of the style sheet, what the cell says, and whether it has a dot."""

    class_: str
    title: str
    dot: bool = False


def grid(names: Sequence[str], heads: int, cell: Callable[[int, int], Cell], label: str) -> Markup:
    """The map and its axes, with the line that repeats a cell's numbers.

    Args:
        names: of the columns.
        cell: what to draw for a column and a head.
        label: what a screen reader says instead.
    """
    cells = [(index, head, cell(index, head)) for index in range(len(names)) for head in range(heads)]
    svg = element(
        "svg",
        *(
            element("rect", element("title", c.title), class_=c.class_, x=x, y=y, width=1, height=1)
            for x, y, c in cells
        ),
        *(dot(x, y, c) for x, y, c in cells if c.dot),
        viewBox=f"0 0 {len(names)} {heads}",
        preserveAspectRatio="none",
        role="img",
        aria_label=label,
        tabindex=0,
        data_rows=heads,
        class_="heat" if max(len(names), heads) <= CROWDED else "heat crowded",
        style=f"height:{min(max(heads * 26, 48), 560)}px",
    )
    marks = [((head + 0.5) / heads, str(head)) for head in range(0, heads, axes.tick_step(heads, 10))]
    return join(
        axes.chart(svg, axes.name_ticks(names), axes.ticks(marks, "top", "y-ticks"), "↓ head", len(names)),
        axes.readout("Point at a cell or tap it for its numbers; the arrow keys work too."),
    )


def dot(x: int, y: int, cell: Cell) -> Markup:
    """A dot in the middle of a cell: a line without length and with round ends, which no stretching deforms."""
    return element("path", class_="dot on-odd" if cell.class_ == "odd" else "dot", d=f"M{x + 0.5} {y + 0.5}h0")


def density_legend() -> Markup:
    marks = [(0, "0"), (0.25, "0.25"), (0.5, "0.5"), (0.75, "0.75"), (1, "1")]
    return legend(marks, "all skipped", "all computed", "colour scale of the density, from 0 to 1")


def legend(marks: Sequence[tuple[float, str]], least: str, most: str, label: str) -> Markup:
    """The colour ramp, with numbers under it and words at its ends."""
    cells = (element("rect", class_=f"s{s}", x=s, y=0, width=1.05, height=1) for s in range(colour.STEPS))
    bar = element(
        "svg",
        *cells,
        viewBox=f"0 0 {colour.STEPS} 1",
        preserveAspectRatio="none",
        role="img",
        aria_label=label,
    )
    return element(
        "div",
        element("span", least, aria_hidden="true"),
        element("div", bar, axes.ticks(marks, "left", "x-ticks"), class_="scale"),
        element("span", most, aria_hidden="true"),
        class_="legend",
    )


def odd_note(present: bool, text: str) -> Markup | None:
    """The key of the colour for what is not as it should be, where that colour occurs."""
    return element("p", element("span", class_="key key-odd"), text, class_="keys") if present else None
