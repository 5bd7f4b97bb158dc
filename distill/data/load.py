"""`load_dataset`: any source, split, resized or tokenised once, written to the run's data folder, memory-mapped ever after."""

from __future__ import annotations

from pathlib import Path

from distill.data.dataset import Dataset
from distill.data.section import DataSection
from profiles.progress import Progress, Silent


def load_dataset(
    section: DataSection, *, seed: int, base: Path, folder: Path, progress: Progress | None = None
) -> Dataset:
    """The data of a recipe.

    Args:
        section: the `[data]` table.
        seed: the recipe's seed; makes the splits where none are given (unless `split_seed` is set).
        base: folder that relative paths of the section start from.
        folder: the run's data artefact; reused when it was made from the same files and keys.
        progress: shows reading and decoding.

    Raises:
        InputError: anything wrong with the section or the data, naming file and key.
        EdgestillError: a download failed, or the folder cannot be written.
    """
    raise NotImplementedError
