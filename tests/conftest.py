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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests run last, so that a mistake shows early; pytest-xdist keeps a file in one process."""
    slow = {item.path for item in items if item.get_closest_marker("slow") is not None}
    items.sort(key=lambda item: (item.path in slow, item.get_closest_marker("slow") is not None))
