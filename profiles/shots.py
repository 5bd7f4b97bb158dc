"""Many-, medium- and few-shot groups of classes, and the accuracy on each: how a long tail fares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from profiles.errors import EdgestillError
from profiles.metrics import Metric, correct_answers
from profiles.statistics import wilson

Array = NDArray[Any]
GroupName = Literal["many", "medium", "few"]
MANY, FEW = 100, 20
_LONG_TAIL = 10
"""A largest class this many times the smallest: from here on an overall accuracy hides what the tail does."""


@dataclass(frozen=True)
class ShotGroup:
    """Classes with a similar number of training samples.

    name: "many", "medium" or "few". classes: their numbers, ascending. samples: the smallest and the largest number of
    training samples of one of them.
    """

    name: GroupName
    classes: tuple[int, ...]
    samples: tuple[int, int]


def shot_groups(train_counts: ArrayLike, *, many: int = MANY, few: int = FEW) -> tuple[ShotGroup, ...]:
    """The classes by their number of training samples: more than `many`, `few` to `many`, fewer than `few`.

    The limits are those of Liu et al. 2019 (open long-tailed recognition, arXiv 1904.05160).

    Args:
        train_counts: integers (C,), training samples of each class; none counts as few.
        many: classes with more belong to "many".
        few: classes with fewer belong to "few".

    Returns:
        At most three groups, many first; a group without classes is left out. Every class is in exactly one.

    Raises:
        EdgestillError: counts that are no counts, or few > many.

    >>> [(group.name, group.classes) for group in shot_groups([500, 101, 100, 20, 19])]
    [('many', (0, 1)), ('medium', (2, 3)), ('few', (4,))]
    """
    counts = _checked(train_counts)
    if few > many:
        raise EdgestillError("the limits of the shot groups are swapped", evidence=f"few = {few}, many = {many}")
    members: tuple[tuple[GroupName, Array], ...] = (
        ("many", counts > many),
        ("medium", (counts >= few) & (counts <= many)),
        ("few", counts < few),
    )
    return tuple(
        ShotGroup(name, tuple(np.flatnonzero(inside).tolist()), (int(counts[inside].min()), int(counts[inside].max())))
        for name, inside in members
        if inside.any()
    )


def long_tailed(train_counts: ArrayLike) -> bool:
    """Whether the largest class has at least ten times the training samples of the smallest: groups are worth showing.

    >>> long_tailed([500, 50]), long_tailed([500, 51])
    (True, False)
    """
    counts = _checked(train_counts)
    return int(counts.max()) > 0 and int(counts.max()) >= _LONG_TAIL * int(counts.min())


def group_accuracy(logits: Array, labels: Array, classes: Sequence[int]) -> Metric:
    """The mean of the recalls of some classes, with a 95 % interval.

    R = (1/K) sum_c r_c, r_c = share of class c's samples whose highest logit is c's among *all* classes. With equally
    many samples of each class it is the accuracy on the samples of the group.

    The interval is MOVER (method of variance estimates recovery, Zou & Donner 2008) on Wilson's limits l_c, u_c of each
    recall: low = R - (1/K) sqrt(sum (r_c - l_c)^2), high = R + (1/K) sqrt(sum (u_c - r_c)^2). For one class it is
    Wilson's, as for top-1. A bootstrap would give a point where every recall is 0, which is where few-shot classes are.

    Args:
        logits: (N, C), of all test samples.
        labels: integers (N,).
        classes: of the group; those without a sample in `labels` do not count.

    Raises:
        EdgestillError: shapes or labels that do not fit, NaN among the logits, or no sample of any of the classes.

    >>> group_accuracy(np.eye(3), np.array([0, 1, 2]), (0, 2)).value
    1.0
    """
    labels = np.asarray(labels)
    correct = correct_answers(logits, labels)
    total = np.bincount(labels, minlength=logits.shape[1])
    hits = np.bincount(labels[correct], minlength=logits.shape[1])
    present = [int(label) for label in sorted(set(classes)) if 0 <= label < len(total) and total[label] > 0]
    if not present:
        raise EdgestillError(
            "no sample of any of these classes", evidence=f"classes {tuple(classes)}, {len(labels)} samples"
        )
    recalls = [int(hits[label]) / int(total[label]) for label in present]
    limits = [wilson(int(hits[label]), int(total[label])) for label in present]
    value = math.fsum(recalls) / len(present)
    below = math.sqrt(math.fsum((recall - low) ** 2 for recall, (low, _) in zip(recalls, limits, strict=True)))
    above = math.sqrt(math.fsum((high - recall) ** 2 for recall, (_, high) in zip(recalls, limits, strict=True)))
    return Metric(
        name="macro recall",
        value=value,
        low=max(0.0, value - below / len(present)),
        high=min(1.0, value + above / len(present)),
        n=int(sum(int(total[label]) for label in present)),
        method="MOVER on Wilson's limits of each class",
    )


def _checked(train_counts: ArrayLike) -> Array:
    counts = np.asarray(train_counts)
    if counts.ndim != 1 or counts.size == 0 or counts.dtype.kind not in "iu" or int(counts.min()) < 0:
        raise EdgestillError(
            "training samples per class are one whole number per class", evidence=f"{counts.dtype} of {counts.shape}"
        )
    return counts
