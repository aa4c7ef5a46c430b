"""How the defaults are chosen, on SmolLM2-135M and the demo's text, int8 included.

1. Every setting of a grid of `cdf`, `similarity` and `pv_threshold`: mean density and mean relative L1 over the 270
   heads at 4,096 tokens.
2. Those inside the L1 budget, sparsest first, read three parts of the text of 8,192 tokens each until one keeps all
   three perplexities inside their budget: that one is chosen. A setting that fails also rules out those that are
   sparser in every respect. A mean error over heads says little about the few heads on which a prediction rests;
   perplexity does.

The judge of similarity stays on: turned off it would save a little here, and cost a lot on the heads it is meant for.
Every figure is written when it is measured, and a later run continues there.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tamis.bench.layers import Layer, evaluate, language_layers
from tamis.bench.record import commit, write
from tamis.demo.language import backbone, perplexity
from tamis.demo.machine import machine
from tamis.demo.measure import Settings
from tamis.demo.models import encode, load_language_model
from tamis.demo.passes import applied
from tamis.demo.progress import Progress
from tamis.demo.text import default_text
from tamis.predictors.sparge import Sparge

CDF = (0.97, 0.98, 0.985, 0.99, 0.993, 0.995, 0.997, 0.998)
SIMILARITY = (0.1, 0.2, 0.3, 0.4)
PV_THRESHOLD = (3.0, 3.5, 4.0, 5.0, 6.0, 8.0, 12.0, None)
L1_BUDGET = 0.08
PERPLEXITY_BUDGET = 0.005  # half of what the demo allows, which leaves room for other texts
TOKENS, PERPLEXITY_TOKENS = 4096, 8192
STARTS = (0, 30000, 70000)  # of the three parts, in tokens; the first is what the demo reads

Row = dict[str, Any]
Choice = tuple[float, float, float | None]  # cdf, similarity, pv_threshold


class Study:
    """The measurements of one file, old and new."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[Choice, Row] = {}
        self.dense: list[float] = []
        self.chosen: Row | None = None
        self._layers: list[Layer] = []
        self._reader: Callable[[Settings | None, int], float] | None = None
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            self.rows = {(row["cdf"], row["similarity"], row["pv_threshold"]): row for row in found["rows"]}
            self.dense = found["perplexity_dense"]

    def errors(self, choice: Choice) -> Row:
        """Densities and relative L1 over all heads."""
        if choice not in self.rows:
            self._layers = self._layers or language_layers(TOKENS)
            names = dict(zip(("cdf", "similarity", "pv_threshold"), choice, strict=True))
            self.rows[choice] = {**names, **evaluate(self._layers, _settings(choice)).as_json(), "perplexity": None}
            self.save()
        return self.rows[choice]

    def perplexity_change(self, choice: Choice) -> float:
        """The largest of sparse perplexity / dense perplexity - 1 over the parts, read until one is over the budget."""
        reader = self._reader = self._reader or _reader()
        self.dense = self.dense or [reader(None, start) for start in STARTS]
        row = self.rows[choice]
        row["perplexity"] = row["perplexity"] or []
        for start in STARTS[len(row["perplexity"]) :]:
            if row["perplexity"] and _change(row, self.dense) > PERPLEXITY_BUDGET:
                break
            row["perplexity"].append(reader(_settings(choice), start))
            self.save()
        return _change(row, self.dense)

    def save(self) -> None:
        """Write everything known so far."""
        write(self.path, self.as_json())

    def as_json(self) -> dict[str, Any]:
        """Plain values, sparsest settings first."""
        return {
            "tokens": TOKENS,
            "l1_budget": L1_BUDGET,
            "perplexity_tokens": PERPLEXITY_TOKENS,
            "perplexity_budget": PERPLEXITY_BUDGET,
            "perplexity_starts": STARTS,
            "perplexity_dense": self.dense,
            "chosen": self.chosen,
            "machine": machine(),
            "commit": commit(),
            "rows": sorted(self.rows.values(), key=_density),
        }


def run(path: Path) -> dict[str, Any]:
    """Measure what is missing in the file and return the whole result.

    Raises:
        RuntimeError: no setting stays in both budgets.
    """
    study = Study(path)
    grid: list[Choice] = list(itertools.product(CDF, SIMILARITY, PV_THRESHOLD))
    with Progress(len(grid), "density and error") as progress:
        for choice in grid:
            study.errors(choice)
            progress.advance()
    failed: list[Choice] = []
    inside = [choice for choice in grid if study.rows[choice]["l1_mean"] <= L1_BUDGET]
    for choice in sorted(inside, key=lambda choice: _density(study.rows[choice])):
        if any(_sparser(choice, other) for other in failed):
            continue
        # Without stage 2 the same prediction keeps the most: if that fails, no threshold helps.
        ceiling: Choice = (*choice[:2], None)
        broken = next((row for row in (ceiling, choice) if study.perplexity_change(row) > PERPLEXITY_BUDGET), None)
        if broken is None:
            study.chosen = study.rows[choice]
            study.save()
            return study.as_json()
        failed.append(broken)
    raise RuntimeError(f"no setting has relative L1 within {L1_BUDGET} and perplexity within {PERPLEXITY_BUDGET:.1%}")


def _sparser(choice: Choice, other: Choice) -> bool:
    """Whether no setting of a choice keeps more than the other's."""
    return all((a or math.inf) <= (b or math.inf) for a, b in zip(choice, other, strict=True))


def _change(row: Row, dense: list[float]) -> float:
    return max(float(sparse) / part - 1 for sparse, part in zip(row["perplexity"], dense, strict=False))


def _reader() -> Callable[[Settings | None, int], float]:
    """A function that reads the part of the text from a start, dense without settings, and returns the perplexity."""
    model, tokenizer, _ = load_language_model(None)
    text = encode(tokenizer, default_text(), max(STARTS) + PERPLEXITY_TOKENS)

    def read(settings: Settings | None, start: int) -> float:
        ids = text[:, start : start + PERPLEXITY_TOKENS]
        if settings is None:
            hidden = backbone(model, ids)
        else:
            with applied(model, settings):
                hidden = backbone(model, ids)
        with torch.inference_mode():
            return perplexity(model, hidden, ids, "perplexity")

    return read


def _settings(choice: Choice) -> Settings:
    cdf, similarity, threshold = choice
    return Settings(Sparge(cdf=cdf, similarity=similarity), threshold)


def _density(row: Row) -> float:
    return float(row["density"])


def table(result: dict[str, Any]) -> str:
    """The settings whose perplexity was measured, as text; the last one is the choice."""
    dense = result["perplexity_dense"]
    head = (
        f"{'cdf':>6}{'similarity':>12}{'pv':>6}{'density':>9}{'L1 mean':>9}{'median':>8}{'95th':>7}{'worst':>7}"
        f"{'perplexity':>12}{'change':>9}"
    )
    lines = [
        f"{len(result['rows'])} settings; density and relative L1 at {result['tokens']} tokens, perplexity at "
        f"{result['perplexity_tokens']} (dense {', '.join(f'{part:.4f}' for part in dense)})",
        head,
    ]
    for row in result["rows"]:
        if row["perplexity"] is not None:
            threshold = "-" if row["pv_threshold"] is None else f"{row['pv_threshold']:g}"
            lines.append(
                f"{row['cdf']:6g}{row['similarity']:12g}{threshold:>6}{row['density']:9.4f}{row['l1_mean']:9.4f}"
                f"{row['l1_median']:8.4f}{row['l1_p95']:7.3f}{row['l1_worst']:7.3f}{row['perplexity'][0]:12.4f}"
                f"{_change(row, dense):+9.2%}"
            )
    if (chosen := result["chosen"]) is not None:
        lines.append(
            f"chosen: cdf={chosen['cdf']:g}, similarity={chosen['similarity']:g}, pv_threshold={chosen['pv_threshold']}"
        )
    return "\n".join(lines)
