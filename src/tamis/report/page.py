"""The sections of the report in reading order: what came out, where it came from, and under which settings."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tamis.report import charts, maps, numbers, shell, summary
from tamis.report.markup import Markup, element, join
from tamis.report.parts import Part, entries, head_count, layer_name, part_of, per_head

PHOTO_LIMIT = 8_000_000  # characters of base64: a page must stay quick to open and to send
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
LEAD = (
    "The same input went through the same model twice: once with dense attention (torch SDPA), once through tamis, "
    "which predicts the blocks of the attention map that matter, computes those and skips the rest. This page shows "
    "what that gained and what it cost."
)
ALONE = "All layers together, prediction and quantisation included."
WHOLE = "One pass through the model's layers, attention and everything else."


def render(result: Mapping[str, Any]) -> str:
    """The report about a demo result as one self-contained HTML document."""
    language, image, machine = (part_of(result, name) for name in ("language", "image", "machine"))
    return shell.document(
        summary.headline(language, image),
        LEAD if language or image else "No run was recorded, neither on text nor on an image.",
        language_section(language) if language else None,
        image_section(image) if image else None,
        settings_section(language, image, machine),
        foot=shell.made_by(machine.get("tamis"), machine.get("date")),
    )


def language_section(part: Part) -> Markup:
    return element(
        "section",
        element("h2", f"Language model, {numbers.count(part.get('tokens'))} tokens", id="language"),
        subject(part, "text"),
        element(
            "div",
            summary.time_card(part, "attention", "Attention time", ALONE),
            summary.time_card(part, "total", "Total time", WHOLE),
            summary.perplexity_card(part),
            summary.density_card(part),
            class_="cards",
        ),
        summary.ledger(part),
        summary.passkey(part),
        by_layer(part),
        attention_maps(part, causal=True),
        aria_labelledby="language",
    )


def image_section(part: Part) -> Markup:
    total = numbers.speedup(part, "total") is not None
    return element(
        "section",
        element("h2", f"Image model, {numbers.count(part.get('tokens'))} tokens", id="image"),
        subject(part, "photo"),
        photograph(part.get("photo_png")),
        element(
            "div",
            summary.time_card(part, "attention", "Attention time", ALONE),
            summary.time_card(part, "total", "Total time", WHOLE) if total else None,
            summary.cosine_card(part),
            summary.density_card(part),
            class_="cards",
        ),
        summary.ledger(part),
        by_layer(part),
        attention_maps(part, causal=False),
        aria_labelledby="image",
    )


def subject(part: Part, what: str) -> Markup | None:
    """Which model was given which input, where the result says so."""
    named = [f"{label}: {part[key]}" for label, key in (("Model", "model"), (what.capitalize(), what)) if part.get(key)]
    return element("p", " · ".join(named), class_="note") if named else None


def photograph(encoded: object) -> Markup | None:
    if not isinstance(encoded, str) or not encoded:
        return None
    try:
        signature = base64.b64decode(encoded, validate=True)[: len(PNG_SIGNATURE)]
    except (binascii.Error, ValueError):
        signature = b""
    if signature != PNG_SIGNATURE:
        return element("p", "The photograph is left out: it is no PNG picture.", class_="note")
    if len(encoded) > PHOTO_LIMIT:
        return element("p", "The photograph is left out: it would make this page too large.", class_="note")
    picture = element("img", src=f"data:image/png;base64,{encoded}", alt="the photograph the model was given")
    return element("figure", picture, element("figcaption", "What the model was given."), class_="photo")


def by_layer(part: Part) -> Markup | None:
    layers = entries(part, "layers")
    heads = head_count(layers)
    if not heads:
        return None
    densities = numbers.finite_only(d for layer in layers for d in per_head(layer, "density"))
    size = f"{len(layers)} layers of {heads} heads" if len(layers) != 1 or heads != 1 else "one layer of one head"
    spread = "no finite density"
    if densities:
        spread = (
            f"mean {numbers.unit(numbers.mean(densities))}, lowest {numbers.unit(min(densities))}, "
            f"highest {numbers.unit(max(densities))}"
        )
    return join(
        element("h3", "Density by layer and head"),
        element(
            "p",
            f"How much of each head's attention was computed, in {size}: {spread}. Heads in the colour of "
            "the page were mostly skipped, those that stand out from it ran nearly dense.",
        ),
        element("figure", charts.heat_map(layers, f"heat map of density, {size}: {spread}"), class_="density"),
        element("h3", "Error by layer"),
        element(
            "p",
            "Relative L1 of the attention output, Σ|tamis - dense| / Σ|dense|, of each head on the query, key and "
            "value of the dense run: 0.01 is one percent off. A bar runs from the median head of a layer to its worst.",
        ),
        element("figure", charts.error_chart(layers, f"relative L1 error by layer, {size}"), class_="error"),
        layer_table(layers),
    )


def layer_table(layers: Sequence[Part]) -> Markup:
    columns = [column for column in LAYER_COLUMNS if any(column[1] in layer for layer in layers)]
    head = element("tr", *(element("th", name, scope="col") for name in ("layer", *(name for name, *_ in columns))))
    rows = []
    for index, layer in enumerate(layers):
        cells = (element("td", summarise(per_head(layer, key))) for _, key, summarise in columns)
        rows.append(element("tr", element("th", layer_name(layer, index), scope="row"), *cells))
    table = element("table", element("thead", head), element("tbody", *rows))
    return element("details", element("summary", "The same as a table"), element("div", table, class_="scroll"))


def worst_of(errors: list[Any]) -> str:
    known = numbers.finite_only(errors)
    return numbers.plain(max(known, default=None)) + ("" if len(known) == len(errors) else " (some not finite)")


LAYER_COLUMNS: tuple[tuple[str, str, Callable[[list[Any]], str]], ...] = (
    ("mean density", "density", lambda heads: numbers.unit(numbers.mean(heads))),
    ("lowest", "density", lambda heads: numbers.unit(min(numbers.finite_only(heads), default=None))),
    ("highest", "density", lambda heads: numbers.unit(max(numbers.finite_only(heads), default=None))),
    ("mean QK density", "qk_density", lambda heads: numbers.unit(numbers.mean(heads))),
    ("median error", "relative_l1", lambda heads: numbers.plain(numbers.median(heads))),
    ("worst error", "relative_l1", worst_of),
    ("dense time", "dense_seconds", lambda times: numbers.seconds(numbers.mean(times))),
    ("tamis time", "sparse_seconds", lambda times: numbers.seconds(numbers.mean(times))),
)


def attention_maps(part: Part, *, causal: bool) -> Markup | None:
    drawn = [figure for entry in entries(part, "maps") if (figure := maps.attention_map(entry, causal))]
    if not drawn:
        return None
    swatches = [("much", "much attention, or kept"), ("little", "little attention, or skipped")]
    if causal:
        swatches.append(("unseen", "the future, hidden from the token"))
    return join(
        element("h3", "What was looked at, and what was kept"),
        element(
            "p",
            "Left: where dense attention went, token blocks from top to bottom looking at token blocks from left to "
            "right (each row against its own largest value, square-root scale). Right: the blocks tamis visited.",
        ),
        element(
            "ul",
            *(element("li", element("i", class_=f"swatch-{name}"), text) for name, text in swatches),
            class_="swatches",
        ),
        element("div", *drawn, class_="maps"),
    )


def settings_section(language: Part, image: Part, machine: Part) -> Markup:
    columns = [
        (title, facts)
        for title, facts in (
            ("Language model", settings_of(language)),
            ("Image model", settings_of(image)),
            ("Machine", dict(machine)),
        )
        if facts
    ]
    blocks = (element("div", element("h3", title), shell.fact_list(facts)) for title, facts in columns)
    body = (
        element("div", *blocks, class_="columns") if columns else element("p", "Neither was recorded.", class_="note")
    )
    return element("section", element("h2", "Settings and machine", id="settings"), body, aria_labelledby="settings")


def settings_of(part: Part) -> dict[str, Any]:
    given = part.get("settings")
    facts: dict[str, Any] = dict(given) if isinstance(given, Mapping) else {}
    if part.get("dense_kind"):
        facts["dense attention"] = f"torch SDPA, {part['dense_kind']}"
    probed = part.get("dense_probe_seconds")
    if isinstance(probed, Mapping) and probed:
        times = ", ".join(f"{kind} {numbers.seconds(time)}" for kind, time in probed.items())
        facts["dense, one layer"] = times
    return facts
