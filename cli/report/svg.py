"""The report's figures as inline SVG: they scale, print, follow light and dark, and explain themselves on hover."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from cli.report.pareto import common_floor, latency_axis, linear_axis, measured_points, near, pareto_front
from cli.report.schema import Report, TargetRow, TrainingRun
from cli.report.words import VERDICT_WORDS, metric_title, milliseconds, percent, percentile_title, percentiles
from cli.report.words import plain_number as number

WIDTH, HEIGHT = 760, 380
LEFT, RIGHT, TOP, BOTTOM = 52, 18, 24, 46
CHARACTER = 7.0
"""Width of a label's character in user units, on the safe side."""


def _line(x1: float, y1: float, x2: float, y2: float, look: str) -> str:
    return f'<line class="{look}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, look: str = "", anchor: str = "start") -> str:
    return f'<text class="{look}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _mark(verdict: str, x: float, y: float) -> str:
    """A shape per verdict, so that nobody needs colour: circle PASS, cross FAIL, diamond undecided, square error."""
    if verdict == "fail":
        return f'<path class="mark fail" d="M{x - 6:.1f},{y - 6:.1f}l12,12m0,-12l-12,12"/>'
    if verdict == "inconclusive":
        return f'<path class="mark inconclusive" d="M{x:.1f},{y - 7:.1f}l7,7l-7,7l-7,-7z"/>'
    if verdict == "pass":
        return f'<circle class="mark pass" cx="{x:.1f}" cy="{y:.1f}" r="6"/>'
    return f'<rect class="mark error" x="{x - 5:.1f}" y="{y - 5:.1f}" width="10" height="10"/>'


def _describe(row: TargetRow, metric: str) -> str:
    assert row.latency is not None
    assert row.metric is not None
    latency, value = row.latency, row.metric
    return (
        f"{row.name}: {VERDICT_WORDS[row.verdict]}\n{row.arch}, {row.precision}\n"
        f"{percentile_title(latency.percentile)} {milliseconds(latency.point)} ms "
        f"[{milliseconds(latency.lower_bound)}, {milliseconds(latency.upper_bound)}]\n"
        f"{metric_title(metric)} {percent(value.value)} % [{percent(value.low)}, {percent(value.high)}]\n"
        f"{row.device_title}, {row.stack}"
    )


def accuracy_latency(report: Report) -> str:
    """Metric over latency of the measured targets with both intervals and the Pareto front; "" for fewer than two."""
    plotted = measured_points(report)
    if len(plotted) < 2:
        return ""
    rows = {row.name: row for row in report.targets}
    floor = common_floor(report)
    teacher = next((r.metric.value * 100 for r in report.references if r.role == "teacher" and r.metric), None)
    references = [
        (value, label)
        for value, label in ((floor, "floor"), (teacher, "teacher"))
        if value is not None and near(value, plotted)
    ]
    extent = [value for point in plotted for value in (point.low, point.high)]
    vertical = linear_axis([*extent, *(value for value, _ in references)], 7, ceiling=100.0)
    horizontal = latency_axis([point.ms for point in plotted], most_ticks=9)
    inner_width, inner_height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    base = TOP + inner_height

    def x_of(ms: float) -> float:
        return LEFT + min(max(horizontal.place(max(ms, horizontal.low or 1e-9)), 0.0), 1.0) * inner_width

    def y_of(value: float) -> float:
        return base - min(max(vertical.place(value), 0.0), 1.0) * inner_height

    title = metric_title(report.metric)
    shown = percentiles(report)
    axis_title = f"{percentile_title(shown[0]) if len(shown) == 1 else 'latency'} ms{', log' if horizontal.log else ''}"
    parts = [
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)} over latency">',
    ]
    for tick in vertical.ticks:
        parts += [_line(LEFT, y_of(tick), WIDTH - RIGHT, y_of(tick), "grid")]
        parts += [_text(LEFT - 8, y_of(tick) + 4, number(tick), "tick", "end")]
    for tick in horizontal.ticks:
        parts += [_line(x_of(tick), TOP, x_of(tick), base, "grid")]
        parts += [_text(x_of(tick), base + 18, number(tick), "tick", "middle")]
    parts += [_line(LEFT, base, WIDTH - RIGHT, base, "axis"), _line(LEFT, TOP, LEFT, base, "axis")]
    parts += [
        _text(WIDTH - RIGHT, HEIGHT - 8, axis_title, "title", "end"),
        _text(LEFT, TOP - 5, f"{title} %", "title"),
    ]
    taken: list[tuple[float, float, float, float]] = [(LEFT, TOP - 18, LEFT + 80, TOP - 2)]
    for value, label in references:
        parts += [_line(LEFT, y_of(value), WIDTH - RIGHT, y_of(value), f"reference {label}")]
        parts += [_text(WIDTH - RIGHT - 4, y_of(value) - 5, f"{label} {number(round(value, 2))}", "tick", "end")]
        taken.append((WIDTH - RIGHT - 90, y_of(value) - 18, WIDTH - RIGHT, y_of(value) - 2))

    front = pareto_front(plotted)
    path = f"M{x_of(front[0].ms):.1f},{y_of(front[0].percent):.1f}"
    for point in front[1:]:
        path += f"H{x_of(point.ms):.1f}V{y_of(point.percent):.1f}"
    parts.append(f'<path class="front" d="{path}H{WIDTH - RIGHT}"><title>Pareto front</title></path>')

    for point in plotted:
        x, y = x_of(point.ms), y_of(point.percent)
        taken.append((x - 8, y - 8, x + 8, y + 8))
    for point in plotted:
        row = rows[point.name]
        x, y = x_of(point.ms), y_of(point.percent)
        parts.append(f"<g><title>{escape(_describe(row, report.metric))}</title>")
        parts.append(_line(x, y_of(point.low), x, y_of(point.high), "whisker"))
        if row.latency is not None and row.latency.lower_bound and row.latency.upper_bound:
            parts.append(_line(x_of(row.latency.lower_bound), y, x_of(row.latency.upper_bound), y, "whisker"))
        parts.append(f'<circle class="hover" cx="{x:.1f}" cy="{y:.1f}" r="14"/>{_mark(row.verdict, x, y)}</g>')
    for point in plotted:
        name = point.name if len(point.name) <= 28 else point.name[:16] + "…" + point.name[-11:]
        x, y = x_of(point.ms), y_of(point.percent)
        length = len(name) * CHARACTER
        places = [(x + 12, y - 6), (x - 12 - length, y - 6), (x + 12, y + 16), (x - 12 - length, y + 16)]
        places += [(x - length / 2, y - 14 - 14 * i) for i in range(4)] + [
            (x - length / 2, y + 24 + 14 * i) for i in range(4)
        ]
        for left, baseline in places:
            box = (left, baseline - 11, left + length, baseline + 3)
            inside = box[0] >= LEFT and box[2] <= WIDTH - RIGHT and box[1] >= TOP - 10 and box[3] <= base
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                parts.append(_text(left, baseline, name, "label"))
                break
    parts.append("</svg>")
    return "".join(parts)


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def training_curve(run: TrainingRun, metric: str) -> str:
    """Validation metric over epochs, small; "" without at least two validations."""
    values = [(point.epoch, point.validation * 100) for point in run.curve if point.validation is not None]
    values = [(epoch, value) for epoch, value in values if math.isfinite(value)]
    if len(values) < 2:
        return ""
    width, height, left, right, top, bottom = 340, 150, 40, 12, 10, 24
    vertical = linear_axis([value for _, value in values], 4, floor=0.0, ceiling=100.0)
    first, last = values[0][0], values[-1][0]

    def place(epoch: float, value: float) -> tuple[float, float]:
        share = (epoch - first) / (last - first) if last > first else 0.5
        return left + share * (width - left - right), height - bottom - vertical.place(value) * (height - top - bottom)

    label = f"{metric_title(metric)} on the validation split over epochs"
    parts = [f'<svg class="curve" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">']
    for tick in vertical.ticks:
        y = place(first, tick)[1]
        parts += [_line(left, y, width - right, y, "grid"), _text(left - 6, y + 4, number(tick), "tick", "end")]
    parts.append(f'<polyline class="front" points="{_points([place(*value) for value in values])}"/>')
    for epoch, value in values:
        x, y = place(epoch, value)
        best = run.best_epoch is not None and abs(epoch - run.best_epoch) < 1e-9
        title = f"epoch {number(epoch)}: {value:.1f} %{', chosen' if best else ''}"
        look = "mark pass" if best else "dot"
        parts.append(
            f'<circle class="{look}" cx="{x:.1f}" cy="{y:.1f}" r="{5 if best else 3}"><title>{title}</title></circle>'
        )
    parts += [
        _text(left, height - 6, f"epoch {number(first)}", "tick"),
        _text(width - right, height - 6, number(last), "tick", "end"),
    ]
    return "".join(parts) + "</svg>"


def _points(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
