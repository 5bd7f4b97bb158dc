from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from export.mixed import rescue


@st.composite
def oracles(draw: st.DrawFn) -> tuple[int, list[frozenset[int]]]:
    """A number of candidates, and sets each of which is enough: what contains one of them holds."""
    count = draw(st.integers(1, 12))
    sets = draw(st.lists(st.frozensets(st.integers(0, count - 1)), min_size=1, max_size=4))
    return count, sets


@given(oracles())
def test_rescue_of_a_monotone_oracle_is_minimal(oracle: tuple[int, list[frozenset[int]]]) -> None:
    count, enough = oracle

    def keeps(chosen: frozenset[int]) -> bool:
        return any(needed <= chosen for needed in enough)

    found = rescue(range(count), keeps, limit=10_000)
    assert keeps(found)
    assert not any(keeps(found - {item}) for item in found)


@given(oracles(), st.integers(1, 12))
def test_rescue_that_runs_out_of_questions_still_holds(oracle: tuple[int, list[frozenset[int]]], limit: int) -> None:
    count, enough = oracle
    asked = 0

    def keeps(chosen: frozenset[int]) -> bool:
        nonlocal asked
        asked += 1
        return any(needed <= chosen for needed in enough)

    found = rescue(range(count), keeps, limit=limit)
    assert any(needed <= found for needed in enough)
    assert asked <= limit + 1


def test_rescue_of_k_asks_about_k_times_the_logarithm() -> None:
    asked = 0

    def keeps(chosen: frozenset[int]) -> bool:
        nonlocal asked
        asked += 1
        return chosen >= {0, 3, 5}

    assert rescue(range(64), keeps) == {0, 3, 5}
    assert asked <= 3 * 7 + 4
