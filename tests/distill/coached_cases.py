"""What the tests of a coached teacher share: small live teachers, one call to `train`, and a look at a single step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distill.objectives.compose import Composition
from distill.outputs import TeacherOutput
from distill.strategies.coached import Coached
from distill.strategy import Step
from distill.students import Student, build_student
from distill.students.section import StudentSection
from distill.teachers.live import live_teacher
from distill.teachers.strategy_section import CoachedSection
from distill.teachers.teacher import ModuleTeacher, NetworkTeacher, TeacherBatch
from distill.training import Run, TrainResult, train
from tests.distill.training_cases import SIDE, Case, dataset

PIXELS = 3 * SIDE * SIDE


class Smooth(nn.Module):
    """Flat images -> embedding of 5, in the precision of its weights: no kink, no BatchNorm, no dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(PIXELS, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.first.weight
        found: Tensor = self.second(torch.tanh(self.first(scaled(x, weight))))
        return found.tanh()


class Fixed(nn.Module):
    """Flat images -> embedding of 5, without parameters: a Linear on it has logits that are affine in all weights."""

    mix: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mix", torch.randn(PIXELS, 5, generator=torch.Generator().manual_seed(9)) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return scaled(x, self.mix) @ self.mix


def scaled(x: Tensor, like: Tensor) -> Tensor:
    """uint8 images -> (N, PIXELS) around zero, in the precision of `like`."""
    return (x.flatten(1).to(like) - 100) / 100


class DoubleTeacher(NetworkTeacher):
    """Flat images -> logits, in float64 throughout."""

    def __init__(self, seed: int = 5) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = nn.Sequential(nn.Linear(PIXELS, 4), nn.Tanh(), nn.Linear(4, 4))
        super().__init__(network.double(), "double", torch.device("cpu"))
        self.num_logits = 4

    def compute(self, batch: TeacherBatch) -> TeacherOutput:
        weight: Tensor = self.network[0].weight  # type: ignore[index]
        return TeacherOutput(None, 3 * self.network(scaled(batch.inputs, weight)))


class Looking(Coached):
    """Calls `look` with every step before it acts. Class weights are in the precision of the student."""

    look: Callable[[Looking, Step], None] = staticmethod(lambda coached, step: None)

    def start(self, run: Run) -> None:
        super().start(run)
        if run.weights is not None:
            run.weights = run.weights.to(next(run.student.parameters()).dtype)

    def before_step(self, step: Step) -> None:
        self.look(self, step)
        super().before_step(step)


@dataclass(frozen=True)
class Coaching:
    """One training with a coached teacher; `run` makes fresh modules each time, as a new process would."""

    strategy: Literal["online", "meta", "lgtm"] = "lgtm"
    section: CoachedSection = field(default_factory=CoachedSection)
    case: Case = field(default_factory=lambda: Case("kd", norm=False))
    held_out: float | None = 0.2
    learning_rate: float = 1e-3
    teacher_arch: str | None = None
    double: Callable[[], nn.Module] | None = None
    """A student's body in float64, and a teacher in float64."""
    given: Callable[[], NetworkTeacher] | None = None
    """Loads another teacher."""
    layers: int | None = None
    kind: type[Looking] = Looking
    wide: bool = False
    """Weights in float64, so that rounding decides nothing."""

    def with_(self, **keys: Any) -> Coaching:
        """The same with other keys of `[teacher.coached]`."""
        return replace(self, section=CoachedSection.model_validate({**self.section.model_dump(), **keys}))

    def build(self) -> Looking:
        """The strategy with a fresh live teacher."""
        teacher: NetworkTeacher = DoubleTeacher() if self.given is None else self.given()
        if self.double is None and self.given is None:
            case = replace(self.case, arch=self.teacher_arch, seed=5)
            teacher = ModuleTeacher(network(case).double() if self.wide else network(case))
        return self.kind(
            self.strategy,
            self.section,
            live_teacher(teacher, self.layers, self.case.data),
            self.case.data,
            held_out=self.held_out,
            learning_rate=self.learning_rate,
            start_key=teacher.key,
        )

    def run(
        self,
        folder: Path,
        look: Callable[[Looking, Step], None] | None = None,
        progress: Any = None,
        device: str = "cpu",
    ) -> tuple[TrainResult, Student, Looking]:
        """Trains; `look` is called before every step."""
        coached = self.build()
        if look is not None:
            coached.look = look
        student, objective = self.student()
        result = train(
            student,
            objective,
            self.case.data,
            None,
            self.case.section,
            self.case.augmentation,
            folder,
            seed=self.case.seed,
            device=device,
            strategy=coached,
            progress=progress,
        )
        return result, student, coached

    def student(self) -> tuple[Student, Composition]:
        """Fresh student and objective."""
        student, objective, _ = self.case.build()
        if self.double is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(3)
                student = Student("double", self.double(), 5, 4).double()
        return student.double() if self.wide else student, objective


def network(case: Case) -> Student:
    """A student of the case, as somebody's teacher."""
    if case.arch is None:
        return case.build()[0]
    return build_student(StudentSection(arch=case.arch), case.data.input, 4, seed=case.seed, base=Path())


def exact(optimizer: str = "sgd", objective: Any = "kd", **train_keys: Any) -> Coaching:
    """A case in which nothing but the formulas decides: float64, smooth nets, JVP."""
    case = Case(objective, norm=False, data=dataset(60)).with_(
        optimizer=optimizer, schedule="constant", warmup=0.0, epochs=2, batch_size=12, learning_rate=0.05, **train_keys
    )
    section = CoachedSection(derivative="jvp", held_out_batch_size=9, lambda_inf="bilevel")
    return Coaching(section=section, case=case, double=Smooth)


@torch.enable_grad()
def after_a_step(coached: Coached, step: Step) -> float:
    """The held-out loss after a step of a copy of student and optimiser on the teacher's present outputs."""
    run = coached.run
    student, optimizer = copy.deepcopy((run.student, run.optimizer))
    told = coached.teacher(step)
    terms = run.loss_terms(student(step.inputs), told, step.rows, step.number)
    optimizer.zero_grad()
    sum(terms.values()).backward()  # type: ignore[union-attr]
    if run.section.grad_clip is not None:
        nn.utils.clip_grad_norm_(list(student.parameters()), run.section.grad_clip)
    optimizer.step()
    rows, host_rows = coached.held_out_batch(step.number)
    return run.truth(student.eval()(clean(coached, host_rows)).head, rows).item()


def clean(coached: Coached, host_rows: Tensor) -> Tensor:
    """The rows' inputs as the data set has them."""
    return torch.from_numpy(coached.dataset.train.inputs[host_rows.numpy()])


def plain_sgd(coached: Coached) -> None:
    """Gives the run SGD without momentum, which the loop does not have."""
    parameters = coached.run.student.parameters()
    coached.run.optimizer = torch.optim.SGD(parameters, lr=coached.run.section.peak_learning_rate)


def gradient(coached: Coached, step: Step) -> list[Tensor]:
    """grad J by the teacher's weights."""
    *_, value = coached.influence(step)
    return list(torch.autograd.grad(value, coached.learner.parameters_that_learn()))


def bytes_of(folder: Path) -> dict[str, bytes]:
    """The weights in a finished training."""
    return {name: (folder / name).read_bytes() for name in ("student.safetensors", "teacher.safetensors")}
