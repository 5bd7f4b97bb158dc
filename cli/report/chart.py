"""What the page's chart draws: points with their intervals on several axes, as plain values for its script."""

from __future__ import annotations

from typing import Any, Final

from cli.report.pareto import common_floor
from cli.report.schema import CandidateRow, EnergyValue, LatencyValue, MetricValue, Report, TargetRow
from cli.report.words import (
    VERDICT_WORDS,
    energy_words,
    mebibytes,
    metric_title,
    milliseconds,
    on_other_machine,
    percent,
    percentile_title,
    scope_words,
)

SHIPPED: Final = "shipped"
TRIED: Final = "tried"
METRIC: Final = "metric"

Ends = list[float | None]
"""Value, lower and upper end; the ends are None where the value has no interval."""


def chart_data(report: Report) -> dict[str, Any]:
    """The document that the page's script reads.

    axes: id, title and which direction is better. points: of two sets, since the shipped files were scored on the test
    split and everything that was tried on the validation split; `values` by axis. lines: the metric of the teacher and
    the floor that all targets share.
    """
    axes: dict[str, dict[str, Any]] = {}
    metric = metric_title(report.metric)
    axes[METRIC] = {"id": METRIC, "title": f"{metric} %", "better": "high"}
    points = []
    for row in report.targets:
        points.append(_shipped(row, metric, axes))
        points += [_tried(row, candidate, metric, axes) for candidate in row.candidates]
    drawn = [point for point in points if len(point["values"]) > 1]
    used = {axis for point in drawn for axis in point["values"]}
    # latencies first, the one that most points have before the others
    frequency = {axis: sum(axis in point["values"] for point in drawn) for axis in axes}
    order = sorted(axes, key=lambda axis: (axis == METRIC, not axis.startswith("latency"), -frequency[axis]))
    teacher = next((each.metric for each in report.references if each.role == "teacher" and each.metric), None)
    floor = common_floor(report)
    lines = [("teacher", None if teacher is None else teacher.value * 100), ("floor", floor)]
    return {
        "metric": metric,
        "axes": [axes[axis] for axis in order if axis in used],
        "points": drawn,
        "lines": [{"title": title, "value": round(value, 4)} for title, value in lines if value is not None],
    }


def file_name(row: TargetRow) -> str:
    """The shipped file among those that were tried, such as int8-fp16; the precision where nothing was."""
    return next((candidate.precision for candidate in row.candidates if candidate.chosen), row.precision)


def _shipped(row: TargetRow, metric: str, axes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    values = _values(row.latency, row.metric, row.size_mib, row.peak_memory_mib, row.energy, axes)
    star = ", ONNX Runtime here, not the device" if on_other_machine(row) else ""
    lines = [
        f"{row.arch}, {row.precision}",
        *_latency_words(row.latency),
        *_metric_words(row.metric, metric, f"test split{star}"),
        f"file {mebibytes(row.size_mib)} MiB" if row.size_mib is not None else "",
        f"peak memory {mebibytes(row.peak_memory_mib)} MiB" if row.peak_memory_mib is not None else "",
        f"energy {energy_words(row)}" if row.energy is not None else "",
        f"{row.device_title}, {row.stack}",
    ]
    return {
        "set": SHIPPED,
        "target": row.name,
        "precision": file_name(row),
        "label": row.name,
        "look": row.verdict.replace(" ", "-"),
        "title": f"{row.name}: {VERDICT_WORDS[row.verdict]}",
        "lines": [line for line in lines if line],
        "values": values,
    }


def _tried(row: TargetRow, candidate: CandidateRow, metric: str, axes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    energy, memory = candidate.energy, candidate.peak_memory_mib
    values = _values(candidate.latency, candidate.metric, candidate.size_mib, memory, energy, axes)
    lines = [
        row.arch,
        *_latency_words(candidate.latency),
        *_metric_words(candidate.metric, metric, "validation split"),
        f"file {mebibytes(candidate.size_mib)} MiB" if candidate.size_mib is not None else "",
        f"peak memory {mebibytes(memory)} MiB" if memory is not None else "",
        f"energy {milliseconds(energy.value)} mJ" if energy is not None and energy.value is not None else "",
        candidate.rejected_because or "",
    ]
    return {
        "set": TRIED,
        "target": row.name,
        "precision": candidate.precision,
        "label": f"{row.name} {candidate.precision}",
        "look": "chosen" if candidate.chosen else "other",
        "title": f"{row.name}, {candidate.precision}{': chosen' if candidate.chosen else ''}",
        "lines": [line for line in lines if line],
        "values": values,
    }


def _values(
    latency: LatencyValue | None,
    metric: MetricValue | None,
    size: float | None,
    memory: float | None,
    energy: EnergyValue | None,
    axes: dict[str, dict[str, Any]],
) -> dict[str, Ends]:
    """The point's place on every axis that it has one on; axes that are new are added."""
    values: dict[str, Ends] = {}

    def put(axis: str, title: str, ends: Ends) -> None:
        axes.setdefault(axis, {"id": axis, "title": title, "better": "low"})
        values[axis] = ends

    if metric is not None:
        values[METRIC] = [metric.value * 100, metric.low * 100, metric.high * 100]
    if latency is not None and latency.point is not None:
        # other percentiles, clocks and batches are other quantities, each with its own axis
        title = f"{percentile_title(latency.percentile)} ms, {scope_words(latency)}"
        put(f"latency {title}", title, [latency.point, latency.lower_bound, latency.upper_bound])
    if size is not None:
        put("size", "file size MiB", [size, None, None])
    if memory is not None:
        put("memory", "peak memory MiB", [memory, None, None])
    if energy is not None and energy.value is not None:
        put("energy", "energy mJ", [energy.value, energy.low, energy.high])
    return values


def _latency_words(latency: LatencyValue | None) -> list[str]:
    if latency is None:
        return ["latency not measured"]
    ends = f"[{milliseconds(latency.lower_bound)}, {milliseconds(latency.upper_bound)}]"
    return [f"{percentile_title(latency.percentile)} {milliseconds(latency.point)} ms {ends}, {scope_words(latency)}"]


def _metric_words(metric: MetricValue | None, title: str, split: str) -> list[str]:
    if metric is None:
        return []
    return [f"{title} {percent(metric.value)} % [{percent(metric.low)}, {percent(metric.high)}], {split}"]
