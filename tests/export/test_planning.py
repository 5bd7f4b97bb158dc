from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from export import Plan, plan
from export.section import ExportSection
from profiles.artifact import verify
from profiles.device import Device
from profiles.errors import EdgestillError, InputError
from tests.export.conftest import IMAGES, device_and_stack, plan_for
from tests.export.models import TinyText, calibration, trained


def test_cpu_plan_has_fp32_and_int8_and_says_why_not_fp16(cpu_plan: Plan) -> None:
    assert [candidate.name for candidate in cpu_plan.usable] == ["fp32", "int8"]
    assert "computes FP16 graphs in FP32" in str(cpu_plan["fp16"].refused)
    for candidate in cpu_plan.usable:
        assert candidate.validation is not None
        assert candidate.validation.value > 0.9
        assert all(rung.passed and rung.batches == (1, 2, 5) and rung.difference for rung in candidate.parity)
        assert candidate.file is not None
        assert verify(candidate.file.parent, "graph")
    assert [rung.name for rung in cpu_plan["fp32"].parity] == ["onnx fp32", "onnx runtime optimised"]


def test_what_computes_is_read_from_the_runtime_not_from_the_name(cpu_plan: Plan) -> None:
    assert cpu_plan["int8"].compute_precision is not None
    assert cpu_plan["int8"].compute_precision.startswith("int8: 4 of 4 ")


def test_calibration_set_is_identified(cpu_plan: Plan, tmp_path: Path) -> None:
    assert cpu_plan.calibration_sha256
    other = plan_for(
        "this-machine", tmp_path, calibration=IMAGES[:64], precisions=("int8",), score=None, difference=None
    )
    assert other.calibration_sha256 != cpu_plan.calibration_sha256


def test_finished_plan_is_not_made_again_and_another_model_is(tmp_path: Path) -> None:
    options = {"score": None, "difference": None, "precisions": ("fp32",)}
    assert plan_for("this-machine", tmp_path, **options).reused == ()
    again = plan_for("raspberry-pi-5", tmp_path, **options)
    assert again.reused == ("fp32",)
    assert again.all_reused
    assert not plan_for("this-machine", tmp_path, model_key="other", **options).all_reused


def test_devices_of_one_dialect_do_not_overwrite_each_other(tmp_path: Path) -> None:
    device, stack = device_and_stack("this-machine")
    stack = stack.model_copy(update={"dialect": "qdq-u8s8"})
    new = device.model_copy(update={"name": "new", "isa": ("avx2", "vnni")})
    old = device.model_copy(update={"name": "old", "isa": ("avx2",)})

    def made(on: Device) -> Plan:
        return plan(
            trained(), held_out=IMAGES, calibration=calibration(), stack=stack, device=on, folder=tmp_path,
            model_key="tiny",
        )  # fmt: skip

    first, second, again = made(new), made(old), made(new)
    assert (first.all_reused, again.all_reused) == (False, True)
    assert second.reused == ("fp32",)
    assert second["int8"].file != first["int8"].file == again["int8"].file


def test_int8_without_real_samples_is_refused(tmp_path: Path) -> None:
    found = plan_for("this-machine", tmp_path, calibration=None, score=None, difference=None)
    assert "real samples" in str(found["int8"].refused)


def test_weakly_typed_tensorrt_gets_fp32_and_the_flags(tmp_path: Path) -> None:
    found = plan_for("jetson-nano", tmp_path)
    assert [candidate.name for candidate in found.usable] == ["fp32"]
    assert "trtexec --onnx=model.onnx --fp16" in str(found["fp16"].refused)
    assert "compute capability 5.3" in str(found["int8-fp16"].refused)
    fp32 = found["fp32"]
    assert fp32.file is not None
    assert fp32.to_score != fp32.file
    graph = onnx.load(str(fp32.file)).graph
    # TensorRT 8.2 has no uint8 inputs
    assert graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert fp32.input_dtype == "float32"


def test_jetson_graphs_are_parsed_and_labelled_with_the_parsers_version(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (extra tensorrt-rtx)")
    found = plan_for("jetson-orin-nano", tmp_path, score=None, difference=None)
    assert [candidate.name for candidate in found.usable] == ["fp32", "fp16", "int8-fp16", "int8-fp32"]
    for candidate in found.usable:
        assert candidate.engine is None
        assert str(candidate.parsed_by).startswith("parsed by TensorRT-RTX 1.")
        assert str(candidate.parsed_by).endswith("(not TensorRT 10.3.0)")
        assert "unverified" in str(candidate.compute_precision)


def test_two_int8_remainders_are_offered_for_tensorrt(rtx_plan: Plan) -> None:
    fp16, fp32 = rtx_plan["int8-fp16"], rtx_plan["int8-fp32"]
    assert fp16.compute_precision is not None
    assert fp32.compute_precision is not None
    assert fp16.compute_precision.startswith("int8, rest fp16")
    assert fp32.compute_precision.startswith("int8, rest fp32")
    assert fp16.to_score != fp16.file
    assert fp16.validation is not None
    assert fp16.validation.value > 0.9


def test_precision_without_an_export_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no export for FP4"):
        plan_for("rtx-a2000", tmp_path, precisions=("fp4",))


class Overflowing(nn.Module):
    """Right in FP32, infinite in FP16: 1e5 is beyond 65504."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(256, 4)

    def forward(self, image: Tensor) -> Tensor:
        big = image.to(torch.float32).flatten(1) * 1000.0
        return self.head(big) / 1000.0


def test_fp16_overflow_is_left_out_of_auto_with_the_node(tmp_path: Path) -> None:
    model = Overflowing().eval()
    found = plan_for("jetson-orin-nano", tmp_path, model=model, score=None, difference=None, calibration=None)
    refused = str(found["fp16"].refused)
    assert 'parity rung "fp16" fails' in refused
    assert "first diverging node: Mul" in refused
    with pytest.raises(EdgestillError, match='rung "fp16"') as caught:
        plan_for("jetson-orin-nano", tmp_path, model=model, score=None, difference=None, precisions=("fp16",))
    assert caught.value.exit_status == 1
    assert "Mul" in str(caught.value.where)


def test_fp32_rung_over_its_tolerance_stops_the_export(tmp_path: Path) -> None:
    with pytest.raises(EdgestillError, match="does not compute what the model does"):
        plan_for("this-machine", tmp_path, section=ExportSection(fp32_tolerance=1e-12), score=None, difference=None)
    assert not any(tmp_path.rglob("manifest.json"))


def test_tokens_and_signs_work_like_images_and_argmax(tmp_path: Path) -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    found = plan_for(
        "this-machine",
        tmp_path,
        model=TinyText().eval(),
        held_out=rng.integers(0, 50, (64, 12)),
        calibration=rng.integers(0, 50, (64, 12)),
        input_name="tokens",
        exclusive=False,
        score=None,
        difference=None,
    )
    assert (found.input_name, found.input_dtype, found.input_shape) == ("tokens", "int64", (12,))
    assert {candidate.name for candidate in found.usable} == {"fp32", "int8"}
