"""The `[train]` table of a recipe. Imports only pydantic."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from profiles.section import Section


class TrainSection(Section):
    """How a student is trained; one loop serves every objective."""

    epochs: int = Field(30, ge=1, description="passes over the training split")
    min_steps: int | None = Field(
        None, ge=1, description="at least so many optimiser steps: a small training split gets more epochs for it"
    )
    validations: int | None = Field(
        None, ge=1, description="at most so many looks at the validation split, evenly spread; default: every epoch"
    )
    batch_size: int = Field(128, ge=1, description="samples per optimiser step, over all processes together")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="sgd has Nesterov momentum 0.9")
    learning_rate: float | Literal["auto"] = Field(
        "auto", description="peak of the schedule; auto: 0.002 for adamw, 0.05 for sgd"
    )
    weight_decay: float = Field(0.01, ge=0, description="on matrices and kernels; never on biases, norms or objectives")
    schedule: Literal["one-cycle", "cosine", "constant"] = Field(
        "one-cycle", description="one-cycle: half-cosine up and down; cosine: linear warm-up, then half-cosine to zero"
    )
    warmup: float | None = Field(
        None, ge=0, lt=1, description="share of the steps that warm up; default 0.25 (one-cycle), 0.05 (others)"
    )
    hard_weight: float | None = Field(
        None, ge=0, description="weight of the ground-truth term; default: the objective's own, required with several"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target spread over all classes")
    class_weights: Literal["balanced"] | tuple[float, ...] | None = Field(
        None,
        description="in the ground truth, one number per class (several labels: on its positive labels)",
    )
    mixup: float = Field(
        0.0, ge=0, description="alpha of the Beta distribution; 0: off. Only supervised and kd allow it"
    )
    grad_clip: float | None = Field(None, gt=0, description="largest norm of the student's gradient")
    ema: float | None = Field(
        None, gt=0, lt=1, description="decay of the moving average of the weights; the average is then what is kept"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="of the student's forward pass; auto: bf16 on GPUs that have it. Losses are always float32"
    )
    compile: bool = Field(False, description="torch.compile the student while it trains")
    checkpoint_every: int = Field(1, ge=1, description="epochs between checkpoints; Ctrl-C always writes one")
    tensorboard: bool = Field(False, description="write TensorBoard events beside metrics.jsonl")

    def resolved(self, samples: int) -> TrainSection:
        """The same with the epochs that `samples` training samples get; `min_steps` is then spent."""
        if self.min_steps is None:
            return self
        steps_per_epoch = max(1, samples // self.batch_size)
        epochs = max(self.epochs, -(-self.min_steps // steps_per_epoch))
        return self.model_copy(update={"epochs": epochs, "min_steps": None})

    def validates_after(self, epoch: int) -> bool:
        """Whether the validation split is looked at after epoch `epoch` (from 1); always after the last."""
        every = 1 if self.validations is None else -(-self.epochs // self.validations)
        return epoch % every == 0 or epoch == self.epochs

    @property
    def peak_learning_rate(self) -> float:
        """The number behind "auto"."""
        if self.learning_rate != "auto":
            return self.learning_rate
        return {"adamw": 0.002, "sgd": 0.05}[self.optimizer]

    @property
    def warmup_share(self) -> float:
        """The number behind a missing `warmup`."""
        if self.warmup is not None:
            return self.warmup
        return 0.25 if self.schedule == "one-cycle" else 0.05
