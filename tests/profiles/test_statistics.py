"""The bounds hold for any distribution, agree with their definitions, and repeated looks do not break them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from profiles import statistics as ours
from profiles.errors import EdgestillError

latencies = st.lists(st.floats(0.01, 1e4), min_size=1, max_size=200)
percentiles = st.sampled_from([50.0, 90.0, 95.0, 99.0, 99.9])
confidences = st.sampled_from([0.9, 0.99, 0.999])


def gamma(random: np.random.Generator, n: int) -> np.ndarray:
    return random.gamma(4.0, 0.5, n)


def bimodal(random: np.random.Generator, n: int) -> np.ndarray:
    """Most queries at 1 ms, some at 5 ms: p90 and p99 lie in different modes."""
    return np.where(random.random(n) < 0.985, random.normal(1.0, 0.02, n), random.normal(5.0, 0.1, n))


def heavy_tail(random: np.random.Generator, n: int) -> np.ndarray:
    """Pareto with an infinite variance."""
    return 1 + random.pareto(1.5, n)


def quantile_of(draw: object, p: float) -> float:
    """The true percentile, from a sample so large that its error does not matter here."""
    values = draw(np.random.default_rng(99), 2_000_000)  # type: ignore[operator]
    return float(np.quantile(values, p / 100))


@pytest.mark.parametrize(("p", "expected"), [(50, 11), (90, 64), (95, 130), (99, 662), (99.9, 6636)])
def test_sample_minimum_is_that_of_loadgen(p: float, expected: int) -> None:
    assert ours.samples_needed(p) == expected


@given(st.floats(20, 99.5), confidences)
@settings(max_examples=50, deadline=None)
def test_sample_minimum_is_the_smallest_that_satisfies_the_criterion(p: float, confidence: float) -> None:
    n = ours.samples_needed(p, confidence)
    tail = 1 - p / 100
    assert stats.binom.cdf(1, n, tail) <= 1 - confidence + 1e-12
    assert n == 2 or stats.binom.cdf(1, n - 1, tail) > 1 - confidence - 1e-12


@pytest.mark.parametrize("p", [90, 95, 99])
def test_at_the_minimum_the_bound_is_the_maximum_and_below_it_there_is_none(p: float) -> None:
    n = ours.samples_needed(p)
    samples = np.random.default_rng(0).permutation(np.arange(1.0, n + 1))
    assert ours.upper_bound(samples, p) == n
    assert ours.upper_bound(samples[:-1], p) is None


@given(st.integers(1, 3000), percentiles, confidences)
@settings(max_examples=60, deadline=None)
def test_ranks_are_the_extreme_ones_that_satisfy_their_definition(n: int, p: float, confidence: float) -> None:
    samples = np.arange(1.0, n + 1)
    tail, error = round(100 - p, 9) / 100, round(1 - confidence, 12)
    counts = np.arange(n + 1)
    allowed = counts[1:][stats.binom.cdf(counts[1:], n, tail) <= error]
    upper = ours.upper_bound(samples, p, confidence)
    assert upper == (samples[-allowed.max()] if allowed.size else None)
    allowed = counts[1:][stats.binom.sf(counts[1:] - 1, n, tail) <= error]
    lower = ours.lower_bound(samples, p, confidence)
    assert lower == (samples[-allowed.min()] if allowed.size else None)


@given(latencies, percentiles)
@settings(max_examples=60, deadline=None)
def test_bounds_enclose_the_estimate_are_seen_values_and_ignore_order(samples: list[float], p: float) -> None:
    estimate = ours.percentile(samples, p)
    upper, lower = ours.upper_bound(samples, p), ours.lower_bound(samples, p)
    assert estimate in samples
    assert upper is None or (upper in samples and upper >= estimate)
    assert lower is None or (lower in samples and lower <= estimate)
    assert ours.upper_bound(samples[::-1], p) == upper
    more = ours.upper_bound(samples, p, 0.9999)
    assert more is None or (upper is not None and more >= upper)


@given(latencies, percentiles, st.floats(0.01, 1e4))
@settings(max_examples=60, deadline=None)
def test_verdict_says_what_the_bounds_say(samples: list[float], p: float, limit: float) -> None:
    upper, lower = ours.upper_bound(samples, p), ours.lower_bound(samples, p)
    expected = "pass" if upper is not None and upper <= limit else "inconclusive"
    if expected != "pass" and lower is not None and lower > limit:
        expected = "fail"
    assert ours.verdict(samples, limit, p) == expected


@pytest.mark.parametrize("draw", [gamma, bimodal, heavy_tail])
@pytest.mark.parametrize(("p", "n"), [(90, 300), (99, 1000)])
def test_bounds_cover_the_truth_as_often_as_they_claim(draw: object, p: float, n: int) -> None:
    truth = quantile_of(draw, p)
    random = np.random.default_rng(7)
    trials, confidence = 1500, 0.95
    missed_above = missed_below = 0
    for _ in range(trials):
        samples = draw(random, n)  # type: ignore[operator]
        upper, lower = ours.upper_bound(samples, p, confidence), ours.lower_bound(samples, p, confidence)
        assert upper is not None
        assert lower is not None
        missed_above += truth > upper
        missed_below += truth < lower
    # Three standard errors of the simulation beside the claimed 5 %.
    allowed = trials * 0.05 + 3 * math.sqrt(trials * 0.05 * 0.95)
    assert missed_above <= allowed
    assert missed_below <= allowed


def test_over_coverage_is_as_documented() -> None:
    samples = np.arange(1.0, 1001)
    upper = ours.upper_bound(samples, 99)
    assert upper is not None
    t = int(1001 - upper)
    assert 1 - stats.binom.cdf(t - 1, 1000, 0.01) == pytest.approx(0.9995, abs=5e-5)


def test_look_sizes_double_from_the_minimum_to_the_maximum() -> None:
    assert ours.look_sizes(99) == (662, 1324, 2648, 5296, 10592, 20000)
    assert ours.look_sizes(99.9, maximum=5000) == (5000,)
    assert ours.look_sizes(90, maximum=64) == (64,)


@pytest.mark.parametrize("wrong", ["pass", "fail"])
def test_looking_again_and_again_is_wrong_no_more_often_than_claimed(wrong: str) -> None:
    p, confidence = 90.0, 0.95
    truth = quantile_of(heavy_tail, p)
    limit = truth * (0.999 if wrong == "pass" else 1.001)
    sizes = ours.look_sizes(p, confidence, maximum=800)
    each = ours.look_confidence(confidence, len(sizes))
    random = np.random.default_rng(3)
    trials, mistakes = 1000, 0
    for _ in range(trials):
        samples = heavy_tail(random, sizes[-1])
        for size in sizes:
            found = ours.verdict(samples[:size], limit, p, each)
            if found != "inconclusive":
                mistakes += found == wrong
                break
    assert mistakes <= trials * 0.05 + 3 * math.sqrt(trials * 0.05 * 0.95)


def test_clear_cases_are_decided() -> None:
    samples = gamma(np.random.default_rng(0), 2000)
    assert ours.verdict(samples, 100.0, 99) == "pass"
    assert ours.verdict(samples, 0.1, 99) == "fail"
    assert ours.verdict(samples, ours.percentile(samples, 99), 99) == "inconclusive"
    assert ours.verdict(samples[:20], 100.0, 99) == "inconclusive"


@given(latencies, st.floats(1, 100))
@settings(max_examples=60, deadline=None)
def test_percentile_is_the_nearest_rank(samples: list[float], p: float) -> None:
    expected = np.percentile(samples, p, method="inverted_cdf")
    assert ours.percentile(samples, p) == pytest.approx(expected)


@pytest.mark.parametrize("samples", [[], [1.0, math.nan], [math.inf]])
def test_missing_or_impossible_samples_are_refused(samples: list[float]) -> None:
    for function in (ours.upper_bound, ours.lower_bound, ours.percentile):
        with pytest.raises(EdgestillError):
            function(samples, 90)
    with pytest.raises(EdgestillError):
        ours.verdict(samples, 1.0, 90)


@pytest.mark.parametrize(("p", "confidence"), [(0, 0.99), (100, 0.99), (90, 0), (90, 1)])
def test_impossible_arguments_are_refused(p: float, confidence: float) -> None:
    with pytest.raises(ValueError, match="between"):
        ours.samples_needed(p, confidence)


def autoregression(random: np.random.Generator, n: int, r: float) -> np.ndarray:
    values = np.empty(n)
    values[0] = random.normal()
    noise = random.normal(0, math.sqrt(1 - r * r), n)
    for i in range(1, n):
        values[i] = r * values[i - 1] + noise[i]
    return values


@pytest.mark.parametrize("r", [0.0, 0.5, 0.9])
def test_lag1_autocorrelation_is_found(r: float) -> None:
    found = ours.lag1_autocorrelation(autoregression(np.random.default_rng(0), 4000, r))
    assert found == pytest.approx(r, abs=0.05)


@pytest.mark.parametrize("samples", [[1.0], [1.0, 2.0], [0.1 + 0.2] * 50])
def test_lag1_of_too_few_or_equal_samples_is_unknown(samples: list[float]) -> None:
    assert ours.lag1_autocorrelation(samples) is None


@given(st.lists(st.floats(-1e6, 1e6), min_size=3, max_size=50))
@settings(max_examples=60, deadline=None)
def test_lag1_stays_between_minus_one_and_one(samples: list[float]) -> None:
    found = ours.lag1_autocorrelation(samples)
    assert found is None or -1 <= found <= 1


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.5, 0.999))
@settings(max_examples=60, deadline=None)
def test_wilson_agrees_with_scipy(case: tuple[int, int], confidence: float) -> None:
    successes, n = case
    expected = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    assert ours.wilson(successes, n, confidence) == pytest.approx((expected.low, expected.high), abs=1e-9)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (-1, 3), (4, 3)])
def test_wilson_refuses_impossible_counts(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match="successes of"):
        ours.wilson(successes, n)


def test_bootstrap_interval_of_a_mean_covers_it() -> None:
    random = np.random.default_rng(5)
    found = [ours.bootstrap_interval(random.normal(3, 1, 60), resamples=400, seed=i) for i in range(300)]
    covered = sum(each.low <= 3 <= each.high for each in found)
    assert covered >= 300 * 0.95 - 3 * math.sqrt(300 * 0.95 * 0.05) - 6  # the percentile bootstrap is a little short


def test_bootstrap_takes_any_statistic_and_repeats_itself() -> None:
    values = np.random.default_rng(0).normal(size=50)

    def spread(data: np.ndarray) -> np.ndarray:
        return data.std(axis=-1)

    first = ours.bootstrap_interval(values, spread, seed=1)
    assert first == ours.bootstrap_interval(values, spread, seed=1)
    assert first != ours.bootstrap_interval(values, spread, seed=2)
    assert first.low <= first.value <= first.high
    assert first.value == pytest.approx(values.std())


def test_paired_difference_counts_wins_and_beats_an_unpaired_comparison() -> None:
    random = np.random.default_rng(0)
    seeds = random.normal(0.9, 0.02, 5)
    found = ours.paired_difference(seeds + 0.004 + random.normal(0, 0.0005, 5), seeds)
    assert (found.wins, found.n) == (5, 5)
    assert found.value == pytest.approx(0.004, abs=0.001)
    assert found.low > 0
    with pytest.raises(ValueError, match="not pairs"):
        ours.paired_difference([1.0], [1.0, 2.0])


@pytest.mark.parametrize("r", [0.0, 0.6])
def test_block_bootstrap_covers_the_difference_of_dependent_series(r: float) -> None:
    random = np.random.default_rng(11)
    trials, covered = 150, 0
    for trial in range(trials):
        a, b = autoregression(random, 600, r), autoregression(random, 600, r) + 0.1
        found = ours.block_bootstrap_difference(a, b, resamples=200, seed=trial)
        covered += found.low <= -0.1 <= found.high
    # Block bootstraps of short dependent series fall somewhat short of their level.
    assert covered >= trials * 0.88


def test_slow_spell_that_hit_both_series_cancels_out() -> None:
    random = np.random.default_rng(0)
    spell = np.repeat(random.choice([0.0, 3.0], 40), 25)
    a = spell + random.normal(1.0, 0.01, 1000)
    b = spell + random.normal(1.05, 0.01, 1000)
    found = ours.block_bootstrap_difference(a, b, resamples=300)
    apart = ours.block_bootstrap_difference(a, b[::-1].copy(), resamples=300)
    assert found.low < -0.05 < found.high
    assert found.high - found.low < 0.1 < apart.high - apart.low


def test_block_bootstrap_of_one_series_with_itself_is_zero() -> None:
    samples = gamma(np.random.default_rng(0), 200)
    found = ours.block_bootstrap_difference(samples, samples, p=90, resamples=50)
    assert (found.value, found.low, found.high) == (0, 0, 0)


@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([50.0, 90.0, 100.0]))
@settings(max_examples=25, deadline=None)
def test_block_bootstrap_takes_series_of_any_length(n: int, m: int, p: float) -> None:
    random = np.random.default_rng(n * 1000 + m)
    found = ours.block_bootstrap_difference(random.random(n), random.random(m), p=p, resamples=20)
    assert found.low <= found.high
    assert math.isfinite(found.value)


def test_blocks_grow_with_dependence() -> None:
    random = np.random.default_rng(0)
    assert ours.block_length(random.normal(size=1000)) == 10
    assert ours.block_length(autoregression(random, 1000, 0.9)) > 30
    assert ours.block_length([1.0, 2.0]) == 1


def drifting(random: np.random.Generator, n: int) -> np.ndarray:
    return gamma(random, n) / 2 + np.linspace(0, 1, n)


def two_spells(random: np.random.Generator, n: int) -> np.ndarray:
    """One query in twenty takes three times as long, in two spells."""
    slow = np.zeros(n, bool)
    for start in random.choice(n // 2, 2) + np.array([0, n // 2]):
        slow[start : start + n // 40] = True
    return random.normal(1.0, 0.02, n) * np.where(slow, 3, 1)


@pytest.mark.parametrize("draw", [gamma, bimodal, heavy_tail])
@pytest.mark.parametrize(("p", "n"), [(50, 300), (99, 1324)])
def test_independent_samples_are_stable_with_the_usual_bounds(draw: object, p: float, n: int) -> None:
    random = np.random.default_rng(1)
    dependent = 0
    for _ in range(150):
        samples = draw(random, n)  # type: ignore[operator]
        found = ours.stability(samples, p)
        if found.p_value > ours.CAUTION:
            assert (found.lower, found.upper) == (ours.lower_bound(samples, p), ours.upper_bound(samples, p))
        assert found.stable or found.p_value <= ours.DEPENDENCE_ERROR
        dependent += not found.stable
    assert dependent <= 2


@pytest.mark.parametrize(("draw", "p"), [(drifting, 50), (two_spells, 99)])
def test_a_drift_and_slow_spells_are_not_stable(draw: object, p: float) -> None:
    random = np.random.default_rng(2)
    for _ in range(20):
        found = ours.stability(draw(random, 1324), p)  # type: ignore[operator]
        assert not found.stable
        assert found.inflation > 3


def test_a_drift_that_does_not_matter_is_stable_within_wider_bounds() -> None:
    samples = np.random.default_rng(3).normal(1, 0.001, 2000) * np.linspace(1, 1.02, 2000)
    found = ours.stability(samples, 50)
    lower, upper = ours.lower_bound(samples, 50), ours.upper_bound(samples, 50)
    assert found.stable
    assert found.p_value <= ours.DEPENDENCE_ERROR
    assert found.lower is not None
    assert found.upper is not None
    assert found.lower < lower < upper < found.upper  # type: ignore[operator]


def test_many_short_spells_give_a_number_whose_bounds_hold() -> None:
    random = np.random.default_rng(4)
    n, length, stable, missed = 20_000, 8, 0, 0
    for _ in range(40):
        # slow in 3 % of the time, 8 queries on end: the median is 1 ms and the p99 about 3 ms
        slow = np.repeat(random.random(n // length) < 0.03, length)
        found = ours.stability(random.normal(1, 0.02, n) * np.where(slow, 3, 1), 99)
        truth = 3 * float(stats.norm.ppf(1 - 0.01 / 0.03, 1, 0.02))
        stable += found.stable
        missed += found.stable and not (found.lower or 0) <= truth <= (found.upper or 0)
    assert stable == 40
    assert missed <= 1


@pytest.mark.parametrize("r", [0.3, 0.5, 0.9])
def test_ordinary_dependence_gives_a_median_within_bounds_a_little_wider(r: float) -> None:
    random = np.random.default_rng(5)
    for _ in range(20):
        samples = np.exp(0.03 * autoregression(random, 704, r))
        found = ours.stability(samples, 50)
        assert found.stable
        assert found.lower is not None
        assert found.upper is not None
        assert found.upper / found.lower < 1.08


def test_one_burst_among_many_samples_is_no_percentile() -> None:
    random = np.random.default_rng(6)
    for _ in range(10):
        samples = random.normal(1, 0.02, 1324)
        start = random.integers(1300)
        samples[start : start + 20] *= 3
        assert not ours.stability(samples, 99).stable
        assert ours.stability(samples, 50).stable
        assert ours.judge(samples, 3.5, 99) == "inconclusive", "more such bursts may be longer"
        assert ours.judge(samples, 100, 99) == "pass"


def test_two_slow_neighbours_are_no_burst() -> None:
    samples = np.random.default_rng(7).normal(1, 0.02, 1324)
    samples[500:502] *= 3
    assert ours.stability(samples, 99).stable


@given(st.lists(st.booleans(), min_size=2, max_size=14))
@settings(max_examples=40, deadline=None)
def test_the_number_of_runs_is_judged_as_all_orders_would(marks: list[bool]) -> None:
    def runs(order: tuple[bool, ...]) -> int:
        return sum(mark and not before for before, mark in itertools.pairwise((False, *order)))

    orders = [
        tuple(index in places for index in range(len(marks)))
        for places in itertools.combinations(range(len(marks)), sum(marks))
    ]
    as_few = sum(runs(order) <= runs(tuple(marks)) for order in orders) / len(orders)
    found = ours._in_runs(np.asarray(marks))
    assert found == pytest.approx(as_few) or (found == 1.0 and as_few > 0.3)


@given(latencies, percentiles, confidences)
@settings(max_examples=40, deadline=None)
def test_bounds_with_dependence_are_never_narrower(samples: list[float], p: float, confidence: float) -> None:
    found = ours.stability(samples, p, confidence)
    lower, upper = ours.lower_bound(samples, p, confidence), ours.upper_bound(samples, p, confidence)
    assert (found.lower is None, found.upper is None) == (lower is None, upper is None)
    assert lower is None or found.lower is None or found.lower <= lower
    assert upper is None or found.upper is None or upper <= found.upper
    assert 0 < found.p_value <= 1
    assert found.inflation >= 1


@given(latencies, percentiles, st.floats(0.01, 1e4))
@settings(max_examples=40, deadline=None)
def test_what_is_judged_in_order_is_no_bolder_than_without(samples: list[float], p: float, limit: float) -> None:
    assert ours.judge(samples, limit, p) in (ours.verdict(samples, limit, p), "inconclusive")


def test_a_limit_far_beyond_the_slowest_pause_is_kept_however_much_the_pauses_moved() -> None:
    series = np.full(2000, 0.05)
    series[500:600] = 8.0
    assert not ours.stability(series, 99).stable
    assert ours.judge(series, 500.0, 99) == "pass"
    assert ours.judge(series, 25.0, 99) == "pass"
    assert ours.judge(series, 20.0, 99) == "inconclusive"
