"""Relational knowledge distillation (Park, Kim, Lu & Cho 2019, arXiv 1904.05068)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distill.objectives.base import Objective, Shapes, at_least_float32, required
from distill.objectives.section import RKDSection
from distill.outputs import Batch, StudentOutput, TeacherOutput

_ENTRIES = 2**24
"""Numbers in one chunk's differences and angles, 64 MB in float32; a batch of 128 with 768 dimensions is one chunk."""


def rkd_distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """mean_ij h(d_ij / mean(d), e_ij / mean(e)), d and e the Euclidean distances of student and teacher rows.

    h is the smooth L1 distance: (a - b)^2 / 2 where |a - b| < 1, else |a - b| - 1/2. Either side is divided by its
    own mean over the positive distances, through which the gradient passes. The mean over i, j includes the zeros of
    the diagonal, as in the authors' code. Distances are taken from differences, not from a Gram matrix.

    Args:
        student: (N, D_s).
        teacher: (N, D_t); the dimensions may differ. No gradient reaches it.

    Returns:
        Scalar >= 0, at least float32. Invariant to rotation, shift and isotropic scale of either side. No gradient
        for fewer than 3 rows: one distance divided by itself says nothing.
    """
    d, e = (_relative_distances(at_least_float32(x)) for x in (student, teacher.detach()))
    # every pair is there once, and counts twice among the N^2
    return 2 * F.smooth_l1_loss(d, e, reduction="sum") / len(student) ** 2


def _relative_distances(x: Tensor) -> Tensor:
    """Distances of all pairs of rows, (N (N - 1) / 2,), divided by the mean of the positive ones."""
    d = torch.pdist(x)
    mean = d.sum() / (d > 0).sum().clamp_min(1)
    return d / torch.where(mean > 0, mean, 1)


def rkd_angle_loss(student: Tensor, teacher: Tensor, *, entries: int = _ENTRIES) -> Tensor:
    """mean_ijk h(cos of the student's angle at j between i and k, the teacher's), h as in `rkd_distance_loss`.

    cos = <(x_i - x_j) / |x_i - x_j|, (x_k - x_j) / |x_k - x_j|>; a difference of zero (or below the rounding of the
    rows) has the cosine 0 with everything and passes no gradient. The mean over all N^3 triples includes those with
    equal members, as in the authors' code.

    Args:
        student: (N, D_s).
        teacher: (N, D_t); the dimensions may differ. No gradient reaches it.
        entries: numbers that the differences and angles of one chunk of vertices j may take. A batch that needs
            several chunks computes each again in the backward pass instead of keeping N^2 (N + D) numbers; the result
            is the same up to rounding.

    Returns:
        Scalar >= 0, at least float32. Invariant to rotation, shift and isotropic scale of either side. No gradient
        for fewer than 3 rows, which have no angle.
    """
    x, y = at_least_float32(student), _compact(at_least_float32(teacher.detach()))
    n = len(x)
    vertices = max(1, entries // (n * (n + max(x.shape[1], y.shape[1]))))
    if vertices >= n:
        return _angle_sum(x, y, 0, n) / n**3
    total = x.new_zeros(())
    for first in range(0, n, vertices):
        last = min(first + vertices, n)
        total = total + checkpoint(
            _angle_sum, x, y, first, last, use_reentrant=False, preserve_rng_state=False, determinism_check="none"
        )
    return total / n**3


def _compact(x: Tensor) -> Tensor:
    """The same rows up to rotation and shift in at most N dimensions; the angles of a wide teacher cost N^3 D_t."""
    n, dimensions = x.shape
    if dimensions <= n or x.device.type != "cpu":
        return x
    x = x - x.mean(0, keepdim=True)
    triangle: Tensor = torch.linalg.qr(x.T, mode="r").R
    return triangle.T


def _angle_sum(x: Tensor, y: Tensor, first: int, last: int) -> Tensor:
    """Sum of h over i, k and the vertices j in first..last - 1."""
    return F.smooth_l1_loss(_cosines(x, first, last), _cosines(y, first, last), reduction="sum")


def _cosines(x: Tensor, first: int, last: int) -> Tensor:
    """(V, N, N): cosine of the angle at each vertex between every pair of rows."""
    difference = x[None] - x[first:last, None]
    squared = difference.square().sum(2, keepdim=True)
    # below the rounding of the rows there is no direction, and 1 / length would make the gradient explode
    rounding = 32 * torch.finfo(x.dtype).eps
    zero = squared <= rounding**2 * x.detach().square().sum(1).amax()
    # the root must not see a zero even in the branch that `where` discards: its gradient would be 0 * inf
    unit = difference * torch.where(zero, 0, torch.where(zero, 1, squared).rsqrt())
    return unit @ unit.mT


class RKD(Objective):
    """weight (distance_weight `rkd_distance_loss` + angle_weight `rkd_angle_loss`) of the embeddings.

    A part of weight 0 is left out. Requirements: teacher embeddings; no labels. Training samples of a batch are
    compared with each other, so that the batch size is part of the method.
    """

    def __init__(self, section: RKDSection, shapes: Shapes) -> None:
        super().__init__(section, shapes)
        self.distance_weight = section.distance_weight
        self.angle_weight = section.angle_weight

    def forward(self, student: StudentOutput, teacher: TeacherOutput, batch: Batch) -> dict[str, Tensor]:
        target = required(teacher.embedding).detach()
        terms: dict[str, Tensor] = {}
        if self.distance_weight:
            distance = rkd_distance_loss(student.embedding, target)
            terms["rkd/distance"] = self.weight * self.distance_weight * distance
        if self.angle_weight:
            terms["rkd/angle"] = self.weight * self.angle_weight * rkd_angle_loss(student.embedding, target)
        return terms
