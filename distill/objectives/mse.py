"""Logit matching (Ba & Caruana 2014): the squared distance of student and teacher logits."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from distill.objectives.base import Objective, Shapes, at_least_float32, required
from distill.objectives.section import MSESection
from distill.outputs import Batch, StudentOutput, TeacherOutput


def logit_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """mean_i 1/C sum_c (z_S - z_T)^2.

    The mean over classes is Kim et al.'s; Ba & Caruana sum and halve. Up to a factor its gradient is that of
    knowledge distillation at a temperature without bound, for logits of mean zero (Hinton et al. 2015).

    Args:
        student: class or label logits z_S (N, C).
        teacher: class or label logits z_T (N, C); where they carry a gradient, it is passed on.

    Returns:
        Scalar >= 0, at least float32; 0 exactly when the logits are equal. Not invariant to a shift of the logits.
    """
    return F.mse_loss(at_least_float32(student), at_least_float32(teacher))


class MSE(Objective):
    """weight (1 - hard_weight) times `logit_mse`; unknown labels are matched too, the teacher has an opinion on them.

    The factor (1 - hard_weight) and its default of 0.9 are our reading: it keeps the balance with the labels where `kd`
    has it. Ba & Caruana match logits alone, hard_weight 0. A hard_weight above 1 leaves no negative share to the
    teacher: the factor stops at 0.
    """

    def __init__(self, section: MSESection, shapes: Shapes) -> None:
        super().__init__(section, shapes)

    def forward(self, student: StudentOutput, teacher: TeacherOutput, batch: Batch) -> dict[str, Tensor]:
        share = self.weight * max(0.0, 1.0 - self.shapes.hard_weight)
        return {"mse": share * logit_mse(student.head, required(teacher.logits))}
