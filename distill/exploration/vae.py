"""The convolutional variational autoencoder that edgestill trains on unlabelled images.

Kingma & Welling 2014 (arXiv 1312.6114), with the calibrated Gaussian decoder of Rybkin et al. 2021 (sigma-VAE, arXiv
2006.13202): one variance for all pixels, always the one of largest likelihood, which is the mean squared error. With a
fixed variance of 1 the KL term outweighs the pixels and the posterior collapses; with this one beta = 1 is balanced at
every image size and contrast. A Bernoulli likelihood is no density for grey levels and would need such a beta again.
The blocks are our choice: small, and smooth (SiLU), because gradient exploration climbs through the decoder.
"""

from __future__ import annotations

import math
from typing import Self

import torch
from torch import Tensor, nn

from distill.data.dataset import InputSpec
from distill.exploration.generator import ImageGenerator
from distill.networks import Normalize, fingerprint
from profiles.artifact import content_key

_SMALLEST_MAP = 4
"""The encoder halves the map until its longer side is at most this."""
_LARGE = 96
"""From this side on the first layer works on 4x4 patches, not 2x2."""
_MOST_CHANNELS = 4
"""Widest layer, in widths of the first."""
_QUANTISATION = 1 / (12 * 255**2)
"""Variance of rounding to 256 grey levels: no image is known better, and the likelihood stays finite."""
_CHUNK = 256


class VAE(nn.Module):
    """Encoder and decoder for images of one shape.

    Encoder: a strided convolution (2, from 96 px on 4), then strided convolutions that double the channels up to four
    times `width`, until the map is at most 4 px; a Linear gives mean and log-variance of the posterior. Decoder: the
    same maps backwards, each doubled by a transposed convolution (kernel 4, so that every pixel is covered equally
    often) and cut to exactly the encoder's size; the last one gives whole patches (sub-pixel convolution), cut to the
    image. So every size is met exactly. Channels last: two thirds of the time on a CPU.

    Args:
        spec: shape, and mean and std of the images.
        latent: d, dimensions of the latent space.
        width: channels of the first layer.
    """

    def __init__(self, spec: InputSpec, latent: int, width: int) -> None:
        super().__init__()
        channels, height, side = spec.shape
        self.shape = (channels, height, side)
        self.latent = latent
        patch = 4 if max(height, side) >= _LARGE else 2
        sizes = [(-(-height // patch), -(-side // patch))]
        while max(sizes[-1]) > _SMALLEST_MAP:
            sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))
        widths = [min(2**i, _MOST_CHANNELS) * width for i in range(len(sizes))]
        self.normalize = Normalize(spec.mean, spec.std)
        down: list[nn.Module] = [_block(channels, widths[0], 2 * patch - 1, patch)]
        down += [_block(widths[i], widths[i + 1], 3, 2) for i in range(len(sizes) - 1)]
        self.down = nn.Sequential(*down)
        flat = widths[-1] * math.prod(sizes[-1])
        self.posterior = nn.Linear(flat, 2 * latent)
        self.grow = nn.Sequential(nn.Linear(latent, flat), nn.SiLU())
        self.smallest = (widths[-1], *sizes[-1])
        self.sizes = sizes[-2::-1]
        self.up = nn.ModuleList(_doubled(widths[i + 1], widths[i]) for i in reversed(range(len(sizes) - 1)))
        self.paint = nn.Sequential(nn.Conv2d(widths[0], channels * patch**2, 3, padding=1), nn.PixelShuffle(patch))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 (N, C, H, W) -> mean and log-variance of the posterior, float32 (N, d) each."""
        pixels = self.normalize(images.contiguous(memory_format=torch.channels_last))
        features = self.down(pixels).flatten(1)
        mean, log_variance = self.posterior(features).chunk(2, dim=1)
        return mean, log_variance.clamp(-12, 12)

    def decode(self, latents: Tensor) -> Tensor:
        """float32 (N, d) -> float32 (N, C, H, W), pixels 0 to 1."""
        x = self.grow(latents).unflatten(1, self.smallest).contiguous(memory_format=torch.channels_last)
        for (height, width), block in zip(self.sizes, self.up, strict=True):
            x = block(x)[:, :, :height, :width]
        _, height, width = self.shape
        painted: Tensor = self.paint(x)
        return painted[:, :, :height, :width].sigmoid()

    def loss(self, images: Tensor, beta: float) -> dict[str, Tensor]:
        """The negative evidence lower bound per pixel value, without its constants.

        With D = C H W, posterior N(m, diag(s^2)) and z = m + s * noise (torch's global generator), of a batch:
        "reconstruction": 1/2 log(v), v the mean over batch and pixels of (x - Dec(z))^2, x in 0..1, plus the variance
        of rounding to grey levels; "kl": beta / D * mean over the batch of 1/2 sum_d (m_d^2 + s_d^2 - 1 - log s_d^2).

        Args:
            images: uint8 (N, C, H, W).
            beta: weight of the KL term; 1 is the lower bound itself.
        """
        mean, log_variance = self.encode(images)
        decoded = self.decode(mean + (log_variance / 2).exp() * torch.randn_like(mean))
        error = (images.to(decoded.dtype) / 255 - decoded).square().mean()
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean() / 2
        return {
            "reconstruction": (error + _QUANTISATION).log() / 2,
            "kl": beta * divergence / math.prod(self.shape),
        }


def _block(channels: int, out: int, kernel: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(out), nn.SiLU()
    )


def _doubled(channels: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.ConvTranspose2d(channels, out, 4, 2, 1, bias=False), nn.BatchNorm2d(out), nn.SiLU())


class VAEGenerator(ImageGenerator):
    """A trained VAE, frozen: `encode` gives the posterior's mean.

    Args:
        network: trained; changed in place: eval mode, no gradients.
        latent_std: float32 (d,), positive; see `ImageGenerator`.
    """

    def __init__(self, network: VAE, latent_std: Tensor) -> None:
        self.network = network.eval().requires_grad_(False)
        self._vae = network
        self.latent_std = latent_std.to(next(network.parameters()).device)
        self.key = content_key("vae", fingerprint(network), latent_std.cpu().numpy())

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """uint8 (N, C, H, W) -> float32 (N, d), the posterior's mean."""
        parts = [self._vae.encode(part.to(self.latent_std.device))[0] for part in torch.split(images, _CHUNK)]
        return torch.cat(parts)

    def decode(self, latents: Tensor) -> Tensor:
        """float32 (N, d) -> float32 (N, C, H, W), pixels 0 to 255, differentiable in `latents`."""
        return self._vae.decode(latents) * 255

    def to(self, device: object) -> Self:
        """Moves network and `latent_std`; returns itself."""
        place = torch.device(device)  # type: ignore[call-overload]
        self.network.to(place)
        self.latent_std = self.latent_std.to(place)
        return self
