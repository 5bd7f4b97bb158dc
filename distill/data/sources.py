"""Readers of every source: each gives undecoded inputs and raw labels, split as the source splits them."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from distill.data import catalogue
from distill.data.arrays import Array, read_idx, read_npz
from distill.data.dataset import SplitName
from distill.data.images import ArrayImages, EncodedImages, Images
from distill.data.make_fashion_mnist_small import PACKAGED
from distill.data.section import FILE_SOURCES, DataSection
from profiles.errors import EdgestillError, InputError, nearest
from profiles.progress import Progress

_SPLIT_NAMES: dict[str, SplitName] = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "t10k": "test",
}
_BUILDERS = {"imagefolder": "imagefolder", "csv": "csv", "jsonl": "json", "parquet": "parquet"}


@dataclass(frozen=True)
class Rows:
    """The samples of one split, undecoded: `inputs` images, or texts; `labels` as `parse_labels` takes them."""

    inputs: Images | Sequence[str]
    labels: Sequence[Any] | Array


@dataclass(frozen=True)
class Raw:
    """A source as read. `files` are further files, named by a table, that the content depends on.

    `revision` is the commit of a hub data set.
    """

    name: str
    where: str
    splits: dict[SplitName, Rows]
    classes: tuple[str, ...] = ()
    licence: str = ""
    citation: str = ""
    files: tuple[Path, ...] = ()
    revision: str | None = None

    @property
    def is_text(self) -> bool:
        """Whether the samples are texts."""
        return not hasattr(self.splits["train"].inputs, "decode")


def source_paths(section: DataSection, base: Path) -> list[Path]:
    """The files and folders that the section names.

    Raises:
        InputError: one of them does not exist.
    """
    named = {"path": section.path, "validation_path": section.validation_path, "test_path": section.test_path}
    if section.source not in FILE_SOURCES:
        named = {}
    named["tokenizer"] = section.tokenizer
    paths = []
    for key, value in named.items():
        if value is None:
            continue
        path = base / Path(value).expanduser()
        if not path.exists():
            there = sorted(entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else []
            raise InputError(
                f"no such file or folder: {value}",
                where=f"data.{key}, from {base}",
                fix=nearest(path.name, there[:50]) if there else f"{path.parent} does not exist either",
            )
        paths.append(path)
    return paths


@contextmanager
def read_source(section: DataSection, base: Path, scratch: Path, progress: Progress) -> Iterator[Raw]:
    """Reads the source that a section names; the yielded inputs are valid inside the block.

    Args:
        section: the `[data]` table.
        base: where relative paths start.
        scratch: existing folder for the converter's temporary files, removed after the block.
        progress: shows downloads.

    Raises:
        InputError: what is wrong with the section or the files.
        EdgestillError: a download failed.
    """
    source_paths(section, base)
    path = base / Path(section.path or "").expanduser()
    if section.source in _BUILDERS:
        temporary = Path(tempfile.mkdtemp(prefix=".datasets-", dir=scratch))
        try:
            yield _read_table(section, base, path, temporary)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    elif section.source == "npz":
        yield _read_npz(section, base, path)
    elif section.source == "idx":
        yield _read_idx(path)
    elif section.source in {entry.name for entry in catalogue.list_catalogue()}:
        yield _read_catalogue(section, progress)
    elif "/" in section.source:
        progress.note(f"asking the Hugging Face hub for {section.source}")
        loaded = load_from_hub(section.source, section.subset, section.revision)
        raw = _from_datasets(loaded, section, section.source, f"hub data set {section.source}", Path())
        yield replace(raw, revision=commit_of(loaded))
    else:
        names = [*FILE_SOURCES, *(entry.name for entry in catalogue.list_catalogue())]
        raise InputError(f'unknown source "{section.source}"', where="data.source", fix=nearest(section.source, names))


# ------------------------------------------------------------------------------------------------ arrays


def _read_npz(section: DataSection, base: Path, path: Path) -> Raw:
    image_key, label_key = section.image_column or "images", section.label_column or "labels"
    files: dict[SplitName, Path] = {"train": path}
    if section.validation_path:
        files["validation"] = base / Path(section.validation_path).expanduser()
    if section.test_path:
        files["test"] = base / Path(section.test_path).expanduser()
    splits: dict[SplitName, Rows] = {}
    for split, file in files.items():
        arrays = read_npz(file)
        if len(files) == 1 and f"train_{image_key}" in arrays:
            for own, prefix in (("train", "train_"), ("validation", "validation_"), ("test", "test_")):
                if f"{prefix}{image_key}" in arrays:
                    splits[_SPLIT_NAMES[own]] = _npz_rows(arrays, section, prefix, image_key, label_key, file)
        else:
            splits[split] = _npz_rows(arrays, section, "", image_key, label_key, file)
    return Raw(path.stem, str(path), splits)


def _npz_rows(
    arrays: Mapping[str, Array], section: DataSection, prefix: str, image_key: str, label_key: str, file: Path
) -> Rows:
    mask_key = section.mask_key or "mask"
    wanted = {"image_column": image_key, "label_column": label_key}
    if section.mask_key:
        wanted["mask_key"] = mask_key
    for key, name in wanted.items():
        if prefix + name not in arrays:
            raise InputError(
                f'no array "{prefix}{name}" in {file.name}',
                where=f"data.{key}, in {file}",
                evidence="keys found: " + ", ".join(sorted(arrays)),
                fix=f"name the array with data.{key}",
            )
    images = ArrayImages(arrays[prefix + image_key], f"{file}, {prefix}{image_key}")
    labels = arrays[prefix + label_key]
    mask = arrays.get(prefix + mask_key)
    _check_rows(len(images), len(labels), f"{file}, {prefix}{image_key} and {prefix}{label_key}")
    if mask is not None and section.task == "multilabel":
        if mask.shape != labels.shape:
            raise InputError(
                f"mask has shape {mask.shape}, labels have {labels.shape}", where=f"{file}, {prefix}{mask_key}"
            )
        labels = np.where(mask.astype(bool), labels.astype(np.float64), np.nan)
    return Rows(images, labels)


def _read_idx(path: Path, classes: tuple[str, ...] = ()) -> Raw:
    pairs: dict[SplitName, tuple[Path, Path]] = {}
    if path.is_dir():
        for file in sorted(path.iterdir()):
            prefix = file.name.split("-")[0]
            if "images" in file.name and prefix in _SPLIT_NAMES:
                pairs[_SPLIT_NAMES[prefix]] = (file, _label_file(file))
        if "train" not in pairs:
            raise InputError(
                "no training images",
                where=str(path),
                evidence="files found: " + (", ".join(sorted(file.name for file in path.iterdir())[:10]) or "none"),
                fix="the folder holds train-images-idx3-ubyte and train-labels-idx1-ubyte, plain or .gz",
            )
    else:
        pairs["train"] = (path, _label_file(path))
    splits: dict[SplitName, Rows] = {}
    for split, (image_file, label_file) in pairs.items():
        images, labels = ArrayImages(read_idx(image_file), str(image_file)), read_idx(label_file)
        _check_rows(len(images), len(labels), f"{image_file} and {label_file.name}")
        splits[split] = Rows(images, labels)
    return Raw(path.name, str(path), splits, classes)


def _label_file(images: Path) -> Path:
    name = images.name.replace("images", "labels").replace("idx3", "idx1").removesuffix(".gz")
    compressed = images.with_name(name + ".gz")
    return compressed if compressed.is_file() else images.with_name(name)


def _check_rows(images: int, labels: int, where: str) -> None:
    if images != labels:
        raise InputError(
            "images and labels differ in number",
            where=where,
            evidence=f"{images} images, {labels} labels",
            fix="write both from the same list of samples",
        )


def _read_catalogue(section: DataSection, progress: Progress) -> Raw:
    entry = catalogue.entry_of(section.source)
    if entry.name == "movie-snippets":
        texts, labels = catalogue.read_snippets(catalogue.fetch(entry.name, progress=progress))
        raw = Raw(entry.name, entry.name, {"train": Rows(texts, labels)}, entry.classes)
    elif entry.name == "fashion-mnist":
        raw = _read_idx(catalogue.fetch(entry.name, progress=progress), entry.classes)
    else:
        arrays = read_npz(PACKAGED)
        names: tuple[SplitName, ...] = ("train", "validation", "test")
        splits = {
            name: Rows(ArrayImages(arrays[f"{name}_images"], entry.name), arrays[f"{name}_labels"]) for name in names
        }
        raw = Raw(entry.name, entry.name, splits, entry.classes)
    return Raw(entry.name, entry.name, raw.splits, entry.classes, entry.licence, entry.citation)


# ------------------------------------------------------------------------------- tables, folders and the hub


@contextmanager
def _quiet_datasets() -> Iterator[Any]:
    """The `datasets` module, its progress bars off: ours are shown instead."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import datasets

    enabled = datasets.utils.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield datasets
    finally:
        if enabled:
            datasets.enable_progress_bars()


def load_from_hub(name: str, subset: str | None, revision: str | None) -> Any:
    """A `DatasetDict` of the hub, cached in edgestill's cache folder.

    Raises:
        EdgestillError: the hub cannot be reached.
        InputError: the hub has no such data set.
    """
    with _quiet_datasets() as datasets:
        try:
            return datasets.load_dataset(
                name, name=subset, revision=revision, cache_dir=str(catalogue.cache_folder().parent / "hub")
            )
        except datasets.exceptions.DatasetNotFoundError as error:
            raise InputError(
                f'the hub has no data set "{name}" that you may read',
                where="data.source",
                evidence=str(error).splitlines()[0],
                fix="check the name and the revision; for a private one, log in with `hf auth login`",
            ) from error
        except (OSError, EOFError) as error:  # ConnectionError, timeouts and offline mode are OSErrors
            raise EdgestillError(
                f"the Hugging Face hub cannot be asked for {name}",
                where="data.source",
                evidence=str(error).splitlines()[0],
                fix='connect to the network, or use a local copy: source = "parquet" (or imagefolder, csv) and path',
            ) from error
        except (ValueError, RuntimeError) as error:
            raise InputError(
                f"{name} cannot be read",
                where="data.source",
                evidence=str(error).splitlines()[0],
                fix="data.subset names one of several configurations",
            ) from error


def commit_of(loaded: Any) -> str | None:
    """The commit (40 hexadecimal digits) that a hub's `DatasetDict` was read from, None where it is not told.

    `datasets` keeps the converted tables in a folder that is named by the commit; asking the hub again instead would
    need the network, and could answer with a commit that came in between.
    """
    for table in loaded.values():
        for file in table.cache_files:
            name = Path(file["filename"]).parent.name
            if re.fullmatch(r"[0-9a-f]{40}", name):
                return name
    return None


def _read_table(section: DataSection, base: Path, path: Path, cache: Path) -> Raw:
    files: dict[SplitName, Path] = {"train": path}
    own: tuple[tuple[SplitName, str | None], ...] = (
        ("validation", section.validation_path),
        ("test", section.test_path),
    )
    for split, value in own:
        if value is not None:
            files[split] = base / Path(value).expanduser()
    if section.source == "imagefolder" and not path.is_dir():
        raise InputError(
            f"{section.path} is not a folder", where="data.path", fix="name the folder that holds one folder per class"
        )
    if path.is_dir() and len(files) > 1:
        other = "validation_path" if section.validation_path else "test_path"
        raise InputError(
            f'"{other}" belongs to a path that is a file, {section.path} is a folder',
            where=f"data.{other}",
            fix="name the training file with data.path, or keep all files of the splits in the folder",
        )
    loaded = load_table(section.source, path, files, cache)
    folder = path if path.is_dir() else path.parent
    return _from_datasets(loaded, section, path.stem, str(path), folder)


def load_table(source: str, path: Path, files: Mapping[SplitName, Path], cache: Path) -> Any:
    """A `DatasetDict` of a folder, or of table files.

    Args:
        source: imagefolder, csv, jsonl or parquet.
        path: the folder, else the training file.
        files: the file of each split, where `path` is a file.
        cache: for the converter's temporary files; the caller removes it after use.

    Raises:
        InputError: nothing in it, or not of that kind.
    """
    arguments: dict[str, Any] = {"cache_dir": str(cache)}
    if path.is_dir():
        arguments["data_dir"] = str(path)
    else:
        arguments["data_files"] = {split: str(file) for split, file in files.items()}
    with _quiet_datasets() as datasets:
        try:
            return datasets.load_dataset(_BUILDERS[source], **arguments)
        except Exception as error:  # the builders raise whatever pandas, pyarrow or fsspec raise
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            empty = (path.is_file() and path.stat().st_size == 0) or "corresponds to no data" in str(cause)
            raise InputError(
                f"{path.name} {'holds no samples' if empty else f'cannot be read as {source}'}",
                where=str(path),
                evidence=f"{type(cause).__name__}: {str(cause).splitlines()[0] if str(cause) else ''}",
                fix="one sample per row, the same columns in every row"
                if source != "imagefolder"
                else "one folder per class, images inside; or train/, validation/ and test/ with those inside",
            ) from error


def _from_datasets(loaded: Any, section: DataSection, name: str, where: str, folder: Path) -> Raw:
    """Columns of a `DatasetDict` as inputs and labels."""
    tables: dict[SplitName, Any] = {}
    for split, table in loaded.items():
        if split in _SPLIT_NAMES:
            tables[_SPLIT_NAMES[split]] = table
    if "train" not in tables:
        raise InputError(
            "no training split", where=where, evidence="splits found: " + ", ".join(loaded), fix='one is called "train"'
        )
    if len(tables["train"]) == 0:
        raise InputError(
            "no samples", where=where, fix="the first line of a table names its columns, each other line is a sample"
        )
    columns = list(tables["train"].column_names)
    features = tables["train"].features
    image_column, text_column = section.image_column, section.text_column
    if image_column is None and text_column is None:
        image_column = next((column for column in columns if type(features[column]).__name__ == "Image"), None)
        image_column = image_column or ("image" if "image" in columns else None)
        text_column = (
            None if image_column else next((column for column in ("text", "sentence") if column in columns), None)
        )
        if image_column is None and text_column is None:
            raise InputError(
                "which column holds the input?",
                where=where,
                evidence="columns: " + ", ".join(columns),
                fix="name it with data.image_column or data.text_column",
            )
    label_column = section.label_column or ("label" if "label" in columns or "labels" not in columns else "labels")
    for key, column in (
        ("image_column", image_column),
        ("text_column", text_column),
        ("split_column", section.split_column),
        *((("label_columns", column) for column in section.label_columns) if section.label_columns else ()),
        *((("label_column", label_column),) if not section.label_columns else ()),
    ):
        if column is not None and column not in columns:
            if key == "label_column" and section.source == "imagefolder" and section.label_column is None:
                raise InputError(
                    "the images have no classes",
                    where=where,
                    fix="put them into one folder per class, or write a metadata.csv with file_name and label columns",
                )
            raise InputError(
                f'no column "{column}"',
                where=f"data.{key}, in {where}",
                evidence="columns: " + ", ".join(columns),
                fix=nearest(column, columns),
            )
    if section.split_column is not None:
        if len(tables) > 1:
            raise InputError(
                '"split_column" belongs to data in one table, this one is split already',
                where=f"data.split_column, in {where}",
                evidence="splits found: " + ", ".join(tables),
                fix="remove the key",
            )
        tables = _split_by_column(tables["train"], section.split_column, where)
    files: list[Path] = []
    splits: dict[SplitName, Rows] = {}
    for split, table in tables.items():
        inputs: Images | Sequence[str]
        if text_column is not None:
            inputs = texts_of(table, text_column, f"{where}, {split}")
        else:
            assert image_column is not None
            inputs, found = images_of(table, image_column, folder, f"{where}, {split}")
            if section.source in ("csv", "jsonl", "parquet"):
                files += found
        labels: Sequence[Any] | Array
        if section.label_columns:
            labels = _matrix(table, section.label_columns, f"{where}, {split}")
        else:
            labels = table[label_column][:]
        splits[split] = Rows(inputs, labels)
    classes = () if section.label_columns else _class_names(features[label_column])
    return Raw(name, where, splits, section.label_columns or classes, files=tuple(files))


def _class_names(feature: Any) -> tuple[str, ...]:
    feature = getattr(feature, "feature", feature)
    names = getattr(feature, "names", None)
    return tuple(names) if names else ()


def _split_by_column(table: Any, column: str, where: str) -> dict[SplitName, Any]:
    rows: dict[SplitName, list[int]] = {}
    for row, value in enumerate(table[column][:]):
        name = str(value).strip().lower()
        if name not in _SPLIT_NAMES:
            raise InputError(
                f"unknown split {value!r}",
                where=f"{where}, column {column}, row {row}",
                fix="train, validation (or valid, val, dev) or test",
            )
        rows.setdefault(_SPLIT_NAMES[name], []).append(row)
    if "train" not in rows:
        raise InputError(
            "no training sample", where=f"{where}, column {column}", fix='give some rows the split "train"'
        )
    return {split: table.select(chosen) for split, chosen in rows.items()}


def texts_of(table: Any, column: str, where: str) -> list[str]:
    """The texts of a column.

    Raises:
        InputError: one of them is no text.
    """
    texts = table[column][:]
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(
                "a sample has no text", where=f"{where}, column {column}, row {row}", evidence=f"found {text!r}"
            )
    return list(texts)


def _matrix(table: Any, columns: Sequence[str], where: str) -> Array:
    """float64 (N, C), NaN where empty."""
    matrix = np.empty((len(table), len(columns)))
    for index, column in enumerate(columns):
        for row, value in enumerate(table[column][:]):
            try:
                matrix[row, index] = np.nan if value is None or value == "" else float(value)
            except (TypeError, ValueError) as error:
                raise InputError(
                    f"label {value!r} is not a number",
                    where=f"{where}, column {column}, row {row}",
                    fix="multilabel entries are 0, 1, or empty/NaN for unknown",
                ) from error
    return matrix


def images_of(table: Any, column: str, folder: Path, where: str) -> tuple[EncodedImages, list[Path]]:
    """The undecoded images of a column, and the files among them; `folder`: where relative paths start.

    Raises:
        InputError: a row without an image.
    """
    import datasets

    if type(table.features[column]).__name__ == "Image":
        entries = table.cast_column(column, datasets.Image(decode=False))[column][:]
    else:
        entries = table[column][:]
    sources: list[tuple[str, Path | bytes]] = []
    for row, entry in enumerate(entries):
        if isinstance(entry, dict):
            entry = entry.get("bytes") or entry.get("path")  # noqa: PLW2901
        if isinstance(entry, bytes):
            sources.append((f"{where}, column {column}, row {row}", entry))
        elif isinstance(entry, str) and entry:
            sources.append((entry, folder / entry))
        else:
            raise InputError(
                "a sample has no image", where=f"{where}, column {column}, row {row}", evidence=f"found {entry!r}"[:100]
            )
    return EncodedImages(sources), [source for _, source in sources if isinstance(source, Path)]
