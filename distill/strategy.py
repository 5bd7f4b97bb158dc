"""What the training loop knows of a teacher strategy: a few moments of a step at which it asks, and what it keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from distill.data.dataset import Dataset
from distill.outputs import StudentOutput, TeacherOutput

if TYPE_CHECKING:
    from distill.training import Run


@dataclass(frozen=True)
class Step:
    """One optimiser step as a strategy sees it.

    number: optimiser steps done before it. epoch: from 0. rows, host_rows: int64 (B,), the global batch's rows of the
    training split, on the device and on the host. share, host_share: (n,), this process's part of them; all of them in
    one process. inputs: (n, *shape), the share's augmented inputs as the trained network gets them. learning_rate: of
    this step. truth: class logits (n, C) of the share -> its ground-truth loss, unweighted, with the recipe's class
    weights, smoothing and mixup.
    """

    number: int
    epoch: int
    rows: Tensor
    host_rows: Tensor
    share: Tensor
    host_share: Tensor
    inputs: Tensor
    learning_rate: float
    truth: Callable[[Tensor], Tensor]


class Strategy:
    """How a teacher learns, as an object that the one training loop asks; the base class does nothing.

    Order of a step: `before_step`, forward pass of the trained network, `teacher`, `terms`, backward pass, gradients
    averaged over the processes, the network's optimiser step, `after_step`. Torch's generators are seeded by (seed,
    step) before `before_step` and once more after it, so a strategy never changes the network's dropout.

    What is drawn at random must be a pure function of (run.seed, step), or be in the state.
    """

    mixup = False
    """Whether `train.mixup` is sound with it."""
    remedy = ""
    """What may help beside `train`'s own settings when a loss became infinite or NaN."""

    @property
    def key(self) -> object:
        """Plain values that decide what it does; part of the hash of the trained network.

        The base class, which stands for a frozen teacher in the loop, has none and is never asked.
        """
        raise NotImplementedError

    def rows(self, dataset: Dataset, seed: int) -> np.ndarray[Any, Any] | None:
        """Sorted int64 rows of the training split to train on; None: all of them."""
        return None

    def start(self, run: Run) -> None:
        """Called once, before the optimiser is made: data, student and objective are on the device."""

    def modules(self) -> list[nn.Module]:
        """Modules that train with the network, in its optimiser and schedule; kept in the checkpoint by the loop."""
        return []

    def before_step(self, step: Step) -> None:
        """The teacher's own step, or what the step needs to be ready."""

    def teacher(self, step: Step) -> TeacherOutput | None:
        """Outputs of the global batch, float32, without gradient; None: those of the cache."""
        return None

    def terms(self, step: Step, output: StudentOutput) -> dict[str, Tensor]:
        """Further scalar terms of the loss, each a mean over this process's share. `output`: of the share, float32."""
        return {}

    def after_step(self, step: Step) -> None:
        """After the network's optimiser step."""

    def logs(self) -> dict[str, float]:
        """Figures for the metrics, asked once per epoch; they start anew then."""
        return {}

    def validation(self) -> dict[str, float]:
        """Figures on the validation split, asked whenever the network is validated."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed training needs besides `modules()`: tensors, numbers, and lists and dicts of them."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`, after `start`."""

    def save(self, folder: Path) -> None:
        """Writes what is to be kept into the finished artefact, beside the network's weights."""
