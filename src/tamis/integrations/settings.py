"""Settings that are the same for all attention calls, from the arguments of a public function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tamis.attend import DEFAULT_PV_THRESHOLD
from tamis.call import PerHead
from tamis.predictors.base import Predictor
from tamis.predictors.sparge import Sparge
from tamis.profile import LayerSettings


def uniform(
    predictor: Predictor | None,
    precision: str | None,
    pv_threshold: PerHead | str | None,
    compensate: str | None,
) -> LayerSettings:
    """The same settings for every layer; None and "default" stand for the defaults.

    Raises:
        ValueError: `pv_threshold` is another word.
    """
    if isinstance(pv_threshold, str) and pv_threshold != "default":
        raise ValueError(f"pv_threshold must be a number, one per head, None or 'default', got {pv_threshold!r}")
    return LayerSettings(
        Sparge() if predictor is None else predictor,
        pv_threshold=_plain(pv_threshold),
        precision="int8" if precision is None else precision,
        compensate=compensate,
    )


def check_min_queries(min_queries: object) -> None:
    """Raise unless it is a number of queries or "auto"."""
    if min_queries == "auto":
        return
    if isinstance(min_queries, bool) or not isinstance(min_queries, int):
        raise TypeError(f"min_queries must be an integer or 'auto', got {min_queries!r}")
    if min_queries < 1:
        raise ValueError(f"min_queries must be at least 1, got {min_queries}")


def _plain(pv_threshold: Any) -> float | tuple[float, ...] | None:
    """As settings hold it; what is no threshold `attend` refuses."""
    if isinstance(pv_threshold, str):
        return DEFAULT_PV_THRESHOLD
    if isinstance(pv_threshold, Tensor):
        pv_threshold = pv_threshold.tolist()
    return tuple(pv_threshold) if isinstance(pv_threshold, Sequence) else pv_threshold
