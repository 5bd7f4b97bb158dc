from __future__ import annotations

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from export.mixed import Unit, affordable, pools, rescue, share_in_int8


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


def unit(place: int, multiply_adds: int) -> Unit:
    return Unit(str(place), "Conv", frozenset({str(place)}), multiply_adds)


def test_a_unit_that_is_too_large_to_leave_in_float_does_not_end_the_list() -> None:
    large, *small = units = [unit(place, size) for place, size in enumerate([900, 40, 30, 30])]
    assert affordable(units, units, 0.2) == small
    assert affordable(units, [*small, large], 0.2) == small


@given(st.lists(st.integers(0, 100), min_size=1, max_size=10), st.floats(0, 1), st.randoms())
def test_what_may_be_left_in_float_keeps_the_share_and_nothing_more_fits(
    sizes: list[int], least: float, random: Random
) -> None:
    units = [unit(place, size) for place, size in enumerate(sizes)]
    order = random.sample(units, len(units))
    taken = affordable(units, order, least)
    assert share_in_int8(units, taken) >= least
    assert taken == [entry for entry in order if entry in taken]
    assert all(share_in_int8(units, [*taken, other]) < least for other in units if other not in taken)


def test_a_large_unit_gets_its_turn_in_place_of_smaller_ones() -> None:
    first, second, third = units = [unit(place, size) for place, size in enumerate([30, 60, 10])]
    assert pools(units, units, 0.2) == [[first, third], [second, third]]
    assert pools(units, units, 0.0) == [units]
    assert pools([first], [first], 0.5) == []
