"""Tiny random diffusers transformers, and arguments for each: [3, 8, 12] tokens of video or [1, 16, 24] of an image."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# Nothing here asks the hub for anything.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

VIDEO, IMAGE = (3, 8, 12), (1, 16, 24)
PIXELS = IMAGE[1] * IMAGE[2]
TEXT = 7


class Tiny(NamedTuple):
    """How to make a model, its arguments, the grid of its tokens, and how many text tokens join them in attention."""

    make: Callable[[], nn.Module]
    given: Callable[[], dict[str, Any]]
    grid: tuple[int, int, int]
    text: int


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def make(name: str, **settings: Any) -> nn.Module:
    import diffusers

    torch.manual_seed(0)
    model: nn.Module = getattr(diffusers, name)(**settings).eval()
    return model


def video(channels: int = 4, *, frames_first: bool = False, batch: int = 1) -> Tensor:
    """A latent whose patches of 1 x 2 x 2 are the tokens."""
    t, h, w = VIDEO
    latent = noise(batch, channels, t, 2 * h, 2 * w)
    return latent.transpose(1, 2) if frames_first else latent


def image(channels: int = 4) -> Tensor:
    return noise(1, channels, 2 * IMAGE[1], 2 * IMAGE[2])


def at(step: float = 500.0) -> Tensor:
    return torch.tensor([step])


def ids() -> Tensor:
    _, h, w = IMAGE
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    return torch.stack([torch.zeros(h, w), rows, columns], -1).reshape(-1, 3).float()


def rotary(grid: tuple[int, int, int], dim: int) -> tuple[Tensor, Tensor]:
    """Position embeddings as a pipeline of CogVideoX hands them to its transformer."""
    angles = torch.arange(grid[0] * grid[1] * grid[2])[:, None] * 0.7 ** torch.arange(dim // 2)
    angles = angles.repeat_interleave(2, 1)
    return angles.cos(), angles.sin()


def hunyuan(valid: int = TEXT) -> dict[str, Any]:
    """With a mask of the text, of which so many tokens are valid."""
    return {
        "hidden_states": video(),
        "timestep": at(),
        "encoder_hidden_states": noise(1, TEXT, 16),
        "encoder_attention_mask": (torch.arange(TEXT) < valid)[None],
        "pooled_projections": noise(1, 8),
        "guidance": torch.tensor([1000.0]),
    }


TINY: dict[str, Tiny] = {
    "wan": Tiny(
        lambda: make(
            "WanTransformer3DModel",
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=16,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=32,
        ),
        lambda: {"hidden_states": video(), "timestep": at(), "encoder_hidden_states": noise(1, TEXT, 16)},
        VIDEO,
        0,
    ),
    "hunyuan": Tiny(
        lambda: make(
            "HunyuanVideoTransformer3DModel",
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            text_embed_dim=16,
            pooled_projection_dim=8,
            rope_axes_dim=(4, 4, 4),
        ),
        hunyuan,
        VIDEO,
        TEXT,
    ),
    "cogvideox": Tiny(
        lambda: make(
            "CogVideoXTransformer3DModel",
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            time_embed_dim=8,
            text_embed_dim=16,
            num_layers=2,
            max_text_seq_length=TEXT,
            use_rotary_positional_embeddings=True,
        ),
        lambda: {
            "hidden_states": video(frames_first=True),
            "encoder_hidden_states": noise(1, TEXT, 16),
            "timestep": at(),
            "image_rotary_emb": rotary(VIDEO, 12),
        },
        VIDEO,
        TEXT,
    ),
    "mochi": Tiny(
        lambda: make(
            "MochiTransformer3DModel",
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            pooled_projection_dim=16,
            in_channels=4,
            text_embed_dim=16,
            time_embed_dim=8,
        ),
        lambda: {
            "hidden_states": video(),
            "encoder_hidden_states": noise(1, TEXT, 16),
            "timestep": at(),
            "encoder_attention_mask": torch.ones(1, TEXT, dtype=torch.bool),
        },
        VIDEO,
        TEXT,
    ),
    "ltx": Tiny(
        lambda: make(
            "LTXVideoTransformer3DModel",
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=12,
            cross_attention_dim=24,
            num_layers=2,
            caption_channels=16,
        ),
        lambda: {
            "hidden_states": noise(1, 288, 4),
            "encoder_hidden_states": noise(1, TEXT, 16),
            "timestep": at(),
            "encoder_attention_mask": torch.ones(1, TEXT, dtype=torch.bool),
            "num_frames": VIDEO[0],
            "height": VIDEO[1],
            "width": VIDEO[2],
        },
        VIDEO,
        0,
    ),
    "flux": Tiny(
        lambda: make(
            "FluxTransformer2DModel",
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=12,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=8,
            axes_dims_rope=(4, 4, 4),
        ),
        lambda: {
            "hidden_states": noise(1, PIXELS, 4),
            "encoder_hidden_states": noise(1, TEXT, 16),
            "pooled_projections": noise(1, 8),
            "timestep": at(0.5),
            "img_ids": ids(),
            "txt_ids": torch.zeros(TEXT, 3),
        },
        IMAGE,
        TEXT,
    ),
    "sd3": Tiny(
        lambda: make(
            "SD3Transformer2DModel",
            sample_size=32,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=12,
            num_attention_heads=2,
            joint_attention_dim=16,
            caption_projection_dim=24,
            pooled_projection_dim=8,
            pos_embed_max_size=24,
            dual_attention_layers=(0,),
        ),
        lambda: {
            "hidden_states": image(),
            "encoder_hidden_states": noise(1, TEXT, 16),
            "pooled_projections": noise(1, 8),
            "timestep": at(),
        },
        IMAGE,
        TEXT,
    ),
    "qwenimage": Tiny(
        lambda: make(
            "QwenImageTransformer2DModel",
            in_channels=4,
            out_channels=1,
            num_layers=2,
            attention_head_dim=12,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 4, 4),
        ),
        lambda: {
            "hidden_states": noise(1, PIXELS, 4),
            "encoder_hidden_states": noise(1, TEXT, 16),
            "encoder_hidden_states_mask": torch.ones(1, TEXT, dtype=torch.bool),
            "timestep": at(0.5),
            "img_shapes": [[IMAGE]],
        },
        IMAGE,
        TEXT,
    ),
    "cogview4": Tiny(
        lambda: make(
            "CogView4Transformer2DModel",
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            text_embed_dim=16,
            time_embed_dim=8,
            condition_dim=4,
            rope_axes_dim=(16, 16),
        ),
        lambda: {
            "hidden_states": image(),
            "encoder_hidden_states": noise(1, TEXT, 16),
            "timestep": at(),
            "original_size": torch.tensor([[24.0, 32.0]]),
            "target_size": torch.tensor([[24.0, 32.0]]),
            "crop_coords": torch.tensor([[0.0, 0.0]]),
        },
        IMAGE,
        TEXT,
    ),
    "pixart": Tiny(
        lambda: make(
            "PixArtTransformer2DModel",
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            cross_attention_dim=16,
            sample_size=32,
            caption_channels=16,
            use_additional_conditions=False,
        ),
        lambda: {"hidden_states": image(), "encoder_hidden_states": noise(1, TEXT, 16), "timestep": at()},
        IMAGE,
        0,
    ),
}
