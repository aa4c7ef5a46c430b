"""The page around a report: head, style, script, header and footer, all of it inside one file."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import resources

from tamis.report import colour, numbers
from tamis.report.markup import Markup, element, join

SIEVE = (
    '<svg viewBox="0 0 24 24" aria-hidden="true" fill="none" stroke="currentColor" stroke-width="1.8">'
    '<circle cx="12" cy="12" r="10"/><path d="M8 3v18M12 2v20M16 3v18M3 8h18M2 12h20M3 16h18" stroke-width="1"/></svg>'
)


def document(
    title: str,
    lead: str,
    *sections: Markup | None,
    foot: str,
    brand: str = "tamis report",
    styles: Sequence[str] = ("page.css",),
    scripts: Sequence[str] = ("page.js",),
) -> str:
    """A self-contained HTML document; only the scripts named here may run in it.

    Args:
        styles, scripts: files of this package.
    """
    sources = [asset(name) for name in scripts]
    allowed = " ".join(f"'sha256-{digest(source)}'" for source in sources)
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element(
            "meta",
            http_equiv="Content-Security-Policy",
            content=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}",
        ),
        element("title", f"{brand}: {title}"),
        element("link", rel="icon", href="data:,"),
        element("style", style(styles)),
    )
    body = element(
        "body",
        element(
            "header",
            element("div", Markup(SIEVE), brand, class_="brand"),
            element("h1", title),
            element("p", lead, class_="lead"),
        ),
        element("main", *sections),
        element("footer", foot),
        *(element("script", Markup(source)) for source in sources),
    )
    return "<!doctype html>\n" + element("html", head, body, lang="en") + "\n"


def asset(name: str) -> str:
    return resources.files("tamis.report").joinpath(name).read_text(encoding="utf-8")


def digest(source: str) -> str:
    return base64.b64encode(hashlib.sha256(source.encode()).digest()).decode("ascii")


def style(names: Sequence[str]) -> Markup:
    light = colour.css(colour.LIGHT) + swatch_rules(colour.LIGHT, colour.LIGHT_UNSEEN)
    dark = colour.css(colour.DARK) + swatch_rules(colour.DARK, colour.DARK_UNSEEN)
    rules = "".join(asset(name) for name in names)
    return Markup(f"{rules}{light}@media (prefers-color-scheme: dark){{{dark}}}")


def swatch_rules(ramp: Sequence[colour.Colour], unseen: colour.Colour) -> str:
    shown = {"much": ramp[-1], "little": ramp[0], "unseen": unseen}
    return "".join(f".swatch-{name}{{background:#{bytes(c).hex()}}}" for name, c in shown.items())


def made_by(version: object, date: object = None) -> str:
    """The footer."""
    made = "Made by tamis" + (f" {version}" if version else "") + (f", {date}" if date else "")
    return f"{made}. This page is complete in itself and loads nothing."


def fact_list(facts: Mapping[str, object]) -> Markup:
    return element(
        "dl",
        *(
            join(element("dt", str(name).replace("_", " ")), element("dd", fact(value)))
            for name, value in facts.items()
        ),
        class_="facts",
    )


def fact(value: object) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return numbers.odd(value) if numbers.finite(value) is None else f"{value:.6g}"
    return json.dumps(value, ensure_ascii=False, default=str)


def data(name: str, value: object) -> Markup:
    """JSON for a script of the page: an element that holds it as text, and in which nothing can end that element.

    Raises:
        ValueError: there is a number that JSON does not have.
    """
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))  # ASCII; only <, > and & matter to a parser
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return element("script", Markup(text), type="application/json", id=name)
