"""tamis offered to torch as an implementation of its flash attention, for code in which no mode can be turned on.

torch keeps such implementations by name until `torch.nn.attention.activate_flash_attention_impl(name)` puts one in
place of its kernel, in the whole process and in all threads. tamis takes over the kernel of the CPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from tamis.call import PerHead
from tamis.errors import UnsupportedError
from tamis.integrations.applied import Applied
from tamis.integrations.hook import Hook
from tamis.integrations.intercept import Asked, request_of
from tamis.integrations.request import Request
from tamis.integrations.schedule import Chooser
from tamis.integrations.settings import check_min_queries, uniform
from tamis.predictors.base import Predictor
from tamis.stats import AttentionOutput

_OP = "_scaled_dot_product_flash_attention_for_cpu"


class Kernel(Hook):
    """Takes the place of torch's kernel once it is activated.

    Args:
        answer: answers a call if it runs sparse.
    """

    def __init__(self, answer: Callable[[Request], AttentionOutput | None]) -> None:
        self._answer = answer
        self._library: Any = None  # torch's kernel is back when this is gone
        self._torchs: Any = None

    def activate(self) -> Kernel:
        """What torch calls to activate an implementation; it calls `remove` of what this returns."""
        library: Any = torch.library
        self._torchs = torch.library.get_kernel(f"aten::{_OP}", "CPU")
        self._library = library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            # That a kernel is overridden is what the caller asked for.
            warnings.simplefilter("ignore")
            self._library.impl(_OP, self._kernel, "CPU", allow_override=True)
        return self

    def remove(self) -> None:
        """Put torch's kernel back, as `torch.nn.attention.restore_flash_attention_impl()` does; safe to call twice."""
        self._library = None

    def _kernel(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        asked = Asked(query, key, value, attn_mask, dropout_p, is_causal, scale)
        request = request_of(asked, f"{query.shape[1]} heads of {query.shape[3]}")
        # Its own call would come back here.
        result = self._answer(replace(request, original=None))
        if result is not None:
            return result.output, result.lse
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
        options = {"attn_mask": attn_mask, "scale": scale}
        found: tuple[Tensor, Tensor] = self._torchs.call_boxed(keys, query, key, value, dropout_p, is_causal, **options)
        return found


class Registered(Applied):
    """Calls of an implementation that torch knows; see `register`."""

    def __init__(self, chooser: Chooser, *, backend: str | None, min_queries: int) -> None:
        self.kernel = Kernel(self.sparse)
        super().__init__(lambda attend: self.kernel, chooser, backend=backend, min_queries=min_queries)


def register(
    predictor: Predictor | None = None,
    *,
    name: str = "tamis",
    precision: str | None = None,
    pv_threshold: PerHead | Literal["default"] | None = "default",
    compensate: str | None = None,
    backend: str | None = None,
    min_queries: int = 128,
) -> Registered:
    """Let torch know tamis as a flash attention implementation; nothing changes until it is activated.

    Activated, it answers every call that torch would have given to the CPU's flash kernel. Masks arrive there as
    additive ones and run dense, as do calls that need gradients. A GPU's calls are left alone: see `tamis.sdpa`.

    Args:
        name: under which torch keeps it.
        predictor, precision, pv_threshold, compensate, backend, min_queries: as in `tamis.apply`.

    Returns:
        A handle with `.calls`, `.dense_reasons` and `.stats()`, and `.remove()`.

    Raises:
        TypeError, ValueError: an argument has the wrong type or is out of its range.
        UnsupportedError: this torch takes no implementations.

    Example:
        >>> import torch
        >>> from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl
        >>> handle = register()
        >>> activate_flash_attention_impl("tamis")
        >>> query, key, value = (torch.randn(1, 4, 1024, 64) for _ in range(3))
        >>> output = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        >>> restore_flash_attention_impl()
        >>> handle.calls
        {'sparse': 1, 'dense': 0}
    """
    if not isinstance(min_queries, int):
        # Measuring would call what it measures.
        raise TypeError(f"min_queries must be an integer, got {min_queries!r}")
    check_min_queries(min_queries)
    add: Any = getattr(torch.nn.attention, "register_flash_attention_impl", None)
    if add is None or not hasattr(torch.library, "get_kernel"):
        raise UnsupportedError(f"torch {torch.__version__} takes no flash attention implementations: use tamis.sdpa()")
    chooser = Chooser(uniform(predictor, precision, pv_threshold, compensate), None, [])
    handle = Registered(chooser, backend=backend, min_queries=min_queries)
    add(name, register_fn=handle.kernel.activate)
    return handle
