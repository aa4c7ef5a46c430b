"""The tuning report: what it says about a profile and its survey, and which files it refuses."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from report_pages import Page, check_page
from tuning_pages import EVIL, PROFILES, SURVEYED, make_profile, make_survey, write_journal

from tamis import Sparge, cli, report
from tamis.predictors import Window
from tamis.profile import Evidence, LayerSettings, Profile, Stage
from tamis.report import axes, colour
from tamis.report.tuning import frontier, render
from tamis.report.tuning.heads import short_names, words
from tamis.tuning import Budget, surveys, tune_source
from tamis.tuning.calls import LayerCall
from tamis.tuning.candidates import GRID
from tamis.tuning.run import survey as survey_call


def page_of(case: str, surveyed: bool) -> str:
    profile = PROFILES[case]
    return render(profile, make_survey(profile, SURVEYED[case]) if surveyed else None)


ALL = [(case, False) for case in PROFILES] + [(case, True) for case in SURVEYED]


@pytest.mark.parametrize(("case", "surveyed"), ALL)
def test_every_page_is_well_formed_and_complete_in_itself(case: str, surveyed: bool) -> None:
    html = page_of(case, surveyed)
    page = check_page(html, scripts=2)
    assert "NaN" not in html
    for word in ("nan", "inf", "Infinity"):
        assert not re.search(rf"\b{word}\b", page.words("main")), word
    assert "None" not in page.words("body")
    assert ("What another budget would give" in page.words("h2")) == surveyed


def test_hostile_names_are_shown_and_not_obeyed() -> None:
    html = page_of("hostile", surveyed=True)
    page = Page(html)
    assert page.words("h1").startswith(EVIL.strip().split("\u2028")[0])
    assert page.words("main").count("<script>alert(1)</script>") == 6, "layers, budget, reached, model, version"
    assert "alert" not in page.words("style")
    assert not page.all("img")
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert len(page.all("script")) == 3
    found = re.findall(r'<script type="application/json" id="survey">([^<>&]*)</script>', html)
    assert json.loads(found[0])["layers"][1]["name"] == "1"


def test_hostile_names_inside_the_data_of_the_script() -> None:
    profile = replace(make_profile(2, 1), layers={EVIL: make_profile(1, 1).layers["model.layers.0.self_attn"]})
    html = render(profile, make_survey(profile))
    check_page(html, scripts=2)
    found = re.findall(r'<script type="application/json" id="survey">([^<>&]*)</script>', html)
    assert json.loads(found[0])["layers"][0]["name"] == EVIL


def small() -> Profile:
    """Two layers of two heads whose figures are easily found by hand."""
    first = Evidence((0.25, 1.0), (0.03, 0.01), (0.05, 0.02), 3, (0.5, 1.0), (0.05, 0.01), (0.12, 0.01), 2)
    second = Evidence((0.5, 0.25), (0.06, 0.04), (0.09, 0.04), 3, (0.5, 0.4), (0.06, 0.02), (0.09, 0.03), 2)
    settings = LayerSettings(Sparge(cdf=(0.9, 1e-9), topk=(1e-9, 1.0), similarity=-1), (4.0, float("inf")))
    return Profile(
        {
            "blocks.0.attn": (Stage(settings, evidence=first),),
            "blocks.1.attn": (Stage(LayerSettings(Sparge(topk=0.25), precision="full"), evidence=second),),
        },
        "Tiny",
        {"l1": 0.08, "pv_l1": 0.09},
        "0.1.0",
    )


def test_cards_say_what_the_profile_says() -> None:
    text = Page(render(small())).words()
    assert "Tiny computes 50% of the blocks of its attention" in text
    assert "relative L1 of a head by its mask at most 0.08" in text
    assert "2 layers with 4 heads" in text
    assert "Mean density 0.500 tuning inputs 0.500 held out 0.600" in text
    assert "Heads within the budget, held out 75% tuning inputs 100% held out 75%" in text
    assert "Worst head 0.120 budget 0.0900 tuning inputs 0.0500 held out 0.120" in text
    assert "Relative L1 of layer 0, head 0, on a held-out input. It runs with cdf 0.9, pv threshold 4." in text
    assert "Dense heads 1 of all heads 25%" in text
    assert "In full precision, since rounding alone went beyond the budget: 1 layer." in text


def test_a_budget_for_the_end_is_judged_there() -> None:
    text = Page(page_of("end budget", surveyed=False)).words("main")
    assert "At the end of the model 0.0193 budget 0.0200 reached 0.0193" in text
    assert "within the budget" not in text
    over = replace(PROFILES["end budget"], evidence={"end_l1": 0.021})
    assert len(Page(render(over)).all("div", "bad")) == 1
    assert len(Page(page_of("end budget", surveyed=False)).all("div", "bad")) == 0


def test_evidence_on_the_budget_is_within_it() -> None:
    """Evidence is rounded to six places: what lies on the budget is not beyond it."""
    assert 'class="odd"' not in render(replace(small(), budget={"l1": 0.12})), "held out .12 of .12"
    assert render(replace(small(), budget={"l1": 0.12})).count("mark over") == 0
    assert 'class="odd"' not in render(replace(small(), budget={"l1": 0.1199996})), "which rounds to .12"
    assert render(replace(small(), budget={"l1": 0.119})).count('class="mark over"') == 1


def cells(html: str) -> list[tuple[str, int, int, str]]:
    found = re.findall(r'<rect class="(\w+)" x="(\d+)" y="(\d+)" width="1" height="1"><title>([^<]*)</title>', html)
    return [(step, int(x), int(y), title) for step, x, y, title in found]


def test_four_maps_with_a_cell_for_every_head() -> None:
    html = render(small())
    found = cells(html)
    assert len(found) == 4 * 4
    step = "s{}".format
    top = colour.step_of
    density, held, error, held_error = (found[at : at + 4] for at in range(0, 16, 4))
    assert [cell[:3] for cell in density] == [
        (step(top(value)), x, y) for value, x, y in ((0.25, 0, 0), (1.0, 0, 1), (0.5, 1, 0), (0.25, 1, 1))
    ]
    assert [cell[0] for cell in held] == [step(top(value)) for value in (0.5, 1.0, 0.5, 0.4)]
    assert [cell[0] for cell in error] == [step(top(value / 0.09)) for value in (0.05, 0.02, 0.09, 0.04)]
    assert [cell[0] for cell in held_error] == ["odd", *(step(top(value / 0.09)) for value in (0.01, 0.09, 0.03))]
    assert density[0][3] == (
        "layer 0, head 0: cdf 0.9, pv threshold 4; density 0.250, L1 0.0300 (largest 0.0500); "
        "held out 0.500, 0.0500 (0.120)"
    )
    assert density[1][3].startswith("layer 0, head 1: all blocks (topk 1); density 1.000")
    assert re.findall(r'<path class="dot" d="([^"]*)">', html) == ["M0.5 1.5h0"] * 4


def test_layers_of_unequal_size_have_empty_cells() -> None:
    made = small()
    (stage,) = made.layers["blocks.1.attn"]
    one = replace(stage, evidence=Evidence((0.5,), (0.1,), (0.1,), 3))
    found = cells(render(replace(made, layers={**made.layers, "blocks.1.attn": (one,)})))
    assert ("none", 1, 1, "layer 1 has no head 1") in found


def test_dots_stand_where_both_errors_say() -> None:
    html = render(small())
    low, high = axes.log_range(0.01, 0.12)
    dots = re.findall(r'<path class="mark( \w+)?" d="M([\d.]+) ([\d.]+)h0"><title>(layer \d, head \d)', html)
    assert [(kind.strip(), name) for kind, _, _, name in dots] == [
        ("over", "layer 0, head 0"),
        ("dense", "layer 0, head 1"),
        ("", "layer 1, head 0"),
        ("", "layer 1, head 1"),
    ]
    for (_, x, y, _), (tuned, held) in zip(dots, ((0.05, 0.12), (0.02, 0.01), (0.09, 0.09), (0.04, 0.03)), strict=True):
        assert 10 ** (low + float(x) * (high - low)) == pytest.approx(tuned, rel=1e-3)
        assert 10 ** (high - float(y) * (high - low)) == pytest.approx(held, rel=1e-3)
    # Both budgets, as lines through the chart.
    assert len(re.findall(r'class="budget"', html)) == 2


def test_work_is_the_sum_of_densities() -> None:
    made = small()
    html = render(replace(made, layers={**made.layers, "blocks.2.attn": made.layers["blocks.1.attn"]}))
    assert "layer 0: 45% of the kept blocks, those of 1.25 dense heads of 2" in html
    assert "layer 1: 27% of the kept blocks, those of 0.750 dense heads of 2" in html
    assert "The densest quarter of the heads keeps 55% of them." in html, "two of six: 1.5 of 2.75"
    heights = [float(h) for h in re.findall(r'class="fill" [^>]* height="([\d.]+)"', html)]
    assert heights[0] / heights[1] == pytest.approx(1.25 / 0.75, rel=1e-3)


@pytest.mark.parametrize(("high", "expected"), [(1.0, 6), (0.05, 6), (7.0, 4), (0.9999, 5), (300.0, 4)])
def test_linear_ticks_are_round(high: float, expected: int) -> None:
    found = axes.linear_ticks(high)
    assert len(found) == expected
    assert found[0] == 0
    assert found[-1] <= high * 1.0001
    assert found[-1] > high * 0.6
    assert f"{found[1]:.3e}"[0] in "125"


def test_missing_evidence_is_said() -> None:
    text = Page(page_of("bare", surveyed=False)).words()
    assert "without evidence" in text
    assert text.count("The profile holds no evidence for these settings") == 3
    assert "Steps 0 to 1" in text
    assert "Steps 2 to 4" in text
    assert "Steps from 5 on" in text
    html = page_of("no held out", surveyed=False)
    assert len(cells(html)) == 2 * 6 * 4, "no maps of what was not held out"
    assert "Tuned against held out" not in Page(html).words()
    assert "held out not measured" in Page(html).words()
    assert "The profile has no layers." in Page(page_of("nothing", surveyed=False)).words()


@pytest.mark.parametrize(("density", "error"), [(1.5, 0.1), (-0.1, 0.1), (0.5, -1e-9)])
def test_impossible_evidence_is_refused(density: float, error: float) -> None:
    good, bad = (0.5, 0.5), (0.5, density)
    for evidence in (
        Evidence(bad, (0.1, error), (0.1, error), 1),
        Evidence(good, (0.1, 0.1), (0.1, 0.1), 1, bad, (0.1, error), (0.1, error), 1),
    ):
        profile = Profile({"x.y": (Stage(LayerSettings(None), evidence=evidence),)})
        with pytest.raises(ValueError, match=r"evidence for layer 'x.y', head 1 is impossible"):
            render(profile)


def test_every_range_of_steps_has_its_maps() -> None:
    html = page_of("stages", surveyed=True)
    titles = Page(html).words("h2")
    assert titles.startswith("Steps 0 to 1 Steps 2 to 6 Steps from 7 on")
    assert len(cells(html)) == 3 * 4 * 4 * 3
    names = [layer["name"] for layer in data_of(html)["layers"]]
    assert names[:5] == ["0, steps 0 to 1", "1, steps 0 to 1", "2, steps 0 to 1", "3, steps 0 to 1", "0, steps 2 to 6"]


@pytest.mark.parametrize(
    ("settings", "head", "expected"),
    [
        (LayerSettings(None), 0, "dense"),
        (LayerSettings(Sparge(cdf=0.99985, similarity=-1)), 3, "cdf 0.99985"),
        (LayerSettings(Sparge(cdf=0.9, topk=0.1), 5.0), 0, "cdf 0.9, topk 0.1, similarity 0.1, pv threshold 5"),
        (LayerSettings(Sparge(cdf=(0.9, 1e-9), topk=(1e-9, 1.0))), 1, "all blocks (topk 1)"),
        (LayerSettings(Sparge(cdf=1e-9, similarity=-1, sink=False)), 0, "the largest block of every row, no sink"),
        (
            LayerSettings(Window(64), None, "full", "centroid"),
            0,
            "Window, size 64, sink 64, full precision, compensate centroid",
        ),
        (LayerSettings(Sparge(cdf=0.5, similarity=-1), (1.0, float("inf"))), 1, "cdf 0.5"),
    ],
)
def test_settings_in_words(settings: LayerSettings, head: int, expected: str) -> None:
    assert words(settings, head) == expected


def test_names_are_as_short_as_they_can_be() -> None:
    assert short_names(["model.layers.0.self_attn", "model.layers.11.self_attn"]) == ["0", "11"]
    assert short_names(["down.0.a.attn", "down.1.b.attn"]) == ["0.a", "1.b"]
    assert short_names(["attn"]) == ["0"]
    assert short_names(["first_long_name.a", "second_long_name.b"]) == ["0", "1"]
    assert short_names(["a", "a.b"]) == ["a", "a.b"]
    assert short_names(["a", "a"]) == ["0", "1"]
    assert short_names([]) == []


@pytest.mark.parametrize("digits", [12, 1])
def test_frontiers_hold_what_nothing_beats(digits: int) -> None:
    """Against all pairs of candidates; with one digit many are equally dense or equally exact."""
    found = make_survey(make_profile(1, 3)).found["model.layers.0.self_attn", 0]
    found = {name: array[:1].round(decimals=digits) for name, array in found.items()}
    density, error = found["density"][0], found["l1"][0]
    for head, points in enumerate(frontier.frontiers(found)):
        pairs = list(zip(density[:, head].tolist(), error[:, head].tolist(), strict=True))
        best = {a for a in pairs if not any(b != a and b[0] <= a[0] and b[1] <= a[1] for b in pairs)}
        assert [(point.density, point.worst) for point in points] == sorted(best)
        assert all(pairs[point.candidate] == (point.density, point.worst) for point in points)


def test_frontiers_know_mean_and_largest_error() -> None:
    found = make_survey(make_profile(1, 3)).found["model.layers.0.self_attn", 0]
    for by in ("worst", "mean"):
        for head, points in enumerate(frontier.frontiers(found, by)):
            for point in points:
                errors = found["l1"][:, point.candidate, head]
                assert point.worst == float(errors.max())
                assert point.mean == float(errors.mean())
                assert point.density == float(found["density"][:, point.candidate, head].mean())


@pytest.mark.parametrize("by", ["worst", "mean"])
def test_density_within_a_bound_is_the_sparsest_of_every_head(by: str) -> None:
    found = make_survey(make_profile(1, 5)).found["model.layers.0.self_attn", 0]
    density = found["density"].mean(0)
    error = found["l1"].amax(0) if by == "worst" else found["l1"].mean(0)
    bounds = [0.001, 0.02, float(error[3, 2]), 0.1, 0.5, 2.0]
    expected = [float(torch.where(error <= bound, density, 9.0).amin(0).mean()) for bound in bounds]
    assert frontier.density_within(frontier.frontiers(found, by), bounds, by) == pytest.approx(expected)


def data_of(html: str) -> Any:
    return json.loads(re.findall(r'id="survey">([^<]*)</script>', html)[0])


def test_the_slider_has_every_frontier_and_what_was_chosen() -> None:
    profile = PROFILES["whole"]
    survey = make_survey(profile)
    data = data_of(render(profile, survey))
    assert len(data["layers"]) == 30
    assert data["heads"] == 270
    assert data["grid"][-1] == "all blocks (topk 1)"
    assert data["grid"][0] == "cdf 0.4"
    evidence = profile.layers["model.layers.7.self_attn"][0].evidence
    assert evidence is not None
    points = frontier.frontiers(survey.found["model.layers.7.self_attn", 0])
    head = data["layers"][7]["heads"][3]
    assert head["chosen"] == [evidence.density[3], evidence.l1[3], evidence.l1_worst[3]]
    assert head["settings"] == "cdf 0.903, similarity 0.1, pv threshold 5"
    assert len(head["points"]) == len(points[3])
    for written, point in zip(head["points"], points[3], strict=True):
        assert written == pytest.approx(list(point), rel=1e-3)
    densities = [d for stages in profile.layers.values() for s in stages if s.evidence for d in s.evidence.density]
    assert data["density"] == pytest.approx(sum(densities))


def test_page_size_is_bounded() -> None:
    """80 layers of 64 heads: a page that a phone still opens."""
    assert len(page_of("large", surveyed=True).encode()) < 16_000_000


def test_a_survey_is_read_as_it_was_written(tmp_path: Path) -> None:
    profile = make_profile(3, 2, bounds=(2,))
    survey = make_survey(profile, (2,))
    path = write_journal(tmp_path / "journal", survey)
    path.write_bytes(path.read_bytes() + b"cut of")
    before = path.read_bytes()
    read = surveys.read(path)
    assert path.read_bytes() == before, "reading changes nothing"
    assert read.grid == GRID
    assert read.bounds == (2,)
    assert set(read.found) == set(survey.found)
    for place, arrays in survey.found.items():
        for name, array in arrays.items():
            assert torch.equal(read.found[place][name], array)
    assert render(profile, read) == render(profile, survey)


class OneCall:
    """A source of one call."""

    name, left_out = "One", Counter[str]()

    def __len__(self) -> int:
        return 1

    def visit(self, number: int, function: Callable[[LayerCall], None]) -> None:
        q, k, v = torch.randn(3, 1, 2, 640, 16, generator=torch.Generator().manual_seed(0))
        function(LayerCall("a/layer", number, 0, 0, 3 * q, k, v, True, None, None))

    def identity(self) -> str:
        return "one"


def test_the_journal_of_a_real_run_fits_its_profile(tmp_path: Path) -> None:
    profile = tune_source(OneCall(), None, Budget(0.2, 0.25), resume=tmp_path / "journal")
    read = surveys.read(tmp_path / "journal")
    found = read.found["a/layer", 0]
    call: list[LayerCall] = []
    OneCall().visit(0, call.append)
    expected = survey_call(call[0], 16, None)
    assert {name: array[0].tolist() for name, array in found.items()} == expected
    assert read.grid == GRID
    page = Page(render(profile, read))
    assert "What another budget would give" in page.words("h2")
    assert profile.run == read.run != ""
    with pytest.raises(ValueError, match="the journal is of another run than the profile: its model, inputs"):
        frontier.check(profile, read._replace(run="0123456789abcdef"))


def test_a_run_that_goes_on_is_read_as_far_as_it_is(tmp_path: Path) -> None:
    path = write_journal(tmp_path / "journal", make_survey(make_profile(2, 2)))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:5]))  # head, two layers of one input, its list, a layer of the next
    assert {len(arrays["l1"]) for arrays in surveys.read(path).found.values()} == {1}
    path.write_bytes(b"".join(lines[:3]))
    with pytest.raises(ValueError, match=r"journal holds no input's survey"):
        surveys.read(path)


def test_damaged_journals_are_refused_by_name(tmp_path: Path) -> None:
    survey = make_survey(make_profile(2, 2))
    whole = write_journal(tmp_path / "whole", survey).read_bytes()
    path = tmp_path / "broken"
    for data, message in (
        (b"", "broken is no journal"),
        (b"a text\nof two lines\n", "broken is damaged in line 1"),
        (whole.replace(b"survey /0/", b"survey /7/", 1), "broken is damaged in line 2"),
        (whole[:400].replace(b"\n", b" "), "broken is no journal"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            surveys.read(path)
    (layer, stage), arrays = next(iter(survey.found.items()))
    nan = torch.full_like(arrays["l1"], torch.nan)
    for number, (broken, message) in enumerate(
        (
            ({**arrays, "l1": arrays["l1"][:, :5]}, "l1 must be numbers for 48 candidates"),
            ({**arrays, "density": nan}, "density must be numbers for 48 candidates"),
            ({"l1": arrays["l1"]}, "square"),
        )
    ):
        file = write_journal(tmp_path / f"odd{number}", survey._replace(found={(layer, stage): broken}))
        with pytest.raises(ValueError, match=rf"odd{number} is a journal whose survey cannot be read.*{message}"):
            surveys.read(file)
    with pytest.raises(ValueError, match="cannot be read"):
        surveys.read(write_journal(tmp_path / "steps", survey, steps="x"))


def test_a_survey_of_another_run_is_refused() -> None:
    profile = make_profile(3, 2)
    survey = make_survey(profile)
    with pytest.raises(ValueError, match=r"no survey of layer 'model.layers.2.self_attn'"):
        render(profile, make_survey(make_profile(2, 2)))
    with pytest.raises(ValueError, match=r"2 samples of 3 heads, the profile 2 of 2"):
        render(profile, make_survey(make_profile(3, 3)))
    with pytest.raises(ValueError, match=r"ranges of steps start at \[0, 4\]"):
        render(profile, survey._replace(bounds=(4,)))
    one = {place: {name: array[:1] for name, array in arrays.items()} for place, arrays in survey.found.items()}
    with pytest.raises(ValueError, match=r"1 samples of 2 heads, the profile 2 of 2"):
        render(profile, survey._replace(found=one))


def test_the_command_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile = make_profile(2, 2)
    survey = make_survey(profile)
    saved, journal, out = tmp_path / "p.json", tmp_path / "p.journal", tmp_path / "page.html"
    profile.save(saved)
    write_journal(journal, survey)
    assert cli.main(["report", str(saved), "--journal", str(journal), "--out", str(out)]) == 0
    assert out.read_text(encoding="utf-8") == render(profile, survey)
    assert f"report: {out}" in capsys.readouterr().out
    assert cli.main(["report", str(saved), "--out", str(out)]) == 0
    assert out.read_text(encoding="utf-8") == render(profile)


@pytest.mark.parametrize(
    ("break_it", "code", "message"),
    [
        (lambda folder: (folder / "p.json").unlink(), cli.USAGE, "PROFILE: "),
        (lambda folder: (folder / "p.journal").unlink(), cli.USAGE, "--journal: "),
        (lambda folder: (folder / "p.json").write_text('{"format": 1}'), cli.FAILED, "p.json is no profile"),
        (lambda folder: (folder / "p.json").write_bytes(b"\xff"), cli.FAILED, "p.json is no profile"),
        (lambda folder: (folder / "p.journal").write_bytes(b"x\n"), cli.FAILED, "p.journal is damaged in line 1"),
        (
            lambda folder: make_profile(3, 2).save(folder / "p.json"),
            cli.FAILED,
            "the journal is of another run than the profile",
        ),
    ],
)
def test_the_command_refuses_files_by_name(
    break_it: Any, code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = make_profile(2, 2)
    profile.save(tmp_path / "p.json")
    write_journal(tmp_path / "p.journal", make_survey(profile))
    break_it(tmp_path)
    out = tmp_path / "page.html"
    given = ["report", str(tmp_path / "p.json"), "--journal", str(tmp_path / "p.journal"), "--out", str(out)]
    assert cli.main(given) == code
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.out.count("report:") == 0
    assert not out.exists()


def test_the_folder_of_the_page_must_be_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_profile(1, 1).save(tmp_path / "p.json")
    assert cli.main(["report", str(tmp_path / "p.json"), "--out", "/nowhere/page.html"]) == cli.USAGE
    assert "--out: the folder of /nowhere/page.html is not there" in capsys.readouterr().err


def test_write_returns_the_path(tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    assert report.write_tuning(target, small()) == target
    assert target.read_text(encoding="utf-8") == render(small())
