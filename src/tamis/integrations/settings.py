"""Settings that are the same for all attention calls, from the arguments of a public function."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from tamis.attend import DEFAULT_PV_THRESHOLD
from tamis.backends.base import BACKENDS
from tamis.call import SMALLEST, PerHead
from tamis.predictors.base import Predictor
from tamis.predictors.sparge import Sparge
from tamis.profile import LayerSettings, Profile


def uniform(
    predictor: Predictor | None,
    precision: str | None,
    pv_threshold: PerHead | str | None,
    compensate: str | None,
) -> LayerSettings:
    """The same settings for every layer; None and "default" stand for the defaults.

    Raises:
        TypeError: `predictor` is none.
        ValueError: `pv_threshold` is another word, or not above 0.
    """
    if predictor is not None:
        check_predictor(predictor)
    if isinstance(pv_threshold, str) and pv_threshold != "default":
        raise ValueError(f"pv_threshold must be a number, one per head, None or 'default', got {pv_threshold!r}")
    threshold = _plain(pv_threshold)
    numbers = threshold if isinstance(threshold, tuple) else () if threshold is None else (threshold,)
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise TypeError(f"pv_threshold must be a number, one per head, None or 'default', got {number!r}")
        if not number >= SMALLEST:
            raise ValueError(f"pv_threshold must be > 0 (None turns it off), got {number}")
    return LayerSettings(
        Sparge() if predictor is None else predictor,
        pv_threshold=threshold,
        precision="int8" if precision is None else precision,
        compensate=compensate,
    )


def check_predictor(predictor: object, name: str = "predictor") -> None:
    """Raise unless it is a predictor; a profile is none here."""
    if isinstance(predictor, (str, Path)):
        raise TypeError(f"{name} must be a predictor, got a path: tamis.Profile.load({str(predictor)!r})")
    if isinstance(predictor, type):
        raise TypeError(f"{name} must be an object such as {predictor.__name__}(), got the class {predictor.__name__}")
    if isinstance(predictor, Profile) or not callable(predictor):
        raise TypeError(f"{name} must be a predictor such as Sparge(), got {type(predictor).__name__}")


def check_backend(backend: object) -> None:
    """Raise unless it is the name of a backend, or None."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None, got {backend!r}")


def check_min_queries(min_queries: object) -> None:
    """Raise unless it is a number of queries or "auto"."""
    if min_queries == "auto":
        return
    if isinstance(min_queries, bool) or not isinstance(min_queries, int):
        raise TypeError(f"min_queries must be an integer or 'auto', got {min_queries!r}")
    if min_queries < 1:
        raise ValueError(f"min_queries must be at least 1, got {min_queries}")


def _plain(pv_threshold: Any) -> float | tuple[float, ...] | None:
    """As settings hold it."""
    if isinstance(pv_threshold, str):
        return DEFAULT_PV_THRESHOLD
    if isinstance(pv_threshold, Tensor):
        pv_threshold = pv_threshold.tolist()
    return tuple(pv_threshold) if isinstance(pv_threshold, Sequence) else pv_threshold
