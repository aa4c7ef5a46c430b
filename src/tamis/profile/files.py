"""The JSON of a profile: written one entry a line, read strictly, never executed."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

from tamis import predictors
from tamis.predictors.base import Keep, Predictor
from tamis.profile.layers import Evidence, LayerSettings, Stage

FORMAT, VERSION = "tamis profile", 1
_PRECISIONS = ("full", "int8", "fp8")


def write(path: Path, head: Mapping[str, Any], layers: Mapping[str, Sequence[Stage]]) -> None:
    """Write a profile; an existing file is replaced whole or not at all."""
    stages = {name: [stage_json(stage) for stage in found] for name, found in layers.items()}
    write_atomically(path, _text({"format": FORMAT, "version": VERSION, **head, "layers": stages}) + "\n")


def read(path: Path) -> tuple[dict[str, Any], dict[str, tuple[Stage, ...]]]:
    """The head of a profile's file and its layers.

    Raises:
        ValueError: the file is no profile, is cut off or damaged, or is of a newer version.
        OSError: it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
        return _parts(json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is no profile that tamis can use: {error}") from error


def _parts(data: Any) -> tuple[dict[str, Any], dict[str, tuple[Stage, ...]]]:
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f'it has no "format": "{FORMAT}"')
    version = data.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(f"its version is {version!r}")
    if version > VERSION:
        raise ValueError(f"its version is {version} and this tamis reads up to {VERSION}: use a newer tamis")
    data = {"run": "", **data}
    _exactly(data, ("format", "version", "tamis", "model", "run", "budget", "evidence", "layers"), "the file")
    head: dict[str, Any] = {name: _string(data[name], name) for name in ("tamis", "model", "run")}
    for part in ("budget", "evidence"):
        head[part] = {name: _real(value, f"{part}.{name}") for name, value in _mapping(data[part], part).items()}
    layers = {}
    for name, stages in _mapping(data["layers"], "layers").items():
        if not isinstance(stages, list):
            raise ValueError(f"layer {name!r} must hold a list of stages")
        layers[name] = tuple(_stage(stage, name) for stage in stages)
    return head, layers


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader, or a crash, meets the old one or the new one and nothing between."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def stage_json(stage: Stage) -> dict[str, Any]:
    settings = stage.settings
    return {
        "steps": [stage.first, stage.last],
        "predictor": None if settings.predictor is None else _predictor_json(settings.predictor),
        "pv_threshold": _number_json(settings.pv_threshold),
        "precision": settings.precision,
        "compensate": settings.compensate,
        "evidence": None
        if stage.evidence is None
        else {f.name: _number_json(getattr(stage.evidence, f.name)) for f in fields(Evidence)},
    }


def _predictor_json(predictor: Predictor) -> dict[str, Any]:
    name = type(predictor).__name__
    if name not in _known():
        raise ValueError(f"a profile can hold the predictors {', '.join(_known())}, got {name}")
    return {"name": name} | {key: _number_json(value) for key, value in vars(predictor).items()}


def _number_json(value: Any) -> Any:
    """Plain JSON of a setting; inf, which JSON does not have, is null."""
    if isinstance(value, Keep):
        return {"keys": [list(r) for r in value.keys], "queries": [list(r) for r in value.queries]}
    if isinstance(value, tuple):
        return [_number_json(item) for item in value]
    return None if isinstance(value, float) and value == math.inf else value


def _text(value: Any, indent: str = "") -> str:
    """JSON with an entry a line, and lists of plain values in one line."""
    inner = indent + "  "
    if isinstance(value, dict) and value:
        lines = [f"{inner}{json.dumps(key)}: {_text(item, inner)}" for key, item in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return "[\n" + ",\n".join(inner + _text(item, inner) for item in value) + f"\n{indent}]"
    return inline(value)


def inline(value: Any) -> str:
    return json.dumps(value, allow_nan=False)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"a name stands twice among {', '.join(sorted(found))}")
    return found


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no number that a profile can hold")


def _stage(data: Any, layer: str) -> Stage:
    names = ("steps", "predictor", "pv_threshold", "precision", "compensate", "evidence")
    _exactly(_mapping(data, f"layer {layer!r}"), names, f"layer {layer!r}")
    steps = data["steps"]
    if (
        not isinstance(steps, list)
        or len(steps) != 2
        or not _whole(steps[0])
        or not (steps[1] is None or _whole(steps[1]))
    ):
        raise ValueError(f"layer {layer!r}: steps must be [first, last or null], got {steps!r}")
    if data["precision"] not in _PRECISIONS:
        raise ValueError(
            f"layer {layer!r}: precision must be one of {', '.join(_PRECISIONS)}, got {data['precision']!r}"
        )
    compensate = data["compensate"]
    settings = LayerSettings(
        predictor=None if data["predictor"] is None else _predictor(data["predictor"], layer),
        pv_threshold=_threshold(data["pv_threshold"], layer),
        precision=data["precision"],
        compensate=None if compensate is None else _string(compensate, f"layer {layer!r}: compensate"),
    )
    evidence = None if data["evidence"] is None else _evidence(data["evidence"], layer)
    return Stage(settings, steps[0], steps[1], evidence)


def _predictor(data: Any, layer: str) -> Predictor:
    options = dict(_mapping(data, f"layer {layer!r}: predictor"))
    name = options.pop("name", None)
    if name not in _known():
        raise ValueError(f"layer {layer!r}: predictor must be one of {', '.join(_known())}, got {name!r}")
    kind = getattr(predictors, name)
    _exactly(options, tuple(f.name for f in fields(kind)), f"layer {layer!r}: predictor")
    try:
        return cast(Predictor, kind(**options))
    except (TypeError, ValueError) as error:
        raise ValueError(f"layer {layer!r}: {error}") from error


def _known() -> list[str]:
    """Predictors that a profile can hold: those whose settings are plain."""
    return [name for name in predictors.__all__ if name not in ("Keep", "Predictor")]


def _threshold(data: Any, layer: str) -> float | tuple[float, ...] | None:
    if data is None:
        return None
    where = f"layer {layer!r}: pv_threshold"
    values = [math.inf if item is None else _real(item, where) for item in (data if isinstance(data, list) else [data])]
    if not values or any(value <= 0 for value in values):
        raise ValueError(f"{where} must be above 0, one number or one per query head, got {data!r}")
    return tuple(values) if isinstance(data, list) else values[0]


def _evidence(data: Any, layer: str) -> Evidence:
    where = f"layer {layer!r}: evidence"
    _exactly(_mapping(data, where), tuple(f.name for f in fields(Evidence)), where)
    found: dict[str, Any] = {}
    for name, value in data.items():
        if name.endswith("samples"):
            if not _whole(value):
                raise ValueError(f"{where}.{name} must be a whole number, got {value!r}")
            found[name] = value
        elif isinstance(value, list):
            found[name] = tuple(_real(item, f"{where}.{name}") for item in value)
        else:
            raise ValueError(f"{where}.{name} must be a list of numbers, got {value!r}")
    lengths = {len(value) for name, value in found.items() if isinstance(value, tuple) and not name.startswith("held")}
    if len(lengths) != 1:
        raise ValueError(f"{where} must have one number per query head in every list")
    return Evidence(**found)


def _exactly(data: Mapping[str, Any], names: Sequence[str], where: str) -> None:
    missing, unknown = [n for n in names if n not in data], [n for n in data if n not in names]
    if missing or unknown:
        raise ValueError(f"{where}: missing {missing}, unknown {unknown}")


def _mapping(data: Any, where: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise ValueError(f"{where} must be an object, got {type(data).__name__}")
    return data


def _string(data: Any, where: str) -> str:
    if not isinstance(data, str):
        raise ValueError(f"{where} must be text, got {data!r}")
    return data


def _real(data: Any, where: str) -> float:
    if isinstance(data, bool) or not isinstance(data, (int, float)) or not math.isfinite(data):
        raise ValueError(f"{where} must be a number, got {data!r}")
    return float(data)


def _whole(data: Any) -> bool:
    return isinstance(data, int) and not isinstance(data, bool) and data >= 0
