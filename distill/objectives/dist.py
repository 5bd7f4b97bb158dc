"""DIST: relational matching of predictions (Huang et al. 2022, arXiv 2205.10536).

A student that is much smaller than its teacher need not repeat the teacher's probabilities; it is enough that they
correlate with them: within each sample over the classes, and within each class over the samples of the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill.objectives.base import Objective, Shapes, at_least_float32, required
from distill.objectives.section import DISTSection
from distill.outputs import Batch, StudentOutput, TeacherOutput


def pearson(x: Tensor, y: Tensor) -> Tensor:
    """Pearson's correlation along the last dimension; 0, with zero gradient, where x or y is constant.

        rho = sum_i (x_i - mean x)(y_i - mean y) / sqrt(sum_i (x_i - mean x)^2 sum_i (y_i - mean y)^2)

    Constant means: no value is further from the mean than rounding could have moved it.

    Args:
        x: (..., n).
        y: (..., n).

    Returns:
        (...), -1..1 up to rounding, at least float32. Invariant to the shift and the positive scale of each row. The
        official code of DIST adds 1e-8 to the denominator instead, which pulls rows of tiny variance towards 0.
    """
    return (_standardised(x) * _standardised(y)).sum(-1)


def _standardised(x: Tensor) -> Tensor:
    """Rows of mean 0 and norm 1, or of zeros where the row is constant."""
    x = at_least_float32(x)
    centred = x - x.mean(-1, keepdim=True)
    largest = centred.detach().abs().amax(-1, keepdim=True)
    constant = largest <= 8 * torch.finfo(x.dtype).eps * x.detach().abs().amax(-1, keepdim=True)
    # a fixed scale cancels in the quotient, and without it the squares of small probabilities underflow
    scaled = torch.where(constant, 0.0, centred / torch.where(constant, 1.0, largest))
    # the root of 0 has no gradient: it must not be taken, not only be hidden
    norm = torch.where(constant, 1.0, scaled.square().sum(-1, keepdim=True)).sqrt()
    return scaled / norm


def relation_losses(student: Tensor, teacher: Tensor, tau: float, *, multilabel: bool = False) -> tuple[Tensor, Tensor]:
    """tau^2 mean_i (1 - rho(Y_S[i], Y_T[i])) and tau^2 mean_k (1 - rho(Y_S[:, k], Y_T[:, k])).

    Y is softmax(z / tau). With several labels per sample it is sigmoid(z / tau) instead (our reading: the paper knows
    one label only); labels that are unknown in the data are matched too, the teacher has an opinion on them.

    Args:
        student: class or label logits z_S (N, C).
        teacher: class or label logits z_T (N, C); where they carry a gradient, it is passed on.
        tau: temperature > 0.
        multilabel: whether a sample may have several labels.

    Returns:
        Two scalars in 0..2 tau^2, at least float32, 0 when all relations agree. First over the classes within a sample
        (the paper's inter-class relation), then over the samples within a class (its intra-class relation). A batch of
        one has no relation between samples: the second is then 0, with zero gradient.
    """
    z_s, z_t = at_least_float32(student) / tau, at_least_float32(teacher) / tau
    y_s, y_t = (z_s.sigmoid(), z_t.sigmoid()) if multilabel else (z_s.softmax(1), z_t.softmax(1))
    classes = tau**2 * (1 - pearson(y_s, y_t)).mean()
    if len(y_s) == 1:
        return classes, 0 * y_s.sum()
    return classes, tau**2 * (1 - pearson(y_s.t(), y_t.t())).mean()


class DIST(Objective):
    """weight times each of `relation_losses`, as two terms.

    Requirements: teacher logits, more than two classes or labels (two values always correlate with 1 or -1).
    """

    def __init__(self, section: DISTSection, shapes: Shapes) -> None:
        super().__init__(section, shapes)
        self.tau = section.tau
        self.multilabel = shapes.task == "multilabel"

    def forward(self, student: StudentOutput, teacher: TeacherOutput, batch: Batch) -> dict[str, Tensor]:
        classes, samples = relation_losses(student.head, required(teacher.logits), self.tau, multilabel=self.multilabel)
        return {"dist/classes": self.weight * classes, "dist/samples": self.weight * samples}
