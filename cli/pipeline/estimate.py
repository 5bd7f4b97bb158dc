"""`--dry-run`: what a run would do, and about how long and how much disk it would take.

The times come from a few timed steps of every network on this machine, in this moment. Nothing is written to the run
folder.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from cli.pipeline.run import (
    PLAIN,
    SUPERVISED,
    Run,
    cache_folder,
    needs_teacher,
    teacher_name,
    teacher_title,
    weights_mib,
)
from cli.recipe import Recipe, load_recipe, to_toml
from distill.data import Dataset, load_dataset
from distill.data.load import open_dataset
from distill.distribution import default_device
from distill.objectives.compose import head_size
from distill.objectives.subclass import retrained_for
from distill.students import build_student, teacher_arch
from distill.teachers.section import TeacherSection
from profiles import artifact
from profiles.errors import InputError
from profiles.section import Section

_WARM_STEPS = 2
_TIMED_SECONDS = 1.0
_MIB = 2**20
_EXPORT_SECONDS = 12.0
"""Graphs, quantisation and parity of one small student; measured on two cores."""
_MEASURE_SECONDS = 10.0
"""Warm-up, samples and the separate process of one attached target with two candidates, when the verdict is clear."""


class PlannedStage(Section):
    """`seconds`: None where nothing is known beforehand. `finished`: an earlier run with the same recipe sections left
    an artefact, which is used unless the files that it was made from have changed."""

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


class _Earlier:
    """What an earlier run of this folder left, and with which recipe."""

    def __init__(self, run: Run) -> None:
        self._run = run
        stored = run.folder / "recipe.toml"
        self._recipe: Recipe | None = None
        if stored.is_file():
            with contextlib.suppress(InputError):  # a recipe that this version cannot read vouches for nothing
                self._recipe = load_recipe(str(stored)).recipe

    def finished(self, place: str, *sections: str) -> bool:
        """Whether the artefact at `place` is there and was made with the same values of these recipe sections."""
        if self._recipe is None or not (self._run.folder / place / artifact.MANIFEST).is_file():
            return False
        return all(getattr(self._recipe, name) == getattr(self._run.recipe, name) for name in ("seed", *sections))


_TEACHER = ("data", "teacher", "student", "train")
_STUDENT = (*_TEACHER, "objective")
_TARGET = (*_STUDENT, "export", "measure", "target")


def estimate(run: Run) -> Estimate:
    """Times a few steps of every network that the recipe would train."""
    earlier = _Earlier(run)
    with tempfile.TemporaryDirectory(prefix="edgestill-") as temporary:
        started = time.perf_counter()
        stored = _stored_data(run) if earlier.finished("data", "data") else None
        if stored is not None:
            run.dataset = dataset = stored
        else:
            run.dataset = dataset = load_dataset(
                run.recipe.data,
                seed=run.recipe.seed,
                base=run.loaded.base,
                folder=Path(temporary) / "data",
                progress=run.progress,
            )
        if run.recipe.teacher.kind in ("train", "none"):
            run.check()  # another kind of teacher is only known when it is loaded
        stages = [_stage("data", time.perf_counter() - started, _data_mib(dataset), stored is not None)]
        stages += _teacher_stages(run, dataset, earlier)
        for arch in run.archs:
            roles = [("student", "")]
            if run.recipe.plain_students and run.recipe.objective != (SUPERVISED,):
                roles.append(("plain student", PLAIN))
            for role, suffix in roles:
                done = earlier.finished(f"students/{arch}{suffix}", *_STUDENT)
                stages.append(_student_stage(run, dataset, arch, role, done))
        for target in run.targets:
            done = earlier.finished(f"bundles/{target.name}", *_TARGET)
            stages.append(_stage(f"export {target.name}", _EXPORT_SECONDS, 0.0, done))
            if target.is_this_machine:
                done = earlier.finished(f"measurements/{target.name}", *_TARGET)
                stages.append(_stage(f"measure {target.name}", _MEASURE_SECONDS, 0.0, done))
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
        done = "  done by an earlier run" if stage.finished else ""
        lines.append(f"  {stage.name:<{width}}  about {seconds}  {stage.disk_mib:7.1f} MiB{done}")
    minutes = found.seconds / 60
    lines += ["", f"about {minutes:.1f} min and {found.disk_mib:.0f} MiB; from a few timed steps on this machine, now"]
    if any(stage.seconds is None for stage in found.stages):
        lines.append("? is not in the sum: a teacher of this kind is only known when it is loaded")
    return "\n".join(lines)


def _stage(name: str, seconds: float | None, disk_mib: float, finished: bool) -> PlannedStage:
    rounded = None if seconds is None else round(seconds, 1)
    return PlannedStage(name=name, seconds=rounded, disk_mib=round(disk_mib, 1), finished=finished)


def _stored_data(run: Run) -> Dataset | None:
    """The run's data as an earlier run left it; None when another version wrote it in another form."""
    try:
        return open_dataset(run.folder / "data")
    except InputError:
        return None


def _data_mib(dataset: Dataset) -> float:
    splits = (dataset.train, dataset.validation, dataset.test)
    return sum(split.inputs.nbytes + split.labels.nbytes for split in splits) / _MIB


def _teacher_stages(run: Run, dataset: Dataset, earlier: _Earlier) -> list[PlannedStage]:
    section: TeacherSection = run.recipe.teacher
    objectives = run.recipe.objective
    if section.kind == "none" or not needs_teacher(objectives):
        return []
    views = run.recipe.data.augment.teacher_views if dataset.input.kind == "image" else 1
    rows = views * len(dataset.train) + len(dataset.validation) + len(dataset.test)
    if section.kind != "train":
        return [_stage("teacher cache", None, 0.0, earlier.finished("cache", "data", "teacher"))]
    retrained = retrained_for(objectives)
    outputs = len(dataset.classes) if retrained is None else head_size((retrained,), len(dataset.classes))
    name = teacher_name(retrained)
    arch = section.arch or teacher_arch(run.recipe.student.family, dataset.input)
    teacher = build_student(
        run.recipe.student.model_copy(update={"kind": "family"}),
        dataset.input,
        outputs,
        arch=arch,
        seed=run.recipe.seed,
        base=run.loaded.base,
    )
    train = (
        run.recipe.train if section.epochs is None else run.recipe.train.model_copy(update={"epochs": section.epochs})
    )
    epochs = train.resolved(len(dataset.train)).epochs
    step, forward = _timed(teacher, dataset, run.recipe.train.batch_size)
    stored = rows * (teacher.embedding_dim + outputs) * (2 if section.cache_dtype == "float16" else 4)
    return [
        _stage(
            f"{teacher_title(retrained)} {arch}",
            step * len(dataset.train) * epochs,
            weights_mib(teacher),
            earlier.finished(name, *_TEACHER),
        ),
        _stage("teacher cache", forward * rows, stored / _MIB, earlier.finished(cache_folder(name), *_TEACHER)),
    ]


def _student_stage(run: Run, dataset: Dataset, arch: str, role: str, finished: bool) -> PlannedStage:
    student = build_student(
        run.recipe.student,
        dataset.input,
        len(dataset.classes) if role == "plain student" else head_size(run.recipe.objective, len(dataset.classes)),
        arch=None if run.recipe.student.kind == "torch" else arch,
        seed=run.recipe.seed,
        base=run.loaded.base,
        allow_code=run.allow_code,
    )
    step, _ = _timed(student, dataset, run.recipe.train.batch_size)
    seconds = step * len(dataset.train) * run.recipe.train.resolved(len(dataset.train)).epochs
    return _stage(f"{role} {arch}", seconds, weights_mib(student), finished)


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
