"""`--dry-run`: what a run would do, and about how long and how much disk it would take.

The times come from a few timed steps of every network on this machine, in this moment. Nothing is written to the run
folder.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from cli.pipeline.run import PLAIN, SUPERVISED, Run
from cli.recipe import to_toml
from distill.data import Dataset, load_dataset
from distill.distribution import default_device
from distill.students import build_student, teacher_arch
from distill.teachers.section import TeacherSection
from profiles import artifact
from profiles.section import Section

_WARM_STEPS = 2
_TIMED_SECONDS = 1.0
_MIB = 2**20
_EXPORT_SECONDS = 12.0
"""Graphs, quantisation and parity of one small student; measured on two cores."""
_MEASURE_SECONDS = 10.0
"""Warm-up, samples and the separate process of one attached target with two candidates, when the verdict is clear."""


class PlannedStage(Section):
    """`seconds`: None where nothing is known beforehand. `finished`: an earlier run left an artefact, which is used
    when nothing that it was made from has changed."""

    name: str
    seconds: float | None
    disk_mib: float
    finished: bool


class Estimate(Section):
    """What `run --dry-run` tells. `recipe`: the resolved recipe as TOML."""

    recipe: str
    folder: str
    stages: tuple[PlannedStage, ...]
    seconds: float
    disk_mib: float


def estimate(run: Run) -> Estimate:
    """Times a few steps of every network that the recipe would train."""
    with tempfile.TemporaryDirectory(prefix="edgestill-") as temporary:
        stored = run.folder / "data"
        known = (stored / artifact.MANIFEST).is_file()
        started = time.perf_counter()
        dataset = load_dataset(
            run.recipe.data,
            seed=run.recipe.seed,
            base=run.loaded.base,
            folder=stored if known else Path(temporary) / "data",
            progress=run.progress,
        )
        run.dataset = dataset
        stages = [_stage(run, "data", time.perf_counter() - started, _data_mib(dataset), "data")]
        stages += _teacher_stages(run, dataset)
        for arch in run.archs:
            stages.append(_student_stage(run, dataset, arch, f"student {arch}", f"students/{arch}"))
            if run.recipe.plain_students and run.recipe.objective != (SUPERVISED,):
                stages.append(_student_stage(run, dataset, arch, f"plain student {arch}", f"students/{arch}{PLAIN}"))
        for target in run.targets:
            stages.append(_stage(run, f"export {target.name}", _EXPORT_SECONDS, 0.0, f"bundles/{target.name}"))
            if target.is_this_machine:
                place = f"measurements/{target.name}"
                stages.append(_stage(run, f"measure {target.name}", _MEASURE_SECONDS, 0.0, place))
    left = [stage for stage in stages if not stage.finished]
    return Estimate(
        recipe=to_toml(run.recipe),
        folder=str(run.folder),
        stages=tuple(stages),
        seconds=sum(stage.seconds or 0.0 for stage in left),
        disk_mib=sum(stage.disk_mib for stage in left),
    )


def render(found: Estimate, run: Run) -> str:
    """The estimate as text."""
    lines = [found.recipe.rstrip(), "", f"run folder {found.folder}", ""]
    width = max(len(stage.name) for stage in found.stages)
    for stage in found.stages:
        seconds = "      ?" if stage.seconds is None else f"{stage.seconds:5.0f} s"
        done = "  finished earlier, used if nothing it was made from changed" if stage.finished else ""
        lines.append(f"  {stage.name:<{width}}  about {seconds}  {stage.disk_mib:7.1f} MiB{done}")
    minutes = found.seconds / 60
    lines += ["", f"about {minutes:.1f} min and {found.disk_mib:.0f} MiB; from a few timed steps on this machine, now"]
    if any(stage.seconds is None for stage in found.stages):
        lines.append("? is not in the sum: a teacher of this kind is only known when it is loaded")
    return "\n".join(lines)


def _stage(run: Run, name: str, seconds: float | None, disk_mib: float, place: str) -> PlannedStage:
    finished = (run.folder / place / artifact.MANIFEST).is_file()
    rounded = None if seconds is None else round(seconds, 1)
    return PlannedStage(name=name, seconds=rounded, disk_mib=round(disk_mib, 1), finished=finished)


def _data_mib(dataset: Dataset) -> float:
    splits = (dataset.train, dataset.validation, dataset.test)
    return sum(split.inputs.nbytes + split.labels.nbytes for split in splits) / _MIB


def _teacher_stages(run: Run, dataset: Dataset) -> list[PlannedStage]:
    section: TeacherSection = run.recipe.teacher
    if section.kind == "none":
        return []
    views = run.recipe.data.augment.teacher_views if dataset.input.kind == "image" else 1
    rows = views * len(dataset.train) + len(dataset.validation) + len(dataset.test)
    if section.kind != "train":
        return [_stage(run, "teacher cache", None, 0.0, "cache")]
    arch = section.arch or teacher_arch(run.recipe.student.family, dataset.input)
    teacher = build_student(
        run.recipe.student.model_copy(update={"kind": "family"}),
        dataset.input,
        len(dataset.classes),
        arch=arch,
        seed=run.recipe.seed,
        base=run.loaded.base,
    )
    epochs = section.epochs or run.recipe.train.epochs
    step, forward = _timed(teacher, dataset, run.recipe.train.batch_size)
    stored = rows * (teacher.embedding_dim + len(dataset.classes)) * (2 if section.cache_dtype == "float16" else 4)
    return [
        _stage(run, f"teacher {arch}", step * len(dataset.train) * epochs, _weights_mib(teacher), "teacher"),
        _stage(run, "teacher cache", forward * rows, stored / _MIB, "cache"),
    ]


def _student_stage(run: Run, dataset: Dataset, arch: str, name: str, place: str) -> PlannedStage:
    student = build_student(
        run.recipe.student,
        dataset.input,
        len(dataset.classes),
        arch=None if run.recipe.student.kind == "torch" else arch,
        seed=run.recipe.seed,
        base=run.loaded.base,
        allow_code=run.allow_code,
    )
    step, _ = _timed(student, dataset, run.recipe.train.batch_size)
    return _stage(run, name, step * len(dataset.train) * run.recipe.train.epochs, _weights_mib(student), place)


def _weights_mib(module: nn.Module) -> float:
    return sum(int(tensor.nbytes) for tensor in module.state_dict().values()) / _MIB


def _timed(network: nn.Module, dataset: Dataset, batch_size: int) -> tuple[float, float]:
    """Seconds per sample of a training step, and of a forward pass alone (medians)."""
    device = default_device()
    batch = torch.from_numpy(dataset.train.inputs[:batch_size].copy()).to(device)
    if batch.dim() == 4:
        batch = batch.contiguous(memory_format=torch.channels_last)
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    network = network.to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def step() -> None:
        network(batch).head.logsumexp(1).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wait()

    def forward() -> None:
        with torch.inference_mode():
            network(batch)
        wait()

    return _median(step) / len(batch), _median(forward) / len(batch)


def _median(work: object) -> float:
    assert callable(work)
    for _ in range(_WARM_STEPS):
        work()
    times: list[float] = []
    while sum(times) < _TIMED_SECONDS or len(times) < _WARM_STEPS:
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2]
