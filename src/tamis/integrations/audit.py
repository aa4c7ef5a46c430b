"""The error of sparse attention while a model is used, estimated from a random sample of its rows.

Per layer the audit estimates R = sum|O - O'| / sum|O| over all sparse calls, where O' is what the model got and O dense
attention in fp32. Both sums are estimated from the rows that `rows.draw` chose, weighted by w, the inverse of how often
a row is drawn, and R by their ratio. With e = y - R x for the sampled row sums y of |O - O'| and x of |O|, the variance
of the ratio is by linearisation that of the weighted sum of e, over (sum x)^2 (Cochran, Sampling Techniques, 3rd
edition, 6.4). It has two parts:

    within calls:   sum (w e1 - w e2)^2 over strata, of each of which two independent rows are drawn (5A.12), times p
    between calls:  sum (sum w e)^2 over calls, times (1 - p) n / (n - 1)

where p is the probability with which a call was audited, and n the number of audited calls of p < 1. Each part of m
squares v has 3 (sum v)^2 / sum v^2 - 2 degrees of freedom, which is m on average if the squares are alike and less if a
few rule; between calls n - 1 at most. Satterthwaite's rule (5.4) joins them for Student's t.
"""

from __future__ import annotations

import math
import secrets
import statistics
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tamis.integrations import rows
from tamis.integrations.request import Request

# Chance of a false alarm, over all looks at a layer together; also what an interval of 95% leaves out on each side.
TAIL = 0.025


@dataclass(frozen=True)
class LayerAudit:
    """What an audit knows of one layer.

    Attributes:
        estimate: relative L1 error, sum|O - O'| / sum|O|, over all sparse calls of the layer; NaN while no row was
            sampled.
        low, high: its 95% confidence interval; 0 and inf while there are too few rows to say.
        rows: sampled rows, counted per head.
        calls: sparse calls of the layer; audited: those of which rows were sampled.
        share: work of the audit / work of dense attention in these calls, in pairs of a query and a key.
        nonfinite: sampled rows in which tamis returned infinity or NaN and dense attention does not.
        undefined: sampled rows whose dense attention is not finite. Both are left out of the estimate.
        exceeded: whether the budget was found to be exceeded.
    """

    estimate: float
    low: float
    high: float
    rows: int
    calls: int
    audited: int
    share: float
    nonfinite: int
    undefined: int
    exceeded: bool


@dataclass(frozen=True)
class Audit:
    """How much of a model's sparse attention is checked while it is used, and what happens if its error is too large.

    Args:
        share: mean work of the audit as a share of dense attention's, in (0, 1]. Work is multiplied pairs of a query
            and a key, including those that are multiplied and then masked.
        budget: relative L1 error that a layer may have. It is looked at after 1, 2, 4, 8, .. audited calls of a layer.
        seed: of the sample; equal calls with equal seeds have equal samples. None draws another seed for every handle,
            so that many short lives of a model do not look at the same rows again and again.
        on_exceeded: called once per layer, with its name and its `LayerAudit`, when its error exceeds the budget, or
            when its output is not finite where dense attention is; a warning by default. Where the interval holds, the
            chance that a layer within the budget is ever reported is at most 2.5%, however long it is used (the n-th
            look has a share of 1 / (n (n + 1)) in it).

    Rows are drawn with equal chances, and the interval is Student's. It does not hold where less than a row in a
    hundred carries most of sum|O| and few rows were sampled: a sample that misses those rows knows nothing of them.

    Raises:
        TypeError, ValueError: a setting is out of its range.

    Example:
        >>> from tamis.integrations.audit import Audit
        >>> Audit(share=0.01, on_exceeded=lambda layer, audit: print(layer, audit.estimate)).budget
        0.08
    """

    share: float = 0.005
    budget: float = 0.08
    seed: int | None = None
    on_exceeded: Callable[[str, LayerAudit], object] | None = None

    def __post_init__(self) -> None:
        for name in ("share", "budget"):
            number = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                raise TypeError(f"{name} must be a number, got {type(number).__name__}")
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be in (0, 1], got {self.share}")
        if not self.budget > 0:
            raise ValueError(f"budget must be > 0, got {self.budget}")
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int)):
            raise TypeError(f"seed must be an integer or None, got {type(self.seed).__name__}")
        if self.on_exceeded is not None and not callable(self.on_exceeded):
            raise TypeError(f"on_exceeded must be callable or None, got {type(self.on_exceeded).__name__}")


class Auditor:
    """Keeps the samples of all layers of a model."""

    def __init__(self, settings: Audit) -> None:
        self.settings = settings
        self._seed = secrets.randbits(32) if settings.seed is None else settings.seed
        self._layers: dict[str, _Layer] = {}

    def look(self, request: Request, output: Tensor) -> None:
        """Sample a sparse call: what was asked for, and what the model gets, `[batch, heads, q_len, value_dim]`."""
        layer = self._layers.get(request.layer)
        if layer is None:
            layer = self._layers[request.layer] = _Layer(self._generator(request.layer))
        shape, batch = rows.Shape.of(request), request.query.shape[0]
        layer.calls += 1
        layer.dense_work += shape.work * shape.heads
        drawn = rows.draw(shape, batch, self.settings.share, layer.generator) if shape.heads else None
        if drawn is None:
            return
        places, probability = drawn
        layer.audited += 1
        layer.rows += places.numel()
        layer.work += shape.cost(places.shape[2]) * shape.heads
        layer.add(_sums(request, output, places.to(output.device)), shape.q_len, probability)
        if layer.audited.bit_count() == 1 and not layer.exceeded:
            self._judge(request.layer, layer)

    def report(self) -> dict[str, LayerAudit]:
        """What is known, by layer. Waits for the device."""
        return {name: layer.summary() for name, layer in self._layers.items()}

    def reset(self) -> None:
        """Forget all samples and start again: from the seed, or without one with another."""
        self._layers.clear()
        if self.settings.seed is None:
            self._seed = secrets.randbits(32)

    def _generator(self, layer: str) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(f"{self._seed}/{layer}".encode()))

    def _judge(self, name: str, layer: _Layer) -> None:
        look = layer.audited.bit_length()
        summary = layer.summary(TAIL / (look * (look + 1)))
        if summary.low <= self.settings.budget and not summary.nonfinite:
            return
        layer.exceeded = True
        summary = layer.summary()
        if self.settings.on_exceeded is not None:
            self.settings.on_exceeded(name, summary)
        elif summary.nonfinite:
            warnings.warn(f"{name}: {summary.nonfinite} of {summary.rows} audited rows are not finite", stacklevel=2)
        else:
            warnings.warn(
                f"{name}: relative L1 error {summary.estimate:.3g} (95% interval {summary.low:.3g} to "
                f"{summary.high:.3g}) exceeds the budget of {self.settings.budget:.3g}: run this layer with a higher "
                "density, or dense",
                stacklevel=2,
            )


def _sums(request: Request, output: Tensor, places: Tensor) -> Tensor:
    """Of every sampled row sum|O - O'|, sum|O|, and whether it is (not finite in O' only, in O), fp64
    `[4, batch, heads, pairs, 2]`."""
    truth = rows.exact(request, places)
    found = output.detach().take_along_dim(places.flatten(2)[..., None], 2).float().reshape(truth.shape)
    undefined = ~truth.isfinite().all(-1)
    nonfinite = ~found.isfinite().all(-1) & ~undefined
    error, size = (truth - found).abs().sum(-1).double(), truth.abs().sum(-1).double()
    left_out = undefined | nonfinite
    return torch.stack(
        [error.masked_fill(left_out, 0), size.masked_fill(left_out, 0), nonfinite.double(), undefined.double()]
    )


# What `_Layer.totals` holds: two sums, two counts, and for the contrasts within calls and between calls, which are
# a - R b, the sums of a^(n - i) b^i for n = 2 and 4.
_SIZES = (2, 2, 3, 5, 3, 5)


@dataclass
class _Layer:
    """Running totals of one layer, in fp64 on the layer's device: adding to them does not wait for it."""

    generator: torch.Generator
    calls: int = 0
    audited: int = 0
    chosen: int = 0
    rows: int = 0
    work: int = 0
    dense_work: int = 0
    exceeded: bool = False
    totals: Tensor = field(default_factory=lambda: torch.zeros(sum(_SIZES), dtype=torch.float64))

    def add(self, sums: Tensor, q_len: int, probability: float) -> None:
        """Add the sampled rows of one call, as `_sums` returns them, which was chosen with a probability."""
        self.chosen += probability < 1
        weighted = sums[:2] * (q_len / (2 * sums.shape[3] * probability))
        total = weighted.flatten(1).sum(1)
        inside = (weighted[..., 0] - weighted[..., 1]).flatten(1) * math.sqrt(probability)
        between = total[:, None] * math.sqrt(1 - probability)
        new = [total, sums[2:].flatten(1).sum(1)]
        for a, b in (inside, between):
            for degree in (2, 4):
                new.append(torch.stack([(a ** (degree - i) * b**i).sum() for i in range(degree + 1)]))
        # Not in place: this may run inside or outside of inference mode.
        self.totals = self.totals.to(sums.device) + torch.cat(new)

    def summary(self, tail: float = TAIL) -> LayerAudit:
        """The estimate and its interval, which leaves out `tail` on each side."""
        (error, size), (nonfinite, undefined), *squares = (
            part.tolist() for part in torch.split(self.totals, list(_SIZES))
        )
        estimate = error / size if size > 0 else 0.0 if self.rows else math.nan
        parts = [_expand(part, estimate) for part in squares]
        half = _half_width(parts, self.chosen, tail) / size if size > 0 else math.inf
        return LayerAudit(
            estimate=estimate,
            low=max(0.0, estimate - half) if self.rows else 0.0,
            high=estimate + half if self.rows else math.inf,
            rows=self.rows,
            calls=self.calls,
            audited=self.audited,
            share=self.work / self.dense_work if self.dense_work else 0.0,
            nonfinite=int(nonfinite),
            undefined=int(undefined),
            exceeded=self.exceeded,
        )


def _expand(sums: list[float], ratio: float) -> float:
    """Sum of (a - ratio * b)^n from the sums of a^(n - i) b^i."""
    degree = len(sums) - 1
    return max(0.0, sum(math.comb(degree, i) * (-ratio) ** i * item for i, item in enumerate(sums)))


def _half_width(parts: list[float], chosen: int, tail: float) -> float:
    """Half of Student's interval for the sum of e; inf if fewer than two degrees of freedom are left to judge by.

    Args:
        parts: sums of squares and of fourth powers within calls, then between calls.
        chosen: number of audited calls that might not have been.
    """
    if chosen == 1:
        return math.inf
    variance, spread = 0.0, 0.0
    for (second, fourth), factor, most in (
        (parts[:2], 1.0, math.inf),
        (parts[2:], chosen / max(chosen - 1, 1), chosen - 1),
    ):
        if fourth > 0:
            freedom = min(3 * second**2 / fourth - 2, most)
            variance += factor * second
            spread += (factor * second) ** 2 / freedom
    if spread == 0 or variance**2 / spread < 2:
        return math.inf
    return _student(tail, variance**2 / spread) * math.sqrt(variance)


def _student(tail: float, freedom: float) -> float:
    """What Student's t exceeds with a probability of `tail` (Abramowitz and Stegun 26.7.5; at two degrees of freedom
    .8% too small for a tail of .025)."""
    z = statistics.NormalDist().inv_cdf(1 - tail)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))
