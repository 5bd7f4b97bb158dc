"""How long work tells that it is alive, without the lower layers knowing the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Task(Protocol):
    """One running piece of work."""

    def advance(self, amount: int = 1, note: str = "") -> None:
        """`amount` more units are done; `note` replaces the text beside the bar."""
        ...


class Progress(Protocol):
    """Shows tasks and notes; `cli` has the Rich and the plain-log implementations."""

    def task(self, title: str, total: int | None, unit: str = "samples") -> AbstractContextManager[Task]:
        """A task of `total` units (None: unknown); rate and time left are the implementation's."""
        ...

    def note(self, message: str) -> None:
        """One line that stays."""
        ...


class _SilentTask:
    def advance(self, amount: int = 1, note: str = "") -> None:
        """Nothing to show."""


class Silent:
    """Progress that shows nothing: the default of every function that takes a Progress."""

    @contextmanager
    def task(self, title: str, total: int | None, unit: str = "samples") -> Iterator[Task]:
        yield _SilentTask()

    def note(self, message: str) -> None:
        """Nothing to show."""
