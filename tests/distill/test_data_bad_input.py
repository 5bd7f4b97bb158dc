"""What is wrong with the data is said with file, key, evidence and a fix."""

import contextlib
import gzip
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from distill.data import load_dataset
from distill.data.arrays import read_idx, read_npz, write_idx
from distill.data.catalogue import list_catalogue
from distill.data.section import CATALOGUE_KINDS, DataSection
from profiles.errors import InputError


def refused(base, match, *, where=None, evidence=None, fix=None, **keys) -> InputError:
    with pytest.raises(InputError, match=match) as caught:
        load_dataset(DataSection(**keys), seed=0, base=base, folder=base / "run" / "data")
    for part, wanted in (("where", where), ("evidence", evidence), ("fix", fix)):
        if wanted is not None:
            assert wanted in str(getattr(caught.value, part))
    # nothing half-made is left
    assert not (base / "run" / "data").exists()
    assert not list((base / "run").glob(".*")) if (base / "run").exists() else True
    return caught.value


def images_of(count):
    return np.random.default_rng(0).integers(0, 256, (count, 6, 6), dtype=np.uint8)


def write_npz(base, labels, images=None, name="d.npz", **more):
    np.savez(base / name, images=images_of(len(labels)) if images is None else images, labels=labels, **more)


def write_lines(path, *lines):
    path.write_text("\n".join(lines) + "\n")


def test_missing_path_suggests_the_nearest_name(tmp_path):
    (tmp_path / "photos").mkdir()
    refused(tmp_path, "no such file", source="imagefolder", path="photo", where="data.path", fix='"photos"')


def test_unknown_source_suggests_the_nearest(tmp_path):
    refused(tmp_path, "unknown source", source="imagefoldr", fix='"imagefolder"')


def test_empty_folder_and_empty_table(tmp_path):
    (tmp_path / "photos").mkdir()
    refused(tmp_path, "photos", source="imagefolder", path="photos", where="photos")
    (tmp_path / "t.csv").touch()
    refused(tmp_path, "t.csv holds no samples", source="csv", path="t.csv")
    write_lines(tmp_path / "h.csv", "text,label")
    refused(tmp_path, "h.csv holds no samples", source="csv", path="h.csv", where="h.csv")
    write_npz(tmp_path, np.zeros(0, np.int64), np.zeros((0, 6, 6), np.uint8))
    refused(tmp_path, "no train samples", source="npz", path="d.npz")


def test_one_class_data(tmp_path):
    write_npz(tmp_path, np.full(20, 3))
    refused(tmp_path, "all samples have the same label", source="npz", path="d.npz", evidence='20 samples, all "3"')


def test_corrupt_and_truncated_images_are_named(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index, image in enumerate(images_of(8)):
            Image.fromarray(image).save(tmp_path / "photos" / name / f"{index}.png")
    broken = tmp_path / "photos" / "b" / "3.png"
    whole = broken.read_bytes()
    broken.write_bytes(b"this is no picture")
    error = refused(tmp_path, "not a readable image", source="imagefolder", path="photos")
    assert str(broken) in str(error.where)
    broken.write_bytes(whole[: len(whole) // 2])
    refused(
        tmp_path, "not a readable image", source="imagefolder", path="photos", image_size=4, channels=1, where="3.png"
    )


def test_missing_image_of_a_table_is_named(tmp_path):
    write_lines(tmp_path / "t.csv", "image,label", *(f"{i}.png,{i % 2}" for i in range(10)))
    refused(tmp_path, r"no image \d.png", source="csv", path="t.csv", image_size=4)


def test_images_of_different_sizes_ask_for_a_size(tmp_path):
    for index, side in enumerate((6, 7) * 5):
        (tmp_path / "p" / "ab"[index % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("L", (side, 6)).save(tmp_path / "p" / "ab"[index % 2] / f"{index}.png")
    refused(tmp_path, "different sizes", source="imagefolder", path="p", evidence="6x", fix="data.image_size")


def test_label_out_of_range(tmp_path):
    write_npz(tmp_path, np.arange(20) % 4)
    refused(
        tmp_path,
        "label 2 is out of range",
        source="npz",
        path="d.npz",
        classes=("x", "y"),
        where="train, row 2",
        evidence="2 classes, numbered 0 to 1",
    )
    write_lines(tmp_path / "t.csv", "text,label", *(f"a,{name}" for name in ["cat", "dog", "dgo"] * 4))
    refused(tmp_path, 'unknown label "dgo"', source="csv", path="t.csv", classes=("cat", "dog"), fix='"dog"')
    write_npz(tmp_path, np.array([[0, 1], [1, 2]] * 10))
    refused(tmp_path, "label 2 is out of range", source="npz", path="d.npz", task="multilabel", where="row 1, class 1")


def test_missing_and_fractional_labels(tmp_path):
    write_lines(tmp_path / "t.csv", "text,label", *(f"a,{name}" for name in ["cat", "dog", ""] * 4))
    refused(tmp_path, "no label", source="csv", path="t.csv", where="row 2")
    write_npz(tmp_path, np.array([0.0, 1.0, np.nan, 1.0] * 5))
    refused(tmp_path, "no label", source="npz", path="d.npz", where="row 2", evidence="nan")
    write_npz(tmp_path, np.array([0.0, 0.5] * 10))
    refused(tmp_path, "fractions", source="npz", path="d.npz", evidence="0.5")


def test_a_label_column_that_is_an_identifier(tmp_path):
    write_lines(tmp_path / "t.csv", "text,label", *(f"a,{index}" for index in range(40)))
    refused(tmp_path, "a label of its own", source="csv", path="t.csv", evidence="40 different labels in 40 samples")


def test_several_labels_in_a_multiclass_task(tmp_path):
    rows = [{"text": "a", "label": ["x", "y"]}] * 10
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    refused(tmp_path, "several labels", source="jsonl", path="t.jsonl", fix="multilabel")


def test_row_counts_that_differ(tmp_path):
    write_npz(tmp_path, np.arange(20) % 2, images_of(19))
    refused(tmp_path, "differ in number", source="npz", path="d.npz", evidence="19 images, 20 labels")
    write_idx(tmp_path / "train-images-idx3-ubyte", images_of(5))
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.arange(4))
    refused(tmp_path, "differ in number", source="idx", path="train-images-idx3-ubyte", evidence="5 images, 4 labels")


def test_nan_and_float_images(tmp_path):
    images = images_of(20).astype(np.float32) / 255
    write_npz(tmp_path, np.arange(20) % 2, images)
    refused(tmp_path, "uint8 is needed", source="npz", path="d.npz", evidence="values 0 to 1", fix="* 255")
    images[3, 2, 1] = np.nan
    write_npz(tmp_path, np.arange(20) % 2, images)
    refused(tmp_path, "uint8 is needed", source="npz", path="d.npz", evidence="1 NaN", where="images")


def test_class_of_the_test_split_that_training_lacks(tmp_path):
    images = {f"{split}_images": images_of(12) for split in ("train", "validation", "test")}
    labels = {f"{split}_labels": np.arange(12) % 3 for split in ("train", "validation", "test")}
    labels["train_labels"] = np.arange(12) % 2
    np.savez(tmp_path / "d.npz", **images, **labels)
    refused(tmp_path, 'class "2" has no training sample', source="npz", path="d.npz", evidence="4 samples in")


def test_multilabel_class_without_positive(tmp_path):
    labels = np.tile([[0, 1, 0], [1, 0, 0]], (20, 1))
    write_npz(tmp_path, labels)
    refused(tmp_path, 'class "2" has no known positive', source="npz", path="d.npz", task="multilabel")


def test_too_few_samples_to_stratify(tmp_path):
    write_npz(tmp_path, np.array([0] * 10 + [1] * 10 + [2]))
    refused(tmp_path, 'too few samples of class "2"', source="npz", path="d.npz", evidence="1 sample")
    write_npz(tmp_path, np.array([0, 1] * 2))
    refused(tmp_path, "too few samples to keep every class", source="npz", path="d.npz")
    write_npz(tmp_path, np.array([0, 1] * 20))
    refused(tmp_path, "train_size = 900 is more", source="npz", path="d.npz", train_size=900, evidence="28 training")


def test_unknown_column_suggests_the_nearest(tmp_path):
    write_lines(tmp_path / "t.csv", "sentence,category", "a,x", "b,y")
    keys = {"source": "csv", "path": "t.csv"}
    refused(
        tmp_path,
        'no column "categry"',
        **keys,
        label_column="categry",
        where="data.label_column",
        evidence="sentence, category",
        fix='"category"',
    )
    write_lines(tmp_path / "u.csv", "a,b", "1,2")
    refused(tmp_path, "which column holds the input", source="csv", path="u.csv", evidence="columns: a, b")


def test_wrong_npz_keys_are_listed(tmp_path):
    np.savez(tmp_path / "d.npz", x=images_of(4), y=np.arange(4))
    keys = {"source": "npz", "path": "d.npz", "evidence": "keys found: x, y"}
    for columns, missing, where in (
        ({}, "images", "data.image_column, in"),
        ({"image_column": "x"}, "labels", "data.label_column, in"),
        ({"image_column": "x", "label_column": "y", "mask_key": "m", "task": "multilabel"}, "m", "data.mask_key, in"),
    ):
        refused(tmp_path, f'no array "{missing}"', **keys, **columns, where=where, fix=where.split(",")[0])


def test_damaged_npz_and_pickled_objects(tmp_path):
    (tmp_path / "d.npz").write_bytes(b"PK\x03\x04 not really")
    refused(tmp_path, "cannot be read", source="npz", path="d.npz")
    np.savez(tmp_path / "o.npz", images=images_of(3), labels=np.array(["a", None, "b"], object))
    refused(tmp_path, "cannot be read", source="npz", path="o.npz")
    np.save(tmp_path / "single.npy", images_of(3))
    with pytest.raises(InputError, match=r"not an \.npz archive"):
        read_npz(tmp_path / "single.npy")


def test_broken_table(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "a", "label": 1}\n{"text": ')
    refused(tmp_path, "cannot be read as jsonl", source="jsonl", path="t.jsonl")
    (tmp_path / "t.parquet").write_bytes(b"PAR1 nothing")
    refused(tmp_path, "cannot be read as parquet", source="parquet", path="t.parquet")


def test_unknown_split_name_and_missing_text(tmp_path):
    write_lines(tmp_path / "t.csv", "text,label,part", "a,0,train", "b,1,holdout")
    refused(tmp_path, "unknown split 'holdout'", source="csv", path="t.csv", split_column="part", where="row 1")
    write_lines(tmp_path / "u.csv", "text,label", "a,0", ",1")
    refused(tmp_path, "no text", source="csv", path="u.csv", where="row 1")


def test_tokenizer_that_is_none_and_augmented_texts(tmp_path):
    write_lines(tmp_path / "t.csv", "text,label", *(f"word {i},{i % 2}" for i in range(30)))
    (tmp_path / "tok.json").write_text("{}")
    refused(tmp_path, "not a tokenizer", source="csv", path="t.csv", tokenizer="tok.json")
    refused(tmp_path, "texts cannot be cropped", source="csv", path="t.csv", augment={"flip": True})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"source": "csv"}, "needs a path"),
        ({"image_column": "a", "text_column": "b"}, "exclude each other"),
        ({"label_columns": ("a", "b")}, "multilabel"),
        ({"imagesize": 3}, "imagesize"),
        ({"classes": ("a", "a")}, "twice"),
        ({"path": "photos"}, '"path" belongs to imagefolder, csv, .*source = "fashion-mnist-small" does not read it'),
        ({"source": "movie-snippets", "label_column": "y"}, '"label_column" belongs to imagefolder'),
        ({"source": "movie-snippets", "image_size": 32}, '"image_size" belongs to images, the data holds texts'),
        ({"length": 12}, '"length" belongs to texts, the data holds images'),
        ({"source": "npz", "path": "d.npz", "tokenizer": "t.json"}, '"tokenizer" belongs to texts'),
        ({"source": "npz", "path": "d.npz", "split_column": "part"}, '"split_column" belongs to imagefolder, csv'),
        ({"source": "npz", "path": "d.npz", "mask_key": "m"}, '"mask_key" belongs to task = "multilabel"'),
        ({"source": "csv", "path": "t.csv", "mask_key": "m"}, '"mask_key" belongs to npz'),
        ({"source": "csv", "path": "t.csv", "revision": "main"}, '"revision" belongs to a hub\'s'),
        ({"source": "owner/data", "path": "t.csv"}, '"path" belongs to imagefolder'),
        ({"source": "imagefolder", "path": "p", "test_path": "q"}, '"test_path" belongs to csv'),
        ({"source": "idx", "path": "p", "image_column": "x"}, '"image_column" belongs to'),
        ({"source": "csv", "path": "t.csv", "text_column": "t", "channels": 1}, '"channels" belongs to images'),
        ({"source": "csv", "path": "t.csv", "image_column": "i", "vocabulary": 80}, '"vocabulary" belongs to texts'),
        ({"source": "csv", "path": "t.csv", "tokenizer": "t.json", "vocabulary": 80}, "has its own"),
        ({"source": "csv", "path": "t.csv", "resize": "stretch"}, '"resize" belongs to "image_size"'),
        ({"source": "csv", "path": "t.csv", "label_separator": ";"}, '"label_separator" belongs to task'),
        ({"source": "csv", "path": "t.csv", "split_column": "s", "test_path": "q.csv"}, "exclude each other"),
        (
            {"source": "csv", "path": "t", "task": "multilabel", "label_columns": ("a",), "label_separator": ";"},
            "nothing to separate",
        ),
    ],
)
def test_section_refuses_contradictions(keys, message):
    with pytest.raises(ValidationError, match=message):
        DataSection(**keys)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"source": "movie-snippets", "length": 12},
        {"source": "owner/data", "revision": "main", "text_column": "t", "vocabulary": 80},
        {"source": "csv", "path": "t.csv", "tokenizer": "t.json"},
        {"source": "npz", "path": "d.npz", "task": "multilabel", "mask_key": "known", "image_size": (4, 6)},
    ],
)
def test_a_stored_section_that_spells_every_default_out_loads_again(keys):
    section = DataSection(**keys)
    assert DataSection.model_validate(section.model_dump()) == section
    assert DataSection.model_validate(section.model_dump(mode="json")) == section


def test_the_section_knows_what_the_catalogue_holds():
    assert {entry.name: entry.kind for entry in list_catalogue()} == CATALOGUE_KINDS


def test_keys_of_another_kind_are_refused_once_the_columns_tell_the_kind(tmp_path):
    write_lines(tmp_path / "t.csv", "text,label", *(f"word {i},{i % 2}" for i in range(30)))
    text = {"source": "csv", "path": "t.csv"}
    refused(tmp_path, '"image_size" belongs to images', **text, image_size=8, where="data.image_size")
    refused(tmp_path, "texts have no views", **text, augment={"views": 8}, where="data.augment")
    write_lines(tmp_path / "i.csv", "image,label", *(f"{i}.png,{i % 2}" for i in range(30)))
    refused(tmp_path, '"length" belongs to texts', source="csv", path="i.csv", length=8, where="data.length")


def test_keys_for_making_splits_are_refused_where_the_splits_are_given(tmp_path):
    images = {f"{split}_images": images_of(12) for split in ("train", "validation", "test")}
    np.savez(tmp_path / "d.npz", **images, **{name.replace("images", "labels"): np.arange(12) % 2 for name in images})
    keys = {"source": "npz", "path": "d.npz"}
    refused(tmp_path, '"test_fraction" belongs to', **keys, test_fraction=0.3, evidence="12 test samples")
    refused(tmp_path, '"validation_fraction" belongs to', **keys, validation_fraction=0.3)
    refused(tmp_path, '"split_seed" belongs to', **keys, split_seed=3)
    load_dataset(
        DataSection(**keys, split_seed=3, train_size=8), seed=0, base=tmp_path, folder=tmp_path / "other" / "data"
    )


def test_splits_that_are_given_twice_are_refused(tmp_path):
    (tmp_path / "tables").mkdir()
    for split in ("train", "test"):
        write_lines(tmp_path / "tables" / f"{split}.csv", "text,label,part", *(f"a,{i % 2},train" for i in range(20)))
    keys = {"source": "csv", "path": "tables"}
    refused(tmp_path, "this one is split already", **keys, split_column="part", evidence="train, test")
    refused(tmp_path, '"test_path" belongs to', **keys, test_path="tables/test.csv", where="data.test_path")


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=64))
def test_any_bytes_are_an_idx_array_or_an_input_error(data, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "any.idx"
    path.write_bytes(data)
    with contextlib.suppress(InputError):
        assert read_idx(path).ndim >= 1


@settings(max_examples=30, deadline=None)
@given(cut=st.integers(0, 200), compressed=st.booleans())
def test_truncated_idx_is_refused(cut, compressed, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "cut.idx"
    write_idx(path, np.arange(60, dtype=np.uint8).reshape(3, 4, 5))
    whole = gzip.compress(path.read_bytes(), mtime=0) if compressed else path.read_bytes()
    path.write_bytes(whole[: min(cut, len(whole) - 1)])
    with pytest.raises(InputError):
        read_idx(path)
