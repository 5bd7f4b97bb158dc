"""The report as CSV and as Markdown, for spreadsheets and pull requests."""

from __future__ import annotations

import csv
import io
import re
from typing import cast, get_args

from cli.report.schema import LimitName, MetricValue, Report, ShotName, ShotRow
from cli.report.words import (
    LIMIT_TITLES,
    NOT_THE_DEVICE,
    VERDICT_WORDS,
    bound_words,
    counts_line,
    date,
    duration,
    exploration_notes,
    latency_limit,
    limit_figures,
    limit_unit,
    mebibytes,
    metric_title,
    milliseconds,
    on_other_machine,
    percent,
    percentile_title,
    percentiles,
    plain_number,
    points,
    provenance,
    reasons,
    scopes,
    shot_notes,
    shot_title,
    strategy_notes,
    subject_line,
)

_SHOTS: tuple[ShotName, ...] = ("many", "medium", "few")
CSV_COLUMNS = (
    "row",
    "name",
    "verdict",
    "device",
    "device_title",
    "host",
    "stack",
    "power_mode",
    "arch",
    "precision",
    "compute_precision",
    "size_mib",
    "metric",
    "metric_value",
    "metric_low",
    "metric_high",
    "metric_n",
    "metric_on",
    "latency_scope",
    "latency_batch",
    "latency_percentile",
    "latency_ms",
    "latency_lower_bound_ms",
    "latency_upper_bound_ms",
    "latency_bound_confidence",
    "latency_samples",
    "latency_stable",
    "roofline_at_least_ms",
    "load_ms",
    "first_inference_ms",
    "peak_memory_mib",
    "energy_mj",
    "energy_low_mj",
    "energy_high_mj",
    "limit_latency_ms",
    "limit_memory_mib",
    "limit_file_size_mib",
    "limit_energy_mj",
    "limit_metric_floor",
    "limit_max_metric_drop",
    "bundle",
    "exploration",
    *(f"{group}_shot_{part}" for group in _SHOTS for part in ("value", "low", "high", "n")),
)
_LIMITS = cast(tuple[LimitName, ...], get_args(LimitName))


def to_csv(report: Report) -> str:
    """One line per target, then the reference models; fractions, ms and MiB at full precision, unknown values empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, CSV_COLUMNS, lineterminator="\n", restval="")
    writer.writeheader()
    for row in report.targets:
        fields: dict[str, object] = {
            "row": "target",
            "name": row.name,
            "verdict": VERDICT_WORDS[row.verdict],
            "device": row.device,
            "device_title": row.device_title,
            "host": row.host,
            "stack": row.stack,
            "power_mode": row.power_mode,
            "arch": row.arch,
            "precision": row.precision,
            "compute_precision": row.compute_precision,
            "size_mib": row.size_mib,
            "load_ms": row.load_ms,
            "first_inference_ms": row.first_inference_ms,
            "peak_memory_mib": row.peak_memory_mib,
            "roofline_at_least_ms": row.roofline.bound_ms if row.roofline else None,
            "bundle": row.bundle,
            "exploration": "none" if report.exploration is None else report.exploration.kind,
        }
        fields |= _metric_fields(report, row.metric)
        rows = report.shots.rows if report.shots is not None else ()
        fields |= _shot_fields(next((each for each in rows if row.name in each.targets), None))
        if row.latency is not None:
            fields |= {
                "latency_scope": row.latency.scope,
                "latency_batch": row.latency.batch,
                "latency_percentile": row.latency.percentile,
                "latency_ms": row.latency.point,
                "latency_lower_bound_ms": row.latency.lower_bound,
                "latency_upper_bound_ms": row.latency.upper_bound,
                "latency_bound_confidence": row.latency.confidence,
                "latency_samples": row.latency.samples,
                "latency_stable": row.latency.stable,
            }
        if row.energy is not None:
            ends = {"energy_mj": row.energy.value, "energy_low_mj": row.energy.low, "energy_high_mj": row.energy.high}
            fields |= ends
        for name in _LIMITS:
            limit = row.limit(name)
            fields[f"limit_{name}"] = None if limit is None else limit.limit
        writer.writerow(fields)
    others = [row for row in report.shots.rows if row.role != "student"] if report.shots is not None else []
    for reference in report.references:
        # the same models in the same order; several teachers may have one architecture
        same = next((row for row in others if (row.role, row.arch) == (reference.role, reference.arch)), None)
        if same is not None:
            others.remove(same)
        writer.writerow(
            {
                "row": reference.role,
                "arch": reference.arch,
                "precision": reference.precision,
                "size_mib": reference.size_mib,
            }
            | _metric_fields(report, reference.metric)
            | _shot_fields(same)
        )
    return out.getvalue()


def _shot_fields(row: ShotRow | None) -> dict[str, object]:
    fields: dict[str, object] = {}
    for group, metric in row.metrics.items() if row is not None else ():
        parts = {"value": metric.value, "low": metric.low, "high": metric.high, "n": metric.n}
        fields |= {f"{group}_shot_{part}": figure for part, figure in parts.items()}
    return fields


def _metric_fields(report: Report, metric: MetricValue | None) -> dict[str, object]:
    if metric is None:
        return {}
    return {
        "metric": report.metric,
        "metric_value": metric.value,
        "metric_low": metric.low,
        "metric_high": metric.high,
        "metric_n": metric.n,
        "metric_on": metric.on,
    }


def escape_markdown(text: str) -> str:
    """One line of Markdown and HTML that shows as it is written, also inside a table."""
    text = " ".join(text.split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]|~#@])", r"\\\1", text)


def to_markdown(report: Report) -> str:
    """The table, the reasons and, folded away, the limits: what a pull request should show."""
    shown = percentiles(report)
    several = len(shown) > 1
    title = percentile_title(shown[0]) if len(shown) == 1 else "latency"
    lines = [
        f"### {escape_markdown(report.name)}: {counts_line(report)}",
        "",
        f"{escape_markdown(subject_line(report))}; {escape_markdown(date(report.created))}, "
        f"{duration(report.seconds)}, exit status {report.exit_status}",
        "",
        f"| Target | Student | Precision | MiB | {metric_title(report.metric)} % | {title} ms | bound | limit "
        "| Verdict |",
        "|---|---|---|--:|--:|--:|--:|--:|---|",
    ]
    for row in report.targets:
        asked, latency = latency_limit(row), row.latency
        point = milliseconds(latency.point, asked) if latency else "-"
        if several and latency:
            point = f"{percentile_title(latency.percentile)} {point}"
        verdict = VERDICT_WORDS[row.verdict]
        cells = [
            escape_markdown(row.name),
            escape_markdown(row.arch),
            escape_markdown(row.precision),
            mebibytes(row.size_mib),
            _metric_words(row.metric) + ("\\*" if on_other_machine(row) else ""),
            point,
            milliseconds(latency.upper_bound, asked) if latency else "-",
            "-" if asked is None else plain_number(asked),
            f"**{verdict}**" if row.verdict in ("fail", "error") else verdict,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    for reference in report.references:
        cells = [
            f"_{reference.title}_",
            escape_markdown(reference.arch),
            escape_markdown(reference.precision),
            mebibytes(reference.size_mib),
            _metric_words(reference.metric),
        ]
        lines.append(f"| {' | '.join(cells)} | | | | |")
    lines.append("")
    words = bound_words(row.latency for row in report.targets if row.latency is not None)
    bound = f"; {words}" if words else ""
    spreads = {row.metric.confidence for row in report.targets if row.metric is not None}
    bound += f"; ±: {plain_number(min(spreads) * 100)} %" if spreads else ""
    timed = scopes(report)
    if len(timed) == 1:
        lines.append(f"{next(iter(timed))}, one query in flight{bound}  ")
    else:
        lines += [f"{what}: {escape_markdown(', '.join(names))}{bound}  " for what, names in timed.items()]
    for entry in report.bought:
        lines.append(f"distilling {escape_markdown(entry.arch)} bought {points(entry.difference)}  ")
    lines += [f"{escape_markdown(note)}  " for note in (*strategy_notes(report), *exploration_notes(report))]
    if any(on_other_machine(row) for row in report.targets):
        lines.append(f"\\* {NOT_THE_DEVICE}  ")
    lines += ["", *_shots(report)]
    for row in report.targets:
        lines.append(f"- **{escape_markdown(row.name)}** ({escape_markdown(provenance(row))})")
        lines += [f"  - {escape_markdown(reason)}" for reason in reasons(row)]
        lines += [f"  - fix: {escape_markdown(fix)}" for fix in row.fixes]
    limits = [(row, limit) for row in report.targets for limit in row.limits]
    if limits:
        lines += ["", "<details><summary>Every limit</summary>", ""]
        lines += ["| Target | Limit of | Value | Interval | Limit | | Verdict |", "|---|---|--:|--:|--:|---|---|"]
        for row, limit in limits:
            value, interval, at = limit_figures(limit)
            found = f"{LIMIT_TITLES[limit.name]} | {value} | {interval} | {at} | {limit_unit(limit)}"
            reason = f", {escape_markdown(limit.reason)}" if limit.reason else ""
            lines.append(f"| {escape_markdown(row.name)} | {found} | {VERDICT_WORDS[limit.verdict]}{reason} |")
        lines += ["", "</details>"]
    return "\n".join(lines) + "\n"


def _shots(report: Report) -> list[str]:
    """The table of the classes with many, medium and few training samples, and an empty line; nothing without them."""
    shots = report.shots
    if shots is None:
        return []
    heads = ["Mean recall %", "Student", "Precision"]
    heads += [escape_markdown(shot_title(group.name)) for group in shots.groups]
    lines = [f"| {' | '.join(heads)} |", f"|---|---|---|{'--:|' * len(shots.groups)}"]
    for row in shots.rows:
        title = escape_markdown(row.title) if row.role == "student" else f"_{row.title}_"
        figures = [_metric_words(row.metrics.get(group.name)) for group in shots.groups]
        lines.append(f"| {' | '.join([title, escape_markdown(row.arch), escape_markdown(row.precision), *figures])} |")
    return [*lines, "", *(f"{escape_markdown(note)}  " for note in shot_notes(report)), ""]


def _metric_words(metric: MetricValue | None) -> str:
    return "-" if metric is None else f"{percent(metric.value)} ±{percent(metric.half_width)}"
