"""What holds for every test: fast ones first, no hub, fixed examples, threads that do not spin while others work."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

# read when PyTorch is imported; see cli/app.py
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# the same examples in every run: a failure in CI is one that its reader can repeat
settings.register_profile("fixed", derandomize=True)
settings.load_profile("fixed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests run last, so that a mistake shows early."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
