"""Fashion-MNIST under three label sets, and EfficientNet-Lite0 as a teacher of another task for it."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate

from distill.data import catalogue
from distill.data.arrays import read_idx, read_npz
from distill.data.dataset import SplitName
from tests.benchmarks.evidence import packages

Array = np.ndarray[Any, Any]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")
UPPER_BODY = ("T-shirt/top", "Pullover", "Coat", "Shirt")
"""A dress is not counted: it covers the upper body, but not only that."""
SIDE = 96
"""Pixels of EfficientNet's input."""
FEATURES = 1280
MORE_PER_CLASS = 2000
_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class Images:
    """uint8 (N, 28, 28) and the true classes, uint8 (N,)."""

    images: Array
    classes: Array


def fashion() -> dict[SplitName, Images]:
    """The packaged subset's 10,000 training and 2,000 validation images, and the whole official test split."""
    small = read_npz(catalogue.fetch("fashion-mnist-small"))
    found: dict[SplitName, Images] = {
        name: Images(small[f"{name}_images"], small[f"{name}_labels"]) for name in ("train", "validation")
    }
    whole = catalogue.fetch("fashion-mnist")
    found["test"] = Images(read_idx(whole / "t10k-images-idx3-ubyte"), read_idx(whole / "t10k-labels-idx1-ubyte"))
    return found


def many() -> Images:
    """30,000 training images: the packaged subset's 10,000, then the first 2,000 of each class in the official training
    split that are in neither of its two parts. A teacher worth learning from has seen more than its students."""
    small = fashion()
    taken = {image.tobytes() for name in ("train", "validation") for image in small[name].images}
    whole = catalogue.fetch("fashion-mnist")
    official = Images(
        read_idx(whole / "train-images-idx3-ubyte"), read_idx(whole / "train-labels-idx1-ubyte").astype(np.uint8)
    )
    free = np.array([image.tobytes() not in taken for image in official.images])
    rows = np.concatenate([np.flatnonzero(free & (official.classes == each))[:MORE_PER_CLASS] for each in range(10)])
    rows.sort()
    return Images(
        np.concatenate([small["train"].images, official.images[rows]]),
        np.concatenate([small["train"].classes, official.classes[rows]]),
    )


def label_sets(classes: Array) -> dict[str, Array]:
    """uint8 labels (N,) of the true classes (N,), for each of the label sets.

    parity: 1 where the number of the class is odd. upper-body: 1 for UPPER_BODY. ten: the true classes.
    """
    names = catalogue.entry_of("fashion-mnist").classes
    upper = [names.index(name) for name in UPPER_BODY]
    return {
        "parity": (classes % 2).astype(np.uint8),
        "upper-body": np.isin(classes, upper).astype(np.uint8),
        "ten": classes.astype(np.uint8),
    }


def efficientnet(unpacked: Path) -> Any:
    """EfficientNet-Lite0 with its ImageNet weights, frozen; `unpacked` holds the packages.

    The package's code is imported from there; its hash was checked before it was unpacked.
    """
    sys.path.insert(0, str(unpacked))
    try:
        library = importlib.import_module("efficientnet_lite_pytorch")
    finally:
        sys.path.remove(str(unpacked))
    network = library.EfficientNet.from_name("efficientnet-lite0", image_size=SIDE)
    network.load_state_dict(torch.load(unpacked / packages.EFFICIENTNET, weights_only=True, map_location="cpu"))
    return network.eval().requires_grad_(False)


def features(network: Any, images: Array) -> Array:
    """float32 (N, 1280), what the classifier of `network` reads, of grey uint8 images (N, H, W).

    Bilinear to 96 pixels, grey repeated to red, green and blue, values scaled to -1..1.
    """
    found = np.empty((len(images), FEATURES), np.float32)
    with torch.inference_mode():
        for start in range(0, len(images), _ROWS_AT_ONCE):
            chunk = torch.from_numpy(images[start : start + _ROWS_AT_ONCE].copy()).float().unsqueeze(1)
            larger = interpolate(chunk, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
            scaled = (larger / 255 - 0.5) / 0.5
            found[start : start + len(chunk)] = network.extract_features(scaled.expand(-1, 3, -1, -1)).mean((2, 3))
    return found
