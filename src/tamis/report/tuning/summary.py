"""What tuning found, in words and figures: the headline, and the cards under it."""

from __future__ import annotations

from collections.abc import Sequence

from tamis.profile import Profile
from tamis.report import numbers
from tamis.report.markup import Markup, element
from tamis.report.summary import bars, card
from tamis.report.tuning.heads import Head, Measured, Steps, beyond, every_head, limit_of

NAMES = {
    "l1": "relative L1 of a head by its mask",
    "pv_l1": "relative L1 of a head with stage 2",
    "end_l1": "relative L1 of the model's output",
    "end_perplexity": "relative change of perplexity",
}


def headline(profile: Profile, heads: Sequence[Head]) -> str:
    """How much of the attention is left, in a sentence."""
    model, density = profile.model or "A model", numbers.mean(head.tuned.density for head in heads)
    if density is None:
        return f"{model}: settings of {len(profile.layers)} layers, without evidence"
    return f"{model} computes {numbers.percent(density)} of the blocks of its attention"


def lead(profile: Profile, parts: Sequence[Steps]) -> str:
    """What the page is about: how many layers, and for which budget."""
    sizes = [len(layer.heads) for part in parts for layer in part.layers]
    ranges = f", in {len(parts)} ranges of steps" if len(parts) > 1 else ""
    accepted = "; ".join(f"{NAMES.get(name, name)} at most {size:.4g}" for name, size in profile.budget.items())
    return (
        f"tamis tune looked for the sparsest settings of every head that stay within a budget: "
        f"{accepted or 'none is recorded'}. {count(len(profile.layers), 'layer')} with {count(sum(sizes), 'head')} "
        f"have settings{ranges}. Held out means inputs that decided nothing."
    )


def count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def cards(profile: Profile, parts: Sequence[Steps]) -> Markup:
    heads = every_head(parts)
    return element(
        "div",
        density_card(heads),
        within_card(heads, limit_of(profile)),
        worst_card(heads, limit_of(profile)),
        end_card(profile) or dense_card(parts),
        class_="cards",
    )


def density_card(heads: Sequence[Head]) -> Markup:
    tuned, held = (numbers.mean(m.density for m in each) for each in _both(heads))
    rows = [("tuning inputs", tuned, numbers.unit(tuned), False), ("held out", held, numbers.unit(held), False)]
    note = "Computed block products of those that are visible, mean over heads; 1 would be dense."
    return card("Mean density", numbers.unit(tuned), bars(rows, full=1), element("p", note))


def within_card(heads: Sequence[Head], limit: float | None) -> Markup:
    """How many heads stay within the budget; the middle of their errors if it is not for heads."""
    both = [[m.worst for m in each if m.worst is not None] for each in _both(heads)]
    if limit is None:
        rows = [
            (name, numbers.median(errors), numbers.plain(numbers.median(errors)), False)
            for name, errors in zip(("tuning inputs", "held out"), both, strict=True)
        ]
        note = "Largest relative L1 over the inputs, of the median head. The budget is not for single heads."
        return card("Error of a head", rows[0][2], bars(rows), element("p", note))
    shares = [numbers.mean(float(not beyond(e, limit)) for e in errors) for errors in both]
    rows = [
        (name, share, numbers.percent(share), False)
        for name, share in zip(("tuning inputs", "held out"), shares, strict=True)
    ]
    tone = None if shares[1] is None else "good" if shares[1] == 1 else "bad" if shares[1] < 0.9 else None
    note = f"Heads whose largest relative L1 over the inputs is at most {limit:.4g}."
    return card(
        "Heads within the budget, held out",
        numbers.percent(shares[1]),
        bars(rows, full=1),
        element("p", note),
        tone=tone,
    )


def worst_card(heads: Sequence[Head], limit: float | None) -> Markup:
    """The head with the largest error anywhere, held out inputs included."""
    found = [
        (error, where, head)
        for head in heads
        for error, where in ((head.tuned.worst, "on a tuning input"), (head.held.worst, "on a held-out input"))
        if error is not None
    ]
    if not found:
        return card("Worst head", numbers.MISSING, element("p", "The profile holds no evidence."))
    error, where, head = max(found, key=lambda entry: entry[0])
    rows = [
        (name, size, numbers.plain(size), dense)
        for name, size, dense in (
            ("budget", limit, True),
            ("tuning inputs", head.tuned.worst, False),
            ("held out", head.held.worst, False),
        )
        if size is not None
    ]
    note = f"Relative L1 of {head.name}, {where}. It runs with {head.settings}."
    return card(
        "Worst head", numbers.plain(error), bars(rows), element("p", note), tone="bad" if beyond(error, limit) else None
    )


def end_card(profile: Profile) -> Markup | None:
    """What all settings together did at the end of the model, beside the budget for it."""
    known = [(name, value) for name, value in profile.evidence.items() if name.startswith("end_")]
    if not known:
        return None
    name, value = known[0]
    accepted = profile.budget.get(name)
    rows = [("reached", value, numbers.plain(value), False)]
    if accepted is not None:
        rows.insert(0, ("budget", accepted, numbers.plain(accepted), True))
    note = f"All settings together: {NAMES.get(name, name)}."
    tone = "bad" if accepted is not None and value > accepted else None
    return card("At the end of the model", numbers.plain(value), bars(rows), element("p", note), tone=tone)


def dense_card(parts: Sequence[Steps]) -> Markup:
    heads = every_head(parts)
    dense = sum(head.dense for head in heads)
    layers = [layer for part in parts for layer in part.layers]
    full = sum(layer.precision == "full" for layer in layers)
    share = dense / len(heads) if heads else None
    rows = [("of all heads", share, numbers.percent(share), False)]
    note = (
        "Heads that keep all blocks: no sparse setting that was tried was good enough." if dense else "None keeps all."
    )
    more = f" In full precision, since rounding alone went beyond the budget: {count(full, 'layer')}." if full else ""
    return card("Dense heads", f"{dense:,}", bars(rows, full=1), element("p", note + more))


def _both(heads: Sequence[Head]) -> tuple[list[Measured], list[Measured]]:
    return [head.tuned for head in heads], [head.held for head in heads]
