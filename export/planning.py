"""From a trained model to every candidate that a device and its stack could run, each compared with PyTorch."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn

from export import parity, tensorrt
from export.availability import EXPORTED, available, refusal_of
from export.candidate import GRAPH, Candidate, Engine, Plan, PlanStep, Rung
from export.floor import Floor
from export.onnx import (
    DEFAULT_IR,
    choose_opset,
    export_graph,
    graph_opset,
    own_version,
    remove,
    save,
    set_metadata,
    write,
)
from export.parity import DifferenceOf, Limits, Samples, spread, take
from export.precision import (
    Quantizer,
    computed_in_int8,
    quantization_for,
    quantize,
    to_bf16,
    to_fp8,
    to_fp16,
    types_of,
)
from export.preflight import preflight, refusal, version_of
from export.search import MOSTLY, Found, Judge, Search, Verdict
from export.section import ENGINE_OPTIONS, ExportSection
from profiles.artifact import array_hash, content_key, create, current, tool_versions
from profiles.device import THIS_MACHINE, Device, Precision, Stack
from profiles.engine_check import this_gpu
from profiles.errors import EdgestillError, InputError
from profiles.measure import model_hash
from profiles.metrics import Metric
from profiles.progress import Progress, Silent, Task
from profiles.quantspec import QuantSpec

ENGINE = "model.engine"
STATIC_ENGINE = "model-batch1.engine"
TIMING = "timing"
"""Folder of the builders' timing caches, inside of a plan's."""
_ONE = (1, 1, 1)
_SCORED = "scored.onnx"
_FORMS = 3
"""Raise when the way a graph is made changes, so that older artefacts are made anew."""
_INT8_DIVERGENCE = 0.3
"""Relative error of a single value at which an INT8 graph is said to diverge, when it has collapsed."""
_FULL, _MIXED = "full.onnx", "mixed.onnx"
Score = Callable[[Path], Metric]
Retrain = Callable[[QuantSpec], tuple[nn.Module, str]]
"""Trains the model on through fake-quantised weights and activations: (the model with new weights, their hash)."""


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
    decides: bool = True,
    metadata: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    retrain: Retrain | None = None,
    floor: Floor | None = None,
    rescue: bool = True,
    output_name: str = "logits",
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
) -> Plan:
    """Exports, quantises, compares and (for TensorRT-RTX) builds; what is there already is not made again.

    With "auto", what costs more is tried only when the metric asks for it: BF16 when FP16 does not keep it; when plain
    INT8 does not, FP8 (where the device has it), then what `export.search` tries, then `retrain`.

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
        decides: the output is class logits; False: other values, which hold no decisions.
        metadata: for the graph's `metadata_props`: preprocessing, labels and the like, as plain values.
        retrain: quantisation-aware training, the last resort; None: there is none.
        floor: the metric to keep; None: 99 % of FP32. Without `score` what counts is the outputs' error, and that the
            decisions agree, as the section asks.
        rescue: whether search and retraining follow where INT8 does not keep the metric; without them, an INT8 that was
            asked for by name and cannot be used is left for the caller to judge.
        output_name: of the graph's output.
        dynamic: further dynamic dimensions, see `export_graph`.

    Raises:
        InputError: an opset that the stack does not read; a precision asked for that there is no export for.
        EdgestillError: the export or an FP32 rung fails, or a rung of a precision that was asked for by name; the
            evidence names the first diverging node.
    """
    started = time.perf_counter()
    section = section or ExportSection()
    progress = progress or Silent()
    wanted = _wanted(precisions, device, stack)
    if (unavailable := tensorrt.refusal_of_options(section, device, stack)) is not None:
        raise InputError(unavailable, where="export", fix="leave it out of [export]")
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
        decides=decides,
        metadata=dict(metadata or {}),
        strict="auto" not in precisions,
        opset=choose_opset(section.opset, stack),
        floor=floor or Floor(),
        output_name=output_name,
        dynamic=dict(dynamic or {}),
        retrain=retrain if section.qat == "auto" else None,
        rescue=rescue,
    )
    with progress.task("export", total=_planned(wanted, stack), unit="graphs") as task:
        work.make(wanted, task)
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
        decides=decides,
        calibration_sha256=work.calibration_hash,
        candidates=tuple(work.candidates),
        seconds=round(time.perf_counter() - started, 2),
        steps=tuple(work.steps),
        lowest_metric=work.lowest,
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


def _planned(wanted: set[str], stack: Stack) -> int:
    """Graphs of the ordinary case."""
    return 1 + ("fp16" in wanted) + ("int8" in wanted) * (1 if stack.runtime == "onnxruntime" else 2)


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
    decides: bool
    metadata: dict[str, Any]
    strict: bool
    opset: int
    floor: Floor
    retrain: Retrain | None
    rescue: bool = True
    output_name: str = "logits"
    dynamic: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    reused: list[str] = field(default_factory=list)
    candidates: list[Candidate] = field(default_factory=list)
    steps: list[PlanStep] = field(default_factory=list)
    searched_key: str = ""

    # -- which graphs, in which order --------------------------------------------------------------------------------

    def make(self, wanted: set[str], task: Task) -> None:
        """Fills `candidates` and `steps`."""
        self.add("fp32", "fp32", self.fp32, task)
        half = self.add("fp16", "fp16", self.fp16, task) if "fp16" in wanted else None
        if "bf16" in wanted and (self.strict or (half is not None and half.file is not None and not self.keeps(half))):
            self.add("bf16", "bf16", self.bf16, task, quiet_refusal=not self.strict)
        if "int8" in wanted:
            self.integer(wanted, task)
        if "fp8" in wanted and self.strict:
            self.eight_bit_floats(task)

    def integer(self, wanted: set[str], task: Task) -> None:
        """INT8, and what helps where it does not keep the metric."""
        plain = [
            self.add(name, "int8", partial(self.int8, name, half=half), task) for name, half in self.remainders("int8")
        ]
        if any(self.keeps(candidate) for candidate in plain) or all(candidate.file is None for candidate in plain):
            return
        if (
            "fp8" in wanted
            and not self.strict
            and any(self.keeps(candidate) for candidate in self.eight_bit_floats(task))
        ):
            return
        if not self.rescue:
            return
        found = self.search(task)
        if found is None:
            self.must_keep(plain)
            return
        if found.keeps:
            for name, half in self.remainders("int8"):
                self.add(name, "int8", self.searched(name, found, _FULL, half=half), task, instead=True)
        mixed = [
            self.add(name, "int8", self.searched(name, found, _MIXED, half=half), task)
            for name, half in (self.remainders("int8-mixed") if found.mixed else [])
        ]
        done = found.keeps or (any(self.keeps(candidate) for candidate in mixed) and found.share >= MOSTLY)
        if not done and self.retrain is not None:
            self.add("int8-qat", "int8", self.retrained, task)
        self.must_keep([candidate for candidate in self.candidates if candidate.precision == "int8"])

    def eight_bit_floats(self, task: Task) -> list[Candidate]:
        """FP8 with both remainders; none where "auto" meets a device without it."""
        return [
            self.add(name, "fp8", partial(self.fp8, name, half=half), task, quiet_refusal=not self.strict)
            for name, half in self.remainders("fp8")
        ]

    def remainders(self, name: str) -> list[tuple[str, bool]]:
        """(candidate, whether what is not quantised is FP16), for every remainder that the device computes in."""
        if self.stack.runtime == "onnxruntime":
            return [(name, False)]
        half = [(f"{name}-fp16", True)] if self.device.why_not("fp16") is None else []
        return [*half, (f"{name}-fp32", False)]

    def add(
        self,
        name: str,
        precision: Precision,
        build: Callable[[], Candidate],
        task: Task,
        *,
        instead: bool = False,
        quiet_refusal: bool = False,
    ) -> Candidate:
        """Builds a candidate, or says why there is none.

        Args:
            instead: it takes the place of the candidate of that name.
            quiet_refusal: where the device or its stack does not have the precision, nothing is listed.
        """
        reason = refusal_of(precision, self.device, self.stack, self.calibration is not None)
        try:
            candidate = Candidate(name=name, precision=precision, refused=reason) if reason else build()
        except EdgestillError as error:
            if precision == "fp32" or (self.strict and name != "int8-qat"):
                raise
            failed = ": ".join(part for part in (error.message, error.evidence) if part)
            candidate = Candidate(name=name, precision=precision, refused=failed)
        if candidate.compute_precision is None:  # else it comes from another plan, which did this
            candidate = self.on_device(candidate)
        if reason and quiet_refusal:
            return candidate
        if instead:
            self.candidates = [candidate if entry.name == name else entry for entry in self.candidates]
        else:
            self.candidates.append(candidate)
        if not reason:
            self.steps.append(self.step(candidate))
        task.advance(note=name)
        return candidate

    def step(self, candidate: Candidate) -> PlanStep:
        return PlanStep(
            name=candidate.name,
            metric=candidate.validation,
            agreement=candidate.parity[-1].agreement if candidate.parity else None,
            size_bytes=candidate.size_bytes,
            seconds=candidate.seconds,
            keeps=self.keeps(candidate),
            note=candidate.refused or "",
        )

    @property
    def lowest(self) -> float | None:
        """The metric to keep; None where none is computed."""
        first = next((candidate for candidate in self.candidates if candidate.name == "fp32"), None)
        if first is None or first.validation is None:
            return None
        return self.floor.lowest(first.validation.value)

    def keeps(self, candidate: Candidate) -> bool:
        """Usable, and with the metric that is asked for."""
        if not candidate.usable:
            return False
        return candidate.validation is None or self.lowest is None or candidate.validation.value >= self.lowest

    def must_keep(self, candidates: list[Candidate]) -> None:
        """Where a precision was asked for by name, one graph of it must compute what the model does."""
        if not self.strict or any(candidate.usable for candidate in candidates):
            return
        failed = next(
            (rung for candidate in candidates for rung in candidate.parity if not rung.passed and candidate.file), None
        )
        if failed is not None:
            raise _failure(failed, None)

    # -- the graphs --------------------------------------------------------------------------------------------------

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

    def limits(self, precision: Precision) -> Limits:
        return parity.limits_of(precision, self.section, judged=self.score is not None)

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
                output_names=(self.output_name,),
                dynamic=self.dynamic,
                metadata=self.graph_metadata("fp32"),
            )
            limits = self.limits("fp32")
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
                save(onnx.load(str(graph)), scored)
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
            rung = self.climb("fp16", parity.open_session(scored), self.limits("fp16"))
            rung = self.judge(rung, scored, self.section.fp16_tolerance)
            return self.describe("fp16", "fp16", graph, (rung,), scored=scored)

        return self.artefact("fp16", "fp16", make)

    def bf16(self) -> Candidate:
        def make(folder: Path) -> Candidate:
            graph = folder / GRAPH
            to_bf16(self.base / GRAPH, graph, self.graph_metadata("bf16"))
            scored = folder / _SCORED
            parity.emulate_half(graph, scored, half=onnx.TensorProto.BFLOAT16)
            limits = self.limits("bf16")
            assert limits.tolerance is not None
            rung = self.climb("bf16", parity.open_session(scored), limits)
            return self.describe("bf16", "bf16", graph, (self.judge(rung, scored, limits.tolerance),), scored=scored)

        return self.artefact("bf16", "bf16", make)

    def fp8(self, name: str, *, half: bool) -> Candidate:
        form = quantization_for(self.device, self.stack)

        def make(folder: Path) -> Candidate:
            assert self.calibration_samples is not None  # refusal_of saw to it
            quantizer = Quantizer(
                self.base / GRAPH, self.calibration_samples, form, self.section.calibration_percentile
            )
            model = to_fp8(quantizer.quantized("minmax"), quantizer.prepared)
            return self.checked(name, "fp8", model, folder, half=half, form="fp8 (E4M3FN), minmax ranges")

        return self.artefact(name, "fp8", make)

    def checked(
        self, name: str, precision: Precision, model: onnx.ModelProto, folder: Path, *, half: bool, form: str
    ) -> Candidate:
        """Writes a QDQ graph whose remainder is FP32, as it is or with an FP16 remainder, and climbs its rung."""
        graph = folder / GRAPH
        made = folder / "quantized.onnx" if half else graph
        set_metadata(model, self.graph_metadata(name, form))
        save(model, made)
        if half:
            to_fp16(made, graph)
            remove(made)
        scored = None if self.native else folder / _SCORED
        if scored is not None:
            parity.emulate(graph, scored)
            if half:
                parity.emulate_half(scored, scored)
        rung = self.climb(name, parity.open_session(scored or graph), self.limits(precision))
        rung = self.judge(rung, scored or graph, _INT8_DIVERGENCE, strict=False)
        return self.describe(name, precision, graph, (rung,), scored=scored, form=form)

    def search(self, task: Task) -> Found | None:
        """What keeps the metric in INT8, from its artefact or searched for now; None: the quantiser fails."""
        form = quantization_for(self.device, self.stack)
        assert self.calibration_samples is not None  # plain INT8 was made
        key = content_key(self.key("int8-search", "int8"), self.lowest)
        folder = self.place("int8-search", "int8")
        manifest = current(folder, "search", key, whole=True)
        if manifest is None:
            task.advance(0, note="int8 search")
            with tempfile.TemporaryDirectory(prefix="edgestill-") as scratch:
                judge = self.search_judge(Path(scratch))
                try:
                    found = Search(self.base / GRAPH, self.calibration_samples, form, self.section, judge).run()
                except EdgestillError as error:
                    self.steps.append(PlanStep(name="int8 search", keeps=False, note=error.evidence or error.message))
                    return None
            info: dict[str, Any] = {
                "described": found.described,
                "keeps": found.keeps,
                "share": found.share,
                "floating": list(found.floating),
                "steps": [json.loads(step.model_dump_json()) for step in found.steps],
            }
            with create(folder, "search", key, info) as temporary:
                save(found.full, temporary / _FULL)
                if found.mixed is not None:
                    save(found.mixed, temporary / _MIXED)
        else:
            info = manifest.info
        self.searched_key = key
        self.steps += [PlanStep.model_validate(step) for step in info["steps"]]
        return Found(
            folder=folder,
            described=info["described"],
            keeps=info["keeps"],
            mixed=(folder / _MIXED).is_file(),
            share=info["share"],
            floating=tuple(info["floating"]),
        )

    def search_judge(self, scratch: Path) -> Judge:
        """How the search looks at a graph: as this target's candidates are looked at, with an FP32 remainder."""
        lowest = self.lowest
        place = scratch / "tried.onnx"

        def written(model: onnx.ModelProto) -> Path:
            write(model, place)
            if not self.native:
                parity.emulate(place, place)
            return place

        def logits(model: onnx.ModelProto) -> NDArray[np.float32]:
            return parity.run_session(parity.open_session(written(model)), self.samples, 256)

        def verdict(model: onnx.ModelProto) -> Verdict:
            found = logits(model)
            same = parity.agreement(self.reference, found, exclusive=self.exclusive) if self.decides else None
            sound = bool(np.isfinite(found).all()) and (same is None or same >= self.section.int8_agreement)
            if self.score is None or lowest is None or not np.isfinite(found).all():
                error = parity.spread_error(self.reference, found)
                return Verdict(1 - error, sound and error <= self.section.int8_tolerance, None, error, same)
            metric = self.score(place)
            return Verdict(metric.value, sound and metric.value >= lowest, metric, None, same)

        def change(found: NDArray[np.float32]) -> float:
            if self.difference is None:
                return -parity.spread_error(self.reference, found)
            return self.difference(found, self.reference, self.rows).value

        return Judge(verdict, logits, self.reference, change)

    def searched(self, name: str, found: Found, file: str, *, half: bool) -> Callable[[], Candidate]:
        """Builds a candidate from a graph that the search left."""
        form = quantization_for(self.device, self.stack)
        described = f"quantised {form}, {found.described}"
        if file == _MIXED:
            described += f"; {len(found.floating)} nodes in float: {', '.join(found.floating)}"

        def make(folder: Path) -> Candidate:
            model = onnx.load(str(found.folder / file))
            return self.checked(name, "int8", model, folder, half=half, form=described)

        # plain INT8 stays where it is: the next run asks for it again
        stored = name if file == _MIXED else f"{name}-searched"
        return lambda: self.artefact(stored, "int8", make, name=name, made_from=(self.searched_key, half))

    def retrained(self) -> Candidate:
        """INT8 of a model that was trained on through rounded weights and activations; its FP32 graph is checked, too.

        Raises:
            EdgestillError: the new weights' FP32 graph fails, or their INT8 graph cannot be made.
        """
        assert self.retrain is not None
        started = time.perf_counter()
        model, key = self.retrain(quantization_for(self.device, self.stack).spec)
        trained = round(time.perf_counter() - started, 2)
        other = replace(
            self,
            model=model,
            model_key=key,
            folder=self.folder / f"int8-qat-{key[:8]}",
            retrain=None,
            strict=False,
            reused=[],
            candidates=[],
            steps=[],
            floor=Floor(metric_floor=self.lowest),
        )
        with Silent().task("export", total=None, unit="graphs") as task:
            other.add("fp32", "fp32", other.fp32, task)
            other.integer({"int8"}, task)
        if all(entry.name in other.reused for entry in other.candidates if entry.file is not None):
            self.reused.append("int8-qat")
        self.steps.append(
            PlanStep(
                name="quantisation-aware training",
                metric=other.candidates[0].validation,
                seconds=trained,
                note="metric of its weights in FP32",
            )
        )
        self.steps += [step for step in other.steps if step.name != "fp32"]
        ranked = sorted(
            (entry for entry in other.candidates if entry.precision == "int8" and entry.file is not None),
            key=lambda entry: (other.keeps(entry), entry.validation.value if entry.validation is not None else 0.0),
        )
        if not ranked:
            refused = next((entry.refused for entry in other.candidates if entry.refused), None)
            raise EdgestillError("no INT8 graph of the retrained weights", evidence=refused)
        best = ranked[-1]
        notes = (f"{best.name} after quantisation-aware training", *best.notes)
        return best.model_copy(update={"name": "int8-qat", "notes": notes})

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
                remove(made)
            scored = None if self.native else folder / _SCORED
            if scored is not None:
                parity.emulate(graph, scored)
                if half:
                    parity.emulate_half(scored, scored)
            checked = scored or graph
            rung = self.climb(name, parity.open_session(checked), self.limits("int8"))
            rung = self.judge(rung, checked, _INT8_DIVERGENCE, strict=False)
            described = f"quantised {form}, {self.section.calibration_method} ranges"
            return self.describe(name, "int8", graph, (rung,), scored=scored, form=described)

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
            decides=self.decides,
            difference=self.difference,
        )

    def require(self, rung: Rung, expected: Callable[[], Mapping[str, NDArray[Any]]], graph: Path) -> None:
        """Raises when an FP32 rung failed, naming the first diverging node."""
        if rung.passed:
            return
        node = parity.first_divergence(expected(), graph, self.first_samples, self.section.fp32_tolerance)
        raise _failure(rung.model_copy(update={"first_divergence": node}), self.section.fp32_tolerance)

    def judge(self, rung: Rung, graph: Path, tolerance: float, *, strict: bool = True) -> Rung:
        """A failing rung with its first diverging node; raises when its precision was asked for by name.

        strict: False where something else may help.
        """
        if rung.passed:
            return rung
        expected = parity.graph_values(self.base / GRAPH, self.first_samples)
        node = parity.first_divergence(expected, graph, self.first_samples, tolerance)
        rung = rung.model_copy(update={"first_divergence": node})
        if self.strict and strict:
            raise _failure(rung, tolerance)
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
            notes.append(form)
        return Candidate(
            name=name,
            precision=precision,
            file=graph,
            scored_file=scored,
            input_dtype="float32" if scored is not None and precision == "fp32" else None,
            opset=graph_opset(model),
            ir_version=int(model.ir_version),
            sha256=model_hash(graph),
            size_bytes=sum(path.stat().st_size for path in graph.parent.glob(f"{GRAPH}*")),
            parity=rungs,
            validation=self.score(scored or graph) if self.score is not None and failed is None else None,
            refused=failure_text(failed) if failed is not None else None,
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
        said = types_of(model)
        if self.stack.runtime != "onnxruntime":
            return f"{said} by the graph's types, unverified (not looked into on its GPU)"
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
        if precision in ("int8", "fp8"):
            form = quantization_for(self.device, self.stack)
            return (ir, repr(form), self.native, *(() if form.outputs else ("inputs alone",)))
        return (ir, self.float_inputs if precision == "fp32" else None)

    def place(self, name: str, precision: Precision) -> Path:
        """The candidate's folder. Its form is part of the name: two devices' graphs lie side by side."""
        larger = f"-b{self.batch}" if self.batch > 2 else ""
        return self.folder / f"{name}-opset{self.opset}{larger}-{content_key(*self.form(precision))[:8]}"

    def key(self, name: str, precision: Precision) -> str:
        """Hash of everything that decides a candidate."""
        quantized = precision in ("int8", "fp8")
        # what decides whether something else is tried is no part of a graph
        section = self.section.model_dump(mode="json", exclude={"qat", "qat_epochs", *ENGINE_OPTIONS})
        return content_key(
            _FORMS,
            name,
            self.model_key,
            section,
            self.opset,
            list(self.form(precision)),
            {key: array_hash(array) for key, array in self.samples.items()},
            self.calibration_hash if quantized else None,
            self.metadata,
            self.output_name,
            {name: {str(place): size for place, size in sizes.items()} for name, sizes in self.dynamic.items()},
            self.exclusive,
            self.decides,
            self.score is not None,
            self.difference is not None,
            tool_versions(),
        )

    def artefact(
        self,
        stored: str,
        precision: Precision,
        make: Callable[[Path], Candidate],
        *,
        name: str | None = None,
        made_from: tuple[Any, ...] = (),
    ) -> Candidate:
        """The candidate from its folder when that was made from the same, else made now.

        Args:
            stored: what its folder is called by.
            name: of the candidate, where it is another one.
            made_from: what else decides it.
        """
        name = name or stored
        key = self.key(stored, precision)
        if made_from:
            key = content_key(key, *made_from)
        folder = self.place(stored, precision)
        manifest = current(folder, "graph", key, whole=True)
        if manifest is not None:
            candidate = Candidate.model_validate(manifest.info["candidate"])
            if candidate.refused is None or not self.strict or precision == "int8":
                self.reused.append(name)
                return _moved(candidate, folder)
        # one of that name that was there did not do
        self.reused = [entry for entry in self.reused if entry != name]
        info: dict[str, Any] = {}
        with create(folder, "graph", key, info) as temporary:
            started = time.perf_counter()
            candidate = make(temporary)
            candidate = candidate.model_copy(update={"seconds": round(time.perf_counter() - started, 2)})
            remove(temporary / "optimised.onnx")
            relative = _moved(candidate, Path())
            info["candidate"] = json.loads(relative.model_dump_json())
            info["calibration_sha256"] = self.calibration_hash if precision in ("int8", "fp8") else None
        return _moved(relative, folder)

    def with_engine(self, candidate: Candidate) -> Candidate:
        """Adds the parser's evidence and, where its builder is here, the engines."""
        if candidate.file is None or candidate.refused is not None or self.stack.runtime == "onnxruntime":
            return candidate
        rtx = tensorrt.load_adapter(rtx=True)
        label = parsed = None
        if rtx is not None:
            label = parsed = tensorrt.evidence_label(rtx, self.stack.runtime, self.stack.runtime_version)
        if self.stack.runtime == "tensorrt":
            if rtx is not None:
                errors = tensorrt.parse(rtx, candidate.file)
                parsed = label if errors is None else f"not {label}: {errors}"
            adapter = tensorrt.adapter_for(self.device, self.stack)
            if adapter is None:
                note = f"TensorRT {self.stack.runtime_version} builds its engine on the device: sh build_engine.sh"
                return candidate.model_copy(update={"parsed_by": parsed, "engine_note": note})
        else:
            adapter = rtx
        if adapter is None:
            return candidate.model_copy(update={"engine_note": f"not built: {tensorrt.INSTALL_RTX}"})
        if not self.section.engines:
            note = "not built: engines = false in [export]"
            return candidate.model_copy(update={"parsed_by": parsed, "engine_note": note})
        try:
            engines = self.engines(candidate, adapter)
        except EdgestillError as error:
            return candidate.model_copy(update={"refused": f"{error.message}: {error.evidence}"})
        found: dict[str, Any] = {
            "engine": engines[0],
            "static_engine": engines[1] if len(engines) > 1 else None,
            "parsed_by": parsed,
        }
        if engines[0].inspection is not None:
            found["compute_precision"] = engines[0].realised_precision
        return candidate.model_copy(update=found)

    def engines(self, candidate: Candidate, adapter: tensorrt.Adapter) -> list[Engine]:
        capability = self.device.compute_capability
        if capability is None or candidate.file is None:
            raise EdgestillError("an engine needs a GPU", evidence=f"{self.device.title} has no compute capability")
        first, *others = tensorrt.profiles_of(self.batch, self.section.engine_batches)
        options = tensorrt.BuildOptions(
            more_profiles=tuple(others),
            workspace_mib=tensorrt.workspace_of(self.section, self.device),
            hardware_compatibility=self.section.hardware_compatibility,
            version_compatible=self.section.version_compatible,
            optimization_level=self.section.builder_optimization_level,
        )
        place = candidate.file.parent
        folder = place.with_name(f"{place.name}-sm{capability.replace('.', '')}-b{self.batch}")
        gpu = this_gpu()
        here = gpu is not None and gpu["compute_capability"] == capability
        key = content_key(
            _FORMS, candidate.sha256, str(adapter), capability, self.batch, asdict(options), gpu if here else None
        )
        manifest = current(folder, "engine", key, whole=True)
        if manifest is not None:
            found = [Engine.model_validate(entry) for entry in manifest.info["engines"]]
            return [engine.model_copy(update={"file": folder / engine.file}) for engine in found]
        if candidate.name in self.reused:
            self.reused.remove(candidate.name)
        said = types_of(onnx.load(str(candidate.file), load_external_data=False))
        cache = self.folder / TIMING / f"{content_key(candidate.sha256, str(adapter), capability)[:16]}.cache"
        wanted = {ENGINE: (first, replace(options, timing_cache=cache))}
        if first != _ONE:
            wanted[STATIC_ENGINE] = (_ONE, replace(options, timing_cache=cache, more_profiles=()))
        info: dict[str, Any] = {"device": self.device.name, "stack": self.stack.name}
        built = []
        with create(folder, "engine", key, info) as temporary:
            for name, (batch, chosen) in wanted.items():
                engine = tensorrt.build_engine(
                    adapter,
                    candidate.file,
                    temporary / name,
                    capability=capability,
                    batch=batch,
                    precision=said,
                    options=chosen,
                )
                if here:
                    seen = tensorrt.inspect_engine(adapter, engine)
                    engine = engine.model_copy(update={"inspection": seen, "realised_precision": str(seen)})
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


def failure_text(rung: Rung) -> str:
    """Why a rung failed, one clause."""
    node = f"; first diverging node: {rung.first_divergence}" if rung.first_divergence else ""
    return f'parity rung "{rung.name}" fails: {figures_of(rung)}, {rung.samples} samples{node}'


def figures_of(rung: Rung) -> str:
    """The rung's errors and its agreement, as far as it has them."""
    agreed = f", {rung.agreement:.1%} of decisions kept" if rung.agreement is not None else ""
    spread = f", {rung.spread_error:.2g} of the outputs' spread" if rung.spread_error is not None else ""
    return f"relative error {rung.relative:.2g}{spread}{agreed}"


def _failure(rung: Rung, tolerance: float | None) -> EdgestillError:
    limit = f"; tolerance {tolerance:g}" if tolerance is not None else ""
    return EdgestillError(
        f'the exported graph does not compute what the model does (rung "{rung.name}")',
        where=f"first diverging node: {rung.first_divergence or 'none alone; the error grows over the graph'}",
        evidence=f"{figures_of(rung)}{limit}",
        fix='precision = "auto" leaves a failing precision out' if not rung.name.startswith("onnx") else None,
    )
