"""A generator from a user's own torch code: a module with `encode` and `decode`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NoReturn, Self

import torch
from torch import Tensor

from distill.exploration.generator import ImageGenerator
from distill.exploration.section import GeneratorSection
from distill.networks import call_factory, fingerprint, load_state, read_state, seeded
from profiles.artifact import content_key
from profiles.errors import InputError

_WHERE = "explore.generator"
_FACTORY = f"{_WHERE}.factory"
_SLACK = 0.25
"""How far a decoder without a final sigmoid may leave 0..1 before its pixels must mean something else."""
_CHUNK = 256


class TorchGenerator(ImageGenerator):
    """What the factory returned, frozen, with its latents flattened.

    `encode` of the module gets float32 images in 0..1, (N, C, H, W), and returns latents (N, ...), or a tuple that
    begins with them (mean, log-variance, ...). `decode` gets such latents and returns images in 0..1, (N, C, H, W),
    and nothing beside them; what leaves 0..1 is cut off. Both are tried here, on `examples`.

    `latent_std` is all ones until `set_latent_std`.

    Attributes:
        identity: hash of weights and settings, without what was measured.

    Args:
        section: of kind "torch".
        examples: uint8 (n, C, H, W), n >= 1, real images.
        base: the recipe's folder.
        seed: of the factory's random initialisation, as far as no weights replace it.
        device: where it runs.
        allow_code: the user allowed importing code that the recipe names.

    Raises:
        InputError: a factory that fails, weights that do not fit, a missing method, one that fails on the examples,
            latents without a batch dimension or that are random, images of another shape or range, values that are not
            finite.
    """

    def __init__(
        self,
        section: GeneratorSection,
        examples: Tensor,
        *,
        base: Path,
        seed: int,
        device: torch.device,
        allow_code: bool,
    ) -> None:
        assert section.factory is not None
        self._name = section.factory
        with seeded(seed):
            network = call_factory(section.factory, section.kwargs, base=base, where=_WHERE, allow_code=allow_code)
        if section.weights is not None:
            file = base / section.weights
            load_state(network, read_state(file, where=f"{_WHERE}.weights"), file=file, where=f"{_WHERE}.weights")
        missing = [name for name in ("encode", "decode") if not callable(getattr(network, name, None))]
        if missing:
            raise InputError(
                f'what "{section.factory}" returns has no method {" and no method ".join(missing)}',
                where=_FACTORY,
                evidence=f"it is a {type(network).__name__}",
                fix="give it encode(images in 0..1) -> latents (N, ...) and decode(latents) -> images in 0..1",
            )
        self.network = network.to(device).eval().requires_grad_(False)
        self.device = device
        # a generator that draws must show it here, and must not move the random numbers of anything else
        with seeded(seed):
            self._latent_shape = self._probe(examples.to(device))
        settings = section.model_dump(mode="json", include={"kind", "factory", "kwargs"})
        self.identity = content_key(settings, fingerprint(network), list(self._latent_shape))
        self.set_latent_std(torch.ones(self._latent_shape.numel()))

    def set_latent_std(self, latent_std: Tensor) -> None:
        """Takes over what was measured over the inputs, float32 (d,), positive; a part of the key."""
        self.latent_std = latent_std.to(self.device)
        self.key = content_key(self.identity, latent_std.cpu().numpy())

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """uint8 (N, C, H, W) -> float32 (N, d), flattened."""
        with self._own_noise():
            parts = [self._encoded(part.to(self.device)).flatten(1) for part in torch.split(images, _CHUNK)]
        return torch.cat(parts)

    def decode(self, latents: Tensor) -> Tensor:
        """float32 (N, d) -> float32 (N, C, H, W), pixels 0 to 255, differentiable in `latents`."""
        with self._own_noise():
            pixels = self._decoded(latents.reshape(len(latents), *self._latent_shape))
        # clamp keeps what is not a number, which exploration looks for
        return pixels.clamp(0, 1) * 255

    def to(self, device: object) -> Self:
        """Moves network and `latent_std`; returns itself."""
        self.device = torch.device(device)  # type: ignore[call-overload]
        self.network.to(self.device)
        self.latent_std = self.latent_std.to(self.device)
        return self

    def _own_noise(self) -> AbstractContextManager[None]:
        """Inside, a module that draws (a sample beside the mean) moves no random numbers of the training's."""
        return torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else [])

    def _encoded(self, images: Tensor) -> Tensor:
        """uint8 images -> the user's latents as they are, float32."""
        found = self._call("encode", images.float() / 255)
        if isinstance(found, tuple | list) and found:
            found = found[0]
        if not isinstance(found, Tensor):
            self._refuse(
                "encode returns no tensor",
                f"a {type(found).__name__}",
                "return the latents, or a tuple that begins with them",
            )
        if not found.is_floating_point():
            self._refuse(
                "encode returns no floating-point latents",
                f"dtype {str(found.dtype).removeprefix('torch.')}",
                "return continuous latents, from before they are quantised",
            )
        return found.float()

    def _decoded(self, latents: Tensor) -> Tensor:
        found = self._call("decode", latents)
        if isinstance(found, tuple | list):
            self._refuse(
                "decode returns several things where the images alone are wanted",
                f"a {type(found).__name__} of {len(found)}",
                "return the images, (N, C, H, W) in 0..1, without what stands beside them",
            )
        if not isinstance(found, Tensor):
            self._refuse("decode returns no tensor", f"a {type(found).__name__}", "return images (N, C, H, W) in 0..1")
        return found.float()

    def _call(self, name: str, argument: Tensor) -> Any:
        method: Callable[[Tensor], Any] = getattr(self.network, name)
        try:
            return method(argument)
        except Exception as error:  # a user's code may raise anything
            raise InputError(
                f'"{self._name}": {name} fails',
                where=_FACTORY,
                evidence=f"its input was {tuple(argument.shape)}, {type(error).__name__}: {error}",
                fix=f"try {name} on a tensor of that shape",
            ) from error

    @torch.no_grad()
    def _probe(self, images: Tensor) -> torch.Size:
        """The shape of one sample's latents, after both methods were tried on `images`.

        Raises:
            InputError: see the class.
        """
        count = len(images)
        latents = self._encoded(images)
        if latents.ndim < 2 or len(latents) != count:
            self._refuse(
                "encode returns no batch dimension",
                f"{tuple(latents.shape)} for {count} images",
                f"return latents ({count}, ...): the first dimension is the image",
            )
        self._check_finite("encode", latents)
        if not torch.equal(latents, self._encoded(images)):
            self._refuse(
                "encode gives other latents at every call",
                "two calls with the same images differ",
                "return the mean of the posterior, not a sample",
            )
        decoded = self._decoded(latents)
        if decoded.shape != images.shape:
            self._refuse(
                "decode returns another shape than the images",
                f"{tuple(decoded.shape)} for {count} images, which are {tuple(images.shape)}",
                f"end it with images {tuple(images.shape[1:])}; data.image_size and data.channels change the data",
            )
        self._check_finite("decode", decoded)
        if not torch.equal(decoded, self._decoded(latents)):
            self._refuse(
                "decode gives another image at every call",
                "two calls with the same latents differ",
                "return the mean of the image, and leave noise out in eval mode",
            )
        low, high = decoded.min().item(), decoded.max().item()
        if low < -_SLACK or high > 1 + _SLACK:
            self._refuse(
                "decode returns pixels outside 0..1",
                f"from {low:.3g} to {high:.3g}",
                "scale its result to 0..1 (a tanh: (x + 1) / 2; grey levels: x / 255)",
            )
        return latents.shape[1:]

    def _check_finite(self, name: str, values: Tensor) -> None:
        broken = int((~values.isfinite()).flatten(1).any(1).sum())
        if broken:
            self.refuse_not_finite(name, broken, len(values))

    def refuse_not_finite(self, name: str, broken: int, count: int) -> NoReturn:
        """Raises the InputError for `broken` of `count` samples whose result of `name` holds infinity or NaN."""
        self._refuse(
            f"{name} gives values that are not finite",
            f"for {broken} of {count} samples",
            "check the weights that it was given (explore.generator.weights), and divisions and roots in it",
        )

    def _refuse(self, message: str, evidence: str, fix: str) -> NoReturn:
        raise InputError(f'"{self._name}": {message}', where=_FACTORY, evidence=evidence, fix=fix)
