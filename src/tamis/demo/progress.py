"""A progress bar on stderr: one redrawn line on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TextIO

_WIDTH = 24
_REDRAW_SECONDS = 0.1


def note(text: str) -> None:
    """Say on stderr what is going on, for steps that cannot count how far they are."""
    print(text, file=sys.stderr, flush=True)


class Progress:
    """Progress of one task of `total` steps; silent until it has taken `delay` seconds.

    Example:
        >>> with Progress(3, "reading") as progress:
        ...     for _ in range(3):
        ...         progress.advance()
    """

    def __init__(self, total: int, label: str, *, delay: float = 2.0, stream: TextIO | None = None) -> None:
        self.total = max(total, 1)
        self.label = label
        self.done = 0
        self._stream = sys.stderr if stream is None else stream
        self._terminal = self._stream.isatty()
        self._start = time.monotonic()
        self._next = self._start + delay
        self._delay = delay
        self._shown = False
        self._drawn = 0

    def advance(self, steps: int = 1) -> None:
        """Count `steps` more as done."""
        self.update(self.done + steps)

    def update(self, done: int) -> None:
        """Set how many steps are done."""
        self.done = min(done, self.total)
        now = time.monotonic()
        if now >= self._next:
            self._next = now + (_REDRAW_SECONDS if self._terminal else max(10.0, self._delay))
            self._draw(now)

    def _draw(self, now: float) -> None:
        share = self.done / self.total
        filled = round(share * _WIDTH)
        bar = "█" * filled + "·" * (_WIDTH - filled)
        text = f"{self.label} {bar} {share:4.0%} {now - self._start:5.0f} s"
        self._stream.write(f"\r\x1b[K{text}" if self._terminal else f"{self.label} {share:.0%}\n")
        self._stream.flush()
        self._shown = True
        self._drawn = self.done

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        if self._shown:
            if kind is None and self._drawn < self.total:
                self.done = self.total
                self._draw(time.monotonic())
            if self._terminal:
                self._stream.write("\n")
                self._stream.flush()
