import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch.utils._python_dispatch import TorchDispatchMode

from distill.objectives.compose import build_objective
from distill.objectives.crd import CRD, draw_candidates, log_normaliser, nce_loss, similarities
from distill.objectives.section import CRDSection, ObjectiveSections
from distill.outputs import Batch, StudentOutput, TeacherOutput
from profiles.errors import InputError, Interrupted
from tests.distill.objective_cases import random, shapes
from tests.distill.training_cases import Case, StopAfter, dataset, same_weights

SAMPLES = 12


def crd(seed: int = 0, samples: int = SAMPLES, **section: Any) -> CRD:
    torch.manual_seed(seed)
    return CRD(CRDSection(**{"dimension": 5, **section}), shapes(train_samples=samples))


def batch(indices: list[int], step: int = 0) -> Batch:
    return Batch(torch.zeros(len(indices), dtype=torch.int64), None, torch.tensor(indices), step, 0.0)


def outputs(rows: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> tuple[StudentOutput, TeacherOutput]:
    s = random(rows, 6, seed=seed, dtype=dtype).requires_grad_()
    return StudentOutput(s, s[:, :3]), TeacherOutput(
        random(rows, 8, seed=seed + 50, dtype=dtype).requires_grad_(), None
    )


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def numpy_term(
    anchors: np.ndarray, bank: np.ndarray, indices: list[int], chosen: list[list[int]], tau: float, z: float | None
) -> tuple[float, float]:
    """The loss of one kind of anchors with explicit negatives per sample, and Z."""
    samples, k = len(bank), len(chosen[0])
    x = np.array(
        [
            [math.exp(float(v @ bank[j]) / tau) for j in [own, *others]]
            for v, own, others in zip(anchors, indices, chosen, strict=True)
        ]
    )
    z = x.mean() * samples if z is None else z
    x = x / z
    noise = k / samples
    total = 0.0
    for row in x:
        total += math.log(row[0] / (row[0] + noise))
        total += sum(math.log(noise / (value + noise)) for value in row[1:])
    return -total / len(indices), z


def negatives_of(objective: CRD, indices: list[int], step: int) -> list[list[int]]:
    rows, left_out = draw_candidates(
        len(objective.student_bank), objective.negatives, torch.tensor(indices), seed=objective.seed, step=step
    )
    return [[r for at, r in enumerate(rows.tolist()) if at != gone] for gone in left_out.tolist()]


@pytest.mark.parametrize("negatives", [None, 4, 1])
def test_loss_normaliser_and_banks_agree_with_numpy_over_several_steps(negatives: int | None) -> None:
    objective = crd(negatives=negatives, tau=0.2, momentum=0.7, weight=0.8).double()
    student_bank, teacher_bank = objective.student_bank.numpy().copy(), objective.teacher_bank.numpy().copy()
    normalisers: list[float | None] = [None, None]
    for step, indices in enumerate([[3, 0, 7], [1, 3, 11], [7, 2, 0]]):
        student, teacher = outputs(3, seed=step, dtype=torch.float64)
        chosen = negatives_of(objective, indices, step)
        terms = objective(student, teacher, batch(indices, step))
        projected = []
        for layer, embedding in (
            (objective.student_projection, student.embedding),
            (objective.teacher_projection, teacher.embedding),
        ):
            weight, bias = (p.detach().numpy() for p in layer.parameters())
            projected.append(unit(embedding.detach().numpy() @ weight.T + bias))
        expected = []
        for side, (anchors, bank) in enumerate(zip(projected, (teacher_bank, student_bank), strict=True)):
            loss, normalisers[side] = numpy_term(anchors, bank, indices, chosen, 0.2, normalisers[side])
            expected.append(0.8 * loss)
        assert [float(terms[f"crd/{name}"].detach()) for name in ("student", "teacher")] == pytest.approx(
            expected, rel=1e-9
        )
        assert objective.log_z.exp().tolist() == pytest.approx(normalisers, rel=1e-9)
        for bank, rows in ((student_bank, projected[0]), (teacher_bank, projected[1])):
            bank[indices] = unit(0.7 * bank[indices] + 0.3 * rows)
        assert np.allclose(objective.student_bank.numpy(), student_bank, atol=1e-12)
        assert np.allclose(objective.teacher_bank.numpy(), teacher_bank, atol=1e-12)


@pytest.mark.parametrize("negatives", [1, 4, 10, 11])
def test_every_sample_has_that_many_distinct_negatives_and_never_itself(negatives: int) -> None:
    indices = [0, 3, 11, 5]
    objective = crd(negatives=negatives)
    for step in range(20):
        for own, others in zip(indices, negatives_of(objective, indices, step), strict=True):
            assert len(set(others)) == len(others) == negatives
            assert own not in others
            assert set(others) <= set(range(SAMPLES))


def test_negatives_are_uniform_among_the_others() -> None:
    objective = crd(negatives=3)
    counts = np.zeros((2, SAMPLES))
    steps = 4000
    for step in range(steps):
        for row, others in enumerate(negatives_of(objective, [2, 9], step)):
            counts[row, others] += 1
    expected = steps * 3 / (SAMPLES - 1)
    for own, row in zip([2, 9], counts, strict=True):
        assert row[own] == 0
        assert np.abs(np.delete(row, own) - expected).max() < 5 * math.sqrt(expected)


def test_the_draw_depends_on_seed_and_step_and_on_nothing_else() -> None:
    def draw(seed: int, step: int) -> list[int]:
        return draw_candidates(100, 10, torch.tensor([1]), seed=seed, step=step)[0].tolist()

    assert draw(1, 2) == draw(1, 2)
    assert len({tuple(draw(seed, step)) for seed in range(3) for step in range(3)}) == 9


def test_processes_with_other_random_states_see_the_same_loss_and_keep_the_same_banks() -> None:
    results = []
    for state in (1, 2):
        objective = crd(negatives=4)
        torch.manual_seed(state)
        for step, indices in enumerate([[3, 0, 7], [1, 3, 11]]):
            torch.rand(state)
            before = torch.get_rng_state()
            terms = objective(*outputs(3, seed=step), batch(indices, step))
            assert torch.equal(before, torch.get_rng_state())
        results.append((torch.stack(list(terms.values())), objective))
    assert torch.equal(results[0][0], results[1][0])
    assert same_weights(results[0][1], results[1][1])


def test_the_default_contrasts_with_all_others_up_to_the_published_number() -> None:
    assert crd().negatives == SAMPLES - 1
    assert crd(samples=16384 + 100, dimension=2).negatives == 16384


def test_initial_state_and_draws_are_a_function_of_the_seed() -> None:
    assert same_weights(crd(seed=3), crd(seed=3))
    assert crd(seed=3).seed == crd(seed=3).seed != crd(seed=4).seed
    assert torch.allclose(crd().student_bank.norm(dim=1), torch.ones(SAMPLES))
    assert not torch.equal(crd().student_bank, crd().teacher_bank)


def test_in_eval_mode_nothing_is_remembered() -> None:
    objective = crd(negatives=4)
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    objective.eval()
    terms = objective(*outputs(3), batch([3, 0, 7]))
    assert all(torch.isfinite(term) for term in terms.values())
    assert all(torch.equal(before[name], value) for name, value in objective.state_dict().items())
    objective.train()
    trained = objective(*outputs(3), batch([3, 0, 7]))
    assert all(torch.equal(trained[name], terms[name]) for name in terms)
    changed = {name for name, value in objective.state_dict().items() if not torch.equal(before[name], value)}
    assert changed == {"student_bank", "teacher_bank", "log_z"}


def test_only_the_batchs_rows_move_and_they_stay_normalised() -> None:
    objective = crd()
    before = objective.student_bank.clone()
    objective(*outputs(3), batch([3, 0, 7]))
    moved = (objective.student_bank != before).any(1)
    assert moved.nonzero().flatten().tolist() == [0, 3, 7]
    assert torch.allclose(objective.student_bank.norm(dim=1), torch.ones(SAMPLES))
    assert not objective.student_bank.requires_grad


def test_the_normaliser_is_that_of_the_first_training_batch() -> None:
    objective = crd()
    assert objective.log_z.isinf().all()
    objective(*outputs(3, seed=1), batch([3, 0, 7]))
    first = objective.log_z.clone()
    objective(*outputs(3, seed=2), batch([1, 2, 4], 1))
    assert torch.equal(objective.log_z, first)


def test_a_loaded_state_goes_on_like_the_original_and_a_fresh_one_starts_anew() -> None:
    original, other = crd(negatives=4), crd(negatives=4)
    fresh = {name: value.clone() for name, value in original.state_dict().items()}
    original(*outputs(3, seed=1), batch([3, 0, 7]))
    other(*outputs(3, seed=9), batch([1, 0, 7]))
    other.load_state_dict(original.state_dict())
    for objective in (original, other):
        objective(*outputs(3, seed=2), batch([1, 3, 11], 1))
    assert same_weights(original, other)
    other.load_state_dict(fresh)
    assert other.log_z.isinf().all()
    other(*outputs(3, seed=1), batch([3, 0, 7]))
    assert other.log_z.isfinite().all()


def test_each_anchor_trains_its_own_projection_and_the_student_alone() -> None:
    for name, own, foreign in (
        ("crd/student", "student_projection", "teacher_projection"),
        ("crd/teacher", "teacher_projection", "student_projection"),
    ):
        objective = crd()
        student, teacher = outputs(3)
        objective(student, teacher, batch([3, 0, 7]))[name].backward()
        assert getattr(objective, own).weight.grad.any()
        assert getattr(objective, foreign).weight.grad is None
        assert (student.embedding.grad is not None) is (name == "crd/student")
        assert teacher.embedding.grad is None


def test_the_loss_falls_when_the_positive_comes_closer_and_a_negative_goes() -> None:
    zero = torch.zeros((), dtype=torch.float64)
    bank = torch.nn.functional.normalize(random(4, 3, seed=1))
    left_out = torch.tensor([3])

    def loss(anchor: torch.Tensor, positive: torch.Tensor) -> float:
        return float(nce_loss(*similarities(anchor, positive, bank, left_out, 0.1), zero, 10))

    anchor = bank[:1]
    assert loss(-anchor, -anchor) < loss(-anchor, bank[1:2]) < loss(-anchor, anchor)
    assert loss(bank[3:], bank[3:]) < loss(bank[:1], bank[:1])


def test_scores_of_any_size_give_finite_losses_and_gradients() -> None:
    for scale in (1e-3, 1.0, 1e3):
        positive = (random(3, seed=1, dtype=torch.float32) * scale).requires_grad_()
        negative = random(3, 5, seed=2, dtype=torch.float32) * scale
        negative[:, 2] = -math.inf
        negative.requires_grad_()
        log_z = log_normaliser(positive, negative, 10).detach()
        loss = nce_loss(positive, negative, log_z, 10)
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(positive.grad).all()
        assert torch.isfinite(negative.grad).all()
        assert not negative.grad[:, 2].any()


@pytest.mark.parametrize("negatives", [None, 4])
def test_gradients_agree_with_finite_differences(negatives: int | None) -> None:
    objective = crd(negatives=negatives, tau=0.3).double()
    objective(*outputs(3, dtype=torch.float64), batch([3, 0, 7]))
    objective.eval()
    e = random(3, 8, seed=2)

    def total(s: torch.Tensor) -> torch.Tensor:
        return sum(objective(StudentOutput(s, s[:, :3]), TeacherOutput(e, None), batch([1, 3, 11], 1)).values())

    assert torch.autograd.gradcheck(total, (random(3, 6, seed=1).requires_grad_(),))


@pytest.mark.parametrize("rows", [1, 4])
def test_a_batch_of_one_and_identical_rows_are_finite(rows: int) -> None:
    for negatives in (1, 11):
        objective = crd(negatives=negatives)
        for step in range(3):
            s = torch.ones(rows, 6).requires_grad_()
            output = StudentOutput(s, s[:, :3]), TeacherOutput(torch.ones(rows, 8), None)
            sum(objective(*output, batch(list(range(rows)), step)).values()).backward()
            assert torch.isfinite(s.grad).all()
            assert torch.isfinite(objective.student_bank).all()


def test_a_bank_as_large_as_the_batch_works() -> None:
    terms = crd(samples=2)(*outputs(2), batch([1, 0]))
    assert all(torch.isfinite(term) for term in terms.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    student, teacher = outputs(3)
    s, e = student.embedding.detach().to(dtype), teacher.embedding.detach().to(dtype)
    half = crd()(StudentOutput(s, s[:, :3]), TeacherOutput(e, None), batch([3, 0, 7]))
    exact = crd()(StudentOutput(s.float(), student.head), TeacherOutput(e.float(), None), batch([3, 0, 7]))
    for name, term in half.items():
        assert term.dtype == torch.float32
        assert torch.equal(term, exact[name])


class _Reads(TorchDispatchMode):
    """Fails where the host reads a tensor's value."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "_local_scalar_dense" not in str(func)
        assert "nonzero" not in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("negatives", [None, 4])
def test_the_host_reads_no_value_in_a_step(negatives: int | None) -> None:
    objective = crd(negatives=negatives)
    for step in range(2):
        student, teacher = outputs(3)
        indices = batch([3, 0, 7], step)
        with _Reads():
            sum(objective(student, teacher, indices).values()).backward()


def toy(rows: int) -> tuple[Any, Any]:
    data = dataset(rows=rows)
    return data, SimpleNamespace(
        key="cache", views=1, train_embedding=np.zeros((1, rows, 10), np.float32), train_logits=None
    )


@pytest.mark.parametrize("negatives", [96, 20000])
def test_more_negatives_than_other_samples_are_refused(negatives: int) -> None:
    sections = TypeAdapter(ObjectiveSections).validate_python([{"kind": "crd", "negatives": negatives}])
    data, teacher = toy(96)
    with pytest.raises(InputError) as error:
        build_objective(sections, data, teacher, student_dim=6)
    assert error.value.where == "objective[0].negatives"
    assert "95" in str(error.value.fix)


def test_a_training_split_of_one_sample_is_refused() -> None:
    data, teacher = toy(1)
    with pytest.raises(InputError) as error:
        build_objective(TypeAdapter(ObjectiveSections).validate_python("crd"), data, teacher, student_dim=6)
    assert error.value.where == "objective[0].kind"


CASE = Case([{"kind": "crd", "dimension": 16, "negatives": 40}])


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_a_student_learns_with_it(task: Any, tmp_path: Path) -> None:
    case = replace(CASE, data=dataset(task=task)).with_(epochs=16, learning_rate=0.02)
    result, _, _ = case.run(tmp_path / "student")
    assert result.metric.value > 0.6
    for name in ("loss/crd/student", "loss/crd/teacher"):
        assert result.history[-2][name] < 0.7 * result.history[0][name]  # two epochs with the same view


@pytest.mark.parametrize("stop", [1, 4, 9])
def test_a_resumed_training_keeps_banks_normaliser_and_draws(stop: int, tmp_path: Path) -> None:
    case = CASE.with_(epochs=3)
    whole, net, composed = case.run(tmp_path / "whole")
    with pytest.raises(Interrupted):
        case.run(tmp_path / "parts", progress=StopAfter(stop))
    resumed, other, other_composed = case.run(tmp_path / "parts")
    assert same_weights(net, other)
    assert same_weights(composed, other_composed)
    assert [r["loss"] for r in resumed.history] == [r["loss"] for r in whole.history]
    assert {"objectives.0.student_bank", "objectives.0.log_z"} <= set(other_composed.state_dict())
