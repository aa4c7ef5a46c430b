"""Captured attention calls on disk: a folder with `index.json` and one safetensors file per call.

docs/captures.md describes the format. Everything is checked when it is read, for the folder may come from elsewhere:
nothing is unpickled, no name leads out of the folder, and what does not fit is refused with the name of its file. What
is written appears under its name only when it is whole, the index after the file it names.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SCHEMA = 1
INDEX = "index.json"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TENSORS = ("query", "key", "value")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors", re.ASCII)
_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)


@dataclass(frozen=True)
class Entry:
    """One captured attention call, as the index describes it.

    Attributes:
        file: its name inside the folder.
        layer: qualified name of the attention module.
        input, step: which input of the model, and how many calls of this layer came before in it.
        causal, window, scale: as in `tamis.attend`; the ends of query and key are aligned.
        num_heads, num_kv_heads: heads of the model's query and key.
        heads, kv_heads: the kept ones, ascending; kept query heads are all those of the kept key heads.
        shapes: of "query", "key" and "value", each `[1, heads, seq, head_dim]`.
        dtype: "fp32", "bf16" or "fp16".
        bytes, sha256: size and hexadecimal digest of the file.
    """

    file: str
    layer: str
    input: int
    step: int
    causal: bool
    window: int | None
    scale: float | None
    num_heads: int
    num_kv_heads: int
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    shapes: dict[str, tuple[int, ...]]
    dtype: str
    bytes: int
    sha256: str

    @property
    def place(self) -> tuple[int, int, str]:
        """Input, step and layer: what no other entry of the folder shares."""
        return self.input, self.step, self.layer


@dataclass(frozen=True)
class Skipped:
    """An attention call that the format cannot hold, and why."""

    layer: str
    input: int
    step: int
    reason: str


@dataclass
class Index:
    """What `index.json` says. `layers` names every attention layer in the order of first calls, kept or not."""

    model: str
    layers: list[str] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Size of all files that it names."""
        return sum(entry.bytes for entry in self.entries)


def write_index(folder: Path, index: Index) -> None:
    """Replace the index of a folder in one step."""
    plain = {"schema": SCHEMA, **asdict(index)}
    write_whole(folder / INDEX, (json.dumps(plain, indent=1, allow_nan=False) + "\n").encode())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file beside its place, wait until the disk has it, and move it there."""
    part = path.with_name(f".part-{os.getpid()}-{path.name}")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def read_index(folder: Path) -> Index:
    """The checked index of a folder.

    Raises:
        ValueError: there is none, or it does not say what an index of this version says.
    """
    path = folder / INDEX
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no captures: {INDEX} is not there") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    fields = _Fields(content, str(path))
    if fields.whole("schema") != SCHEMA:
        raise ValueError(f"{path} has schema {fields.whole('schema')}, this tamis reads {SCHEMA}: capture again")
    fields.exactly({"schema", *Index.__dataclass_fields__})
    index = Index(
        model=fields.text("model"),
        layers=[_text(name, f"{path}: layers") for name in fields.items("layers")],
        entries=[_entry(item, f"{path}: entries[{i}]") for i, item in enumerate(fields.items("entries"))],
        skipped=[_skipped(item, f"{path}: skipped[{i}]") for i, item in enumerate(fields.items("skipped"))],
    )
    _check_together(index, path)
    return index


def read_tensors(folder: Path, entry: Entry) -> dict[str, Tensor]:
    """ "query", "key" and "value" of an entry, on the CPU.

    Raises:
        ValueError: the file is missing, lies elsewhere, is cut short or altered, or holds something else.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = folder / entry.file
    if path.resolve().parent != folder.resolve():
        raise ValueError(f"{path} leads out of its folder: refused")
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path} is not there, and {INDEX} names it") from None
    if len(content) != entry.bytes:
        raise ValueError(f"{path} has {len(content)} bytes and should have {entry.bytes}: cut short or altered")
    if hashlib.sha256(content).hexdigest() != entry.sha256:
        raise ValueError(f"{path} does not have the sha256 of {INDEX}: altered")
    try:
        tensors: dict[str, Tensor] = load(content)
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} is no readable safetensors file: {error}") from error
    expected = {name: (entry.shapes[name], DTYPES[entry.dtype]) for name in TENSORS}
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    if found != expected:
        raise ValueError(f"{path} holds {found}, {INDEX} says {expected}")
    return tensors


class _Fields:
    """An object of the index, read field by field; errors say where."""

    def __init__(self, content: object, where: str) -> None:
        if not isinstance(content, dict):
            raise ValueError(f"{where} must be an object, got {type(content).__name__}")
        self._content: dict[str, Any] = content
        self._where = where

    def exactly(self, names: set[str]) -> None:
        if extra := sorted(set(self._content) - names):
            raise ValueError(f"{self._where} has {extra[0]!r}, which schema {SCHEMA} does not know")

    def get(self, name: str) -> Any:
        if name not in self._content:
            raise ValueError(f"{self._where} has no {name!r}")
        return self._content[name]

    def where(self, name: str) -> str:
        return f"{self._where}: {name}"

    def text(self, name: str) -> str:
        return _text(self.get(name), self.where(name))

    def whole(self, name: str, *, least: int = 0) -> int:
        return _whole(self.get(name), self.where(name), least=least)

    def truth(self, name: str) -> bool:
        found = self.get(name)
        if not isinstance(found, bool):
            raise ValueError(f"{self.where(name)} must be true or false, got {found!r}")
        return found

    def items(self, name: str) -> list[Any]:
        found = self.get(name)
        if not isinstance(found, list):
            raise ValueError(f"{self.where(name)} must be a list, got {type(found).__name__}")
        return found

    def wholes(self, name: str) -> tuple[int, ...]:
        return tuple(_whole(item, self.where(name)) for item in self.items(name))

    def matching(self, name: str, pattern: re.Pattern[str], what: str) -> str:
        if not pattern.fullmatch(found := self.text(name)):
            raise ValueError(f"{self.where(name)} must be {what}, got {found!r}")
        return found


def _entry(content: object, where: str) -> Entry:
    fields = _Fields(content, where)
    fields.exactly(set(Entry.__dataclass_fields__))
    shapes = _Fields(fields.get("shapes"), fields.where("shapes"))
    shapes.exactly(set(TENSORS))
    scale = fields.get("scale")
    if scale is not None and (
        isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale)
    ):
        raise ValueError(f"{fields.where('scale')} must be a finite number or null, got {scale!r}")
    entry = Entry(
        file=fields.matching("file", _FILE_NAME, "the plain name of a .safetensors file"),
        layer=fields.text("layer"),
        input=fields.whole("input"),
        step=fields.whole("step"),
        causal=fields.truth("causal"),
        window=None if fields.get("window") is None else fields.whole("window", least=1),
        scale=scale,
        num_heads=fields.whole("num_heads", least=1),
        num_kv_heads=fields.whole("num_kv_heads", least=1),
        heads=fields.wholes("heads"),
        kv_heads=fields.wholes("kv_heads"),
        shapes={name: shapes.wholes(name) for name in TENSORS},
        dtype=fields.text("dtype"),
        bytes=fields.whole("bytes", least=1),
        sha256=fields.matching("sha256", _DIGEST, "64 hexadecimal digits"),
    )
    if entry.dtype not in DTYPES:
        raise ValueError(f"{fields.where('dtype')} must be one of {', '.join(DTYPES)}, got {entry.dtype!r}")
    _check_heads(entry, where)
    return entry


def _check_heads(entry: Entry, where: str) -> None:
    """Whole groups of heads, and shapes that attention can take."""
    group, rest = divmod(entry.num_heads, entry.num_kv_heads)
    if rest:
        raise ValueError(f"{where}: num_heads {entry.num_heads} is no multiple of num_kv_heads {entry.num_kv_heads}")
    kept = entry.kv_heads
    if not kept or list(kept) != sorted(set(kept)) or kept[-1] >= entry.num_kv_heads:
        raise ValueError(f"{where}: kv_heads must ascend below {entry.num_kv_heads}, got {list(kept)}")
    if entry.heads != query_heads(kept, group):
        raise ValueError(f"{where}: heads must be all query heads of kv_heads {list(kept)}, got {list(entry.heads)}")
    query, key, value = (entry.shapes[name] for name in TENSORS)
    fits = (
        len(query) == len(key) == len(value) == 4
        and all(size > 0 for size in (*query, *key, *value))
        and query[:2] == (1, len(entry.heads))
        and key[:2] == (1, len(kept))
        and key[:3] == value[:3]
        and query[3] == key[3]
    )
    if not fits:
        raise ValueError(
            f"{where}: shapes of {len(entry.heads)} query and {len(kept)} key heads do not fit together: "
            f"query {list(query)}, key {list(key)}, value {list(value)}"
        )


def query_heads(kv_heads: tuple[int, ...], group: int) -> tuple[int, ...]:
    """The query heads that share these key heads, `group` each."""
    return tuple(kv_head * group + member for kv_head in kv_heads for member in range(group))


def _skipped(content: object, where: str) -> Skipped:
    fields = _Fields(content, where)
    fields.exactly(set(Skipped.__dataclass_fields__))
    return Skipped(fields.text("layer"), fields.whole("input"), fields.whole("step"), fields.text("reason"))


def _check_together(index: Index, path: Path) -> None:
    """Every file, place and layer once, and no entry of a layer that `layers` does not name."""
    once: dict[str, list[Any]] = {
        "file": [entry.file.lower() for entry in index.entries],
        "input, step and layer": [entry.place for entry in index.entries],
        "layer name": index.layers,
    }
    for what, found in once.items():
        if len(set(found)) < len(found):
            raise ValueError(f"{path} has the same {what} twice: {Counter(found).most_common(1)[0][0]}")
    if unknown := {entry.layer for entry in index.entries} - set(index.layers):
        raise ValueError(f"{path}: layers does not name {min(unknown)!r}, of which there is an entry")


def _text(found: object, where: str) -> str:
    if not isinstance(found, str):
        raise ValueError(f"{where} must be text, got {found!r}")
    return found


def _whole(found: object, where: str, *, least: int = 0) -> int:
    if isinstance(found, bool) or not isinstance(found, int) or found < least:
        raise ValueError(f"{where} must be a whole number of at least {least}, got {found!r}")
    return found
