"""Images of any kind and size become uint8 (C, H, W), by one written rule."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from distill.data.arrays import Array
from distill.data.section import Resize
from profiles.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

_GREY_MODES = {"1", "L", "LA", "I", "F", "I;16", "I;16B", "I;16L"}


class Images(Protocol):
    """A sequence of undecoded images."""

    def __len__(self) -> int: ...

    def name(self, row: int) -> str:
        """Of one image, for messages."""
        ...

    def describe(self, row: int) -> tuple[int, int, bool]:
        """Height, width and whether it is grey, from the header."""
        ...

    def decode(self, row: int, size: tuple[int, int], resize: Resize, channels: int) -> Array:
        """uint8 (channels, *size)."""
        ...


class ArrayImages:
    """Images that are an array already: uint8 (N, H, W), (N, H, W, C) or (N, C, H, W)."""

    def __init__(self, array: Array, where: str) -> None:
        if array.ndim not in (3, 4) or 0 in array.shape[1:]:
            raise InputError(
                f"images have shape {array.shape}",
                where=where,
                fix="wanted are (N, H, W), (N, H, W, 1 or 3) or (N, 1 or 3, H, W)",
            )
        if array.ndim == 4 and array.shape[3] not in (1, 3):
            if array.shape[1] not in (1, 3):
                raise InputError(
                    f"images have shape {array.shape}", where=where, fix="the channels, 1 or 3, come first or last"
                )
            array = array.transpose(0, 2, 3, 1)
        self.array = _as_uint8(array if array.ndim == 4 else array[..., None], where)
        """uint8 (N, H, W, C)"""
        self._where = where

    def __len__(self) -> int:
        return len(self.array)

    def name(self, row: int) -> str:
        return f"{self._where}, row {row}"

    def describe(self, row: int) -> tuple[int, int, bool]:
        return self.array.shape[1], self.array.shape[2], self.array.shape[3] == 1

    def decode(self, row: int, size: tuple[int, int], resize: Resize, channels: int) -> Array:
        image = self.array[row]
        if image.shape == (*size, channels):
            return np.asarray(image.transpose(2, 0, 1))
        from PIL import Image

        return fit(Image.fromarray(image[..., 0] if image.shape[2] == 1 else image), size, resize, channels)


class EncodedImages:
    """Image files: paths, or the encoded bytes, each with a name for messages."""

    def __init__(self, sources: Sequence[tuple[str, Path | bytes]]) -> None:
        self._sources = sources

    def __len__(self) -> int:
        return len(self._sources)

    def name(self, row: int) -> str:
        return self._sources[row][0]

    def describe(self, row: int) -> tuple[int, int, bool]:
        with self._open(row) as image:
            grey = image.mode in _GREY_MODES
            height, width = image.height, image.width
            try:
                on_its_side = image.getexif().get(0x0112, 1) >= 5  # orientations 5 to 8
            except (OSError, SyntaxError, ValueError, EOFError) as error:  # a PNG's are behind its pixels
                raise self._corrupt(row, error) from error
        return (width, height, grey) if on_its_side else (height, width, grey)

    def decode(self, row: int, size: tuple[int, int], resize: Resize, channels: int) -> Array:
        from PIL import ImageOps

        try:
            with self._open(row) as image:
                return fit(ImageOps.exif_transpose(image), size, resize, channels)
        except (OSError, SyntaxError, ValueError, EOFError) as error:
            raise self._corrupt(row, error) from error

    def _open(self, row: int) -> Image:
        from PIL import Image

        name, source = self._sources[row]
        if isinstance(source, Path) and not source.is_file():
            raise InputError(f"no image {name}", where=str(source), fix="paths are relative to the table's folder")
        try:
            return Image.open(source if isinstance(source, Path) else io.BytesIO(source))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise self._corrupt(row, error) from error

    def _corrupt(self, row: int, error: Exception) -> InputError:
        name, source = self._sources[row]
        size = source.stat().st_size if isinstance(source, Path) else len(source)
        return InputError(
            f"{name} is not a readable image",
            where=str(source) if isinstance(source, Path) else name,
            evidence=f"{str(error).splitlines()[0] if str(error) else type(error).__name__} ({size} bytes)",
            fix="remove it or replace it, then run the same command again",
        )


def fit(image: Image, size: tuple[int, int], resize: Resize, channels: int) -> Array:
    """The image as uint8 (channels, *size).

    center-crop: scaled until it covers the size, the middle is kept. letterbox: scaled until it fits, black bars
    centred. stretch: each side on its own. Bilinear with antialiasing; transparency is dropped; 16-bit is scaled to 8.
    """
    from PIL import Image

    if image.mode.startswith("I"):
        image = Image.fromarray((np.clip(np.asarray(image, np.int64), 0, 65535) >> 8).astype(np.uint8))
    image = image.convert("L" if channels == 1 else "RGB")
    height, width = size
    if (image.height, image.width) != size:
        if resize == "stretch":
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        else:
            ratios = (height / image.height, width / image.width)
            ratio = max(ratios) if resize == "center-crop" else min(ratios)
            scaled = (max(1, round(image.width * ratio)), max(1, round(image.height * ratio)))
            image = image.resize(scaled, Image.Resampling.BILINEAR)
            left, top = (image.width - width) // 2, (image.height - height) // 2
            # beyond the image's edges, crop fills with black: that is the letterbox
            image = image.crop((left, top, left + width, top + height))
    pixels = np.asarray(image)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def _as_uint8(array: Array, where: str) -> Array:
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind == "f":
        bad = ~np.isfinite(array)
        evidence = (
            f"{int(bad.sum())} NaN or infinite values" if bad.any() else f"values {array.min():g} to {array.max():g}"
        )
        raise InputError(
            f"images are {array.dtype}, uint8 is needed",
            where=where,
            evidence=evidence,
            fix="store (images * 255).round().astype('uint8') where they lie in 0..1",
        )
    if array.dtype.kind not in "iu" or array.min() < 0 or array.max() > 255:
        raise InputError(f"images are {array.dtype}", where=where, fix="store them as uint8, 0 to 255")
    return array.astype(np.uint8)
