"""Where text goes: results to standard output, progress, notes and errors to standard error.

Rich reads `NO_COLOR`, `COLUMNS` and `TERM` by itself. Nothing here imports Rich until something is printed.
"""

from __future__ import annotations

import json
import math
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

from profiles.errors import EdgestillError, Interrupted
from profiles.progress import Progress, Silent, Task

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Task as RichTaskState

_LOG_INTERVAL_SECONDS = 10.0
_VERBOSE_LOG_INTERVAL_SECONDS = 2.0


@dataclass(frozen=True)
class Settings:
    """The options that every command takes."""

    quiet: bool = False
    verbose: bool = False
    debug: bool = False


_state = {"settings": Settings()}


def configure(settings: Settings) -> None:
    """Called once per command line, before the command."""
    _state["settings"] = settings


def settings() -> Settings:
    """The options given on this command line."""
    return _state["settings"]


def stdout() -> Console:
    """The console of results."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=False)


def stderr() -> Console:
    """The console of progress, notes and errors."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def emit(result: RenderableType) -> None:
    """Prints a result on standard output; text is printed as it is, without Rich's markup or wrapping."""
    if isinstance(result, str):
        sys.stdout.write(result if result.endswith("\n") else result + "\n")
    else:
        stdout().print(result)


def emit_wrapped(text: str) -> None:
    """Prints lines on standard output; a terminal gets them broken between words, further lines indented."""
    if sys.stdout.isatty():
        from shutil import get_terminal_size

        width = max(40, get_terminal_size().columns)
        broken = []
        for line in text.splitlines():
            indent = line[: len(line) - len(line.lstrip())] + "  "
            broken += textwrap.wrap(line, width, subsequent_indent=indent, drop_whitespace=True) or [""]
        text = "\n".join(broken)
    emit(text)


def emit_json(document: Any) -> None:
    """Prints one JSON document on standard output.

    Args:
        document: plain values, pydantic models, or lists and dicts of both. NaN and infinities become null, because
            JSON has no word for them.
    """
    sys.stdout.write(json.dumps(_jsonable(document), indent=2, allow_nan=False) + "\n")


def _jsonable(value: Any) -> Any:
    if hasattr(value, "model_dump"):
        value = value.model_dump(mode="json")
    if isinstance(value, dict):
        return {str(key): _jsonable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        entries = sorted(value) if isinstance(value, set | frozenset) else value
        return [_jsonable(entry) for entry in entries]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return str(value)


def print_error(error: EdgestillError, console: Console | None = None) -> None:
    """`error: what`, then `where`, `evidence` and `fix` as far as they are known, never wrapped so that a command in
    the fix can be copied."""
    from rich.text import Text

    prefix = "" if isinstance(error, Interrupted) else "error: "  # stopping the work is the user's right
    text = Text.assemble((prefix, "bold red"), error.message)
    details = (("where", error.where), ("evidence", error.evidence), ("fix", error.fix))
    for label, detail in details:
        if detail:
            text.append(f"\n  {label}: ", style="bold")
            text.append(str(detail).rstrip("\n").replace("\n", "\n    "))
    (console or stderr()).print(text, soft_wrap=True)


def make_progress(quiet: bool | None = None, verbose: bool | None = None) -> Progress:
    """How work is shown: bars on a terminal, log lines elsewhere, nothing with `-q`.

    Args:
        quiet: None takes `-q` of the command line.
        verbose: None takes `-v`; finished inner tasks leave a line as well, and log lines come more often.
    """
    quiet = settings().quiet if quiet is None else quiet
    verbose = settings().verbose if verbose is None else verbose
    if quiet:
        return Silent()
    console = stderr()
    if console.is_terminal and not console.is_dumb_terminal:
        return RichProgress(console, verbose=verbose)
    interval = _VERBOSE_LOG_INTERVAL_SECONDS if verbose else _LOG_INTERVAL_SECONDS
    return PlainProgress(sys.stderr, interval=interval, verbose=verbose)


def duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 min 05 s`, `2 h 03 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def rate(units_per_second: float, unit: str) -> str:
    """`1,230 samples/s`; three digits are enough to compare two runs."""
    digits = 2 if units_per_second < 1 else 1 if units_per_second < 100 else 0
    return f"{units_per_second:,.{digits}f} {unit}/s"


def _summary(title: str, done: int, unit: str, elapsed: float, note: str) -> str:
    """The line that a finished task leaves."""
    parts = [f"{done:,} {unit} in {duration(elapsed)}"]
    if elapsed > 0 and done:
        parts.append(rate(done / elapsed, unit))
    if note:
        parts.append(note)
    return f"{title}: " + ", ".join(parts)


class _PlainTask:
    def __init__(self, owner: PlainProgress, title: str, total: int | None, unit: str, announced: bool) -> None:
        self.title, self.total, self.unit, self.announced = title, total, unit, announced
        self.done = 0
        self.note = ""
        self._owner = owner
        self.started = self._last_line = owner.clock()

    def advance(self, amount: int = 1, note: str = "") -> None:
        self.done += amount
        if note:
            self.note = note
        now = self._owner.clock()
        if now - self._last_line >= self._owner.interval:
            self._last_line = now
            self.announced = True
            self._owner.line(self._running(now - self.started))

    def _running(self, elapsed: float) -> str:
        count = f"{self.done:,}" if self.total is None else f"{self.done:,}/{self.total:,}"
        parts = [f"{count} {self.unit}"]
        if self.done and elapsed > 0:
            speed = self.done / elapsed
            parts.append(rate(speed, self.unit))
            if self.total is not None and self.total >= self.done:
                parts.append(f"{duration((self.total - self.done) / speed)} left")
        if self.note:
            parts.append(self.note)
        return f"{self.title}: " + ", ".join(parts)


class PlainProgress:
    """Log lines: one when a task starts, one about every `interval` seconds, one at its end.

    A task inside another one stays silent until it has lasted `interval` seconds, so that thirty short epochs do not
    bury the log; `verbose` shows it all.
    """

    def __init__(
        self,
        file: TextIO,
        *,
        interval: float = _LOG_INTERVAL_SECONDS,
        verbose: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.interval, self.clock = interval, clock
        self._file, self._verbose = file, verbose
        self._open: list[_PlainTask] = []

    @contextmanager
    def task(self, title: str, total: int | None, unit: str = "samples") -> Iterator[Task]:
        """See `profiles.progress.Progress`."""
        announced = self._verbose or not self._open
        task = _PlainTask(self, title, total, unit, announced)
        if announced:
            self.line(title if total is None else f"{title}: {total:,} {unit}")
        self._open.append(task)
        try:
            yield task
        finally:
            self._open.remove(task)
        if task.announced:
            self.line(_summary(title, task.done, unit, self.clock() - task.started, task.note))

    def note(self, message: str) -> None:
        """One line."""
        self.line(message)

    def line(self, text: str) -> None:
        """Writes and flushes, because whoever reads a log follows it while it grows."""
        self._file.write(text + "\n")
        self._file.flush()


class _RichTask:
    def __init__(self, owner: RichProgress, identifier: Any) -> None:
        self._owner, self._identifier = owner, identifier
        self.done = 0
        self.note = ""

    def advance(self, amount: int = 1, note: str = "") -> None:
        self.done += amount
        if note:
            self.note = note
            self._owner.display.update(self._identifier, advance=amount, note=note)
        else:
            self._owner.display.advance(self._identifier, amount)


class RichProgress:
    """One bar per running task: done, rate, elapsed, time left, note. Finished outer tasks leave one line."""

    def __init__(self, console: Console, *, verbose: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        from rich.progress import BarColumn, ProgressColumn, TextColumn
        from rich.progress import Progress as Display
        from rich.text import Text

        class Figures(ProgressColumn):
            max_refresh = 0.5

            def render(self, task: RichTaskState) -> Text:
                return Text(_figures(task), style="cyan", no_wrap=True, overflow="ellipsis")

        self._verbose, self._clock = verbose, clock
        self._open: list[_RichTask] = []
        self.display = Display(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=16),
            Figures(),
            TextColumn("{task.fields[note]}", markup=False, style="dim"),
            console=console,
            transient=True,
            refresh_per_second=4,  # redrawing takes the cores that the work wants
            get_time=clock,
        )

    @contextmanager
    def task(self, title: str, total: int | None, unit: str = "samples") -> Iterator[Task]:
        """See `profiles.progress.Progress`."""
        inner = bool(self._open)
        if not inner:
            self.display.start()
        identifier = self.display.add_task(("  " * len(self._open)) + title, total=total, unit=unit, note="")
        task = _RichTask(self, identifier)
        started = self._clock()
        self._open.append(task)
        finished = False
        try:
            yield task
            finished = True
        finally:
            self._open.remove(task)
            self.display.remove_task(identifier)
            if finished and (self._verbose or not inner):
                self.note(_summary(title, task.done, unit, self._clock() - started, task.note))
            if not self._open:
                self.display.stop()

    def note(self, message: str) -> None:
        """One line above the bars."""
        self.display.console.print(message, markup=False, soft_wrap=True)


def _figures(task: RichTaskState) -> str:
    """`1,200/5,000  350 samples/s  12 s, 11 s left`."""
    count = f"{int(task.completed):,}"
    parts = [count if task.total is None else f"{count}/{int(task.total):,}"]
    if task.speed:
        parts.append(rate(task.speed, task.fields["unit"]))
    times = duration(task.elapsed or 0.0)
    if task.time_remaining is not None and not task.finished:
        times += f", {duration(task.time_remaining)} left"
    return "  ".join([*parts, times])
