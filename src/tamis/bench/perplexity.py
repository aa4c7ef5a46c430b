"""What predictors do to the perplexity of the demo's language model: where the default of `Probe` comes from."""

from __future__ import annotations

import statistics
from typing import Any

from tamis.bench.record import commit
from tamis.demo.language import backbone, perplexity
from tamis.demo.machine import machine
from tamis.demo.models import encode, load_language_model
from tamis.demo.progress import note
from tamis.demo.text import default_text
from tamis.integrations.apply import apply
from tamis.predictors import Predictor, Probe, Sparge

PREDICTORS: dict[str, Predictor] = {
    "`Sparge()`": Sparge(),
    f"`Probe()`, floor {Probe().floor:g}".replace(" 0.", " ."): Probe(),
    "`Probe(floor=.003)`": Probe(floor=0.003),
    "`Sparge(cdf=.98)`": Sparge(cdf=0.98),
    "`Probe(cdf=.98)`": Probe(cdf=0.98),
    "`Probe(floor=.004)`": Probe(floor=0.004),
}


def run(tokens: int = 4096, start: int = 60000) -> dict[str, Any]:
    """Density and perplexity under every predictor, in int8 and without skipped value products; plain values.

    Args:
        tokens: length of the text; start: its first token.

    Raises:
        AssetError: weights cannot be fetched.
        ValueError: the text is too short for so many tokens.
    """
    model, tokenizer, _ = load_language_model(None)
    ids = encode(tokenizer, default_text(), start + tokens)[:, start:]
    note("dense")
    result: dict[str, Any] = {"tokens": tokens, "start": start, "rows": []}
    result["perplexity"] = perplexity(model, backbone(model, ids), ids, "perplexity, dense")
    for name, predictor in PREDICTORS.items():
        note(name)
        with apply(model, predictor, precision="int8", pv_threshold=None) as handle:
            hidden = backbone(model, ids)
            layers = [calls.last for calls in handle.stats().values() if calls.last is not None]
        densities = [density for stats in layers for density in stats.density_per_head.tolist()]
        found = perplexity(model, hidden, ids, f"perplexity, {name}")
        result["heads"] = len(densities)
        result["rows"].append({"name": name, "density": statistics.fmean(densities), "perplexity": found})
    return result | {"machine": machine(), "commit": commit()}


def markdown(result: dict[str, Any]) -> str:
    """The result as it stands in docs/predictors.md."""
    lines = [f"against {result['perplexity']:.3f} dense:", "", "| | density | perplexity |", "|---|---|---|"]
    for row in result["rows"]:
        change = row["perplexity"] / result["perplexity"] - 1
        written = f"{change:+.1%}" if abs(change) >= 0.01 else f"{change:+.2%}".replace("0.", ".")
        lines.append(f"| {row['name']} | {row['density']:.3f} | {written} |".replace("| 0.", "| ."))
    return "\n".join(lines)
