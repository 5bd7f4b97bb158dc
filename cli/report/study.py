"""A study in a terminal: a table per value of the factors, the learning curves, and what cannot be told; and as CSV."""

from __future__ import annotations

import csv
import io
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from string import ascii_letters
from typing import TextIO

from rich.cells import cell_len
from rich.text import Text

from cli.report.pareto import latency_axis, linear_axis
from cli.report.plot import ASCII, ROWS, UNICODE, Canvas, x_axis
from cli.report.study_schema import Block, CellResult, ComparisonRow, MethodRow, StudyReport, TeacherFacts, TuningRow
from cli.report.terminal import (
    MAX_PLOT,
    MAX_PROSE,
    MIN_WIDTH,
    Style,
    as_text,
    sides,
    speaks_unicode,
    terminal_width,
    wants_color,
    wrapped,
)
from cli.report.words import date, duration, metric_title, percent, plain_number
from cli.study_grid import TRAIN_SIZE, short_key, shown

_WIDE = 110
"""Width from which all three intervals are shown."""
_COLOURS = {"higher": "green", "lower": "bold red", "cannot tell": "yellow"}
_MARKS = "●▲■◆○△□◇"
_ASCII_MARKS = "ox+*#@%&"
_MANY_MARKS = ascii_letters
"""For more methods than there are shapes."""


def print_study(report: StudyReport, stream: TextIO | None = None) -> None:
    """Writes the study to a stream (standard output) in the width, colours and characters that it can show."""
    stream = sys.stdout if stream is None else stream
    stream.write(
        render_study(
            report,
            width=terminal_width(stream),
            color=wants_color(stream),
            ascii_only=not speaks_unicode(stream),
        )
    )


def render_study(report: StudyReport, width: int = 80, color: bool = False, ascii_only: bool = False) -> str:
    """The study as text, with a line feed at its end; see `terminal.render_text` for the arguments."""
    style = Style(max(width, MIN_WIDTH), ascii_only)
    lines = _header(report, style)
    for block in report.blocks:
        lines += [Text(), *_block(report, block, style)]
    lines += [Text(), *_legend(report, style)]
    for title, blocks in curves(report):
        lines += [Text(), *_plot(report, title, blocks, style)]
    lines += [*_tuning(report, style), *_untold(report, style), *_failures(report, style)]
    lines += [line for note in report.notes for line in wrapped(style.clean(note), _prose(style), "  note: ", "    ")]
    lines += [Text(), Text().append("cells    ", "dim").append(f"{report.folder}/study.json")]
    return as_text(lines, style, color)


def to_csv(report: StudyReport) -> str:
    """One row per training; factors by their keys, metrics as fractions, losses and logs under `term:`.

    Of a tuned study, the last columns are the number of the tuning trial, empty for the cells, and the searched
    settings under `set:`. Trials come first; they have no test metric.
    """
    keys = list(report.factors)
    terms = sorted({name for cell in report.cells for name in cell.terms})
    plain = ("validation", "test", "best_epoch", "epochs", "seconds", "samples_per_second", "train_samples")
    more = ("arch", "parameters", "hard_weight", "device", "threads")
    searched = sorted({key for row in report.tuning for key in row.search})
    tuned = ["trial", *(f"set:{key}" for key in searched)] if report.tune is not None else []
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["method", *keys, "seed", "metric", *plain, *more, *(f"term:{name}" for name in terms), *tuned])
    for row in report.tuning:
        for trial in row.trials:
            writer.writerow(
                [
                    row.method,
                    *(shown(row.factors[key]) for key in keys),
                    row.seed,
                    report.metric,
                    *(getattr(trial, name, None) for name in plain),
                    *[None] * (len(more) + len(terms)),
                    trial.number,
                    *(trial.settings.get(key) for key in searched),
                ]
            )
    for cell in report.cells:
        writer.writerow(
            [
                cell.method,
                *(shown(cell.factors[key]) for key in keys),
                cell.seed,
                report.metric,
                *(getattr(cell, name) for name in (*plain, *more)),
                *(cell.terms.get(name, "") for name in terms),
                *([None, *(_settings(report, cell).get(key) for key in searched)] if tuned else []),
            ]
        )
    return out.getvalue()


def _settings(report: StudyReport, cell: CellResult) -> dict[str, object]:
    """The searched settings that a cell has."""
    for row in report.tuning:
        if (row.method, row.factors) == (cell.method, cell.factors):
            return (row.chosen or row.defaults).settings
    return {}


def curves(report: StudyReport) -> list[tuple[str, list[Block]]]:
    """Blocks that differ in the number of training samples alone, by the words for their other factors."""
    if len(set(report.factors.get(TRAIN_SIZE, ()))) < 2:
        return []
    found: dict[str, list[Block]] = {}
    for block in report.blocks:
        others = {key: value for key, value in block.factors.items() if key != TRAIN_SIZE}
        found.setdefault(_factor_words(others), []).append(block)
    return [
        (title, sorted(blocks, key=lambda block: block.train_samples))
        for title, blocks in found.items()
        if len({block.train_samples for block in blocks}) > 1
    ]


def _prose(style: Style) -> int:
    return min(style.width, MAX_PROSE)


def _factor_words(factors: dict[str, object]) -> str:
    return ", ".join(f"{key} = {shown(value)}" for key, value in factors.items())


def _header(report: StudyReport, style: Style) -> list[Text]:
    subject = f"study, {report.n_test:,} test {report.unit}s, {metric_title(report.metric)}"
    when = f"{date(report.created)}  {duration(report.seconds)}"
    left = Text().append(style.cut(style.clean(report.name), 30), "bold").append(f"  {style.clean(subject)}")
    done = f"{len(report.cells)} of {report.planned} cells" if len(report.cells) < report.planned else ""
    size = f"{len(report.methods)} methods" if len(report.methods) > 1 else report.methods[0]
    parts = [size, *(f"{len(v)} x {short_key(k)}" for k, v in report.factors.items()), _count(report.seeds, "seed")]
    lines = sides(left, Text(style.clean(when), style="dim"), style.width)
    status = Text(done or f"{report.planned} cells", style="bold red" if done else "")
    lines += sides(Text(style.clean(", ".join(parts))), status, style.width)
    for teacher in report.teachers:
        lines += wrapped(style.clean(_teacher_words(report, teacher)), _prose(style), "", "  ", "dim")
    if any(teacher.seconds is not None for teacher in report.teachers) and len(report.factors.get(TRAIN_SIZE, ())) > 1:
        text = "teachers saw more than the smaller sets that students learn from"
        lines += wrapped(style.clean(text), _prose(style), "", "  ", "dim")
    return lines


def _teacher_words(report: StudyReport, teacher: TeacherFacts) -> str:
    """`teacher of subclass: conv-w12-d1-k3, trained with 8 subclasses per class on 280 samples in 9 s, 81.2 %`."""
    shared = sum(other.factors == teacher.factors for other in report.teachers) == 1
    whose = "" if shared else f" of {', '.join(teacher.methods)}"
    factors = f" ({_factor_words(teacher.factors)})" if teacher.factors else ""
    score = "" if teacher.test is None else f", {percent(teacher.test)} %"
    if teacher.seconds is None:
        return f"teacher{whose}{factors}: of kind {teacher.kind}, not trained here{score}"
    split = "" if teacher.subclasses is None else f"with {teacher.subclasses} subclasses per class "
    split += "" if teacher.conditioned_on is None else f"for {teacher.conditioned_on} "
    trained = f"trained {split}on {teacher.train_samples:,} samples in {duration(teacher.seconds)}"
    return f"teacher{whose}{factors}: {teacher.arch}, {trained}{score}"


def _block(report: StudyReport, block: Block, style: Style) -> list[Text]:
    wide = style.width >= _WIDE
    heads = ["Method", f"{metric_title(report.metric)} %", "- control", "95 % seeds*"]
    heads += ["95 % seeds, t", "95 % test samples"] if wide else []
    heads += ["wins", "time", "Outcome"]
    rows = [(_cells(row, report, wide, style), row.to_control) for row in block.rows]
    widths = [max(cell_len(head), *(cell_len(cells[i]) for cells, _ in rows)) for i, head in enumerate(heads)]
    gap = "  " if 2 + sum(widths) + 2 * (len(widths) - 1) <= style.width else " "
    # the name gives way to the figures, and goes on below them
    widths[0] = max(8, min(widths[0], style.width - 2 - sum(widths[1:]) - len(gap) * (len(widths) - 1)))
    lines = []
    if block.factors:
        lines.append(Text(style.clean(_factor_words(block.factors)), style="bold"))
    lines.append(Text("  " + _padded([style.clean(head) for head in heads], widths, gap, style), style="dim"))
    for (name, *figures), comparison in rows:
        first, *rest = textwrap.wrap(name, widths[0], subsequent_indent="  ") or [""]
        text = Text("  " + _padded([first, *figures], widths, gap, style))
        if comparison is None:
            text.stylize("dim")
        else:
            start = len(text) - len(comparison.outcome)
            text.stylize(_COLOURS[comparison.outcome], max(start, 0))
        lines += [text, *(Text("  " + line, style="dim" if comparison is None else "") for line in rest)]
    return lines


def _padded(cells: Sequence[str], widths: Sequence[int], gap: str, style: Style) -> str:
    fitted = [style.cut(cells[0], widths[0]), *cells[1:]]
    last = len(cells) - 1
    return gap.join(
        cell + " " * (room - cell_len(cell)) if i == 0 else cell if i == last else " " * (room - cell_len(cell)) + cell
        for i, (cell, room) in enumerate(zip(fitted, widths, strict=True))
    )


def _cells(row: MethodRow, report: StudyReport, wide: bool, style: Style) -> list[str]:
    plus_minus = "+-" if style.ascii else "±"
    score = percent(row.mean, 2) + ("" if row.sd is None else f" {plus_minus}{percent(row.sd, 2)}")
    start = [style.clean(row.method), score]
    time = duration(row.seconds)
    found = row.to_control
    if found is None:
        last = "control" if row.method == report.control else "no control"
        return [*start, *[""] * (5 if wide else 3), time, last]
    intervals = [_interval(found.bootstrap if found.n > 1 else None)]  # one seed shows no spread
    if wide:
        intervals += [_interval(found.seeds_interval), _interval(found.samples_interval)]
    ties = f", {_count(found.ties, 'tie')}" if found.ties else ""
    return [*start, _points(found.difference), *intervals, f"{found.wins}/{found.n}{ties}", time, found.outcome]


def _points(fraction: float) -> str:
    return f"{fraction * 100 + 0.0:+.2f}"


def _interval(found: tuple[float, float] | None) -> str:
    return "-" if found is None else f"{_points(found[0])} {_points(found[1])}"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _legend(report: StudyReport, style: Style) -> list[Text]:
    if not any(row.to_control for block in report.blocks for row in block.rows):
        return []
    text = (
        f"± standard deviation over seeds; differences to {report.control} in points, paired by seed; time of one "
        f"student's training, without its teacher's. * bootstrap over seeds, too narrow for "
        f"{_count(report.seeds, 'seed')}: the outcome rests on Student's t interval over seeds and on a bootstrap over "
        "test samples, which must both leave out zero; a terminal of 120 columns and --json show them"
    )
    return wrapped(style.clean(text), _prose(style), "  ", "  ", "dim")


def _plot(report: StudyReport, title: str, blocks: list[Block], style: Style) -> list[Text]:
    """Metric over the number of training samples; the methods stand beside each other where they have one size."""
    marks, shapes = (_ASCII_MARKS, ASCII) if style.ascii else (_MARKS, UNICODE)
    width = min(style.width, MAX_PLOT)
    marks = marks if len(report.methods) <= len(marks) else _MANY_MARKS
    mark_of = {method: marks[i % len(marks)] for i, method in enumerate(report.methods)}
    points = [(block.train_samples, row.mean * 100, row.method) for block in blocks for row in block.rows]
    vertical = linear_axis([value for _, value, _ in points], 6, ceiling=100.0)
    tick_texts = [plain_number(tick) for tick in vertical.ticks]
    gutter = max(len(text) for text in tick_texts) + 1
    spread = len(report.methods) // 2 + 1
    columns = width - gutter - 1
    sizes = sorted({float(size) for size, _, _ in points})
    horizontal = replace(latency_axis(sizes), ticks=tuple(sizes))
    canvas = Canvas(columns, ROWS)
    for size, value, method in points:
        middle = spread + round(horizontal.place(size) * (columns - 1 - 2 * spread))
        offset = report.methods.index(method) - (len(report.methods) - 1) // 2
        row = ROWS - 1 - round(vertical.place(value) * (ROWS - 1))
        canvas.put(middle + offset, row, mark_of[method], 1)
    log = " (log)" if horizontal.log else ""
    lines = [f" {metric_title(report.metric)} % over training samples{log}" + (f", {title}" if title else "")]
    ticks_at = {
        ROWS - 1 - round(vertical.place(tick) * (ROWS - 1)): text
        for tick, text in zip(vertical.ticks, tick_texts, strict=True)
    }
    for row in range(ROWS):
        edge = shapes.tick_left if row in ticks_at else shapes.down
        lines.append(f"{ticks_at.get(row, ''):>{gutter - 1}} {edge}{''.join(canvas.cells[row])}".rstrip())
    lines += x_axis(horizontal, columns, gutter, shapes, "", margin=spread)
    texts = [Text(style.clean(line) if style.ascii else line) for line in lines]
    return [*texts, *_mark_legend(mark_of, width, " " * (gutter + 1), style)]


def _mark_legend(mark_of: dict[str, str], width: int, indent: str, style: Style) -> list[Text]:
    """Marks with their methods, a mark never parted from its name."""
    lines = [indent]
    for method, mark in mark_of.items():
        entry = f"{mark} {style.clean(method)}"
        if lines[-1].strip() and cell_len(lines[-1]) + 3 + cell_len(entry) > width:
            lines.append(indent)
        lines[-1] += ("   " if lines[-1].strip() else "") + entry
    return [Text(line) for line in lines]


def _tuning(report: StudyReport, style: Style) -> list[Text]:
    """A row per tuning, and below it the settings that it chose."""
    if not report.tuning:
        return []
    title = metric_title(report.metric)
    text = (
        f"{_count(report.tune or 0, 'training')} per method with seed {report.tuning[0].seed}, the first with its "
        f"defaults; judged by the validation split's {title} alone, whose highest of several promises too much"
    )
    rows = [_tuning_cells(row, style) for row in report.tuning]
    heads = ["Method", f"defaults {title} %", "best", "trial", "time"]
    widths = [max(cell_len(head), *(cell_len(cells[i]) for cells in rows)) for i, head in enumerate(heads)]
    widths[0] = max(8, min(widths[0], style.width - 2 - sum(room + 2 for room in widths[1:])))
    lines = [Text(), Text("Tuning", style="bold"), *wrapped(style.clean(text), _prose(style), "  ", "  ", "dim")]
    lines.append(Text("  " + _padded(heads, widths, "  ", style), style="dim"))
    for row, cells in zip(report.tuning, rows, strict=True):
        lines.append(Text("  " + _padded(cells, widths, "  ", style)))
        lines += wrapped(style.clean(_settings_words(row)), _prose(style), "    ", "    ", "dim")
    return lines


def _tuning_cells(row: TuningRow, style: Style) -> list[str]:
    label = ", ".join([row.method, *(f"{short_key(key)}={shown(value)}" for key, value in row.factors.items())])
    scores = [None if trial is None else trial.validation for trial in (row.defaults, row.chosen)]
    which = f"{'-' if row.best is None else row.best + 1}/{len(row.trials)}"
    return [style.clean(label), *("-" if s is None else percent(s, 2) for s in scores), which, duration(row.seconds)]


def _settings_words(row: TuningRow) -> str:
    """`learning_rate 0.004, tau 2.3`, and what failed."""
    chosen = row.chosen or row.defaults
    short = [short_key(key) for key in chosen.settings]
    words = ", ".join(
        f"{name if short.count(name) == 1 else key} {shown(value)}"
        for name, (key, value) in zip(short, chosen.settings.items(), strict=True)
    )
    if not row.search:
        words = "nothing to search: what could be is compared"
    elif not row.best:
        words = f"the defaults: {words}"
    failed = [trial for trial in row.trials if trial.error]
    return words + (f"; {len(failed)} failed, such as: {failed[0].error}" if failed else "")


def _untold(report: StudyReport, style: Style) -> list[Text]:
    """Why an outcome cannot be told, the same reasons of several methods together."""
    lines = []
    for block in report.blocks:
        groups: dict[str, list[str]] = {}
        for row in block.rows:
            if row.to_control is not None and row.to_control.outcome == "cannot tell":
                groups.setdefault(_why(row.to_control), []).append(row.method)
        where = f"{_factor_words(block.factors)}: " if block.factors else ""
        for reason, methods in groups.items():
            text = f"{where}{', '.join(methods)}: {reason}"
            lines += wrapped(style.clean(text), _prose(style), "  ", "    ")
    return [Text(), Text("Cannot be told", style="bold"), *lines] if lines else []


def _why(comparison: ComparisonRow) -> str:
    return "; ".join(comparison.reasons)


def _failures(report: StudyReport, style: Style) -> list[Text]:
    if not report.failed:
        return []
    lines = [
        line
        for cell in report.failed
        for line in wrapped(style.clean(f"{cell.label}: {cell.error}"), _prose(style), "  ", "    ")
    ]
    return [Text(), Text("Failed", style="bold red"), *lines]
