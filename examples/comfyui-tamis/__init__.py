"""A ComfyUI node that runs a model's attention through tamis. Nothing of ComfyUI is imported."""

from __future__ import annotations

from typing import Any

import tamis
from tamis.integrations.comfyui import Override, patch


class TamisAttention:
    """MODEL in, MODEL out: its long attention calls run sparse, all others as before."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "apply"
    CATEGORY = "model_patches/attention"
    DESCRIPTION = "Sparse, quantised attention (SpargeAttn) for the model's long attention calls."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What the node asks for."""
        share = {"min": 0.01, "max": 1.0, "step": 0.005}
        return {
            "required": {
                "model": ("MODEL",),
                "keep": (["topk", "cdf"], {"tooltip": "topk: a share of the blocks; cdf: a share of the softmax mass"}),
                "amount": ("FLOAT", {"default": 0.5, **share, "tooltip": "smaller is faster and less accurate"}),
                "similarity": (
                    "FLOAT",
                    {
                        "default": tamis.Sparge().similarity,
                        "min": -1.0,
                        "max": 0.99,
                        "step": 0.01,
                        "tooltip": "blocks less alike inside than this are kept whole; -1 turns it off",
                    },
                ),
                "precision": (["int8", "full", "fp8"], {"tooltip": "fp8 needs a GPU that has it"}),
                "min_tokens": (
                    "INT",
                    {"default": 1024, "min": 0, "max": 1 << 20, "tooltip": "shorter calls stay dense"},
                ),
                "enabled": ("BOOLEAN", {"default": True}),
            }
        }

    def apply(
        self,
        model: Any,
        keep: str,
        amount: float,
        similarity: float,
        precision: str,
        min_tokens: int,
        enabled: bool,
    ) -> tuple[Any]:
        """The patched clone of the model, or the model itself."""
        if not enabled:
            return (model,)
        predictor = tamis.Sparge(**{keep: amount}, similarity=similarity)
        return (patch(model, Override(predictor, precision=precision, min_tokens=min_tokens)),)


NODE_CLASS_MAPPINGS = {"TamisAttention": TamisAttention}
NODE_DISPLAY_NAME_MAPPINGS = {"TamisAttention": "Sparse attention (tamis)"}
