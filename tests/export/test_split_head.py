"""Students whose head predicts subclasses: the log-sum-exp at the end of their graphs, in every form and precision."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from distill.objectives.lelp import LELP
from distill.objectives.section import LELPSection, SubclassSection
from distill.objectives.subclass import Subclass
from export import tensorrt
from export.onnx import export_graph
from export.parity import agreement, emulate, emulate_half, open_session, relative_error, run_session, run_torch
from export.precision import quantization_for, quantize, to_fp16
from export.section import ExportSection
from profiles.device import Device, Stack
from profiles.errors import EdgestillError
from tests.distill.objective_cases import shapes
from tests.export.conftest import IMAGES, LABELS, device_and_stack, plan_for
from tests.export.models import TinyConv, calibration, samples

TAIL = ("ReduceMax", "Sub", "Div", "Exp", "ReduceSum", "Log", "Mul", "Squeeze", "Add")
CASES = [
    ("lelp", "this-machine", ["int8"]),
    ("subclass", "raspberry-pi-5", ["int8"]),
    ("lelp at tau 2", "jetson-orin-nano", ["fp16", "int8-fp16", "int8-fp32"]),
]
TAUS = {2: 0.5, 16: 1.0}
"""Subclasses per class and temperature of the students that are quantised in every form."""
FORMS = {
    "u8s8": lambda: quantization_for(*x86("vnni")),
    "u8s8, 7-bit weights": lambda: quantization_for(*x86("avx2")),
    "s8s8": lambda: quantization_for(*device_and_stack("raspberry-pi-5")),
    "symmetric": lambda: quantization_for(*device_and_stack("rtx-4060-laptop")),
}


def x86(isa: str) -> tuple[Device, Stack]:
    device, stack = device_and_stack("this-machine")
    return device.model_copy(update={"isa": ("avx2", isa)}), stack.model_copy(update={"dialect": "qdq-u8s8"})


class Split(nn.Module):
    """A TinyConv with S outputs per class and the objective's reading of them, as the pipeline exports it."""

    def __init__(self, subclasses: int, class_logits: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.student = TinyConv()
        self.student.head = nn.Linear(16, 4 * subclasses)
        self.class_logits = class_logits

    def forward(self, image: Tensor) -> Tensor:
        return self.class_logits(self.student(image))


@cache
def student(kind: str, subclasses: int, tau: float) -> Split:
    """Trained for a second on the class logits at temperature tau; nearly always right."""
    torch.manual_seed(0)
    if kind == "lelp":
        section = LELPSection(subclasses_per_class=subclasses, tau=tau)
        model = Split(subclasses, LELP(section, shapes(classes=4, teacher_logits=4, teacher_dim=40)).class_logits)
    else:
        plain = SubclassSection(subclasses_per_class=subclasses, tau=tau)
        model = Split(subclasses, Subclass(plain, shapes(classes=4, subclasses=subclasses)).class_logits)
    images, labels = (torch.from_numpy(array) for array in samples(512, 1))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(60):
        rows = torch.arange(64) + 64 * (step % 8)
        loss = nn.functional.cross_entropy(model(images[rows]) / tau, labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def head(name: str) -> Split:
    return student("subclass", 2, 1.0) if name == "subclass" else student("lelp", 4, 2.0 if "tau" in name else 1.0)


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """FP32 graphs of two and of sixteen subclasses."""
    folder = tmp_path_factory.mktemp("graphs")
    return {count: exported(student("lelp", count, tau), folder / f"{count}.onnx") for count, tau in TAUS.items()}


def exported(model: Split, path: Path, opset: int = 20) -> Path:
    export_graph(model, {"image": torch.from_numpy(IMAGES[:2])}, path, opset=opset)
    return path


@pytest.mark.parametrize(("name", "device", "beside_fp32"), CASES)
def test_every_precision_of_a_split_head_is_usable(
    name: str, device: str, beside_fp32: list[str], tmp_path: Path
) -> None:
    found = plan_for(device, tmp_path, model=head(name), score=None)
    assert [candidate.name for candidate in found.usable] == ["fp32", *beside_fp32]
    for candidate in found.usable:
        assert all(rung.passed for rung in candidate.parity)
        (last,) = candidate.parity[-1:]
        assert last.agreement > 0.98
        assert last.relative < (0.2 if candidate.precision == "int8" else 2e-3)
        if candidate.parsed_by is not None:
            assert candidate.parsed_by.startswith("parsed by")


@pytest.mark.parametrize("subclasses", TAUS)
@pytest.mark.parametrize("form", FORMS)
def test_the_log_sum_exp_stays_in_float(graphs: dict[int, Path], subclasses: int, form: str, tmp_path: Path) -> None:
    model = student("lelp", subclasses, TAUS[subclasses])
    quantize(graphs[subclasses], tmp_path / "int8.onnx", {"image": calibration()}, FORMS[form](), ExportSection())
    nodes = onnx.load(str(tmp_path / "int8.onnx")).graph.node
    tail = next(position for position, node in enumerate(nodes) if node.op_type == "ReduceMax")
    assert {node.op_type for node in nodes[tail:]} <= set(TAIL)
    # TensorRT's form rounds what nodes with weights read, the others what they write, too
    assert sum(node.op_type == "QuantizeLinear" for node in nodes) >= (4 if form == "symmetric" else 7)
    emulate(tmp_path / "int8.onnx", tmp_path / "emulated.onnx")
    reference = run_torch(model, {"image": IMAGES})
    found = run_session(open_session(tmp_path / "emulated.onnx"), {"image": IMAGES}, 64)
    assert agreement(reference, found, exclusive=True) > 0.98
    assert np.mean(found.argmax(1) == LABELS) > 0.95
    assert np.sqrt(np.mean((found - reference) ** 2)) < 0.02 * np.abs(reference).max()


def test_fp16_of_a_small_temperature_does_not_overflow(tmp_path: Path) -> None:
    model = student("lelp", 4, 0.5)
    cold = Split(
        4, LELP(LELPSection(subclasses_per_class=4, tau=0.0001), shapes(classes=4, teacher_dim=40)).class_logits
    )
    cold.student = model.student
    graph = exported(cold.eval(), tmp_path / "fp32.onnx")
    to_fp16(graph, tmp_path / "fp16.onnx")
    emulate_half(tmp_path / "fp16.onnx", tmp_path / "rounded.onnx")
    reference = run_torch(cold, {"image": IMAGES})
    assert np.abs(run_torch(cold.student, {"image": IMAGES})).max() / 0.0001 > 65504
    found = run_session(open_session(tmp_path / "rounded.onnx"), {"image": IMAGES}, 64)
    assert relative_error(reference, found)[1] < 2e-3


def test_the_oldest_operator_set_computes_the_same(tmp_path: Path) -> None:
    model = head("lelp at tau 2")
    graph = exported(model, tmp_path / "fp32.onnx", opset=13)
    reference = run_torch(model, {"image": IMAGES})
    assert relative_error(reference, run_session(open_session(graph), {"image": IMAGES}, 64))[1] < 1e-5
    quantize(graph, tmp_path / "int8.onnx", {"image": calibration()}, FORMS["symmetric"](), ExportSection())
    emulate(tmp_path / "int8.onnx", tmp_path / "emulated.onnx")
    found = run_session(open_session(tmp_path / "emulated.onnx"), {"image": IMAGES}, 64)
    assert agreement(reference, found, exclusive=True) > 0.98
    if adapter := tensorrt.load_adapter(rtx=True):
        assert tensorrt.parse(adapter, graph) is None
        assert tensorrt.parse(adapter, tmp_path / "int8.onnx") is None


class Residual(nn.Module):
    """Has no Linear: it ends in the average of a sum."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(1, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 1, 1)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.relu(self.first(image.to(torch.float32) / 255))
        return nn.functional.adaptive_avg_pool2d(x + torch.relu(self.last(x)), 1).flatten(1)


def test_what_directly_follows_the_last_convolution_is_quantised(tmp_path: Path) -> None:
    export_graph(Residual().eval(), {"image": torch.from_numpy(IMAGES[:2])}, tmp_path / "fp32.onnx", opset=20)
    quantize(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", {"image": calibration()}, FORMS["s8s8"](), ExportSection())
    model = onnx.load(str(tmp_path / "int8.onnx"))
    producers = {name: node.op_type for node in model.graph.node for name in node.output}
    (add,) = [node for node in model.graph.node if node.op_type == "Add"]
    assert {producers[name] for name in add.input} == {"DequantizeLinear"}


def test_a_quantiser_that_fails_names_itself_and_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise TypeError("object of type 'NoneType' has no len()")

    monkeypatch.setattr("onnxruntime.quantization.qdq_quantizer.QDQQuantizer", broken)
    found = plan_for("this-machine", tmp_path, score=None, difference=None)  # precision "auto"
    refused = "ONNX Runtime's quantiser cannot quantise the graph: TypeError: object of type 'NoneType' has no len()"
    assert found["int8"].refused == refused
    with pytest.raises(EdgestillError, match="quantiser") as caught:
        plan_for("this-machine", tmp_path, score=None, difference=None, precisions=("int8",))
    assert "TypeError" in str(caught.value.evidence)
