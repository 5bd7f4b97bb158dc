"""Equalisation and bias correction of linear layers, as a transformer's export has them: MatMul and Add."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from distill.data.dataset import InputSpec
from distill.students import build_student
from distill.students.section import StudentSection
from export.equalise import channel_means, correct_biases, equalise
from export.onnx import export_graph, write
from export.parity import emulate, open_session, relative_error, run_session, spread_error
from export.precision import Quantizer, quantization_for
from tests.export.conftest import device_and_stack

TOKENS = {"tokens": np.random.default_rng(0).integers(0, 40, (96, 10))}
WIDE = 500.0


class Logits(nn.Module):
    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student

    def forward(self, tokens: Tensor) -> Tensor:
        return self.student(tokens).head


@torch.no_grad()
def transformer() -> nn.Module:
    """A text student with wide channels behind a normalisation and inside the ReLU network of its block."""
    spec = InputSpec("tokens", (10,), vocabulary=40, pad_id=0)
    student = build_student(StudentSection(), spec, 3, arch="text-w16-d1-h2", seed=0, base=Path())
    block = student.body.blocks[0]
    for vector in [parameter for parameter in student.parameters() if parameter.dim() == 1]:
        vector.add_(0.1 * torch.randn(vector.shape, generator=torch.Generator().manual_seed(len(vector))))
    block.norm2.weight[3] *= WIDE
    block.norm2.bias[3] *= WIDE
    block.hidden.weight[:, 3] /= WIDE
    block.hidden.weight[7] *= WIDE
    block.hidden.bias[7] *= WIDE
    block.project.weight[:, 7] /= WIDE
    return Logits(student).eval()


@pytest.fixture(scope="module")
def quantizer(tmp_path_factory: pytest.TempPathFactory) -> Quantizer:
    path = tmp_path_factory.mktemp("linear") / "model.onnx"
    export_graph(transformer(), {"tokens": torch.from_numpy(TOKENS["tokens"][:2])}, path, opset=20)
    return Quantizer(path, TOKENS, quantization_for(*device_and_stack("rtx-4060-laptop")), 99.99)


def logits(model: onnx.ModelProto, folder: Path) -> NDArray[np.float32]:
    write(model, folder / "run.onnx")
    emulate(folder / "run.onnx", folder / "run.onnx")
    return run_session(open_session(folder / "run.onnx"), TOKENS, 96)


def test_wide_channels_between_linear_layers_are_scaled_back(quantizer: Quantizer, tmp_path: Path) -> None:
    found = equalise(quantizer.prepared, TOKENS)
    # behind both normalisations of the block and the last one, and between the layers of the ReLU network
    assert found.groups == 4
    assert set(found.stopped) == {"Reshape", "LayerNormalization"}  # into heads; the residual sum
    expected = logits(quantizer.prepared, tmp_path)
    assert relative_error(expected, logits(found.model, tmp_path))[1] < 1e-4
    plain = spread_error(expected, logits(quantizer.quantized("minmax"), tmp_path))
    scaled = spread_error(expected, logits(quantizer.of(found.model).quantized("minmax"), tmp_path))
    assert plain > 0.2
    assert scaled < plain / 3


def test_biases_of_linear_layers_take_their_mean_errors_back(quantizer: Quantizer) -> None:
    quantized = quantizer.quantized("minmax")
    changed, count = correct_biases(quantizer.prepared, quantized, TOKENS)
    assert count == 7  # query, key, value, out, hidden, project, head
    corrected = quantizer.of(changed, keep_ranges=True).quantized("minmax")
    sums = {node.output[0]: 2 for node in quantizer.prepared.graph.node if node.output[0].startswith("linear")}
    assert len(sums) == 6
    wanted = channel_means(quantizer.prepared, sums, TOKENS)

    def off(model: onnx.ModelProto) -> float:
        means = channel_means(model, sums, TOKENS)
        return float(np.mean([np.abs(means[name] - wanted[name]).mean() for name in sums]))

    assert off(corrected) < off(quantized) / 3


def test_an_activation_that_passes_no_scale_is_named(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    rows = np.random.default_rng(0).standard_normal((16, 5, 4)).astype(np.float32)
    export_graph(model, {"x": torch.from_numpy(rows[:2])}, tmp_path / "m.onnx", opset=20)
    form = quantization_for(*device_and_stack("this-machine"))
    found = equalise(Quantizer(tmp_path / "m.onnx", {"x": rows}, form, 99.99).prepared, {"x": rows})
    assert found.groups == 1
    assert found.stopped == {"Gelu": 1}
