"""DKD: decoupled knowledge distillation (Zhao et al. 2022, arXiv 2203.08679).

The divergence of knowledge distillation falls apart into what is said about the target class and what is said about
the others:

    KL(p_T || p_S) = KL(b_T || b_S) + (1 - p_T(y)) KL(pi_T || pi_S)

with b = (p(y), 1 - p(y)) and pi the softmax over the classes other than y. A sure teacher thereby silences the second
part. DKD gives both parts weights of their own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.objectives.base import Objective, Shapes, at_least_float32, required
from distill.objectives.section import DKDSection
from distill.outputs import Batch, StudentOutput, TeacherOutput


def decoupled_divergences(student: Tensor, teacher: Tensor, labels: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """KL(b_T || b_S) and KL(pi_T || pi_S) of every sample, b over (target, rest), pi over the other classes.

    Everything stays in log space: the margin m = z_y - logsumexp(z of the others) gives log p(y) = logsigmoid(m) and
    log(1 - p(y)) = logsigmoid(-m), without a cancellation where the teacher is sure.

    Args:
        student: class logits z_S (N, C).
        teacher: class logits z_T (N, C); where they carry a gradient, it is passed on.
        labels: the targets y, int64 (N,) in 0..C-1.
        tau: temperature > 0 of both.

    Returns:
        (N,) and (N,), >= 0 up to rounding, at least float32, without the factor tau^2. The second is 0 for two classes,
        both are 0 for one class.
    """
    z_s = at_least_float32(student) / tau
    z_t = at_least_float32(teacher) / tau
    if z_s.shape[1] == 1:
        nothing = 0 * z_s.squeeze(1)
        return nothing, nothing
    # columns of the other classes: 0..C-2, shifted by one from the target on; no mask, so nothing infinite can leak
    columns = torch.arange(z_s.shape[1] - 1, device=z_s.device)
    others = columns + (columns >= labels[:, None]).long()
    rest_s, rest_t = z_s.gather(1, others), z_t.gather(1, others)
    margin_s = z_s.gather(1, labels[:, None]).squeeze(1) - rest_s.logsumexp(1)
    margin_t = z_t.gather(1, labels[:, None]).squeeze(1) - rest_t.logsumexp(1)
    target = margin_t.sigmoid() * (F.logsigmoid(margin_t) - F.logsigmoid(margin_s))
    target = target + (-margin_t).sigmoid() * (F.logsigmoid(-margin_t) - F.logsigmoid(-margin_s))
    log_pi_t, log_pi_s = rest_t.log_softmax(1), rest_s.log_softmax(1)
    return target, (log_pi_t.exp() * (log_pi_t - log_pi_s)).sum(1)


def dkd_losses(
    student: Tensor, teacher: Tensor, labels: Tensor, tau: float, *, alpha: float = 1.0, beta: float = 8.0
) -> tuple[Tensor, Tensor]:
    """alpha tau^2 KL(b_T || b_S) and beta tau^2 KL(pi_T || pi_S), averaged over the batch. Their sum is the loss.

    Args:
        student: class logits z_S (N, C).
        teacher: class logits z_T (N, C); where they carry a gradient, it is passed on.
        labels: the targets, int64 (N,).
        tau: temperature > 0.
        alpha: weight of the target part.
        beta: weight of the part of the other classes.

    Returns:
        Two scalars >= 0, at least float32; both are 0 exactly when the distributions are equal. With alpha = 1 and
        1 - p_T(y) of each sample in place of beta their sum is `kd_loss`.
    """
    target, rest = decoupled_divergences(student, teacher, labels, tau)
    return alpha * tau**2 * target.mean(), beta * tau**2 * rest.mean()


class DKD(Objective):
    """weight times each of `dkd_losses`, as two terms.

    Requirements: teacher logits, labels, more than two classes (the second part is 0 for two). Relations: `kd` weighs
    the second part of each sample with 1 - p_T(y). The published warm-up, 20 of 240 epochs, is the weight schedule of
    its section: about the first tenth of the training.
    """

    def __init__(self, section: DKDSection, shapes: Shapes) -> None:
        super().__init__(section, shapes)
        self.alpha = section.alpha
        self.beta = section.beta
        self.tau = section.tau

    def forward(self, student: StudentOutput, teacher: TeacherOutput, batch: Batch) -> dict[str, Tensor]:
        target, rest = dkd_losses(
            student.head, required(teacher.logits), batch.labels, self.tau, alpha=self.alpha, beta=self.beta
        )
        return {"dkd/target": self.weight * target, "dkd/rest": self.weight * rest}
