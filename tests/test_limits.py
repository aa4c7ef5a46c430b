"""`tamis bench limits` at tiny sizes: what it measures with, what it says, and the picture."""

from __future__ import annotations

import json
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from tamis.bench import cpu, limits, memory, picture, roofline
from tamis.demo.machine import machine

TINY = limits.Sizes(
    kept_lengths=(512, 1024),
    kept=4,
    length=512,
    head_dims=(32,),
    predicted=((512, 0.5), (1024, 0.5)),
    longest_dense=512,
    packed=1024,
    million=2048,
    short=(128,),
    repeats=1,
    patience=0.0,
)


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        for name, size in (("SIDE", 64), ("MEMORY_BYTES", 1 << 16), ("CACHE_BYTES", 1 << 14), ("DECODED", 256)):
            patch.setattr(roofline, name, size)
        torch.set_num_threads(2)
        return limits.run(TINY)


def test_every_part_has_bars(result: dict[str, Any]) -> None:
    assert {bar["part"] for bar in result["bars"]} >= set("abcdf")
    assert len({bar["what"] for bar in result["bars"]}) == len(result["bars"])
    for bar in result["bars"]:
        limit = bar["most"] if bar["least"] is None else bar["least"]
        below = bar["value"] <= limit
        assert bar["holds"] == (below if bar["least"] is None else bar["value"] >= limit)
    json.dumps(result, allow_nan=False)


def test_the_table_says_what_fails(result: dict[str, Any]) -> None:
    bars = [{**bar, "holds": index > 0} for index, bar in enumerate(result["bars"])]
    printed = limits.table({**result, "bars": bars})
    assert printed.count("FAILS") == 1
    assert f"{len(bars) - 1} of {len(bars)} bars hold" in printed
    assert "dense extrapolated from density" in printed
    assert all(point["name"] in printed for point in result["roofline"]["points"])


def test_a_bar_is_held_from_its_side() -> None:
    def holds(value: float, **limit: float) -> bool:
        return bool(limits._bar("a", "what", value, "x", note="", **limit)["holds"])

    assert [holds(value, most=1.1) for value in (1.0, 1.1, 1.2, float("nan"))] == [True, True, False, False]
    assert [holds(value, least=1.1) for value in (1.0, 1.1, 1.2, float("nan"))] == [False, True, True, False]


@pytest.mark.parametrize("local", [False, True])
def test_every_row_keeps_as_many_blocks(local: bool) -> None:
    mask = limits._kept(4096, 16, local).validate()
    kept = mask.to_dense()[0, 0]
    assert (kept.sum(-1) == 16).all()
    places = kept.nonzero()[:, 1].reshape(-1, 16)
    extent = places[:, -1] - places[:, 0]
    if local:
        assert (extent == 15).all()
        assert (kept[torch.arange(32), 2 * torch.arange(32)]).all(), "a row's own place is among them"
    else:
        assert extent.double().mean() > 40, "of 64: they are anywhere"


def test_a_length_is_timed_by_the_same_number_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[int, int] = {}

    def count(query: torch.Tensor, *_: Any) -> None:
        seen[query.shape[2]] = seen.get(query.shape[2], 0) + query.shape[2]

    monkeypatch.setattr(limits, "attend", count)
    bars = list(limits.kept_blocks(TINY))
    assert len(set(seen.values())) == 1
    assert [[row["tokens"] for row in bar["rows"]] for bar in bars] == [[512, 1024]] * 2


def test_a_cost_per_key_block_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault that part a is there to find: time that grows with the map."""

    def quadratic(query: torch.Tensor, *_: Any) -> None:
        limits.time.sleep(query.shape[2] ** 2 * 1e-8)

    monkeypatch.setattr(limits, "attend", quadratic)
    assert not any(bar["holds"] for bar in limits.kept_blocks(TINY))


def test_threads_are_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever happens while one thread is measured; with one thread to begin with there is nothing to compare."""

    def broken(*_: Any, **__: Any) -> None:
        assert torch.get_num_threads() == 1
        raise ValueError("stop")

    monkeypatch.setattr(limits, "attend", broken)
    assert list(limits.scaling(TINY)) == []
    torch.set_num_threads(3)
    with pytest.raises(ValueError, match="stop"):
        list(limits.scaling(TINY))
    assert torch.get_num_threads() == 3


def test_nothing_is_timed_after_a_wrong_output(monkeypatch: pytest.MonkeyPatch) -> None:
    real = cpu.attend

    def wrong(*arguments: Any, **options: Any) -> Any:
        found = real(*arguments, **options)
        return found._replace(output=found.output * 1.2)

    monkeypatch.setattr(cpu, "attend", wrong)
    with pytest.raises(RuntimeError, match=r"relative L1 .* nothing was timed"):
        limits.run(TINY)


def test_packing_eight_heads_takes_eight_times_the_memory() -> None:
    one, eight = (memory.packing(16384, heads) for heads in (1, 8))
    if one is None or eight is None:
        pytest.skip("this system does not tell peak memory")
    assert one.peak_extra_bytes > 16384 * 2 * 64, "a byte an entry"
    assert 6 < eight.peak_extra_bytes / one.peak_extra_bytes < 10
    assert min(one.seconds, eight.seconds) > 0


def test_quick_leaves_the_million_out() -> None:
    assert list(limits.million(limits.QUICK)) == []
    assert set(limits.QUICK.kept_lengths) < set(limits.FULL.kept_lengths)


def test_operations_and_bytes_of_a_point(result: dict[str, Any]) -> None:
    points = {point["name"]: point for point in result["roofline"]["points"]}
    dense, full = points["int8, d=64"], points["full, d=64"]
    assert full["intensity"] == pytest.approx(4 * 512 * 512 * 64 / (4 * 4 * 512 * 64))
    assert 1.4 < dense["intensity"] / full["intensity"] < 1.6, "16 bytes an entry against a little over 10"
    assert dense["gops"] * dense["seconds"] == pytest.approx(4 * roofline.HEADS * 512 * 512 * 64 / 1e9)
    assert points["int8, d=64, density 0.25"]["intensity"] == pytest.approx(dense["intensity"] / 4)


def test_the_roof_is_the_lower_of_both() -> None:
    peaks = {"int8": 1000.0, "fp32": 100.0, "cache": 10.0}
    assert roofline.roof(peaks, {"kind": "int8", "intensity": 5.0}) == 50
    assert roofline.roof(peaks, {"kind": "int8", "intensity": 500.0}) == 1000
    assert roofline.roof(peaks, {"kind": "full", "intensity": 500.0}) == 100


def test_the_picture_holds_every_point(result: dict[str, Any]) -> None:
    drawn = ElementTree.fromstring(picture.svg(result))
    space = "{http://www.w3.org/2000/svg}"
    dots = drawn.findall(f"{space}circle")
    assert [dot.findtext(f"{space}title") for dot in dots] == [p["name"] for p in result["roofline"]["points"]]
    for dot in dots:
        assert picture.LEFT <= float(dot.attrib["cx"]) <= picture.RIGHT
        assert picture.TOP <= float(dot.attrib["cy"]) <= picture.BOTTOM
    words = " ".join(drawn.itertext())
    assert all(unit in words for unit in ("operations per byte", "operations per second", "GB/s"))
    assert "prefers-color-scheme:dark" in words


def test_numbers_beside_dots_do_not_meet(result: dict[str, Any]) -> None:
    """Two kernels at the same place: their numbers stand on different sides."""
    points = result["roofline"]["points"]
    twice = {**result, "roofline": {**result["roofline"], "points": [points[0], {**points[0], "name": "again"}]}}
    drawn = ElementTree.fromstring(picture.svg(twice))
    places = {
        (text.attrib["x"], text.attrib["y"])
        for text in drawn.iter("{http://www.w3.org/2000/svg}text")
        if text.text in ("1", "2")
        and "strong" in text.attrib.get("class", "")
        and float(text.attrib["x"]) < picture.RIGHT
    }
    assert len(places) == 2


def test_a_result_says_what_held_torch_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or it would pass for one against all that torch can do."""
    monkeypatch.delenv("MKL_ENABLE_INSTRUCTIONS", raising=False)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert machine()["peer_limits"] == {"ONEDNN_MAX_CPU_ISA": "AVX2"}
