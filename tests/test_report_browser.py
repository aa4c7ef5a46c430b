"""The report in a real, headless Chromium: quiet, complete without a network, fitting, and drawn as the data says."""

from __future__ import annotations

import math
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from browser import OVERFLOW, Browser, pixels
from report_pages import CASES

from tamis import report
from tamis.report import colour, maps


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    return {case: report.write(folder / f"{case}.html", result) for case, result in CASES.items()}


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("case", CASES)
def test_page_loads_quietly_and_fits(browser: Browser, pages: dict[str, Path], case: str, width: int) -> None:
    browser.view(width)
    browser.open(pages[case])
    browser.evaluate("document.querySelectorAll('details').forEach((d) => d.open = true)")
    assert browser.problems == []
    assert {url.partition(":")[0] for url in browser.requests} <= {"file", "data"}
    assert [url for url in browser.requests if url.startswith("file:")] == [pages[case].as_uri()]
    assert browser.evaluate("innerWidth") == width
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(OVERFLOW) == []


def test_the_checks_above_can_fail(browser: Browser, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<!doctype html><title>bad</title><p class=wide style='width:3000px'>wide</p>"
        "<img src='http://example.invalid/a.png'>"
        "<script>console.error('a complaint'); alert('a dialog'); throw new Error('thrown')</script>"
    )
    browser.view(400)
    browser.open(bad)
    assert "P.wide" in browser.evaluate(OVERFLOW)
    assert browser.evaluate("document.documentElement.scrollWidth") > 400
    assert "http://example.invalid/a.png" in browser.requests
    complaints = " ".join(browser.problems)
    for complaint in ("a complaint", "a dialog", "thrown", "ERR_INTERNET_DISCONNECTED"):
        assert complaint in complaints


CELLS = """
[...document.querySelectorAll("#language ~ figure .heat rect")].map((cell) => {
  const box = cell.getBoundingClientRect();
  return [cell.querySelector("title").textContent, box.x + box.width / 2 + scrollX, box.y + box.height / 2 + scrollY,
          box.width, box.height, getComputedStyle(cell).fill];
})
"""


@pytest.mark.parametrize("case", ["whole", "one head", "large"])
def test_heat_map_cells_are_there_with_their_values(browser: Browser, pages: dict[str, Path], case: str) -> None:
    browser.view(1400)
    browser.open(pages[case])
    layers = CASES[case]["language"]["layers"]
    cells = browser.evaluate(CELLS)
    expected = [(layer["layer"], h, d) for layer in layers for h, d in enumerate(layer["density"])]
    assert len(cells) == len(expected) > 0
    for (title, _, _, width, height, fill), (layer, head, density) in zip(cells, expected, strict=True):
        assert title.startswith(f"layer {layer}, head {head}: density {density:.3f},")
        assert width > 4
        assert height > 4
        assert tuple(map(int, re.findall(r"\d+", fill))) == colour.LIGHT[colour.step_of(density)]
    heads = len(layers[0]["density"])
    xs, ys = [cell[1] for cell in cells], [cell[2] for cell in cells]
    assert all(left < right for left, right in pairwise(xs[::heads])), "layers run from left to right"
    assert all(upper < lower for upper, lower in pairwise(ys[:heads])), "heads run from top to bottom"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_screenshot_shows_the_heat_map(browser: Browser, pages: dict[str, Path], width: int, scheme: str) -> None:
    """The pixel at the middle of every cell has the colour of the cell's density: the picture is right."""
    browser.view(width, scheme=scheme)
    browser.open(pages["whole"])
    ramp = colour.LIGHT if scheme == "light" else colour.DARK
    cells = browser.evaluate(CELLS)
    top, bottom = min(cell[2] for cell in cells) - 20, max(cell[2] for cell in cells) + 20
    picture = pixels(browser.screenshot(0, top, width, bottom - top))
    assert (len(picture[0]), len(picture)) == (width, math.ceil(bottom - top))
    densities = [d for layer in CASES["whole"]["language"]["layers"] for d in layer["density"]]
    for (_, x, y, *_), density in zip(cells, densities, strict=True):
        assert picture[int(y - top)][int(x)] == ramp[colour.step_of(density)]
    assert len({pixel for row in picture for pixel in row}) > 30


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_screenshot_of_the_top_is_not_blank(browser: Browser, pages: dict[str, Path], scheme: str) -> None:
    browser.view(400, scheme=scheme)
    browser.open(pages["whole"])
    counts = Counter(pixel for row in pixels(browser.screenshot(0, 0, 400, 600)) for pixel in row)
    paper, often = counts.most_common(1)[0]
    assert min(paper) > 230 if scheme == "light" else max(paper) < 50
    assert 0.5 < often / counts.total() < 0.97, "text on paper, neither blank nor solid"


DRAWN = """
(async () => {
  const image = document.querySelectorAll(".map img")[INDEX];
  await image.decode();
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  const box = image.getBoundingClientRect();
  return [image.naturalWidth, image.naturalHeight, box.width, box.height,
          [...context.getImageData(0, 0, canvas.width, canvas.height).data]];
})()
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_attention_maps_are_drawn(browser: Browser, pages: dict[str, Path], scheme: str) -> None:
    browser.view(1400, scheme=scheme)
    browser.open(pages["whole"])
    palette = [*colour.LIGHT, colour.LIGHT_UNSEEN] if scheme == "light" else [*colour.DARK, colour.DARK_UNSEEN]
    entry = CASES["whole"]["language"]["maps"][0]
    shown = [maps.shade(entry["attention"], True), maps.paint(entry["kept"], True)]
    for index, rows in enumerate(shown):
        width, height, drawn_width, drawn_height, data = browser.evaluate(DRAWN.replace("INDEX", str(index)))
        assert (width, height) == (64, 32)
        assert drawn_width == pytest.approx(drawn_height)
        assert drawn_width > 100
        assert [tuple(data[i : i + 3]) for i in range(0, len(data), 4)] == [
            palette[step] for row in rows for step in row
        ]
    assert {maps.KEPT, maps.PAPER, maps.UNSEEN} <= {step for row in shown[1] for step in row}


READOUT = "document.querySelector('.density .readout').textContent"


def test_pointer_and_keys_read_out_the_numbers(browser: Browser, pages: dict[str, Path]) -> None:
    browser.view(1400)
    browser.open(pages["whole"])
    browser.evaluate("document.querySelector('.heat').scrollIntoView()")
    title, x, y, *_ = browser.evaluate(CELLS)[9 * 4 + 7]
    assert title.startswith("layer 4, head 7:")
    browser.point(x, y - browser.evaluate("scrollY"))
    assert browser.evaluate(READOUT) == title
    browser.point(1, 1)
    browser.evaluate("document.querySelector('.heat').focus({focusVisible: true})")
    assert browser.evaluate(READOUT).startswith("layer 0, head 0:")
    for key, place in (
        ("ArrowRight", "layer 1, head 0:"),
        ("ArrowDown", "layer 1, head 1:"),
        ("ArrowLeft", "layer 0, head 1:"),
    ):
        browser.press(key)
        assert browser.evaluate(READOUT).startswith(place)
    assert browser.problems == []
