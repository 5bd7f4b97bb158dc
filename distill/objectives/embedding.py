"""EmbKD: soft targets and embedding matching, the embedding baseline of Loo et al. 2024 (arXiv 2409.20449)."""

from __future__ import annotations

from torch import Tensor, nn

from distill.objectives.base import Objective, Shapes, at_least_float32, required
from distill.objectives.fitnet import hint_loss, linear_map
from distill.objectives.kd import KD
from distill.objectives.section import EmbeddingSection, KDSection
from distill.outputs import Batch, StudentOutput, TeacherOutput


class Embedding(Objective):
    """The terms of `KD`, and lam * mean_ij (A s - e)_ij^2, each times `weight`.

    A is a learned `nn.Linear` when D_s != D_t, the identity when they are equal. The mean over the dimensions, and with
    it lam = 1, is our reading: the squared norm ||A s - e||^2 of a sample is D_t times that, which is lam = D_t here.
    Nothing is normalised: the term grows with the square of the teacher's scale. For unit-norm embeddings (of sentence
    encoders, for instance) it is about 1 / D_t, little beside the soft targets unless lam is near D_t.

    Relations: lam = 0 is `kd`; without the soft targets, and with A always learned, it is `fitnet`.
    """

    def __init__(self, section: EmbeddingSection, shapes: Shapes) -> None:
        super().__init__(section, shapes)
        self.lam = section.lam
        self.soft_targets = KD(KDSection(weight=section.weight, tau=section.tau), shapes)
        self.align: nn.Module = nn.Identity() if shapes.student_dim == shapes.teacher_dim else linear_map(shapes)

    def forward(self, student: StudentOutput, teacher: TeacherOutput, batch: Batch) -> dict[str, Tensor]:
        terms = {"embedding/kd": self.soft_targets(student, teacher, batch)["kd"]}
        if self.lam:
            mapped = self.align(at_least_float32(student.embedding))
            terms["embedding/distance"] = self.weight * self.lam * hint_loss(mapped, required(teacher.embedding))
        return terms
