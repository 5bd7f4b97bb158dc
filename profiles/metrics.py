"""Task metrics on plain arrays, each with its interval. Values are fractions, 0 to 1; reports print per cent."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from profiles.errors import EdgestillError
from profiles.section import Section

if TYPE_CHECKING:  # the models below are part of stored documents, which must load fast
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[Any]
    Floats = NDArray[np.floating[Any]]

Task = Literal["multiclass", "multilabel"]

_RESAMPLES = 1000
_CELLS = 4_000_000
"""Resampled weights that are held at once."""


class Metric(Section):
    """A metric with its interval, as fractions."""

    name: str
    """"top1" (accuracy), "mAP" (macro mean average precision) or "macro recall" (mean over classes)."""
    value: float
    low: float
    high: float
    n: int
    """Samples that it was computed on."""
    confidence: float = 0.95
    method: str
    """Of the interval."""


class Difference(Section):
    """A metric of one model minus that of another on the same samples, as a fraction (0.01: one point)."""

    value: float
    low: float
    high: float
    confidence: float = 0.95
    n: int = 0
    method: str = ""


def primary_metric(task: str) -> str:
    """The name of the metric that decides: "top1" for multiclass, "mAP" for multilabel.

    >>> primary_metric("multilabel")
    'mAP'
    """
    if task == "multiclass":
        return "top1"
    if task == "multilabel":
        return "mAP"
    raise ValueError(f"unknown task {task!r}")


def evaluate(task: str, logits: Array, labels: Array, mask: Array | None = None, *, seed: int = 0) -> Metric:
    """The task's primary metric with a 95 % interval: Wilson for top-1, bootstrap over samples for mAP.

    mAP is the mean over the classes that have at least one positive and one negative known label.

    Args:
        task: "multiclass" or "multilabel".
        logits: (N, C), any scale that orders; a tie of the highest logits goes to the first class.
        labels: integers (N,) for multiclass, 0/1 (N, C) for multilabel.
        mask: bool (N, C), True where a multilabel label is known; None: all are.
        seed: of the bootstrap.

    Raises:
        EdgestillError: shapes or labels that do not fit, NaN among the logits, or no class that can be judged.

    >>> import numpy as np
    >>> evaluate("multiclass", np.array([[2.0, 1.0], [0.0, 3.0]]), np.array([0, 1])).value
    1.0
    """
    import numpy as np

    if primary_metric(task) == "top1":
        from profiles.statistics import wilson

        correct = correct_answers(logits, labels)
        hits, n = int(correct.sum()), int(correct.size)
        low, high = wilson(hits, n)
        return Metric(name="top1", value=hits / n, low=low, high=high, n=n, method="Wilson score")
    logits, labels, mask = _checked_multilabel(logits, labels, mask)
    n = labels.shape[0]
    value = float(average_precision(logits, labels, mask).mean())
    resampled = np.concatenate(
        [_class_mean(weighted_average_precision(logits, labels, mask, weights)) for weights in _resamples(n, seed)]
    )
    # A point estimate outside its own interval helps nobody; it happens when a class has a handful of positives.
    low, high = _quantiles(resampled)
    method = f"bootstrap over samples, {_RESAMPLES} resamples"
    return Metric(name="mAP", value=value, low=min(low, value), high=max(high, value), n=n, method=method)


def difference(
    task: str,
    logits_a: Array,
    logits_b: Array,
    labels: Array,
    mask: Array | None = None,
    *,
    seed: int = 0,
    confidence: float = 0.95,
) -> Difference:
    """The primary metric of a minus that of b on the same samples, with a paired bootstrap interval.

    Both models are judged on the same resampled samples, so what is hard for both cancels out. The interval of two
    classifiers that never disagree about being right is a point: these samples cannot tell them apart.

    Args:
        task: "multiclass" or "multilabel".
        logits_a: (N, C).
        logits_b: (N, C), of the same samples in the same order.
        labels: as in `evaluate`.
        mask: as in `evaluate`.
        seed: of the bootstrap.
        confidence: two-sided.

    Raises:
        EdgestillError: as `evaluate`.
    """
    import numpy as np

    method = f"paired bootstrap over samples, {_RESAMPLES} resamples"
    if primary_metric(task) == "top1":
        gain = correct_answers(logits_a, labels).astype(np.int64) - correct_answers(logits_b, labels).astype(np.int64)
        n = int(gain.size)
        # Resampling n of n values out of -1, 0 and 1 is drawing their counts.
        counts = np.array([(gain < 0).sum(), (gain == 0).sum(), (gain > 0).sum()])
        drawn = np.random.default_rng(seed).multinomial(n, counts / n, size=10 * _RESAMPLES)
        low, high = _quantiles((drawn[:, 2] - drawn[:, 0]) / n, confidence)
        method = f"paired bootstrap over samples, {10 * _RESAMPLES} resamples"
        return Difference(value=float(gain.mean()), low=low, high=high, confidence=confidence, n=n, method=method)
    second = _checked_multilabel(logits_b, labels, mask)[0]
    first, labels, known = _checked_multilabel(logits_a, labels, mask)
    n = labels.shape[0]
    value = average_precision(first, labels, known) - average_precision(second, labels, known)
    resampled = [
        _class_mean(
            weighted_average_precision(first, labels, known, weights)
            - weighted_average_precision(second, labels, known, weights)
        )
        for weights in _resamples(n, seed)
    ]
    low, high = _quantiles(np.concatenate(resampled), confidence)
    mean = float(value.mean())
    return Difference(value=mean, low=min(low, mean), high=max(high, mean), confidence=confidence, n=n, method=method)


def average_precision(logits: Array, labels: Array, mask: Array | None = None) -> Floats:
    """Average precision of each class, (C,), NaN for a class without a known positive.

    The sum over thresholds of precision times the gain in recall; equal logits share one threshold (the definition of
    scikit-learn and torchmetrics).

    >>> import numpy as np
    >>> average_precision(np.array([[3.0], [2.0], [1.0]]), np.array([[1], [0], [1]])).round(4).tolist()
    [0.8333]
    """
    import numpy as np

    ones = np.ones((labels.shape[0], 1), dtype=np.float64)
    precision: Floats = weighted_average_precision(logits, labels, mask, ones)[0]
    return precision


def weighted_average_precision(logits: Array, labels: Array, mask: Array | None, weights: Array) -> Floats:
    """Average precision of each class under several weightings of the samples at once.

    Args:
        logits: (N, C).
        labels: 0/1 (N, C).
        mask: bool (N, C) or None.
        weights: (N, R), how often each sample counts in each of R resamples.

    Returns:
        (R, C), NaN where no known positive of the class has weight, or no known negative although it has some.
    """
    import numpy as np

    out = np.full((weights.shape[1], logits.shape[1]), np.nan)
    for column in range(logits.shape[1]):
        known = np.arange(logits.shape[0]) if mask is None else np.flatnonzero(mask[:, column])
        scores = np.asarray(logits[known, column], dtype=np.float64)
        order = np.argsort(-scores, kind="stable")
        positive = labels[known[order], column] > 0
        places = np.flatnonzero(positive)
        if places.size == 0:
            continue
        ordered = scores[order]
        counted = np.cumsum(weights[known[order]], axis=0)  # weight down to each place, (K, R)
        hits = np.cumsum(weights[known[order[places]]], axis=0)  # of it on positives, at each positive, (P, R)
        total = hits[-1]
        # Where logits are equal, precision is taken at the last place of the tie.
        ends = np.searchsorted(-ordered, -ordered[places], side="right") - 1
        hits_at_end = hits[np.searchsorted(places, ends, side="right") - 1]
        seen = counted[ends]
        precision = np.divide(hits_at_end, seen, out=np.zeros_like(seen), where=seen > 0)
        gain = np.diff(hits, axis=0, prepend=0)
        usable = total > 0
        if places.size < positive.size:
            usable &= counted[-1] > total
        np.divide((precision * gain).sum(axis=0), total, out=out[:, column], where=usable)
    return out


def correct_answers(logits: Array, labels: Array) -> Array:
    """Whether the highest logit is the label's, bool (N,); a tie goes to the first class.

    Raises:
        EdgestillError: shapes or labels that do not fit, or NaN among the logits.
    """
    import numpy as np

    logits, labels = np.asarray(logits), np.asarray(labels)
    _check_logits(logits)
    if labels.shape != (logits.shape[0],):
        raise EdgestillError(
            "labels and logits do not fit",
            evidence=f"labels {labels.shape}, logits {logits.shape}; wanted (N,), (N, C)",
        )
    if int(labels.min()) < 0 or int(labels.max()) >= logits.shape[1]:
        raise EdgestillError(
            "a label has no logit",
            evidence=f"labels from {labels.min()} to {labels.max()}, {logits.shape[1]} logits",
        )
    correct: Array = logits.argmax(axis=1) == labels
    return correct


def _checked_multilabel(logits: Array, labels: Array, mask: Array | None) -> tuple[Array, Array, Array | None]:
    """The classes that can be judged: those with a positive and a negative known label."""
    import numpy as np

    logits, labels = np.asarray(logits), np.asarray(labels)
    mask = None if mask is None else np.asarray(mask, dtype=bool)
    _check_logits(logits)
    if labels.shape != logits.shape or (mask is not None and mask.shape != logits.shape):
        shapes = f"labels {labels.shape}, logits {logits.shape}" + ("" if mask is None else f", mask {mask.shape}")
        raise EdgestillError("labels, mask and logits do not fit", evidence=f"{shapes}; wanted (N, C) each")
    positive, negative = labels > 0, labels <= 0
    if mask is not None:
        positive, negative = positive & mask, negative & mask
    judged = np.flatnonzero(positive.any(axis=0) & negative.any(axis=0))
    if judged.size == 0:
        raise EdgestillError(
            "mAP is not defined on these samples",
            evidence=f"none of {labels.shape[1]} classes has both a positive and a negative known label",
            fix="evaluate on more samples, or with more known labels",
        )
    return logits[:, judged], labels[:, judged], None if mask is None else mask[:, judged]


def _check_logits(logits: Array) -> None:
    import numpy as np

    if logits.ndim != 2 or 0 in logits.shape:
        raise EdgestillError("logits must be a table (N, C) with at least one row", evidence=f"shape {logits.shape}")
    bad = np.isnan(logits).any(axis=1)
    if bad.any():
        raise EdgestillError(
            "the model's logits are not numbers",
            evidence=f"NaN in {int(bad.sum())} of {bad.size} samples, first in number {int(bad.argmax())}",
            fix="a lower learning rate, or another precision for this model",
        )


def _class_mean(precision: Floats) -> Floats:
    """Mean over the classes that are defined in each resample, (R, C) to (R',); resamples without any are left out."""
    import numpy as np

    defined = ~np.isnan(precision)
    some = defined.any(axis=1)
    sums: Floats = np.where(defined, precision, 0).sum(axis=1)[some] / defined.sum(axis=1)[some]
    return sums


def _resamples(n: int, seed: int) -> Iterator[Floats]:
    """How often each sample is drawn, float32 (N, R) in portions of R that fit into memory; _RESAMPLES in all."""
    import numpy as np

    random = np.random.default_rng(seed)
    step = max(1, _CELLS // n)
    for start in range(0, _RESAMPLES, step):
        count = min(step, _RESAMPLES - start)
        drawn = random.integers(0, n, (count, n)) + np.arange(count)[:, None] * n
        counts = np.bincount(drawn.reshape(-1), minlength=count * n).reshape(count, n)
        yield np.ascontiguousarray(counts.T, dtype=np.float32)


def _quantiles(resampled: Array, confidence: float = 0.95) -> tuple[float, float]:
    import numpy as np

    half = (1 - confidence) / 2
    low, high = np.quantile(resampled, [half, 1 - half])
    return float(low), float(high)
