"""Knowledge distillation with soft targets (Hinton, Vinyals & Dean 2015)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from distill.objectives.base import Objective, Shapes, at_least_float32, required
from distill.objectives.section import KDSection
from distill.outputs import Batch, StudentOutput, TeacherOutput


def kd_loss(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """tau^2 KL(softmax(z_T / tau) || softmax(z_S / tau)), summed over classes, averaged over the batch.

    Args:
        student: class logits z_S (N, C).
        teacher: class logits z_T (N, C); where they carry a gradient, it is passed on.
        tau: temperature > 0. The factor tau^2 keeps the gradient's size when tau changes.

    Returns:
        Scalar >= 0, at least float32; 0 exactly when the distributions are equal.
    """
    log_p = F.log_softmax(at_least_float32(teacher) / tau, dim=-1)
    log_q = F.log_softmax(at_least_float32(student) / tau, dim=-1)
    return tau**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def binary_kd_loss(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """tau^2 KL between Bernoulli distributions, one per label, averaged over labels and batch.

    With p = sigma(z_T / tau) and q = sigma(z_S / tau): p log(p / q) + (1 - p) log((1 - p) / (1 - q)). The average over
    labels (not their sum) puts it on the scale of the mean binary cross-entropy beside it. Labels that are unknown in
    the data are matched too: the teacher has an opinion on them.

    Args:
        student: label logits z_S (N, C).
        teacher: label logits z_T (N, C); where they carry a gradient, it is passed on.
        tau: temperature > 0.

    Returns:
        Scalar >= 0, at least float32.
    """
    z_t = at_least_float32(teacher) / tau
    z_s = at_least_float32(student) / tau
    positive = z_t.sigmoid() * (F.logsigmoid(z_t) - F.logsigmoid(z_s))
    negative = (-z_t).sigmoid() * (F.logsigmoid(-z_t) - F.logsigmoid(-z_s))
    return tau**2 * (positive + negative).mean()


class KD(Objective):
    """weight (1 - hard_weight) times `kd_loss`, or `binary_kd_loss` when there are several labels.

    A hard_weight above 1 leaves no negative share to the teacher: the factor stops at 0.
    """

    def __init__(self, section: KDSection, shapes: Shapes) -> None:
        super().__init__(section, shapes)
        self.tau = section.tau
        self.loss = kd_loss if shapes.task == "multiclass" else binary_kd_loss

    def forward(self, student: StudentOutput, teacher: TeacherOutput, batch: Batch) -> dict[str, Tensor]:
        share = self.weight * max(0.0, 1.0 - self.shapes.hard_weight)
        return {"kd": share * self.loss(student.head, required(teacher.logits), self.tau)}
