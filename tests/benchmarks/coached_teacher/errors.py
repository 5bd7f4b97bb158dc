"""How far the finite difference of the influence is from the exact derivative, by precision and by step."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from distill.data.section import AugmentSection
from distill.objectives.compose import build_objective
from distill.objectives.kd import kd_loss
from distill.objectives.section import SupervisedSection
from distill.strategies import influence
from distill.students import Student
from distill.teachers import TeacherBatch, live_teacher
from distill.training import train
from tests.benchmarks.coached_teacher.tasks import Name, Task

FACTORS = (1.0, 0.1, 0.01, 0.001)
PRECISIONS = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
BATCH = 64
ABOUT = (
    "u is the change of the student's logits along v, the gradient of the cross-entropy of 64 training samples; the "
    "finite difference moves the weights by eps v on either side. Weights, activations and v have the precision of "
    "the row. Errors are relative to the exact derivative in float64, as norms: of u for 64 other samples, and of the "
    "influence's gradient by all weights of the teacher (KL at temperature 1); cosine: between the latter and the "
    "exact one. The teacher's own passes are float32 in all rows, whose rounding is the floor of that column. Students "
    "in eval mode after one epoch from the labels. The strategy takes eps = 0.01 / \\|\\|v\\|\\| in the precision of "
    "the weights, which is float32 (mixed precision keeps float32 weights, and these passes run without autocast)."
)


def error_table(tasks: Mapping[Name, Task]) -> dict[str, Any]:
    """The table of all tasks' students."""
    return {"about": ABOUT, "rows": [row for task in tasks.values() for row in _rows(task)]}


def _rows(task: Task) -> list[dict[str, Any]]:
    student, dataset = _started(task), task.dataset
    teacher = live_teacher(task.teacher, None, dataset)
    order = np.random.default_rng(0).permutation(len(dataset.train))
    rows, others = order[:BATCH], order[BATCH : 2 * BATCH]
    inputs, held = (torch.from_numpy(np.array(dataset.train.inputs[each])) for each in (rows, others))
    labels = torch.from_numpy(dataset.train.labels[others])
    exact = copy.deepcopy(student).double()
    names, parameters = zip(*exact.named_parameters(), strict=True)
    found = torch.autograd.grad(cross_entropy(exact(held).head, labels), parameters)
    direction = dict(zip(names, found, strict=True))
    told = teacher.compute(TeacherBatch(inputs, "train", rows)).logits
    assert told is not None
    weights = teacher.parameters_that_learn()
    true_change, true_gradient = _measured(exact, inputs, direction, told, weights, "jvp")
    result = []
    for precision, dtype in PRECISIONS.items():
        network = copy.deepcopy(student).to(dtype)
        cast = {name: v.to(dtype) for name, v in direction.items()}
        for factor in (*FACTORS, None):
            with _step(influence.STEP if factor is None else factor):
                method: Literal["jvp", "finite_difference"] = "jvp" if factor is None else "finite_difference"
                change, gradient = _measured(network, inputs, cast, told, weights, method)
            result.append(
                {
                    "task": task.name,
                    "student": student.arch,
                    "precision": precision,
                    "factor": "JVP" if factor is None else f"{factor:g}",
                    "change": _relative(change, true_change),
                    "gradient": _relative(gradient, true_gradient),
                    "cosine": float(torch.cosine_similarity(gradient.double(), true_gradient.double(), dim=0)),
                }
            )
    return result


def _started(task: Task) -> Student:
    """A student after one epoch from the labels: gradients of fresh weights would be too well-behaved."""
    student = task.student(0)
    objective = build_objective((SupervisedSection(),), task.dataset, None, student_dim=student.embedding_dim)
    section = task.settings.train.model_copy(update={"epochs": 1})
    train(student, objective, task.dataset, None, section, AugmentSection(), task.folder / "errors", seed=0)
    return student


def _measured(
    student: Student,
    inputs: Tensor,
    direction: Mapping[str, Tensor],
    told: Tensor,
    weights: Sequence[nn.Parameter],
    method: Literal["jvp", "finite_difference"],
) -> tuple[Tensor, Tensor]:
    """u (N, C), and the influence's gradient by the teacher's `weights` as one vector.

    told: the teacher's logits (N, C), with a graph.
    """
    change = influence.change_along(student, inputs, direction, method)
    with torch.no_grad():
        outputs = student(inputs).head
    # double on the student's side, so that the rows differ by the student's precision alone
    value = influence.influence(lambda head: kd_loss(head, told.double(), 1.0), outputs.double(), change.double())
    gradients = torch.autograd.grad(value, weights, retain_graph=True)
    return change, torch.cat([gradient.flatten() for gradient in gradients])


@contextmanager
def _step(factor: float) -> Iterator[None]:
    """The strategy's own code with another eps ||v||."""
    before = influence.STEP
    influence.STEP = factor
    try:
        yield
    finally:
        influence.STEP = before


def _relative(found: Tensor, true: Tensor) -> float:
    return float((found.double() - true.double()).norm() / true.double().norm())
