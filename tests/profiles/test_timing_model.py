"""The work that is counted in a graph: known truths, and rules that hold for every shape."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from profiles.errors import InputError
from profiles.timing_model import OTHER, _axis, _spans, _tiles, priced_graph


def conv_model(
    folder: Path,
    *,
    channels: int = 16,
    made: int = 32,
    kernel: int = 3,
    stride: int = 1,
    groups: int = 1,
    side: int = 9,
) -> Path:
    """A convolution with a Relu."""
    weights = np.ones((made, channels // groups, kernel, kernel), np.float32)
    pads = [kernel // 2] * 4
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["h"], "conv", group=groups, pads=pads, strides=[stride] * 2),
        helper.make_node("Relu", ["h"], ["y"], "relu"),
    ]
    return saved(folder, nodes, {"w": weights}, (channels, side, side), rank=4)


def saved(
    folder: Path, nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray], shape: tuple[int, ...], rank: int
) -> Path:
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *shape])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", *[None] * (rank - 1)])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path = folder / "model.onnx"
    onnx.save(model, str(path))
    return path


def test_the_optimised_graph_is_priced_not_the_file(tmp_path: Path) -> None:
    graph = priced_graph(conv_model(tmp_path))
    assert "Relu" not in [node.operator for node in graph.nodes], "it is fused into the convolution"
    assert any(node.operator == "Conv" for node in graph.nodes)


def test_nodes_are_timed_when_asked(tmp_path: Path) -> None:
    model = conv_model(tmp_path)
    assert all(node.microseconds is None for node in priced_graph(model).nodes)
    assert all(node.microseconds is not None and node.microseconds > 0 for node in priced_graph(model, runs=4).nodes)


def test_a_matrix_product_counts_its_multiplications(tmp_path: Path) -> None:
    model = saved(
        tmp_path,
        [helper.make_node("MatMul", ["x", "w"], ["y"], "product")],
        {"w": np.ones((24, 32), np.float32)},
        (12, 24),
        3,
    )
    (node,) = priced_graph(model, batch=2).nodes
    assert node.kind == "gemm"
    assert node.work["products"] == 2 * 12 * 24 * 32
    assert node.moved == 4 * (2 * 12 * 24 + 24 * 32 + 2 * 12 * 32)


def test_weights_and_living_activations_are_counted(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Exp", ["x"], ["a"], "a"),
        helper.make_node("Tanh", ["a"], ["b"], "b"),
        helper.make_node("Mul", ["b", "w"], ["y"], "c"),
    ]
    graph = priced_graph(saved(tmp_path, nodes, {"w": np.ones((2**18,), np.float32)}, (2**18,), 2))
    assert graph.weight_mib == pytest.approx(1)
    assert graph.activation_mib == pytest.approx(2), "input and output of one node, never three tensors"


def test_an_operator_without_a_rule_is_counted_by_its_bytes(tmp_path: Path) -> None:
    nodes = [helper.make_node("CumSum", ["x", "axis"], ["y"], "sum")]
    (node,) = priced_graph(saved(tmp_path, nodes, {"axis": np.asarray(1, np.int64)}, (64,), 2)).nodes
    assert node.kind == OTHER
    assert node.work["bytes"] >= 2 * 4 * 64


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such model file"):
        priced_graph(tmp_path / "none.onnx")


@settings(deadline=None, max_examples=25)
@given(
    channels=st.sampled_from((1, 3, 4, 8, 12, 16, 24)),
    made=st.sampled_from((4, 8, 12, 16, 40)),
    kernel=st.sampled_from((1, 3, 5)),
    stride=st.sampled_from((1, 2)),
    side=st.integers(1, 19),
    depthwise=st.booleans(),
)
def test_work_is_not_negative_and_grows_with_the_batch(
    tmp_path_factory: pytest.TempPathFactory,
    channels: int,
    made: int,
    kernel: int,
    stride: int,
    side: int,
    depthwise: bool,
) -> None:
    folder = tmp_path_factory.mktemp("conv")
    groups = channels if depthwise else 1
    model = conv_model(
        folder,
        channels=channels,
        made=channels if depthwise else made,
        kernel=kernel,
        stride=stride,
        groups=groups,
        side=side,
    )
    one, four = priced_graph(model).nodes, priced_graph(model, 4).nodes
    assert [node.kind for node in one] == [node.kind for node in four]
    for less, more in zip(one, four, strict=True):
        assert all(0 <= less.work[name] <= more.work[name] for name in less.work)
        assert set(less.work) == set(more.work)
        assert less.moved <= more.moved


@given(read=st.integers(1, 30), kernel=st.integers(1, 7), stride=st.integers(1, 3), data=st.data())
def test_outputs_and_taps_along_an_axis_are_those_of_a_walk(
    read: int, kernel: int, stride: int, data: st.DataObject
) -> None:
    pad = data.draw(st.integers(0, kernel // 2))
    out = (read + 2 * pad - kernel) // stride + 1
    if out < 1:
        return
    outputs, taps = _axis(read, out, kernel, stride, pad)
    inside = [[0 <= o * stride - pad + k < read for k in range(kernel)] for o in range(out)]
    assert taps == sum(map(sum, inside))
    assert outputs.total == out
    assert outputs.inner == sum(map(all, inside))


@given(positions=st.integers(0, 200), filters=st.integers(1, 4))
def test_tiles_take_their_products_at_least(positions: int, filters: int) -> None:
    assert positions * filters / 2 <= _tiles(positions, filters) <= positions * max(filters / 2, 2.0)


@pytest.mark.parametrize(
    ("a", "b", "spans"),
    [
        ((2, 8, 4), (2, 8, 4), 1),
        ((2, 8, 4), (), 1),
        ((2, 8, 4), (4,), 16),
        ((2, 8, 4), (2, 8, 1), 16),
        ((2, 8, 4), (2, 1, 1), 2),
        ((2, 8, 4), (8, 4), 2),
    ],
)
def test_spans_are_the_runs_of_the_inner_loop(a: tuple[int, ...], b: tuple[int, ...], spans: float) -> None:
    assert _spans(a, b, (2, 8, 4)) == spans
    assert math.isclose(_spans(b, a, (2, 8, 4)), spans)
