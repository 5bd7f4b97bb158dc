"""What the training loop knows of a teacher strategy or an exploration: moments of a step at which it asks."""

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
    """How a teacher learns, or on which further inputs a student does, as an object that the one training loop asks.

    The base class does nothing.

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


class Together(Strategy):
    """Several at once, asked in their order: a teacher that learns, and inputs to explore.

    Their terms, figures and files must have different names. At most one of them may choose rows or give the teacher's
    outputs; the first that does so counts. What looks ahead, as influence does, sees the loop's own terms alone and
    not what another strategy adds (our reading).
    """

    def __init__(self, *strategies: Strategy) -> None:
        self.strategies = strategies
        self.mixup = all(strategy.mixup for strategy in strategies)
        self.remedy = "".join(strategy.remedy for strategy in strategies)

    @property
    def key(self) -> object:
        return ["together", *(strategy.key for strategy in self.strategies)]

    def rows(self, dataset: Dataset, seed: int) -> np.ndarray[Any, Any] | None:
        found = (strategy.rows(dataset, seed) for strategy in self.strategies)
        return next((rows for rows in found if rows is not None), None)

    def start(self, run: Run) -> None:
        for strategy in self.strategies:
            strategy.start(run)

    def modules(self) -> list[nn.Module]:
        return [module for strategy in self.strategies for module in strategy.modules()]

    def before_step(self, step: Step) -> None:
        for strategy in self.strategies:
            strategy.before_step(step)

    def teacher(self, step: Step) -> TeacherOutput | None:
        found = (strategy.teacher(step) for strategy in self.strategies)
        return next((told for told in found if told is not None), None)

    def terms(self, step: Step, output: StudentOutput) -> dict[str, Tensor]:
        return {name: term for strategy in self.strategies for name, term in strategy.terms(step, output).items()}

    def after_step(self, step: Step) -> None:
        for strategy in self.strategies:
            strategy.after_step(step)

    def logs(self) -> dict[str, float]:
        return {name: value for strategy in self.strategies for name, value in strategy.logs().items()}

    def validation(self) -> dict[str, float]:
        return {name: value for strategy in self.strategies for name, value in strategy.validation().items()}

    def state_dict(self) -> dict[str, Any]:
        return {"strategies": [strategy.state_dict() for strategy in self.strategies]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for strategy, own in zip(self.strategies, state["strategies"], strict=True):
            strategy.load_state_dict(own)

    def save(self, folder: Path) -> None:
        for strategy in self.strategies:
            strategy.save(folder)
