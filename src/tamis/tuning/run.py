"""The three readings of a tuning run: what every candidate would cost, what the chosen ones do, what they do elsewhere.

survey   all candidates on all tuning inputs, from one pass over the blocks each      frontier.py
trial    the few that may be best, in the kernel, with every pv_threshold             evaluate.py
held     the settings chosen, on inputs that were not tuned on
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tamis.tuning.calls import LayerCall
from tamis.tuning.candidates import GRID, masks
from tamis.tuning.evaluate import Trial, evaluate
from tamis.tuning.frontier import frontier, sample_rows
from tamis.tuning.identity import of_settings
from tamis.tuning.journal import Journal
from tamis.tuning.pool import Pool, open_pool
from tamis.tuning.sources import Source

Progress = Callable[[str, int, int, str], None]
_TELL_SECONDS = 3.0


class Place(NamedTuple):
    """A layer, and which of its ranges of steps."""

    layer: str
    stage: int


class Task(NamedTuple):
    """What is done with a call: a function and its further arguments, which are plain."""

    function: Callable[..., dict[str, Any]]
    arguments: tuple[Any, ...]


Results = dict[Place, dict[str, Tensor]]


@dataclass
class Run:
    """A tuning run.

    Attributes:
        bounds: the steps at which a new stage starts, without 0.
        calls_per_step: how often a layer is called in one step.
        workers: as in `tune`; they are started when there is something to do, and stopped by `close`.
    """

    journal: Journal
    bounds: Sequence[int]
    calls_per_step: int
    workers: int | str
    progress: Progress | None
    _pool: Pool | None = None
    _told: float = field(default_factory=time.monotonic)

    def close(self) -> None:
        """Stop the workers, and give the journal's file free."""
        if self._pool is not None:
            self._pool.close()
        self.journal.close()

    def read(
        self, phase: str, source: Source, tasks: Task | Mapping[Place, Task], why: str = "", *, whole: bool = False
    ) -> Results:
        """Do something with the calls of every input; results stacked over the samples, by place.

        What the journal has is not done again, and a model does not run for an input that is complete.

        Args:
            tasks: one for all calls, on which the journal's head tells what matters, or one for each place.
            why: a word for who watches.
            whole: every input must have a call for which there is a task.
        """
        about = "" if isinstance(tasks, Task) else of_settings([(*place, *tasks[place].arguments) for place in tasks])
        name = f"{phase} {about}"
        for number in range(len(source)):
            known = f"{name}/{number}" in self.journal
            if not known:
                self._read_input(_Reading(phase, name, number, len(source)), source, tasks, whole)
            self._tell(phase, number + 1, len(source), "from the journal" if known else why)
        return self._collect(name, len(source))

    def _read_input(self, reading: _Reading, source: Source, tasks: Task | Mapping[Place, Task], whole: bool) -> None:
        self._pool = pool = self._pool or open_pool(self.workers, self.journal.put)
        keys: list[list[Any]] = []
        left_out = source.left_out.copy()

        def visit(call: LayerCall) -> None:
            place = Place(call.layer, self.stage(call.step))
            todo = tasks if isinstance(tasks, Task) else tasks.get(place)
            if todo is None:
                return
            about = "" if isinstance(tasks, Task) else "/" + of_settings(todo.arguments)
            key = f"{reading.phase} /{call.input}/{call.layer}/{call.step}/{call.batch}{about}"
            keys.append([key, *place])
            if key not in self.journal:
                pool.submit(key, todo.function, call, *todo.arguments)
            said = f"{len(keys)} calls of input {reading.number + 1}, now {call.layer}"
            self.murmur(reading.phase, reading.number, reading.inputs, said)

        source.visit(reading.number, visit)
        pool.drain()
        if whole and not keys:
            why = dict(source.left_out - left_out) or "it made none, or of other layers only"
            raise ValueError(
                f"{reading.phase}: no attention call of input {reading.number} (counted from 0) of {source.name} can "
                f"be judged: {why}. Leave this input away, or give a longer one"
            )
        self.journal.put(f"{reading.name}/{reading.number}", keys)

    def murmur(self, phase: str, done: int, inputs: int, said: str) -> None:
        """Tell who watches, if they have heard nothing for a few seconds."""
        if time.monotonic() - self._told >= _TELL_SECONDS:
            self._tell(phase, done, inputs, said)

    def _tell(self, phase: str, done: int, inputs: int, said: str) -> None:
        self._told = time.monotonic()
        if self.progress is not None:
            self.progress(phase, done, inputs, said)

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

    def stage(self, call: int) -> int:
        """The stage of a layer's call, counted from 0."""
        return sum(call // self.calls_per_step >= bound for bound in self.bounds)


class _Reading(NamedTuple):
    """One input of a phase; name: of the phase, with what its results depend on."""

    phase: str
    name: str
    number: int
    inputs: int


def survey(call: LayerCall, most_rows: int, backend: str | None) -> dict[str, Any]:
    """Error and density of every candidate of GRID, `[candidates, heads]`."""
    rows = sample_rows(call, most_rows)
    with torch.inference_mode(), torch.autocast(call.query.device.type, enabled=False):
        found = frontier(call, masks(call, GRID, rows, backend), rows)
    return {name: value.tolist() for name, value in found._asdict().items()}


def trial(call: LayerCall, trials: Sequence[Trial], precision: str, backend: str | None) -> dict[str, Any]:
    """Error and density of trials, `[trials, heads]`."""
    with torch.inference_mode(), torch.autocast(call.query.device.type, enabled=False):
        found = evaluate(call, trials, precision, backend)
    return {name: value.tolist() for name, value in found._asdict().items()}
