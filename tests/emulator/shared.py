"""Shared memory and its barriers.

An element has never been written, is good, or is about to be overwritten by a copy that is under way; the first and the
last hold poison. Every access is held against all others that overlap: two that conflict, and that nothing orders, are
an error, whatever happened to come first.
"""

from __future__ import annotations

import linecache
import os
import sys
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon.language._layouts import SharedLayout

from emulator.machine import Clock, current, join
from emulator.values import TORCH, KernelError, Type, Value, poison, raw, valued

_EMPTY, _GOOD, _COMING = 0, 1, 2
_HERE = os.path.dirname(__file__) + os.sep


class _Accesses:
    """Who last wrote and read one region: agents with their steps."""

    def __init__(self, footprint: Tensor) -> None:
        self.footprint = footprint
        self.writes: Clock = {}
        self.reads: Clock = {}


class Allocation:
    """One piece of shared memory, named after the variable that it is given to."""

    def __init__(self, dtype: Any, shape: list[int]) -> None:
        self.name = _variable()
        current().shared.append(self)
        self.data = raw(torch.empty(shape, dtype=TORCH[dtype])).fill_(poison(TORCH[dtype]))
        self.state = torch.full(shape, _EMPTY, dtype=torch.int8)
        self.regions: dict[Any, _Accesses] = {}
        # Regions that threads of a partition wrote or read, which the asynchronous units do not know of yet.
        self.unfenced: dict[str, dict[Any, int]] = {"writing": {}, "reading": {}}
        self.barriers: dict[int, Barrier] = {}


def _variable() -> str:
    """The left side of the assignment that a kernel is at."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename.startswith(_HERE):
        assert frame.f_back is not None
        frame = frame.f_back
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    return line.split("=")[0].split(":")[0].strip() or f"line {frame.f_lineno}"


class Shared:
    """A view of shared memory: what kernels call a memory descriptor."""

    def __init__(self, of: Allocation, dtype: Any, layout: Any, views: tuple[Tensor, Tensor], name: str) -> None:
        self.of, self.dtype, self.layout, self.name = of, dtype, layout, name
        self.data, self.state = views

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    @property
    def rank(self) -> int:
        return self.data.dim()

    @property
    def numel(self) -> int:
        return self.data.numel()

    @property
    def type(self) -> Any:
        return Type(self.dtype, self.shape, self.layout)

    def _view(self, change: Any, name: str) -> Shared:
        return Shared(self.of, self.dtype, self.layout, (change(self.data), change(self.state)), name)

    def index(self, index: Any) -> Shared:
        place = int(index)
        if not 0 <= place < self.shape[0]:
            raise KernelError(f"{self.name} has {self.shape[0]} entries, and the kernel takes number {place}")
        return self._view(lambda x: x[place], f"{self.name}[{place}]")

    def slice(self, start: Any, length: Any, dim: int = 0) -> Shared:
        if int(start) + int(length) > self.shape[dim]:
            raise KernelError(f"a slice ends outside of {self.name}")
        return self._view(lambda x: x.narrow(dim, int(start), int(length)), f"{self.name}[{int(start)}:]")

    def permute(self, order: Any) -> Shared:
        return self._view(lambda x: x.permute(tuple(order)), self.name)

    def reshape(self, shape: Any) -> Shared:
        if not self.data.is_contiguous():
            raise KernelError(f"{self.name} does not lie in one piece")
        return self._view(lambda x: x.view([int(size) for size in shape]), self.name)

    def load(self, layout: Any) -> Value:
        """Read by the threads of the partition."""
        machine = current()
        machine.switch()
        here = machine.here
        self.access(here.index, here.clock[here.index], here.clock, write=False)
        self.of.unfenced["reading"][self.key()] = here.index
        return Value(self.contents(), layout)

    def store(self, value: Any) -> None:
        """Write by the threads of the partition."""
        machine = current()
        machine.switch()
        here = machine.here
        if valued(value).data.dtype != TORCH[self.dtype]:
            raise KernelError(f"{self.name} holds {self.dtype}, not {value.dtype}")
        self.access(here.index, here.clock[here.index], here.clock, write=True)
        self.of.unfenced["writing"][self.key()] = here.index
        self.put(raw(value.data))

    def _keep_alive(self) -> None:
        return

    def contents(self) -> Tensor:
        """What lies there now."""
        if current().races and (self.state != _GOOD).any():
            raise KernelError(f"{self.name} is read before something was written to it")
        return self.data.contiguous().clone().view(TORCH[self.dtype])

    def put(self, data: Tensor) -> None:
        self.data.copy_(data)
        self.state.fill_(_GOOD)

    def coming(self) -> None:
        """From now on until it lands, a copy may have written any part."""
        self.data.fill_(poison(TORCH[self.dtype]))
        self.state.fill_(_COMING)

    def key(self) -> Any:
        return self.data.storage_offset(), tuple(self.data.shape), self.data.stride()

    def _region(self) -> _Accesses:
        key = self.key()
        if key not in self.of.regions:
            footprint = torch.zeros(self.of.data.numel(), dtype=torch.bool)
            torch.as_strided(footprint, key[1], key[2], key[0]).fill_(True)
            self.of.regions[key] = _Accesses(footprint)
        return self.of.regions[key]

    def _overlaps(self, other: _Accesses) -> bool:
        own = self._region()
        return other is own or bool((own.footprint & other.footprint).any())

    def access(self, agent: Any, step: int, clock: Clock, *, write: bool) -> None:
        """Note an access by an agent that knows `clock`, and raise if a conflicting one may happen at the same time."""
        own = self._region()
        for other in self.of.regions.values():
            if not self._overlaps(other):
                continue
            for kind, earlier in (("writes", other.writes), ("reads", other.reads)):
                if kind == "reads" and not write:
                    continue
                for who, when in earlier.items():
                    if clock.get(who, 0) < when and current().races:
                        verb = "is overwritten" if write else "is read"
                        raise KernelError(f"race: {self.name} {verb} while {_agent(who)} {kind} it")
        if write:
            own.writes, own.reads = {agent: step}, {}
        else:
            own.reads[agent] = max(step, own.reads.get(agent, 0))

    def fenced(self, *verbs: str) -> None:
        """Raise if an asynchronous unit might come before what threads did here.

        PTX ISA, "Proxies": a barrier alone orders accesses of one kind with each other only.
        """
        for verb in verbs:
            for key in self.of.unfenced[verb]:
                if self._overlaps(self.of.regions[key]):
                    raise KernelError(f"fence_async_shared is missing between {verb} {self.name} and its use")


def _agent(who: Any) -> str:
    return current().partitions[who].name if isinstance(who, int) else f"one of the {who[0]} of {who[1].name}"


def allocate(element_ty: Any, shape: Any, layout: Any, value: Any = None) -> Shared:
    """`gl.allocate_shared_memory`."""
    if not isinstance(layout, SharedLayout):
        raise KernelError("shared memory needs a layout of shared memory")
    sizes = [int(size) for size in shape]
    made = Allocation(element_ty, sizes)
    view = Shared(made, element_ty, layout, (made.data, made.state), made.name)
    if value is not None:
        view.store(value)
    return view


def fence(cluster: bool = False) -> None:
    """`fence_async_shared`: the asynchronous units come after what this partition did so far."""
    current().switch()
    me = current().here.index
    for allocation in current().shared:
        for verb, regions in allocation.unfenced.items():
            allocation.unfenced[verb] = {key: who for key, who in regions.items() if who != me}


class Barrier:
    """An mbarrier: arrivals and bytes that are missing in its phase, and what its last phase makes known."""

    def __init__(self, name: str, count: int) -> None:
        self.name, self.count = name, count
        self.phase = 0
        self.left = count
        self.expected = self.issued = self.landed = 0
        self.gathered: Clock = {}
        self.known: Clock = {}

    def arrive(self, number: int) -> None:
        if number > self.left:
            raise KernelError(
                f"{number} arrive at {self.name}, which waits for {self.left} of {self.count} in its phase"
            )
        current().here.release(self.gathered)
        self.left -= number
        self._maybe_complete()

    def expect(self, size: int) -> None:
        self.expected += size
        self.arrive(1)

    def issue(self, size: int) -> None:
        """A copy of so many bytes will land in this phase."""
        self.issued += size

    def land(self, size: int) -> None:
        self.landed += size
        self._maybe_complete()

    def _maybe_complete(self) -> None:
        if self.left or self.landed < self.expected:
            return
        self.check()
        join(self.known, self.gathered)
        self.phase += 1
        self.known["copies", self] = self.phase
        self.left = self.count
        self.expected = self.issued = self.landed = 0

    def check(self) -> None:
        """Raise if a phase that is over, or the last one, saw other bytes than it expects."""
        if self.issued != self.expected:
            raise KernelError(f"{self.name} expects {self.expected} bytes, and copies bring {self.issued}")

    def missing(self) -> str:
        """What the phase still lacks."""
        parts = [f"{self.left} of {self.count} arrivals"] if self.left else []
        if self.landed != self.expected:
            parts.append(f"{self.expected - self.landed} of {self.expected} bytes")
        return f"in phase {self.phase}, {' and '.join(parts)} missing"
