"""Views: augmented images as a pure function of (seed, sample, view), so that cached teacher outputs stay true.

Every random number is a hash of (seed, view, sample index, stream) in 64-bit integer arithmetic: no generator state, so
a sample's view is the same in any batch, order, process and on any device, bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill.data.section import AugmentSection

_GOLDEN = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB
_MASK = (1 << 64) - 1
# one stream per decision: vertical shift, horizontal shift, flip, erase?, its height, width, top, left, grey level
_DY, _DX, _FLIP, _ERASE, _HEIGHT, _WIDTH, _TOP, _LEFT, _LEVEL = range(9)
_STREAMS = 9


def view_of(epoch: int, views: int) -> int:
    """The view that epoch `epoch` (from 0) trains on: 0, the clean images, and then every `views` epochs again."""
    return epoch % views


def augment(images: Tensor, indices: Tensor, view: int | Tensor, seed: int, section: AugmentSection) -> Tensor:
    """View `view` of the samples `indices`.

    Args:
        images: uint8 (N, C, H, W), the clean images. Token batches (N, T) pass unchanged: texts have no views.
        indices: int64 (N,), row of each sample in the training split, on the same device.
        view: one view for all, or int64 (N,) one per sample. View 0 is the clean image.
        seed: the recipe's seed.
        section: what may change.

    Returns:
        uint8 (N, C, H, W) in the memory format of `images`; `images` itself where nothing changes.
    """
    if images.dim() != 4 or not (section.crop or section.flip or section.erase):
        return images
    if isinstance(view, int):
        if view == 0:
            return images
        changed = None
    else:
        changed = (view != 0).to(torch.int64)
    draws = _draws(indices, view, seed)
    height, width = images.shape[2:]
    if section.crop or section.flip:
        rows = torch.arange(height, device=images.device).expand(len(indices), height)
        columns = torch.arange(width, device=images.device).expand(len(indices), width)
        if section.crop:
            rows = _reflect(rows + _shift(draws[_DY], section.crop, height, changed), height)
            columns = _reflect(columns + _shift(draws[_DX], section.crop, width, changed), width)
        if section.flip:
            mirror = draws[_FLIP] & 1
            mirror = mirror if changed is None else mirror * changed
            # x -> W-1-x where mirrored, x elsewhere
            columns = columns + mirror[:, None] * (width - 1 - 2 * columns)
        images = _gather(images, rows, columns)
    if section.erase:
        images = _erase(images, draws, section.erase, changed)
    return images


def _signed(value: int) -> int:
    """The int64 with the bits of an unsigned 64-bit `value`."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _mix(value: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014) on int64, whose products wrap as unsigned ones do."""
    value = (value ^ ((value >> 30) & ((1 << 34) - 1))) * _signed(_MIX1)
    value = (value ^ ((value >> 27) & ((1 << 37) - 1))) * _signed(_MIX2)
    return value ^ ((value >> 31) & ((1 << 33) - 1))


def _draws(indices: Tensor, view: int | Tensor, seed: int) -> Tensor:
    """int64 (streams, N) in 0..2^31-1, independent per (seed, view, sample, stream)."""
    state = indices * _STREAMS + torch.arange(_STREAMS, device=indices.device)[:, None]
    state = state * _signed(_GOLDEN) + _signed((seed + 1) * _MIX1)
    offset = _signed((view + 1) * _MIX2) if isinstance(view, int) else (view + 1) * _signed(_MIX2)
    # two rounds: one would leave the views of a sample related through the sum
    return (_mix(_mix(state) + offset) >> 33) & ((1 << 31) - 1)


def _shift(draw: Tensor, crop: int, side: int, changed: Tensor | None) -> Tensor:
    """int64 (N, 1): shifts in -crop..crop, never so far that a reflection would need a second one."""
    reach = min(crop, side - 1)
    shift = draw % (2 * reach + 1) - reach
    return (shift if changed is None else shift * changed)[:, None]


def _reflect(position: Tensor, side: int) -> Tensor:
    """Positions outside 0..side-1 mirrored back in at the border pixel."""
    return (side - 1) - ((side - 1) - position.abs()).abs()


def _gather(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """images[n, :, rows[n, y], columns[n, x]] as one gather over the flattened pixels; keeps channels_last."""
    count, channels, height, width = images.shape
    source = (rows * width).unsqueeze(2) + columns.unsqueeze(1)
    taken = images.reshape(count, channels, -1).gather(2, source.view(count, 1, -1).expand(-1, channels, -1))
    taken = taken.view(count, channels, height, width)
    if not images.is_contiguous() and images.is_contiguous(memory_format=torch.channels_last):
        return taken.contiguous(memory_format=torch.channels_last)
    return taken


def _erase(images: Tensor, draws: Tensor, probability: float, changed: Tensor | None) -> Tensor:
    """A rectangle of 1/8 to 1/2 of each side becomes one random grey level, with `probability`."""
    height, width = images.shape[2:]
    chosen = draws[_ERASE] < int(probability * (1 << 31))
    if changed is not None:
        chosen = chosen & changed.bool()
    inside_y = _inside(height, draws[_HEIGHT], draws[_TOP]) & chosen[:, None]
    inside_x = _inside(width, draws[_WIDTH], draws[_LEFT])
    level = (draws[_LEVEL] & 255).to(torch.uint8)[:, None, None, None]
    return torch.where((inside_y.unsqueeze(2) & inside_x.unsqueeze(1)).unsqueeze(1), level, images)


def _inside(side: int, extent: Tensor, start: Tensor) -> Tensor:
    """bool (N, side): the rectangle's span along one axis."""
    shortest, longest = max(1, side // 8), max(1, side // 2)
    span = shortest + extent % (longest - shortest + 1)
    first = (start % (side - span + 1))[:, None]
    position = torch.arange(side, device=extent.device)
    return (position >= first) & (position < first + span[:, None])
