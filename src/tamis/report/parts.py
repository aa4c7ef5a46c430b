"""Reading a demo result: its parts, lists and layers, whatever else may be in their place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Part = Mapping[str, Any]
NOTHING: Part = {}


def part_of(result: Mapping[str, Any], name: str) -> Part:
    part = result.get(name)
    return part if isinstance(part, Mapping) else NOTHING


def entries(part: Part, name: str) -> list[Part]:
    """The list of dicts under `name`, without anything that is not one."""
    values = part.get(name)
    return [v for v in values if isinstance(v, Mapping)] if isinstance(values, (list, tuple)) else []


def per_head(layer: Part, key: str) -> list[Any]:
    """The values of a layer, one per head; a single number counts as one head."""
    values = layer.get(key)
    return list(values) if isinstance(values, (list, tuple)) else [] if values is None else [values]


def head_count(layers: Sequence[Part]) -> int:
    return max((len(per_head(layer, key)) for layer in layers for key in ("density", "relative_l1")), default=0)


def layer_name(layer: Part, index: int) -> str:
    return str(layer.get("layer", index))
