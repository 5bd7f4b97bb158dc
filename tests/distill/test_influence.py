"""The influence's parts against autograd, central differences and each other, and its gradient through a real step."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from distill.data.dataset import InputSpec
from distill.objectives.kd import binary_kd_loss, kd_loss
from distill.outputs import StudentOutput, TeacherOutput
from distill.strategies import influence as module
from distill.strategies.influence import (
    change_along,
    influence,
    preconditioned,
    sample_influence,
    through_clipping,
)
from distill.strategies.virtual_step import virtual_step
from distill.strategy import Step
from distill.students import Student, build_student
from distill.students.section import StudentSection
from tests.distill.coached_cases import Coaching, Fixed, Looking, after_a_step, exact, gradient, plain_sgd
from tests.distill.training_cases import Case, dataset

METHODS: tuple[Literal["finite_difference", "jvp"], ...] = ("finite_difference", "jvp")


class Seen(Exception):
    """The step that the test wanted to see was reached."""


def at_step(coaching: Coaching, folder: Path, number: int, look: Callable[[Looking, Step], None]) -> None:
    """Trains up to a step, and looks at it; before the first, plain SGD may be set."""

    def wait(coached: Looking, step: Step) -> None:
        if step.number == number:
            look(coached, step)
            raise Seen

    with pytest.raises(Seen):
        coaching.run(folder, wait)


def mixed_derivative(coached: Looking, step: Step) -> tuple[list[Tensor], dict[str, Tensor]]:
    """grad_phi [ grad_theta L(theta, phi)^T v ] by two backward passes, and v by name."""
    run = coached.run
    told = coached._logits(step)
    parameters = list(run.student.parameters())

    def loss(teacher: Tensor) -> Tensor:
        output = run.student(step.inputs)
        terms = run.loss_terms(output, TeacherOutput(None, teacher), step.rows, step.number)
        return torch.stack(list(terms.values())).sum()

    gradients = torch.autograd.grad(loss(told.detach()), parameters)
    with virtual_step(run.optimizer, dict(zip(parameters, gradients, strict=True))):
        v = coached._held_out_gradient(step)
    first = torch.autograd.grad(loss(told), parameters, create_graph=True)
    inner = torch.stack([(g * v[p]).sum() for g, p in zip(first, parameters, strict=True)]).sum()
    found = torch.autograd.grad(inner, coached.learner.parameters_that_learn())
    return list(found), {name: v[p] for name, p in run.student.named_parameters()}


def largest_error(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Relative to the largest entry."""
    size = max(b.abs().max().item() for b in wanted)
    assert size > 0
    return max((a - b).abs().max().item() for a, b in zip(found, wanted, strict=True)) / size


# -- J against the exact mixed derivative ------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["kd", "dist", "mse", "dkd"])
@pytest.mark.parametrize("method", METHODS)
def test_an_affine_students_influence_is_the_mixed_derivative(method: str, objective: str, tmp_path: Path) -> None:
    coaching = exact(objective=objective).with_(derivative=method)
    coaching = Coaching(section=coaching.section, case=coaching.case, double=Fixed)

    def look(coached: Looking, step: Step) -> None:
        wanted, _ = mixed_derivative(coached, step)
        assert largest_error(gradient(coached, step), wanted) < 1e-9

    at_step(coaching, tmp_path / "student", 2, look)


def test_a_bent_students_is_exact_by_jvp_and_off_by_eps_squared_by_finite_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(coached: Looking, step: Step) -> None:
        wanted, v = mixed_derivative(coached, step)
        assert largest_error(gradient(coached, step), wanted) < 1e-9
        student = coached.run.student
        exactly = change_along(student, step.inputs, v, "jvp")
        errors = []
        for size in (0.02, 0.01, 0.005):
            monkeypatch.setattr(module, "STEP", size)
            errors.append((change_along(student, step.inputs, v, "finite_difference") - exactly).norm().item())
        assert errors[0] / errors[1] == pytest.approx(4, rel=0.05)
        assert errors[1] / errors[2] == pytest.approx(4, rel=0.05)
        assert errors[0] < 1e-3 * exactly.norm().item()

    at_step(exact(), tmp_path / "student", 2, look)


# -- the bilevel gradient through the virtual step ---------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["kd", "dist", "mse"])
@pytest.mark.parametrize(
    ("optimizer", "kind", "clip", "truth"),
    [
        ("sgd", "plain", None, {}),  # without momentum
        ("sgd", "preconditioned", None, {"label_smoothing": 0.2}),
        ("sgd", "preconditioned", 0.05, {"class_weights": (0.3, 3.0, 1.0, 2.0)}),
        ("adamw", "preconditioned", None, {}),
        ("adamw", "preconditioned", 0.05, {}),
    ],
)
def test_the_held_out_loss_after_the_step_has_the_gradient_of_the_influence(
    optimizer: str, kind: str, clip: float | None, truth: dict[str, Any], objective: str, tmp_path: Path
) -> None:
    """Central differences by the teacher's weights, each with a real step of a copy of student and optimiser."""

    def look(coached: Looking, step: Step) -> None:
        if kind == "plain":
            plain_sgd(coached)
        found = [-step.learning_rate * g for g in gradient(coached, step)]
        weights = coached.learner.parameters_that_learn()
        generator = torch.Generator().manual_seed(1)
        eps = 1e-6
        for _ in range(3):
            way = [torch.randn(w.shape, generator=generator, dtype=w.dtype) for w in weights]
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    torch._foreach_add_([*weights], way, alpha=sign * eps)
                values.append(after_a_step(coached, step))
                with torch.no_grad():
                    torch._foreach_add_([*weights], way, alpha=-sign * eps)
            slope = (values[0] - values[1]) / (2 * eps)
            assert torch.stack([(g * w).sum() for g, w in zip(found, way, strict=True)]).sum().item() == pytest.approx(
                slope, rel=1e-5, abs=1e-9 * step.learning_rate
            )

    coaching = exact(optimizer, objective, grad_clip=clip, hard_weight=0.3, **truth).with_(influence=kind)
    if optimizer == "adamw":
        coaching = Coaching(
            section=coaching.section, case=coaching.case.with_(learning_rate=0.01), double=coaching.double
        )
    at_step(coaching, tmp_path / "student", 3, look)


@pytest.mark.parametrize(("optimizer", "kind"), [("sgd", "plain"), ("adamw", "preconditioned")])
def test_a_small_step_on_the_influence_alone_lowers_the_held_out_loss(
    optimizer: str, kind: str, tmp_path: Path
) -> None:
    def look(coached: Looking, step: Step) -> None:
        weights = coached.learner.parameters_that_learn()
        up = gradient(coached, step)
        size = torch.stack([g.square().sum() for g in up]).sum().sqrt()
        losses = []
        for way in (0.0, 0.02, -0.02):
            with torch.no_grad():
                torch._foreach_add_([*weights], [way * g / size for g in up])
            losses.append(after_a_step(coached, step))
            with torch.no_grad():
                torch._foreach_sub_([*weights], [way * g / size for g in up])
        # descending -J is climbing J; the other sign raises the loss
        assert losses[1] < losses[0] < losses[2]

    at_step(exact(optimizer).with_(influence=kind), tmp_path / "student", 3, look)


@pytest.mark.parametrize("hard_weight", [0.0, 0.3])
def test_in_a_step_the_influence_is_the_mean_of_the_samples(hard_weight: float, tmp_path: Path) -> None:
    """KD at tau 1; what the labels ask of the student is no part of it."""

    def look(coached: Looking, step: Step) -> None:
        told, said, change, value = coached.influence(step)
        samples = sample_influence(said, told, change)
        assert samples.abs().min() > 0
        assert value.item() == pytest.approx((1 - hard_weight) * samples.mean().item(), rel=1e-9)

    coaching = exact(objective={"kind": "kd", "tau": 1.0}, hard_weight=hard_weight)
    at_step(coaching, tmp_path / "student", 2, look)


# -- samples -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multilabel", [False, True])
def test_sample_influences_average_to_the_influence_and_permute_with_the_samples(multilabel: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    s, t, u = (torch.randn(7, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    told = t.clone().requires_grad_()
    loss = binary_kd_loss if multilabel else kd_loss
    value = influence(lambda head: loss(head, told, 1.0), s, u)
    samples = sample_influence(s, t, u, multilabel=multilabel)
    assert samples.shape == (7,)
    assert samples.mean().item() == pytest.approx(value.item(), rel=1e-12)
    order = torch.randperm(7, generator=generator)
    permuted = sample_influence(s[order], t[order], u[order], multilabel=multilabel)
    assert torch.allclose(permuted, samples[order], rtol=1e-14)
    (slope,) = torch.autograd.grad(value, told)
    assert slope.abs().min() > 0


def test_the_influence_reaches_neither_student_nor_direction() -> None:
    s, u = (torch.randn(3, 2, requires_grad=True) for _ in range(2))
    t = torch.randn(3, 2, requires_grad=True)
    torch.autograd.backward(influence(lambda head: kd_loss(head, t, 1.0), s, u))
    assert s.grad is None
    assert u.grad is None
    assert t.grad is not None


# -- directions of the weights -----------------------------------------------------------------------------------------


def images(count: int = 3) -> tuple[Tensor, InputSpec]:
    spec = InputSpec("image", (3, 12, 12), (0.5,) * 3, (0.3,) * 3)
    x = torch.randint(0, 256, (count, 3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return x, spec


def tokens(count: int = 3) -> tuple[Tensor, InputSpec]:
    x = torch.randint(0, 16, (count, 6), generator=torch.Generator().manual_seed(0))
    return x, InputSpec("tokens", (6,), vocabulary=16)


NETS = [(images, "conv-w8-d1-k3"), (images, "convi-w8-d1-k3"), (tokens, "text-w16-d2-h2"), (tokens, "textc-w16-d1-k3")]


@pytest.mark.parametrize(("data", "arch"), NETS)
def test_every_family_has_both_derivatives_and_keeps_its_weights(
    data: Any, arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, spec = data()
    student = build_student(StudentSection(arch=arch), spec, 4, seed=0, base=Path()).eval().double()
    monkeypatch.setattr(module, "STEP", 1e-6)  # not over the next kink of a ReLU
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        # BatchNorm's shifts start at zero, where dead inputs leave the next ReLU exactly at its kink
        for p in student.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype), alpha=0.01)
    v = {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in student.named_parameters()}
    before = copy.deepcopy(student.state_dict())
    found = [change_along(student, x, v, method) for method in METHODS]
    assert found[0].shape == (3, 4)
    assert not found[0].requires_grad
    assert (found[0] - found[1]).norm() < 1e-6 * found[1].norm()
    for name, value in student.state_dict().items():
        assert torch.equal(value, before[name]), name


class Encoder(nn.Module):
    """A user's network: the layer that torch runs by a fused path in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(16, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(self.tokens(x)).mean(1)
        return found


@pytest.mark.parametrize("method", METHODS)
def test_fused_attention_of_a_users_network_is_no_obstacle(method: str) -> None:
    torch.manual_seed(0)
    student = Student("own", Encoder(), 8, 4).eval()
    x, _ = tokens()
    v = {name: torch.randn_like(p) for name, p in student.named_parameters()}
    double = copy.deepcopy(student).double()
    wanted = change_along(double, x, {name: value.double() for name, value in v.items()}, "jvp")
    found = change_along(student, x, v, method)  # type: ignore[arg-type]
    assert (found - wanted).norm() < 0.01 * wanted.norm()
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("method", METHODS)
def test_no_direction_is_no_change(method: str) -> None:
    x, spec = images()
    student = build_student(StudentSection(arch="conv-w8-d1-k3"), spec, 4, seed=0, base=Path()).eval()
    v = {name: torch.zeros_like(p) for name, p in student.named_parameters()}
    assert torch.equal(change_along(student, x, v, method), torch.zeros(3, 4))  # type: ignore[arg-type]


def test_weights_come_back_after_an_error() -> None:
    class Breaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([0.1, 0.7]))

        def forward(self, x: Tensor) -> StudentOutput:
            raise ValueError("here")

    student = Breaks()
    with pytest.raises(ValueError, match="here"):
        change_along(student, torch.zeros(1), {"weight": torch.tensor([0.3, 0.2])}, "finite_difference")
    assert torch.equal(student.weight, torch.tensor([0.1, 0.7]))


# -- what the optimiser makes of a change of the gradient --------------------------------------------------------------


def optimizer(name: str, weight: nn.Parameter) -> torch.optim.Optimizer:
    if name == "adamw":
        return torch.optim.AdamW([weight], lr=0.1, weight_decay=0.1)
    return torch.optim.SGD([weight], lr=0.1, weight_decay=0.1, momentum=0.9, nesterov=name == "nesterov")


def updated(weight: nn.Parameter, given: torch.optim.Optimizer, g: Tensor) -> Tensor:
    copied, other = copy.deepcopy((weight, given))
    copied.grad = g
    other.step()
    return copied.detach()


@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize("name", ["adamw", "momentum", "nesterov"])
def test_the_preconditioner_is_the_derivative_of_the_update(name: str, steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(6, generator=generator, dtype=torch.float64))
    given = optimizer(name, weight)
    for _ in range(steps):
        weight.grad = torch.randn(6, generator=generator, dtype=torch.float64)
        given.step()
    g, v = (torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(2))
    # so small that Adam's eps decides at a fresh state
    g = g * (1e-6 if steps == 0 and name == "adamw" else 1.0)
    eps = g.abs().min() * 1e-4
    slopes = torch.stack(
        [
            (updated(weight, given, g + eps * e) - updated(weight, given, g - eps * e)) / (2 * eps)
            for e in torch.eye(6).double()
        ]
    )
    assert torch.equal(slopes, slopes.diag().diag())
    (found,) = preconditioned(given, {weight: g}, {weight: v}).values()
    assert torch.allclose(found, -slopes.diag() * v / 0.1, rtol=1e-5)


def test_the_preconditioner_is_as_good_in_float32() -> None:
    """At a fresh state the two parts of the textbook form differ by eps alone."""
    weight = nn.Parameter(torch.ones(3))
    given = optimizer("adamw", weight)
    g = torch.tensor([0.3, -2.0, 1e-30])
    (found,) = preconditioned(given, {weight: g}, {weight: torch.ones(3)}).values()
    assert torch.allclose(found.double(), 1e-8 / (g.double().abs() + 1e-8) ** 2, rtol=1e-4)
    assert found.isfinite().all()


def test_what_never_had_a_gradient_has_no_part_in_the_preconditioned_direction() -> None:
    weight = nn.Parameter(torch.ones(3))
    given = optimizer("adamw", weight)
    weight.grad = torch.tensor([0.5, 0.0, 0.0])
    given.step()
    g = torch.tensor([0.0, 0.0, 0.3])
    (found,) = preconditioned(given, {weight: g}, {weight: torch.ones(3)}).values()
    assert found[0] > 0.1  # it has moments
    assert found[1] == 0
    assert found[2] > 0


@pytest.mark.parametrize("number", [0, 5])
def test_tokens_that_only_held_out_samples_have_do_not_blur_the_finite_difference(number: int, tmp_path: Path) -> None:
    """In float32, for a text student under AdamW, against forward mode."""
    case = Case("kd", data=dataset(60, tokens=True), views=1, arch="text-w16-d1-h2").with_(batch_size=12)
    coaching = Coaching(case=case, teacher_arch="text-w24-d1-h2", held_out=0.2).with_(influence="preconditioned")
    held = coaching.build()._held_out(case.data, case.seed)
    inputs = case.data.train.inputs.copy()
    inputs[held, :2] += 16
    data = replace(
        case.data, train=replace(case.data.train, inputs=inputs), input=replace(case.data.input, vocabulary=32)
    )
    coaching = replace(coaching, case=replace(case, data=data))

    def look(coached: Looking, step: Step) -> None:
        assert coached.held.tolist() == held.tolist()
        found = gradient(coached, step)
        coached.section = coaching.with_(derivative="jvp").section
        assert largest_error(found, gradient(coached, step)) < 0.01

    at_step(coaching, tmp_path / "student", number, look)


@pytest.mark.parametrize("largest", [0.5, 100.0])
def test_the_way_through_clipping_is_its_transposed_jacobian(largest: float) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3,), (2, 2)]
    weights = [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in shapes]
    g, v = ([torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes] for _ in range(2))
    given = [x.clone().requires_grad_() for x in g]
    size = torch.cat([x.flatten() for x in given]).norm()
    factor = torch.clamp(largest / (size + 1e-6), max=1.0)
    wanted = torch.autograd.grad([factor * x for x in given], given, v)
    found = through_clipping(dict(zip(weights, g, strict=True)), largest, dict(zip(weights, v, strict=True)))
    for weight, value in zip(weights, wanted, strict=True):
        assert torch.allclose(found[weight], value, rtol=1e-10)
