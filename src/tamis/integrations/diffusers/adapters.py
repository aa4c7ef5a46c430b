"""What tamis has to know of each diffusers transformer: an entry of a table, no code of theirs.

An entry says which attention layers hold the tokens of the image or video, on which side of them text stands, how
large their grid is, and where positions enter, so that tokens can be put into another order once for all blocks: their
way in is the first block's `hidden_states`, their way out `proj_out`, and rotary embeddings have to follow.
Read from diffusers 0.42.1; tests/test_diffusers.py runs every entry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

Grid = tuple[int, int, int]
Arguments = Mapping[str, Any]
# Sizes of one or more grids of tokens, one behind the other; or the ids [tokens, (image, row, column)] of all tokens.
Tokens = "tuple[Grid, ...] | Tensor"


def _never(config: Any, given: Arguments) -> bool:
    return False


@dataclass(frozen=True)
class Rotary:
    """Where position embeddings for tokens come from.

    Attributes:
        place: a module that returns them, or an argument of the model's `forward`.
        dim: dimension of the tokens.
        item: which item of the returned tuple; None for all.
    """

    place: str
    dim: int
    item: int | None = None


@dataclass(frozen=True)
class Adapter:
    """One model.

    Attributes:
        layers: patterns of the names of attention layers in which the image's tokens attend to each other.
        text: on which side of the image's tokens text may stand in those layers; None if it never does.
        tokens: the grids of the image, from the model's configuration and the arguments of `forward`.
        block: the first block.
        rotary: position embeddings that go by token.
        around: whether these arguments hold something else that goes by token, so that the order has to be changed
            around every attention instead.
    """

    layers: tuple[str, ...]
    text: Literal["before", "after"] | None
    tokens: Callable[[Any, Arguments], Any]
    block: str = "transformer_blocks.0"
    rotary: tuple[Rotary, ...] = ()
    around: Callable[[Any, Arguments], bool] = _never


def _video(*sizes: str | int, frames: int = 2) -> Callable[[Any, Arguments], tuple[Grid, ...]]:
    """Grid of a video latent with its frames at a dimension, from the names of the patch sizes in the config, or 1."""

    def tokens(config: Any, given: Arguments) -> tuple[Grid, ...]:
        shape = given["hidden_states"].shape
        t, h, w = (1 if size == 1 else (getattr(config, str(size)) or 1) for size in sizes)
        return ((shape[frames] // t, shape[-2] // h, shape[-1] // w),)

    return tokens


def _wan(config: Any, given: Arguments) -> tuple[Grid, ...]:
    shape, (t, h, w) = given["hidden_states"].shape, config.patch_size
    return ((shape[2] // t, shape[3] // h, shape[4] // w),)


def _image(config: Any, given: Arguments) -> tuple[Grid, ...]:
    shape, size = given["hidden_states"].shape, config.patch_size
    return ((1, shape[-2] // size, shape[-1] // size),)


def _ltx(config: Any, given: Arguments) -> tuple[Grid, ...]:
    sizes = tuple(given.get(name) for name in ("num_frames", "height", "width"))
    if None in sizes:
        raise ValueError("a token order needs the arguments num_frames, height and width of the transformer")
    return (sizes,)  # type: ignore[return-value]  # all integers


def _qwen(config: Any, given: Arguments) -> tuple[Grid, ...]:
    shapes = given["img_shapes"]
    shapes = shapes[0] if isinstance(shapes, list) else shapes
    return tuple(tuple(grid) for grid in (shapes if isinstance(shapes, list) else [shapes]))


def _flux(config: Any, given: Arguments) -> Tensor:
    ids: Tensor = given["img_ids"]
    return ids[0] if ids.dim() == 3 else ids


def _given(*names: str) -> Callable[[Any, Arguments], bool]:
    return lambda config, given: any(given.get(name) is not None for name in names)


def _timestep_by_token(config: Any, given: Arguments) -> bool:
    timestep = given["timestep"]
    return isinstance(timestep, Tensor) and timestep.dim() > 1


_JOINT = ("transformer_blocks.*.attn", "single_transformer_blocks.*.attn")

TABLE: dict[str, Adapter] = {
    "WanTransformer3DModel": Adapter(
        ("blocks.*.attn1",), None, _wan, "blocks.0", (Rotary("rope", 1),), around=_timestep_by_token
    ),
    "HunyuanVideoTransformer3DModel": Adapter(
        _JOINT,
        "after",
        _video("patch_size_t", "patch_size", "patch_size"),
        rotary=(Rotary("rope", 0),),
        around=lambda config, given: config.image_condition_type == "token_replace",
    ),
    "CogVideoXTransformer3DModel": Adapter(
        ("transformer_blocks.*.attn1",),
        "before",
        _video("patch_size_t", "patch_size", "patch_size", frames=1),
        rotary=(Rotary("image_rotary_emb", 0),),
    ),
    "MochiTransformer3DModel": Adapter(
        ("transformer_blocks.*.attn1",), "after", _video(1, "patch_size", "patch_size"), rotary=(Rotary("rope", 0),)
    ),
    "LTXVideoTransformer3DModel": Adapter(
        ("transformer_blocks.*.attn1",), None, _ltx, rotary=(Rotary("rope", 1),), around=_timestep_by_token
    ),
    "FluxTransformer2DModel": Adapter(
        _JOINT,
        "before",
        _flux,
        rotary=(Rotary("pos_embed", 0),),
        around=_given("controlnet_block_samples", "controlnet_single_block_samples"),
    ),
    "SD3Transformer2DModel": Adapter(
        ("transformer_blocks.*.attn", "transformer_blocks.*.attn2"),
        "after",
        _image,
        around=_given("block_controlnet_hidden_states"),
    ),
    "QwenImageTransformer2DModel": Adapter(
        _JOINT,
        "before",
        _qwen,
        rotary=(Rotary("pos_embed", 0, 0),),
        around=lambda config, given: config.zero_cond_t or given.get("controlnet_block_samples") is not None,
    ),
    "CogView4Transformer2DModel": Adapter(
        ("transformer_blocks.*.attn1",),
        "before",
        _image,
        rotary=(Rotary("rope", 0),),
        around=_given("image_rotary_emb"),
    ),
    "PixArtTransformer2DModel": Adapter(("transformer_blocks.*.attn1",), None, _image, around=_given("attention_mask")),
}


def find(model: Any) -> Adapter | None:
    """The entry of a model's class or of one it is made from; None for a model that the table does not know."""
    return next((TABLE[kind.__name__] for kind in type(model).__mro__ if kind.__name__ in TABLE), None)
