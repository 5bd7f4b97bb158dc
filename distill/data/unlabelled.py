"""Inputs without labels, `[data.unlabelled]`: what generators learn from and what is explored around."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from distill.data.arrays import Array, read_idx, read_npz
from distill.data.dataset import Dataset
from distill.data.images import ArrayImages, EncodedImages, Images
from distill.data.load import FILES, decoded, files_unchanged, stamps, stream_seed
from distill.data.section import DataSection, Kind, UnlabelledSection
from distill.data.sources import images_of, load_table, read_source, source_paths, texts_of
from distill.data.text import encode, load_tokenizer
from profiles import artifact
from profiles.errors import InputError, nearest
from profiles.progress import Progress, Silent

KIND = "unlabelled data"
_FORM = 1
"""Raise it when the way the inputs are written changes, so that an older folder is made anew."""
_CHUNK = 4096
_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


@dataclass(frozen=True)
class Unlabelled:
    """Inputs without labels, in the shape of the data that they go with.

    inputs: (M, *shape), uint8 images or int64 tokens, memory-mapped. texts: the raw texts of token data, else None.
    key: hash of the content. name: what they are, for people.
    """

    inputs: Array
    texts: tuple[str, ...] | None
    key: str
    name: str

    def __len__(self) -> int:
        return len(self.inputs)


@dataclass(frozen=True)
class _Found:
    """A source as read: undecoded inputs, which of them to take, and files that a table named."""

    name: str
    inputs: Images | Sequence[str]
    rows: Array
    files: tuple[Path, ...] = ()
    key: str = "path"
    """Of the recipe, for messages."""


def load_unlabelled(
    section: DataSection,
    dataset: Dataset,
    *,
    seed: int,
    base: Path,
    folder: Path,
    progress: Progress | None = None,
) -> Unlabelled | None:
    """The unlabelled inputs of a recipe, in the shape of its data; None without `[data.unlabelled]`.

    Images are brought to the data's size by its resize rule and to its channels, texts are tokenised by its tokenizer.
    An input that is also in the validation or the test split (the same bytes after that, the same text) is dropped and
    the number of them is noted: a student that saw it, even without its label, would be judged too kindly.

    Args:
        section: the `[data]` table.
        dataset: what `load_dataset` made of it.
        seed: the recipe's; draws `size` of them (unless `split_seed` is set).
        base: folder that relative paths of the section start from.
        folder: their own artefact; reused when it was made from the same data, files and keys.
        progress: shows reading and decoding.

    Raises:
        InputError: anything wrong with the section or the inputs, naming file and key.
        EdgestillError: the folder cannot be written.
    """
    wanted = section.unlabelled
    if wanted is None:
        return None
    progress = progress or Silent()
    kind: Kind = "text" if dataset.input.kind == "tokens" else "image"
    if wanted.known_kind not in (None, kind):
        key = "text_column" if wanted.text_column else "image_column" if wanted.image_column else "source"
        raise InputError(
            wanted.other_kind_message(kind),
            where=f"data.unlabelled.{key}",
            fix="name texts" if kind == "text" else "name images",
        )
    path = _path(wanted, base)
    paths = source_paths(section, base) if path is None else [path]
    draw = seed if section.split_seed is None else section.split_seed
    key = artifact.content_key(
        KIND,
        _FORM,
        dataset.key,
        wanted,
        section.text_column if wanted.source in ("csv", "jsonl", "parquet") else None,
        section.channels,
        dataset.left_out if wanted.rest else None,
        draw if wanted.size is not None else None,
        stamps(paths, base),
    )
    if artifact.current(folder, KIND, key) is None or not files_unchanged(folder):
        with artifact.explain_os_errors(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
        with _read(section, wanted, dataset, path, base, folder.parent, progress) as found:
            chosen = _choose(found, wanted, draw)
            info: dict[str, Any] = {}
            with artifact.create(folder, KIND, key, info) as temporary:
                info.update(_write(section, dataset, found, chosen, temporary, progress))
    return open_unlabelled(folder)


def open_unlabelled(folder: Path) -> Unlabelled:
    """The inputs of a finished artefact, memory-mapped read-only.

    Raises:
        InputError: there is none.
    """
    manifest = artifact.read_manifest(folder, KIND)
    texts = folder / "texts.json"
    return Unlabelled(
        inputs=np.load(folder / "inputs.npy", mmap_mode="r"),
        texts=tuple(json.loads(texts.read_text(encoding="utf-8"))) if texts.is_file() else None,
        key=artifact.content_key(KIND, {name: value for name, value in manifest.files.items() if name != FILES}),
        name=manifest.info["name"],
    )


# ------------------------------------------------------------------------------------------------- reading


def _path(wanted: UnlabelledSection, base: Path) -> Path | None:
    if wanted.path is None:
        return None
    path = base / Path(wanted.path).expanduser()
    if not path.exists():
        there = sorted(entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else []
        raise InputError(
            f"no such file or folder: {wanted.path}",
            where=f"data.unlabelled.path, from {base}",
            fix=nearest(path.name, there[:50]) if there else f"{path.parent} does not exist either",
        )
    folders = ("imagefolder", "csv", "jsonl", "parquet", "idx")
    if path.is_dir() and wanted.source not in folders:
        raise InputError(
            f"{wanted.path} is a folder, a file is needed",
            where="data.unlabelled.path",
            fix=f'name the file; source = "{wanted.source}" reads one',
        )
    if path.is_file() and wanted.source == "imagefolder":
        raise InputError(
            f"{wanted.path} is not a folder", where="data.unlabelled.path", fix="name the folder that holds the images"
        )
    return path


@contextmanager
def _under(key: str) -> Iterator[None]:
    """Puts the recipe's key before the place that a reader names, where it does not name one itself."""
    try:
        yield
    except InputError as error:
        if error.where is not None and error.where.startswith("data.unlabelled."):
            raise
        where = f"data.unlabelled.{key}" + (f", {error.where}" if error.where else "")
        raise InputError(error.message, where=where, evidence=error.evidence, fix=error.fix) from error


@contextmanager
def _read(
    section: DataSection,
    wanted: UnlabelledSection,
    dataset: Dataset,
    path: Path | None,
    base: Path,
    scratch: Path,
    progress: Progress,
) -> Iterator[_Found]:
    if path is None:
        with _rest(section, dataset, base, scratch, progress) as found:
            yield found
    elif wanted.source in ("csv", "jsonl", "parquet"):
        temporary = Path(tempfile.mkdtemp(prefix=".datasets-", dir=scratch))
        try:
            with _under("path"):
                found = _table(section, wanted, dataset, path, temporary)
            yield found
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    else:
        with _under("path"):
            inputs = _inputs(wanted, path)
            if len(inputs) == 0:
                raise InputError(f"{path.name} holds no samples", where=str(path), fix="name another file or folder")
        yield _Found(path.stem if path.is_file() else path.name, inputs, np.arange(len(inputs)))


@contextmanager
def _rest(section: DataSection, dataset: Dataset, base: Path, scratch: Path, progress: Progress) -> Iterator[_Found]:
    """The training samples of the data's own source that are in no split."""
    left_out = dataset.left_out
    if left_out is None or len(left_out) == 0:
        unused = section.train_size is None and section.imbalance is None
        raise InputError(
            "nothing of the training samples is left over",
            where="data.unlabelled.rest",
            evidence="neither data.train_size nor data.imbalance is set, so all of them are used with their labels"
            if unused
            else f"all {len(dataset.train)} training samples are used with their labels",
            fix="set data.train_size to fewer than there are, or name unlabelled inputs with source and path",
        )
    if dataset.revision is not None:  # what the hub had when the splits were made, not what it has now
        section = section.model_copy(update={"revision": dataset.revision})
    with read_source(section, base, scratch, progress) as raw:
        inputs = raw.splits["train"].inputs
        if len(inputs) != dataset.train.source_size:
            raise InputError(
                "the data has changed since it was split",
                where=f"data.unlabelled.rest, {raw.where}",
                evidence=f"{len(inputs)} training samples, there were {dataset.train.source_size}",
                fix="delete the run's data folder; it is made anew",
            )
        yield _Found(f"rest of {dataset.name}", inputs, left_out, raw.files, "rest")


def _inputs(wanted: UnlabelledSection, path: Path) -> Images | list[str]:
    if wanted.source == "lines":
        return _lines(path)
    if wanted.source == "imagefolder":
        return _image_files(path)
    if wanted.source == "npz":
        arrays, key = read_npz(path), wanted.image_column or "images"
        if key not in arrays:
            raise InputError(
                f'no array "{key}" in {path.name}',
                where=f"data.unlabelled.image_column, in {path}",
                evidence="keys found: " + ", ".join(sorted(arrays)),
                fix="name the array with data.unlabelled.image_column",
            )
        return ArrayImages(arrays[key], f"{path}, {key}")
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if "images" in file.name and file.is_file())
        if len(files) != 1:
            raise InputError(
                f"{path.name} holds {len(files) or 'no'} image files",
                where=str(path),
                evidence=", ".join(file.name for file in files[:10]) or None,
                fix="name the one to use, such as train-images-idx3-ubyte, with data.unlabelled.path",
            )
    return ArrayImages(read_idx(files[0]), str(files[0]))


def _lines(path: Path) -> list[str]:
    """The lines of a text file; empty ones are no texts."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            texts = [line.strip() for line in file]
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path.name} is not a UTF-8 text", where=str(path), evidence=str(error), fix="save it as UTF-8"
        ) from error
    return [text for text in texts if text]


def _image_files(folder: Path) -> EncodedImages:
    """Every image in or under the folder, in the order of the paths; hidden files and other kinds are passed over."""
    files = [file for file in sorted(folder.rglob("*")) if not file.name.startswith(".") and file.is_file()]
    images = [file for file in files if file.suffix.lower() in _SUFFIXES]
    if not images:
        raise InputError(
            f"no image in {folder.name}",
            where=str(folder),
            evidence=f"{len(files)} other files, the first is {files[0].name}" if files else "the folder is empty",
            fix="images end in " + ", ".join(_SUFFIXES),
        )
    return EncodedImages([(str(file.relative_to(folder)), file) for file in images])


def _table(section: DataSection, wanted: UnlabelledSection, dataset: Dataset, path: Path, temporary: Path) -> _Found:
    import datasets

    loaded = load_table(str(wanted.source), path, {"train": path}, temporary)
    table = datasets.concatenate_datasets(list(loaded.values()))
    columns = list(table.column_names)
    if len(table) == 0:
        raise InputError(f"{path.name} holds no samples", where=str(path), fix="one sample per row, below the names")
    texts = dataset.input.kind == "tokens"
    key = "text_column" if texts else "image_column"
    column = wanted.text_column if texts else wanted.image_column
    if column is None:
        usual = (section.text_column, "text", "sentence") if texts else (section.image_column, "image")
        pictures = [name for name in columns if not texts and type(table.features[name]).__name__ == "Image"]
        column = next((name for name in (*usual, *pictures) if name in columns), None)
    if column is None or column not in columns:
        raise InputError(
            f"which column holds the {'texts' if texts else 'images'}?" if column is None else f'no column "{column}"',
            where=f"data.unlabelled.{key}, in {path}",
            evidence="columns: " + ", ".join(columns),
            fix=f"name it with data.unlabelled.{key}" if column is None else nearest(column, columns),
        )
    if texts:
        return _Found(path.stem, texts_of(table, column, str(path)), np.arange(len(table)))
    images, files = images_of(table, column, path if path.is_dir() else path.parent, str(path))
    return _Found(path.stem, images, np.arange(len(table)), tuple(files))


def _choose(found: _Found, wanted: UnlabelledSection, seed: int) -> Array:
    """Rows to take, ascending."""
    if wanted.size is None:
        return found.rows
    if wanted.size > len(found.rows):
        raise InputError(
            f"size = {wanted.size} is more than there is",
            where="data.unlabelled.size",
            evidence=f"{len(found.rows)} unlabelled samples",
            fix="leave the key out to use all",
        )
    order = np.random.default_rng(stream_seed(seed, 5)).permutation(found.rows)
    return np.sort(order[: wanted.size])


# ------------------------------------------------------------------------------------------------- writing


def _write(
    section: DataSection, dataset: Dataset, found: _Found, rows: Array, folder: Path, progress: Progress
) -> dict[str, Any]:
    """Everything of the artefact into `folder`; returns the manifest's info."""
    if dataset.input.kind == "tokens":
        kept = _write_texts(dataset, cast(Sequence[str], found.inputs), rows, folder, progress)
    else:
        images = cast(Images, found.inputs)
        with _under(found.key):
            if dataset.input.shape[0] == 1 and section.channels == "auto":
                _refuse_colour(images, rows, progress)
            kept = _write_images(section, dataset, images, rows, folder, progress)
    if kept == 0:
        raise InputError(
            "every unlabelled sample is also in the validation or the test split",
            where=f"data.unlabelled.{found.key}",
            evidence=f"{len(rows)} samples, all of them dropped",
            fix="name inputs that the student is not judged on",
        )
    if kept < len(rows):
        progress.note(
            f"{len(rows) - kept} of {len(rows)} unlabelled samples are also in the validation or the test split; "
            "they are left out"
        )
    if found.files:
        artifact.write_text(folder / FILES, json.dumps(stamps([file.absolute() for file in found.files], Path("/"))))
    return {
        "form": _FORM,
        "name": found.name,
        "samples": kept,
        "dropped": len(rows) - kept,
        "of": len(found.rows),
        "data": dataset.key,
        "input": {"kind": dataset.input.kind, "shape": list(dataset.input.shape)},
        "preprocessing": dataset.preprocessing,
    }


def _write_texts(dataset: Dataset, texts: Sequence[str], rows: Array, folder: Path, progress: Progress) -> int:
    judged = {text for split in (dataset.validation, dataset.test) for text in split.texts or ()}
    kept = [text for text in (texts[row] for row in rows.tolist()) if text not in judged]
    if not kept:
        return 0
    assert dataset.tokenizer is not None
    tokenizer = load_tokenizer(dataset.tokenizer)
    length = dataset.input.shape[0]
    target = np.lib.format.open_memmap(folder / "inputs.npy", "w+", np.int64, (len(kept), length))
    with progress.task("tokenising unlabelled texts", len(kept)) as task:
        for start in range(0, len(kept), _CHUNK):
            chunk = kept[start : start + _CHUNK]
            target[start : start + len(chunk)] = encode(tokenizer, chunk, length)
            task.advance(len(chunk))
    target.flush()
    (folder / "texts.json").write_text(json.dumps(kept, ensure_ascii=False), encoding="utf-8")
    return len(kept)


def _write_images(
    section: DataSection, dataset: Dataset, images: Images, rows: Array, folder: Path, progress: Progress
) -> int:
    judged = {_digest(image) for split in (dataset.validation, dataset.test) for image in split.inputs}
    channels, height, width = dataset.input.shape
    place, count = folder / "inputs.npy", 0
    target = np.lib.format.open_memmap(place, "w+", np.uint8, (len(rows), *dataset.input.shape))
    with progress.task("reading unlabelled images", len(rows)) as task:
        for chunk in decoded(images, rows, (height, width), section.resize, channels):
            fresh = [index for index, image in enumerate(chunk) if _digest(image) not in judged]
            target[count : count + len(fresh)] = chunk[fresh]
            count += len(fresh)
            task.advance(len(chunk))
    target.flush()
    del target
    if 0 < count < len(rows):
        _shorten(place, count)
    return count


def _digest(image: Array) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16).digest()


def _shorten(place: Path, count: int) -> None:
    """Writes the file anew with its first `count` rows: the header holds their number."""
    longer = place.with_name("longer.npy")
    place.rename(longer)
    source = np.load(longer, mmap_mode="r")
    target = np.lib.format.open_memmap(place, "w+", source.dtype, (count, *source.shape[1:]))
    for start in range(0, count, _CHUNK):
        end = min(start + _CHUNK, count)
        target[start:end] = source[start:end]
    target.flush()
    del source, target
    longer.unlink()


def _refuse_colour(images: Images, rows: Array, progress: Progress) -> None:
    """Grey data, found to be so by its images, and colour beside it: making that grey is for the user to say."""
    # an array's rows are all alike
    chosen = rows[:1] if isinstance(images, ArrayImages) else rows
    with progress.task("reading unlabelled images' headers", len(chosen)) as task:
        for row in chosen.tolist():
            if not images.describe(row)[2]:
                raise InputError(
                    "an unlabelled image is in colour, the data is grey",
                    where=images.name(row),
                    evidence='data.channels = "auto" made the data grey, because all of its images are',
                    fix="data.channels = 1 makes every image grey; 3 keeps the colours and makes the data RGB",
                )
            task.advance()
