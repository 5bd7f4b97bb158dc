"""Augmentation is a pure function of (seed, sample, view)."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.data.section import AugmentSection
from distill.data.views import _draws, augment, view_of

ALL = AugmentSection(crop=3, flip=True, erase=0.5, views=4)


def batch(count: int = 12, channels: int = 3, height: int = 9, width: int = 11) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8, generator=generator)


@settings(max_examples=40, deadline=None)
@given(
    order=st.permutations(range(12)),
    size=st.integers(1, 12),
    view=st.integers(0, 1000),
    seed=st.integers(0, 2**63 - 1),
    channels=st.sampled_from([1, 3]),
)
def test_a_view_does_not_depend_on_the_batch_it_is_made_in(order, size, view, seed, channels):
    images, indices = batch(channels=channels), torch.arange(12) * 977
    whole = augment(images, indices, view, seed, ALL)
    chosen = torch.tensor(order[:size])
    assert torch.equal(augment(images[chosen], indices[chosen], view, seed, ALL), whole[chosen])
    one_view_each = augment(images[chosen], indices[chosen], torch.full((size,), view), seed, ALL)
    assert torch.equal(one_view_each, whole[chosen])


@pytest.mark.parametrize("section", [ALL, AugmentSection(crop=2), AugmentSection(flip=True), AugmentSection(erase=1)])
def test_view_zero_is_the_clean_image(section):
    images, indices = batch(), torch.arange(12)
    assert torch.equal(augment(images, indices, 0, 5, section), images)
    views = torch.arange(12) % 3
    mixed = augment(images, indices, views, 5, section)
    assert torch.equal(mixed[views == 0], images[views == 0])
    assert torch.equal(mixed[views == 2], augment(images, indices, 2, 5, section)[views == 2])


@settings(max_examples=25, deadline=None)
@given(view=st.integers(1, 50), seed=st.integers(0, 10**6), crop=st.integers(1, 40))
def test_crop_and_flip_agree_with_reflection_padding_and_slicing(view, seed, crop):
    images, indices = batch(channels=2), torch.arange(12) + 100
    section = AugmentSection(crop=crop, flip=True)
    made = augment(images, indices, view, seed, section).numpy()
    draws = _draws(indices, view, seed).numpy()
    for row, image in enumerate(images.numpy()):
        reach_y, reach_x = min(crop, 8), min(crop, 10)
        top = draws[0, row] % (2 * reach_y + 1)
        left = draws[1, row] % (2 * reach_x + 1)
        source = image[:, :, ::-1] if draws[2, row] & 1 else image
        padded = np.pad(source, ((0, 0), (reach_y, reach_y), (reach_x, reach_x)), mode="reflect")
        assert np.array_equal(made[row], padded[:, top : top + 9, left : left + 11])


def test_flip_alone_mirrors_about_half_of_the_samples():
    images = batch(1).expand(4000, -1, -1, -1)
    made = augment(images, torch.arange(4000), 1, 0, AugmentSection(flip=True))
    mirrored = (made == images.flip(3)).flatten(1).all(1)
    clean = (made == images).flatten(1).all(1)
    assert bool((mirrored ^ clean).all())
    assert 0.46 < mirrored.float().mean() < 0.54


def test_erase_replaces_one_rectangle_with_its_probability():
    images = torch.full((4000, 1, 16, 24), 77, dtype=torch.uint8)
    made = augment(images, torch.arange(4000), 1, 3, AugmentSection(erase=0.3))
    changed = (made != images).flatten(1).any(1)
    assert 0.27 < changed.float().mean() < 0.33
    for row in changed.nonzero().flatten()[:50]:
        hole = made[row, 0] != 77
        rows, columns = hole.any(1).nonzero().flatten(), hole.any(0).nonzero().flatten()
        assert hole[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].all()
        assert 2 <= len(rows) <= 8
        assert 3 <= len(columns) <= 12
        assert made[row, 0][hole].unique().numel() == 1


def test_draws_are_uniform_and_uncorrelated_between_streams_views_and_samples():
    draws = _draws(torch.arange(20_000), 1, 0).double() / 2**31
    assert torch.allclose(draws.mean(1), torch.full((len(draws),), 0.5, dtype=torch.double), atol=0.01)
    assert torch.allclose(draws.var(1), torch.full((len(draws),), 1 / 12, dtype=torch.double), atol=0.003)
    other = _draws(torch.arange(20_000), 2, 0).double() / 2**31
    reseeded = _draws(torch.arange(20_000), 1, 1).double() / 2**31
    table = torch.cat([draws, other, reseeded, draws.roll(1, 1)])
    correlation = torch.corrcoef(table) - torch.eye(len(table), dtype=torch.double)
    assert correlation.abs().max() < 0.035


def test_channels_last_input_stays_channels_last_and_equal():
    images, indices = batch(), torch.arange(12)
    last = images.contiguous(memory_format=torch.channels_last)
    made = augment(last, indices, 1, 0, ALL)
    assert made.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(made, augment(images, indices, 1, 0, ALL))


def test_tokens_and_empty_sections_pass_unchanged():
    tokens, indices = torch.arange(24).view(4, 6), torch.arange(4)
    assert augment(tokens, indices, 3, 0, ALL) is tokens
    images = batch(4)
    assert augment(images, indices, 3, 0, AugmentSection()) is images


def test_epochs_cycle_through_the_views_from_the_clean_one():
    assert [view_of(epoch, 3) for epoch in range(7)] == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_views_are_the_same_on_a_gpu():
    images, indices = batch(), torch.arange(12)
    made = augment(images.cuda(), indices.cuda(), 3, 9, ALL)
    assert torch.equal(made.cpu(), augment(images, indices, 3, 9, ALL))
