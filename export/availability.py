"""Which precisions a target can get, told before anything is trained or exported. Light: no torch, no onnx."""

from __future__ import annotations

from typing import cast, get_args

from export.candidate import GRAPH
from profiles.device import Device, Precision, Stack

EXPORTED: tuple[Precision, ...] = ("fp32", "fp16", "bf16", "int8", "fp8")
"""Precisions that there is an export for."""
BF16_OPSET = 22
"""From here on Conv and the pools take BF16 (onnx operator changelog)."""
FP8_OPSET = 19
"""From here on QuantizeLinear and DequantizeLinear take FP8."""


def refusal_of(precision: str, device: Device, stack: Stack, has_calibration: bool = True) -> str | None:
    """Why the target gets no file in `precision`, with the fact and what helps; None: nothing known is in the way.

    Args:
        precision: one of `Precision`, or "auto", which leaves out what is refused and is never refused itself.
        has_calibration: there are real samples to measure INT8 ranges on.
    """
    # FP32 is what every other graph is made from
    if precision in ("auto", "fp32"):
        return None
    known = precision in get_args(Precision)
    reason = device.why_not(cast(Precision, precision)) if known else None
    if precision not in EXPORTED:
        usable = ", ".join(name.upper() for name in available(device, stack, has_calibration))
        evidence = f" ({reason})" if reason is not None else ""
        return f"there is no export for {precision.upper()} yet{evidence}; this target can get {usable}"
    if reason is not None:
        return f"{device.title} cannot compute in {precision.upper()}: {reason}"
    if stack.dialect == "weak-tensorrt":
        return (
            f"TensorRT {stack.runtime_version} knows weak typing only, so its builder "
            f"chooses {precision.upper()} by a flag and not by the graph; on the device: "
            f"trtexec --onnx={GRAPH} --{precision}"
            + {
                "int8": ", with a calibration of its own, which edgestill does not make",
                "fp16": ", or sh build_engine.sh --precision fp16",
            }.get(precision, "")
        )
    if precision == "fp16" and stack.runtime == "onnxruntime" and device.kind == "cpu":
        return "ONNX Runtime computes FP16 graphs in FP32 on a CPU"
    if precision in ("bf16", "fp8") and stack.runtime == "onnxruntime":
        return f"ONNX Runtime has no {precision.upper()} kernels for convolutions"
    needed = {"bf16": BF16_OPSET, "fp8": FP8_OPSET}.get(precision, 0)
    if stack.max_opset < needed:
        return (
            f"{precision.upper()} graphs need opset {needed}; "
            f"{stack.runtime} {stack.runtime_version} reads up to {stack.max_opset}"
        )
    if precision in ("int8", "fp8") and not has_calibration:
        return f"{precision.upper()} needs real samples to measure its ranges on, and none were given"
    return None


def available(device: Device, stack: Stack, has_calibration: bool = True) -> tuple[Precision, ...]:
    """The precisions that the target can get."""
    return tuple(name for name in EXPORTED if refusal_of(name, device, stack, has_calibration) is None)
