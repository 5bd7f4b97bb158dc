"""One process or several: the few things in which training on many devices differs from training on one.

Every process holds all labels and cached outputs, runs the student on its share of the global batch, and then sees the
student's outputs of the *whole* batch. So a loss that couples samples (distance correlation) is exactly the loss of one
process with the same global batch, and objectives' own parameters get the same gradient everywhere.
BatchNorm: statistics are those of the global batch too, by torch's SyncBatchNorm on GPUs and by ours on CPUs. A user's
subclass of BatchNorm keeps its own forward pass, and so the statistics of each process's share.
"""

from __future__ import annotations

import os
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from distill.objectives.base import at_least_float32
from distill.outputs import StudentOutput
from profiles.errors import InputError

_PATIENCE = timedelta(hours=6)
"""How long a process waits for the others: the main one may build a teacher cache for hours meanwhile. A process that
dies is noticed by its launcher, which ends the others, so this need not be short."""
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def default_device() -> torch.device:
    """The first CUDA device where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def join_processes(device: torch.device | None = None) -> Any:
    """Joins the processes that a launcher started, once; later calls give the same accelerate.PartialState.

    Whatever needs the other processes comes here first, because who joins first sets how long all wait: 6 hours.

    Args:
        device: its type decides between NCCL (cuda) and gloo (cpu); None: `default_device()`.
    """
    from accelerate import PartialState

    return PartialState(cpu=(device or default_device()).type == "cpu", timeout=_PATIENCE)


class Processes:
    """This process alone; also the interface of `AcceleratedProcesses`."""

    rank = 0
    world = 1

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def wrap(self, student: nn.Module) -> nn.Module:
        """The module to call in training; averages the student's gradients over the processes."""
        return student

    def unwrap(self) -> None:
        """Puts back what `wrap` replaced inside the student; its weights stay as trained."""

    def share(self, rows: Tensor) -> Tensor:
        """This process's part of the global batch's rows (B,), B a multiple of `world`."""
        size = len(rows) // self.world
        return rows[self.rank * size : (self.rank + 1) * size]

    def gather(self, output: StudentOutput) -> StudentOutput:
        """Outputs of the global batch, in the order of its rows; gradients flow back into this process's part."""
        return output

    def average_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Replaces gradients by their mean over the processes."""

    def synchronise(self, module: nn.Module) -> None:
        """Parameters and buffers of the main process, everywhere."""

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the processes."""
        return values

    def any(self, flag: bool) -> bool:
        """Whether any process raised the flag; all processes must ask."""
        return flag

    def barrier(self) -> None:
        """Waits for all processes."""


class AcceleratedProcesses(Processes):
    """Several processes that `torchrun` or `accelerate launch` started; NCCL on GPUs, gloo on CPUs."""

    def __init__(self, device: torch.device) -> None:
        from accelerate import Accelerator

        join_processes(device)
        self._accelerator: Any = Accelerator(cpu=device.type == "cpu")
        super().__init__(torch.device(self._accelerator.device))
        self.rank = int(self._accelerator.process_index)
        self.world = int(self._accelerator.num_processes)
        self._replaced: list[tuple[nn.Module, str, nn.Module]] = []

    def wrap(self, student: nn.Module) -> nn.Module:
        # all names, since one layer may be used at several places
        for path, layer in list(student.named_modules(remove_duplicate=False)):
            # exact types: a subclass may do more than normalise, as timm's with their activation
            if type(layer) not in _BATCH_NORMS:
                continue
            parent_path, _, name = path.rpartition(".")
            parent = student.get_submodule(parent_path)
            self._replaced.append((parent, name, layer))
            parent.add_module(name, self._synchronised(layer))
        wrapped: nn.Module = self._accelerator.prepare_model(student)
        return wrapped

    def _synchronised(self, layer: nn.Module) -> nn.Module:
        if self.device.type == "cpu":
            return _GlobalBatchNorm(layer, self.rank, self.world)
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(layer)  # type: ignore[no-untyped-call]
        return converted

    def unwrap(self) -> None:
        for parent, name, layer in self._replaced:
            parent.add_module(name, layer)
        self._replaced.clear()

    def gather(self, output: StudentOutput) -> StudentOutput:
        # one collective for both, and a gradient for both even when a loss reads only one of them
        width = output.embedding.shape[1]
        both = torch.cat([output.embedding, output.head], 1)
        joined: Tensor = _Gather.apply(both, self.rank, self.world)  # type: ignore[no-untyped-call]
        return StudentOutput(joined[:, :width], joined[:, width:])

    def average_gradients(self, parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            if parameter.grad is not None:
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= self.world

    def synchronise(self, module: nn.Module) -> None:
        for value in module.state_dict().values():
            torch.distributed.broadcast(value, src=0)

    def sum(self, values: Tensor) -> Tensor:
        values = values.clone()
        torch.distributed.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        return bool(self.sum(torch.tensor(float(flag), device=self.device)) > 0)

    def barrier(self) -> None:
        self._accelerator.wait_for_everyone()


class _Gather(torch.autograd.Function):
    """(B / W, D) of this process -> (B, D) of all.

    Every process computes the same loss of the gathered batch, so the gradient of this process's rows is already here.
    It is multiplied by W because the student's gradients are *averaged* over the processes afterwards.
    """

    @staticmethod
    def forward(ctx: Any, local: Tensor, rank: int, world: int) -> Tensor:
        ctx.rank, ctx.world, ctx.size = rank, world, len(local)
        parts = [torch.empty_like(local) for _ in range(world)]
        torch.distributed.all_gather(parts, local.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        start = ctx.rank * ctx.size
        return gradients[0][start : start + ctx.size] * ctx.world, None, None


class _GatherStatistics(torch.autograd.Function):
    """(D,) of this process -> (W, D) of all.

    Every process normalises its own samples with everybody's statistics, so their gradients are summed.
    """

    @staticmethod
    def forward(ctx: Any, local: Tensor, rank: int, world: int) -> Tensor:
        ctx.rank = rank
        parts = [torch.empty_like(local) for _ in range(world)]
        torch.distributed.all_gather(parts, local.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        summed = gradients[0].clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(summed)
        return summed[ctx.rank], None, None


@cache
def _keep_out_of_graphs() -> None:
    """torch.compile leaves the layer out. Done when the first one is made: it imports the whole compiler."""
    outside: Any = torch.compiler.disable(_GlobalBatchNorm.forward)  # type: ignore[no-untyped-call]
    _GlobalBatchNorm.forward = outside  # type: ignore[method-assign]


class _GlobalBatchNorm(_BatchNorm):
    """BatchNorm with the statistics of all processes' samples, which torch's SyncBatchNorm refuses on CPUs.

    Shares parameters and running statistics with `layer`. (B / W, C, ...) -> the same shape and type.
    """

    def __init__(self, layer: nn.Module, rank: int, world: int) -> None:
        assert isinstance(layer, _BatchNorm)
        super().__init__(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
        _keep_out_of_graphs()
        self.weight, self.bias = layer.weight, layer.bias
        self.running_mean, self.running_var = layer.running_mean, layer.running_var
        self.num_batches_tracked = layer.num_batches_tracked
        self.training = layer.training
        self._rank, self._world = rank, world

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            alone = self.running_mean is None
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, alone, 0.0, self.eps)
        wide = at_least_float32(x)
        mean, variance, count = self._statistics(wide)
        if self.track_running_stats:
            self._track(mean.detach(), variance.detach() * (count / (count - 1)))
        shape = (1, -1, *(1 for _ in x.shape[2:]))
        scale = (variance + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        result = (wide - mean.view(shape)) * scale.view(shape)
        if self.bias is not None:
            result = result + self.bias.view(shape)
        return result.to(x.dtype)

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean (C,), biased variance (C,) and count () of the values of each channel in all processes.

        Parts are joined as in Chan, Golub & LeVeque 1979: without the cancellation of E[x^2] - E[x]^2.
        """
        variance, mean = torch.var_mean(x, [0, *range(2, x.dim())], correction=0)
        count = mean.new_full((1,), x.numel() / x.shape[1])
        gathered: Tensor = _GatherStatistics.apply(  # type: ignore[no-untyped-call]
            torch.cat([mean, variance, count]), self._rank, self._world
        )
        means, variances, counts = torch.split(gathered, [len(mean), len(mean), 1], 1)
        shares = counts / counts.sum()
        joint = (shares * means).sum(0)
        return joint, (shares * (variances + (means - joint).square())).sum(0), counts.detach().sum()

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        """Running statistics as BatchNorm keeps them, the variance unbiased."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        factor = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, factor)
        self.running_var.lerp_(variance, factor)


def start(device: torch.device | str | None, batch_size: int) -> Processes:
    """The processes of this run: several when a launcher said so in the environment (WORLD_SIZE).

    Raises:
        InputError: the global batch cannot be divided evenly.
    """
    chosen = default_device() if device is None else torch.device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes(chosen)
    processes = AcceleratedProcesses(chosen)
    if batch_size % processes.world:
        raise InputError(
            f"a batch of {batch_size} cannot be shared by {processes.world} processes",
            where="train.batch_size",
            fix=f"batch_size = {max(1, batch_size // processes.world) * processes.world}",
        )
    return processes
