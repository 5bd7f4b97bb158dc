"""Raw labels of any source become class numbers or 0/1 matrices, with every mistake named by its row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distill.data.arrays import Array
from distill.data.dataset import SplitName
from distill.data.section import DataSection
from profiles.errors import InputError, nearest


@dataclass(frozen=True)
class Labels:
    """values: int64 (N,) or uint8 (N, C). mask: bool (N, C), True where known; None when all are (or multiclass)."""

    values: Array
    mask: Array | None = None

    def __len__(self) -> int:
        return len(self.values)

    def take(self, rows: Array) -> Labels:
        """The labels of those rows."""
        return Labels(self.values[rows], None if self.mask is None else self.mask[rows])


def parse_labels(
    raw: Mapping[SplitName, Sequence[Any] | Array], section: DataSection, known_classes: Sequence[str], where: str
) -> tuple[tuple[str, ...], dict[SplitName, Labels]]:
    """Classes, and the labels of each split.

    Args:
        raw: one entry per sample of each split. multiclass: names or integers. multilabel: a row of 0/1 (NaN unknown),
            a list of names or class numbers, or names joined by the section's separator (None unknown).
        section: task, classes, separator.
        known_classes: the source's own class names in label order, or empty.
        where: file and key, for messages.

    Raises:
        InputError: missing, unknown or out-of-range labels, or fewer than two classes.
    """
    classes = section.classes or tuple(known_classes)
    if section.task == "multiclass":
        return _multiclass(raw, classes, where)
    return _multilabel(raw, classes, section.label_separator, where)


def _multiclass(
    raw: Mapping[SplitName, Sequence[Any] | Array], classes: tuple[str, ...], where: str
) -> tuple[tuple[str, ...], dict[SplitName, Labels]]:
    values = {split: _scalars(column, split, where) for split, column in raw.items()}
    found = sorted({value for column in values.values() for value in column}, key=_order)
    count = sum(len(column) for column in values.values())
    if len(found) == 1:
        raise InputError(
            "all samples have the same label",
            where=where,
            evidence=f'{count} samples, all "{found[0]}"',
            fix="a classifier needs two classes or more: check the label column",
        )
    if not classes and count >= 20 and len(found) > count / 2:
        raise InputError(
            "nearly every sample has a label of its own",
            where=where,
            evidence=f"{len(found)} different labels in {count} samples",
            fix="name the column that holds the class with data.label_column",
        )
    numeric = all(isinstance(value, int) for value in found)
    number: dict[int | str, int]
    if classes and numeric:
        number = {value: value for value in range(len(classes))}
    elif classes:
        number = {name: index for index, name in enumerate(classes)}
    else:
        number = {value: index for index, value in enumerate(found)}
        classes = tuple(str(value) for value in found)
    for split, column in values.items():
        for row, value in enumerate(column):
            if value not in number:
                raise InputError(
                    f"label {value!r} is out of range" if numeric else f'unknown label "{value}"',
                    where=f"{where}, {split}, row {row}",
                    evidence=f"{len(classes)} classes, numbered 0 to {len(classes) - 1}" if numeric else None,
                    fix="correct data.classes or the label" if numeric else nearest(str(value), list(classes)),
                )
    return classes, {
        split: Labels(np.array([number[value] for value in column], np.int64)) for split, column in values.items()
    }


def _order(value: int | str) -> tuple[bool, int, str]:
    return (isinstance(value, str), value if isinstance(value, int) else 0, str(value))


def _scalars(column: Sequence[Any] | Array, split: str, where: str) -> list[int | str]:
    """Plain ints where every label is one, else strings."""
    if isinstance(column, np.ndarray):
        if column.ndim == 2 and 1 in column.shape:
            column = column.reshape(-1)
        if column.ndim != 1:
            raise InputError(
                f"labels have shape {column.shape}, one number per sample is needed",
                where=where,
                fix='for several labels per sample set data.task = "multilabel"',
            )
        column = column.tolist()
    values: list[int | str] = []
    for row, value in enumerate(column):
        place = f"{where}, {split}, row {row}"
        if value is None or value == "" or (isinstance(value, float) and not np.isfinite(value)):
            raise InputError(
                "a sample has no label", where=place, evidence=f"found {value!r}", fix="label it or drop it"
            )
        if isinstance(value, list | tuple | dict):
            raise InputError(
                "a sample has several labels",
                where=place,
                evidence=f"found {value!r}"[:100],
                fix='set data.task = "multilabel"',
            )
        if isinstance(value, float) and not value.is_integer():
            raise InputError(
                "labels are fractions, not classes",
                where=place,
                evidence=f"found {value!r}",
                fix="use class names or integers",
            )
        values.append(int(value) if isinstance(value, int | float) else str(value))
    # a column that mixes both ("3" beside 3) is one of names
    return values if all(isinstance(value, int) for value in values) else [str(value) for value in values]


def _multilabel(
    raw: Mapping[SplitName, Sequence[Any] | Array], classes: tuple[str, ...], separator: str, where: str
) -> tuple[tuple[str, ...], dict[SplitName, Labels]]:
    if all(isinstance(column, np.ndarray) and column.ndim == 2 for column in raw.values()):
        widths = {column.shape[1] for column in raw.values() if isinstance(column, np.ndarray)}
        width = max(widths)
        classes = classes or tuple(str(index) for index in range(width))
        if widths != {len(classes)}:
            raise InputError(
                f"{width} label columns, {len(classes)} classes",
                where=where,
                fix="give data.classes one name per column",
            )
        matrices = {split: np.asarray(column, np.float64) for split, column in raw.items()}
    else:
        classes, matrices = _from_lists(raw, classes, separator, where)
    if len(classes) < 1:
        raise InputError("no sample has any label", where=where, fix="check the label column and data.label_separator")
    labels: dict[SplitName, Labels] = {}
    for split, matrix in matrices.items():
        known = ~np.isnan(matrix)
        wrong = known & (matrix != 0) & (matrix != 1)
        if wrong.any():
            row, column = (int(index) for index in np.argwhere(wrong)[0])
            raise InputError(
                f"label {matrix[row, column]:g} is out of range",
                where=f"{where}, {split}, row {row}, class {classes[column]}",
                fix="multilabel entries are 0, 1, or empty/NaN for unknown",
            )
        labels[split] = Labels(np.where(known, matrix, 0).astype(np.uint8), None if known.all() else known)
    return classes, labels


def _from_lists(
    raw: Mapping[SplitName, Sequence[Any] | Array], classes: tuple[str, ...], separator: str, where: str
) -> tuple[tuple[str, ...], dict[SplitName, Array]]:
    rows: dict[SplitName, list[list[int | str] | None]] = {}
    for split, column in raw.items():
        rows[split] = []
        for row, value in enumerate(column):
            if value is None or value == "" or (isinstance(value, float) and np.isnan(value)):
                rows[split].append(None)
            elif isinstance(value, str):
                # a lone separator therefore says "none of the classes", where an empty cell says "not known"
                rows[split].append([name.strip() for name in value.split(separator) if name.strip()])
            elif isinstance(value, list | tuple | np.ndarray):
                rows[split].append(
                    [int(entry) if isinstance(entry, int | np.integer) else str(entry) for entry in value]
                )
            else:
                raise InputError(
                    "multilabel labels are a list or a string",
                    where=f"{where}, {split}, row {row}",
                    evidence=f"found {value!r}",
                    fix=f'join names with "{separator}", or name one column per class in data.label_columns',
                )
    found = {name for column in rows.values() for entry in column if entry is not None for name in entry}
    numeric = bool(found) and all(isinstance(name, int) for name in found)
    number: dict[int | str, int]
    if classes:
        number = {index if numeric else name: index for index, name in enumerate(classes)}
    else:
        ordered = sorted(found, key=_order)
        number = {name: index for index, name in enumerate(ordered)}
        classes = tuple(str(name) for name in ordered)
    matrices: dict[SplitName, Array] = {}
    for split, column in rows.items():
        matrix = np.zeros((len(column), len(classes)))
        for row, entry in enumerate(column):
            if entry is None:
                matrix[row] = np.nan
                continue
            for name in entry:
                if name not in number:
                    raise InputError(
                        f"label {name} is out of range" if numeric else f'unknown label "{name}"',
                        where=f"{where}, {split}, row {row}",
                        fix=f"numbers 0 to {len(classes) - 1}" if numeric else nearest(str(name), list(classes)),
                    )
                matrix[row, number[name]] = 1
        matrices[split] = matrix
    return classes, matrices


def check_classes(splits: Mapping[SplitName, Labels], classes: tuple[str, ...], where: str) -> None:
    """What training and scoring need of the labels.

    Raises:
        InputError: a class without training samples (multilabel: without a known positive or a known negative).
    """
    train = splits["train"]
    if train.values.ndim == 1:
        present = np.bincount(train.values, minlength=len(classes)) > 0
        for name, labels in splits.items():
            counts = np.bincount(labels.values, minlength=len(classes))
            for index in np.flatnonzero((counts > 0) & ~present):
                raise InputError(
                    f'class "{classes[index]}" has no training sample',
                    where=where,
                    evidence=f"{counts[index]} samples in {name}, none in train",
                    fix=f'move some to train, or drop "{classes[index]}" from {name}',
                )
        for index in np.flatnonzero(~present):
            raise InputError(
                f'class "{classes[index]}" has no sample', where=where, fix=f'drop "{classes[index]}" from data.classes'
            )
        return
    known = np.ones_like(train.values, bool) if train.mask is None else train.mask
    for value, kind in ((1, "positive"), (0, "negative")):
        for index in np.flatnonzero(~((train.values == value) & known).any(axis=0)):
            raise InputError(
                f'class "{classes[index]}" has no known {kind} training sample',
                where=where,
                evidence=f"{int(known[:, index].sum())} of {len(train)} training labels of this class are known",
                fix=f'drop "{classes[index]}", or add training samples',
            )
