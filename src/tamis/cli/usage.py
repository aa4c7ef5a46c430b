"""What options may be: judged by their parser, or once all of them are known."""

from __future__ import annotations

import argparse
from decimal import Decimal
from pathlib import Path
from typing import TypeAlias

# What `add_subparsers` returns; argparse has no public name for it.
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


class UsageError(Exception):
    """An option that can only be judged after parsing."""


def check_folder(path: Path | None, option: str) -> None:
    """Before minutes of measuring, not after: a file can be written there.

    Raises:
        UsageError: its folder is not there, or it is one itself.
    """
    if path is not None and not path.resolve().parent.is_dir():
        raise UsageError(f"{option}: the folder of {path} is not there")
    if path is not None and path.is_dir():
        raise UsageError(f"{option}: {path} is a folder, give a file in it")


def positive(text: str) -> int:
    """A whole number above 0."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return number


def tokens(text: str) -> int:
    """A whole number above 0, also as 1e6 or 1_000_000."""
    try:
        return positive(str(int(Decimal(text))) if Decimal(text) % 1 == 0 else text)
    except (ArithmeticError, ValueError):
        return positive(text)


def natural(text: str) -> int:
    """A whole number, 0 included."""
    return 0 if text == "0" else positive(text)


def share(text: str) -> float:
    """A number in (0, 1]."""
    number = _number(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"expected a number in (0, 1], got {text!r}")
    return number


def size(text: str) -> float:
    """A number above 0."""
    number = _number(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return number


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def workers(text: str) -> int | str:
    """A number of processes, or "ray"."""
    return text if text == "ray" else positive(text)


def ray(text: str) -> str:
    """The address of a Ray cluster."""
    if not text:
        raise argparse.ArgumentTypeError("expected the address of a Ray cluster, as HOST:PORT, or auto")
    return f"ray@{text}"


def layers(text: str) -> tuple[int | str, ...]:
    """Numbers or names, with commas between them."""
    return tuple(int(item) if item.isdecimal() else item for item in map(str.strip, text.split(",")))


def numbers(text: str) -> tuple[int, ...]:
    """Whole numbers with commas between them."""
    found = [item for item in layers(text) if isinstance(item, int)]
    if len(found) < text.count(",") + 1:
        raise argparse.ArgumentTypeError(f"expected whole numbers with commas between them, got {text!r}")
    return tuple(found)
