"""What the suite leaves out and what it remembers must not change what it proves."""

from __future__ import annotations

from itertools import combinations, product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pairs import pairs
from remember import KEPT, remember

import tamis

NAMES = ("engine", "dtype", "length", "causal")


def case(values: tuple[Any, ...], given: tuple[str, ...] = NAMES[1:]) -> Any:
    marks = [SimpleNamespace(args=(name,)) for name in given]
    return SimpleNamespace(
        callspec=SimpleNamespace(params=dict(zip(NAMES, values, strict=False))), iter_markers=lambda _: marks
    )


def test_every_pair_of_values_is_kept() -> None:
    engines, others = [object() for _ in range(7)], [("a", "b", "c"), (1, 63, 65, 1000), (False, True)]
    everything = [case(values) for values in product(engines, *others)]
    kept = pairs(everything)
    assert 7 * 4 <= len(kept) < len(everything) / 4
    assert [item for item in everything if item in kept] == kept

    def held(items: list[Any]) -> set[Any]:
        return {pair for item in items for pair in combinations(item.callspec.params.items(), 2)}

    assert held(kept) == held(everything)


def test_a_product_of_two_is_kept_whole() -> None:
    two = [case(values, ("dtype",)) for values in product("abc", "xyz")]
    assert pairs(two) == two
    together = [case((engine, *lengths), ("dtype, length",)) for engine, lengths in product("abc", [(1, 2), (1, 3)])]
    assert pairs(together) == together
    alone = SimpleNamespace()
    assert pairs([alone]) == [alone]  # type: ignore[list-item]


def test_only_the_same_bits_are_the_same() -> None:
    calls = []

    @remember
    def twice(x: torch.Tensor, **options: Any) -> tuple[torch.Tensor, float]:
        calls.append(options)
        return 2 * x, 0.5

    zero = torch.zeros(3)
    first, _ = twice(zero)
    first[0] = 7
    assert twice(zero.clone())[0].tolist() == [0, 0, 0]
    assert len(calls) == 1
    mask = tamis.BlockMask.from_dense(torch.ones(1, 1, 1, 1, dtype=torch.bool), seq_lens=(1, 1))
    for options in ({"a": 1}, {"a": 1.0}, {"a": True}, {"a": None}, {"b": 1}, {"a": (1,)}, {"a": [1]}, {"a": mask}):
        twice(zero, **options)
    for x in (-zero, zero.double(), zero[None], zero.int()):
        twice(x)
    assert len(calls) == 13
    for number in range(KEPT):
        twice(zero, number=number)
    assert twice(zero)[0].tolist() == [0, 0, 0]
    assert len(calls) == 13 + KEPT + 1
    with pytest.raises(TypeError, match="one set from another"):
        twice(zero, a={1})
