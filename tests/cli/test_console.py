"""Progress on a terminal and in a log, with a clock of the test's own."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from cli import console
from cli.console import PlainProgress, RichProgress
from profiles.progress import Silent


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_log_has_start_regular_lines_with_rate_and_time_left_and_an_end() -> None:
    clock, out = Clock(), io.StringIO()
    progress = PlainProgress(out, clock=clock)
    with progress.task("train conv-w24-d2-k3", 5000) as task:
        for second in range(1, 26):
            clock.now = float(second)
            task.advance(200, f"loss {second / 10}")
    assert out.getvalue().splitlines() == [
        "train conv-w24-d2-k3: 5,000 samples",
        "train conv-w24-d2-k3: 2,000/5,000 samples, 200 samples/s, 15 s left, loss 1.0",
        "train conv-w24-d2-k3: 4,000/5,000 samples, 200 samples/s, 5.0 s left, loss 2.0",
        "train conv-w24-d2-k3: 5,000 samples in 25 s, 200 samples/s, loss 2.5",
    ]


@pytest.mark.parametrize(("verbose", "lines"), [(False, 4), (True, 8)])
def test_short_inner_tasks_are_logged_only_when_asked_for(verbose: bool, lines: int) -> None:
    clock, out = Clock(), io.StringIO()
    progress = PlainProgress(out, clock=clock, verbose=verbose)
    with progress.task("student", 2, "epochs") as outer:
        for _ in range(2):
            with progress.task("validation", 10) as inner:
                inner.advance(10)
            clock.now += 1
            outer.advance()
    with progress.task("unknown length", None, "files") as task:
        task.advance(3)
    assert len(out.getvalue().splitlines()) == lines
    assert "unknown length: 3 files in 0.0 s" in out.getvalue()


def test_a_failing_task_claims_no_end() -> None:
    out = io.StringIO()
    progress = PlainProgress(out, clock=Clock())
    with pytest.raises(RuntimeError), progress.task("export", 3, "files"):
        raise RuntimeError
    assert out.getvalue().splitlines() == ["export: 3 files"]


def test_a_terminal_shows_bars_with_rate_and_keeps_one_line_per_outer_task() -> None:
    clock = Clock()
    screen = Console(file=io.StringIO(), force_terminal=True, width=110, color_system=None)
    progress = RichProgress(screen, clock=clock)
    with progress.task("train", 1000) as outer:
        for _ in range(4):
            with progress.task("epoch", 10, "batches") as inner:
                clock.now += 1
                inner.advance(10, "loss 0.5")
            outer.advance(200)
        progress.display.refresh()
        progress.note("[not markup] best epoch 3")
    shown = screen.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(r"train .*800/1,000  200 samples/s  4\.0 s, 1\.0 s left", shown)
    assert "[not markup] best epoch 3" in shown
    assert shown.count("train: 800 samples in 4.0 s, 200 samples/s") == 1
    assert "epoch: " not in shown


def test_quiet_is_silent_and_a_pipe_gets_log_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert isinstance(console.make_progress(quiet=True), Silent)
    progress = console.make_progress(quiet=False, verbose=False)
    assert isinstance(progress, PlainProgress)
    progress.note("a note")
    out, err = capsys.readouterr()
    assert (out, err) == ("", "a note\n")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7380, "2 h 03 min")],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert console.duration(seconds) == text
