"""The one training loop: any objective mix, one process or many, resumable to the bit.

Everything random is a pure function of (seed, epoch, step): the order of the samples, their views, mixup's draws and
the state of torch's generators. So a resumed run needs no generator state, and ends with the same weights.
"""

from __future__ import annotations

import copy
import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from distill.checkpoint import load_checkpoint, save_checkpoint
from distill.data.dataset import Dataset, Split
from distill.data.section import AugmentSection
from distill.distribution import Processes, default_device, start
from distill.objectives.base import CachedTeacher, at_least_float32
from distill.objectives.compose import Composition
from distill.objectives.ground_truth import balanced_weights, task_loss
from distill.outputs import Batch, StudentOutput, TeacherOutput
from distill.resident import Resident
from distill.strategy import Step, Strategy
from distill.students import Student, load_student, save_student
from distill.train_section import TrainSection
from profiles.artifact import content_key, create, current, explain_os_errors, read_manifest, write_text
from profiles.errors import EdgestillError, InputError, Interrupted
from profiles.metrics import Metric, average_precision, evaluate, primary_metric
from profiles.progress import Progress, Silent, Task
from profiles.section import Section

_WINDOW = 50
"""Steps between two looks at the losses; the only moments inside an epoch at which the host waits for the device."""
_CHECKPOINT = "checkpoint.pt"
_TENSORBOARD = "tensorboard"
FORM = 1
"""Raise when the way a student is trained changes, so that older artefacts are made anew."""


class TrainResult(Section):
    """What came out of one training.

    metric: primary metric of the task on the validation split, of the kept epoch. seconds: all epochs with their
    validation, and before them the fit of what objectives fit first (EC's transform). samples_per_second: training
    steps only. history: one record per epoch, as in metrics.jsonl; with the validation metric where it was looked at.
    """

    arch: str
    metric: Metric
    best_epoch: int
    epochs: int
    seconds: float
    samples_per_second: float
    parameters: int
    hard_weight: float
    device: str
    precision: Literal["fp32", "bf16"]
    processes: int
    history: tuple[dict[str, float], ...]


def train(
    student: Student,
    objective: Composition,
    dataset: Dataset,
    cache: CachedTeacher | None,
    section: TrainSection,
    augmentation: AugmentSection,
    folder: Path,
    *,
    seed: int = 0,
    view_seed: int | None = None,
    progress: Progress | None = None,
    title: str = "training",
    device: torch.device | str | None = None,
    teacher_fingerprint: Callable[[], str] | None = None,
    strategy: Strategy | None = None,
) -> TrainResult:
    """Trains `student` and leaves it in eval mode on the CPU, with the weights of its best epoch by validation metric.

    The artefact (kind "student") in `folder` holds student.safetensors, objective.safetensors, metrics.jsonl and
    train.json. While it is made, `<folder>.partial` holds the checkpoint and the metrics so far. A finished artefact of
    the same student, objective, data, cache and settings is loaded, not made again. The test split is never touched.

    Args:
        student: as built; changed in place.
        objective: as `build_objective` gave it; changed in place, on the CPU afterwards.
        dataset: training split to learn from, validation split to choose the epoch.
        cache: the teacher's outputs; None when no objective needs a teacher, or a coached strategy gives them.
        section: the recipe's `[train]`.
        augmentation: the recipe's `[data.augment]`; the cache must have been built with it.
        folder: of the artefact.
        seed: of everything random here.
        view_seed: of the augmented views, which a cache of several views was built with; None: `seed`.
        progress: shows samples, rate and time left.
        title: of the progress bar.
        device: None: the first GPU where there is one, else the CPU.
        teacher_fingerprint: hash of a frozen teacher's weights and buffers, compared before and after.
        strategy: how the teacher learns, or what is explored: a coached one gives the teacher's outputs instead of a
            cache; a conditioning one belongs to the training of the teacher itself; an exploration adds inputs. None:
            the teacher is frozen, and nothing is explored.

    Raises:
        InputError: settings that do not fit data or objective, or a damaged checkpoint.
        Interrupted: the user pressed Ctrl-C; a checkpoint was written and the same call goes on.
        EdgestillError: a loss became infinite or NaN, the teacher changed, the disk is full.
    """
    progress = progress or Silent()
    _check(section, objective, dataset, strategy)
    rows = strategy.rows(dataset, seed) if strategy is not None else None
    section = section.resolved(len(dataset.train) if rows is None else len(rows))
    view_seed = seed if view_seed is None else view_seed
    key = _key(student, objective, dataset, cache, section, augmentation, seed, view_seed, strategy)
    if current(folder, "student", key, whole=True) is not None:
        load_student(student, folder / "student.safetensors")
        load_student(objective, folder / "objective.safetensors")
        student.eval()
        return read_result(folder)
    before = teacher_fingerprint() if teacher_fingerprint is not None else ""
    processes = start(device, section.batch_size)
    run = Run(
        student,
        objective,
        dataset,
        cache,
        section,
        augmentation,
        folder,
        key,
        seed,
        view_seed,
        processes,
        strategy,
        rows,
    )
    run.resume(progress)
    remaining = (section.epochs - run.epoch) * run.steps_per_epoch * run.batch_size - run.step_in_epoch * run.batch_size
    with stop_requests() as stop, progress.task(title, remaining) as task:
        while run.epoch < section.epochs:
            run.train_epoch(task, stop)
            # agreed on first: a signal may reach one process only, and all of them must save or none
            asked = processes.any(stop.requested)
            if run.epoch % section.checkpoint_every == 0 or asked or run.epoch == section.epochs:
                run.save()
            if run.epoch < section.epochs and asked:
                raise _interrupted(folder, run)
    if teacher_fingerprint is not None and teacher_fingerprint() != before:
        raise EdgestillError("the frozen teacher changed during training", where=str(folder))
    return run.finish()


def read_result(folder: Path) -> TrainResult:
    """The result stored in a finished artefact of `train`.

    Raises:
        InputError: no finished student there.
    """
    return TrainResult.model_validate(read_manifest(folder, "student").info["result"])


def evaluate_logits(
    student: nn.Module,
    objective: Composition,
    split: Split,
    *,
    batch_size: int = 512,
    device: torch.device | str | None = None,
) -> np.ndarray[Any, Any]:
    """Class logits (N, C), float32, of a split's clean inputs. Student and objective end in eval mode on `device`."""
    place = default_device() if device is None else torch.device(device)
    student.to(place).eval()
    objective.to(place).eval()
    rows = np.arange(len(split))
    return _logits(student, objective, split.inputs, rows, batch_size, place).cpu().numpy()


@torch.inference_mode()
def _logits(
    student: nn.Module,
    objective: Composition,
    inputs: np.ndarray[Any, Any],
    rows: np.ndarray[Any, Any],
    batch_size: int,
    device: torch.device,
) -> Tensor:
    """Class logits (len(rows), C) of `inputs[rows]`, computed in float32."""
    parts = []
    for first in range(0, len(rows), batch_size):
        batch = torch.from_numpy(np.asarray(inputs[rows[first : first + batch_size]])).to(device)
        if batch.dim() == 4:
            batch = batch.contiguous(memory_format=torch.channels_last)
        output: StudentOutput = student(batch)
        parts.append(objective.class_logits(output.head).float())
    return torch.cat(parts)


class Run:
    """One training in progress: what is trained, where it stands, and how it is kept."""

    def __init__(
        self,
        student: Student,
        objective: Composition,
        dataset: Dataset,
        cache: CachedTeacher | None,
        section: TrainSection,
        augmentation: AugmentSection,
        folder: Path,
        key: str,
        seed: int,
        view_seed: int,
        processes: Processes,
        strategy: Strategy | None,
        rows: np.ndarray[Any, Any] | None,
    ) -> None:
        self.section, self.folder, self.key, self.seed, self.processes = section, folder, key, seed, processes
        self.dataset = dataset
        self.device = processes.device
        self.partial = folder.with_name(folder.name + ".partial")
        self.data = Resident(dataset, cache, augmentation, seed, view_seed, self.device)
        self.checksum = self.data.teacher_checksum()
        self.student, self.objective = student.to(self.device), objective.to(self.device)
        if dataset.input.kind == "image":
            student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.rows = None if rows is None else torch.from_numpy(rows)
        self.trained_rows = self.data.rows if rows is None else len(rows)
        self.batch_size = min(section.batch_size, self.trained_rows) // processes.world * processes.world
        self.steps_per_epoch = self.trained_rows // self.batch_size
        self.weights = _class_weights(section, dataset, self.data)
        self.bf16 = _bf16(section, self.device)
        self.strategy = strategy or Strategy()
        self.strategy.start(self)
        self.beside = nn.ModuleList(self.strategy.modules())
        self.optimizer = _optimizer(section, student, objective, self.beside)
        self.student_parameters = [p for p in student.parameters() if p.requires_grad]
        self.average = _Average(student, section.ema) if section.ema is not None else None
        self.writer: Any = None

        self.epoch = 0
        self.step_in_epoch = 0
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Any] = {}
        self.seconds = 0.0
        self.names: list[str] = []
        self.totals: list[float] = []
        self.window: Tensor | None = None
        self.window_start = 0

    # -- one epoch ----------------------------------------------------------------------------------------------------

    def train_epoch(self, task: Task | None = None, stop: Stop | None = None) -> None:
        """Trains to the end of the current epoch, or to the first step after a stop was requested."""
        stop = stop or Stop()
        started = time.perf_counter()
        host_order = self._order()
        order = host_order.to(self.device)
        self.student.train()
        self.objective.train()
        first = self.step_in_epoch
        for step in range(first, self.steps_per_epoch):
            chosen = slice(step * self.batch_size, (step + 1) * self.batch_size)
            self._step(order[chosen], host_order[chosen])
            self.step_in_epoch = step + 1
            if task is not None:
                task.advance(self.batch_size)
            if (step + 1) % _WINDOW == 0:
                self._read_window()
                stop.agreed = self.processes.any(stop.requested)
            # alone, every step can be the last; together, only one that all processes agreed on
            if stop.agreed or (stop.requested and self.processes.world == 1):
                self.seconds += time.perf_counter() - started
                self.save()
                raise _interrupted(self.folder, self)
        self._read_window()
        elapsed = time.perf_counter() - started
        self._end_epoch((self.steps_per_epoch - first) * self.batch_size / elapsed)
        self.seconds += time.perf_counter() - started

    def _step(self, rows: Tensor, host_rows: Tensor) -> None:
        """One optimiser step on the global batch `rows` (B,). The host never waits for the device here."""
        step = self.epoch * self.steps_per_epoch + self.step_in_epoch
        self._seed_generators(step)
        rate = learning_rate(self.section, step, self.section.epochs * self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        share, host_share = self.processes.share(rows), self.processes.share(host_rows)
        inputs = self.data.inputs(share, host_share, self.epoch)
        partners = None
        kept = 1.0
        if self.section.mixup:
            kept = np.random.default_rng((self.seed, step)).beta(self.section.mixup, self.section.mixup)
            # the order is random, so the reversed batch is a random pairing
            partners, host_partners = rows.flip(0), host_rows.flip(0)
            others = self.data.inputs(self.processes.share(partners), self.processes.share(host_partners), self.epoch)
            inputs = (inputs * kept + others * (1 - kept)).round_().to(torch.uint8)

        def truth(logits: Tensor) -> Tensor:
            own = self.truth(logits, share)
            if partners is None:
                return own
            return kept * own + (1 - kept) * self.truth(logits, self.processes.share(partners))

        facts = Step(step, self.epoch, rows, host_rows, share, host_share, inputs, rate, truth)
        self.strategy.before_step(facts)
        self._seed_generators(step)
        with self.autocast():
            output: StudentOutput = self.forward(inputs)
        own = StudentOutput(at_least_float32(output.embedding), at_least_float32(output.head))
        output = self.processes.gather(own)
        told = self.strategy.teacher(facts)
        terms = self._terms(output, rows, host_rows, step, told)
        if partners is not None:
            # every term is affine in the targets up to a constant, so the mixture of two losses has the gradient of
            # the loss of the mixed targets
            mixed = self._terms(output, partners, host_partners, step, told)
            terms = {name: kept * term + (1 - kept) * mixed[name] for name, term in terms.items()}
        terms |= self.strategy.terms(facts, own)
        losses = list(terms.values())
        torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
        self.processes.average_gradients([*self.objective.parameters(), *self.beside.parameters()])
        if self.section.grad_clip is not None:
            # the student alone: an objective's own gradients must not change how the student learns
            nn.utils.clip_grad_norm_(self.student_parameters, self.section.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.strategy.after_step(facts)
        if self.average is not None:
            self.average.update(self.student, step)
        self.names = list(terms)
        values = torch.stack(losses).detach()
        self.window = values if self.window is None else self.window + values

    def _terms(
        self, output: StudentOutput, rows: Tensor, host_rows: Tensor, step: int, told: TeacherOutput | None
    ) -> dict[str, Tensor]:
        teacher = told if told is not None else self.data.teacher(rows, host_rows, self.epoch)
        return self.loss_terms(output, teacher, rows, step)

    def loss_terms(self, output: StudentOutput, teacher: TeacherOutput, rows: Tensor, step: int) -> dict[str, Tensor]:
        """Every weighted term of the loss; the ground truth is added here, once.

        Args:
            output: of the trained network on the global batch, float32.
            teacher: outputs of the same samples; where they have a gradient, logit objectives pass it on.
            rows: int64 (B,), the batch's rows of the training split.
            step: optimiser steps done so far.
        """
        labels = self.data.labels.index_select(0, rows)
        mask = None if self.data.mask is None else self.data.mask.index_select(0, rows)
        epoch = step / self.steps_per_epoch
        batch = Batch(labels, mask, rows, step, epoch, epoch / self.section.epochs)
        terms: dict[str, Tensor] = dict(self.objective(output, teacher, batch))
        truth = self.truth(self.objective.class_logits(output.head), rows)
        terms["ground_truth"] = self.objective.hard_weight * truth
        return terms

    def truth(self, logits: Tensor, rows: Tensor) -> Tensor:
        """The ground-truth loss, unweighted, of class logits (n, C) for `rows` (n,) of the training split."""
        labels = self.data.labels.index_select(0, rows)
        mask = None if self.data.mask is None else self.data.mask.index_select(0, rows)
        return task_loss(logits, labels, mask, weights=self.weights, smoothing=self.section.label_smoothing)

    def autocast(self) -> torch.autocast:
        """The precision of forward passes: bfloat16 where the recipe and the device say so."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def _order(self) -> Tensor:
        """Rows of the training split in this epoch's order; a pure function of seed and epoch."""
        generator = torch.Generator().manual_seed(
            int(np.random.SeedSequence((self.seed, self.epoch)).generate_state(1)[0])
        )
        order = torch.randperm(self.trained_rows, generator=generator)
        return order if self.rows is None else self.rows[order]

    def _seed_generators(self, step: int) -> None:
        seed_generators(self.seed, step, self.device, rank=self.processes.rank)

    def _read_window(self) -> None:
        """Adds the losses since the last look to the epoch's totals.

        Raises:
            EdgestillError: a term is infinite or NaN.
        """
        if self.window is None:
            return
        values = self.window.double().tolist()
        self.window = None
        broken = [name for name, value in zip(self.names, values, strict=True) if not math.isfinite(value)]
        if broken:
            raise EdgestillError(
                f"the loss is not a number any more: {', '.join(broken)}",
                where=f"epoch {self.epoch + 1}, steps {self.window_start + 1} to {self.step_in_epoch}",
                evidence=", ".join(f"{name} {value:g}" for name, value in zip(self.names, values, strict=True)),
                fix=f"train.learning_rate below {self.section.peak_learning_rate:g}, or train.grad_clip = 1.0"
                + self.strategy.remedy,
            )
        self.totals = [a + b for a, b in zip(self.totals or [0.0] * len(values), values, strict=True)]
        self.window_start = self.step_in_epoch

    def _end_epoch(self, samples_per_second: float) -> None:
        """Notes the losses, validates where it is due, and writes the metrics."""
        if self.data.teacher_checksum() != self.checksum:
            raise EdgestillError("the cached teacher outputs changed during training", where=str(self.folder))
        steps = self.steps_per_epoch
        last_step = (self.epoch + 1) * steps - 1
        record: dict[str, float] = {
            "epoch": self.epoch + 1,
            "learning_rate": learning_rate(self.section, last_step, self.section.epochs * steps),
            "loss": sum(self.totals) / steps,
            **{f"loss/{name}": total / steps for name, total in zip(self.names, self.totals, strict=True)},
            "samples_per_second": samples_per_second,
            **self.objective.logs(),
            **self.strategy.logs(),
        }
        self.history.append(record)
        if self.section.validates_after(self.epoch + 1):
            self._validate(record)
        if self.writer is not None:
            for name, value in record.items():
                self.writer.add_scalar(name, value, self.epoch + 1)
            self.writer.flush()
        self.epoch += 1
        self.step_in_epoch = self.window_start = 0
        self.totals = []

    def _validate(self, record: dict[str, float]) -> None:
        """Adds the validation metric to the epoch's record, and keeps the weights when they are the best so far."""
        logits = self._validation_logits()
        value = metric_value(self.dataset, logits)
        record[f"validation/{primary_metric(self.dataset.task)}"] = value
        record.update(self.strategy.validation())
        # of equal epochs the later one: its learning rate was lower
        if not self.best or value >= self.best["value"]:
            self.best = {
                "value": value,
                "logits": torch.from_numpy(logits),
                "epoch": self.epoch + 1,
                "student": _copy(self._kept_student()),
                "objective": _copy(self.objective),
            }

    def _kept_student(self) -> nn.Module:
        return self.student if self.average is None else self.average.module

    def _validation_logits(self) -> np.ndarray[Any, Any]:
        """Class logits (N, C) of the validation split; every process does its share of the samples."""
        split = self.dataset.validation
        kept = self._kept_student()
        if self.processes.world > 1:
            self.processes.synchronise(kept)
        kept.eval()
        self.objective.eval()
        rows = np.arange(self.processes.rank, len(split), self.processes.world)
        logits = torch.zeros(len(split), len(self.dataset.classes), device=self.device)
        if len(rows):
            size = max(256, self.batch_size)
            logits[torch.from_numpy(rows).to(self.device)] = _logits(
                kept, self.objective, split.inputs, rows, size, self.device
            )
        found: np.ndarray[Any, Any] = self.processes.sum(logits).cpu().numpy()
        return found

    # -- keeping ------------------------------------------------------------------------------------------------------

    def resume(self, progress: Progress) -> None:
        """Goes on from the checkpoint of the same training where there is one; else fits the objective and starts."""
        file = self.partial / _CHECKPOINT
        state = load_checkpoint(file) if file.is_file() else None
        if state is not None and state["key"] != self.key:
            progress.note(f"{self.partial} holds a training with other settings; starting anew")
            state = None
        if self.processes.is_main:
            self._open_events(state)
        if state is None:
            started = time.perf_counter()
            self.objective.prepare(self.data.fit_data(self.device))
            self.seconds = time.perf_counter() - started
        else:
            self.student.load_state_dict(state["student"])
            self.objective.load_state_dict(state["objective"])
            self.objective.prepare(self.data.fit_data(self.device), fitted=True)
            self.beside.load_state_dict(state["beside"])
            self.strategy.load_state_dict(state["strategy"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.average is not None:
                self.average.module.load_state_dict(state["average"])
            self.epoch, self.step_in_epoch = state["epoch"], state["step_in_epoch"]
            self.history, self.best, self.seconds = state["history"], state["best"], state["seconds"]
            self.names, self.totals, self.window_start = state["names"], state["totals"], state["window_start"]
            self.window = None if state["window"] is None else state["window"].to(self.device)
            progress.note(f"resumed after epoch {self.epoch}, step {self.step_in_epoch} of {self.steps_per_epoch}")
        if self.processes.world > 1:
            self.processes.synchronise(self.objective)
            self.processes.synchronise(self.beside)
        # a further forward pass of a step takes this one: its gradients are averaged with those of `forward`
        self.alone: nn.Module = torch.compile(self.student) if self.section.compile else self.student  # type: ignore[assignment]
        self.forward = self.processes.wrap(self.alone)

    def _open_events(self, state: dict[str, Any] | None) -> None:
        """The TensorBoard writer, if the recipe wants one; events of a discarded training are removed."""
        folder = self.partial / _TENSORBOARD
        if state is None and folder.exists():
            with explain_os_errors(folder):
                shutil.rmtree(folder)
        if self.section.tensorboard:
            # epochs after the checkpoint are trained again; their older events no longer count
            self.writer = _tensorboard(folder, None if state is None else state["epoch"] + 1)

    def save(self) -> None:
        """Writes checkpoint and metrics; the main process does it for all."""
        if self.processes.is_main:
            state = {
                "key": self.key,
                "student": self.student.state_dict(),
                "objective": self.objective.state_dict(),
                "beside": self.beside.state_dict(),
                "strategy": self.strategy.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "average": None if self.average is None else self.average.module.state_dict(),
                "epoch": self.epoch,
                "step_in_epoch": self.step_in_epoch,
                "history": self.history,
                "best": self.best,
                "seconds": self.seconds,
                "names": self.names,
                "totals": self.totals,
                "window": self.window,
                "window_start": self.window_start,
            }
            save_checkpoint(self.partial / _CHECKPOINT, state)
            with explain_os_errors(self.partial):
                write_text(self.partial / "metrics.jsonl", self._metrics())
        self.processes.barrier()

    def _metrics(self) -> str:
        import json

        return "".join(json.dumps(record) + "\n" for record in self.history)

    def finish(self) -> TrainResult:
        """Loads the best weights and writes the artefact; the working folder goes."""
        self.processes.unwrap()
        self.student.load_state_dict(self.best["student"])
        self.objective.load_state_dict(self.best["objective"])
        self.student.to("cpu").to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
        self.objective.to("cpu").eval()
        rates = sorted(record["samples_per_second"] for record in self.history)
        validation = self.dataset.validation
        result = TrainResult(
            arch=self.student.arch,
            metric=evaluate(
                self.dataset.task, self.best["logits"].numpy(), validation.labels, validation.mask, seed=self.seed
            ),
            best_epoch=self.best["epoch"],
            epochs=self.section.epochs,
            seconds=self.seconds,
            samples_per_second=rates[len(rates) // 2],
            parameters=sum(p.numel() for p in self.student.parameters()),
            hard_weight=self.objective.hard_weight,
            device=str(self.device),
            precision="bf16" if self.bf16 else "fp32",
            processes=self.processes.world,
            history=tuple(self.history),
        )
        if self.processes.is_main:
            info = {"arch": self.student.arch, "result": result.model_dump(mode="json")}
            with create(self.folder, "student", self.key, info) as folder:
                save_student(self.student, folder / "student.safetensors")
                save_student(self.objective, folder / "objective.safetensors")
                self.strategy.save(folder)
                (folder / "metrics.jsonl").write_text(self._metrics(), encoding="utf-8")
                (folder / "train.json").write_text(self.section.model_dump_json(indent=2) + "\n", encoding="utf-8")
                if self.writer is not None:
                    self.writer.close()
                    shutil.copytree(self.partial / _TENSORBOARD, folder / _TENSORBOARD)
            shutil.rmtree(self.partial, ignore_errors=True)
        self.processes.barrier()
        return result


class _Average:
    """Exponential moving average of the student's weights and floating buffers.

    The decay is min(decay, (1 + step) / (10 + step)), so that short trainings do not keep the initial weights.
    """

    def __init__(self, student: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(student)
        self.module.requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, student: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        pairs = list(zip(self.module.state_dict().values(), student.state_dict().values(), strict=True))
        floating = [(mean, value) for mean, value in pairs if mean.is_floating_point()]
        torch._foreach_lerp_([mean for mean, _ in floating], [value for _, value in floating], 1 - decay)
        for mean, value in pairs:
            if not mean.is_floating_point():
                mean.copy_(value)


def seed_generators(seed: int, step: int, device: torch.device, *, rank: int = 0) -> None:
    """Sets torch's generators to a state of (seed, step, process) alone, without waiting for the device."""
    mixed = ((seed * 1_000_003 + step) * 65_537 + rank) % 2**63
    torch.default_generator.manual_seed(mixed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or torch.cuda.current_device()].manual_seed(mixed)


class Stop:
    """Whether the user asked to stop, and whether all processes know it."""

    requested = False
    agreed = False


@contextmanager
def stop_requests() -> Iterator[Stop]:
    """Turns the first SIGINT or SIGTERM into a request that the loop sees between two steps; a second acts as usual."""
    stop = Stop()
    previous: dict[int, Any] = {}

    def request(number: int, frame: FrameType | None) -> None:
        stop.requested = True
        for restored, handler in previous.items():
            signal.signal(restored, handler)

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, request)
    except ValueError:
        previous.clear()  # not the main thread: signals are somebody else's
    try:
        yield stop
    except KeyboardInterrupt as error:
        raise Interrupted("stopped", fix="the same command goes on from the last checkpoint") from error
    finally:
        for restored, handler in previous.items():
            signal.signal(restored, handler)


def _interrupted(folder: Path, run: Run) -> Interrupted:
    done = run.epoch + run.step_in_epoch / run.steps_per_epoch
    return Interrupted(
        f"stopped after {done:.1f} of {run.section.epochs} epochs",
        where=str(folder),
        fix="the same command goes on from here",
    )


def learning_rate(section: TrainSection, step: int, total: int) -> float:
    """The learning rate of optimiser step `step` (from 0) of `total`.

    "one-cycle": half-cosine from peak / 25 up, then half-cosine to peak / 10,000 (Smith & Topin 2019; momentum stays).
    "cosine": linear warm-up, then half-cosine to 0. "constant": linear warm-up, then the peak.
    """
    peak = section.peak_learning_rate
    warm = round(section.warmup_share * total)
    if step < warm:
        if section.schedule == "one-cycle":
            return _half_cosine(peak / 25, peak, step / warm)
        return peak * (step + 1) / warm
    if section.schedule == "constant":
        return peak
    final = peak / 1e4 if section.schedule == "one-cycle" else 0.0
    return _half_cosine(peak, final, (step - warm) / max(1, total - warm))


def _half_cosine(first: float, last: float, share: float) -> float:
    return last + (first - last) * (1 + math.cos(math.pi * share)) / 2


def _optimizer(
    section: TrainSection, student: nn.Module, objective: nn.Module, beside: nn.Module
) -> torch.optim.Optimizer:
    """Weight decay on matrices and kernels of the student, and of what a strategy trains beside it; none on an
    objective, whose rank it would lower."""
    trained = [p for module in (student, beside) for p in module.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": section.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
        {"params": list(objective.parameters()), "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    rate = section.peak_learning_rate
    if section.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=rate, fused=True)
    return torch.optim.SGD(groups, lr=rate, momentum=0.9, nesterov=True, fused=True)


def _class_weights(section: TrainSection, dataset: Dataset, data: Resident) -> Tensor | None:
    if section.class_weights is None:
        return None
    if section.class_weights == "balanced":
        return balanced_weights(data.labels, data.mask, len(dataset.classes)).to(data.device)
    return torch.tensor(section.class_weights, dtype=torch.float32, device=data.device)


def _bf16(section: TrainSection, device: torch.device) -> bool:
    if section.precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return section.precision == "bf16"


def metric_value(dataset: Dataset, logits: np.ndarray[Any, Any]) -> float:
    """The primary metric on the validation split without its interval, whose bootstrap can cost more than an epoch."""
    split = dataset.validation
    if dataset.task == "multiclass":
        return evaluate(dataset.task, logits, split.labels).value
    known = np.ones_like(split.labels, dtype=bool) if split.mask is None else split.mask
    judged = ((split.labels > 0) & known).any(0) & ((split.labels == 0) & known).any(0)
    if not judged.any() or not np.isfinite(logits).all():
        return evaluate(dataset.task, logits, split.labels, split.mask).value  # explains what is wrong
    mask = None if split.mask is None else split.mask[:, judged]
    return float(average_precision(logits[:, judged], split.labels[:, judged], mask).mean())


def _copy(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def _tensorboard(folder: Path, purge_step: int | None) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError(
            "TensorBoard is not installed",
            where="train.tensorboard",
            evidence=str(error),
            fix="pip install 'edgestill[tensorboard]', or tensorboard = false; metrics.jsonl is always written",
        ) from error
    return SummaryWriter(str(folder), purge_step=purge_step)


def _check(section: TrainSection, objective: Composition, dataset: Dataset, strategy: Strategy | None) -> None:
    """Refuses what cannot work before anything is trained.

    Raises:
        InputError: mixup or class weights that do not fit objective or data, or empty splits.
    """
    objective.check_mixup(section.mixup)
    if section.mixup and strategy is not None and not strategy.mixup:
        raise InputError(
            "mixup cannot be used while the teacher learns beside the student",
            where="train.mixup",
            evidence="the influence of a sample is not defined for a mixture of two",
            fix='mixup = 0, or teacher.strategy = "frozen"',
        )
    if section.mixup and dataset.input.kind != "image":
        raise InputError("mixup needs images", where="train.mixup", evidence="the inputs are tokens", fix="mixup = 0")
    if isinstance(section.class_weights, tuple) and len(section.class_weights) != len(dataset.classes):
        raise InputError(
            f"{len(section.class_weights)} class weights for {len(dataset.classes)} classes",
            where="train.class_weights",
            evidence="classes: " + ", ".join(dataset.classes[:8]),
            fix='one number per class, or class_weights = "balanced"',
        )
    for name in ("train", "validation"):
        if not len(dataset.split("train" if name == "train" else "validation")):
            raise InputError(f"the {name} split is empty", where="data", fix="give it samples")


def _key(
    student: Student,
    objective: Composition,
    dataset: Dataset,
    cache: CachedTeacher | None,
    section: TrainSection,
    augmentation: AugmentSection,
    seed: int,
    view_seed: int,
    strategy: Strategy | None,
) -> str:
    """Hash of everything that decides the weights."""
    # only where there is one, so that all other students keep their key
    learning = [] if strategy is None else [strategy.key]
    return content_key(
        "student",
        FORM,
        student.arch,
        {name: value.detach().cpu().numpy() for name, value in student.state_dict().items()},
        {name: value.detach().cpu().numpy() for name, value in objective.state_dict().items()},
        list(objective.sections),
        objective.hard_weight,
        section.model_dump(mode="json", exclude={"hard_weight", "checkpoint_every", "tensorboard"}),
        augmentation,
        dataset.key,
        cache.key if cache is not None else None,
        seed,
        view_seed,
        *learning,
    )
