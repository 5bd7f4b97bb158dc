"""Where exploration goes: how far, in which direction, and at which inputs it starts, as pure functions.

Latents z (N, d) are looked at in units of their own spread, u = z / std per dimension. There the random offset is
isotropic, N(0, sigma^2 I), and the ball of `radius` that gradient steps stay in is round, so that both kinds explore
equally far. The published description leaves the coordinates of the ball open: this is our reading.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.objectives.base import at_least_float32

SMALLEST_GRADIENT = 1e-6
"""Below this norm a gradient is rounding, and its direction means nothing."""
_SEEDS, _OFFSETS, _TEXTS, _STRENGTH = range(0x7E57, 0x7E5B)
"""One stream for each kind of draw, apart from other draws of the same seed."""
_CONTRAST = (0.5, 1.5)
_BRIGHTNESS = 64.0


def radius(sigma: float, dimensions: int) -> float:
    """sigma sqrt(2) Gamma((d + 1) / 2) / Gamma(d / 2): the mean norm of N(0, sigma^2 I) in d dimensions.

    Args:
        sigma: >= 0.
        dimensions: d >= 1.

    Returns:
        sigma sqrt(2 / pi) for d = 1; towards sigma sqrt(d - 1/2) for large d.
    """
    # by logarithms: the gamma function itself overflows from d = 342 on
    return sigma * math.sqrt(2) * math.exp(math.lgamma((dimensions + 1) / 2) - math.lgamma(dimensions / 2))


class Draws:
    """The random draws of one step: a pure function of (seed, step, rank), on any device the same.

    Each kind of draw is a stream of its own; two calls give what one call for both together would have given.

    Args:
        seed: of the training.
        step: optimiser steps done, or which version of a fixed set.
        rank: of the process.
    """

    def __init__(self, seed: int, step: int, rank: int = 0) -> None:
        self._offsets, self._texts, self._strength = (
            _generator(stream, seed, step, rank) for stream in (_OFFSETS, _TEXTS, _STRENGTH)
        )

    def offsets(self, count: int, std: Tensor, sigma: float) -> Tensor:
        """nu ~ N(0, sigma^2 diag(std^2)), (count, d) in the type and on the device of `std` (d,); zeros for sigma 0."""
        drawn = self._offsets.standard_normal((count, len(std)), dtype=np.float32)
        return to_device(torch.from_numpy(drawn), std.device) * (sigma * std)

    def text_seeds(self, count: int) -> list[int]:
        """Integers from 0 to 2^63 - 1."""
        drawn: list[int] = self._texts.integers(0, 2**63, count, dtype=np.uint64).tolist()
        return drawn

    def strengthen(self, images: Tensor) -> Tensor:
        """Contrast times 0.5 to 1.5 around each image's mean, brightness by up to 64 of 255 up or down.

        uint8 (N, C, H, W) -> the same.
        """
        draws = self._strength.random((len(images), 2), dtype=np.float32)
        contrast, brightness = to_device(torch.from_numpy(draws), images.device).T[:, :, None, None, None]
        pixels = images.float()
        mean = pixels.mean((1, 2, 3), keepdim=True)
        low, high = _CONTRAST
        changed = (pixels - mean) * (low + (high - low) * contrast) + mean + _BRIGHTNESS * (2 * brightness - 1)
        return to_pixels(changed)


class Orders:
    """Which real inputs a step explores around, a pure function of (seed, step).

    Steps go through all inputs in a random order, and then through all of them in another: every one is a seed equally
    often, up to one. What is kept between calls only saves time.

    Args:
        total: number of inputs.
        seed: of the training.
    """

    def __init__(self, total: int, seed: int) -> None:
        self.total, self.seed = total, seed
        self._round, self._order = -1, np.empty(0, np.int64)

    def chosen(self, step: int, batch_size: int) -> np.ndarray[Any, Any]:
        """int64 (batch_size,) in 0..total - 1: the seeds of step `step`, all steps having the same `batch_size`."""
        position = np.arange(step * batch_size, (step + 1) * batch_size)
        rounds, places = np.divmod(position, self.total)
        found = np.empty(batch_size, np.int64)
        for number in range(int(rounds[0]), int(rounds[-1]) + 1):
            here = rounds == number
            found[here] = self._of(number)[places[here]]
        return found

    def _of(self, number: int) -> np.ndarray[Any, Any]:
        if number != self._round:
            self._round, self._order = number, _generator(_SEEDS, self.seed, number, 0).permutation(self.total)
        return self._order


class Ascent(NamedTuple):
    """latents: (N, d), where it ended. before: (N,), the divergence at the start."""

    latents: Tensor
    before: Tensor


def ascend(latents: Tensor, std: Tensor, rho: float, steps: int, divergence: Callable[[Tensor], Tensor]) -> Ascent:
    """Steps of length rho along the gradient of a divergence, each followed by projection onto the ball of radius rho.

    In u = z / std, with g = grad_u l_d = std grad_z l_d:

        u <- P(u + rho g / ||g||),  P(u) = u_0 + (u - u_0) min(1, rho / ||u - u_0||)

    and no step where ||g|| < 1e-6. One step from u_0 is the published one; that further ones have the same length is
    our reading. A gradient that is not finite gives latents that are not.

    Args:
        latents: (N, d), the centres u_0 of the balls.
        std: (d,), see `distill.exploration.generator.ImageGenerator.latent_std`.
        rho: radius in u, see `radius`.
        steps: how many.
        divergence: latents (N, d) -> (N,), differentiable, no sample depending on another.

    Returns:
        Without any graph; no gradient of anything else is touched.
    """
    start = latents.detach()
    moved = torch.zeros_like(start)  # in u; so that latents without a step are those of the start, bit for bit
    first: Tensor | None = None
    for _ in range(steps):
        with torch.enable_grad():
            place = (start + moved * std).requires_grad_()
            value = divergence(place)
            (gradient,) = torch.autograd.grad(value.sum(), place)
        first = value.detach() if first is None else first
        moved = project(moved + direction(gradient * std) * rho, rho)
    assert first is not None
    return Ascent(start + moved * std, first)


def direction(gradient: Tensor) -> Tensor:
    """g / ||g|| per row (N, d); 0 where ||g|| < 1e-6."""
    size = gradient.norm(dim=1, keepdim=True)
    flat = size < SMALLEST_GRADIENT
    return torch.where(flat, 0.0, gradient / torch.where(flat, 1.0, size))


def project(moved: Tensor, rho: float) -> Tensor:
    """Rows (N, d) no longer than rho: those that are, shortened to it."""
    size = moved.norm(dim=1, keepdim=True)
    return moved * torch.where(size > rho, rho / size, 1.0)


def divergence(told: Tensor, found: Tensor, *, multilabel: bool) -> Tensor:
    """l_d = KL(h || f) per sample, at temperature 1.

    Args:
        told: the teacher's class logits (N, C).
        found: the student's.
        multilabel: Bernoulli distributions, one per label, averaged over the labels.

    Returns:
        (N,) >= 0, at least float32, differentiable in both.
    """
    told, found = at_least_float32(told), at_least_float32(found)
    if multilabel:
        positive = told.sigmoid() * (F.logsigmoid(told) - F.logsigmoid(found))
        negative = (-told).sigmoid() * (F.logsigmoid(-told) - F.logsigmoid(-found))
        return (positive + negative).mean(1)
    return F.kl_div(F.log_softmax(found, 1), F.log_softmax(told, 1), reduction="none", log_target=True).sum(1)


def to_pixels(images: Tensor) -> Tensor:
    """Rounded to uint8 as a deployed student gets them; what is not finite becomes some value that is."""
    return images.nan_to_num(0.0).clamp(0, 255).round().to(torch.uint8)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on the device, without waiting for it."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def _generator(stream: int, seed: int, step: int, rank: int) -> np.random.Generator:
    return np.random.default_rng((stream, seed, step, rank))
