"""Ground truth alone: the reference for every distilled student."""

from __future__ import annotations

from torch import Tensor

from distill.objectives.base import Objective
from distill.outputs import Batch, StudentOutput, TeacherOutput


class Supervised(Objective):
    """No distillation term; the loop's ground-truth term is everything."""

    def forward(self, student: StudentOutput, teacher: TeacherOutput, batch: Batch) -> dict[str, Tensor]:
        return {}
