"""The tuning report in a real, headless Chromium: quiet, fitting, and with a slider that says where it stands."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from browser import OVERFLOW, Browser, pixels
from tuning_pages import EVIL, PROFILES, SURVEYED, make_profile, make_survey

from tamis import report
from tamis.report import colour


class Pages(dict[str, Path]):
    """Pages by name, each written when it is first asked for; "x, surveyed" is that of profile x with its survey."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def __missing__(self, name: str) -> Path:
        case, _, surveyed = name.partition(", ")
        survey = make_survey(PROFILES[case], SURVEYED[case]) if surveyed else None
        self[name] = report.write_tuning(self.folder / f"{len(self)}.html", PROFILES[case], survey)
        return self[name]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Pages:
    return Pages(tmp_path_factory.mktemp("tuning"))


NAMES = [*PROFILES, *(f"{case}, surveyed" for case in SURVEYED)]


@pytest.mark.parametrize("name", NAMES)
def test_page_loads_quietly_and_fits(browser: Browser, pages: Pages, name: str) -> None:
    for width in (375, 1400):
        browser.view(width)
        browser.open(pages[name])
        browser.evaluate("document.querySelectorAll('details').forEach((d) => d.open = true)")
        assert browser.problems == []
        assert [url for url in browser.requests if not url.startswith("data:")] == [pages[name].as_uri()]
        assert browser.evaluate("innerWidth") == width
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        assert browser.evaluate(OVERFLOW) == []


def said(browser: Browser) -> dict[str, str]:
    """The figures under the slider."""
    script = "[...document.querySelectorAll('#said dt')].map((t) => [t.textContent, t.nextSibling.textContent])"
    return dict(browser.evaluate(script))


def choose(browser: Browser, name: str, index: int) -> None:
    browser.evaluate(f"""(() => {{ const box = document.getElementById("{name}"); box.value = {index};
        box.dispatchEvent(new Event("{"input" if name == "stop" else "change"}", {{bubbles: true}})) }})()""")


def data(browser: Browser) -> Any:
    return json.loads(browser.evaluate("document.getElementById('survey').textContent"))


def centre(browser: Browser, what: str) -> tuple[float, float]:
    """The middle of a mark, as shares of its drawing."""
    found = browser.evaluate(f"document.querySelector('#explorer {what}').getAttribute('d')")
    x, y = re.fullmatch(r"M([\d.e-]+) ([\d.]+)h0", found).groups()  # type: ignore[union-attr]
    return float(x), float(y)


def test_the_slider_moves_and_the_text_follows(browser: Browser, pages: Pages) -> None:
    browser.view(375)
    browser.open(pages["whole, surveyed"])
    facts = data(browser)
    choose(browser, "layer", 7)
    choose(browser, "head", 3)
    head = facts["layers"][7]["heads"][3]
    points, low, high = head["points"], *facts["scale"][:2]
    first = int(browser.evaluate("document.getElementById('stop').value"))
    near = [abs(point[0] - head["chosen"][0]) for point in points]
    assert near[first] == min(near), "it starts beside what was chosen"
    assert said(browser)["chosen"].startswith("cdf 0.903, similarity 0.1, pv threshold 5: density ")
    seen = set()
    for stop, (density, mean, worst, candidate) in enumerate(points):
        choose(browser, "stop", stop)
        text = said(browser)
        assert text["stop"] == f"{stop + 1} of {len(points)}"
        assert text["settings"] == facts["grid"][candidate]
        assert text["density"].startswith(f"{density:.3f}: ")
        figures = re.fullmatch(r"mean ([\d.e-]+), largest ([\d.e-]+), (within|beyond) the budget", text["error"])
        assert figures is not None
        assert float(figures[1]) == pytest.approx(mean, rel=6e-3), "three digits"
        assert float(figures[2]) == pytest.approx(worst, rel=6e-3)
        assert (figures[3] == "beyond") == (worst > 0.08)
        now, then = (float(number) for number in re.findall(r"\d\.\d{4}", text["whole model"]))
        moved = (density - head["chosen"][0]) / 270
        assert then - now == pytest.approx(moved, abs=1.1e-4), "four places each"
        x, y = centre(browser, ".mark.at")
        assert x == pytest.approx(density)
        assert 10 ** (high - y * (high - low)) == pytest.approx(min(max(worst, 10**low), 10**high), rel=1e-3)
        seen.add(tuple(text.items()))
    assert len(seen) == len(points) > 5
    assert said(browser)["density"] == "1.000: as much as dense attention"
    assert browser.problems == []


def test_keys_move_the_slider(browser: Browser, pages: Pages) -> None:
    browser.view(1400)
    browser.open(pages["whole, surveyed"])
    choose(browser, "stop", 1)
    before = centre(browser, ".mark.at")
    browser.evaluate("document.getElementById('stop').focus()")
    browser.send(
        "Input.dispatchKeyEvent", type="keyDown", key="ArrowRight", code="ArrowRight", windowsVirtualKeyCode=39
    )
    browser.send("Input.dispatchKeyEvent", type="keyUp", key="ArrowRight", code="ArrowRight", windowsVirtualKeyCode=39)
    after = centre(browser, ".mark.at")
    assert said(browser)["stop"].startswith("3 of ")
    assert after[0] > before[0], "denser"
    assert after[1] > before[1], "and more exact, which is further down"
    assert "settings" in browser.evaluate("document.getElementById('stop').getAttribute('aria-valuetext')")


def test_another_layer_brings_its_own_heads(browser: Browser, tmp_path: Path) -> None:
    made = make_profile(2, 4)
    layers = {"a": made.layers["model.layers.0.self_attn"], "b": make_profile(1, 2).layers["model.layers.0.self_attn"]}
    profile = type(made)(layers, made.model, made.budget)
    browser.view(1400)
    browser.open(report.write_tuning(tmp_path / "page.html", profile, make_survey(profile)))
    names = "[...document.getElementById('head').options].map((o) => o.textContent)"
    assert browser.evaluate(names) == ["0", "1", "2", "3"]
    choose(browser, "head", 3)
    assert said(browser)["chosen"].startswith("all blocks (topk 1): density 1.000")
    choose(browser, "layer", 1)
    assert browser.evaluate(names) == ["0", "1"]
    assert said(browser)["chosen"].startswith("cdf 0.9, ")


def test_hostile_names_are_only_names(browser: Browser, tmp_path: Path) -> None:
    stages = make_profile(1, 1).layers["model.layers.0.self_attn"]
    profile = type(PROFILES["whole"])({EVIL: stages}, EVIL, {"l1": 0.08})
    browser.view(375)
    browser.open(report.write_tuning(tmp_path / "page.html", profile, make_survey(profile)))
    assert browser.problems == []
    assert browser.evaluate("document.getElementById('layer').options[0].textContent") == EVIL
    assert browser.evaluate("document.images.length") == 0
    assert browser.evaluate(OVERFLOW) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_screenshot_shows_maps_and_frontier(browser: Browser, pages: Pages, scheme: str) -> None:
    """Cells have the colour of their figure, and the chosen dot is where its figures say."""
    browser.view(1400, scheme=scheme)
    browser.open(pages["whole, surveyed"])
    script = """[...document.querySelectorAll(".heat")[0].querySelectorAll("rect")].map((cell) => {
      const box = cell.getBoundingClientRect();
      return [box.x + box.width * .25 + scrollX, box.y + box.height * .25 + scrollY];
    })"""
    places = browser.evaluate(script)
    ramp = colour.LIGHT if scheme == "light" else colour.DARK
    top, bottom = min(y for _, y in places) - 5, max(y for _, y in places) + 5
    picture = pixels(browser.screenshot(0, top, 1400, bottom - top))
    stages = [stages[0].evidence for stages in PROFILES["whole"].layers.values()]
    densities = [density for evidence in stages if evidence is not None for density in evidence.density]
    for (x, y), density in zip(places, densities, strict=True):
        assert picture[int(y - top)][int(x)] == ramp[colour.step_of(density)]
    box = browser.evaluate("""(() => { const box = document.querySelector("#explorer svg").getBoundingClientRect();
        return [box.x + scrollX, box.y + scrollY, box.width, box.height] })()""")
    odd = (217, 72, 15) if scheme == "light" else (255, 122, 69)
    choose(browser, "stop", 0)
    picture = pixels(browser.screenshot(*box))
    x, y = centre(browser, ".mark.chosen")
    assert picture[int(y * box[3])][int(x * box[2])] == odd


def test_pointing_at_a_dot_reads_it_out(browser: Browser, pages: Pages) -> None:
    browser.view(1400)
    browser.open(pages["stages"])
    browser.evaluate("document.querySelector('.scatter').scrollIntoView()")
    script = """(() => { const dots = [...document.querySelectorAll(".scatter")[0].querySelectorAll(".mark")];
      const dot = dots.at(-1), box = dot.getBoundingClientRect();
      return [dot.textContent, box.x + box.width / 2, box.y + box.height / 2] })()"""
    title, x, y = browser.evaluate(script)
    browser.point(x, y)
    shown = "document.querySelector('.scatter').closest('figure').querySelector('.readout').textContent"
    assert title.startswith("layer 3, head 2: all blocks")
    assert browser.evaluate(shown) == title
