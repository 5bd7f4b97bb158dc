"""Limits become a verdict and targets an exit status."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.report.verdict import WORST_FIRST, RowVerdict, exit_status, overall_verdict


@dataclass(frozen=True)
class Row:
    verdict: RowVerdict


rows_of = st.lists(st.sampled_from(WORST_FIRST).map(Row))
limits_of = st.lists(st.sampled_from(WORST_FIRST[1:]).map(Row))


@given(limits_of, st.booleans())
def test_overall_verdict_is_the_worst_limit(limits: list[Row], measured: bool) -> None:
    verdict = overall_verdict(limits, measured=measured)
    own: list[RowVerdict] = ["pass" if measured else "not measured"]
    assert verdict == min([*own, *(limit.verdict for limit in limits)], key=WORST_FIRST.index)


@given(limits_of, st.booleans())
def test_an_error_overrides_every_limit(limits: list[Row], measured: bool) -> None:
    assert overall_verdict(limits, measured=measured, error="the builder crashed") == "error"


@pytest.mark.parametrize(("measured", "expected"), [(True, "pass"), (False, "not measured")])
def test_without_limits_only_a_measured_target_passes(measured: bool, expected: str) -> None:
    assert overall_verdict([], measured=measured) == expected


@given(rows_of, st.booleans())
def test_exit_status_takes_the_worst_in_the_order_1_3_4(rows: list[Row], require: bool) -> None:
    meaning = {"error": 1, "fail": 3, "inconclusive": 4, "not measured": 4 if require else 0, "pass": 0}
    statuses = {meaning[row.verdict] for row in rows}
    assert exit_status(rows, require) == next((status for status in (1, 3, 4) if status in statuses), 0)


@given(rows_of, rows_of, st.booleans())
def test_another_target_never_makes_a_bad_status_good(rows: list[Row], more: list[Row], require: bool) -> None:
    order = [1, 3, 4, 0]
    assert order.index(exit_status(rows + more, require)) <= order.index(exit_status(rows, require))


@given(rows_of)
def test_the_order_of_targets_does_not_matter(rows: list[Row]) -> None:
    assert exit_status(rows) == exit_status(rows[::-1])
