import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.data.labels import Labels
from distill.strategies.held_out import held_out_rows
from profiles.errors import InputError

WHERE = "teacher.coached.held_out"


def names(count: int) -> tuple[str, ...]:
    return tuple(f"c{index}" for index in range(count))


def attempt(labels: Labels, classes: tuple[str, ...], share: float, seed: int) -> Any:
    """The rows, or the error."""
    try:
        return held_out_rows(labels, classes, share, seed)
    except InputError as error:
        return error


def suggested(error: InputError) -> float | None:
    found = re.fullmatch(r"held_out = ([\d.]+)", error.fix or "")
    return None if found is None else float(found[1])


@given(
    counts=st.lists(st.integers(2, 30), min_size=2, max_size=6),
    share=st.floats(0.01, 0.5),
    seed=st.integers(0, 50),
)
def test_every_class_is_on_both_sides_or_the_smallest_share_is_told(counts: list[int], share: float, seed: int) -> None:
    values = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    classes = names(len(counts))
    rows = attempt(Labels(values), classes, share, seed)
    if isinstance(rows, InputError):
        assert rows.where == WHERE
        needed = suggested(rows)
        assert needed is not None
        assert share < needed <= 0.5
        # it works, and one sample less does not
        assert len(held_out_rows(Labels(values), classes, needed, seed)) == len(counts)
        with pytest.raises(InputError):
            held_out_rows(Labels(values), classes, (len(counts) - 1) / len(values), seed)
        return
    assert rows.dtype == np.int64
    assert (np.diff(rows) > 0).all()
    assert len(rows) == max(1, round(share * len(values)))
    held = np.bincount(values[rows], minlength=len(counts))
    assert (held > 0).all()
    assert (held < counts).all()
    assert np.array_equal(rows, held_out_rows(Labels(values), classes, share, seed))


@given(seed=st.integers(0, 200), share=st.floats(0.02, 0.5), masked=st.booleans())
def test_every_label_is_known_positive_on_both_sides(seed: int, share: float, masked: bool) -> None:
    random = np.random.default_rng(seed)
    values = (random.random((40, 5)) < random.choice([0.03, 0.1, 0.4], 5)).astype(np.uint8)
    mask = random.random(values.shape) < 0.8 if masked else None
    positive = values.astype(bool) if mask is None else values.astype(bool) & mask
    labels = Labels(values, mask)
    rows = attempt(labels, names(5), share, seed)
    if isinstance(rows, InputError):
        assert rows.where == WHERE
        needed = suggested(rows)
        if needed is not None:
            assert share < needed
            held_out_rows(labels, names(5), needed, seed)
        return
    totals, held = positive.sum(0), positive[rows].sum(0)
    assert len(rows) == max(1, round(share * 40))
    assert (held[totals > 1] > 0).all()
    assert (held < totals)[totals > 1].all()
    assert (held[totals == 1] == 0).all()


def test_shares_of_the_classes_are_kept() -> None:
    values = np.repeat([0, 1, 2], [600, 300, 100])
    rows = held_out_rows(Labels(values), names(3), 0.1, 0)
    assert np.bincount(values[rows]).tolist() == [60, 30, 10]
    assert not np.array_equal(rows, held_out_rows(Labels(values), names(3), 0.1, 1))


def test_a_class_of_one_sample_is_refused_by_name() -> None:
    with pytest.raises(InputError, match='class "c1" has one training sample') as error:
        held_out_rows(Labels(np.array([0, 0, 0, 1, 2, 2])), names(3), 0.5, 0)
    assert error.value.where == WHERE


def test_a_label_that_cannot_be_on_both_sides_is_told_with_the_share() -> None:
    values = np.zeros((40, 3), np.uint8)
    values[[0, 1], 0] = values[[2, 3], 1] = values[[4, 5], 2] = 1
    with pytest.raises(InputError, match='leaves label "c') as error:
        held_out_rows(Labels(values), names(3), 0.05, 0)
    assert error.value.evidence == "2 of 40 training samples would be held out"
    assert error.value.fix == "held_out = 0.075"
    assert len(held_out_rows(Labels(values), names(3), 0.075, 0)) == 3
