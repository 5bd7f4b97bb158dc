from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.preflight import activation_bytes, graph_precisions, preflight, refusal
from tests.export.conftest import device_and_stack


def tiny_graph(zero: TensorProto.DataType | None = None, *, opset: int = 20, operator: str = "Relu") -> onnx.ModelProto:
    """x (1, 4) through one operator, quantised with a zero point of type `zero` before it."""
    nodes, constants, last = [], [], "x"
    if zero is not None:
        constants.append(numpy_helper.from_array(np.array(0.1, np.float32), "scale"))
        constants.append(helper.make_tensor("zero", zero, [], [0]))
        nodes.append(helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]))
        nodes.append(helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"]))
        last = "d"
    nodes.append(helper.make_node(operator, [last], ["y"]))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])
    graph = helper.make_graph(nodes, "g", [x], [y], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def reason(model: onnx.ModelProto, device: str, stack: str | None = None) -> str:
    return str(refusal(preflight(model, *device_and_stack(device, stack))))


def test_plain_graph_passes_everywhere() -> None:
    for device in ("this-machine", "rtx-a2000", "jetson-orin-nano", "raspberry-pi-5"):
        assert reason(tiny_graph(), device) == "None"


def test_fp8_below_sm89_is_refused_by_its_fact() -> None:
    model = tiny_graph(TensorProto.FLOAT8E4M3FN)
    assert graph_precisions(model) == ("fp32", "fp8")
    assert "cannot compute in FP8: compute capability 8.6; FP8 needs 8.9 or higher" in reason(model, "rtx-a2000")
    assert reason(model, "rtx-4060-laptop") == "None"


def test_int8_on_sm53_is_refused() -> None:
    assert "compute capability 5.3; INT8 needs 6.1" in reason(tiny_graph(TensorProto.INT8, opset=13), "jetson-nano")


def test_unsigned_or_int32_quantisation_is_refused_for_tensorrt_only() -> None:
    model = tiny_graph(TensorProto.UINT8)
    model.graph.initializer[1].CopyFrom(helper.make_tensor("zero", TensorProto.UINT8, [], [128]))
    assert "non-zero zero point" in reason(model, "jetson-orin-nano")
    assert reason(model, "this-machine") == "None"


def test_bf16_on_a_turing_card_is_refused() -> None:
    model = tiny_graph()
    model.graph.initializer.append(helper.make_tensor("w", TensorProto.BFLOAT16, [1], [1.0]))
    assert "BF16 needs 8.0" in reason(model, "t4")


def test_opset_and_ir_version_beyond_the_stack_are_refused() -> None:
    assert "opset 23; tensorrt 10.3.0 reads up to 20" in reason(tiny_graph(opset=23), "jetson-orin-nano", "jetpack-6.2")
    model = tiny_graph()
    model.ir_version = 99
    assert "IR version 99" in reason(model, "jetson-orin-nano")


def test_operator_that_tensorrt_8_does_not_know_is_named() -> None:
    assert "HardSwish" in reason(tiny_graph(operator="HardSwish", opset=14), "jetson-nano")


def test_activations_of_a_large_batch_are_refused_and_of_a_small_one_pass(fp32_graph: Path) -> None:
    device, stack = device_and_stack("jetson-orin-nano")
    # per sample: 256 pixels of one byte, and 8 channels of 8 x 8 in FP32
    assert activation_bytes(onnx.load(str(fp32_graph)), 3) == 3 * (256 + 4 * 8 * 64)
    assert refusal(preflight(fp32_graph, device, stack, batch=1024)) is None
    refused = str(refusal(preflight(fp32_graph, device, stack, batch=2**22)))
    assert "at least 9.0 GiB of activations at batch 4194304, 8 GiB of memory" in refused


def test_model_larger_than_the_memory_is_refused(tmp_path: Path) -> None:
    model = tiny_graph()
    huge = model.graph.initializer.add()
    huge.name, huge.data_type = "w", TensorProto.FLOAT
    huge.dims.extend([3 * 2**10, 2**20])  # 12 GiB by its shape, no bytes needed
    assert "does not fit the memory: 12.0 GiB of weights" in reason(model, "jetson-orin-nano")
