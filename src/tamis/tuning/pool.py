"""Where layers are looked at: in this process, in several processes, or on a Ray cluster."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any, Protocol

import torch


class Pool(Protocol):
    """Work for later: `submit` may wait until there is room, `drain` waits for all and hands the results over."""

    def submit(self, key: str, function: Callable[..., Any], *arguments: Any) -> None: ...
    def drain(self) -> None: ...
    def close(self) -> None: ...


Done = Callable[[str, Any], None]


def open_pool(workers: int | str, done: Done) -> Pool:
    """The pool for `tune`'s argument `workers`: a number of processes, or "ray"."""
    if workers == "ray":
        return RayPool(done)
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise ValueError(f"workers must be a number of processes above 0 or 'ray', got {workers!r}")
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
        from concurrent.futures import ProcessPoolExecutor

        import torch.multiprocessing as processes

        threads = max(1, torch.get_num_threads() // workers)
        self._pool = ProcessPoolExecutor(workers, processes.get_context("spawn"), _start, (threads,))
        self._most, self._done = 2 * workers, done
        self._waiting: dict[Any, str] = {}

    def submit(self, key: str, function: Callable[..., Any], *arguments: Any) -> None:
        while len(self._waiting) >= self._most:
            self._collect()
        self._waiting[self._pool.submit(function, *arguments)] = key

    def _collect(self) -> None:
        from concurrent.futures import FIRST_COMPLETED, wait

        for future in wait(self._waiting, return_when=FIRST_COMPLETED).done:
            self._done(self._waiting.pop(future), future.result())

    def drain(self) -> None:
        while self._waiting:
            self._collect()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def _start(threads: int) -> None:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    torch.set_num_threads(threads)


class RayPool:
    """A Ray cluster: the one that is connected, or else one of this machine."""

    def __init__(self, done: Done) -> None:
        ray: Any = importlib.import_module("ray")
        self._ray, self._done = ray, done
        if not ray.is_initialized():
            ray.init(log_to_driver=False)
        self._most = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
        self._waiting: dict[Any, str] = {}

    def submit(self, key: str, function: Callable[..., Any], *arguments: Any) -> None:
        while len(self._waiting) >= self._most:
            self._collect()
        self._waiting[self._ray.remote(function).remote(*arguments)] = key

    def _collect(self) -> None:
        for reference in self._ray.wait(list(self._waiting))[0]:
            self._done(self._waiting.pop(reference), self._ray.get(reference))

    def drain(self) -> None:
        while self._waiting:
            self._collect()

    def close(self) -> None:
        self._waiting.clear()
