"""Shot groups are a partition by training samples, and their accuracy is a mean of recalls with an honest interval."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profiles.errors import EdgestillError
from profiles.shots import group_accuracy, long_tailed, shot_groups
from profiles.statistics import wilson


@given(st.lists(st.integers(0, 300), min_size=1, max_size=30), st.integers(0, 150), st.integers(0, 150))
def test_groups_are_a_partition_with_the_limits_of_the_paper(counts: list[int], one: int, other: int) -> None:
    few, many = sorted((one, other))
    for limits, groups in (
        ((20, 100), shot_groups(counts)),
        ((few, many), shot_groups(np.array(counts), many=many, few=few)),
    ):
        assert sorted(label for group in groups for label in group.classes) == list(range(len(counts)))
        for group in groups:
            assert group.classes
            assert list(group.classes) == sorted(group.classes)
            own = [counts[label] for label in group.classes]
            assert group.samples == (min(own), max(own))
            for count in own:
                expected = "many" if count > limits[1] else "few" if count < limits[0] else "medium"
                assert group.name == expected
        order = [group.name for group in groups]
        assert order == [name for name in ("many", "medium", "few") if name in order]


def test_the_long_tail_of_fashion_mnist_has_all_three_groups() -> None:
    groups = shot_groups([1000, 599, 359, 215, 129, 77, 46, 27, 16, 10])
    assert [(group.name, group.classes) for group in groups] == [
        ("many", (0, 1, 2, 3, 4)),
        ("medium", (5, 6, 7)),
        ("few", (8, 9)),
    ]


@pytest.mark.parametrize(
    ("counts", "expected"), [([100, 10], True), ([99, 10], False), ([7, 7], False), ([7, 0], True), ([0, 0], False)]
)
def test_long_tailed(counts: list[int], expected: bool) -> None:
    assert long_tailed(counts) is expected


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 7), st.data())
def test_accuracy_of_a_group_agrees_with_torchmetrics_and_with_a_loop(
    seed: int, classes: int, data: st.DataObject
) -> None:
    import torch
    from torchmetrics.functional.classification import multiclass_recall

    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, 60)
    logits = random.normal(size=(60, classes)) + np.eye(classes)[labels]
    present = [label for label in range(classes) if (labels == label).any()]
    group = data.draw(st.lists(st.sampled_from(present), min_size=1, unique=True))
    found = group_accuracy(logits, labels, group)
    recall = multiclass_recall(torch.tensor(logits), torch.tensor(labels), classes, average="none")
    assert found.value == pytest.approx(float(recall[group].double().mean()), abs=1e-6)
    loop = [(logits.argmax(1)[labels == label] == label).mean() for label in group]
    assert found.value == pytest.approx(np.mean(loop), abs=1e-12)
    assert found.n == int(np.isin(labels, group).sum())
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert group_accuracy(logits, labels, group[::-1]) == found


def test_one_class_has_wilsons_interval_and_all_of_a_balanced_test_have_its_accuracy() -> None:
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 50)
    logits = random.normal(size=(200, 4)) + np.eye(4)[labels]
    correct = logits.argmax(1) == labels
    one = group_accuracy(logits, labels, (2,))
    assert (one.low, one.high) == pytest.approx(wilson(int(correct[100:150].sum()), 50))
    assert group_accuracy(logits, labels, range(4)).value == pytest.approx(correct.mean())


def test_samples_of_other_classes_do_not_count_but_their_logits_do() -> None:
    logits = np.array([[1.0, 0.0, 2.0], [0.0, 3.0, 1.0], [0.0, 1.0, 5.0]])
    found = group_accuracy(logits, np.array([0, 1, 1]), (0, 1))
    assert (found.value, found.n) == (0.25, 3)
    assert group_accuracy(logits, np.array([0, 1, 1]), (1, 2)).value == 0.5  # class 2 has no sample
    assert found.name == "macro recall"


def test_no_right_answer_still_leaves_room_above() -> None:
    labels = np.repeat(np.arange(3), 20)
    found = group_accuracy(np.roll(np.eye(3)[labels], 1, axis=1), labels, (1, 2))
    assert found.value == found.low == 0
    assert 0.05 < found.high < 0.2


@pytest.mark.parametrize("rates", [(0.9, 0.5, 0.2), (0.05, 0.02, 0.1), (0.97, 0.99, 0.95)])
def test_the_interval_covers_the_true_mean_of_recalls(rates: tuple[float, ...]) -> None:
    random = np.random.default_rng(1)
    labels = np.repeat(np.arange(3), (60, 40, 80))
    covered = 0
    for _ in range(600):
        right = random.random(len(labels)) < np.array(rates)[labels]
        logits = np.eye(3)[np.where(right, labels, (labels + 1) % 3)]
        found = group_accuracy(logits, labels, (0, 1, 2))
        covered += found.low <= np.mean(rates) <= found.high
    assert 0.93 <= covered / 600 <= 0.995


def test_what_cannot_be_grouped_or_judged_is_refused() -> None:
    for counts in ([], [1.5, 2.0], [3, -1], [[1, 2]]):
        with pytest.raises(EdgestillError, match="one whole number per class"):
            shot_groups(counts)
        with pytest.raises(EdgestillError, match="one whole number per class"):
            long_tailed(counts)
    with pytest.raises(EdgestillError, match="swapped"):
        shot_groups([1, 2], many=5, few=6)
    labels = np.array([0, 1])
    for group in ((2,), (), (7,)):
        with pytest.raises(EdgestillError, match="no sample of any of these classes"):
            group_accuracy(np.eye(3)[:2], labels, group)
    with pytest.raises(EdgestillError, match="NaN"):
        group_accuracy(np.array([[np.nan, 1], [1, 0]]), labels, (0,))
    with pytest.raises(EdgestillError, match="do not fit"):
        group_accuracy(np.eye(2), np.array([0]), (0,))
