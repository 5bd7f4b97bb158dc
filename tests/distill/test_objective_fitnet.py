from pathlib import Path

import numpy as np
import pytest
import torch

from distill.objectives.base import Objective
from distill.objectives.compose import build_objective
from distill.objectives.fitnet import FitNet, hint_loss, linear_map
from distill.objectives.section import FitNetSection
from distill.outputs import StudentOutput, TeacherOutput
from tests.distill.objective_cases import batch, random, shapes
from tests.distill.training_cases import Case, cache, dataset

LABELS = torch.tensor([0, 1, 2, 0, 1])


def fitnet(weight: float = 100.0, **changes: object) -> FitNet:
    torch.manual_seed(0)
    return FitNet(FitNetSection(weight=weight), shapes(**changes))


def outputs(rows: int = 5, dtype: torch.dtype = torch.float32) -> tuple[StudentOutput, TeacherOutput]:
    s, e = random(rows, 6, seed=1, dtype=dtype).requires_grad_(), random(rows, 8, seed=2, dtype=dtype).requires_grad_()
    return StudentOutput(s, s[:, :3]), TeacherOutput(e, None)


def term(objective: Objective, student: StudentOutput, teacher: TeacherOutput) -> torch.Tensor:
    return objective(student, teacher, batch(LABELS[: len(student.head)]))["fitnet"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_hint_loss_agrees_with_numpy(dtype: torch.dtype) -> None:
    mapped, teacher = random(7, 5, seed=1), random(7, 5, seed=2) * 3
    expected = np.mean([np.dot(m - e, m - e) / 5 for m, e in zip(mapped.numpy(), teacher.numpy(), strict=True)])
    assert float(hint_loss(mapped.to(dtype), teacher.to(dtype))) == pytest.approx(expected, rel=1e-6)


def test_gradient_of_the_hint_agrees_with_finite_differences() -> None:
    assert torch.autograd.gradcheck(
        lambda m: hint_loss(m, random(4, 3, seed=4)), (random(4, 3, seed=3).requires_grad_(),)
    )


def test_gradient_of_the_whole_objective_agrees_with_finite_differences() -> None:
    objective = fitnet().double()
    e = random(4, 8, seed=2)

    def total(s: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        parameters = {"regressor.weight": weight, "regressor.bias": bias}
        arguments = (StudentOutput(s, s[:, :3]), TeacherOutput(e, None), batch(LABELS[:4]))
        return torch.func.functional_call(objective, parameters, arguments)["fitnet"]

    weight, bias = (p.detach().clone().requires_grad_() for p in objective.parameters())
    assert torch.autograd.gradcheck(total, (random(4, 6, seed=1).requires_grad_(), weight, bias))


def test_an_exact_match_is_exactly_zero_and_teaches_nothing() -> None:
    objective = fitnet()
    student, _ = outputs()
    e = objective.regressor(student.embedding).detach()
    loss = term(objective, student, TeacherOutput(e, None))
    loss.backward()
    assert float(loss.detach()) == 0
    assert not student.embedding.grad.any()


def test_a_student_that_holds_the_teacher_up_to_an_affine_map_can_reach_zero() -> None:
    """With the least-squares regressor in place; with another teacher nothing of this size is left."""
    objective = fitnet(student_dim=9).double()
    e = random(40, 8, seed=2)
    s = torch.cat([e, random(40, 1, seed=3)], 1) @ random(9, 9, seed=4) + random(9, seed=5)
    design = torch.cat([s, torch.ones(40, 1, dtype=torch.float64)], 1)
    solution = torch.linalg.lstsq(design, e).solution
    with torch.no_grad():
        objective.regressor.weight.copy_(solution[:-1].T)
        objective.regressor.bias.copy_(solution[-1])
    assert float(hint_loss(objective.regressor(s), e).detach()) < 1e-20
    assert float(hint_loss(objective.regressor(s), e.flip(0)).detach()) > 0.1


def test_the_loss_ignores_order_common_shift_and_rotation_and_grows_with_the_square_of_the_scale() -> None:
    m, e = random(6, 4, seed=1), random(6, 4, seed=2)
    loss = float(hint_loss(m, e))
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    rotation = torch.linalg.qr(random(4, 4, seed=3))[0]
    assert float(hint_loss(m[order], e[order])) == pytest.approx(loss)
    assert float(hint_loss(m + 7, e + 7)) == pytest.approx(loss)
    assert float(hint_loss(m @ rotation, e @ rotation)) == pytest.approx(loss)
    assert float(hint_loss(3 * m, 3 * e)) == pytest.approx(9 * loss)
    assert float(hint_loss(m[order], e)) != pytest.approx(loss)


def test_the_regressor_learns_and_the_teacher_gets_no_gradient() -> None:
    objective = fitnet()
    student, teacher = outputs()
    term(objective, student, teacher).backward()
    assert student.embedding.grad.any()
    assert all(p.grad.any() for p in objective.parameters())
    assert teacher.embedding.grad is None


def test_the_regressor_is_learned_for_equal_dimensions_too() -> None:
    assert [tuple(p.shape) for p in fitnet(student_dim=8).parameters()] == [(8, 8), (8,)]


def test_the_term_is_weighted_with_100_unless_the_recipe_says_otherwise() -> None:
    student, teacher = outputs()
    loss = float(hint_loss(fitnet().regressor(student.embedding), teacher.embedding).detach())
    assert FitNetSection().weight == 100
    assert float(term(fitnet(), student, teacher).detach()) == pytest.approx(100 * loss)
    assert float(term(fitnet(2.0), student, teacher).detach()) == pytest.approx(2 * loss)


@pytest.mark.parametrize("rows", [1, 5])
def test_one_sample_and_identical_rows_are_finite(rows: int) -> None:
    s = torch.ones(rows, 6).requires_grad_()
    loss = term(fitnet(), StudentOutput(s, s[:, :3]), TeacherOutput(torch.ones(rows, 8), None))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(s.grad).all()


def test_one_dimension_and_one_class_are_finite() -> None:
    s = torch.ones(3, 1).requires_grad_()
    objective = fitnet(student_dim=1, teacher_dim=1, classes=1)
    loss = term(objective, StudentOutput(s, s), TeacherOutput(torch.zeros(3, 1), None))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(s.grad).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 6e4])
def test_half_precision_of_any_scale_is_computed_in_float32(dtype: torch.dtype, scale: float) -> None:
    m, e = ((random(8, 4, seed=seed).tanh() * scale).to(dtype) for seed in (1, 2))
    value = hint_loss(m, e)
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(float(hint_loss(m.double(), e.double())), rel=1e-5)
    student = StudentOutput(random(5, 6, seed=1).to(dtype), random(5, 3, seed=1).to(dtype))
    loss = term(fitnet(), student, TeacherOutput((random(5, 8, seed=2).tanh() * scale).to(dtype), None))
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)


def test_a_map_without_teacher_embeddings_is_refused() -> None:
    with pytest.raises(RuntimeError, match="without teacher embeddings"):
        linear_map(shapes(teacher_dim=None))


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_it_is_built_from_a_recipe_and_trains(task: str, tmp_path: Path) -> None:
    data = dataset(task=task)
    composed = build_objective((FitNetSection(),), data, cache(data), student_dim=12)
    assert composed.hard_weight == 1.0
    assert {name: tuple(p.shape) for name, p in composed.named_parameters()} == {
        "objectives.0.regressor.weight": (10, 12),
        "objectives.0.regressor.bias": (10,),
    }
    result, net, _ = Case("fitnet", data=data).with_(epochs=10, learning_rate=0.02).run(tmp_path / "student")
    losses = [record["loss/fitnet"] for record in result.history]
    assert losses[-1] < 0.7 * losses[0]
    assert result.metric.value > 0.6
    assert not any("regressor" in name for name in net.state_dict())
