from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from profiles import predict
from profiles.device import Device, load_device
from profiles.errors import InputError
from profiles.predict import node_costs, roofline

FLOAT = TensorProto.FLOAT


def save(
    path: Path,
    nodes: list[Any],
    inputs: dict[str, list[Any]],
    outputs: dict[str, list[Any] | None],
    constants: dict[str, np.ndarray[Any, Any]],
    type_: int = FLOAT,
) -> Path:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, type_, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, type_, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, str(path))
    return path


def device(**facts: Any) -> Device:
    base = load_device("t4").model_dump()
    peaks = ("fp32_tflops", "tf32_tflops", "fp16_tflops", "int8_tops", "fp8_tflops", "fp4_tflops", "bandwidth_gb_s")
    return Device.model_validate({**base, **dict.fromkeys(peaks), "evidence": {}, "name": "paper", **facts})


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 5),
    groups=st.sampled_from([1, 2, 4]),
    width=st.integers(1, 3),
    out=st.integers(1, 3),
    size=st.integers(5, 17),
    kernel=st.integers(1, 5),
    stride=st.integers(1, 3),
    bias=st.booleans(),
)
def test_convolution_operations_follow_the_hand_formula(
    tmp_path: Path, batch: int, groups: int, width: int, out: int, size: int, kernel: int, stride: int, bias: bool
) -> None:
    channels, filters = groups * width, groups * out
    weights: dict[str, np.ndarray[Any, Any]] = {"w": np.zeros((filters, width, kernel, kernel), np.float32)}
    if bias:
        weights["b"] = np.zeros(filters, np.float32)
    node = helper.make_node("Conv", ["x", *weights], ["y"], group=groups, strides=[stride, stride])
    path = save(
        tmp_path / "conv.onnx",
        [node],
        {"x": ["batch", channels, size, size]},
        {"y": ["batch", filters, None, None]},
        weights,
    )
    (cost,) = node_costs(path, batch)
    side = (size - kernel) // stride + 1
    multiply_adds = 0
    for _ in range(batch * filters * side * side):  # one output value at a time
        multiply_adds += width * kernel * kernel
    assert cost.flops == 2 * multiply_adds + (batch * filters * side * side if bias else 0)
    assert cost.matrix
    assert cost.weight_bytes == 4 * sum(array.size for array in weights.values())
    assert cost.activation_bytes == 4 * batch * (channels * size * size + filters * side * side)


def test_attention_as_matrix_products_with_softmax(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["q", "k"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["p"]),
        helper.make_node("MatMul", ["p", "v"], ["y"]),
    ]
    path = save(
        tmp_path / "attention.onnx",
        nodes,
        {"q": ["n", 4, 16, 8], "k": ["n", 4, 8, 16], "v": ["n", 4, 16, 8]},
        {"y": ["n", 4, 16, 8]},
        {},
    )
    assert [cost.flops for cost in node_costs(path, 2)] == [
        2 * 2 * 4 * 16 * 16 * 8,
        2 * 4 * 16 * 16,
        2 * 2 * 4 * 16 * 8 * 16,
    ]


def test_gemm_transposed_or_not_and_einsum_agree(tmp_path: Path) -> None:
    expected = 2 * 3 * 20 * 10
    weights = np.zeros((10, 20), np.float32)
    gemm = helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)
    einsum = helper.make_node("Einsum", ["x", "w"], ["y"], equation="bi,oi->bo")
    for node in (gemm, einsum):
        path = save(tmp_path / "m.onnx", [node], {"x": ["b", 20]}, {"y": ["b", 10]}, {"w": weights})
        assert [cost.flops for cost in node_costs(path, 3)] == [expected]


def test_quantised_weights_count_their_stored_bytes(tmp_path: Path) -> None:
    constants: dict[str, np.ndarray[Any, Any]] = {
        "wq": np.zeros((8, 3, 3, 3), np.int8),
        "scale": np.ones(8, np.float32),
        "zero": np.zeros(8, np.int8),
    }
    nodes = [
        helper.make_node("DequantizeLinear", list(constants), ["w"], axis=0),
        helper.make_node("Conv", ["x", "w"], ["y"]),
    ]
    path = save(tmp_path / "q.onnx", nodes, {"x": ["n", 3, 8, 8]}, {"y": ["n", 8, 6, 6]}, constants)
    dequantise, convolution = node_costs(path, 1)
    assert dequantise.weight_bytes == 8 * 27 + 8 * 4 + 8
    assert convolution.weight_bytes == 0
    assert convolution.flops == 2 * 8 * 36 * 27


def test_weights_that_two_nodes_share_are_read_once(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("MatMul", ["h", "w"], ["y"])]
    path = save(tmp_path / "s.onnx", nodes, {"x": ["n", 6]}, {"y": ["n", 6]}, {"w": np.zeros((6, 6), np.float32)})
    assert [cost.weight_bytes for cost in node_costs(path)] == [144, 0]


def test_the_bound_is_operations_over_peak(tmp_path: Path) -> None:
    path = save(
        tmp_path / "m.onnx",
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        {"x": ["n", 1000]},
        {"y": ["n", 1000]},
        {"w": np.zeros((1000, 1000), np.float32)},
    )
    found = roofline(path, device(fp32_tflops=2.0, bandwidth_gb_s=100), "fp32", batch=4)
    assert found.flops == found.matrix_flops == 8_000_000
    assert found.bound_ms == pytest.approx(8e6 / 2e12 * 1e3)
    assert found.limiting == "compute"
    assert found.bytes == 4 * (1_000_000 + 2 * 4 * 1000)


def test_a_model_that_no_cache_holds_is_bound_by_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict, "ON_CHIP_BYTES", 1000)  # a model of 64 MiB would only make the test slow
    side = 60
    path = save(
        tmp_path / "m.onnx",
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        {"x": ["n", side]},
        {"y": ["n", side]},
        {"w": np.zeros((side, side), np.float32)},
    )
    found = roofline(path, device(fp32_tflops=100.0, bandwidth_gb_s=10), "fp32")
    assert found.limiting == "memory"
    assert found.bound_ms == pytest.approx((found.bytes - 1000) / 10e9 * 1e3)
    alone = roofline(path, device(fp32_tflops=100.0), "fp32")
    assert alone.limiting == "compute"
    assert alone.missing == ("memory bandwidth of paper",)
    other = roofline(path, device(bandwidth_gb_s=10), "fp32")
    assert other.limiting == "memory"
    assert other.missing == ("fp32 peak of paper",)
    none = roofline(path, device(), "fp32")
    assert none.bound_ms is None
    assert len(none.missing) == 2


def test_an_operator_that_cannot_be_priced_is_named(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Det", ["h3"], ["d"]),
        helper.make_node("Reshape", ["h", "shape"], ["h3"]),
        helper.make_node("Add", ["h", "d1"], ["y"]),
        helper.make_node("Reshape", ["d", "one"], ["d1"]),
    ]
    order = [nodes[0], nodes[2], nodes[1], nodes[4], nodes[3]]
    constants: dict[str, np.ndarray[Any, Any]] = {
        "w": np.zeros((4, 4), np.float32),
        "shape": np.array([-1, 2, 2], np.int64),
        "one": np.array([-1, 1], np.int64),
    }
    path = save(tmp_path / "u.onnx", order, {"x": ["n", 4]}, {"y": ["n", 4]}, constants)
    found = roofline(path, device(fp32_tflops=1.0), "fp32")
    assert found.unpriced == ("Det",)
    assert found.matrix_flops == 2 * 4 * 4


@pytest.mark.parametrize("content", [None, b"", b"not a model at all"])
def test_what_is_no_model_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "m.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        node_costs(path)
    assert caught.value.where == str(path)
