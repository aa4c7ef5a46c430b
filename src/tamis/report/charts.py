"""The charts of a demo run: density by layer and head, and error by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tamis.report import axes, colour, heat, numbers
from tamis.report.markup import Markup, element, join
from tamis.report.parts import Part, head_count, layer_name, per_head


def heat_map(layers: Sequence[Part], label: str) -> Markup:
    """One cell per layer (across) and head (down); the colour is the density, from 0 to 1 whatever the data."""
    drawn = heat.grid(names(layers), head_count(layers), lambda i, head: heat_cell(layers[i], i, head), label)
    return join(drawn, heat.density_legend(), heat.odd_note('class="odd"' in drawn, "no finite number"))


def names(layers: Sequence[Part]) -> list[str]:
    return [layer_name(layer, index) for index, layer in enumerate(layers)]


def heat_cell(layer: Part, index: int, head: int) -> heat.Cell:
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
    return heat.Cell(step, title)


def error_chart(layers: Sequence[Part], label: str) -> Markup:
    """Per layer a bar from the median head's error to the worst head's, on a logarithmic scale."""
    values = [e for layer in layers for e in numbers.finite_only(per_head(layer, "relative_l1")) if e > 0]
    if not values:
        return element("p", "No error above zero was measured, so there is nothing to draw.", class_="note")
    low, high = log_range(layers, values)
    marks = axes.log_ticks(low, high)
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
        axes.chart(
            svg,
            axes.name_ticks(names(layers)),
            axes.ticks(marks, "top", "y-ticks"),
            "↑ relative L1, log scale",
            len(layers),
        ),
        axes.readout("Point at a bar or tap it for its numbers."),
        element(
            "p",
            element("span", class_="key key-worst"),
            "worst head ",
            element("span", class_="key key-median"),
            "median head",
            class_="keys",
        ),
        heat.odd_note('class="bar lost"' in svg, "holds an error that is no finite number"),
    )


def log_range(layers: Sequence[Part], values: Sequence[float]) -> tuple[float, float]:
    """The exponents of round numbers around every layer's median and worst error."""
    medians = [m for layer in layers if (m := numbers.median(per_head(layer, "relative_l1")) or 0) > 0]
    return axes.log_range(min(medians or values), max(values))


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
