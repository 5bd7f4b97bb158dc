"""Training curves as inline SVG: they scale, print, follow light and dark, and explain themselves on hover."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from cli.report.pareto import linear_axis
from cli.report.schema import TrainingRun
from cli.report.words import metric_title
from cli.report.words import plain_number as number

MOST_POINTS = 200
"""Of a curve; a longer one is thinned."""


def _line(x1: float, y1: float, x2: float, y2: float, look: str) -> str:
    return f'<line class="{look}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, look: str = "", anchor: str = "start") -> str:
    return f'<text class="{look}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def training_curve(run: TrainingRun, metric: str) -> str:
    """Validation metric over epochs, small; "" without at least two validations."""
    values = [(point.epoch, point.validation * 100) for point in run.curve if point.validation is not None]
    values = [(epoch, value) for epoch, value in values if math.isfinite(value)]
    if len(values) < 2:
        return ""
    if len(values) > MOST_POINTS:
        kept = set(range(0, len(values), -(-len(values) // MOST_POINTS))) | {len(values) - 1}
        values = [entry for i, entry in enumerate(values) if i in kept or entry[0] == run.best_epoch]
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
