import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill.strategies.virtual_step import clipped, untouched, virtual_step

OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True, fused=True),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.1, fused=True),
}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    found = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3))
    found.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return found


def loss(module: nn.Module, seed: int) -> Tensor:
    x = torch.randn(5, 2, 6, 6, generator=torch.Generator().manual_seed(seed))
    output: Tensor = module(x)
    return output.square().mean()


def optimizer_of(module: nn.Sequential, name: str) -> torch.optim.Optimizer:
    found: torch.optim.Optimizer = OPTIMIZERS[name](
        [{"params": module[0].parameters(), "weight_decay": 0.1}, {"params": module[3].parameters()}]
    )
    return found


def gradients_of(module: nn.Module, seed: int) -> dict[nn.Parameter, Tensor]:
    parameters = [p for name, p in module.named_parameters() if not name.startswith("1")]
    return dict(zip(parameters, torch.autograd.grad(loss(module, seed), parameters), strict=True))


def stepped(module: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    optimizer.zero_grad()
    torch.autograd.backward(loss(module, seed))
    optimizer.step()


def snapshot(module: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    return copy.deepcopy((module.state_dict(), optimizer.state_dict(), [p.grad for p in module.parameters()]))


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_the_real_step_and_leaves_nothing_behind(name: str, steps: int) -> None:
    module = net()
    optimizer = optimizer_of(module, name)
    for seed in range(steps):
        stepped(module, optimizer, seed)
    real, real_optimizer = copy.deepcopy((module, optimizer))
    gradients = gradients_of(module, 7)
    before = snapshot(module, optimizer)
    with virtual_step(optimizer, gradients):
        inside = copy.deepcopy(module.state_dict())
    assert equal(snapshot(module, optimizer), before)
    # buffers apart, whose statistics the gradient's own forward pass moved
    stepped(real, real_optimizer, 7)
    for parameter, value in real.named_parameters():
        assert torch.equal(inside[parameter], value), parameter
        assert not parameter.startswith(("0", "3")) or not torch.equal(value, before[0][parameter])
    # and the next real step is the one that it would have been
    stepped(module, optimizer, 7)
    assert all(map(torch.equal, module.parameters(), real.parameters()))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_exception_leaves_nothing_behind_either(name: str) -> None:
    module = net()
    optimizer = optimizer_of(module, name)
    torch.autograd.backward(loss(module, 0))
    before = snapshot(module, optimizer)
    gradients = gradients_of(module, 1)
    before[0].update(copy.deepcopy(dict(module.named_buffers())))
    with pytest.raises(ValueError, match="inside"), virtual_step(optimizer, gradients):
        raise ValueError("inside")
    assert equal(snapshot(module, optimizer), before)


def test_parameters_without_a_gradient_are_not_stepped() -> None:
    module = net()
    optimizer = optimizer_of(module, "sgd")
    torch.autograd.backward(loss(module, 0))
    weight = module.get_parameter("0.weight")
    gradient = {p: g for p, g in gradients_of(module, 1).items() if p is not weight}
    old = weight.detach().clone()
    with virtual_step(optimizer, gradient):
        assert torch.equal(weight, old)
    assert weight.grad is not None


def test_buffers_and_modes_come_back() -> None:
    module = net()
    module[1].eval()
    module.get_buffer("1.running_mean").fill_(3)
    before = copy.deepcopy(module.state_dict())

    def disturb() -> None:
        with untouched(module):
            module.train()
            loss(module, 0)
            module.eval()
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        disturb()
    assert equal(module.state_dict(), before)
    assert module.training
    assert not module[1].training


@pytest.mark.parametrize("largest", [1e-3, 0.5, 1e3])
def test_clipping_is_that_of_the_loop(largest: float) -> None:
    module = net()
    gradients = gradients_of(module, 0)
    found = clipped(gradients, largest)
    for parameter, gradient in gradients.items():
        parameter.grad = gradient.clone()
    nn.utils.clip_grad_norm_(list(gradients), largest)
    for parameter, gradient in found.items():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradient)
