"""Which method is better: comparisons paired by seed and by test sample. Pure functions on plain arrays.

Two things limit what a study can say. Another seed (initial weights, order of the samples) would give other figures:
that is judged by Student's t interval of the paired differences over seeds. Another test split would do so as well:
that is judged by a bootstrap over test samples. An outcome needs both intervals on one side of zero.
The percentile bootstrap over seeds is given, too, but decides nothing: with five seeds it covers about 84 % where it
says 95 %.

What the seeds of a study share is not judged: its training samples, the teacher that learned from them, the augmented
views. Another draw of the training samples may change a difference by more than the intervals are wide, most of all
when they are few.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any, Literal

import numpy as np

from profiles.metrics import difference
from profiles.statistics import Interval, PairedDifference, paired_difference

Array = np.ndarray[Any, Any]
Outcome = Literal["higher", "lower", "cannot tell"]

CONFIDENCE = 0.95
MANY_SEEDS = 100
_RESAMPLES = 10_000


@dataclass(frozen=True)
class Comparison:
    """One method minus the control over the seeds that both have, as fractions (0.01: one point).

    bootstrap: mean difference, percentile bootstrap over seeds, wins. ties: seeds on which both are equal, which are
    neither won nor lost. seeds: t interval over seeds, None for one seed.
    samples: bootstrap over test samples. seeds_needed: at which the t interval would just leave out zero if mean and
    deviation stayed as they are, None when more than MANY_SEEDS or unknown. reasons: why it cannot be told.
    """

    differences: tuple[float, ...]
    bootstrap: PairedDifference
    ties: int
    seeds: tuple[float, float] | None
    samples: Interval
    outcome: Outcome
    seeds_needed: int | None
    reasons: tuple[str, ...]


def compare(ours: Sequence[float], control: Sequence[float], samples: Interval) -> Comparison:
    """Judges paired scores.

    Args:
        ours: (S,), one method's metric by seed, fractions.
        control: (S,), the control's on the same seeds.
        samples: of the difference over test samples, from `over_samples`.
    """
    found = paired_difference(ours, control, confidence=CONFIDENCE)
    differences = tuple(a - b for a, b in zip(ours, control, strict=True))
    seeds = t_interval(differences)
    outcome: Outcome = "cannot tell"
    if seeds is not None and seeds[0] > 0 and samples.low > 0:
        outcome = "higher"
    elif seeds is not None and seeds[1] < 0 and samples.high < 0:
        outcome = "lower"
    needed = seeds_needed(differences)
    ties = sum(value == 0 for value in differences)
    reasons: tuple[str, ...] = ()
    if ties == len(differences):
        reasons = ("the same on every seed" if ties > 1 else "the same on the one seed",)
    elif outcome == "cannot tell":
        reasons = _reasons(seeds, samples, len(differences), needed)
    return Comparison(differences, found, ties, seeds, samples, outcome, needed, reasons)


def t_interval(differences: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """Student's t interval of the mean, mean -+ t_(n-1) s / sqrt(n); None for one value, which shows no spread.

    >>> low, high = t_interval([0.01, 0.02, 0.03])
    >>> round(low, 4), round(high, 4)
    (-0.0048, 0.0448)
    """
    n = len(differences)
    if n < 2:
        return None
    half = _t(confidence, n) * stdev(differences) / math.sqrt(n)
    return mean(differences) - half, mean(differences) + half


def seeds_needed(differences: Sequence[float], confidence: float = CONFIDENCE) -> int | None:
    """Seeds at which the t interval would just leave out zero if mean and deviation stayed: a rough guide.

    None: more than MANY_SEEDS, or unknown from one seed.
    """
    if len(differences) < 2:
        return None
    size, deviation = abs(mean(differences)), stdev(differences)
    for n in range(2, MANY_SEEDS + 1):
        if _t(confidence, n) * deviation / math.sqrt(n) < size:
            return n
    return None


def over_samples(
    task: str,
    ours: Sequence[Array],
    control: Sequence[Array],
    labels: Array,
    mask: Array | None = None,
    *,
    seed: int = 0,
) -> Interval:
    """The mean difference over seeds with an interval over test samples.

    multiclass: every test sample's share of seeds that get it right, ours minus the control's, resampled over samples.
    multilabel: the mean over seeds of each seed's interval of the mAP difference, which is wider than it need be.

    Args:
        task: "multiclass" or "multilabel".
        ours: S arrays (N, C) of class logits, one per seed.
        control: the control's, of the same seeds.
        labels: (N,) or (N, C).
        mask: bool (N, C) or None.
        seed: of the bootstrap.
    """
    if task == "multilabel":
        found = [difference(task, a, b, labels, mask, seed=seed) for a, b in zip(ours, control, strict=True)]
        return Interval(
            mean(one.value for one in found),
            mean(one.low for one in found),
            mean(one.high for one in found),
            CONFIDENCE,
            f"mean over seeds of: {found[0].method}",
        )
    seeds = len(ours)
    gain = sum(
        (a.argmax(1) == labels).astype(np.int64) - (b.argmax(1) == labels) for a, b in zip(ours, control, strict=True)
    )
    n = len(labels)
    # resampling n of n values out of -S..S is drawing their counts
    levels = np.arange(-seeds, seeds + 1)
    counts = np.array([(gain == level).sum() for level in levels])
    drawn = np.random.default_rng(seed).multinomial(n, counts / n, size=_RESAMPLES) @ levels / (n * seeds)
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    method = f"paired bootstrap over samples, {_RESAMPLES} resamples"
    return Interval(float(np.mean(gain)) / seeds, float(low), float(high), CONFIDENCE, method)


def chance_of_all_wins(seeds: int) -> float:
    """How often all seeds, or none, are won by chance alone when there is no difference: 2 / 2^seeds.

    >>> chance_of_all_wins(5)
    0.0625
    """
    return min(1.0, 2 * 0.5**seeds)


def _reasons(seeds: tuple[float, float] | None, samples: Interval, count: int, needed: int | None) -> tuple[str, ...]:
    reasons = []
    if seeds is None:
        reasons.append("one seed shows no spread between seeds")
    elif seeds[0] <= 0 <= seeds[1]:
        many = f"more than {MANY_SEEDS}" if needed is None else f"about {max(needed, count + 1)}"
        reasons.append(f"{count} seeds are too few; at this mean and spread it would take {many}")
    if samples.low <= 0 <= samples.high:
        reasons.append("other test samples could turn it round, which more seeds hardly change: it takes more of them")
    return tuple(reasons) or ("seeds and test samples point in opposite directions",)


def _t(confidence: float, n: int) -> float:
    from scipy.stats import t

    return float(t.ppf((1 + confidence) / 2, n - 1))
