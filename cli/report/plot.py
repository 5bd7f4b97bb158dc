"""The accuracy-latency plot as lines of text: fixed size, labels that do not cover each other, ASCII on request."""

from __future__ import annotations

from dataclasses import dataclass
from string import ascii_letters

from rich.cells import cell_len

from cli.report.pareto import Axis, common_floor, latency_axis, linear_axis, measured_points, near, pareto_front
from cli.report.schema import Report
from cli.report.words import metric_title, percentile_title, percentiles, plain_number, scopes, wrap

ROWS = 11


@dataclass(frozen=True)
class Marks:
    """The characters of a plot."""

    point: str = "●"
    across: str = "─"
    down: str = "│"
    turn_up: str = "╯"
    turn_right: str = "╭"
    reference: str = "┄"
    tick_left: str = "┤"
    tick_below: str = "┬"
    corner: str = "└"


UNICODE = Marks()
ASCII = Marks("o", "-", "|", "+", "+", ".", "|", "+", "+")

_TAKEN_BY_LABEL = 2
_TAKEN_BY_LINE = 1


class Canvas:
    """A grid of characters, each with the priority of what drew it."""

    def __init__(self, columns: int, rows: int) -> None:
        self.columns, self.rows = columns, rows
        self.cells = [[" "] * columns for _ in range(rows)]
        self.taken = [[0] * columns for _ in range(rows)]

    def put(self, column: int, row: int, text: str, priority: int) -> None:
        """Writes over what has a lower or equal priority."""
        for character in text:
            size = cell_len(character)
            # a wide character stands in its first cell, the second stays empty
            for offset, part in enumerate([character, ""][:size]):
                if 0 <= column + offset < self.columns and self.taken[row][column + offset] <= priority:
                    self.cells[row][column + offset] = part
                    self.taken[row][column + offset] = priority
            column += size

    def free(self, column: int, row: int, length: int) -> int | None:
        """How many line cells text of this length would cover; None when it touches a label or leaves the plot."""
        if not 0 <= row < self.rows or column < 0 or column + length > self.columns:
            return None
        if _TAKEN_BY_LABEL in self.taken[row][max(column - 1, 0) : column + length + 1]:
            return None
        return sum(self.taken[row][column : column + length])


def plot_lines(report: Report, width: int, ascii_only: bool = False) -> list[str]:
    """The plot of all measured targets, no line wider than `width` cells; a sentence when fewer than two were measured.

    Left and up is better. The front is drawn as steps: whatever is under or right of them, some other target beats.
    Names must be printable (`terminal.Style.clean`).
    """
    marks = ASCII if ascii_only else UNICODE
    title = metric_title(report.metric)
    points = measured_points(report)
    if len(points) < 2:
        number = "no measured target" if not points else "one measured target"
        return [f"{title} over latency: {number}, a plot needs two"]

    floor = common_floor(report)
    teacher = next((r.metric.value * 100 for r in report.references if r.role == "teacher" and r.metric), None)
    references = [
        (value, label)
        for value, label in ((floor, "floor"), (teacher, "teacher"))
        if value is not None and near(value, points)
    ]
    vertical = linear_axis([*(p.percent for p in points), *(v for v, _ in references)], 6, ceiling=100.0)
    tick_texts = [plain_number(tick) for tick in vertical.ticks]
    gutter = max(len(text) for text in tick_texts) + 1
    columns = width - gutter - 1
    horizontal = latency_axis([point.ms for point in points])
    canvas = Canvas(columns, ROWS)

    def column_of(ms: float) -> int:
        return round(horizontal.place(ms) * (columns - 1))

    def row_of(percent: float) -> int:
        return ROWS - 1 - round(vertical.place(percent) * (ROWS - 1))

    for value, label in references:
        row = row_of(value)
        canvas.put(0, row, marks.reference * columns, _TAKEN_BY_LINE)
        canvas.put(columns - len(label) - 1, row, f" {label}", _TAKEN_BY_LABEL)

    _draw_front(canvas, [(column_of(point.ms), row_of(point.percent)) for point in pareto_front(points)], marks)

    cells: dict[tuple[int, int], list[str]] = {}
    for point in points:
        cells.setdefault((column_of(point.ms), row_of(point.percent)), []).append(point.name)
    for column, row in cells:
        canvas.put(column, row, marks.point, _TAKEN_BY_LABEL)
    keys = _place_labels(canvas, cells)

    pts = percentiles(report)
    what = percentile_title(pts[0]) if len(pts) == 1 else "latency"
    x_title = f"{what} ms{', log' if horizontal.log else ''}"
    legend = f"{marks.point} measured   {marks.across * 2} Pareto front"
    head = f" {title} %"
    lines = [head + legend.rjust(width - len(head) - 1)]
    ticks_at = {row_of(tick): text for tick, text in zip(vertical.ticks, tick_texts, strict=True)}
    for row in range(ROWS):
        edge = marks.tick_left if row in ticks_at else marks.down
        lines.append(f"{ticks_at.get(row, ''):>{gutter - 1}} {edge}{''.join(canvas.cells[row])}".rstrip())
    lines += x_axis(horizontal, columns, gutter, marks, x_title)
    if keys:
        indent = " " * (gutter + 1)
        lines += wrap("; ".join(f"{key} = {names}" for key, names in keys), width, indent, indent)
    if len(scopes(report)) > 1 or len(pts) > 1:
        lines.append(f"{' ' * gutter} not all points timed alike: see percentile, scope and batch above")
    return lines


def _draw_front(canvas: Canvas, corners: list[tuple[int, int]], marks: Marks) -> None:
    for index, (column, row) in enumerate(corners):
        last = index + 1 == len(corners)
        end, next_row = (canvas.columns, row) if last else corners[index + 1]
        canvas.put(column, row, marks.across * (end - column), _TAKEN_BY_LINE)
        if not last and next_row < row:
            canvas.put(end, row, marks.turn_up, _TAKEN_BY_LINE)
            for between in range(next_row + 1, row):
                canvas.put(end, between, marks.down, _TAKEN_BY_LINE)


def _place_labels(canvas: Canvas, cells: dict[tuple[int, int], list[str]]) -> list[tuple[str, str]]:
    """Writes each cell's names where they cover no other label; names without a place get a letter, returned."""
    keys: list[tuple[str, str]] = []
    for (column, row), names in cells.items():
        text = ", ".join(names)
        length = cell_len(text)
        places = [
            (column + 2, row),
            (column - 1 - length, row),
            (column + 1, row - 1),
            (column + 1, row + 1),
            (column - length, row - 1),
            (column - length, row + 1),
            (column - length // 2, row - 1),
            (column - length // 2, row + 1),
        ]
        scored = [
            (covered, order)
            for order, place in enumerate(places)
            if (covered := canvas.free(place[0], place[1], length)) is not None
        ]
        if scored:
            at = places[min(scored)[1]]
            canvas.put(at[0], at[1], text, _TAKEN_BY_LABEL)
        else:
            key = ascii_letters[len(keys) % len(ascii_letters)]
            canvas.put(column, row, key, _TAKEN_BY_LABEL)
            keys.append((key, text))
    return keys


def x_axis(axis: Axis, columns: int, gutter: int, marks: Marks, title: str, margin: int = 0) -> list[str]:
    """The line under a plot and its numbers, the title at the right end; `margin`: columns left free on either side."""
    line = [marks.across] * columns
    numbers = [" "] * columns
    room = columns - len(title) - 1
    numbers[room + 1 :] = title
    for tick in axis.ticks:
        column = margin + round(axis.place(tick) * (columns - 1 - 2 * margin))
        line[column] = marks.tick_below
        text = plain_number(tick)
        start = max(0, column - len(text) // 2)
        if start + len(text) < room and all(c == " " for c in numbers[max(0, start - 1) : start + len(text) + 1]):
            numbers[start : start + len(text)] = text
    return [
        f"{' ' * gutter}{marks.corner}{''.join(line)}",
        f"{' ' * gutter} {''.join(numbers)}".rstrip(),
    ]
