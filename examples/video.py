"""A video model denoises twice from the same noise: as it is, and with sparse attention.

python examples/video.py                         # a tiny Wan with random weights
python examples/video.py --model FOLDER_OR_NAME  # any pipeline of diffusers, of images too, that tamis.apply knows
"""

from __future__ import annotations

import argparse
import inspect
import time
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from picture import Recorder, draw, new_file, sparse_layers
from torch import Tensor

import tamis
from tamis.integrations.schedule import Schedule


def load(name: str, prompt: str) -> tuple[Any, dict[str, Any]]:
    """A pipeline, and what it is asked for; one with random weights has nobody to read a prompt."""
    if name != "tiny":
        return DiffusionPipeline.from_pretrained(name), {"prompt": prompt}
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 4, "attention_head_dim": 24, "num_layers": 4, "ffn_dim": 96}
    channels = {"in_channels": 4, "out_channels": 4, "text_dim": 16, "freq_dim": 16}
    transformer = WanTransformer3DModel(**sizes, **channels, rope_max_seq_len=32).eval()
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = WanPipeline(None, None, None, scheduler, transformer=transformer)  # no tokenizer, text encoder, VAE
    return pipe, {"prompt_embeds": torch.randn(1, 7, 16), "negative_prompt_embeds": torch.randn(1, 7, 16)}


def denoise(pipe: Any, asked: dict[str, Any]) -> tuple[float, Tensor]:
    """Seconds of all steps, and the latent at their end."""
    start = time.perf_counter()
    latent = pipe(**asked, generator=torch.Generator().manual_seed(0), output_type="latent", return_dict=False)[0]
    return time.perf_counter() - start, latent


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="tiny", help="tiny (default), a folder, or a name on the Hugging Face hub")
parser.add_argument("--prompt", default="a cat on a bicycle, rain")
parser.add_argument("--height", type=int, default=256, help="pixels, as the width")
parser.add_argument("--width", type=int, default=384)
parser.add_argument("--frames", type=int, default=13, help="where the pipeline makes videos")
parser.add_argument("--steps", type=int, default=4)
parser.add_argument("--order", help="of the tokens inside of the model: hilbert, column, .. (docs/token-order.md)")
parser.add_argument("--picture", type=new_file, default="video.svg", help="where to write which blocks were kept")
options = parser.parse_args()

pipe, asked = load(options.model, options.prompt)
pipe.set_progress_bar_config(disable=True)
asked |= {"height": options.height, "width": options.width, "num_inference_steps": options.steps}
if "num_frames" in inspect.signature(pipe.__call__).parameters:
    asked["num_frames"] = options.frames
# Random weights have no structure to find: of them a fixed share is kept.
recorder = Recorder(tamis.Sparge(topk=0.3, similarity=-1) if options.model == "tiny" else tamis.Sparge())
schedule = Schedule(dense_steps=1)  # the first step of a denoising decides most

dense_seconds, dense = denoise(pipe, asked)
with tamis.apply(pipe, recorder, schedule=schedule, order=options.order) as handle:  # at its end all is as it was
    sparse_seconds, sparse = denoise(pipe, asked)

layers = sparse_layers(handle)
density = sum(stats.density for stats in layers.values()) / len(layers)
tokens = recorder.masks[-1].seq_lens[0]
print(f"{type(pipe).__name__}, {tokens:,} tokens, {options.steps} steps")
print(f"attention calls: {handle.calls['sparse']} sparse, {handle.calls['dense']} dense {dict(handle.dense_reasons)}")
print(f"density: {density:.2f} of all blocks, {len(layers)} layers, in the last step")
print(f"latent: relative L1 {(sparse - dense).abs().sum() / dense.abs().sum():.4f} from dense")
print(f"denoising, once: {dense_seconds:.2f} s dense, {sparse_seconds:.2f} s sparse")
title = f"{options.model}, {tokens:,} tokens in {options.order or 'row'} order, last step"
draw(options.picture, title, density, recorder.masks[-len(layers) :])
print(f"wrote {options.picture}")
