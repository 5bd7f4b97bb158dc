"""A teacher that is only its outputs: embeddings and logits that were computed elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from distill.data.dataset import Dataset, Split, SplitName
from distill.outputs import TeacherOutput
from distill.teachers.section import TeacherSection
from distill.teachers.single_logit import is_single_logit
from distill.teachers.teacher import Teacher, TeacherBatch
from profiles.artifact import array_hash
from profiles.errors import InputError, nearest
from profiles.opening import open_arrays

Array = np.ndarray[Any, Any]
_SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")
_ROWS_AT_ONCE = 65_536


class ArrayTeacher(Teacher):
    """Stored outputs, one row per sample of the source, or of the split. It knows the clean samples only.

    Where edgestill made the splits, one file with a row per sample of the source, in its order, serves all of them.
    Logits of two exclusive classes may be one column z (or a vector), which speaks for the second class: [0, z].

    Raises:
        InputError: unreadable file, wrong shape or row count, NaN or infinity (the message names file and first row).
    """

    sees_views = False
    runs_live = False

    kind = "array"

    def __init__(self, section: TeacherSection, dataset: Dataset, base: Path) -> None:
        super().__init__("array")
        self._embeddings = _read_splits(section, dataset, base, "embeddings")
        self._logits = _read_splits(section, dataset, base, "logits")
        given = [arrays for arrays in (self._embeddings, self._logits) if arrays]
        self.splits = tuple(split for split in _SPLITS if all(split in arrays for arrays in given))
        if self._embeddings:
            self.embedding_dim = self._embeddings["train"].shape[1]
        if self._logits:
            self._know_logits(self._logits["train"].shape, dataset)

    def fingerprint(self) -> str:
        parts = [
            f"{what}/{split}/{array_hash(arrays[split])}"
            for what, arrays in (("embeddings", self._embeddings), ("logits", self._logits))
            for split in sorted(arrays)
        ]
        return "\n".join(parts)

    def outputs(self, batch: TeacherBatch) -> TeacherOutput:
        """The stored rows of a split's samples.

        Raises:
            InputError: inputs that are in no split: texts of their own, or pixels of which a gradient is wanted.
        """
        if batch.texts is not None or batch.inputs.is_floating_point():
            raise InputError(
                "a teacher of stored outputs cannot say anything about new inputs",
                where="teacher.kind",
                fix='a teacher that runs: kind = "train", "transformers", "onnx" or "torch"; or take [explore] out',
            )

        def rows(arrays: dict[SplitName, Array]) -> torch.Tensor | None:
            if batch.split not in arrays:
                return None
            return torch.from_numpy(arrays[batch.split][batch.rows].astype(np.float32))

        logits = rows(self._logits)
        return TeacherOutput(rows(self._embeddings), None if logits is None else self._class_logits(logits))


def _read_splits(
    section: TeacherSection, dataset: Dataset, base: Path, what: Literal["embeddings", "logits"]
) -> dict[SplitName, Array]:
    """The checked arrays (N, D) of each split that has some; empty when the section names no training file.

    A single logit stays one column in all splits, also where its file has a vector.
    """
    found: dict[SplitName, tuple[Array, str, Path]] = {}
    for split in _SPLITS:
        key = what if split == "train" else f"{split}_{what}"
        name: str | None = getattr(section, key)
        if name is None:
            continue
        path = base / name
        where = f"teacher.{key}"
        arrays = _read_file(path, where)
        if what == "logits":
            vectors = {name: array for name, array in arrays.items() if is_single_logit(array.shape, dataset)}
            arrays |= {name: array.reshape(-1, 1) for name, array in vectors.items()}
        if split == "train":
            # a file with one array per split serves all of them
            found |= {other: (arrays[other], where, path) for other in _SPLITS if other in arrays}
        if split in arrays:
            found[split] = (arrays[split], where, path)
        elif len(arrays) == 1:
            found[split] = (next(iter(arrays.values())), where, path)
        else:
            raise InputError(
                f'{path} holds no array called "{split}"',
                where=where,
                evidence="it holds: " + (", ".join(sorted(arrays)) or "nothing"),
                fix=nearest(split, list(arrays)) if arrays else None,
            )
    if found and "train" not in found:
        key = f"teacher.{what}"
        raise InputError(f"{what} of the training split are missing", where=key, fix=f"{key} names their file")
    for split, (array, where, path) in found.items():
        _check(array, path, where, dataset.split(split), split)
        first = found["train"][0].shape
        of_classes = what == "logits" and not is_single_logit(first, dataset)
        columns = len(dataset.classes) if of_classes else first[1]
        if array.shape[1] != columns:
            reason = f"the data set has {columns} classes" if of_classes else f"the training split's have {columns}"
            raise InputError(f"{path} has {array.shape[1]} columns, {reason}", where=where, evidence=f"{array.shape}")
    aligned = {split: _aligned(array, dataset.split(split)) for split, (array, _, _) in found.items()}
    for split in _SPLITS:
        if found and split not in found:
            taken = dataset.split(split)
            array = found["train"][0]
            if taken.source == "train" and taken.rows is not None and len(array) == taken.source_size:
                aligned[split] = array[taken.rows]
    return aligned


def _aligned(array: Array, split: Split) -> Array:
    """The rows of the split's samples, in its order."""
    return array[split.rows] if split.rows is not None and len(array) == split.source_size else array


def _read_file(path: Path, where: str) -> dict[str, Array]:
    """All arrays of a file by name; an .npy file's only array is called "array". Mapped from disk where possible."""
    if not path.is_file():
        raise InputError(f"no such file: {path}", where=where)
    try:
        if path.suffix == ".npy":
            return {"array": np.load(path, mmap_mode="r", allow_pickle=False)}
        if path.suffix == ".npz":
            return open_arrays(path, where=where)
        if path.suffix == ".safetensors":
            from safetensors.numpy import load_file

            return dict(load_file(path))
    except InputError:
        raise
    except Exception as error:  # the readers raise many types for damaged bytes
        raise InputError(
            f"cannot read {path}",
            where=where,
            evidence=str(error),
            fix="the file is truncated or corrupt: write it again",
        ) from error
    raise InputError(f"{path} is of an unknown kind", where=where, fix="use .npy, .npz or .safetensors")


def _check(array: Array, path: Path, where: str, split: Split, name: str) -> None:
    if array.ndim != 2 or array.shape[1] == 0 or array.dtype.kind not in "fiu":
        raise InputError(
            f"{path} is not a table of numbers (rows, dimensions)",
            where=where,
            evidence=f"shape {array.shape}, type {array.dtype}",
            fix="save one row of floats per sample",
        )
    if array.shape[0] not in (len(split), split.source_size):
        source = "" if split.source_size in (None, len(split)) else f" (taken from {split.source_size} of the source)"
        raise InputError(
            f"{path} has {array.shape[0]} rows, the {name} split has {len(split)} samples{source}",
            where=where,
            fix="compute one row per sample of the source, in its order",
        )
    for start in range(0, array.shape[0], _ROWS_AT_ONCE):
        bad = ~np.isfinite(np.asarray(array[start : start + _ROWS_AT_ONCE], dtype=np.float32)).all(1)
        if bad.any():
            row = start + int(bad.argmax())
            value = next(v for v in array[row] if not np.isfinite(np.float32(v)))
            raise InputError(
                f"{path} holds a value that is not a finite float32",
                where=where,
                evidence=f"first bad row: {row} (counted from 0), value {value}",
                fix="find out why the network that made it failed on that sample, and compute the row again",
            )
