"""The charts: density by layer and head, and error by layer.

They are inline SVG in data units (one layer is one unit wide), stretched to whatever width the page has; their labels
are HTML around them, so they stay legible on a phone. Every mark carries its numbers as a title, which the script
of the page also shows in a line under the chart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from tamis.report import colour, numbers
from tamis.report.markup import Markup, element, join
from tamis.report.parts import Part, head_count, layer_name, per_head

ROUND = (0.0, math.log10(2), math.log10(5))  # exponents of 1, 2 and 5; a half is 5 tenths, a fifth is 2 tenths
CROWDED = 40  # columns or rows beyond which cells are too small for a gap between them


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


def layer_ticks(layers: Sequence[Part]) -> Markup:
    size = len(layers)
    return ticks(
        [((i + 0.5) / size, layer_name(layers[i], i)) for i in range(0, size, tick_step(size))], "left", "x-ticks"
    )


def chart(svg: Markup, x_ticks: Markup, y_ticks: Markup, y_title: str, columns: int) -> Markup:
    """A stretched drawing with its axes; narrow charts do not stretch to the whole page."""
    return element(
        "div",
        element("div", y_title, class_="y-title", aria_hidden="true"),
        y_ticks,
        svg,
        x_ticks,
        element("div", "layer →", class_="x-title", aria_hidden="true"),
        class_="chart",
        style=f"max-width:{3 * columns + 12}rem",
    )


def readout(hint: str) -> Markup:
    return element("p", hint, class_="readout", aria_live="polite")


def heat_map(layers: Sequence[Part], label: str) -> Markup:
    """One cell per layer (across) and head (down); the colour is the density, from 0 to 1 whatever the data."""
    heads = head_count(layers)
    cells = [heat_cell(layer, index, head) for index, layer in enumerate(layers) for head in range(heads)]
    svg = element(
        "svg",
        *cells,
        viewBox=f"0 0 {len(layers)} {heads}",
        preserveAspectRatio="none",
        role="img",
        aria_label=label,
        tabindex=0,
        data_rows=heads,
        class_="heat" if max(len(layers), heads) <= CROWDED else "heat crowded",
        style=f"height:{min(max(heads * 26, 48), 560)}px",
    )
    head_ticks = ticks([((h + 0.5) / heads, str(h)) for h in range(0, heads, tick_step(heads, 10))], "top", "y-ticks")
    return join(
        chart(svg, layer_ticks(layers), head_ticks, "↓ head", len(layers)),
        readout("Point at a cell or tap it for its numbers; the arrow keys work too."),
        scale_legend(),
        odd_note('class="odd"' in svg, "no finite number"),
    )


def heat_cell(layer: Part, index: int, head: int) -> Markup:
    def of(key: str) -> object:
        values = per_head(layer, key)
        return values[head] if head < len(values) else None

    value = of("density")
    density = numbers.finite(value)
    title = (
        f"layer {layer_name(layer, index)}, head {head}: density {numbers.unit(value)}, "
        f"QK density {numbers.unit(of('qk_density'))}, relative L1 {numbers.plain(of('relative_l1'))}"
    )
    step = f"s{colour.step_of(density)}" if density is not None else "none" if value is None else "odd"
    return element("rect", element("title", title), class_=step, x=index, y=head, width=1, height=1)


def odd_note(present: bool, text: str) -> Markup | None:
    """The key of the colour for broken numbers, where that colour occurs."""
    return element("p", element("span", class_="key key-odd"), text, class_="keys") if present else None


def scale_legend() -> Markup:
    cells = (element("rect", class_=f"s{s}", x=s, y=0, width=1.05, height=1) for s in range(colour.STEPS))
    bar = element(
        "svg",
        *cells,
        viewBox=f"0 0 {colour.STEPS} 1",
        preserveAspectRatio="none",
        role="img",
        aria_label="colour scale of the density, from 0 to 1",
    )
    marks = ticks([(0, "0"), (0.25, "0.25"), (0.5, "0.5"), (0.75, "0.75"), (1, "1")], "left", "x-ticks")
    return element(
        "div",
        element("span", "all skipped", aria_hidden="true"),
        element("div", bar, marks, class_="scale"),
        element("span", "all computed", aria_hidden="true"),
        class_="legend",
    )


def error_chart(layers: Sequence[Part], label: str) -> Markup:
    """Per layer a bar from the median head's error to the worst head's, on a logarithmic scale."""
    values = [e for layer in layers for e in numbers.finite_only(per_head(layer, "relative_l1")) if e > 0]
    if not values:
        return element("p", "No error above zero was measured, so there is nothing to draw.", class_="note")
    low, high = log_range(layers, values)
    marks = log_ticks(low, high)
    bars = [error_bar(layer, index, low, high) for index, layer in enumerate(layers)]
    lines = [element("line", class_="grid", x1=0, x2=len(layers), y1=f"{y:.4f}", y2=f"{y:.4f}") for y, _ in marks]
    svg = element(
        "svg",
        *lines,
        *bars,
        viewBox=f"0 0 {len(layers)} 1",
        preserveAspectRatio="none",
        role="img",
        aria_label=label,
        class_="errors",
    )
    return join(
        chart(svg, layer_ticks(layers), ticks(marks, "top", "y-ticks"), "↑ relative L1, log scale", len(layers)),
        readout("Point at a bar or tap it for its numbers."),
        element(
            "p",
            element("span", class_="key key-worst"),
            "worst head ",
            element("span", class_="key key-median"),
            "median head",
            class_="keys",
        ),
        odd_note('class="bar lost"' in svg, "holds an error that is no finite number"),
    )


def log_range(layers: Sequence[Part], values: Sequence[float]) -> tuple[float, float]:
    """The exponents of round numbers (1, 2 or 5 times a power of ten) around every layer's median and worst error."""
    medians = [m for layer in layers if (m := numbers.median(per_head(layer, "relative_l1")) or 0) > 0]
    smallest, largest = min(medians or values), max(values)
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


def error_bar(layer: Part, index: int, low: float, high: float) -> Markup:
    errors = per_head(layer, "relative_l1")
    known = numbers.finite_only(errors)
    lost = [head for head, error in enumerate(errors) if numbers.finite(error) is None]
    middle, worst = numbers.median(known), max(known, default=None)

    def place(error: float | None) -> float:
        exponent = math.log10(error) if error and error > 0 else low
        return (high - min(max(exponent, low), high)) / (high - low)

    top, bottom = (0.0 if lost else place(worst)), place(middle)
    name = f"layer {layer_name(layer, index)}"
    if not known:
        title = f"{name}: no finite error"
    else:
        title = f"{name}: median {numbers.plain(middle)}, worst {numbers.plain(worst)} (head {errors.index(worst)})"
    if lost:
        title += f"; not finite in head {', '.join(map(str, lost))}"
    left, right = f"{index + 0.18:.2f}", f"{index + 0.82:.2f}"
    return element(
        "g",
        element("title", title),
        element("rect", class_="hit", x=index, y=0, width=1, height=1),
        element("rect", class_="span", x=left, y=f"{top:.4f}", width=0.64, height=f"{max(bottom - top, 0):.4f}"),
        element("line", class_="worst", x1=left, x2=right, y1=f"{top:.4f}", y2=f"{top:.4f}"),
        element("line", class_="median", x1=left, x2=right, y1=f"{bottom:.4f}", y2=f"{bottom:.4f}") if known else None,
        class_="bar lost" if lost else "bar",
    )
