"""What the export hands on: candidates with their parity, and the plan that holds them. Light: pydantic only."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import ConfigDict

from export.inspection import Inspection
from export.section import HardwareCompatibility
from profiles.device import Precision
from profiles.metrics import Difference, Metric
from profiles.section import Section

GRAPH = "model.onnx"
"""The graph's file in every artefact and bundle."""


class Rung(Section):
    """One step of the parity ladder: a graph against the PyTorch model in FP32, on real held-out samples."""

    # an overflow's error is infinite, and plain JSON would read it back as null
    model_config = ConfigDict(**Section.model_config | {"ser_json_inf_nan": "strings"})

    name: str
    """What was compared, such as "onnx fp32" or "onnx runtime optimised"."""
    batches: tuple[int, ...]
    """Batch sizes that ran; the figures are the worst over them."""
    samples: int
    max_abs: float
    """Largest |a - b| over all logits."""
    relative: float
    """`max_abs` over the largest |reference| logit."""
    agreement: float | None = None
    """Share of samples (of logits, when classes are not exclusive) with the reference's decision, 0 to 1; None where
    the output is no class logits."""
    spread_error: float | None = None
    """See `parity.spread_error`: 0 is none, 1 what a constant output would have."""
    difference: Difference | None = None
    """Task metric of this rung minus the reference's, paired over samples; None when no labels were given."""
    passed: bool
    first_divergence: str | None = None
    """For a failing rung: the first node, in graph order, whose output leaves the tolerance."""


class Engine(Section):
    """A TensorRT engine for one compute capability. A raw plan: `trtexec --loadEngine` reads it."""

    file: Path
    compute_capability: str
    builder: str
    """Such as "TensorRT-RTX 1.7.1.116"; an engine runs on this version only."""
    batch: tuple[int, int, int]
    """Smallest, optimal and largest batch of the first optimisation profile; all equal: a static shape."""
    more_profiles: tuple[tuple[int, int, int], ...] = ()
    """Those of the further profiles."""
    device: str | None = None
    """GPU that it was built on, by the driver's name; None: built without one, for every GPU of the capability."""
    hardware_compatibility: HardwareCompatibility = "none"
    version_compatible: bool = False
    workspace_mib: int | None = None
    """Scratch memory that its layers may take; None: the builder's default."""
    sha256: str
    size_bytes: int
    build_seconds: float
    realised_precision: str
    inspection: Inspection | None = None
    """What the engine inspector said; None: no GPU to load the engine on."""


class Candidate(Section):
    """One file that a target could run, or the reason why it cannot."""

    name: str
    """Unique in a plan: fp32, fp16, bf16, int8 (ONNX Runtime), int8-fp16 and int8-fp32 (INT8 with that remainder, for
    TensorRT), fp8-fp16 and fp8-fp32, int8-mixed, int8-mixed-fp16 and int8-mixed-fp32 (some nodes left in float),
    int8-qat (after a quantisation-aware training)."""
    precision: Precision
    file: Path | None = None
    """The ONNX graph; None when refused before it was made."""
    scored_file: Path | None = None
    """What ONNX Runtime scores on this machine in place of `file`, where its own kernels would not compute what the
    device's runtime does: the same arithmetic in plain operators. None: `file` itself. See `to_score`."""
    input_dtype: str | None = None
    """Of this file, when it is not that of the plan."""
    engine: Engine | None = None
    static_engine: Engine | None = None
    """The same for batch 1 alone, when the target's batch is larger: a dynamic batch can cost 3x at batch 1."""
    engine_note: str | None = None
    """Why there is no engine."""
    opset: int | None = None
    ir_version: int | None = None
    sha256: str | None = None
    size_bytes: int | None = None
    parity: tuple[Rung, ...] = ()
    validation: Metric | None = None
    """Task metric of this very file on validation data in ONNX Runtime."""
    compute_precision: str | None = None
    """What really computes, where it is known, such as "int8: 9 of 9 Conv and MatMul nodes"."""
    parsed_by: str | None = None
    """Evidence for TensorRT stacks, such as "parsed by TensorRT-RTX 1.7.1 (not TensorRT 10.3)"."""
    refused: str | None = None
    """Reason why the target cannot use it, with the fact; None: usable."""
    notes: tuple[str, ...] = ()
    seconds: float | None = None
    """What making and checking it took, when that was done; None: not known."""

    @property
    def usable(self) -> bool:
        """Made, and not refused."""
        return self.refused is None and self.file is not None

    @property
    def to_score(self) -> Path | None:
        """The file whose accuracy in ONNX Runtime on this machine stands for this candidate's. Latency: `file`."""
        return self.scored_file or self.file


class PlanStep(Section):
    """One thing that the planner tried, and what it bought."""

    name: str
    """Such as "int8 minmax", "int8 equalised", "int8-mixed"."""
    metric: Metric | None = None
    """On validation data; None: there is none, or the graph was refused."""
    agreement: float | None = None
    """Share of the parity samples with the model's own decision; None: no graph, or no class logits."""
    size_bytes: int | None = None
    seconds: float | None = None
    """What it took when it was done, which may have been in an earlier run."""
    keeps: bool | None = None
    """Whether it keeps the metric that is asked for; None: not known."""
    note: str = ""


class Plan(Section):
    """Every candidate of one student for one target's device and stack."""

    folder: Path
    device: str
    stack: str
    dialect: Literal["qdq-u8s8", "qdq-s8s8", "weak-tensorrt"]
    opset: int
    input_name: str
    input_dtype: str
    input_shape: tuple[int, ...]
    """Of one sample, without the batch."""
    batch: int
    decides: bool = True
    """The output is one score per class, so that a sample has a decision; False: other values, or not known."""
    calibration_sha256: str | None
    candidates: tuple[Candidate, ...]
    seconds: float
    steps: tuple[PlanStep, ...] = ()
    """What was tried, in order."""
    lowest_metric: float | None = None
    """The metric that a candidate has to keep; None: no metric was computed."""
    reused: tuple[str, ...] = ()
    """Candidates whose files, engines and figures were there already."""

    @property
    def all_reused(self) -> bool:
        """Every candidate that has a file was there already; False when none has a file."""
        made = [candidate.name for candidate in self.candidates if candidate.file is not None]
        return bool(made) and set(made) <= set(self.reused)

    @property
    def usable(self) -> tuple[Candidate, ...]:
        """Candidates that the target can use."""
        return tuple(candidate for candidate in self.candidates if candidate.usable)

    def __getitem__(self, name: str) -> Candidate:
        """The candidate of that name. Raises KeyError."""
        for candidate in self.candidates:
            if candidate.name == name:
                return candidate
        raise KeyError(name)
