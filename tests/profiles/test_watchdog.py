from __future__ import annotations

import threading
import time

import pytest

from profiles.watchdog import Beat, Hung, watched


def test_what_comes_back_is_handed_on() -> None:
    assert watched(lambda beat: 42, 1.0) == 42


def test_an_error_reaches_the_caller() -> None:
    def work(beat: Beat) -> None:
        raise ZeroDivisionError("in the thread")

    with pytest.raises(ZeroDivisionError, match="in the thread"):
        watched(work, 1.0)


def test_slow_work_that_beats_is_no_hang() -> None:
    def work(beat: Beat) -> str:
        for index in range(12):
            beat(str(index))
            time.sleep(0.05)
        return "done"

    assert watched(work, 0.4) == "done"


def test_work_that_stops_beating_is_named_and_ends_when_it_comes_back() -> None:
    release, ended = threading.Event(), threading.Event()

    def work(beat: Beat) -> None:
        beat("the third query")
        release.wait()
        try:
            beat("the fourth query")
        finally:
            ended.set()

    with pytest.raises(Hung) as caught:
        watched(work, 0.2)
    assert caught.value.label == "the third query"
    release.set()
    assert ended.wait(30)
