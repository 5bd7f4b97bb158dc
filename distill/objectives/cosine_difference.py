"""Difference of cosine similarities (EAsT: Ding & Lerch 2023, arXiv 2306.17424)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from distill.objectives.base import Objective, at_least_float32, required
from distill.outputs import Batch, StudentOutput, TeacherOutput


def cosine_difference_loss(x: Tensor, y: Tensor) -> Tensor:
    """mean_ij |S_x - S_y|_ij with S the (N, N) matrices of cosine similarities between rows.

    Args:
        x: (N, D_1).
        y: (N, D_2); the dimensions may differ.

    Returns:
        Scalar in 0..2, at least float32; 0 for a batch of one. Invariant to rotation and to the scale of each row;
        not to a shift.
    """
    x, y = F.normalize(at_least_float32(x), dim=1), F.normalize(at_least_float32(y), dim=1)
    return (x @ x.T - y @ y.T).abs().mean()


class CosineDifference(Objective):
    """weight mean |S(student embedding) - S(teacher embedding)|."""

    def forward(self, student: StudentOutput, teacher: TeacherOutput, batch: Batch) -> dict[str, Tensor]:
        loss = cosine_difference_loss(student.embedding, required(teacher.embedding).detach())
        return {"cosine_difference": self.weight * loss}
