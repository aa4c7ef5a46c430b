"""What a tuning run has found so far, on disk: a run that was interrupted goes on where it stopped.

A file of lines. The first says what is tuned on what; each other one is the checksum and the JSON of one result. A last
line that is cut off, as a killed process leaves it, is dropped and its result found anew; any other damage is refused,
and so is a file that is no journal: nothing of it is touched. One run at a time has a file.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_HEAD = b'{"head":'


def fingerprint(head: dict[str, Any]) -> str:
    """What tells a run from others: a checksum of what its journal is about."""
    return hashlib.sha256(json.dumps(head, sort_keys=True).encode()).hexdigest()[:16]


class Journal:
    """Results by key, kept in a file if there is one; the file is locked until `close`.

    Args:
        path: the file; None keeps everything in memory.
        head: what the results are about; a file with another head is refused.

    Raises:
        ValueError: the file is no journal, about something else, damaged, or in use by another run.
        OSError: it cannot be read or written.
    """

    def __init__(self, path: Path | None, head: dict[str, Any]) -> None:
        self._path = path
        self._found: dict[str, Any] = {}
        self._file = -1
        if path is None:
            return
        binary = getattr(os, "O_BINARY", 0)  # Windows
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | binary, 0o644)
        self._close = weakref.finalize(self, os.close, self._file)
        try:
            self._open(path, head)
        except BaseException:
            self.close()
            raise

    def _open(self, path: Path, head: dict[str, Any]) -> None:
        if not stat.S_ISREG(os.fstat(self._file).st_mode):
            raise ValueError(f"{path} must be a file to keep results in")
        _lock(self._file, path)
        known, first = path.read_bytes(), _line({"head": head})
        whole = known[: known.rfind(b"\n") + 1]
        if not whole and not first.startswith(known):  # of what this run would write, a piece may be there
            raise ValueError(f"{path} is no journal of `tamis.tune(resume=)`: name another file")
        if whole:
            self._read(whole, head)
        if len(whole) < len(known):
            os.ftruncate(self._file, len(whole))
        if not whole:
            self._append(first)

    def close(self) -> None:
        """Give the file to other runs; safe to call twice."""
        if self._file >= 0:
            self._close()

    def _read(self, data: bytes, head: dict[str, Any]) -> None:
        entries = _entries(self._path, data)
        try:
            self._compare(head, next(entries)["head"])
            for entry in entries:
                self._found[entry["key"]] = entry["value"]
        except Damaged as error:
            raise ValueError(f"{error}: delete it to start anew, or name another") from error

    def _compare(self, head: dict[str, Any], known: dict[str, Any]) -> None:
        different = [name for name in {**head, **known} if head.get(name) != known.get(name)]
        if different:
            raise ValueError(
                f"{self._path} is of another run (other {', '.join(sorted(different))}): delete it, or name another"
            )

    def __contains__(self, key: str) -> bool:
        return key in self._found

    def __getitem__(self, key: str) -> Any:
        if key not in self._found:  # it was promised: a line is missing
            raise ValueError(f"{self._path} is damaged: it lacks {key!r}: delete it to start anew, or name another")
        return self._found[key]

    def put(self, key: str, value: Any) -> None:
        """Keep a result: plain JSON."""
        self._found[key] = value
        if self._path is not None:
            self._append(_line({"key": key, "value": value}))

    def _append(self, line: bytes) -> None:
        left = memoryview(line)
        while left:
            left = left[os.write(self._file, left) :]


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
    except StopIteration as error:
        raise Damaged(f"{path} is no journal of `tamis tune --resume`") from error
    return head, {entry["key"]: entry["value"] for entry in entries}


def _entries(path: Path | None, data: bytes, prefix: str = "") -> Iterator[Any]:
    """The head, and of the results in whole lines (the last may be cut off) those whose keys start with a prefix."""
    wanted = b'{"key":' + json.dumps(prefix)[:-1].encode() if prefix else b""
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):
        check, _, text = line.partition(b" ")
        if check != _checksum(text) or (number == 1) != text.startswith(_HEAD):
            raise Damaged(f"{path} is damaged in line {number}{', or no journal' if number == 1 else ''}")
        if number > 1 and not text.startswith(wanted):
            continue
        try:
            entry = json.loads(text)
            sound = isinstance(entry["head"], dict) if number == 1 else isinstance(entry["key"], str)
            if not sound or (number > 1 and "value" not in entry):
                raise KeyError
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise Damaged(f"{path} is damaged in line {number}") from error
        yield entry


def _lock(file: int, path: Path) -> None:
    """Keep other runs away from a file until it is closed, where the system can."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"{path} is in use by another run: wait for it, or name another file") from error
    except OSError:  # a file system without locks
        return


def _line(entry: dict[str, Any]) -> bytes:
    text = json.dumps(entry, separators=(",", ":")).encode()
    return _checksum(text) + b" " + text + b"\n"


def _checksum(text: bytes) -> bytes:
    return b"%08x" % zlib.crc32(text)
