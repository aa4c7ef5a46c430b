"""The language model of the demo, or one's own, and its text as tokens."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tamis.demo.assets import SMOLLM2, fetch
from tamis.demo.progress import note


def load_language_model(folder: Path | None) -> tuple[Any, Any, str]:
    """A causal language model in fp32 on the CPU, its tokenizer and its name.

    Args:
        folder: a folder as transformers saves it, or one that holds a single .gguf file; None for
            SmolLM2-135M-Instruct, whose weights come from a package.

    Raises:
        ValueError: the folder holds no model.
        AssetError: the weights cannot be fetched.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    quiet: Any = transformers_logging
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    options: dict[str, Any] = {}
    if folder is None:
        weights = fetch(SMOLLM2)
        folder, options["gguf_file"] = weights.parent, weights.name
        name = weights.name.removesuffix(".gguf")
    else:
        name = folder.resolve().name
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder")
        if not (folder / "config.json").is_file():
            found = sorted(folder.glob("*.gguf"))
            if len(found) != 1:
                raise ValueError(f"{folder} holds neither config.json nor exactly one .gguf file")
            options["gguf_file"] = found[0].name
            name = found[0].stem
    note(f"loading {name}")
    try:
        # gguf loading draws a bar that no setting of transformers turns off.
        with contextlib.redirect_stderr(io.StringIO()):
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, **options)
            model: Any = AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, dtype=torch.float32, **options
            )
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} holds no model that transformers can load: {error}") from error
    return model.eval(), tokenizer, name


def encode(tokenizer: Any, text: str, tokens: int) -> Tensor:
    """The first `tokens` tokens of a text, `[1, tokens]`.

    Raises:
        ValueError: the text is shorter.
    """
    ids: Tensor = tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, :tokens]
    if ids.shape[1] < tokens:
        raise ValueError(f"the text has {ids.shape[1]} tokens, {tokens} are wanted: use --tokens {ids.shape[1]}")
    return ids


def check_length(model: Any, tokens: int) -> None:
    """Refuse lengths for which the model has no positions.

    Raises:
        ValueError: the model cannot read that many tokens.
    """
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and tokens > longest:
        raise ValueError(f"the model reads at most {longest} tokens, {tokens} are wanted")
