"""VID: variational information distillation (Ahn et al. 2019, arXiv 1904.05835) on embeddings."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.objectives.base import Objective, Shapes, at_least_float32, required
from distill.objectives.fitnet import linear_map
from distill.objectives.section import VIDSection
from distill.outputs import Batch, StudentOutput, TeacherOutput

_FIRST_VARIANCE = 5.0
_SMALLEST_VARIANCE = 1e-5


def vid_loss(mean: Tensor, teacher: Tensor, variance: Tensor) -> Tensor:
    """mean_ij 1/2 [ (e_ij - m_ij)^2 / sigma_j^2 + log sigma_j^2 ] over the batch and the dimensions.

    Per dimension, the negative log-likelihood of e under a normal distribution of mean m and variance sigma^2, without
    the constant 1/2 log(2 pi): the teacher's entropy minus its expectation, summed over the dimensions, is a lower
    bound of the mutual information of both embeddings. The best sigma_j^2 is the mean squared error of dimension j;
    with it, embeddings a times as long only add log a. The loss is negative where sigma^2 is small: that is no fault.

    Args:
        mean: m (N, D), what the student predicts of the teacher's embedding.
        teacher: e (N, D); no gradient reaches it.
        variance: sigma^2 (D,), positive.

    Returns:
        Scalar >= 1/2 log(min sigma^2), at least float32.
    """
    mean, teacher = at_least_float32(mean), at_least_float32(teacher).detach()
    return 0.5 * ((teacher - mean).square() / variance + variance.log()).mean()


class VID(Objective):
    """weight * `vid_loss`(m(s), e, softplus(r) + 1e-5), m a learned `nn.Linear`, r learned, one per dimension.

    Formula, 1e-5 and the start at sigma^2 = 5 are those of the authors' code, as the CRD repository has it (`VIDLoss`).
    There m is three 1x1 convolutions with ReLU between feature maps of middle stages, and vectors are left out. A
    cached teacher has embeddings only: VID on them, with m linear (and a bias), is our reading.

    The start is for embeddings of about unit variance per dimension. AdamW moves r by about one learning rate a step:
    with 1e-3, sigma^2 is still above 3 after 1,500 steps, and unit-norm embeddings, whose variance is about 1 / D_t,
    then hardly reach the student. A larger learning rate or `weight` is what helps; `logs` has the mean of sigma^2.
    """

    def __init__(self, section: VIDSection, shapes: Shapes) -> None:
        super().__init__(section, shapes)
        self.mean = linear_map(shapes)
        first = math.log(math.expm1(_FIRST_VARIANCE - _SMALLEST_VARIANCE))
        self.raw_variance = nn.Parameter(torch.full((self.mean.out_features,), first))

    def variance(self) -> Tensor:
        """sigma^2 (D_t,), more than 1e-5."""
        return F.softplus(self.raw_variance) + _SMALLEST_VARIANCE

    def forward(self, student: StudentOutput, teacher: TeacherOutput, batch: Batch) -> dict[str, Tensor]:
        mean = self.mean(at_least_float32(student.embedding))
        return {"vid": self.weight * vid_loss(mean, required(teacher.embedding), self.variance())}

    @torch.no_grad()
    def logs(self) -> dict[str, float]:
        """`variance`: the mean of sigma^2 over the dimensions; near 5 it has not yet found the teacher's scale."""
        return {"vid/variance": float(self.variance().mean())}
