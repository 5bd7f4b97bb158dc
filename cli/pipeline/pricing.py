"""What every member of a pool costs in every precision on every target, before anything is trained.

Where the device is attached, each member is exported once with fresh weights, as the latency of a network does not
depend on what it has learned. A calibrated device then needs no run; another one measures the graphs against each
other for about a second each. Elsewhere the facts of the device have to do, with an assumed efficiency.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from cli.pipeline.pool_cost import multiply_adds, paper_costs, precisions_of
from distill.students import Student
from distill.students.arch import Arch, TextArch
from distill.students.pool import Cost, kind_of
from export.onnx import choose_opset, export_graph
from export.precision import quantization_for, quantize
from profiles import artifact
from profiles.calibration import (
    Calibration,
    assumed_efficiency,
    find_calibration,
    launch_overhead_ms,
    predict,
    stored_calibrations,
    usable,
)
from profiles.device import Precision, Target, TargetSection
from profiles.errors import EdgestillError
from profiles.measure import measure
from profiles.measure_section import MeasureSection
from profiles.measurement import Latency, Measurement
from profiles.predict import roofline
from profiles.section import Section

if TYPE_CHECKING:
    from cli.pipeline.run import Run

Costs = dict[Precision, Cost]
"""By precision; one that cannot be exported is missing."""

KIND = "cost"
_FORM = 1
"""Raise when the way a graph is priced changes, so that older costs are found anew."""
_TOGETHER = 4
"""Members that are measured against each other, and lost together when the run is interrupted."""
_SECONDS = 1.0
"""Of warming up, and of sampling, one graph."""
_SAMPLES = 2000
_INPUTS = 64
_CALIBRATION_ROWS = 32
"""The ranges of an INT8 graph play no part in its latency."""
_HOPELESS = 2.0
"""A member that needs so many times what every target allows need not be followed by larger ones."""
_MIB = 2**20


class Spread(Section):
    """Latencies of one clock in milliseconds; None where there were too few samples. keys: percentiles as text."""

    percentiles: dict[str, float | None]
    maximum: float

    @classmethod
    def of(cls, latency: Latency) -> Spread:
        found = {"50": latency.p50, "90": latency.p90, "95": latency.p95, "99": latency.p99, "99.9": latency.p99_9}
        return cls(percentiles=found, maximum=latency.maximum)


class Figures(Section):
    """One graph. clocks: by scope, where it was measured. predicted_ms: the median by scope, where it was predicted;
    tail: how many times that p99 is."""

    precision: Precision
    file_mib: float
    memory_mib: float | None
    bound_ms: float | None
    clocks: dict[str, Spread] = Field(default_factory=dict)
    predicted_ms: dict[str, float] = Field(default_factory=dict)
    tail: float = 1.0


class Pricing:
    """The costs of a run's pool.

    Args:
        run: whose targets are chosen for.
        targets: those.
    """

    def __init__(self, run: Run, targets: Sequence[Target]) -> None:
        self.run, self.targets = run, tuple(targets)
        self.has_worked = False
        self._work: dict[Arch, int] = {}

    @property
    def attached(self) -> tuple[Target, ...]:
        """The targets that this machine is."""
        return tuple(target for target in self.targets if is_attached(target))

    def work(self, arch: Arch) -> int:
        """Multiply-adds of one sample."""
        if arch not in self._work:
            self._work[arch] = multiply_adds(self.run.fresh(str(arch)), self.run.dataset.input)
        return self._work[arch]

    def calibration(self, target: Target) -> Calibration | None:
        """That of the target's device and stack; None where there is none.

        Raises:
            InputError: it was made with another runtime version, processor or number of threads.
        """
        threads = self.run.recipe.measure.threads
        found = find_calibration(target.device, target.stack, threads=threads)
        return None if found is None else usable(found, target.device, target.stack, threads)

    def overhead_ms(self, target: Target) -> float:
        """What a query of an empty graph takes there at least."""
        return launch_overhead_ms(target.device, self.calibration(target) if is_attached(target) else None)

    def efficiency(self) -> tuple[float, str]:
        """The share of its roofline that a device is taken to reach, and where that number is from."""
        asked = self.run.recipe.student.choice.assumed_efficiency
        if asked is not None:
            return asked, "student.choice.assumed_efficiency"
        known = any(calibration.efficiency is not None for calibration in stored_calibrations())
        return assumed_efficiency(), "what calibrated devices reach" if known else "a prior; no device is calibrated"

    def costs(self, archs: Sequence[Arch]) -> dict[str, dict[Arch, Costs]]:
        """By target and architecture; what is not stored yet is exported, and measured or predicted, now."""
        found: dict[str, dict[Arch, Costs]] = {target.name: {} for target in self.targets}
        for target in self.targets:
            if not is_attached(target):
                found[target.name] = {arch: self.paper(arch, target) for arch in archs}
        for targets in self._groups():
            for name, costs in self._priced(archs, targets).items():
                found[name] = costs
        return found

    def paper(self, arch: Arch, target: Target) -> Costs:
        """What facts and an assumed efficiency say of one member on one target."""
        efficiency, _ = self.efficiency()
        return paper_costs(
            self.run.fresh(str(arch)),
            self.run.dataset.input,
            target,
            efficiency=efficiency,
            overhead_ms=launch_overhead_ms(target.device, None),
        )

    def missing(self, archs: Sequence[Arch]) -> int:
        """How many graphs would be made at most to know all costs; 0 where an earlier run has left them."""
        count = 0
        for targets in self._groups():
            wanted, target = _precisions(targets), targets[0]
            stored: dict[Arch, tuple[Figures, ...]] = {}
            hopeless: dict[Arch, float] = {}
            for arch in self._order(archs):
                manifest = artifact.current(self._folder(arch, target), KIND, self._key(arch, targets, wanted))
                if manifest is not None:
                    stored[arch] = tuple(Figures.model_validate(entry) for entry in manifest.info["figures"])
                    least = self._least(arch, stored, targets)
                    hopeless |= {} if least is None else {arch: least}
                elif not _beyond(arch, hopeless):
                    count += len(wanted)
        return count

    def _groups(self) -> list[list[Target]]:
        """The attached targets, those of one batch size together."""
        groups: dict[int, list[Target]] = {}
        for target in self.attached:
            groups.setdefault(target.section.batch, []).append(target)
        return list(groups.values())

    def _order(self, archs: Sequence[Arch]) -> list[Arch]:
        """Those with little work first."""
        return sorted(archs, key=lambda arch: (self.work(arch), str(arch)))

    # -- on this machine ---------------------------------------------------------------------------------------------

    def _priced(self, archs: Sequence[Arch], targets: Sequence[Target]) -> dict[str, dict[Arch, Costs]]:
        """Costs on targets that differ in their limits alone, cheap members first."""
        order = self._order(archs)
        wanted = _precisions(targets)
        stored: dict[Arch, tuple[Figures, ...]] = {}
        hopeless: dict[Arch, float] = {}
        with self.run.progress.task("pricing the pool", total=len(order), unit="students") as task:
            for start in range(0, len(order), _TOGETHER):
                chunk = [arch for arch in order[start : start + _TOGETHER] if not _beyond(arch, hopeless)]
                stored |= self._chunk(chunk, targets, wanted)
                for arch in chunk:
                    least = self._least(arch, stored, targets)
                    if least is not None:
                        hopeless[arch] = least
                task.advance(len(order[start : start + _TOGETHER]))
        tails = {
            target.name: _tail(stored.values(), target.section.latency_scope, target.section.percentile)
            for target in targets
        }
        costs: dict[str, dict[Arch, Costs]] = {target.name: {} for target in targets}
        for target in targets:
            for arch in archs:
                if arch in stored:
                    costs[target.name][arch] = {
                        each.precision: _cost(each, target.section, tails[target.name])
                        for each in stored[arch]
                        if each.precision in precisions_of(target)
                    }
                else:
                    least = min(value for other, value in hopeless.items() if _larger(arch, other))
                    bound = Cost(latency_bound_ms=least)
                    costs[target.name][arch] = dict.fromkeys(precisions_of(target), bound)
        return costs

    def _least(self, arch: Arch, stored: Mapping[Arch, tuple[Figures, ...]], targets: Sequence[Target]) -> float | None:
        """The latency of a member that no target comes near to allowing, in its fastest precision."""
        limits = [target.section.latency_ms for target in targets]
        if any(limit is None for limit in limits) or not stored.get(arch):
            return None
        least = min(_typical(each, targets[0].section.latency_scope) for each in stored[arch])
        return least if least > _HOPELESS * max(limit for limit in limits if limit is not None) else None

    def _chunk(
        self, archs: Sequence[Arch], targets: Sequence[Target], wanted: Sequence[Precision]
    ) -> dict[Arch, tuple[Figures, ...]]:
        target = targets[0]
        found: dict[Arch, tuple[Figures, ...]] = {}
        for arch in archs:
            manifest = artifact.current(self._folder(arch, target), KIND, self._key(arch, targets, wanted))
            if manifest is not None:
                found[arch] = tuple(Figures.model_validate(entry) for entry in manifest.info["figures"])
        missing = [arch for arch in archs if arch not in found]
        if not missing:
            return found
        self.has_worked = True
        with tempfile.TemporaryDirectory(prefix="edgestill-") as folder:
            graphs: dict[tuple[Arch, Precision], Path] = {}
            for arch in missing:
                graphs |= {(arch, each): file for each, file in self._graphs(arch, target, wanted, Path(folder))}
            figures = self._figures(graphs, targets)
        for arch in missing:
            found[arch] = tuple(figures[arch, each] for each in wanted if (arch, each) in figures)
            info: dict[str, Any] = {"figures": [each.model_dump(mode="json") for each in found[arch]]}
            with artifact.create(self._folder(arch, target), KIND, self._key(arch, targets, wanted), info):
                pass  # all of it is in the manifest
        return found

    def _graphs(
        self, arch: Arch, target: Target, wanted: Sequence[Precision], folder: Path
    ) -> Iterator[tuple[Precision, Path]]:
        """The files of a student with fresh weights; a precision that cannot be made is left out."""
        run, dataset = self.run, self.run.dataset
        rows = np.asarray(dataset.train.inputs[:_CALIBRATION_ROWS])
        file = folder / f"{arch}.onnx"
        examples = {dataset.input.name: torch.from_numpy(rows[:2].copy())}
        network = _Fresh(run.fresh(str(arch))).eval()
        opset = choose_opset(run.recipe.export.opset, target.stack)
        export_graph(network, examples, file, opset=opset, max_ir=target.stack.max_ir)
        if "fp32" in wanted:
            yield "fp32", file
        if "int8" in wanted:
            quantised = folder / f"{arch}-int8.onnx"
            form = quantization_for(target.device, target.stack)
            try:
                quantize(file, quantised, {dataset.input.name: rows}, form, run.recipe.export)
            except EdgestillError as error:
                run.say_once(f"{arch} has no INT8 graph: {error.message}")
                return
            yield "int8", quantised

    def _figures(
        self, graphs: Mapping[tuple[Arch, Precision], Path], targets: Sequence[Target]
    ) -> dict[tuple[Arch, Precision], Figures]:
        run, target = self.run, targets[0]
        batch, calibration = target.section.batch, self.calibration(target)
        measured: dict[str, Measurement] = {}
        if calibration is None:
            inputs = run.dataset.validation.inputs
            results = measure(
                {f"{arch} {precision}": file for (arch, precision), file in graphs.items()},
                {run.dataset.input.name: np.asarray(inputs[: max(_INPUTS, batch)])},
                # without a limit, which would stop the sampling early
                TargetSection(name="pool", batch=batch),
                MeasureSection(
                    threads=run.recipe.measure.threads,
                    idle_gap_ms=run.recipe.measure.idle_gap_ms,
                    max_seconds=_SECONDS,
                    warmup_seconds=_SECONDS,
                    max_samples=_SAMPLES,
                    energy_seconds=0,
                ),
                progress=None,
                fresh_process=_asks_for_memory(targets),
            )
            measured = {name: result.measurement for name, result in results.items()}
        found = {}
        for (arch, precision), file in graphs.items():
            bound = roofline(file, target.device, precision, batch, target.power_mode).bound_ms
            size = sum(path.stat().st_size for path in file.parent.glob(f"{file.name}*")) / _MIB
            if calibration is not None:
                # this machine's processor computes in no other one
                said = predict(file, calibration, precision="int8" if precision == "int8" else "fp32", batch=batch)
                found[arch, precision] = Figures(
                    precision=precision,
                    file_mib=size,
                    memory_mib=said.memory_mib,
                    bound_ms=bound,
                    predicted_ms={"end_to_end": said.p50_ms, "compute": said.compute_ms},
                    tail=said.p99_ms / said.p50_ms if math.isfinite(said.p99_ms) else 1.0,
                )
                continue
            seen = measured[f"{arch} {precision}"]
            found[arch, precision] = Figures(
                precision=precision,
                file_mib=size,
                memory_mib=seen.memory.peak_mib,
                bound_ms=bound,
                clocks={"end_to_end": Spread.of(seen.end_to_end), "compute": Spread.of(seen.compute)},
            )
        return found

    def _folder(self, arch: Arch, target: Target) -> Path:
        return self.run.folder / "choice" / "costs" / f"{arch}-b{target.section.batch}"

    def _key(self, arch: Arch, targets: Sequence[Target], wanted: Sequence[Precision]) -> str:
        run, target = self.run, targets[0]
        spec, calibration = run.dataset.input, self.calibration(target)
        return artifact.content_key(
            _FORM,
            str(arch),
            [spec.kind, list(spec.shape), spec.vocabulary],
            len(run.dataset.classes),
            target.section.batch,
            list(wanted),
            target.device,
            target.stack,
            run.recipe.export.opset,
            [run.recipe.measure.threads, run.recipe.measure.idle_gap_ms],
            _asks_for_memory(targets),
            calibration,
            artifact.tool_versions(),
        )


class _Fresh(nn.Module):
    """An untrained student: inputs -> the head's output (N, C)."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(self, x: Tensor) -> Tensor:
        head: Tensor = self.student(x).head
        return head


def is_attached(target: Target) -> bool:
    """Whether the target's artefacts can be run here."""
    return target.is_this_machine and target.stack.runtime == "onnxruntime"


def _precisions(targets: Sequence[Target]) -> tuple[Precision, ...]:
    """What some of the targets may get."""
    return tuple(dict.fromkeys(precision for target in targets for precision in precisions_of(target)))


def _asks_for_memory(targets: Sequence[Target]) -> bool:
    return any(target.section.memory_mib is not None for target in targets)


def _cost(figures: Figures, section: TargetSection, tail: float) -> Cost:
    source: Literal["calibrated", "measured"] = "measured"
    if figures.predicted_ms:
        # a calibration knows the median and p99; what lies beyond is for the measurement to say
        source, tail = "calibrated", 1.0 if section.percentile == 50 else figures.tail
    expected = _typical(figures, section.latency_scope) * tail
    return Cost(figures.file_mib, figures.memory_mib, figures.bound_ms, expected, source)


def _typical(figures: Figures, scope: str) -> float:
    """The median latency, or the largest where there were too few samples for it."""
    if figures.predicted_ms:
        return figures.predicted_ms[scope]
    clock = figures.clocks[scope]
    median = clock.percentiles["50"]
    return clock.maximum if median is None else median


def _tail(pool: Any, scope: str, percentile: float) -> float:
    """How many times the median a percentile is, as the median over the pool.

    A short measurement tells a graph's median well and its own tail badly: a single pause of the machine makes it.
    """
    ratios = []
    for member in pool:
        for figures in member:
            clock = figures.clocks.get(scope)
            median = clock.percentiles["50"] if clock is not None else None
            if clock is None or not median:
                continue
            # a short measurement has too few samples for the highest ones
            known = [
                value for name, value in clock.percentiles.items() if value is not None and float(name) <= percentile
            ]
            ratios.append(max(known) / median)
    return statistics.median(ratios) if ratios else 1.0


def _beyond(arch: Arch, hopeless: Mapping[Arch, float]) -> bool:
    return any(_larger(arch, other) for other in hopeless)


def _larger(arch: Arch, other: Arch) -> bool:
    """Whether an architecture holds the other one whole, so that it cannot be faster."""
    same = kind_of(arch) == kind_of(other) and arch.width >= other.width and arch.depth >= other.depth
    if isinstance(arch, TextArch) and isinstance(other, TextArch) and arch.heads != other.heads:
        return False
    return same and arch.kernel >= other.kernel
