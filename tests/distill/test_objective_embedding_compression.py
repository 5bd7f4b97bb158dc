import math
from typing import Any

import pytest
import torch

from distill.objectives.compose import Composition
from distill.objectives.distance_correlation import distance_correlation_loss
from distill.objectives.embedding_compression import EmbeddingCompression
from distill.objectives.ground_truth import task_loss
from distill.objectives.section import DistanceCorrelationSection, EmbeddingCompressionSection
from distill.outputs import StudentOutput, TeacherOutput
from tests.distill.objective_cases import batch, fit_data, random, shapes

DISTANCE = "embedding_compression/distance"
TASK = "embedding_compression/task"
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])


def ec(seed: int = 0, changes: dict[str, Any] | None = None, **section: Any) -> EmbeddingCompression:
    torch.manual_seed(seed)
    return EmbeddingCompression(EmbeddingCompressionSection(**section), shapes(**(changes or {})))


def outputs(dtype: torch.dtype = torch.float32) -> tuple[StudentOutput, TeacherOutput]:
    s, e = random(8, 6, seed=1, dtype=dtype).requires_grad_(), random(8, 8, seed=2, dtype=dtype).requires_grad_()
    return StudentOutput(s, s[:, :3]), TeacherOutput(e, None)


def gradients(module: torch.nn.Module) -> bool:
    return any(p.grad is not None and bool(p.grad.any()) for p in module.parameters())


@pytest.mark.parametrize("distance", ["distance_correlation", "cosine_difference", "cosine"])
@pytest.mark.parametrize("transform", ["linear", "mlp"])
def test_each_term_trains_its_own_side(distance: str, transform: str) -> None:
    objective = ec(distance=distance, transform=transform)
    student, teacher = outputs()
    objective(student, teacher, batch(LABELS))[DISTANCE].backward()
    assert student.embedding.grad.any()
    assert not gradients(objective.transform)
    assert not gradients(objective.head)

    student, teacher = outputs()
    objective(student, teacher, batch(LABELS))[TASK].backward()
    assert student.embedding.grad is None
    assert gradients(objective.transform)
    assert gradients(objective.head)
    assert teacher.embedding.grad is None


def test_without_detach_the_distance_moves_the_transform_too() -> None:
    objective = ec(detach=False)
    student, teacher = outputs()
    objective(student, teacher, batch(LABELS))[DISTANCE].backward()
    assert gradients(objective.transform)
    assert teacher.embedding.grad is None


@pytest.mark.parametrize("distance", ["distance_correlation", "cosine_difference", "cosine"])
def test_terms_are_weighted_as_documented(distance: str) -> None:
    objective = ec(distance=distance, lam=0.6, mu=0.5, weight=2.0)
    student, teacher = outputs()
    terms = objective(student, teacher, batch(LABELS))
    compressed = objective.transform(teacher.embedding)
    assert float(terms[DISTANCE].detach()) == pytest.approx(
        2 * 0.6 * float(objective.distance(student.embedding, compressed).detach())
    )
    assert float(terms[TASK].detach()) == pytest.approx(
        2 * 0.5 * float(task_loss(objective.head(compressed), LABELS, None).detach())
    )


def test_the_identity_transform_without_task_loss_is_east() -> None:
    objective = ec(mu=0.0, schedule="joint", lam=0.7, dimension=8)
    with torch.no_grad():
        objective.transform.weight.copy_(torch.eye(8))
        objective.transform.bias.zero_()
    student, teacher = outputs()
    terms = objective(student, teacher, batch(LABELS))
    assert list(terms) == [DISTANCE]
    terms[DISTANCE].backward()
    east_student, east_teacher = outputs()
    east = 0.7 * distance_correlation_loss(east_student.embedding, east_teacher.embedding)
    east.backward()
    assert torch.equal(terms[DISTANCE].detach(), east.detach())
    assert torch.equal(student.embedding.grad, east_student.embedding.grad)
    # the default weight of the EAsT baseline is the same mix, relative to a ground-truth weight of 1
    assert DistanceCorrelationSection().weight == pytest.approx(0.7 / 0.3, abs=0.01)


def test_lam_zero_leaves_the_student_to_the_ground_truth() -> None:
    section = EmbeddingCompressionSection(lam=0.0)
    objective = ec(lam=0.0)
    student, teacher = outputs()
    terms = objective(student, teacher, batch(LABELS))
    assert list(terms) == [TASK]
    assert section.default_hard_weight == 1.0
    terms[TASK].backward()
    assert student.embedding.grad is None


def test_cosine_learns_a_map_only_when_the_dimensions_differ() -> None:
    assert not list(ec(distance="cosine").align.parameters())
    mapped = ec(distance="cosine", dimension=5)
    student, teacher = outputs()
    mapped(student, teacher, batch(LABELS))[DISTANCE].backward()
    assert gradients(mapped.align)


def test_dimensions_may_differ_for_the_other_distances() -> None:
    for distance in ("distance_correlation", "cosine_difference"):
        terms = ec(distance=distance, dimension=4)(*outputs(), batch(LABELS))
        assert torch.isfinite(terms[DISTANCE])


def test_several_labels_with_unknown_ones_train_the_transform_on_the_known() -> None:
    objective = ec(changes={"task": "multilabel"})
    student, teacher = outputs()
    labels, mask = torch.ones(8, 3), torch.zeros(8, 3, dtype=torch.bool)
    objective(student, teacher, batch(labels, mask))[TASK].backward()
    assert not gradients(objective.transform)
    mask[0, 1] = True
    objective(student, teacher, batch(labels, mask))[TASK].backward()
    assert objective.head.weight.grad[1].any()
    assert not objective.head.weight.grad[[0, 2]].any()


def separable(rows: int = 120) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(rows) % 3
    return random(3, 8, seed=5, dtype=torch.float32)[labels] + 0.3 * random(
        rows, 8, seed=6, dtype=torch.float32
    ), labels


@pytest.mark.parametrize("transform", ["linear", "mlp"])
def test_frozen_is_fitted_on_the_training_split_and_then_fixed(transform: str) -> None:
    embedding, labels = separable()
    objective = ec(schedule="frozen", transform=transform, fit_epochs=150)
    objective.prepare(fit_data(embedding, labels))
    objective.train()
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    with torch.no_grad():
        predicted = objective.head(objective.transform(embedding)).argmax(1)
    assert (predicted == labels).float().mean() > 0.9
    terms = objective(*outputs(), batch(LABELS))
    assert list(terms) == [DISTANCE]
    terms[DISTANCE].backward()
    assert not gradients(objective)
    assert all(torch.equal(before[name], value) for name, value in objective.state_dict().items())


def test_warmup_trains_the_transform_alone_and_joint_does_not() -> None:
    embedding, labels = separable()
    for schedule, moves in (("joint", False), ("warmup", True)):
        objective = ec(schedule=schedule)
        before = objective.transform.weight.clone()
        objective.prepare(fit_data(embedding, labels))
        assert torch.equal(before, objective.transform.weight) is not moves
        assert all(p.requires_grad for p in objective.parameters())


def test_fitting_is_a_function_of_the_seed_and_leaves_the_embeddings_alone() -> None:
    embedding, labels = separable()
    kept = embedding.clone()
    states = []
    for seed in (1, 1, 2):
        objective = ec(schedule="frozen", fit_epochs=2)
        objective.prepare(fit_data(embedding, labels, seed=seed))
        states.append(objective.transform.weight.clone())
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])
    assert torch.equal(kept, embedding)


def test_a_checkpointed_objective_is_not_fitted_again() -> None:
    embedding, labels = separable()
    objective = ec(schedule="frozen", fit_epochs=2)
    objective.prepare(fit_data(embedding, labels))
    again = ec(seed=9, schedule="frozen", fit_epochs=2)
    again.load_state_dict(objective.state_dict())
    again.prepare(fit_data(embedding, labels), fitted=True)
    assert torch.equal(again.transform.weight, objective.transform.weight)
    assert not again.transform.weight.requires_grad


@pytest.mark.parametrize("transform", ["linear", "mlp"])
def test_a_batch_of_one_and_identical_rows_are_finite(transform: str) -> None:
    for distance in ("distance_correlation", "cosine_difference", "cosine"):
        objective = ec(distance=distance, transform=transform)
        for rows in (1, 8):
            s = torch.ones(rows, 6).requires_grad_()
            terms = objective(
                StudentOutput(s, s[:, :3]), TeacherOutput(torch.ones(rows, 8), None), batch(LABELS[:rows])
            )
            sum(terms.values()).backward()
            assert torch.isfinite(s.grad).all()


def test_half_precision_embeddings_are_computed_in_float32() -> None:
    student, teacher = outputs()
    half = TeacherOutput(teacher.embedding.half(), None)
    for distance in ("distance_correlation", "cosine_difference", "cosine"):
        terms = ec(distance=distance)(StudentOutput(student.embedding.bfloat16(), student.head), half, batch(LABELS))
        assert all(term.dtype == torch.float32 for term in terms.values())


def test_the_effective_rank_is_logged_and_falls_when_directions_vanish() -> None:
    embedding, labels = separable()
    objective = ec(schedule="joint", dimension=8)
    assert objective.logs() == {}
    objective.prepare(fit_data(embedding, labels))
    full = objective.logs()["embedding_compression/effective_rank"]
    with torch.no_grad():
        objective.transform.weight[1:] = 0
    single = objective.logs()["embedding_compression/effective_rank"]
    assert single == pytest.approx(1, abs=1e-3)
    assert 1 < full <= 8
    assert not math.isnan(full)


def test_gradient_of_the_whole_objective_agrees_with_finite_differences() -> None:
    objective = ec(detach=False).double()
    e = random(6, 8, seed=2)

    def total(s: torch.Tensor) -> torch.Tensor:
        return sum(objective(StudentOutput(s, s[:, :3]), TeacherOutput(e, None), batch(LABELS[:6])).values())

    assert torch.autograd.gradcheck(total, (random(6, 6, seed=1).requires_grad_(),))


def test_class_logits_need_neither_transform_nor_head() -> None:
    """The exported student is student.head through `class_logits`; EC's parameters are not among its inputs."""
    section = EmbeddingCompressionSection()
    composed = Composition((section,), [ec()], section.default_hard_weight)
    head = random(4, 3, seed=1)
    assert composed.class_logits(head) is head
