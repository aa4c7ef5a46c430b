"""Processes that are the ranks of a gloo group on this machine, kept for many calls: starting them takes seconds.

A rank runs functions of the test modules, `function(group, *arguments)`, and sends back what they return. Only the
loopback interface is used; the ranks find each other by a file.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

SIZES = (1, 2, 3, 4)


class Ranks:
    """`number` processes, with a group of the first 1, 2, 3, .. of them each."""

    def __init__(self, number: int, timeout: float = 60.0, *, preload: Sequence[str] = ()) -> None:
        context = multiprocessing.get_context("forkserver")
        # What a rank needs is imported once, before any thread pool is there; every rank is a copy of that process.
        context.set_forkserver_preload(["tamis.parallel", "torch.distributed.tensor", "rank_jobs", *preload])
        self._folder = tempfile.TemporaryDirectory()
        store = "file://" + os.path.join(self._folder.name, "store")
        pairs = [context.Pipe() for _ in range(number)]
        self.pipes = [pair[0] for pair in pairs]
        self.processes = [
            context.Process(target=_serve, args=(pair[1], rank, number, store, timeout), daemon=True)
            for rank, pair in enumerate(pairs)
        ]
        for process in self.processes:
            process.start()
        for _, end in pairs:
            end.close()

    def start(self, size: int, function: Callable[..., Any], *arguments: Any) -> None:
        """Ask the first `size` ranks to run a function."""
        for pipe in self.pipes[:size]:
            pipe.send((size, function, arguments))

    def result(self, rank: int, patience: float = 120.0) -> Any:
        """What a rank returned; an error of it is raised here."""
        assert self.pipes[rank].poll(patience), f"rank {rank} has not answered within {patience} seconds"
        kind, what = self.pipes[rank].recv()
        if kind == "error":
            raise RankError(f"rank {rank}: {what}")
        return what

    def run(self, size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `function(group, *arguments)` returns on each of the first `size` ranks."""
        self.start(size, function, *arguments)
        answers: list[Any] = []
        for rank in range(size):
            try:
                answers.append(self.result(rank))
            except RankError as error:
                answers.append(error)
        errors = [answer for answer in answers if isinstance(answer, RankError)]
        if errors:
            raise errors[0]
        return answers

    def close(self) -> None:
        """End all ranks."""
        for process in self.processes:
            process.kill()
            process.join()
        self._folder.cleanup()


class RankError(Exception):
    """What went wrong in a rank."""


def _serve(pipe: Connection, rank: int, number: int, store: str, timeout: float) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # torch.empty then hands out NaN
    limit = datetime.timedelta(seconds=timeout)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=number, timeout=limit)
    groups = {size: dist.new_group(range(size), timeout=limit) for size in range(1, number + 1)}
    while True:
        try:
            size, function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            torch.manual_seed(0)
            answer = ("result", function(groups[size], *arguments))
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            answer = ("error", text if isinstance(error, (ValueError, TypeError)) else traceback.format_exc())
        pipe.send(answer)
