"""`tamis bench gpu` without a GPU: a whole run in Triton's interpreter, the gate, the arithmetic, the texts.

Run as a program with a file's name, it is that whole run, on tiny shapes: Triton reads `TRITON_INTERPRET` once.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import tamis
from tamis import cli
from tamis.bench import gpu, gpu_calls, gpu_gate, gpu_report, record

TINY = gpu_calls.Shape("tiny", 1, 2, 1, 200, 32, causal=True)
PLAIN = gpu_calls.Shape("plain", 2, 2, 2, 200, 32)
LONG = gpu_calls.Shape("long", 1, 32, 8, 32768, 128, causal=True)


def main(path: Path) -> None:
    """The whole run, written as JSON after every repetition; prints table, bars and markdown."""
    import interpreter

    interpreter.install()
    options = gpu.GpuOptions(shapes=(TINY,), densities=(0.5,), repeats=1)
    saves = []

    def save(result: gpu_report.Result) -> None:
        record.write(path, result)
        saves.append(sum(len(row["times_ms"]) for row in result["rows"]))

    result = gpu.run(options, save=save, show=print, device="cpu", timer=gpu.wall_timer)
    assert saves[0] == 0 and saves[-1] == saves[1] > 0, "after the gate, and after the repetition"
    print(f"{gpu_report.LEGEND}\n{gpu_report.bar_table(result)}\n{gpu_report.markdown(path)}")


def test_a_whole_run_in_the_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    path = tmp_path / "gpu.json"
    places = [str(Path(__file__).parent), str(Path(tamis.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(places)}
    done = subprocess.run([sys.executable, __file__, str(path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["failures"] == []
    assert {"gpu", "triton", "torch", "driver", "date"} <= set(result["machine"])
    rows = {gpu_report._name(row): row for row in result["rows"]}
    assert len(rows) == len(result["rows"]) == 14
    refused = rows.pop("sdpa cudnn bf16")
    assert "No viable backend" in refused["failure"] and refused["times_ms"] == []
    assert all(row["failure"] is None and row["ms"]["median"] > 0 for row in rows.values())
    for precision, limit in (("full", 0.004), ("int8", 0.016), ("fp8", 0.05)):
        errors = [row["error"] for row in rows.values() if row["precision"] == precision and row["error"] is not None]
        assert errors and max(errors) <= limit
    assert rows["mask fp8 0.5"]["density"] == rows["flex bf16 0.5"]["density"] < 1
    assert rows["predict fp8 0.5"]["agreement"] == 1
    assert 0 < rows["total int8 0.5"]["prediction_share"] < 1
    for text in ("tiny: batch 1, 2 heads on 1, 200 tokens, d=32, causal", "| total fp8 0.5 |", "of 20 bars"):
        assert text in done.stdout


class Clock:
    """A timer that calls, and says what it is told."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, calls: Any) -> list[gpu.Sample]:
        self.calls += len(calls)
        for call in calls:
            call()
        return [gpu.Sample(2.0, 1.0) for _ in calls]


@pytest.fixture
def on_reference(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The reference backend in the place of Triton's, which need not be installed."""
    monkeypatch.setattr(gpu_calls, "BACKEND", "reference")
    monkeypatch.setattr(gpu, "_WARM_SECONDS", 0.0)
    monkeypatch.setattr(gpu, "_device", torch.device)
    monkeypatch.setattr(gpu, "_machine", lambda _device: {"gpu": None, "torch": "2", "date": "2026-01-01T00:00"})
    monkeypatch.setattr(gpu_calls, "_quantise_value", lambda _inputs: None)
    return Clock()


def run(timer: gpu.Timer, *shapes: gpu_calls.Shape, **options: Any) -> tuple[gpu_report.Result, list[str], list[int]]:
    """A run without FlexAttention, and what it showed and saved: the number of times in all rows."""
    shown: list[str] = []
    saved: list[int] = []
    result = gpu.run(
        gpu.GpuOptions(**{"shapes": shapes, "densities": (0.5,), "repeats": 2, "flex": False, **options}),
        save=lambda result: saved.append(sum(len(row["times_ms"]) for row in result["rows"])),
        show=shown.append,
        device="cpu",
        timer=timer,
    )
    return result, shown, saved


def test_what_is_measured_is_saved_at_once(on_reference: Clock) -> None:
    result, shown, saved = run(on_reference, PLAIN, TINY)
    timed = [row for row in result["rows"] if row["times_ms"]]
    half = len(timed) // 2
    assert saved == [0, half, 2 * half, 2 * half, 2 * half, 3 * half, 4 * half, 4 * half]
    assert on_reference.calls == 3 * len(timed), "once to warm up and two repetitions"
    assert [text.partition(":")[0] for text in shown] == ["plain", "tiny"]
    assert result["failures"] == []


def test_a_precision_that_is_refused_is_a_row(on_reference: Clock) -> None:
    result, (shown,), _ = run(on_reference, PLAIN)
    row = gpu_report.find(result["rows"], "dense", "fp8")
    assert row is not None and row["failure"].startswith("UnsupportedError") and row["ms"] is None
    assert "UnsupportedError" in shown


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 6])
def test_every_call_finds_another_set(number: int) -> None:
    sets: Any = ["a", "b", "c"]
    seen: list[str] = []
    candidate = gpu_calls.Candidate("dense", "full", 1.0, seen.append)
    live: Any = [(candidate, {"times_ms": [], "host_times_ms": []})] * number
    bench = gpu._Bench(
        gpu.GpuOptions(repeats=5), torch.device("cpu"), Clock(), float("inf"), completed(), lambda _result: None
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "_WARM_SECONDS", 0.0)
        bench._time(live, sets)
    assert len(seen) == 6 * number, "one to warm up"
    assert all(a != b for a, b in itertools.pairwise(seen)), "nor that of the call before"
    for place in range(number):
        own = seen[place::number]
        assert all(len(set(own[start : start + 3])) == 3 for start in range(4)), "all are used"


def test_a_wrong_output_is_not_timed_and_the_next_shape_is(
    on_reference: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = gpu_calls.attend

    def wrong(query: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        result = real(query, *arguments, **options)
        broken = 1.2 if query.shape[0] == PLAIN.batch and options["precision"] == "int8" else 1.0
        return result._replace(output=result.output * broken)

    monkeypatch.setattr(gpu_calls, "attend", wrong)
    result, shown, _ = run(on_reference, PLAIN, TINY)
    (failure,) = result["failures"]
    assert failure.startswith("plain: RuntimeError: nothing was timed")
    assert "dense int8, density 1: relative L1 2." in failure and "mask int8, density 0.5" in failure
    assert failure in shown[0]
    for row in result["rows"]:
        assert (row["times_ms"] == []) == (row["shape"] == "plain" or row["failure"] is not None)
        if (row["shape"], row["precision"], row["candidate"]) == ("plain", "int8", "dense"):
            assert row["error"] == pytest.approx(0.2, abs=0.02)


def test_an_output_that_is_not_finite_is_wrong(on_reference: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    real = gpu_calls.attend

    def broken(*arguments: Any, **options: Any) -> Any:
        result = real(*arguments, **options)
        result.output[0, 1, 17, 3] = float("nan")
        return result

    monkeypatch.setattr(gpu_calls, "attend", broken)
    result, _, _ = run(on_reference, PLAIN)
    assert "dense full, density 1: its output is not finite" in result["failures"][0]


@pytest.mark.real_memory
def test_an_output_that_is_not_written_is_wrong(on_reference: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory it gets may hold the right answer of the call before."""
    real = gpu_calls.attend

    def forgetful(*arguments: Any, **options: Any) -> Any:
        result = real(*arguments, **options)
        output = torch.empty_like(result.output)
        assert output.isnan().all(), "so it shows for certain"
        return result._replace(output=output)

    monkeypatch.setattr(gpu_calls, "attend", forgetful)
    result, _, _ = run(on_reference, PLAIN)
    assert "dense full, density 1: its output is not finite" in result["failures"][0]
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_prediction_of_other_blocks_is_wrong(on_reference: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    real = gpu_calls._predict

    def other(*arguments: Any) -> Any:
        mask, prepared = real(*arguments)
        flipped = mask.to_dense().flip(-1)
        return tamis.BlockMask.from_dense(flipped, mask.block_size, mask.seq_lens), prepared

    monkeypatch.setattr(gpu_calls, "_predict", other)
    result, _, _ = run(on_reference, PLAIN)
    assert "of its blocks are the reference's" in result["failures"][0]


def test_a_peer_that_breaks_is_a_row_and_ours_is_a_failure(
    on_reference: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_arguments: Any) -> None:
        raise OSError("out of\nluck")

    monkeypatch.setattr(gpu_calls, "_sdpa", breaks)
    result, _, _ = run(on_reference, PLAIN)
    assert result["failures"] == []
    assert gpu_report.find(result["rows"], "sdpa flash", "bf16")["failure"] == "OSError: out of luck"
    assert gpu_report.find(result["rows"], "dense", "full")["ratio_sdpa"] is None
    monkeypatch.setattr(gpu_calls, "_total", breaks)
    result, _, _ = run(on_reference, PLAIN)
    assert result["failures"][0] == "plain: total int8, density 0.5 cannot run: OSError: out of luck"
    assert gpu_report.find(result["rows"], "dense", "full")["times_ms"] == [2.0, 2.0], "the others are timed"


def test_what_is_not_reached_says_so(on_reference: Clock) -> None:
    result, shown, _ = run(on_reference, PLAIN, seconds=-1.0)
    assert result["rows"] == []
    assert "plain: not reached within the -1 s" in shown[0]


def test_a_call_is_timed_between_its_events(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("event")

        def elapsed_time(self, _other: Event) -> float:
            log.append("read")
            return 3.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda _cycles: log.append("wait"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("synchronize"))
    samples = gpu.device_timer([lambda: log.append("a"), lambda: log.append("b")])
    assert log == [*("wait", "event", "a", "event", "wait", "event", "b", "event"), "synchronize", "read", "read"]
    assert [sample.device for sample in samples] == [3.0, 3.0]
    assert all(0 <= sample.host < 1000 for sample in samples)


def test_the_machine_is_named_with_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    told = ["580.1\n580.1\n", OSError("no such program")]

    def nvidia_smi(command: list[str], **_options: Any) -> Any:
        assert command[0] == "nvidia-smi"
        if isinstance(answer := told.pop(0), OSError):
            raise answer
        return SimpleNamespace(stdout=answer)

    about = SimpleNamespace(name="A GPU", multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: about)
    monkeypatch.setattr(gpu.chips, "name_of", lambda _device: "sm_90")
    monkeypatch.setattr(gpu, "machine", lambda: {"torch": "2"})
    monkeypatch.setattr(gpu.subprocess, "run", nvidia_smi)
    found = gpu._machine(torch.device("cuda"))
    assert (found["gpu"], found["chip"], found["driver"], found["multiprocessors"]) == ("A GPU", "sm_90", "580.1", 132)
    assert gpu._machine(torch.device("cuda"))["driver"] is None


@pytest.mark.parametrize("density", [0.5, 0.25, 0.1])
@pytest.mark.parametrize("causal", [False, True])
def test_random_masks_have_their_density_and_their_diagonal(density: float, causal: bool) -> None:
    shape = gpu_calls.Shape("a", 1, 3, 1, 4000, 8, causal)
    mask = gpu_calls.random_mask(shape, density, torch.Generator().manual_seed(0)).validate()
    assert mask.density(causal) == pytest.approx(density, abs=0.03)
    kept = mask.to_dense()[0]
    assert kept.shape == (3, 32, 63)
    if not causal:
        assert (kept.sum(-1) == round(density * 63)).all()
        return
    for row in range(32):
        own = kept[:, row, 2 * row : 2 * row + 2]
        assert own.all(), "the rows' own places"
        assert not kept[:, row, 2 * row + 2 :].any(), "nothing in the future, which would be counted and not done"


@pytest.mark.parametrize("shape", [TINY, PLAIN])
def test_the_sampled_error_is_that_of_exact_attention(shape: gpu_calls.Shape) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = gpu_calls.normals(shape, generator)
    mask = gpu_calls.random_mask(shape, 0.5, generator)
    kept = mask.to_dense().repeat_interleave(128, 2).repeat_interleave(64, 3)[:, :, :200, :200]
    if shape.causal:
        kept = kept & torch.ones(200, 200, dtype=torch.bool).tril()
    double = [tensor.double() for tensor in inputs]
    exact = scaled_dot_product_attention(*double, attn_mask=kept, enable_gqa=True)
    assert gpu_gate.sampled_error(inputs, exact, mask, causal=shape.causal) < 1e-12
    assert gpu_gate.sampled_error(inputs, exact * 1.01, mask, causal=shape.causal) == pytest.approx(0.01)
    assert gpu_gate.sampled_error(inputs, exact, None, causal=shape.causal) > 0.05
    if shape.causal:
        assert gpu_gate.sampled_error(inputs, exact, mask, causal=False) > 0.05


def made_up(
    candidate: str, precision: str, times: list[float], density: float = 1.0, error: float | None = None
) -> gpu_report.Row:
    timed = gpu_calls.Candidate(candidate, precision, density, lambda _inputs: None)
    row = gpu._row(LONG, timed, gpu_gate.Verdict(density, error))
    return row | {"times_ms": times, "host_times_ms": [0.1] * len(times)}


def completed(*rows: gpu_report.Row, shape: gpu_calls.Shape = LONG) -> gpu_report.Result:
    result = {
        "shapes": [asdict(shape)],
        "rows": list(rows),
        "failures": [],
        "machine": {"gpu": "A GPU", "driver": "1.2", "torch": "2.11", "triton": "3.6", "date": "2026-01-02T03:04"},
        "commit": "0123456789abcdef",
    }
    gpu_report.complete(result)
    return result


def bar(result: gpu_report.Result, start: str) -> gpu_report.Row:
    (found,) = (bar for bar in result["bars"] if bar["what"].startswith(start))
    return found


def test_rates_and_ratios() -> None:
    result = completed(
        made_up("sdpa flash", "bf16", [20.0, 22.0, 24.0]),
        made_up("sdpa cudnn", "bf16", [16.0, 20.0, 18.0]),
        made_up("dense", "fp8", [20.0, 20.0, 20.0]),
        made_up("flex", "bf16", [10.0, 12.0, 12.0], 0.25),
        made_up("mask", "fp8", [5.0, 4.0, 6.0], 0.25),
        made_up("total", "fp8", [8.0, 8.0, 8.0], 0.25),
        made_up("predict", "fp8", [0.5, 0.4, 0.6], 0.25),
        made_up("quantise value", "fp8", [0.1, 0.1, 0.1]),
    )
    flash, cudnn, dense, _, mask, total, predict, quantise = result["rows"]
    # 4 * 32 heads * 32768^2 / 2 * 128 operations in 18 ms
    assert cudnn["dense_tops"] == pytest.approx(4 * 32 * 32768**2 / 2 * 128 / 18e-3 / 1e12)
    assert cudnn["dense_tops"] == pytest.approx(488.7, abs=0.1)
    assert flash["ratio_sdpa"] == {"median": 0.8, "min": 0.75, "max": pytest.approx(20 / 22)}
    assert dense["ratio_sdpa"] == {"median": 0.9, "min": 0.8, "max": 1.0}
    assert dense["ratio_dense"] is None
    assert mask["executed_tops"] == pytest.approx(mask["dense_tops"] / 4)
    assert mask["ratio_dense"] == {"median": 4.0, "min": pytest.approx(20 / 6), "max": 5.0}
    assert mask["ratio_flex"] == {"median": 2.0, "min": 2.0, "max": 3.0}
    assert total["ratio_flex"] is None, "its mask is another"
    assert total["prediction_share"] == pytest.approx(0.5 / 8)
    assert predict["overhead_share"] == pytest.approx(0.6 / 18), "of the fastest dense call, which is torch's here"
    assert predict["dense_tops"] is quantise["dense_tops"] is None


def test_bytes_stand_beside_times() -> None:
    """Of a prediction: query once, key twice, both in 8 bits, and the lists are the least. Other rows have none."""
    rows = (
        made_up("predict", "int8", [2.0], 0.25),
        made_up("dense", "int8", [2.0]),
        made_up("predict", "fp8", [], 0.5),
    )
    predict, dense, idle = completed(*rows)["rows"]
    assert predict["moved_gb_s"] == pytest.approx(predict["moved_bytes"] / 2e6)
    query, key, blocks = 32 * 32768 * 128, 8 * 32768 * 128, 256 * 257  # visible pairs of a head
    lists = 4 * (32 * 256 + round(0.25 * 32 * blocks))
    assert predict["least_bytes"] == 3 * query + 5 * key + 8 * 32 * 32768 + 4 * 8 * 512 + lists
    assert predict["least_bytes"] < predict["moved_bytes"] < 1.4 * predict["least_bytes"]
    assert idle["moved_gb_s"] is dense["moved_bytes"] is dense["moved_gb_s"] is None
    table = gpu_report.table(completed(*rows), "long")
    assert f"{predict['moved_bytes'] / 1e9:.3f}" in table and f"{predict['moved_gb_s']:.0f}" in table


def test_the_page_has_the_bytes() -> None:
    page = (Path(__file__).parents[1] / "docs" / "performance-gpu.md").read_text(encoding="utf-8")
    assert gpu_calls.traffic_markdown() in page


def test_bars_hold_fail_or_are_not_measured() -> None:
    result = completed(
        made_up("sdpa flash", "bf16", [20.0]),
        made_up("dense", "full", [20.0 / 0.6]),
        made_up("dense", "fp8", [25.0], error=0.051),
        made_up("mask", "fp8", [10.0], 0.5, error=0.03),
        made_up("mask", "fp8", [6.25], 0.25, error=0.03),
        made_up("total", "fp8", [], 0.25),
        made_up("predict", "fp8", [0.5], 0.25),
        made_up("predict", "int8", [0.8], 0.25, error=None),
    )
    verdicts = {bar["what"]: bar["verdict"] for bar in result["bars"]}
    assert len(verdicts) == len(gpu_report.RULES)
    assert bar(result, "dense full")["verdict"] == "holds"
    dense = bar(result, "dense fp8")
    assert (dense["verdict"], dense["value"], dense["where"]) == ("FAILS", 0.8, "long, dense fp8")
    assert bar(result, "given mask fp8, density 0.5")["verdict"] == "holds"
    assert bar(result, "given mask fp8, density 0.25")["verdict"] == "holds"
    assert bar(result, "given mask fp8, density 0.1")["verdict"] == "not measured"
    total = bar(result, "total fp8")
    assert (total["verdict"], total["measured"], total["expected"]) == ("not measured", 0, 1)
    rounding = bar(result, "prediction + quantisation, 32k")
    assert (rounding["verdict"], rounding["value"], rounding["measured"]) == ("holds", 0.04, 1), "fp8's is not whole"
    assert bar(result, "prediction + quantisation, 128k")["verdict"] == "not measured"
    assert bar(result, "given mask fp8, x Flex")["verdict"] == "not measured"
    error = bar(result, "relative L1, fp8")
    assert (error["verdict"], error["value"], error["where"]) == ("FAILS", 0.051, "long, dense fp8")
    assert bar(result, "relative L1, int8")["verdict"] == "not measured"
    printed = gpu_report.bar_table(result)
    assert "1 of 2 measured" in printed
    assert printed.endswith("of 20 bars: 4 holds, 2 FAILS, 14 not measured")


def test_bars_are_about_their_shapes() -> None:
    short = gpu_calls.Shape("long", 1, 24, 24, 4608, 64)
    result = completed(
        made_up("sdpa flash", "bf16", [1.0]),
        made_up("dense", "full", [9.0]),
        made_up("total", "fp8", [9.0], 0.25),
        shape=short,
    )
    for start in ("dense full", "total fp8"):
        assert (bar(result, start)["verdict"], bar(result, start)["expected"]) == ("not measured", 0)


def test_the_table_shows_every_row() -> None:
    rows = [made_up("sdpa flash", "bf16", [20.0]), made_up("mask", "int8", [5.0], 0.25, error=0.0123)]
    broken = made_up("flex", "bf16", [], 0.25) | {"failure": "OSError: no"}
    result = completed(*rows, broken)
    result["failures"] = ["long: something", "other: something else"]
    lines = gpu_report.table(result, "long").splitlines()
    assert lines[0] == "long: batch 1, 32 heads on 8, 32,768 tokens, d=128, causal; 8.8 TFLOP dense, 1 repetitions"
    words = [" ".join(line.split()) for line in lines[3:5]]
    assert words == [
        "mask int8 0.25 0.250 5.000 5.000-5.000 0.100 1759 440 4.00 - - - 0.0123 - - -",
        "flex bf16 0.25 OSError: no",
    ]
    assert lines[5:] == ["long: something"]


def test_markdown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gpu.json"
    wrong = made_up("dense", "int8", [], error=0.3) | {"failure": "relative L1"}
    cannot = made_up("flex", "bf16", [], 0.25) | {"failure": "OSError"}
    idle = made_up("total", "fp8", [], 0.25)
    rows = (made_up("sdpa flash", "bf16", [20.0]), made_up("dense", "fp8", [10.0], error=0.0321), wrong, cannot, idle)
    record.write(path, completed(*rows))
    assert cli.main(["bench", "gpu", "--markdown", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("A GPU, driver 1.2, torch 2.11, Triton 3.6, commit 0123456789ab, 2026-01-02.")
    assert lines[2:9] == [
        "| | long: batch 1, 32 heads on 8, 32,768 tokens, d=128, causal |",
        "|---|---|",
        "| sdpa flash bf16 | 20.00 (440; 1.00x) |",
        "| dense fp8 | 10.00 (880; 2.00x; L1 0.0321) |",
        "| dense int8 | wrong |",
        "| flex bf16 0.25 | cannot run |",
        "| total fp8 0.25 | not measured |",
    ]
    assert "| dense fp8, d=128, x fastest SDPA | >= 0.85 | holds | 2 at worst (long, dense fp8) |" in lines
    assert "| dense full, d=128, x fastest SDPA | >= 0.6 | not measured |  |" in lines


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is not there: `tamis bench gpu --json "),
        ('{"rows": []}', "is no result of `tamis bench gpu`: it has no 'shapes'"),
        ("[1]", "is no result of `tamis bench gpu`"),
        ("rows", "is no result of `tamis bench gpu`: it is no JSON"),
    ],
)
def test_markdown_of_something_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, message: str
) -> None:
    path = tmp_path / "gpu.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    assert cli.main(["bench", "gpu", "--markdown", str(path)]) == 1
    printed = capsys.readouterr()
    assert f"tamis: {path} {message}" in printed.err
    assert "Error" not in printed.err and printed.out == ""


def test_the_command_says_what_it_lacks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench", "gpu"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "needs a GPU that torch can use" in line and "torch's CUDA or ROCm build" in line
    assert cli.main(["bench", "gpu", "--shape", "flux", "square"]) == 2
    assert (
        "--shape must be among cogvideox, mochi, llama-32k, flux, llama-128k, got 'square'" in capsys.readouterr().err
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu.chips, "missing", lambda _kind, _index: "Triton is not installed")
    assert cli.main(["bench", "gpu"]) == 1
    assert "cannot use Triton: Triton is not installed" in capsys.readouterr().err


def test_the_command_writes_prints_and_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[gpu.GpuOptions] = []
    made = completed(made_up("sdpa flash", "bf16", [20.0]))

    def run(options: gpu.GpuOptions, *, save: Any, show: Any) -> gpu_report.Result:
        asked.append(options)
        save(made)
        show("a table")
        return made

    monkeypatch.setattr(gpu, "run", run)
    path = tmp_path / "gpu.json"
    assert cli.main(["bench", "gpu", "--quick", "--commit", "abc", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "a table" in printed and "of 20 bars" in printed and f"written: {path}" in printed
    assert json.loads(path.read_text(encoding="utf-8"))["rows"][0]["candidate"] == "sdpa flash"
    made["failures"] = ["long: wrong"]
    assert cli.main(["bench", "gpu", "--shape", "mochi", "--no-flex", "--repeats", "7", "--json", str(path)]) == 1
    assert "1 failures: long: wrong" in capsys.readouterr().err
    quick, chosen = asked
    assert [shape.name for shape in quick.shapes] == ["llama-32k", "flux"]
    assert (quick.repeats, quick.flex, quick.commit) == (5, False, "abc")
    assert [shape.name for shape in chosen.shapes] == ["mochi"]
    assert (chosen.repeats, chosen.flex, chosen.seconds) == (7, False, gpu.GpuOptions().seconds)


def test_it_needs_no_more_than_torch_and_triton() -> None:
    """The GPU machine has neither the native library nor the packages of the demo."""
    program = (
        "import sys; from tamis import cli; from tamis.bench import gpu; from tamis.demo.machine import machine; "
        "machine(); print({'transformers', 'gguf', 'onnx', 'accelerate', 'skimage'} & set(sys.modules))"
    )
    places = [str(Path(tamis.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "TAMIS_CPU_LIBRARY": "/nowhere", "PYTHONPATH": os.pathsep.join(places)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


if __name__ == "__main__":
    main(Path(sys.argv[1]))
