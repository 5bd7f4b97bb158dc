"""What an architecture costs on every target, from facts alone: nothing is trained, exported or measured.

`pool_cost`: a lower end over the precisions that the target may get, so that only what cannot fit is left out.
`paper_costs`: precision by precision, with the latency that an assumed efficiency makes of the bound.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from distill.data import InputSpec
from distill.students import Student
from distill.students.arch import Arch
from distill.students.pool import Cost, Limits
from export import available
from profiles.device import Precision, Target
from profiles.predict import ON_CHIP_BYTES

_MIB = 2**20
_BYTES: dict[str, float] = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2, "int8": 1, "fp8": 1, "fp4": 0.5}
"""Of one stored value."""


def limits_of(targets: Sequence[Target]) -> dict[str, Limits]:
    """The limits that facts can decide, by target; empty where some target has none: it carries everything."""
    found = {
        target.name: Limits(
            file_mib=target.section.file_size_mib,
            memory_mib=target.section.memory_mib,
            latency_ms=target.section.latency_ms,
        )
        for target in targets
    }
    return {} if any(limits == Limits() for limits in found.values()) else found


def paper_costs(
    student: Student,
    spec: InputSpec,
    target: Target,
    *,
    efficiency: Callable[[Precision], float],
    launch_ms: float,
) -> dict[Precision, Cost]:
    """What a student costs in every precision that the target may get.

    File and memory are lower ends. The latency is expected to be the roofline bound over `efficiency`, and on top what
    the runtime needs to start the work (see `starting_ms`); without the device's peak, it is not known.

    Args:
        student: its weights play no part.
        spec: one sample's shape.
        target: one that is not this machine.
        efficiency: of a precision: the share of its peaks that a device is taken to reach, 0 to 1.
        launch_ms: of one query on a CPU, of one kernel on a GPU.
    """
    work = _work(student, spec, target.section.batch)
    found: dict[Precision, Cost] = {}
    for precision in precisions_of(target):
        bound = _bound_ms(work, target, held_to(precision, target))
        started = starting_ms(target, work.layers, launch_ms)
        expected = None if bound is None else bound / efficiency(precision) + started
        found[precision] = Cost(
            file_mib=work.values * _BYTES[precision] / _MIB,
            memory_mib=(work.values + work.activations) * _BYTES[precision] / _MIB,
            latency_bound_ms=bound,
            latency_ms=expected,
            source="bound" if expected is None else "assumed",
        )
    return found


def held_to(precision: Precision, target: Target) -> Precision:
    """The precision whose peak bounds a graph: runtimes compute FP32 in TF32 unasked where the device has it."""
    return "tf32" if precision == "fp32" and "tf32" in target.device.precisions else precision


def starting_ms(target: Target, layers: int, launch_ms: float) -> float:
    """What a query takes beside its work: one call on a CPU, a kernel for every layer with weights on a GPU."""
    return launch_ms * (max(layers, 1) if target.device.kind == "gpu" else 1)


def precisions_of(target: Target) -> tuple[Precision, ...]:
    """The precisions that a target may get: the one that it asks for, or all that there are exports for."""
    asked = target.section.precision
    return available(target.device, target.stack) if asked == "auto" else (asked,)


def multiply_adds(student: Student, spec: InputSpec) -> int:
    """Of one sample, in convolutions and matrix products."""
    return _work(student, spec, 1).flops // 2


def pool_cost(
    targets: Sequence[Target], spec: InputSpec, build: Callable[[Arch], Student]
) -> Callable[[Arch], Mapping[str, Cost]]:
    """`cost(arch)`: by target name, what a student of that architecture needs at least.

    Args:
        targets: the recipe's.
        spec: one sample's shape.
        build: makes the student; its weights play no part.
    """

    def cost(arch: Arch) -> Mapping[str, Cost]:
        student = build(arch)
        return {target.name: _cost(_work(student, spec, target.section.batch), target) for target in targets}

    return cost


class _Work(NamedTuple):
    """values: weights that are left in an exported graph. flops: of convolutions and matrix products, a multiply-add
    is two. activations: the most values that one layer reads and writes. passed: bytes of the graph's inputs and
    outputs, which keep their type in every precision. layers: with weights, each time that one runs."""

    values: int
    flops: int
    activations: int
    passed: int
    layers: int


@torch.no_grad()
def _work(student: Student, spec: InputSpec, batch: int) -> _Work:
    """Counted in one forward pass that computes nothing (on the meta device)."""
    student = student.to("meta").eval()
    inputs = torch.empty(batch, *spec.shape, dtype=torch.uint8 if spec.kind == "image" else torch.int64, device="meta")
    largest = layers = 0

    def watch(module: nn.Module, given: tuple[object, ...], output: object) -> None:
        nonlocal largest, layers
        layers += 1
        if isinstance(output, Tensor):
            read = sum(value.numel() for value in given if isinstance(value, Tensor) and value.is_floating_point())
            largest = max(largest, read + output.numel())

    handles = [
        module.register_forward_hook(watch)
        for module in student.modules()
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear)
    ]
    with FlopCounterMode(display=False) as counter:
        head: Tensor = student(inputs).head
    for handle in handles:
        handle.remove()
    # an export folds batch normalisation into the convolution before it
    kept = (module for module in student.modules() if not isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d))
    values = sum(parameter.numel() for module in kept for parameter in module.parameters(recurse=False))
    passed = inputs.numel() * inputs.element_size() + head.numel() * 4
    return _Work(values, counter.get_total_flops(), largest, passed, layers)


def _cost(work: _Work, target: Target) -> Cost:
    asked = target.section.precision
    stored = precisions_of(target)
    # a builder on the device may compute an FP32 file in any precision that the device has
    computed: tuple[Precision, ...] = target.device.precisions if asked == "auto" else (asked,)
    if asked == "fp32" and "tf32" in target.device.precisions:
        computed = ("tf32",)
    smallest = min(_BYTES[name] for name in computed)
    bounds = [_bound_ms(work, target, name) for name in computed]
    return Cost(
        file_mib=work.values * min(_BYTES[name] for name in stored) / _MIB,
        memory_mib=(work.values + work.activations) * smallest / _MIB,
        latency_bound_ms=None if None in bounds else min(bound for bound in bounds if bound is not None),
    )


def _bound_ms(work: _Work, target: Target, precision: Precision) -> float | None:
    """The roofline bound (see `profiles.predict.roofline`); None where the device's peak is not known."""
    peak = target.device.peak(precision, target.power_mode)
    if peak is None:
        return None
    bandwidth = target.device.bandwidth(target.power_mode)
    moved = work.values * _BYTES[precision] + work.passed
    memory_ms = max(0.0, moved - ON_CHIP_BYTES) / bandwidth * 1e3 if bandwidth else 0.0
    return max(work.flops / peak * 1e3, memory_ms)
