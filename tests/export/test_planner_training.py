"""The planner's last resort with the real quantisation-aware training behind it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distill.data.section import AugmentSection
from distill.quantized import train_quantized
from distill.students import Student
from distill.train_section import TrainSection
from distill.training import train
from export import Plan, plan
from profiles.metrics import Metric, evaluate
from profiles.quantspec import QuantSpec
from profiles.runtimes.onnxruntime import run_model
from tests.distill.training_cases import Case
from tests.export.conftest import device_and_stack

WIDE = 850.0


class Squared(nn.Module):
    """Squares between its convolutions, through which no scale is taken; two channels are then `WIDE` times wider."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first((x.float() - 100) / 50))
        return torch.relu(self.second(y * y)).mean((2, 3))

    @torch.no_grad()
    def widen(self) -> None:
        for channel in (1, 5):
            self.first.weight[channel] *= WIDE**0.5
            self.first.bias[channel] *= WIDE**0.5
            self.second.weight[:, channel] /= WIDE


class Logits(nn.Module):
    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student

    def forward(self, image: Tensor) -> Tensor:
        return self.student(image).head


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tmp_path_factory.mktemp("training")
    case = Case(augmentation=AugmentSection(), views=1)
    _, objective, teacher = case.build()
    torch.manual_seed(0)
    student = Student("squared", Squared(), 12, 4)
    section = TrainSection(epochs=12, batch_size=16, learning_rate=0.01)
    train(student, objective, case.data, teacher, section, case.augmentation, folder / "student", device="cpu")
    student.body.widen()
    validation = case.data.validation

    def score(file: Path) -> Metric:
        return evaluate("multiclass", run_model(file, {"image": validation.inputs})["logits"], validation.labels)

    def retrain(spec: QuantSpec) -> tuple[nn.Module, str]:
        trained, _ = train_quantized(
            student, objective, case.data, teacher, section, case.augmentation, folder / "qat",
            spec=spec, epochs=30, device="cpu",
        )  # fmt: skip
        return Logits(trained).eval(), "trained"

    device, stack = device_and_stack("this-machine")
    return plan(
        Logits(student.cpu().eval()).eval(), held_out=np.asarray(validation.inputs),
        calibration=np.asarray(case.data.train.inputs), stack=stack, device=device, folder=folder / "exports",
        model_key="squared", score=score, retrain=retrain,
    )  # fmt: skip


def test_training_through_rounded_weights_rescues_what_nothing_else_does(found: Plan) -> None:
    names = [step.name for step in found.steps]
    trained = names.index("quantisation-aware training")
    before = [step for step in found.steps[:trained] if step.name.startswith("int8") and step.name != "int8-mixed"]
    assert len(before) >= 4
    assert not any(step.keeps for step in before)
    after = next(step for step in found.steps[trained:] if step.name == "int8-qat")
    assert after.keeps
    assert after.metric is not None
    assert after.metric.value > max(step.metric.value for step in before if step.metric is not None) + 0.2
    integer, total = str(found["int8-qat"].compute_precision).split()[1:4:2]
    assert integer == total
