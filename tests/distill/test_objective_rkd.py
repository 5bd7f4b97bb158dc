from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill.objectives.rkd import RKD, rkd_angle_loss, rkd_distance_loss
from distill.objectives.section import RKDSection
from distill.outputs import StudentOutput, TeacherOutput
from tests.distill.objective_cases import batch, random, shapes
from tests.distill.training_cases import Case, dataset

LOSSES = [rkd_distance_loss, rkd_angle_loss]


def huber(difference: np.ndarray | float) -> np.ndarray:
    size = np.abs(difference)
    return np.where(size < 1, size**2 / 2, size - 0.5)


def numpy_distance(x: np.ndarray, y: np.ndarray) -> float:
    def relative(x: np.ndarray) -> np.ndarray:
        d = np.array([[np.sqrt(((a - b) ** 2).sum()) for b in x] for a in x])
        return d / d[d > 0].mean()

    return float(huber(relative(x) - relative(y)).mean())


def numpy_angle(x: np.ndarray, y: np.ndarray) -> float:
    def cosine(x: np.ndarray, i: int, j: int, k: int) -> float:
        a, b = x[i] - x[j], x[k] - x[j]
        lengths = np.linalg.norm(a) * np.linalg.norm(b)
        return float(a @ b / lengths) if lengths else 0.0

    return float(np.mean([huber(cosine(x, *t) - cosine(y, *t)) for t in product(range(len(x)), repeat=3)]))


def rotation(dimension: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(random(dimension, dimension, seed=seed))[0]


@pytest.mark.parametrize("teacher_dim", [3, 4, 20])
def test_both_losses_agree_with_numpy(teacher_dim: int) -> None:
    x, y = random(7, 4, seed=1), random(7, teacher_dim, seed=2) ** 3
    assert float(rkd_distance_loss(x, y)) == pytest.approx(numpy_distance(x.numpy(), y.numpy()), rel=1e-9)
    assert float(rkd_angle_loss(x, y)) == pytest.approx(numpy_angle(x.numpy(), y.numpy()), rel=1e-9)


def test_large_relative_distances_are_compared_linearly() -> None:
    x, y = random(6, 3, seed=1), random(6, 3, seed=2)
    x[0] += 100
    assert numpy_distance(x.numpy(), y.numpy()) > 0.3
    assert float(rkd_distance_loss(x, y)) == pytest.approx(numpy_distance(x.numpy(), y.numpy()), rel=1e-9)


def test_a_duplicate_is_compared_as_in_numpy() -> None:
    x, y = random(6, 3, seed=1), random(6, 9, seed=2)
    x[3] = x[5]
    y[1] = y[2]
    assert float(rkd_distance_loss(x, y)) == pytest.approx(numpy_distance(x.numpy(), y.numpy()), rel=1e-9)
    assert float(rkd_angle_loss(x, y)) == pytest.approx(numpy_angle(x.numpy(), y.numpy()), rel=1e-9)


@pytest.mark.parametrize("loss", LOSSES)
def test_rotation_shift_and_scale_of_either_side_change_nothing(loss: Any) -> None:
    x, y = random(8, 4, seed=1), random(8, 11, seed=2)
    expected = float(loss(x, y))
    assert float(loss(0.3 * x @ rotation(4, 3) + 7, y)) == pytest.approx(expected, abs=1e-12)
    assert float(loss(x, 5 * y @ rotation(11, 3) - 2)) == pytest.approx(expected, abs=1e-12)
    assert float(loss(x, 2 * x @ rotation(4, 3) + 1)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_order_of_the_batch_changes_nothing(loss: Any) -> None:
    x, y = random(8, 4, seed=1), random(8, 5, seed=2)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    assert float(loss(x[order], y[order])) == pytest.approx(float(loss(x, y)), abs=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("teacher_dim", [4, 12])
def test_gradients_agree_with_finite_differences(loss: Any, teacher_dim: int) -> None:
    x = random(6, 3, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, random(6, teacher_dim, seed=4)), (x,))


@pytest.mark.parametrize("entries", [1, 200, 400])
def test_angles_in_chunks_are_those_at_once(entries: int) -> None:
    # one vertex, two, and four of nine at a time
    results = []
    for option in ({}, {"entries": entries}):
        x = random(9, 3, seed=1).requires_grad_()
        loss = rkd_angle_loss(x, random(9, 2, seed=2), **option)
        loss.backward()
        results.append((float(loss.detach()), x.grad))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-12)
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-10, atol=1e-14)


def test_chunks_keep_the_memory_of_a_large_batch_bounded() -> None:
    """What the graph keeps for the backward pass does not grow with the number of triples."""
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    x, y = random(40, 3, seed=1).requires_grad_(), random(40, 3, seed=2)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        rkd_angle_loss(x, y, entries=8000)
    assert max(kept, default=0) < 40**2


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("rows", [1, 2, 3, 8])
def test_identical_rows_and_small_batches_give_finite_gradients(loss: Any, rows: int) -> None:
    for x in (torch.ones(rows, 3, dtype=torch.float64), random(rows, 3, seed=1)):
        for y in (torch.ones(rows, 9, dtype=torch.float64), random(rows, 9, seed=4)):
            student = x.clone().requires_grad_()
            value = loss(student, y)
            value.backward()
            assert torch.isfinite(value)
            assert torch.isfinite(student.grad).all()
            if rows < 3:
                assert student.grad.abs().max() < 1e-12


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("rows", [1, 2])
def test_one_row_or_two_have_no_relation_to_match(loss: Any, rows: int) -> None:
    assert float(loss(random(rows, 3, seed=1), random(rows, 9, seed=4))) == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("loss", LOSSES)
def test_duplicates_that_the_teacher_tells_apart_give_small_gradients(loss: Any) -> None:
    """The derivative of a length at zero must not become 1 / epsilon."""
    x = random(8, 3, seed=1)
    x[3] = x[5]
    x.requires_grad_()
    loss(x, random(8, 4, seed=4)).backward()
    assert 0 < x.grad.abs().max() < 1


@pytest.mark.parametrize("loss", LOSSES)
def test_a_shift_of_small_data_does_not_spoil_float32(loss: Any) -> None:
    x, y = random(32, 16, seed=1) * 0.1, random(32, 64, seed=2)
    shifted = float(loss((x + 10).float(), (y + 10).float()))
    assert shifted == pytest.approx(float(loss(x, y)), rel=1e-3)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(loss: Any, dtype: torch.dtype) -> None:
    x, y = (random(8, 3, seed=1) * 100).to(dtype), (random(8, 12, seed=2) * 100).to(dtype)
    value = loss(x, y)
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(float(loss(x.double(), y.double())), abs=1e-5)


def test_the_module_weighs_both_terms_and_leaves_the_teacher_alone() -> None:
    s, e = random(8, 6, seed=1).requires_grad_(), random(8, 8, seed=2).requires_grad_()
    outputs = StudentOutput(s, s[:, :3]), TeacherOutput(e, None), batch(torch.zeros(8, dtype=torch.int64))
    terms = RKD(RKDSection(weight=0.5), shapes())(*outputs)
    assert float(terms["rkd/distance"].detach()) == pytest.approx(0.5 * 25 * float(rkd_distance_loss(s, e).detach()))
    assert float(terms["rkd/angle"].detach()) == pytest.approx(0.5 * 50 * float(rkd_angle_loss(s, e).detach()))
    sum(terms.values()).backward()
    assert s.grad.any()
    assert e.grad is None


def test_a_part_of_weight_zero_is_not_computed() -> None:
    s, e = random(4, 6, seed=1), random(4, 8, seed=2)
    outputs = StudentOutput(s, s[:, :3]), TeacherOutput(e, None), batch(torch.zeros(4, dtype=torch.int64))
    assert list(RKD(RKDSection(angle_weight=0), shapes())(*outputs)) == ["rkd/distance"]
    assert list(RKD(RKDSection(distance_weight=0), shapes())(*outputs)) == ["rkd/angle"]


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_a_student_learns_with_it(task: Any, tmp_path: Path) -> None:
    case = Case("rkd", data=dataset(task=task)).with_(epochs=8, learning_rate=0.02)
    result, _, _ = case.run(tmp_path / "student")
    assert result.metric.value > 0.6
    first, last = result.history[0], result.history[-2]  # two epochs with the same view of the inputs
    assert last["loss/rkd/distance"] < first["loss/rkd/distance"]
    assert last["loss/rkd/angle"] < first["loss/rkd/angle"]
