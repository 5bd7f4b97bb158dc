"""Stratified splits, from a seed."""

from __future__ import annotations

import numpy as np

from distill.data.arrays import Array
from distill.data.labels import Labels
from profiles.errors import InputError

_SMALLEST_HALF = 4
"""Rows below which stratifying them means nothing."""


def take_stratified(
    labels: Labels, size: int, *, seed: int, where: str, classes: tuple[str, ...]
) -> tuple[Array, Array]:
    """Splits rows into (rest, taken), exactly `size` taken, with the class shares kept in both.

    multiclass: per-class quotas by largest remainder, at least one sample of each class on either side. multilabel:
    iterative stratification (Sechidis, Tsoumakas, Vlahavas 2011), rarest class first, on known labels.

    Returns:
        Two int64 arrays of row numbers, each ascending.

    Raises:
        InputError: too few samples for that.
    """
    count = len(labels)
    if not 0 < size < count:
        raise InputError(
            f"cannot take {size} of {count} samples",
            where=where,
            fix="add samples, or choose a smaller size or fraction",
        )
    random = np.random.default_rng(seed)
    if labels.values.ndim == 1:
        taken = _by_quota(labels.values, size, random, where, classes)
    else:
        taken = _iterative(labels, size, random)
    chosen = np.zeros(count, bool)
    chosen[taken] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def nested_order(labels: Labels, *, seed: int) -> Array:
    """An order of the rows whose first n rows keep the class shares, for every n: nested training sets of any sizes.

    multiclass: one sample of each class first, then the classes interleaved evenly, so that no class of a prefix is off
    its share by more samples than there are classes. multilabel: halves by iterative stratification, again and again.

    Returns:
        int64 (N,), a permutation.
    """
    random = np.random.default_rng(seed)
    if labels.values.ndim > 1:
        return _halving(labels, np.arange(len(labels)), random)
    place = np.empty(len(labels))
    for label in np.unique(labels.values):
        rows = random.permutation(np.flatnonzero(labels.values == label))
        place[rows] = (np.arange(len(rows)) + random.random()) / len(rows)
        place[rows[0]] = -1.0
    return np.lexsort((random.permutation(len(labels)), place))


def _halving(labels: Labels, rows: Array, random: np.random.Generator) -> Array:
    if len(rows) < _SMALLEST_HALF:
        return random.permutation(rows)
    first = np.zeros(len(rows), bool)
    first[_iterative(labels.take(rows), len(rows) // 2, random)] = True
    return np.concatenate([_halving(labels, rows[first], random), _halving(labels, rows[~first], random)])


def _by_quota(values: Array, size: int, random: np.random.Generator, where: str, classes: tuple[str, ...]) -> Array:
    counts = np.bincount(values, minlength=len(classes))
    present = counts > 0
    if (counts[present] < 2).any():
        rare = int(np.flatnonzero(counts == 1)[0])
        raise InputError(
            f'too few samples of class "{classes[rare]}" to split',
            where=where,
            evidence="1 sample; every split needs one of each class",
            fix="add samples of it, drop the class, or give the splits yourself",
        )
    classes_here = int(present.sum())
    if size < classes_here or len(values) - size < classes_here:
        raise InputError(
            "too few samples to keep every class in each split",
            where=where,
            evidence=f"{size} and {len(values) - size} samples for {classes_here} classes",
            fix="add samples, or change the size or fraction",
        )
    share = counts * (size / len(values))
    quota = np.clip(np.floor(share).astype(np.int64), np.where(present, 1, 0), np.maximum(counts - 1, 0))
    while (missing := size - int(quota.sum())) != 0:
        # largest remainder first; one class at a time keeps the bounds
        step = 1 if missing > 0 else -1
        room = (quota < counts - 1) if step > 0 else (quota > 1)
        quota[int(np.argmax(np.where(room & present, step * (share - quota), -np.inf)))] += step
    return np.concatenate(
        [random.permutation(np.flatnonzero(values == label))[: quota[label]] for label in range(len(classes))]
    )


def _iterative(labels: Labels, size: int, random: np.random.Generator) -> Array:
    count = len(labels)
    positive = labels.values.astype(bool)
    if labels.mask is not None:
        positive = positive & labels.mask
    room = np.array([count - size, size])
    wanted = positive.sum(0) * (room / count)[:, None]
    side = np.full(count, -1)
    remaining = positive.sum(0)
    while (remaining > 0).any():
        rarest = int(np.argmin(np.where(remaining > 0, remaining, count + 1)))
        for row in random.permutation(np.flatnonzero(positive[:, rarest] & (side < 0))):
            # the side that lacks this class most; ties go to the side with more room, relative to its size
            lack = [(wanted[part, rarest], room[part]) if room[part] > 0 else (-np.inf, 0) for part in (0, 1)]
            part = int(lack[1] > lack[0])
            side[row] = part
            room[part] -= 1
            wanted[part, positive[row]] -= 1
            remaining -= positive[row]
    left = random.permutation(np.flatnonzero(side < 0))
    side[left[: room[1]]] = 1
    return np.flatnonzero(side == 1)
