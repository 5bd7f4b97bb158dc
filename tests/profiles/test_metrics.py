"""Metrics agree with torchmetrics, their intervals cover, and what cannot be judged is refused."""

from __future__ import annotations

import math
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profiles import metrics
from profiles.errors import EdgestillError


def multilabel(n: int, classes: int, seed: int = 0, share: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    """Logits that know something about the labels, (N, C) each."""
    random = np.random.default_rng(seed)
    labels = (random.random((n, classes)) < share).astype(np.uint8)
    logits = (random.normal(size=(n, classes)) + 1.5 * labels).astype(np.float32)
    return logits, labels


def test_primary_metrics() -> None:
    assert metrics.primary_metric("multiclass") == "top1"
    assert metrics.primary_metric("multilabel") == "mAP"
    with pytest.raises(ValueError, match="unknown task"):
        metrics.primary_metric("detection")


def test_top1_is_the_share_of_right_answers_with_wilson_interval() -> None:
    logits = np.eye(10)[[0, 1, 2, 3, 4, 5, 6, 7, 8, 0]]
    found = metrics.evaluate("multiclass", logits, np.arange(10))
    assert (found.name, found.value, found.n) == ("top1", 0.9, 10)
    assert (found.low, found.high) == pytest.approx((0.596, 0.982), abs=1e-3)
    assert "Wilson" in found.method


def test_top1_of_the_right_answers_only_still_has_room_below() -> None:
    found = metrics.evaluate("multiclass", np.eye(3), np.arange(3))
    assert found.value == found.high == 1
    assert 0.4 < found.low < 0.5


@given(st.integers(2, 40), st.integers(1, 5), st.integers(0, 10_000), st.sampled_from([None, 1, 0]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_average_precision_agrees_with_torchmetrics(
    n: int, classes: int, seed: int, decimals: int | None, masked: bool
) -> None:
    import torch
    from torchmetrics.functional.classification import binary_average_precision

    logits, labels = multilabel(n, classes, seed)
    if decimals is not None:  # rounding makes ties
        logits = logits.round(decimals)
    mask = np.random.default_rng(seed).random(labels.shape) < 0.7 if masked else None
    found = metrics.average_precision(logits, labels, mask)
    for column in range(classes):
        known = slice(None) if mask is None else mask[:, column]
        target = torch.tensor(labels[known, column].astype(np.int64))
        if target.sum() == 0:
            assert math.isnan(found[column])
            continue
        scores = torch.sigmoid(torch.tensor(logits[known, column], dtype=torch.float64))
        oracle = binary_average_precision(scores, target, thresholds=None)
        assert found[column] == pytest.approx(float(oracle), abs=1e-5)


def test_map_is_the_mean_over_classes_with_both_kinds_of_labels() -> None:
    logits, labels = multilabel(200, 4)
    labels[:, 1] = 0
    labels[:, 2] = 1
    found = metrics.evaluate("multilabel", logits, labels)
    expected = metrics.average_precision(logits, labels)[[0, 3]].mean()
    assert found.value == pytest.approx(expected)
    assert (found.name, found.n) == ("mAP", 200)
    assert found.low <= found.value <= found.high


def test_masked_labels_play_no_part() -> None:
    logits, labels = multilabel(300, 3)
    mask = np.random.default_rng(1).random(labels.shape) < 0.6
    flipped = np.where(mask, labels, 1 - labels)
    assert metrics.evaluate("multilabel", logits, labels, mask) == metrics.evaluate("multilabel", logits, flipped, mask)
    assert metrics.evaluate("multilabel", logits, labels, mask) != metrics.evaluate("multilabel", logits, flipped)


@pytest.mark.parametrize("ties", [False, True])
def test_weights_mean_that_samples_are_repeated(ties: bool) -> None:
    logits, labels = multilabel(30, 3)
    logits = logits.round(0 if ties else 6)
    mask = np.random.default_rng(2).random(labels.shape) < 0.8
    random = np.random.default_rng(3)
    drawn = random.integers(0, 30, (20, 30))
    weights = np.stack([np.bincount(row, minlength=30) for row in drawn], axis=1).astype(np.float32)
    found = metrics.weighted_average_precision(logits, labels, mask, weights)
    for row, rows in zip(found, drawn, strict=True):
        expected = metrics.average_precision(logits[rows], labels[rows], mask[rows])
        np.testing.assert_allclose(row[~np.isnan(row)], expected[~np.isnan(row)], rtol=1e-5)


@given(st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_map_does_not_depend_on_the_scale_of_logits(seed: int) -> None:
    logits, labels = multilabel(40, 3, seed)
    if not (labels.any(axis=0) & (1 - labels).any(axis=0)).any():
        return
    shifted = metrics.average_precision(logits.astype(np.float64) * 3 - 7, labels)
    np.testing.assert_allclose(metrics.average_precision(logits, labels), shifted)


def test_bootstrap_interval_of_map_covers_the_truth() -> None:
    truth = metrics.evaluate("multilabel", *multilabel(60_000, 3, seed=99)).value
    found = [metrics.evaluate("multilabel", *multilabel(200, 3, seed=seed)) for seed in range(50)]
    covered = sum(each.low <= truth <= each.high for each in found)
    assert covered >= 50 * 0.95 - 3 * math.sqrt(50 * 0.95 * 0.05)


def test_same_seed_gives_the_same_interval() -> None:
    data = multilabel(100, 3)
    assert metrics.evaluate("multilabel", *data, seed=1) == metrics.evaluate("multilabel", *data, seed=1)
    assert metrics.evaluate("multilabel", *data, seed=1) != metrics.evaluate("multilabel", *data, seed=2)


def test_map_with_its_interval_is_quick_on_2000_samples_of_20_classes() -> None:
    data = multilabel(2000, 20)
    metrics.evaluate("multilabel", *multilabel(10, 2))
    start = time.process_time()
    metrics.evaluate("multilabel", *data)
    assert time.process_time() - start < 2.5  # about 0.7 s on one core; the rest is for busy machines


def test_paired_difference_of_top1_is_exact_and_sharper_than_the_two_intervals() -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, 10, 2000)
    right = random.random(2000) < 0.9
    answers = np.where(right, labels, (labels + 1) % 10)
    better = answers.copy()
    better[np.flatnonzero(~right)[:30]] = labels[np.flatnonzero(~right)[:30]]
    a, b = np.eye(10)[better], np.eye(10)[answers]
    found = metrics.difference("multiclass", a, b, labels)
    assert found.value == pytest.approx(30 / 2000)
    assert 0 < found.low < found.value < found.high
    alone = metrics.evaluate("multiclass", a, labels)
    assert found.high - found.low < alone.high - alone.low
    back = metrics.difference("multiclass", b, a, labels)
    assert back.value == -found.value


def test_paired_difference_covers_the_truth() -> None:
    random = np.random.default_rng(1)
    covered = 0
    for seed in range(200):
        labels = np.zeros(400, dtype=np.int64)
        hard = random.random(400)
        logits_a = np.stack([hard < 0.9, np.full(400, 0.5)], axis=1)
        logits_b = np.stack([hard + random.normal(0, 0.05, 400) < 0.85, np.full(400, 0.5)], axis=1)
        found = metrics.difference("multiclass", logits_a, logits_b, labels, seed=seed)
        covered += found.low <= 0.05 <= found.high
    assert covered >= 200 * 0.95 - 3 * math.sqrt(200 * 0.95 * 0.05) - 2


def test_paired_difference_of_map_is_that_of_the_two_values() -> None:
    logits, labels = multilabel(500, 4)
    mask = np.random.default_rng(2).random(labels.shape) < 0.8
    worse = logits + np.random.default_rng(1).normal(size=logits.shape)
    found = metrics.difference("multilabel", logits, worse, labels, mask)
    apart = [metrics.evaluate("multilabel", each, labels, mask).value for each in (logits, worse)]
    assert found.value == pytest.approx(apart[0] - apart[1])
    assert 0 < found.low < found.value < found.high


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_model_does_not_differ_from_itself(task: str) -> None:
    logits, labels = multilabel(100, 3)
    found = metrics.difference(task, logits, logits, labels if task == "multilabel" else labels[:, 0])
    assert (found.value, found.low, found.high) == (0, 0, 0)


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_nan_logits_are_refused_with_the_first_sample(task: str) -> None:
    logits, labels = multilabel(50, 3)
    logits[7, 1] = math.nan
    with pytest.raises(EdgestillError, match="not numbers") as caught:
        metrics.evaluate(task, logits, labels if task == "multilabel" else labels[:, 0])
    assert "1 of 50 samples, first in number 7" in str(caught.value.evidence)


def test_infinite_logits_are_ordered() -> None:
    found = metrics.evaluate("multiclass", np.array([[math.inf, 0.0], [-math.inf, 0.0]]), np.array([0, 1]))
    assert found.value == 1


@pytest.mark.parametrize("case", ["no positive", "no negative", "all masked"])
def test_map_without_a_class_to_judge_is_refused(case: str) -> None:
    logits, labels = multilabel(20, 2)
    mask = np.zeros(labels.shape, dtype=bool) if case == "all masked" else None
    if case == "no positive":
        labels[:] = 0
    if case == "no negative":
        labels[:] = 1
    with pytest.raises(EdgestillError, match="mAP is not defined") as caught:
        metrics.evaluate("multilabel", logits, labels, mask)
    assert "none of 2 classes" in str(caught.value.evidence)


def test_class_that_is_masked_entirely_is_left_out() -> None:
    logits, labels = multilabel(200, 3)
    mask = np.ones(labels.shape, dtype=bool)
    mask[:, 1] = False
    found = metrics.evaluate("multilabel", logits, labels, mask)
    assert found.value == pytest.approx(metrics.average_precision(logits, labels)[[0, 2]].mean())


def test_class_with_one_positive_keeps_the_estimate_inside_its_interval() -> None:
    logits, labels = multilabel(50, 1)
    labels[:] = 0
    labels[3] = 1
    found = metrics.evaluate("multilabel", logits, labels)
    assert 0 <= found.low <= found.value <= found.high <= 1


@pytest.mark.parametrize(
    ("task", "logits", "labels"),
    [
        ("multiclass", np.zeros((3, 2)), np.zeros(4, dtype=int)),
        ("multiclass", np.zeros((3, 2)), np.array([0, 1, 2])),
        ("multiclass", np.zeros((3, 2)), np.array([0, 1, -1])),
        ("multiclass", np.zeros((0, 2)), np.zeros(0, dtype=int)),
        ("multiclass", np.zeros(3), np.zeros(3, dtype=int)),
        ("multilabel", np.zeros((3, 2)), np.zeros((3, 3))),
        ("multilabel", np.zeros((3, 2)), np.zeros(3)),
    ],
)
def test_arrays_that_do_not_fit_are_refused(task: str, logits: np.ndarray, labels: np.ndarray) -> None:
    with pytest.raises(EdgestillError):
        metrics.evaluate(task, logits, labels)


def test_documents_load_without_numpy_and_torch() -> None:
    code = (
        "import sys, profiles.metrics, profiles.device; "
        "print([name for name in ('numpy', 'torch', 'scipy', 'onnxruntime') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
