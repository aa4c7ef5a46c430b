"""Attention over ranks: 2, 3 and 4 gloo processes against one process.

In full precision and fp32 the results may differ by the order of fp32 sums only: 1e-6, absolute and relative.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import rank_jobs
import torch
from rank_jobs import Job
from ranks import RankError, Ranks

import tamis
from tamis import cli
from tamis.bench import scale
from tamis.parallel import Layout, Workload, plan
from tamis.parallel.heads import calls_of, share_of
from tamis.parallel.planning import balance, traffic_of
from tamis.profile.layers import LayerSettings

SPARGE = tamis.Sparge(cdf=0.9, similarity=0.2)
TEXT, VIDEO = (11, 40, 0, 26), (300, 210, 257, 130)  # of every rank


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    group = Ranks(4, preload=["diffusers.models.transformers.transformer_wan"])
    yield group
    group.close()


def wan(size: int) -> Job:
    """Self-attention of video tokens, all heads with their own keys."""
    return Job(6, 6, 32, VIDEO[:size])


def flux(size: int) -> Job:
    """Text and image in one sequence, each rank with its share of both; text is always kept."""
    text = sum(TEXT[:size])
    keep = {"keys": [(0, text)], "queries": [(0, text)]}
    predictor = tamis.Sparge(topk=0.3, similarity=-1, keep=keep)
    return Job(4, 4, 32, list(zip(TEXT[:size], VIDEO[:size], strict=True)), predictor=predictor)


def llama(size: int) -> Job:
    """Causal, and query heads share keys: fewer key heads than four ranks."""
    return Job(8, 2, 32, VIDEO[:size], batch=2, options={"causal": True})


def check(ranks: Ranks, size: int, job: Job, *, atol: float = 1e-6) -> tuple[float, dict[str, int]]:
    """Compare with one process; returns the density and what rank 0 sent."""
    found = ranks.run(size, rank_jobs.spread, job)
    expected = rank_jobs.alone(job)
    layout = job.layouts()[0]
    output = layout.put([torch.from_numpy(output) for output, _, _ in found])
    torch.testing.assert_close(output, expected.output.float(), rtol=1e-6, atol=atol)
    if found[0][1] is not None:
        lse = layout.put([torch.from_numpy(lse) for _, lse, _ in found], -1)
        torch.testing.assert_close(lse, expected.lse, rtol=1e-6, atol=max(atol, 2e-6))  # of numbers near 10
    if found[0][2] is None:
        return 0.0, {}
    assert expected.stats is not None
    densities = [density for _, _, (density, _) in found]
    assert densities == pytest.approx([expected.stats.density] * size, abs=1e-9)
    return densities[0], found[0][2][1]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("mode", ["heads", "ring"])
@pytest.mark.parametrize("make", [wan, flux, llama])
def test_equals_one_process(ranks: Ranks, make: object, mode: str, size: int) -> None:
    """Dense, by a given mask, and by two kinds of predicted ones."""
    assert callable(make)
    job = replace(make(size), mode=mode)
    predictor = job.predictor or SPARGE
    check(ranks, size, replace(job, predictor=None))
    density, _ = check(ranks, size, replace(job, predictor=None, kind="mask"))
    assert density < 0.7
    density, _ = check(ranks, size, replace(job, predictor=predictor))
    assert density < 0.98
    check(ranks, size, replace(job, predictor=tamis.Window(100, keep={"queries": [(0, 130)]})))


@pytest.mark.parametrize("mode", ["heads", "ring"])
def test_whatever_the_numbers(ranks: Ranks, mode: str) -> None:
    """Head counts that no number of ranks divides, ranks without tokens or heads, lengths and sizes that differ."""
    causal = {"causal": True}
    check(ranks, 3, Job(5, 5, 40, (0, 333, 90), mode=mode, value_dim=24))
    check(ranks, 2, Job(6, 3, 32, (150, 77), mode=mode, predictor=SPARGE))
    check(ranks, 4, Job(2, 1, 32, (700, 0, 0, 5), mode=mode, predictor=SPARGE, options=causal))
    check(
        ranks, 3, Job(6, 2, 32, (100, 30, 70), key_shares=(400, 500, 101), mode=mode, predictor=SPARGE, options=causal)
    )
    check(ranks, 2, Job(2, 2, 32, (40, 3), mode=mode, batch=2, kind="mask"))
    # Two partial results, each rounded to bf16, whose steps are 1/128 of what is at most 4.
    atol = 1e-6 if mode == "heads" else 2 * 4 / 256
    check(ranks, 3, Job(3, 1, 32, (130, 260, 10), mode=mode, dtype=torch.bfloat16), atol=atol)


@pytest.mark.parametrize("mode", ["heads", "ring"])
def test_arguments(ranks: Ranks, mode: str) -> None:
    """Windows, padding, softcap, sink logits, a scale, what stands in for skipped blocks."""
    job = Job(4, 2, 32, VIDEO, mode=mode)
    check(ranks, 4, replace(job, predictor=SPARGE, padding=150, options={"causal": True, "scale": 0.3}))
    check(ranks, 4, replace(job, padding=150, options={"window": 120}))
    sinks = {"softcap": 20.0, "sink_logits": torch.tensor([0.0, 3.0, -2.0, 1.0])}
    check(ranks, 4, replace(job, kind="mask", options=sinks | {"causal": True}))
    check(ranks, 4, replace(job, kind="mask", options={"compensate": "centroid"}))


def test_settings_of_every_head_go_with_it(ranks: Ranks) -> None:
    """Five heads on four ranks: tuples in the predictor, a threshold for every head, as a profile holds them."""
    shares = (0.2, 0.9, 0.4, 0.3, 0.6)
    settings = LayerSettings(
        tamis.Sparge(topk=shares, similarity=(-1.0, 0.3, -1.0, 0.5, 0.2)), (2.0, float("inf"), 1.0, 4.0, 3.0), "full"
    )
    check(ranks, 4, Job(5, 5, 32, VIDEO, settings=settings))
    check(ranks, 3, Job(4, 2, 32, VIDEO[:3], predictor=tamis.Antidiagonal(cdf=(0.4, 0.9, 0.6, 0.5))))
    check(ranks, 2, Job(4, 2, 32, VIDEO[:2], settings=LayerSettings(None, None, "full")))


def test_eight_bits_do_not_depend_on_the_ranks(ranks: Ranks) -> None:
    """All query heads of a group decide what is rounded how, also if they are on several ranks."""
    job = Job(6, 2, 32, VIDEO[:3], predictor=tamis.Sparge(topk=0.3, similarity=-1))
    options = {"causal": True, "precision": "int8", "pv_threshold": (5.0, 6.0, 5.0, 4.0, 3.0, 5.0)}
    check(ranks, 3, replace(job, options=options))
    check(ranks, 3, replace(job, predictor=None, kind="mask", options={"precision": "int8"}))
    job = replace(job, mode="ring", shares=(512, 256), options={"precision": "int8"})
    two = ranks.run(2, rank_jobs.spread, job)
    one = ranks.run(1, rank_jobs.spread, replace(job, shares=(768,)))[0]
    both = torch.cat([torch.from_numpy(output) for output, _, _ in two], 2)
    # P has 8 bits, against the maximum of its own keys: half a step of 1/254 of the values, and mostly nothing.
    difference = (both - torch.from_numpy(one[0])).abs()
    assert difference.max() < 4 / 508 and difference.mean() < 1e-5
    exact = rank_jobs.alone(replace(job, options={})).output
    assert (both - exact).abs().sum() / exact.abs().sum() < 0.03


def test_a_known_layout_costs_no_exchange(ranks: Ranks) -> None:
    """And tokens that already lie in a zig-zag stay where they are."""
    job = Job(4, 4, 32, VIDEO[:2], mode="ring", options={"causal": True}, given_layout=True)
    _, sent = check(ranks, 2, job)
    assert "lengths" not in sent and sent["order"] > 0
    assert Layout.zigzag(700, 2).ranks == (((0, 128), (512, 188)), ((128, 384),))
    _, sent = check(ranks, 2, replace(job, shares=[300, 400], zigzag=True))
    assert "order" not in sent and sent["ring"] > 0
    for shares, moves in (((128, 384, 60), False), ((128, 60, 384), True)):
        _, sent = check(ranks, 3, Job(2, 2, 32, shares, mode="ring", predictor=SPARGE))
        assert ("order" in sent) == moves


@pytest.mark.parametrize(("length", "mode"), [(512, "heads"), (603, "heads"), (603, "ring")])
def test_dtensors(ranks: Ranks, length: int, mode: str) -> None:
    """Even and uneven shards; the result is a DTensor of the whole shape."""
    expected = rank_jobs.alone(Job(4, 2, 32, [length], options={"causal": True})).output
    for output, shape, local in ranks.run(4, rank_jobs.sharded, length, mode):
        assert shape == (1, 4, length, 32) and local[2] in (length // 4, -(-length // 4), length - 3 * -(-length // 4))
        torch.testing.assert_close(torch.from_numpy(output), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", ["heads", "ring"])
def test_dtensors_cut_by_hand(ranks: Ranks, mode: str) -> None:
    """The first rank has what torch would give it, the others have not."""
    lengths = (150, 100, 200)
    expected = rank_jobs.alone(Job(4, 2, 32, lengths, options={"causal": True})).output
    found = torch.cat([torch.from_numpy(own) for own in ranks.run(3, rank_jobs.cut_by_hand, lengths, mode)], 2)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", ["heads", "ring"])
def test_nothing_to_do(ranks: Ranks, mode: str) -> None:
    for precision in ("full", "int8"):
        for size in (1, 2):
            for shapes in ranks.run(size, rank_jobs.empty, mode, precision):
                assert shapes == [(0, 4, 100, 32)] * 2 + [(1, 4, 0, 32)] * 2


def test_inside_local_map(ranks: Ranks) -> None:
    expected = rank_jobs.alone(Job(4, 2, 32, [512])).output
    for output in ranks.run(2, rank_jobs.mapped, 512):
        torch.testing.assert_close(torch.from_numpy(output), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", ["heads", "ring"])
@pytest.mark.parametrize("precision", ["full", "int8"])
def test_planned_traffic_is_what_is_sent(ranks: Ranks, mode: str, precision: str) -> None:
    """To the byte as counted, and within 2% of what the system says was written, which has headers."""
    work = Workload(1500, 8, 64, kv_heads=2, item=4, causal=mode == "ring", precision=precision)
    job = Job(8, 2, 64, Layout.even(1500, 4).lengths, mode=mode, predictor=tamis.Sparge(topk=0.3))
    job = replace(job, options={"causal": work.causal, "precision": precision})
    for rank, (written, counted) in enumerate(ranks.run(4, rank_jobs.written, job)):
        assert counted == traffic_of(work, 4, mode, rank)
        assert written == pytest.approx(sum(counted.values()), rel=0.02)


def test_refusals(ranks: Ranks) -> None:
    job = Job(4, 4, 32, (200, 200), mode="ring")
    for wrong, says in (
        (replace(job, options={"pv_threshold": 3.0}), "depends on the number of ranks"),
        (replace(job, options={"precision": "fp8"}), "fp8"),
        (replace(job, predictor=tamis.Antidiagonal()), "mode='heads'"),
        (replace(job, mode="heads", predictor=tamis.Random(0.5)), "Random draws"),
        (replace(job, shares=(200,), options={"pv_threshold": 3.0}), "depends on the number of ranks"),
        (replace(job, mode="tree"), "mode must be one of heads, ring"),
        (replace(job, mode="heads", predictor=tamis.Sparge(topk=(0.5, 0.5))), "one per query head"),
    ):
        with pytest.raises(RankError, match=says):
            ranks.run(len(wrong.shares), rank_jobs.spread, wrong)
    for text in ranks.run(2, rank_jobs.disagree):
        assert (
            "ranks disagree" in text and "alike on all of them; heads: 3 on rank 1, 2 on rank 0; key heads: 3" in text
        )
        assert "batch" not in text and "head_dim" not in text
    for name, says in (("mesh", "mesh must be a DeviceMesh or None, got str"), ("group", "group must be a torch")):
        for text in ranks.run(2, rank_jobs.misnamed, name):
            assert says in text
    with pytest.raises(ValueError, match="init_process_group"):
        tamis.parallel.attend(*(torch.zeros(1, 1, 8, 8) for _ in range(3)))


WAYS = [("wan", "ulysses_degree"), ("flux", "ulysses_degree"), ("wan", "ring_degree")]


@pytest.mark.parametrize(("name", "degree"), WAYS)
def test_diffusers_context_parallelism(ranks: Ranks, name: str, degree: str) -> None:
    """Registered there, tamis gets shards of tokens; joint text and image arrive interleaved, and blocks know it."""
    pytest.importorskip("diffusers")
    for apart, from_dense, calls in ranks.run(4, rank_jobs.diffusion, name, {degree: 4}):
        assert calls == 2  # one for each layer
        assert apart < 1e-5 < 1e-3 < from_dense  # sums in another order, through two layers; and it did run sparse


@pytest.mark.parametrize(
    ("name", "size", "mode", "own"),
    [
        ("wan", 2, "heads", False),
        ("wan", 3, "ring", False),
        ("wan", 4, "heads", True),
        ("wan", 4, "ring", True),
        ("flux", 3, "heads", False),
        ("flux", 4, "ring", False),
        ("flux", 4, "heads", True),
        ("ltx", 2, "heads", False),
    ],
)
def test_apply_cuts_a_diffusers_model(ranks: Ranks, name: str, size: int, mode: str, own: bool) -> None:
    """Or takes it as `enable_parallelism` has cut it; cross-attention and joint attention see all text."""
    pytest.importorskip("diffusers")
    cross = 0 if name == "flux" else 2
    for apart, from_dense, calls, left in ranks.run(size, rank_jobs.cut, name, mode, own):
        assert apart < 1e-5 < 1e-3 < from_dense  # sums in another order, through two layers; and it did run sparse
        assert calls == {"sparse": 2, "dense": cross}
        assert left < 1e-5


def test_wrong_and_different_arguments_are_refused_by_all_ranks(ranks: Ranks) -> None:
    """And the group's next call is right: nothing that was posted is left behind."""
    patterns = [
        "softcap must be",
        "scale must be",
        *["ranks disagree"] * 5,
        r"block_mask is for lengths \(64, 64\), the whole query and key have \(128, 128\)",
        r"sink_logits must be a tensor of one number per query head \(4\)",
        r"segments\[0\] must be integers, got torch.float32",
    ]
    for said in ranks.run(2, rank_jobs.refused):
        assert len(said) == len(patterns)
        for text, pattern in zip(said, patterns, strict=True):
            assert re.search(pattern, text), text


@pytest.mark.parametrize(("size", "mode", "profiled"), [(2, "heads", False), (4, "ring", False), (4, "heads", True)])
def test_apply_with_a_mesh(ranks: Ranks, size: int, mode: str, profiled: bool) -> None:
    pytest.importorskip("transformers")
    for apart, from_dense, calls in ranks.run(size, rank_jobs.applied, mode, profiled):
        assert apart < 1e-5 < 1e-2 < from_dense  # logits of two layers, sums in another order; and it was sparse
        assert calls == ({"sparse": 1, "dense": 1} if profiled else {"sparse": 2, "dense": 0})


def test_apply_in_a_ring_has_no_threshold(ranks: Ranks) -> None:
    pytest.importorskip("transformers")
    patterns = ["runs", "runs", "leave it out", "a pv_threshold in model.layers.0", "runs", "not be given", "runs"]
    for text, pattern in zip(ranks.run(1, rank_jobs.ring_thresholds)[0], patterns, strict=True):
        assert re.search(pattern, text), text


@pytest.mark.parametrize(
    ("ends", "cuts"),
    [
        ((100, 230, 300), (100, 300)),  # a document ends where a rank ends: no rank has two of them but the last
        ((150, 300), (150, 300)),  # no rank has two
        ((40, 180, 300), (110, 300)),  # one goes on over the boundary
        ((150, 300), (70, 150, 220, 300)),
        ((90, 300), (70, 150, 220, 300)),  # ranks 2 and 3 see none of the boundaries
    ],
)
def test_packed_documents(ranks: Ranks, ends: Sequence[int], cuts: Sequence[int]) -> None:
    """A rank cannot see that a document ended on another one, or where its own began."""
    pytest.importorskip("transformers")
    for apart, from_mixed, from_exact in ranks.run(len(cuts), rank_jobs.packed, ends, cuts):
        assert max(apart, from_exact) < 1e-5 < 1e-2 < from_mixed  # logits of two layers, sums in another order


def test_what_shards_do_not_show(ranks: Ranks) -> None:
    """Padding of other ranks, a window longer than a shard; and what cannot be right is an error everywhere."""
    pytest.importorskip("transformers")
    answers = ranks.run(2, rank_jobs.strange)
    patterns = [*["position_ids must be given on every rank"] * 2, *["ranks disagree: all must call"] * 3]
    patterns += ["rank 0 ends at 149 and rank 1 begins at 0"] * 2 + ["all were given the same tokens"]
    for own, (apart, said) in zip(("rank 1 cannot take part in this call", "gradients"), answers, strict=True):
        assert own in said.pop()
        assert apart < 1e-5  # logits of two layers, sums in another order
        assert len(said) == len(patterns)
        for text, pattern in zip(said, patterns, strict=True):
            assert re.search(pattern, text), text


def test_what_one_rank_cannot_do_no_rank_waits_for(ranks: Ranks) -> None:
    start = time.monotonic()
    others, own = ranks.run(2, rank_jobs.declined)
    assert time.monotonic() - start < 30  # half of the group's timeout
    assert others == ["rank 1 cannot take part in this call: its own error says why"] * 5
    for text, pattern in zip(own, ("grad", "head_dim", "mode must be", "must add up", "segments"), strict=True):
        assert pattern in text, own


@pytest.mark.parametrize("way", ["call", "model"])
def test_ranks_out_of_step_never_mix_two_calls(ranks: Ranks, way: str) -> None:
    """One fails alone in the middle and goes on with the next request: all of them raise, and go on raising."""
    pytest.importorskip("transformers")
    (first, *others), own = ranks.run(2, rank_jobs.one_goes_on, way)
    assert own[0] == "broken" and first == ("done" if way == "call" else others[0])
    for text in (*others, *own[1:]):
        assert text.startswith("the ranks are out of step: rank 0 is at a call of attention, turn ")
        assert f"rank 1 is at a {'call of attention' if way == 'call' else 'run of a model'}, turn" in text


def test_what_the_page_shows_runs(ranks: Ranks) -> None:
    text = (Path(__file__).parent.parent / "docs" / "scale-out.md").read_text(encoding="utf-8")
    _, calls, model = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert ranks.run(4, rank_jobs.read_along, calls) == [(1, 8, 500 + rank, 64) for rank in range(4)]
    ranks.run(1, rank_jobs.read_along, model)


def test_bench_scale(ranks: Ranks, capsys: pytest.CaptureFixture[str]) -> None:
    """Measured rows hold what was planned; the model is marked as one, and no rank is better than perfect."""
    options = scale.ScaleOptions(tokens=600, heads=4, kv_heads=2, head_dim=32, repeats=1, causal=True, ranks=(4,))
    rows = scale.rows_of(ranks.run(4, rank_jobs.bench, options), options)
    assert [row["bytes_sent"] == row["bytes_planned"] and row["bandwidth"] > 0 for row in rows] == [True, True]
    alone = {"mode": "ring", "ranks": 1, "seconds": {"median": 1.0}, "bandwidth": None}
    scale.beside([alone, *rows], options)
    assert rows[0]["seconds_modelled"] is None and rows[1]["seconds_modelled"] > 1.0
    model = scale.clusters(scale.CLUSTER_WORK, ranks=(8, 1024))
    assert model["kind"] == "model, nothing measured" and all(0 < row["efficiency"] <= 1 for row in model["rows"])
    assert "MODEL, nothing measured" in scale.table({"rows": rows, "model": model})
    assert cli.main(["bench", "scale", "--plan", "--tokens", "1000000", "--ranks", "8", "--kv-heads", "7"]) == 2
    assert cli.main(["bench", "scale", "--plan", "--tokens", "1e6", "100000000", "--ranks", "8", "64"]) == 0
    printed = capsys.readouterr()
    assert "heads must be a multiple of kv_heads, got 40 and 7" in printed.err
    assert [line.split()[:3] for line in printed.out.splitlines()[2:-2]] == [
        [tokens, ranks, mode]
        for tokens in ("1,000,000", "100,000,000")
        for ranks in ("8", "64")
        for mode in ("heads", "ring")
    ]
    idle = [" 64 heads" in line for line in printed.out.splitlines()]
    assert ["only 40 ranks work" in line for line in printed.out.splitlines()] == idle
    assert cli.main(["bench", "scale", "--heads", "4", "--kv-heads", "3"]) == 2
    assert "heads must be a multiple of kv_heads, got 4 and 3" in capsys.readouterr().err


def test_the_page_has_what_was_measured() -> None:
    root = Path(__file__).parents[1]
    saved = json.loads((root / "benchmarks" / "results" / "scale-xeon-amx.json").read_text(encoding="utf-8"))
    measured = scale.table(saved).split("\n\nMODEL")[0]
    page = (root / "docs" / "scale-out.md").read_text(encoding="utf-8")
    assert "".join(f"    {line}\n" for line in measured.splitlines()) in page


def test_bench_scale_at_every_length(ranks: Ranks, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One process here, in the place of those that it would start; and on one rank pairs in turn, with quartiles."""

    def measured(options: scale.ScaleOptions, size: int) -> list[dict[str, object]]:
        return scale.rows_of(ranks.run(size, rank_jobs.bench_alone, replace(options, pairs=5)), options)

    monkeypatch.setattr(scale, "_measured", measured)
    out = tmp_path / "scale.json"
    arguments = ["--tokens", "256", "300", "--ranks", "1", "--heads", "2", "--head-dim", "16", "--json", str(out)]
    assert cli.main(["bench", "scale", *arguments]) == 0
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert [(row["tokens"], row["mode"]) for row in rows] == [(n, m) for n in (256, 300) for m in ("heads", "ring")]
    for row in rows:
        overhead = row["overhead"]
        assert overhead["pairs"] == 5 and 0 < overhead["low"] <= overhead["median"] <= overhead["high"]
        assert row["seconds_modelled"] == row["seconds"]["median"]
    calls: list[str] = []
    scale.paired(lambda: calls.append("one"), lambda: calls.append("other"), 3)
    assert calls == ["one", "other", "other", "one", "one", "other"]
    with pytest.raises(ValueError, match="lengths must be different"):
        scale.run(scale.ScaleOptions(), [300, 300])


@pytest.mark.parametrize("way", ["killed", "stopped"])
def test_a_lost_rank_is_an_error_in_time(way: str) -> None:
    """Killed in the middle of calls, or alive and silent: every other rank fails within the timeout and 5 seconds."""
    timeout = 3.0
    group = Ranks(3, timeout)
    try:
        group.run(3, rank_jobs.sleep, 0.0)
        group.start(3, rank_jobs.until_it_fails, "ring" if way == "killed" else "heads")
        time.sleep(0.5)
        process = group.processes[1]
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL if way == "killed" else signal.SIGSTOP)
        for rank in (0, 2):
            seconds, text = group.result(rank, timeout + 15)
            assert seconds <= timeout + 5
            assert f"rank {rank} of 3: the exchange of" in text and "has died" in text
    finally:
        group.close()


def test_layouts() -> None:
    layout = Layout.parts([(2, 3), (0, 4), (1, 0)])
    whole = torch.arange(10)[:, None]
    shards = [layout.take(whole, rank) for rank in range(3)]
    assert [shard[:, 0].tolist() for shard in shards] == [[0, 1, 3, 4, 5], [6, 7, 8, 9], [2]]
    assert layout.put(shards).equal(whole)
    assert [layout.positions(rank, whole.device).tolist() for rank in range(3)] == [s[:, 0].tolist() for s in shards]
    assert Layout.even(10, 4).lengths == tuple(len(part) for part in torch.arange(10).chunk(4))
    assert Layout.even(5, 4).lengths == (2, 2, 1, 0)
    for wrong in ([[(0, 2)], [(3, 1)]], [[(0, 2)], [(1, 2)]]):
        with pytest.raises(ValueError, match="cover the sequence once"):
            Layout(tuple(tuple(runs) for runs in wrong))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"), [(8, 2, 4), (6, 2, 4), (7, 7, 3), (6, 3, 2), (24, 8, 5), (2, 1, 4)]
)
def test_shares_cover_all_heads_once(heads: int, kv_heads: int, size: int) -> None:
    group, seen = heads // kv_heads, []
    for rank in range(size):
        for call in calls_of(share_of(rank, size, heads, kv_heads), group):
            number, keys = call.query.stop - call.query.start, call.key.stop - call.key.start
            assert number % keys == 0
            of = [call.key.start + i // (number // keys) for i in range(number)]
            assert of == [head // group for head in range(call.query.start, call.query.stop)]
            seen += range(call.query.start, call.query.stop)
    assert seen == list(range(heads))


def test_plans() -> None:
    work = Workload(1_000_000, 32, kv_heads=8, density=0.1, causal=True)
    assert balance(work, 8, "ring") < 1.01 and balance(work, 64, "heads") == 2.0
    for mode in ("heads", "ring"):
        plans = [plan(work, size, mode) for size in (1, 8, 64, 1024)]
        assert plans[0].sent == 0
        assert [made.held for made in plans] == sorted((made.held for made in plans), reverse=True)
    far = plan(replace(work, tokens=100_000_000), 1024, "ring")
    assert far.memory["ring"] < far.memory["blocks"]  # lists of blocks are what ends first
    with pytest.raises(ValueError, match="mode"):
        plan(work, 8, "tree")
    sizes = ("tokens", "heads", "head_dim", "kv_heads", "value_dim", "batch", "item")
    wrong: list[tuple[dict[str, object], str]] = [
        ({name: n}, f"{name} must be at least 1") for name in sizes for n in (0, -2)
    ]
    wrong += [({name: 1.5}, f"{name} must be an integer") for name in sizes]
    wrong += [({"kv_heads": 7}, "multiple of kv_heads"), ({"precision": "int4"}, "precision must be one of")]
    wrong += [({"density": share}, r"density must be in \(0, 1\]") for share in (0.0, -0.1, 1.1, float("nan"))]
    for settings, says in wrong:
        with pytest.raises((ValueError, TypeError), match=says):
            replace(work, **settings)  # type: ignore[arg-type]
    for ranks in (0, -1, 2.0):
        with pytest.raises((ValueError, TypeError), match="ranks must be a"):
            plan(work, ranks)  # type: ignore[arg-type]
    for name, number in (("rate", 0.0), ("near", -1.0), ("far", float("nan")), ("node", 0), ("wait", -1e-6)):
        with pytest.raises(ValueError, match=f"{name} must be"):
            replace(scale.STATED, **{name: number})
    with pytest.raises(ValueError, match="fp8"):
        plan(replace(work, precision="fp8"), 8, "ring")
    for option in ("repeats", "pairs"):
        with pytest.raises(ValueError, match=f"{option} must be at least 1"):
            scale.ScaleOptions(**{option: 0})
