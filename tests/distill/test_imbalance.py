"""A long-tailed training split follows the law exactly, its test split is balanced, and nothing else changes."""

import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from distill.data import load_dataset
from distill.data.dataset import subset
from distill.data.labels import Labels
from distill.data.section import DataSection, imbalance_factor
from distill.data.splits import long_tail_counts, take_balanced, take_long_tail
from profiles.artifact import read_manifest
from profiles.errors import InputError


def load(base: Path, *, seed: int = 0, folder: str = "run/data", **keys):
    return load_dataset(DataSection(**keys), seed=seed, base=base, folder=base / folder)


def write_npz(path: Path, counts, **splits) -> None:
    """Images that tell their row, and labels in random order; `splits` adds arrays of further splits."""
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    images = np.random.default_rng(1).integers(0, 256, (len(labels), 5, 5), dtype=np.uint8)
    if not splits:
        np.savez(path, images=images, labels=labels)
        return
    arrays = {"train_images": images, "train_labels": labels}
    for name, other in splits.items():
        own = np.repeat(np.arange(len(other)), other)
        arrays[f"{name}_images"] = np.random.default_rng(len(name)).integers(0, 256, (len(own), 5, 5), dtype=np.uint8)
        arrays[f"{name}_labels"] = own
    np.savez(path, **arrays)


def at_most(count: int, first: int, factor: int, label: int, classes: int) -> bool:
    """Whether count <= first * factor^(-label/(classes-1)), in exact integers."""
    power = classes - 1
    return Fraction(count) ** power * Fraction(factor) ** label <= Fraction(first) ** power


@settings(max_examples=80, deadline=None)
@given(available=st.lists(st.integers(0, 3000), min_size=2, max_size=12), factor=st.integers(1, 500))
def test_the_law_holds_exactly_and_no_larger_first_class_would_fit(available, factor):
    counts = long_tail_counts(np.array(available), factor)
    classes, first = len(available), int(counts[0])

    def floor_of_law(largest: int) -> list[int]:
        found = []
        for label in range(classes):
            guess = int(largest * factor ** (-label / (classes - 1)))
            found.append(max(n for n in (guess - 1, guess, guess + 1) if at_most(n, largest, factor, label, classes)))
        return found

    assert counts.tolist() == floor_of_law(first)
    assert (counts <= available).all()
    assert (np.diff(counts) <= 0).all()
    if first < available[0]:
        assert (np.array(floor_of_law(first + 1)) > available).any()


def test_the_known_long_tail_of_cifar10():
    assert long_tail_counts(np.full(10, 5000), 100).tolist() == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]


def test_a_stronger_imbalance_chooses_among_the_samples_of_a_weaker_one():
    labels = Labels(np.random.default_rng(0).permutation(np.repeat(np.arange(4), 60)))
    names = ("a", "b", "c", "d")
    weak, strong = (set(take_long_tail(labels, factor, seed=3, classes=names).tolist()) for factor in (5, 50))
    assert strong < weak
    assert set(take_long_tail(labels, 5, seed=4, classes=names).tolist()) != weak


@settings(max_examples=40, deadline=None)
@given(counts=st.lists(st.integers(1, 30), min_size=2, max_size=6), seed=st.integers(0, 99))
def test_a_balanced_choice_has_as_many_of_each_class_as_the_rarest(counts, seed):
    values = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    rows = take_balanced(Labels(values), seed=seed, where="here", classes=tuple(map(str, counts)))
    assert np.bincount(values[rows], minlength=len(counts)).tolist() == [min(counts)] * len(counts)
    assert (np.diff(rows) > 0).all()


def test_training_is_long_tailed_test_balanced_and_validation_as_it_was(tmp_path):
    write_npz(tmp_path / "d.npz", [200, 200, 150, 120])
    keys = {"source": "npz", "path": "d.npz"}
    plain, tail = load(tmp_path, **keys, folder="plain"), load(tmp_path, **keys, imbalance="exp:20", folder="tail")
    available = np.bincount(plain.train.labels)
    assert np.bincount(tail.train.labels).tolist() == long_tail_counts(available, 20).tolist()
    assert np.bincount(tail.test.labels).tolist() == [int(np.bincount(plain.test.labels).min())] * 4
    assert np.array_equal(tail.validation.rows, plain.validation.rows)
    assert np.array_equal(tail.validation.inputs, plain.validation.inputs)
    # a choice of the same splits, never a sample of another one
    assert set(tail.train.rows.tolist()) < set(plain.train.rows.tolist())
    assert set(tail.test.rows.tolist()) < set(plain.test.rows.tolist())
    assert set(tail.left_out.tolist()) == set(plain.train.rows.tolist()) - set(tail.train.rows.tolist())
    assert len(plain.left_out) == 0
    info = read_manifest(tmp_path / "tail", "data").info
    assert info["samples_of_class"]["train"] == {str(i): int(n) for i, n in enumerate(np.bincount(tail.train.labels))}
    assert info["split"]["imbalance"] == "exp:20"
    assert info["split"]["left_out"] == {
        "train": len(plain.train) - len(tail.train),
        "test": len(plain.test) - len(tail.test),
    }
    # pixels are still the source's, so is the mean
    images = np.load(tmp_path / "d.npz")["images"]
    assert np.array_equal(tail.train.inputs[:, 0], images[tail.train.rows])
    assert tail.input.mean[0] == pytest.approx(tail.train.inputs.mean() / 255, abs=1e-6)


def test_train_size_is_taken_first(tmp_path):
    write_npz(tmp_path / "d.npz", [100] * 4, validation=[5] * 4, test=[8, 6, 7, 9])
    keys = {"source": "npz", "path": "d.npz", "train_size": 200, "imbalance": "exp:10"}
    data = load(tmp_path, **keys)
    assert np.bincount(data.train.labels).tolist() == [50, 23, 10, 5]
    assert np.bincount(data.test.labels).tolist() == [6] * 4
    assert np.bincount(data.validation.labels).tolist() == [5] * 4
    assert data.test.source == "test"
    assert len(data.left_out) == 400 - len(data.train)
    again = load(tmp_path, **keys, folder="again")
    assert again.key == data.key
    other = load(tmp_path, **keys, seed=1, folder="other")
    assert not np.array_equal(other.train.rows, data.train.rows)
    assert np.bincount(other.train.labels).tolist() == [50, 23, 10, 5]


def test_factor_one_on_balanced_data_leaves_it_as_it_is(tmp_path):
    write_npz(tmp_path / "d.npz", [40] * 3, validation=[5] * 3, test=[5] * 3)
    keys = {"source": "npz", "path": "d.npz"}
    plain, even = load(tmp_path, **keys, folder="plain"), load(tmp_path, **keys, imbalance="exp:1", folder="even")
    for name in ("train", "validation", "test"):
        assert np.array_equal(even.split(name).inputs, plain.split(name).inputs)
        assert np.array_equal(even.split(name).labels, plain.split(name).labels)
    assert even.input == plain.input
    assert len(even.left_out) == 0


def test_a_smaller_training_set_leaves_more_out(tmp_path):
    write_npz(tmp_path / "d.npz", [40] * 3)
    data = load(tmp_path, source="npz", path="d.npz", train_size=60)
    part = subset(data, np.array([50, 3, 7]))
    gone = set(data.train.rows.tolist()) - set(part.train.rows.tolist())
    assert set(part.left_out.tolist()) == set(data.left_out.tolist()) | gone


@pytest.mark.parametrize(
    "word",
    ["exp", "exp:", "exp:0.5", "exp:0", "exp:inf", "exp:nan", "exp:-3", "exp:1e999", "step:10", "100", "exp:1_0"],
)
def test_a_malformed_law_is_refused_at_its_key(word):
    with pytest.raises(ValidationError, match=r"exp:F.*finite F of 1 or more") as caught:
        DataSection(imbalance=word)
    assert caught.value.errors()[0]["loc"] == ("imbalance",)


@settings(max_examples=60, deadline=None)
@given(factor=st.floats(1, 1e12, allow_nan=False))
def test_every_finite_factor_from_one_on_is_read(factor):
    assert imbalance_factor(f"exp:{factor:.6g}") == float(f"{factor:.6g}")


def test_several_labels_per_sample_have_no_tail():
    with pytest.raises(ValidationError, match="multiclass") as caught:
        DataSection(source="csv", path="t.csv", task="multilabel", imbalance="exp:10")
    assert caught.value.errors()[0]["loc"] == ("imbalance",)


def test_a_class_that_would_be_left_without_a_sample(tmp_path):
    write_npz(tmp_path / "d.npz", [40] * 4, validation=[5] * 4, test=[5] * 4)
    with pytest.raises(InputError, match='leaves class "3" without a training sample') as caught:
        load(tmp_path, source="npz", path="d.npz", imbalance="exp:1e9")
    assert caught.value.where == "data.imbalance"
    assert "40 of 40" in str(caught.value.evidence)
    assert 'imbalance = "exp:20"' in str(caught.value.fix)
    assert not (tmp_path / "run" / "data").exists()
    assert load(tmp_path, source="npz", path="d.npz", imbalance="exp:20").train.labels.max() == 3


def test_a_test_split_that_lacks_a_class(tmp_path):
    write_npz(tmp_path / "d.npz", [40] * 3, validation=[5] * 3, test=[5, 5])
    with pytest.raises(InputError, match='class "2" has no test sample') as caught:
        load(tmp_path, source="npz", path="d.npz", imbalance="exp:4")
    assert caught.value.where == "data.imbalance"


def test_data_without_the_new_keys_has_the_key_that_it_always_had(tmp_path):
    """The hashes are of data folders that were written before there was `imbalance` or `unlabelled`."""
    data = load(tmp_path, train_size=40, folder="images")
    assert read_manifest(tmp_path / "images", "data").key == "d76ac5c842f7e94cea0951efd8b90b7e"
    assert data.key == "e9220872e3374657b0d549eebff2fa4c"
    table = tmp_path / "t.csv"
    table.write_text("text,label\n" + "\n".join(f"word number {i},{i % 2}" for i in range(40)) + "\n")
    os.utime(table, ns=(10**18, 10**18))
    keys = {"source": "csv", "path": "t.csv", "vocabulary": 80, "length": 6}
    data = load(tmp_path, **keys, seed=3, folder="texts")
    assert read_manifest(tmp_path / "texts", "data").key == "597dd361df4ea32db273f1c21ada2f3c"
    assert data.key == "becbac6f396843de0338b1d948517ebe"
    # unlabelled inputs are an artefact of their own
    (tmp_path / "more.txt").write_text("a\nb\n")
    before = (tmp_path / "texts" / "manifest.json").stat().st_mtime_ns
    assert (
        load(tmp_path, **keys, seed=3, folder="texts", unlabelled={"source": "lines", "path": "more.txt"}).key
        == data.key
    )
    assert (tmp_path / "texts" / "manifest.json").stat().st_mtime_ns == before


def test_a_section_is_stored_without_the_keys_that_it_does_not_use():
    assert not {"imbalance", "unlabelled"} & set(DataSection().model_dump())
    section = DataSection(imbalance="exp:10", train_size=100, unlabelled={"rest": True})
    assert section.model_dump(mode="json")["imbalance"] == "exp:10"
    assert DataSection.model_validate(section.model_dump(mode="json")) == section
