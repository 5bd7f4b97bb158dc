"""Sources become a Dataset; views are pure functions of (seed, sample, view)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill.data.dataset import Dataset, InputSpec, Split, SplitName, Task

__all__ = ["Dataset", "InputSpec", "Split", "SplitName", "Task", "load_dataset"]

if TYPE_CHECKING:
    from distill.data.load import load_dataset


def __getattr__(name: str) -> object:
    # load_dataset pulls in Pillow and the readers; `from distill.data.section import DataSection` must stay light
    if name == "load_dataset":
        from distill.data.load import load_dataset

        return load_dataset
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
