"""Comparisons over seeds and samples against hand-computed figures and SciPy; nested training sets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from distill.data.dataset import subset
from distill.data.labels import Labels
from distill.data.section import AugmentSection
from distill.data.splits import nested_order
from distill.study import chance_of_all_wins, compare, over_samples, seeds_needed, t_interval
from distill.teachers.cache import build_cache
from distill.teachers.subset import cache_rows
from distill.teachers.teacher import ModuleTeacher
from profiles.metrics import difference
from profiles.statistics import Interval, paired_difference
from tests.distill.training_cases import dataset, student

WELL_ABOVE = Interval(0.02, 0.01, 0.03, 0.95, "")
AROUND_ZERO = Interval(0.0, -0.01, 0.01, 0.95, "")


def logits_of(correct: np.ndarray, labels: np.ndarray, classes: int = 3) -> np.ndarray:
    """Logits whose highest is the label's where `correct`, else the next class's."""
    return np.eye(classes)[np.where(correct, labels, (labels + 1) % classes)]


# -- over seeds -------------------------------------------------------------------------------------------------------


def test_the_t_interval_of_three_seeds_is_the_one_computed_by_hand() -> None:
    # mean 0.02, sd 0.01, t(0.975, 2) = 4.302653
    low, high = t_interval([0.01, 0.02, 0.03]) or (0.0, 0.0)
    assert low == pytest.approx(0.02 - 4.302653 * 0.01 / 3**0.5, abs=1e-7)
    assert high == pytest.approx(0.02 + 4.302653 * 0.01 / 3**0.5, abs=1e-7)


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=12).filter(lambda values: np.std(values) > 1e-6))
def test_the_t_interval_agrees_with_scipy(values: list[float]) -> None:
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert t_interval(values) == pytest.approx((expected.low, expected.high))


def test_one_seed_has_no_interval_and_no_outcome() -> None:
    assert t_interval([0.03]) is None
    assert seeds_needed([0.03]) is None
    found = compare([0.9], [0.8], WELL_ABOVE)
    assert found.outcome == "cannot tell"
    assert found.reasons == ("one seed shows no spread between seeds",)


def test_an_outcome_needs_seeds_and_samples_to_agree() -> None:
    ours, control = [0.93, 0.94, 0.935, 0.937, 0.931], [0.91, 0.92, 0.918, 0.915, 0.912]
    assert compare(ours, control, WELL_ABOVE).outcome == "higher"
    assert compare(control, ours, replace(WELL_ABOVE, low=-0.03, high=-0.01)).outcome == "lower"
    few_samples = compare(ours, control, AROUND_ZERO)
    assert few_samples.outcome == "cannot tell"
    assert "test samples" in few_samples.reasons[0]
    against = compare(ours, control, replace(WELL_ABOVE, low=-0.03, high=-0.01))
    assert against.reasons == ("seeds and test samples point in opposite directions",)


def test_too_few_seeds_are_said_with_the_number_that_would_do() -> None:
    found = compare([0.91, 0.95, 0.92], [0.90, 0.91, 0.915], WELL_ABOVE)
    assert found.outcome == "cannot tell"
    assert found.seeds_needed is not None
    # the number is the first at which the interval of the same mean and deviation leaves out zero
    sd, centre = np.std(found.differences, ddof=1), np.mean(found.differences)

    def low(n: int) -> float:
        return float(centre - stats.t.ppf(0.975, n - 1) * sd / n**0.5)

    assert low(found.seeds_needed) > 0 >= low(found.seeds_needed - 1)
    assert f"about {found.seeds_needed}" in found.reasons[0]


def test_a_difference_lost_in_noise_would_take_more_than_a_hundred_seeds() -> None:
    found = compare([0.90, 0.92, 0.91], [0.92, 0.90, 0.9099], AROUND_ZERO)
    assert found.seeds_needed is None
    assert "more than 100" in found.reasons[0]


def test_no_difference_at_all_is_said_and_more_seeds_are_not_asked_for() -> None:
    found = compare([0.9, 0.8, 0.85], [0.9, 0.8, 0.85], AROUND_ZERO)
    assert (found.outcome, found.ties, found.bootstrap.wins) == ("cannot tell", 3, 0)
    assert found.reasons == ("the same on every seed",)
    assert compare([0.9], [0.9], AROUND_ZERO).reasons == ("the same on the one seed",)


def test_ties_are_neither_won_nor_lost() -> None:
    found = compare([0.9, 0.8, 0.85], [0.9, 0.7, 0.86], AROUND_ZERO)
    assert (found.bootstrap.wins, found.ties, found.bootstrap.n) == (1, 1, 3)
    assert "too few" in found.reasons[0]


def test_the_bootstrap_over_seeds_and_the_wins_are_those_of_the_shared_statistics() -> None:
    ours, control = [0.91, 0.93, 0.92, 0.90], [0.90, 0.91, 0.92, 0.92]
    found = compare(ours, control, AROUND_ZERO)
    assert found.bootstrap == paired_difference(ours, control)
    assert (found.bootstrap.wins, found.bootstrap.n) == (2, 4)


def test_the_percentile_bootstrap_over_five_seeds_is_too_narrow_and_the_t_interval_is_not() -> None:
    random = np.random.default_rng(0)
    draws = [random.normal(size=5).tolist() for _ in range(400)]

    def covers(low: float, high: float) -> bool:
        return low <= 0 <= high

    bootstraps = [paired_difference(draw, [0.0] * 5, resamples=1000) for draw in draws]
    by_bootstrap = np.mean([covers(one.low, one.high) for one in bootstraps])
    by_t = np.mean([covers(*(t_interval(draw) or (0, 0))) for draw in draws])
    assert by_bootstrap < 0.88
    assert by_t > 0.92


def test_winning_every_seed_by_chance() -> None:
    assert [chance_of_all_wins(n) for n in (1, 2, 5, 6)] == [1.0, 0.5, 0.0625, 0.03125]


# -- over samples -----------------------------------------------------------------------------------------------------


def test_the_interval_over_samples_is_the_bootstrap_of_their_mean_difference() -> None:
    random = np.random.default_rng(1)
    labels = random.integers(0, 3, 400)
    ours = [random.random(400) < 0.8 for _ in range(4)]
    control = [random.random(400) < 0.7 for _ in range(4)]
    found = over_samples(
        "multiclass", [logits_of(c, labels) for c in ours], [logits_of(c, labels) for c in control], labels
    )
    expected = paired_difference(np.mean(ours, axis=0), np.mean(control, axis=0))
    assert found.value == pytest.approx(expected.value)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.003)


def test_two_methods_that_are_right_on_the_same_samples_have_an_interval_of_zero() -> None:
    labels = np.arange(30) % 3
    logits = logits_of(np.arange(30) % 2 == 0, labels)
    found = over_samples("multiclass", [logits, logits], [logits, logits], labels)
    assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)


def test_several_labels_are_judged_by_map_averaged_over_seeds() -> None:
    random = np.random.default_rng(2)
    labels = (random.random((120, 3)) < 0.4).astype(np.uint8)
    mask = random.random((120, 3)) < 0.9
    ours = [labels + random.normal(scale=0.8, size=labels.shape) for _ in range(2)]
    control = [labels + random.normal(scale=1.5, size=labels.shape) for _ in range(2)]
    found = over_samples("multilabel", ours, control, labels, mask)
    each = [difference("multilabel", a, b, labels, mask) for a, b in zip(ours, control, strict=True)]
    assert found.value == pytest.approx(np.mean([one.value for one in each]))
    assert found.low == pytest.approx(np.mean([one.low for one in each]))
    assert found.low < found.value < found.high


# -- nested training sets ---------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 4), min_size=5, max_size=200), st.integers(0, 5))
def test_every_prefix_of_the_nested_order_keeps_the_class_shares(values: list[int], seed: int) -> None:
    labels = np.array(values)
    order = nested_order(Labels(labels), seed=seed)
    assert sorted(order.tolist()) == list(range(len(labels)))
    present = np.unique(labels)
    assert set(labels[order[: len(present)]]) == set(present)
    counts = np.bincount(labels)
    for size in range(len(present), len(labels) + 1):
        expected = counts * size / len(labels)
        assert np.abs(np.bincount(labels[order[:size]], minlength=len(counts)) - expected).max() <= len(present)


def test_the_nested_order_follows_the_seed_alone() -> None:
    labels = Labels(np.arange(60) % 4)
    assert np.array_equal(nested_order(labels, seed=1), nested_order(labels, seed=1))
    assert not np.array_equal(nested_order(labels, seed=1), nested_order(labels, seed=2))


def test_several_labels_keep_their_shares_in_nested_halves() -> None:
    random = np.random.default_rng(3)
    values = (random.random((400, 4)) < [0.1, 0.3, 0.5, 0.05]).astype(np.uint8)
    order = nested_order(Labels(values, random.random((400, 4)) < 0.95), seed=0)
    assert sorted(order.tolist()) == list(range(400))
    for size in (100, 200):
        assert np.abs(values[order[:size]].mean(0) - values.mean(0)).max() < 0.03


def test_a_subset_has_its_rows_its_own_key_and_the_same_test_split() -> None:
    whole = dataset(40)
    rows = np.array([3, 7, 21])
    part = subset(whole, rows)
    assert len(part.train) == 3
    assert np.array_equal(part.train.inputs, whole.train.inputs[rows])
    assert np.array_equal(part.train.labels, whole.train.labels[rows])
    assert part.test is whole.test
    assert part.key == subset(whole, rows).key
    assert len({whole.key, part.key, subset(whole, rows[:2]).key}) == 3


def test_a_subset_of_masked_labels_keeps_the_mask_in_line() -> None:
    whole = dataset(40, task="multilabel")
    part = subset(whole, np.array([5, 2]))
    assert whole.train.mask is not None
    assert part.train.mask is not None
    assert np.array_equal(part.train.mask, whole.train.mask[[5, 2]])


def test_the_cache_of_a_subset_holds_the_teachers_outputs_for_the_same_rows(tmp_path: Path) -> None:
    whole = dataset(40)
    cache = build_cache(
        ModuleTeacher(student(), "cpu"), whole, AugmentSection(flip=True, views=2), tmp_path / "cache", seed=0
    )
    rows = np.array([1, 30, 8])
    part = cache_rows(cache, rows)
    assert cache.train_logits is not None
    assert part.train_logits is not None
    assert part.train_logits.shape == (2, 3, 4)
    assert np.array_equal(part.train_logits, cache.train_logits[:, rows])
    assert part.views == cache.views
    assert part.head_weight is cache.head_weight
    assert len({cache.key, part.key, cache_rows(cache, rows[:1]).key}) == 3
