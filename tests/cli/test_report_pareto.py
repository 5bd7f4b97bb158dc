"""The Pareto front and round axes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cli.report.pareto import LOG_FROM, Point, latency_axis, linear_axis, measured_points, pareto_front
from tests.cli.report_example import depot_nx, example, line3_orin

latencies = st.floats(1e-3, 1e5)
percents = st.floats(0, 100)
point_lists = st.lists(st.builds(Point, st.just("p"), latencies, percents, percents, percents), min_size=1, max_size=20)


def beats(a: Point, b: Point) -> bool:
    return a.ms <= b.ms and a.percent >= b.percent and (a.ms, a.percent) != (b.ms, b.percent)


@given(point_lists)
def test_front_is_exactly_what_no_point_beats(points: list[Point]) -> None:
    front = pareto_front(points)
    unbeaten = {(p.ms, p.percent) for p in points if not any(beats(other, p) for other in points)}
    assert {(p.ms, p.percent) for p in front} == unbeaten
    assert len(front) == len(unbeaten)


@given(point_lists)
def test_front_rises_in_latency_and_metric(points: list[Point]) -> None:
    front = pareto_front(points)
    assert [p.ms for p in front] == sorted({p.ms for p in front})
    assert [p.percent for p in front] == sorted({p.percent for p in front})


@given(st.lists(latencies, min_size=1, max_size=10))
def test_latency_axis_holds_its_values_and_is_logarithmic_above_a_factor_of_ten(values: list[float]) -> None:
    axis = latency_axis(values)
    assert axis.log == (max(values) / min(values) > LOG_FROM)
    assert all(-1e-9 <= axis.place(value) <= 1 + 1e-9 for value in [*values, *axis.ticks])
    assert axis.ticks == tuple(sorted(set(axis.ticks)))


@given(st.lists(percents, min_size=1, max_size=10))
def test_metric_axis_holds_its_values_and_ends_at_100(values: list[float]) -> None:
    axis = linear_axis(values, 6, ceiling=100.0)
    assert all(-1e-9 <= axis.place(value) <= 1 + 1e-9 for value in [*values, *axis.ticks])
    assert axis.high <= 100.0 or min(values) == 100.0
    assert len(axis.ticks) <= 8


def test_targets_that_were_not_measured_are_no_points() -> None:
    assert [point.name for point in measured_points(example((line3_orin(), depot_nx())))] == ["line3-orin"]
