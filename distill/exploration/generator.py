"""What makes new inputs: the two interfaces that exploration knows, one for images and one for texts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn


class ImageGenerator(ABC):
    """An encoder and a decoder, frozen: eval mode, no parameter requires a gradient, no generator state is used.

    Attributes:
        network: all modules that its outputs depend on.
        key: hash of weights and settings.
        latent_std: float32 (d,), standard deviation of every dimension of the flattened latents over all inputs that
            the generator was given, training and unlabelled ones, wherever exploration starts; never 0 (a dimension
            that carries nothing has the smallest that does not divide by zero, and moves no image).
    """

    network: nn.Module
    key: str
    latent_std: Tensor

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """uint8 (N, C, H, W) -> float32 (N, d): the posterior's mean, flattened. Differentiable nowhere."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """float32 (N, d) -> float32 (N, C, H, W), pixels 0 to 255, not rounded, differentiable in `latents`.

        May give values that are not finite where the network does; `Exploration` finds and names them.
        """

    @abstractmethod
    def to(self, device: object) -> ImageGenerator:
        """Moves network and `latent_std`; returns itself."""


class TextGenerator(ABC):
    """Rewrites texts, frozen.

    Attributes:
        network: all modules that its outputs depend on.
        key: hash of weights, tokenizer and settings.
    """

    network: nn.Module
    key: str

    @abstractmethod
    def refill(self, texts: Sequence[str], seeds: Sequence[int]) -> list[str]:
        """Each text with a random share of its tokens masked and drawn anew by the masked language model.

        Args:
            texts: n texts.
            seeds: n non-negative integers below 2**63; what becomes of a text depends on it and its seed alone, up to
                the rounding of a batched forward pass.

        Returns:
            n texts, decoded; a text of a single token comes back refilled or as it was.
        """

    @abstractmethod
    def to(self, device: object) -> TextGenerator:
        """Moves the network; returns itself."""
