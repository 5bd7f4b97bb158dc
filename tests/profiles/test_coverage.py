"""The bounds on known distributions, and a short turn of `python -m tests.benchmarks.coverage` with its loop."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import numpy as np
import pytest

from profiles import statistics
from tests.benchmarks.coverage import JUDGED, KINDS, SUSPECT, Kind, chance, judged, run

NAMED = {kind.name: kind for kind in KINDS}


@pytest.fixture(autouse=True)
def _nothing_to_collect() -> Iterator[None]:
    """The loop collects garbage before it samples, which is slow work among the objects of all the other tests."""
    gc.freeze()
    yield
    gc.unfreeze()


def suspicion(kind: Kind, percentile: float, n: int, repetitions: int, confidence: float) -> float:
    """How probable such coverage is, if each bound held with 99 %; the bounds are made for `confidence`."""
    random = np.random.default_rng([7, KINDS.index(kind), int(percentile)])
    truth = kind.quantile(percentile)
    given = upper = lower = 0
    for _ in range(repetitions):
        found = statistics.stability(kind.draw(random, n), percentile, confidence)
        if found.stable:
            assert found.upper is not None
            assert found.lower is not None
            given += 1
            upper += found.upper >= truth
            lower += found.lower <= truth
    assert given >= repetitions * 0.5
    return min(chance(upper, given), chance(lower, given))


@pytest.mark.parametrize(
    ("name", "percentile", "n"),
    [
        ("constant", 99, 1324),
        ("bimodal", 50, 704),
        ("bimodal", 99, 1324),
        ("heavy tail", 90, 512),
        ("AR 0.3, 3%", 50, 704),
        ("AR 0.5, 3%", 90, 512),
        ("AR 0.9, 3%", 50, 704),
    ],
)
def test_bounds_hold_as_often_as_they_claim(name: str, percentile: float, n: int) -> None:
    assert suspicion(NAMED[name], percentile, n, 300, 0.99) >= SUSPECT


@pytest.mark.parametrize(("name", "percentile", "n"), [("bimodal", 50, 704), ("heavy tail", 90, 512)])
def test_bounds_of_90_percent_would_not_pass_as_ones_of_99(name: str, percentile: float, n: int) -> None:
    assert suspicion(NAMED[name], percentile, n, 300, 0.90) < SUSPECT


@pytest.mark.parametrize("kind", KINDS, ids=[kind.name for kind in KINDS])
def test_the_loop_gives_bounds_that_hold_and_ends_what_moves_as_unstable(kind: Kind) -> None:
    found = run(kind, 99.0, 6)
    assert found.holds is not False
    if kind.name in ("constant", "bimodal", "heavy tail"):
        assert found.unstable <= 0.2
    if not kind.steady:
        assert found.unstable == 1


@pytest.mark.parametrize("r", ["AR 0.3, 3%", "AR 0.5, 3%"])
def test_ordinary_dependence_costs_no_median(r: str) -> None:
    assert run(NAMED[r], 50.0, 6).unstable == 0


@pytest.mark.parametrize("name", [kind.name for kind in JUDGED if kind.claimed][:3])
def test_verdicts_at_the_limit_are_hardly_ever_wrong(name: str) -> None:
    found = judged(NAMED[name], 90.0, 10)
    assert found.looks > 2
    assert found.wrong <= 0.1
