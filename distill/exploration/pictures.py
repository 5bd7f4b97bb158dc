"""Pictures that a person can look at: rows of images with words beside and below them, as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image
    from PIL.ImageDraw import ImageDraw

Array = np.ndarray[Any, Any]
_CELL = 64
"""Smaller images are enlarged to at least so many pixels, by a whole factor."""
_GAP = 4
_TITLE = 13
_CAPTION = 10
_INK = (0, 0, 0)
_MARK = (11, 98, 196)
_FEWEST_COLUMNS = 8
_MOST_COLUMNS = 10


class Columns(NamedTuple):
    """Which real images a picture shows: rows (K,) of the inputs, and K words above them, None where nothing is known.

    heading: what the words are.
    """

    rows: Array
    titles: tuple[str, ...] | None = None
    heading: str = "true class"


def spread(count: int) -> Columns:
    """At most eight of `count` inputs, evenly spread, so that sorted data shows every part."""
    shown = min(_FEWEST_COLUMNS, count)
    return Columns(np.arange(shown) * count // shown)


def one_per_class(labels: Array, classes: Sequence[str]) -> Columns:
    """The first sample of every class, the rarest class first, then second ones where there are fewer than eight.

    Args:
        labels: int (N,), N >= 1.
        classes: their names. Of more than ten the ten with the fewest samples are shown.
    """
    labels = np.asarray(labels)
    counts = np.bincount(labels, minlength=len(classes))
    order = [index for index in np.argsort(counts, kind="stable").tolist() if counts[index]]
    members = {index: np.flatnonzero(labels == index) for index in order[:_MOST_COLUMNS]}
    rounds = range(max(len(rows) for rows in members.values()))
    found = [(int(rows[each]), index) for each in rounds for index, rows in members.items() if each < len(rows)]
    found = found[: max(_FEWEST_COLUMNS, len(members))]
    return Columns(np.array([row for row, _ in found]), tuple(classes[index] for _, index in found))


def grid(
    images: Tensor | Array,
    path: Path,
    *,
    row_titles: Sequence[str] | None = None,
    captions: Sequence[Sequence[str]] | None = None,
    column_titles: Sequence[str] | None = None,
    heading: str = "",
    marked: int | None = None,
) -> None:
    """Writes rows of images to a PNG; small ones are enlarged pixel by pixel.

    Args:
        images: uint8 (R, K, C, H, W), grey (C = 1) or RGB (C = 3), at least one.
        path: of the PNG.
        row_titles: R texts, left of the rows.
        captions: R rows of K texts, each below its image; what is wider than the image is cut.
        column_titles: K texts above the first row, cut in the same way.
        heading: what those are, left of them where there are row titles.
        marked: a row that gets a frame.
    """
    from PIL import Image, ImageDraw, ImageFont

    pixels = images.detach().cpu().numpy() if isinstance(images, Tensor) else np.asarray(images)
    rows, columns, channels, height, width = pixels.shape
    factor = max(1, -(-_CELL // max(height, width)))
    cell_width, cell_height = width * factor, height * factor
    title_font, caption_font = ImageFont.load_default(_TITLE), ImageFont.load_default(_CAPTION)
    beside = () if row_titles is None else (heading, *row_titles)
    margin = int(max(title_font.getlength(title) for title in beside)) + 2 * _GAP if beside else 0
    above = 0 if column_titles is None else _CAPTION + _GAP
    below = 0 if captions is None else _CAPTION + _GAP
    step_x, step_y = cell_width + _GAP, cell_height + below + _GAP
    sheet = Image.new("RGB", (margin + columns * step_x + _GAP, above + rows * step_y + _GAP), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    if column_titles is not None:
        if beside:
            draw.text((_GAP, _GAP), heading, fill=_INK, font=caption_font)
        for column, title in enumerate(column_titles):
            text = _cut(title, cell_width, draw, caption_font)
            draw.text((margin + _GAP + column * step_x, _GAP), text, fill=_INK, font=caption_font)
    for row in range(rows):
        top = above + _GAP + row * step_y
        if row == marked:
            corner = (sheet.width - 2, top + step_y - _GAP + 1)
            draw.rectangle((1, top - _GAP + 1, *corner), outline=_MARK, width=2)
        if row_titles is not None:
            draw.text((_GAP, top + cell_height // 2), row_titles[row], fill=_INK, font=title_font, anchor="lm")
        for column in range(columns):
            left = margin + _GAP + column * step_x
            sheet.paste(_enlarged(pixels[row, column], channels, factor), (left, top))
            if captions is not None:
                text = _cut(captions[row][column], cell_width, draw, caption_font)
                draw.text((left, top + cell_height + 1), text, fill=_INK, font=caption_font)
    sheet.save(path, format="PNG")


def _enlarged(pixels: Array, channels: int, factor: int) -> Image.Image:
    """uint8 (C, H, W) as an RGB picture, every pixel a square of `factor` pixels."""
    from PIL import Image

    shown = np.repeat(pixels, 3, axis=0) if channels == 1 else pixels
    large = shown.repeat(factor, axis=1).repeat(factor, axis=2)
    return Image.fromarray(np.ascontiguousarray(large.transpose(1, 2, 0)))


def _cut(text: str, width: int, draw: ImageDraw, font: Any) -> str:
    """`text`, shortened until it is at most `width` pixels wide."""
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(text + "...", font=font) > width:
        text = text[:-1]
    return text + "..."
