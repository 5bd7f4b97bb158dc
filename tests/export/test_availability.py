from __future__ import annotations

import subprocess
import sys

import pytest

from export import available, refusal_of
from tests.export.conftest import device_and_stack


@pytest.mark.parametrize(
    ("device", "precision", "fact"),
    [
        ("this-machine", "fp16", "computes FP16 graphs in FP32 on a CPU"),
        ("raspberry-pi-5", "fp8", "cannot compute in FP8: ONNX Runtime has no FP8 kernels for this CPU"),
        ("raspberry-pi-5", "fp4", "no export for FP4 yet (ONNX Runtime has no FP4 kernels for this CPU)"),
        ("rtx-a2000", "tf32", "no export for TF32 yet; this target can get FP32, FP16, BF16, INT8"),
        ("rtx-a2000", "fp8", "FP8 needs 8.9 or higher"),
        ("jetson-orin-nano", "bf16", "BF16 graphs need opset 22; tensorrt 10.3.0 reads up to 20"),
        ("jetson-thor", "fp4", "no export for FP4 yet"),
        ("jetson-nano", "fp16", "trtexec --onnx=model.onnx --fp16"),
        ("jetson-nano", "int8", "compute capability 5.3"),
    ],
)
def test_what_a_target_cannot_get_is_said_with_the_fact(device: str, precision: str, fact: str) -> None:
    assert fact in str(refusal_of(precision, *device_and_stack(device)))


def test_precisions_of_a_target() -> None:
    assert available(*device_and_stack("this-machine")) == ("fp32", "int8")
    assert available(*device_and_stack("rtx-4060-laptop")) == ("fp32", "fp16", "bf16", "int8", "fp8")
    assert available(*device_and_stack("rtx-a2000")) == ("fp32", "fp16", "bf16", "int8")
    assert available(*device_and_stack("rtx-4060-laptop"), has_calibration=False) == ("fp32", "fp16", "bf16")
    assert available(*device_and_stack("jetson-nano")) == ("fp32",)
    assert refusal_of("auto", *device_and_stack("jetson-nano")) is None


def test_question_costs_no_heavy_import() -> None:
    code = "import sys; from export import refusal_of; print({'torch', 'onnx', 'onnxruntime'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
