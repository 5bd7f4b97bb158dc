"""Stratified splits, from a seed."""

from __future__ import annotations

import numpy as np

from distill.data.arrays import Array
from distill.data.labels import Labels
from profiles.errors import InputError

_FACTORS = (1000, 500, 200, 100, 50, 20, 10, 5, 2)
"""Imbalances to suggest, the strongest first."""
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


def long_tail_counts(available: Array, factor: float) -> Array:
    """How many samples each class keeps in a long-tailed training split: floor(n F^(-i/(C-1))), i = 0 .. C-1.

    The exponential law of Cui et al. 2019 (class-balanced loss, arXiv 1901.05555), classes in their order. n is the
    largest whole number with which every class has enough samples.

    Args:
        available: int64 (C,), C >= 2, samples of each class.
        factor: F >= 1, how many times as many the first class gets as the last.

    Returns:
        int64 (C,), never increasing; 0 where a class would keep none.

    >>> long_tail_counts(np.full(5, 1000), 100).tolist()
    [1000, 316, 100, 31, 10]
    """
    law = factor ** -(np.arange(len(available)) / (len(available) - 1))

    def counts(first: int) -> Array:
        # rounded first, because 1000 * 1000 ** (-1 / 3) falls short of 100 by one part in 10^14
        return np.floor(np.round(first * law, 9)).astype(np.int64)

    low, high = 0, int(available[0])
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if (counts(middle) <= available).all() else (low, middle - 1)
    return counts(low)


def take_long_tail(labels: Labels, factor: float, *, seed: int, classes: tuple[str, ...]) -> Array:
    """Rows of a long-tailed choice of multiclass samples, see `long_tail_counts`; ascending, int64.

    Raises:
        InputError: the factor leaves a class without a sample.
    """
    available = np.bincount(labels.values, minlength=len(classes))
    counts = long_tail_counts(available, factor)
    if counts.min() < 1:
        worst = int(np.flatnonzero(counts == 0)[-1])
        fitting = next((other for other in _FACTORS if long_tail_counts(available, other).min() >= 1), None)
        raise InputError(
            f'"exp:{factor:g}" leaves class "{classes[worst]}" without a training sample',
            where="data.imbalance",
            evidence=f'"{classes[0]}" would keep {counts[0]} of {available[0]}, "{classes[worst]}" none of '
            f"{available[worst]}",
            fix="add samples" if fitting is None else f'imbalance = "exp:{fitting}" leaves some of each',
        )
    return _per_class(labels.values, counts, seed)


def take_balanced(labels: Labels, *, seed: int, where: str, classes: tuple[str, ...]) -> Array:
    """Rows of equally many multiclass samples of each class, as many as the rarest has; ascending, int64.

    Raises:
        InputError: a class has no sample.
    """
    counts = np.bincount(labels.values, minlength=len(classes))
    if counts.min() < 1:
        raise InputError(
            f'class "{classes[int(np.argmin(counts))]}" has no test sample, so the test split cannot be balanced',
            where=where,
            evidence=f"{len(labels)} test samples",
            fix="add test samples of it, or leave data.imbalance out",
        )
    return _per_class(labels.values, np.full(len(classes), counts.min()), seed)


def _per_class(values: Array, counts: Array, seed: int) -> Array:
    """Random rows, so many of each class: the first of one order per class, so that smaller choices are nested."""
    random = np.random.default_rng(seed)
    chosen = [random.permutation(np.flatnonzero(values == label))[:count] for label, count in enumerate(counts)]
    return np.sort(np.concatenate(chosen))


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
