from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from export import Plan, tensorrt
from export.onnx import export_graph
from export.parity import agreement, emulate, open_session, run_session
from export.precision import quantization_for, quantize, to_fp16, types_of
from export.preflight import preflight
from export.section import ExportSection
from profiles.errors import EdgestillError
from tests.export.conftest import IMAGES, device_and_stack
from tests.export.models import calibration

SAMPLES = {"image": IMAGES}


@pytest.fixture(scope="module")
def trt_int8(fp32_graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("precision") / "trt.onnx"
    form = quantization_for(*device_and_stack("rtx-4060-laptop"))
    quantize(fp32_graph, path, {"image": calibration()}, form, ExportSection())
    return path


def zero_points(path: Path) -> list[onnx.TensorProto]:
    model = onnx.load(str(path))
    names = {node.input[2] for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")}
    return [tensor for tensor in model.graph.initializer if tensor.name in names]


@pytest.mark.parametrize("method", ["minmax", "entropy", "percentile"])
def test_every_calibration_method_keeps_the_decisions(fp32_graph: Path, tmp_path: Path, method: str) -> None:
    form = quantization_for(*device_and_stack("this-machine"))
    section = ExportSection.model_validate({"calibration_method": method})
    quantize(fp32_graph, tmp_path / "int8.onnx", {"image": calibration()}, form, section)
    reference = run_session(open_session(fp32_graph), SAMPLES, 64)
    found = run_session(open_session(tmp_path / "int8.onnx"), SAMPLES, 64)
    assert agreement(reference, found, exclusive=True) > 0.95


def test_x86_graph_has_unsigned_activations_and_reduced_weights_without_vnni(fp32_graph: Path, tmp_path: Path) -> None:
    device, stack = device_and_stack("this-machine")
    x86 = stack.model_copy(update={"dialect": "qdq-u8s8"})
    old = quantization_for(device.model_copy(update={"isa": ("avx2",)}), x86)
    new = quantization_for(device.model_copy(update={"isa": ("avx2", "avx512", "vnni")}), x86)
    assert (old.reduce_range, new.reduce_range) == (True, False)
    quantize(fp32_graph, tmp_path / "u8.onnx", {"image": calibration()}, old, ExportSection())
    assert onnx.TensorProto.UINT8 in {tensor.data_type for tensor in zero_points(tmp_path / "u8.onnx")}
    weights = [
        onnx.numpy_helper.to_array(tensor)
        for tensor in onnx.load(str(tmp_path / "u8.onnx")).graph.initializer
        if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) == 4
    ]
    assert weights
    assert max(np.abs(weight.astype(int)).max() for weight in weights) <= 64


def test_tensorrt_graph_is_symmetric_without_quantised_bias(trt_int8: Path) -> None:
    found = zero_points(trt_int8)
    assert {tensor.data_type for tensor in found} == {onnx.TensorProto.INT8}
    assert not any(np.any(onnx.numpy_helper.to_array(tensor)) for tensor in found)


def test_int8_graph_parses_in_tensorrt_and_the_x86_one_does_not(trt_int8: Path, cpu_plan: Plan) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (extra tensorrt-rtx)")
    adapter = tensorrt.load_adapter(rtx=True)
    assert adapter is not None
    assert tensorrt.parse(adapter, trt_int8) is None
    x86 = cpu_plan["int8"].file
    assert x86 is not None
    assert tensorrt.parse(adapter, x86) is not None
    # preflight says the same without the parser
    device, stack = device_and_stack("rtx-4060-laptop")
    assert any(found.level == "refused" for found in preflight(x86, device, stack))
    assert not any(found.level == "refused" for found in preflight(trt_int8, device, stack))


def test_pixels_and_their_normalisation_stay_in_float(trt_int8: Path) -> None:
    nodes = {node.output[0]: node for node in onnx.load(str(trt_int8)).graph.node}
    first = next(node for node in nodes.values() if node.op_type == "QuantizeLinear" and node.input[0] in nodes)
    assert nodes[first.input[0]].op_type in ("Div", "Mul", "Sub")


@pytest.mark.parametrize("half", [False, True])
def test_emulated_graph_computes_what_the_quantised_one_says(trt_int8: Path, tmp_path: Path, half: bool) -> None:
    graph = trt_int8
    if half:
        graph = tmp_path / "half.onnx"
        to_fp16(trt_int8, graph)
    emulate(graph, tmp_path / "emulated.onnx")
    written = run_session(open_session(graph, optimised=False), SAMPLES, 64)
    emulated = run_session(open_session(tmp_path / "emulated.onnx"), SAMPLES, 64)
    step = np.abs(written).max() / 127
    assert np.abs(written - emulated).max() <= 2 * step
    assert agreement(written, emulated, exclusive=True) > 0.99


def test_fp16_graph_keeps_its_interface(fp32_graph: Path, tmp_path: Path) -> None:
    to_fp16(fp32_graph, tmp_path / "half.onnx")
    model = onnx.load(str(tmp_path / "half.onnx"))
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert model.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert {tensor.data_type for tensor in model.graph.initializer} & {onnx.TensorProto.FLOAT16}
    assert types_of(model) == "fp16"


def test_graph_without_anything_to_quantise_is_refused(tmp_path: Path) -> None:
    class Scale(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2.0

    export_graph(Scale().eval(), {"x": torch.ones(2, 3)}, tmp_path / "scale.onnx", opset=20)
    form = quantization_for(*device_and_stack("this-machine"))
    with pytest.raises(EdgestillError, match="nothing to quantise"):
        quantize(
            tmp_path / "scale.onnx", tmp_path / "q.onnx", {"x": np.ones((4, 3), np.float32)}, form, ExportSection()
        )


def test_casts_around_operators_that_stay_in_fp32_are_put_in_order(tmp_path: Path) -> None:
    class Clamped(torch.nn.Module):
        """Max stays in FP32, so the converter wraps it in Casts, which it appends at the graph's end."""

        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(x / x.sum(1, keepdim=True).clamp(min=1.0))

    export_graph(Clamped().eval(), {"x": torch.ones(2, 4)}, tmp_path / "clamped.onnx", opset=20)
    to_fp16(tmp_path / "clamped.onnx", tmp_path / "half.onnx")
    assert open_session(tmp_path / "half.onnx") is not None
