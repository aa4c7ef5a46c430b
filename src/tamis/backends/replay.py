"""Calls like one before: what was checked and laid out for it serves again, with other tensors.

A short call on a CPU is mostly Python: the door's checks, the dispatcher, a native structure filled field by field. All
of it depends on the form of a call alone, never on what its tensors hold. So a form that comes a second time is
recorded, and from then on costs a few pointers.

A form is taken only of what eager PyTorch hands to the CPU unchanged. Subclasses, traced and transformed tensors,
modes, profilers and gradients take the whole way, where the dispatcher and the door see them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from tamis.backends import cpu
from tamis.backends.cpu import AttendRecord, PredictRecord

__all__ = ["BACKEND", "AttendRecord", "Form", "Memory", "PredictRecord", "form"]

BACKEND = cpu.NAME
Form = tuple[Hashable, ...]
Record = TypeVar("Record")
_LIMIT = 512  # forms remembered; a record is some kilobytes
_NOTHING: Any = object()
_SETTINGS = frozenset((bool, int, float, str, type(None)))


class Memory(Generic[Record]):
    """What is known of forms of calls. Forms seen once are remembered as such: most never come again."""

    def __init__(self) -> None:
        self._records: dict[Form, Any] = {}

    def get(self, form: Form | None) -> Record | None:
        """The record of a form, if there is one."""
        found: Any = None if form is None else self._records.get(form)
        return None if found is _NOTHING else found

    def offer(self, form: Form | None, backend: str, make: Callable[[], Record | None]) -> None:
        """Say that a call of this form went the whole way, to this backend; make its record if it is not the first."""
        if form is None or backend != BACKEND:
            return
        found = self._records.get(form)  # once: other threads may clear in between
        if found is None:
            if len(self._records) >= _LIMIT:
                self._records.clear()
            self._records[form] = _NOTHING
        elif found is _NOTHING:
            record = make()
            if record is not None:
                self._records[form] = record


def form(
    tensors: Iterable[object],
    backend: object,
    settings: tuple[Any, ...],
    *more: Hashable,
    lists: tuple[Tensor, Tensor] | None = None,
) -> Form | None:
    """All that a call depends on but the numbers in its tensors, or None if it must take the whole way.

    Of `settings`, which nobody has checked yet, numbers, words and tuples of them make a form, by value and type: 1 is
    not True. `more` is taken as it is; callers with other settings keep another `Memory`. `lists` are those of a mask:
    how wide a dense one is does not matter, for every prediction makes another width.
    """
    if torch.compiler.is_compiling() or not _PLAIN or backend not in (None, BACKEND) or not _plain_eager():
        return None
    parts: list[Any] = []
    grads = torch.is_grad_enabled()
    for tensor in tensors if lists is None else (*tensors, *lists):
        if type(tensor) is not Tensor or _keys(tensor) not in _PLAIN or (grads and tensor.requires_grad):
            return None
        parts += (tensor.dtype, tensor.shape, tensor.stride())
    if lists is not None and lists[1].dim() == 4 and lists[1].is_contiguous():
        parts[-2:] = lists[1].shape[:3]
    for setting in settings:
        kind = type(setting)
        if kind not in _SETTINGS:
            if kind is not tuple or not _SETTINGS.issuperset(map(type, setting)):
                return None
            parts += map(type, setting)
        parts += (kind, setting)
    try:
        return (*parts, *more, cpu.target(), torch.get_num_threads())
    except ValueError:  # there is no such target: the call says so if nothing else is wrong with it
        return None


def _keys(tensor: Tensor) -> int:
    return torch._C._dispatch_keys(tensor).raw_repr()


def _plain_keys() -> frozenset[int]:
    """Dispatch keys of tensors with nothing special about them, outside of inference mode and inside."""
    with torch.inference_mode(False):
        usual = _keys(torch.empty(0, device="cpu"))
    with torch.inference_mode():
        return frozenset((usual, _keys(torch.empty(0, device="cpu"))))


def _plain_eager() -> bool:
    """Whether no mode, transformation, trace or profiler stands between the caller and plain memory."""
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.maybe_current_level() is not None
        or torch._C._dispatch_tls_is_dispatch_key_included(torch._C.DispatchKey.Functionalize)
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    )


try:
    _plain_eager()
    _PLAIN = _plain_keys()
except AttributeError:  # a torch that tells these things in another way: every call takes the whole way
    _PLAIN = frozenset()
