"""Distillation influence (Ren et al., ACL 2023, arXiv 2305.09651): what a teacher's word does to the held-out loss.

Notation: theta the student's weights, z_S its outputs (N, C) on the training batch, T the teacher's logits (N, C),
L(z_S, T) the student's loss, g = grad_theta L, theta' the weights after one optimiser step with g, E the loss on a
held-out batch, v = grad E at theta'.

    dE(theta')/dT = (d theta'/dg v)^T  d g/dT  =  -eta  d/dT [ (P v)^T grad_theta L ],   theta' = theta - eta update(g)

where P = d update/dg. The bracket is J = <dL/dz_S, u> with u = (dz_S/dtheta) P v, the change of the student's outputs
along P v, and T is in dL/dz_S alone: so one derivative along a direction and one backward pass of the teacher suffice.
"plain", as published, has P = 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from distill.objectives.base import at_least_float32
from distill.strategies.virtual_step import clip_factor, norm

STEP = 0.01
"""How far the finite difference moves the student's weights, as a norm (as in the official code)."""


def influence(loss: Callable[[Tensor], Tensor], outputs: Tensor, change: Tensor) -> Tensor:
    """J = <dL(z_S, T)/dz_S, u>, a scalar with a gradient into T, of which the loss must be a differentiable function.

    Where the loss is the mean over the batch of KL(softmax T || softmax z_S), J is the mean of `sample_influence`.

    Args:
        loss: z_S -> L(z_S, T).
        outputs: z_S (N, C).
        change: u (N, C), of the outputs along a direction of the weights.
    """
    leaf = outputs.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    return (gradient * change.detach()).sum()


def sample_influence(student: Tensor, teacher: Tensor, change: Tensor, *, multilabel: bool = False) -> Tensor:
    """I_i = (S_i - T_i) . u_i: what each sample's soft target, matched by KL at tau 1, does along the direction.

    Positive: following the teacher on this sample lowers the held-out loss.

    Args:
        student: class logits (N, C); S is their softmax.
        teacher: class logits (N, C); T is their softmax.
        change: u (N, C).
        multilabel: sigmoids instead, and the mean over the labels instead of their sum (our reading).

    Returns:
        (N,), at least float32.
    """
    student, teacher, change = (at_least_float32(x) for x in (student, teacher, change))
    if multilabel:
        return ((student.sigmoid() - teacher.sigmoid()) * change).mean(1)
    return ((student.softmax(1) - teacher.softmax(1)) * change).sum(1)


def change_along(
    student: nn.Module,
    inputs: Tensor,
    direction: Mapping[str, Tensor],
    method: Literal["finite_difference", "jvp"],
) -> Tensor:
    """u = d head(x; theta) / d theta . v: the change of the head's outputs along a direction of the weights.

    "finite_difference": [head(theta + eps v) - head(theta - eps v)] / (2 eps), eps = 0.01 / ||v||; two forward passes,
    error O(eps^2), exact for a student whose outputs are affine in its weights. The weights move in place and come back
    as they were, to the bit, also after an error. "jvp": one pass in forward mode, exact. At a kink (a ReLU whose input
    is exactly 0, as behind dead units before the first step) the difference averages both sides, forward mode takes the
    side that backward passes take.

    Call it in eval mode: forward mode knows no BatchNorm in train mode, and the two passes must drop the same units.
    Attention is computed step by step meanwhile, as forward mode knows no fused kernel either. Both run in the weights'
    own precision, without autocast.

    Args:
        student: inputs -> StudentOutput.
        inputs: (n, *shape).
        direction: v by name of the student's parameters; names that are missing stand still.
        method: how it is found.

    Returns:
        (n, H), without gradient, at least float32; zeros where v is zero.
    """
    with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False), _plain_attention():
        if method == "jvp":
            return _jvp(student, inputs, direction)
        return _finite_difference(student, inputs, direction)


def _jvp(student: nn.Module, inputs: Tensor, direction: Mapping[str, Tensor]) -> Tensor:
    weights = {name: p.detach() for name, p in student.named_parameters() if name in direction}

    def head(values: dict[str, Tensor]) -> Tensor:
        output: Tensor = torch.func.functional_call(student, values, (inputs,)).head
        return output

    change: Tensor = torch.func.jvp(head, (weights,), ({name: direction[name] for name in weights},))[1]
    return at_least_float32(change)


def _finite_difference(student: nn.Module, inputs: Tensor, direction: Mapping[str, Tensor]) -> Tensor:
    weights: list[Tensor] = [p for name, p in student.named_parameters() if name in direction]
    vectors = [direction[name] for name, _ in student.named_parameters() if name in direction]
    saved = [weight.detach().clone() for weight in weights]
    size = norm(vectors)
    moves = size > 0
    # the quotient must not be taken where v is zero, not only be hidden
    epsilon = torch.where(moves, STEP / torch.where(moves, size, 1.0), 0.0)
    shift = list(torch._foreach_mul(vectors, epsilon))
    try:
        torch._foreach_add_(weights, shift)
        ahead = at_least_float32(student(inputs).head)
        torch._foreach_copy_(weights, saved)
        torch._foreach_sub_(weights, shift)
        behind = at_least_float32(student(inputs).head)
    finally:
        torch._foreach_copy_(weights, saved)
    return (ahead - behind) * (size / (2 * STEP))


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Attention without fused kernels, and `nn.TransformerEncoderLayer` without its fast path."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def preconditioned(
    optimizer: torch.optim.Optimizer, gradients: Mapping[nn.Parameter, Tensor], direction: Mapping[nn.Parameter, Tensor]
) -> dict[nn.Parameter, Tensor]:
    """P v, element by element: what a change of the gradient does to the next update of the loop's optimisers.

    theta' = theta - eta (update(g) + weight decay), whose derivative by g, at the present moments, is

        SGD:    P = 1, with Nesterov's momentum mu: 1 + mu     update = g + mu (mu b + g); weight decay adds to g
        AdamW:  update = m^ / (r + eps),  m^ = (b1 m + (1 - b1) g) / c1,  r = sqrt((b2 w + (1 - b2) g^2) / c2),
                c_k = 1 - b_k^(t + 1) after t steps, m and w the moments:
                P = [(1 - b1) eps + ((1 - b1) b2 w - b1 (1 - b2) m g) / (c2 r)] / (c1 (r + eps)^2)

    In P the terms in g^2 have cancelled; as a difference of two quotients it would lose all digits in float32. At a
    fresh state P is eps / (|g| + eps)^2: next to nothing where |g| is far above eps, as Adam's step is +-eta whatever
    the size of g, and up to 1 / eps where it is not. A few parameters of tiny g may then decide ||P v||, and with it
    how far a finite difference moves all others; forward mode does not mind.

    Where g, m and w are all exactly 0, P v is 0 instead of v (1 - b1) / (c1 eps): our reading. Such a parameter is
    nearly always one that no output of the batch depends on, like the embedding of a token that only held-out samples
    have. The outputs do not change along it, so u and J are the same, but a finite difference would lose all else.
    The exception is a parameter whose samples' gradients cancel to the bit, as in a student that says what its teacher
    says: there Adam would jump by eta at the slightest change, of which a derivative tells nothing.

    Args:
        optimizer: SGD (without dampening) or AdamW (without amsgrad), before the step.
        gradients: g, after clipping.
        direction: v.

    Returns:
        P v for the parameters of `direction`.
    """
    found: dict[nn.Parameter, Tensor] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in direction:
                continue
            v = direction[parameter]
            if isinstance(optimizer, torch.optim.AdamW):
                found[parameter] = v * _adamw_slope(group, optimizer.state.get(parameter, {}), gradients[parameter])
            else:
                found[parameter] = v * (1 + group["momentum"] if group["nesterov"] else 1.0)
    return found


def _adamw_slope(group: dict[str, Any], state: Mapping[str, Tensor], g: Tensor) -> Tensor:
    b1, b2 = group["betas"]
    eps = group["eps"]
    m = state.get("exp_avg", torch.zeros_like(g))
    w = state.get("exp_avg_sq", torch.zeros_like(g))
    # double, since the counter is float32 and 1 - b2^t is a small difference at first
    steps = state.get("step", torch.zeros((), device=g.device)).double() + 1
    c1, c2 = (1 - b1**steps).to(g), (1 - b2**steps).to(g)
    r = ((b2 * w + (1 - b2) * g.square()) / c2).sqrt()
    # r is 0 where no gradient ever came; the part that it divides is 0 there as well
    moved = ((1 - b1) * b2 * w - b1 * (1 - b2) * m * g) / (c2 * torch.where(r > 0, r, 1.0))
    slope = ((1 - b1) * eps + moved) / (c1 * (r + eps).square())
    # not r alone, which is also 0 where squares are too small for float32
    return torch.where((g == 0) & (m == 0) & (w == 0), 0.0, slope)


def through_clipping(
    gradients: Mapping[nn.Parameter, Tensor], largest: float, direction: Mapping[nn.Parameter, Tensor]
) -> dict[nn.Parameter, Tensor]:
    """(d clip(g)/dg)^T v, as the last part of P where `train.grad_clip` is set; v where the norm is below the limit.

    With n = ||g|| and f = largest / (n + 1e-6) < 1:  f v - f (g . v) / (n (n + 1e-6)) g.

    Args:
        gradients: g before clipping, of the parameters that are clipped together.
        largest: norm.
        direction: v of the same parameters.
    """
    g, v = [gradients[p] for p in direction], list(direction.values())
    size = norm(g)
    factor = clip_factor(size, largest)
    inner = torch.stack([(a * b).sum() for a, b in zip(g, v, strict=True)]).sum()
    share = torch.where(factor < 1, factor * inner / (size * (size + 1e-6)).clamp(min=1e-30), 0.0)
    result = torch._foreach_sub(list(torch._foreach_mul(v, factor)), list(torch._foreach_mul(g, share)))
    return dict(zip(direction, result, strict=True))
