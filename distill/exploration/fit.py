"""The one small loop in which a generator learns: resumable to the bit, for images and for texts.

As in `distill.training`, everything random is a pure function of (seed, epoch, step), so a checkpoint holds no
generator state. A generator is not validated: what it makes is looked at (pictures, examples), and used.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distill.checkpoint import load_checkpoint, save_checkpoint
from distill.train_section import TrainSection
from distill.training import learning_rate as scheduled_rate
from distill.training import seed_generators, stop_requests
from profiles.artifact import explain_os_errors, write_text
from profiles.errors import EdgestillError, Interrupted
from profiles.progress import Progress, Silent, Task

_WINDOW = 50
"""Steps between two looks at the losses, at which the host waits for the device."""
_CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.jsonl"
_WEIGHT_DECAY = 0.01
_CLIP = 1.0
_WHERE = "explore.generator"


def partial(folder: Path) -> Path:
    """Where the checkpoint and the metrics lie while the generator of `folder` learns."""
    return folder.with_name(folder.name + ".partial")


def clear(folder: Path) -> None:
    """Removes `partial(folder)`; for whoever has stored the trained generator as an artefact."""
    shutil.rmtree(partial(folder), ignore_errors=True)


def lines(history: list[dict[str, float]]) -> str:
    """The text of metrics.jsonl: one JSON object per epoch."""
    return "".join(json.dumps(record) + "\n" for record in history)


def fit(
    module: nn.Module,
    loss: Callable[[Tensor], dict[str, Tensor]],
    count: int,
    folder: Path,
    *,
    key: str,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    device: torch.device | str,
    progress: Progress | None = None,
    title: str,
) -> list[dict[str, float]]:
    """Trains `module` with AdamW (one-cycle, gradients clipped to norm 1); it ends in eval mode on `device`.

    Weight decay 0.01 on matrices and kernels only. torch's global generators end as they were. After a finished call
    `<folder>.partial` still holds the checkpoint, and the same call then returns at once, until `clear(folder)`.

    Args:
        module: as built; changed in place. Only parameters that require a gradient learn.
        loss: rows, int64 (B,) on the host, of 0..count-1 -> named terms, each a scalar on `device`; their sum is
            minimised. Called in train mode; its noise comes from torch's global generators, which are set to a state
            of (seed, step) before.
        count: samples, at least 1. An epoch takes each once in a new order; the rest of a last, incomplete batch is
            left out (a batch is never larger than `count`).
        folder: of the artefact to be; checkpoint and metrics are written to `<folder>.partial` at Ctrl-C, and after
            every epoch that ends 50 steps or more after they were last written.
        key: hash of everything that decides the weights; a checkpoint with another key is not taken up.
        epochs, batch_size, learning_rate: as in `[explore.generator]`; `learning_rate` is the peak.
        seed: of order and noise.
        device: where the module learns.
        progress: shows samples, rate and time left.
        title: of the progress bar.

    Returns:
        One record per epoch: "epoch" from 1, "learning_rate" of its last step, "loss", and "loss/<term>", means over
        the epoch's steps.

    Raises:
        Interrupted: SIGINT or SIGTERM; a checkpoint was written and the same call goes on.
        EdgestillError: a term became infinite or NaN, or the disk is full.
        InputError: a damaged checkpoint.
    """
    progress = progress or Silent()
    place = torch.device(device)
    devices = [place] if place.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        run = _Fit(module, loss, count, folder, key, epochs, batch_size, learning_rate, seed, place)
        run.resume(progress)
        remaining = run.total - run.step
        with stop_requests() as stop, progress.task(title, remaining * run.batch_size) as task:
            while run.step < run.total:
                run.one_step(task)
                if run.step % run.steps_per_epoch == 0:
                    run.end_epoch()
                    # few inputs make short epochs, and writing would take longer than learning
                    if run.step - run.saved >= _WINDOW or run.step == run.total:
                        run.save()
                if stop.requested and run.saved < run.step:
                    run.save()
                if stop.requested and run.step < run.total:
                    raise Interrupted(
                        f"stopped after {run.step / run.steps_per_epoch:.1f} of {epochs} epochs",
                        where=str(folder),
                        fix="the same command goes on from here",
                    )
    module.eval()
    return run.history


class _Fit:
    """One generator's training in progress."""

    def __init__(
        self,
        module: nn.Module,
        loss: Callable[[Tensor], dict[str, Tensor]],
        count: int,
        folder: Path,
        key: str,
        epochs: int,
        batch_size: int,
        learning_rate: float,
        seed: int,
        device: torch.device,
    ) -> None:
        self.module, self.loss, self.count, self.key, self.seed = module.to(device), loss, count, key, seed
        self.partial, self.device = partial(folder), device
        self.batch_size = min(batch_size, count)
        self.steps_per_epoch = count // self.batch_size
        self.total = epochs * self.steps_per_epoch
        self.schedule = TrainSection(epochs=epochs, learning_rate=learning_rate)
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self.parameters if p.dim() > 1], "weight_decay": _WEIGHT_DECAY},
            {"params": [p for p in self.parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=learning_rate, fused=True)
        self.step = self.saved = 0
        self.order: Tensor | None = None
        self.history: list[dict[str, float]] = []
        self.names: list[str] = []
        self.totals: list[float] = []
        self.window: Tensor | None = None
        self.window_start = 0

    def resume(self, progress: Progress) -> None:
        """Goes on from the checkpoint of the same training where there is one."""
        file = self.partial / _CHECKPOINT
        state = load_checkpoint(file) if file.is_file() else None
        if state is not None and state["key"] != self.key:
            progress.note(f"{self.partial} holds a training with other settings; starting anew")
            state = None
        if state is None:
            return
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.history = state["step"], state["history"]
        self.saved = self.step
        self.names, self.totals, self.window_start = state["names"], state["totals"], state["window_start"]
        self.window = None if state["window"] is None else state["window"].to(self.device)
        if self.step < self.total:
            progress.note(f"resumed after step {self.step} of {self.total}")

    def save(self) -> None:
        """Writes checkpoint and metrics."""
        state = {
            "key": self.key,
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "history": self.history,
            "names": self.names,
            "totals": self.totals,
            "window": self.window,
            "window_start": self.window_start,
        }
        save_checkpoint(self.partial / _CHECKPOINT, state)
        with explain_os_errors(self.partial):
            write_text(self.partial / METRICS, lines(self.history))
        self.saved = self.step

    def one_step(self, task: Task) -> None:
        """One optimiser step; the host never waits for the device here but every 50th time."""
        epoch, inside = divmod(self.step, self.steps_per_epoch)
        if self.order is None or inside == 0:
            mixed = int(np.random.SeedSequence((self.seed, epoch)).generate_state(1)[0])
            self.order = torch.randperm(self.count, generator=torch.Generator().manual_seed(mixed))
            self.module.train()
        rows = self.order[inside * self.batch_size : (inside + 1) * self.batch_size]
        for group in self.optimizer.param_groups:
            group["lr"] = scheduled_rate(self.schedule, self.step, self.total)
        seed_generators(self.seed, self.step, self.device)
        terms = self.loss(rows)
        losses = torch.stack([term.float() for term in terms.values()])
        losses.sum().backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.parameters, _CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.names = list(terms)
        values = losses.detach()
        if self.window is not None:
            # one broken term breaks all of the steps after it; what is named later is the term that was first
            values = self.window + torch.where(self.window.isfinite().all(), values, 0.0)
        self.window = values
        self.step += 1
        task.advance(self.batch_size)
        if self.step % _WINDOW == 0:
            self._read_window()

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
                f"the generator's loss is not a number any more: {', '.join(broken)}",
                where=_WHERE,
                evidence=f"steps {self.window_start + 1} to {self.step}: "
                + ", ".join(f"{name} {value:g}" for name, value in zip(self.names, values, strict=True)),
                fix=f"{_WHERE}.learning_rate below {self.schedule.peak_learning_rate:g}",
            )
        self.totals = [a + b for a, b in zip(self.totals or [0.0] * len(values), values, strict=True)]
        self.window_start = self.step

    def end_epoch(self) -> None:
        """Notes the epoch's mean losses."""
        self._read_window()
        means = [total / self.steps_per_epoch for total in self.totals]
        self.history.append(
            {
                "epoch": self.step // self.steps_per_epoch,
                "learning_rate": scheduled_rate(self.schedule, self.step - 1, self.total),
                "loss": sum(means),
                **{f"loss/{name}": mean for name, mean in zip(self.names, means, strict=True)},
            }
        )
        self.totals = []
