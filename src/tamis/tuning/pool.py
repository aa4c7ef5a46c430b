"""Where layers are looked at: in this process, in several processes, or on a Ray cluster.

A worker may be lost: killed by the system when memory runs out, or with the machine it runs on. What it looked at is
looked at again by another, and the outcome does not depend on who found it.
"""

from __future__ import annotations

import importlib
import os
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from queue import SimpleQueue
from typing import Any, NamedTuple, Protocol

import torch

MOST_LOSSES = 2  # a job that has lost so many workers is run once more, and not again
_RAY = "ray"
_PATIENCE = 20.0  # seconds for a Ray cluster to answer
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


def check_reachable(workers: int | str) -> None:
    """Refuse the address of a Ray cluster where nothing listens, before a model is loaded: Ray tries for minutes.

    Raises:
        ValueError: no connection within 20 seconds.
    """
    address = workers.partition("@")[2] if isinstance(workers, str) else ""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdecimal()):
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _PATIENCE).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"workers: no Ray cluster answers at {address}: {error}") from error


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
    """Several processes, which share the machine's cores; a few calls wait in memory at a time.

    Every process is a pool of its own, so that a lost one is charged to the job that it ran and to no other.
    """

    def __init__(self, workers: int, done: Done) -> None:
        import torch.multiprocessing as processes

        self._most, self._done = 2 * workers, done
        self._share = max(1, torch.get_num_threads() // workers)
        self._context = processes.get_context("spawn")
        self._started = self._context.Event()
        self._free: SimpleQueue[Any] = SimpleQueue()
        for _ in range(workers):
            self._free.put(self._open())
        self._threads = ThreadPoolExecutor(workers)
        self._waiting: dict[Future[Any], str] = {}

    def _open(self) -> Any:
        from concurrent.futures import ProcessPoolExecutor

        return ProcessPoolExecutor(1, self._context, _start, (self._share, self._started))

    def submit(self, key: str, function: Callable[..., Any], *arguments: Any) -> None:
        while len(self._waiting) >= self._most:
            self._collect()
        self._waiting[self._threads.submit(self._run, Job(key, function, arguments))] = key

    def _run(self, job: Job) -> Any:
        """What a job finds, in a process that is free.

        Raises:
            RuntimeError: no worker ever began, or the job has cost too many.
        """
        from concurrent.futures.process import BrokenProcessPool

        process = self._free.get()
        try:
            while True:
                running = False
                try:
                    found = process.submit(job.function, *job.arguments)
                    running = True
                    return found.result()
                except BrokenProcessPool:
                    if not self._started.is_set():
                        raise RuntimeError(GUARD) from None
                    process.shutdown()
                    process = self._open()
                    if running:  # or it was lost before, with nothing to do
                        job = job.again()
        finally:
            self._free.put(process)

    def _collect(self) -> None:
        for future in wait(self._waiting, return_when=FIRST_COMPLETED).done:
            self._done(self._waiting.pop(future), future.result())

    def drain(self) -> None:
        while self._waiting:
            self._collect()

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        while not self._free.empty():
            self._free.get().shutdown()


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
