"""What a user's data looks like from outside: kind, columns, sizes. Loading it checks the rest."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from profiles.errors import InputError

_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
_TABLES = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".npz": "npz"}
_SPLITS = frozenset({"train", "training", "validation", "valid", "val", "dev", "test", "testing"})
_LOOK_AT_IMAGES = 24
_USUAL_SIZE = 128
"""Pixels: keeps the detail of most photos, and a student for it trains on a laptop."""

_IMAGE_NAMES = ("image", "images", "image_path", "path", "file", "filename", "file_name", "img", "photo")
_TEXT_NAMES = ("text", "sentence", "review", "content", "document", "comment", "title", "body")
_LABEL_NAMES = ("label", "labels", "class", "category", "target", "tags", "tag", "y")
_SPLIT_NAMES = ("split", "subset", "partition", "fold")


@dataclass(frozen=True)
class OwnData:
    """A guess at the `[data]` table.

    `path` is None for a data set that is named, not stored here. `columns` are those of a table or the keys of an npz.
    `image_size` is None where the images' own size will do.
    """

    source: str
    path: Path | None
    columns: tuple[str, ...] = ()
    image_column: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    split_column: str | None = None
    image_size: int | None = None
    named_texts: bool = False
    """A data set that is named, not looked into, and holds texts."""
    seen: str = ""
    """What it was recognised by, one line."""

    @property
    def is_text(self) -> bool:
        """Whether a sample is a text."""
        return self.named_texts or self.text_column is not None

    @property
    def other_columns(self) -> tuple[str, ...]:
        """Columns that are neither the input nor the split: in a table with one column per class, the classes."""
        used = {self.image_column, self.text_column, self.split_column}
        return tuple(name for name in self.columns if name not in used)


def look_at(place: str, catalogue: Mapping[str, str] | None = None) -> OwnData:
    """Recognises a folder of images, a table, arrays, a catalogue name or a hub name.

    Args:
        place: path or name.
        catalogue: what the catalogue's data sets hold, by name: "image" or "text".

    Raises:
        InputError: nothing is there, or it is of no known kind, or holds too little to learn from.
    """
    if catalogue is not None and place in catalogue:
        return OwnData(place, None, named_texts=catalogue[place] == "text", seen="a data set of the catalogue")
    path = Path(place).expanduser()
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        return _file(path)
    parts = place.split("/")
    if len(parts) == 2 and all(parts) and parts[0] not in (".", "..", "~") and not Path(place).suffix:
        return OwnData(place, None, seen="a data set of the Hugging Face hub")
    raise InputError(
        f"there is no {place}",
        where="--data",
        evidence="neither a file nor a folder, nor a name of the catalogue, nor owner/name of the hub",
        fix="edgestill data list",
    )


def _folder(path: Path) -> OwnData:
    if any(path.glob("*-ubyte*")):
        return OwnData("idx", path, seen="IDX files (as MNIST comes)")
    folders = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    splits = [entry for entry in folders if entry.name.lower() in _SPLITS]
    classes = folders
    if splits and len(splits) == len(folders):
        training = next((entry for entry in splits if entry.name.lower().startswith("train")), splits[0])
        classes = sorted(entry for entry in training.iterdir() if entry.is_dir())
    images = [image for folder in classes for image in _some_images(folder)]
    if images:
        if len(classes) < 2:
            raise InputError(
                "all images are in one class, so there is nothing to tell apart",
                where=str(path),
                evidence=f"the only folder with images is {classes[0].name}",
                fix="one folder per class: photos/cat/..., photos/dog/...",
            )
        return OwnData(
            "imagefolder",
            path,
            image_size=_size_of(images),
            seen=f"{len(classes)} folders of images: {', '.join(entry.name for entry in classes[:4])}"
            + (", ..." if len(classes) > 4 else ""),
        )
    tables = sorted(entry for entry in path.iterdir() if entry.suffix.lower() in _TABLES)
    if len(tables) == 1:
        return _file(tables[0])
    raise InputError(
        f"{path} holds no data of a known kind",
        where=str(path),
        evidence=f"several tables: {', '.join(entry.name for entry in tables)}" if tables else "no images in folders",
        fix="name one file" if tables else "one folder of images per class, or a csv, jsonl, parquet or npz file",
    )


def _some_images(folder: Path) -> list[Path]:
    found: list[Path] = []
    for entry in sorted(folder.rglob("*")):
        if entry.suffix.lower() in _IMAGES:
            found.append(entry)
            if len(found) == 4:
                break
    return found


def _size_of(images: Sequence[Path]) -> int | None:
    """None when a look at some of them finds one small size, else the usual size."""
    from PIL import Image, UnidentifiedImageError

    sizes = set()
    step = max(1, len(images) // _LOOK_AT_IMAGES)
    for path in images[::step]:
        try:
            with Image.open(path) as image:
                sizes.add(image.size)
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
            continue  # loading the data names every image that cannot be read
    if len(sizes) == 1 and max(sizes.copy().pop()) <= _USUAL_SIZE:
        return None
    return _USUAL_SIZE


def _file(path: Path) -> OwnData:
    source = _TABLES.get(path.suffix.lower())
    if source is None:
        raise InputError(
            f"{path.name} is of no known kind",
            where=str(path),
            evidence=f'its ending is "{path.suffix}"',
            fix="csv, jsonl, parquet or npz, or a folder of images",
        )
    columns = _columns(path, source)
    image = _first(_IMAGE_NAMES, columns)
    text = None if image or source == "npz" else _first(_TEXT_NAMES, columns)
    return OwnData(
        source,
        path,
        columns=columns,
        image_column=image,
        text_column=text,
        label_column=_first(_LABEL_NAMES, columns),
        split_column=None if source == "npz" else _first(_SPLIT_NAMES, columns),
        image_size=_USUAL_SIZE if image and source != "npz" else None,
        seen=f"a {source} file with {'the arrays' if source == 'npz' else 'the columns'} {', '.join(columns[:8])}"
        + (", ..." if len(columns) > 8 else ""),
    )


def _columns(path: Path, source: str) -> tuple[str, ...]:
    try:
        if source == "csv":
            with path.open(encoding="utf-8-sig", newline="") as file:
                return tuple(next(csv.reader(file), ()))
        if source == "jsonl":
            with path.open(encoding="utf-8") as file:
                first = json.loads(file.readline() or "{}")
            return tuple(first) if isinstance(first, dict) else ()
        if source == "parquet":
            from pyarrow import parquet

            return tuple(parquet.read_schema(path).names)
        import numpy as np

        with np.load(path, allow_pickle=False) as arrays:
            return tuple(arrays.files)
    except Exception as error:  # every reader has its own errors for a damaged file
        raise InputError(
            f"cannot read {path.name} as {source}", where=str(path), evidence=" ".join(str(error).split())
        ) from error


def _first(wanted: Sequence[str], columns: Sequence[str]) -> str | None:
    lower = {column.lower(): column for column in reversed(columns)}
    return next((lower[name] for name in wanted if name in lower), None)
