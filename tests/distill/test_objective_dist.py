from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from distill.data.section import AugmentSection
from distill.objectives.compose import build_objective
from distill.objectives.dist import DIST, pearson, relation_losses
from distill.objectives.section import DISTSection, ObjectiveSections
from distill.outputs import StudentOutput, TeacherOutput
from distill.train_section import TrainSection
from tests.distill.objective_cases import batch, random, shapes
from tests.distill.training_cases import Case, cache, dataset

READ = TypeAdapter(ObjectiveSections).validate_python


def oracle(student: np.ndarray, teacher: np.ndarray, tau: float, multilabel: bool) -> tuple[float, float]:
    """numpy.corrcoef, row by row and column by column."""

    def probabilities(z: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-z / tau)) if multilabel else np.exp(z / tau) / np.exp(z / tau).sum(1, keepdims=True)

    s, t = probabilities(student), probabilities(teacher)
    classes = [1 - np.corrcoef(s[i], t[i])[0, 1] for i in range(len(s))]
    samples = [1 - np.corrcoef(s[:, k], t[:, k])[0, 1] for k in range(s.shape[1])]
    return tau**2 * float(np.mean(classes)), tau**2 * float(np.mean(samples))


def total(student: Tensor, teacher: Tensor, tau: float, *, multilabel: bool = False) -> Tensor:
    classes, samples = relation_losses(student, teacher, tau, multilabel=multilabel)
    return classes + samples


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("tau", [1.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_dist_agrees_with_numpy(tau: float, dtype: torch.dtype, multilabel: bool) -> None:
    student, teacher = random(7, 5, seed=1), random(7, 5, seed=2) * 3
    expected = oracle(student.numpy(), teacher.numpy(), tau, multilabel)
    found = relation_losses(student.to(dtype), teacher.to(dtype), tau, multilabel=multilabel)
    assert [float(part) for part in found] == pytest.approx(expected, rel=1e-5)
    assert found[0].dtype == found[1].dtype == dtype


@pytest.mark.parametrize("multilabel", [False, True])
def test_gradients_agree_with_finite_differences(multilabel: bool) -> None:
    student = random(4, 3, seed=3).requires_grad_()

    def losses(z: Tensor) -> tuple[Tensor, Tensor]:
        return relation_losses(z, random(4, 3, seed=4), 2.0, multilabel=multilabel)

    assert torch.autograd.gradcheck(losses, (student,))


def test_gradients_of_the_correlation_agree_with_finite_differences_on_both_sides() -> None:
    x, y = random(3, 4, seed=1).requires_grad_(), random(3, 4, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(pearson, (x, y))


def test_a_teacher_that_learns_gets_a_gradient() -> None:
    student, teacher = random(4, 3, seed=3).requires_grad_(), random(4, 3, seed=4).requires_grad_()
    total(student, teacher, 1.0).backward()
    assert student.grad is not None
    assert teacher.grad is not None
    assert bool(teacher.grad.abs().sum() > 0)


def test_the_correlation_ignores_shift_and_positive_scale_and_turns_with_the_sign() -> None:
    x, y = random(3, 6, seed=1), random(3, 6, seed=2)
    expected = pearson(x, y)
    torch.testing.assert_close(pearson(x * torch.tensor([[1e-12], [1.0], [1e12]]) + 0.0, y * 3 - 7), expected)
    torch.testing.assert_close(pearson(-x, y), -expected)
    torch.testing.assert_close(pearson(y, x), expected)
    torch.testing.assert_close(pearson(x, 2 * x + 1), torch.ones(3, dtype=torch.float64))


def test_tiny_probabilities_keep_their_correlation_in_float32() -> None:
    x, y = random(3, 6, seed=1).abs(), random(3, 6, seed=2).abs()
    found = pearson((x * 1e-30).float(), (y * 1e-25).float())
    torch.testing.assert_close(found.double(), pearson(x, y), rtol=1e-5, atol=1e-5)


def test_an_equal_student_costs_nothing_and_an_affine_one_neither() -> None:
    teacher = random(6, 4, seed=1)
    assert float(total(teacher, teacher + 3, 2.0)) == pytest.approx(0, abs=1e-12)
    # probabilities that keep half of the teacher's distance to uniform correlate perfectly with them, where KL is not 0
    softer = (0.5 * teacher.softmax(1) + 0.5 / 4).log()
    assert float(total(softer, teacher, 1.0)) == pytest.approx(0, abs=1e-12)


def test_an_order_of_classes_or_samples_changes_nothing() -> None:
    student, teacher = random(6, 4, seed=3), random(6, 4, seed=4)
    expected = pytest.approx(float(total(student, teacher, 2.0)), rel=1e-9)
    assert float(total(student.flip(0), teacher.flip(0), 2.0)) == expected
    assert float(total(student.flip(1), teacher.flip(1), 2.0)) == expected


@pytest.mark.parametrize("multilabel", [False, True])
def test_a_batch_of_one_has_no_relation_between_samples(multilabel: bool) -> None:
    student = random(1, 4, seed=3).requires_grad_()
    classes, samples = relation_losses(student, random(1, 4, seed=4), 1.0, multilabel=multilabel)
    assert samples.item() == 0
    (gradient,) = torch.autograd.grad(samples, student, retain_graph=True)
    assert gradient.abs().sum() == 0
    (gradient,) = torch.autograd.grad(classes, student)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("value", [0.0, 1 / 3, 1e-30, 7.1])
def test_a_constant_row_correlates_with_nothing_and_has_no_gradient(value: float, dtype: torch.dtype) -> None:
    x = torch.full((2, 7), value, dtype=dtype)
    x[1] = torch.arange(7)
    x.requires_grad_()
    y = random(2, 7, seed=1).to(dtype)
    rho = pearson(x, y)
    rho.sum().backward()
    assert rho[0].item() == 0
    assert x.grad[0].abs().sum() == 0
    assert x.grad[1].abs().sum() > 0
    assert float(pearson(y, x.detach())[0]) == 0


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("size", [(1, 3), (5, 1), (1, 1), (2, 2), (4, 3)])
def test_identical_rows_one_sample_and_one_class_are_finite(size: tuple[int, int], multilabel: bool) -> None:
    for student in (torch.ones(*size), random(1, size[1], seed=2).float().repeat(size[0], 1)):
        student.requires_grad_()
        value = total(student, random(*size, seed=4), 1.0, multilabel=multilabel)
        value.backward()
        assert torch.isfinite(value)
        assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("multilabel", [False, True])
def test_probabilities_that_saturate_give_finite_gradients(multilabel: bool) -> None:
    student = (random(5, 4, seed=1) * 1e4).float().requires_grad_()
    value = total(student, random(5, 4, seed=2) * 1e4, 1.0, multilabel=multilabel)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, multilabel: bool) -> None:
    student, teacher = (random(6, 4, seed=3) * 3).to(dtype), (random(6, 4, seed=4) * 3).to(dtype)
    value = total(student, teacher, 1.0, multilabel=multilabel)
    assert value.dtype == torch.float32
    exact = total(student.double(), teacher.double(), 1.0, multilabel=multilabel)
    assert float(value) == pytest.approx(float(exact), rel=1e-5)


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_terms_are_weighted_as_documented(task) -> None:
    head, logits = random(7, 5, seed=1), random(7, 5, seed=2)
    objective = DIST(DISTSection(weight=3.0, tau=2.0), shapes(classes=5, teacher_logits=5, task=task))
    labels = torch.zeros(7, 5) if task == "multilabel" else torch.zeros(7).long()
    terms = objective(StudentOutput(head, head), TeacherOutput(None, logits), batch(labels))
    classes, samples = oracle(head.numpy(), logits.numpy(), 2.0, task == "multilabel")
    expected = {"dist/classes": 3 * classes, "dist/samples": 3 * samples}
    assert {name: float(term) for name, term in terms.items()} == pytest.approx(expected)


def test_the_published_mix_weighs_both_relations_twice_beside_the_whole_ground_truth() -> None:
    data = dataset()
    mix = build_objective(READ("dist"), data, cache(data), student_dim=12)
    head, logits = random(7, 4, seed=1), random(7, 4, seed=2)
    terms = mix(StudentOutput(head, head), TeacherOutput(None, logits), batch(torch.zeros(7).long()))
    assert mix.hard_weight == 1.0
    assert sum(float(term) for term in terms.values()) == pytest.approx(2 * float(total(head, logits, 1.0)))


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_a_short_training_brings_the_student_to_the_teacher(task, tmp_path: Path) -> None:
    case = Case(
        objective="dist",
        section=TrainSection(epochs=20, batch_size=16, learning_rate=0.03),
        augmentation=AugmentSection(crop=0, flip=False, views=1),
        data=dataset(task=task),
        norm=False,
        views=1,
    )
    result, _, _ = case.run(tmp_path / "run")
    assert {"loss/dist/classes", "loss/dist/samples", "loss/ground_truth"} <= set(result.history[0])
    for term in ("loss/dist/classes", "loss/dist/samples"):
        assert result.history[-1][term] < 0.5 * result.history[0][term]
