"""What a tuning run has found so far, on disk: a run that was interrupted goes on where it stopped.

A file of lines. The first says what is tuned on what; each other one is the checksum and the JSON of one result. A last
line that is cut off, as a killed process leaves it, is dropped and its result found anew; any other damage is refused.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Journal:
    """Results by key, kept in a file if there is one.

    Args:
        path: the file; None keeps everything in memory.
        head: what the results are about; a file with another head is refused.

    Raises:
        ValueError: the file is about something else, or damaged.
    """

    def __init__(self, path: Path | None, head: dict[str, Any]) -> None:
        self._path = path
        self._found: dict[str, Any] = {}
        if path is None:
            return
        known = path.read_bytes() if path.exists() else b""
        whole = known[: known.rfind(b"\n") + 1]
        if whole:
            self._read(whole, head)
        if len(whole) < len(known):
            with path.open("rb+") as file:
                file.truncate(len(whole))
        if not whole:
            self._append({"head": head})

    def _read(self, data: bytes, head: dict[str, Any]) -> None:
        try:
            for number, entry in enumerate(_entries(self._path, data), start=1):
                if number == 1:
                    self._compare(head, entry["head"])
                else:
                    self._found[entry["key"]] = entry["value"]
        except Damaged as error:
            raise ValueError(f"{error}: delete it to start anew") from error

    def _compare(self, head: dict[str, Any], known: dict[str, Any]) -> None:
        different = [name for name in {**head, **known} if head.get(name) != known.get(name)]
        if different:
            raise ValueError(
                f"{self._path} is of another run (other {', '.join(sorted(different))}): delete it, or name another"
            )

    def __contains__(self, key: str) -> bool:
        return key in self._found

    def __getitem__(self, key: str) -> Any:
        return self._found[key]

    def put(self, key: str, value: Any) -> None:
        """Keep a result: plain JSON."""
        self._found[key] = value
        if self._path is not None:
            self._append({"key": key, "value": value})

    def _append(self, entry: dict[str, Any]) -> None:
        assert self._path is not None
        text = json.dumps(entry, separators=(",", ":")).encode()
        with self._path.open("ab") as file:
            file.write(_checksum(text) + b" " + text + b"\n")


class Damaged(ValueError):
    """A journal that cannot be read; the message says which, and where."""


def read(path: Path, prefix: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The head of a journal's file, and those of its results whose keys start with a prefix; the file stays as it is.

    Raises:
        Damaged: it is no journal, or damaged.
        OSError: it cannot be read.
    """
    entries = _entries(path, path.read_bytes(), prefix)
    try:
        head = next(entries)["head"]
        found = {entry["key"]: entry["value"] for entry in entries}
    except (StopIteration, KeyError, TypeError) as error:
        raise Damaged(f"{path} is no journal of `tamis tune --resume`") from error
    return head, found


def _entries(path: Path | None, data: bytes, prefix: str = "") -> Iterator[Any]:
    """The head, and of the results in whole lines (the last may be cut off) those whose keys start with a prefix."""
    wanted = b'{"key":' + json.dumps(prefix)[:-1].encode() if prefix else b""
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):
        check, _, text = line.partition(b" ")
        if check != _checksum(text):
            raise Damaged(f"{path} is damaged in line {number}")
        if number == 1 or text.startswith(wanted):
            yield json.loads(text)


def _checksum(text: bytes) -> bytes:
    return b"%08x" % zlib.crc32(text)
