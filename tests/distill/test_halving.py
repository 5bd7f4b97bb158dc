"""Successive halving: who is trained for how long, and who is left."""

from __future__ import annotations

import math
from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.students.arch import Arch, ConvArch
from distill.students.halving import halve, planned

POOL: tuple[Arch, ...] = tuple(ConvArch(w, d, k) for w in range(8, 48, 8) for d in (1, 2) for k in (3, 5))
budgets = st.dictionaries(
    st.sampled_from(["a", "b", "c", "d"]), st.lists(st.sampled_from(POOL), unique=True, max_size=20), min_size=1
)
counts, shares, etas = st.integers(1, 5), st.floats(0.01, 1.2), st.integers(2, 4)


class Trainer:
    """Scores from a table, by length; remembers what it was asked."""

    def __init__(self, table: dict[tuple[Arch, int], float]) -> None:
        self.table = table
        self.asked: list[tuple[Arch, float]] = []

    def __call__(self, arch: Arch, share: float) -> float:
        self.asked.append((arch, share))
        return self.table[arch, round(-math.log(share) * 10) % 3]


def noisy(seed: int) -> Trainer:
    """Another order at every length, with ties and diverged trainings."""
    random = Random(seed)
    values = [math.nan, *(step / 10 for step in range(10))]
    return Trainer({(arch, place): random.choice(values) for arch in POOL for place in range(3)})


def steady(seed: int) -> Trainer:
    """The same order at every length."""
    values = Random(seed).sample(range(100), len(POOL))
    return Trainer({(arch, place): value for arch, value in zip(POOL, values, strict=True) for place in range(3)})


seeds = st.integers(0, 10**6)


@given(budgets, seeds.map(noisy), counts, shares, etas)
def test_no_rung_trains_twice_or_in_full_and_every_target_ends_with_its_finalists(
    targets: dict[str, list[Arch]], train: Trainer, k: int, share: float, eta: int
) -> None:
    found = halve(targets, train, finalists=k, share=share, eta=eta)
    assert max(Counter(train.asked).values(), default=1) == 1
    assert all(length < 1 for _, length in train.asked)
    assert train.asked == [(arch, rung.share) for rung in found.rungs for arch in rung.scores]
    for one, two in zip(found.rungs, found.rungs[1:], strict=False):
        assert two.share == one.share * eta
        assert two.scores.keys() <= one.scores.keys()
    assert found.trainings == pytest.approx(sum(length for _, length in train.asked))
    # what is trained in full afterwards
    assert len({arch for archs in found.finalists.values() for arch in archs}) <= k * len(targets)
    for target, archs in targets.items():
        assert set(found.order[target]) == set(archs)
        assert len(found.order[target]) == len(archs)
        assert found.finalists[target] == found.order[target][:k]
        assert len(found.finalists[target]) == min(k, len(archs))


@given(budgets, seeds.map(noisy), counts, shares, etas)
def test_the_plan_bounds_what_is_trained(
    targets: dict[str, list[Arch]], train: Trainer, k: int, share: float, eta: int
) -> None:
    rungs = halve(targets, train, finalists=k, share=share, eta=eta).rungs
    plan = planned(targets, finalists=k, share=share, eta=eta)
    assert [rung.share for rung in rungs] == [rung.share for rung in plan]
    assert all(len(rung.scores) <= most.trainings for rung, most in zip(rungs, plan, strict=True))
    if rungs:
        assert len(rungs[0].scores) == plan[0].trainings


@given(budgets, seeds.map(noisy), counts, shares, etas)
def test_the_same_scores_give_the_same_trainings_and_finalists(
    targets: dict[str, list[Arch]], train: Trainer, k: int, share: float, eta: int
) -> None:
    again = Trainer(train.table)
    one = halve(targets, train, finalists=k, share=share, eta=eta)
    two = halve(targets, again, finalists=k, share=share, eta=eta)
    assert (two.finalists, two.order) == (one.finalists, one.order)
    assert again.asked == train.asked


@given(budgets, seeds.map(steady), counts, st.floats(0.01, 0.9), etas)
def test_scores_that_tell_the_truth_lose_no_finalist(
    targets: dict[str, list[Arch]], train: Trainer, k: int, share: float, eta: int
) -> None:
    found = halve(targets, train, finalists=k, share=share, eta=eta)
    for target, archs in targets.items():
        best = sorted(archs, key=lambda arch: -train.table[arch, 0])
        if len(archs) > k:
            assert list(found.finalists[target]) == best[:k]
        else:
            assert set(found.finalists[target]) == set(archs)


def test_eight_candidates_and_three_finalists_take_one_rung() -> None:
    found = halve({"a": POOL[:8]}, lambda arch, _: arch.width + arch.depth, finalists=3, share=0.1)
    assert [(rung.share, len(rung.scores)) for rung in found.rungs] == [(0.1, 8)]
    assert found.trainings == pytest.approx(0.8)
    assert planned({"a": POOL[:8]}, finalists=3, share=0.1) == ((0.1, 8),)


def test_many_candidates_are_cut_to_a_third_each_time_in_trainings_of_three_times_the_length() -> None:
    found = halve({"a": POOL}, lambda arch, _: arch.width, finalists=1, share=0.05)
    assert [(round(rung.share, 6), len(rung.scores)) for rung in found.rungs] == [(0.05, 20), (0.15, 7), (0.45, 3)]
    assert len(found.finalists["a"]) == 1


def test_scores_of_another_rung_do_not_decide() -> None:
    # a small network leads early, a large one later
    small, large, other = POOL[0], POOL[-1], POOL[5]

    def score(arch: Arch, share: float) -> float:
        return {small: 0.8, large: 0.6, other: 0.5}[arch] if share < 0.2 else {small: 0.81, large: 0.9}[arch]

    found = halve({"a": [small, other, large]}, score, finalists=1, share=0.1, eta=2)
    assert found.order["a"] == (large, small, other)


def test_a_target_with_no_more_candidates_than_finalists_needs_no_trial() -> None:
    few, many = POOL[:2], POOL[4:12]
    asked: list[Arch] = []

    def score(arch: Arch, share: float) -> float:
        asked.append(arch)
        return share

    found = halve({"few": few, "many": many}, score, finalists=2, share=0.3)
    assert set(asked) == set(many)
    # the most costly is the most promising where nothing has been tried
    assert found.finalists["few"] == (few[1], few[0])
    assert halve({"few": few}, score, finalists=2, share=0.3).rungs == ()


def test_trials_of_another_target_also_order_what_needed_none() -> None:
    shared, own = POOL[:2], POOL[2:8]
    found = halve({"few": shared, "many": (*shared, *own)}, lambda arch, _: -POOL.index(arch), finalists=2, share=0.3)
    assert found.finalists["few"] == shared


def test_of_equal_scores_the_cheaper_stays() -> None:
    found = halve({"a": POOL[:9]}, lambda *_: 0.5, finalists=2, share=0.1)
    assert found.finalists["a"] == POOL[:2]


def test_a_training_that_diverged_is_the_worst() -> None:
    found = halve({"a": POOL[:4]}, lambda arch, _: math.nan if arch == POOL[0] else 0.1, finalists=3, share=0.1)
    assert found.order["a"] == (*POOL[1:4], POOL[0])
