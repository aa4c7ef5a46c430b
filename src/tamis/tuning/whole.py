"""One error for the whole model: density goes where it spares the most error at the end.

To first order the output of the model moves by the sum over heads of J_h dO_h, where J_h is its derivative by what head
h hands over. With errors that know nothing of each other,

    E|dy|^2 = sum over heads of w_h e_h
    w_h = |J_h|^2 = E_r |J_h^T r|^2, r random signs
    e_h = mean square of dO_h

so one backward pass with random signs weighs every head. For a price p each head takes the setting with the least
density + p w_h e_h; p is then found by running the model, since first order and independence are only nearly true.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor

from tamis.profile import Profile
from tamis.tuning.candidates import DENSE, GRID, Candidate
from tamis.tuning.choose import priced
from tamis.tuning.decide import Decision, decide, stages
from tamis.tuning.evaluate import Trial
from tamis.tuning.run import Place, Results

_RUNGS = (16.0, 4.0, 1.0, 0.25, 0.0625)  # parts of the price that is expected to be right
_QUICK = 2  # inputs on which the price is looked for at first


class Scale(NamedTuple):
    """How a price is looked for: by this factor, its square, .., until it is between two, then to within `fine`."""

    factor: float
    fine: float


_WIDE = Scale(8.0, 1.03)  # from what first order expects
_NARROW = Scale(2.0, 1.1)  # from what holds on a few inputs
_UP, _DOWN = 1e40, 1e24  # no further


class Choices:
    """What each head can choose, and what it does choose at a price.

    Args:
        found: density and square of the choices, `[samples, choices, heads]`.
        weights: w_h / |y|^2 of every place, `[heads]`: harm is then a share of the output's square.

    Raises:
        ValueError: a head has no choice whose error is finite.
    """

    def __init__(self, found: Results, weights: Mapping[Place, Tensor]) -> None:
        self._density = {place: one["density"].mean(0) for place, one in found.items()}
        self._harm = {place: one["square"].mean(0) * weights[place] for place, one in found.items()}
        for place, harm in self._harm.items():
            if not bool(harm.isfinite().any(0).all()):
                raise ValueError(f"layer {place.layer}: no setting of a head has an error that is finite")

    def at(self, price: float) -> dict[Place, Tensor]:
        """The choice of every head, `[heads]`."""
        return {place: priced(self._density[place], harm, price) for place, harm in self._harm.items()}

    def expected(self, price: float) -> float:
        """The error at the end, by first order."""
        chosen = self.at(price)
        return math.sqrt(sum(float(harm.gather(0, chosen[place][None]).sum()) for place, harm in self._harm.items()))

    def expected_price(self, budget: float) -> float:
        """The least price at which the error is expected to be within a budget; the largest there is if none is."""
        low, high = 1e-6, 1e12
        for _ in range(60):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if self.expected(middle) > budget else (low, middle)
        return high


def rungs(surveyed: Results, weights: Mapping[Place, Tensor], budget: float) -> dict[Place, list[list[Candidate]]]:
    """What is worth running for each head, by the price at which the first-order error meets the budget.

    Args:
        surveyed: density and square of the candidates of GRID.
        weights: as in `Choices`.
        budget: the relative error of the output.
    """
    choices = Choices(surveyed, weights)
    price = choices.expected_price(budget)
    rows = [choices.at(price / step) for step in _RUNGS]
    return {
        place: [[*(GRID[int(row[place][head])] for row in rows), DENSE] for head in range(len(weights[place]))]
        for place in surveyed
    }


def settle(
    tried: Mapping[Place, Sequence[Trial]],
    outcome: Results,
    weights: Mapping[Place, Tensor],
    budget: float,
    end_errors: Callable[[Profile, int | None], list[float]],
    bounds: Sequence[int],
    precision: str,
) -> tuple[dict[Place, Decision], list[float]]:
    """The sparsest decisions whose error at the end, measured, stays within the budget: `likely_mean` over all inputs.

    The price is looked for on the first inputs, by their mean, and raised until all hold.

    Args:
        end_errors: the errors at the end of the model with a profile, on the first so many inputs, or all (None).

    Returns:
        The decisions, and their error on every input.

    Raises:
        ValueError: the budget cannot be reached.
    """
    choices = Choices(outcome, weights)
    known: dict[tuple[float, int | None], list[float]] = {}

    def decisions(price: float) -> dict[Place, Decision]:
        chosen = choices.at(price)
        return {place: decide(tried[place], chosen[place], found, precision) for place, found in outcome.items()}

    def holds(inputs: int | None, price: float) -> bool:
        if (price, inputs) not in known:
            known[price, inputs] = end_errors(Profile(stages(decisions(price), {}, bounds)), inputs)
        # Of two inputs the spread says nothing. An error that is not a number is within no budget.
        return (likely_mean if inputs is None else statistics.fmean)(known[price, inputs]) <= budget

    first, every = partial(holds, _QUICK), partial(holds, None)
    start = choices.expected_price(budget)
    price = _below(first, start, _WIDE) if first(start) else _above(first, start, _WIDE)
    price = None if price is None else _above(every, price, _NARROW)
    if price is None:
        hint = "give a larger one" if precision == "full" else "precision='full', or a larger one"
        raise ValueError(f"no settings in precision {precision!r} reach an error of {budget} at the end: {hint}")
    return decisions(price), known[price, None]


def likely_mean(errors: Sequence[float]) -> float:
    """Mean and one standard error of it: the mean over other inputs of the kind is below that five times in six."""
    mean, count = statistics.fmean(errors), len(errors)
    if count == 1:
        return mean
    return mean + math.sqrt(sum((error - mean) ** 2 for error in errors) / (count - 1) / count)


def _above(holds: Callable[[float], bool], start: float, scale: Scale) -> float | None:
    """The start if it holds, or else a price above it that does and is hardly larger than one that does not."""
    low, high, factor = start, start, scale.factor
    while not holds(high):
        if high > start * _UP:
            return None
        low, high, factor = high, high * factor, factor**2
    return _between(holds, low, high, scale)


def _below(holds: Callable[[float], bool], start: float, scale: Scale) -> float:
    """A price below the start that holds, and is hardly larger than one that does not."""
    low, high, factor = start / scale.factor, start, scale.factor
    while holds(low):
        if low < start / _DOWN:
            return low  # even the sparsest of what was tried is good enough
        factor **= 2
        low, high = low / factor, low
    return _between(holds, low, high, scale)


def _between(holds: Callable[[float], bool], low: float, high: float, scale: Scale) -> float:
    while high > low * scale.fine:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
