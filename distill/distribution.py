"""One process or several: the few things in which training on many devices differs from training on one.

Every process holds all labels and cached outputs, runs the student on its share of the global batch, and then sees the
student's outputs of the *whole* batch. So a loss that couples samples (distance correlation) is exactly the loss of one
process with the same global batch, and objectives' own parameters get the same gradient everywhere.
BatchNorm: statistics are those of the global batch on GPUs (SyncBatchNorm) and of each process's share on CPUs.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from distill.outputs import StudentOutput
from profiles.errors import InputError


def default_device() -> torch.device:
    """The first CUDA device where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


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

        self._accelerator: Any = Accelerator(cpu=device.type == "cpu")
        super().__init__(torch.device(self._accelerator.device))
        self.rank = int(self._accelerator.process_index)
        self.world = int(self._accelerator.num_processes)

    def wrap(self, student: nn.Module) -> nn.Module:
        if self.device.type == "cuda":
            student = nn.SyncBatchNorm.convert_sync_batchnorm(student)  # type: ignore[no-untyped-call]
        wrapped: nn.Module = self._accelerator.prepare_model(student)
        return wrapped

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
