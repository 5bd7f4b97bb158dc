import numpy as np
import pytest
import torch

from distill.objectives.kd import KD, binary_kd_loss, kd_loss
from distill.objectives.section import KDSection
from distill.outputs import StudentOutput, TeacherOutput
from tests.distill.objective_cases import batch, random, shapes


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("tau", [1.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_kd_agrees_with_numpy(tau: float, dtype: torch.dtype) -> None:
    student, teacher = random(7, 5, seed=1), random(7, 5, seed=2) * 3
    p, q = softmax(teacher.numpy() / tau), softmax(student.numpy() / tau)
    expected = tau**2 * (p * np.log(p / q)).sum(1).mean()
    assert float(kd_loss(student.to(dtype), teacher.to(dtype), tau)) == pytest.approx(expected, rel=1e-5)


def test_binary_kd_agrees_with_numpy() -> None:
    student, teacher, tau = random(7, 4, seed=1), random(7, 4, seed=2) * 3, 2.0
    p, q = 1 / (1 + np.exp(-teacher.numpy() / tau)), 1 / (1 + np.exp(-student.numpy() / tau))
    expected = tau**2 * (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).mean()
    assert float(binary_kd_loss(student, teacher, tau)) == pytest.approx(expected, rel=1e-9)


def test_two_classes_equal_one_binary_label() -> None:
    student, teacher = random(6, 1, seed=1), random(6, 1, seed=2)
    zero = torch.zeros_like(student)
    pair = kd_loss(torch.cat([zero, student], 1), torch.cat([zero, teacher], 1), 3.0)
    assert float(pair) == pytest.approx(float(binary_kd_loss(student, teacher, 3.0)), rel=1e-9)


@pytest.mark.parametrize("loss", [kd_loss, binary_kd_loss])
def test_gradients_agree_with_finite_differences(loss) -> None:
    student = random(4, 3, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss(z, random(4, 3, seed=4), 4.0), (student,))


@pytest.mark.parametrize("loss", [kd_loss, binary_kd_loss])
def test_a_teacher_that_learns_gets_a_gradient(loss) -> None:
    student, teacher = random(4, 3, seed=3).requires_grad_(), random(4, 3, seed=4).requires_grad_()
    loss(student, teacher, 4.0).backward()
    assert student.grad is not None
    assert teacher.grad is not None
    assert bool(teacher.grad.abs().sum() > 0)


def test_kd_ignores_a_shift_of_all_logits_and_is_zero_for_equal_ones() -> None:
    student, teacher = random(4, 3, seed=3), random(4, 3, seed=4)
    assert float(kd_loss(student + 5, teacher - 2, 4.0)) == pytest.approx(float(kd_loss(student, teacher, 4.0)))
    assert float(kd_loss(teacher, teacher, 4.0)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("loss", [kd_loss, binary_kd_loss])
@pytest.mark.parametrize("size", [(1, 3), (5, 1), (1, 1)])
def test_one_sample_and_one_class_are_finite(loss, size: tuple[int, int]) -> None:
    student = random(*size, seed=3).requires_grad_()
    value = loss(student, random(*size, seed=4), 4.0)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("loss", [kd_loss, binary_kd_loss])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(loss, dtype: torch.dtype) -> None:
    student, teacher = (random(4, 3, seed=3) * 200).to(dtype), (random(4, 3, seed=4) * 200).to(dtype)
    value = loss(student, teacher, 1.0)
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(float(loss(student.double(), teacher.double(), 1.0)), rel=1e-5)


def test_the_term_carries_what_the_ground_truth_leaves() -> None:
    head, logits = random(4, 3, seed=1), random(4, 3, seed=2)
    objective = KD(KDSection(weight=2.0), shapes(hard_weight=0.25))
    term = objective(StudentOutput(head, head), TeacherOutput(None, logits), batch(torch.zeros(4).long()))["kd"]
    assert float(term) == pytest.approx(2.0 * 0.75 * float(kd_loss(head, logits, 4.0)))


def test_a_ground_truth_weight_above_one_never_turns_the_term_negative() -> None:
    head, logits = random(4, 3, seed=1), random(4, 3, seed=2)
    objective = KD(KDSection(), shapes(hard_weight=2.0))
    term = objective(StudentOutput(head, head), TeacherOutput(None, logits), batch(torch.zeros(4).long()))["kd"]
    assert float(term) == 0


def test_several_labels_use_the_binary_form() -> None:
    head, logits = random(4, 3, seed=1), random(4, 3, seed=2)
    objective = KD(KDSection(), shapes(task="multilabel", hard_weight=0.0))
    term = objective(StudentOutput(head, head), TeacherOutput(None, logits), batch(torch.zeros(4, 3)))["kd"]
    assert float(term) == pytest.approx(float(binary_kd_loss(head, logits, 4.0)))
