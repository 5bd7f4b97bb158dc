"""What holds for every test of the command line."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _timed_shortly(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dry run times real steps for a second each; no test looks at how exact the estimate is."""
    monkeypatch.setattr("cli.pipeline.estimate._TIMED_SECONDS", 0.02)
