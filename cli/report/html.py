"""The report as one self-contained page: no network, light and dark, readable on a phone and on paper.

Only the chart and the filters need the script; without it the tables hold all that there is. Whatever the run, the page
stays below MOST_BYTES: long curves are thinned, long tables and texts end with what was left out, and pictures that do
not fit are named.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from cli.report.chart import SHIPPED, TRIED, chart_data, file_name
from cli.report.schema import MetricValue, Picture, Report, TargetRow
from cli.report.svg import training_curve
from cli.report.words import (
    LIMIT_TITLES,
    NOT_THE_DEVICE,
    SHOT_HEADING,
    VERDICT_WORDS,
    bound_words,
    choice_rows,
    date,
    duration,
    energy_words,
    engine_words,
    exploration_notes,
    latency_limit,
    limit_figures,
    limit_unit,
    mebibytes,
    metric_title,
    milliseconds,
    on_other_machine,
    other_notes,
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
    stage_words,
    step_figures,
    strategy_notes,
    subject_line,
)

STYLE_FILE = Path(__file__).with_name("page.css")
SCRIPT_FILE = Path(__file__).with_name("page.js")
MOST_BYTES = 2_000_000
_MARKS = {"pass": "✓", "fail": "✗", "inconclusive": "?", "not measured": "–", "error": "!"}
_PNG = b"\x89PNG\r\n\x1a\n"
_LONGEST_TEXT = 20_000
"""Characters of an example file, or of a measurement's environment, that the page shows."""
_MOST_ROWS = 200
"""Of a table that has a row per member of a pool."""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
"""The browser itself then refuses whatever would leave the page."""


def to_html(report: Report, folder: Path | None = None) -> str:
    """The page as text. Everything that comes from the report is escaped.

    Args:
        report: the report.
        folder: the run folder, whose pictures become part of the page; None: they are only named.
    """
    before = [_heading(report), _FILTERS, _targets(report), _shots(report), _plot(report)]
    after = [_why(report), _details(report)]
    script = SCRIPT_FILE.read_text(encoding="utf-8")
    style = STYLE_FILE.read_text(encoding="utf-8")
    data = json.dumps(chart_data(report), ensure_ascii=False, separators=(",", ":"))
    # nothing in the data can end the element that it stands in
    data = data.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    end = f'<script type="application/json" id="chart-data">{data}</script>\n<script>\n{script}</script>\n'
    used = sum(len(part.encode()) for part in (*before, *after, style, end))
    sections = [*before, _exploration(report, folder, MOST_BYTES - 100_000 - used), *after, end]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">'
        f'<meta name="generator" content="edgestill {escape(report.versions.get("edgestill", ""))}">'
        f"<title>{escape(report.name)} · edgestill</title>\n"
        f"<style>\n{style}</style></head>\n"
        f"<body>\n{''.join(sections)}</body></html>\n"
    )


_FILTERS = '<div id="filters" class="filters" hidden></div>\n'


def _row(cells: Sequence[str], target: TargetRow, precision: str | None = None) -> str:
    """A row that the filters know."""
    marked = f' data-target="{escape(target.name)}"'
    if precision is not None:
        marked += f' data-precision="{escape(precision)}"'
    return f"<tr{marked}>{''.join(cells)}</tr>"


def _class(verdict: str) -> str:
    return verdict.replace(" ", "-")


def _verdict(verdict: str, words: str) -> str:
    return f'<span class="verdict {_class(verdict)}">{_MARKS[verdict]} {escape(words)}</span>'


def _heading(report: Report) -> str:
    counts = report.counts
    chips = (
        ("error", counts.errors, "error" if counts.errors == 1 else "errors"),
        ("fail", counts.failed, "fail"),
        ("inconclusive", counts.inconclusive, "inconclusive"),
        ("not measured", counts.not_measured, "not measured"),
        ("pass", counts.passed, "pass"),
    )
    items = "".join(
        f'<li class="{_class(verdict)}">{_MARKS[verdict]} {count} {word}</li>'
        for verdict, count, word in chips
        if count
    )
    return (
        f"<header><h1>{escape(report.name)}</h1>"
        f'<span class="soft">{escape(date(report.created))} · {duration(report.seconds)}</span></header>\n'
        f'<p class="soft">{escape(subject_line(report))} · exit status {report.exit_status}</p>\n'
        f'<ul class="chips">{items}</ul>\n'
    )


def _metric(metric: MetricValue | None) -> str:
    return "-" if metric is None else f"{percent(metric.value)} ±{percent(metric.half_width)}"


def _cell(text: str, label: str = "", look: str = "", title: str = "") -> str:
    """A cell; its label stands before it where the table becomes a list on narrow screens. `text` is HTML."""
    attributes = "".join(
        f' {name}="{escape(value)}"'
        for name, value in (("class", look), ("data-label", label), ("title", title))
        if value
    )
    return f"<td{attributes}>{text}</td>"


def _table(heads: Sequence[tuple[str, str]], rows: Iterable[str], look: str = "stack") -> str:
    head = "".join(f"<th{f' class={look}' if look else ''}>{escape(text)}</th>" for text, look in heads)
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="scroll"><table class="{look}">{body}</table></div>\n'


def _targets(report: Report) -> str:
    shown = percentiles(report)
    several = len(shown) > 1
    latency_title = f"{percentile_title(shown[0]) if len(shown) == 1 else 'latency'} ms"
    metric_head = f"{metric_title(report.metric)} %"
    heads = [("Target", ""), ("Student", ""), ("Precision", ""), ("MiB", "number"), (metric_head, "number")]
    heads += [(latency_title, "number"), ("bound", "number"), ("limit", "number"), ("Verdict", "")]
    rows = []
    for row in report.targets:
        limit, latency = latency_limit(row), row.latency
        point = milliseconds(latency.point, limit) if latency else "-"
        if several and latency:
            point = f"{percentile_title(latency.percentile)} {point}"
        interval = f"{percent(row.metric.low)} to {percent(row.metric.high)} %, {row.metric.on}" if row.metric else ""
        samples = f"{latency.samples:,} runs" if latency else ""
        cells = [
            _cell(escape(row.name), look="name"),
            _cell(escape(row.arch), look="arch"),
            _cell(escape(row.precision), title=row.compute_precision),
            _cell(mebibytes(row.size_mib), "MiB", "number"),
            _cell(_metric(row.metric) + ("*" if on_other_machine(row) else ""), metric_head, "number", interval),
            _cell(point, latency_title, "number", samples),
            _cell(milliseconds(latency.upper_bound, limit) if latency else "-", "bound", "number"),
            _cell("-" if limit is None else plain_number(limit), "limit", "number"),
            _cell(_verdict(row.verdict, VERDICT_WORDS[row.verdict]), look="judged"),
        ]
        rows.append(_row(cells, row, file_name(row)))
    for reference in report.references:
        cells = [
            _cell(escape(reference.title), title=reference.note),
            _cell(escape(reference.arch), look="arch"),
            _cell(escape(reference.precision)),
            _cell(mebibytes(reference.size_mib), "MiB", "number"),
            _cell(_metric(reference.metric), metric_head, "number"),
            *[_cell("")] * 4,
        ]
        rows.append(f'<tr class="reference">{"".join(cells)}</tr>')
    return _table(heads, rows) + _footnotes(report)


def _footnotes(report: Report) -> str:
    bound = bound_words(row.latency for row in report.targets if row.latency is not None)
    spreads = {row.metric.confidence for row in report.targets if row.metric is not None}
    timed = scopes(report)
    notes = [f"{what}: {', '.join(names)}" for what, names in timed.items()]
    if len(timed) == 1:
        notes = [f"{next(iter(timed))}, one query in flight"]
    said = [bound] if bound else []
    said += [f"±: {plain_number(min(spreads) * 100)} %"] if spreads else []
    notes += ["; ".join(said)] if said else []
    notes += [f"distilling {entry.arch} bought {points(entry.difference, '−')}" for entry in report.bought]
    if any(on_other_machine(row) for row in report.targets):
        notes.append(f"* {NOT_THE_DEVICE}")
    notes += strategy_notes(report)
    notes += other_notes(report)
    return f'<div class="notes">{"".join(f"<p>{escape(note)}</p>" for note in notes)}</div>\n'


def _shots(report: Report) -> str:
    """Accuracy on the classes with many, medium and few training samples, where there are such."""
    shots = report.shots
    if shots is None:
        return ""
    rows = []
    for row in shots.rows:
        cells = [
            _cell(escape(row.title), look="name" if row.role == "student" else ""),
            _cell(escape(row.arch), look="arch"),
            _cell(escape(row.precision)),
        ]
        for group in shots.groups:
            metric = row.metrics.get(group.name)
            title = "" if metric is None else f"{percent(metric.low)} to {percent(metric.high)} %, {metric.on}"
            cells.append(_cell(_metric(metric), shot_title(group.name), "number", title))
        look = "" if row.role == "student" else ' class="reference"'
        rows.append(f"<tr{look}>{''.join(cells)}</tr>")
    heads = [("", ""), ("Student", ""), ("Precision", "")]
    heads += [(f"{shot_title(group.name)} %", "number") for group in shots.groups]
    members = [f"{group.name}: {', '.join(group.classes)}" for group in shots.groups]
    notes = "".join(f"<p>{escape(note)}</p>" for note in (*shot_notes(report), *members))
    return f'<h2>{SHOT_HEADING.replace(" %", "")}</h2>{_table(heads, rows)}<div class="notes">{notes}</div>\n'


def _exploration(report: Report, folder: Path | None, room: int) -> str:
    """What the students explored, with the pictures that the run made of it, as far as `room` bytes hold them."""
    found = report.exploration
    if found is None:
        return ""
    kept = ""
    classes = {name for student in found.students for name in student.kept_by_class}
    if classes:
        students = found.students
        lines = [("all", [student.kept for student in students])]
        lines += [
            (name, [student.kept_by_class.get(name) for student in students])
            for name in dict.fromkeys((*report.data.labels, *sorted(classes)))
            if name in classes
        ]
        rows = []
        for name, shares in lines:
            cells = [_cell(escape(name))]
            cells += [_cell(percent(share), each.arch, "number") for each, share in zip(students, shares, strict=True)]
            rows.append(f"<tr>{''.join(cells)}</tr>")
        heads = [("kept %, by the class that the teacher names", ""), *((each.arch, "number") for each in students)]
        kept = _table(heads, rows)
    notes = "".join(f'<p class="soft">{escape(note)}</p>' for note in exploration_notes(report))
    pictures = ""
    for picture in found.pictures:
        shown = _picture(picture, folder)
        if len((pictures + shown).encode()) > room:
            shown = _picture(picture.model_copy(update={"title": f"{picture.title}; too large for this page:"}), None)
        pictures += shown
    return f"<h2>Exploration</h2>{notes}{kept}{pictures}\n"


def _picture(picture: Picture, folder: Path | None) -> str:
    """The picture itself, or the examples; where they cannot be read, their name alone."""
    caption = f"<figcaption>{escape(picture.title)} <code>{escape(picture.file)}</code></figcaption>"
    content = b""
    if folder is not None and (path := (folder / picture.file).resolve()).is_relative_to(folder.resolve()):
        content = path.read_bytes() if path.is_file() else b""
    if content.startswith(_PNG):
        source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
        return f'<figure><div class="scroll"><img src="{source}" alt="{escape(picture.title)}"></div>{caption}</figure>'
    if content and picture.file.endswith(".txt"):
        text = content.decode("utf-8", errors="replace")
        shown = text[:_LONGEST_TEXT].rpartition("\n")[0] if len(text) > _LONGEST_TEXT else text
        return f"<figure><pre>{escape(shown)}</pre>{caption}</figure>"
    return f"<figure>{caption}</figure>"


def _plot(report: Report) -> str:
    """Where the script draws the chart."""
    data = chart_data(report)
    counts = [sum(point["set"] == each for point in data["points"]) for each in (SHIPPED, TRIED)]
    heading = "<h2>What each costs, and what it is good for</h2>"
    if max(counts) < 2 or len(data["axes"]) < 2:
        return f'{heading}<p class="soft">Fewer than two files with figures: nothing to compare.</p>\n'
    shapes = "Circle: PASS, cross: FAIL, diamond: INCONCLUSIVE; of what was tried, a full circle was chosen."
    return (
        f'{heading}<div id="chart-controls" class="filters"></div><figure id="chart" class="chart">'
        "<noscript><p>The chart needs JavaScript. The tables hold the same figures.</p></noscript></figure>"
        '<div class="notes"><p id="chart-missing"></p><p>Bars: intervals. Line: Pareto front, which nothing beats in '
        f"both. {shapes} Point at one, or reach it with the Tab key, for its figures.</p></div>\n"
    )


def _why(report: Report) -> str:
    cards = []
    for row in report.targets:
        lines = [f"<li>{escape(reason)}</li>" for reason in reasons(row)]
        lines += [f'<li class="fix"><code>{escape(fix)}</code></li>' for fix in row.fixes]
        host = f"{row.host} · " if row.host else ""
        items = f"<ul>{''.join(lines)}</ul>" if lines else ""
        cards.append(
            f'<section class="card is-{_class(row.verdict)}" data-target="{escape(row.name)}" '
            f'data-precision="{escape(file_name(row))}"><header><h3>{escape(row.name)}</h3>'
            f"{_verdict(row.verdict, VERDICT_WORDS[row.verdict])}</header>"
            f'<p class="soft">{escape(host + provenance(row))}</p>'
            f"{items}</section>"
        )
    return f'<h2>Why</h2><div class="cards">{"".join(cards)}</div>\n'


def _details(report: Report) -> str:
    parts = ["<h2>Everything else</h2>"]
    limits = _limits(report)
    if limits:
        parts.append(f"<details open><summary>Every limit</summary>{limits}</details>")
    candidates = _candidates(report)
    if candidates:
        title = f"Every candidate, {escape(metric_title(report.metric))} on the validation split"
        parts.append(f"<details open><summary>{title}</summary>{candidates}</details>")
    steps = _steps(report)
    if steps:
        parts.append(f"<details><summary>What each step of the precision planner bought</summary>{steps}</details>")
    for row in report.targets:
        if row.selection is not None:
            title = f"Students for {escape(row.name)}, {escape(metric_title(report.metric))} on the validation split"
            students = _students(row, report.metric)
            parts.append(f'<details data-target="{escape(row.name)}"><summary>{title}</summary>{students}</details>')
    parts.append(f"<details><summary>Measurements</summary>{_measurements(report)}</details>")
    if report.training or report.stages:
        parts.append(f"<details open><summary>Training and stages</summary>{_cost(report)}</details>")
    parts.append(f"<details><summary>Data, versions, machine</summary>{_facts(report)}</details>\n")
    return "".join(parts)


def _limits(report: Report) -> str:
    rows = []
    for row in report.targets:
        for limit in row.limits:
            value, interval, asked = limit_figures(limit)
            unit = f" {limit_unit(limit)}"
            reason = f'<span class="reason">{escape(limit.reason)}</span>' if limit.reason else ""
            cells = [
                _cell(escape(row.name), look="name"),
                _cell(LIMIT_TITLES[limit.name]),
                _cell(value + (unit if value != "-" else ""), "value", "number"),
                _cell(interval, "interval", "number"),
                _cell(asked + unit, "limit", "number"),
                _cell(_verdict(limit.verdict, VERDICT_WORDS[limit.verdict]) + reason, look="judged"),
            ]
            rows.append(_row(cells, row))
    heads = [("Target", ""), ("Limit of", ""), ("value", "number"), ("interval", "number"), ("limit", "number")]
    return _table([*heads, ("Verdict", "")], rows) if rows else ""


def _candidates(report: Report) -> str:
    rows = []
    metric_head = f"{metric_title(report.metric)} %"
    for row in report.targets:
        for candidate in row.candidates:
            latency = candidate.latency
            fate = "chosen" if candidate.chosen else candidate.rejected_because or ""
            cells = [
                _cell(escape(row.name), look="name"),
                _cell(escape(candidate.precision), title=candidate.compute_precision),
                _cell(mebibytes(candidate.size_mib), "MiB", "number"),
                _cell(_metric(candidate.metric), metric_head, "number"),
                _cell(milliseconds(latency.point if latency else None), "ms", "number"),
                _cell(milliseconds(latency.upper_bound if latency else None), "bound", "number"),
                _cell(f"<strong>{escape(fate)}</strong>" if candidate.chosen else escape(fate)),
            ]
            rows.append(_row(cells, row, candidate.precision))
    heads = [("Target", ""), ("Precision", ""), ("MiB", "number"), (metric_head, "number"), ("ms", "number")]
    return _table([*heads, ("bound", "number"), ("", "")], rows) if rows else ""


def _steps(report: Report) -> str:
    rows = []
    metric_head = f"{metric_title(report.metric)} %"
    for row in report.targets:
        for step in row.steps:
            size, metric, seconds, outcome = step_figures(step)
            cells = [
                _cell(escape(row.name), look="name"),
                _cell(escape(step.name)),
                _cell(size, "MiB", "number"),
                _cell(metric, metric_head, "number"),
                _cell(seconds, "time", "number"),
                _cell(escape("; ".join(part for part in (outcome, step.note) if part))),
            ]
            rows.append(_row(cells, row))
    heads = [("Target", ""), ("Step", ""), ("MiB", "number"), (metric_head, "number"), ("time", "number"), ("", "")]
    return _table(heads, rows) if rows else ""


def _students(row: TargetRow, metric: str) -> str:
    """Every student that a target might have got, and what became of it."""
    head = f"{metric_title(metric)} %"
    rows = []
    found = choice_rows(row.selection) if row.selection is not None else []
    for arch, file, value, latency, fate, reason in found[:_MOST_ROWS]:
        cells = [
            _cell(escape(arch), look="name"),
            _cell(escape(file)),
            _cell(value, head, "number"),
            _cell(latency, "ms", "number"),
            _cell(f"<strong>{fate}</strong>" if fate == "chosen" else fate),
            _cell(escape(reason)),
        ]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    left = len(found) - len(rows)
    more = f'<p class="soft">and {left:,} more, all in report.json</p>' if left else ""
    return _table([("Student", ""), ("File", ""), (head, "number"), ("ms", "number"), ("", ""), ("", "")], rows) + more


def _measurements(report: Report) -> str:
    return "".join(_measurement(row) for row in report.targets)


def _measurement(row: TargetRow) -> str:
    latency = row.latency
    facts: list[tuple[str, str]] = []
    if latency is not None:
        facts += [
            ("runs", f"{latency.samples:,}{'' if latency.stable else ', never became stable'}"),
            ("p50", f"{milliseconds(latency.p50)} ms"),
            ("mean", f"{milliseconds(latency.mean)} ms"),
            ("maximum", f"{milliseconds(latency.max)} ms"),
            ("outliers", "-" if latency.outliers is None else f"{latency.outliers:,}, none removed"),
        ]
    facts += [
        ("load", f"{milliseconds(row.load_ms)} ms" if row.load_ms is not None else ""),
        ("first inference", f"{milliseconds(row.first_inference_ms)} ms" if row.first_inference_ms is not None else ""),
        ("peak memory", f"{mebibytes(row.peak_memory_mib)} MiB" if row.peak_memory_mib is not None else ""),
        ("memory read from", row.peak_memory_how),
        ("energy", energy_words(row)),
        ("computes in", row.compute_precision),
        ("engine", engine_words(row)),
        ("model", row.model_file or ""),
        ("bundle", row.bundle or ""),
    ]
    options = {} if latency is None else latency.options
    recorded = {**({"options": options} if options else {}), **row.environment}
    text = json.dumps(recorded, indent=2, ensure_ascii=False) if recorded else ""
    if len(text) > _LONGEST_TEXT:
        text = text[:_LONGEST_TEXT].rpartition("\n")[0] + "\n… the rest is in report.json"
    environment = f"<pre>{escape(text)}</pre>" if text else ""
    return f'<div data-target="{escape(row.name)}"><h3>{escape(row.name)}</h3>{_definitions(facts)}{environment}</div>'


def _definitions(facts: Sequence[tuple[str, str]]) -> str:
    return f"<dl>{''.join(f'<dt>{escape(key)}</dt><dd>{escape(value)}</dd>' for key, value in facts if value)}</dl>"


def _cost(report: Report) -> str:
    cards = []
    for run in report.training:
        speed = f", {run.samples_per_second:,.0f} {report.unit}s/s" if run.samples_per_second else ""
        best = "" if run.best_epoch is None else f", epoch {plain_number(run.best_epoch)} chosen"
        text = f"{run.objective}; {plain_number(run.epochs)} epochs{best}, {duration(run.seconds)}{speed}"
        cards.append(
            f'<section class="card"><h3>{escape(run.title)} {escape(run.arch)}</h3>'
            f'<p class="soft">{escape(text)}</p>{training_curve(run, report.metric)}</section>'
        )
    longest = max((stage.seconds for stage in report.stages), default=0.0) or 1.0
    rows = [
        f"<tr>{_cell(escape(stage.name))}{_cell(duration(stage.seconds), '', 'number')}"
        f"{_cell(stage_words(stage))}"
        f'<td><span class="bar" style="width:{stage.seconds / longest * 100:.1f}%"></span></td></tr>'
        for stage in report.stages
    ]
    stages = _table([("Stage", ""), ("time", "number"), ("", ""), ("", "")], rows, "stages") if rows else ""
    return f'<div class="cards">{"".join(cards)}</div>{stages}'


def _facts(report: Report) -> str:
    data, machine = report.data, report.machine
    facts = [
        ("data", data.title or data.source),
        ("source", data.source),
        ("licence", data.licence),
        ("citation", data.citation),
        ("samples", ", ".join(f"{count:,} {name}" for name, count in data.splits.items())),
        ("input", data.input),
        ("labels", ", ".join(data.labels)),
        ("seed", str(report.seed)),
        ("recipe", report.recipe),
        ("run folder", report.folder),
        ("machine", ", ".join(part for part in (machine.title, machine.host, machine.os) if part)),
        ("Python", machine.python),
        ("versions", ", ".join(f"{name} {version}" for name, version in report.versions.items())),
    ]
    return _definitions(facts)
