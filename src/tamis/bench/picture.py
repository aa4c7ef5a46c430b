"""The roofline as an SVG of its own, with its own background: readable in light and dark viewers."""

from __future__ import annotations

import math
from typing import Any

from tamis.bench.roofline import roof
from tamis.report.markup import Markup, element, join

TITLE = "What bounds the kernels: operations a byte against operations a second"
WIDTH, HEIGHT = 1080, 540
LEFT, RIGHT, TOP, BOTTOM = 78, 640, 56, 470
STYLE = """
svg{--page:#fff;--text:#1f2328;--soft:#59636e;--grid:#d8dee4;--int8:#0b6e75;--full:#a8480f;--bf16:#6639ba}
@media (prefers-color-scheme:dark){
svg{--page:#0d1117;--text:#e6edf3;--soft:#9198a1;--grid:#2b323b;--int8:#4cc2c9;--full:#f0883e;--bf16:#be8fff}}
.page{fill:var(--page)}svg{fill:var(--text)}text{font:13px system-ui,sans-serif}.soft{fill:var(--soft)}
.title{font-size:16px;font-weight:600}.grid{stroke:var(--grid)}.roof{stroke-width:2;fill:none}
.bytes{stroke:var(--soft)}.line-int8{stroke:var(--int8)}.line-bf16{stroke:var(--bf16)}.line-fp32{stroke:var(--full)}
.int8{fill:var(--int8)}.full{fill:var(--full)}.strong{font-weight:700}
.end{text-anchor:end}.middle{text-anchor:middle}
"""


class Axes:
    """Logarithmic axes that hold every point and every roof."""

    def __init__(self, peaks: dict[str, float], points: list[dict[str, Any]]) -> None:
        intensities, rates = [p["intensity"] for p in points], [p["gops"] for p in points]
        self.x = math.floor(math.log10(min(intensities))), math.ceil(math.log10(max(intensities)))
        self.y = math.floor(math.log10(min(rates))), math.log10(max(*rates, peaks["int8"])) + 0.25

    def across(self, intensity: float) -> float:
        low, high = self.x
        return LEFT + (math.log10(intensity) - low) / (high - low) * (RIGHT - LEFT)

    def down(self, gops: float) -> float:
        low, high = self.y
        return BOTTOM - (math.log10(gops) - low) / (high - low) * (BOTTOM - TOP)


def svg(result: dict[str, Any]) -> str:
    """The picture of a result of `tamis bench limits`."""
    peaks, points, machine = result["roofline"]["peaks"], result["roofline"]["points"], result["machine"]
    axes = Axes(peaks, points)
    subtitle = f"{machine['cpu']}, {machine['threads']} threads, target {machine['target']}, torch {machine['torch']}"
    return (
        element(
            "svg",
            element("title", "Roofline of tamis on a CPU"),
            element("style", STYLE),
            element("rect", class_="page", width=WIDTH, height=HEIGHT),
            element("text", TITLE, class_="title", x=18, y=26),
            element("text", subtitle, class_="soft", x=18, y=44),
            _grid(axes),
            _roofs(axes, peaks),
            _marks(axes, points),
            _legend(peaks, points),
            xmlns="http://www.w3.org/2000/svg",
            viewBox=f"0 0 {WIDTH} {HEIGHT}",
            width=WIDTH,
            height=HEIGHT,
            role="img",
        )
        + "\n"
    )


def _grid(axes: Axes) -> Markup:
    parts = []
    for exponent in range(axes.x[0], axes.x[1] + 1):
        x = axes.across(10.0**exponent)
        parts += [_line("grid", x, TOP, x, BOTTOM), _text(f"{10.0**exponent:,g}", x, BOTTOM + 18, "soft middle")]
    for exponent in range(axes.y[0], math.floor(axes.y[1]) + 1):
        y = axes.down(10.0**exponent)
        parts += [_line("grid", LEFT, y, RIGHT, y), _text(f"{10.0**exponent:,g}", LEFT - 8, y + 4, "soft end")]
    across = "arithmetic intensity: operations per byte that must move at least once"
    parts.append(_text(across, (LEFT + RIGHT) / 2, BOTTOM + 42, "middle"))
    turned = f"translate(20 {(TOP + BOTTOM) / 2}) rotate(-90)"
    return join(*parts, element("text", "10⁹ operations per second (GOPS)", class_="middle", transform=turned))


def _roofs(axes: Axes, peaks: dict[str, float]) -> Markup:
    """Rates of the number formats from where the cache can feed them, and both bandwidths up to the highest rate."""
    parts = []
    for name, said in (("int8", "int8, torch._int_mm"), ("bf16", "bf16, torch.mm"), ("fp32", "fp32, torch.mm")):
        x = axes.across(max(peaks[name] / peaks["cache"], 10.0 ** axes.x[0]))
        y = axes.down(peaks[name])
        parts.append(_line(f"roof line-{name}", x, y, RIGHT, y))
        under = name == "bf16" and peaks["bf16"] < 1.5 * peaks["fp32"]  # as without bf16 instructions
        parts.append(_text(f"{said}: {peaks[name]:,.0f}", RIGHT - 4, y + (14 if under else -5), "end"))
    for name, said, beside in (("cache", "shared cache", -6), ("memory", "memory", 16)):
        low = max(10.0 ** axes.x[0], 10.0 ** axes.y[0] / peaks[name])
        high = min(10.0 ** axes.x[1], peaks["int8"] / peaks[name])
        (x1, y1), (x2, y2) = ((axes.across(x), axes.down(x * peaks[name])) for x in (low, high))
        parts.append(_line("roof bytes", x1, y1, x2, y2))
        angle = math.degrees(math.atan2(y2 - y1, x2 - x1))
        at = f"translate({0.85 * x1 + 0.15 * x2:.1f} {0.85 * y1 + 0.15 * y2:.1f}) rotate({angle:.1f})"
        parts.append(
            element(
                "text", f"{said}: {peaks[name]:,.0f} GB/s", class_="middle", transform=f"{at} translate(0 {beside})"
            )
        )
    return join(*parts)


def _marks(axes: Axes, points: list[dict[str, Any]]) -> Markup:
    """A dot at each point and its number on the first side of it that is free."""
    dots = [(axes.across(point["intensity"]), axes.down(point["gops"])) for point in points]
    taken, parts = list(dots), []
    for number, (point, (x, y)) in enumerate(zip(points, dots, strict=True), 1):
        parts.append(element("circle", element("title", point["name"]), class_=point["kind"], cx=_n(x), cy=_n(y), r=5))
        sides = [(x + 16, y), (x - 16, y), (x, y + 16), (x, y - 16), (x + 16, y + 16)]
        free = [side for side in sides if all(abs(side[0] - a) > 12 or abs(side[1] - b) > 11 for a, b in taken)]
        place = (free or sides)[0]
        taken.append(place)
        parts.append(_text(str(number), place[0], place[1] + 4, f"middle strong {point['kind']}"))
    return join(*parts)


def _legend(peaks: dict[str, float], points: list[dict[str, Any]]) -> Markup:
    left, columns = RIGHT + 30, (925, 990, 1060)
    parts = [
        _text(name, x, TOP + 12, "soft end") for name, x in zip(("op/byte", "GOPS", "of roof"), columns, strict=True)
    ]
    for number, point in enumerate(points, 1):
        y = TOP + 14 + 24 * number
        parts.append(_text(str(number), left, y, f"middle strong {point['kind']}"))
        parts.append(_text(point["name"], left + 18, y))
        figures = (_figure(point["intensity"]), _figure(point["gops"]), f"{point['gops'] / roof(peaks, point):.0%}")
        parts += [_text(text, x, y, "end") for text, x in zip(figures, columns, strict=True)]
    y = TOP + 44 + 24 * len(points)
    for said in (
        "Teal strives for torch's int8 product, orange for its fp32 one;",
        "of roof: of that or of the shared cache, the lower.",
    ):
        parts.append(_text(said, left - 5, y, "soft"))
        y += 18
    return join(*parts)


def _figure(number: float) -> str:
    return f"{number:,.0f}" if number >= 20 else f"{number:.1f}"


def _n(number: float) -> str:
    return f"{number:.1f}"


def _line(class_: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    return element("line", class_=class_, x1=_n(x1), y1=_n(y1), x2=_n(x2), y2=_n(y2))


def _text(text: str, x: float, y: float, class_: str | None = None) -> Markup:
    return element("text", text, class_=class_, x=_n(x), y=_n(y))
