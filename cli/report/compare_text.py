"""A comparison in a terminal and as Markdown."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TextIO

from rich.cells import cell_len
from rich.text import Text

from cli.report.compare import Change, ComparedRow, ComparedRun, Comparison, Outcome
from cli.report.tables import escape_markdown
from cli.report.terminal import (
    MIN_WIDTH,
    SHORT_WORDS,
    Style,
    as_text,
    sides,
    speaks_unicode,
    terminal_width,
    wants_color,
    wrapped,
)
from cli.report.verdict import RowVerdict
from cli.report.words import VERDICT_WORDS, date, mebibytes, metric_title, milliseconds, percent, plain_number

_WORDS: dict[Outcome, str] = {
    "better": "better",
    "worse": "worse",
    "same": "the same",
    "noise": "within noise",
    "unknown": "not decided",
    "refused": "not comparable",
    "not measured": "not measured",
}
_MARKS: dict[Outcome, str] = {"better": "▲", "worse": "▼", "same": "=", "noise": "~", "unknown": "?", "refused": "!"}
_ASCII_MARKS: dict[Outcome, str] = _MARKS | {"better": "+", "worse": "x"}
_LOOKS: dict[str, str] = {
    "better": "green",
    "worse": "bold red",
    "pass": "green",
    "fail": "bold red",
    "inconclusive": "yellow",
    "unknown": "yellow",
    "refused": "yellow",
    "not measured": "dim",
}


def print_comparison(comparison: Comparison, stream: TextIO | None = None) -> None:
    """Writes it to a stream (standard output) in the width, colours and characters that it can show."""
    stream = sys.stdout if stream is None else stream
    stream.write(
        render_comparison(
            comparison,
            width=terminal_width(stream),
            color=wants_color(stream),
            ascii_only=not speaks_unicode(stream),
        )
    )


def render_comparison(comparison: Comparison, width: int = 80, color: bool = False, ascii_only: bool = False) -> str:
    """The comparison as text, with a line feed at its end; see `terminal.render_text` for the arguments."""
    style = Style(max(width, MIN_WIDTH), ascii_only)
    head = Text(style.clean(summary(comparison)), style="bold")
    lines = sides(head, Text(f"exit status {comparison.exit_status}", style="dim"), style.width)
    lines += [_run(letter, run, style) for letter, run in (("A", comparison.a), ("B", comparison.b))]
    lines += _rows(comparison, style)
    lines += [Text(), *(line for note in notes(comparison) for line in _note(note, style))]
    return as_text(lines, style, color)


def summary(comparison: Comparison) -> str:
    """ "1 worse, 2 within noise, 1 the same"; with gates how many of them passed."""
    if comparison.gates:
        verdicts = [change.verdict for row in comparison.rows for change in row.changes if change.verdict]
        order: tuple[RowVerdict, ...] = ("fail", "inconclusive", "pass", "not measured")
        counts = [(verdicts.count(verdict), VERDICT_WORDS[verdict].lower()) for verdict in order]
        return f"gates {', '.join(comparison.gates)}: " + _counted(counts)
    outcomes = [change.outcome for row in comparison.rows for change in row.changes]
    return _counted([(outcomes.count(outcome), word) for outcome, word in _WORDS.items()])


def _counted(counts: list[tuple[int, str]]) -> str:
    return ", ".join(f"{count} {word}" for count, word in counts if count) or "nothing to decide"


def _run(letter: str, run: ComparedRun, style: Style) -> Text:
    created = f"  {date(run.created)}" if run.created else ""
    return Text(f"  {letter}  {style.cut(style.clean(run.path), style.width - 5 - len(created))}{created}", style="dim")


def row_title(row: ComparedRow) -> str:
    """Target, student and precision, with an arrow where they differ."""

    def both(a: str, b: str) -> str:
        return a if a == b else f"{a or '-'} -> {b or '-'}"

    model = " ".join(part for part in (both(row.arch_a, row.arch_b), both(row.precision_a, row.precision_b)) if part)
    return f"{row.name}  {model}"


def figures(change: Change, metric: str) -> tuple[str, str, str, str, str]:
    """Title with its unit, A, B, the change and its interval, as text; "-" for what does not exist."""
    write: Callable[[float | None], str]
    if change.quantity == "metric":
        title, write = f"{metric_title(metric)} %", percent
        shift, low, high = (
            None if part is None else part * 100 for part in (change.difference, change.low, change.high)
        )
        signed, unit = "+.1f", " pt"
    else:
        units = {"latency": "ms", "energy": "mJ"}
        title = f"{change.title} {units.get(change.quantity, 'MiB')}"
        write = milliseconds if change.quantity == "latency" else mebibytes
        if change.quantity == "energy":
            write = milliseconds
        parts = (change.relative, change.relative_low, change.relative_high)
        shift, low, high = (None if part is None else part * 100 for part in parts)
        signed, unit = "+.1f", " %"
    moved = "-" if shift is None else f"{shift:{signed}}{unit}"
    exact = low is None or high is None or change.confidence is None
    interval = "" if exact else f"[{low:{signed}}, {high:{signed}}]"
    return title, write(change.a), write(change.b), moved, interval


def _rows(comparison: Comparison, style: Style) -> list[Text]:
    """Every row as a small table of its own, the columns of all in line."""
    gated = bool(comparison.gates)
    heads = ["", "A", "B", "change", f"{plain_number(comparison.confidence * 100)} %"] + ["gate"] * gated
    tables = [
        [[*figures(change, comparison.metric), *([change.gate or ""] * gated)] for change in row.changes]
        for row in comparison.rows
    ]
    widths = [
        max(cell_len(cells[i]) for cells in [heads, *(line for table in tables for line in table)])
        for i in range(len(heads))
    ]
    head = "  ".join(_place(cell, widths[i], i == 0) for i, cell in enumerate(heads))
    marks = _ASCII_MARKS if style.ascii else _MARKS
    lines: list[Text] = []
    for row, table in zip(comparison.rows, tables, strict=True):
        lines += [Text(), Text(style.cut(style.clean(row_title(row)), style.width), style="bold")]
        lines.append(Text(f"    {head}", style="dim"))
        for change, cells in zip(row.changes, table, strict=True):
            text = Text(f"  {marks.get(change.outcome, '-')} ", style=_LOOKS.get(change.outcome, ""))
            text.append("  ".join(_place(cell, widths[i], i == 0) for i, cell in enumerate(cells)) + "  ")
            word = _WORDS[change.outcome]
            if change.verdict is None:
                text.append(word, _LOOKS.get(change.outcome, ""))
            else:
                verdict = VERDICT_WORDS[change.verdict]
                if text.cell_len + len(verdict) > style.width:
                    verdict = SHORT_WORDS[change.verdict]
                text.append(verdict, _LOOKS[change.verdict])
                more = f", {word}" if change.outcome not in ("same", "not measured") else ""
                text.append(more if text.cell_len + len(more) <= style.width else "", "dim")
            lines.append(text)
        reasons = [f"{change.title}: {change.reason}" for change in row.changes if change.reason]
        for reason in [*dict.fromkeys(reasons), *row.notes]:
            lines += wrapped(style.clean(reason), style.width, "    ", "      ", "dim")
    return lines


def _place(cell: str, width: int, left: bool) -> str:
    space = " " * (width - cell_len(cell))
    return cell + space if left else space + cell


def notes(comparison: Comparison) -> list[str]:
    """How the intervals are meant, and what stands in one of the two only."""
    share = plain_number(comparison.confidence * 100)
    said = [f"only in {side}: {', '.join(names)}" for side, names in _alone(comparison) if names]
    if comparison.only_a and comparison.gates:
        said[0] += ", so its gates are not decided"
    intervals = [change for row in comparison.rows for change in row.changes if change.confidence is not None]
    if intervals:
        count = comparison.decisions
        said.append(
            f"intervals: {share} % for {'this one' if count == 1 else f'all {count} together'}; they hold the noise "
            "within each run, not what changes between two runs of one model, such as another state of the machine"
        )
        said += list(
            dict.fromkeys(f"{change.title}: {change.how}" for change in intervals if len(comparison.rows) == 1)
        )
    return said


def _alone(comparison: Comparison) -> tuple[tuple[str, tuple[str, ...]], ...]:
    return ("A", comparison.only_a), ("B", comparison.only_b)


def _note(note: str, style: Style) -> list[Text]:
    return wrapped(style.clean(note), style.width, "  ", "    ", "dim")


def comparison_markdown(comparison: Comparison) -> str:
    """What a pull request should show."""
    gated = bool(comparison.gates)
    lines = [
        f"### edgestill compare: {escape_markdown(summary(comparison))}",
        "",
        f"A: `{_code(comparison.a.path)}` {date(comparison.a.created)}, "
        f"B: `{_code(comparison.b.path)}` {date(comparison.b.created)}; exit status {comparison.exit_status}",
        "",
        "| Target | | A | B | Change | Interval |" + (" Gate |" if gated else "") + " |",
        "|---|---|--:|--:|--:|--:|" + ("--:|" if gated else "") + "---|",
    ]
    below: list[str] = []
    for row in comparison.rows:
        title = escape_markdown(row_title(row))
        for position, change in enumerate(row.changes):
            word = _WORDS[change.outcome]
            if change.verdict is not None:
                verdict = VERDICT_WORDS[change.verdict]
                word = f"**{verdict}**, {word}" if change.verdict == "fail" else f"{verdict}, {word}"
            cells = ["" if position else title, *(escape_markdown(cell) for cell in figures(change, comparison.metric))]
            cells += [change.gate or ""] * gated
            lines.append(f"| {' | '.join([*cells, word])} |")
        said = dict.fromkeys(
            [f"{change.title}: {change.reason}" for change in row.changes if change.reason] + list(row.notes)
        )
        below += [f"- {escape_markdown(row.name)}: {escape_markdown(reason)}" for reason in said]
    lines += ["", *below, *(f"- {escape_markdown(note)}" for note in notes(comparison))]
    return "\n".join(lines) + "\n"


def _code(text: str) -> str:
    return " ".join(text.replace("`", "'").split())
