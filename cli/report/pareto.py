"""Which points no other point beats, and axes whose ticks are round numbers. Pure functions, no drawing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cli.report.schema import Report

LOG_FROM = 10.0
"""Largest to smallest latency above which the axis is logarithmic."""


@dataclass(frozen=True)
class Point:
    """A measured target: latency in ms, metric in percent with its interval."""

    name: str
    ms: float
    percent: float
    low: float
    high: float


@dataclass(frozen=True)
class Axis:
    """Maps values to 0..1 and names its ticks."""

    low: float
    high: float
    log: bool
    ticks: tuple[float, ...]

    def place(self, value: float) -> float:
        """Where a value is: 0 at `low`, 1 at `high`."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def measured_points(report: Report) -> list[Point]:
    """The targets that have both a measured latency and a metric."""
    return [
        Point(row.name, row.latency.point, row.metric.value * 100, row.metric.low * 100, row.metric.high * 100)
        for row in report.targets
        if row.metric is not None and row.latency is not None and row.latency.point
    ]


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats (none is both at least as fast and at least as good, and better in one).

    Fastest first, so the metric rises along the front. Of equal points the first stays.
    """
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.ms, -point.percent)):
        if not front or point.percent > front[-1].percent:
            front.append(point)
    return front


def latency_axis(values: Sequence[float], most_ticks: int = 7) -> Axis:
    """An axis around these latencies (all > 0): logarithmic when they differ by more than a factor of 10."""
    low, high = min(values), max(values)
    if high / low <= LOG_FROM:
        return linear_axis(values, most_ticks, floor=0.0)
    low, high = low / 1.15, high * 1.15
    for steps in ((1, 2, 5), (1, 3), (1,)):
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = tuple(
            step * 10.0**decade if decade >= 0 else step / 10.0**-decade
            for decade in decades
            for step in steps
            if low <= step * 10.0**decade <= high
        )
        if len(ticks) <= most_ticks:
            break
    return Axis(low, high, True, ticks)


def linear_axis(values: Sequence[float], most_ticks: int, floor: float = -math.inf, ceiling: float = math.inf) -> Axis:
    """A linear axis around these values with a margin, within floor..ceiling; ticks at 1, 2 or 5 times 10^n."""
    low, high = min(values), max(values)
    margin = max((high - low) * 0.12 or abs(high) * 0.1, 1e-6) if (low, high) != (0, 0) else 1.0
    low, high = max(low - margin, floor), min(high + margin, ceiling)
    if high <= low:
        low, high = low - margin, high + margin
    rough = (high - low) / most_ticks
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return Axis(low, high, False, tuple(round(index * step, 10) for index in range(first, last + 1)))


def common_floor(report: Report) -> float | None:
    """The metric floor in percent when all targets that set one agree on it."""
    floors = {limit.limit for row in report.targets if (limit := row.limit("metric_floor")) is not None}
    return floors.pop() * 100 if len(floors) == 1 else None


def near(value: float | None, points: Sequence[Point]) -> bool:
    """Whether a reference line is near enough to the points to be drawn without squeezing them together."""
    if value is None or not points:
        return False
    metrics = [point.percent for point in points]
    room = max(2 * (max(metrics) - min(metrics)), 3.0)
    return min(metrics) - room <= value <= max(metrics) + room
