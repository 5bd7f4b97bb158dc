"""The samples of the training split that judge a coached student.

Neither the student nor the coached teacher trains on them from then on. A teacher of kind "train" has seen them before:
it learned from the whole training split. Class weights "balanced" count them, too.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from distill.data.labels import Labels
from distill.data.splits import take_stratified
from profiles.errors import InputError

Array = np.ndarray[Any, Any]
_WHERE = "teacher.coached.held_out"
_LARGEST = 0.5
"""Share that a recipe may ask for."""
_STREAM = 0x4E1D
"""Keeps these draws apart from others of the same seed."""


def held_out_rows(labels: Labels, classes: tuple[str, ...], share: float, seed: int) -> Array:
    """Rows of the training split that are held out: `share` of them, class by class; a pure function of its arguments.

    Every class has a sample on either side. With several labels per sample, every label that is known positive in two
    samples or more is so on either side, and one that is in a single sample stays in the rest, where it is learned.

    Args:
        labels: of the training split.
        classes: their names.
        share: 0..0.5 of the rows.
        seed: of the choice.

    Returns:
        int64, ascending.

    Raises:
        InputError: a class would be empty on either side; with the smallest share that works.
    """
    count = len(labels)
    size = max(1, min(round(share * count), count - 1))
    if labels.values.ndim == 1:
        _check_classes(labels.values, classes, size)
    mixed = int(np.random.SeedSequence((seed, _STREAM)).generate_state(1)[0])
    if labels.values.ndim == 1:
        return take_stratified(labels, size, seed=mixed, where=_WHERE, classes=classes)[1]
    found, missing = _several(labels, classes, size, mixed)
    if missing:
        raise _too_few(count, size, _smallest(labels, classes, size, mixed), f'label "{classes[missing[0]]}"')
    return found


def _check_classes(values: Array, classes: tuple[str, ...], size: int) -> None:
    counts = np.bincount(values, minlength=len(classes))
    present = int((counts > 0).sum())
    if (counts == 1).any():
        raise InputError(
            f'class "{classes[int(np.argmax(counts == 1))]}" has one training sample, which cannot be on both sides',
            where=_WHERE,
            evidence="every class needs a sample to learn from and one that judges",
            fix='add samples of it, drop the class, or teacher.strategy = "online" without held_out',
        )
    if size < present:
        smallest = np.flatnonzero(counts > 0)[np.argmin(counts[counts > 0])]
        raise _too_few(len(values), size, present, f'class "{classes[int(smallest)]}"')


def _too_few(count: int, size: int, needed: int | None, who: str) -> InputError:
    digits = len(str(10 * count))  # so many that the share means this number of rows
    share = None if needed is None else float(np.ceil(needed / count * 10**digits) / 10**digits)
    return InputError(
        f"so small a held-out share leaves {who} empty",
        where=_WHERE,
        evidence=f"{size} of {count} training samples would be held out",
        fix=f"held_out = {share!r}" if share is not None and share <= _LARGEST else "add samples",
    )


def _several(labels: Labels, classes: tuple[str, ...], size: int, seed: int) -> tuple[Array, list[int]]:
    """Held-out rows, and the labels that are empty on a side although they have two positives or more."""
    positive = labels.values.astype(bool)
    if labels.mask is not None:
        positive = positive & labels.mask
    _, taken = take_stratified(labels, size, seed=seed, where=_WHERE, classes=classes)
    out = np.zeros(len(labels), bool)
    out[taken] = True
    totals = positive.sum(0)
    for label in np.argsort(totals, kind="stable"):
        # a label that one sample has is learned from; the others are needed on both sides
        for side in (False, True) if totals[label] > 1 else (False,):
            if totals[label] and not (positive[:, label] & (out == side)).any():
                _swap(positive, totals, out, side, int(label))
    held = (positive & out[:, None]).sum(0)
    missing = np.flatnonzero((totals > 1) & ((held == 0) | (held == totals)))
    return np.flatnonzero(out), [int(label) for label in missing]


def _swap(positive: Array, totals: Array, out: Array, side: bool, label: int) -> None:
    """Brings a sample with `label` to `side` and another one back, if no label becomes empty by either; in place."""
    here, there = (positive & (out == side)[:, None]).sum(0), (positive & (out != side)[:, None]).sum(0)
    # neither sample may be the last of a label on its side; one that alone has a label stays where it is learned
    for come in np.flatnonzero((out != side) & positive[:, label]):
        if (positive[come] & (there == 1) & ((totals > 1) | (not out[come]))).any():
            continue
        arriving = here + positive[come]
        goes = (out == side) & ~(positive & (arriving == 1) & ((totals > 1) | (not side))).any(1)
        if goes.any():
            out[come], out[np.flatnonzero(goes)[0]] = side, not side
            return


def _smallest(labels: Labels, classes: tuple[str, ...], size: int, seed: int) -> int | None:
    """The smallest number of held-out rows found to work, None when none up to half of the rows does."""
    low, high = size, int(_LARGEST * len(labels))
    if _several(labels, classes, high, seed)[1]:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        if _several(labels, classes, middle, seed)[1]:
            low = middle
        else:
            high = middle
    return high
