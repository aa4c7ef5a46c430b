"""Which packages are installed."""

from __future__ import annotations

import functools
from importlib.metadata import PackageNotFoundError, version


@functools.cache
def installed(package: str = "tamis") -> str | None:
    """The version of an installed package; None where there is none, as of tamis in a bare source tree."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
