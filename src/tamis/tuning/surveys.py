"""What a tuning run's survey found, read back from its journal: error and density of every candidate everywhere."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tamis.tuning import journal
from tamis.tuning.candidates import Candidate
from tamis.tuning.run import Place

_PHASE = "survey "  # as `Run.read` names it: the phase, and what else its results depend on, which is nothing
_NAMES = ("l1", "square", "density")


class Surveys(NamedTuple):
    """A survey.

    Attributes:
        grid: the candidates.
        bounds: the steps at which a new stage starts, without 0.
        found: l1, square and density by layer and stage (`Place`), float64 `[samples, candidates, heads]`.
        run: tells the run, as in the profiles that came from it.
    """

    grid: tuple[Candidate, ...]
    bounds: tuple[int, ...]
    found: Mapping[tuple[str, int], Mapping[str, Tensor]]
    run: str = ""


def read(path: str | Path) -> Surveys:
    """Read the survey of a journal, the file of `tamis tune --resume`; of a run that goes on, the inputs it has done.

    Raises:
        ValueError: the file is no journal, is damaged, or holds no input's survey; the message names it.
        OSError: it cannot be read.
    """
    path = Path(path)
    head, entries = journal.read(path, _PHASE)
    try:
        grid = tuple(Candidate(*map(float, row)) for row in head["grid"])
        samples: dict[Place, list[dict[str, Tensor]]] = {}
        for number in itertools.takewhile(lambda n: f"{_PHASE}/{n}" in entries, itertools.count()):
            for key, layer, stage in entries[f"{_PHASE}/{number}"]:
                samples.setdefault(Place(layer, stage), []).append(_arrays(entries[key], len(grid)))
        found: dict[tuple[str, int], dict[str, Tensor]] = {
            place: {name: torch.stack([sample[name] for sample in taken]) for name in _NAMES}
            for place, taken in samples.items()
        }
        bounds = tuple(map(int, head["steps"]))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is a journal whose survey cannot be read: {error}") from error
    if not found:
        raise ValueError(f"{path} holds no input's survey: let `tamis tune` finish")
    return Surveys(grid, bounds, found, journal.fingerprint(head))


def _arrays(found: Mapping[str, Any], candidates: int) -> dict[str, Tensor]:
    """The arrays of one call, float64 `[candidates, heads]`."""
    arrays = {name: torch.tensor(found[name], dtype=torch.float64) for name in _NAMES}
    for name, array in arrays.items():
        if array.ndim != 2 or array.shape[0] != candidates or not bool(array.isfinite().all()):
            raise ValueError(
                f"{name} must be numbers for {candidates} candidates and every head, got {list(array.shape)}"
            )
    return arrays
