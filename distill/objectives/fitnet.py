"""FitNet hints on embeddings (Romero et al. 2015, arXiv 1412.6550)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from distill.objectives.base import Objective, Shapes, at_least_float32, required
from distill.objectives.section import FitNetSection
from distill.outputs import Batch, StudentOutput, TeacherOutput


def hint_loss(mapped: Tensor, teacher: Tensor) -> Tensor:
    """mean_ij (m_ij - e_ij)^2 over the batch and the dimensions.

    It grows with the square of the teacher's scale: embeddings twice as long give a loss four times as large, and a
    unit-norm embedding of D_t dimensions gives about 1 / D_t. The difference is taken in float32, so that float16
    embeddings (at most 65,504) can neither lose a small difference nor overflow when squared.

    Args:
        mapped: the student's embedding in the teacher's space (N, D_t).
        teacher: the teacher's embedding e (N, D_t); no gradient reaches it.

    Returns:
        Scalar >= 0, at least float32; 0 exactly when they are equal. Invariant to a common shift, a common rotation
        and the order of the samples.
    """
    return F.mse_loss(at_least_float32(mapped), at_least_float32(teacher).detach())


def linear_map(shapes: Shapes) -> nn.Linear:
    """A learned affine map of the student's embedding (N, D_s) into the teacher's space (N, D_t)."""
    if shapes.teacher_dim is None:
        raise RuntimeError("an objective that matches embeddings was built without teacher embeddings")
    return nn.Linear(shapes.student_dim, shapes.teacher_dim)


class FitNet(Objective):
    """weight * `hint_loss`(r(s), e), r a learned `nn.Linear`, also when the dimensions are equal.

    The paper, and the CRD repository from which the weight of 100 comes (Tian et al. 2020, arXiv 1910.10699), place the
    hint on feature maps of a middle stage, with a convolution as regressor (in the repository with BatchNorm and ReLU).
    A cached teacher has embeddings only: the hint on them, by a plain linear r, is our reading.

    Nothing is normalised, so the best weight depends on the scale of the teacher's embedding (see `hint_loss`).
    """

    def __init__(self, section: FitNetSection, shapes: Shapes) -> None:
        super().__init__(section, shapes)
        self.regressor = linear_map(shapes)

    def forward(self, student: StudentOutput, teacher: TeacherOutput, batch: Batch) -> dict[str, Tensor]:
        mapped = self.regressor(at_least_float32(student.embedding))
        return {"fitnet": self.weight * hint_loss(mapped, required(teacher.embedding))}
