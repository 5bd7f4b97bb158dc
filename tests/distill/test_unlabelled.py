"""Unlabelled inputs of every source end in the shape of the data, and none of them is a validation or test sample."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from distill.data import load_dataset
from distill.data.arrays import write_idx
from distill.data.images import fit
from distill.data.section import KEYS_OF_UNLABELLED, DataSection
from distill.data.unlabelled import load_unlabelled, open_unlabelled
from profiles.artifact import read_manifest, verify
from profiles.errors import InputError

WORDS = np.array(["the", "a", "good", "bad", "film", "plot", "slow", "fine", "dull", "bright", "very", "not", "quite"])


class Notes:
    """A Progress that keeps its notes and the sizes of its tasks."""

    def __init__(self):
        self.notes, self.titles = [], []

    def note(self, message):
        self.notes.append(message)

    def task(self, title, total, unit="samples"):
        from profiles.progress import Silent

        self.titles.append((title, total))
        return Silent().task(title, total)


def load(base: Path, unlabelled, *, seed: int = 0, folder: str = "run", progress=None, **keys):
    section = DataSection(**keys, unlabelled=unlabelled)
    data = load_dataset(section, seed=seed, base=base, folder=base / folder / "data")
    place = base / folder / "unlabelled"
    return data, load_unlabelled(section, data, seed=seed, base=base, folder=place, progress=progress)


def refused(base: Path, unlabelled, match, *, where, evidence="", fix="", **keys) -> None:
    with pytest.raises(InputError, match=match) as caught:
        load(base, unlabelled, **keys)
    assert str(caught.value.where).startswith(f"data.unlabelled.{where}")
    assert evidence in str(caught.value.evidence)
    assert fix in str(caught.value.fix)
    # nothing half-made is left
    assert not (base / "run" / "unlabelled").exists()
    assert not list((base / "run").glob(".*"))


def images_of(count: int, *, seed: int = 0, side: int = 6, channels: int | None = None) -> np.ndarray:
    shape = (count, side, side) if channels is None else (count, side, side, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def sentences(count: int, seed: int = 0) -> list[str]:
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, 5)) + f" {seed}{row}" for row in range(count)]


def write_table(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def pictures(tmp_path) -> dict:
    """Labelled grey images, 6 by 6, split by the tool; the keys of its source."""
    np.savez(tmp_path / "d.npz", images=images_of(40), labels=np.arange(40) % 2)
    return {"source": "npz", "path": "d.npz"}


@pytest.fixture
def reviews(tmp_path) -> dict:
    """Labelled texts; the keys of their source."""
    write_table(tmp_path / "t.csv", [{"text": text, "label": row % 2} for row, text in enumerate(sentences(60))])
    return {"source": "csv", "path": "t.csv", "vocabulary": 80, "length": 8}


def save_pictures(folder: Path, images: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for row, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{row:03}.png")


# ------------------------------------------------------------------------------------------- what is left over


def test_without_the_table_there_is_nothing(tmp_path, pictures):
    assert load(tmp_path, None, **pictures)[1] is None
    assert not (tmp_path / "run" / "unlabelled").exists()


def test_rest_is_what_train_size_left_out_of_training(tmp_path, pictures):
    data, rest = load(tmp_path, {"rest": True}, **pictures, train_size=10)
    source = np.load(tmp_path / "d.npz")["images"]
    used = np.concatenate([data.train.rows, data.validation.rows, data.test.rows])
    expected = np.setdiff1d(np.arange(40), used)
    assert len(rest) == 40 - len(used) == len(expected) > 0
    assert np.array_equal(rest.inputs[:, 0], source[expected])
    assert isinstance(rest.inputs, np.memmap)
    assert rest.inputs.dtype == np.uint8
    assert rest.texts is None
    verify(tmp_path / "run" / "unlabelled", "unlabelled data")


def test_rest_of_a_long_tail_has_no_test_sample_that_balancing_left_out(tmp_path):
    labels = np.repeat(np.arange(3), (90, 60, 60))
    np.savez(tmp_path / "d.npz", images=images_of(210), labels=labels)
    keys = {"source": "npz", "path": "d.npz"}
    plain, _ = load(tmp_path, None, **keys, folder="plain")
    data, rest = load(tmp_path, {"rest": True}, **keys, imbalance="exp:10")
    assert len(data.test) < len(plain.test)
    images = np.load(tmp_path / "d.npz")["images"]
    expected = np.setdiff1d(plain.train.rows, data.train.rows)
    assert np.array_equal(rest.inputs[:, 0], images[expected])


def test_rest_of_a_column_of_splits_and_of_files_of_their_own(tmp_path):
    texts = sentences(80)
    parts = ["train"] * 50 + ["valid"] * 15 + ["test"] * 15
    order = np.random.default_rng(5).permutation(80)
    rows = [{"text": texts[row], "label": row % 2, "part": parts[row]} for row in order]
    write_table(tmp_path / "all.csv", rows)
    for part in ("train", "valid", "test"):
        write_table(tmp_path / f"{part}.csv", [row for row in rows if row["part"] == part])
    keys = {"source": "csv", "vocabulary": 80, "length": 8, "train_size": 20}
    for name, own in (
        ("column", {"path": "all.csv", "split_column": "part"}),
        ("files", {"path": "train.csv", "validation_path": "valid.csv", "test_path": "test.csv"}),
        ("one file of its own", {"path": "train.csv", "test_path": "test.csv"}),
    ):
        data, rest = load(tmp_path, {"rest": True}, folder=name, **keys, **own)
        given = [row["text"] for row in rows if row["part"] == "train"]
        used = {text for split in (data.train, data.validation, data.test) for text in split.texts}
        assert list(rest.texts) == [text for text in given if text not in used]
        assert len(rest) == 50 - 20 - (8 if name == "one file of its own" else 0)
        assert rest.inputs.shape == (len(rest), 8)
        assert rest.inputs.dtype == np.int64


def test_rest_of_a_catalogue_source(tmp_path):
    data, rest = load(tmp_path, {"rest": True, "size": 300}, train_size=100)
    assert rest.inputs.shape == (300, 1, 28, 28)
    train = {image.tobytes() for image in data.train.inputs}
    judged = {image.tobytes() for split in (data.validation, data.test) for image in split.inputs}
    found = {image.tobytes() for image in rest.inputs}
    assert not found & judged
    assert len(found & train) <= 1  # Fashion-MNIST has a few pictures twice
    assert "fashion-mnist-small" in rest.name


def test_rest_of_a_hub_source_is_of_the_commit_that_was_split(tmp_path, monkeypatch):
    import datasets
    import huggingface_hub
    from datasets.packaged_modules.csv.csv import Csv

    monkeypatch.setenv("EDGESTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    texts = sentences(60)
    write_table(tmp_path / "t.csv", [{"text": text, "label": row % 2} for row, text in enumerate(texts)])
    # what `datasets` leaves in its cache after a download of that commit
    builder = Csv(cache_dir=str(tmp_path / "scratch"), dataset_name="snippets", data_files=str(tmp_path / "t.csv"))
    place = tmp_path / "cache/hub/someone___snippets/default/0.0.0" / ("0123456789abcdef" * 2 + "01234567")
    builder.download_and_prepare(str(place))
    keys = {"source": "someone/snippets", "vocabulary": 80, "length": 8, "train_size": 20}
    data, rest = load(tmp_path, {"rest": True}, **keys)
    assert list(rest.texts) == [texts[row] for row in data.left_out]
    assert len(rest) == 42 - 20


@settings(max_examples=12, deadline=None)
@given(
    train_size=st.integers(4, 20),
    imbalance=st.sampled_from([None, "exp:1", "exp:2"]),
    copies=st.integers(0, 6),
    seed=st.integers(0, 50),
)
def test_rest_never_holds_a_validation_or_test_input(train_size, imbalance, copies, seed, tmp_path_factory):
    base = tmp_path_factory.mktemp("rest")
    images = images_of(48, seed=seed)
    images[-copies or 48 :] = images[:copies]  # the same picture twice in the source
    np.savez(base / "d.npz", images=images, labels=np.arange(48) % 2)
    data, rest = load(
        base, {"rest": True}, seed=seed, source="npz", path="d.npz", train_size=train_size, imbalance=imbalance
    )
    judged = {image.tobytes() for split in (data.validation, data.test) for image in split.inputs}
    assert not judged & {image.tobytes() for image in rest.inputs}
    expected = [images[row] for row in data.left_out if images[row][None].tobytes() not in judged]
    assert np.array_equal(rest.inputs[:, 0], expected)


@pytest.mark.parametrize("keys", [{}, {"train_size": 28}, {"imbalance": "exp:1"}])
def test_nothing_left_over_is_refused(tmp_path, pictures, keys):
    refused(
        tmp_path,
        {"rest": True},
        "nothing of the training samples is left over",
        where="rest",
        evidence="28 training samples" if keys else "neither data.train_size nor data.imbalance",
        fix="data.train_size",
        **pictures,
        **keys,
    )


# --------------------------------------------------------------------------------------------- further sources


def test_a_folder_of_images_with_or_without_class_folders(tmp_path, pictures):
    more = images_of(9, seed=7)
    save_pictures(tmp_path / "more", more[:4])
    save_pictures(tmp_path / "more" / "deeper" / "still", more[4:])
    (tmp_path / "more" / "readme.txt").write_text("not an image")
    (tmp_path / "more" / ".000.png").write_text("hidden")
    _, found = load(tmp_path, {"source": "imagefolder", "path": "more"}, **pictures)
    assert np.array_equal(found.inputs[:, 0], more)
    assert found.name == "more"


def test_tables_arrays_and_idx_files_give_the_same_inputs(tmp_path, pictures):
    more = images_of(9, seed=7)
    save_pictures(tmp_path / "more", more)
    names = [f"more/{row:03}.png" for row in range(9)]
    write_table(tmp_path / "i.csv", [{"image": name, "note": ""} for name in names])
    (tmp_path / "i.jsonl").write_text("\n".join(json.dumps({"picture": name}) for name in names))
    np.savez(tmp_path / "u.npz", images=more, views=more[::-1])
    write_idx(tmp_path / "idx-images", more)
    (tmp_path / "mnist").mkdir()
    write_idx(tmp_path / "mnist" / "train-images-idx3-ubyte", more)
    write_idx(tmp_path / "mnist" / "train-labels-idx1-ubyte", np.zeros(9, np.uint8))
    keys = []
    for number, unlabelled in enumerate(
        (
            {"source": "csv", "path": "i.csv"},
            {"source": "jsonl", "path": "i.jsonl", "image_column": "picture"},
            {"source": "npz", "path": "u.npz"},
            {"source": "idx", "path": "idx-images"},
            {"source": "idx", "path": "mnist"},
        )
    ):
        _, found = load(tmp_path, unlabelled, folder=str(number), **pictures)
        assert np.array_equal(found.inputs[:, 0], more), unlabelled
        keys.append(found.key)
    assert len(set(keys)) == 1  # the key is of the content
    _, found = load(tmp_path, {"source": "npz", "path": "u.npz", "image_column": "views"}, folder="views", **pictures)
    assert np.array_equal(found.inputs[:, 0], more[::-1])
    assert found.key != keys[0]


def test_images_are_brought_to_the_shape_of_the_data_by_its_rule(tmp_path):
    Image.fromarray(images_of(1, side=9, channels=3)[0]).resize((13, 9)).save(tmp_path / "wide.png")
    (tmp_path / "more").mkdir()
    (tmp_path / "wide.png").rename(tmp_path / "more" / "wide.png")
    np.savez(tmp_path / "d.npz", images=images_of(40, channels=3), labels=np.arange(40) % 2)
    for rule in ("center-crop", "letterbox", "stretch"):
        for channels in (1, 3):
            _, found = load(
                tmp_path,
                {"source": "imagefolder", "path": "more"},
                folder=f"{rule}{channels}",
                source="npz",
                path="d.npz",
                image_size=5,
                resize=rule,
                channels=channels,
            )
            with Image.open(tmp_path / "more" / "wide.png") as image:
                assert np.array_equal(found.inputs[0], fit(image, (5, 5), rule, channels))


def test_lines_and_tables_of_texts_are_tokenised_as_the_data_is(tmp_path, reviews):
    data, _ = load(tmp_path, None, **reviews)
    known = list(data.train.texts[:3])
    (tmp_path / "more.txt").write_text(
        "\ufeff" + "\r\n".join([known[0], "", "  " + known[1] + " ", "a new one"]) + "\n"
    )
    notes = Notes()
    data, found = load(tmp_path, {"source": "lines", "path": "more.txt"}, progress=notes, **reviews)
    assert found.texts == (known[0], known[1], "a new one")
    assert np.array_equal(found.inputs[:2], data.train.inputs[:2])
    assert notes.titles == [("tokenising unlabelled texts", 3)]
    write_table(tmp_path / "more.csv", [{"text": text, "other": "x"} for text in known])
    write_table(tmp_path / "own.csv", [{"say": text, "text": "x"} for text in known])
    for number, unlabelled in enumerate(({"path": "more.csv"}, {"path": "own.csv", "text_column": "say"})):
        _, found = load(tmp_path, {"source": "csv", **unlabelled}, folder=str(number), **reviews)
        assert np.array_equal(found.inputs, data.train.inputs[:3])


def test_samples_that_are_judged_are_dropped_and_counted(tmp_path, pictures, reviews):
    data, _ = load(tmp_path, None, **pictures)
    fresh = images_of(5, seed=9)
    mixed = np.concatenate([fresh[:2], data.test.inputs[:2, 0], fresh[2:], data.validation.inputs[:1, 0]])
    np.savez(tmp_path / "u.npz", images=mixed)
    notes = Notes()
    _, found = load(tmp_path, {"source": "npz", "path": "u.npz"}, progress=notes, **pictures)
    assert np.array_equal(found.inputs[:, 0], fresh)
    assert "3 of 8 unlabelled samples are also in the validation or the test split" in notes.notes[0]
    info = read_manifest(tmp_path / "run" / "unlabelled", "unlabelled data").info
    assert (info["samples"], info["dropped"], info["of"]) == (5, 3, 8)
    assert not (tmp_path / "run" / "unlabelled" / "longer.npy").exists()
    data, _ = load(tmp_path, None, folder="texts", **reviews)
    lines = ["one", data.test.texts[0], "two", data.validation.texts[3], data.train.texts[0]]
    (tmp_path / "more.txt").write_text("\n".join(lines))
    _, found = load(tmp_path, {"source": "lines", "path": "more.txt"}, folder="texts", **reviews)
    assert found.texts == ("one", "two", data.train.texts[0])


def test_a_size_draws_by_the_seed(tmp_path, pictures):
    more = images_of(50, seed=7)
    np.savez(tmp_path / "u.npz", images=more)
    unlabelled = {"source": "npz", "path": "u.npz", "size": 20}
    found = [load(tmp_path, unlabelled, seed=seed, folder=str(seed), **pictures)[1] for seed in (0, 1)]
    assert [len(each) for each in found] == [20, 20]
    assert found[0].key != found[1].key
    source = [image.tobytes() for image in more]
    places = [source.index(image.tobytes()) for image in found[0].inputs]
    assert places == sorted(set(places))
    again = load(tmp_path, unlabelled, folder="again", **pictures)[1]
    assert again.key == found[0].key


def test_the_artefact_is_reused_until_files_keys_or_data_change(tmp_path, pictures):
    save_pictures(tmp_path / "more", images_of(4, seed=7))
    write_table(tmp_path / "i.csv", [{"image": f"more/{row:03}.png"} for row in range(4)])
    unlabelled = {"source": "csv", "path": "i.csv"}

    def stamp(**keys) -> int:
        load(tmp_path, unlabelled, **{**pictures, **keys})
        return (tmp_path / "run" / "unlabelled" / "manifest.json").stat().st_mtime_ns

    first = stamp()
    assert stamp() == first
    save_pictures(tmp_path / "more", images_of(4, seed=8))  # named by the table, not by the recipe
    second = stamp()
    assert second != first
    assert np.array_equal(open_unlabelled(tmp_path / "run" / "unlabelled").inputs[:, 0], images_of(4, seed=8))
    third = stamp(train_size=12)
    assert third != second
    unlabelled["size"] = 2
    assert stamp(train_size=12) != third


# --------------------------------------------------------------------------------------------------- bad input


def test_a_path_that_is_missing_or_of_the_other_kind(tmp_path, pictures):
    save_pictures(tmp_path / "photos", images_of(2))
    refused(
        tmp_path,
        {"source": "imagefolder", "path": "photo"},
        "no such file or folder: photo",
        where="path",
        fix='"photos"',
        **pictures,
    )
    refused(tmp_path, {"source": "imagefolder", "path": "d.npz"}, "is not a folder", where="path", **pictures)
    refused(tmp_path, {"source": "npz", "path": "photos"}, "is a folder, a file is needed", where="path", **pictures)


def test_empty_sources(tmp_path, pictures, reviews):
    (tmp_path / "none").mkdir()
    folder = {"source": "imagefolder", "path": "none"}
    refused(tmp_path, folder, "no image in none", where="path", evidence="empty", **pictures)
    (tmp_path / "none" / "a.txt").write_text("no picture")
    refused(
        tmp_path, folder, "no image in none", where="path", evidence="1 other files, the first is a.txt", **pictures
    )
    refused(tmp_path, {"source": "idx", "path": "none"}, "holds no image files", where="path", **pictures)
    np.savez(tmp_path / "u.npz", images=images_of(0))
    refused(tmp_path, {"source": "npz", "path": "u.npz"}, "holds no samples", where="path", **pictures)
    (tmp_path / "e.txt").write_text("\n \n")
    refused(tmp_path, {"source": "lines", "path": "e.txt"}, "holds no samples", where="path", **reviews)
    (tmp_path / "e.csv").write_text("text\n")
    refused(tmp_path, {"source": "csv", "path": "e.csv"}, "holds no samples", where="path", **reviews)


def test_unreadable_images_are_named(tmp_path, pictures):
    save_pictures(tmp_path / "more", images_of(3))
    (tmp_path / "more" / "001.png").write_bytes(b"this is no picture")
    unlabelled = {"source": "imagefolder", "path": "more"}
    refused(tmp_path, unlabelled, "001.png is not a readable image", where="path, ", **pictures)
    refused(tmp_path, unlabelled, "001.png is not a readable image", where="path, ", **pictures, channels=1)
    write_table(tmp_path / "i.csv", [{"image": "more/000.png"}, {"image": "more/gone.png"}])
    refused(tmp_path, {"source": "csv", "path": "i.csv"}, "no image more/gone.png", where="path, ", **pictures)


def test_images_of_other_channels(tmp_path, pictures):
    save_pictures(tmp_path / "more", images_of(2, channels=3))
    unlabelled = {"source": "imagefolder", "path": "more"}
    refused(
        tmp_path, unlabelled, "in colour, the data is grey", where="path, 000.png", fix="data.channels = 1", **pictures
    )
    _, found = load(tmp_path, unlabelled, folder="grey", **pictures, channels=1)
    assert found.inputs.shape == (2, 1, 6, 6)
    np.savez(tmp_path / "u.npz", images=images_of(3, channels=4))
    refused(tmp_path, {"source": "npz", "path": "u.npz"}, "images have shape", where="path", **pictures)
    np.savez(tmp_path / "f.npz", images=images_of(3) / 255)
    refused(tmp_path, {"source": "npz", "path": "f.npz"}, "uint8 is needed", where="path", **pictures)


def test_texts_for_images_and_images_for_texts(tmp_path, pictures, reviews):
    images, lines = {"source": "imagefolder", "path": "more"}, {"source": "lines", "path": "more.txt"}
    # known from the keys alone
    for keys, unlabelled in ((pictures, lines), ({"source": "movie-snippets"}, images)):
        with pytest.raises(ValidationError, match=r"gives (texts|images), the data holds") as caught:
            DataSection(**keys, unlabelled=unlabelled)
        assert caught.value.errors()[0]["loc"] == ("unlabelled",)
    # known once the columns of the data are read
    refused(tmp_path, images, "gives images, the data holds texts", where="source", **reviews)
    column = {"source": "csv", "path": "t.csv", "image_column": "text"}
    refused(tmp_path, column, "gives images, the data holds texts", where="image_column", **reviews)
    # known once their own columns are read
    refused(
        tmp_path,
        {"source": "csv", "path": "t.csv"},
        "which column holds the images",
        where="image_column",
        evidence="columns: text, label",
        **pictures,
    )


def test_columns_and_arrays_that_are_not_there(tmp_path, pictures, reviews):
    np.savez(tmp_path / "u.npz", pictures=images_of(3))
    refused(tmp_path, {"source": "npz", "path": "u.npz"}, 'no array "images"', where="image_column", **pictures)
    write_table(tmp_path / "more.csv", [{"sentences": "a"}])
    table = {"source": "csv", "path": "more.csv"}
    refused(
        tmp_path, {**table, "text_column": "sentence"}, "no column", where="text_column", fix='"sentences"', **reviews
    )
    (tmp_path / "more.jsonl").write_text('{"text": "a"}\n{"text": null}\n')
    refused(tmp_path, {"source": "jsonl", "path": "more.jsonl"}, "no text", where="path", **reviews)
    (tmp_path / "latin.txt").write_bytes("caf\u00e9\n".encode("latin-1"))
    refused(tmp_path, {"source": "lines", "path": "latin.txt"}, "not a UTF-8 text", where="path", **reviews)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nothing")
    refused(tmp_path, {"source": "parquet", "path": "broken.parquet"}, "cannot be read", where="path", **reviews)


def test_more_than_there_is_and_nothing_but_judged_samples(tmp_path, pictures):
    np.savez(tmp_path / "u.npz", images=images_of(3, seed=7))
    refused(
        tmp_path,
        {"source": "npz", "path": "u.npz", "size": 4},
        "size = 4 is more than there is",
        where="size",
        evidence="3 unlabelled samples",
        **pictures,
    )
    data, _ = load(tmp_path, None, **pictures)
    np.savez(tmp_path / "u.npz", images=data.test.inputs[:, 0])
    refused(
        tmp_path,
        {"source": "npz", "path": "u.npz"},
        "every unlabelled sample is also in the validation or the test split",
        where="path",
        **pictures,
    )


@pytest.mark.parametrize(
    ("unlabelled", "message"),
    [
        ({}, "rest = true, or from a source with its path"),
        ({"rest": True, "path": "x"}, "another way"),
        ({"source": "csv"}, '"path" is missing'),
        ({"path": "x"}, '"source" is missing'),
        ({"source": "csv", "path": "x", "image_column": "a", "text_column": "b"}, "exclude each other"),
        ({"source": "lines", "path": "x", "text_column": "b"}, 'source = "lines" does not read text_column'),
        ({"source": "npz", "path": "x", "text_column": "b"}, 'source = "npz" does not read text_column'),
        ({"rest": True, "image_column": "b"}, "rest = true does not read image_column"),
        ({"source": "folder", "path": "x"}, "imagefolder"),
        ({"rest": True, "size": 0}, "greater than or equal to 1"),
        ({"rest": True, "fraction": 0.1}, "Extra inputs"),
    ],
)
def test_the_table_refuses_contradictions(unlabelled, message):
    with pytest.raises(ValidationError, match=message) as caught:
        DataSection(source="csv", path="t.csv", unlabelled=unlabelled)
    assert caught.value.errors()[0]["loc"][0] == "unlabelled"


def test_every_source_has_its_keys():
    for source, keys in KEYS_OF_UNLABELLED.items():
        section = DataSection(
            source="owner/data", unlabelled={"source": source, "path": "x", **dict.fromkeys(sorted(keys)[:1], "c")}
        )
        assert DataSection.model_validate(section.model_dump()) == section
