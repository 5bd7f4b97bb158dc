import numpy as np
import pytest
import torch

from distill.objectives.cosine_difference import CosineDifference, cosine_difference_loss
from distill.objectives.distance_correlation import (
    DistanceCorrelation,
    distance_correlation_loss,
    squared_distance_correlation,
)
from distill.objectives.embedding_compression import cosine_loss, effective_rank
from distill.objectives.section import CosineDifferenceSection, DistanceCorrelationSection
from distill.outputs import StudentOutput, TeacherOutput
from tests.distill.objective_cases import batch, random, shapes


def numpy_distance_correlation(x: np.ndarray, y: np.ndarray, biased: bool) -> float:
    def centred(x: np.ndarray) -> np.ndarray:
        n = len(x)
        d = np.array([[np.sqrt(((a - b) ** 2).sum()) for b in x] for a in x])
        if biased:
            h = np.eye(n) - 1 / n
            return h @ d @ h
        out = np.zeros((n, n))
        for i in range(n):
            for j in range(n):
                if i != j:
                    out[i, j] = d[i, j] - d[i].sum() / (n - 2) - d[j].sum() / (n - 2) + d.sum() / ((n - 1) * (n - 2))
        return out

    a, b = centred(x), centred(y)
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


def rotation(dimension: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(random(dimension, dimension, seed=seed))[0]


LOSSES = [
    distance_correlation_loss,
    lambda x, y: distance_correlation_loss(x, y, biased=True),
    cosine_difference_loss,
    lambda x, y: cosine_loss(x, y[:, : x.shape[1]]),
]


@pytest.mark.parametrize("biased", [False, True])
def test_distance_correlation_agrees_with_numpy(biased: bool) -> None:
    x, y = random(9, 4, seed=1), random(9, 7, seed=2)
    y[:, :4] += x
    expected = numpy_distance_correlation(x.numpy(), y.numpy(), biased)
    assert float(squared_distance_correlation(x, y, biased=biased)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("biased", [False, True])
def test_distance_correlation_with_itself_is_one_whatever_the_pose(biased: bool) -> None:
    x = random(12, 5, seed=1)
    moved = 0.3 * x @ rotation(5, 2) + 7
    assert float(squared_distance_correlation(x, x, biased=biased)) == pytest.approx(1, abs=1e-9)
    assert float(squared_distance_correlation(x, moved, biased=biased)) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("biased", [False, True])
def test_distance_correlation_is_symmetric_and_takes_unequal_dimensions(biased: bool) -> None:
    x, y = random(12, 5, seed=1), random(12, 3, seed=2)
    forward = squared_distance_correlation(x, y, biased=biased)
    assert float(forward) == pytest.approx(float(squared_distance_correlation(y, x, biased=biased)), abs=1e-12)


def test_u_centring_is_about_zero_for_independent_data_where_double_centring_saturates() -> None:
    unbiased, biased = [], []
    for seed in range(10):
        x, y = random(32, 256, seed=2 * seed), random(32, 64, seed=2 * seed + 1)
        unbiased.append(float(squared_distance_correlation(x, y)))
        biased.append(float(squared_distance_correlation(x, y, biased=True)))
    assert abs(np.mean(unbiased)) < 0.05
    assert np.mean(biased) > 0.85


def test_a_shift_of_small_data_does_not_spoil_float32() -> None:
    x, y = random(64, 16, seed=1) * 0.1, random(64, 8, seed=2)
    y += x[:, :8] * 20
    exact = float(squared_distance_correlation(x, y))
    shifted = float(squared_distance_correlation((x + 10).float(), y.float()))
    assert shifted == pytest.approx(exact, abs=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_agree_with_finite_differences(loss) -> None:
    x = random(6, 3, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, random(6, 4, seed=4)), (x,))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("rows", [1, 2, 3, 8])
def test_identical_rows_and_small_batches_give_finite_gradients(loss, rows: int) -> None:
    x = torch.ones(rows, 3, dtype=torch.float64).requires_grad_()
    value = loss(x, random(rows, 4, seed=4))
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(x.grad).all()


def test_duplicate_rows_among_others_give_finite_gradients() -> None:
    x = random(8, 3, seed=1)
    x[3] = x[5]
    x.requires_grad_()
    distance_correlation_loss(x, random(8, 4, seed=4)).backward()
    assert torch.isfinite(x.grad).all()
    assert x.grad.abs().sum() > 0


def test_rows_that_are_all_equal_correlate_with_nothing() -> None:
    assert float(squared_distance_correlation(torch.ones(8, 3), random(8, 4))) == 0


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_batches_below_four_teach_nothing(rows: int) -> None:
    x = random(rows, 3, seed=1).requires_grad_()
    loss = distance_correlation_loss(x, random(rows, 4, seed=4))
    loss.backward()
    assert float(loss.detach()) == 0
    assert not x.grad.any()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(loss, dtype: torch.dtype) -> None:
    x, y = (random(8, 3, seed=1) * 100).to(dtype), (random(8, 4, seed=2) * 100).to(dtype)
    value = loss(x, y)
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(float(loss(x.double(), y.double())), abs=1e-4)


def test_cosine_difference_agrees_with_numpy() -> None:
    x, y = random(5, 3, seed=1).numpy(), random(5, 4, seed=2).numpy()

    def similarity(x: np.ndarray) -> np.ndarray:
        return np.array([[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in x] for a in x])

    expected = np.abs(similarity(x) - similarity(y)).mean()
    assert float(cosine_difference_loss(torch.from_numpy(x), torch.from_numpy(y))) == pytest.approx(expected, rel=1e-9)


def test_cosine_difference_ignores_rotation_and_the_rows_scale() -> None:
    x, y = random(6, 4, seed=1), random(6, 3, seed=2)
    scale = random(6, 1, seed=3).abs() + 0.1
    changed = cosine_difference_loss(scale * (x @ rotation(4, 5)), y)
    assert float(changed) == pytest.approx(float(cosine_difference_loss(x, y)), abs=1e-9)


def test_cosine_agrees_with_numpy() -> None:
    x, y = random(5, 3, seed=1).numpy(), random(5, 3, seed=2).numpy()
    expected = np.mean([1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(x, y, strict=True)])
    assert float(cosine_loss(torch.from_numpy(x), torch.from_numpy(y))) == pytest.approx(expected, rel=1e-9)


def test_effective_rank_counts_directions() -> None:
    basis = torch.linalg.qr(random(40, 8, seed=1) - random(40, 8, seed=1).mean(0))[0]
    assert float(effective_rank(basis[:, :5] @ rotation(5, 2))) == pytest.approx(5, abs=0.05)
    assert float(effective_rank(basis[:, :1] @ torch.ones(1, 6, dtype=torch.float64))) == pytest.approx(1, abs=1e-6)
    assert float(effective_rank(torch.ones(4, 3))) == 0


def test_modules_weigh_the_pure_functions_and_leave_the_teacher_alone() -> None:
    student, teacher = random(8, 6, seed=1).requires_grad_(), random(8, 8, seed=2).requires_grad_()
    labels = torch.zeros(8, dtype=torch.int64)
    outputs = StudentOutput(student, student[:, :3]), TeacherOutput(teacher, None), batch(labels)
    dcor = DistanceCorrelation(DistanceCorrelationSection(weight=2.0, biased=True), shapes())(*outputs)
    cosine = CosineDifference(CosineDifferenceSection(weight=3.0), shapes())(*outputs)
    assert float(dcor["distance_correlation"]) == pytest.approx(
        2 * float(distance_correlation_loss(student, teacher, biased=True))
    )
    assert float(cosine["cosine_difference"]) == pytest.approx(3 * float(cosine_difference_loss(student, teacher)))
    (dcor["distance_correlation"] + cosine["cosine_difference"]).backward()
    assert teacher.grad is None
    assert student.grad is not None
