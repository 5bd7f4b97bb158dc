"""Resizing does what its rule says."""

import io

import numpy as np
import pytest
from PIL import Image

from distill.data.images import EncodedImages, fit


def bands() -> Image.Image:
    """Wide: 10 high, 30 wide; left third 0, middle third 100, right third 200."""
    return Image.fromarray(np.repeat(np.array([0, 100, 200], np.uint8), 10)[None].repeat(10, 0))


def test_center_crop_keeps_the_middle():
    assert (fit(bands(), (10, 10), "center-crop", 1) == 100).all()
    assert fit(bands(), (5, 5), "center-crop", 1).shape == (1, 5, 5)


def test_letterbox_keeps_everything_between_black_bars():
    made = fit(bands(), (30, 30), "letterbox", 1)[0]
    assert np.array_equal(made[10:20], np.asarray(bands()))
    assert not made[:10].any()
    assert not made[20:].any()


def test_stretch_ignores_the_shape():
    made = fit(bands(), (12, 12), "stretch", 1)[0]
    assert made[:, 0].max() < 30
    assert made[:, 6].min() > 70
    assert made[:, -1].min() > 170


@pytest.mark.parametrize("resize", ["center-crop", "letterbox", "stretch"])
def test_the_right_size_is_not_resampled(resize):
    pixels = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    assert np.array_equal(fit(Image.fromarray(pixels), (7, 9), resize, 3), pixels.transpose(2, 0, 1))


def test_small_images_grow():
    assert fit(Image.new("RGB", (2, 3), (9, 8, 7)), (16, 16), "center-crop", 3)[:, 8, 8].tolist() == [9, 8, 7]


def test_sixteen_bit_grey_is_scaled_not_clipped():
    deep = Image.fromarray(np.array([[0, 0x8000, 0xFFFF]], np.uint16))
    assert fit(deep, (1, 3), "stretch", 1).tolist() == [[[0, 128, 255]]]


def test_the_camera_orientation_is_applied():
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.fromarray(np.array([[10, 200]], np.uint8)).save(file, "PNG", exif=exif)
    images = EncodedImages([("turned.png", file.getvalue())])
    assert images.describe(0) == (2, 1, True)
    assert images.decode(0, (2, 1), "stretch", 1)[0].tolist() == [[10], [200]]
