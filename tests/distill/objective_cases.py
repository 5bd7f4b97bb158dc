"""What the objectives' tests share: small outputs, and a batch to go with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distill.objectives.base import FitData, Shapes
from distill.outputs import Batch


def shapes(**changes: Any) -> Shapes:
    """Three classes, a student of 6 and a teacher of 8 dimensions."""
    values: dict[str, Any] = {
        "task": "multiclass",
        "classes": 3,
        "student_dim": 6,
        "teacher_dim": 8,
        "teacher_logits": 3,
        "hard_weight": 0.3,
    }
    return Shapes(**{**values, **changes})


def batch(labels: Tensor, mask: Tensor | None = None, epoch: float = 0.0) -> Batch:
    """A batch of the first rows of the training split."""
    return Batch(labels, mask, torch.arange(len(labels)), 0, epoch)


def fit_data(embedding: Tensor, labels: Tensor, mask: Tensor | None = None, seed: int = 0) -> FitData:
    """A training split with one view."""
    return FitData(embedding[None], None, labels, mask, seed, torch.device("cpu"))


def random(*size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers of a fixed seed."""
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=dtype)
