"""Whether ranks are in step: an exchange pairs whatever comes next on each rank, also if that belongs to another call.

A rank that fails in the middle of a call, or of a model's run, and goes on with the next one, would exchange its tokens
of that with tokens of the call that the others are still in. So every question among ranks carries what is asked, how
many turns the rank has taken, and whether its last one failed. Where these differ, all ranks raise, and no call with
the group is answered any more: which call is whose cannot be found out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

QUESTIONS = {
    "call": "a call of attention",
    "layout": "exchange_layout",
    "model": "a run of a model",
    "documents": "the documents of a model's run",
    "output": "the output of a model",
    "difference": "the arguments that differ",
    "again": "a call after one that failed",
}
HEADER = 3  # numbers: the question, the turn, whether the last call failed


@dataclass
class Step:
    """Where this rank is: turns taken, whether its last one failed by itself, and why it is out of step, if it is."""

    turns: int = 0
    failed: bool = False
    settled: bool = False
    lost: str = ""

    def header(self, question: str) -> list[int]:
        """What a question begins with; it is a turn.

        Raises:
            RuntimeError: the ranks are out of step.
        """
        self.check()
        self.turns += 1
        return [list(QUESTIONS).index(question), self.turns, self.failed]

    def compare(self, headers: Sequence[Sequence[int]]) -> None:
        """Raise on every rank, and from then on always, unless all are in the same place."""
        self.failed = False  # if it was, all ranks failed together
        if all(list(header) == list(headers[0]) for header in headers):
            return
        names = list(QUESTIONS.values())
        said = [
            f"rank {rank} is at {names[asked]}, turn {turn}{', after an error of its own' if failed else ''}"
            for rank, (asked, turn, failed) in enumerate(headers)
        ]
        self.lost = (
            f"the ranks are out of step: {'; '.join(said)}. A rank failed and went on, or called more often than "
            "others; results of different calls would mix, so this process group is of no more use to tamis: end all "
            "ranks, or make a new group on all of them"
        )
        self.check()

    def check(self) -> None:
        """Raise if the ranks are out of step."""
        if self.lost:
            raise RuntimeError(self.lost)


_steps: WeakKeyDictionary[ProcessGroup, Step] = WeakKeyDictionary()


def step_of(group: ProcessGroup) -> Step:
    """Where this rank is among those of a group."""
    return _steps.setdefault(group, Step())


def forget(group: ProcessGroup) -> None:
    """Take a group for a new one."""
    _steps.pop(group, None)


@contextlib.contextmanager
def watched(group: ProcessGroup) -> Iterator[Step]:
    """Remember a call that fails on this rank, unless all ranks know of it (`settled`)."""
    step = step_of(group)
    step.check()
    step.settled = False
    try:
        yield step
    except BaseException:
        step.failed = not step.settled
        raise
