"""The page about a profile, in reading order: what it spares and costs, where, and what else there was."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tamis.profile import Profile
from tamis.report import numbers, shell
from tamis.report.markup import Markup, element, join
from tamis.report.tuning import charts, explorer, frontier, summary
from tamis.report.tuning.heads import Head, Layer, Steps, every_head, limit_of, steps_of


def render(profile: Profile, survey: frontier.Survey | None = None) -> str:
    """The report about a profile as one self-contained HTML document.

    Args:
        survey: of the tuning run that made it.

    Raises:
        ValueError: the survey is of another run.
    """
    if survey is not None:
        frontier.check(profile, survey)
    parts = steps_of(profile)
    heads = every_head(parts)
    return shell.document(
        summary.headline(profile, heads),
        summary.lead(profile, parts),
        summary.cards(profile, parts) if parts else element("p", "The profile has no layers.", class_="note"),
        *(by_head(part, profile, f"maps-{number}", len(parts)) for number, part in enumerate(parts)),
        explorer.section(profile, parts, survey) if survey is not None else None,
        facts(profile, parts),
        foot=shell.made_by(profile.library),
        brand="tamis tuning",
        styles=("page.css", "tuning/tuning.css"),
        scripts=("page.js", "tuning/explorer.js"),
    )


def by_head(part: Steps, profile: Profile, name: str, parts: int) -> Markup:
    """Everything about one range of steps."""
    heads = every_head([part])
    title = "By layer and head" if parts == 1 else part.title
    if all(head.tuned.density is None for head in heads):
        text = "The profile holds no evidence for these settings, so there is nothing to draw."
        return element("section", element("h2", title, id=name), element("p", text), table(part), aria_labelledby=name)
    limits = [(key, size) for key, size in profile.budget.items() if key in ("l1", "pv_l1") and size > 0]
    return element(
        "section",
        element("h2", title, id=name),
        element(
            "p",
            "A column is a layer, a cell a head. Densities are mean over the inputs, errors the largest: relative L1 "
            "against dense attention, Σ|tamis - dense| / Σ|dense|, in the kernel and its precision.",
        ),
        charts.heat_maps(part, limit_of(profile)),
        generalises(heads, limits),
        where_the_work_is(part, heads),
        table(part),
        aria_labelledby=name,
    )


def generalises(heads: Sequence[Head], limits: Sequence[tuple[str, float]]) -> Markup | None:
    drawn = charts.scatter(heads, limits)
    if drawn is None:
        return None
    text = (
        "Every dot is a head: its largest error on the inputs it was tuned on, across, and on inputs that decided "
        "nothing, up. Above the diagonal a head does worse than it promised. Errors off the scale are at its edge."
    )
    return join(element("h3", "Tuned against held out"), element("p", text), drawn)


def where_the_work_is(part: Steps, heads: Sequence[Head]) -> Markup | None:
    drawn = charts.work(part)
    if drawn is None:
        return None
    densities = sorted(numbers.finite_only(head.tuned.density for head in heads), reverse=True)
    first = math.ceil(len(densities) / 4)
    text = (
        "Kept blocks are where the time goes. "
        f"The densest quarter of the heads keeps {numbers.percent(sum(densities[:first]) / sum(densities))} of them."
    )
    return join(element("h3", "Where the work goes"), element("p", text), drawn)


def table(part: Steps) -> Markup:
    names = ("layer", "heads", "dense", "density", "held out", "largest L1", "held out", "precision")
    head = element("tr", *(element("th", name, scope="col") for name in names))
    rows = (element("tr", element("th", layer.name, scope="row"), *cells(layer)) for layer in part.layers)
    return element(
        "details",
        element("summary", "The same as a table"),
        element("div", element("table", element("thead", head), element("tbody", *rows)), class_="scroll"),
    )


def cells(layer: Layer) -> list[Markup]:
    tuned, held = [head.tuned for head in layer.heads], [head.held for head in layer.heads]
    said = (
        str(len(layer.heads)),
        str(sum(head.dense for head in layer.heads)),
        *(numbers.unit(numbers.mean(m.density for m in each)) for each in (tuned, held)),
        *(numbers.plain(max(numbers.finite_only(m.worst for m in each), default=None)) for each in (tuned, held)),
        layer.precision,
    )
    return [element("td", text) for text in said]


def facts(profile: Profile, parts: Sequence[Steps]) -> Markup:
    stages = [stage for found in profile.layers.values() for stage in found]
    samples = {stage.evidence.samples for stage in stages if stage.evidence is not None}
    held = {stage.evidence.held_out_samples for stage in stages if stage.evidence is not None}
    known: dict[str, object] = {
        "model": profile.model or "not recorded",
        "layers": len(profile.layers),
        "heads": len(every_head(parts)),
        **{f"budget: {summary.NAMES.get(name, name)}": size for name, size in profile.budget.items()},
        **{f"reached: {summary.NAMES.get(name, name)}": size for name, size in profile.evidence.items()},
        "calls looked at per layer": ", ".join(map(str, sorted(samples))) or "none",
        "calls held out per layer": ", ".join(map(str, sorted(held))) or "none",
        "tamis": profile.library or "not recorded",
    }
    return element(
        "section", element("h2", "Settings", id="settings"), shell.fact_list(known), aria_labelledby="settings"
    )
