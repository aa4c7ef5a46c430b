"""From how many queries on sparse attention is faster than dense here: measured once per machine and kind of call.

The two are run on random tensors with a ladder of lengths, in turn, and their median times compared. The break-even is
the first of two neighbouring lengths at which sparse is faster by `MARGIN`. `Sparge` is measured as if it kept every
block, and skipped no value product, so that a real call, which keeps fewer, is faster still.

Results are kept in `$TAMIS_CACHE`, else `$XDG_CACHE_HOME/tamis`, else `~/.cache/tamis`, a file for each; where that
cannot be written, in memory.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tamis.backends import base
from tamis.integrations.request import Request, torch_attention
from tamis.predictors.sparge import Sparge
from tamis.profile import LayerSettings
from tamis.version import installed

LENGTHS = (64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
MARGIN = 0.9
ROUNDS = (3, 9)
# Seconds for one length, after which no round is begun, and for all, after which no length is.
SECONDS = (0.3, 3.0)

_known: dict[str, BreakEven] = {}


@dataclass(frozen=True)
class BreakEven:
    """What was measured.

    Attributes:
        queries: sparse attention is faster from here on; None if it is not up to `longest`.
        longest: the longest length that was measured.
    """

    queries: int | None
    longest: int

    def reason(self, queries: int) -> str | None:
        """Why a call of so many queries runs dense; None if it does not."""
        if self.queries is None:
            return f"dense is faster up to {self.longest} queries, the most that was measured"
        return f"shorter than the break-even of {self.queries} queries" if queries < self.queries else None


def break_even(
    request: Request,
    settings: LayerSettings,
    backend: str | None,
    dense: Callable[[Request], Tensor],
    sparse: Callable[[Request, LayerSettings, str | None], Any],
) -> BreakEven:
    """The break-even of calls like this one: from memory, from the file, or by measuring, which takes seconds.

    Args:
        request: a call; its batch, lengths, mask and padding do not matter.
        dense, sparse: what runs such calls.
    """
    worst = _worst(settings)
    key = _key(request, worst, backend)
    text = json.dumps(key, sort_keys=True)
    if text not in _known:
        # The address of an object says nothing in another process.
        path = None if " at 0x" in text else _folder() / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
        found = None if path is None else _read(path, key)
        if found is None:
            found = _measure(request, worst, backend, dense, sparse)
            if path is not None:
                _write(path, key, found)
        _known[text] = found
    return _known[text]


def can_measure(device: torch.device) -> bool:
    """Not inside of a graph that is being compiled or captured."""
    if torch.compiler.is_compiling():
        return False
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def _worst(settings: LayerSettings) -> LayerSettings:
    """Settings like these that compute everything."""
    if isinstance(settings.predictor, Sparge):
        return replace(settings, predictor=Sparge(topk=1.0, similarity=-1.0), pv_threshold=None)
    return replace(settings, pv_threshold=None)


def _measure(
    request: Request,
    settings: LayerSettings,
    backend: str | None,
    dense: Callable[[Request], Tensor],
    sparse: Callable[[Request, LayerSettings, str | None], Any],
) -> BreakEven:
    started, first, length = time.perf_counter(), None, 0
    for length in LENGTHS:
        call = _random(request, length)
        functions = functools.partial(dense, call), functools.partial(sparse, call, settings, backend)
        seconds = _compare(*functions, request.query.device)
        faster = seconds[1] <= MARGIN * seconds[0]
        if faster and first is not None:
            return BreakEven(first, length)
        first = length if faster else None
        if time.perf_counter() - started > SECONDS[1]:
            break
    return BreakEven(None, length)


def _compare(dense: Callable[[], Any], sparse: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Median seconds of both, run in turn."""
    times: tuple[list[float], list[float]] = ([], [])
    started = time.perf_counter()
    for number in range(ROUNDS[1] + 1):
        for function, taken in zip((dense, sparse), times, strict=True):
            _wait(device)
            begun = time.perf_counter()
            function()
            _wait(device)
            if number > 0:  # the first time may compile
                taken.append(time.perf_counter() - begun)
        if number >= ROUNDS[0] and time.perf_counter() - started > SECONDS[0]:
            break
    return statistics.median(times[0]), statistics.median(times[1])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _random(request: Request, length: int) -> Request:
    """A call of the same kind with random tensors, batch 1 and `length` queries and keys."""
    generator = torch.Generator(request.query.device).manual_seed(0)

    def like(tensor: Tensor) -> Tensor:
        shape = (1, tensor.shape[1], length, tensor.shape[3])
        # [batch, seq, heads, dim] in memory, as projections leave it.
        made = torch.randn(
            shape[0], shape[2], shape[1], shape[3], generator=generator, device=tensor.device, dtype=torch.float32
        )
        return made.to(tensor.dtype).transpose(1, 2)

    query, key, value = like(request.query), like(request.key), like(request.value)
    plain: dict[str, Any] = {"mask": None, "segments": None, "library": torch_attention, "original": None, "keep": None}
    return replace(request, query=query, key=key, value=value, **plain)


def _key(request: Request, settings: LayerSettings, backend: str | None) -> dict[str, Any]:
    """All that the break-even depends on, as JSON can say it."""
    query, key, value = request.query, request.key, request.value
    device = query.device
    return {
        "machine": [platform.platform(), _processor(), os.cpu_count(), _accelerator(device)],
        "versions": [installed(), torch.__version__],
        "threads": torch.get_num_threads(),
        "target": base.load("cpu").target(device) if device.type == "cpu" else None,
        "dtype": f"{query.dtype}, autocast {torch.is_autocast_enabled(device.type)}",
        "heads": [query.shape[1], key.shape[1]],
        "dims": [query.shape[3], value.shape[3]],
        "causal": request.causal,
        "window": request.window,
        "extras": [request.softcap is not None, request.sink_logits is not None],
        "settings": repr(settings),
        "backend": backend,
        "measured": [list(LENGTHS), MARGIN, list(ROUNDS), list(SECONDS)],
    }


@functools.cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _accelerator(device: torch.device) -> str | None:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def _folder() -> Path:
    own, shared = os.environ.get("TAMIS_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own).expanduser() / "break-even"
    try:
        return (Path(shared).expanduser() if shared else Path.home() / ".cache") / "tamis" / "break-even"
    except RuntimeError:  # nobody's home
        return Path(tempfile.gettempdir()) / "tamis" / "break-even"


def _read(path: Path, key: dict[str, Any]) -> BreakEven | None:
    """A measurement from its file; None if there is none, or none that can be used."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(held, dict) or held.get("key") != key:
        return None
    queries, longest = held.get("queries"), held.get("longest")
    whole = all(isinstance(number, int) and not isinstance(number, bool) for number in (queries or 0, longest))
    return BreakEven(queries, longest) if whole and longest in LENGTHS and queries in (None, *LENGTHS) else None


def _write(path: Path, key: dict[str, Any], found: BreakEven) -> None:
    """Keep a measurement, whole or not at all; several processes may do so at once."""
    text = json.dumps({"key": key, "queries": found.queries, "longest": found.longest}, indent=1)
    part = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        number, part = tempfile.mkstemp(dir=path.parent, suffix=".part")
        with os.fdopen(number, "w", encoding="utf-8") as file:
            file.write(text + "\n")
        os.replace(part, path)
    except OSError:
        if part is not None:
            Path(part).unlink(missing_ok=True)
