"""The scripts of examples/ as a user runs them: what they print, against what the models do, and their pictures."""

from __future__ import annotations

import base64
import re
import runpy
import struct
import sys
import zlib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

import tamis

EXAMPLES = Path(__file__).parent.parent / "examples"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a script; what it left behind as names, what it printed, and its picture."""
    monkeypatch.syspath_prepend(EXAMPLES)

    def script(name: str, *arguments: str) -> tuple[dict[str, Any], str, Path]:
        path = tmp_path / f"{name}.svg"
        monkeypatch.setattr(sys, "argv", [name, *arguments, "--picture", str(path)])
        return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__"), capsys.readouterr().out, path

    yield script
    sys.modules.pop("picture", None)


def distance(said: str, names: dict[str, Any]) -> float:
    """The relative L1 that a script printed, after checking it."""
    dense, sparse = names["dense"].double(), names["sparse"].double()
    (printed,) = re.findall(r"relative L1 (\S+) from dense", said)
    assert float(printed) == pytest.approx(float((sparse - dense).abs().sum() / dense.abs().sum()), abs=1e-4)
    return float(printed)


def check(said: str, names: dict[str, Any], path: Path, sparse: int, dense: dict[str, int], maps: int) -> None:
    """What all of them say: calls, density, distance, seconds; and a picture with so many layers' maps."""
    assert f"attention calls: {sparse} sparse, {sum(dense.values())} dense {dense}\n" in said
    layers = [layer.last.density for layer in names["handle"].stats().values() if layer.sparse]
    assert len(layers) == maps and max(layers) < 0.6
    assert f"density: {sum(layers) / maps:.2f} of " in said
    assert 1e-4 < distance(said, names) < 0.5
    assert re.search(r"once: \d+\.\d\d s dense, \d+\.\d\d s sparse\n", said)
    assert said.endswith(f"wrote {path}\n")
    assert path.stat().st_size < 60_000
    drawn, masks = pixels(path), names["recorder"].masks[-maps:]
    side = masks[0].grid[1]
    for column, mask in enumerate(masks):
        for row, head in enumerate(mask.to_dense()[0]):
            shown = drawn[row * (side + 2) :, column * (side + 2) :][:side, :side]
            assert torch.equal(shown[::2] > 0, head[: len(shown[::2])]), (column, row)


def pixels(path: Path) -> torch.Tensor:
    """The image in a picture: palette indices `[height, width]`."""
    (image,) = ElementTree.parse(path).getroot().iter(f"{SVG}image")
    data = base64.b64decode(image.attrib["href"].removeprefix("data:image/png;base64,"))
    width, height = struct.unpack(">II", data[16:24])
    assert (image.attrib["width"], image.attrib["height"]) == (str(width), str(height))
    start = data.index(b"IDAT")
    (length,) = struct.unpack(">I", data[start - 4 : start])
    rows = torch.frombuffer(bytearray(zlib.decompress(data[start + 4 : start + 4 + length])), dtype=torch.uint8)
    return rows.view(height, width + 1)[:, 1:]


def test_language(run: Any) -> None:
    names, said, path = run("language")
    assert said.startswith("LlamaForCausalLM, 1,024 tokens\n")
    check(said, names, path, 4, {"decoding": 44}, 4)
    assert names["dense_text"].shape == (12,)
    assert re.search(r"perplexity of the last 255 tokens: \d+\.\d{3} dense, \d+\.\d{3} sparse\n", said)


def test_image(run: Any) -> None:
    names, said, path = run("image")
    assert said.startswith("Dinov2Model, 1,370 tokens\n")
    check(said, names, path, 4, {}, 4)
    cosine = torch.nn.functional.cosine_similarity(names["sparse"].double(), names["dense"].double(), dim=-1)
    assert f"cosine with dense: {cosine.mean():.4f} on average, {cosine.min():.4f} at the worst token\n" in said


def test_speech(run: Any) -> None:
    names, said, path = run("speech")
    assert said.startswith("WhisperForConditionalGeneration, 1,500 tokens of sound\n")
    check(said, names, path, 4, {"decoding": 60}, 4)
    same = names["dense_text"].equal(names["sparse_text"])
    assert f"text of 15 tokens: {'unchanged' if same else 'CHANGED'}\n" in said


def test_a_recording_is_written_down_unchanged(run: Any) -> None:
    """Whisper base, 30 s of talk; the words are those of the transcript in the recording's package."""
    names, said, _ = run("speech", "--model", "whisper")
    assert "attention calls: 6 sparse, " in said and "text of 102 tokens: unchanged\n" in said
    heard = re.findall(r"^  (?:dense|sparse): +(.*)$", said, re.MULTILINE)
    assert len(heard) == 2 and heard[0] == heard[1]
    assert "Oh, hello. I didn't know you were there." in heard[0] and "This is Diane in New Jersey." in heard[0]
    assert 1e-4 < distance(said, names) < 0.1


@pytest.mark.parametrize("order", ["row", "hilbert"])
def test_video(run: Any, order: str) -> None:
    pytest.importorskip("diffusers")
    names, said, path = run("video", *(["--order", order] if order != "row" else []))
    assert said.startswith("WanPipeline, 1,536 tokens, 4 steps\n")
    # 4 layers, with and without the prompt, in 4 steps, of which the first is dense.
    check(said, names, path, 24, {"one of the first 1 steps": 8, "cross-attention": 32}, 4)


def test_long_maps_are_shrunk_to_shares(run: Any, tmp_path: Path) -> None:
    """10,240 keys are 160 blocks: a pixel is the share that was kept of 5 of them by as many queries."""
    names, _, _ = run("image", "--pixels", "182")
    kept = torch.rand(1, 1, 80, 160, generator=torch.Generator().manual_seed(0)) < 0.3
    path = tmp_path / "long.svg"
    names["draw"](path, "a < b", 0.3, [tamis.BlockMask.from_dense(kept)])
    shares = kept[0, 0].double().repeat_interleave(2, 0).view(32, 5, 32, 5).mean((1, 3))
    assert torch.equal(pixels(path).double(), (shares * 15).ceil())
    assert ElementTree.parse(path).getroot().findtext(f"{SVG}title") == "a < b"


def test_gallery_shows_what_is_there() -> None:
    """Every picture of the gallery is shown, small, and for both colour schemes; every command names a script."""
    docs = EXAMPLES.parent / "docs"
    page = (docs / "gallery.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"\]\((gallery/\S+)\)", page))
    assert shown == {f"gallery/{path.name}" for path in (docs / "gallery").iterdir()} and len(shown) == 4
    for name in shown:
        drawing = (docs / name).read_text(encoding="utf-8")
        assert len(drawing) < 60_000 and "prefers-color-scheme:dark" in drawing
        assert len(pixels(docs / name).unique()) > 1
    for script, arguments in re.findall(r"^    python examples/(\w+)\.py(.*)$", page, re.MULTILINE):
        code = (EXAMPLES / f"{script}.py").read_text(encoding="utf-8")
        assert all(f'"{option}"' in code for option in re.findall(r"--\w+", arguments)), (script, arguments)
    for link in re.findall(r"\]\(([^)#]+)", page):
        assert (docs / link).exists(), link


def test_recorder_keeps_what_it_is_told_to(run: Any) -> None:
    """The text of Flux stands before its image: the first keys, and queries that need every key."""
    pytest.importorskip("diffusers")
    from diffusion import TINY

    names, _, _ = run("image", "--pixels", "182")
    recorder = names["Recorder"](tamis.Sparge(topk=0.1, similarity=-1, sink=False))
    model = TINY["flux"].make()
    with torch.no_grad(), tamis.apply(model, recorder) as handle:
        model(**TINY["flux"].given())
    assert handle.calls["sparse"] == len(recorder.masks) == 2
    for mask in recorder.masks:
        kept = mask.to_dense()
        assert kept[..., 0].all() and kept[:, :, 0].all() and not kept[:, :, 1:, 1:].all()


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [("language", ["--tokens", "100"], "fewer than 128"), ("image", ["--pixels", "100"], "fewer than 128")],
)
def test_nothing_sparse_is_said(run: Any, name: str, arguments: list[str], reason: str) -> None:
    with pytest.raises(SystemExit, match=rf"attention calls: 0 sparse, \d+ dense .*{reason}[^\n]*\nnothing ran sparse"):
        run(name, *arguments)


def test_files_are_looked_for_before_anything_runs(
    run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for model in ("tiny", "dinov2"):
        with pytest.raises(SystemExit):
            run("image", "--model", model, "--photo", str(tmp_path / "none.png"))
        wanted = "give --model" if model == "tiny" else "there is no file"
        assert wanted in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["language", "--picture", str(tmp_path / "none" / "x.svg")])
    with pytest.raises(SystemExit):
        runpy.run_path(str(EXAMPLES / "language.py"), run_name="__main__")
    assert "there is no folder" in capsys.readouterr().err


def test_what_cannot_be_drawn_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    draw = runpy.run_path(str(EXAMPLES / "picture.py"))["draw"]
    masks = [tamis.BlockMask.from_dense(torch.ones(1, 1, rows, 2 * rows, dtype=torch.bool)) for rows in (1, 2)]
    with pytest.raises(ValueError, match="nothing ran sparse"):
        draw(tmp_path / "x.svg", "none", 0.5, [])
    with pytest.raises(ValueError, match="calls of one length"):
        draw(tmp_path / "x.svg", "two", 0.5, masks)
