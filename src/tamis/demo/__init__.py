"""`tamis demo`: real models read real data with dense and with sparse attention, and every difference is reported."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tamis.attend import DEFAULT_PV_THRESHOLD
from tamis.demo.language import LanguageOptions
from tamis.demo.measure import Settings
from tamis.predictors.sparge import Sparge


@dataclass(frozen=True)
class DemoOptions:
    """What to run and where to write; `only` is "language", "image" or None for both."""

    only: str | None = None
    language: LanguageOptions = field(default_factory=LanguageOptions)
    pixels: int | None = None
    settings: Settings = field(default_factory=lambda: Settings(Sparge(), DEFAULT_PV_THRESHOLD))
    json: Path | None = None
    report: Path | None = Path("tamis-report.html")


def run(options: DemoOptions) -> dict[str, Any]:
    """Run the demo, write its files, return its result.

    Raises:
        ValueError: text, model or an option cannot be used.
        AssetError: weights cannot be fetched.
        OSError: a file cannot be read or written.
    """
    from tamis import report
    from tamis.demo import image, language
    from tamis.demo.machine import machine

    for path in (options.json, options.report):
        if path is not None and not path.resolve().parent.is_dir():
            raise ValueError(f"cannot write {path}: its folder is not there")
    result: dict[str, Any] = {}
    if options.only in (None, "language"):
        result["language"] = language.run(options.language, options.settings)
    if options.only in (None, "image"):
        result["image"] = image.run(options.settings, pixels=options.pixels or image.PIXELS)
    result["machine"] = machine()
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if options.report is not None:
        report.write(options.report, result)
    return result


def summary(result: dict[str, Any]) -> str:
    """The figures of a result as text, for a terminal."""
    lines = []
    if (language := result.get("language")) is not None:
        change = language["perplexity_sparse"] / language["perplexity_dense"] - 1
        found = {kind: sum(entry[kind] for entry in language["passkey"]) for kind in ("dense", "sparse")}
        lines += [
            f"{language['model']} reads {language['tokens']:,} tokens",
            *_times(language),
            f"  perplexity       dense {language['perplexity_dense']:9.3f}     "
            f"sparse {language['perplexity_sparse']:9.3f}     {change:+8.2%}",
            *_errors(language),
            f"  passkey          dense {found['dense']:9d}     sparse {found['sparse']:9d}     "
            f"of {len(language['passkey'])} depths found, in {language['passkey_tokens']:,} tokens",
        ]
    if (image := result.get("image")) is not None:
        lines += [
            f"{image['model']} looks at {image['pixels']} x {image['pixels']} pixels, {image['tokens']:,} tokens",
            *_times(image),
            *_errors(image),
            f"  feature cosine   mean {image['feature_cosine']:.5f}, worst token {image['feature_cosine_worst']:.5f}",
        ]
    return "\n".join(lines)


def _times(part: dict[str, Any]) -> list[str]:
    return [
        f"  {label:16} dense {part[f'{kind}_seconds_dense']:7.2f} s     sparse {part[f'{kind}_seconds_sparse']:7.2f} s"
        f"     {part[f'{kind}_ratio']:7.2f}x"
        for kind, label in (("total", "whole pass"), ("attention", f"attention {part['dense_kind']}"))
    ]


def _errors(part: dict[str, Any]) -> list[str]:
    return [
        f"  density          {part['density']:.3f} (QK {part['qk_density']:.3f}, PV {part['pv_density']:.3f})",
        f"  relative L1      median {part['relative_l1_median']:.4f}, mean {part['relative_l1_mean']:.4f}, "
        f"worst head {part['relative_l1_worst']:.4f}",
    ]
