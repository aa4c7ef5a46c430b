"""The frame of every chart: axes with their labels, and the line that repeats the numbers of a mark.

A chart is inline SVG in data units, stretched to whatever width the page has; its labels are HTML around it, so they
stay legible on a phone. Every mark carries its numbers as a title, which the script of the page also shows in a line
under the chart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from tamis.report.markup import Markup, element

ROUND = (0.0, math.log10(2), math.log10(5))  # exponents of 1, 2 and 5; a half is 5 tenths, a fifth is 2 tenths


def tick_step(length: int, most: int = 8) -> int:
    """The smallest of 1, 2, 5, 10, 20, ... that labels `length` places with at most `most` ticks."""
    step = 1
    while math.ceil(length / step) > most:
        step = step * 5 // 2 if str(step).startswith("2") else step * 2
    return step


def ticks(places: Sequence[tuple[float, str]], side: str, class_: str) -> Markup:
    """Labels along one side of a chart; a place is a share of that side."""
    spans = (element("span", shorten(text), style=f"{side}:{100 * place:.3f}%") for place, text in places)
    return element("div", *spans, class_=class_, aria_hidden="true")


def shorten(text: str, most: int = 8) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def name_ticks(names: Sequence[str]) -> Markup:
    """The names of columns under a chart, as many as have room."""
    size = len(names)
    return ticks([((i + 0.5) / size, names[i]) for i in range(0, size, tick_step(size))], "left", "x-ticks")


def chart(
    svg: Markup, x_ticks: Markup, y_ticks: Markup, y_title: str, columns: int, *, x_title: str = "layer →"
) -> Markup:
    """A stretched drawing with its axes; narrow charts do not stretch to the whole page."""
    return element(
        "div",
        element("div", y_title, class_="y-title", aria_hidden="true"),
        y_ticks,
        svg,
        x_ticks,
        element("div", x_title, class_="x-title", aria_hidden="true"),
        class_="chart",
        style=f"max-width:{3 * columns + 12}rem",
    )


def readout(hint: str) -> Markup:
    return element("p", hint, class_="readout", aria_live="polite")


def log_range(smallest: float, largest: float) -> tuple[float, float]:
    """The exponents of round numbers (1, 2 or 5 times a power of ten) around two numbers above 0."""
    floor, ceiling = math.floor(math.log10(smallest)), math.ceil(math.log10(largest))
    low = floor + max(step for step in ROUND if 10 ** (floor + step) <= smallest * 1.0001)
    high = ceiling - max(step for step in ROUND if 10 ** (ceiling - step) >= largest * 0.9999)
    return (low, high) if high - low >= ROUND[1] else (low - ROUND[1], high + ROUND[1])


def log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Places from the top as shares, and labels: 1, 2 and 5 of each decade, or whole decades where there are many."""
    decades = range(math.floor(low), math.ceil(high) + 1)
    every = tick_step(len(decades), 7)
    exponents = [e + step for e in decades for step in (ROUND if high - low <= 2 else ROUND[:1]) if e % every == 0]
    return [((high - e) / (high - low), f"{10**e:.3g}") for e in exponents if low - 1e-9 <= e <= high + 1e-9]


def linear_ticks(high: float, most: int = 6) -> list[float]:
    """0 and multiples of 1, 2 or 5 times a power of ten, at most `most`, the last not above `high` (above 0)."""
    exponent = math.floor(math.log10(high / most))
    step = next(s for e in range(exponent, exponent + 3) for r in ROUND if high / (s := 10 ** (e + r)) < most)
    return [index * step for index in range(math.floor(high / step * 1.0001) + 1)]
