"""Tiny random models of transformers, one for every architecture that the tests name, and inputs for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

VOCABULARY = 64
WINDOW = 48
_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_IMAGE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 112,
    "patch_size": 8,
}


def _build(config: Any, kind: str) -> Any:
    torch.manual_seed(0)
    return getattr(transformers, kind)(config).eval()


def language(name: str, **settings: Any) -> Any:
    return _build(getattr(transformers, f"{name}Config")(**{**_TEXT, **settings}), f"{name}ForCausalLM")


def image(name: str) -> Any:
    return _build(getattr(transformers, f"{name}Config")(**_IMAGE, initializer_range=0.15), f"{name}Model")


def pair(name: str) -> Any:
    """A model of images and texts."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    text = {name: _TEXT[name] for name in names} | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    text |= {"max_position_embeddings": 256}
    return _build(getattr(transformers, f"{name}Config")(text_config=text, vision_config=_IMAGE), f"{name}Model")


def whisper() -> Any:
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_source_positions=150,
        max_target_positions=200,
        num_mel_bins=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        decoder_start_token_id=3,
        init_std=0.15,
    )
    return _build(config, "WhisperForConditionalGeneration")


def t5() -> Any:
    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0, eos_token_id=None)
    return _build(config, "T5ForConditionalGeneration")


def qwen_vl() -> Any:
    """Two layers of vision, of which the second sees the whole image and the first windows of 8 x 8 patches."""
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 32,
        "window_size": 32,
        "fullatt_block_indexes": [1],
    }
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    tokens = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**_TEXT, "rope_parameters": rope}, vision_config=vision, **tokens
    )
    return _build(config, "Qwen2_5_VLForConditionalGeneration")


LANGUAGE: dict[str, Callable[[], Any]] = {
    "llama": lambda: language("Llama"),
    "mistral": lambda: language("Mistral", sliding_window=WINDOW),
    "qwen3": lambda: language("Qwen3", head_dim=12),
    "phi": lambda: language("Phi"),
    "gemma2": lambda: language("Gemma2", head_dim=8, sliding_window=WINDOW, attn_logit_softcapping=5.0),
    "gemma3": lambda: _build(
        transformers.Gemma3TextConfig(**_TEXT, head_dim=8, sliding_window=WINDOW), "Gemma3ForCausalLM"
    ),
    "gpt_oss": lambda: language(
        "GptOss", head_dim=8, sliding_window=WINDOW, num_local_experts=2, num_experts_per_tok=1
    ),
}
OTHERS: dict[str, Callable[[], Any]] = {
    "whisper": whisper,
    "t5": t5,
    "qwen2_5_vl": qwen_vl,
    "vit": lambda: image("ViT"),
    "dinov2": lambda: image("Dinov2"),
    "clip": lambda: pair("CLIP"),
    "siglip": lambda: pair("Siglip"),
}


def tokens(batch: int = 1, length: int = 200) -> torch.Tensor:
    return torch.randint(4, 60, (batch, length), generator=torch.Generator().manual_seed(1))


def inputs(name: str) -> dict[str, torch.Tensor]:
    """Arguments of a forward pass of one of `OTHERS`."""
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(2, 3, 112, 112, generator=generator)
    if name == "whisper":
        return {"input_features": torch.randn(2, 8, 300, generator=generator), "decoder_input_ids": tokens(2, 150)}
    if name == "t5":
        mask = torch.ones(2, 200, dtype=torch.long)
        mask[1, 140:] = 0
        return {"input_ids": tokens(2), "attention_mask": mask, "decoder_input_ids": tokens(2, 150)}
    if name == "qwen2_5_vl":
        marks = [torch.tensor([[62]]), torch.full((1, 64), 60), torch.tensor([[63]])]
        ids = torch.cat([tokens(1, 20), *marks, tokens(1, 60)], dim=1)
        patches = torch.randn(256, 3 * 2 * 4 * 4, generator=generator)
        grid = torch.tensor([[1, 16, 16]])
        kinds = (ids == 60).int()
        return {"input_ids": ids, "pixel_values": patches, "image_grid_thw": grid, "mm_token_type_ids": kinds}
    return {"pixel_values": pixels} if name in ("vit", "dinov2") else {"pixel_values": pixels, "input_ids": tokens(2)}


def outputs(result: Any) -> torch.Tensor:
    """Everything that a model says, in one row."""
    names = ("logits", "last_hidden_state", "logits_per_image", "image_embeds", "text_embeds")
    return torch.cat([result[name].reshape(-1) for name in names if result.get(name) is not None])
