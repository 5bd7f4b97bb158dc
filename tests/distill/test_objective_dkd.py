from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from torch import Tensor

from distill.data.section import AugmentSection
from distill.objectives.compose import build_objective
from distill.objectives.dkd import DKD, decoupled_divergences, dkd_losses
from distill.objectives.kd import kd_loss
from distill.objectives.section import DKDSection, ObjectiveSections
from distill.outputs import StudentOutput, TeacherOutput
from distill.train_section import TrainSection
from profiles.errors import InputError
from tests.distill.objective_cases import batch, random, shapes
from tests.distill.training_cases import Case, cache, dataset

LABELS = torch.tensor([0, 3, 2, 4, 1, 1, 0])
READ = TypeAdapter(ObjectiveSections).validate_python


def oracle(student: np.ndarray, teacher: np.ndarray, labels: np.ndarray, tau: float) -> tuple[float, float]:
    """Sample by sample, from plain probabilities."""
    target, rest = [], []
    for z_s, z_t, y in zip(student, teacher, labels, strict=True):
        p, q = (np.exp(z / tau) / np.exp(z / tau).sum() for z in (z_t, z_s))
        target.append(p[y] * np.log(p[y] / q[y]) + (1 - p[y]) * np.log((1 - p[y]) / (1 - q[y])))
        p, q = (np.delete(each, y) / np.delete(each, y).sum() for each in (p, q))
        rest.append((p * np.log(p / q)).sum())
    return tau**2 * float(np.mean(target)), tau**2 * float(np.mean(rest))


def total(student: Tensor, teacher: Tensor, labels: Tensor, tau: float) -> Tensor:
    target, rest = dkd_losses(student, teacher, labels, tau)
    return target + rest


@pytest.mark.parametrize("tau", [1.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_dkd_agrees_with_numpy(tau: float, dtype: torch.dtype) -> None:
    student, teacher = random(7, 5, seed=1), random(7, 5, seed=2) * 3
    target, rest = oracle(student.numpy(), teacher.numpy(), LABELS.numpy(), tau)
    found = dkd_losses(student.to(dtype), teacher.to(dtype), LABELS, tau, alpha=0.5, beta=3.0)
    assert found[0].dtype == found[1].dtype == dtype
    assert [float(part) for part in found] == pytest.approx([0.5 * target, 3 * rest], rel=1e-5)
    parts = decoupled_divergences(student.to(dtype), teacher.to(dtype), LABELS, tau)
    assert [tau**2 * float(part.mean()) for part in parts] == pytest.approx([target, rest], rel=1e-5)


@settings(max_examples=30, deadline=None)
@given(
    classes=st.integers(1, 6),
    rows=st.integers(1, 5),
    tau=st.sampled_from([0.5, 1.0, 4.0]),
    scale=st.sampled_from([0.1, 1.0, 10.0]),
    seed=st.integers(0, 2**16),
)
def test_weighted_by_the_teachers_doubt_the_parts_are_kd(
    classes: int, rows: int, tau: float, scale: float, seed: int
) -> None:
    student, teacher = scale * random(rows, classes, seed=seed), scale * random(rows, classes, seed=seed + 1)
    labels = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(seed))
    target, rest = decoupled_divergences(student, teacher, labels, tau)
    doubt = 1 - (teacher / tau).softmax(1)[torch.arange(rows), labels]
    both = tau**2 * (target + doubt * rest).mean()
    assert float(both) == pytest.approx(float(kd_loss(student, teacher, tau)), rel=1e-7, abs=1e-10)


def test_weighted_by_the_teachers_doubt_the_gradient_is_that_of_kd() -> None:
    student, teacher = random(7, 5, seed=1).requires_grad_(), random(7, 5, seed=2) * 3
    target, rest = decoupled_divergences(student, teacher, LABELS, 4.0)
    doubt = 1 - (teacher / 4).softmax(1)[torch.arange(7), LABELS]
    (found,) = torch.autograd.grad(16 * (target + doubt * rest).mean(), student)
    (expected,) = torch.autograd.grad(kd_loss(student, teacher, 4.0), student)
    torch.testing.assert_close(found, expected)


def test_gradients_agree_with_finite_differences() -> None:
    student, labels = random(4, 3, seed=3).requires_grad_(), torch.tensor([0, 2, 1, 2])
    assert torch.autograd.gradcheck(lambda z: dkd_losses(z, random(4, 3, seed=4), labels, 4.0), (student,))
    assert torch.autograd.gradcheck(lambda z: decoupled_divergences(z, random(4, 3, seed=4), labels, 1.0), (student,))


def test_a_teacher_that_learns_gets_a_gradient() -> None:
    student, teacher = random(7, 5, seed=3).requires_grad_(), random(7, 5, seed=4).requires_grad_()
    total(student, teacher, LABELS, 4.0).backward()
    assert student.grad is not None
    assert teacher.grad is not None
    assert bool(teacher.grad.abs().sum() > 0)


def test_a_shift_of_all_logits_and_an_order_of_classes_or_samples_change_nothing() -> None:
    student, teacher = random(7, 5, seed=3), random(7, 5, seed=4)
    expected = pytest.approx(float(total(student, teacher, LABELS, 4.0)), rel=1e-9)
    assert float(total(student + 5, teacher - 2, LABELS, 4.0)) == expected
    order = torch.tensor([4, 2, 0, 1, 3])
    assert float(total(student[:, order], teacher[:, order], order.argsort()[LABELS], 4.0)) == expected
    assert float(total(student.flip(0), teacher.flip(0), LABELS.flip(0), 4.0)) == expected


def test_equal_logits_cost_nothing() -> None:
    teacher = random(7, 5, seed=4)
    assert float(total(teacher, teacher, LABELS, 4.0)) == pytest.approx(0, abs=1e-12)


def test_the_rest_does_not_see_the_target_and_the_target_does_not_see_the_order_of_the_rest() -> None:
    student, teacher, labels = random(4, 5, seed=3), random(4, 5, seed=4), torch.zeros(4).long()
    target, rest = decoupled_divergences(student, teacher, labels, 1.0)
    moved = student.clone()
    moved[:, 0] += 3
    assert torch.allclose(decoupled_divergences(moved, teacher, labels, 1.0)[1], rest)
    swapped = student[:, [0, 4, 3, 2, 1]]
    assert torch.allclose(decoupled_divergences(swapped, teacher, labels, 1.0)[0], target)


def test_for_two_classes_the_rest_says_nothing() -> None:
    student, teacher, labels = random(4, 2, seed=3).requires_grad_(), random(4, 2, seed=4), torch.tensor([0, 1, 1, 0])
    target, rest = decoupled_divergences(student, teacher, labels, 2.0)
    assert rest.tolist() == [0, 0, 0, 0]
    assert 4 * float(target.detach().mean()) == pytest.approx(float(kd_loss(student.detach(), teacher, 2.0)))


@pytest.mark.parametrize("size", [(1, 3), (5, 1), (1, 1), (3, 2)])
def test_one_sample_and_few_classes_are_finite(size: tuple[int, int]) -> None:
    student = random(*size, seed=3).requires_grad_()
    value = total(student, random(*size, seed=4), torch.zeros(size[0]).long(), 4.0)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("sure", [1e3, 1e4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_teacher_and_a_student_that_are_sure_give_finite_gradients(sure: float, dtype: torch.dtype) -> None:
    teacher = torch.zeros(3, 4, dtype=dtype)
    teacher[:, 1] = sure
    student = teacher.flip(1).clone().requires_grad_()
    value = total(student, teacher, torch.tensor([0, 1, 2]), 1.0)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(student.grad).all()


def test_identical_rows_give_finite_gradients() -> None:
    student = torch.ones(4, 3, dtype=torch.float64).requires_grad_()
    total(student, random(1, 3, seed=1).expand(4, 3), torch.zeros(4).long(), 4.0).backward()
    assert torch.isfinite(student.grad).all()


def test_a_sure_teachers_doubt_is_exact_in_float32() -> None:
    # log(1 - p) from p = 1 - 1e-8 would be -inf in float32
    teacher, student, labels = torch.tensor([[20.0, 1.0, 0.0]]), torch.tensor([[19.0, 1.0, 1.0]]), torch.zeros(1).long()
    target, _ = decoupled_divergences(student, teacher, labels, 1.0)
    exact, _ = decoupled_divergences(student.double(), teacher.double(), labels, 1.0)
    assert float(target) == pytest.approx(float(exact), rel=0.01, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    student, teacher = (random(7, 5, seed=3) * 200).to(dtype), (random(7, 5, seed=4) * 200).to(dtype)
    value = total(student, teacher, LABELS, 1.0)
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(float(total(student.double(), teacher.double(), LABELS, 1.0)), rel=1e-5)


def test_terms_are_weighted_as_documented() -> None:
    head, logits = random(7, 5, seed=1), random(7, 5, seed=2)
    objective = DKD(DKDSection(weight=2.0, alpha=0.5, beta=3.0, tau=2.0), shapes(classes=5, teacher_logits=5))
    terms = objective(StudentOutput(head, head), TeacherOutput(None, logits), batch(LABELS))
    target, rest = oracle(head.numpy(), logits.numpy(), LABELS.numpy(), 2.0)
    assert {name: float(term) for name, term in terms.items()} == pytest.approx(
        {"dkd/target": 2 * 0.5 * target, "dkd/rest": 2 * 3 * rest}
    )


def test_the_published_mix_warms_up_over_the_first_tenth() -> None:
    data = dataset()
    mix = build_objective(READ("dkd"), data, cache(data), student_dim=12)
    assert mix.hard_weight == 1.0
    head, teacher = random(4, 4, seed=1), TeacherOutput(None, random(4, 4, seed=2))
    labels = torch.tensor([0, 1, 2, 3])
    seen = {
        progress: sum(
            float(term)
            for term in mix(StudentOutput(head, head), teacher, batch(labels)._replace(progress=progress)).values()
        )
        for progress in (0.0, 0.05, 0.1, 1.0)
    }
    full = float(total(head, teacher.logits, labels, 4.0))
    assert seen == pytest.approx({0.0: 0, 0.05: full / 2, 0.1: full, 1.0: full})


def test_several_labels_are_refused() -> None:
    data = dataset(task="multilabel")
    with pytest.raises(InputError, match="not defined for several labels") as error:
        build_objective(READ("dkd"), data, cache(data), student_dim=12)
    assert error.value.where == "objective[0].kind"


def test_a_short_training_teaches_the_student_what_the_teacher_says_about_wrong_classes(tmp_path: Path) -> None:
    data = dataset()
    # every class resembles the next one: knowledge that the labels do not hold
    logits = 8 * np.eye(4) + 4 * np.roll(np.eye(4), 1, axis=1)
    teacher = replace(cache(data), train_logits=logits[data.train.labels][None].astype(np.float16))
    case = Case(
        objective="dkd",
        section=TrainSection(epochs=20, batch_size=16, learning_rate=0.03),
        augmentation=AugmentSection(crop=0, flip=False, views=1),
        data=data,
        norm=False,
        views=1,
    )
    result, _, _ = case.run(tmp_path / "run", teacher=teacher)
    assert {"loss/dkd/target", "loss/dkd/rest", "loss/ground_truth"} <= set(result.history[0])
    # the first two epochs lie within the warm-up: their weighted terms are small without being learnt
    for term in ("loss/dkd/target", "loss/dkd/rest"):
        assert result.history[-1][term] < 0.5 * result.history[2][term]
    assert result.history[-1]["validation/top1"] > 0.6
