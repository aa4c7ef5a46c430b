"""`tamis.sdpa`: any code that calls torch's attention, sparse inside of a `with` block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from tamis.call import PerHead
from tamis.integrations.applied import Applied, LayerCalls
from tamis.integrations.audit import Audit
from tamis.integrations.hook import Hook
from tamis.integrations.intercept import Asked, Interception, as_asked, request_of, sweep
from tamis.integrations.schedule import Chooser
from tamis.integrations.settings import check_backend, check_min_queries, uniform
from tamis.predictors.base import Predictor


class Block(Hook):
    """A mode that is on in a `with` block, which may be entered again once it was left.

    Blocks may be left in any order, and by other threads: each turns off its own mode and no other.

    Args:
        make: makes the mode, a new one for each time that the block is entered.
    """

    def __init__(self, make: Callable[[], Interception]) -> None:
        self._make = make
        self._mode: Interception | None = None

    def begin(self) -> None:
        """Enter the block."""
        if self._mode is not None:
            raise ValueError("sdpa: this block is entered already; make another with tamis.sdpa()")
        if not torch.compiler.is_compiling():
            sweep()
        self._mode = self._make()
        self._mode.__enter__()  # type: ignore[no-untyped-call]

    def remove(self) -> None:
        """Leave the block; safe to call twice."""
        mode, self._mode = self._mode, None
        if mode is not None:
            mode.leave()


class Intercepted(Applied):
    """Every attention call that Python code of this thread makes in a `with` block; see `sdpa`."""

    def __init__(
        self, chooser: Chooser, *, backend: str | None, min_queries: int | Literal["auto"], audit: Audit | None
    ) -> None:
        self._block = Block(lambda: Interception(self._answer, self._missed))
        super().__init__(lambda attend: self._block, chooser, backend=backend, min_queries=min_queries, audit=audit)

    def __enter__(self) -> Intercepted:
        self._block.begin()
        return self

    def _answer(self, asked: Asked) -> Tensor:
        # In a graph nothing is counted, and the numbers may be symbols, which a name would bind to one value.
        graph = torch.compiler.is_compiling() or asked.query.dim() < 3
        name = "scaled_dot_product_attention" if graph else f"{asked.query.shape[-3]} heads of {asked.query.shape[-1]}"
        return as_asked(self.attend(request_of(asked, name)), asked)

    def _missed(self) -> None:
        if not torch.compiler.is_compiling():
            layer = self._calls.setdefault("nn.MultiheadAttention", LayerCalls())
            layer.dense += 1
            layer.reasons["inside of nn.MultiheadAttention"] += 1


def sdpa(
    predictor: Predictor | None = None,
    *,
    precision: str | None = None,
    pv_threshold: PerHead | Literal["default"] | None = "default",
    compensate: str | None = None,
    backend: str | None = None,
    min_queries: int | Literal["auto"] = 128,
    audit: float | Audit | None = None,
) -> Intercepted:
    """Run `torch.nn.functional.scaled_dot_product_attention` through tamis inside of a `with` block, in any code.

    Calls with at least `min_queries` queries run sparse. Calls that ask for something sparse attention does not do
    (dropout, gradients, additive masks, ..) run as torch runs them, and `dense_reasons` counts why. Nothing is patched:
    other threads are left alone, blocks may end in any order, and torch.compile traces through it, inside or outside of
    the block. Calls that `nn.MultiheadAttention` makes are hidden by torch and stay dense.

    Args:
        predictor: which blocks to keep, by default `Sparge()`. Tokens that matter to all, such as the text of an image
            model, are not known here: give `Sparge(keep=..)`, or use `tamis.apply`.
        precision, pv_threshold, compensate, backend, min_queries, audit: as in `tamis.apply`.

    Returns:
        A handle for `with`, with `.calls`, `.dense_reasons`, `.stats()` by kind of call, `.audit()` and `.reset()`.

    Raises:
        TypeError, ValueError: an argument has the wrong type or is out of its range.

    Example:
        >>> import torch, tamis
        >>> query, key, value = (torch.randn(1, 4, 1024, 64) for _ in range(3))
        >>> with tamis.sdpa(tamis.Sparge(topk=0.25)) as handle:
        ...     output = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        >>> output.shape, handle.calls
        (torch.Size([1, 4, 1024, 64]), {'sparse': 1, 'dense': 0})
    """
    settings = uniform(predictor, precision, pv_threshold, compensate)
    check_backend(backend)
    check_min_queries(min_queries)
    if audit is not None and not isinstance(audit, Audit):
        audit = Audit(share=audit)
    chooser = Chooser(settings, None, [])
    return Intercepted(chooser, backend=backend, min_queries=min_queries, audit=audit)
