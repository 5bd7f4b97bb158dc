"""What every objective is: a module that turns student and teacher outputs into named, weighted distillation terms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from distill.data.dataset import Task
from distill.objectives.section import ObjectiveBase
from distill.outputs import Batch, StudentOutput, TeacherOutput


class CachedTeacher(Protocol):
    """What training reads of a teacher cache; arrays are (views, N, D) and (views, N, C) of the training split.

    `head_weight` (C, D) and `head_bias` (C,): the teacher's linear head, None where it is not known.
    """

    @property
    def key(self) -> str: ...
    @property
    def views(self) -> int: ...
    @property
    def train_embedding(self) -> np.ndarray[Any, Any] | None: ...
    @property
    def train_logits(self) -> np.ndarray[Any, Any] | None: ...
    @property
    def head_weight(self) -> np.ndarray[Any, Any] | None: ...
    @property
    def head_bias(self) -> np.ndarray[Any, Any] | None: ...


@runtime_checkable
class SubclassedTeacher(CachedTeacher, Protocol):
    """The outputs of a teacher that was trained with subclasses: its logits have classes x `subclasses` columns."""

    @property
    def subclasses(self) -> int: ...


@dataclass(frozen=True)
class Shapes:
    """The sizes that objectives are built from.

    teacher_dim: D_t, None without embeddings. teacher_logits: columns of the teacher's logits, None without.
    student_dim: D_s. hard_weight: the resolved weight of the ground-truth term. train_samples: size of the training
    split. position: of the objective among the recipe's, for messages. subclasses: per class, of a teacher that was
    trained with them; `teacher_logits` counts its classes.
    """

    task: Task
    classes: int
    student_dim: int
    teacher_dim: int | None
    teacher_logits: int | None
    hard_weight: float
    train_samples: int = 0
    position: int = 0
    subclasses: int | None = None


@dataclass(frozen=True)
class FitData:
    """The training split as `prepare` sees it; never validation or test.

    embedding: (views, N, D_t) or None. logits: (views, N, C_t) or None; both in the cache's own type. labels: (N,) or
    (N, C). mask: bool (N, C) or None. device: where the objective lives. head_weight: (C_t, D_t) and head_bias: (C_t,),
    float32, the teacher's linear head where it is known.
    """

    embedding: Tensor | None
    logits: Tensor | None
    labels: Tensor
    mask: Tensor | None
    seed: int
    device: torch.device
    head_weight: Tensor | None = None
    head_bias: Tensor | None = None


class Objective(nn.Module):
    """One distillation objective. It returns distillation terms only, weighted inside; the loop adds the ground truth.

    Its parameters train with the student and are checkpointed apart from it. Called outside autocast, in float32.

    Args:
        section: its table in the recipe.
        shapes: sizes of student, teacher and task.
    """

    def __init__(self, section: ObjectiveBase, shapes: Shapes) -> None:
        super().__init__()
        self.weight = section.weight
        self.shapes = shapes

    builds_on_others = False
    """Whether `prepare` needs the other objectives to be prepared first."""

    @staticmethod
    def head_size(section: ObjectiveBase, classes: int) -> int:
        """Outputs of the student's head; more than `classes` where the objective splits classes."""
        return classes

    def class_logits(self, head: Tensor) -> Tensor:
        """(N, H) -> (N, C): the class logits of a head's output; part of the exported graph."""
        return head

    def attach(self, others: Sequence[Objective]) -> None:
        """Called once with all objectives of the composition, itself included, for one that builds on another."""

    def prepare(self, data: FitData, *, fitted: bool = False) -> None:
        """Fits what must be fitted on the training split. `fitted`: the parameters came from a checkpoint."""

    def forward(self, student: StudentOutput, teacher: TeacherOutput, batch: Batch) -> dict[str, Tensor]:
        """Named scalar terms, each already weighted. `student.head` is (N, H) if this objective sets the head's size,
        else class logits (N, C)."""
        raise NotImplementedError

    def logs(self) -> dict[str, float]:
        """Figures for the metrics, asked once per epoch."""
        return {}


def at_least_float32(x: Tensor) -> Tensor:
    """Half-precision tensors as float32; float32 and float64 unchanged."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def required(x: Tensor | None) -> Tensor:
    """A teacher output that `needs` promised."""
    if x is None:
        raise RuntimeError("an objective ran without a teacher output that it declares in `needs`")
    return x
