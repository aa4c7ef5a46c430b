"""The result of `tamis bench order` as Markdown tables, and a picture of the orders on small grids."""

from __future__ import annotations

from typing import Any

from tamis import order
from tamis.bench.frontier import density_for
from tamis.predictors.sparge import DEFAULT_CDF
from tamis.report.markup import Markup, element, join

FIXED = (DEFAULT_CDF, 0.95)
BOUNDS = (0.05, 0.1)
ORDERS = ("random", "row", "column", "time", "hilbert")  # as in the paper, and column-major

WIDTH, HEIGHT = 960, 404
LEFT, PANEL = 18, 188
IMAGE, IMAGE_BLOCK = (1, 7, 11), 11
VIDEO, VIDEO_BLOCK = (4, 12, 12), 32
_STEP, _CELL = 15, 13  # pixels from token to token of the image, and the side of a token of the video
_IMAGE_TOP, _VIDEO_TOP = 66, 212
_STYLE = """
svg{--page:#fff;--text:#1f2328;--soft:#59636e}
@media (prefers-color-scheme:dark){svg{--page:#0d1117;--text:#e6edf3;--soft:#9198a1}}
.page{fill:var(--page)}svg{fill:var(--text);color:var(--text)}.soft{fill:var(--soft)}
text{font:13px system-ui,sans-serif}
.title{font-size:16px;font-weight:600}.walk{fill:none;stroke-width:3;stroke-linejoin:round;stroke-linecap:round}
.jump{stroke-width:1;opacity:.6}
"""


def markdown(result: dict[str, Any]) -> str:
    """One table per clip: similarities, L1 and sparsity at fixed settings, and the density that a bound on L1 needs."""
    parts = []
    for clip in result["clips"]:
        fixed = (f"L1, cdf {cdf:g} | sparsity" for cdf in FIXED)
        needed = (f"density at L1 {bound:g} | judge off" for bound in BOUNDS)
        head = ["order", "similarity of q", "of k", *fixed, *needed]
        lines = [_caption(result, clip), "", "| " + " | ".join(head) + " |"]
        lines.append("|" + "---|" * (lines[-1].count("|") - 1))
        found = {entry["order"]: entry for entry in clip["orders"]}
        lines += [_row(found[name]) for name in ORDERS]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _caption(result: dict[str, Any], clip: dict[str, Any]) -> str:
    frames, height, width = clip["grid"]
    return (
        f"{clip['clip']}, {frames} frames of {height} x {width} tokens ({clip['tokens']:,}), {clip['heads']} heads of "
        f"{len(clip['layers'])} layers of {result['model']} (proxy):"
    )


def _row(entry: dict[str, Any]) -> str:
    cells = [entry["order"], f"{entry['q_similarity']:.3f}", f"{entry['k_similarity']:.3f}"]
    by_cdf = {row["cdf"]: row for row in entry["judged"]}
    for cdf in FIXED:
        cells += [f"{by_cdf[cdf]['l1_mean']:.4f}", f"{1 - by_cdf[cdf]['density']:.3f}"]
    cells += [_needed(entry[name], bound) for bound in BOUNDS for name in ("judged", "unjudged")]
    return "| " + " | ".join(cells) + " |"


def _needed(rows: list[dict[str, float]], bound: float) -> str:
    """The density that a bound on the error needs; at most that of the sparsest setting, if even that keeps it."""
    ordered = sorted(rows, key=lambda row: row["density"])
    needed = density_for(ordered, bound)
    if needed is None:
        return f"at most {ordered[0]['density']:.3f}" if ordered[0]["l1_mean"] < bound else "-"
    return f"{needed:.3f}"


def svg() -> str:
    """The orders as walks through a small image, and the blocks that each makes of the first frame of a video."""
    said = [
        ("Five orders of tokens", "title", 26),
        (f"The walk through an image of 7 x 11 tokens, a colour for every {IMAGE_BLOCK} of them", "soft", 48),
        (f"The first of 4 frames of 12 x 12 tokens, a colour for every block of {VIDEO_BLOCK} tokens", "soft", 198),
    ]
    return (
        element(
            "svg",
            element("title", said[0][0]),
            element("style", _STYLE),
            element("rect", class_="page", width=WIDTH, height=HEIGHT),
            *(element("text", text, class_=class_, x=LEFT, y=y) for text, class_, y in said),
            *(_panel(name, LEFT + PANEL * number) for number, name in enumerate(ORDERS)),
            xmlns="http://www.w3.org/2000/svg",
            viewBox=f"0 0 {WIDTH} {HEIGHT}",
            width=WIDTH,
            height=HEIGHT,
            role="img",
        )
        + "\n"
    )


def _panel(name: str, left: int) -> Markup:
    name_at = _VIDEO_TOP + VIDEO[1] * _CELL + 20
    return join(element("text", name, x=left, y=name_at), *_walk(name, left), *_blocks(name, left))


def _walk(name: str, left: int) -> list[Markup]:
    at = [(left + 4 + column * _STEP, _IMAGE_TOP + row * _STEP) for _, row, column in _cells(name, IMAGE)]
    parts = []
    for number, block in enumerate(_cut(at, IMAGE_BLOCK)):
        if number:
            last = number * IMAGE_BLOCK - 1
            parts.append(_line(at[last : last + 2], "walk jump", "currentColor"))
        parts.append(_line(block, "walk", _colour(number)))
    return parts


def _line(points: list[tuple[int, int]], class_: str, stroke: str) -> Markup:
    return element("polyline", class_=class_, stroke=stroke, points=" ".join(f"{x},{y}" for x, y in points))


def _blocks(name: str, left: int) -> list[Markup]:
    parts = []
    for number, block in enumerate(_cut(_cells(name, VIDEO), VIDEO_BLOCK)):
        squares = [
            f"M{left + column * _CELL} {_VIDEO_TOP + row * _CELL}h{_CELL - 1}v{_CELL - 1}h{1 - _CELL}z"
            for frame, row, column in block
            if frame == 0
        ]
        if squares:
            parts.append(element("path", fill=_colour(number), d="".join(squares)))
    return parts


def _cells(name: str, grid: order.Grid) -> list[tuple[int, int, int]]:
    """(frame, row, column) of every token of an order."""
    _, height, width = grid
    found = order.tokens(name, grid).forward.tolist()
    return [(index // (height * width), index // width % height, index % width) for index in found]


def _cut(items: list[Any], size: int) -> list[list[Any]]:
    return [items[first : first + size] for first in range(0, len(items), size)]


def _colour(number: int) -> str:
    """Neighbouring numbers far apart on the circle of hues."""
    return f"hsl({number * 137 % 360} 60% 55%)"
