"""The `[export]` table of a recipe. Light: pydantic only."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from profiles.section import Section

CalibrationMethod = Literal["minmax", "entropy", "percentile"]
HardwareCompatibility = Literal["none", "same-capability", "ampere+"]
ENGINE_OPTIONS = frozenset(
    {
        "engines",
        "engine_batches",
        "workspace_mib",
        "hardware_compatibility",
        "version_compatible",
        "builder_optimization_level",
    }
)
"""Fields that decide an engine and no graph."""


class ExportSection(Section):
    """How a trained student becomes files.

    A rung of the parity ladder fails when its *relative error*, max |a - b| / max |reference| over the logits of all
    held-out samples, is over the tolerance of its precision, when fewer of its samples than the agreement asks for keep
    the reference's decision (argmax; sign of every logit when classes are not exclusive), or when it holds NaN or
    infinity. INT8 and FP8 have `int8_tolerance` in place of the relative error.
    """

    opset: int | None = Field(default=None, ge=13, le=25)
    """ONNX operator set; None: 20, or the newest that the target's stack reads when that is older."""
    calibration_samples: int = Field(default=256, ge=1)
    """Training samples that the INT8 ranges are measured on; never random data."""
    calibration_method: CalibrationMethod = "minmax"
    """Tried first; the other ones follow when it does not keep the metric that the target asks for."""
    calibration_percentile: float = Field(default=99.99, gt=50, le=100)
    """Percent of the activations inside the range; for calibration_method "percentile"."""
    parity_samples: int = Field(default=256, ge=2)
    """Held-out samples that every rung of the parity ladder is compared on."""
    fp32_tolerance: float = Field(default=1e-4, gt=0)
    """Relative error of an FP32 graph. Reordered sums of a deep network give about 1e-6; a wrong operator far more."""
    fp32_agreement: float = Field(default=0.995, ge=0, le=1)
    """Share of decisions that FP32 graphs keep; below 1 because near-ties may fall either way."""
    fp16_tolerance: float = Field(default=2e-2, gt=0)
    """Relative error of an FP16 graph (11 bits of mantissa, 5e-4 per rounding, summed over the layers)."""
    fp16_agreement: float = Field(default=0.98, ge=0, le=1)
    int8_agreement: float = Field(default=0.8, ge=0, le=1)
    """Share of decisions that an INT8 graph keeps; below it the graph has collapsed. Asked of class logits alone."""
    int8_tolerance: float = Field(default=0.3, gt=0, le=1)
    """Largest error of an INT8 or FP8 graph against the spread of its outputs over the samples; 1 is what a constant
    would have. Asked where no task metric judges the graph: of a model that was not distilled here. 0.3 leaves 91 % of
    the outputs' variance explained; the tests' sound graphs have about 0.05, collapsed ones 0.8."""
    qat: Literal["auto", "never"] = "auto"
    """Quantisation-aware training, the last resort: "auto" when nothing else makes an INT8 graph that keeps the metric
    with at least half of its arithmetic in INT8; "never"."""
    qat_epochs: int = Field(default=3, ge=1)
    """Epochs of it, with a tenth of the student's own learning rate."""
    engines: bool = True
    """Build TensorRT-RTX engines for targets that run it; TensorRT ones where the target's GPU is in this machine."""
    engine_batches: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Batch sizes that an engine is tuned for besides 1 and the target's: one optimisation profile each."""
    workspace_mib: int | None = Field(default=None, ge=1)
    """Scratch memory that an engine's layers may take; None: half of the device's memory, a quarter of it where CPU and
    GPU share it."""
    hardware_compatibility: HardwareCompatibility = "none"
    """Which GPUs an engine runs on: that of the target; "same-capability": others of its compute capability; "ampere+":
    compute capability 8.0 and later. Wider ones can be slower."""
    version_compatible: bool = False
    """Engines that run on later versions of TensorRT, too (8.6 and up; not TensorRT-RTX). Can be slower."""
    builder_optimization_level: int | None = Field(default=None, ge=0, le=5)
    """How long the builder searches, 0 to 5; None: its own default, 3."""
