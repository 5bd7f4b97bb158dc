from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from distill.data.section import AugmentSection
from distill.quantized import RoundedStudent, RoundedWeight, train_quantized
from distill.train_section import TrainSection
from distill.training import train
from profiles.quantspec import QuantSpec
from tests.distill.training_cases import Case, dataset

CPU = QuantSpec(activations="uint8", symmetric=False, weight_limit=64)
GPU = QuantSpec(activations="int8", symmetric=True)


def test_grid_of_folded_weights_is_the_folded_grid() -> None:
    torch.manual_seed(0)
    weight, gain = torch.randn(6, 3, 3, 3), torch.rand(6) * 4 + 0.1
    rounding = RoundedWeight(127, 0)
    folded = rounding(weight * gain.view(-1, 1, 1, 1))
    assert torch.allclose(folded, rounding(weight) * gain.view(-1, 1, 1, 1), atol=1e-6)


def test_gradient_passes_the_rounding_straight_through() -> None:
    weight = torch.randn(4, 5, requires_grad=True)
    RoundedWeight(127, 0)(weight).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.ones(4, 5))


def test_rounded_student_computes_on_its_grid_and_keeps_the_plain_weights() -> None:
    student, _, _ = Case().build()
    for spec in (CPU, GPU):
        rounded = RoundedStudent(student, spec).train()
        images = torch.from_numpy(dataset().train.inputs[:32])
        rounded(images)
        plain, coarse = student.eval()(images).head, rounded.eval()(images).head
        assert not torch.equal(plain, coarse)
        assert torch.allclose(plain, coarse, atol=0.15 * plain.abs().max().item())
        weights = rounded.weights()
        assert weights.keys() == student.state_dict().keys()
        assert all(torch.equal(value, weights[name]) for name, value in student.state_dict().items())
        convolution = rounded.student.body.layers[0]
        assert len(torch.unique(convolution.weight[0])) <= 2 * spec.weight_limit + 1


def test_training_gets_a_student_with_wide_channels_back(tmp_path: Path) -> None:
    case = Case(objective="kd", augmentation=AugmentSection(), views=1, norm=False)
    student, objective, teacher = case.build()
    section = TrainSection(epochs=12, batch_size=16, learning_rate=0.02)
    train(student, objective, case.data, teacher, section, case.augmentation, tmp_path / "student")
    with torch.no_grad():
        first, second = student.body.layers[0], student.body.layers[2]
        first.weight[:2] *= 3000
        first.bias[:2] *= 3000
        second.weight[:, :2] /= 3000
    before = {name: value.clone() for name, value in student.state_dict().items()}

    def right(network: nn.Module) -> float:
        validation = case.data.validation
        with torch.no_grad():
            logits = network(torch.from_numpy(validation.inputs)).head
        return float((logits.argmax(1).numpy() == validation.labels).mean())

    def rounded(network: nn.Module) -> float:
        coarse = RoundedStudent(network, GPU).train()
        coarse(torch.from_numpy(case.data.train.inputs))
        return right(coarse.eval())

    assert right(student) > 0.9
    untrained = rounded(student)
    assert untrained < 0.8
    trained, result = train_quantized(
        student, objective, case.data, teacher, section, case.augmentation, tmp_path / "qat", spec=GPU, epochs=10
    )
    assert rounded(trained) > untrained + 0.1
    assert result.epochs == 10
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert not any("parametrizations" in name for name in trained.state_dict())
    again, _ = train_quantized(
        student, objective, case.data, teacher, section, case.augmentation, tmp_path / "qat", spec=GPU, epochs=10
    )
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in trained.state_dict().items())


def test_batch_normalisation_stands_still(tmp_path: Path) -> None:
    case = Case()
    student, objective, teacher = case.build()
    trained, _ = train_quantized(
        student, objective, case.data, teacher, case.section, case.augmentation, tmp_path, spec=CPU, epochs=1
    )
    for name, value in student.state_dict().items():
        if "running" in name or "num_batches" in name:
            assert torch.equal(value, trained.state_dict()[name])
    assert not torch.equal(student.head.weight, trained.head.weight)


def test_texts_train_the_same_way(tmp_path: Path) -> None:
    case = Case(data=dataset(tokens=True), augmentation=AugmentSection(), views=1)
    student, objective, teacher = case.build()
    _, result = train_quantized(
        student, objective, case.data, teacher, case.section, case.augmentation, tmp_path, spec=CPU, epochs=1
    )
    assert result.metric.value >= 0
