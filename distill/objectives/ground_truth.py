"""The ground-truth term: cross-entropy of the classes, or masked binary cross-entropy of several labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.objectives.base import at_least_float32


def cross_entropy(logits: Tensor, labels: Tensor, *, weights: Tensor | None = None, smoothing: float = 0.0) -> Tensor:
    """-sum_i w_{y_i} log softmax(z_i)_{y_i} / sum_i w_{y_i}, the labels smoothed towards the uniform distribution.

    Args:
        logits: (N, C).
        labels: int64 (N,).
        weights: (C,), None: all 1.
        smoothing: share of the target spread over all classes (Szegedy et al. 2016).

    Returns:
        Scalar >= 0, at least float32.
    """
    return F.cross_entropy(at_least_float32(logits), labels, weight=weights, label_smoothing=smoothing)


def masked_binary_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    *,
    positive_weights: Tensor | None = None,
    smoothing: float = 0.0,
) -> Tensor:
    """Mean over the known labels of -[w y log sigma(z) + (1 - y) log sigma(-z)]; unknown labels give no gradient.

    Args:
        logits: (N, C).
        labels: (N, C), 0 or 1; entries where `mask` is False may be anything finite.
        mask: bool (N, C), True where the label is known; None: all are.
        positive_weights: (C,) factor w on the positive labels; None: all 1.
        smoothing: y becomes y (1 - smoothing) + smoothing / 2.

    Returns:
        Scalar >= 0, at least float32; 0 when no label is known.
    """
    logits = at_least_float32(logits)
    targets = labels.to(logits.dtype)
    if smoothing:
        targets = targets * (1 - smoothing) + smoothing / 2
    if mask is None:
        return F.binary_cross_entropy_with_logits(logits, targets, pos_weight=positive_weights)
    targets = torch.where(mask, targets, 0)
    losses = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=positive_weights, reduction="none")
    return torch.where(mask, losses, 0).sum() / mask.sum().clamp(min=1)


def task_loss(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    *,
    weights: Tensor | None = None,
    smoothing: float = 0.0,
) -> Tensor:
    """`cross_entropy` for labels (N,), `masked_binary_cross_entropy` for labels (N, C)."""
    if labels.dim() == 1:
        return cross_entropy(logits, labels, weights=weights, smoothing=smoothing)
    return masked_binary_cross_entropy(logits, labels, mask, positive_weights=weights, smoothing=smoothing)


def balanced_weights(labels: Tensor, mask: Tensor | None, classes: int) -> Tensor:
    """Class weights (C,) float32 that give every class the same say.

    Multiclass: N / (C n_c), the mean weight of a sample is 1; a class without samples gets 0. Several labels:
    negatives / positives among the known ones, 1 where either is missing.
    """
    if labels.dim() == 1:
        counts = torch.bincount(labels, minlength=classes).float()
        return torch.where(counts > 0, counts.sum() / (classes * counts.clamp(min=1)), 0)
    known = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask
    positives = ((labels > 0) & known).sum(0).float()
    negatives = known.sum(0).float() - positives
    return torch.where((positives > 0) & (negatives > 0), negatives / positives.clamp(min=1), 1)
