"""From a run's outcomes to its report: plain copying and wording, no work."""

from __future__ import annotations

import math
import platform
import socket
import time
from collections.abc import Sequence
from datetime import datetime

from cli.pipeline.advice import unit_of, weak_teacher
from cli.pipeline.limits import judge, missed
from cli.pipeline.local import local_runtime
from cli.pipeline.run import Run, Shipped, Trained
from cli.pipeline.shots import exploration_facts, shots
from cli.report.schema import (
    CandidateRow,
    Counts,
    CurvePoint,
    DataFacts,
    EnergyValue,
    Engine,
    LatencyValue,
    LimitVerdict,
    Machine,
    MetricPlace,
    MetricValue,
    PlanStep,
    Report,
    Stage,
    TargetRow,
    TrainingRun,
    load_report,
)
from cli.report.schema import Roofline as ReportedRoofline
from cli.report.verdict import exit_status, overall_verdict
from cli.report.words import selection_lines
from export import Candidate
from profiles import artifact
from profiles.device import Target
from profiles.errors import InputError
from profiles.measurement import Measurement
from profiles.metrics import primary_metric

MIB = 2**20
NOT_THE_DEVICE: MetricPlace = "ONNX Runtime here, not the device"
_RUNTIMES = {"onnxruntime": "ONNX Runtime", "tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}


def build_report(run: Run, shipped: Sequence[Shipped], *, require_measured: bool = False) -> Report:
    """The document that every renderer reads."""
    dataset = run.dataset
    rows = tuple(_row(run, outcome) for outcome in shipped)
    references = run.references()
    # a teacher that learns on beside its students is shown as it started
    weak = () if run.recipe.teacher.moves else weak_teacher(references, primary_metric(dataset.task))
    return Report(
        name=run.recipe.name,
        created=datetime.now().astimezone().isoformat(timespec="seconds"),
        seconds=round(time.time() - run.started, 1),
        versions=artifact.tool_versions(),
        machine=machine_facts(),
        recipe=run.loaded.origin,
        folder=str(run.folder),
        seed=run.recipe.seed,
        task=dataset.task,
        metric=primary_metric(dataset.task),
        classes=len(dataset.classes),
        n_test=len(dataset.test),
        unit=unit_of(dataset),
        require_measured=require_measured,
        exit_status=exit_status(rows, require_measured),
        counts=Counts.of(rows),
        targets=rows,
        references=references,
        bought=run.bought(),
        stages=_stages(run),
        training=tuple(_training(role, trained) for (role, _), trained in run.trained.items()),
        shots=shots(run, shipped, NOT_THE_DEVICE),
        exploration=exploration_facts(run),
        sharing=run.budgets.sharing() if run.budgets is not None else None,
        data=DataFacts(
            source=run.recipe.data.source,
            title=dataset.name,
            licence=dataset.licence,
            citation=dataset.citation,
            splits={name: len(dataset.split(name)) for name in ("train", "validation", "test")},
            labels=dataset.classes,
            input=f"{dataset.input.dtype} {'x'.join(str(side) for side in dataset.input.shape)}",
            test_key=run.test_key,
        ),
        notes=(*run.notes, *weak),
    )


def _stages(run: Run) -> tuple[Stage, ...]:
    """The stages of this run; what a cached one took when it was made is taken from the report that is there."""
    try:
        earlier = {stage.name: stage for stage in load_report(run.folder / "report.json").stages}
    except (InputError, OSError):
        return tuple(run.stages)
    found = []
    for stage in run.stages:
        before = earlier.get(stage.name)
        if stage.cached and before is not None:
            made = before.made_seconds if before.cached else before.seconds
            stage = stage.model_copy(update={"made_seconds": made})  # noqa: PLW2901
        found.append(stage)
    return tuple(found)


def _row(run: Run, outcome: Shipped) -> TargetRow:
    target, section = outcome.target, outcome.target.section
    candidate, measurement = outcome.candidate, outcome.measurement
    on_device = measurement is not None
    metric_on_device = on_device and outcome.metric_on_device
    size_mib = candidate.size_bytes / MIB if candidate is not None and candidate.size_bytes is not None else None
    limits: tuple[LimitVerdict, ...] = ()
    if candidate is not None and size_mib is not None:
        limits = judge(
            section,
            measurement=measurement,
            size_mib=size_mib,
            metric=outcome.metric,
            drop=outcome.drop,
            on_device=metric_on_device,
        )
    elif outcome.miss is not None:
        limits = missed(section, outcome.miss)
    bound = (outcome.rooflines or {}).get(candidate.name) if candidate is not None else None
    why, fixes = _explain(run, outcome, limits)
    return TargetRow(
        name=target.name,
        device=target.device.name,
        device_title=target.device.title,
        host=measurement.environment.get("host", socket.gethostname()) if measurement is not None else None,
        stack=_stack_words(target),
        power_mode=target.power_mode.name if target.power_mode is not None else None,
        conditions=_conditions(measurement) if measurement is not None else (),
        arch=outcome.arch,
        precision=_precision(outcome),
        compute_precision=(candidate.compute_precision or "") if candidate is not None else "",
        model_file=candidate.file.name if candidate is not None and candidate.file is not None else None,
        bundle=str(outcome.bundle.relative_to(run.folder)) if outcome.bundle is not None else None,
        size_mib=size_mib,
        metric=MetricValue.of(outcome.metric, "artifact in its runtime" if metric_on_device else NOT_THE_DEVICE)
        if outcome.metric is not None
        else None,
        latency=LatencyValue.of(measurement) if measurement is not None else None,
        energy=_energy_of(measurement),
        roofline=ReportedRoofline(bound_ms=bound.bound_ms, limiting=bound.limiting)
        if bound is not None and bound.bound_ms is not None and bound.limiting is not None
        else None,
        load_ms=measurement.load_ms if measurement is not None else None,
        first_inference_ms=measurement.first_inference_ms if measurement is not None else None,
        peak_memory_mib=measurement.memory.peak_mib if measurement is not None else None,
        peak_memory_how=measurement.memory.how if measurement is not None else "",
        limits=limits,
        verdict=overall_verdict(limits, measured=on_device, error=outcome.error),
        error=outcome.error,
        engine=_engine(candidate) if candidate is not None and target.stack.runtime != "onnxruntime" else None,
        candidates=tuple(_candidate(entry, outcome) for entry in outcome.plan.candidates) if outcome.plan else (),
        steps=_steps(outcome),
        selection=outcome.selection,
        why=why,
        fixes=fixes,
        environment=measurement.environment if measurement is not None else {},
    )


def _energy_of(measurement: Measurement | None) -> EnergyValue | None:
    energy = measurement.energy if measurement is not None else None
    return EnergyValue.of(energy) if energy is not None else None


def _explain(run: Run, outcome: Shipped, limits: Sequence[LimitVerdict]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Reasons and fixes, a line each."""
    section, measurement = outcome.target.section, outcome.measurement
    why = list(outcome.choice.why) if outcome.choice is not None else []
    if outcome.selection is not None:
        why += selection_lines(outcome.selection, outcome.arch)
    if outcome.miss is not None:
        assumed = any(excess.source == "assumed" for excess in outcome.miss.excesses)
        fix = f"{outcome.miss.fix}{' by assumption' if assumed else ''}, or a pool with smaller students"
        if assumed:
            fix += ", or student.choice.assumed_efficiency"
        return tuple(why), (fix,)
    fixes: list[str] = []
    for limit in limits:
        if limit.name == "latency_ms" and limit.verdict in ("fail", "inconclusive") and measurement is not None:
            asked = measurement.asked
            decided = asked.upper_bound if measurement.stable and asked.upper_bound is not None else asked.maximum
            if limit.verdict == "fail":
                over = (asked.value or asked.maximum) / limit.limit - 1
                why.append(f"{over:.0%} over the limit after {asked.samples:,} runs")
                if measurement.warnings:
                    fixes.append(f"measure again on a quiet machine: edgestill bench {run.folder}")
                fixes.append(f"latency_ms = {_at_least(decided)}, or a smaller arch")
            else:
                why.append(limit.reason)
                if not measurement.mismatches:
                    fixes.append("close other programs and run again, or raise measure.max_seconds")
        elif limit.verdict == "fail" and limit.name == "file_size_mib":
            fixes.append(f"file_size_mib = {_at_least(limit.value or limit.limit)}, or a smaller arch")
        elif limit.verdict == "fail" and limit.name == "memory_mib":
            fixes.append(f"memory_mib = {_at_least(limit.value or limit.limit)}, or a smaller arch")
        elif limit.verdict == "fail" and limit.name == "metric_floor":
            fixes.append(
                f"more epochs, a larger arch, or metric_floor = {math.floor((limit.low or 0.0) * 1000) / 1000}"
            )
        elif limit.verdict == "fail":
            fixes.append(f"max_metric_drop = {_at_least(limit.high or limit.limit)}, or another precision")
    if measurement is not None:
        why.extend(measurement.warnings)
        why.extend(measurement.mismatches)
    elif outcome.error is None:
        why.append(_not_measured(outcome))
    if outcome.device_note:
        why.append(outcome.device_note)
    if section.memory_mib is not None and measurement is not None and measurement.memory.peak_mib is None:
        why.append(measurement.memory.how)
    return tuple(dict.fromkeys(why)), tuple(dict.fromkeys(fixes))


def _precision(outcome: Shipped) -> str:
    """Of the chosen file, or of the one that comes nearest; else what was asked for."""
    if outcome.candidate is not None:
        return outcome.candidate.precision
    return outcome.target.section.precision if outcome.miss is None else outcome.miss.option.precision


def _at_least(value: float) -> str:
    """Three digits, rounded up, so that the value that is suggested passes."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 2) if value > 0 else 1.0
    return f"{math.ceil(value / unit) * unit:.4g}"


def _not_measured(outcome: Shipped) -> str:
    runtime, reason = local_runtime(outcome.target)
    if runtime is None:
        return f"not run: {reason}"
    note = outcome.candidate.engine_note if outcome.candidate is not None else None
    return f"not run: {note or f'the chosen file could not be measured in {runtime}'}"


def _stack_words(target: Target) -> str:
    stack = target.stack
    runtime = f"{_RUNTIMES[stack.runtime]} {stack.runtime_version}"
    name = stack.name.replace("jetpack-", "JetPack ")
    return runtime if stack.name.startswith(stack.runtime) else f"{name}, {runtime}"


def _conditions(measurement: Measurement) -> tuple[str, ...]:
    threads = measurement.options.get("intra_op_threads")
    return (f"{threads} thread{'' if threads == 1 else 's'}",) if threads else ()


def _candidate(candidate: Candidate, outcome: Shipped) -> CandidateRow:
    measurement = (outcome.measurements or {}).get(candidate.name)
    chosen = outcome.choice is not None and candidate.name == outcome.choice.name
    rejected = candidate.refused or (
        outcome.choice.rejected.get(candidate.name) if outcome.choice is not None else None
    )
    if rejected is None and not chosen:
        rejected = f'precision = "{outcome.target.section.precision}" asks for another one'
    return CandidateRow(
        precision=candidate.name,
        compute_precision=candidate.compute_precision or "",
        size_mib=candidate.size_bytes / MIB if candidate.size_bytes is not None else None,
        metric=MetricValue.of(
            candidate.validation,
            "ONNX Runtime here, not the device" if measurement is None else "artifact in its runtime",
        )
        if candidate.validation is not None
        else None,
        latency=LatencyValue.of(measurement) if measurement is not None else None,
        energy=_energy_of(measurement),
        peak_memory_mib=measurement.memory.peak_mib if measurement is not None else None,
        chosen=chosen,
        rejected_because=None if chosen else rejected,
    )


def _steps(outcome: Shipped) -> tuple[PlanStep, ...]:
    return tuple(
        PlanStep(
            name=step.name,
            metric=step.metric.value if step.metric is not None else None,
            size_mib=step.size_bytes / MIB if step.size_bytes is not None else None,
            seconds=step.seconds,
            keeps=step.keeps,
            note=step.note,
        )
        for step in (outcome.plan.steps if outcome.plan is not None else ())
    )


def _engine(candidate: Candidate) -> Engine:
    engine = candidate.engine
    return Engine(
        file=engine.file.name if engine is not None else None,
        built_by=engine.builder if engine is not None else None,
        parsed_by=candidate.parsed_by if engine is None else None,
        not_built_because=candidate.engine_note if engine is None else None,
    )


def _training(role: str, trained: Trained) -> TrainingRun:
    result = trained.result
    return TrainingRun.model_validate(
        {
            "role": role,
            "arch": trained.student.arch,
            "objective": trained.objective_name,
            "strategy": trained.strategy,
            "exploration": trained.exploration,
            "epochs": result.epochs,
            "best_epoch": result.best_epoch,
            "seconds": result.seconds,
            "samples_per_second": result.samples_per_second,
            "device": result.device,
            "parameters": sum(parameter.numel() for parameter in trained.student.parameters()),
            "curve": tuple(
                CurvePoint(
                    epoch=point["epoch"],
                    train_loss=point.get("loss"),
                    validation=point.get(f"validation/{result.metric.name}"),
                )
                for point in result.history
            ),
        }
    )


def machine_facts() -> Machine:
    """The machine that this runs on."""
    from profiles.device import detect

    device = detect()
    memory = f", {device.memory_gib:.0f} GiB" if device.memory_gib is not None else ""
    return Machine(
        title=f"{device.title}{memory}",
        host=socket.gethostname(),
        os=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
    )
