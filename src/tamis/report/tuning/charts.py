"""The drawings of a profile: heat maps of density and error, tuned against held out, and where the work goes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from tamis.report import axes, colour, heat, numbers
from tamis.report.markup import Markup, element, join
from tamis.report.tuning.heads import Head, Layer, Measured, Steps, beyond, every_head

LARGEST = 1e6  # errors beyond it are drawn at the edge
FLOOR = 20  # errors smaller than the largest by more than this are drawn at the edge


def heat_maps(part: Steps, limit: float | None) -> Markup:
    """Density and error of every head, on the tuning inputs and on those held out."""
    heads = every_head([part])
    kinds: list[tuple[str, Callable[[Head], Measured]]] = [("tuning inputs", lambda h: h.tuned)]
    if any(head.held.density is not None for head in heads):
        kinds.append(("held-out inputs", lambda h: h.held))
    errors = numbers.finite_only(of(head).worst for head in heads for _, of in kinds)
    top = limit or max(errors, default=0) or 1.0
    density = [density_map(part, name, of) for name, of in kinds]
    error = [error_map(part, name, of, limit, top) for name, of in kinds]
    marks = [(share, f"{share * top:.3g}") for share in (0, 0.5, 1)]
    scale = heat.legend(marks, "exact", "budget" if limit else "largest", "colour scale of the error")
    return join(
        element("div", *density, class_="two"),
        heat.density_legend(),
        dense_note(heads),
        element("div", *error, class_="two"),
        scale,
        heat.odd_note(any('class="odd"' in drawn for drawn in error), "beyond the budget"),
    )


def density_map(part: Steps, name: str, of: Callable[[Head], Measured]) -> Markup:
    def step(head: Head) -> str:
        density = of(head).density
        return "none" if density is None else f"s{colour.step_of(density)}"

    return figure(part, f"Density, {name}", step)


def error_map(part: Steps, name: str, of: Callable[[Head], Measured], limit: float | None, top: float) -> Markup:
    def step(head: Head) -> str:
        error = of(head).worst
        return "none" if error is None else "odd" if beyond(error, limit) else f"s{colour.step_of(error / top)}"

    return figure(part, f"Largest L1, {name}", step)


def figure(part: Steps, title: str, step: Callable[[Head], str]) -> Markup:
    """One heat map with its title."""

    def cell(column: int, row: int) -> heat.Cell:
        heads = part.layers[column].heads
        if row >= len(heads):
            return heat.Cell("none", f"layer {part.layers[column].short} has no head {row}")
        return heat.Cell(step(heads[row]), told(heads[row]), heads[row].dense)

    most = max(len(layer.heads) for layer in part.layers)
    label = f"heat map by layer and head: {title}"
    drawn = heat.grid([layer.short for layer in part.layers], most, cell, label)
    return element("figure", element("figcaption", title), drawn)


def told(head: Head) -> str:
    """A head's settings and evidence, in a line."""
    tuned, held = head.tuned, head.held
    said = f"{head.name}: {head.settings}; density {numbers.unit(tuned.density)}, L1 {numbers.plain(tuned.l1)}"
    said += f" (largest {numbers.plain(tuned.worst)})"
    if held.density is not None:
        said += f"; held out {numbers.unit(held.density)}, {numbers.plain(held.l1)} ({numbers.plain(held.worst)})"
    return said


def dense_note(heads: Sequence[Head]) -> Markup | None:
    if not any(head.dense for head in heads):
        return None
    return element("p", element("span", class_="key-dot"), "a head that keeps all its blocks", class_="keys")


def scatter(heads: Sequence[Head], limits: Sequence[tuple[str, float]]) -> Markup | None:
    """Every head's largest error on held-out inputs over that on the tuning inputs; both axes are logarithmic.

    Args:
        limits: names and sizes of the budgets, drawn as lines.
    """
    known = [(h, h.tuned.worst, h.held.worst) for h in heads if h.tuned.worst is not None and h.held.worst is not None]
    sizes = [size for _, *both in known for size in both if size > 0]
    if not sizes:
        return None
    largest = min(max(*sizes, *(size for _, size in limits)), LARGEST)
    low, high = axes.log_range(max(min(*sizes, largest), largest / FLOOR), largest)
    strict = max((size for _, size in limits), default=None)

    def up(error: float) -> float:
        exponent = math.log10(error) if error > 0 else low
        return (min(max(exponent, low), high) - low) / (high - low)

    marks = axes.log_ticks(low, high)
    svg = element(
        "svg",
        *(line("grid", at, at) for at, _ in marks),
        element("path", class_="diagonal", d="M0 1L1 0"),
        *(line("budget", up(size), 1 - up(size)) for _, size in limits),
        *(
            element(
                "path",
                element("title", told(head)),
                class_="mark over" if beyond(held, strict) else "mark dense" if head.dense else "mark",
                d=f"M{up(tuned):.4f} {1 - up(held):.4f}h0",
            )
            for head, tuned, held in known
        ),
        viewBox="0 0 1 1",
        preserveAspectRatio="none",
        role="img",
        aria_label=f"largest relative L1 of {len(known)} heads, held-out inputs over tuning inputs",
        class_="scatter",
    )
    across = axes.ticks([(1 - at, text) for at, text in marks], "left", "x-ticks")
    return element(
        "figure",
        axes.chart(
            svg, across, axes.ticks(marks, "top", "y-ticks"), "↑ held out, log scale", 5, x_title="tuning inputs →"
        ),
        axes.readout("Point at a dot or tap it for its numbers."),
        element("p", *_keys(known, limits), class_="keys"),
    )


def line(class_: str, across: float, down: float) -> Markup:
    """A line through the whole chart, up and down, and one from side to side."""
    return element("path", class_=class_, d=f"M{across:.4f} 0V1M0 {down:.4f}H1")


def _keys(known: Sequence[tuple[Head, float, float]], limits: Sequence[tuple[str, float]]) -> list[Markup]:
    found = [element("span", element("span", class_="key-dot accent"), "a head")]
    if any(head.dense for head, _, _ in known):
        found.append(element("span", element("span", class_="key-dot soft"), "dense"))
    if limits:
        strict = max(size for _, size in limits)
        if any(beyond(held, strict) for _, _, held in known):
            found.append(element("span", element("span", class_="key-dot odd"), "beyond the budget, held out"))
        sizes = ", ".join(f"{name} {size:.4g}" for name, size in limits)
        found.append(element("span", element("span", class_="key key-budget"), f"budget ({sizes})"))
    return found


def work(part: Steps) -> Markup | None:
    """Each layer's share of all kept blocks."""
    sums = [sum(numbers.finite_only(head.tuned.density for head in layer.heads)) for layer in part.layers]
    total = sum(sums)
    if not 0 < total < math.inf:
        return None
    dense = sum(len(layer.heads) for layer in part.layers)
    shares = [size / total for size in sums]
    even = [len(layer.heads) / dense for layer in part.layers]
    high = 1.05 * max(*shares, *even)
    marks = [(1 - tick / high, f"{100 * tick:.3g}%") for tick in axes.linear_ticks(high)]
    bars = [work_bar(index, layer, sums[index], shares[index], high) for index, layer in enumerate(part.layers)]
    svg = element(
        "svg",
        *(element("path", class_="grid", d=f"M0 {at:.4f}h{len(shares)}") for at, _ in marks),
        *bars,
        *(element("path", class_="even", d=f"M{index} {1 - share / high:.4f}h1") for index, share in enumerate(even)),
        viewBox=f"0 0 {len(shares)} 1",
        preserveAspectRatio="none",
        role="img",
        aria_label=f"share of the kept blocks by layer, {len(shares)} layers",
        class_="work",
    )
    names = axes.name_ticks([layer.short for layer in part.layers])
    return element(
        "figure",
        axes.chart(svg, names, axes.ticks(marks, "top", "y-ticks"), "↑ share of kept blocks", len(shares)),
        axes.readout("Point at a bar or tap it for its numbers."),
        element(
            "p", element("span", class_="key key-even"), "what a layer would have if all were dense", class_="keys"
        ),
    )


def work_bar(index: int, layer: Layer, size: float, share: float, high: float) -> Markup:
    title = (
        f"layer {layer.heads[0].layer if layer.heads else layer.short}: {numbers.percent(share)} of the kept blocks, "
        f"those of {numbers.plain(size)} dense heads of {len(layer.heads)}"
    )
    return element(
        "g",
        element("title", title),
        element("rect", class_="hit", x=index, y=0, width=1, height=1),
        element(
            "rect",
            class_="fill",
            x=f"{index + 0.14:.2f}",
            y=f"{1 - share / high:.4f}",
            width=0.72,
            height=f"{share / high:.4f}",
        ),
        class_="bar",
    )
