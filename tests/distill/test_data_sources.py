"""Every source ends in the same kind of Dataset."""

import csv
import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distill.data import Dataset, load_dataset
from distill.data.arrays import write_idx
from distill.data.load import open_dataset
from distill.data.section import AugmentSection, DataSection
from profiles.artifact import verify
from profiles.errors import InputError


def load(base: Path, *, seed: int = 0, folder: str = "run/data", **keys) -> Dataset:
    return load_dataset(DataSection(**keys), seed=seed, base=base, folder=base / folder)


def images_of(count: int, *, side: int = 8, channels: int | None = None, seed: int = 0) -> np.ndarray:
    shape = (count, side, side) if channels is None else (count, side, side, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_image_folder(folder: Path, per_class: int = 10, *, splits=("",), channels: int | None = 3) -> None:
    for split in splits:
        for label, name in enumerate(("bolt", "nut")):
            place = folder / split / name
            place.mkdir(parents=True)
            for index, image in enumerate(images_of(per_class, channels=channels, seed=label)):
                Image.fromarray(image).save(place / f"{index}.png")


def write_csv(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_packaged_set_is_the_default_and_has_all_splits(tmp_path):
    data = load(tmp_path)
    assert (len(data.train), len(data.validation), len(data.test)) == (10_000, 2_000, 2_000)
    assert data.input.shape == (1, 28, 28)
    assert data.classes[9] == "Ankle boot"
    train = data.train.inputs.astype(np.float64) / 255
    assert data.input.mean == pytest.approx((train.mean(),), abs=1e-6)
    assert data.input.std == pytest.approx((train.std(),), abs=1e-6)
    assert "MIT" in data.licence
    assert isinstance(data.train.inputs, np.memmap)
    assert data.preprocessing["layout"] == "NCHW"
    verify(tmp_path / "run/data", "data")


def test_image_folder_is_split_stratified_and_keeps_its_pixels(tmp_path):
    write_image_folder(tmp_path / "photos", 20)
    data = load(tmp_path, source="imagefolder", path="photos")
    assert data.classes == ("bolt", "nut")
    assert data.input.shape == (3, 8, 8)
    assert [len(split) for split in (data.train, data.validation, data.test)] == [28, 6, 6]
    for split in (data.train, data.validation, data.test):
        assert np.bincount(split.labels).tolist() == [len(split) // 2] * 2
    originals = {
        image.transpose(2, 0, 1).tobytes() for label in (0, 1) for image in images_of(20, channels=3, seed=label)
    }
    found = [image.tobytes() for split in (data.train, data.validation, data.test) for image in split.inputs]
    assert len(set(found)) == 40
    assert set(found) == originals


def test_given_image_folder_splits_are_kept(tmp_path):
    write_image_folder(tmp_path / "photos", 4, splits=("train", "val", "test"), channels=None)
    data = load(tmp_path, source="imagefolder", path="photos", image_size=6)
    assert [len(split) for split in (data.train, data.validation, data.test)] == [8, 8, 8]
    assert data.input.shape == (1, 6, 6)
    assert data.preprocessing["colour_order"] == "grey"


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_tables_with_image_paths(tmp_path, kind):
    (tmp_path / "table").mkdir()
    rows = []
    for index, image in enumerate(images_of(24)):
        Image.fromarray(image).save(tmp_path / "table" / f"{index}.png")
        rows.append(
            {"file": f"{index}.png", "kind": "ab"[index % 2], "part": ("train", "train", "val", "test")[index // 2 % 4]}
        )
    path = tmp_path / "table" / f"t.{kind}"
    if kind == "csv":
        write_csv(path, rows)
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    keys = {"source": kind, "path": f"table/t.{kind}", "image_column": "file", "label_column": "kind"}
    data = load(tmp_path, split_column="part", **keys)
    assert data.classes == ("a", "b")
    assert [len(split) for split in (data.train, data.validation, data.test)] == [12, 6, 6]
    assert np.array_equal(data.train.inputs[0, 0], images_of(24)[0])
    # a picture that the table names is part of the content
    Image.fromarray(images_of(1, seed=9)[0]).save(tmp_path / "table" / "0.png")
    os.utime(tmp_path / "table" / "0.png", (1, 1))
    assert load(tmp_path, split_column="part", **keys).key != data.key


def test_separate_files_for_the_splits(tmp_path):
    for name, count in (("a", 8), ("b", 4), ("c", 4)):
        write_csv(tmp_path / f"{name}.csv", [{"text": f"word{i % 2} {i}", "label": i % 2} for i in range(count)])
    data = load(tmp_path, source="csv", path="a.csv", validation_path="b.csv", test_path="c.csv", text_column="text")
    assert [len(split) for split in (data.train, data.validation, data.test)] == [8, 4, 4]
    assert data.classes == ("0", "1")


def write_texts(path: Path, count: int = 60) -> None:
    words = {"good": ["fine", "lovely", "bright"], "bad": ["dull", "grim", "flat"]}
    rows = []
    for index in range(count):
        label = ("good", "bad")[index % 2]
        rows.append({"text": f"A {words[label][index % 3]} Film number {index}", "label": label})
    write_csv(path, rows)


def test_texts_become_padded_tokens_and_the_tokenizer_is_kept(tmp_path):
    from tokenizers import Tokenizer

    write_texts(tmp_path / "t.csv")
    data = load(tmp_path, source="csv", path="t.csv", length=12, vocabulary=80)
    assert data.input.kind == "tokens"
    assert data.train.inputs.dtype == np.int64
    assert data.train.inputs.shape == (len(data.train), 12)
    assert data.input.vocabulary <= 80
    assert data.train.inputs.max() < data.input.vocabulary
    assert data.input.pad_id == 0
    saved = Tokenizer.from_file(str(data.tokenizer))
    assert saved.token_to_id("[PAD]") == 0
    assert data.test.texts is not None
    assert saved.encode(data.test.texts[0]).ids == data.test.inputs[0].tolist()


def test_the_tokenizer_sees_only_the_training_split(tmp_path):
    write_csv(tmp_path / "a.csv", [{"text": "plain words here", "label": i % 2} for i in range(8)])
    write_csv(tmp_path / "b.csv", [{"text": "zebra zebra zebra", "label": i % 2} for i in range(8)])
    keys = {"source": "csv", "path": "a.csv", "validation_path": "b.csv", "test_path": "b.csv"}
    data = load(tmp_path, **keys)
    vocabulary = json.loads(data.tokenizer.read_text())["model"]["vocab"]
    assert "z" not in vocabulary
    assert "▁plain" in vocabulary
    assert (data.validation.inputs == vocabulary["[UNK]"]).any(axis=1).all()
    assert not (data.train.inputs == vocabulary["[UNK]"]).any()


def test_the_same_texts_train_the_same_tokenizer_in_another_process(tmp_path):
    write_texts(tmp_path / "t.csv")
    code = (
        "import sys; from pathlib import Path; from distill.data import load_dataset; "
        "from distill.data.section import DataSection; base = Path(sys.argv[1]); "
        "print(load_dataset(DataSection(source='csv', path='t.csv', vocabulary=200), seed=0, base=base, "
        "folder=base / sys.argv[2]).key)"
    )
    keys = {
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path), name], capture_output=True, text=True, check=True
        ).stdout
        for name in ("one", "two")
    }
    assert len(keys) == 1


def test_own_tokenizer_is_used(tmp_path):
    write_texts(tmp_path / "t.csv")
    first = load(tmp_path, source="csv", path="t.csv", vocabulary=80)
    second = load(tmp_path, folder="run/two", source="csv", path="t.csv", tokenizer="run/data/tokenizer.json", length=5)
    assert np.array_equal(second.train.inputs, first.train.inputs[:, :5])
    assert second.preprocessing["trained_here"] is False


@pytest.mark.parametrize("layout", ["NHW", "NHWC", "NCHW"])
def test_npz_layouts(tmp_path, layout):
    images = images_of(40, channels=None if layout == "NHW" else 3)
    stored = images.transpose(0, 3, 1, 2) if layout == "NCHW" else images
    np.savez(tmp_path / "d.npz", images=stored, labels=np.arange(40) % 4)
    data = load(tmp_path, source="npz", path="d.npz")
    assert data.input.shape == ((1, 8, 8) if layout == "NHW" else (3, 8, 8))
    source = images[..., None] if layout == "NHW" else images
    assert np.array_equal(data.train.inputs, source[data.train.rows].transpose(0, 3, 1, 2))
    assert np.array_equal(data.test.labels, data.test.rows % 4)


def test_npz_with_splits_and_named_keys(tmp_path):
    arrays = {}
    for split, count in (("train", 20), ("validation", 8), ("test", 6)):
        arrays[f"{split}_x"], arrays[f"{split}_y"] = images_of(count), np.arange(count) % 2
    np.savez(tmp_path / "d.npz", **arrays)
    data = load(tmp_path, source="npz", path="d.npz", image_column="x", label_column="y", classes=("off", "on"))
    assert [len(split) for split in (data.train, data.validation, data.test)] == [20, 8, 6]
    assert data.classes == ("off", "on")


def test_idx_folder_plain_and_compressed(tmp_path):
    (tmp_path / "idx").mkdir()
    write_idx(tmp_path / "idx" / "train-images-idx3-ubyte", images_of(30))
    write_idx(tmp_path / "idx" / "train-labels-idx1-ubyte", np.arange(30) % 3)
    for kind, array in (("images-idx3", images_of(9, seed=1)), ("labels-idx1", np.arange(9) % 3)):
        plain = tmp_path / f"{kind}"
        write_idx(plain, array)
        (tmp_path / "idx" / f"t10k-{kind}-ubyte.gz").write_bytes(gzip.compress(plain.read_bytes()))
    data = load(tmp_path, source="idx", path="idx", validation_fraction=0.2)
    assert [len(split) for split in (data.train, data.validation, data.test)] == [24, 6, 9]
    assert np.array_equal(data.test.inputs[:, 0], images_of(9, seed=1))


def test_multilabel_columns_lists_and_joined_names_agree(tmp_path):
    random = np.random.default_rng(0)
    matrix = random.integers(0, 2, (60, 3))
    names = np.array(["bass", "drums", "voice"])
    images = images_of(60)
    for index, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{index}.png")
    columns, joined, lists = [], [], []
    for index, row in enumerate(matrix):
        image = {"image": f"{index}.png"}
        present = names[row == 1].tolist()
        columns.append(image | {name: int(value) for name, value in zip(names, row, strict=True)})
        joined.append(image | {"label": "|".join(present) or "|"})
        lists.append(image | {"label": present})
    columns[7]["drums"] = ""
    joined[8]["label"] = ""
    write_csv(tmp_path / "c.csv", columns)
    write_csv(tmp_path / "j.csv", joined)
    (tmp_path / "l.jsonl").write_text("\n".join(json.dumps(row) for row in lists))
    keys = {"task": "multilabel", "image_column": "image"}
    one = load(tmp_path, folder="1", source="csv", path="c.csv", label_columns=tuple(names), **keys)
    two = load(tmp_path, folder="2", source="csv", path="j.csv", **keys)
    three = load(tmp_path, folder="3", source="jsonl", path="l.jsonl", **keys)
    assert one.classes == two.classes == three.classes == ("bass", "drums", "voice")
    for data, unknown in ((one, {(7, 1)}), (two, {(8, 0), (8, 1), (8, 2)}), (three, set())):
        masked = set()
        for split in (data.train, data.validation, data.test):
            assert split.labels.dtype == np.uint8
            known = np.ones_like(split.labels, bool) if split.mask is None else split.mask
            assert np.array_equal(split.labels[known], matrix[split.rows][known])
            masked |= {(int(split.rows[row]), int(column)) for row, column in np.argwhere(~known)}
        assert masked == unknown


def test_npz_multilabel_mask(tmp_path):
    random = np.random.default_rng(1)
    labels, mask = random.integers(0, 2, (50, 2)), random.random((50, 2)) < 0.8
    np.savez(tmp_path / "d.npz", images=images_of(50), labels=labels, mask=mask)
    data = load(tmp_path, source="npz", path="d.npz", task="multilabel")
    assert np.array_equal(data.train.mask, mask[data.train.rows])
    assert np.array_equal(data.train.labels, (labels * mask)[data.train.rows])


def test_train_size_keeps_class_shares_and_leaves_the_other_splits_alone(tmp_path):
    whole = load(tmp_path, folder="whole")
    small = load(tmp_path, folder="small", train_size=500)
    assert np.bincount(small.train.labels).tolist() == [50] * 10
    assert np.array_equal(small.test.inputs, whole.test.inputs)
    assert np.array_equal(small.train.inputs, whole.train.inputs[small.train.rows])
    again = load(tmp_path, folder="other", seed=1, train_size=500)
    assert again.key != small.key


def test_an_unchanged_artefact_is_reused_and_a_changed_source_is_read_again(tmp_path):
    np.savez(tmp_path / "d.npz", images=images_of(40), labels=np.arange(40) % 2)
    keys = {"source": "npz", "path": "d.npz"}
    first = load(tmp_path, **keys)
    made = (tmp_path / "run/data/manifest.json").stat().st_mtime_ns
    again = load(tmp_path, augment=AugmentSection(crop=2), **keys)
    assert (tmp_path / "run/data/manifest.json").stat().st_mtime_ns == made  # augmentation is not stored, so not remade
    assert again.key == first.key
    assert load(tmp_path, folder="copy", **keys).key == first.key
    np.savez(tmp_path / "d.npz", images=images_of(40, seed=3), labels=np.arange(40) % 2)
    os.utime(tmp_path / "d.npz", (5, 5))
    assert load(tmp_path, **keys).key != first.key
    assert not list((tmp_path / "run").glob(".*"))


def test_images_that_a_table_names_are_read_again_only_when_one_changes(tmp_path):
    (tmp_path / "p").mkdir()
    for index, image in enumerate(images_of(20)):
        Image.fromarray(image).save(tmp_path / "p" / f"{index}.png")
    write_csv(tmp_path / "t.csv", [{"image": f"p/{index}.png", "label": index % 2} for index in range(20)])
    keys = {"source": "csv", "path": "t.csv"}
    first = load(tmp_path, **keys)
    made = (tmp_path / "run/data/manifest.json").stat().st_mtime_ns
    assert load(tmp_path, **keys).key == first.key
    assert (tmp_path / "run/data/manifest.json").stat().st_mtime_ns == made
    Image.fromarray(255 - images_of(1)[0]).save(tmp_path / "p" / "0.png")
    assert load(tmp_path, **keys).key != first.key


def test_a_folder_of_another_form_is_made_anew(tmp_path, monkeypatch):
    np.savez(tmp_path / "d.npz", images=images_of(40), labels=np.arange(40) % 2)
    keys = {"source": "npz", "path": "d.npz"}
    first = load(tmp_path, **keys)
    manifest = tmp_path / "run/data/manifest.json"
    old = json.loads(manifest.read_text())
    del old["info"]["sources"], old["info"]["form"]
    manifest.write_text(json.dumps(old))
    with pytest.raises(InputError, match="another version of edgestill"):
        open_dataset(tmp_path / "run/data")
    monkeypatch.setattr("distill.data.load._FORM", -1)
    assert load(tmp_path, **keys).key == first.key
    assert json.loads(manifest.read_text())["info"]["sources"]["train"] == ["train", 40]


def test_the_commit_of_a_hub_data_set_is_kept_and_needs_no_network_again(tmp_path, monkeypatch):
    import datasets
    import huggingface_hub
    from datasets.packaged_modules.csv.csv import Csv

    monkeypatch.setenv("EDGESTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    write_texts(tmp_path / "t.csv")
    commit = "0123456789abcdef" * 2 + "01234567"
    # what `datasets` leaves in its cache after a download of that commit
    builder = Csv(cache_dir=str(tmp_path / "scratch"), dataset_name="snippets", data_files=str(tmp_path / "t.csv"))
    builder.download_and_prepare(str(tmp_path / "cache/hub/someone___snippets/default/0.0.0" / commit))
    data = load(tmp_path, source="someone/snippets", vocabulary=80)
    assert data.revision == commit
    shutil.rmtree(tmp_path / "cache")
    assert load(tmp_path, source="someone/snippets", vocabulary=80).revision == commit
    assert load(tmp_path, folder="run/table", source="csv", path="t.csv", vocabulary=80).revision is None


def test_the_section_imports_without_torch_numpy_and_datasets():
    heavy = "[name for name in ('torch', 'numpy', 'datasets', 'PIL') if name in sys.modules]"
    code = f"import sys, distill.data.section; print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
