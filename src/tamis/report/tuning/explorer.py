"""What other budgets would give: the model's frontier, each layer's, and one head's, along which a slider moves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from tamis.profile import Profile
from tamis.report import axes, numbers, shell
from tamis.report.markup import Markup, element, join
from tamis.report.tuning.frontier import Frontier, Survey, density_within, frontiers
from tamis.report.tuning.heads import Head, Layer, Steps, candidate_words, limit_of, positive

CURVE = 60  # bounds at which a curve is drawn
MANY = 48  # small drawings; more are folded away


class Scale(NamedTuple):
    """The errors that the drawings show, as exponents of ten, and the budgets of a head: by its mask, and in all."""

    low: float
    high: float
    limit: float | None
    measured: float | None

    def down(self, error: float) -> float:
        """The place of an error, from the top, as a share; errors beyond the scale are at its edge."""
        exponent = math.log10(error) if error > 0 else self.low
        return (self.high - min(max(exponent, self.low), self.high)) / (self.high - self.low)

    def bounds(self) -> list[float]:
        step = (self.high - self.low) / (CURVE - 1)
        return [10 ** (self.low + index * step) for index in range(CURVE)]


class Surveyed(NamedTuple):
    """A layer in a range of steps, and its heads' frontiers by the largest and by the mean error."""

    layer: Layer
    worst: list[Frontier]
    mean: list[Frontier]


def section(profile: Profile, parts: Sequence[Steps], survey: Survey) -> Markup:
    surveyed = [
        Surveyed(layer, frontiers(found), frontiers(found, "mean"))
        for part in parts
        for layer in part.layers
        if (found := survey.found.get((layer.name, layer.stage))) is not None
    ]
    scale = scale_of(surveyed, profile)
    names = [name_of(entry, parts) for entry in surveyed]
    small = [small_curve(entry, name, scale) for entry, name in zip(surveyed, names, strict=True)]
    multiples: Markup = element("div", *small, class_="multiples")
    if len(small) > MANY:
        multiples = element("details", element("summary", f"All {len(small)} layers"), multiples)
    return element(
        "section",
        element("h2", "What another budget would give", id="frontier"),
        element(
            "p",
            "From the survey: how dense the attention would be if every head took the sparsest candidate whose error "
            "stays within a bound. The survey knows masks alone, on some of the rows, without rounding and stage 2; "
            "the dot is what the chosen settings really did, with both.",
        ),
        model_curve(surveyed, scale),
        element("h3", "Layer by layer"),
        element(
            "p",
            "Across: density from 0 to 1. Up: the bound, on the same scale as above. A curve that stays left is a "
            "layer that can be sparse; a steep one gains little from a larger budget, a flat one much.",
        ),
        multiples,
        slider(surveyed, names, scale, survey),
        aria_labelledby="frontier",
    )


def name_of(entry: Surveyed, parts: Sequence[Steps]) -> str:
    """The layer, and its steps where there are several ranges."""
    layer = entry.layer
    said = layer.heads[0].layer if layer.heads else layer.name
    part = next(part for part in parts if any(layer is other for other in part.layers))
    return said if len(parts) == 1 else f"{said}, {part.title.lower()}"


def scale_of(surveyed: Sequence[Surveyed], profile: Profile) -> Scale:
    """Two decades around the budget, or around the middle of the errors."""
    errors = [p.worst for entry in surveyed for heads in entry.worst for p in heads if p.worst > 0]
    limit = positive(profile.budget.get("l1"))
    middle = min(max(limit or numbers.median(errors) or 0.1, 1e-12), 1e12)
    return Scale(*axes.log_range(middle / 12, middle * 8), limit, limit_of(profile))


def model_curve(surveyed: Sequence[Surveyed], scale: Scale) -> Markup:
    """Mean density over all heads for every bound, with what was chosen."""
    marks = axes.log_ticks(scale.low, scale.high)
    bounds = scale.bounds()
    worst = density_within([f for entry in surveyed for f in entry.worst], bounds)
    mean = density_within([f for entry in surveyed for f in entry.mean], bounds, "mean")
    heads = [head for entry in surveyed for head in entry.layer.heads]
    svg = element(
        "svg",
        *(element("path", class_="grid", d=f"M0 {at:.4f}H1") for at, _ in marks),
        *(element("path", class_="grid", d=f"M{x} 0V1") for x in (0.25, 0.5, 0.75)),
        budget_line(scale),
        element("path", class_="curve mean", d=path(mean, bounds, scale)),
        element("path", class_="curve", d=path(worst, bounds, scale)),
        *(
            element(
                "path",
                element(
                    "title", f"error of every head at most {numbers.plain(bound)}: density {numbers.unit(density)}"
                ),
                class_="mark ghost",
                d=f"M{density:.4f} {scale.down(bound):.4f}h0",
            )
            for density, bound in zip(worst[::2], bounds[::2], strict=True)
        ),
        chosen_dot(heads, scale),
        viewBox="0 0 1 1",
        preserveAspectRatio="none",
        role="img",
        aria_label="mean density of the model for every bound on the error of a head",
        class_="frontier",
    )
    return element(
        "figure", frame(svg, marks), axes.readout("Point at the curve or tap it for its numbers."), keys(scale)
    )


def frame(svg: Markup, marks: Sequence[tuple[float, str]]) -> Markup:
    across = axes.ticks([(x, f"{x:g}") for x in (0, 0.25, 0.5, 0.75, 1)], "left", "x-ticks")
    up = axes.ticks(marks, "top", "y-ticks")
    return axes.chart(svg, across, up, "↑ relative L1, log scale", 10, x_title="density →")


def keys(scale: Scale) -> Markup:
    found = [
        element("span", element("span", class_="key key-worst"), "largest over the inputs"),
        element("span", element("span", class_="key key-mean"), "mean over the inputs"),
        element("span", element("span", class_="key-dot odd"), "chosen, as measured"),
    ]
    if scale.limit is not None:
        found.append(element("span", element("span", class_="key key-budget"), f"budget of a mask, {scale.limit:.4g}"))
    return element("p", *found, class_="keys")


def budget_line(scale: Scale) -> Markup | None:
    return None if scale.limit is None else element("path", class_="budget", d=f"M0 {scale.down(scale.limit):.4f}H1")


def path(densities: Sequence[float], errors: Sequence[float], scale: Scale) -> str:
    places = (f"{x:.3f} {scale.down(y):.3f}" for x, y in zip(densities, errors, strict=True))
    return "M" + "L".join(places)


def chosen_dot(heads: Sequence[Head], scale: Scale) -> Markup | None:
    """Mean density and largest error of what was chosen."""
    densities = numbers.finite_only(head.tuned.density for head in heads)
    errors = numbers.finite_only(head.tuned.worst for head in heads)
    if not densities or not errors:
        return None
    density = sum(densities) / len(densities)
    title = f"chosen: density {numbers.unit(density)}, largest error of a head {numbers.plain(max(errors))}"
    return element(
        "path", element("title", title), class_="mark chosen", d=f"M{density:.4f} {scale.down(max(errors)):.4f}h0"
    )


def small_curve(entry: Surveyed, name: str, scale: Scale) -> Markup:
    bounds = scale.bounds()[::2]
    svg = element(
        "svg",
        budget_line(scale),
        element("path", class_="curve mean", d=path(density_within(entry.mean, bounds, "mean"), bounds, scale)),
        element("path", class_="curve", d=path(density_within(entry.worst, bounds), bounds, scale)),
        chosen_dot(entry.layer.heads, scale),
        viewBox="0 0 1 1",
        preserveAspectRatio="none",
        role="img",
        aria_label=f"frontier of layer {name}",
        class_="frontier small-frontier",
    )
    density = numbers.unit(numbers.mean(head.tuned.density for head in entry.layer.heads))
    return element(
        "div", svg, element("div", element("span", name, class_="of"), element("span", density), class_="under")
    )


def slider(surveyed: Sequence[Surveyed], names: Sequence[str], scale: Scale, survey: Survey) -> Markup:
    """The controls, which the script fills, and what it needs for that."""
    marks = axes.log_ticks(scale.low, scale.high)
    svg = element(
        "svg",
        *(element("path", class_="grid", d=f"M0 {at:.4f}H1") for at, _ in marks),
        *(element("path", class_="grid", d=f"M{x} 0V1") for x in (0.25, 0.5, 0.75)),
        budget_line(scale),
        element("path", class_="curve mean"),
        element("path", class_="curve"),
        element("path", class_="mark chosen"),
        element("path", class_="mark at"),
        viewBox="0 0 1 1",
        preserveAspectRatio="none",
        role="img",
        aria_label="frontier of the head chosen below",
        class_="frontier",
    )
    return join(
        element("h3", "One head", id="one-head"),
        element(
            "p",
            "Choose a head and move along its frontier: every stop is a candidate of which no other is both "
            "sparser and more exact.",
        ),
        element("noscript", element("p", "This part needs the script of the page.", class_="note")),
        element(
            "div",
            element(
                "div",
                element("label", "layer ", element("select", id="layer")),
                element("label", "head ", element("select", id="head")),
                class_="choose",
            ),
            element("figure", frame(svg, marks), keys(scale)),
            element(
                "label",
                element("span", "sparser"),
                element("input", type="range", id="stop", min=0, step=1, aria_label="place on the frontier"),
                element("span", "more exact"),
                class_="slide",
            ),
            element("dl", id="said", class_="facts", aria_live="polite"),
            shell.data("survey", facts_of(surveyed, names, scale, survey)),
            id="explorer",
            class_="explorer",
            hidden="",
        ),
    )


def facts_of(surveyed: Sequence[Surveyed], names: Sequence[str], scale: Scale, survey: Survey) -> dict[str, Any]:
    """What the script knows: every head's frontier and what was chosen."""
    heads = [head for entry in surveyed for head in entry.layer.heads]
    return {
        "scale": list(scale),
        "grid": [candidate_words(*candidate) for candidate in survey.grid],
        "heads": len(heads),
        "density": numbers.finite(sum(numbers.finite_only(head.tuned.density for head in heads))) or 0.0,
        "layers": [
            {"name": name, "heads": [head_facts(*pair) for pair in zip(entry.layer.heads, entry.worst, strict=False)]}
            for entry, name in zip(surveyed, names, strict=True)
        ],
    }


def head_facts(head: Head, frontier: Frontier) -> dict[str, Any]:
    tuned = head.tuned
    return {
        "chosen": None if tuned.density is None else [tuned.density, tuned.l1, tuned.worst],
        "settings": head.settings,
        "points": [[_short(p.density), _short(p.mean), _short(p.worst), p.candidate] for p in frontier],
    }


def _short(value: float) -> float:
    return float(f"{value:.4g}")
