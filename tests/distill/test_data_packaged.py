"""The Fashion-MNIST subset that ships with the package."""

from importlib.resources import files

import numpy as np
import pytest

from distill.data.arrays import read_npz
from distill.data.make_fashion_mnist_small import DEBIAN_FOLDER, PACKAGED, make
from profiles.artifact import array_hash


def test_packaged_subset_is_balanced_and_splits_are_disjoint():
    arrays = read_npz(PACKAGED)
    for split, per_class in (("train", 1000), ("validation", 200), ("test", 200)):
        assert arrays[f"{split}_images"].shape == (per_class * 10, 28, 28)
        assert arrays[f"{split}_images"].dtype == np.uint8
        assert np.bincount(arrays[f"{split}_labels"]).tolist() == [per_class] * 10
    train = {image.tobytes() for image in arrays["train_images"]}
    shared = sum(image.tobytes() in train for image in arrays["validation_images"])
    assert shared <= 1  # the official training split itself holds a few identical pictures


def test_licence_and_citation_lie_beside_the_packaged_subset():
    folder = files("distill.data") / "packaged"
    assert "Copyright (c) 2017 Zalando SE" in (folder / "LICENSE").read_text()
    assert "1708.07747" in (folder / "CITATION.bib").read_text()
    assert (folder / "fashion_mnist_small.npz").is_file()


@pytest.mark.skipif(
    not DEBIAN_FOLDER.is_dir(), reason="needs Fashion-MNIST: apt-get install dataset-fashion-mnist (Debian, Ubuntu)"
)
def test_packaged_subset_is_what_the_script_makes_from_the_official_files():
    packaged, made = read_npz(PACKAGED), make()
    assert sorted(packaged) == sorted(made)
    assert all(array_hash(packaged[name]) == array_hash(made[name]) for name in made)
