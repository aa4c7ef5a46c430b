"""What each part of the method does, on the attention maps of the demo's language model.

Stage 1 (blocks that are predicted away), stage 2 (value products that are skipped), both; the self-similarity judge on
and off; and density by length. The paper's figures for the same questions are for larger models and stand in its
sections 4.3 and 4.4.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

from tamis.attend import DEFAULT_PV_THRESHOLD
from tamis.bench.layers import Layer, Outcome, evaluate, language_layers
from tamis.bench.record import commit
from tamis.demo.machine import machine
from tamis.demo.measure import Settings
from tamis.demo.progress import Progress
from tamis.predictors.sparge import Sparge

LENGTHS = (1024, 2048, 4096, 8192)
JUDGES = (Sparge().similarity, 0.3, 0.5)  # the default, and where more blocks are judged
_HARDEST = 0.02  # share of heads on which the judge matters most, as in the paper


def run(tokens: int = LENGTHS[-1]) -> dict[str, Any]:
    """All ablations up to `tokens` tokens, as plain values."""
    lengths = [length for length in LENGTHS if length <= tokens]
    if not lengths:
        raise ValueError(f"tokens must be at least {LENGTHS[0]}, got {tokens}")
    layers = language_layers(tokens)
    standard = Sparge()
    both = Settings(standard, DEFAULT_PV_THRESHOLD)
    everything = Sparge(topk=1.0, similarity=-1.0)
    unjudged = Settings(replace(standard, similarity=-1.0), DEFAULT_PV_THRESHOLD)
    with Progress(4 + len(JUDGES) + len(lengths), "ablation") as progress:

        def measure(settings: Settings, chosen: list[Layer]) -> Outcome:
            outcome = evaluate(chosen, settings)
            progress.advance()
            return outcome

        neither = measure(Settings(everything, None), layers)
        first = measure(Settings(standard, None), layers)
        second = measure(Settings(everything, DEFAULT_PV_THRESHOLD), layers)
        joint = measure(both, layers)
        without = measure(unjudged, layers)
        judges = [(JUDGES[0], joint)]
        for similarity in JUDGES[1:]:
            strict = Settings(replace(standard, similarity=similarity), DEFAULT_PV_THRESHOLD)
            judges.append((similarity, measure(strict, layers)))
        by_length = {length: measure(both, [layer.first(length) for layer in layers]) for length in lengths}
    return {
        "tokens": tokens,
        "settings": both.as_json(),
        "stages": [
            {"name": name, **outcome.as_json()}
            for name, outcome in (
                ("neither: int8 alone", neither),
                ("stage 1 alone", first),
                ("stage 2 alone", second),
                ("both", joint),
            )
        ],
        "judge": [{"similarity": similarity, **_judge(outcome, without)} for similarity, outcome in judges],
        "lengths": [{"tokens": length, **outcome.as_json()} for length, outcome in by_length.items()],
        "machine": machine(),
        "commit": commit(),
    }


def _judge(with_judge: Outcome, without: Outcome) -> dict[str, Any]:
    """With and without the judge, over all heads and over the heads where it changes the error most."""
    gains = sorted(
        zip(with_judge.errors, without.errors, strict=True), key=lambda pair: pair[1] - pair[0], reverse=True
    )
    hardest = gains[: max(1, round(_HARDEST * len(gains)))]
    return {
        "with": with_judge.as_json(),
        "without": without.as_json(),
        "hardest_heads": len(hardest),
        "hardest_l1_with": statistics.fmean(pair[0] for pair in hardest),
        "hardest_l1_without": statistics.fmean(pair[1] for pair in hardest),
    }


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    head = f"{'':24}{'density':>9}{'QK':>7}{'PV':>7}{'L1 mean':>9}{'median':>8}{'95th':>7}{'worst':>7}"
    head += f"{'cosine':>9}{'seconds':>9}"

    def line(name: str, row: dict[str, Any]) -> str:
        return (
            f"{name:24}{row['density']:9.3f}{row['qk_density']:7.3f}{row['pv_density']:7.3f}{row['l1_mean']:9.4f}"
            f"{row['l1_median']:8.4f}{row['l1_p95']:7.3f}{row['l1_worst']:7.3f}{row['cosine_median']:9.5f}{row['seconds']:9.2f}"
        )

    judges = result["judge"]
    return "\n".join(
        [
            f"{result['tokens']} tokens, all layers and heads of SmolLM2-135M, settings {result['settings']}",
            head,
            *(line(row["name"], row) for row in result["stages"]),
            line("both, judge off", judges[0]["without"]),
            *(line(f"both, similarity {judge['similarity']}", judge["with"]) for judge in judges),
            *(
                f"similarity {judge['similarity']}, the {judge['hardest_heads']} heads where it matters most: "
                f"L1 {judge['hardest_l1_with']:.3f} with, {judge['hardest_l1_without']:.3f} without"
                for judge in judges
            ),
            *(line(f"{row['tokens']} tokens", row) for row in result["lengths"]),
        ]
    )
