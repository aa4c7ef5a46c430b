"""What a profile holds for a layer: its settings, the steps they are for, and the evidence."""

from __future__ import annotations

from dataclasses import dataclass

from tamis.call import COMPENSATIONS, PRECISIONS
from tamis.predictors.base import Predictor


@dataclass(frozen=True)
class LayerSettings:
    """What one layer runs with: arguments of `sparse_attention`.

    Attributes:
        predictor: what chooses the blocks; None runs the layer dense.
        pv_threshold: one number, one per query head (inf = off for that head), or None = off.
        precision, compensate: as in `attend`.

    Raises:
        ValueError: precision or compensate is none that `attend` knows.
    """

    predictor: Predictor | None
    pv_threshold: float | tuple[float, ...] | None = None
    precision: str = "int8"
    compensate: str | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("precision", PRECISIONS), ("compensate", (None, *COMPENSATIONS))):
            if getattr(self, name) not in allowed:
                choices = ", ".join(map(repr, allowed))
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class Evidence:
    """What the settings of a layer did when they were evaluated; every list has one number per query head.

    Attributes:
        density: computed / visible block products, mean over the inputs.
        l1: relative L1 against dense attention in fp32, mean over the inputs.
        l1_worst: the largest over the inputs.
        samples: how many inputs.
        held_out_density, held_out_l1, held_out_l1_worst, held_out_samples: the same on inputs that tuning did not see.
    """

    density: tuple[float, ...]
    l1: tuple[float, ...]
    l1_worst: tuple[float, ...]
    samples: int
    held_out_density: tuple[float, ...] = ()
    held_out_l1: tuple[float, ...] = ()
    held_out_l1_worst: tuple[float, ...] = ()
    held_out_samples: int = 0


@dataclass(frozen=True)
class Stage:
    """Settings of a layer for the steps first .. last - 1 of a diffusion model; a language model has one step, 0.

    Attributes:
        last: None for all that follow.
    """

    settings: LayerSettings
    first: int = 0
    last: int | None = None
    evidence: Evidence | None = None
