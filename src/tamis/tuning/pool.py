"""Where layers are looked at: in this process, in several processes, or on a Ray cluster.

A worker may be lost: killed by the system when memory runs out, or with the machine it runs on. What it looked at is
looked at again by another, and the outcome does not depend on who found it.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

MOST_LOSSES = 2  # a job that has lost so many workers is run once more, and not again
_RAY = "ray"
GUARD = """the worker processes could not start. They first read the calling script, whose work must stand under

    if __name__ == "__main__":
        profile = tamis.tune(.., workers=2)"""


class Pool(Protocol):
    """Work for later: `submit` may wait until there is room, `drain` waits for all and hands the results over."""

    def submit(self, key: str, function: Callable[..., Any], *arguments: Any) -> None: ...
    def drain(self) -> None: ...
    def close(self) -> None: ...


Done = Callable[[str, Any], None]


class Job(NamedTuple):
    """What is to be done, and how many workers were lost over it."""

    key: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    losses: int = 0

    def again(self) -> Job:
        """The job after one more loss.

        Raises:
            RuntimeError: there were too many.
        """
        if self.losses >= MOST_LOSSES:
            raise RuntimeError(
                f"{self.losses + 1} workers were lost over {self.key}: they were killed from outside, as happens when "
                "memory runs out. Give fewer workers, or shorter inputs; --resume keeps what has been found"
            )
        return self._replace(losses=self.losses + 1)


def check_workers(workers: int | str) -> None:
    """Refuse what is neither a number of processes nor "ray" nor "ray@ADDRESS"."""
    if isinstance(workers, str) and (workers == _RAY or workers.startswith(f"{_RAY}@")):
        return
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise ValueError(f"workers must be a number of processes above 0, 'ray' or 'ray@ADDRESS', got {workers!r}")


def open_pool(workers: int | str, done: Done) -> Pool:
    """The pool for `tune`'s argument `workers`: a number of processes, "ray", or "ray@ADDRESS"."""
    check_workers(workers)
    if isinstance(workers, str):
        return RayPool(workers.partition("@")[2] or None, done)
    return Inline(done) if workers == 1 else Processes(workers, done)


class Inline:
    """Everything at once, here."""

    def __init__(self, done: Done) -> None:
        self._done = done

    def submit(self, key: str, function: Callable[..., Any], *arguments: Any) -> None:
        self._done(key, function(*arguments))

    def drain(self) -> None:
        pass

    def close(self) -> None:
        pass


class Processes:
    """Several processes, which share the machine's cores; a few calls wait in memory at a time."""

    def __init__(self, workers: int, done: Done) -> None:
        import torch.multiprocessing as processes

        self._workers, self._most, self._done = workers, 2 * workers, done
        self._threads = max(1, torch.get_num_threads() // workers)
        self._context = processes.get_context("spawn")
        self._started = self._context.Event()
        self._pool = self._open()
        self._waiting: dict[Any, Job] = {}

    def _open(self) -> Any:
        from concurrent.futures import ProcessPoolExecutor

        return ProcessPoolExecutor(self._workers, self._context, _start, (self._threads, self._started))

    def submit(self, key: str, function: Callable[..., Any], *arguments: Any) -> None:
        from concurrent.futures.process import BrokenProcessPool

        while len(self._waiting) >= self._most:
            self._collect()
        job = Job(key, function, arguments)
        try:
            self._give(job)
        except BrokenProcessPool:  # no fault of this job: a worker was lost since the others were looked at
            self._renew([])
            self._give(job)

    def _give(self, job: Job) -> None:
        self._waiting[self._pool.submit(job.function, *job.arguments)] = job

    def _collect(self) -> None:
        from concurrent.futures import FIRST_COMPLETED, wait

        self._settle(wait(self._waiting, return_when=FIRST_COMPLETED).done)

    def _settle(self, futures: Iterable[Any]) -> None:
        """Hand over what was found; if a worker was lost, start anew."""
        lost = self._take(futures)
        if lost:
            self._renew(lost)

    def _renew(self, lost: list[Job]) -> None:
        """New workers, for what was lost and for what waits: with one worker a pool loses all.

        Raises:
            RuntimeError: no worker ever began, or a job has cost too many.
        """
        if not self._started.is_set():
            raise RuntimeError(GUARD)
        lost += self._take(list(self._waiting))
        self._pool.shutdown()
        self._pool = self._open()
        for job in lost:
            self._give(job.again())

    def _take(self, futures: Iterable[Any]) -> list[Job]:
        """Hand over what was found; the jobs whose worker was lost."""
        from concurrent.futures.process import BrokenProcessPool

        lost = []
        for future in futures:
            job = self._waiting.pop(future)
            try:
                found = future.result()
            except BrokenProcessPool:
                lost.append(job)
            else:
                self._done(job.key, found)
        return lost

    def drain(self) -> None:
        while self._waiting:
            self._collect()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def _start(threads: int, started: Any) -> None:
    """Begin in a new process: its share of the cores, and the sign that it could begin at all."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    torch.set_num_threads(threads)
    started.set()


class RayPool:
    """A Ray cluster: the one at an address; without one that which is connected, or else one of this machine.

    `close` leaves what was joined, or started, here.
    """

    def __init__(self, address: str | None, done: Done) -> None:
        ray: Any = importlib.import_module("ray")
        self._ray, self._done = ray, done
        self._joined = not ray.is_initialized()
        if self._joined:
            ray.init(address=address, log_to_driver=False)
        elif address not in (None, "auto", here := ray.get_runtime_context().gcs_address):
            raise ValueError(f"workers: this process has joined the Ray cluster at {here}: leave it (ray.shutdown())")
        self._most = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
        self._waiting: dict[Any, Job] = {}

    def submit(self, key: str, function: Callable[..., Any], *arguments: Any) -> None:
        while len(self._waiting) >= self._most:
            self._collect()
        self._give(Job(key, function, arguments))

    def _give(self, job: Job) -> None:
        # Ray's own retries have no end where memory runs out.
        remote = self._ray.remote(max_retries=0)(job.function)
        self._waiting[remote.remote(*job.arguments)] = job

    def _collect(self) -> None:
        errors = self._ray.exceptions
        finished: Sequence[Any] = self._ray.wait(list(self._waiting))[0]
        for reference in finished:
            job = self._waiting.pop(reference)
            try:
                found = self._ray.get(reference)
            except errors.RayTaskError:
                raise  # the function's own
            except errors.RayError:
                self._give(job.again())
            else:
                self._done(job.key, found)

    def drain(self) -> None:
        while self._waiting:
            self._collect()

    def close(self) -> None:
        self._waiting.clear()
        if self._joined:
            self._ray.shutdown()
