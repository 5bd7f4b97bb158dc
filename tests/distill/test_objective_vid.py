import math
from pathlib import Path

import numpy as np
import pytest
import torch

from distill.objectives.compose import build_objective
from distill.objectives.section import VIDSection
from distill.objectives.vid import VID, vid_loss
from distill.outputs import StudentOutput, TeacherOutput
from tests.distill.objective_cases import batch, random, shapes
from tests.distill.training_cases import Case, cache, dataset

LABELS = torch.tensor([0, 1, 2, 0, 1])


def vid(weight: float = 1.0, **changes: object) -> VID:
    torch.manual_seed(0)
    return VID(VIDSection(weight=weight), shapes(**changes))


def outputs(rows: int = 5, dtype: torch.dtype = torch.float32) -> tuple[StudentOutput, TeacherOutput]:
    s, e = random(rows, 6, seed=1, dtype=dtype).requires_grad_(), random(rows, 8, seed=2, dtype=dtype).requires_grad_()
    return StudentOutput(s, s[:, :3]), TeacherOutput(e, None)


def term(objective: VID, student: StudentOutput, teacher: TeacherOutput) -> torch.Tensor:
    return objective(student, teacher, batch(LABELS[: len(student.head)]))["vid"]


def positive(*size: int, seed: int) -> torch.Tensor:
    return random(*size, seed=seed).exp()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_vid_agrees_with_the_normal_density(dtype: torch.dtype) -> None:
    mean, teacher, variance = random(7, 4, seed=1), random(7, 4, seed=2) * 3, positive(4, seed=3)
    densities = [
        math.exp(-((e - m) ** 2) / (2 * v)) / math.sqrt(2 * math.pi * v)
        for row_m, row_e in zip(mean.tolist(), teacher.tolist(), strict=True)
        for m, e, v in zip(row_m, row_e, variance.tolist(), strict=True)
    ]
    expected = -np.log(densities).mean() - 0.5 * math.log(2 * math.pi)
    value = vid_loss(mean.to(dtype), teacher.to(dtype), variance.to(dtype))
    assert float(value) == pytest.approx(expected, rel=1e-5)


def test_the_module_agrees_with_numpy_from_its_parameters() -> None:
    objective = vid(weight=3.0).double()
    with torch.no_grad():
        objective.raw_variance.copy_(random(8, seed=5))
    student, teacher = outputs(dtype=torch.float64)
    weight, bias, raw = (objective.state_dict()[name].numpy() for name in ("mean.weight", "mean.bias", "raw_variance"))
    s, e = student.embedding.detach().numpy(), teacher.embedding.detach().numpy()
    variance = np.log(1 + np.exp(raw)) + 1e-5
    expected = (0.5 * ((s @ weight.T + bias - e) ** 2 / variance + np.log(variance))).mean()
    assert float(term(objective, student, teacher).detach()) == pytest.approx(3 * expected, rel=1e-9)


def test_the_variance_starts_at_five_and_stays_positive_whatever_the_optimiser_does() -> None:
    objective = vid()
    assert objective.variance().detach().numpy() == pytest.approx(5, rel=1e-6)
    assert objective.logs() == {"vid/variance": pytest.approx(5)}
    with torch.no_grad():
        objective.raw_variance.copy_(torch.tensor([-1e4, -100, -1, 0, 1, 50, 100, 1e4]))
    variance = objective.variance().detach()
    assert torch.isfinite(variance).all()
    assert float(variance.min()) == pytest.approx(1e-5)
    assert float(variance.max()) == pytest.approx(1e4)
    assert torch.isfinite(term(objective, *outputs()))


def test_gradients_of_the_formula_agree_with_finite_differences() -> None:
    mean, variance = random(4, 3, seed=1).requires_grad_(), positive(3, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda m, v: vid_loss(m, random(4, 3, seed=3), v), (mean, variance))


def test_gradients_of_the_whole_objective_agree_with_finite_differences() -> None:
    objective = vid().double()
    e = random(4, 8, seed=2)

    def total(s: torch.Tensor, raw: torch.Tensor) -> torch.Tensor:
        arguments = (StudentOutput(s, s[:, :3]), TeacherOutput(e, None), batch(LABELS[:4]))
        return torch.func.functional_call(objective, {"raw_variance": raw}, arguments)["vid"]

    assert torch.autograd.gradcheck(total, (random(4, 6, seed=1).requires_grad_(), random(8, seed=3).requires_grad_()))


def test_an_exact_match_leaves_half_the_log_variance_which_may_be_negative() -> None:
    objective = vid()
    with torch.no_grad():
        objective.raw_variance.fill_(-1e4)
    student, _ = outputs()
    loss = term(objective, student, TeacherOutput(objective.mean(student.embedding).detach(), None))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.5 * math.log(1e-5))
    assert not student.embedding.grad.any()


def test_the_best_variance_is_the_mean_squared_error_of_each_dimension() -> None:
    mean, teacher = random(9, 4, seed=1), random(9, 4, seed=2) * torch.tensor([0.1, 1.0, 5.0, 30.0])
    best = (teacher - mean).square().mean(0).requires_grad_()
    loss = vid_loss(mean, teacher, best)
    loss.backward()
    assert best.grad.abs().max() < 1e-9
    for factor in (0.8, 1.25):
        assert vid_loss(mean, teacher, best.detach() * factor) > loss


def test_the_scale_of_the_teacher_adds_its_logarithm_and_nothing_else() -> None:
    mean, teacher, variance = random(6, 4, seed=1), random(6, 4, seed=2), positive(4, seed=3)
    loss = float(vid_loss(mean, teacher, variance))
    assert float(vid_loss(20 * mean, 20 * teacher, 400 * variance)) == pytest.approx(loss + math.log(20))


def test_the_order_of_samples_and_dimensions_and_a_common_shift_do_not_matter() -> None:
    mean, teacher, variance = random(6, 4, seed=1), random(6, 4, seed=2), positive(4, seed=3)
    loss = float(vid_loss(mean, teacher, variance))
    rows, columns = torch.tensor([3, 1, 5, 0, 4, 2]), torch.tensor([2, 0, 3, 1])
    assert float(vid_loss(mean[rows], teacher[rows], variance)) == pytest.approx(loss)
    assert float(vid_loss(mean[:, columns], teacher[:, columns], variance[columns])) == pytest.approx(loss)
    assert float(vid_loss(mean - 4, teacher - 4, variance)) == pytest.approx(loss)
    assert float(vid_loss(mean, teacher, variance[columns])) != pytest.approx(loss)


def test_what_is_noisy_in_the_teacher_pulls_the_student_less() -> None:
    mean = torch.zeros(4, 2).requires_grad_()
    vid_loss(mean, torch.ones(4, 2), torch.tensor([0.5, 50.0])).backward()
    assert torch.allclose(mean.grad[:, 0], 100 * mean.grad[:, 1])


def test_map_and_variance_learn_and_the_teacher_gets_no_gradient() -> None:
    objective = vid()
    student, teacher = outputs()
    term(objective, student, teacher).backward()
    assert student.embedding.grad.any()
    assert all(p.grad.any() for p in objective.parameters())
    assert teacher.embedding.grad is None


@pytest.mark.parametrize("rows", [1, 5])
def test_one_sample_and_identical_rows_are_finite(rows: int) -> None:
    s = torch.ones(rows, 6).requires_grad_()
    objective = vid()
    loss = term(objective, StudentOutput(s, s[:, :3]), TeacherOutput(torch.ones(rows, 8), None))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(s.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in objective.parameters())


def test_one_dimension_and_one_class_are_finite() -> None:
    s = torch.ones(3, 1).requires_grad_()
    loss = term(
        vid(student_dim=1, teacher_dim=1, classes=1), StudentOutput(s, s), TeacherOutput(torch.zeros(3, 1), None)
    )
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(s.grad).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 6e4])
def test_half_precision_of_any_scale_is_computed_in_float32(dtype: torch.dtype, scale: float) -> None:
    mean, teacher = ((random(8, 4, seed=seed).tanh() * scale).to(dtype) for seed in (1, 2))
    variance = positive(4, seed=3)
    value = vid_loss(mean, teacher, variance.float())
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(float(vid_loss(mean.double(), teacher.double(), variance)), rel=1e-4)
    student = StudentOutput(random(5, 6, seed=1).to(dtype), random(5, 3, seed=1).to(dtype))
    loss = term(vid(), student, TeacherOutput((random(5, 8, seed=2).tanh() * scale).to(dtype), None))
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_it_is_built_from_a_recipe_and_trains(task: str, tmp_path: Path) -> None:
    data = dataset(task=task)
    composed = build_objective((VIDSection(),), data, cache(data), student_dim=12)
    assert composed.hard_weight == 1.0
    assert {name: tuple(p.shape) for name, p in composed.named_parameters()} == {
        "objectives.0.raw_variance": (10,),
        "objectives.0.mean.weight": (10, 12),
        "objectives.0.mean.bias": (10,),
    }
    result, net, _ = Case("vid", data=data).with_(epochs=10, learning_rate=0.02).run(tmp_path / "student")
    first, last = result.history[0], result.history[-1]
    assert last["loss/vid"] < first["loss/vid"] - 0.1
    assert last["vid/variance"] < first["vid/variance"]
    assert result.metric.value > 0.6
    assert not any("variance" in name for name in net.state_dict())
