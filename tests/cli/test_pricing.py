"""What the members of a pool cost before anything is trained: on this machine, by its calibration, and on paper."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cli.pipeline import Run
from cli.pipeline.pricing import Pricing
from cli.recipe import load_recipe
from distill.students.arch import parse_arch
from profiles.calibration import PRIOR_EFFICIENCY
from tests.cli.budget_cases import FITS_ALL, SMALL, WIDE, make_data, target, write_recipe


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("pricing")
    make_data(folder)
    yield folder


@pytest.fixture(autouse=True)
def own_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGESTILL_CONFIG", str(tmp_path / "config"))


def pricing_of(place: Path, folder: Path, targets: str, **changes: str) -> Pricing:
    run = Run(load_recipe(str(write_recipe(place, targets, **changes))), folder)  # type: ignore[arg-type]
    assert run.budgets is not None
    return run.budgets.pricing


# -- files for devices that are not attached --------------------------------------------------------------------------


def conv_file(file: Path, types: tuple[str, ...]) -> Path:
    """Convolutions of equal work one after the other: "int8" between roundings, "fp16" or "fp32" as they are."""
    nodes, constants, value = [], [], "x"
    for position, kind in enumerate(types):
        float_type = np.float32 if kind == "fp32" else np.float16
        weights = np.ones((64, 64, 3, 3), np.int8 if kind == "int8" else float_type)
        constants.append(numpy_helper.from_array(weights, f"w{position}"))
        read, filters = value, f"w{position}"
        if kind == "int8":
            constants.append(numpy_helper.from_array(np.array(0.1, np.float16), f"s{position}"))
            constants.append(numpy_helper.from_array(np.array(0, np.int8), f"z{position}"))
            scale = [f"s{position}", f"z{position}"]
            nodes.append(helper.make_node("QuantizeLinear", [value, *scale], [f"q{position}"]))
            nodes.append(helper.make_node("DequantizeLinear", [f"q{position}", *scale], [f"d{position}"]))
            nodes.append(helper.make_node("DequantizeLinear", [filters, *scale], [f"dw{position}"]))
            read, filters = f"d{position}", f"dw{position}"
        value = f"y{position}"
        nodes.append(helper.make_node("Conv", [read, filters], [value], pads=[1, 1, 1, 1]))
    graph_type = TensorProto.FLOAT if "fp32" in types else TensorProto.FLOAT16
    shape = ["batch", 64, 32, 32]
    graph = helper.make_graph(
        nodes,
        "convolutions",
        [helper.make_tensor_value_info("x", graph_type, shape)],
        [helper.make_tensor_value_info(value, graph_type, shape)],
        constants,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(file))
    return file


def test_a_file_that_is_int8_in_part_is_priced_node_by_node(place: Path, tmp_path: Path) -> None:
    pricing = pricing_of(place, tmp_path / "run", target("rtx", FITS_ALL, device="rtx-4060-laptop", precision="auto"))
    device = pricing.targets[0]
    bounds = {}
    for types in (("int8",) * 2, ("int8", "fp16"), ("fp16",) * 2):
        found = pricing.priced_file(device, parse_arch(SMALL), conv_file(tmp_path / "a.onnx", types), "int8")
        assert found is not None
        assert found.source == "assumed"
        assert found.latency_bound_ms is not None
        assert found.latency_ms is not None
        launches = 2 * pricing.overhead_ms(device)
        assert found.latency_ms == pytest.approx(found.latency_bound_ms / PRIOR_EFFICIENCY + launches)
        bounds[types] = found.latency_bound_ms
    whole, part, half = bounds.values()
    assert whole < part < half
    assert part == pytest.approx((whole + half) / 2)


def test_a_file_of_an_attached_target_is_for_the_measurement(place: Path, tmp_path: Path) -> None:
    pricing = pricing_of(place, tmp_path / "run", target("here", FITS_ALL))
    file = conv_file(tmp_path / "a.onnx", ("fp32",))
    assert pricing.priced_file(pricing.targets[0], parse_arch(WIDE), file, "fp32") is None
