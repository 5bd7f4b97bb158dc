from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from torch import Tensor, nn

from distill import training
from distill.data.dataset import Dataset, InputSpec, Split
from distill.objectives.base import FitData
from distill.objectives.compose import Composition, build_objective, head_size
from distill.objectives.embedding_compression import EmbeddingCompression
from distill.objectives.kd import kd_loss
from distill.objectives.lelp import (
    LELP,
    fit_probe,
    fit_subclasses,
    lelp_terms,
    random_rotation,
    recover_head,
    removed_directions,
)
from distill.objectives.section import LELPSection, ObjectiveSections
from distill.objectives.split_head import class_logits_of, log_sum_exp
from distill.outputs import Batch, StudentOutput, TeacherOutput
from distill.students import load_student, save_student
from export.onnx import export_graph
from export.parity import open_session, run_session, run_torch
from profiles.errors import InputError, Interrupted
from tests.distill.objective_cases import batch, random, shapes
from tests.distill.test_training import Reads
from tests.distill.training_cases import Case, StopAfter, dataset, same_weights

S = 4
CLASS, SUBCLASS = "lelp/class", "lelp/subclass"
READ = TypeAdapter(ObjectiveSections).validate_python


def softmax(z: np.ndarray, axis: int = -1) -> np.ndarray:
    e = np.exp(z - z.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def joint(logits: np.ndarray, coordinates: np.ndarray, tau: float, beta: float) -> np.ndarray:
    """p_{c,s} (N, C, S), sample by sample and class by class."""
    p = np.empty_like(coordinates)
    for i, c in np.ndindex(*coordinates.shape[:2]):
        p[i, c] = softmax(logits[i] / tau)[c] * softmax(beta * coordinates[i, c])
    return p


def perfect_head(logits: Tensor, coordinates: Tensor, tau: float, beta: float) -> Tensor:
    """o with softmax(o / tau) = p."""
    return tau * torch.from_numpy(np.log(joint(logits.numpy(), coordinates.numpy(), tau, beta))).flatten(1)


# -- a teacher --------------------------------------------------------------------------------------------------------

LABELS = torch.arange(90) % 3


def teacher(rows: int = 90, size: int = 8, classes: int = 3, dtype: torch.dtype = torch.float64) -> SimpleNamespace:
    """Embeddings around their class's mean with other variances along other directions, and a linear head."""
    labels = torch.arange(rows) % classes
    spread = torch.linspace(2, 0.3, size, dtype=torch.float64)
    embedding = random(classes, size, seed=1)[labels] * 2 + random(rows, size, seed=2) * spread + 1
    weight, bias = random(classes, size, seed=3), random(classes, seed=4)
    logits = embedding @ weight.T + bias
    return SimpleNamespace(
        labels=labels,
        **{k: v.to(dtype) for k, v in {"e": embedding, "w": weight, "b": bias, "z": logits}.items()},
    )


def data(t: SimpleNamespace, seed: int = 0, head: bool = True, logits: bool = True) -> FitData:
    return FitData(
        t.e[None],
        t.z[None] if logits else None,
        t.labels,
        None,
        seed,
        torch.device("cpu"),
        t.w if head else None,
        t.b if head else None,
    )


def lelp(t: SimpleNamespace, changes: dict[str, Any] | None = None, seed: int = 0, **section: Any) -> LELP:
    """Fitted, float64."""
    objective = fresh(t, changes, **section)
    given = {"head": (changes or {}).get("teacher_logits", 3) is not None}
    objective.prepare(data(t, seed, logits=given["head"], head=given["head"]))
    return objective


def fresh(t: SimpleNamespace, changes: dict[str, Any] | None = None, **section: Any) -> LELP:
    sizes = {"classes": t.w.shape[0], "teacher_logits": t.z.shape[1], "teacher_dim": t.e.shape[1]}
    return LELP(LELPSection(**{"subclasses_per_class": S, **section}), shapes(**{**sizes, **(changes or {})})).double()


def fit(e: Tensor, labels: Tensor, removed: Tensor | None = None, **options: Any) -> Any:
    removed = torch.zeros(1, e.shape[1], dtype=torch.float64) if removed is None else removed
    return fit_subclasses(e, labels, removed, **{"classes": 3, "subclasses": S, "seed": 0, **options})


# -- the loss ---------------------------------------------------------------------------------------------------------


def example(classes: int = 3, subclasses: int = S) -> tuple[Tensor, Tensor, Tensor]:
    return (
        random(6, classes * subclasses, seed=5),
        random(6, classes, seed=6) * 2,
        random(6, classes, subclasses, seed=7),
    )


@pytest.mark.parametrize(("tau", "beta"), [(1.0, 1.0), (2.0, 0.5), (4.0, 3.0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_parts_agree_with_numpy_and_add_up_to_the_joint_divergence(
    tau: float, beta: float, dtype: torch.dtype
) -> None:
    head, z, a = example()
    p = joint(z.numpy(), a.numpy(), tau, beta)
    q = softmax(head.numpy() / tau).reshape(6, 3, S)
    p_class, q_class = p.sum(2), q.sum(2)
    expected_class = tau**2 * (p_class * np.log(p_class / q_class)).sum(1).mean()
    within = (p * np.log(p / p_class[..., None] / (q / q_class[..., None]))).sum((1, 2))
    found = lelp_terms(head.to(dtype), z.to(dtype), a.to(dtype), tau=tau, beta=beta)
    assert float(found[0]) == pytest.approx(expected_class, rel=1e-5)
    assert float(found[1]) == pytest.approx(tau**2 * within.mean(), rel=1e-5)
    whole = tau**2 * (p * np.log(p / q)).sum((1, 2)).mean()
    assert float(found[0] + found[1]) == pytest.approx(whole, rel=1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_a_student_at_the_target_has_no_loss_and_keeps_the_teachers_class_probabilities(tau: float) -> None:
    _, z, a = example()
    head = perfect_head(z, a, tau, 1.5)
    parts = lelp_terms(head, z, a, tau=tau, beta=1.5)
    assert max(abs(float(part)) for part in parts) < 1e-12
    torch.testing.assert_close((head / tau).softmax(1).view(6, 3, S).sum(2), (z / tau).softmax(1))


def test_targets_that_change_the_class_probabilities_are_not_ours() -> None:
    _, z, a = example()
    tau, beta = 2.0, 1.5
    classes = (z / tau).softmax(1)
    added = (z.unsqueeze(2) / tau + beta * a).flatten(1)
    tempered = perfect_head(z, a, 1.0, beta) / tau
    for wrong in (added, tempered):
        assert (wrong.softmax(1).view(6, 3, S).sum(2) - classes).abs().max() > 0.01
        parts = lelp_terms(tau * wrong, z, a, tau=tau, beta=beta)
        assert float(parts[0]) > 1e-3


def test_one_subclass_is_knowledge_distillation() -> None:
    head, z, a = example(subclasses=1)
    parts = lelp_terms(head, z, a, tau=3.0, beta=2.0)
    assert float(parts[0]) == pytest.approx(float(kd_loss(head, z, 3.0)), rel=1e-12)
    assert float(parts[1]) == 0
    t = teacher()
    objective = lelp(t, subclasses_per_class=1, tau=3.0)
    out = random(90, 3, seed=9)
    terms = objective(StudentOutput(out, out), TeacherOutput(t.e, t.z), batch(t.labels))
    assert float(terms[CLASS]) == pytest.approx(float(kd_loss(out, t.z, 3.0)), rel=1e-12)
    assert objective.class_logits(out) is out
    assert LELP.head_size(LELPSection(subclasses_per_class=1), 3) == 3
    assert "lelp/teacher_subclass_entropy" not in objective.logs()


def test_the_class_part_is_knowledge_distillation_on_the_class_logits() -> None:
    head, z, a = example()
    parts = lelp_terms(head, z, a, tau=2.0, beta=1.0)
    assert float(parts[0]) == pytest.approx(float(kd_loss(class_logits_of(head, S, 2.0), z, 2.0)), rel=1e-12)


def test_permuting_the_subclasses_of_a_class_leaves_its_class_outputs() -> None:
    head, z, a = example()
    order = torch.tensor([2, 0, 3, 1])
    moved = head.view(6, 3, S)[:, :, order].flatten(1)
    torch.testing.assert_close(class_logits_of(moved, S, 2.0), class_logits_of(head, S, 2.0))
    before, after = lelp_terms(head, z, a, tau=2.0, beta=1.0), lelp_terms(moved, z, a, tau=2.0, beta=1.0)
    assert float(after[0]) == pytest.approx(float(before[0]), rel=1e-12)
    assert float(after[1]) != pytest.approx(float(before[1]), rel=1e-3)


@pytest.mark.parametrize("tau", [2.0, 4.0])
def test_class_logits_without_the_temperature_flip_labels_of_a_perfect_student(tau: float) -> None:
    z, a = random(2000, 3, seed=1), 2 * random(2000, 3, 8, seed=2)
    head = perfect_head(z, a, tau, 1.0)
    assert torch.equal(class_logits_of(head, 8, tau).argmax(1), z.argmax(1))
    flipped = (class_logits_of(head, 8, 1.0).argmax(1) != z.argmax(1)).double().mean()
    assert float(flipped) > 0.01


def test_log_sum_exp_neither_overflows_nor_loses_its_gradient() -> None:
    x = torch.tensor([[200.0, 199.0], [-300.0, -300.0], [0.0, -1e4]], requires_grad=True)
    value = log_sum_exp(x)
    torch.testing.assert_close(value, torch.logsumexp(x, 1))
    value.sum().backward()
    torch.testing.assert_close(x.grad, x.softmax(1))
    assert torch.isfinite(log_sum_exp(torch.full((1, 4), 60.0, dtype=torch.float16))).all()


def test_gradients_agree_with_finite_differences() -> None:
    head, z, a = example()
    for part in (0, 1):
        assert torch.autograd.gradcheck(
            lambda o, part=part: lelp_terms(o, z, a, tau=2.0, beta=1.5)[part], (head.clone().requires_grad_(),)
        )
    assert torch.autograd.gradcheck(lambda o: class_logits_of(o, S, 2.0), (head.clone().requires_grad_(),))


@pytest.mark.parametrize("size", [(1, 3, S), (5, 1, S), (5, 3, 1), (1, 1, 1)])
def test_one_sample_one_class_and_identical_rows_are_finite(size: tuple[int, int, int]) -> None:
    rows, classes, subclasses = size
    for values in (random(rows, classes * subclasses, seed=3), torch.ones(rows, classes * subclasses)):
        head = values.clone().requires_grad_()
        z, a = torch.ones(rows, classes), torch.zeros(rows, classes, subclasses)
        sum(lelp_terms(head, z, a, tau=2.0, beta=1.0)).backward()
        assert torch.isfinite(head.grad).all()


def test_certain_teachers_and_far_coordinates_are_finite() -> None:
    head = random(4, 12, seed=3, dtype=torch.float32).requires_grad_()
    z, a = torch.eye(3)[[0, 1, 2, 0]] * 500, random(4, 3, S, seed=4, dtype=torch.float32) * 1e4
    total = sum(lelp_terms(head, z, a, tau=1.0, beta=1.0))
    total.backward()
    assert torch.isfinite(total)
    assert torch.isfinite(head.grad).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    head, z, a = (x.to(dtype) * 10 for x in example())
    found = lelp_terms(head, z, a, tau=1.0, beta=1.0)
    expected = lelp_terms(head.double(), z.double(), a.double(), tau=1.0, beta=1.0)
    for ours, exact in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        assert float(ours) == pytest.approx(float(exact), rel=1e-4)


def test_half_precision_embeddings_of_a_whole_objective() -> None:
    t = teacher(dtype=torch.float32)
    objective = fresh(t).float()
    objective.prepare(data(replace_values(t, e=t.e.half(), z=t.z.half())))
    out = random(90, 3 * S, seed=9, dtype=torch.float32)
    exact = objective(StudentOutput(out, out), TeacherOutput(t.e.half().float(), t.z), batch(t.labels))
    half = objective(StudentOutput(out, out.half()), TeacherOutput(t.e.half(), t.z.half()), batch(t.labels))
    for name, term in half.items():
        assert term.dtype == torch.float32
        assert float(term) == pytest.approx(float(exact[name]), rel=5e-3)


def replace_values(t: SimpleNamespace, **values: Any) -> SimpleNamespace:
    return SimpleNamespace(**{**vars(t), **values})


def test_gradients_reach_only_the_student() -> None:
    t = teacher()
    objective = lelp(t)
    s, o = random(90, 6, seed=8).requires_grad_(), random(90, 3 * S, seed=9).requires_grad_()
    e, z = t.e.clone().requires_grad_(), t.z.clone().requires_grad_()
    sum(objective(StudentOutput(s, o), TeacherOutput(e, z), batch(t.labels)).values()).backward()
    assert o.grad.any()
    assert s.grad is None
    assert e.grad is None
    assert z.grad is None
    assert not list(objective.parameters())
    assert all(not value.requires_grad for value in objective.buffers())


def test_terms_carry_the_weight() -> None:
    t = teacher()
    out = StudentOutput(t.e, random(90, 3 * S, seed=9))
    plain, heavy = (lelp(t, weight=w)(out, TeacherOutput(t.e, t.z), batch(t.labels)) for w in (1.0, 2.5))
    assert set(plain) == {CLASS, SUBCLASS}
    for name in plain:
        assert float(heavy[name]) == pytest.approx(2.5 * float(plain[name]))


# -- the fit ----------------------------------------------------------------------------------------------------------


def oracle(t: SimpleNamespace, weight: np.ndarray | None, subclasses: int = S) -> dict[str, np.ndarray]:
    """Mean, unrotated directions and scale of every class by pseudo-inverse and singular vectors."""
    e, labels = t.e.numpy(), t.labels.numpy()
    size = e.shape[1]
    p = np.eye(size)
    if weight is not None:
        a = weight - weight.mean(0)
        p -= np.linalg.pinv(a) @ a
    x = e @ p.T
    mean, directions, scale = [], [], []
    for c in range(labels.max() + 1):
        own = x[labels == c]
        mean.append(own.mean(0))
        v = np.linalg.svd(own - own.mean(0))[2][:subclasses]
        directions.append(v)
        scale.append(np.sqrt((((own - own.mean(0)) @ v.T) ** 2).mean()))
    return {"p": p, "mean": np.array(mean), "directions": np.array(directions), "scale": np.array(scale)}


@pytest.mark.parametrize("null_space", [True, False])
@pytest.mark.parametrize("rows", [90, 18])
def test_the_fit_agrees_with_numpy(null_space: bool, rows: int) -> None:
    """With 18 samples, 6 per class, fewer than the 8 dimensions: the other way to the principal directions."""
    t = teacher(rows)
    objective = lelp(t, rotation=False, null_space=null_space)
    expected = oracle(t, t.w.numpy() if null_space else None)
    np.testing.assert_allclose(objective.null_space.numpy(), expected["p"], atol=1e-10)
    np.testing.assert_allclose(objective.mean.numpy(), expected["mean"], atol=1e-10)
    np.testing.assert_allclose(objective.scale.numpy(), expected["scale"], rtol=1e-9)
    cosines = (objective.directions.numpy() * expected["directions"]).sum(2)
    np.testing.assert_allclose(np.abs(cosines), 1, atol=1e-9)


def test_the_targets_agree_with_numpy() -> None:
    t = teacher()
    objective = lelp(t)
    expected = oracle(t, t.w.numpy())
    z, a = objective.targets(TeacherOutput(t.e, t.z), torch.arange(90))
    assert torch.equal(z, t.z)
    v = objective.directions.numpy()
    for c in range(3):
        x = t.e.numpy() @ expected["p"].T - expected["mean"][c]
        np.testing.assert_allclose(a[:, c].numpy(), x @ v[c].T / expected["scale"][c], atol=1e-9)


def test_a_class_seen_from_its_own_samples_has_coordinates_of_unit_size() -> None:
    t = teacher()
    for section in ({}, {"projection": "random"}, {"rotation": False}, {"null_space": False}):
        _, a = lelp(t, **section).targets(TeacherOutput(t.e, t.z), torch.arange(90))
        for c in range(3):
            assert float(a[t.labels == c, c].square().mean()) == pytest.approx(1, rel=1e-9)
            assert a[t.labels == c, c].mean(0).abs().max() < 1e-9


def test_what_the_head_reads_is_removed() -> None:
    t = teacher()
    objective = lelp(t)
    p = objective.null_space
    assert torch.linalg.matrix_rank(p) == 6
    assert ((t.w - t.w.mean(0)) @ p).abs().max() < 1e-12
    torch.testing.assert_close(p @ p, p)
    wp = t.w @ p
    assert (wp - wp[0]).abs().max() < 1e-12
    probabilities = (t.e @ p @ t.w.T + t.b).softmax(1)
    assert (probabilities - probabilities[0]).abs().max() < 1e-12
    # the directions lie in the null space, so that e and P e have the same coordinates
    torch.testing.assert_close(objective.directions @ p, objective.directions)
    here = objective.targets(TeacherOutput(t.e, t.z), torch.arange(90))[1]
    torch.testing.assert_close(objective.targets(TeacherOutput(t.e @ p, t.z), torch.arange(90))[1], here)
    # so a step along the head's own directions moves no subclass
    along = t.e + 5 * random(90, 3, seed=11) @ (t.w - t.w.mean(0))
    torch.testing.assert_close(objective.targets(TeacherOutput(along, t.z), torch.arange(90))[1], here)


def test_without_the_null_space_nothing_is_removed() -> None:
    t = teacher()
    objective = lelp(t, null_space=False)
    assert torch.equal(objective.null_space, torch.eye(8, dtype=torch.float64))
    assert not torch.allclose(objective.directions, lelp(t).directions)


def test_the_rotation_keeps_the_span_and_evens_out_the_variances() -> None:
    t = teacher(900)
    plain, rotated = lelp(t, rotation=False), lelp(t)
    torch.testing.assert_close(plain.scale, rotated.scale)
    spread = []
    for objective in (plain, rotated):
        v = objective.directions
        torch.testing.assert_close(v @ v.transpose(1, 2), torch.eye(S, dtype=torch.float64).expand(3, S, S))
        _, a = objective.targets(TeacherOutput(t.e, t.z), torch.arange(900))
        variances = torch.stack([a[t.labels == c, c].var(0) for c in range(3)])
        spread.append(float(variances.log().std(1).mean()))
    torch.testing.assert_close(
        plain.directions.transpose(1, 2) @ plain.directions, rotated.directions.transpose(1, 2) @ rotated.directions
    )
    assert spread[1] < 0.7 * spread[0]


def test_rotations_are_orthogonal_and_uniform() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([random_rotation(3, generator) for _ in range(3000)])
    torch.testing.assert_close(drawn @ drawn.transpose(1, 2), torch.eye(3, dtype=torch.float64).expand(3000, 3, 3))
    # of a uniform rotation every entry has mean 0 and variance 1/3; without the sign fix the diagonal has not
    assert drawn.mean(0).abs().max() < 0.05
    assert (drawn.square().mean(0) - 1 / 3).abs().max() < 0.03


def test_random_directions_are_orthonormal_and_in_the_null_space() -> None:
    t = teacher()
    objective = lelp(t, projection="random")
    v = objective.directions
    torch.testing.assert_close(v @ v.transpose(1, 2), torch.eye(S, dtype=torch.float64).expand(3, S, S))
    torch.testing.assert_close(v @ objective.null_space, v)
    assert not torch.allclose(v, lelp(t, projection="random", seed=1).directions)
    assert not torch.allclose(v[0], v[1])
    # nothing is left to draw when S is all there is
    lelp(t, projection="random", subclasses_per_class=6)
    with pytest.raises(InputError, match="7 subclasses") as error:
        lelp(t, projection="random", subclasses_per_class=7)
    assert error.value.fix == "subclasses_per_class = 6 or fewer"


def test_the_fit_is_a_function_of_the_seed() -> None:
    t = teacher()
    for section in ({}, {"projection": "random"}, {"subclasses": "random"}):
        first, same, other = (
            lelp(t, seed=seed, **section).targets(TeacherOutput(t.e, t.z), torch.arange(90))[1] for seed in (3, 3, 4)
        )
        assert torch.equal(first, same)
        assert not torch.allclose(first, other)


def test_the_fit_leaves_embeddings_and_global_generators_alone() -> None:
    t = teacher()
    kept = t.e.clone()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    lelp(t)
    lelp(t, subclasses="random")
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(t.e, kept)


def test_a_large_constant_in_the_embeddings_costs_no_digits() -> None:
    t = teacher(300, size=512, dtype=torch.float32)
    moved = replace_values(t, e=t.e + 300)
    exact = lelp(replace_values(moved, **{k: getattr(moved, k).double() for k in "ewbz"}), projection="random")
    objective = fresh(moved, projection="random").float()
    objective.prepare(data(moved))
    found = objective.targets(TeacherOutput(moved.e, moved.z), torch.arange(300))[1]
    expected = exact.targets(TeacherOutput(moved.e.double(), moved.z.double()), torch.arange(300))[1]
    assert (found - expected).abs().max() < 1e-4


# -- small and empty classes, too few directions ----------------------------------------------------------------------


def test_a_small_class_keeps_its_own_directions_and_borrows_the_rest() -> None:
    e = random(43, 8, seed=1) * torch.linspace(3, 0.1, 8, dtype=torch.float64)
    labels = torch.cat([torch.zeros(20), torch.ones(20), torch.full((3,), 2)]).long()
    found = fit(e, labels, rotation=False)
    v = found.directions[2]
    torch.testing.assert_close(v @ v.T, torch.eye(S, dtype=torch.float64))
    own = e[40:] - e[40:].mean(0)
    # three samples span two directions: the first two
    torch.testing.assert_close(own @ v[:2].T @ v[:2], own)
    residuals = e - torch.stack([e[labels == c].mean(0) for c in range(3)])[labels]
    rest = residuals - residuals @ v[:2].T @ v[:2]
    expected = np.linalg.svd(rest.numpy())[2][:2]
    np.testing.assert_allclose(np.abs((v[2:].numpy() * expected).sum(1)), 1, atol=1e-9)
    assert float(found.scale[2]) == pytest.approx(float(((own @ v.T) ** 2).mean().sqrt()), rel=1e-9)


def test_an_empty_class_gets_what_is_pooled() -> None:
    e = random(40, 8, seed=1) * torch.linspace(3, 0.1, 8, dtype=torch.float64)
    labels = torch.arange(40) % 2 * 2
    found = fit(e, labels, rotation=False)
    torch.testing.assert_close(found.mean[1], e.mean(0))
    residuals = e - torch.stack([e[labels == c].mean(0) if c != 1 else e[0] for c in range(3)])[labels]
    expected = np.linalg.svd(residuals.numpy())[2][:S]
    np.testing.assert_allclose(np.abs((found.directions[1].numpy() * expected).sum(1)), 1, atol=1e-9)
    assert float(found.scale[1]) == pytest.approx(np.sqrt(((residuals.numpy() @ expected.T) ** 2).mean()), rel=1e-9)


def test_a_class_of_one_sample_or_of_equal_ones_has_the_smallest_scale() -> None:
    e = random(44, 8, seed=1)
    e[41:] = e[41]
    labels = torch.cat([torch.zeros(40), torch.ones(1), torch.full((3,), 2)]).long()
    found = fit(e, labels)
    own = (e[:40] - e[:40].mean(0)) @ found.directions[0].T
    pooled = float((own.square().sum() / (44 * S)).sqrt())
    assert float(found.scale[1]) == pytest.approx(1e-3 * pooled, rel=1e-9)
    assert float(found.scale[2]) == pytest.approx(1e-3 * pooled, rel=1e-9)
    assert torch.isfinite(found.directions).all()


@pytest.mark.parametrize("projection", ["pca", "random"])
def test_small_and_empty_classes_train_with_finite_losses(projection: str) -> None:
    t = teacher()
    labels = torch.zeros(90, dtype=torch.int64)
    labels[:2] = 1
    objective = lelp(replace_values(t, labels=labels), projection=projection)
    out = random(90, 3 * S, seed=9).requires_grad_()
    terms = objective(StudentOutput(out, out), TeacherOutput(t.e, t.z), batch(labels))
    sum(terms.values()).backward()
    assert all(torch.isfinite(term) for term in terms.values())
    assert torch.isfinite(out.grad).all()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    counts=st.lists(st.integers(0, 7), min_size=1, max_size=4).filter(lambda c: sum(c) > 0),
    size=st.integers(1, 9),
    head=st.booleans(),
    subclasses=st.integers(1, 8),
    shift=st.sampled_from([0.0, 1e3]),
)
def test_every_size_is_fitted_or_refused_with_the_size_that_fits(
    counts: list[int], size: int, head: bool, subclasses: int, shift: float
) -> None:
    classes = len(counts)
    labels = torch.repeat_interleave(torch.arange(classes), torch.tensor(counts))
    e = random(len(labels), size, seed=1) + shift
    removed = removed_directions(random(classes, size, seed=2)) if head else torch.zeros(1, size).double()
    left = size - min(classes - 1, size) * head
    limit = min(sum(max(0, n - 1) for n in counts), left)

    def attempt(s: int) -> Any:
        return fit(e, labels, removed, classes=classes, subclasses=s)

    if subclasses > limit:
        with pytest.raises(InputError) as error:
            attempt(subclasses)
        assert error.value.where == "subclasses_per_class"
        if limit:
            assert error.value.fix == f"subclasses_per_class = {limit} or fewer"
            attempt(limit)
    else:
        found = attempt(subclasses)
        products = found.directions @ found.directions.transpose(1, 2)
        torch.testing.assert_close(products, torch.eye(subclasses).double().expand_as(products), atol=1e-6, rtol=0)
        assert (found.directions @ removed.T).abs().max() < 1e-6
        assert (found.scale > 0).all()


def test_too_many_subclasses_name_the_recipe_key_and_what_would_do() -> None:
    t = teacher()
    with pytest.raises(InputError) as error:
        lelp(t, {"position": 2}, subclasses_per_class=7)
    assert error.value.where == "objective[2].subclasses_per_class"
    assert error.value.evidence is not None
    assert "90 training samples vary in 6 of 8 directions" in error.value.evidence
    assert error.value.fix == "subclasses_per_class = 6 or fewer"
    lelp(t, subclasses_per_class=6)
    lelp(t, subclasses_per_class=8, null_space=False)


@pytest.mark.parametrize("projection", ["pca", "random"])
def test_embeddings_without_variation_are_refused(projection: str) -> None:
    t = teacher()
    constant = replace_values(t, e=random(3, 8, seed=1)[t.labels] + 1e4)
    with pytest.raises(InputError) as error:
        lelp(constant, projection=projection)
    assert error.value.fix is not None
    assert "null_space = false" in error.value.fix


def test_a_head_that_reads_every_direction_leaves_none() -> None:
    t = teacher(size=2)
    with pytest.raises(InputError, match="more than the embedding"):
        lelp(t, subclasses_per_class=1)
    lelp(t, subclasses_per_class=2, null_space=False)


# -- where W and the logits come from ---------------------------------------------------------------------------------


def test_a_single_logit_beside_zero_is_what_two_logits_are() -> None:
    t = teacher(classes=2)
    one = single_logit(t)
    found, expected = lelp(one), lelp(t)
    assert found.head_source == "teacher"
    torch.testing.assert_close(found.null_space, expected.null_space)
    assert torch.linalg.matrix_rank(found.null_space) == 7
    out = random(90, 2 * S, seed=9)
    terms = found(StudentOutput(out, out), TeacherOutput(t.e, one.z), batch(t.labels))
    for name, term in expected(StudentOutput(out, out), TeacherOutput(t.e, t.z), batch(t.labels)).items():
        assert float(terms[name]) == pytest.approx(float(term), rel=1e-9)
    head = perfect_head(one.z, found.targets(TeacherOutput(t.e, one.z), torch.arange(90))[1], 1.0, 1.0)
    torch.testing.assert_close(found.class_logits(head).softmax(1)[:, 1], torch.sigmoid(one.z[:, 1]))


def single_logit(t: SimpleNamespace) -> SimpleNamespace:
    """The two-class teacher as one logit z gives it: [0, z]."""
    return replace_values(t, w=t.w - t.w[:1], z=t.z - t.z[:, :1], b=t.b - t.b[:1])


def test_the_probe_is_the_optimum_of_its_convex_problem() -> None:
    t = teacher(rows=60, size=5)
    weight, bias = fit_probe(t.e, t.labels, classes=3, device=torch.device("cpu"))
    x = (t.e.numpy() - t.e.numpy().mean(0)) / t.e.numpy().std(0)
    y = np.eye(3)[t.labels]

    def loss(parameters: np.ndarray) -> float:
        w, b = parameters[:15].reshape(3, 5), parameters[15:]
        return float(-(y * np.log(softmax(x @ w.T + b))).sum(1).mean() + 5e-4 * (w**2).sum())

    best = scipy.optimize.minimize(loss, np.zeros(18), method="BFGS", options={"gtol": 1e-7})
    expected = softmax(x @ best.x[:15].reshape(3, 5).T + best.x[15:])
    found = softmax((t.e @ weight.T + bias).numpy())
    np.testing.assert_allclose(found, expected, atol=1e-4)
    again = fit_probe(t.e, t.labels, classes=3, device=torch.device("cpu"))
    assert torch.equal(again[0], weight)


def test_the_probe_survives_constant_columns_large_shifts_and_empty_classes() -> None:
    t = teacher(rows=60, size=5)
    e = torch.cat([t.e * 100 + 1e4, torch.full((60, 1), 7.0)], 1)
    weight, bias = fit_probe(e, t.labels, classes=4, device=torch.device("cpu"))
    plain = fit_probe(t.e, t.labels, classes=4, device=torch.device("cpu"))
    assert not weight[:, 5].any()
    torch.testing.assert_close(
        (e @ weight.T + bias).softmax(1), (t.e @ plain[0].T + plain[1]).softmax(1), atol=1e-4, rtol=0
    )
    assert (e @ weight.T + bias).softmax(1)[:, 3].max() < 0.05


def test_a_teacher_of_another_task_is_read_through_a_probe() -> None:
    t = teacher()
    other = replace_values(t, z=random(90, 10, seed=4), w=random(10, 8, seed=5), b=random(10, seed=6))
    objective = fresh(t, {"teacher_logits": 10})
    objective.prepare(data(other))
    assert objective.head_source == "probe"
    assert objective.logs()["lelp/probe"] == 1
    weight, bias = fit_probe(t.e, t.labels, classes=3, device=torch.device("cpu"))
    z, _ = objective.targets(TeacherOutput(t.e, other.z), torch.arange(90))
    torch.testing.assert_close(z, t.e @ weight.T + bias)
    assert (weight - weight.mean(0)).mm(objective.null_space).abs().max() < 1e-10
    assert float((z.argmax(1) == t.labels).double().mean()) > 0.7


def test_a_teacher_without_logits_is_read_through_a_probe() -> None:
    objective = lelp(teacher(), {"teacher_logits": None})
    assert objective.head_source == "probe"
    z, _ = objective.targets(TeacherOutput(teacher().e, None), torch.arange(90))
    assert z.shape == (90, 3)


def bent(t: SimpleNamespace) -> SimpleNamespace:
    """A teacher whose logits are no linear map of its embedding."""
    return replace_values(t, z=3 * torch.tanh(t.z) + t.e.square().mean(1, keepdim=True) * t.w[:, 0])


def recover(e: Tensor, z: Tensor) -> Tensor | None:
    return recover_head(e, z, device=torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_a_linear_head_is_read_off_logits_and_embeddings(dtype: torch.dtype) -> None:
    t = teacher(900)
    stored = replace_values(t, e=t.e.to(dtype), z=t.z.to(dtype))
    objective = fresh(t)
    objective.prepare(data(stored, head=False))
    assert objective.head_source == "recovered"
    assert objective.logs()["lelp/recovered"] == 1
    assert objective.logs()["lelp/probe"] == 0
    assert not objective.probe_weight.any()
    # what the real head reads is gone: its probabilities are those of the mean for every embedding
    p = objective.null_space
    probabilities = (t.e @ p @ t.w.T + t.b).softmax(1)
    assert (probabilities - probabilities[0]).abs().max() < (1e-4 if dtype == torch.float64 else 5e-3)
    exact = lelp(t)
    assert exact.logs()["lelp/recovered"] == 0
    torch.testing.assert_close(p, exact.null_space, atol=1e-4 if dtype == torch.float64 else 1e-3, rtol=0)
    assert torch.equal(objective.targets(TeacherOutput(t.e, t.z), torch.arange(900))[0], t.z)


def test_the_recovered_head_agrees_with_numpy() -> None:
    t = teacher()
    x = np.c_[t.e.numpy(), np.ones(90)]
    expected = np.linalg.lstsq(x, t.z.numpy(), rcond=None)[0][:-1].T
    found = recover(t.e, t.z)
    assert found is not None
    np.testing.assert_allclose(found.numpy(), expected - expected.mean(0), atol=1e-4)
    assert torch.equal(found, recover(t.e, t.z))


def leave_one_out(e: np.ndarray, z: np.ndarray) -> float:
    """The same error by fitting every sample's prediction on all the others, with an intercept."""
    z = z - z.mean(1, keepdims=True)
    ridge = 1e-6 * ((e - e.mean(0)) ** 2).sum() / e.shape[1]
    error = 0.0
    for i in range(len(e)):
        rest = np.arange(len(e)) != i
        x, y = e[rest] - e[rest].mean(0), z[rest] - z[rest].mean(0)
        w = np.linalg.solve(x.T @ x + ridge * np.eye(e.shape[1]), x.T @ y)
        error += float(((z[i] - z[rest].mean(0) - (e[i] - e[rest].mean(0)) @ w) ** 2).sum())
    return error / float(((z - z.mean(0)) ** 2).sum())


@pytest.mark.parametrize(("rows", "size"), [(60, 8), (30, 40)])
def test_a_head_is_linear_up_to_a_leave_one_out_error_of_a_hundredth(rows: int, size: int) -> None:
    """More samples than dimensions, and fewer: there a fit without held-out samples would explain anything."""
    spread = 0.5 ** torch.arange(size, dtype=torch.float64)
    e = random(rows, size, seed=1) * spread + 2
    z, noise = e @ random(3, size, seed=2).T, random(rows, 3, seed=3)
    share = leave_one_out(e.numpy(), (z + 0.05 * noise).numpy())
    for target, expected in ((0.009, True), (0.011, False)):
        noisy = z
        scale = 0.05 * (target / share) ** 0.5
        for _ in range(20):
            noisy = z + scale * noise
            scale *= (target / leave_one_out(e.numpy(), noisy.numpy())) ** 0.5
        assert (recover(e, noisy) is not None) == expected
    assert recover(e, noise) is None


def test_log_probabilities_are_as_good_as_logits_and_probabilities_are_not() -> None:
    t = teacher()
    plain = recover(t.e, t.z)
    assert plain is not None
    torch.testing.assert_close(recover(t.e, t.z.log_softmax(1)), plain)
    assert recover(t.e, t.z.softmax(1)) is None


@pytest.mark.parametrize("change", ["constant embedding", "constant logits", "one sample"])
def test_nothing_is_recovered_from_what_does_not_vary(change: str) -> None:
    t = teacher()
    e = t.e[:1].expand(90, 8) if change == "constant embedding" else t.e
    z = t.z[:1].expand(90, 3) if change == "constant logits" else t.z
    rows = 1 if change == "one sample" else 90
    assert recover(e[:rows], z[:rows]) is None


def test_a_constant_column_and_a_class_that_is_always_the_same_are_recovered() -> None:
    t = teacher()
    e, z = torch.cat([t.e, torch.full((90, 1), 1e3)], 1), t.z.clone()
    z[:, 1] = 0
    found = recover(e, z)
    assert found is not None
    assert found[:, 8].abs().max() < 1e-6
    w = t.w.clone()
    w[1] = 0
    torch.testing.assert_close(found[:, :8], w - w.mean(0), atol=1e-4, rtol=0)


def test_a_single_logit_without_a_known_head_is_recovered() -> None:
    t = teacher(classes=2)
    objective = fresh(t)
    objective.prepare(data(single_logit(t), head=False))
    assert objective.head_source == "recovered"
    torch.testing.assert_close(objective.null_space, lelp(t).null_space, atol=1e-4, rtol=0)


def test_logits_of_no_linear_head_are_matched_and_the_probe_gives_the_null_space() -> None:
    t = bent(teacher())
    objective = fresh(t)
    objective.prepare(data(t, head=False))
    assert objective.head_source == "probe"
    assert objective.logs()["lelp/probe"] == 1
    assert torch.equal(objective.targets(TeacherOutput(t.e, t.z), torch.arange(90))[0], t.z)
    weight, _ = fit_probe(t.e, t.labels, classes=3, device=torch.device("cpu"))
    assert (weight - weight.mean(0)).mm(objective.null_space).abs().max() < 1e-10


def test_without_the_null_space_no_head_is_needed() -> None:
    t = teacher()
    for section in ({"null_space": False}, {"subclasses": "random"}):
        objective = fresh(t, **section)
        objective.prepare(data(t, head=False))
        assert objective.head_source == "teacher"
        assert not objective.probe_weight.any()


def test_the_source_and_the_sharpness_of_the_targets_are_logged() -> None:
    t = teacher()
    logs = lelp(t).logs()
    assert logs["lelp/probe"] == 0
    assert 0 < logs["lelp/teacher_subclass_entropy"] < 1
    assert lelp(t, beta=0.0).logs()["lelp/teacher_subclass_entropy"] == pytest.approx(1)
    assert lelp(t, beta=3.0).logs()["lelp/teacher_subclass_entropy"] < logs["lelp/teacher_subclass_entropy"]


# -- random subclasses ------------------------------------------------------------------------------------------------


def test_random_subclasses_belong_to_the_sample_and_have_real_coordinates_size() -> None:
    t = teacher(3000)
    objective = lelp(t, subclasses="random")
    rows = torch.tensor([5, 17, 5])
    _, a = objective.targets(TeacherOutput(t.e[:3], t.z[:3]), rows)
    assert torch.equal(a[0], a[2])
    assert not torch.equal(a[0], a[1])
    _, everything = objective.targets(TeacherOutput(t.e, t.z), torch.arange(3000))
    assert torch.equal(everything[5], a[0].to(everything))
    assert float(everything.square().mean()) == pytest.approx(1, abs=0.03)
    assert float(everything.mean()) == pytest.approx(0, abs=0.03)
    out = random(3, 3 * S, seed=9)
    terms = objective(StudentOutput(out, out), TeacherOutput(t.e[:3], t.z[:3]), Batch(t.labels[:3], None, rows, 0, 0.0))
    assert float(terms[SUBCLASS]) > 0
    # more subclasses than directions: nothing is projected, so nothing runs out
    lelp(teacher(), subclasses="random", subclasses_per_class=20)


# -- keeping ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("section", [{}, {"subclasses": "random"}])
def test_the_fit_survives_a_save_and_a_load(section: dict[str, Any], tmp_path: Path) -> None:
    t = teacher(dtype=torch.float32)
    objective = fresh(t, **section).float()
    objective.prepare(data(t))
    save_student(objective, tmp_path / "objective.safetensors")
    again = fresh(t, **section).float()
    assert {k: v.shape for k, v in again.state_dict().items()} == {
        k: v.shape for k, v in objective.state_dict().items()
    }
    load_student(again, tmp_path / "objective.safetensors")
    # labels that would give another fit: it is not made again
    again.prepare(data(replace_values(t, labels=t.labels.flip(0))), fitted=True)
    assert same_weights(objective, again)
    out = random(90, 3 * S, seed=9, dtype=torch.float32)
    first, second = (o(StudentOutput(out, out), TeacherOutput(t.e, t.z), batch(t.labels)) for o in (objective, again))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert objective.logs() == again.logs()


@pytest.mark.parametrize("source", ["no logits", "probe", "recovered"])
def test_a_loaded_fit_still_knows_its_source(source: str) -> None:
    t = bent(teacher()) if source == "probe" else teacher()
    logits = source != "no logits"
    changes = {} if logits else {"teacher_logits": None}
    objective, again = fresh(t, changes), fresh(t, changes)
    objective.prepare(data(t, head=False, logits=logits))
    again.load_state_dict(objective.state_dict())
    again.prepare(data(t, head=False, logits=logits), fitted=True)
    assert objective.head_source == again.head_source == ("recovered" if source == "recovered" else "probe")
    assert again.logs() == objective.logs()


# -- compositions -----------------------------------------------------------------------------------------------------


def composed(sections: list[Any], t: SimpleNamespace, **options: Any) -> Composition:
    split = Split(np.zeros((len(t.labels), 1, 4, 4), np.uint8), t.labels.numpy())
    toy = Dataset("toy", "multiclass", ("a", "b", "c"), InputSpec("image", (1, 4, 4)), split, split, split, "key")
    cache = SimpleNamespace(
        key="cache",
        views=1,
        train_embedding=t.e[None].numpy(),
        train_logits=None if t.z is None else t.z[None].numpy(),
        head_weight=None,
        head_bias=None,
    )
    return build_objective(READ(sections), toy, cache, student_dim=5, hard_weight=0.3, **options)


COMPRESSED = [
    {"kind": "lelp", "on": "compressed", "subclasses_per_class": 2},
    {"kind": "ec", "schedule": "frozen", "fit_epochs": 3},
]


@pytest.mark.parametrize("logits", [True, False])
def test_compressed_works_on_the_frozen_transform(logits: bool) -> None:
    t = teacher(dtype=torch.float32)
    t = t if logits else replace_values(t, z=None)
    mix = composed(COMPRESSED, t)
    ours, ec = mix.objectives
    assert isinstance(ours, LELP)
    assert isinstance(ec, EmbeddingCompression)
    names = [name for name in mix.state_dict() if "objectives.0" in name]
    assert sorted(names) == [f"objectives.0.{name}" for name in ("directions", "mean", "removed", "scale")]
    assert len(list(mix.parameters())) == len({id(p) for p in mix.parameters()}) == 4
    fitting = FitData(t.e[None], t.z[None] if logits else None, t.labels, None, 0, torch.device("cpu"))
    mix.prepare(fitting)
    assert ours.head_source == "compressed"
    with torch.no_grad():
        c = ec.transform(t.e)
        z, a = ours.targets(TeacherOutput(t.e, t.z), torch.arange(90))
        torch.testing.assert_close(z, ec.head(c))
    # prepared after the transform, though it comes before it
    torch.testing.assert_close(
        torch.stack([a[t.labels == k, k].square().mean() for k in range(3)]), torch.ones(3), rtol=1e-4, atol=0
    )
    w = ec.head.weight.detach()
    assert ((w - w.mean(0)) @ ours.null_space).abs().max() < 1e-5
    out = random(90, 6, seed=9, dtype=torch.float32).requires_grad_()
    s = random(90, 5, seed=8, dtype=torch.float32).requires_grad_()
    terms = mix(StudentOutput(s, out), TeacherOutput(t.e, t.z), batch(t.labels))
    assert set(terms) == {CLASS, SUBCLASS, "embedding_compression/distance"}
    sum(terms.values()).backward()
    assert out.grad.any()
    assert all(p.grad is None for p in mix.parameters())


def test_other_objectives_read_the_class_logits_of_the_split_head() -> None:
    t = teacher(dtype=torch.float32)
    mix = composed([{"kind": "kd", "tau": 2.0}, {"kind": "lelp", "subclasses_per_class": S, "tau": 2.0}], t)
    mix.prepare(data(t))
    out = random(90, 3 * S, seed=9, dtype=torch.float32)
    terms = mix(StudentOutput(out, out), TeacherOutput(t.e, t.z), batch(t.labels))
    assert head_size(mix.sections, 3) == 3 * S
    assert float(terms["kd"]) == pytest.approx(0.7 * float(kd_loss(class_logits_of(out, S, 2.0), t.z, 2.0)))
    assert float(terms["kd"]) == pytest.approx(0.7 * float(terms[CLASS]), rel=1e-5)


# -- the exported graph -----------------------------------------------------------------------------------------------


class Exported(nn.Module):
    """What ships: a head and the composition's class logits."""

    def __init__(self, mix: Composition) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3 * S)
        self.mix = mix

    def forward(self, x: Tensor) -> Tensor:
        return self.mix.class_logits(self.head(x))


@pytest.mark.parametrize("opset", [13, 20])
@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_class_logits_are_part_of_the_exported_graph(tau: float, opset: int, tmp_path: Path) -> None:
    mix = composed([{"kind": "lelp", "subclasses_per_class": S, "tau": tau}], teacher())
    model = Exported(mix).eval()
    x = random(7, 6, seed=1, dtype=torch.float32) * 100
    export_graph(model, {"x": x[:2]}, tmp_path / "student.onnx", opset=opset)
    expected = run_torch(model, {"x": x.numpy()})
    o = (x @ model.head.weight.T + model.head.bias).detach().numpy().astype(np.float64).reshape(7, 3, S) / tau
    np.testing.assert_allclose(expected, tau * np.log(np.exp(o).sum(2)), rtol=1e-4, atol=1e-4)
    for size in (1, 2, 7):
        found = run_session(open_session(tmp_path / "student.onnx"), {"x": x.numpy()}, size)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    graph = onnx.load(str(tmp_path / "student.onnx")).graph
    assert not {"ReduceLogSumExp", "ReduceLogSum"} & {node.op_type for node in graph.node}
    # neither the subclasses' fit nor the teacher's head is shipped
    assert {tuple(tensor.dims) for tensor in graph.initializer} <= {
        (3 * S, 6),
        (6, 3 * S),
        (3 * S,),
        (),
        (1,),
        (2,),
        (3,),
    }


# -- training ---------------------------------------------------------------------------------------------------------


TRAINED: list[Any] = [
    [{"kind": "lelp", "subclasses_per_class": 3, "tau": 2.0}],
    [
        {"kind": "ec", "schedule": "frozen", "fit_epochs": 20, "dimension": 8},
        {"kind": "lelp", "subclasses_per_class": 3, "on": "compressed"},
    ],
]


@pytest.mark.parametrize("objective", TRAINED)
def test_a_student_learns(objective: Any, tmp_path: Path) -> None:
    case = Case(objective).with_(epochs=15, learning_rate=0.02, hard_weight=0.0 if len(objective) == 1 else 0.3)
    result, net, mix = case.run(tmp_path / "student")
    assert result.metric.value > 0.6
    first, last = result.history[0], result.history[-1]
    assert last[f"loss/{CLASS}"] < first[f"loss/{CLASS}"]
    assert last[f"loss/{SUBCLASS}"] > 0
    assert "lelp/teacher_subclass_entropy" in last
    assert training.evaluate_logits(net, mix, case.data.validation, device="cpu").shape == (48, 4)


@pytest.mark.parametrize("objective", [*TRAINED, [{"kind": "lelp", "subclasses": "random"}]])
def test_an_interrupted_training_ends_bit_for_bit_like_an_uninterrupted_one(objective: Any, tmp_path: Path) -> None:
    case = Case(objective).with_(hard_weight=0.2)
    whole, net, mix = case.run(tmp_path / "whole")
    with pytest.raises(Interrupted):
        case.run(tmp_path / "parts", progress=StopAfter(7))
    resumed, other, other_mix = case.run(tmp_path / "parts", progress=StopAfter(0))
    assert same_weights(net, other)
    assert same_weights(mix, other_mix)
    timing = {"samples_per_second"}
    assert [{k: v for k, v in r.items() if k not in timing} for r in resumed.history] == [
        {k: v for k, v in r.items() if k not in timing} for r in whole.history
    ]


@pytest.mark.parametrize("objective", [*TRAINED, [{"kind": "lelp", "subclasses": "random"}]])
def test_no_step_reads_a_value_back(objective: Any, tmp_path: Path, monkeypatch) -> None:
    found: list[str] = []
    step = training.Run._step

    def watched(self: Any, *rows: Tensor) -> None:
        with Reads() as reads:
            step(self, *rows)
        found.extend(reads.found)

    monkeypatch.setattr(training.Run, "_step", watched)
    Case(objective).with_(epochs=1, hard_weight=0.2).run(tmp_path / "student")
    assert found == []


def test_the_fit_reads_nothing_but_the_training_split(tmp_path: Path) -> None:
    data_set = dataset()
    held_out = replace(data_set.validation, inputs=255 - data_set.validation.inputs)
    moved = replace(data_set, validation=held_out, test=held_out)
    states = [
        Case(TRAINED[0], data=d).with_(epochs=1).run(tmp_path / name)[2] for d, name in ((data_set, "a"), (moved, "b"))
    ]
    assert same_weights(*states)


def test_too_many_subclasses_are_refused_before_the_student_trains(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(training.Run, "_step", lambda *_: pytest.fail("trained"))
    with pytest.raises(InputError, match="9 subclasses per class") as error:
        Case([{"kind": "lelp", "subclasses_per_class": 9}]).run(tmp_path / "student")
    assert error.value.where == "objective[0].subclasses_per_class"
    assert error.value.fix == "subclasses_per_class = 7 or fewer"
