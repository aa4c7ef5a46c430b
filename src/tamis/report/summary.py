"""What came out, in words and figures: the headline, the cards, gains and costs, and the hidden number."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tamis.report import numbers
from tamis.report.markup import Markup, element, join
from tamis.report.parts import Part, entries, layer_name, per_head


def headline(language: Part, image: Part) -> str:
    """The result in a sentence, losses included."""
    speeds = []
    for part, what in ((language, "{} tokens of text"), (image, "an image of {} tokens")):
        ratio = numbers.speedup(part, "attention")
        if ratio is not None and ratio > 0:
            ran = numbers.faster(ratio) if tone_of(ratio) else "at the same speed"
            speeds.append(f"{ran} over {what.format(numbers.count(part.get('tokens')))}")
    if not speeds:
        return "What sparse attention gained and what it cost"
    moved = numbers.change(language.get("perplexity_dense"), language.get("perplexity_sparse"))
    return f"Attention ran {' and '.join(speeds)}" + (f"; perplexity changed by {moved}" if moved else "")


def dense_label(part: Part) -> str:
    kind = part.get("dense_kind")
    return f"dense ({kind})" if kind else "dense"


def card(title: str, big: str, *content: object, tone: str | None = None) -> Markup:
    tone = "bad" if big in ("NaN", "∞", "-∞") else tone
    figure = element("div", big, class_=f"big {tone}" if tone else "big")
    return element("div", element("h3", title), figure, *content, class_="card")


def bars(rows: Sequence[tuple[str, object, str, bool]], full: float | None = None) -> Markup:
    """Rows of (name, value, text, is dense) as bars that share one scale: up to `full`, or the largest value."""
    largest = full or max(numbers.finite_only(value for _, value, _, _ in rows), default=0)
    lines = []
    for name, value, text, dense in rows:
        share = (numbers.finite(value) or 0) / largest if largest > 0 else 0
        bar = element("i", style=f"width:{100 * min(max(share, 0), 1):.2f}%")
        track = element("dd", element("div", bar, class_="track dense" if dense else "track"), aria_hidden="true")
        lines.append(join(element("dt", name), track, element("dd", text)))
    return element("dl", *lines, class_="compare")


def tone_of(ratio: float | None) -> str | None:
    """Win, loss, or None where there is neither."""
    return None if ratio is None or abs(ratio - 1) < numbers.SAME else "good" if ratio > 1 else "bad"


def time_card(part: Part, what: str, title: str, note: str) -> Markup:
    dense, sparse = part.get(f"{what}_seconds_dense"), part.get(f"{what}_seconds_sparse")
    ratio = numbers.speedup(part, what)
    rows = [(dense_label(part), dense, numbers.seconds(dense), True), ("tamis", sparse, numbers.seconds(sparse), False)]
    words = numbers.faster(part.get(f"{what}_ratio") if ratio is None else ratio)
    return card(title, words, bars(rows), element("p", note), tone=tone_of(ratio))


def density_card(part: Part) -> Markup:
    rows = [
        (name, part[key], numbers.unit(part[key]), False)
        for name, key in (("QK products", "qk_density"), ("PV products", "pv_density"))
        if key in part
    ]
    density = numbers.finite(part.get("density"))
    note = "Share of the visible block products that were computed; 1 is dense."
    if density is not None:
        note = f"{numbers.percent(1 - density)} of the visible block products were skipped. 1 would be dense."
    return card("Density", numbers.unit(part.get("density")), bars(rows, full=1) if rows else None, element("p", note))


def perplexity_card(part: Part) -> Markup:
    dense, sparse = part.get("perplexity_dense"), part.get("perplexity_sparse")
    rows = [
        (dense_label(part), dense, numbers.plain(dense, 5), True),
        ("tamis", sparse, numbers.plain(sparse, 5), False),
    ]
    note = "How surprised the model is by each next token of the text: lower is better."
    moved = numbers.change(dense, sparse)
    if moved is None:
        return card("Perplexity", numbers.plain(sparse, 5), bars(rows), element("p", note))
    words = {"+": f"{moved[1:]} worse", "-": f"{moved[1:]} better"}
    big, tone = (
        ("unchanged", None) if float(moved[:-1]) == 0 else (words[moved[0]], "bad" if moved[0] == "+" else "good")
    )
    return card("Perplexity", big, bars(rows), element("p", note), tone=tone)


def cosine_card(part: Part) -> Markup:
    note = "Cosine similarity of the model's output features, dense against tamis: 1 is the same."
    value, worst = part.get("feature_cosine"), part.get("feature_cosine_worst")
    rows = [("mean token", value, numbers.plain(value, 5), False)]
    if worst is not None:
        rows.append(("worst token", worst, numbers.plain(worst, 5), False))
    return card("Feature cosine", numbers.plain(value, 4), bars(rows, full=1), element("p", note))


def ledger(part: Part) -> Markup | None:
    """The same figures sorted into gains and costs, so that no loss hides in a chart."""
    gained: list[str] = []
    cost: list[str] = []
    for what, name in (("attention", "Attention alone"), ("total", "A whole pass")):
        ratio = numbers.speedup(part, what)
        if ratio is not None and ratio > 0 and tone_of(ratio):
            (gained if ratio > 1 else cost).append(f"{name} ran {numbers.faster(ratio)}.")
    density = numbers.finite(part.get("density"))
    if density is not None and density < 1:
        gained.append(f"{numbers.percent(1 - density)} of the block products were never computed.")
    dense, sparse = numbers.finite(part.get("perplexity_dense")), numbers.finite(part.get("perplexity_sparse"))
    if dense is not None and sparse is not None and dense != sparse:
        moved = f"{numbers.plain(dense, 5)} to {numbers.plain(sparse, 5)} ({numbers.change(dense, sparse)})"
        (cost if sparse > dense else gained).append(f"Perplexity went from {moved}.")
    cosine = numbers.finite(part.get("feature_cosine"))
    if cosine is not None:
        cost.append(f"The output features are not identical: cosine {numbers.plain(cosine, 5)}.")
    missed = [
        numbers.percent(e.get("depth")) for e in entries(part, "passkey") if e.get("dense") and not e.get("sparse")
    ]
    if missed:
        cost.append(f"The hidden number was missed where dense found it: at {', '.join(missed)} of the text.")
    cost.extend(worst_sentences(part))
    broken = [
        key.replace("_", " ") for key, value in part.items() if isinstance(value, float) and not math.isfinite(value)
    ]
    if broken:
        cost.append(f"Not a finite number: {', '.join(broken)}.")
    if not gained and not cost:
        return None
    return element(
        "div",
        element("div", element("h3", "Gained"), points(gained, "Nothing that was measured got better.")),
        element("div", element("h3", "Cost"), points(cost, "Nothing that was measured got worse.")),
        class_="ledger",
    )


def points(sentences: Sequence[str], otherwise: str) -> Markup:
    return element("ul", *(element("li", sentence) for sentence in sentences or [otherwise]))


def worst_sentences(part: Part) -> list[str]:
    known = [
        (error, layer_name(layer, index), head)
        for index, layer in enumerate(entries(part, "layers"))
        for head, error in enumerate(per_head(layer, "relative_l1"))
    ]
    sentences = []
    good = [(error, name, head) for error, name, head in known if numbers.finite(error) is not None]
    if good:
        error, name, head = max(good, key=lambda entry: entry[0])
        typical = numbers.finite(part.get("relative_l1_median")) or numbers.median(error for error, _, _ in good)
        average = part.get("relative_l1_mean")
        also = "" if average is None else f" (mean {numbers.plain(average)})"
        sentences.append(
            f"Attention outputs differ from dense by a median relative L1 of {numbers.plain(typical)}{also}; "
            f"the worst head (layer {name}, head {head}) by {numbers.plain(error)}."
        )
    elif "relative_l1_worst" in part or "relative_l1_median" in part:
        middle, worst = (numbers.plain(part.get(f"relative_l1_{which}")) for which in ("median", "worst"))
        sentences.append(f"Attention outputs differ from dense by a median relative L1 of {middle}, at worst {worst}.")
    if len(good) < len(known):
        sentences.append(f"{len(known) - len(good)} of {len(known)} heads have an error that is not a finite number.")
    return sentences


def passkey(part: Part) -> Markup | None:
    """Whether a number hidden in the text was repeated at the end, by depth."""
    found = entries(part, "passkey")
    if not found:
        return None

    def row(name: str, key: str) -> Markup:
        cells = (
            element("td", "found" if entry.get(key) else "missed", class_="good" if entry.get(key) else "bad")
            for entry in found
        )
        return element("tr", element("th", name, scope="row"), *cells)

    depths = (element("th", numbers.percent(entry.get("depth")), scope="col") for entry in found)
    totals = {key: sum(bool(entry.get(key)) for entry in found) for key in ("dense", "sparse")}
    tokens = part.get("passkey_tokens")
    text = "the text" if tokens is None else f"{numbers.count(tokens)} tokens of the text"
    return join(
        element("h3", "A number hidden in the text"),
        element(
            "p",
            f"A number is hidden at {len(found)} depths of {text} and the model is asked for it at the end. "
            f"Dense attention found {totals['dense']} of {len(found)}, tamis {totals['sparse']} of {len(found)}.",
        ),
        element(
            "div",
            element(
                "table",
                element("thead", element("tr", element("th", "depth", scope="col"), *depths)),
                element("tbody", row("dense", "dense"), row("tamis", "sparse")),
                class_="passkey",
            ),
            class_="scroll",
        ),
    )
