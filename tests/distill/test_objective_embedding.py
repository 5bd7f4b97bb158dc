from pathlib import Path

import numpy as np
import pytest
import torch

from distill.objectives.compose import build_objective
from distill.objectives.embedding import Embedding
from distill.objectives.kd import KD, binary_kd_loss, kd_loss
from distill.objectives.section import EmbeddingSection, KDSection
from distill.outputs import StudentOutput, TeacherOutput
from profiles.errors import InputError
from tests.distill.objective_cases import batch, random, shapes
from tests.distill.training_cases import Cache, Case, cache, dataset

SOFT = "embedding/kd"
DISTANCE = "embedding/distance"
LABELS = torch.tensor([0, 1, 2, 0, 1])


def embedding(changes: dict[str, object] | None = None, **section: float) -> Embedding:
    torch.manual_seed(0)
    return Embedding(EmbeddingSection(**section), shapes(**(changes or {})))


def outputs(
    rows: int = 5, student_dim: int = 6, dtype: torch.dtype = torch.float32
) -> tuple[StudentOutput, TeacherOutput]:
    s = random(rows, student_dim, seed=1, dtype=dtype).requires_grad_()
    o = random(rows, 3, seed=2, dtype=dtype).requires_grad_()
    e = random(rows, 8, seed=3, dtype=dtype).requires_grad_()
    z = random(rows, 3, seed=4, dtype=dtype).requires_grad_()
    return StudentOutput(s, o), TeacherOutput(e, z)


def numpy_terms(
    objective: Embedding, student: StudentOutput, teacher: TeacherOutput, tau: float
) -> tuple[float, float]:
    """The soft targets as cross-entropy minus entropy, the distance by matrix products; float64."""
    s, o, e, z = (x.detach().double().numpy() for x in (*student, *teacher))
    p, q = (np.exp(x / tau) / np.exp(x / tau).sum(1, keepdims=True) for x in (z, o))
    soft = tau**2 * (-(p * np.log(q)).sum() + (p * np.log(p)).sum()) / len(p)
    state = {name: value.double().numpy() for name, value in objective.align.state_dict().items()}
    mapped = s @ state["weight"].T + state["bias"] if state else s
    return soft, float(np.trace((mapped - e) @ (mapped - e).T)) / e.size


@pytest.mark.parametrize("student_dim", [6, 8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_both_terms_agree_with_numpy(student_dim: int, dtype: torch.dtype) -> None:
    changes = {"student_dim": student_dim, "hard_weight": 0.25}
    objective = embedding(changes, weight=2.0, lam=0.7, tau=3.0).to(dtype)
    student, teacher = outputs(student_dim=student_dim, dtype=dtype)
    terms = objective(student, teacher, batch(LABELS))
    soft, distance = numpy_terms(objective, student, teacher, 3.0)
    assert float(terms[SOFT].detach()) == pytest.approx(2 * 0.75 * soft, rel=1e-5)
    assert float(terms[DISTANCE].detach()) == pytest.approx(2 * 0.7 * distance, rel=1e-5)


def test_without_the_distance_it_is_kd_exactly() -> None:
    student, teacher = outputs()
    terms = embedding(lam=0.0, tau=2.0, weight=0.5)(student, teacher, batch(LABELS))
    assert list(terms) == [SOFT]
    reference = KD(KDSection(tau=2.0, weight=0.5), shapes())(student, teacher, batch(LABELS))["kd"]
    assert torch.equal(terms[SOFT], reference)
    assert EmbeddingSection().default_hard_weight == KDSection().default_hard_weight


def test_a_weight_of_the_dimension_is_the_squared_norm() -> None:
    objective = embedding(lam=8.0)
    student, teacher = outputs()
    norm = (objective.align(student.embedding) - teacher.embedding).norm(dim=1).square().mean()
    assert float(objective(student, teacher, batch(LABELS))[DISTANCE].detach()) == pytest.approx(float(norm.detach()))


def test_several_labels_use_the_binary_soft_targets_and_no_label() -> None:
    objective = embedding({"task": "multilabel", "hard_weight": 0.0})
    student, teacher = outputs()
    assert teacher.logits is not None
    terms = objective(student, teacher, batch(torch.zeros(5, 3)))
    assert torch.equal(terms[SOFT], binary_kd_loss(student.head, teacher.logits, 4.0))
    unknown = objective(student, teacher, batch(torch.ones(5, 3), torch.zeros(5, 3, dtype=torch.bool)))
    assert all(torch.equal(terms[name], unknown[name]) for name in terms)


def test_a_map_is_learned_only_when_the_dimensions_differ() -> None:
    assert not list(embedding({"student_dim": 8}).parameters())
    objective = embedding()
    assert [tuple(p.shape) for p in objective.parameters()] == [(8, 6), (8,)]
    objective(*outputs(), batch(LABELS))[DISTANCE].backward()
    assert all(p.grad.any() for p in objective.parameters())


@pytest.mark.parametrize("student_dim", [6, 8])
def test_an_exact_match_is_exactly_zero_and_teaches_nothing(student_dim: int) -> None:
    objective = embedding({"student_dim": student_dim})
    student, _ = outputs(student_dim=student_dim)
    mapped = objective.align(student.embedding).detach()
    terms = objective(student, TeacherOutput(mapped, student.head.detach()), batch(LABELS))
    sum(terms.values()).backward()
    assert float(terms[DISTANCE].detach()) == 0
    assert float(terms[SOFT].detach()) == pytest.approx(0, abs=1e-6)
    assert not student.embedding.grad.any()
    assert student.head.grad.abs().max() < 1e-6


def test_the_order_of_the_samples_does_not_matter() -> None:
    objective = embedding().double()
    student, teacher = outputs(dtype=torch.float64)
    order = torch.tensor([3, 1, 0, 4, 2])
    shuffled = (StudentOutput(*(x[order] for x in student)), TeacherOutput(*(x[order] for x in teacher)))
    terms, same = objective(student, teacher, batch(LABELS)), objective(*shuffled, batch(LABELS[order]))
    assert all(float(terms[name].detach()) == pytest.approx(float(same[name].detach())) for name in terms)


def test_each_term_trains_its_own_side_and_never_the_teachers_embedding() -> None:
    objective = embedding()
    student, teacher = outputs()
    terms = objective(student, teacher, batch(LABELS))
    terms[SOFT].backward()
    assert student.embedding.grad is None
    assert student.head.grad.any()
    terms[DISTANCE].backward()
    assert student.embedding.grad.any()
    assert teacher.embedding.grad is None


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
@pytest.mark.parametrize("student_dim", [6, 8])
def test_gradient_agrees_with_finite_differences(task: str, student_dim: int) -> None:
    objective = embedding({"task": task, "student_dim": student_dim}).double()
    _, teacher = outputs(dtype=torch.float64)

    def total(s: torch.Tensor, o: torch.Tensor) -> torch.Tensor:
        return sum(objective(StudentOutput(s, o), teacher, batch(LABELS)).values())

    s, o = random(5, student_dim, seed=1).requires_grad_(), random(5, 3, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(total, (s, o))


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("classes", [1, 3])
def test_one_sample_one_class_and_identical_rows_are_finite(rows: int, classes: int) -> None:
    s, o = torch.ones(rows, 6).requires_grad_(), torch.ones(rows, classes).requires_grad_()
    teacher = TeacherOutput(torch.ones(rows, 8), torch.zeros(rows, classes))
    terms = embedding({"classes": classes})(StudentOutput(s, o), teacher, batch(LABELS[:rows]))
    sum(terms.values()).backward()
    assert all(torch.isfinite(term) for term in terms.values())
    assert torch.isfinite(s.grad).all()
    assert torch.isfinite(o.grad).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_half_precision_embeddings_of_any_scale_are_computed_in_float32(dtype: torch.dtype, scale: float) -> None:
    student, teacher = outputs()
    assert teacher.embedding is not None
    assert teacher.logits is not None
    low = (
        StudentOutput(*(x.to(dtype) for x in student)),
        TeacherOutput((teacher.embedding * scale).to(dtype), teacher.logits.to(dtype)),
    )
    terms = embedding()(*low, batch(LABELS))
    exact = embedding().double()(
        StudentOutput(*(x.double() for x in low[0])), TeacherOutput(*(x.double() for x in low[1])), batch(LABELS)
    )
    for name, term in terms.items():
        assert term.dtype == torch.float32
        assert float(term.detach()) == pytest.approx(float(exact[name].detach()), rel=1e-4)


def test_a_teacher_without_logits_or_without_embeddings_is_refused() -> None:
    data = dataset()
    whole = cache(data)
    for teacher, missing in (
        (Cache(whole.train_embedding, None), "no logits"),
        (Cache(None, whole.train_logits), "no embeddings"),
    ):
        with pytest.raises(InputError, match=missing) as error:
            build_objective((EmbeddingSection(),), data, teacher, student_dim=12)
        assert error.value.where == "objective[0].kind"


def test_a_recipe_builds_it_with_the_hard_weight_of_kd() -> None:
    data = dataset()
    composed = build_objective((EmbeddingSection(),), data, cache(data), student_dim=12)
    assert composed.hard_weight == 0.1
    student = StudentOutput(random(5, 12, seed=1).float(), random(5, 4, seed=2).float())
    teacher = TeacherOutput(random(5, 10, seed=3).float(), random(5, 4, seed=4).float())
    terms = composed(student, teacher, batch(LABELS))
    assert teacher.logits is not None
    assert list(terms) == [SOFT, DISTANCE]
    assert float(terms[SOFT]) == pytest.approx(0.9 * float(kd_loss(student.head, teacher.logits, 4.0)))


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_it_trains_and_the_exported_student_holds_no_map(task: str, tmp_path: Path) -> None:
    case = Case("embedding", data=dataset(task=task)).with_(epochs=10, learning_rate=0.02)
    result, net, _ = case.run(tmp_path / "student")
    for name in (SOFT, DISTANCE):
        losses = [record[f"loss/{name}"] for record in result.history]
        assert losses[-1] < 0.8 * losses[0]
    assert result.metric.value > 0.6
    assert not any("align" in name for name in net.state_dict())
