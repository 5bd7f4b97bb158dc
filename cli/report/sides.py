"""What `edgestill compare` is given, brought to one form: runs, reports, measurements; and what makes two alike."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import ValidationError

from cli.report.predictions import PREDICTIONS, Stored, load_predictions
from cli.report.schema import CandidateRow, EnergyValue, LatencyValue, MetricValue, Report, TargetRow, load_report
from cli.report.words import percentile_title, scope_words
from profiles.errors import InputError
from profiles.measure import load_measurement
from profiles.measurement import Measurement
from profiles.runtimes import on_gpu

Array = np.ndarray[Any, Any]

_OF_THE_MACHINE = ("cpu_model", "machine", "cores", "affinity", "max_clock_mhz")
_OF_THE_MOMENT = ("governor", "power_mode")
"""Facts of `Measurement.environment` that two latencies must share; the second ones are recorded before and after."""
_OF_THE_GPU = ("gpu", "driver")
_OF_THE_GPU_NOW = ("gpu_power_limit_watts",)
"""The same of a model that ran on one."""


@dataclass(frozen=True)
class Figures:
    """One model file on one device: what is known of it."""

    name: str
    """Of the target, or of the measured file."""
    precision: str
    shipped: bool = False
    arch: str = ""
    size_mib: float | None = None
    metric: MetricValue | None = None
    split: Literal["test", "validation"] = "test"
    latency: LatencyValue | None = None
    memory_mib: float | None = None
    memory_how: str = ""
    energy: EnergyValue | None = None
    device: str = ""
    host: str = ""
    stack: str = ""
    power_mode: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict)
    predictions: Stored | None = None
    samples: Callable[[], Array | None] = lambda: None
    """Latencies in ms in the order of measurement, (N,), on the clock of `latency`; None where they are not stored."""
    looks: int = 1
    """At how many looks sampling could have ended."""
    warnings: tuple[str, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class Side:
    """One of the two that are compared."""

    path: str
    figures: tuple[Figures, ...]
    name: str = ""
    created: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    metric: str = ""
    task: str = ""
    test_key: str = ""
    labels: tuple[str, ...] = ()
    data: tuple[Any, ...] = ()


class Pair(NamedTuple):
    """A row of both."""

    name: str
    a: Figures
    b: Figures
    shipped: bool


def load_side(path: Path) -> Side:
    """A run folder, its report.json, what `edgestill bench --json` printed, or a stored measurement.

    Raises:
        InputError: none of these, or a damaged one.
    """
    if path.is_dir():
        return _of_report(path, load_report(path / "report.json"), path)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"no such file or folder: {path}", where=str(path), fix="name a run folder, a report.json or a bench's JSON"
        ) from error
    except (OSError, ValueError) as error:
        raise InputError("this is not JSON", where=str(path), evidence=str(error).splitlines()[0]) from error
    if isinstance(document, dict) and "targets" in document:
        return _of_report(path, load_report(path), path.parent)
    try:
        return _of_measurements(path, document)
    except (ValidationError, TypeError, AttributeError) as error:
        raise InputError(
            "this is neither a report nor a measurement",
            where=str(path),
            evidence=str(error).splitlines()[0],
            fix="name a run folder, its report.json, or what `edgestill bench FILE.onnx --json` printed",
        ) from error


def _of_report(path: Path, report: Report, folder: Path) -> Side:
    figures: list[Figures] = []
    for row in report.targets:
        # where a target has no candidates, its row stands alone
        chosen = next((candidate for candidate in row.candidates if candidate.chosen), None)
        figures.append(_shipped(row, chosen, folder))
        figures += [
            _tried(row, candidate, folder) for candidate in row.candidates if candidate.latency or candidate.metric
        ]
    data = report.data
    return Side(
        path=str(path),
        figures=tuple(figures),
        name=report.name,
        created=report.created,
        versions=report.versions,
        metric=report.metric,
        task=report.task,
        test_key=data.test_key,
        labels=data.labels,
        data=(data.source, data.title, tuple(sorted(data.splits.items())), data.input),
    )


def _shipped(row: TargetRow, chosen: CandidateRow | None, folder: Path) -> Figures:
    name = chosen.precision if chosen is not None else row.precision
    measured = _Samples(row, name, row.latency, folder)
    return Figures(
        name=row.name,
        precision=name,
        shipped=True,
        arch=row.arch,
        size_mib=row.size_mib,
        metric=row.metric,
        latency=row.latency,
        memory_mib=row.peak_memory_mib,
        memory_how=row.peak_memory_how,
        energy=row.energy,
        device=row.device_title,
        host=row.host or "",
        stack=row.stack,
        power_mode=row.power_mode or "",
        environment=row.environment,
        predictions=load_predictions(folder / PREDICTIONS / row.name) if row.metric is not None else None,
        samples=measured.values,
        looks=measured.looks,
        warnings=measured.warnings,
        error=row.error or "",
    )


def _tried(row: TargetRow, candidate: CandidateRow, folder: Path) -> Figures:
    """A precision that was tried for a target; its metric is of the validation split."""
    measured = _Samples(row, candidate.precision, candidate.latency, folder)
    return Figures(
        name=row.name,
        precision=candidate.precision,
        arch=row.arch,
        size_mib=candidate.size_mib,
        metric=candidate.metric,
        split="validation",
        latency=candidate.latency,
        memory_mib=candidate.peak_memory_mib,
        memory_how=row.peak_memory_how,
        energy=candidate.energy,
        device=row.device_title,
        host=row.host or "",
        stack=row.stack,
        power_mode=row.power_mode or "",
        environment=row.environment,
        samples=measured.values,
        looks=measured.looks,
        warnings=measured.warnings,
    )


class _Samples:
    """The stored samples behind a latency of a report, where they are still those that it was made from."""

    def __init__(self, row: TargetRow, name: str, latency: LatencyValue | None, folder: Path) -> None:
        self.looks = 1
        self.warnings: tuple[str, ...] = ()
        self._file: Path | None = None
        for place in (f"{row.name}--{row.arch}", row.name):
            file = folder / "measurements" / place / f"{name}.json"
            if latency is None or not file.is_file():
                continue
            stored = load_measurement(file).measurement
            # measured anew since then, the samples belong to another figure
            if LatencyValue.of(stored).model_copy(update={"options": latency.options}) == latency:
                self.looks, self.warnings, self._file = stored.planned_looks, stored.warnings, file
                break

    def values(self) -> Array | None:
        return None if self._file is None else _in_scope(self._file)


def _in_scope(file: Path) -> Array:
    measurement, samples = load_measurement(file)
    return np.asarray(samples.compute_ns if measurement.scope == "compute" else samples.end_to_end_ns) / 1e6


def _of_measurements(path: Path, document: Any) -> Side:
    """Of a bench of one file, of a run's targets, or one stored measurement with its samples beside it."""
    if isinstance(document, dict) and "measurement" in document:
        named = [("", document["measurement"])]
    elif isinstance(document, dict) and "end_to_end" in document:
        named = [("", document)]
    else:
        named = [(target, entry) for target, entries in document.items() for entry in entries]
    stored = path if path.with_suffix(".npz").is_file() else None
    figures = [_measured(Measurement.model_validate(entry), target, stored) for target, entry in named]
    return Side(
        path=str(path),
        figures=tuple(figures),
        name=path.stem,
        created=min((Measurement.model_validate(entry).created for _, entry in named), default=""),
    )


def _measured(measurement: Measurement, target: str, stored: Path | None) -> Figures:
    return Figures(
        name=target or measurement.name,
        precision=measurement.name if target else measurement.graph_precision,
        size_mib=measurement.file_size_mib,
        latency=LatencyValue.of(measurement),
        memory_mib=measurement.memory.peak_mib,
        memory_how=measurement.memory.how,
        energy=EnergyValue.of(measurement.energy) if measurement.energy is not None else None,
        environment=measurement.environment,
        samples=lambda: None if stored is None else _in_scope(stored),
        looks=measurement.planned_looks,
        warnings=measurement.warnings,
    )


def common_rows(a: Side, b: Side) -> tuple[list[Pair], list[str], list[str]]:
    """The rows of both, and the names that only one of them has.

    A target's shipped files are paired whatever their precision, since they are what reaches the device; what was
    tried is paired by precision. Two single measurements are paired whatever their names.
    """
    if len(a.figures) == len(b.figures) == 1:
        first, second = a.figures[0], b.figures[0]
        name = first.name if first.name == second.name else f"{first.name} -> {second.name}"
        return [Pair(name, first, second, first.shipped and second.shipped)], [], []
    shipped_a, shipped_b = ({each.name: each for each in side.figures if each.shipped} for side in (a, b))
    tried_a, tried_b = (
        {(each.name, each.precision): each for each in side.figures if not each.shipped} for side in (a, b)
    )
    names = list(dict.fromkeys(each.name for each in a.figures))
    pairs: list[Pair] = []
    for name in names:
        if name in shipped_a and name in shipped_b:
            pairs.append(Pair(name, shipped_a[name], shipped_b[name], True))
        pairs += [
            Pair(name, figures, tried_b[key], False)
            for key, figures in tried_a.items()
            if key[0] == name and key in tried_b
        ]
    others = list(dict.fromkeys(each.name for each in b.figures))
    return pairs, [name for name in names if name not in others], [name for name in others if name not in names]


def latency_identity(figures: Figures) -> dict[str, str]:
    """What two latencies, memories or energies must share to be compared; what is not recorded is left out."""
    latency = figures.latency
    found: dict[str, Any] = {"device": figures.device, "stack": figures.stack, "power mode": figures.power_mode}
    if latency is not None:
        found |= {
            "clock and batch": scope_words(latency),
            "percentile": percentile_title(latency.percentile),
            "runtime": f"{latency.runtime} {latency.runtime_version}".strip(),
            "inputs": latency.input_source,
        }
        found |= {f"option {key}": value for key, value in latency.options.items()}
    before = figures.environment.get("before")
    gpu = latency is not None and on_gpu(latency.runtime, latency.options)
    of_the_machine = _OF_THE_MACHINE + _OF_THE_GPU * gpu
    found |= {key.replace("_", " "): figures.environment.get(key) for key in of_the_machine}
    if isinstance(before, Mapping):
        moments = _OF_THE_MOMENT + _OF_THE_GPU_NOW * gpu
        found |= {key.replace("_", " "): before.get(key) or found.get(key.replace("_", " ")) for key in moments}
    return {key: _text(value) for key, value in found.items() if value not in (None, "", [], {})}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def unlike(a: Mapping[str, str], b: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """In what two identities differ, as "threads: 1 and 4"; and what only one of them has recorded."""
    differing = [f"{key}: {a[key]} and {b[key]}" for key in a if key in b and a[key] != b[key]]
    return differing, _only_one(a, b)


def _only_one(a: Iterable[str], b: Iterable[str]) -> list[str]:
    first, second = set(a), set(b)
    return sorted(first ^ second)
