"""Quantisation-aware training: the one training loop through a student whose weights and activations are rounded.

Jacob et al.: Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference, CVPR 2018,
arXiv 1712.05877. The rounding's gradient is that of the identity inside the range and 0 outside (straight-through
estimator, Bengio et al. 2013, arXiv 1308.3432). Only weights come out of it: the export measures the ranges anew.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from distill.data.dataset import Dataset
from distill.data.section import AugmentSection
from distill.objectives.base import CachedTeacher
from distill.objectives.compose import Composition
from distill.outputs import StudentOutput
from distill.strategy import Strategy
from distill.students import Student
from distill.train_section import TrainSection
from distill.training import TrainResult, train
from profiles.progress import Progress
from profiles.quantspec import QuantSpec

_RATE = 0.1
"""Learning rate against that of the student's own training: the weights are to move within their grid."""
_FOLLOW = 0.1
"""Share of a batch's range in the moving average of the activations' ranges."""
_WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class RoundedWeight(nn.Module):
    """Weights on their symmetric grid, one scale for each output channel.

    The export folds batch normalisation into the convolution before it: that multiplies each output channel, and with
    it the channel's grid, so the grid of the folded weights is this one.
    """

    def __init__(self, limit: int, axis: int) -> None:
        super().__init__()
        self.limit, self.axis = limit, axis

    def forward(self, weight: Tensor) -> Tensor:
        full = weight.float()
        largest = full.detach().abs().amax([axis for axis in range(weight.dim()) if axis != self.axis])
        scale = (largest / self.limit).clamp(min=torch.finfo(torch.float32).tiny)
        zero = torch.zeros_like(scale, dtype=torch.int32)
        rounded: Tensor = torch.fake_quantize_per_channel_affine(full, scale, zero, self.axis, -self.limit, self.limit)
        return rounded.to(weight.dtype)


class RoundedInput(nn.Module):
    """Activations on one grid for the whole tensor. Its range follows the batches in training, and stays in eval.

    low, high: of the range; it always holds 0. seen: whether a batch came by.
    """

    low: Tensor
    high: Tensor
    seen: Tensor

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__()
        self.symmetric = spec.symmetric
        self.smallest, self.largest = spec.activation_limits
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))
        self.register_buffer("seen", torch.zeros((), dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        full = x.float()
        if self.training:
            with torch.no_grad():
                low, high = torch.aminmax(full.detach())
                share = torch.where(self.seen, _FOLLOW, 1.0)
                self.low.lerp_(low.clamp(max=0), share)
                self.high.lerp_(high.clamp(min=0), share)
                self.seen.fill_(True)
        tiny = torch.finfo(torch.float32).tiny
        if self.symmetric:
            scale = (torch.maximum(-self.low, self.high) / self.largest).clamp(min=tiny)
            zero = torch.zeros((), dtype=torch.int32, device=x.device)
        else:
            scale = ((self.high - self.low) / (self.largest - self.smallest)).clamp(min=tiny)
            zero = (self.smallest - (self.low / scale).round()).to(torch.int32)
        rounded: Tensor = torch.fake_quantize_per_tensor_affine(full, scale, zero, self.smallest, self.largest)
        return rounded.to(x.dtype)


class RoundedStudent(nn.Module):
    """A copy of a student that computes with rounded weights and rounded inputs of every weighted layer.

    Its batch normalisation stands still: running statistics that move would change the folded weights under the grid.
    Sums and products without weights (a residual's, attention's) are not rounded.
    """

    def __init__(self, student: Student, spec: QuantSpec) -> None:
        super().__init__()
        self.arch = student.arch
        self.embedding_dim = student.embedding_dim
        self.head_size = student.head_size
        self.student = copy.deepcopy(student)
        self.inputs = nn.ModuleList()
        for layer in [layer for layer in self.student.modules() if isinstance(layer, _WEIGHTED)]:
            axis = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
            parametrize.register_parametrization(layer, "weight", RoundedWeight(spec.weight_limit, axis))
            rounding = RoundedInput(spec)
            self.inputs.append(rounding)
            layer.register_forward_pre_hook(_rounding(rounding))

    @property
    def body(self) -> nn.Module:
        """As of a plain student."""
        return self.student.body

    @property
    def head(self) -> nn.Linear:
        """As of a plain student."""
        return self.student.head

    def forward(self, x: Tensor) -> StudentOutput:
        output: StudentOutput = self.student(x)
        return output

    def train(self, mode: bool = True) -> RoundedStudent:
        super().train(mode)
        for layer in self.student.modules():
            if isinstance(layer, _NORMS):
                layer.eval()
        return self

    def weights(self) -> dict[str, Tensor]:
        """The state of the plain student inside, unrounded."""
        state = self.student.state_dict()
        return {name.replace("parametrizations.weight.original", "weight"): value for name, value in state.items()}


def _rounding(rounding: RoundedInput) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def rounded(_layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (rounding(inputs[0]), *inputs[1:])

    return rounded


def train_quantized(
    student: Student,
    objective: Composition,
    dataset: Dataset,
    cache: CachedTeacher | None,
    section: TrainSection,
    augmentation: AugmentSection,
    folder: Path,
    *,
    spec: QuantSpec,
    epochs: int,
    seed: int = 0,
    progress: Progress | None = None,
    title: str = "quantisation-aware training",
    device: torch.device | str | None = None,
    strategy: Strategy | None = None,
) -> tuple[Student, TrainResult]:
    """Trains a trained student on through rounded weights and activations, by the same objectives and the same loop.

    The learning rate starts at a tenth of the student's own and falls to zero over `epochs`; there is no moving
    average of the weights. The epoch is chosen by the rounded student's metric on the validation split.

    Args:
        student: trained; stays as it is.
        objective: as trained with it; changed in place.
        dataset: as in `train`.
        cache: as in `train`.
        section: the recipe's `[train]`.
        augmentation: as in `train`.
        folder: of the artefact, which holds the rounded student.
        spec: what the target's INT8 graph rounds.
        epochs: of this training.
        seed: of everything random here.
        progress: shows samples, rate and time left.
        title: of the progress bar.
        device: as in `train`.
        strategy: as in `train`.

    Returns:
        The student with new weights in FP32, in eval mode on the CPU, and what the training says of itself.

    Raises:
        As `train`.
    """
    rounded = RoundedStudent(student, spec)
    shorter = section.model_copy(
        update={
            "epochs": epochs,
            "min_steps": None,
            "validations": None,
            "learning_rate": section.peak_learning_rate * _RATE,
            "schedule": "cosine",
            "warmup": None,
            "ema": None,
            "compile": False,
        }
    )
    result = train(
        cast(Student, rounded),
        objective,
        dataset,
        cache,
        shorter,
        augmentation,
        folder,
        seed=seed,
        progress=progress,
        title=title,
        device=device,
        strategy=strategy,
    )
    trained = copy.deepcopy(student)
    trained.load_state_dict(rounded.weights())
    return trained.cpu().eval(), result
