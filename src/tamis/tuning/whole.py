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
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from tamis.profile import Profile
from tamis.tuning.candidates import DENSE, GRID, Candidate
from tamis.tuning.choose import priced
from tamis.tuning.decide import Decision, decide, stages
from tamis.tuning.evaluate import Trial
from tamis.tuning.run import Place, Results

_RUNGS = (16.0, 4.0, 1.0, 0.25, 0.0625)  # prices around the one that is expected to be right
_DOUBLINGS = 12  # the price is looked for within 2^12 of that
_HALVINGS = 6


def rungs(surveyed: Results, weights: Mapping[Place, Tensor], budget: float) -> dict[Place, list[list[Candidate]]]:
    """What is worth running for each head, by the price at which the first-order error meets the budget.

    Args:
        surveyed: density and square of the candidates of GRID.
        weights: w_h / |y|^2 of every place, `[heads]`: harm is then a share of the output's square.
        budget: the relative error of the output.
    """
    density = {place: found["density"].mean(0) for place, found in surveyed.items()}
    harm = {place: found["square"].mean(0) * weights[place] for place, found in surveyed.items()}

    def expected(price: float) -> float:
        total = sum(
            float(harm[place].gather(0, priced(density[place], harm[place], price)[None]).sum()) for place in surveyed
        )
        return math.sqrt(total)

    low, high = 1e-6, 1e12
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if expected(middle) > budget else (low, middle)
    found: dict[Place, list[list[Candidate]]] = {}
    for place in surveyed:
        rows = [priced(density[place], harm[place], high / step).tolist() for step in _RUNGS]
        found[place] = [[*(GRID[row[head]] for row in rows), DENSE] for head in range(density[place].shape[1])]
    return found


def settle(
    tried: Mapping[Place, Sequence[Trial]],
    outcome: Results,
    weights: Mapping[Place, Tensor],
    budget: float,
    end_error: Callable[[Profile], float],
    bounds: Sequence[int],
    precision: str,
) -> dict[Place, Decision]:
    """The sparsest decisions whose error at the end, measured, stays within the budget.

    Args:
        end_error: the error at the end of the model with a profile.
    """
    density = {place: found["density"].mean(0) for place, found in outcome.items()}
    harm = {place: found["square"].mean(0) * weights[place] for place, found in outcome.items()}

    def decisions(price: float) -> dict[Place, Decision]:
        return {
            place: decide(tried[place], priced(density[place], harm[place], price), found, precision)
            for place, found in outcome.items()
        }

    def error(price: float) -> float:
        return end_error(Profile(stages(decisions(price), {}, bounds)))

    # A rough root by first order, then by running.
    total = {price: _expected(density, harm, price) for price in (10.0**k for k in range(-4, 12))}
    start = min((price for price in total if total[price] <= budget), default=max(total))
    low, high = start, start
    while error(high) > budget:
        low, high = high, high * 8
        if high > start * 8.0**_DOUBLINGS:
            raise ValueError(f"no settings reach an error of {budget} at the end in this precision: use 'full'")
    while low == high or error(low) <= budget:
        high, low = low, low / 8
        if low < start / 8.0**_DOUBLINGS:
            return decisions(high)  # even the sparsest of what was tried is good enough
    for _ in range(_HALVINGS):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if error(middle) > budget else (low, middle)
    return decisions(high)


def _expected(density: Mapping[Place, Tensor], harm: Mapping[Place, Tensor], price: float) -> float:
    chosen = (harm[place].gather(0, priced(density[place], harm[place], price)[None]) for place in density)
    return math.sqrt(sum(float(part.sum()) for part in chosen))
