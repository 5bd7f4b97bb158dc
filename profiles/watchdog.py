"""Work that may hang inside a library, in a thread that is given up when it does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")
_LOOKS = 4
"""How often the work is looked at within the allowed time."""


class Hung(Exception):
    """Nothing moved for the allowed time. `label`: what the work said it was doing."""

    def __init__(self, label: str) -> None:
        super().__init__(label)
        self.label = label


class Beat:
    """A sign of life that the work gives, with what it does next."""

    def __init__(self) -> None:
        self.count = 0
        self.label = ""
        self.given_up = False

    def __call__(self, label: str) -> None:
        """Raises `Hung` in work that was given up, so that it ends if it ever comes back."""
        if self.given_up:
            raise Hung(label)
        self.count += 1
        self.label = label


class _Outcome(Generic[T]):
    result: T
    error: BaseException | None = None


def watched(work: Callable[[Beat], T], seconds: float) -> T:
    """The result of `work`, which runs in a thread of its own and must beat at least every `seconds`.

    A thread that hangs in a library cannot be ended; it is left behind and does not keep the process from ending. The
    waiting thread sleeps, so it takes nothing from what is measured.

    Raises:
        Hung: no beat for `seconds` (found within one and a half times that).
        Exception: whatever `work` raised.
    """
    beat = Beat()
    outcome: _Outcome[T] = _Outcome()

    def run() -> None:
        try:
            outcome.result = work(beat)
        except BaseException as error:  # handed to the caller's thread
            outcome.error = error

    thread = threading.Thread(target=run, name="edgestill-measure", daemon=True)
    thread.start()
    try:
        seen, missed = beat.count, 0
        while thread.is_alive():
            began = time.monotonic()
            thread.join(seconds / _LOOKS)
            # a process that was stopped or a machine that slept did not hang
            slept = time.monotonic() - began > 2 * seconds / _LOOKS + 1
            missed = missed + 1 if beat.count == seen and not slept else 0
            seen = beat.count
            if missed > _LOOKS and thread.is_alive():
                raise Hung(beat.label)
    except BaseException:
        beat.given_up = True
        raise
    if outcome.error is not None:
        raise outcome.error
    return outcome.result
