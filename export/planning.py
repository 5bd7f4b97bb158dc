"""From a trained model to every candidate that a device and its stack could run, each compared with PyTorch."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn

from export import parity, tensorrt
from export.availability import EXPORTED, available, refusal_of
from export.candidate import GRAPH, Candidate, Engine, Plan, Rung
from export.onnx import DEFAULT_IR, choose_opset, export_graph, graph_opset, own_version, save
from export.parity import DifferenceOf, Limits, Samples, spread, take
from export.precision import computed_in_int8, quantization_for, quantize, to_fp16
from export.preflight import preflight, refusal, version_of
from export.section import ExportSection
from profiles.artifact import array_hash, content_key, create, current, file_hash, tool_versions
from profiles.device import THIS_MACHINE, Device, Precision, Stack
from profiles.errors import EdgestillError, InputError
from profiles.metrics import Metric
from profiles.progress import Progress, Silent

ENGINE = "model.engine"
STATIC_ENGINE = "model-batch1.engine"
_SCORED = "scored.onnx"
_FORMS = 2
"""Raise when the way a graph is made changes, so that older artefacts are made anew."""
_INT8_DIVERGENCE = 0.3
"""Relative error of a single value at which an INT8 graph is said to diverge, when it has collapsed."""
Score = Callable[[Path], Metric]


def plan(
    model: nn.Module,
    *,
    held_out: NDArray[Any] | Samples,
    calibration: NDArray[Any] | Samples | None,
    stack: Stack,
    device: Device,
    folder: Path,
    model_key: str,
    input_name: str = "image",
    batch: int = 1,
    precisions: Sequence[str] = ("auto",),
    section: ExportSection | None = None,
    score: Score | None = None,
    difference: DifferenceOf | None = None,
    exclusive: bool = True,
    metadata: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Exports, quantises, compares and (for TensorRT-RTX) builds; what is there already is not made again.

    Args:
        model: in eval mode, on the CPU; forward(x, ...) returns logits (N, C).
        held_out: real validation samples (N, ...), uint8 images or int64 tokens, or one such array per input name.
        calibration: real training samples of the same form for the INT8 ranges; None: INT8 is refused.
        folder: artefacts of this student, one subfolder for each form that differs from target to target, so that
            targets which want the same share it and others do not overwrite it.
        model_key: hash of the weights and of the validation data that `score` uses.
        batch: of the target.
        precisions: "auto" for all that device and stack support, or those asked for; FP32 is always made.
        score: task metric of an ONNX file on the validation data in ONNX Runtime.
        difference: paired difference of the task metric, see `DifferenceOf`.
        exclusive: classes exclude each other (argmax decides); else each logit's sign does.
        metadata: for the graph's `metadata_props`: preprocessing, labels and the like, as plain values.

    Raises:
        InputError: an opset that the stack does not read; a precision asked for that there is no export for.
        EdgestillError: the export or an FP32 rung fails, or a rung of a precision that was asked for by name; the
            evidence names the first diverging node.
    """
    started = time.perf_counter()
    section = section or ExportSection()
    progress = progress or Silent()
    wanted = _wanted(precisions, device, stack)
    held = {input_name: held_out} if isinstance(held_out, np.ndarray) else dict(held_out)
    calib = {input_name: calibration} if isinstance(calibration, np.ndarray) else calibration
    work = _Work(
        model=model,
        held_out=held,
        calibration=dict(calib) if calib is not None else None,
        stack=stack,
        device=device,
        folder=folder,
        model_key=model_key,
        batch=batch,
        section=section,
        score=score,
        difference=difference,
        exclusive=exclusive,
        metadata=dict(metadata or {}),
        strict="auto" not in precisions,
        opset=choose_opset(section.opset, stack),
    )
    steps: list[tuple[str, Precision, Callable[[], Candidate]]] = [("fp32", "fp32", work.fp32)]
    if "fp16" in wanted:
        steps.append(("fp16", "fp16", work.fp16))
    if "int8" in wanted:
        if stack.runtime == "onnxruntime":
            steps.append(("int8", "int8", lambda: work.int8("int8", half=False)))
        else:
            steps.append(("int8-fp16", "int8", lambda: work.int8("int8-fp16", half=True)))
            steps.append(("int8-fp32", "int8", lambda: work.int8("int8-fp32", half=False)))
    candidates = []
    with progress.task("export", total=len(steps), unit="graphs") as task:
        for name, precision, build in steps:
            reason = refusal_of(precision, device, stack, calib is not None)
            try:
                candidate = Candidate(name=name, precision=precision, refused=reason) if reason else build()
            except EdgestillError as error:
                if precision == "fp32" or work.strict:
                    raise
                failed = ": ".join(part for part in (error.message, error.evidence) if part)
                candidate = Candidate(name=name, precision=precision, refused=failed)
            candidates.append(work.on_device(candidate))
            task.advance(note=name)
    first = next(iter(held))
    return Plan(
        folder=folder,
        device=device.name,
        stack=stack.name,
        dialect=stack.dialect,
        opset=work.opset,
        input_name=first,
        input_dtype=str(held[first].dtype),
        input_shape=tuple(int(size) for size in held[first].shape[1:]),
        batch=batch,
        calibration_sha256=work.calibration_hash,
        candidates=tuple(candidates),
        seconds=round(time.perf_counter() - started, 2),
        reused=tuple(work.reused),
    )


def _wanted(precisions: Sequence[str], device: Device, stack: Stack) -> set[str]:
    if "auto" in precisions:
        return set(EXPORTED)
    for precision in precisions:
        if precision not in EXPORTED:
            raise InputError(
                str(refusal_of(precision, device, stack)),
                where="target.precision",
                fix="precision = " + ", ".join(f'"{name}"' for name in ("auto", *available(device, stack))),
            )
    return set(precisions)


@dataclass
class _Work:
    model: nn.Module
    held_out: dict[str, NDArray[Any]]
    calibration: dict[str, NDArray[Any]] | None
    stack: Stack
    device: Device
    folder: Path
    model_key: str
    batch: int
    section: ExportSection
    score: Score | None
    difference: DifferenceOf | None
    exclusive: bool
    metadata: dict[str, Any]
    strict: bool
    opset: int
    reused: list[str] = field(default_factory=list)

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        """Held-out rows of the parity ladder."""
        return spread(len(next(iter(self.held_out.values()))), self.section.parity_samples)

    @cached_property
    def samples(self) -> dict[str, NDArray[Any]]:
        return take(self.held_out, self.rows)

    @cached_property
    def calibration_samples(self) -> dict[str, NDArray[Any]] | None:
        if self.calibration is None:
            return None
        count = len(next(iter(self.calibration.values())))
        return take(self.calibration, spread(count, self.section.calibration_samples))

    @cached_property
    def calibration_hash(self) -> str | None:
        chosen = self.calibration_samples
        return content_key({name: array_hash(array) for name, array in chosen.items()}) if chosen else None

    @cached_property
    def reference(self) -> NDArray[np.float32]:
        """The model's logits on `samples`, computed by PyTorch in FP32."""
        return parity.run_torch(self.model, self.samples)

    @property
    def batches(self) -> tuple[int, ...]:
        return tuple(sorted({1, 2, self.batch}))

    def fp32(self) -> Candidate:
        def make(folder: Path) -> Candidate:
            graph = folder / GRAPH
            examples = {
                name: torch.from_numpy(np.array(array[np.arange(2) % len(array)]))
                for name, array in self.samples.items()
            }
            export_graph(
                self.model,
                examples,
                graph,
                opset=self.opset,
                max_ir=self.stack.max_ir,
                metadata=self.graph_metadata("fp32"),
            )
            limits = Limits(self.section.fp32_tolerance, self.section.fp32_agreement)
            plain = self.climb("onnx fp32", parity.open_session(graph, optimised=False), limits)
            self.require(plain, lambda: parity.torch_values(self.model, self.first_samples), graph)
            fused = self.climb("onnx runtime optimised", parity.open_session(graph), limits)
            if not fused.passed:
                optimised = folder / "optimised.onnx"
                parity.optimised_graph(graph, optimised)
                self.require(fused, lambda: parity.graph_values(graph, self.first_samples), optimised)
            scored = None
            if self.float_inputs:
                scored = folder / _SCORED
                graph.rename(scored)
                _float_inputs(scored, graph)
            return self.describe("fp32", "fp32", graph, (plain, fused), scored=scored)

        return self.artefact("fp32", "fp32", make)

    def fp16(self) -> Candidate:
        def make(folder: Path) -> Candidate:
            graph = folder / GRAPH
            to_fp16(self.base / GRAPH, graph, self.graph_metadata("fp16"))
            parity.open_session(graph)  # it loads as it is
            scored = folder / _SCORED
            parity.emulate_half(graph, scored)
            rung = self.climb(
                "fp16", parity.open_session(scored), Limits(self.section.fp16_tolerance, self.section.fp16_agreement)
            )
            rung = self.judge(rung, scored, self.section.fp16_tolerance)
            return self.describe("fp16", "fp16", graph, (rung,), scored=scored)

        return self.artefact("fp16", "fp16", make)

    def int8(self, name: str, *, half: bool) -> Candidate:
        form = quantization_for(self.device, self.stack)

        def make(folder: Path) -> Candidate:
            graph = folder / GRAPH
            assert self.calibration_samples is not None  # refusal_of saw to it
            made = folder / "quantized.onnx" if half else graph
            quantize(
                self.base / GRAPH,
                made,
                self.calibration_samples,
                form,
                self.section,
                self.graph_metadata(name, str(form)),
            )
            if half:
                to_fp16(made, graph)
                made.unlink()
            scored = None if self.native else folder / _SCORED
            if scored is not None:
                parity.emulate(graph, scored)
                if half:
                    parity.emulate_half(scored, scored)
            checked = scored or graph
            rung = self.climb(name, parity.open_session(checked), Limits(None, self.section.int8_agreement))
            rung = self.judge(rung, checked, _INT8_DIVERGENCE)
            return self.describe(name, "int8", graph, (rung,), scored=scored, form=str(form))

        return self.artefact(name, "int8", make)

    @property
    def float_inputs(self) -> bool:
        """The stack has no uint8 inputs (TensorRT before 8.5)."""
        images = any(array.dtype == np.uint8 for array in self.held_out.values())
        return images and self.stack.dialect == "weak-tensorrt" and version_of(self.stack) < (8, 5)

    @property
    def native(self) -> bool:
        """This machine's integer kernels are the target's: other processors' differ (S8S8 saturates on x86 without
        VNNI)."""
        return self.stack.runtime == "onnxruntime" and self.device.name == THIS_MACHINE

    @property
    def base(self) -> Path:
        """Folder of the FP32 graph."""
        return self.place("fp32", "fp32")

    @property
    def first_samples(self) -> dict[str, NDArray[Any]]:
        return {name: array[:4] for name, array in self.samples.items()}

    def graph_metadata(self, name: str, form: str = "") -> dict[str, Any]:
        return {**self.metadata, "precision": f"{name} {form}".strip(), "edgestill": own_version()}

    def climb(self, name: str, session: Any, limits: Limits) -> Rung:
        return parity.climb(
            name,
            session,
            self.reference,
            self.samples,
            self.rows,
            self.batches,
            limits,
            exclusive=self.exclusive,
            difference=self.difference,
        )

    def require(self, rung: Rung, expected: Callable[[], Mapping[str, NDArray[Any]]], graph: Path) -> None:
        """Raises when an FP32 rung failed, naming the first diverging node."""
        if rung.passed:
            return
        node = parity.first_divergence(expected(), graph, self.first_samples, self.section.fp32_tolerance)
        raise _failure(rung.model_copy(update={"first_divergence": node}), self.section.fp32_tolerance)

    def judge(self, rung: Rung, graph: Path, tolerance: float) -> Rung:
        """A failing rung with its first diverging node; raises when its precision was asked for by name."""
        if rung.passed:
            return rung
        expected = parity.graph_values(self.base / GRAPH, self.first_samples)
        node = parity.first_divergence(expected, graph, self.first_samples, tolerance)
        rung = rung.model_copy(update={"first_divergence": node})
        if self.strict:
            raise _failure(rung, None if rung.name.startswith("int8") else tolerance)
        return rung

    def describe(
        self,
        name: str,
        precision: Precision,
        graph: Path,
        rungs: tuple[Rung, ...],
        *,
        scored: Path | None = None,
        form: str = "",
    ) -> Candidate:
        """The candidate with everything that is known of its graph."""
        model = onnx.load(str(graph), load_external_data=False)
        failed = next((rung for rung in rungs if not rung.passed), None)
        notes = []
        if scored is not None:
            notes.append("accuracy: the same arithmetic in ONNX Runtime on this machine, not on the device")
        if form:
            notes.append(f"quantised {form}, {self.section.calibration_method} ranges")
        return Candidate(
            name=name,
            precision=precision,
            file=graph,
            scored_file=scored,
            input_dtype="float32" if scored is not None and precision == "fp32" else None,
            opset=graph_opset(model),
            ir_version=int(model.ir_version),
            sha256=file_hash(graph),
            size_bytes=sum(path.stat().st_size for path in graph.parent.glob(f"{GRAPH}*")),
            parity=rungs,
            validation=self.score(scored or graph) if self.score is not None and failed is None else None,
            refused=_failure_text(failed) if failed is not None else None,
            notes=tuple(notes),
        )

    def on_device(self, candidate: Candidate) -> Candidate:
        """Adds what depends on the target: the preflight's findings, what will compute, engines."""
        if candidate.file is None:
            return candidate
        model = onnx.load(str(candidate.file), load_external_data=False)
        findings = preflight(model, self.device, self.stack, batch=self.batch)
        reasons = [candidate.refused, refusal(findings)]
        notes = [f"{found.message}: {found.fact}" for found in findings if found.level == "note"]
        checked = candidate.model_copy(
            update={
                "refused": "; ".join(reason for reason in reasons if reason) or None,
                "notes": (*candidate.notes, *notes),
                "compute_precision": self.compute_precision(candidate.precision, candidate.file, model),
            }
        )
        return self.with_engine(checked)

    def compute_precision(self, precision: Precision, graph: Path, model: onnx.ModelProto) -> str:
        """What computes: looked up in the runtime's own graph where the target is this machine."""
        said = tensorrt.graph_precision(model)
        if self.stack.runtime != "onnxruntime":
            return f"{said} by the graph's types, unverified (no GPU here)"
        if precision != "int8":
            return said
        if self.device.name != THIS_MACHINE:
            return f"{said} by the graph's types, unverified (another machine)"
        with tempfile.TemporaryDirectory(prefix="edgestill-") as folder:
            integer, total = computed_in_int8(parity.optimised_graph(graph, Path(folder) / "optimised.onnx"))
        return f"int8: {integer} of {total} Conv, Gemm and MatMul nodes in ONNX Runtime's optimised graph"

    def form(self, precision: Precision) -> tuple[Any, ...]:
        """What of a graph differs between devices and stacks of one dialect, besides its opset and batch."""
        ir = min(self.stack.max_ir, DEFAULT_IR)
        if precision == "int8":
            return (ir, repr(quantization_for(self.device, self.stack)), self.native)
        return (ir, self.float_inputs if precision == "fp32" else None)

    def place(self, name: str, precision: Precision) -> Path:
        """The candidate's folder. Its form is part of the name: two devices' graphs lie side by side."""
        larger = f"-b{self.batch}" if self.batch > 2 else ""
        return self.folder / f"{name}-opset{self.opset}{larger}-{content_key(*self.form(precision))[:8]}"

    def artefact(self, name: str, precision: Precision, make: Callable[[Path], Candidate]) -> Candidate:
        """The candidate from its folder when that was made from the same, else made now."""
        key = content_key(
            _FORMS,
            name,
            self.model_key,
            self.section.model_copy(update={"engines": True}),
            self.opset,
            list(self.form(precision)),
            {key: array_hash(array) for key, array in self.samples.items()},
            self.calibration_hash if precision == "int8" else None,
            self.metadata,
            self.exclusive,
            self.score is not None,
            self.difference is not None,
            tool_versions(),
        )
        folder = self.place(name, precision)
        manifest = current(folder, "graph", key)
        if manifest is not None:
            candidate = Candidate.model_validate(manifest.info["candidate"])
            if candidate.refused is None or not self.strict:
                self.reused.append(name)
                return _moved(candidate, folder)
        info: dict[str, Any] = {}
        with create(folder, "graph", key, info) as temporary:
            candidate = make(temporary)
            (temporary / "optimised.onnx").unlink(missing_ok=True)
            relative = _moved(candidate, Path())
            info["candidate"] = json.loads(relative.model_dump_json())
            info["calibration_sha256"] = self.calibration_hash if precision == "int8" else None
        return _moved(relative, folder)

    def with_engine(self, candidate: Candidate) -> Candidate:
        """Adds the parser's evidence and, for TensorRT-RTX, the engines."""
        if candidate.file is None or candidate.refused is not None or self.stack.runtime == "onnxruntime":
            return candidate
        adapter = tensorrt.load_adapter(rtx=True)
        if adapter is None:
            return candidate.model_copy(update={"engine_note": f"not built: {tensorrt.INSTALL_RTX}"})
        label = tensorrt.evidence_label(adapter, self.stack.runtime, self.stack.runtime_version)
        if self.stack.runtime == "tensorrt":
            errors = tensorrt.parse(adapter, candidate.file)
            return candidate.model_copy(
                update={
                    "parsed_by": label if errors is None else f"not {label}: {errors}",
                    "engine_note": f"TensorRT {self.stack.runtime_version} builds its engine on the device",
                }
            )
        if not self.section.engines:
            return candidate.model_copy(update={"engine_note": "not built: engines = false in [export]"})
        try:
            engines = self.engines(candidate, adapter)
        except EdgestillError as error:
            return candidate.model_copy(update={"refused": f"{error.message}: {error.evidence}"})
        return candidate.model_copy(
            update={"engine": engines[0], "static_engine": engines[1] if len(engines) > 1 else None, "parsed_by": label}
        )

    def engines(self, candidate: Candidate, adapter: tensorrt.Adapter) -> list[Engine]:
        capability = self.device.compute_capability
        if capability is None or candidate.file is None:
            raise EdgestillError("an engine needs a GPU", evidence=f"{self.device.title} has no compute capability")
        place = self.place(candidate.name, candidate.precision).name
        folder = self.folder / f"{place}-sm{capability.replace('.', '')}-b{self.batch}"
        key = content_key(_FORMS, candidate.sha256, str(adapter), capability, self.batch)
        manifest = current(folder, "engine", key)
        if manifest is not None:
            found = [Engine.model_validate(entry) for entry in manifest.info["engines"]]
            return [engine.model_copy(update={"file": folder / engine.file}) for engine in found]
        if candidate.name in self.reused:
            self.reused.remove(candidate.name)
        said = tensorrt.graph_precision(onnx.load(str(candidate.file), load_external_data=False))
        shapes = {ENGINE: (1, self.batch, self.batch)} | ({STATIC_ENGINE: (1, 1, 1)} if self.batch > 1 else {})
        info: dict[str, Any] = {"device": self.device.name, "stack": self.stack.name}
        built = []
        with create(folder, "engine", key, info) as temporary:
            for name, batch in shapes.items():
                engine = tensorrt.build_engine(
                    adapter, candidate.file, temporary / name, capability=capability, batch=batch, precision=said
                )
                built.append(engine.model_copy(update={"file": Path(name)}))
            info["engines"] = [json.loads(engine.model_dump_json()) for engine in built]
        return [engine.model_copy(update={"file": folder / engine.file}) for engine in built]


def _moved(candidate: Candidate, folder: Path) -> Candidate:
    """The candidate with its files in `folder`."""
    return candidate.model_copy(
        update={
            name: folder / path.name
            for name in ("file", "scored_file")
            if (path := getattr(candidate, name)) is not None
        }
    )


def _float_inputs(source: Path, target: Path) -> None:
    """The same graph with float32 where an input was uint8 (TensorRT before 8.5): its Cast becomes a no-op."""
    model = onnx.load(str(source))
    for entry in model.graph.input:
        if entry.type.tensor_type.elem_type == onnx.TensorProto.UINT8:
            entry.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    save(model, target)


def _failure_text(rung: Rung) -> str:
    node = f"; first diverging node: {rung.first_divergence}" if rung.first_divergence else ""
    return (
        f'parity rung "{rung.name}" fails: relative error {rung.relative:.2g}, agreement {rung.agreement:.1%} of '
        f"{rung.samples} samples{node}"
    )


def _failure(rung: Rung, tolerance: float | None) -> EdgestillError:
    limit = f"; tolerance {tolerance:g}" if tolerance is not None else ""
    return EdgestillError(
        f'the exported graph does not compute what the model does (rung "{rung.name}")',
        where=f"first diverging node: {rung.first_divergence or 'none alone; the error grows over the graph'}",
        evidence=f"relative error {rung.relative:.2g}{limit}; {rung.agreement:.1%} of decisions kept",
        fix='precision = "auto" leaves a failing precision out' if not rung.name.startswith("onnx") else None,
    )
