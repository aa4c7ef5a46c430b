"""The result of `tamis bench frontier` as Markdown tables and as a picture."""

from __future__ import annotations

import math
from typing import Any

from tamis.bench.frontier import DENSITIES, density_for, error_at
from tamis.report.markup import Markup, element, join

BOUND = 0.05
WIDTH, HEIGHT = 960, 520
LEFT, RIGHT, TOP, BOTTOM = 70, 690, 56, 462
LOW, HIGH = 0.1, 0.6  # densities of the picture
_DRAWN = (
    "oracle, floor",
    "probe, floor",
    "probe, 1 row, floor",
    "antidiagonal, cdf",
    "sparge, cdf",
    "sparge, cdf, no judge",
    "query sampled",
    "vertical slash",
    "window and sink",
    "random",
)
_STYLE = """
svg{--page:#fff;--text:#1f2328;--soft:#59636e;--grid:#d8dee4}
@media (prefers-color-scheme:dark){svg{--page:#0d1117;--text:#e6edf3;--soft:#9198a1;--grid:#2b323b}}
.page{fill:var(--page)}svg{fill:var(--text)}text{font:13px system-ui,sans-serif}.soft{fill:var(--soft)}
.title{font-size:16px;font-weight:600}.grid{stroke:var(--grid)}.curve{stroke-width:2;fill:none}.end{text-anchor:end}
.middle{text-anchor:middle}
"""


def markdown(result: dict[str, Any]) -> str:
    """Mean relative L1 of every family at the same densities, the density at a bound, and what predicting costs."""
    head = ["predictor", *(f"{density:g}" for density in DENSITIES), f"density at L1 {BOUND:g}", "cost"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for family in result["families"]:
        errors = [_figure(error_at(family["rows"], density), ".3f") for density in DENSITIES]
        needed = _figure(density_for(family["rows"], BOUND), ".2f")
        lines.append("| " + " | ".join([family["name"], *errors, needed, f"{family['cost']:.0%}"]) + " |")
    return "\n".join(lines)


def _figure(number: float | None, form: str) -> str:
    return "-" if number is None else format(number, form)


def svg(result: dict[str, Any]) -> str:
    """Curves of density against mean relative L1, the latter on a logarithmic scale."""
    found = {family["name"]: family["rows"] for family in result["families"]}
    curves = {name: [row for row in found[name] if LOW <= row["density"] <= HIGH] for name in _DRAWN if name in found}
    errors = [row["l1_mean"] for rows in curves.values() for row in rows]
    low, high = math.floor(math.log10(min(errors)) * 2) / 2, math.ceil(math.log10(max(errors)) * 4) / 4
    model = f"SmolLM2-135M, {result['heads']} heads, {result['tokens']:,} tokens, blocks of 128 x 64, full precision"
    return (
        element(
            "svg",
            element("title", "Error of block masks by density"),
            element("style", _STYLE),
            element("rect", class_="page", width=WIDTH, height=HEIGHT),
            element("text", "What a mask loses at a density: mean relative L1 over heads", class_="title", x=18, y=26),
            element("text", model, class_="soft", x=18, y=44),
            _grid(low, high),
            *(_curve(i, name, rows, low, high) for i, (name, rows) in enumerate(curves.items())),
            xmlns="http://www.w3.org/2000/svg",
            viewBox=f"0 0 {WIDTH} {HEIGHT}",
            width=WIDTH,
            height=HEIGHT,
            role="img",
        )
        + "\n"
    )


def _across(density: float) -> float:
    return LEFT + (density - LOW) / (HIGH - LOW) * (RIGHT - LEFT)


def _down(error: float, low: float, high: float) -> float:
    return BOTTOM - (math.log10(error) - low) / (high - low) * (BOTTOM - TOP)


def _grid(low: float, high: float) -> Markup:
    parts = []
    for tenth in range(round(LOW * 10), round(HIGH * 10) + 1):
        x = f"{_across(tenth / 10):.1f}"
        parts.append(element("line", class_="grid", x1=x, y1=TOP, x2=x, y2=BOTTOM))
        parts.append(element("text", f"{tenth / 10:g}", class_="soft middle", x=x, y=BOTTOM + 18))
    for error in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0):
        if low <= math.log10(error) <= high:
            y = _down(error, low, high)
            parts.append(element("line", class_="grid", x1=LEFT, y1=f"{y:.1f}", x2=RIGHT, y2=f"{y:.1f}"))
            parts.append(element("text", f"{error:g}", class_="soft end", x=LEFT - 8, y=f"{y + 4:.1f}"))
    parts.append(element("text", "density", class_="middle", x=(LEFT + RIGHT) / 2, y=BOTTOM + 40))
    return join(*parts)


def _curve(index: int, name: str, rows: list[dict[str, float]], low: float, high: float) -> Markup:
    """A line with its points, and its name in the legend, in a colour of equal lightness."""
    colour = f"hsl({index * 360 // len(_DRAWN)} 65% 48%)"
    at = [(_across(row["density"]), _down(row["l1_mean"], low, high)) for row in rows]
    y = TOP + 12 + 24 * index
    return join(
        element("polyline", class_="curve", stroke=colour, points=" ".join(f"{a:.1f},{b:.1f}" for a, b in at)),
        *(element("circle", cx=f"{a:.1f}", cy=f"{b:.1f}", r=3, fill=colour) for a, b in at),
        element("line", stroke=colour, stroke_width=3, x1=RIGHT + 24, y1=y - 4, x2=RIGHT + 46, y2=y - 4),
        element("text", name, x=RIGHT + 54, y=y),
    )
