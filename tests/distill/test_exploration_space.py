import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distill.exploration.space import Draws, Orders, ascend, direction, divergence, project, radius, to_pixels

STD = torch.tensor([0.5, 1.0, 2.0, 4.0])


@pytest.mark.parametrize(
    ("dimensions", "expected"),
    [(1, math.sqrt(2 / math.pi)), (2, math.sqrt(math.pi / 2)), (3, 2 * math.sqrt(2 / math.pi))],
)
def test_radius_in_few_dimensions_is_the_mean_of_the_chi_distribution(dimensions: int, expected: float) -> None:
    assert radius(1.0, dimensions) == pytest.approx(expected)
    assert radius(2.5, dimensions) == pytest.approx(2.5 * expected)
    assert radius(0.0, dimensions) == 0


def test_radius_in_many_dimensions_is_finite_and_approaches_the_root() -> None:
    assert radius(1.0, 100_000) == pytest.approx(math.sqrt(100_000 - 0.5), rel=1e-6)


def test_mean_length_of_random_offsets_is_the_radius_of_gradient_steps() -> None:
    drawn = Draws(0, 0).offsets(20_000, STD, 1.7) / STD
    # the mean of 20,000 lengths, whose standard deviation is below 1.7 / sqrt(2) each
    assert drawn.norm(dim=1).mean() == pytest.approx(radius(1.7, 4), abs=4 * 1.7 / math.sqrt(2 * 20_000))


def test_random_offsets_have_the_covariance_of_the_latents_times_sigma_squared() -> None:
    drawn = Draws(5, 3).offsets(50_000, STD, 0.5).double()
    expected = torch.diag((0.5 * STD.double()) ** 2)
    scale = 0.25 * torch.outer(STD, STD).double()
    assert ((torch.cov(drawn.T) - expected).abs() / scale).max() < 5 * math.sqrt(2 / 50_000)
    assert (drawn.mean(0).abs() / (0.5 * STD)).max() < 5 / math.sqrt(50_000)


def test_no_radius_gives_no_offset() -> None:
    assert torch.equal(Draws(0, 0).offsets(3, STD, 0.0), torch.zeros(3, 4))


def test_draws_are_a_pure_function_of_seed_step_and_rank() -> None:
    images = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4)

    def drawn(*place: int) -> list[list[float]]:
        draws = Draws(*place)
        parts = [draws.offsets(2, STD, 1.0).flatten(), draws.strengthen(images).flatten().float()]
        return [*(part.tolist() for part in parts), [float(seed) for seed in draws.text_seeds(2)]]

    assert drawn(1, 2, 0) == drawn(1, 2, 0)
    for other in ((0, 2, 0), (1, 3, 0), (1, 2, 1)):
        assert all(a != b for a, b in zip(drawn(1, 2, 0), drawn(*other), strict=True))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=5))
def test_several_draws_are_one_draw_in_parts(sizes: list[int]) -> None:
    images = torch.full((sum(sizes), 1, 2, 2), 90, dtype=torch.uint8)
    parts, whole = Draws(4, 1), Draws(4, 1)
    assert torch.equal(
        torch.cat([parts.offsets(size, STD, 1.0) for size in sizes]), whole.offsets(sum(sizes), STD, 1.0)
    )
    assert [seed for size in sizes for seed in parts.text_seeds(size)] == whole.text_seeds(sum(sizes))
    assert torch.equal(torch.cat([parts.strengthen(images[:size]) for size in sizes]), whole.strengthen(images))


def test_text_seeds_fill_63_bits_and_no_more() -> None:
    seeds = Draws(0, 0).text_seeds(500)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62
    assert len(set(seeds)) == 500


@settings(max_examples=40, deadline=None)
@given(total=st.integers(1, 30), batch=st.integers(1, 40), seed=st.integers(0, 3))
def test_every_input_becomes_a_seed_equally_often(total: int, batch: int, seed: int) -> None:
    orders = Orders(total, seed)
    steps = [orders.chosen(step, batch) for step in range(5)]
    counts = np.bincount(np.concatenate(steps), minlength=total)
    assert counts.max() - counts.min() <= 1
    assert np.array_equal(Orders(total, seed).chosen(3, batch), steps[3])


def test_rounds_have_different_orders() -> None:
    orders = Orders(50, 0)
    assert not np.array_equal(orders.chosen(0, 50), orders.chosen(1, 50))


def bowl(latents: Tensor) -> Tensor:
    """A quadratic whose gradient is (z - 1) times (1, 2, 3, 4)."""
    return 0.5 * ((latents - 1).square() * torch.arange(1, 5).to(latents)).sum(1)


def test_one_step_goes_the_whole_radius_along_the_gradient_of_the_whitened_latents() -> None:
    start = torch.tensor([[0.0, 3.0, -1.0, 2.0]], dtype=torch.float64)
    std = STD.double()
    found = ascend(start, std, 0.7, 1, bowl)
    gradient = (start - 1) * torch.arange(1, 5) * std
    expected = start + std * 0.7 * gradient / gradient.norm()
    assert torch.allclose(found.latents, expected, rtol=1e-12)
    assert torch.allclose(found.before, bowl(start))
    assert not found.latents.requires_grad


@pytest.mark.parametrize("steps", [2, 3])
def test_further_steps_stay_in_the_ball_and_climb(steps: int) -> None:
    start = torch.randn(20, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    std = STD.double()
    once, more = (ascend(start, std, 0.7, count, bowl).latents for count in (1, steps))
    assert (((more - start) / std).norm(dim=1) <= 0.7 + 1e-12).all()
    assert (bowl(more) >= bowl(once) - 1e-12).all()
    assert (bowl(more) > bowl(once)).any()


def test_where_nothing_climbs_there_is_no_step() -> None:
    start = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    flat = ascend(start, STD, 0.7, 3, lambda latents: (latents * 0).sum(1))
    assert torch.equal(flat.latents, start)
    almost = direction(torch.tensor([[9e-7, 0.0], [2e-6, 0.0], [0.0, 0.0]]))
    assert torch.equal(almost, torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]]))


def test_a_gradient_that_is_not_finite_is_not_hidden() -> None:
    start = torch.zeros(2, 4)
    found = ascend(start, STD, 1.0, 1, lambda latents: (latents + torch.tensor([[0.0], [1.0]])).sqrt().sum(1))
    assert not torch.isfinite(found.latents[0]).any()
    assert torch.isfinite(found.latents[1]).all()


def test_projection_shortens_only_what_is_too_long() -> None:
    moved = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    assert torch.allclose(project(moved, 1.0), torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_divergence_is_the_kl_of_teacher_to_student(dtype: torch.dtype) -> None:
    told, found = (3 * torch.randn(6, 5, generator=torch.Generator().manual_seed(s)).to(dtype) for s in (0, 1))
    z_t, z_s = told.double().numpy(), found.double().numpy()
    p, q = (np.exp(z) / np.exp(z).sum(1, keepdims=True) for z in (z_t, z_s))
    expected = (p * np.log(p / q)).sum(1)
    got = divergence(told, found, multilabel=False)
    assert got.double().numpy() == pytest.approx(expected, rel=1e-4)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    a, b = (1 / (1 + np.exp(-z)) for z in (z_t, z_s))
    binary = (a * np.log(a / b) + (1 - a) * np.log((1 - a) / (1 - b))).mean(1)
    assert divergence(told, found, multilabel=True).double().numpy() == pytest.approx(binary, rel=1e-4, abs=1e-6)
    assert not divergence(told, told, multilabel=False).any()


def test_divergence_passes_gradcheck() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(3, 4, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2)]
    for multilabel in (False, True):
        assert torch.autograd.gradcheck(lambda a, b, m=multilabel: divergence(a, b, multilabel=m), inputs)


def test_strong_contrast_and_brightness_stay_within_their_bounds() -> None:
    image = torch.tensor([100, 120, 140], dtype=torch.uint8).view(1, 3, 1, 1).expand(400, 3, 1, 1)
    found = Draws(0, 0).strengthen(image).float()
    spread = found.amax((1, 2, 3)) - found.amin((1, 2, 3))
    middle = found.mean((1, 2, 3))
    assert (spread >= 19).all()  # half of 40, rounded
    assert (spread <= 61).all()
    assert spread.min() < 24
    assert spread.max() > 56
    assert ((middle - 120).abs() <= 65).all()
    assert (middle - 120).abs().max() > 55


def test_pixels_are_rounded_and_always_numbers() -> None:
    given = torch.tensor([-3.0, 0.4, 0.6, 254.5, 999.0, math.nan, math.inf])
    assert to_pixels(given).tolist() == [0, 0, 1, 254, 255, 0, 255]
