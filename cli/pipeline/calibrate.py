"""Calibrating this machine: models of all families exported, measured against each other, and fitted."""

from __future__ import annotations

import multiprocessing
import signal
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cli.pipeline.calibration_models import (
    FAMILIES,
    Sampled,
    build,
    realistic_rows,
    sample_architectures,
    sample_layers,
)
from profiles import agent
from profiles.calibration import Calibration, Observation, busy, fit, observe
from profiles.device import THIS_MACHINE, Device, detect, load_device
from profiles.errors import EdgestillError, InputError
from profiles.measure import probe, query_batches
from profiles.predict import roofline
from profiles.progress import Progress
from profiles.timing_model import PricedGraph, priced_graph

_ROWS = 8
_MANY = 6
"""Models from which on starting processes, which import everything again, pays."""
_SPARE_CORES = 0.2
"""What other work may take of the cores that the measuring needs."""
_FREE_SHARE = 0.9
"""Of the other cores, what other work may take of them. Beyond, there may be no moment in which the measured core has
its own speed, so that every pulse is equally slow and none tells it; below, the quickest twentieth of the pulses do."""
_LEAST_SECONDS = 30.0
"""Left for measuring, however long exporting took."""


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    families: kinds of architectures. per_family: architectures of each kind. layers: graphs of layers. runs: profiled
    queries of a model each time. profiles: times that a model is profiled; the quickest counts, as a few milliseconds
    in one place may all be disturbed. queries and seconds: of a model and pass, at most. most_seconds: of exporting and
    measuring together; what is left of it is shared. probes: every how many-th file's memory is measured; an odd
    number, so that both precisions have their turn.
    """

    families: tuple[str, ...] = FAMILIES
    per_family: int = 9
    layers: int = 16
    runs: int = 80
    profiles: int = 2
    queries: int = 704
    seconds: float = 1.5
    most_seconds: float = 270.0
    probes: int = 5


class Seen(NamedTuple):
    """Observations, why they cannot be trusted (None: the machine was quiet), and the cores that others kept busy."""

    observations: list[Observation]
    busy: str | None
    other_cores: float | None


class Calibrated(NamedTuple):
    """A calibration, the measurements behind it, and why they cannot be trusted (None: the machine was quiet)."""

    calibration: Calibration
    observations: list[Observation]
    busy: str | None


def calibrate(
    name: str, progress: Progress, *, threads: int = 1, effort: Effort | None = None, refuse_busy: bool = True
) -> Calibrated:
    """Measures this machine and fits what its work takes; nothing is stored.

    Args:
        name: the device; this machine is the only one that can be measured from here.
        progress: told what is going on.
        threads: threads inside an operator, 1 or more.
        effort: how much is measured.
        refuse_busy: raise where the machine was not quiet.

    Raises:
        InputError: another device, or a runtime that cannot be timed here.
        EdgestillError: the machine was busy, or a model cannot be exported or run.
    """
    device = this_machine(name)
    effort = effort or Effort()
    began = time.monotonic()
    sampled = (*sample_architectures(effort.per_family, families=effort.families), *sample_layers(effort.layers))
    with tempfile.TemporaryDirectory(prefix="edgestill-") as folder:
        models = export_all(sampled, device, Path(folder), progress)
        left = effort.most_seconds - (time.monotonic() - began)
        observations, reason, other_cores = measure_all(
            sampled, models, progress, threads=threads, effort=effort, most_seconds=left
        )
        if reason is not None and refuse_busy:
            raise EdgestillError(
                "the machine was not quiet enough to be calibrated",
                where=device.title,
                evidence=reason,
                fix="stop other work and calibrate again; what was stored before is unchanged",
            )
        efficiency = _efficiency(models, observations, device)
    calibration = fit(
        observations,
        device=device,
        stack=device.stacks[0],
        threads=threads,
        seconds=time.monotonic() - began,
        efficiency=efficiency,
        other_cores=other_cores,
    )
    return Calibrated(calibration, observations, reason)


def this_machine(name: str) -> Device:
    """The device of that name, which must be this machine.

    Raises:
        InputError: another device.
    """
    if name == THIS_MACHINE:
        return detect()
    device = load_device(name, where="NAME")
    raise InputError(
        f"{device.name} cannot be calibrated from here",
        where="NAME",
        evidence="edgestill does not calibrate over a network yet: it measures the machine that it runs on",
        fix="on the device itself: edgestill devices calibrate",
    )


def export_all(
    sampled: Sequence[Sampled], device: Device, folder: Path, progress: Progress
) -> dict[str, dict[str, Path]]:
    """The models' files by name and precision. Many are exported by two processes, where there are two cores."""
    found: dict[str, dict[str, Path]] = {}
    with progress.task("exporting models", len(sampled), "models") as task:
        if len(sampled) < _MANY:
            for one in sampled:
                found[one.name] = build(one, device, folder)
                task.advance(note=one.name)
            return found
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(min(2, device.cores or 1), mp_context=context, initializer=_start)
        try:
            running = {pool.submit(build, one, device, folder): one for one in sampled}
            for done in as_completed(running):
                found[running[done].name] = done.result()
                task.advance(note=running[done].name)
        finally:
            pool.shutdown(cancel_futures=True)
    return found


def _start() -> None:
    """One thread each, and Ctrl-C is for the process that waits."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import torch

    torch.set_num_threads(1)


def measure_all(
    sampled: Sequence[Sampled],
    models: Mapping[str, Mapping[str, Path]],
    progress: Progress,
    *,
    threads: int,
    effort: Effort,
    most_seconds: float | None = None,
) -> Seen:
    """All models measured.

    Args:
        sampled: the models.
        models: their files by name and precision.
        progress: told what is going on.
        threads: threads inside an operator.
        effort: how much is measured.
        most_seconds: of it all; default as much as the effort allows a calibration.
    """
    began, most = time.monotonic(), max(most_seconds or effort.most_seconds, _LEAST_SECONDS)
    files = {(one.name, precision): models[one.name][precision] for one in sampled for precision in models[one.name]}
    rows = {one.name: {one.spec.name: realistic_rows(one.spec, _ROWS, one.seed + 1)} for one in sampled}
    peaks: dict[tuple[str, str], float | None] = {}
    with progress.task("measuring memory", None, "models") as task:
        for key, file in list(files.items())[:: effort.probes]:
            peaks[key] = probe("onnxruntime", file, query_batches(rows[key[0]], 1)[0], threads).memory.peak_mib
            task.advance(note=" ".join(key))
    before = agent.CpuUse()
    graphs: dict[tuple[str, str], PricedGraph] = {}
    with progress.task("profiling nodes", effort.profiles * len(files), "models") as task:
        for _ in range(effort.profiles):
            for key, file in files.items():
                found = priced_graph(file, threads=threads, runs=effort.runs)
                graphs[key] = min(graphs.get(key, found), found, key=_profiled)
                task.advance(note=" ".join(key))
    names = {" ".join(key): key for key in files}
    measured = observe(
        {name: files[key] for name, key in names.items()},
        {name: rows[key[0]] for name, key in names.items()},
        threads=threads,
        seconds=effort.seconds,
        queries=effort.queries,
        most_seconds=most - (time.monotonic() - began),
        progress=progress,
    )
    use = agent.CpuUse().since(before)
    families = {one.name: one.family for one in sampled}
    observations = [
        Observation.model_validate(
            {
                "model": key[0],
                "family": families[key[0]],
                "precision": key[1],
                "nodes": graphs[key].nodes,
                "weight_mib": graphs[key].weight_mib,
                "activation_mib": graphs[key].activation_mib,
                "file_mib": files[key].stat().st_size / 2**20,
                "peak_mib": peaks.get(key),
                **measured[name],
            }
        )
        for name, key in names.items()
    ]
    reasons = [reason for reason in (busy(observations), _others(use, threads)) if reason is not None]
    return Seen(observations, "; ".join(reasons) or None, use.get("other_cores"))


def _profiled(graph: PricedGraph) -> float:
    """Microseconds of all nodes together."""
    return sum(node.microseconds or 0.0 for node in graph.nodes)


def _others(use: Mapping[str, Any], threads: int) -> str | None:
    """What took cores that the measuring needed; None: nothing, or the system does not tell.

    Work on the other cores is accepted up to a share of them: what it does to the measured ones now and then, the
    pulses show (`busy` refuses where hardly any query was undisturbed).
    """
    cores = len(agent.affinity()) or 1
    taken, stolen = use.get("other_cores", 0.0), use.get("stolen_cores", 0.0)
    if taken <= max(_FREE_SHARE * (cores - threads), _SPARE_CORES) and stolen <= _SPARE_CORES:
        return None
    names = ", ".join(f"{entry['name']} {entry['cores']:.1f}" for entry in use.get("busiest", ()))
    by = f" ({names})" if names else ""
    lost = f", the hypervisor took {stolen:.1f}" if stolen > _SPARE_CORES else ""
    return f"other processes used {taken:.1f} of {cores} cores{by}{lost}, and measuring takes {threads} whole"


def _efficiency(
    models: Mapping[str, Mapping[str, Path]],
    observations: Iterable[Observation],
    device: Device,
) -> dict[str, float]:
    """By precision: the roofline bound over the measured median, middle of the architectures; empty without a bound."""
    measured = {(one.model, one.precision): one.p50_ms for one in observations if one.is_architecture}
    shares: dict[str, list[float]] = {}
    for (name, precision), milliseconds in measured.items():
        bound = roofline(models[name][precision], device, precision).bound_ms
        if bound is not None:
            shares.setdefault(precision, []).append(bound / milliseconds)
    return {precision: float(np.median(found)) for precision, found in shares.items()}


def others_sentence(other_cores: float | None) -> str:
    """What else ran while models were measured."""
    if other_cores is None:
        return "what other processes did meanwhile is not known"
    return f"other processes kept {other_cores:.1f} cores busy meanwhile"


def error_rows(calibration: Calibration) -> list[tuple[str, ...]]:
    """The error table: a row per precision."""
    return [
        (
            precision.upper(),
            str(entry.models),
            f"{entry.median_error:.1%}",
            f"{entry.p90_error:.1%}",
            "-" if entry.rank_correlation is None else f"{entry.rank_correlation:.3f}",
        )
        for precision, entry in calibration.held_out.items()
    ]
