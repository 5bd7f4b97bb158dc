"""A step of the real optimiser that never happened: taken on the real weights, looked at, and taken back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def virtual_step(optimizer: torch.optim.Optimizer, gradients: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """Inside, the parameters of `optimizer` are where its next step with `gradients` would bring them.

    The optimiser itself takes the step, so any optimiser and any setting is exactly the real one. Afterwards weights,
    optimiser state (its step counters included) and `.grad` are as they were, to the bit, also when the block raises.
    Costs a copy of the weights and of the optimiser's state; the host does not wait for the device.

    Args:
        optimizer: of the network. Its learning rate is that of the step.
        gradients: of its parameters; one without an entry is not stepped.
    """
    parameters: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
    weights = [p.detach().clone() for p in parameters]
    real = [p.grad for p in parameters]
    state = {
        parameter: {name: _copy(value) for name, value in entries.items()}
        for parameter, entries in optimizer.state.items()
    }
    try:
        for parameter in parameters:
            parameter.grad = gradients.get(parameter)
        optimizer.step()
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_([*parameters], weights)
        for parameter, gradient in zip(parameters, real, strict=True):
            parameter.grad = gradient
        optimizer.state.clear()
        optimizer.state.update(state)


def _copy(value: object) -> object:
    return value.clone() if isinstance(value, Tensor) else value


@contextmanager
def untouched(*modules: nn.Module) -> Iterator[None]:
    """Buffers (BatchNorm's statistics) and train or eval modes of all submodules are afterwards as they were before."""
    buffers = [buffer for module in modules for buffer in module.buffers()]
    copies = [buffer.clone() for buffer in buffers]
    modes = [(child, child.training) for module in modules for child in module.modules()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, copies, strict=True):
                buffer.copy_(value)
        for child, training in modes:
            child.training = training


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of all values together, a scalar tensor; computed as `clip_grad_norm_` does."""
    return nn.utils.get_total_norm(tensors)


def clipped(gradients: Mapping[nn.Parameter, Tensor], largest: float) -> dict[nn.Parameter, Tensor]:
    """g min(1, largest / (||g|| + 1e-6)), as `torch.nn.utils.clip_grad_norm_` leaves it, in new tensors."""
    values = list(gradients.values())
    return dict(zip(gradients, torch._foreach_mul(values, clip_factor(norm(values), largest)), strict=True))


def clip_factor(size: Tensor, largest: float) -> Tensor:
    """min(1, largest / (size + 1e-6)), a scalar tensor."""
    return torch.clamp(largest / (size + 1e-6), max=1.0)
