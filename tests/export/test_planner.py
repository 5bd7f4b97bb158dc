from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from export import Plan
from export.equalise import channel_extremes, equalise
from export.floor import Floor
from export.mixed import leave_float, share_in_int8, units_of
from export.onnx import export_graph
from export.parity import emulate, open_session, relative_error, run_session
from export.precision import Quantizer, quantization_for, to_bf16, types_of
from export.section import ExportSection
from profiles.quantspec import QuantSpec
from tests.export.conftest import IMAGES, device_and_stack, plan_for
from tests.export.planner_cases import Fails, calibration_images, failing, sound

SAMPLES = {"image": IMAGES[:64]}


def planned(device: str, folder: Path, fails: Fails, **options: Any) -> Plan:
    return plan_for(device, folder, model=failing(fails), calibration=calibration_images(), **options)


def outcome(found: Plan, name: str) -> bool | None:
    """Whether the first step of that name kept the metric."""
    return next(step.keeps for step in found.steps if step.name == name)


def keeps(found: Plan, name: str) -> bool:
    candidate = found[name]
    assert found.lowest_metric is not None
    if not candidate.usable:
        return False
    assert candidate.validation is not None
    return candidate.validation.value >= found.lowest_metric


@pytest.fixture(scope="module")
def grouped_graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("grouped") / "model.onnx"
    export_graph(failing("grouped"), {"image": torch.from_numpy(IMAGES[:2])}, path, opset=20)
    return path


@pytest.fixture(scope="module")
def equalised_plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return planned("this-machine", tmp_path_factory.mktemp("cpu"), "depthwise")


def test_wide_channels_are_rescued_by_equalisation_with_every_node_in_int8(equalised_plan: Plan) -> None:
    assert outcome(equalised_plan, "int8") is False
    assert keeps(equalised_plan, "int8")
    assert [candidate.name for candidate in equalised_plan.usable] == ["fp32", "int8"]
    assert "equalised" in " ".join(equalised_plan["int8"].notes)
    assert any("equalised" in step.name and step.keeps for step in equalised_plan.steps)
    integer, total = str(equalised_plan["int8"].compute_precision).split()[1:4:2]
    assert integer == total


def test_every_step_says_what_it_bought_and_what_it_took(equalised_plan: Plan) -> None:
    names = [step.name for step in equalised_plan.steps]
    assert names[:4] == ["fp32", "int8", "int8 entropy", "int8 percentile"]
    assert all(step.seconds is not None and step.size_bytes for step in equalised_plan.steps)
    assert all(step.metric is not None for step in equalised_plan.steps[2:])


def test_channels_that_cannot_be_scaled_are_left_in_float(tmp_path: Path) -> None:
    found = planned("this-machine", tmp_path, "grouped")
    assert outcome(found, "int8") is False
    assert not keeps(found, "int8")
    assert keeps(found, "int8-mixed")
    assert "spatial2" in " ".join(found["int8-mixed"].notes)
    assert "int8-qat" not in [candidate.name for candidate in found.candidates]
    sensitivity = next(step for step in found.steps if step.name == "sensitivity")
    worst = sensitivity.note.split("worst: ")[1].split("; ")
    assert any("spatial2" in entry for entry in worst[:2])
    again = planned("this-machine", tmp_path, "grouped")
    assert again.all_reused
    assert again.steps == found.steps
    assert again["int8-mixed"].file == found["int8-mixed"].file


def test_a_stated_floor_below_what_int8_reaches_ends_the_search(tmp_path: Path) -> None:
    found = planned(
        "this-machine", tmp_path, "grouped", floor=Floor(metric_floor=0.0), section=ExportSection(int8_agreement=0)
    )
    assert [step.name for step in found.steps] == ["fp32", "int8"]


def test_without_rescue_neither_search_nor_retraining_follow(tmp_path: Path) -> None:
    found = planned("this-machine", tmp_path, "grouped", rescue=False, precisions=("int8",))
    assert [step.name for step in found.steps] == ["fp32", "int8"]
    assert not keeps(found, "int8")


def test_retraining_is_the_last_resort_and_starts_from_the_grids_of_the_target(tmp_path: Path) -> None:
    asked: list[QuantSpec] = []

    def retrain(spec: QuantSpec) -> tuple[nn.Module, str]:
        asked.append(spec)
        return sound("everywhere"), "sound"

    found = planned("this-machine", tmp_path, "everywhere", retrain=retrain)
    device, stack = device_and_stack("this-machine")
    assert asked == [quantization_for(device, stack).spec]
    assert keeps(found, "int8-qat")
    mixed = next(step for step in found.steps if step.name == "int8-mixed")
    assert mixed.note.startswith("does not even with ")
    assert "quantisation-aware training" in [step.name for step in found.steps]
    never = planned("this-machine", tmp_path, "everywhere", retrain=retrain, section=ExportSection(qat="never"))
    assert len(asked) == 1
    assert "int8-qat" not in [candidate.name for candidate in never.candidates]


def test_ordinary_students_are_not_searched_for(cpu_plan: Plan) -> None:
    assert [step.name for step in cpu_plan.steps] == ["fp32", "int8"]


@pytest.mark.parametrize("device", ["rtx-a2000", "rtx-4060-laptop"])
def test_rescued_graphs_build_in_tensorrt_rtx(tmp_path: Path, device: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (extra tensorrt-rtx)")
    section = ExportSection(qat="never")
    found = planned(device, tmp_path, "grouped", precisions=("int8",), section=section)
    assert outcome(found, "int8-fp16") is False
    for rest in ("fp16", "fp32"):
        assert keeps(found, f"int8-mixed-{rest}")
        mixed = found[f"int8-mixed-{rest}"]
        assert mixed.engine is not None
        assert " of " in mixed.engine.realised_precision
        assert f"rest {rest} " in mixed.engine.realised_precision
        assert outcome(found, mixed.name) is True


def test_fp8_builds_from_compute_capability_8_9_on(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (extra tensorrt-rtx)")
    found = plan_for("rtx-4060-laptop", tmp_path, precisions=("fp8",))
    for name in ("fp8-fp16", "fp8-fp32"):
        candidate = found[name]
        assert candidate.file is not None
        assert candidate.validation is not None
        assert candidate.validation.value > 0.9
        assert str(candidate.compute_precision).startswith("fp8, rest ")
        assert candidate.usable, candidate.refused
        assert candidate.engine is not None
        assert f"rest {name.removeprefix('fp8-')} " in candidate.engine.realised_precision


def test_bf16_takes_the_place_of_an_fp16_that_overflows(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (extra tensorrt-rtx)")

    class Large(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = sound("depthwise")

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.body(image * 1.0) * 1e6

    found = plan_for("rtx-4060-laptop", tmp_path, model=Large().eval(), calibration=None)
    assert "overflow" in str(found["fp16"].refused) or "fails" in str(found["fp16"].refused)
    assert keeps(found, "bf16")
    assert found["bf16"].engine is not None
    assert types_of(onnx.load(str(found["bf16"].file))) == "bf16"


@pytest.mark.parametrize("device", ["this-machine", "rtx-4060-laptop"])
def test_a_graph_with_every_node_in_float_is_the_float_graph(grouped_graph: Path, tmp_path: Path, device: str) -> None:
    form = quantization_for(*device_and_stack(device))
    quantizer = Quantizer(grouped_graph, {"image": calibration_images()}, form, 99.99)
    quantized = quantizer.quantized("minmax")
    units = units_of(quantizer)
    assert {name for unit in units for name in unit.nodes} == set(quantizer.nodes)
    expected = run_session(open_session(grouped_graph), SAMPLES, 64)
    floating = leave_float(quantized, quantizer, frozenset(quantizer.nodes))
    assert types_of(floating) == "fp32"
    assert relative_error(expected, _run(floating, tmp_path))[1] < 1e-5
    # none in float: what the quantiser wrote
    same = _run(leave_float(quantized, quantizer, frozenset()), tmp_path)
    assert np.array_equal(same, _run(quantized, tmp_path))
    # each alone in float is a graph that runs
    for unit in units:
        assert np.isfinite(_run(leave_float(quantized, quantizer, unit.nodes), tmp_path)).all()
    convolutions = [unit for unit in units if unit.operator == "Conv"]
    assert len(convolutions) == 6
    assert share_in_int8(units, []) == 1
    assert share_in_int8(units, units) == 0


def _run(model: onnx.ModelProto, folder: Path) -> np.ndarray:
    path = folder / "run.onnx"
    path.write_bytes(model.SerializeToString())
    emulate(path, path)
    return run_session(open_session(path), SAMPLES, 64)


def test_equalisation_changes_no_output_and_evens_the_channels(tmp_path: Path) -> None:
    export_graph(failing("depthwise"), {"image": torch.from_numpy(IMAGES[:2])}, tmp_path / "m.onnx", opset=20)
    form = quantization_for(*device_and_stack("this-machine"))
    prepared = Quantizer(tmp_path / "m.onnx", {"image": calibration_images()}, form, 99.99).prepared
    found = equalise(prepared, {"image": calibration_images()})
    scaled = found.model
    assert found.groups >= 2
    assert relative_error(_run(prepared, tmp_path), _run(scaled, tmp_path))[1] < 1e-4
    wide = next(node.output[0] for node in prepared.graph.node if any("expand1" in name for name in node.input))
    before, after = (
        channel_extremes(model, {wide: 1}, {"image": calibration_images()})[wide] for model in (prepared, scaled)
    )
    assert before.max() / np.median(before) > 50
    assert after.max() / np.median(after) < 5


def test_bf16_graph_is_raised_to_an_operator_set_that_has_it(grouped_graph: Path, tmp_path: Path) -> None:
    to_bf16(grouped_graph, tmp_path / "bf16.onnx")
    model = onnx.load(str(tmp_path / "bf16.onnx"))
    assert next(entry.version for entry in model.opset_import if entry.domain == "") >= 22
    types = {tensor.data_type for tensor in model.graph.initializer}
    assert onnx.TensorProto.BFLOAT16 in types
    assert onnx.TensorProto.FLOAT16 not in types
