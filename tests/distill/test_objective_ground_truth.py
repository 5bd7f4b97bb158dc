import numpy as np
import pytest
import torch

from distill.objectives.ground_truth import balanced_weights, cross_entropy, masked_binary_cross_entropy, task_loss
from tests.distill.objective_cases import random


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weighted_smoothed_cross_entropy_agrees_with_numpy(smoothing: float) -> None:
    logits, labels = random(6, 3, seed=1), torch.tensor([0, 1, 2, 2, 1, 0])
    weights = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    log_q = logits.numpy() - np.log(np.exp(logits.numpy()).sum(1, keepdims=True))
    w, y = weights.numpy(), labels.numpy()
    hard = -(w[y] * log_q[np.arange(6), y]).sum() / w[y].sum()
    uniform = -(w * log_q).sum() / 3 / w[y].sum()
    expected = (1 - smoothing) * hard + smoothing * uniform
    assert float(cross_entropy(logits, labels, weights=weights, smoothing=smoothing)) == pytest.approx(expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_masked_binary_cross_entropy_agrees_with_numpy(smoothing: float) -> None:
    logits, labels = random(6, 3, seed=1), (random(6, 3, seed=2) > 0).double()
    mask, weights = random(6, 3, seed=3) > -0.5, torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    z, y, m, w = logits.numpy(), labels.numpy(), mask.numpy(), weights.numpy()
    y = y * (1 - smoothing) + smoothing / 2
    p = 1 / (1 + np.exp(-z))
    expected = -(w * y * np.log(p) + (1 - y) * np.log(1 - p))[m].mean()
    value = masked_binary_cross_entropy(logits, labels, mask, positive_weights=weights, smoothing=smoothing)
    assert float(value) == pytest.approx(expected)


def test_unknown_labels_give_no_gradient_whatever_they_hold() -> None:
    logits = random(4, 3, seed=1).requires_grad_()
    labels, mask = torch.zeros(4, 3), torch.ones(4, 3, dtype=torch.bool)
    mask[1, 2], labels[1, 2] = False, 255.0
    task_loss(logits, labels, mask).backward()
    assert logits.grad[1, 2] == 0
    assert (logits.grad[mask] != 0).all()


def test_no_known_label_at_all_is_zero() -> None:
    logits = random(4, 3, seed=1).requires_grad_()
    loss = task_loss(logits, torch.ones(4, 3), torch.zeros(4, 3, dtype=torch.bool))
    loss.backward()
    assert float(loss.detach()) == 0
    assert not logits.grad.any()


def test_a_full_mask_changes_nothing() -> None:
    logits, labels = random(4, 3, seed=1), (random(4, 3, seed=2) > 0).double()
    full = torch.ones(4, 3, dtype=torch.bool)
    assert float(task_loss(logits, labels, full)) == pytest.approx(float(task_loss(logits, labels, None)))


def test_gradients_agree_with_finite_differences() -> None:
    logits, mask = random(4, 3, seed=1).requires_grad_(), random(4, 3, seed=3) > 0
    assert torch.autograd.gradcheck(lambda z: task_loss(z, torch.tensor([0, 1, 2, 1]), None), (logits,))
    assert torch.autograd.gradcheck(lambda z: task_loss(z, torch.ones(4, 3), mask), (logits,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    logits = (random(4, 3, seed=1) * 100).to(dtype)
    assert task_loss(logits, torch.tensor([0, 1, 2, 1]), None).dtype == torch.float32
    assert task_loss(logits, torch.ones(4, 3), None).dtype == torch.float32


def test_balanced_weights_give_every_class_the_same_say() -> None:
    labels = torch.tensor([0] * 6 + [1] * 3 + [3])
    weights = balanced_weights(labels, None, 4)
    assert torch.allclose(weights * torch.bincount(labels, minlength=4), torch.tensor([2.5, 2.5, 0.0, 2.5]))


def test_balanced_weights_of_several_labels_count_known_ones_only() -> None:
    labels = torch.tensor([[1, 0, 0], [0, 0, 0], [0, 0, 0], [0, 1, 0]])
    mask = torch.ones(4, 3, dtype=torch.bool)
    mask[1, 0] = False
    assert balanced_weights(labels, mask, 3).tolist() == [2.0, 3.0, 1.0]
