"""Demo results to render, real-looking and not, and a strict reader of the page that comes out."""

from __future__ import annotations

import math
import random
from html.parser import HTMLParser
from typing import Any

from tamis.report import colour, numbers
from tamis.report.markup import VOID

Result = dict[str, Any]
NAN, INF = math.nan, math.inf
JUNK: tuple[Any, ...] = (
    None,
    NAN,
    INF,
    -INF,
    -1,
    0,
    1e300,
    10**400,
    True,
    "",
    "<b>&\"'</b>",
    [],
    [[]],
    {},
    [None],
    [{"x": NAN}],
    [[1], [2, 3]],
)


def make_layers(layers: int, heads: int, seed: int = 0) -> list[Result]:
    rng = random.Random(seed)
    made = []
    for layer in range(layers):
        density = [min(1.0, rng.betavariate(1.4, 1.6)) for _ in range(heads)]
        errors = [math.exp(rng.gauss(-3.6, 0.9)) for _ in range(heads)]
        entry = {"layer": layer, "density": density, "qk_density": density[::-1], "relative_l1": errors}
        made.append({**entry, "dense_seconds": 0.4, "sparse_seconds": 0.1})
    return made


def make_map(tokens: int, causal: bool) -> Result:
    """A diagonal and a first block that everything looks at; kept is what holds a good share of its row."""
    rows, columns = math.ceil(tokens / 128), math.ceil(tokens / 64)
    attention = []
    for r in range(rows):
        weights = [
            0.0 if causal and c > 2 * r + 1 else math.exp(-abs(c - 2 * r)) + (c == 0) + 0.01 for c in range(columns)
        ]
        attention.append([weight / sum(weights) for weight in weights])
    kept = [[int(mass > 0.05) for mass in row] for row in attention]
    common = {"layer": 2, "head": 1, "tokens": tokens, "block_size": [128, 64], "density": 0.25, "relative_l1": 0.012}
    return {**common, "attention": attention, "kept": kept}


def make_result(layers: int = 30, heads: int = 9, tokens: int = 4096) -> Result:
    photo = colour.png([bytes([1] * 40)] * 30, [(0, 0, 0), (120, 160, 80)]).partition(",")[2]
    return {
        "language": {
            "tokens": tokens,
            "attention_seconds_dense": 12.0,
            "attention_seconds_sparse": 3.0,
            "attention_ratio": 4.0,
            "total_seconds_dense": 30.0,
            "total_seconds_sparse": 20.0,
            "total_ratio": 1.5,
            "perplexity_dense": 10.0,
            "perplexity_sparse": 10.05,
            "density": 0.47,
            "qk_density": 0.5,
            "pv_density": 0.44,
            "relative_l1_median": 0.028,
            "relative_l1_worst": 0.57,
            "layers": make_layers(layers, heads),
            "passkey": [
                {"depth": d, "dense": d != 0.3, "sparse": d not in (0.3, 0.5)} for d in (0.1, 0.3, 0.5, 0.7, 0.9)
            ],
            "dense_kind": "bf16",
            "dense_probe_seconds": {"fp32": 0.25, "bf16": 0.125},
            "model": "A model",
            "text": "A text",
            "passkey_tokens": 3072,
            "relative_l1_mean": 0.041,
            "settings": {"predictor": "Sparge(cdf=0.98)", "pv_threshold": 12.0, "block_size": [128, 64]},
            "maps": [make_map(tokens, causal=True)],
        },
        "image": {
            "tokens": 5477,
            "attention_ratio": 0.5,
            "attention_seconds_dense": 1.0,
            "attention_seconds_sparse": 2.0,
            "density": 0.61,
            "qk_density": 0.63,
            "feature_cosine": 0.9954,
            "feature_cosine_worst": 0.8123,
            "layers": make_layers(12, 6, seed=1),
            "maps": [make_map(5477, causal=False)],
            "photo_png": photo,
            "settings": {"pixels": 1036},
        },
        "machine": {"cpu": "A CPU", "cores": 2, "threads": 2, "target": "avx2", "tamis": "0.1.0", "date": "2026-01-02"},
    }


def broken_result() -> Result:
    result = make_result()
    language = result["language"]
    language.update(attention_ratio=NAN, attention_seconds_sparse=INF, perplexity_sparse=NAN, density=NAN)
    language["layers"][3]["density"][2] = NAN
    language["layers"][4]["relative_l1"][1] = INF
    language["layers"][5]["relative_l1"] = [NAN] * 9
    return result


def hostile_result() -> Result:
    """Markup in every string a caller may choose."""
    evil = "\"'><script>alert(1)</script><img src=x onerror=alert(2)>"
    result = make_result(2, 2, 512)
    result["language"].update(dense_kind=evil, settings={evil: evil, "nested": {evil: [evil]}}, tokens=evil)
    result["language"]["layers"][0]["layer"] = evil
    result["language"]["layers"][1]["density"][0] = evil
    result["language"]["maps"][0].update(layer=evil, head=evil)
    result["image"].update(photo_png=evil, feature_cosine=evil)
    result["machine"] = {evil: evil, "tamis": evil, "date": evil}
    return result


CASES: dict[str, Result] = {
    "whole": make_result(),
    "language only": {"language": make_result()["language"]},
    "image only": {"image": make_result()["image"], "machine": {}},
    "nothing": {},
    "one head": make_result(1, 1, 64),
    "large": make_result(80, 64),
    "broken": broken_result(),
    "hostile": hostile_result(),
}


class Page(HTMLParser):
    """Parses a page strictly: every element closed in order, no attribute or id twice."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self.ids: set[str] = set()
        self.feed(html)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        assert len(attributes) == len(attrs), f"{tag} has an attribute twice: {attrs}"
        if "id" in attributes:
            assert attributes["id"]
            assert attributes["id"] not in self.ids
            self.ids.add(attributes["id"])
        self.tags.append((tag, attributes))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """SVG shapes may close themselves: `<path .../>`."""
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack[-1:] == [tag], f"</{tag}> closes {self.stack[-3:]}"
        self.stack.pop()

    def handle_data(self, data: str) -> None:
        for tag in {"", *self.stack}:
            self.text.setdefault(tag, []).append(data)

    def words(self, tag: str = "") -> str:
        return " ".join(" ".join(self.text.get(tag, [])).split()).replace(numbers.TIMES, "x")

    def all(self, tag: str, class_: str | None = None) -> list[dict[str, str | None]]:
        return [
            a for name, a in self.tags if name == tag and (class_ is None or class_ in (a.get("class") or "").split())
        ]


def check_page(html: str, scripts: int) -> Page:
    """A page that is well formed, asks for nothing and runs nothing but its own scripts."""
    page = Page(html)
    assert html.startswith("<!doctype html>\n")
    assert len(page.all("h1")) == 1
    assert len(page.all("main")) == 1
    assert sum("type" not in attributes for attributes in page.all("script")) == scripts
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert name not in ("href", "src", "srcset", "action", "data") or (value or "").startswith("data:"), (
                tag,
                name,
            )
            assert not name.startswith("on"), (tag, name)
            assert "url(" not in (value or ""), (tag, name, value)
    styles = page.words("style")
    assert "@import" not in styles
    assert "url(" not in styles
    assert "http:" not in html
    assert "https:" not in html
    for svg in page.all("svg"):
        assert svg.get("aria-label") or svg.get("aria-hidden") == "true"
    assert all(image.get("alt") for image in page.all("img"))
    return page
