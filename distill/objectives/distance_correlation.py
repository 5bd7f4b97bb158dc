"""Distance correlation of embeddings (EAsT: Ding & Lerch 2023, arXiv 2306.17424)."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.objectives.base import Objective, Shapes, at_least_float32, required
from distill.objectives.section import DistanceCorrelationSection
from distill.outputs import Batch, StudentOutput, TeacherOutput

_SMALLEST_VARIANCE = 1e-30


def _distances(x: Tensor) -> Tensor:
    """Euclidean distances (N, N). Columns are centred and the Gram trick is off: with it, data of standard deviation
    0.1 that is shifted by 10 comes out wrong by 5 %."""
    x = x - x.mean(0, keepdim=True)
    if x.device.type != "cpu":
        return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    # the same numbers from one triangle; vectorised on CPUs, where it is 5 to 10 times as fast
    n = len(x)
    row, column = torch.triu_indices(n, n, 1)
    upper = x.new_zeros(n * n).index_put((row * n + column,), torch.pdist(x)).view(n, n)
    return upper + upper.T


def _double_centred(d: Tensor) -> Tensor:
    return d - d.mean(0, keepdim=True) - d.mean(1, keepdim=True) + d.mean()


def _u_centred(d: Tensor) -> Tensor:
    """Szekely & Rizzo 2014: d_ij - r_i/(n-2) - r_j/(n-2) + sum/((n-1)(n-2)), zero diagonal; r the row sums, n >= 4."""
    n = len(d)
    rows = d.sum(1)
    centred = d - rows[:, None] / (n - 2) - rows[None, :] / (n - 2) + rows.sum() / ((n - 1) * (n - 2))
    return centred * (1 - torch.eye(n, device=d.device, dtype=d.dtype))


def squared_distance_correlation(x: Tensor, y: Tensor, *, biased: bool = False) -> Tensor:
    """R = mean(A B) / sqrt(mean(A A) mean(B B)), A and B the centred distance matrices of x and y.

    Biased: double-centred, 0 <= R <= 1, near 1 for *independent* small batches of many dimensions. Otherwise U-centred:
    about 0 for independent data, may be negative. Invariant to rotation, shift and isotropic scale of either side;
    symmetric. R is the *squared* distance correlation and is never rooted.

    Args:
        x: (N, D_1).
        y: (N, D_2); the dimensions may differ.
        biased: double-centring instead of U-centring.

    Returns:
        Scalar <= 1, at least float32. 0 when either side's rows are all equal. 1 with zero gradient (nothing to
        learn from) for fewer than 4 rows (biased: 2).
    """
    x, y = at_least_float32(x), at_least_float32(y)
    if len(x) < (2 if biased else 4):
        return (x * 0).sum() + (y * 0).sum() + 1
    centre = _double_centred if biased else _u_centred
    a, b = centre(_distances(x)), centre(_distances(y))
    variance_a, variance_b = (a * a).mean(), (b * b).mean()
    varies = (variance_a > _SMALLEST_VARIANCE) & (variance_b > _SMALLEST_VARIANCE)
    # the roots must not see a zero even in the branch that `where` discards: its gradient would be 0 * inf
    root_a = torch.where(varies, variance_a, 1).sqrt()
    root_b = torch.where(varies, variance_b, 1).sqrt()
    return torch.where(varies, (a * b).mean() / (root_a * root_b), 0)


def distance_correlation_loss(x: Tensor, y: Tensor, *, biased: bool = False) -> Tensor:
    """1 - `squared_distance_correlation`: 0 when the geometries agree up to rotation, shift and scale."""
    return 1 - squared_distance_correlation(x, y, biased=biased)


class DistanceCorrelation(Objective):
    """weight (1 - R(student embedding, teacher embedding))."""

    def __init__(self, section: DistanceCorrelationSection, shapes: Shapes) -> None:
        super().__init__(section, shapes)
        self.biased = section.biased

    def forward(self, student: StudentOutput, teacher: TeacherOutput, batch: Batch) -> dict[str, Tensor]:
        loss = distance_correlation_loss(student.embedding, required(teacher.embedding).detach(), biased=self.biased)
        return {"distance_correlation": self.weight * loss}
