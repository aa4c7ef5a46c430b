"""The report: what it says, in which order of plainness, and that it stands alone."""

from __future__ import annotations

import base64
import copy
import json
import math
import random
import re
import struct
import zlib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_pages import (
    CASES,
    INF,
    JUNK,
    NAN,
    Page,
    broken_result,
    check_page,
    hostile_result,
    make_layers,
    make_map,
    make_result,
)

from tamis import report
from tamis.report import axes, charts, colour, maps, numbers
from tamis.report.markup import element


@pytest.mark.parametrize("case", CASES)
def test_every_page_is_well_formed_and_complete_in_itself(case: str) -> None:
    check_page(report.render(CASES[case]), scripts=1)


def test_heading_levels_never_jump() -> None:
    levels = [int(tag[1]) for tag, _ in Page(report.render(make_result())).tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_hostile_text_is_shown_and_not_obeyed() -> None:
    page = Page(report.render(hostile_result()))
    assert page.words().count("<script>alert(1)</script>") >= 10
    assert "alert" not in page.words("script")
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert len(page.all("img")) == 4, "two maps of two pictures; the photograph that is none is left out"


def test_headline_figures_say_what_the_result_says() -> None:
    words = Page(report.render(make_result())).words()
    assert (
        "Attention ran 4.00x faster over 4,096 tokens of text and 2.00x slower over an image of 5,477 tokens" in words
    )
    for figure in (
        "12.0 s",
        "3.00 s",
        "30.0 s",
        "20.0 s",
        "1.50x faster",
        "10.000",
        "10.050",
        "0.470",
        "0.500",
        "0.440",
    ):
        assert figure in words, figure
    assert "0.9954" in words
    assert "dense (bf16)" in words
    assert "block size [128, 64]" in words
    assert "target avx2" in words
    assert "5 depths of 3,072 tokens of the text" in words
    assert "Dense attention found 4 of 5, tamis 3 of 5." in words
    assert "worst token 0.81230" in words
    assert "Model: A model · Text: A text" in words
    assert "dense attention torch SDPA, bf16 dense, one layer fp32 250 ms, bf16 125 ms" in words
    assert "median relative L1 of 0.0280 (mean 0.0410); the worst head" in words


def test_layer_table_repeats_the_charts_in_numbers() -> None:
    layers = [
        {"layer": 4, "density": [0.25, 0.75], "relative_l1": [0.01, 0.03], "dense_seconds": 0.4, "sparse_seconds": 0.1},
        {"layer": 5, "density": [0.5, NAN], "relative_l1": [0.02, INF], "dense_seconds": 1.5},
    ]
    rows = re.findall("<tr>(.*?)</tr>", report.render({"language": {"layers": layers}}))
    cells = [re.findall("<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]
    assert cells == [
        ["layer", "mean density", "lowest", "highest", "median error", "worst error", "dense time", "tamis time"],
        ["4", "0.500", "0.250", "0.750", "0.0200", "0.0300", "400 ms", "100 ms"],
        ["5", "0.500", "0.500", "0.500", "0.0200", "0.0200 (some not finite)", "1.50 s", "not measured"],
    ]


def ledger(html: str, part: int) -> tuple[list[str], list[str]]:
    """The sentences under Gained and under Cost of the first or the second part of a page."""
    block = html.split("<h3>Gained</h3>")[part + 1].partition("</div></div>")[0]
    gained, cost = block.replace(numbers.TIMES, "x").split("<h3>Cost</h3>")
    return re.findall("<li>(.*?)</li>", gained), re.findall("<li>(.*?)</li>", cost)


def test_losses_are_as_plain_as_wins() -> None:
    html = report.render(make_result())
    page = Page(html)
    words = page.words()
    assert "Perplexity 0.50% worse" in words
    gained, cost = ledger(html, 0)
    assert gained == [
        "Attention alone ran 4.00x faster.",
        "A whole pass ran 1.50x faster.",
        "53% of the block products were never computed.",
    ]
    assert cost[:2] == [
        "Perplexity went from 10.000 to 10.050 (+0.50%).",
        "The hidden number was missed where dense found it: at 50% of the text.",
    ]
    gained, cost = ledger(html, 1)
    assert gained == ["39% of the block products were never computed."]
    assert cost[:2] == ["Attention alone ran 2.00x slower.", "The output features are not identical: cosine 0.99540."]
    worst = max(
        (error, layer["layer"], head)
        for layer in make_result()["language"]["layers"]
        for head, error in enumerate(layer["relative_l1"])
    )
    assert f"the worst head (layer {worst[1]}, head {worst[2]}) by {numbers.plain(worst[0])}." in words
    assert f">2.00{numbers.TIMES} slower</div>" in html
    assert len(page.all("div", "bad")) == 2


def test_figures_that_are_not_finite_are_costs() -> None:
    page = Page(report.render(broken_result()))
    words = page.words()
    assert "Not a finite number: attention seconds sparse, attention ratio, perplexity sparse, density." in words
    assert "10 of 270 heads have an error that is not a finite number." in words
    assert len(page.all("rect", "odd")) == 1
    assert len(page.all("g", "lost")) == 2
    assert "layer 3, head 2: density NaN" in words
    assert "not finite in head 1" in words
    assert "layer 5: no finite error" in words


def test_absent_parts_leave_no_trace() -> None:
    everything = Page(report.render(CASES["whole"])).words("h2")
    assert "Language model, 4,096 tokens" in everything
    assert "Image model, 5,477 tokens" in everything
    assert "Image model" not in Page(report.render(CASES["language only"])).words("h2")
    image_only = Page(report.render(CASES["image only"]))
    assert "Language model" not in image_only.words()
    assert "perplexity" not in image_only.words().lower()
    nothing = Page(report.render({})).words("body")
    assert "No run was recorded" in nothing
    assert "NaN" not in nothing
    assert "None" not in nothing


def test_bare_numbers_make_a_page_without_charts() -> None:
    page = Page(
        report.render({"language": {"tokens": 8192, "attention_seconds_dense": 3, "attention_seconds_sparse": 1}})
    )
    assert "3.00x faster" in page.words("h1")
    assert "8,192" in page.words("h2")
    assert not page.all("figure")
    assert not page.all("table")
    assert "not measured" in page.words()


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (30, 9), (80, 64)])
def test_one_cell_per_layer_and_head_with_its_numbers(layers: int, heads: int) -> None:
    result = {"language": {"layers": make_layers(layers, heads)}}
    html = report.render(result)
    titles = re.findall(r'<rect class="(s\d+)" x="(\d+)" y="(\d+)" [^>]*><title>([^<]*)</title>', html)
    assert len(titles) == layers * heads
    for step, x, y, title in titles:
        layer = result["language"]["layers"][int(x)]
        density, error = layer["density"][int(y)], layer["relative_l1"][int(y)]
        assert step == f"s{round(density * (colour.STEPS - 1))}"
        assert title == (
            f"layer {x}, head {y}: density {density:.3f}, QK density {layer['qk_density'][int(y)]:.3f}, "
            f"relative L1 {numbers.plain(error)}"
        )


def test_error_bars_run_from_the_median_to_the_worst() -> None:
    layers = [{"layer": 7, "relative_l1": [0.01, 0.1, 0.02]}, {"layer": 8, "relative_l1": [0.05, 0.05, 0.05]}]
    html = charts.error_chart(layers, "errors")
    assert "layer 7: median 0.0200, worst 0.100 (head 1)" in html
    spans = re.findall(r'class="span" [^>]* y="([\d.]+)" width="0.64" height="([\d.]+)"', html)
    low, high = charts.log_range(layers, [0.01, 0.1, 0.05])
    assert (low, high) == pytest.approx((math.log10(0.02), -1), abs=1e-9)
    # .1 is the top of the chart and .02 its bottom; .05 lies log(.1/.05) / log(.1/.02) = 43% down.
    assert [tuple(map(float, span)) for span in spans] == [(0.0, 1.0), (pytest.approx(0.4307, abs=1e-4), 0.0)]


@pytest.mark.parametrize("errors", [[0.0, 0.0], [NAN], [], [None]])
def test_errors_that_cannot_be_drawn_say_so(errors: list[float]) -> None:
    assert "nothing to draw" in charts.error_chart([{"layer": 0, "relative_l1": errors}], "errors")


@pytest.mark.parametrize(
    "span", [(0.02, 0.02), (0.1, 0.1), (1e-7, 3.0), (0.001, 0.9), (1e-12, 1e9), (5.0, 7.0), (1.0, 10.0)]
)
def test_log_axis_holds_the_data_and_has_labels(span: tuple[float, float]) -> None:
    low, high = charts.log_range([{"relative_l1": [error]} for error in span], span)
    assert low - 1e-3 <= math.log10(span[0]) <= math.log10(span[1]) <= high + 1e-3
    ticks = axes.log_ticks(low, high)
    assert 2 <= len(ticks) <= 8
    for place, label in ticks:
        assert -1e-6 <= place <= 1 + 1e-6
        assert float(label) == pytest.approx(10 ** (high - place * (high - low)), rel=1e-2)


def read_png(uri: str) -> tuple[int, int, list[bytes], bytes]:
    """Width, height, rows of indices and palette of an indexed PNG without row filters, checksums verified."""
    data = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(data):
        (length,), kind = struct.unpack_from(">I", data, at), data[at + 4 : at + 8]
        body = data[at + 8 : at + 8 + length]
        assert struct.unpack_from(">I", data, at + 8 + length)[0] == zlib.crc32(kind + body)
        chunks[kind] = body
        at += length + 12
    width, height, *rest = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert rest == [8, 3, 0, 0, 0]
    raw = zlib.decompress(chunks[b"IDAT"])
    lines = [raw[i : i + width + 1] for i in range(0, len(raw), width + 1)]
    assert len(lines) == height
    assert all(line[0] == 0 for line in lines)
    return width, height, [line[1:] for line in lines], chunks[b"PLTE"]


def test_ramps_lead_away_from_the_paper() -> None:
    """Little is near the background, much is far from it: pale to dark on a light page, dark to pale on a dark one."""
    light, dark = ([0.3 * r + 0.59 * g + 0.11 * b for r, g, b in ramp] for ramp in (colour.LIGHT, colour.DARK))
    assert all(after < before for before, after in pairwise(light))
    assert all(after > before for before, after in pairwise(dark))
    assert [colour.step_of(value) for value in (-1, 0, 1, 2)] == [0, 0, colour.STEPS - 1, colour.STEPS - 1]


def test_png_holds_the_pixels_it_was_given() -> None:
    rows = [bytes([0, 1, 2]), bytes([2, 1, 0])]
    assert read_png(colour.png(rows, [(1, 2, 3), (4, 5, 6), (7, 8, 9)])) == (3, 2, rows, bytes(range(1, 10)))


def test_maps_mark_kept_skipped_and_future() -> None:
    kept, future, skipped = maps.KEPT, maps.UNSEEN, maps.PAPER
    causal = maps.paint([[1, 0, 0, 0], [1, 0, 0, 1]], causal=True)
    assert causal == [bytes([kept, skipped, future, future]), bytes([kept, skipped, skipped, kept])]
    assert maps.paint([[0, 0, 0, 1]], causal=False) == [bytes([skipped, skipped, skipped, kept])]
    assert maps.paint([[0, 1.0], [0, 0]], causal=True)[0] == bytes([skipped, kept]), "kept in the future is not hidden"
    # Each row against its own largest, square root: .01 / .04 is half way up the ramp.
    assert maps.shade([[0.04, 0.01, 0.0]], causal=False) == [bytes([kept, colour.step_of(0.5), skipped])]


def test_large_maps_shrink_by_averaging() -> None:
    assert maps.shrink([[0, 1, 1, 1], [0, 1, 1, 0]], most=2) == [[0.5, 1.0], [0.5, 0.5]]
    assert maps.shrink([[1, 2, 3]], most=2) == [[1.0, 2.5]]
    size = 700
    attention = [[1 / size] * size for _ in range(size)]
    result = {"language": {"maps": [{"layer": 0, "head": 0, "attention": attention, "kept": attention}]}}
    html = report.render(result)
    images = Page(html).all("img")
    assert [(image["width"], image["height"]) for image in images] == [("128", "128")] * 2
    for uri in re.findall(r'(?:src|srcset)="([^"]*)"', html):
        assert read_png(uri)[:2] == (128, 128)


def test_attention_inside_kept_blocks_is_summed_block_by_block() -> None:
    entry = {"tokens": 200, "block_size": [128, 64]}
    attention = [[0.5, 0.25, 0.25, 0.0], [0.1, 0.2, 0.3, 0.4]]
    kept = [[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]
    assert maps.mass_kept(entry, attention, kept) == pytest.approx((0.5 + 0.7) / 2)
    assert maps.mass_kept({"tokens": 400, "block_size": [128, 64]}, attention, kept) is None, "a map already shrunk"
    assert maps.mass_kept({}, attention, kept) is None


@pytest.mark.parametrize("photo", ["", "no base64 !", base64.b64encode(b"GIF89a").decode(), 7])
def test_a_photograph_that_is_no_png_is_left_out(photo: object) -> None:
    page = Page(report.render({"image": {"tokens": 1, "photo_png": photo}}))
    assert not page.all("img")
    assert ("no PNG picture" in page.words()) == (isinstance(photo, str) and photo != "")


def test_a_photograph_that_is_too_large_is_left_out() -> None:
    photo = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(7_000_000)).decode()
    page = Page(report.render({"image": {"tokens": 1, "photo_png": photo}}))
    assert not page.all("img")
    assert "too large" in page.words()


def test_page_size_is_bounded() -> None:
    """80 layers of 64 heads and eight maps of noise, which no compression makes smaller."""
    rng = random.Random(0)
    noise = [[rng.random() for _ in range(500)] for _ in range(500)]
    result = make_result(80, 64)
    result["language"]["maps"] = [{"layer": 0, "head": 0, "attention": noise, "kept": noise}] * 8
    assert len(report.render(result).encode()) < 2_000_000


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (numbers.plain(0.02834), "0.0283"),
        (numbers.plain(1234.5), "1,234"),
        (numbers.plain(0), "0"),
        (numbers.plain(-0.5), "-0.500"),
        (numbers.plain(3.21e-7), "3.21e-07"),
        (numbers.plain(NAN), "NaN"),
        (numbers.plain(None), "not measured"),
        (numbers.plain(-INF), "-∞"),
        (numbers.seconds(0.0123), "12.3 ms"),
        (numbers.seconds(4e-6), "4.00 µs"),
        (numbers.seconds(179.9), "3 min 0 s"),
        (numbers.percent(0.005), "0.5%"),
        (numbers.percent(0.4712), "47%"),
        (numbers.faster(4.617), f"4.62{numbers.TIMES} faster"),
        (numbers.faster(0.8), f"1.25{numbers.TIMES} slower"),
        (numbers.faster(1.001), "the same speed"),
        (numbers.faster(NAN), "NaN"),
        (numbers.faster(0.0), "0.0"),
        (numbers.change(10.0, 9.5), "-5.00%"),
        (numbers.change(0.0, 1.0), None),
        (numbers.unit(1.0), "1.000"),
        (numbers.count(8192), "8,192"),
        (numbers.plain(numbers.mean([1e308, 1e308])), "1.00e+308"),
    ],
)
def test_numbers_read_well(written: str | None, expected: str | None) -> None:
    assert written == expected


def test_ratio_comes_from_the_times_where_it_is_missing() -> None:
    assert numbers.speedup({"attention_seconds_dense": 6.0, "attention_seconds_sparse": 2.0}, "attention") == 3.0
    assert numbers.speedup({"attention_seconds_dense": 6.0, "attention_seconds_sparse": 0}, "attention") is None
    assert numbers.speedup({"attention_ratio": 2.5, "attention_seconds_dense": 6.0}, "attention") == 2.5


def test_markup_escapes_text_and_attributes() -> None:
    assert element("p", "<&>", class_='"') == '<p class="&quot;">&lt;&amp;&gt;</p>'
    assert element("img", alt="a", title=None) == '<img alt="a">'


def test_a_result_read_back_from_json_gives_the_same_page() -> None:
    """Tuples in place of lists make no difference, and NaN survives."""
    tuples = make_result(2, 3, 256)
    language = tuples["language"]
    language["settings"]["block_size"] = language["maps"][0]["block_size"] = (128, 64)
    language["layers"][1]["density"] = (0.25, NAN, 0.75)
    language["maps"][0]["kept"] = tuple(map(tuple, language["maps"][0]["kept"]))
    language.update(layers=tuple(language["layers"]), passkey=tuple(language["passkey"]))
    for result in (tuples, *CASES.values()):
        assert report.render(json.loads(json.dumps(result))) == report.render(result)


def test_write_returns_the_path_and_writes_utf8(tmp_path: Path) -> None:
    for target in (tmp_path / "a.html", str(tmp_path / "b.html")):
        written = report.write(target, make_result())
        assert written == Path(target)
        assert written.read_text(encoding="utf-8") == report.render(make_result())


def places(value: object, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside a result, containers included."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


SMALL = make_result(2, 2, 256)
SMALL["image"].update(layers=make_layers(1, 2), maps=[make_map(200, causal=False)])


@settings(max_examples=200)
@given(st.lists(st.tuples(st.sampled_from(list(places(SMALL))[1:]), st.sampled_from(JUNK)), min_size=1, max_size=4))
def test_whatever_a_result_holds_there_is_a_page(changes: list[tuple[tuple[Any, ...], Any]]) -> None:
    result = copy.deepcopy(SMALL)
    for path, junk in changes:
        place: Any = result
        try:
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = copy.deepcopy(junk)
        except (TypeError, KeyError, IndexError):
            continue  # an earlier change removed the way there
    Page(report.render(result))
