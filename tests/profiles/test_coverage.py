"""A short turn of `python -m tests.benchmarks.coverage`: the measuring loop on known distributions."""

from __future__ import annotations

import pytest

from tests.benchmarks.coverage import KINDS, run


@pytest.mark.parametrize("kind", KINDS, ids=[kind.name for kind in KINDS])
def test_bounds_hold_and_what_moves_ends_unstable(kind: object) -> None:
    found = run(kind, 99.0, 15)  # type: ignore[arg-type]
    assert found.holds
    assert found.unstable <= 0.2 if found.upper is not None else found.unstable >= 0.9
