"""`tamis bench order`: what it joins, permutes and measures, its tables and its picture."""

from __future__ import annotations

import itertools
import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention

from tamis import cli, order
from tamis.bench import layers, order_report
from tamis.bench import order as bench
from tamis.demo import clip
from tamis.integrations.capture import Captured, capture

transformers = pytest.importorskip("transformers")
ROOT = Path(__file__).parent.parent
GRID = (4, 8, 9)


def test_the_frames_of_a_video_become_one_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row-major, without class tokens, of the layers asked for; attention runs over all frames."""
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=32, num_attention_heads=2, num_hidden_layers=3, mlp_ratio=1, image_size=28, patch_size=14
    )
    model = transformers.Dinov2Model(config).eval()
    monkeypatch.setattr(layers, "load_image_model", lambda _path: model)
    monkeypatch.setattr(layers, "fetch", lambda _asset: None)
    frames = [torch.randn(1, 3, 28, 42) for _ in range(3)]
    found = layers.video_layers(frames, 2)
    assert [layer.captured.index for layer in found] == [0, 2]
    calls: list[Captured] = []

    def visit(call: Captured) -> Tensor:
        calls.append(call)
        return scaled_dot_product_attention(call.query, call.key, call.value, scale=call.scale)

    capture(model, lambda: model(pixel_values=frames[1]), visit)
    for name in ("query", "key", "value"):
        joined = getattr(found[1].captured, name)
        assert joined.shape == (1, 2, 3 * 6, 16)
        torch.testing.assert_close(joined[:, :, 6:12], getattr(calls[2], name)[:, :, 1:])
    c = found[1].captured
    expected = scaled_dot_product_attention(c.query, c.key, c.value, scale=c.scale)
    torch.testing.assert_close(found[1].exact, expected)


def smooth_layers(*_arguments: object) -> list[layers.Layer]:
    """Tokens that are the more alike the nearer they are, in space and in time."""
    torch.manual_seed(1)
    t, h, w = torch.meshgrid(*(torch.arange(size, dtype=torch.float32) for size in GRID), indexing="ij")
    waves = torch.randn(2, 24, 3) * 0.5
    phase = torch.einsum("hds,stjk->hdtjk", waves, torch.stack([t, h, w])).flatten(2).mT
    query = 2 * torch.cat([phase.sin(), phase.cos()], -1)[None]
    key, value = query.roll(1, 1), torch.randn(1, 2, phase.shape[1], 16)
    exact = scaled_dot_product_attention(query, key, value)
    call = Captured(index=0, name="one", query=query, key=key, value=value, causal=False, scale=None)
    return [layers.Layer(call, exact)]


def test_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "video_layers", smooth_layers)
    monkeypatch.setattr(clip, "frames", lambda *_, **__: [torch.zeros(1, 3, 8 * 14, 9 * 14)] * 4)
    monkeypatch.setattr(bench, "CDFS", (0.5, 1.0))
    result = bench.run(bench.OrderOptions(clips=("bikes",)))
    (found,) = result["clips"]
    assert (found["grid"], found["tokens"], found["heads"], found["layers"]) == ([4, 8, 9], 288, 2, [0])
    by_order = {entry["order"]: entry for entry in found["orders"]}
    for entry in by_order.values():
        half, whole = entry["unjudged"]
        assert whole["density"] == 1.0 and whole["l1_mean"] < 1e-5, "what is compared is permuted alike"
        assert half["density"] < 1.0 and half["l1_mean"] > 1e-3
    assert by_order["hilbert"]["k_similarity"] > by_order["row"]["k_similarity"] > by_order["random"]["k_similarity"]
    json.dumps(result, allow_nan=False)


def test_similarities_are_mean_cosines_of_all_pairs_of_a_block() -> None:
    """In fp64; of 288 tokens the last blocks, of 32 rows both, are partial."""
    (layer,) = smooth_layers()
    query, key = layer.captured.query.double(), layer.captured.key.double()
    found = bench.similarities([layer])
    for x, block, value in ((query, 128, found[0]), (key - key.mean(2, keepdim=True), 64, found[1])):
        blocks = [normalize(part, dim=-1) for part in x.split(block, 2)]
        expected = torch.stack([(part @ part.mT).mean((-1, -2)) for part in blocks]).mean()
        assert value == pytest.approx(float(expected), abs=1e-5)  # fp32 sums of at most 128 unit rows


def row(cdf: float, density: float, error: float) -> dict[str, float]:
    return {"cdf": cdf, "density": density, "l1_mean": error}


def made_result() -> dict[str, Any]:
    rows = [row(0.9, 0.5, 0.1), row(0.95, 0.6, 0.06), row(0.995, 0.8, 0.02)]
    dense = [row(0.9, 0.99, 0.001), row(0.95, 0.992, 0.0005), row(0.995, 1.0, 0.0)]
    bad = [row(0.9, 0.5, 0.3), row(0.95, 0.6, 0.2), row(0.995, 0.8, 0.1)]
    orders = [{"order": name, "q_similarity": 0.75, "k_similarity": 0.5} for name in order.KINDS]
    for entry in orders:
        entry |= {"judged": dense if entry["order"] == "random" else rows, "unjudged": bad}
    found = {"clip": "bikes", "grid": [2, 3, 4], "tokens": 24, "heads": 12, "layers": [0, 6], "orders": orders}
    return {"model": "M", "clips": [found]}


def test_table() -> None:
    lines = order_report.markdown(made_result()).splitlines()
    assert lines[0] == "bikes, 2 frames of 3 x 4 tokens (24), 12 heads of 2 layers of M (proxy):"
    assert len({line.count("|") for line in lines[2:]}) == 1
    assert (
        lines[4]
        == "| random | 0.750 | 0.500 | 0.0000 | 0.000 | 0.0005 | 0.008 | at most 0.990 | - | at most 0.990 | 0.800 |"
    )
    # .05 is a quarter of the way from .06 to .02, so from density .6 to .8; .1 is a row's own.
    assert lines[5] == "| row | 0.750 | 0.500 | 0.0200 | 0.200 | 0.0600 | 0.400 | 0.650 | - | 0.500 | 0.800 |"
    assert [line.split()[1] for line in lines[4:]] == list(order_report.ORDERS)


def test_picture() -> None:
    """One panel per order; only the curve joins its blocks by steps of one token."""
    assert "currentColor" in order_report.svg() and ";color:var(--text)}" in order_report.svg()  # in either scheme
    drawn = ET.fromstring(order_report.svg())
    svg = "{http://www.w3.org/2000/svg}"
    walks = drawn.findall(f"{svg}polyline")
    blocks = 7  # of 11 tokens
    assert len(walks) == len(order_report.ORDERS) * (2 * blocks - 1)
    for number, name in enumerate(order_report.ORDERS):
        points = []
        for walk in walks[number * (2 * blocks - 1) : (number + 1) * (2 * blocks - 1)]:
            if "jump" not in str(walk.get("class")):
                points += [tuple(map(int, at.split(","))) for at in str(walk.get("points")).split()]
        assert len(set(points)) == len(points) == 77
        steps = {abs(a - c) + abs(b - d) for (a, b), (c, d) in itertools.pairwise(points)}
        assert (steps == {15}) is (name == "hilbert")
    squares = sum(str(path.get("d")).count("M") for path in drawn.findall(f"{svg}path"))
    assert squares == len(order_report.ORDERS) * 12 * 12


def test_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[bench.OrderOptions] = []
    monkeypatch.setattr(bench, "run", lambda options: asked.append(options) or made_result())
    out, picture = tmp_path / "out.json", tmp_path / "out.svg"
    arguments = ["--clip", "bikes", "--frames", "3", "--stride", "2", "--rows", "5", "--every", "4"]
    assert cli.main(["bench", "order", *arguments, "--json", str(out), "--picture", str(picture)]) == 0
    assert asked == [bench.OrderOptions(("bikes",), 3, 2, 5, 4)]
    assert json.loads(out.read_text()) == made_result() and picture.read_text() == order_report.svg()
    capsys.readouterr()
    assert cli.main(["bench", "order", "--markdown", str(out)]) == 0
    assert capsys.readouterr().out == order_report.markdown(made_result()) + "\n"
    assert len(asked) == 1, "nothing is measured again"
    assert cli.main(["bench", "order", "--clip", "bikes", "ducks"]) == cli.USAGE
    assert "--clip: ducks is not one of bikes, bigbuckbunny" in capsys.readouterr().err


def test_the_docs_show_the_committed_result() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "order-dinov2.json").read_text(encoding="utf-8"))
    assert order_report.markdown(result) in (ROOT / "docs" / "token-order.md").read_text(encoding="utf-8")
    assert (ROOT / "docs" / "orders.svg").read_text(encoding="utf-8") == order_report.svg()
