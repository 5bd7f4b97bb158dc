"""`load_dataset`: any source, split, resized or tokenised once into the run's data folder, memory-mapped ever after."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np

from distill.data.arrays import Array
from distill.data.dataset import Dataset, InputSpec, Split, SplitName
from distill.data.images import ArrayImages, Images
from distill.data.labels import Labels, check_classes, parse_labels
from distill.data.section import AugmentSection, DataSection, Resize, imbalance_factor
from distill.data.sources import Raw, read_source, source_paths
from distill.data.splits import take_balanced, take_long_tail, take_stratified
from distill.data.text import encode, load_tokenizer, pad_id, train_tokenizer
from profiles import artifact
from profiles.errors import InputError
from profiles.progress import Progress, Silent

KIND = "data"
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")
_CHUNK = 512
_FORM = 1
"""Raise it when the way a data set is written changes, so that an older folder is made anew."""


def load_dataset(
    section: DataSection, *, seed: int, base: Path, folder: Path, progress: Progress | None = None
) -> Dataset:
    """The data of a recipe.

    Args:
        section: the `[data]` table.
        seed: the recipe's seed; makes the splits where none are given (unless `split_seed` is set).
        base: folder that relative paths of the section start from.
        folder: the run's data artefact; reused when it was made from the same files and keys.
        progress: shows reading and decoding.

    Raises:
        InputError: anything wrong with the section or the data, naming file and key.
        EdgestillError: a download failed, or the folder cannot be written.
    """
    progress = progress or Silent()
    split_seed = seed if section.split_seed is None else section.split_seed
    key = artifact.content_key(
        KIND,
        _FORM,
        section.model_dump(mode="json", exclude={"augment", "split_seed", "unlabelled"}),
        split_seed,
        stamps(source_paths(section, base), base),
    )
    manifest = artifact.current(folder, KIND, key)
    if manifest is None or not files_unchanged(folder):
        with artifact.explain_os_errors(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
        with read_source(section, base, folder.parent, progress) as raw:
            _check_section(section, raw)
            info: dict[str, Any] = {}
            with artifact.create(folder, KIND, key, info) as temporary:
                info.update(_write(section, raw, split_seed, base, temporary, progress))
    return open_dataset(folder)


def open_dataset(folder: Path) -> Dataset:
    """The dataset of a finished data artefact, arrays memory-mapped read-only.

    Raises:
        InputError: no finished data artefact there, or one of another form.
    """
    manifest = artifact.read_manifest(folder, KIND)
    info = manifest.info
    if info.get("form") != _FORM:
        raise InputError(
            "another version of edgestill wrote this data folder",
            where=str(folder),
            fix=f"delete {folder}; it is made anew",
        )
    spec = InputSpec(
        kind=info["input"]["kind"],
        shape=tuple(info["input"]["shape"]),
        mean=tuple(info["input"]["mean"]),
        std=tuple(info["input"]["std"]),
        vocabulary=info["input"]["vocabulary"],
        pad_id=info["input"]["pad_id"],
    )
    splits = {}
    for name in SPLITS:
        mask, texts = folder / f"{name}_mask.npy", folder / f"{name}_texts.json"
        splits[name] = Split(
            inputs=np.load(folder / f"{name}_inputs.npy", mmap_mode="r"),
            labels=np.load(folder / f"{name}_labels.npy"),
            mask=np.load(mask) if mask.is_file() else None,
            texts=tuple(json.loads(texts.read_text(encoding="utf-8"))) if texts.is_file() else None,
            rows=np.load(folder / f"{name}_rows.npy"),
            source=info["sources"][name][0],
            source_size=info["sources"][name][1],
        )
    content = {name: value for name, value in manifest.files.items() if name != FILES}
    return Dataset(
        name=info["name"],
        task=info["task"],
        classes=tuple(info["classes"]),
        input=spec,
        train=splits["train"],
        validation=splits["validation"],
        test=splits["test"],
        key=artifact.content_key(KIND, content, info["classes"], info["task"], info["input"], info["preprocessing"]),
        preprocessing=info["preprocessing"],
        licence=info["licence"],
        citation=info["citation"],
        revision=info["revision"],
        tokenizer=folder / "tokenizer.json" if spec.kind == "tokens" else None,
        left_out=np.load(folder / _LEFT_OUT) if (folder / _LEFT_OUT).is_file() else _left_out(splits),
    )


def _left_out(splits: dict[SplitName, Split]) -> Array:
    """Rows of the source's training split that no split took, where no class was thinned out."""
    taken = np.zeros(splits["train"].source_size or 0, bool)
    for split in splits.values():
        if split.source == "train":
            taken[split.rows] = True
    return np.flatnonzero(~taken)


# ------------------------------------------------------------------------------ is what lies there still right?

FILES = "files.json"
"""In the artefact: size and time of the image files that a table named, to notice when one of them changes."""
_LEFT_OUT = "left_out_rows.npy"
"""In the artefact where `imbalance` is used: there, a row that is in no split may be one left out of the test split."""


def stamps(paths: Sequence[Path], base: Path) -> list[tuple[str, int, int]]:
    """(path, size, modification time in ns) of every file in or under `paths`."""
    found = []
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                state = file.stat()
                found.append((os.path.relpath(file, base), state.st_size, state.st_mtime_ns))
    return found


def files_unchanged(folder: Path) -> bool:
    """Whether the image files that a table named are as they were when the artefact in `folder` was made."""
    if not (folder / FILES).is_file():
        return True
    for name, size, time in json.loads((folder / FILES).read_text(encoding="utf-8")):
        try:
            state = Path("/", name).stat()  # stored relative to the root
        except OSError:
            return False
        if (state.st_size, state.st_mtime_ns) != (size, time):
            return False
    return True


# ------------------------------------------------------------------------------------------------- writing


_NO_AUGMENT = AugmentSection()


def _check_section(section: DataSection, raw: Raw) -> None:
    augment = section.augment
    if raw.is_text and (augment.crop or augment.flip or augment.erase):
        raise InputError(
            "texts cannot be cropped, flipped or erased",
            where="data.augment",
            fix="remove these keys: texts have no views",
        )
    if raw.is_text and (augment.views, augment.reuse_clean_teacher) != (_NO_AUGMENT.views, False):
        raise InputError(
            "texts have no views",
            where="data.augment",
            fix="remove views and reuse_clean_teacher: they belong to images",
        )
    wrong = section.keys_of_other_kind("text" if raw.is_text else "image")
    if wrong:
        raise InputError(section.other_kind_message(wrong[0]), where=f"data.{wrong[0]}", fix="remove the key")
    for name in ("validation", "test"):
        if name in raw.splits and section.is_changed(f"{name}_fraction"):
            raise InputError(
                f'"{name}_fraction" belongs to data without a {name} split, this one has its own',
                where=f"data.{name}_fraction, {raw.where}",
                evidence=f"{len(raw.splits[name].inputs)} {name} samples",
                fix="remove the key",
            )
    draws = section.train_size is not None or section.imbalance is not None
    draws = draws or (section.unlabelled is not None and section.unlabelled.size is not None)
    if section.split_seed is not None and not draws and all(name in raw.splits for name in SPLITS):
        raise InputError(
            '"split_seed" belongs to splits that are made, this data has all of them',
            where=f"data.split_seed, {raw.where}",
            fix="remove the key",
        )
    if not section.classes or not raw.classes or section.label_columns:
        return
    if len(section.classes) != len(raw.classes):
        raise InputError(
            f"data.classes names {len(section.classes)} classes, the source has {len(raw.classes)}",
            where="data.classes",
            evidence=", ".join(raw.classes),
            fix="rename all of them, in this order, or leave the key out",
        )


def _write(section: DataSection, raw: Raw, seed: int, base: Path, folder: Path, progress: Progress) -> dict[str, Any]:
    """Everything of the artefact into `folder`; returns the manifest's info."""
    for name, source in raw.splits.items():
        if len(source.inputs) == 0:
            raise InputError(f"no {name} samples", where=raw.where)
    classes, labels = parse_labels(
        {name: rows.labels for name, rows in raw.splits.items()}, section, raw.classes, raw.where
    )
    rows = _choose_rows(section, raw, labels, classes, seed)
    imbalance: dict[str, Any] = {}
    if section.imbalance is not None:
        rows, imbalance = _thin_out(section.imbalance, rows, labels, classes, seed, folder, progress)
    chosen = {name: labels[source].take(index) for name, (source, index) in rows.items()}
    check_classes(chosen, classes, raw.where)
    for name, (_, index) in rows.items():
        np.save(folder / f"{name}_rows.npy", index)
        np.save(folder / f"{name}_labels.npy", chosen[name].values)
        mask = chosen[name].mask
        if mask is not None:
            np.save(folder / f"{name}_mask.npy", mask)
    if raw.is_text:
        spec, preprocessing = _write_texts(section, raw, rows, base, folder, progress)
    else:
        spec, preprocessing = _write_images(section, raw, rows, folder, progress)
    if raw.files:
        artifact.write_text(folder / FILES, json.dumps(stamps([file.absolute() for file in raw.files], Path("/"))))
    return {
        "form": _FORM,
        "name": raw.name,
        "task": section.task,
        "classes": list(classes),
        "samples": {name: len(index) for name, (_, index) in rows.items()},
        "samples_of_class": {name: _samples_of_class(chosen[name], classes) for name in rows},
        "split": {
            "seed": seed,
            "made": [name for name in SPLITS if name not in raw.splits],
            "stratified": True,
            **imbalance,
        },
        "sources": {name: [source, len(labels[source])] for name, (source, _) in rows.items()},
        "input": {
            "kind": spec.kind,
            "shape": list(spec.shape),
            "mean": list(spec.mean),
            "std": list(spec.std),
            "vocabulary": spec.vocabulary,
            "pad_id": spec.pad_id,
        },
        "preprocessing": preprocessing,
        "licence": raw.licence,
        "citation": raw.citation,
        "revision": raw.revision,
    }


def _choose_rows(
    section: DataSection, raw: Raw, labels: dict[SplitName, Labels], classes: tuple[str, ...], seed: int
) -> dict[SplitName, tuple[SplitName, Array]]:
    """For each split: the source's split that its samples come from, and their rows in it."""
    rows: dict[SplitName, tuple[SplitName, Array]] = {
        name: (name, np.arange(len(labels[name]))) for name in SPLITS if name in labels
    }

    def take(size: int, stream: int, where: str) -> tuple[Array, Array]:
        train = rows["train"][1]
        rest, taken = take_stratified(
            labels["train"].take(train), size, seed=stream_seed(seed, stream), where=where, classes=classes
        )
        return train[rest], train[taken]

    given = len(labels["train"])
    for stream, (name, fraction) in enumerate(
        (("test", section.test_fraction), ("validation", section.validation_fraction))
    ):
        split = cast(SplitName, name)
        if split not in rows:
            size = max(1, round(given * fraction))
            rest, taken = take(size, stream, f"data.{name}_fraction = {fraction}, {raw.where}")
            rows["train"], rows[split] = ("train", rest), ("train", taken)
    if section.train_size is not None and section.train_size != len(rows["train"][1]):
        if section.train_size > len(rows["train"][1]):
            raise InputError(
                f"train_size = {section.train_size} is more than there is",
                where="data.train_size",
                evidence=f"{len(rows['train'][1])} training samples",
                fix="leave the key out to use all",
            )
        rows["train"] = ("train", take(section.train_size, 2, f"data.train_size = {section.train_size}")[1])
    return {name: rows[name] for name in SPLITS}


def stream_seed(seed: int, stream: int) -> int:
    """The seed of one of the draws that a data set needs: 0 test, 1 validation, 2 train_size, 3 and 4 imbalance, 5 the
    unlabelled inputs."""
    return int(np.random.SeedSequence([seed & (2**63 - 1), stream]).generate_state(1)[0])


def _thin_out(
    word: str,
    rows: dict[SplitName, tuple[SplitName, Array]],
    labels: dict[SplitName, Labels],
    classes: tuple[str, ...],
    seed: int,
    folder: Path,
    progress: Progress,
) -> tuple[dict[SplitName, tuple[SplitName, Array]], dict[str, Any]]:
    """A long-tailed training split and a balanced test split out of `rows`, and what the manifest says about it."""
    train = rows["train"][1]
    kept = take_long_tail(
        labels["train"].take(train), imbalance_factor(word), seed=stream_seed(seed, 3), classes=classes
    )
    source, test = rows["test"]
    even = take_balanced(labels[source].take(test), seed=stream_seed(seed, 4), where="data.imbalance", classes=classes)
    thinned: dict[SplitName, tuple[SplitName, Array]] = {
        **rows,
        "train": ("train", train[kept]),
        "test": (source, test[even]),
    }
    given, used = np.arange(len(labels["train"])), thinned["train"][1]
    others = [index for name, (origin, index) in rows.items() if origin == "train" and name != "train"]
    left_out = np.setdiff1d(given, np.concatenate([used, *others]))
    np.save(folder / _LEFT_OUT, left_out)
    counts = np.bincount(labels["train"].values[used], minlength=len(classes))
    progress.note(
        f"imbalance {word}: {counts.max()} to {counts.min()} training samples per class"
        + (
            f"; {len(test) - len(even)} test samples left out, so that classes are equally many"
            * (len(even) < len(test))
        )
    )
    return thinned, {
        "imbalance": word,
        "left_out": {"train": len(left_out), "test": len(test) - len(even)},
    }


def _samples_of_class(labels: Labels, classes: tuple[str, ...]) -> dict[str, int]:
    """By name; multilabel: known positives."""
    if labels.values.ndim == 1:
        counts = np.bincount(labels.values, minlength=len(classes))
    else:
        counts = (labels.values.astype(bool) if labels.mask is None else labels.values.astype(bool) & labels.mask).sum(
            0
        )
    return {name: int(count) for name, count in zip(classes, counts, strict=True)}


def _write_texts(
    section: DataSection,
    raw: Raw,
    rows: dict[SplitName, tuple[SplitName, Array]],
    base: Path,
    folder: Path,
    progress: Progress,
) -> tuple[InputSpec, dict[str, Any]]:
    texts = {
        name: [cast(Sequence[str], raw.splits[source].inputs)[row] for row in index.tolist()]
        for name, (source, index) in rows.items()
    }
    if section.tokenizer is None:
        progress.note(f"training a tokenizer on {len(texts['train'])} training texts")
        tokenizer = train_tokenizer(texts["train"], section.vocabulary)
    else:
        tokenizer = load_tokenizer(base / Path(section.tokenizer).expanduser())
    with progress.task("tokenising", sum(map(len, texts.values()))) as task:
        for name in SPLITS:
            np.save(folder / f"{name}_inputs.npy", encode(tokenizer, texts[name], section.length))
            (folder / f"{name}_texts.json").write_text(json.dumps(texts[name], ensure_ascii=False), encoding="utf-8")
            task.advance(len(texts[name]))
    padding = pad_id(tokenizer)
    tokenizer.enable_truncation(section.length)
    tokenizer.enable_padding(length=section.length, pad_id=padding, pad_token=tokenizer.id_to_token(padding) or "[PAD]")
    tokenizer.save(str(folder / "tokenizer.json"))
    spec = InputSpec("tokens", (section.length,), vocabulary=tokenizer.get_vocab_size(), pad_id=padding)
    return spec, {
        "kind": "tokens",
        "tokenizer": "tokenizer.json",
        "trained_here": section.tokenizer is None,
        "length": section.length,
        "vocabulary": spec.vocabulary,
        "pad_id": spec.pad_id,
        "dtype": "int64",
    }


def _write_images(
    section: DataSection,
    raw: Raw,
    rows: dict[SplitName, tuple[SplitName, Array]],
    folder: Path,
    progress: Progress,
) -> tuple[InputSpec, dict[str, Any]]:
    images = {name: cast(Images, raw.splits[name].inputs) for name in raw.splits}
    size, channels = _size_and_channels(section, images, rows, raw.where, progress)
    histogram = np.zeros((channels, 256), np.int64)
    with progress.task("reading images", sum(len(index) for _, index in rows.values())) as task:
        for name, (source, index) in rows.items():
            target = np.lib.format.open_memmap(
                folder / f"{name}_inputs.npy", "w+", np.uint8, (len(index), channels, *size)
            )
            start = 0
            for chunk in decoded(images[source], index, size, section.resize, channels):
                target[start : start + len(chunk)] = chunk
                start += len(chunk)
                if name == "train":
                    for channel in range(channels):
                        histogram[channel] += np.bincount(chunk[:, channel].reshape(-1), minlength=256)
                task.advance(len(chunk))
            target.flush()
            del target
    mean, std = _moments(histogram)
    spec = InputSpec("image", (channels, *size), mean=mean, std=std)
    return spec, {
        "kind": "image",
        "image_size": list(size),
        "resize": section.resize,
        "interpolation": "bilinear",
        "antialias": True,
        "letterbox_fill": 0,
        "channels": channels,
        "colour_order": "grey" if channels == 1 else "RGB",
        "layout": "NCHW",
        "dtype": "uint8",
        "mean": list(mean),
        "std": list(std),
        "mean_and_std_of": "training split, scaled to 0..1",
    }


def decoded(images: Images, index: Array, size: tuple[int, int], resize: Resize, channels: int) -> Iterator[Array]:
    """uint8 (n, channels, H, W) in order; decoding runs in threads, because Pillow frees the interpreter meanwhile."""
    if isinstance(images, ArrayImages) and images.array.shape[1:] == (*size, channels):
        for start in range(0, len(index), _CHUNK):
            yield images.array[index[start : start + _CHUNK]].transpose(0, 3, 1, 2)
        return

    def one(row: int) -> Array:
        return images.decode(row, size, resize, channels)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(index), _CHUNK):
            yield np.stack(list(pool.map(one, index[start : start + _CHUNK].tolist())))


def _size_and_channels(
    section: DataSection,
    images: dict[SplitName, Images],
    rows: dict[SplitName, tuple[SplitName, Array]],
    where: str,
    progress: Progress,
) -> tuple[tuple[int, int], int]:
    """(height, width) and channels: as the section says, else what all images have in common."""
    wanted = section.image_size
    if wanted is not None and section.channels != "auto":
        return (wanted, wanted) if isinstance(wanted, int) else wanted, section.channels
    first: tuple[int, int] | None = None
    all_grey = True
    with progress.task("reading image headers", sum(len(index) for _, index in rows.values())) as task:
        for source, index in rows.values():
            # an array's rows are all alike
            chosen = index[:1] if isinstance(images[source], ArrayImages) else index
            for row in chosen.tolist():
                height, width, grey = images[source].describe(row)
                all_grey = all_grey and grey
                if wanted is None and first is not None and (height, width) != first:
                    raise InputError(
                        "the images have different sizes",
                        where=where,
                        evidence=f"{first[0]}x{first[1]} and {height}x{width} (height x width)",
                        fix="set data.image_size, for example 224",
                    )
                first = (height, width)
                task.advance()
    assert first is not None
    size = first if wanted is None else (wanted, wanted) if isinstance(wanted, int) else wanted
    return size, (1 if all_grey else 3) if section.channels == "auto" else section.channels


def _moments(histogram: Array) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, scaled to 0..1, from exact counts (channels, 256)."""
    value = np.arange(256) / 255
    weight = histogram / histogram.sum(1, keepdims=True)
    mean = weight @ value
    variance = (weight * (value - mean[:, None]) ** 2).sum(1)
    # a constant channel would divide by zero: one grey level is the least spread that means anything
    std = np.maximum(np.sqrt(variance), 1 / 255)
    return tuple(round(float(entry), 6) for entry in mean), tuple(round(float(entry), 6) for entry in std)
