"""Everything that ranks send each other, in one place, where it can be counted.

Bytes are those that leave a rank for another one. Where a collective's way is its library's own choice, they are what a
ring of ranks sends: (ranks - 1) shards in an all-gather, 2 (ranks - 1) / ranks of the tensor in an all-reduce.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from tamis.parallel.step import HEADER, step_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

MESSAGE = 32 * 8  # bytes in which a rank tells what it holds and asks for
_counters: list[Traffic] = []


class Traffic:
    """Counts the bytes that this rank sends to others while it is open.

    Attributes:
        sent: bytes by kind: "heads" (query, key, value to the ranks of their heads), "output" (back again), "order"
            (ring: tokens to their place and back), "ring" (key and value passed on), "summaries" (what predictions and
            key means need), "lengths", "stats".
        exchanges: how many there were.

    Example:
        >>> from tamis.parallel import Traffic
        >>> with Traffic() as traffic:
        ...     pass  # attention calls
        >>> traffic.total
        0
    """

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()
        self.exchanges = 0

    @property
    def total(self) -> int:
        """Bytes of all kinds."""
        return sum(self.sent.values())

    def __enter__(self) -> Traffic:
        _counters.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _counters.remove(self)

    def __repr__(self) -> str:
        return f"Traffic({dict(self.sent)})"


@dataclass(frozen=True)
class Peers:
    """A process group as one rank sees it."""

    group: ProcessGroup
    rank: int
    size: int

    def all_to_all(self, send: Tensor, sizes: tuple[Sequence[int], Sequence[int]], kind: str) -> Tensor:
        """Send slices of a flat tensor to the ranks and get theirs; `sizes` are elements (to, from) every rank."""
        to, back = sizes
        _count(kind, send.element_size() * (sum(to) - to[self.rank]))
        item = send.element_size()
        received = send.new_empty(sum(back))
        with _explained(kind, self):
            # As bytes: what a library can move must not depend on the number format.
            dist.all_to_all_single(
                received.view(torch.uint8),
                send.view(torch.uint8),
                [size * item for size in back],
                [size * item for size in to],
                group=self.group,
            )
        return received

    def tell(self, question: str, numbers: Sequence[int]) -> list[list[int]]:
        """What every rank tells every other, equally many integers each; all must be asking the same.

        They leave in messages of one size, whatever the question: only then can ranks notice that they ask different
        ones.

        Raises:
            RuntimeError: on every rank: they are not at the same place of their program.
        """
        step, room = step_of(self.group), MESSAGE // 8 - HEADER
        rows: list[list[int]] = [[] for _ in range(self.size)]
        for start in range(0, max(len(numbers), 1), room):
            some = list(numbers[start : start + room])
            sent = torch.tensor([*step.header(question), *some, *[0] * (room - len(some))], device=self._device())
            found = [row.tolist() for row in self.all_gather(sent, [sent.numel()] * self.size, "lengths")]
            step.compare([row[:HEADER] for row in found])
            for row, more in zip(rows, found, strict=True):
                row += more[HEADER : HEADER + len(some)]
        return rows

    def tell_text(self, question: str, text: str) -> list[str]:
        """The texts of all ranks."""
        own = torch.frombuffer(bytearray(text.encode() or b" "), dtype=torch.uint8).to(self._device())
        sizes = [row[0] for row in self.tell(question, [own.numel()])]
        return [bytes(shard.tolist()).decode() for shard in self.all_gather(own, sizes, "lengths")]

    def failed(self) -> None:
        """This rank's run of a model failed: if it did not on every rank, the next question finds out."""
        step_of(self.group).failed = True

    def _device(self) -> torch.device:
        """Where a message has to be."""
        if dist.get_backend(self.group) == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    def all_gather(self, tensor: Tensor, sizes: Sequence[int], kind: str) -> list[Tensor]:
        """The flat tensors of all ranks, which have so many elements."""
        padded = tensor.new_zeros(max(sizes))
        padded[: tensor.numel()] = tensor
        gathered = [torch.empty_like(padded) for _ in sizes]
        _count(kind, padded.element_size() * padded.numel() * (self.size - 1))
        with _explained(kind, self):
            dist.all_gather([part.view(torch.uint8) for part in gathered], padded.view(torch.uint8), group=self.group)
        return [part[:size] for part, size in zip(gathered, sizes, strict=True)]

    def all_reduce(self, tensor: Tensor, kind: str, *, largest: bool = False) -> Tensor:
        """The sum (or the largest) over all ranks, in place."""
        _count(kind, 2 * (self.size - 1) * tensor.element_size() * tensor.numel() // self.size)
        with _explained(kind, self):
            dist.all_reduce(tensor, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, group=self.group)
        return tensor

    def shift(self, send: Tensor, size: int, kind: str) -> Callable[[], Tensor]:
        """Send flat bytes to the next rank and get `size` from the one before; the result waits for them."""
        _count(kind, send.numel())
        received = send.new_empty(size)
        ahead = dist.get_global_rank(self.group, (self.rank + 1) % self.size)
        behind = dist.get_global_rank(self.group, (self.rank - 1) % self.size)
        operations = []
        if send.numel():
            operations.append(dist.P2POp(dist.isend, send, ahead, self.group))
        if size:
            operations.append(dist.P2POp(dist.irecv, received, behind, self.group))
        with _explained(kind, self):
            works = dist.batch_isend_irecv(operations) if operations else []

        def wait() -> Tensor:
            with _explained(kind, self):
                for work in works:
                    work.wait()
            return received

        return wait


def peers(mesh: DeviceMesh | None, group: ProcessGroup | None) -> Peers:
    """The ranks of a mesh or a group; of all processes if neither is given.

    Raises:
        TypeError: one of them is something else.
        ValueError: both are given, the mesh has several dimensions, or no process group was made.
    """
    if mesh is not None and group is not None:
        raise ValueError("mesh and group name the same thing: give one of the two")
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("no process group: call torch.distributed.init_process_group first, on every rank")
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a torch.distributed.ProcessGroup or None, got {type(group).__name__}")
    if mesh is not None:
        from torch.distributed.device_mesh import DeviceMesh

        if not isinstance(mesh, DeviceMesh):
            raise TypeError(f"mesh must be a DeviceMesh or None, got {type(mesh).__name__}: a group is group=")
        if mesh.ndim != 1:
            raise ValueError(f"mesh must have one dimension, got {mesh.mesh_dim_names or mesh.ndim}: take mesh['name']")
        group = mesh.get_group()
    group = dist.group.WORLD if group is None else group
    assert group is not None
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("this process is not in the group: call with a group it is in")
    return Peers(group, rank, dist.get_world_size(group))


def _count(kind: str, sent: int) -> None:
    for counter in _counters:
        counter.sent[kind] += sent
        counter.exchanges += 1


@contextlib.contextmanager
def _explained(kind: str, at: Peers) -> Iterator[None]:
    """Say of a failed exchange what it was: the library names a socket."""
    try:
        yield
    except RuntimeError as error:
        text = (
            f"rank {at.rank} of {at.size}: the exchange of {kind} failed. A rank has died, is late by more than the "
            f"group's timeout, or called with other arguments. {error}"
        )
        step_of(at.group).lost = text  # what arrives after this belongs to no call
        raise RuntimeError(text) from error
