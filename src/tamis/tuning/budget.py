"""What error is accepted: of every head, or at the end of the model."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """The error that is accepted.

    Args:
        l1: relative L1 of every head by its mask, on every tuning input; .08 if nothing is given.
        pv_l1: the same with stage 2 on top; 1.125 * l1 if it is not given.
        end_l1: instead of both: relative L1 of the model's output, mean over the inputs and one standard error of it.
        end_perplexity: instead of all: relative change of a language model's perplexity, the same mean.
    """

    l1: float | None = None
    pv_l1: float | None = None
    end_l1: float | None = None
    end_perplexity: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be above 0, got {value}")
        if self.end_l1 is not None and self.end_perplexity is not None:
            raise ValueError("end_l1 and end_perplexity exclude each other: give one")
        if self.end is not None:
            if self.l1 is not None or self.pv_l1 is not None:
                raise ValueError(f"l1 and pv_l1 bound every head, end_{self.end[0]} stands instead of them: give one")
        elif self.heads[1] < self.heads[0]:
            raise ValueError(f"pv_l1 must be at least l1: it counts what stage 2 adds, got {self.heads[::-1]}")

    @property
    def heads(self) -> tuple[float, float]:
        """l1 and pv_l1."""
        l1 = 0.08 if self.l1 is None else self.l1
        return l1, 1.125 * l1 if self.pv_l1 is None else self.pv_l1

    @property
    def end(self) -> tuple[str, float] | None:
        """Metric and size of a budget for the end of the model."""
        if self.end_l1 is not None:
            return "l1", self.end_l1
        return None if self.end_perplexity is None else ("perplexity", self.end_perplexity)

    def as_json(self) -> dict[str, float]:
        """Those that count, by name."""
        if self.end is not None:
            return {f"end_{self.end[0]}": self.end[1]}
        return dict(zip(("l1", "pv_l1"), self.heads, strict=True))
