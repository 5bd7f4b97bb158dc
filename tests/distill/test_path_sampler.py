import copy
import itertools
import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distill.strategies.sampler import Distribution, PathSampler, draws
from distill.students.arch import Arch, ConvArch, TextArch
from profiles.errors import InputError

GRID: tuple[Arch, ...] = tuple(ConvArch(w, d, 3) for w, d in itertools.product((8, 16), (1, 2)))
LARGE: tuple[Arch, ...] = tuple(ConvArch(w, d, k) for w, d, k in itertools.product((8, 12, 16), (1, 2), (3, 5)))
LOSSES = torch.tensor([2.0, 1.5, 1.1, 0.7], dtype=torch.float64)
"""One per architecture of GRID: wider and deeper is easier."""


def sampler(distribution: Distribution = "easy", archs: tuple[Arch, ...] = GRID, **options: Any) -> PathSampler:
    return PathSampler(archs, distribution, **options)


def set_phi(of: PathSampler, values: list[float]) -> None:
    with torch.no_grad():
        of.phi.copy_(torch.tensor(values, dtype=torch.float64))


def test_logits_are_the_sum_of_what_an_architecture_chooses() -> None:
    one = sampler()
    assert one.choices == (("width", 8), ("width", 16), ("depth", 1), ("depth", 2))
    set_phi(one, [0.3, -0.2, 1.0, 0.5])
    logits = np.array([1.3, 0.8, 0.8, 0.3])  # w8 d1, w8 d2, w16 d1, w16 d2
    p = np.exp(logits) / np.exp(logits).sum()
    assert one.probabilities().numpy() == pytest.approx(p, rel=1e-12)
    assert one.log_probabilities().tolist() == pytest.approx(np.log(p), rel=1e-12)
    assert float(one.entropy().detach()) == pytest.approx(scipy.stats.entropy(p), rel=1e-12)
    masses = one.choice_probabilities()
    assert masses == pytest.approx(
        {"width8": p[:2].sum(), "width16": p[2:].sum(), "depth1": p[0] + p[2], "depth2": p[1] + p[3]}
    )


@settings(max_examples=30, deadline=None)
@given(
    st.sets(st.tuples(st.sampled_from([16, 32, 64]), st.integers(1, 4), st.sampled_from([1, 2, 4])), min_size=1),
    st.integers(0, 2**32),
)
def test_any_pool_gives_a_distribution_whose_choices_add_up(words: set[tuple[int, int, int]], seed: int) -> None:
    archs = tuple(TextArch(w, d, heads=h) for w, d, h in sorted(words))
    one = sampler(archs=archs)
    set_phi(one, torch.randn(len(one.choices), generator=draws(seed, 0), dtype=torch.float64).tolist())
    p = one.probabilities()
    assert float(p.sum()) == pytest.approx(1)
    assert 0 <= float(one.entropy().detach()) <= math.log(len(archs)) + 1e-12
    masses = one.choice_probabilities()
    for dimension in ("width", "depth", "heads"):
        found = [mass for name, mass in masses.items() if name.startswith(dimension)]
        assert found == [] or sum(found) == pytest.approx(1)


@pytest.mark.parametrize("phi", [[0.0, 0.0, 0.0, 0.0], [0.7, -0.4, 0.1, -0.9]])
def test_frequencies_match_the_distribution(phi: list[float]) -> None:
    one = sampler()
    set_phi(one, phi)
    found = torch.cat([one.sample(4, draws(0, step)) for step in range(2500)])
    counts = torch.bincount(found, minlength=4).numpy()
    assert scipy.stats.chisquare(counts, one.probabilities().numpy() * 10_000).pvalue > 0.01
    # the draws of one step are independent of each other
    pairs = torch.stack([one.sample(2, draws(1, step)) for step in range(2500)]).numpy()
    table = np.zeros((4, 4))
    np.add.at(table, (pairs[:, 0], pairs[:, 1]), 1)
    assert scipy.stats.chi2_contingency(table).pvalue > 0.01


@pytest.mark.parametrize("distribution", ["uniform", "easy", "hard"])
def test_a_fresh_distribution_is_uniform(distribution: Distribution) -> None:
    assert sampler(distribution, LARGE).probabilities().tolist() == [1 / 12] * 12


def test_uniform_never_learns() -> None:
    one = sampler("uniform")
    for step in range(5):
        one.update(one.sample(2, draws(0, step)), torch.tensor([1.0, 9.0]))
    assert not one.learns
    assert one.probabilities().tolist() == [0.25] * 4


def test_a_pool_of_one_is_always_that_one() -> None:
    one = sampler("hard", GRID[:1])
    assert not one.learns
    assert one.choices == ()
    assert one.sample(3, draws(0, 0)).tolist() == [0, 0, 0]
    assert one.probabilities().tolist() == [1.0]
    assert float(one.entropy().detach()) == 0


def test_an_empty_pool_is_refused() -> None:
    with pytest.raises(InputError) as error:
        sampler(archs=())
    assert error.value.where == "teacher.generic"


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize(("distribution", "sign"), [("easy", 1.0), ("hard", -1.0)])
def test_the_mean_gradient_is_that_of_the_exact_objective(distribution: Distribution, sign: float, k: int) -> None:
    """Over all K-tuples of a 2x2 pool, each weighted with its probability: no bias, whatever the level."""
    one = sampler(distribution, entropy_weight=0.3)
    set_phi(one, [0.4, -0.6, 0.2, 0.5])
    p = one.probabilities()
    mean = torch.zeros_like(one.phi)
    for chosen in itertools.product(range(4), repeat=k):
        indices = torch.tensor(chosen)
        (gradient,) = torch.autograd.grad(one.objective(indices, LOSSES[indices] + 7), one.phi)
        mean += p[indices].prod() * gradient
    phi = one.phi.detach().clone().requires_grad_()
    q = torch.stack([phi[0] + phi[2], phi[0] + phi[3], phi[1] + phi[2], phi[1] + phi[3]]).softmax(0)
    exact = sign * (q * LOSSES).sum() + 0.3 * (q * q.log()).sum()
    (expected,) = torch.autograd.grad(exact, phi)
    assert torch.allclose(mean, expected, rtol=1e-10, atol=1e-14)


def learned(distribution: Distribution, steps: int = 300, **options: Any) -> PathSampler:
    one = sampler(distribution, **options)
    for step in range(steps):
        indices = one.sample(2, draws(3, step))
        one.update(indices, LOSSES[indices].float())
    return one


def expected_loss(of: PathSampler) -> float:
    return float((of.probabilities() * LOSSES).sum())


def test_easy_goes_to_low_losses_and_hard_to_high_ones() -> None:
    start = expected_loss(sampler())
    easy, hard = learned("easy"), learned("hard")
    assert expected_loss(easy) < start - 0.3
    assert expected_loss(hard) > start + 0.3
    assert int(easy.probabilities().argmax()) == 3
    assert int(hard.probabilities().argmax()) == 0


def test_entropy_keeps_the_distribution_wide() -> None:
    free, held = learned("easy", entropy_weight=0.0), learned("easy", entropy_weight=5.0)
    assert float(free.entropy().detach()) < 0.5
    assert float(held.entropy().detach()) > 1.3


def test_a_level_that_all_draws_share_changes_nothing() -> None:
    one, other = sampler(), sampler()
    indices = torch.tensor([0, 3])
    one.update(indices, torch.tensor([2.0, 1.0]))
    other.update(indices, torch.tensor([34.0, 33.0]))
    assert torch.equal(one.phi, other.phi)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_losses_that_are_no_numbers_leave_the_distribution(bad: float) -> None:
    one = learned("easy", 5)
    before = one.phi.detach().clone()
    one.update(torch.tensor([0, 1]), torch.tensor([1.0, bad]))
    assert torch.equal(one.phi, before)


def sequence(of: PathSampler, steps: range) -> list[Tensor]:
    found = []
    for step in steps:
        found.append(of.sample(3, draws(5, step)))
        of.update(found[-1], LOSSES[found[-1]])
    return found


def test_a_restored_sampler_goes_on_as_if_it_had_never_stopped() -> None:
    whole = sampler()
    expected = sequence(whole, range(40))
    first, second = sampler(), sampler()
    found = sequence(first, range(17))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    found += sequence(second, range(17, 40))
    assert torch.equal(torch.stack(found), torch.stack(expected))
    assert torch.equal(second.phi, whole.phi)
    other = [whole.sample(3, draws(6, step)) for step in range(40)]
    assert not torch.equal(torch.stack(other), torch.stack(expected))
