"""Logit matching against NumPy, its gradients, odd sizes, half precision, and the term that a recipe gives."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from distill.data import Dataset, InputSpec, Split
from distill.objectives.compose import build_objective
from distill.objectives.kd import kd_loss
from distill.objectives.mse import MSE, logit_mse
from distill.objectives.section import MSESection, ObjectiveSections
from distill.outputs import StudentOutput, TeacherOutput
from distill.students import build_student
from distill.students.section import StudentSection
from distill.teachers import ModuleTeacher, TeacherBatch, live_teacher
from profiles.errors import InputError
from tests.distill.objective_cases import batch, random, shapes

READ = TypeAdapter(ObjectiveSections).validate_python


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_it_agrees_with_numpy(dtype: torch.dtype) -> None:
    student, teacher = random(7, 5, seed=1), random(7, 5, seed=2) * 3
    expected = ((student.numpy() - teacher.numpy()) ** 2).sum(1).mean() / 5
    assert float(logit_mse(student.to(dtype), teacher.to(dtype))) == pytest.approx(expected, rel=1e-5)


def test_gradients_agree_with_finite_differences_on_both_sides() -> None:
    student, teacher = random(4, 3, seed=3).requires_grad_(), random(4, 3, seed=4).requires_grad_()
    assert torch.autograd.gradcheck(logit_mse, (student, teacher))


def test_its_gradient_is_that_of_distillation_at_a_great_temperature_for_centred_logits() -> None:
    student, teacher = random(6, 4, seed=1), random(6, 4, seed=2)
    student, teacher = student - student.mean(1, keepdim=True), teacher - teacher.mean(1, keepdim=True)

    def gradient(loss: Any) -> Tensor:
        z = student.clone().requires_grad_()
        loss(z).backward()
        assert z.grad is not None
        return z.grad

    hot = gradient(lambda z: kd_loss(z, teacher, 1e4))
    torch.testing.assert_close(gradient(lambda z: logit_mse(z, teacher)), 2 * hot, rtol=1e-3, atol=1e-6)


def test_it_is_zero_for_equal_logits_alone_and_a_shift_counts() -> None:
    logits = random(4, 3, seed=3)
    assert float(logit_mse(logits, logits)) == 0
    assert float(logit_mse(logits + 2, logits)) == pytest.approx(4)


@pytest.mark.parametrize("size", [(1, 3), (5, 1), (1, 1)])
def test_one_sample_and_one_class_are_finite(size: tuple[int, int]) -> None:
    student = random(*size, seed=3).requires_grad_()
    value = logit_mse(student, random(*size, seed=4))
    value.backward()  # type: ignore[no-untyped-call]
    assert torch.isfinite(value)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    # squares of differences beyond 256 do not fit float16
    student, teacher = (random(4, 3, seed=3) * 500).to(dtype), (random(4, 3, seed=4) * 500).to(dtype)
    value = logit_mse(student, teacher)
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(float(logit_mse(student.double(), teacher.double())), rel=1e-5)


@pytest.mark.parametrize(("hard_weight", "share"), [(0.25, 0.75), (0.0, 1.0), (2.0, 0.0)])
def test_the_term_carries_what_the_ground_truth_leaves_and_never_turns_negative(
    hard_weight: float, share: float
) -> None:
    head, logits = random(4, 3, seed=1), random(4, 3, seed=2)
    objective = MSE(MSESection(weight=2.0), shapes(hard_weight=hard_weight))
    term = objective(StudentOutput(head, head), TeacherOutput(None, logits), batch(torch.zeros(4).long()))["mse"]
    assert float(term) == pytest.approx(2.0 * share * float(logit_mse(head, logits)))


def test_several_labels_are_matched_one_by_one_the_unknown_ones_too() -> None:
    head, logits = random(4, 3, seed=1), random(4, 3, seed=2)
    objective = MSE(MSESection(), shapes(task="multilabel", hard_weight=0.0))
    known = batch(torch.zeros(4, 3), torch.zeros(4, 3, dtype=torch.bool))
    term = objective(StudentOutput(head, head), TeacherOutput(None, logits), known)["mse"]
    assert float(term) == pytest.approx(float(logit_mse(head, logits)))


def _data() -> Dataset:
    generator = np.random.default_rng(0)
    split = Split(generator.integers(0, 256, (6, 1, 16, 16), dtype=np.uint8), np.arange(6) % 3)
    spec = InputSpec("image", (1, 16, 16), (0.4,), (0.25,))
    return Dataset("images", "multiclass", ("a", "b", "c"), spec, split, split, split, key="images")


def _cache(logits: np.ndarray[Any, Any] | None) -> Any:
    return SimpleNamespace(
        views=1, train_embedding=np.ones((1, 6, 8), np.float32), train_logits=logits, head_weight=None, head_bias=None
    )


def test_a_recipe_builds_it_with_the_ground_truth_beside_it() -> None:
    data, logits = _data(), np.ones((1, 6, 3), np.float32)
    objective = build_objective(READ("mse"), data, _cache(logits), student_dim=6)
    assert objective.hard_weight == pytest.approx(0.1)
    head = random(6, 3, seed=1, dtype=torch.float32)
    terms = objective(
        StudentOutput(head, head), TeacherOutput(None, torch.ones(6, 3)), batch(torch.from_numpy(data.train.labels))
    )
    assert sum(term.numel() for term in terms.values()) == len(terms)
    (found,) = [term for name, term in terms.items() if name.endswith("mse")]
    assert float(found) == pytest.approx(0.9 * float(logit_mse(head, torch.ones(6, 3))), rel=1e-6)
    with pytest.raises(InputError, match="no logits"):
        build_objective(READ("mse"), data, _cache(None), student_dim=6)


def test_a_gradient_reaches_a_live_teacher() -> None:
    data = _data()
    network = build_student(StudentSection(), data.input, 3, arch="conv-w8-d1-k3", seed=0, base=Path())
    live = live_teacher(ModuleTeacher(network), None, data)
    told = live.compute(TeacherBatch(torch.from_numpy(data.train.inputs), "train", np.arange(6)))
    objective = build_objective(READ("mse"), data, _cache(np.ones((1, 6, 3), np.float32)), student_dim=6)
    head = random(6, 3, seed=1, dtype=torch.float32).requires_grad_()
    terms = objective(StudentOutput(head, head), told, batch(torch.from_numpy(data.train.labels)))
    torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
    assert all(bool(p.grad.abs().sum() > 0) for p in live.parameters_that_learn() if p.grad is not None and p.ndim > 1)
    assert all(p.grad is not None for p in live.parameters_that_learn())
    assert head.grad is not None


def test_methods_say_what_is_not_the_papers() -> None:
    assert "weight beside the labels is our reading" in MSESection.source
