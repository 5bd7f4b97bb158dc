"""What every member of a pool costs in every precision on every target, before anything is trained.

Where the device is attached, each member is exported once with fresh weights, as the latency of a network does not
depend on what it has learned. A calibrated device then needs no run; another one measures the graphs against each
other for about a second each. Elsewhere the facts of the device have to do, with an assumed efficiency.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from cli.pipeline.pool_cost import held_to, multiply_adds, paper_costs, precisions_of, starting_ms
from distill.students import Student
from distill.students.arch import Arch, TextArch
from distill.students.pool import Cost, kind_of
from export.onnx import choose_opset, export_graph
from export.precision import quantization_for, quantize
from profiles import artifact
from profiles.calibration import (
    PRIOR_EFFICIENCY,
    Calibration,
    assumed_efficiency,
    command,
    find_calibration,
    launch_overhead_ms,
    predict,
    usable,
)
from profiles.device import Precision, Target, TargetSection
from profiles.errors import EdgestillError
from profiles.measure import measure
from profiles.measure_section import MeasureSection
from profiles.measurement import Latency, Measurement, Scope
from profiles.predict import node_costs, roofline
from profiles.section import Section

if TYPE_CHECKING:
    from cli.pipeline.run import Run

Costs = dict[Precision, Cost]
"""By precision; one that cannot be exported is missing."""

KIND = "cost"
_FORM = 2
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
    def of(cls, latency: Latency, *, settled: bool) -> Spread:
        """Of latencies that did not settle only the fastest query says something, as a lower end: a pause of the
        machine must not exclude a student that nobody then looks at."""
        if not settled:
            return cls(percentiles={"50": latency.minimum}, maximum=latency.minimum)
        found = {"50": latency.p50, "90": latency.p90, "95": latency.p95, "99": latency.p99, "99.9": latency.p99_9}
        return cls(percentiles=found, maximum=latency.maximum)


class Figures(Section):
    """One graph. clocks: by scope, where it was measured. predicted_ms: the median on an undisturbed core by scope,
    where it was predicted; ratios: by scope and percentile, how many times that the percentile of all queries is."""

    precision: Precision
    file_mib: float
    memory_mib: float | None
    bound_ms: float | None
    clocks: dict[str, Spread] = Field(default_factory=dict)
    predicted_ms: dict[str, float] = Field(default_factory=dict)
    ratios: dict[Scope, dict[str, float]] = Field(default_factory=dict)


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
        self._reached: dict[Precision, float | None] = {}
        self._calibrations: dict[str, Calibration | None] = {}
        self._noisy: dict[str, tuple[Figures, ...]] = {}
        """By key, what was measured on a machine that was not quiet: good for this run alone."""

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
        """That of the target's device and stack; None where there is none for the run's threads and the target's batch.

        One for others says nothing here: that is told, and the pool is measured.

        Raises:
            InputError: it was made with another runtime version or processor, or by other rules.
        """
        if target.name not in self._calibrations:
            self._calibrations[target.name] = self._calibration(target)
        return self._calibrations[target.name]

    def _calibration(self, target: Target) -> Calibration | None:
        run, threads, batch = self.run, self.run.recipe.measure.threads, target.section.batch
        found = find_calibration(target.device, target.stack, threads=threads)
        if found is None:
            return None
        if found.threads != threads:
            run.say_once(
                f"the calibration of {target.device.name} is for {found.threads} thread(s), not {threads}: the pool is "
                f"measured instead; {command(threads)} makes one"
            )
            return None
        usable(found, target.device, target.stack, threads)
        if batch not in found.batch:
            known = ", ".join(map(str, found.batch))
            run.say_once(
                f"{target.device.name} is calibrated for batch {known}, not {batch}: the pool is measured instead"
            )
            return None
        return found

    def overhead_ms(self, target: Target) -> float:
        """What a query of an empty graph takes there at least."""
        return launch_overhead_ms(target.device, self.calibration(target) if is_attached(target) else None)

    def efficiency(self, target: Target | None = None, precision: Precision = "fp32") -> tuple[float, str]:
        """The share of its roofline that a device is taken to reach in a precision, and where that number is from.

        Args:
            target: None: a CPU.
            precision: calibrations tell FP32 and INT8.
        """
        asked = self.run.recipe.student.choice.assumed_efficiency
        if asked is not None:
            return asked, "student.choice.assumed_efficiency"
        if target is not None and target.device.kind == "gpu":
            return PRIOR_EFFICIENCY, "a prior; no calibration tells a GPU's"
        if precision not in self._reached:
            self._reached[precision] = assumed_efficiency("int8" if precision == "int8" else "fp32")
        known = self._reached[precision]
        if known is None:
            return PRIOR_EFFICIENCY, "a prior; no device is calibrated"
        return known, f"what calibrated devices reach in {'INT8' if precision == 'int8' else 'FP32'}"

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
        return paper_costs(
            self.run.fresh(str(arch)),
            self.run.dataset.input,
            target,
            efficiency=lambda precision: self.efficiency(target, precision)[0],
            launch_ms=launch_overhead_ms(target.device, None),
        )

    def priced_file(self, target: Target, arch: Arch, file: Path, precision: Precision) -> Cost | None:
        """What an exported file of a student costs on a target that is not attached, by the file's own nodes.

        A graph that is INT8 in part has nodes in several types: each is held to the peak, and to the assumed
        efficiency, of its own, since the units of a device take turns as the layers of a student do.

        Args:
            target: the device.
            arch: the student's, whose memory on paper is a lower end of the file's.
            file: the ONNX graph of a candidate.
            precision: the candidate's; nodes whose type the graph does not tell compute in it.

        Returns:
            None where the target is attached: there, the file is measured.

        Raises:
            InputError: missing or damaged file.
        """
        if is_attached(target):
            return None
        batch, flops = target.section.batch, dict[Precision, int]()
        nodes = [node for node in node_costs(file, batch) if node.matrix]
        for node in nodes:
            computed = held_to(node.precision or precision, target)
            flops[computed] = flops.get(computed, 0) + node.flops
        peaks = {name: target.device.peak(name, target.power_mode) for name in flops}
        parts = {name: flops[name] / peak * 1e3 for name, peak in peaks.items() if peak}
        # a whole graph's bytes are counted as they are stored, whatever computes
        whole = roofline(file, target.device, precision, batch, target.power_mode)
        moved_ms = whole.bound_ms if whole.limiting == "memory" and whole.bound_ms is not None else 0.0
        bound = max(sum(parts.values()), moved_ms)
        paper = self.paper(arch, target).get(precision, Cost())
        size = sum(path.stat().st_size for path in file.parent.glob(f"{file.name}*")) / _MIB
        if not bound or len(parts) < len(flops):
            return Cost(size, paper.memory_mib, bound or None)
        reached = {name: self.efficiency(target, name)[0] for name in parts}
        worked = max(sum(ms / reached[name] for name, ms in parts.items()), moved_ms / max(reached.values()))
        started = starting_ms(target, len(nodes), launch_overhead_ms(target.device, None))
        return Cost(size, paper.memory_mib, bound, worked + started, "assumed")

    def missing(self, archs: Sequence[Arch]) -> int:
        """How many graphs would be made at most to know all costs; 0 where an earlier run has left them."""
        count = 0
        for targets in self._groups():
            wanted = _precisions(targets)
            hopeless: set[Arch] = set()
            for arch in self._order(archs):
                known = self._known(arch, targets, wanted)
                if known is None:
                    count += 0 if _beyond(arch, hopeless) else len(wanted)
                elif _is_hopeless(known, targets):
                    hopeless.add(arch)
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
        hopeless: set[Arch] = set()
        with self.run.progress.task("pricing the pool", total=len(order), unit="students") as task:
            for start in range(0, len(order), _TOGETHER):
                chunk = [arch for arch in order[start : start + _TOGETHER] if not _beyond(arch, hopeless)]
                stored |= self._chunk(chunk, targets, wanted)
                hopeless |= {arch for arch in chunk if _is_hopeless(stored[arch], targets)}
                task.advance(len(order[start : start + _TOGETHER]))
        costs: dict[str, dict[Arch, Costs]] = {}
        for target in targets:
            section, given = target.section, precisions_of(target)
            self._tell_lower_end(target, stored)
            tail = _tail(stored.values(), section.latency_scope, section.percentile)
            known = {
                arch: {each.precision: cost_of(each, section, tail) for each in figures if each.precision in given}
                for arch, figures in stored.items()
            }
            cut = {arch: known[arch] for arch in hopeless}
            costs[target.name] = {arch: known[arch] if arch in known else _cut_off(arch, cut) for arch in archs}
        return costs

    def _tell_lower_end(self, target: Target, stored: Mapping[Arch, Sequence[Figures]]) -> None:
        """Says where a calibration does not know the percentile of a limit."""
        section = target.section
        ratios = [each.ratios for figures in stored.values() for each in figures if each.predicted_ms]
        if any(f"{section.percentile:g}" not in known.get(section.latency_scope, {}) for known in ratios):
            self.run.say_once(
                f"{target.name}: no calibration tells p{section.percentile:g}; students are priced by a lower "
                "percentile, which is a lower end, and measured before one is chosen"
            )

    def _known(self, arch: Arch, targets: Sequence[Target], wanted: Sequence[Precision]) -> tuple[Figures, ...] | None:
        """What an earlier run stored, or this one measured."""
        key = self._key(arch, targets, wanted)
        manifest = artifact.current(self._folder(arch, targets[0]), KIND, key)
        if manifest is None:
            return self._noisy.get(key)
        return tuple(Figures.model_validate(entry) for entry in manifest.info["figures"])

    def _chunk(
        self, archs: Sequence[Arch], targets: Sequence[Target], wanted: Sequence[Precision]
    ) -> dict[Arch, tuple[Figures, ...]]:
        target = targets[0]
        found: dict[Arch, tuple[Figures, ...]] = {}
        for arch in archs:
            known = self._known(arch, targets, wanted)
            if known is not None:
                found[arch] = known
        missing = [arch for arch in archs if arch not in found]
        if not missing:
            return found
        self.has_worked = True
        with tempfile.TemporaryDirectory(prefix="edgestill-") as folder:
            graphs: dict[tuple[Arch, Precision], Path] = {}
            for arch in missing:
                graphs |= {(arch, each): file for each, file in self._graphs(arch, target, wanted, Path(folder))}
            figures, noise = self._figures(graphs, targets)
        for arch in missing:
            found[arch] = tuple(figures[arch, each] for each in wanted if (arch, each) in figures)
            if arch in noise:
                self._noisy[self._key(arch, targets, wanted)] = found[arch]
                continue
            info: dict[str, Any] = {"figures": [each.model_dump(mode="json") for each in found[arch]]}
            with artifact.create(self._folder(arch, target), KIND, self._key(arch, targets, wanted), info):
                pass  # all of it is in the manifest
        for warning in dict.fromkeys(noise.values()):
            self.run.say_once(f"students of the pool were priced {warning}; the next run prices them again")
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
    ) -> tuple[dict[tuple[Arch, Precision], Figures], dict[Arch, str]]:
        """Of every graph; and by architecture, why a measurement of it is not to be kept.

        Raises:
            EdgestillError: with --strict, where there is such a reason.
        """
        from cli.pipeline.run import refuse_unquiet

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
        if run.strict:
            refuse_unquiet(measured.values())
        found = {}
        noise: dict[Arch, str] = {}
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
                    ratios=calibration.ratios,
                )
                continue
            seen = measured[f"{arch} {precision}"]
            if seen.warnings:
                noise[arch] = (
                    "while the machine was busy or throttled"
                    if seen.stable
                    else "by their fastest query, since latencies did not settle"
                )
            found[arch, precision] = Figures(
                precision=precision,
                file_mib=size,
                memory_mib=seen.memory.peak_mib,
                bound_ms=bound,
                clocks={
                    "end_to_end": Spread.of(seen.end_to_end or seen.compute, settled=seen.stable),
                    "compute": Spread.of(seen.compute, settled=seen.stable),
                },
            )
        return found, noise

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
    """Whether the target is this machine's ONNX Runtime, in which the pool's graphs are priced."""
    runtime = target.section.runtime or target.stack.runtime
    return target.is_this_machine and target.stack.runtime == runtime == "onnxruntime"


def _precisions(targets: Sequence[Target]) -> tuple[Precision, ...]:
    """What some of the targets may get."""
    return tuple(dict.fromkeys(precision for target in targets for precision in precisions_of(target)))


def _asks_for_memory(targets: Sequence[Target]) -> bool:
    return any(target.section.memory_mib is not None for target in targets)


def cost_of(figures: Figures, section: TargetSection, tail: float) -> Cost:
    """What a graph costs a target, in the clock and percentile of its limit.

    Args:
        figures: of the graph.
        section: the target's table.
        tail: times the median, that a measured percentile is; see `_tail`.
    """
    source: Literal["calibrated", "measured"] = "measured"
    if figures.predicted_ms:
        source, tail = "calibrated", _ratio(figures.ratios.get(section.latency_scope, {}), section.percentile)
    expected = _typical(figures, section.latency_scope) * tail
    return Cost(figures.file_mib, figures.memory_mib, figures.bound_ms, expected, source)


def _ratio(known: Mapping[str, float], percentile: float) -> float:
    """The ratio of that percentile, or of the highest one below that is known: a lower end."""
    return max((value for name, value in known.items() if float(name) <= percentile), default=1.0)


def _typical(figures: Figures, scope: Scope) -> float:
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


def _is_hopeless(figures: Sequence[Figures], targets: Sequence[Target]) -> bool:
    """Whether no target comes near to allowing the median latency of a member, in its fastest precision."""
    for target in targets:
        limit, given = target.section.latency_ms, precisions_of(target)
        known = [_typical(each, target.section.latency_scope) for each in figures if each.precision in given]
        if limit is None or not known or min(known) <= _HOPELESS * limit:
            return False
    return True


def _beyond(arch: Arch, hopeless: Iterable[Arch]) -> bool:
    return any(_larger(arch, other) for other in hopeless)


def _cut_off(arch: Arch, hopeless: Mapping[Arch, Costs]) -> Costs:
    """The lower end for a member that was not looked at: what every hopeless one that is a part of it needs."""
    least: dict[Precision, float] = {}
    for other, costs in hopeless.items():
        if _larger(arch, other):
            for precision, cost in costs.items():
                least[precision] = max(least.get(precision, 0.0), cost.latency_ms or 0.0)
    return {precision: Cost(latency_bound_ms=value, is_cut_off=True) for precision, value in least.items()}


def _larger(arch: Arch, other: Arch) -> bool:
    """Whether an architecture holds the other one whole, so that it cannot be faster."""
    same = kind_of(arch) == kind_of(other) and arch.width >= other.width and arch.depth >= other.depth
    if isinstance(arch, TextArch) and isinstance(other, TextArch) and arch.heads != other.heads:
        return False
    return same and arch.kernel >= other.kernel
