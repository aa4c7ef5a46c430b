"""Exceptions of tamis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class UnsupportedError(ValueError):
    """A valid request that no backend (or not the named one) can serve; the message lists every backend's reasons."""


def unsupported(what: str, reasons: Mapping[str, Sequence[str]]) -> UnsupportedError:
    """Build the error that names every backend with its reasons."""
    lines = [f"  {backend}: {'; '.join(why) if why else 'can serve it'}" for backend, why in reasons.items()]
    return UnsupportedError("\n".join([what, *lines]))
