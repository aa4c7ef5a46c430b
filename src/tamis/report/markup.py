"""HTML elements built so that text is escaped unless it is already markup."""

from __future__ import annotations

from html import escape

VOID = frozenset({"img", "link", "meta", "source"})


class Markup(str):
    """A string that is HTML already; every other string counts as text."""

    __slots__ = ()


def element(name: str, /, *children: object, **attributes: object) -> Markup:
    """One element. `class_` becomes `class`, `aria_label` becomes `aria-label`; None leaves an attribute or child out.

    Example:
        >>> element("p", "1 < 2", class_="note")
        '<p class="note">1 &lt; 2</p>'
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in VOID:
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{join(*children)}</{name}>")


def join(*children: object) -> Markup:
    """Children one after another, escaped where they are not markup."""
    return Markup(
        "".join(c if isinstance(c, Markup) else escape(str(c), quote=False) for c in children if c is not None)
    )
