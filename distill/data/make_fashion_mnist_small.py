"""Makes the packaged subset of Fashion-MNIST: `python -m distill.data.make_fashion_mnist_small [--source FOLDER]`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from distill.data.arrays import Array, read_idx

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
PACKAGED = Path(__file__).parent / "packaged" / "fashion_mnist_small.npz"
SEED = 0
PER_CLASS = {"train": 1000, "validation": 200, "test": 200}
"""Train and validation come from the official training split, test from the official test split."""


def make(source: Path = DEBIAN_FOLDER) -> dict[str, Array]:
    """The subset: `<split>_images` uint8 (N, 28, 28) and `<split>_labels` uint8 (N,), class-balanced, shuffled.

    Args:
        source: folder with the four official IDX files, plain or compressed.
    """
    random = np.random.default_rng(SEED)
    arrays: dict[str, Array] = {}
    for official, splits in (("train", ("train", "validation")), ("t10k", ("test",))):
        images = read_idx(find(source, f"{official}-images-idx3-ubyte"))
        labels = read_idx(find(source, f"{official}-labels-idx1-ubyte"))
        by_class = [random.permutation(np.flatnonzero(labels == label)) for label in range(10)]
        start = 0
        for split in splits:
            stop = start + PER_CLASS[split]
            chosen = random.permutation(np.concatenate([rows[start:stop] for rows in by_class]))
            arrays[f"{split}_images"], arrays[f"{split}_labels"] = images[chosen], labels[chosen]
            start = stop
    return arrays


def find(folder: Path, name: str) -> Path:
    """The IDX file `name` in `folder`, plain or with .gz; the plain name when neither is there."""
    compressed = folder / f"{name}.gz"
    return compressed if compressed.is_file() else folder / name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, default=DEBIAN_FOLDER, help="folder with the four official IDX files")
    parser.add_argument("--out", type=Path, default=PACKAGED)
    options = parser.parse_args()
    arrays: dict[str, Any] = make(options.source)
    np.savez_compressed(options.out, **arrays)


if __name__ == "__main__":
    main()
