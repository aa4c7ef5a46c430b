"""Which tamis runs."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def installed() -> str:
    """The version of the installed package; "" where the source tree runs without one."""
    try:
        return version("tamis")
    except PackageNotFoundError:
        return ""
