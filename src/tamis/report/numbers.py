"""Numbers as a reader wants them: short, with units, and honest about NaN, infinity and what is missing.

Every function takes whatever a result may hold and never raises; `finite` is the one gate between data and drawing.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

TIMES = "\N{MULTIPLICATION SIGN}"
MISSING = "not measured"
SAME = 0.01  # two speeds this close, as a share, are called the same


def finite(value: object) -> float | None:
    """The value as a float if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:  # an int beyond any float
        return None
    return number if math.isfinite(number) else None


def finite_only(values: Iterable[object]) -> list[float]:
    return [number for value in values if (number := finite(value)) is not None]


def median(values: Iterable[object]) -> float | None:
    numbers = finite_only(values)
    return statistics.median(numbers) if numbers else None


def mean(values: Iterable[object]) -> float | None:
    numbers = finite_only(values)
    return math.fsum(number / len(numbers) for number in numbers) if numbers else None


def odd(value: object) -> str:
    """How to write what is no finite number."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "-∞"
    return MISSING if value is None else str(value)


def plain(value: object, digits: int = 3) -> str:
    """Three significant digits without an exponent where that is readable: 0.0283, 12.3, 1,540."""
    number = finite(value)
    if number is None:
        return odd(value)
    if number == 0:
        return "0"
    if not 1e-4 <= abs(number) < 1e7:
        return f"{number:.{digits - 1}e}"
    places = max(0, digits - 1 - math.floor(math.log10(abs(number))))
    return f"{number:,.{places}f}"


def unit(value: object) -> str:
    """A number of [0, 1], such as a density, to three places: columns of them stay comparable."""
    number = finite(value)
    return odd(value) if number is None else f"{number:.3f}"


def count(value: object) -> str:
    number = finite(value)
    return odd(value) if number is None else f"{number:,.0f}"


def seconds(value: object) -> str:
    number = finite(value)
    if number is None:
        return odd(value)
    if number >= 120:
        minutes, rest = divmod(round(number), 60)
        return f"{minutes:,} min {rest} s"
    if number >= 1 or number <= 0:
        return f"{plain(number)} s"
    return f"{plain(number * 1e3)} ms" if number >= 1e-3 else f"{plain(number * 1e6)} µs"


def percent(value: object) -> str:
    number = finite(value)
    return odd(value) if number is None else f"{100 * number:.0f}%" if abs(number) >= 0.1 else f"{100 * number:.1f}%"


def change(before: object, after: object) -> str | None:
    """The relative change with its sign: +0.31%."""
    old, new = finite(before), finite(after)
    if old is None or new is None or old == 0:
        return None
    return f"{100 * (new - old) / abs(old):+.2f}%"


def speedup(part: Mapping[str, Any], what: str) -> float | None:
    """How many times faster sparse was: the ratio of the result, or of its two times."""
    given = finite(part.get(f"{what}_ratio"))
    if given is not None:
        return given
    dense, sparse = finite(part.get(f"{what}_seconds_dense")), finite(part.get(f"{what}_seconds_sparse"))
    return dense / sparse if dense is not None and sparse else None


def faster(ratio: object) -> str:
    """A ratio in words, slower said as plainly as faster."""
    number = finite(ratio)
    if number is None or number <= 0:
        return odd(ratio)
    if abs(number - 1) < SAME:
        return "the same speed"
    return f"{plain(number)}{TIMES} faster" if number > 1 else f"{plain(1 / number)}{TIMES} slower"
