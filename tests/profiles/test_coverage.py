"""A short turn of `python -m tests.benchmarks.coverage`: the measuring loop on known distributions."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from tests.benchmarks.coverage import KINDS, Kind, run


@pytest.fixture(autouse=True)
def _nothing_to_collect() -> Iterator[None]:
    """The loop collects garbage before it samples, which is slow work among the objects of all the other tests."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("kind", KINDS, ids=[kind.name for kind in KINDS])
def test_bounds_hold_and_what_moves_ends_unstable(kind: Kind) -> None:
    found = run(kind, 99.0, 8)
    assert found.holds is not False
    if kind.name in ("constant", "bimodal", "heavy tail"):
        assert found.unstable <= 0.2
    if not kind.steady:
        assert found.unstable >= 0.9
