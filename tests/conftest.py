"""What holds for every test: fast ones first, no hub, fixed examples, threads that do not get into each other's way."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

# read when PyTorch is imported; see cli/app.py
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # the processes of pytest -n share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# the same examples in every run: a failure in CI is one that its reader can repeat
settings.register_profile("fixed", derandomize=True)
settings.load_profile("fixed")


# before pytest-xdist reads the groups
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests run last, so that a mistake shows early; the tests of a file in one process, with its fixtures."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
    for item in items:
        slow = " (slow)" if item.get_closest_marker("slow") is not None else ""
        item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0] + slow))
