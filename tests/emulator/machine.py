"""One program: its partitions, which take turns in an order drawn from a seed, and what runs beside them.

A partition is a thread, but only one runs at a time: at every operation on barriers or asynchronous units it hands over
to a partition drawn by lot, and copies and products that are under way may finish. Seeds differ in temper: copies land
at once, at random or as late as can be, and partitions are fast or slow.

Whether two accesses are ordered does not depend on the order that came about: every partition has a clock that
tells which steps of all others it knows to be done (a vector clock). An asynchronous unit counts as one more agent.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

from emulator.values import KernelError

Clock = dict[Any, int]
_MOST_STEPS = 100_000  # of one program; the calls of the tests take a few thousand


class Deadlock(KernelError):
    """Everybody waits."""


class _Stop(BaseException):
    """Ends the threads of a program that failed."""


def join(clock: Clock, other: Clock) -> None:
    """Learn what another knows."""
    for agent, step in other.items():
        if clock.get(agent, 0) < step:
            clock[agent] = step


class Partition:
    """Warps that run one function."""

    def __init__(self, name: str, index: int, clock: Clock) -> None:
        self.name, self.index = name, index
        self.clock = {**clock, index: 1}
        self.ready: Callable[[], bool] | None = None  # what it waits for
        self.waits_for: Callable[[], str] = str
        self.done = False
        self.turn = threading.Semaphore(0)
        self.products: list[Any] = []  # under way, the oldest first
        self.issued = 0
        self.stores: list[Any] = []
        self.stored = 0

    def release(self, into: Clock) -> None:
        """Tell `into` all that was done so far."""
        join(into, self.clock)
        self.clock[self.index] += 1


class Machine:
    """A program while it runs."""

    def __init__(self, program: tuple[int, int], seed: int, races: bool = True) -> None:
        self.program, self.programs = program
        self.chance = random.Random(f"{seed} {self.program}")
        self.haste = self.chance.choice([0.0, 0.1, 0.5, 1.0])
        self.races = races
        self.here = Partition("the kernel", 0, {})
        self.partitions = [self.here]
        self.paces = [1.0]
        self.events: list[Callable[[], None]] = []
        self.copies = 0  # under way
        self.steps = 0
        self.failure: BaseException | None = None
        self.shared: list[Any] = []

    @property
    def writer(self) -> int:
        """Whose stores to global memory these are: one number per program and partition."""
        return 1 + self.program * 64 + self.here.index

    def later(self, event: Callable[[], None]) -> None:
        """Something that happens by itself, some time."""
        self.events.append(event)

    def switch(self) -> None:
        """Let time pass: others may run, and what is under way may finish."""
        me = self.here
        self.steps += 1
        if self.steps > _MOST_STEPS:
            raise KernelError(f"no end after {_MOST_STEPS} steps of {me.name} and others")
        chosen = self._next()
        if chosen is not me:
            self._hand_over(chosen)
            me.turn.acquire()
            if self.failure is not None:
                raise _Stop
        self.here = me

    def wait(self, ready: Callable[[], bool], what: Callable[[], str]) -> None:
        """Go on when `ready`, which `what` puts into words."""
        me = self.here
        me.ready, me.waits_for = ready, what
        self.switch()
        me.ready = None

    def _next(self) -> Partition:
        while True:
            able = [p for p in self.partitions if not p.done and (p.ready is None or p.ready())]
            if self.events and (not able or self.chance.random() < self.haste):
                self.events.pop(self.chance.randrange(len(self.events)))()
                continue
            if not able:
                stuck = "; ".join(f"{p.name} waits for {p.waits_for()}" for p in self.partitions if not p.done)
                raise Deadlock(f"everybody waits: {stuck}")
            return self.chance.choices(able, [self.paces[p.index] for p in able])[0]

    def _hand_over(self, to: Partition) -> None:
        self.here = to
        to.turn.release()

    def specialize(self, parts: list[tuple[Callable[..., Any], tuple[Any, ...]]]) -> Any:
        """Run the first in this thread and the others beside it; what the first returns."""
        if len(self.partitions) > 1:
            raise KernelError("warp_specialize inside of warp_specialize, or twice")
        main = self.here
        (first, arguments), *others = parts
        main.name = _name(first, 0)
        workers = [self._start(function, given) for function, given in others]
        self.paces = [self.chance.choice([0.03, 1.0, 1.0, 30.0]) for _ in self.partitions]
        try:
            self.switch()
            result = first(*arguments)
            others_left = self.partitions[1:]
            self.wait(lambda: all(p.done for p in others_left), lambda: "the end of the others")
        except BaseException as error:
            if self.failure is None:
                self.failure = error
        finally:
            for partition, thread in workers:
                partition.turn.release()
                thread.join()
        if self.failure is not None:
            raise self.failure
        for partition, _ in workers:
            join(main.clock, partition.clock)
        self.partitions, self.here = [main], main
        return result

    def _start(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Partition, threading.Thread]:
        known: Clock = {}
        self.here.release(known)
        partition = Partition(_name(function, len(self.partitions)), len(self.partitions), known)
        self.partitions.append(partition)
        thread = threading.Thread(target=self._work, args=(partition, function, arguments), daemon=True)
        thread.start()
        return partition, thread

    def _work(self, partition: Partition, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        partition.turn.acquire()
        try:
            if self.failure is None:
                function(*arguments)
                self._ended(partition)
                partition.done = True
                self._hand_over(self._next())
        except _Stop:
            return
        except BaseException as error:
            if self.failure is None:
                self.failure = error
            partition.done = True
            self._hand_over(self.partitions[0])

    def _ended(self, partition: Partition) -> None:
        if partition.products:
            raise KernelError(f"{partition.name} ends while its products are under way: warpgroup_mma_wait is missing")
        if partition.stores:
            raise KernelError(f"{partition.name} ends while its stores read shared memory: store_wait is missing")

    def finish(self) -> None:
        """The end of the program."""
        self._ended(self.here)
        if self.copies:
            raise KernelError("the program ends while copies into its shared memory are under way")
        for barrier in (barrier for allocation in self.shared for barrier in allocation.barriers.values()):
            barrier.check()


def _name(function: Any, index: int) -> str:
    """Partitions may run the same function."""
    return f"{getattr(function, '__name__', function)} {index}"


_running: list[Machine] = []


def current() -> Machine:
    """The program that calls."""
    return _running[-1]


def enter(machine: Machine) -> None:
    _running.append(machine)


def leave() -> None:
    _running.pop()
