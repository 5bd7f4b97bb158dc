"""Percentiles with bounds that hold, verdicts, intervals and paired comparisons: pure functions on plain arrays.

Nothing here assumes a distribution of latencies: the bounds are order statistics, so they hold for two modes and for
heavy tails alike. They assume independent samples; `stability` tests that and says what is left when it does not hold,
`lag1_autocorrelation` tells how far neighbours depend on each other, and the comparisons of series resample blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from profiles.errors import EdgestillError

Floats = NDArray[np.float64]
Outcome = Literal["pass", "fail", "inconclusive"]

MATERIAL = 1.10
"""A figure that moves by less than this factor is stable: what the warm-up's windows may differ by, too."""
_FAR = 3.0
"""A limit that is so many times the slowest of enough samples is kept, however much these moved: pauses of a busy
machine make eighths differ by far more, and say nothing of queries that take three times the longest pause."""
DEPENDENCE_ERROR = 0.001
"""Probability that independent samples are taken for unstable ones, for each percentile that is tested."""
CAUTION = 0.05
"""Below this probability of random order, bounds count the dependence that was seen; too wide ones do no harm."""

_CELLS = 4_000_000
"""Resampled values that are held at once: 32 MB."""
_FINEST_BLOCKS = 128
_FEWEST_BLOCKS = 8
_PARTS = 8
_SHUFFLES = 8000
_SHORT = 4096
_DENSE = 2
"""Marks per finest block from which the counts' dispersion follows a chi-square well enough."""
_SURELY_RANDOM = 3.0
"""Standard deviations below which shuffling need not be tried: seven block lengths reach them in 1 % of the series."""
_SURELY_CLUSTERED = 10.0
_SURELY = 1e-6
"""And above which: five of seven slow samples in one of 128 blocks is less likely than 1 in 10,000,000."""


@dataclass(frozen=True)
class Interval:
    """A point estimate and its interval, in the unit of the samples."""

    value: float
    low: float
    high: float
    confidence: float
    method: str


@dataclass(frozen=True)
class PairedDifference(Interval):
    """The mean of a - b over pairs, such as the seeds of two methods; `wins` of the `n` pairs had a > b."""

    wins: int
    n: int


@dataclass(frozen=True)
class Stability:
    """Whether a percentile of a series has one value, and its bounds with the dependence in the series counted in.

    stable: the bounds hold, as they are here. lower, upper: in the unit of the samples; those of `lower_bound` and
    `upper_bound` where samples are independent, wider otherwise, None when the samples are too few. p_value: of the
    series being in random order. inflation: how many dependent samples tell as much as one independent one.
    """

    stable: bool
    lower: float | None
    upper: float | None
    p_value: float
    inflation: float


def percentile(samples: ArrayLike, p: float) -> float:
    """The p-th percentile (0 < p <= 100) by nearest rank: always a value that was seen, never one between two modes.

    Raises:
        EdgestillError: no samples, or one that is not finite.

    >>> percentile([5.0, 1.0, 2.0, 4.0, 3.0], 50)
    3.0
    """
    ordered = _sorted(samples)
    return float(ordered[math.ceil(round(p / 100 * ordered.size, 9)) - 1])


@lru_cache(maxsize=256)
def samples_needed(percentile: float, confidence: float = 0.99) -> int:
    """Fewest samples from which a percentile may be reported: those at which `upper_bound` is the largest of them.

    The smallest n = h + t for t = 1 of MLPerf LoadGen's early stopping, P[Bin(h + t, 1 - p) <= t] <= 1 - c
    (MLCommons inference policies, "Early Stopping Criterion").

    >>> [samples_needed(p) for p in (90, 95, 99, 99.9)]
    [64, 130, 662, 6636]
    """
    tail = _tail(percentile)
    error = _error(confidence)

    def too_few(n: int) -> bool:
        return (1 - tail) ** n + n * tail * (1 - tail) ** (n - 1) > error

    high = 2
    while too_few(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if too_few(middle) else (low, middle)
    return high


def upper_bound(samples: ArrayLike, percentile: float, confidence: float = 0.99) -> float | None:
    """A latency that the percentile does not exceed, with at least this confidence; None when the samples are too few.

    The t-th largest sample with the largest t >= 1 such that P[Bin(n, 1 - p) <= t] <= 1 - c: LoadGen's early stopping.
    It over-covers, since P[Bin(n, 1 - p) <= t - 1] <= 1 - c would do: 99.95 % at p99 with 1,000 samples.
    """
    ordered = _sorted(samples)
    t = _upper_rank(ordered.size, _tail(percentile), _error(confidence))
    return None if t is None else float(ordered[-t])


def lower_bound(samples: ArrayLike, percentile: float, confidence: float = 0.99) -> float | None:
    """A latency that the percentile reaches, with at least this confidence; None when the samples are too few.

    The s-th largest sample with the smallest s such that P[Bin(n, 1 - p) >= s] <= 1 - c: that many samples above the
    percentile would be too unlikely, so it lies at or above the s-th.
    """
    ordered = _sorted(samples)
    s = _lower_rank(ordered.size, _tail(percentile), _error(confidence))
    return None if s is None else float(ordered[-s])


def verdict(samples: ArrayLike, limit: float, percentile: float, confidence: float = 0.99) -> Outcome:
    """ "pass" when the upper bound of the percentile is within `limit`, "fail" when the lower bound is over it.

    Between the two it is "inconclusive". Each answer is wrong with a probability of at most 1 - confidence. Where the
    same samples are judged several times as they grow, pass `look_confidence`.

    >>> verdict(range(1, 1001), limit=1000, percentile=99)
    'pass'
    """
    ordered = _sorted(samples)
    tail, error = _tail(percentile), _error(confidence)
    t = _upper_rank(ordered.size, tail, error)
    if t is not None and ordered[-t] <= limit:
        return "pass"
    s = _lower_rank(ordered.size, tail, error)
    if s is not None and ordered[-s] > limit:
        return "fail"
    return "inconclusive"


def look_sizes(percentile: float, confidence: float = 0.99, maximum: int = 20_000) -> tuple[int, ...]:
    """Numbers of samples at which a verdict is tried: `samples_needed`, doubled until `maximum`, which is the last.

    >>> look_sizes(99)
    (662, 1324, 2648, 5296, 10592, 20000)
    """
    size = samples_needed(percentile, confidence)
    sizes = []
    while size < maximum:
        sizes.append(size)
        size *= 2
    return (*sizes, maximum)


def look_confidence(confidence: float, looks: int) -> float:
    """The confidence of each of `looks` verdicts, such that all of them together are wrong with 1 - confidence at most.

    The error probability is split evenly (Bonferroni), since every further look is another chance to be wrong.

    >>> round(look_confidence(0.99, 5), 6)
    0.998
    """
    if looks < 1:
        raise ValueError("at least one look")
    return 1 - _error(confidence) / looks


def effective_count(samples: ArrayLike, percentile: float) -> int:
    """How many independent samples would say as much about the percentile as these, which follow each other in time.

    n divided by how much more the share of samples above the percentile varies between blocks than independent ones
    would (the design effect; Heidelberger and Lewis, 1984, estimate quantiles of dependent sequences in this way).
    Never more than n.

    Args:
        samples: (N,), in the order of measurement.
        percentile: 0 < percentile < 100.

    >>> effective_count([1.0, 2.0] * 50, 50)
    100
    """
    values = _array(samples)
    tail = _tail(percentile)
    n = int(values.size)
    over = (values > np.partition(values, n - 1 - int(tail * n))[n - 1 - int(tail * n)]).astype(np.float64)
    share = float(over.mean())
    # few samples lie above a high percentile, so the blocks are longer than those of `block_length` alone
    size = max(block_length(over), math.isqrt(n))
    if size < 2 or share in (0.0, 1.0):
        return n
    running = np.concatenate(([0.0], np.cumsum(np.concatenate((over, over[: size - 1])))))
    sums = running[size:] - running[:-size]
    inflation = float(np.mean((sums - size * share) ** 2)) / (size * share * (1 - share))
    return max(1, int(n / max(inflation, 1.0)))


def percentile_bounds(
    samples: ArrayLike, percentile: float, confidence: float = 0.99
) -> tuple[float | None, float | None]:
    """Between which two samples the percentile lies, each bound with this confidence; None where samples are too few.

    Order statistics, so they hold for any distribution: the t-th largest with the largest t such that
    P[Bin(n, 1 - p) <= t - 1] <= 1 - c, and the s-th largest of `lower_bound`. Unlike `upper_bound` this one does not
    over-cover, and n is `effective_count`, so that a slow spell of a hundred queries does not count as a hundred.

    Args:
        samples: (N,), in the order of measurement.
        percentile: 0 < percentile < 100.
        confidence: of each bound by itself.

    >>> percentile_bounds([1.0, 2.0, 3.0, 4.0] * 100, 50, 0.99)
    (2.0, 3.0)
    """
    ordered = _sorted(samples)
    n, tail, error = int(ordered.size), _tail(percentile), _error(confidence)
    return _ranked(ordered, *_clustered_ranks(n, n / effective_count(samples, percentile), tail, error))


def paired_shares(only_a: int, only_b: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of the share of `n` samples that b has right minus that of a, from the samples on which they disagree.

    Agresti and Min (2005): half a sample is added to each of the four cells, which keeps the interval honest where
    hardly any sample tells the two apart.

    Args:
        only_a: samples that a alone has right.
        only_b: samples that b alone has right.
        n: all samples.
        confidence: two-sided.

    Raises:
        ValueError: counts that do not fit.

    >>> tuple(round(bound, 4) for bound in paired_shares(10, 30, 1000))
    (0.0075, 0.0324)
    """
    if n < 1 or only_a < 0 or only_b < 0 or only_a + only_b > n:
        raise ValueError(f"{only_a} and {only_b} of {n}")
    z = NormalDist().inv_cdf(1 - _error(confidence) / 2)
    a, b, total = only_a + 0.5, only_b + 0.5, n + 2
    value = (b - a) / total
    half = z * math.sqrt(max((a + b) / total - value * value, 0.0) / total)
    return max(-1.0, value - half), min(1.0, value + half)


def lag1_autocorrelation(samples: ArrayLike) -> float | None:
    """Correlation of each sample with the next one, -1 to 1; None below three samples or when all are equal.

    Far from 0, neighbouring queries are not independent and the bounds above are too narrow.
    """
    values = _array(samples)
    if values.size < 3:
        return None
    centred = values - values.mean()
    variance = float(centred @ centred)
    # Equal values leave rounding errors behind, whose correlation would mean nothing.
    if variance <= values.size * (1e-12 * float(np.abs(values).max())) ** 2:
        return None
    return float(centred[:-1] @ centred[1:]) / variance


def stability(series: ArrayLike, p: float, confidence: float = 0.99) -> Stability:
    """Whether the p-th percentile of a series in the order of measurement is one number, and its bounds.

    1. Are slow samples scattered at random? Those over several thresholds are counted in 128, 64, ... 2 blocks of equal
       length. The largest standardised dispersion of these counts over all block lengths is compared with what random
       order gives (by chi-square; by shuffling where marks are few), and so is the number of runs that they form (Wald
       and Wolfowitz, 1940). No distribution of latencies is assumed. Scattered, at `CAUTION`: the usual bounds hold.
    2. If not, n samples tell as much as n / F independent ones, with F the dispersion of the counts relative to its
       expectation (the variance inflation of block means, as in batch means of simulations), larger by what so few
       blocks leave open. The bounds are those of n / F samples. Where that is too few for a bound, it lies beyond the
       usual one by twice the factor between the eighths of the series with the highest and the lowest percentile.
    3. Where the order is far from random, at `DEPENDENCE_ERROR`, the figure is not stable when the new bounds are wider
       than the usual ones by more than 10 %, or when the medians of the eighths differ by more than that. Else it is,
       with the new bounds.

    So a drift of 2 % and a hundred short bursts give a number, a drift of 30 % and two long bursts do not.

    Args:
        series: (N,) latencies.
        p: percentile.
        confidence: of each bound.

    >>> stability([1.0] * 700 + [2.0] * 300, 50).stable
    False
    """
    values = _array(series)
    ordered = np.sort(values)
    n, tail, error = values.size, _tail(p), _error(confidence)
    t, s = _upper_rank(n, tail, error), _lower_rank(n, tail, error)
    lower, upper = _ranked(ordered, s, t)
    figure = _nearest_rank(ordered, p)
    # the percentile's own samples are few; those a little further inside tell more, and cluster no less
    shares = [share for share in (tail, 2 * tail, 4 * tail) if share <= 0.5]
    near = [_slow(values, _nearest_rank(ordered, 100 * (1 - share))) for share in shares]
    # a little below the figure a spell of slow samples shows as a whole, a little above it free of the others
    around = [_slow(values, threshold) for threshold in (figure / MATERIAL, figure * MATERIAL)]
    chance = min(1.0, len(near + around) * min(_scatter(marked) for marked in near + around))
    if chance > CAUTION:
        return Stability(True, lower, upper, chance, 1.0)
    sure = chance <= DEPENDENCE_ERROR
    inflation = max(_inflation(marked, error) for marked in near)
    wide_s, wide_t = _clustered_ranks(n, inflation, tail, error)
    wide_lower, wide_upper = _ranked(
        ordered,
        None if s is None or wide_s is None else max(s, wide_s),
        None if t is None or wide_t is None else min(t, wide_t),
    )
    beyond = _movement(values, p) ** 2 if sure else 1.0
    if wide_upper is None and upper is not None:
        wide_upper = float(ordered[-1]) * beyond
    if wide_lower is None and lower is not None:
        wide_lower = float(ordered[0]) / beyond
    widened = 1.0
    for inner, outer in ((upper, wide_upper), (lower, wide_lower)):
        if inner is not None and outer is not None and min(inner, outer) > 0:
            widened *= max(inner, outer) / min(inner, outer)
    moved = max(widened, _movement(values, 50))
    return Stability(not sure or moved <= MATERIAL, wide_lower, wide_upper, chance, inflation)


def judge(series: ArrayLike, limit: float, p: float, confidence: float = 0.99) -> Outcome:
    """`verdict` for samples in the order of measurement, which may depend on each other: by the bounds of `stability`.

    Where the percentile is not stable, it passes only when every single sample is within the limit, were it slower by
    as much again as the slowest eighth of them is than the quickest one, or three times as slow; and fails only when
    every sample is over it.

    >>> judge([1.0] * 700 + [2.0] * 300, limit=1.5, p=50)
    'inconclusive'
    """
    values = _array(series)
    found = stability(values, p, confidence)
    lower, upper = found.lower, found.upper
    if not found.stable:
        upper = None if upper is None else float(values.max()) * min(_movement(values, p), _FAR)
        lower = None if lower is None else float(values.min())
    if upper is not None and upper <= limit:
        return "pass"
    return "fail" if lower is not None and lower > limit else "inconclusive"


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Two-sided score interval of a proportion (Wilson, 1927): low and high, as fractions.

    Raises:
        ValueError: not 0 <= successes <= n, or n is 0.

    >>> tuple(round(bound, 3) for bound in wilson(90, 100))
    (0.826, 0.945)
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}")
    z = NormalDist().inv_cdf(1 - _error(confidence) / 2)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At the ends the interval touches 0 or 1 exactly; rounding would leave it a hair inside or outside.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high


def bootstrap_interval(
    values: ArrayLike,
    statistic: Callable[[Floats], Any] | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap (Efron, 1979) of a statistic of independent values; the default is the mean.

    Args:
        values: (N,).
        statistic: maps (..., N) to (...) along the last axis.
        confidence: two-sided.
        resamples: number of bootstrap samples.
        seed: the same seed gives the same interval.
    """
    data = _array(values)
    function = statistic or _mean
    random = np.random.default_rng(seed)
    step = max(1, _CELLS // data.size)
    parts = [
        np.asarray(function(data[random.integers(0, data.size, (min(step, resamples - start), data.size))]))
        for start in range(0, resamples, step)
    ]
    return _interval(float(function(data)), np.concatenate(parts), confidence, f"bootstrap, {resamples} resamples")


def paired_difference(
    a: ArrayLike, b: ArrayLike, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> PairedDifference:
    """The mean of a - b over pairs (one pair per seed, say), its bootstrap interval, and how many pairs a won.

    Args:
        a: (N,), such as one method's metric on N seeds.
        b: (N,), the other method's on the same seeds.

    Raises:
        ValueError: the two are not of one length.

    >>> paired_difference([0.91, 0.93, 0.92], [0.90, 0.91, 0.92]).wins
    2
    """
    first, second = _array(a), _array(b)
    if first.size != second.size:
        raise ValueError(f"{first.size} and {second.size} values are not pairs")
    found = bootstrap_interval(first - second, confidence=confidence, resamples=resamples, seed=seed)
    wins = int((first > second).sum())
    return PairedDifference(
        found.value, found.low, found.high, found.confidence, "paired " + found.method, wins=wins, n=first.size
    )


def block_length(series: ArrayLike) -> int:
    """Length of bootstrap blocks: (2 r / (1 - r^2))^(2/3) n^(1/3) for lag-1 autocorrelation r, at least n^(1/3).

    The first is the optimum for a first-order autoregression (Carlstein, 1986), the second the rate of Hall, Horowitz
    and Jing (1995), which also catches dependence that lag 1 does not show. At most a quarter of the series.
    """
    values = _array(series)
    r = min(abs(lag1_autocorrelation(values) or 0.0), 0.99)
    cube_root = values.size ** (1 / 3)
    length = max(cube_root, cube_root * (2 * r / (1 - r * r)) ** (2 / 3))
    return int(max(1, min(math.ceil(length), values.size // 4)))


def block_bootstrap_difference(
    a: ArrayLike,
    b: ArrayLike,
    *,
    p: float = 50,
    confidence: float = 0.95,
    resamples: int = 1000,
    block: int | None = None,
    seed: int = 0,
) -> Interval:
    """The p-th percentile of a minus that of b, for two series that were measured interleaved in time.

    Circular block bootstrap (Politis and Romano, 1992): blocks keep the dependence of neighbours, and both series take
    the same blocks, so that a slow spell which hit both cancels out.

    Args:
        a: (N,), in the order of measurement.
        b: (M,), likewise; of the longer one only the first min(N, M) are used.
        p: percentile, 0 to 100.
        block: block length; default `block_length` of the more dependent series.
    """
    first, second = _array(a), _array(b)
    n = min(first.size, second.size)
    first, second = first[:n], second[:n]
    size = max(block_length(first), block_length(second)) if block is None else min(block, n)
    random = np.random.default_rng(seed)
    rank = math.ceil(round(p / 100 * n, 9)) - 1
    rank = max(rank, 0)
    steps = np.arange(size)
    blocks = math.ceil(n / size)
    differences = []
    at_once = max(1, _CELLS // n)
    for start in range(0, resamples, at_once):
        starts = random.integers(0, n, (min(at_once, resamples - start), blocks, 1))
        rows = ((starts + steps) % n).reshape(starts.shape[0], -1)[:, :n]
        at_rank = [np.partition(series[rows], rank, axis=1)[:, rank] for series in (first, second)]
        differences.append(at_rank[0] - at_rank[1])
    value = float(np.partition(first, rank)[rank] - np.partition(second, rank)[rank])
    method = f"circular block bootstrap of the p{p:g}, blocks of {size}, {resamples} resamples"
    return _interval(value, np.concatenate(differences), confidence, method)


def _interval(value: float, resampled: Floats, confidence: float, method: str) -> Interval:
    half = _error(confidence) / 2
    low, high = np.quantile(resampled, [half, 1 - half])
    return Interval(value, float(low), float(high), confidence, method)


def _mean(values: Floats) -> Any:
    return values.mean(axis=-1)


def _slow(values: Floats, threshold: float) -> NDArray[np.bool_]:
    """Which samples lie above the threshold, or at it: whichever tells more where many are equal."""
    above, reached = values > threshold, values >= threshold
    return above if min(above.sum(), (~above).sum()) > min(reached.sum(), (~reached).sum()) else reached


def _dispersions(counts: NDArray[np.int64], length: int, k: int) -> tuple[list[int], list[NDArray[np.float64]]]:
    """Numbers of blocks, halved until 2, and for each the squared dispersion of the counts relative to its expectation.

    Args:
        counts: (..., B) marked samples in each of B blocks of `length`; B is a power of two.
        k: all marked samples.
    """
    blocks, ratios = [], []
    n = counts.shape[-1] * length
    while counts.shape[-1] > 1:
        b = counts.shape[-1]
        size = n // b
        expected = b * size * (k / n) * (1 - k / n) * (n - size) / (n - 1)
        blocks.append(b)
        # sum of (count - k / b) squared: of whole numbers, so nothing is lost
        ratios.append((np.einsum("...i,...i->...", counts, counts) - k * k / b) / expected)
        counts = counts[..., 0::2] + counts[..., 1::2]
    return blocks, ratios


def _counted(marked: NDArray[np.bool_]) -> tuple[NDArray[np.int64], int, int] | None:
    """Marks in each of the finest blocks, their length, and all of them; None where there is nothing to compare."""
    n = marked.size
    b = min(_FINEST_BLOCKS, 2 ** int(math.log2(max(n // 4, 1))))
    if b < _FEWEST_BLOCKS:
        return None
    length = n // b
    counts = marked[n - b * length :].reshape(b, length).sum(axis=1)
    k = int(counts.sum())
    return (counts, length, k) if 1 < k < b * length - 1 else None


def _inflation(marked: NDArray[np.bool_], error: float) -> float:
    """How many marks tell as much as one in random order would: variance inflation of block means, at least 1.

    Few blocks estimate a variance badly; as for Student's t, that asks for more, at the bounds' error probability. The
    largest of several estimates has some of that in it already, so that nothing below 16 blocks asks for more yet.
    """
    found = _counted(marked)
    if found is None:
        return 1.0
    blocks, ratios = _dispersions(*found)
    return max(
        1.0,
        *(
            float(ratio) * _few(max(b, 2 * _FEWEST_BLOCKS), error)
            for b, ratio in zip(blocks, ratios, strict=True)
            if b >= _FEWEST_BLOCKS
        ),
    )


@lru_cache(maxsize=256)
def _few(blocks: int, error: float) -> float:
    from scipy.stats import t

    return float(t.isf(error, blocks - 1) / NormalDist().inv_cdf(1 - error)) ** 2


def _movement(values: Floats, p: float) -> float:
    """The factor between the highest and the lowest p-th percentile of the series' eighths."""
    parts = np.sort(values[values.size % _PARTS :].reshape(_PARTS, -1), axis=1)
    if not parts.size:
        return math.inf
    figures = parts[:, math.ceil(round(p / 100 * parts.shape[1], 9)) - 1]
    return float(figures.max() / figures.min()) if figures.min() > 0 else math.inf


def _clustered_ranks(n: int, inflation: float, tail: float, error: float) -> tuple[int | None, int | None]:
    """Which largest samples bound the percentile from below and above where n of them tell as much as n / inflation.

    The s-th with the smallest s such that P[Bin >= s] <= error, and the t-th with the largest t such that
    P[Bin <= t - 1] <= error, for n / inflation samples, times the inflation. A cluster that is missing is missing as a
    whole, so the largest stays the largest.
    """
    count = int(round(n / inflation, 9))
    s, t = _lower_rank(count, tail, error), _upper_rank(count, tail, error)
    # P[Bin <= t] <= error for t, so t + 1 is what `t - 1` of the formula above allows
    t = t + 1 if t is not None else 1 if (1 - tail) ** count <= error else None
    return (
        None if s is None else min(n, math.ceil(s * inflation)),
        None if t is None else 1 + int((t - 1) * inflation),
    )


def _ranked(ordered: Floats, s: int | None, t: int | None) -> tuple[float | None, float | None]:
    """The s-th and the t-th largest."""
    return None if s is None else float(ordered[-s]), None if t is None else float(ordered[-t])


def _nearest_rank(ordered: Floats, p: float) -> float:
    return float(ordered[max(1, math.ceil(round(p / 100 * ordered.size, 9))) - 1])


def _scatter(marked: NDArray[np.bool_]) -> float:
    """How probable it is that marks in random order are as clustered as these, in blocks or as neighbours."""
    return min(1.0, 2 * min(_in_blocks(marked), _in_runs(marked)))


def _in_runs(marked: NDArray[np.bool_]) -> float:
    """How probable it is that marks in random order are in so few runs: exact, and sharp for neighbours that depend.

    Of the n - k + 1 places before, between and behind the unmarked, k marks take a hypergeometric number.
    """
    from scipy.stats import hypergeom

    n, k = marked.size, int(marked.sum())
    runs = int(marked[:1].sum()) + int((marked[1:] & ~marked[:-1]).sum())
    if k == 0 or runs >= k * (n - k + 1) / n:
        return 1.0
    return float(hypergeom.cdf(runs, n, n - k + 1, k))


def _in_blocks(marked: NDArray[np.bool_]) -> float:
    """How probable it is that marks in random order are so unevenly spread over blocks of some length."""
    found = _counted(marked)
    if found is None:
        return 1.0
    counts, length, k = found
    blocks, ratios = _dispersions(counts, length, k)
    seen = float(_largest(blocks, ratios))
    if min(k, counts.size * length - k) >= _DENSE * counts.size:
        return min(1.0, len(blocks) * NormalDist().cdf(-seen))
    if seen < _SURELY_RANDOM:
        return 1.0
    if seen > _SURELY_CLUSTERED:
        return _SURELY
    # few marks, many block lengths: no formula, so they are thrown into the blocks at random; the rarer kind of mark
    random = _thrown(counts.size, length, min(k, counts.size * length - k))
    # equal counts in another order differ by a rounding error
    return (1 + random.size - int(np.searchsorted(random, seen - 1e-9))) / (_SHUFFLES + 1)


@lru_cache(maxsize=512)
def _thrown(count: int, length: int, rare: int) -> Floats:
    """The largest dispersions of so many marks in random order, ascending: kept, since looks are at the same sizes."""
    # numpy's way for few balls of each colour shuffles them all, so it is the slower one for long series
    method: Literal["count", "marginals"] = "count" if count * length <= _SHORT else "marginals"
    random = np.random.default_rng(0)
    thrown = random.multivariate_hypergeometric([length] * count, rare, _SHUFFLES, method)
    return np.sort(_largest(*_dispersions(thrown, length, rare)))


def _largest(blocks: list[int], ratios: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """The largest dispersion in standard deviations, by Wilson and Hilferty's (1931) cube root of a chi-square."""
    scores = []
    for b, ratio in zip(blocks, ratios, strict=True):
        spread = 2 / (9 * (b - 1))
        scores.append((np.cbrt(ratio) - (1 - spread)) / math.sqrt(spread))
    return np.asarray(np.max(scores, axis=0))


@lru_cache(maxsize=1024)
def _upper_rank(n: int, tail: float, error: float) -> int | None:
    from scipy.stats import binom

    # ppf gives the smallest t with cdf >= error; only where the two are equal does that t itself satisfy cdf <= error.
    t = int(binom.ppf(error, n, tail))
    if binom.cdf(t, n, tail) > error:
        t -= 1
    return t if t >= 1 else None


@lru_cache(maxsize=1024)
def _lower_rank(n: int, tail: float, error: float) -> int | None:
    from scipy.stats import binom

    # sf(s - 1) = P[Bin >= s]; isf gives the smallest s - 1 with sf <= error.
    s = int(binom.isf(error, n, tail)) + 1
    return s if s <= n else None


def _tail(percentile: float) -> float:
    """The share of queries above the percentile. Rounded, like the error below: 1 - 0.999 misses 0.001 by a hair."""
    if not 0 < percentile < 100:
        raise ValueError(f"percentile {percentile} is not between 0 and 100")
    return round(100 - percentile, 9) / 100


def _error(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence} is not between 0 and 1")
    return round(1 - confidence, 12)


def _array(samples: ArrayLike) -> Floats:
    values = np.asarray(samples, dtype=np.float64).reshape(-1)
    if values.size == 0:
        raise EdgestillError("there are no samples", fix="measure for longer")
    if not np.isfinite(values).all():
        raise EdgestillError(
            "a sample is not a finite number", evidence=f"{int((~np.isfinite(values)).sum())} of {values.size}"
        )
    return values


def _sorted(samples: ArrayLike) -> Floats:
    return np.sort(_array(samples))
