"""A model whose attention runs through tamis: sparse where possible, dense with a counted reason elsewhere."""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from tamis.errors import UnsupportedError
from tamis.integrations.audit import Audit, Auditor, LayerAudit
from tamis.integrations.break_even import BreakEven, break_even, can_measure
from tamis.integrations.decoding import Decode, attend_selected, decode_obstacle
from tamis.integrations.hook import Hook
from tamis.integrations.request import Request, dense, sparse
from tamis.integrations.schedule import Chooser
from tamis.integrations.spread import Spread
from tamis.profile import LayerSettings
from tamis.stats import AttentionOutput, AttentionStats

_Self = TypeVar("_Self", bound="Applied")
_numbers = itertools.count()
_handles: WeakValueDictionary[str, Applied] = WeakValueDictionary()


@dataclass
class LayerCalls:
    """What one attention layer did since the model was hooked: counts, and the stats of its last sparse call.

    Attributes:
        traced: "sparse" and "dense" calls that torch.compile made part of a graph, each counted when it was traced.
    """

    sparse: int = 0
    dense: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    last: AttentionStats | None = None
    traced: Counter[str] = field(default_factory=Counter)


class Applied(Hook):
    """Attention that runs through tamis: of one model, or of all that ask for it by name.

    Compiled graphs do not count their calls: `traced` says how the calls that were compiled into graphs run.

    Args:
        install: puts the function it is given in the place of attention.
        chooser: settings of every call.
        backend, min_queries, audit, decode: as in `tamis.apply`.
        spread: where the ranks are that hold the other tokens.
    """

    def __init__(
        self,
        install: Callable[[Callable[[Request], Tensor]], Hook],
        chooser: Chooser,
        *,
        backend: str | None,
        min_queries: int | Literal["auto"],
        audit: Audit | None = None,
        decode: Decode | None = None,
        spread: Spread | None = None,
    ) -> None:
        self.backend = backend
        self.min_queries = min_queries
        self._chooser = chooser
        self._auditor = None if audit is None else Auditor(audit)
        self._calls: dict[str, LayerCalls] = {}
        self._break_even: dict[str, tuple[tuple[object, ...], BreakEven]] = {}
        self._decode = decode
        self._spread = spread
        self.removed = False
        self._warned = False
        self._number = ""  # of a handle that is made inside of a graph, which nobody sees
        if not torch.compiler.is_compiling():
            self._number = str(next(_numbers))  # a string: torch.compile takes numbers for symbols
            _handles[self._number] = self
        self._installed = install(self.attend)
        self._installed.follow_steps(chooser.tell)

    def __enter__(self: _Self) -> _Self:
        if self.removed:
            raise ValueError("this handle was removed: call tamis.apply again")
        return self

    def __repr__(self) -> str:
        density = [layer.last.density for layer in self._calls.values() if layer.last is not None]
        mean = f", density={sum(density) / len(density):.3f}" if density else ""
        reasons = f", dense_reasons={dict(self.dense_reasons)}" if self.dense_reasons else ""
        traced = f", traced={self.traced} (graphs do not count their calls)" if any(self.traced.values()) else ""
        removed = ", removed" if self.removed else ""
        return f"{type(self).__name__}(calls={self.calls}{mean}{reasons}{traced}{removed})"

    def remove(self) -> None:
        """Restore the attention that was there before; safe to call twice."""
        self._installed.remove()
        self.removed = True

    @property
    def step(self) -> int | None:
        """The step of a diffusion model that runs now; None while it is counted from the calls."""
        return self._chooser.step

    @step.setter
    def step(self, step: int) -> None:
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ValueError(f"step must be an integer of at least 0, got {step!r}")
        self._chooser.step = step

    def start(self) -> None:
        """Begin a new image or video: steps count from 0 again. Counts and audit go on."""
        self._chooser.start()

    @property
    def calls(self) -> dict[str, int]:
        """Number of calls that ran sparse and dense, over all layers; those in compiled graphs are not among them."""
        layers = self._calls.values()
        return {"sparse": sum(layer.sparse for layer in layers), "dense": sum(layer.dense for layer in layers)}

    @property
    def traced(self) -> dict[str, int]:
        """Number of calls that torch.compile made part of a graph, which runs them as often as it runs."""
        layers = self._calls.values()
        return {kind: sum(layer.traced[kind] for layer in layers) for kind in ("sparse", "dense")}

    @property
    def dense_reasons(self) -> Counter[str]:
        """How many calls ran dense for which reason."""
        return sum((layer.reasons for layer in self._calls.values()), Counter())

    def stats(self) -> dict[str, LayerCalls]:
        """Counts and last stats by the qualified name of the layer."""
        return dict(self._calls)

    def audit(self) -> dict[str, LayerAudit]:
        """Estimated error of every layer since the model was hooked or `reset`, by its qualified name.

        Raises:
            ValueError: no audit was asked for.
        """
        if self._auditor is None:
            raise ValueError("there is no audit: give audit=0.005")
        return self._auditor.report()

    def reset(self) -> None:
        """Forget the counts, the steps and the audit's samples."""
        self._calls.clear()
        self._chooser.start()
        if self._auditor is not None:
            self._auditor.reset()

    def attend(self, request: Request) -> Tensor:
        """Answer a call, sparse or dense, and count it."""
        if self._spread is not None:
            choice = self._chooser.choose(request.layer)
            # Whatever this rank's part looks like: all ranks must do the same.
            settings = choice.settings if choice.dense is None else LayerSettings(None, precision="full")
            output = self._spread.attend(request, settings, self.backend)
            self._count(request, "all keys on every rank" if request.whole else choice.dense, None)
            return output
        result = self.sparse(request)
        return dense(request) if result is None else result.output

    def sparse(self, request: Request) -> AttentionOutput | None:
        """Answer a call if it runs sparse, and count it in either case."""
        choice = self._chooser.choose(request.layer)
        reason = request.obstacle or self._too_few(request) or choice.dense
        if reason is None:
            try:
                if self._decode is not None and request.query.shape[2] == 1:
                    return self._selected(request, self._decode)
                reason = self._too_slow(request, choice.settings) if self.min_queries == "auto" else None
                if reason is None:
                    return self._sparse(request, choice.settings)
            except UnsupportedError as error:
                if self.backend is not None:
                    raise
                first, *backends = str(error).splitlines()
                reason = f"{first} ({', '.join(line.strip() for line in backends)})" if backends else first
        self._count(request, reason, None)
        return None

    def _too_few(self, request: Request) -> str | None:
        queries = request.query.shape[2]
        least = 2 if self.min_queries == "auto" else self.min_queries
        if queries == 1 and (self._decode is not None or least > 1):
            return decode_obstacle(request, self._decode)
        return None if queries >= least else f"fewer than {least} queries"

    def _too_slow(self, request: Request, settings: LayerSettings) -> str | None:
        known = self._break_even.get(request.layer)
        if can_measure(request.query.device):
            # What of a layer's calls may change; the whole key takes as long as a short call.
            query, threads = request.query, torch.get_num_threads()
            kind = (id(settings.predictor), query.dtype, query.device, request.causal, request.window, threads)
            if known is None or known[0] != kind:
                known = kind, break_even(request, settings, self.backend, dense, sparse)
                self._break_even[request.layer] = known
        if known is None:
            return "the break-even is not known inside of a graph: call the model once before"
        return known[1].reason(request.query.shape[2])

    def _selected(self, request: Request, decode: Decode) -> AttentionOutput:
        result = attend_selected(request, decode, self.backend)
        self._count(request, None, result.stats)
        return result

    def _sparse(self, request: Request, settings: LayerSettings) -> AttentionOutput:
        result = sparse(request, settings, self.backend)
        self._count(request, None, result.stats)
        if self._auditor is not None and can_measure(request.query.device):
            self._auditor.look(request, result.output)
        return result

    def _count(self, request: Request, reason: str | None, stats: AttentionStats | None) -> None:
        if torch.compiler.is_compiling():
            if self._number:
                _trace(self._number, request.layer, "sparse" if reason is None else "dense")
            return
        if reason == "gradients" and not self._warned and request.module is not None and not request.module.training:
            self._warned = True
            warnings.warn(
                f"{request.layer} runs dense because gradients are recorded, and so does all else in this model: call "
                "it under torch.inference_mode()",
                RuntimeWarning,
                stacklevel=2,
            )
        layer = self._calls.setdefault(request.layer, LayerCalls())
        if reason is None:
            layer.sparse += 1
            layer.last = stats
        else:
            layer.dense += 1
            layer.reasons[reason] += 1


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _trace(number: str, layer: str, kind: str) -> bool:
    """Count a call that becomes part of a graph: torch.compile runs this while it traces, and leaves it out."""
    _handles[number]._calls.setdefault(layer, LayerCalls()).traced[kind] += 1
    return True
