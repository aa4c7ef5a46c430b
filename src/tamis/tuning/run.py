"""The three readings of a tuning run: what every candidate would cost, what the chosen ones do, what they do elsewhere.

survey   all candidates on all tuning inputs, from one pass over the blocks each      frontier.py
trial    the few that may be best, in the kernel, with every pv_threshold             evaluate.py
held     the settings chosen, on inputs that were not tuned on
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tamis.tuning.calls import LayerCall
from tamis.tuning.candidates import GRID, masks
from tamis.tuning.evaluate import Trial, evaluate
from tamis.tuning.frontier import frontier, sample_rows
from tamis.tuning.journal import Journal
from tamis.tuning.pool import Pool, open_pool
from tamis.tuning.sources import Source

Progress = Callable[[str, int, int], None]


class Place(NamedTuple):
    """A layer, and which of its ranges of steps."""

    layer: str
    stage: int


class Task(NamedTuple):
    """What is done with a call: a function and its further arguments."""

    function: Callable[..., dict[str, Any]]
    arguments: tuple[Any, ...]


Results = dict[Place, dict[str, Tensor]]


@dataclass
class Run:
    """A tuning run.

    Attributes:
        bounds: the steps at which a new stage starts, without 0.
        workers: as in `tune`; they are started when there is something to do, and stopped by `close`.
    """

    journal: Journal
    bounds: Sequence[int]
    workers: int | str
    progress: Progress | None
    _pool: Pool | None = None

    def close(self) -> None:
        """Stop the workers."""
        if self._pool is not None:
            self._pool.close()

    def read(self, phase: str, source: Source, task: Callable[[Place], Task | None], about: str = "") -> Results:
        """Do something with every call of every input; results stacked over the samples, by place.

        What the journal has is not done again, and a model does not run for an input that is complete.

        Args:
            about: what else the results depend on.
        """
        name = f"{phase} {about}"
        for number in range(len(source)):
            if f"{name}/{number}" not in self.journal:
                self._read_input(name, number, source, task)
            if self.progress is not None:
                self.progress(phase, number + 1, len(source))
        return self._collect(name, len(source))

    def _read_input(self, phase: str, number: int, source: Source, task: Callable[[Place], Task | None]) -> None:
        self._pool = pool = self._pool or open_pool(self.workers, self.journal.put)
        keys: list[list[Any]] = []

        def visit(call: LayerCall) -> None:
            place = Place(call.layer, self.stage(call.step))
            todo = task(place)
            if todo is None:
                return
            key = f"{phase}/{call.input}/{call.layer}/{call.step}/{call.batch}"
            keys.append([key, *place])
            if key not in self.journal:
                pool.submit(key, todo.function, call, *todo.arguments)

        source.visit(number, visit)
        pool.drain()
        self.journal.put(f"{phase}/{number}", keys)

    def _collect(self, phase: str, inputs: int) -> Results:
        samples: dict[Place, list[dict[str, Any]]] = {}
        for number in range(inputs):
            for key, layer, stage in self.journal[f"{phase}/{number}"]:
                samples.setdefault(Place(layer, stage), []).append(self.journal[key])
        return {
            place: {
                name: torch.stack([torch.tensor(sample[name], dtype=torch.float64) for sample in found])
                for name in found[0]
            }
            for place, found in samples.items()
        }

    def stage(self, step: int) -> int:
        """The stage of a step."""
        return sum(step >= bound for bound in self.bounds)


def survey(call: LayerCall, most_rows: int, backend: str | None) -> dict[str, Any]:
    """Error and density of every candidate of GRID, `[candidates, heads]`."""
    rows = sample_rows(call, most_rows)
    with torch.inference_mode():
        found = frontier(call, masks(call, GRID, rows, backend), rows)
    return {name: value.tolist() for name, value in found._asdict().items()}


def trial(call: LayerCall, trials: Sequence[Trial], precision: str, backend: str | None) -> dict[str, Any]:
    """Error and density of trials, `[trials, heads]`."""
    with torch.inference_mode():
        found = evaluate(call, trials, precision, backend)
    return {name: value.tolist() for name, value in found._asdict().items()}
