"""The stand-in for hypothesis draws what it says, and the same each time."""

from __future__ import annotations

import draws as st
import pytest


@pytest.mark.parametrize("more", [1])
@st.given(data=st.data(), flag=st.booleans())
def test_draws(data: st.DataObject, flag: bool, more: int) -> None:
    assert more == 1
    number, share = data.draw(st.integers(2, 5)), data.draw(st.floats(0.5, 0.75, width=32) | st.none())
    assert 2 <= number <= 5
    assert share is None or 0.5 <= share <= 0.75
    pairs = data.draw(st.lists(st.tuples(st.sampled_from("ab"), st.nothing() | st.none()), min_size=1, max_size=3))
    assert 1 <= len(pairs) <= 3
    assert all(letter in "ab" and nothing is None for letter, nothing in pairs)
    assert flag in (True, False)


def test_every_example_ran_and_they_differ() -> None:
    drawn: list[int] = []

    @st.given(number=st.integers(0, 1000))
    def draw(number: int) -> None:
        drawn.append(number)

    draw()
    draw()
    assert len(drawn) == 2 * st.EXAMPLES
    assert drawn[: st.EXAMPLES] == drawn[st.EXAMPLES :]
    assert len(set(drawn)) > 2


def test_a_failure_is_a_failure() -> None:
    @st.given(number=st.integers(1, 3))
    def fails(number: int) -> None:
        assert number < 3

    with pytest.raises(AssertionError):
        fails()
