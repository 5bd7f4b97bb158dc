"""The report in a terminal: verdict first, provenance per device, reason and fix last; layout decided here alone.

Nothing is wider than the asked width, except a path or command without a space that is itself wider. Verdicts are told
by shape and word as well as by colour; without UTF-8 the marks, the plot and all texts fall back to ASCII.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from cli.report.plot import plot_lines
from cli.report.schema import ReferenceRow, Report, TargetRow
from cli.report.verdict import RowVerdict
from cli.report.words import (
    LIMIT_TITLES,
    NOT_THE_DEVICE,
    SHOT_HEADING,
    VERDICT_WORDS,
    bound_words,
    choice_rows,
    counts_line,
    date,
    device_words,
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
    page_command,
    percent,
    percentile_title,
    percentiles,
    plain_number,
    points,
    reasons,
    scopes,
    shot_notes,
    shot_title,
    stage_words,
    state_words,
    step_figures,
    strategy_notes,
    subject_line,
    wrap,
)

MIN_WIDTH = 76
"""Below this the table has no room left; a narrower terminal wraps."""
MAX_PROSE = 120
MAX_PLOT = 100
FULL_WORDS_FROM = 96
"""Width from which verdicts are written out."""

_STYLES: dict[RowVerdict, str] = {
    "pass": "green",
    "fail": "bold red",
    "inconclusive": "yellow",
    "not measured": "dim",
    "error": "bold red",
}
_MARKS: dict[RowVerdict, str] = {"pass": "✓", "fail": "✗", "inconclusive": "?", "not measured": "-", "error": "!"}
_ASCII_MARKS: dict[RowVerdict, str] = _MARKS | {"pass": "+", "fail": "x"}
SHORT_WORDS: dict[RowVerdict, str] = VERDICT_WORDS | {"inconclusive": "INCONCL.", "not measured": "not run"}
"""Where there is no room for the whole."""
_TO_ASCII = str.maketrans(
    {"±": "+-", "°": "", "×": "x", "–": "-", "—": "-", "−": "-", "µ": "u", "μ": "u", "≥": ">=", "≤": "<=", "…": "~"}
    | {"→": "->", "’": "'", "‘": "'", "“": '"', "”": '"', "·": "."}
)


@dataclass(frozen=True)
class Style:
    """How the terminal is written to: width in cells, and whether only ASCII may be used."""

    width: int
    ascii: bool

    def clean(self, text: str) -> str:
        """One printable line: control characters become spaces, and without UTF-8 everything ASCII."""
        text = "".join(" " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in text)
        if not self.ascii:
            return text
        text = unicodedata.normalize("NFKD", text.translate(_TO_ASCII))
        text = "".join(c for c in text if not unicodedata.combining(c))
        return text.encode("ascii", "replace").decode()

    def cut(self, text: str, width: int) -> str:
        """At most `width` cells; names often differ at their end, so the middle goes."""
        if cell_len(text) <= width:
            return text
        tail = (width - 1) // 2
        head = width - 1 - tail
        while tail and cell_len(text[-tail:]) > (width - 1) // 2:
            tail -= 1
        kept = set_cell_size(text, head).rstrip()
        return kept + ("~" if self.ascii else "…") + (text[-tail:] if tail else "")


def render_text(
    report: Report, width: int = 80, color: bool = False, ascii_only: bool = False, show_all: bool = False
) -> str:
    """The report as text, with a line feed at its end.

    Args:
        report: the report.
        width: cells per line; at least MIN_WIDTH is used.
        color: with ANSI colours.
        ascii_only: for an output whose encoding is not UTF-8.
        show_all: every candidate, every limit, stage times and training cost, too.
    """
    style = Style(max(width, MIN_WIDTH), ascii_only)
    lines = [*_header(report, style), Text(), *_table(report, style), *_footnotes(report, style), Text()]
    lines += _shots(report, style)
    lines += [*_provenance(report, style), Text()]
    lines += _plot(report, style)
    lines += _why(report, style)
    if show_all:
        lines += _all(report, style)
    lines += [Text(), *_places(report, style)]
    return as_text(lines, style, color)


def as_text(lines: Sequence[Text], style: Style, color: bool) -> str:
    """Finished lines as one string with a line feed at its end, with colours or without."""
    if not color:
        return "".join(line.plain.rstrip() + "\n" for line in lines)
    out = io.StringIO()
    # the caller has decided, so neither NO_COLOR nor TERM may decide again
    console = Console(
        file=out,
        force_terminal=True,
        color_system="standard",
        no_color=False,
        legacy_windows=False,
        width=style.width,
        highlight=False,
        emoji=False,
    )
    for line in lines:
        line.rstrip()
        console.print(line, soft_wrap=True)
    return out.getvalue()


def print_report(report: Report, stream: TextIO | None = None, show_all: bool = False) -> None:
    """Writes the report to a stream (standard output) in the width, colours and characters that it can show.

    COLUMNS, NO_COLOR, FORCE_COLOR and TERM=dumb are honoured; a pipe gets 80 columns without colour.
    """
    stream = sys.stdout if stream is None else stream
    stream.write(
        render_text(
            report,
            width=terminal_width(stream),
            color=wants_color(stream),
            ascii_only=not speaks_unicode(stream),
            show_all=show_all,
        )
    )


def terminal_width(stream: TextIO) -> int:
    """COLUMNS, else the terminal's width, else 80."""
    asked = os.environ.get("COLUMNS", "")
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    return shutil.get_terminal_size((80, 24)).columns if stream.isatty() else 80


def wants_color(stream: TextIO) -> bool:
    """A terminal that shows colours, unless NO_COLOR is set; FORCE_COLOR colours pipes, too."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return stream.isatty() and os.environ.get("TERM", "") != "dumb"


def speaks_unicode(stream: TextIO) -> bool:
    """Whether the stream can encode the marks and box characters."""
    try:
        "✓±●┄╮".encode(stream.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _short(name: str, style: Style) -> str:
    """A target's name where it stands among others in a line or in the plot."""
    return style.cut(style.clean(name), 24)


def _plot(report: Report, style: Style) -> list[Text]:
    """The plot, with its names in the colours of their verdicts."""
    rows = tuple(row.model_copy(update={"name": _short(row.name, style)}) for row in report.targets)
    lines = plot_lines(report.model_copy(update={"targets": rows}), min(style.width, MAX_PLOT), style.ascii)
    texts = [Text(line) for line in lines]
    for text in texts:
        for row in rows:
            text.highlight_regex(rf"(?<!\w){re.escape(row.name)}(?!\w)", _STYLES[row.verdict])
        text.highlight_words(["┄"], "dim")
    return texts


def sides(left: Text, right: Text, width: int) -> list[Text]:
    """Both on one line, right-aligned, or on two when they do not fit."""
    gap = width - left.cell_len - right.cell_len
    if gap < 2:
        return [left, right]
    return [left + Text(" " * gap) + right]


def wrapped(text: str, width: int, first: str = "", indent: str = "", style: str = "") -> list[Text]:
    """The text in lines of at most `width` cells; see `words.wrap`."""
    return [Text(line, style=style) for line in wrap(text, width, first, indent)]


def _header(report: Report, style: Style) -> list[Text]:
    subject = style.clean(subject_line(report))
    when = f"{style.clean(date(report.created))}  {duration(report.seconds)}"
    room = style.width - cell_len(subject) - 2
    left = Text().append(style.cut(style.clean(report.name), max(room, 12)), "bold").append(f"  {subject}")
    lines = sides(left, Text(when, style="dim"), style.width)
    colour = {0: "green", 1: "bold red", 3: "bold red", 4: "yellow"}[report.exit_status]
    status = Text("exit status ") + Text(str(report.exit_status), style=colour)
    return lines + sides(Text(counts_line(report)), status, style.width)


def _metric_cell(row: TargetRow | ReferenceRow, style: Style) -> str:
    if row.metric is None:
        return "- "
    star = "*" if isinstance(row, TargetRow) and on_other_machine(row) else " "
    return f"{percent(row.metric.value)} {'+-' if style.ascii else '±'}{percent(row.metric.half_width)}{star}"


def _table(report: Report, style: Style) -> list[Text]:
    shown = percentiles(report)
    several = len(shown) > 1
    title = percentile_title(shown[0]) if len(shown) == 1 else "latency"
    wide = style.width >= FULL_WORDS_FROM
    words = VERDICT_WORDS if wide else SHORT_WORDS
    heads = [
        "",
        "Target",
        "Student",
        "Prec",
        "MiB",
        f"{metric_title(report.metric)} % ",
        f"{title} ms",
        "bound",
        "limit",
    ]
    rows: list[tuple[list[str], RowVerdict | None]] = []
    for row in report.targets:
        limit, latency = latency_limit(row), row.latency
        point = milliseconds(latency.point, limit) if latency is not None else "-"
        if several and latency is not None:
            point = f"{percentile_title(latency.percentile)} {point}"
        cells = [
            (_ASCII_MARKS if style.ascii else _MARKS)[row.verdict],
            style.clean(row.name),
            style.clean(row.arch),
            row.precision,
            mebibytes(row.size_mib),
            _metric_cell(row, style),
            point,
            milliseconds(latency.upper_bound, limit) if latency is not None else "-",
            "-" if limit is None else plain_number(limit),
            words[row.verdict],
        ]
        rows.append((cells, row.verdict))
    for reference in report.references:
        cells = ["", reference.role, style.clean(reference.arch), reference.precision, mebibytes(reference.size_mib)]
        rows.append(([*cells, _metric_cell(reference, style), "", "", "", ""], None))

    heads = [style.clean(head) for head in heads] + ["Verdict"]
    widths = [max(cell_len(head), *(cell_len(cells[i]) for cells, _ in rows), 1) for i, head in enumerate(heads)]
    # The two columns of names give way to the figures, the wider one first; the two spaces before the verdict stay.
    while sum(widths) + len(widths) > style.width and max(widths[1], widths[2]) > 6:
        widths[1 if widths[1] >= widths[2] else 2] -= 1

    def line(cells: Sequence[str], look: str) -> Text:
        text = Text()
        for i, (cell, room) in enumerate(zip(cells, widths, strict=True)):
            fitted = style.cut(cell, room) if i in (1, 2) else cell
            padding = " " * (room - cell_len(fitted))
            on_left = i < 4 or i == 9
            text.append(fitted + padding if on_left else padding + fitted, style=look if i in (0, 9) else "")
            text.append("  " if i == 8 else "" if i == 9 else " ")
        return text

    head = line(heads, "")
    head.stylize("dim")
    lines = [head]
    for cells, verdict in rows:
        text = line(cells, _STYLES[verdict] if verdict else "")
        if verdict is None:
            text.stylize("dim")
        lines.append(text)
    return lines


def _footnotes(report: Report, style: Style) -> list[Text]:
    latencies = [row.latency for row in report.targets if row.latency is not None]
    notes: list[str] = []
    timed = scopes(report)
    bound = bound_words(latencies)
    plus_minus = "+-" if style.ascii else "±"
    confidences = {row.metric.confidence for row in report.targets if row.metric is not None}
    spread = f"{plus_minus}: {plain_number(min(confidences) * 100)} %" if confidences else ""
    if len(timed) == 1:
        notes.append("; ".join(part for part in (f"{next(iter(timed))}, one query in flight", bound, spread) if part))
    else:
        notes += [f"{what}: {', '.join(_short(name, style) for name in names)}" for what, names in timed.items()]
        notes += [part for part in ("; ".join(part for part in (bound, spread) if part),) if part]
    for entry in report.bought:
        which = f" ({entry.arch})" if len(report.bought) > 1 else ""
        notes.append(f"distilling{which} bought {points(entry.difference)}")
    notes += strategy_notes(report) + exploration_notes(report)
    if any(on_other_machine(row) for row in report.targets):
        notes.append(f"* {NOT_THE_DEVICE}")
    lines: list[Text] = []
    pending = ""
    for note in (style.clean(note) for note in notes):
        joined = f"{pending}   {note}" if pending else note
        if pending and cell_len(joined) + 2 > style.width:
            lines += wrapped(pending, style.width, "  ", "    ", "dim")
            pending = note
        else:
            pending = joined
    if pending:
        lines += wrapped(pending, style.width, "  ", "    ", "dim")
    return lines


def _shots(report: Report, style: Style) -> list[Text]:
    """Accuracy on the classes with many, medium and few training samples, where there are such."""
    shots = report.shots
    if shots is None:
        return []
    room, plus_minus = style.width // 5, "+-" if style.ascii else "±"
    names = [group.name for group in shots.groups]
    rows: list[tuple[list[str], str]] = []
    for row in shots.rows:
        found = [row.metrics.get(name) for name in names]
        cells = [f"{percent(each.value)} {plus_minus}{percent(each.half_width)}" if each else "-" for each in found]
        rows.append(([row.title, style.cut(style.clean(row.arch), room), row.precision, *cells], ""))
    heads = ["", "", "", *([shot_title(name) for name in names] if style.width >= FULL_WORDS_FROM else names)]
    lines = [Text(SHOT_HEADING, style="bold")]
    lines += _grid(heads, rows, {0, 1, 2}, style)
    for note in shot_notes(report):
        lines += wrapped(style.clean(note), min(style.width, MAX_PROSE), "  ", "    ", "dim")
    return [*lines, Text()]


def _label_width(report: Report, style: Style) -> int:
    longest = max((cell_len(style.clean(row.name)) for row in report.targets), default=0)
    return min(longest, style.width // 4)


def _labelled(label: str, texts: Sequence[str], room: int, style: Style, look: str = "") -> list[Text]:
    """The label in its column, the texts beside it, each wrapped with a hanging indent."""
    width = min(style.width, MAX_PROSE)
    indent = " " * (room + 4)
    fitted = style.cut(label, room)
    lines: list[Text] = []
    for text in texts or [""]:
        prefix = "fix: " if text.startswith("fix: ") else ""
        hanging = indent + " " * len(prefix)
        broken = wrapped(style.clean(text), width, indent, hanging)
        if prefix:
            broken[0].stylize("cyan", len(indent), len(indent) + len(prefix))
        lines += broken
    first = Text("  ") + Text(fitted, style=look) + Text(" " * (room + 2 - cell_len(fitted)))
    lines[0] = first + lines[0][len(indent) :]
    return lines


def _provenance(report: Report, style: Style) -> list[Text]:
    """One entry per device; targets that share it are named together, and what differs between them stands below."""
    groups: dict[str, list[TargetRow]] = {}
    for row in report.targets:
        host = f"{row.host}  " if row.host else ""
        groups.setdefault(host + device_words(row), []).append(row)
    room, width = _label_width(report, style), min(style.width, MAX_PROSE)
    lines: list[Text] = []
    for device, rows in groups.items():
        states = [state_words(row) for row in rows]
        shared = [word for word in states[0] if all(word in other for other in states)]
        text = style.clean(", ".join([device, *shared]))
        if len(rows) == 1:
            lines += _labelled(style.clean(rows[0].name), [text], room, style)
            continue
        lines += wrapped(", ".join(_short(row.name, style) for row in rows) + ":", width, "  ", "  ")
        lines += wrapped(text, width, "    ", "    ")
        for row, words in zip(rows, states, strict=True):
            own = ", ".join(word for word in words if word not in shared)
            if own:
                lines += wrapped(style.clean(f"{_short(row.name, style)}: {own}"), width, "    ", "      ")
    return lines


def _why(report: Report, style: Style) -> list[Text]:
    room = _label_width(report, style)
    lines: list[Text] = []
    for row in report.targets:
        texts = [*reasons(row), *(f"fix: {fix}" for fix in row.fixes)]
        if texts:
            lines += _labelled(style.clean(row.name), texts, room, style, _STYLES[row.verdict])
    notes = [
        line for note in other_notes(report) for line in wrapped(style.clean(note), style.width, "  note: ", "    ")
    ]
    return [*([Text(), Text("Why", style="bold"), *lines] if lines else []), *notes]


def _places(report: Report, style: Style) -> list[Text]:
    lines = []
    if any(row.bundle for row in report.targets):
        lines += _command("bundles", f"{report.folder}/bundles/TARGET/", style)
    for picture in report.exploration.pictures if report.exploration is not None else ():
        lines += _command("look at", f"{report.folder}/{picture.file}", style)
    return lines + _command("page", page_command(report), style)


def _command(label: str, command: str, style: Style) -> list[Text]:
    """A path or command that a person copies: never cut; broken, with a backslash, only where there is a space."""
    head = Text().append(f"{label:<9}", "dim")
    command = style.clean(command)
    if 9 + cell_len(command) <= style.width:
        return [head.append(command)]
    parts = wrap(command, style.width - 4)
    return [head, *(Text(f"  {part}" + (" \\" if i + 1 < len(parts) else "")) for i, part in enumerate(parts))]


def _grid(heads: Sequence[str], rows: Sequence[tuple[Sequence[str], str]], left: set[int], style: Style) -> list[Text]:
    """A plain table, indented by two. Each row is its cells and a note, which goes under it, indented further.

    The first column, a name, gives way when the others need the room.
    """
    cleaned = [([style.clean(cell) for cell in cells], style.clean(note)) for cells, note in rows]
    widths = [max(cell_len(head), *(cell_len(cells[i]) for cells, _ in cleaned)) for i, head in enumerate(heads)]
    widths[0] = max(4, min(widths[0], style.width - 2 - sum(room + 2 for room in widths[1:])))
    lines = []
    for number, (whole, note) in enumerate([(list(heads), ""), *cleaned]):
        cells = [style.cut(whole[0], widths[0]), *whole[1:]]
        padded = [
            cell + " " * (widths[i] - cell_len(cell)) if i in left else " " * (widths[i] - cell_len(cell)) + cell
            for i, cell in enumerate(cells)
        ]
        lines.append(Text("  " + "  ".join(padded), style="" if number else "dim"))
        if note:
            lines += wrapped(note, min(style.width, MAX_PROSE), "      ", "      ", "dim")
    return lines


def _all(report: Report, style: Style) -> list[Text]:
    """What `--all` adds: candidates, limits, what was measured beside latency, stages, training."""

    def section(title: str, lines: list[Text]) -> list[Text]:
        return [Text(), Text(title, style="bold"), *lines]

    name_room = style.width // 5
    names = {row.name: style.cut(style.clean(row.name), name_room) for row in report.targets}
    plus_minus = "+-" if style.ascii else "±"
    out: list[Text] = []

    candidates: list[tuple[list[str], str]] = []
    for row in report.targets:
        for candidate in row.candidates:
            metric, latency = candidate.metric, candidate.latency
            cells = [
                names[row.name],
                candidate.precision,
                mebibytes(candidate.size_mib),
                f"{percent(metric.value)} {plus_minus}{percent(metric.half_width)}" if metric else "-",
                milliseconds(latency.point if latency else None),
                milliseconds(latency.upper_bound if latency else None),
                "chosen" if candidate.chosen else "rejected" if candidate.rejected_because else "",
            ]
            computed = f"computes in {candidate.compute_precision}" if candidate.compute_precision else ""
            candidates.append((cells, "; ".join(part for part in (candidate.rejected_because, computed) if part)))
    if candidates:
        heads = ["target", "prec", "MiB", f"{metric_title(report.metric)} %", "ms", "bound", ""]
        out += section("Candidates, metric on the validation split", _grid(heads, candidates, {0, 1, 6}, style))

    tried = [
        ([names[row.name], step.name, *step_figures(step)], step.note) for row in report.targets for step in row.steps
    ]
    if tried:
        heads = ["target", "step", "MiB", f"{metric_title(report.metric)} %", "time", ""]
        out += section("What each step of the precision planner bought", _grid(heads, tried, {0, 1, 5}, style))

    limits: list[tuple[list[str], str]] = []
    for row in report.targets:
        for limit in row.limits:
            value, interval, asked = limit_figures(limit)
            verdict = VERDICT_WORDS[limit.verdict]
            cells = [names[row.name], LIMIT_TITLES[limit.name], value, interval, asked, limit_unit(limit), verdict]
            limits.append((cells, limit.reason))
    if limits:
        heads = ["target", "limit of", "value", "interval", "limit", "", ""]
        out += section("Limits", _grid(heads, limits, {0, 1, 5, 6}, style))

    for row in report.targets:
        if row.selection is not None:
            students = [(list(cells[:5]), cells[5]) for cells in choice_rows(row.selection)]
            heads = ["student", "file", f"{metric_title(report.metric)} %", "ms", ""]
            out += section(f"Students for {style.clean(row.name)}", _grid(heads, students, {0, 1, 4}, style))
    if report.sharing is not None:
        shared = [
            ([each.title, each.arch, plain_number(each.epochs), duration(each.seconds)], ", ".join(each.targets))
            for each in report.sharing.trainings
        ]
        heads = ["trained once", "arch", "epochs", "time"]
        out += section("Trained once, and for which targets", _grid(heads, shared, {0, 1}, style))

    more: list[tuple[list[str], str]] = []
    for row in report.targets:
        latency = row.latency
        cells = [
            names[row.name],
            f"{latency.samples:,}" if latency else "-",
            milliseconds(latency.p50 if latency else None),
            milliseconds(latency.max if latency else None),
            "-" if latency is None or latency.outliers is None else f"{latency.outliers:,}",
            milliseconds(row.load_ms),
            milliseconds(row.first_inference_ms),
            mebibytes(row.peak_memory_mib),
        ]
        notes = (
            f"peak memory: {row.peak_memory_how}" if row.peak_memory_how else "",
            f"energy: {energy_words(row)}" if energy_words(row) else "",
            f"computes in {row.compute_precision}" if row.compute_precision else "",
            engine_words(row),
        )
        more.append((cells, "; ".join(note for note in notes if note)))
    if more:
        heads = ["target", "runs", "p50 ms", "max ms", "outl.", "load ms", "first ms", "peak MiB"]
        out += section("Measured", _grid(heads, more, {0}, style))
    if report.training:
        runs = [
            (
                [
                    style.cut(run.title, name_room),
                    style.cut(style.clean(run.arch), name_room),
                    style.cut(style.clean(run.objective), name_room),
                    plain_number(run.epochs),
                    "-" if run.best_epoch is None else plain_number(run.best_epoch),
                    "-" if run.samples_per_second is None else f"{run.samples_per_second:,.0f}",
                    duration(run.seconds),
                ],
                "",
            )
            for run in report.training
        ]
        heads = ["network", "arch", "objective", "epochs", "best", f"{report.unit}s/s", "time"]
        out += section("Training", _grid(heads, runs, {0, 1, 2}, style))
    if report.stages:
        stages = [([stage.name, duration(stage.seconds), stage_words(stage)], "") for stage in report.stages]
        out += section("Stages", _grid(["stage", "time", ""], stages, {0, 2}, style))
    splits = ", ".join(f"{count:,} {name}" for name, count in report.data.splits.items())
    facts = [report.data.title or report.data.source, report.data.input, splits, report.data.licence]
    text = ", ".join(fact for fact in facts if fact)
    out += section("Data", wrapped(style.clean(text), min(style.width, MAX_PROSE), "  ", "  "))
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    machine = ", ".join(
        part
        for part in (report.machine.title, report.machine.host, report.machine.os, f"Python {report.machine.python}")
        if part and part != "Python "
    )
    out += section("Made with", wrapped(style.clean(f"{versions}; {machine}"), min(style.width, MAX_PROSE), "  ", "  "))
    return out
