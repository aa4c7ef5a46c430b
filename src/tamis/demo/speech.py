"""A speech model and a recording of people talking: Whisper base, whose encoder reads 1,500 tokens of 20 ms."""

from __future__ import annotations

import re
import wave
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tamis.demo.assets import SPEECH, WHISPER, fetch
from tamis.demo.ctranslate2 import read_variables

RATE = 16_000  # samples a second, of the model and of the recording
SECONDS = 30  # what the model hears at once
_LAYERS, _HEADS, _WIDTH = 6, 8, 512
# Names in the CTranslate2 file and in transformers; attention weights follow below, for there they are stacked.
_RENAMED = {
    r"encoder/position_encodings/encodings": "encoder.embed_positions.weight",
    r"decoder/position_encodings/encodings": "decoder.embed_positions.weight",
    r"decoder/embeddings/weight": "decoder.embed_tokens.weight",
    r"encoder/(conv[12])/(weight|bias)": r"encoder.\1.\2",
    r"(\w+)/layer_norm/(gamma|beta)": r"\1.layer_norm.\2",
    r"(\w+)/layer_(\d)/self_attention/layer_norm/(gamma|beta)": r"\1.layers.\2.self_attn_layer_norm.\3",
    r"(\w+)/layer_(\d)/attention/layer_norm/(gamma|beta)": r"\1.layers.\2.encoder_attn_layer_norm.\3",
    r"(\w+)/layer_(\d)/ffn/layer_norm/(gamma|beta)": r"\1.layers.\2.final_layer_norm.\3",
    r"(\w+)/layer_(\d)/ffn/linear_0/(weight|bias)": r"\1.layers.\2.fc1.\3",
    r"(\w+)/layer_(\d)/ffn/linear_1/(weight|bias)": r"\1.layers.\2.fc2.\3",
}
_ATTENTION = re.compile(r"(\w+)/layer_(\d)/(self_attention|attention)/(linear_\d)/(weight|bias)")
_STACKED = {
    ("self_attention", "linear_0"): ("q_proj", "k_proj", "v_proj"),
    ("self_attention", "linear_1"): ("out_proj",),
    ("attention", "linear_0"): ("q_proj",),
    ("attention", "linear_1"): ("k_proj", "v_proj"),
    ("attention", "linear_2"): ("out_proj",),
}
_MODULES = {"self_attention": "self_attn", "attention": "encoder_attn"}
_PARAMETERS = {"gamma": "weight", "beta": "bias"}
# Facts about the model that are no weights, and what they must be for our configuration to be the right one.
_FACTS = {
    "encoder/num_heads": _HEADS,
    "decoder/num_heads": _HEADS,
    "decoder/activation": 3,  # GELU with erf
    "decoder/pre_norm": 1,
    "decoder/alibi": 0,
    "decoder/scale_embeddings": 0,
    "decoder/start_from_zero_embedding": 0,
}
_IGNORED = {"decoder/alignment_heads", "decoder/alignment_layer", "decoder/projection/weight"}  # for timestamps; tied


def load_speech_encoder() -> Any:
    """Whisper base as a `WhisperModel` in fp32 on the CPU; `model.encoder(features)` is the part that reads the sound.

    Raises:
        AssetError: the weights cannot be fetched.
        ValueError: a weight is missing, left over or has another shape.
    """
    return load_speech_model().model


def load_speech_model() -> Any:
    """Whisper base with its decoder, as a `WhisperForConditionalGeneration` in fp32 on the CPU.

    Raises:
        AssetError: the weights cannot be fetched.
        ValueError: a weight is missing, left over or has another shape.
    """
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    content = bytearray().join(fetch(part).read_bytes() for part in WHISPER)
    config = WhisperConfig(
        vocab_size=51_865,
        d_model=_WIDTH,
        encoder_layers=_LAYERS,
        decoder_layers=_LAYERS,
        encoder_attention_heads=_HEADS,
        decoder_attention_heads=_HEADS,
        encoder_ffn_dim=4 * _WIDTH,
        decoder_ffn_dim=4 * _WIDTH,
    )
    model: Any = WhisperForConditionalGeneration(config)
    try:
        model.model.load_state_dict(rename(read_variables(content)), strict=True)
    except RuntimeError as error:
        raise ValueError(f"{WHISPER[0].member} does not hold the weights of Whisper base: {error}") from error
    return model.eval()


def rename(variables: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a CTranslate2 Whisper by their names in `WhisperModel`, in fp32.

    Raises:
        ValueError: a name is not known, or the file describes another model.
    """
    weights: dict[str, Tensor] = {}
    for name, tensor in variables.items():
        if name in _FACTS:
            if int(tensor) != _FACTS[name]:
                raise ValueError(f"{name} is {int(tensor)}, Whisper base has {_FACTS[name]}")
        elif match := _ATTENTION.fullmatch(name):
            weights.update(_attention(match, tensor.float()))
        elif name not in _IGNORED:
            weights[_renamed(name)] = tensor.float()
    return weights


def _renamed(name: str) -> str:
    for pattern, replacement in _RENAMED.items():
        if match := re.fullmatch(pattern, name):
            path, _, last = match.expand(replacement).rpartition(".")
            return f"{path}.{_PARAMETERS.get(last, last)}"
    raise ValueError(f"{name} is no weight of Whisper")


def _attention(match: re.Match[str], tensor: Tensor) -> dict[str, Tensor]:
    """The projections that are stacked in one tensor."""
    side, layer, kind, linear, parameter = match.groups()
    names = _STACKED[kind, linear]
    weights = {}
    for name, part in zip(names, tensor.chunk(len(names)), strict=True):
        if (name, parameter) != ("k_proj", "bias"):
            weights[f"{side}.layers.{layer}.{_MODULES[kind]}.{name}.{parameter}"] = part.contiguous()
        elif part.any():
            raise ValueError(f"{match[0]}: Whisper's keys have no bias, got {part.abs().max():.3g}")
    return weights


def speech_inputs(count: int) -> list[Tensor]:
    """Log-mel features of `count` views of a recorded conversation in English, each `[1, 80, 3000]`.

    The recording has 30 s. View i starts i/count of it later and goes on at its beginning, so every view is full of
    speech, the same at other positions.

    Raises:
        AssetError: the recording cannot be fetched.
        ValueError: `count` is below 1.
    """
    from transformers import WhisperFeatureExtractor

    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    sound = read_wave(fetch(SPEECH))
    make: Any = WhisperFeatureExtractor
    extractor = make()
    views = (sound.roll(-index * len(sound) // count) for index in range(count))
    return [extractor(view.numpy(), sampling_rate=RATE, return_tensors="pt").input_features for view in views]


def read_wave(path: Path) -> Tensor:
    """The samples of a mono 16-bit WAV file at 16 kHz, in [-1, 1).

    Raises:
        ValueError: the file has another format.
    """
    try:
        with wave.open(str(path)) as file:
            found = (file.getnchannels(), file.getsampwidth(), file.getframerate())
            frames = bytearray(file.readframes(file.getnframes()))
    except (wave.Error, EOFError) as error:
        raise ValueError(f"{path} is no WAV file: {error}") from error
    if found != (1, 2, RATE):
        raise ValueError(f"{path} has (channels, bytes, rate) {found}, expected {(1, 2, RATE)}")
    return torch.frombuffer(frames, dtype=torch.int16).float() / 32768
