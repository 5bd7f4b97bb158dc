from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.data.section import AugmentSection
from distill.objectives import subclass
from distill.objectives.base import FitData
from distill.objectives.compose import Composition, build_objective, build_teacher_objective
from distill.objectives.kd import KD, kd_loss
from distill.objectives.section import KDSection, SubclassSection, SupervisedSection
from distill.objectives.split_head import class_logits_of
from distill.objectives.subclass import (
    Subclass,
    SubclassTeacher,
    auxiliary_loss,
    retrained_for,
    teacher_section,
)
from distill.outputs import StudentOutput, TeacherOutput
from distill.train_section import TrainSection
from distill.training import train
from profiles.errors import InputError, Interrupted
from tests.distill.objective_cases import batch, fit_data, random, shapes
from tests.distill.training_cases import Cache, Case, StopAfter, dataset, same_weights, student

LABELS = torch.tensor([0, 1, 2, 0])


@dataclass(frozen=True)
class Retrained(Cache):
    """Outputs of a teacher that was trained with subclasses."""

    subclasses: int = 3


def auxiliary_oracle(z: np.ndarray, temperature: float) -> float:
    """The formula term by term, with the standard deviation spelled out."""
    rows, columns = z.shape
    h = [(row - row.mean()) / row.std() / np.sqrt(temperature * columns) for row in z]
    total = 0.0
    for i in range(rows):
        total += np.log(sum(np.exp(float(np.dot(h[i], h[j]))) for j in range(rows)))
    return total / rows - 1 / temperature - np.log(rows)


def bound(rows: int, temperature: float) -> float:
    other = (rows - 1) * np.exp(-1 / (temperature * (rows - 1)))
    return float(np.log(np.exp(1 / temperature) + other) - 1 / temperature - np.log(rows))


# -- pure functions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.3, 1.0, 5.0])
@pytest.mark.parametrize(("dtype", "accuracy"), [(torch.float64, 1e-11), (torch.float32, 2e-6)])
def test_the_auxiliary_loss_agrees_with_numpy(temperature: float, dtype: torch.dtype, accuracy: float) -> None:
    z = random(7, 12, seed=1) * 3 + 2
    expected = auxiliary_oracle(z.numpy(), temperature)
    assert float(auxiliary_loss(z.to(dtype), temperature)) == pytest.approx(expected, abs=accuracy)


@pytest.mark.parametrize("tau", [0.5, 1.0, 4.0])
def test_class_outputs_agree_with_numpy(tau: float) -> None:
    head = random(5, 6, seed=2) * 3
    powers = np.exp(head.numpy() / tau)
    logits = np.stack([tau * np.log(powers[:, :3].sum(1)), tau * np.log(powers[:, 3:].sum(1))], 1)
    np.testing.assert_allclose(class_logits_of(head, 3, tau), logits, rtol=1e-12)
    probabilities = powers / powers.sum(1, keepdims=True)
    classes = np.stack([probabilities[:, :3].sum(1), probabilities[:, 3:].sum(1)], 1)
    np.testing.assert_allclose(torch.softmax(class_logits_of(head, 3, tau) / tau, 1), classes, rtol=1e-12)


def test_gradients_agree_with_finite_differences() -> None:
    z = random(4, 6, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: auxiliary_loss(z, 0.7), (z,))
    assert torch.autograd.gradcheck(lambda z: class_logits_of(z, 2, 2.0), (z,))
    assert torch.autograd.gradcheck(lambda z: class_logits_of(z, 3, 2.0), (z,))


def test_the_auxiliary_loss_does_not_see_order_shift_or_scale() -> None:
    z = random(6, 8, seed=4)
    value = float(auxiliary_loss(z))
    generator = torch.Generator().manual_seed(0)
    assert float(auxiliary_loss(z[torch.randperm(6, generator=generator)])) == pytest.approx(value)
    assert float(auxiliary_loss(z[:, torch.randperm(8, generator=generator)])) == pytest.approx(value)
    shift, scale = random(6, 1, seed=5) * 10, random(6, 1, seed=6).abs() + 0.1
    assert float(auxiliary_loss(z * scale + shift)) == pytest.approx(value)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("rows", [2, 3, 6])
def test_the_auxiliary_loss_reaches_its_bounds(rows: int, temperature: float) -> None:
    equal = random(1, 6, seed=7).expand(rows, 6)
    assert float(auxiliary_loss(equal, temperature)) == pytest.approx(0, abs=1e-12)
    simplex = torch.eye(6, dtype=torch.float64)[:rows]
    if rows < 6:  # a simplex of `rows` corners among centred vectors
        q, _ = torch.linalg.qr(torch.cat([torch.ones(6, 1, dtype=torch.float64), random(6, 5, seed=8)], 1))
        simplex = (torch.eye(rows, dtype=torch.float64) - 1 / rows) @ q[:, 1 : rows + 1].T
    assert float(auxiliary_loss(simplex, temperature)) == pytest.approx(bound(rows, temperature), abs=1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_the_auxiliary_loss_lies_between_its_bounds(seed: int) -> None:
    value = float(auxiliary_loss(random(9, 6, seed=seed), 0.8))
    assert bound(9, 0.8) <= value <= 0
    assert bound(9, 0.8) >= -1 / 0.8


def test_descending_the_auxiliary_loss_moves_samples_apart() -> None:
    z = (random(5, 8, seed=9) + 3 * random(1, 8, seed=10)).requires_grad_()
    optimizer = torch.optim.Adam([z], lr=0.05)
    for _ in range(600):
        optimizer.zero_grad()
        auxiliary_loss(z).backward()
        optimizer.step()
    assert float(auxiliary_loss(z.detach())) == pytest.approx(bound(5, 1.0), abs=1e-4)


@pytest.mark.parametrize(
    "z",
    [
        random(1, 6, seed=1),
        random(1, 6, seed=1).expand(4, 6),
        torch.zeros(4, 6, dtype=torch.float64),
        torch.full((3, 7), 0.1, dtype=torch.float32),
        torch.full((3, 7), -1e4, dtype=torch.float64),
        random(4, 1, seed=1),
        torch.zeros(1, 1, dtype=torch.float64),
        random(4, 6, seed=1) * 1e4,
    ],
)
def test_degenerate_batches_are_finite(z: Tensor) -> None:
    z = z.clone().requires_grad_()
    value = auxiliary_loss(z)
    value.backward()
    assert torch.isfinite(value)
    assert z.grad is not None
    assert torch.isfinite(z.grad).all()
    assert float(z.grad.abs().max()) < 100
    if len(z) == 1:
        assert float(auxiliary_loss(z.detach())) == pytest.approx(0 if z.shape[1] > 1 else -1)


def test_a_flat_sample_among_others_has_no_gradient() -> None:
    z = random(4, 6, seed=1)
    z[2] = 3.0
    z.requires_grad_()
    auxiliary_loss(z).backward()
    assert z.grad is not None
    assert not z.grad[2].any()
    assert z.grad[[0, 1, 3]].abs().sum(1).gt(0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    z = (random(5, 6, seed=3) * 200).to(dtype)
    value = auxiliary_loss(z)
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(float(auxiliary_loss(z.double())), rel=1e-5)


def test_permuting_subclasses_leaves_classes_alone() -> None:
    head = random(5, 6, seed=2)
    assert torch.allclose(class_logits_of(head, 3, 2.0), class_logits_of(head[:, [2, 0, 1, 4, 5, 3]], 3, 2.0))
    assert torch.equal(class_logits_of(head, 1), head)


# -- the modules -------------------------------------------------------------------------------------------------------


def retrained(section: SubclassSection, **changes: Any) -> Subclass:
    return Subclass(section, shapes(subclasses=section.subclasses_per_class, **changes))


@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_the_student_matches_every_subclass(tau: float) -> None:
    section = SubclassSection(subclasses_per_class=2, tau=tau, weight=0.5)
    head, logits = random(4, 6, seed=1).requires_grad_(), random(4, 6, seed=2).requires_grad_()
    terms = retrained(section)(StudentOutput(random(4, 6), head), TeacherOutput(None, logits), batch(LABELS))
    assert list(terms) == ["subclass"]
    expected = 0.5 * float(kd_loss(head.detach(), logits.detach(), tau))
    assert float(terms["subclass"].detach()) == pytest.approx(expected)
    terms["subclass"].backward()
    assert head.grad is not None
    assert logits.grad is None


def test_one_subclass_is_knowledge_distillation() -> None:
    head, logits = random(4, 3, seed=1), random(4, 3, seed=2)
    outputs = StudentOutput(head, head), TeacherOutput(None, logits), batch(LABELS)
    terms = retrained(SubclassSection(subclasses_per_class=1, tau=4.0))(*outputs)
    kd = KD(KDSection(tau=4.0), shapes(hard_weight=0.0))(*outputs)
    assert float(terms["subclass"]) == pytest.approx(float(kd["kd"]))


def test_the_teacher_gets_the_auxiliary_term_alone() -> None:
    section = SubclassSection(subclasses_per_class=2, aux_weight=0.25, aux_temperature=2.0)
    objective = SubclassTeacher(section, shapes())
    head = random(4, 6, seed=1)
    terms = objective(StudentOutput(head, head), TeacherOutput(None, None), batch(LABELS))
    assert list(terms) == ["subclass/auxiliary"]
    assert float(terms["subclass/auxiliary"]) == pytest.approx(0.25 * float(auxiliary_loss(head, 2.0)))
    assert torch.equal(objective.class_logits(head), class_logits_of(head, 2))
    assert not list(objective.parameters())


def test_the_teacher_does_not_depend_on_the_students_settings() -> None:
    section = SubclassSection(subclasses_per_class=4, aux_weight=0.5, tau=3.0, weight=2.0, weight_schedule="decay")
    assert teacher_section(section) == SubclassSection(subclasses_per_class=4, aux_weight=0.5)
    composition = build_teacher_objective(section, dataset(), student_dim=12)
    assert composition.sections == (teacher_section(section),)
    assert composition.hard_weight == 1.0


def test_two_heads_for_one_teacher_are_refused() -> None:
    assert retrained_for((KDSection(), SubclassSection())) == SubclassSection()
    assert retrained_for((KDSection(),)) is None
    with pytest.raises(InputError, match="one") as caught:
        retrained_for((SubclassSection(), SubclassSection(subclasses_per_class=1)))
    assert caught.value.where == "objective[1].kind"


def clusters(rows: int = 240) -> tuple[Tensor, Tensor]:
    """Two classes; each is two blobs far apart, so that two subclasses are there to be found. Shifted and scaled."""
    generator = torch.Generator().manual_seed(0)
    blob = torch.randint(4, (rows,), generator=generator)
    centres = torch.randn(4, 8, generator=generator) * 4
    return 100 + 20 * (centres[blob] + torch.randn(rows, 8, generator=generator) * 0.5), blob


def frozen(section: SubclassSection, **changes: Any) -> Subclass:
    return Subclass(section, shapes(classes=2, teacher_logits=None, **changes))


def test_a_frozen_teachers_head_learns_classes_and_finds_subclasses() -> None:
    embedding, blob = clusters()
    objective = frozen(SubclassSection(subclasses_per_class=2))
    objective.prepare(fit_data(embedding, blob // 2))
    head = objective.teacher_logits(TeacherOutput(embedding, None))
    assert head.shape == (240, 4)
    assert torch.equal(class_logits_of(head, 2).argmax(1), blob // 2)
    found = torch.stack([torch.bincount(head.argmax(1)[blob == each], minlength=4) for each in range(4)])
    assert found.max(1).values.sum() > 0.95 * len(blob), found
    assert len(set(found.argmax(1).tolist())) == 4, found


@pytest.fixture
def short_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests in which how well the head fits does not matter."""
    monkeypatch.setattr(subclass, "_FIT_STEPS", 1)


@pytest.mark.usefixtures("short_fit")
def test_a_frozen_teachers_head_is_a_buffer_and_a_function_of_the_seed() -> None:
    embedding, blob = clusters(64)
    kept = embedding.clone()

    def fitted(seed: int) -> Subclass:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            objective = frozen(SubclassSection(subclasses_per_class=2))
        state = torch.get_rng_state()
        objective.prepare(fit_data(embedding, blob // 2, seed=seed))
        assert torch.equal(torch.get_rng_state(), state)
        return objective

    first = fitted(0)
    assert same_weights(first, fitted(0))
    assert not same_weights(first, fitted(1))
    assert torch.equal(embedding, kept)
    assert not list(first.parameters())
    assert set(first.state_dict()) == {"head_weight", "head_bias"}
    before = first.head_weight.clone()
    first.prepare(fit_data(embedding, blob // 2), fitted=True)
    assert torch.equal(first.head_weight, before)


@pytest.mark.usefixtures("short_fit")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_constant_dimensions_and_a_single_row_are_finite(dtype: torch.dtype) -> None:
    embedding, blob = clusters(40)
    embedding[:, 3] = 7.0
    for rows in (40, 1):
        objective = frozen(SubclassSection(subclasses_per_class=2))
        objective.prepare(fit_data(embedding[:rows].to(dtype), blob[:rows] // 2))
        assert torch.isfinite(objective.head_weight).all()
        assert torch.isfinite(objective.head_bias).all()


def test_no_gradient_reaches_a_frozen_teacher() -> None:
    embedding, blob = clusters(16)
    objective = frozen(SubclassSection(subclasses_per_class=2))
    embedding.requires_grad_()
    head = random(16, 4, seed=1, dtype=torch.float32).requires_grad_()
    terms = objective(StudentOutput(head, head), TeacherOutput(embedding, None), batch(blob // 2))
    terms["subclass"].backward()
    assert head.grad is not None
    assert embedding.grad is None


# -- composed and trained ----------------------------------------------------------------------------------------------


def retrained_cache(subclasses: int = 3) -> Retrained:
    data = dataset()
    rng = np.random.default_rng(1)
    logits = np.repeat(np.eye(4)[data.train.labels] * 6, subclasses, 1) + rng.normal(size=(2, 96, 4 * subclasses))
    embedding = rng.normal(size=(2, 96, 10))
    return Retrained(embedding.astype(np.float16), logits.astype(np.float16), views=2, subclasses=subclasses)


def composed(sections: Any, cache: Cache, hard_weight: float | None = None) -> Composition:
    return build_objective(sections, dataset(), cache, student_dim=12, hard_weight=hard_weight)


def test_objectives_beside_it_see_class_logits() -> None:
    sections = (SubclassSection(subclasses_per_class=3), KDSection(tau=2.0))
    objective = composed(sections, retrained_cache(), hard_weight=0.0)
    head, logits = random(4, 12, seed=1), random(4, 12, seed=2)
    terms = objective(StudentOutput(random(4, 12), head), TeacherOutput(None, logits), batch(LABELS))
    assert float(terms["subclass"]) == pytest.approx(float(kd_loss(head, logits, 1.0)))
    expected = kd_loss(class_logits_of(head, 3), class_logits_of(logits, 3), 2.0)
    assert float(terms["kd"]) == pytest.approx(float(expected))


def test_objectives_beside_it_are_fitted_on_class_logits() -> None:
    seen: list[FitData] = []
    objective = composed((SubclassSection(subclasses_per_class=3), KDSection()), retrained_cache(), hard_weight=0.5)
    for member in objective.objectives:
        member.prepare = lambda data, fitted=False: seen.append(data)  # type: ignore[method-assign]
    logits = random(2, 96, 12, dtype=torch.float32)
    known = random(12, 10)
    objective.prepare(FitData(None, logits, torch.zeros(96), None, 0, torch.device("cpu"), known, known[:, 0]))
    assert seen[0].logits is logits
    assert seen[1].logits is not None
    assert torch.equal(seen[1].logits, class_logits_of(logits, 3))
    assert seen[0].head_weight is known
    assert seen[1].head_weight is None


def test_other_objectives_get_the_frozen_teachers_own_logits() -> None:
    case = Case(objective=[{"kind": "subclass"}, {"kind": "kd"}], section=TrainSection(hard_weight=0.0))
    _, objective, _ = case.build()
    head, logits, embedding = random(4, 32, seed=1), random(4, 4, seed=2), random(4, 10, seed=3).float()
    terms = objective(StudentOutput(random(4, 12), head), TeacherOutput(embedding, logits), batch(LABELS))
    assert float(terms["kd"]) == pytest.approx(float(kd_loss(class_logits_of(head, 8), logits, 4.0)))


def test_another_number_of_subclasses_than_the_teachers_is_a_bug() -> None:
    with pytest.raises(RuntimeError, match="another number"):
        composed((SubclassSection(subclasses_per_class=2),), retrained_cache())


def network(head_size: int) -> Any:
    net = student()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net.head = torch.nn.Linear(12, head_size)
    net.head_size = head_size
    return net


SECTION = TrainSection(epochs=2, batch_size=16)
AUGMENT = AugmentSection(crop=1, flip=True, views=2)


def test_a_teacher_is_trained_with_both_losses(tmp_path: Path) -> None:
    data = dataset()
    section = SubclassSection(subclasses_per_class=3)
    objective = build_teacher_objective(section, data, student_dim=12)
    net = network(12)
    long = SECTION.model_copy(update={"epochs": 8})
    result = train(net, objective, data, None, long, AUGMENT, tmp_path / "t", device="cpu")
    first, last = result.history[0], result.history[-1]
    assert result.hard_weight == 1.0
    assert result.metric.value > 0.4
    assert last["loss/ground_truth"] < first["loss/ground_truth"]
    assert last["loss/subclass/auxiliary"] < 0


def test_an_interrupted_teacher_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    def trained(folder: Path, progress: StopAfter | None = None) -> Any:
        net = network(12)
        objective = build_teacher_objective(SubclassSection(subclasses_per_class=3), dataset(), student_dim=12)
        train(net, objective, dataset(), None, SECTION, AUGMENT, folder, device="cpu", progress=progress)
        return net

    with pytest.raises(Interrupted):
        trained(tmp_path / "stopped", StopAfter(8))
    assert same_weights(trained(tmp_path / "stopped"), trained(tmp_path / "whole"))


@pytest.mark.usefixtures("short_fit")
@pytest.mark.parametrize("kind", ["retrained", "frozen"])
def test_a_student_learns_and_a_second_call_trains_nothing(tmp_path: Path, kind: str) -> None:
    data, section = dataset(), SubclassSection(subclasses_per_class=3)
    cache: Cache = retrained_cache()
    if kind == "frozen":
        cache = Cache(cache.train_embedding, None, views=2)
    networks = []
    for _ in range(2):
        net, objective = network(12), composed((section,), cache)
        result = train(net, objective, data, cache, SECTION, AUGMENT, tmp_path / "s", device="cpu")
        networks.append((net, objective))
        assert result.hard_weight == 1.0
        assert "loss/subclass" in result.history[-1]
    assert same_weights(networks[0][0], networks[1][0])
    assert same_weights(networks[0][1], networks[1][1])
    assert objective.class_logits(random(5, 12).float()).shape == (5, 4)


def test_the_plain_student_keeps_its_head() -> None:
    assert composed((SupervisedSection(),), retrained_cache()).class_logits(random(2, 4)).shape == (2, 4)
