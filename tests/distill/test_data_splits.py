"""Stratified splits are exact, disjoint, repeatable and keep the class shares."""

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from distill.data.labels import Labels
from distill.data.splits import take_stratified


def take(labels: Labels, size: int, seed: int = 0):
    width = labels.values.shape[1] if labels.values.ndim == 2 else int(labels.values.max()) + 1
    return take_stratified(labels, size, seed=seed, where="test", classes=tuple(map(str, range(width))))


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(2, 40), min_size=2, max_size=6), share=st.floats(0.05, 0.95), seed=st.integers(0, 99)
)
def test_multiclass_quotas_are_exact_and_within_one_of_the_share(counts, share, seed):
    values = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    size = round(len(values) * share)
    assume(len(counts) <= size <= len(values) - len(counts))
    rest, taken = take(Labels(values), size, seed)
    assert len(taken) == size
    assert np.array_equal(np.sort(np.concatenate([rest, taken])), np.arange(len(values)))
    got = np.bincount(values[taken], minlength=len(counts))
    assert (got >= 1).all()
    assert (got <= np.array(counts) - 1).all()
    wanted = np.array(counts) * size / len(values)
    if (wanted >= 1).all() and (np.array(counts) - wanted >= 1).all():
        assert (np.abs(got - wanted) <= 1).all()
    assert np.array_equal(take(Labels(values), size, seed)[1], taken)


@settings(max_examples=20, deadline=None)
@given(share=st.floats(0.1, 0.9), seed=st.integers(0, 99), masked=st.booleans())
def test_multilabel_shares_are_closer_than_chance(share, seed, masked):
    random = np.random.default_rng(seed)
    values = (random.random((200, 4)) < [0.5, 0.3, 0.1, 0.05]).astype(np.uint8)
    mask = random.random(values.shape) < 0.8 if masked else None
    size = round(200 * share)
    rest, taken = take(Labels(values, mask), size, seed)
    assert len(taken) == size
    assert np.array_equal(np.sort(np.concatenate([rest, taken])), np.arange(200))
    positive = values.astype(bool) if mask is None else values.astype(bool) & mask
    assert (np.abs(positive[taken].sum(0) - positive.sum(0) * size / 200) <= 3).all()


def test_another_seed_takes_other_samples():
    labels = Labels(np.arange(200) % 4)
    assert not np.array_equal(take(labels, 50, 0)[1], take(labels, 50, 1)[1])
