"""Choosing under budgets: what fits, what gets a trial, who is trained in full, and what to say where nothing fits."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from distill.students.arch import Arch, ConvArch, TextArch, parse_arch
from distill.students.choose import (
    Candidate,
    Excess,
    Option,
    by_cost,
    finalists,
    fitting,
    ladder,
    most_accurate,
    nearest_miss,
    next_smaller,
    ranked,
    resolve_rank,
)
from distill.students.pool import Cost, Limits
from profiles.errors import InputError

POOL = tuple(ConvArch(w, d, k) for w in (8, 16, 24, 32) for d in (1, 2) for k in (3, 5))
A, B, C, D = POOL[:4]

# figures of a usual size, as prints and round numbers are part of what is tested
figures = st.floats(1e-6, 1e6)
sources = st.sampled_from(["measured", "calibrated", "assumed"])
costs = st.one_of(
    st.builds(Cost, *[st.none() | figures] * 3),
    st.builds(Cost, *[st.none() | figures] * 3, latency_ms=figures, source=sources),
)
options = st.builds(Option, st.sampled_from(POOL), st.sampled_from(["fp32", "fp16", "int8"]), costs)
limits_ = st.builds(Limits, *[st.none() | figures] * 3)
margins = st.floats(1, 3)


def capacity(arch: Arch) -> float:
    return arch.width**2 * arch.depth * arch.kernel**2


def over(cost: Cost, limits: Limits, margin: float) -> bool:
    """Whether a cost is over a limit, by the words of `fitting`."""

    def exceeds(value: float | None, limit: float | None) -> bool:
        return value is not None and limit is not None and value > limit

    if exceeds(cost.file_mib, limits.file_mib) or exceeds(cost.memory_mib, limits.memory_mib):
        return True
    if cost.source == "measured":
        return exceeds(cost.latency_ms, limits.latency_ms)
    allowed = None if limits.latency_ms is None else margin * limits.latency_ms
    return exceeds(cost.latency_bound_ms, limits.latency_ms) or exceeds(cost.latency_ms, allowed)


# -- what fits ---------------------------------------------------------------------------------------------------------


@given(st.lists(options, max_size=8), limits_, margins)
def test_what_is_within_the_limits_fits_and_all_else_is_rejected(
    given_: list[Option], limits: Limits, margin: float
) -> None:
    fits, rejected = fitting(given_, limits, margin=margin)
    assert fits == tuple(option for option in given_ if not over(option.cost, limits, margin))
    assert len(fits) + len(rejected) == len(given_)
    for entry in rejected:
        assert over(entry.option.cost, limits, margin)
        assert all(excess.needs > excess.allowed for excess in entry.excesses)
        assert entry.overshoot == max(excess.needs / excess.allowed for excess in entry.excesses)
    assert all(one.overshoot <= two.overshoot for one, two in pairwise(rejected))


@given(
    st.lists(options, max_size=8),
    limits_,
    margins,
    st.sampled_from(["file_mib", "memory_mib", "latency_ms"]),
    st.floats(1, 100),
)
def test_raising_a_limit_never_loses_an_option(
    given_: list[Option], limits: Limits, margin: float, field: str, factor: float
) -> None:
    limit = getattr(limits, field)
    raised = replace(limits, **{field: None if limit is None else limit * factor})
    before, after = (fitting(given_, each, margin=margin)[0] for each in (limits, raised))
    assert set(before) <= set(after)
    assert set(before) <= set(fitting(given_, limits, margin=margin * factor)[0])


def test_what_is_not_known_rejects_nothing() -> None:
    option = Option(A, "fp32", Cost())
    assert fitting([option], Limits(1e-9, 1e-9, 1e-9)) == ((option,), ())


def test_a_prediction_may_be_over_by_the_margin_a_bound_and_a_measurement_may_not() -> None:
    limits = Limits(latency_ms=1.0)
    predicted = Option(A, "int8", Cost(latency_bound_ms=0.2, latency_ms=1.2, source="calibrated"))
    assert fitting([predicted], limits)[0] == ()
    assert fitting([predicted], limits, margin=1.2)[0] == (predicted,)
    bound = Option(A, "int8", Cost(latency_bound_ms=1.1, latency_ms=1.2, source="assumed"))
    measured = Option(A, "int8", Cost(latency_bound_ms=0.2, latency_ms=1.1, source="measured"))
    assert fitting([bound, measured], limits, margin=1.2)[0] == ()
    fast = Option(A, "int8", Cost(latency_bound_ms=1.1, latency_ms=0.9, source="measured"))
    assert fitting([fast], limits)[0] == (fast,)


@pytest.mark.parametrize(
    ("cost", "limits", "text"),
    [
        (
            Cost(latency_bound_ms=0.1, latency_ms=0.61, source="calibrated"),
            Limits(latency_ms=0.4),
            "conv-w8-d1-k3 int8: latency ~0.61 ms, limit 0.4",
        ),
        (Cost(latency_bound_ms=0.5), Limits(latency_ms=0.4), "conv-w8-d1-k3 int8: latency at least 0.5 ms, limit 0.4"),
        (
            Cost(latency_ms=0.40004, source="measured"),
            Limits(latency_ms=0.4),
            "conv-w8-d1-k3 int8: latency 0.40004 ms, limit 0.4",
        ),
        (
            Cost(2.5, 60, None, 1.0, "calibrated"),
            Limits(1.0, 20.0, 0.8),
            "conv-w8-d1-k3 int8: memory ~60 MiB, limit 20; file size 2.5 MiB, limit 1; latency ~1 ms, limit 0.8",
        ),
        (
            Cost(2.5, 60, None, 1.0, "assumed"),
            Limits(1.0, 20.0),
            "conv-w8-d1-k3 int8: memory at least 60 MiB, limit 20; file size at least 2.5 MiB, limit 1",
        ),
    ],
)
def test_a_rejection_says_every_limit_worst_first_and_how_its_figure_is_known(
    cost: Cost, limits: Limits, text: str
) -> None:
    _, (rejected,) = fitting([Option(A, "int8", cost)], limits)
    assert str(rejected) == text
    assert (rejected.limit, rejected.needs, rejected.allowed) == rejected.excesses[0][:3]


def test_nothing_can_be_near_a_limit_of_zero() -> None:
    assert Excess("latency_ms", 0.1, 0.0, "bound").overshoot == math.inf


def test_an_expected_latency_without_its_source_is_refused() -> None:
    with pytest.raises(ValueError, match="needs its source"):
        Cost(latency_ms=1.0)


# -- nothing fits ------------------------------------------------------------------------------------------------------


@given(st.lists(options, min_size=1, max_size=8), limits_, margins)
def test_the_nearest_miss_really_passes_with_the_values_it_names(
    given_: list[Option], limits: Limits, margin: float
) -> None:
    _, rejected = fitting(given_, limits, margin=margin)
    assume(rejected)
    miss = nearest_miss(rejected, limits)
    assert miss is not None
    assert fitting([miss.option], miss.passing, margin=margin)[0] == (miss.option,)
    assert fitting([miss.option], miss.passing)[0] == (miss.option,)
    assert miss.limit in miss.raised
    assert miss.value == miss.raised[miss.limit]
    for excess in miss.excesses:
        # a round number, hardly above what is needed
        assert excess.needs <= miss.raised[excess.limit] <= excess.needs * 1.0101
    # the text holds the very values
    assert [float(part.split(" = ")[1]) for part in miss.fix.split(" and ")] == list(miss.raised.values())


def test_a_miss_names_the_option_and_the_value_that_would_pass() -> None:
    near = Option(A, "int8", Cost(0.1, 30, 0.01, 0.6123, "calibrated"))
    far = Option(B, "int8", Cost(0.1, 30, 0.01, 0.7, "calibrated"))
    limits = Limits(memory_mib=25.0, latency_ms=0.4)
    miss = nearest_miss(fitting([far, near], limits)[1], limits)
    assert miss is not None
    assert str(miss) == (
        "conv-w8-d1-k3 int8: latency ~0.612 ms, limit 0.4; memory ~30 MiB, limit 25; "
        "latency_ms = 0.613 and memory_mib = 30 would pass"
    )
    assert (miss.limit, miss.value, miss.option) == ("latency_ms", 0.613, near)
    assert miss.passing == Limits(None, 30.0, 0.613)


def test_a_miss_also_names_the_limit_that_only_the_margin_let_pass() -> None:
    limits = Limits(memory_mib=25.0, latency_ms=0.4)
    option = Option(A, "int8", Cost(None, 30, None, 0.41, "calibrated"))
    _, rejected = fitting([option], limits, margin=1.1)
    assert [excess.limit for excess in rejected[0].excesses] == ["memory_mib"]
    miss = nearest_miss(rejected, limits)
    assert miss is not None
    assert miss.raised == {"memory_mib": 30.0, "latency_ms": 0.41}


def test_a_bound_promises_nothing() -> None:
    limits = Limits(latency_ms=0.4)
    miss = nearest_miss(fitting([Option(A, "fp16", Cost(latency_bound_ms=0.5))], limits)[1], limits)
    assert str(miss).endswith("latency_ms = 0.5 at the least")


def test_what_nobody_looked_at_is_the_farthest_and_never_the_nearest_miss() -> None:
    limits = Limits(latency_ms=0.1)
    seen = [Option(A, "fp32", Cost(latency_ms=ms, source="measured")) for ms in (0.9, 0.5)]
    cut = Option(B, "fp32", Cost(latency_bound_ms=0.3, is_cut_off=True))
    _, rejected = fitting([cut, *seen], limits)
    assert [each.option for each in rejected] == [seen[1], seen[0], cut]
    miss = nearest_miss(rejected, limits)
    assert miss is not None
    assert miss.option == seen[1]
    assert nearest_miss(rejected[2:], limits) is None


def test_where_nothing_was_rejected_nothing_is_missed() -> None:
    assert nearest_miss((), Limits(latency_ms=1.0)) is None


# -- who gets a trial --------------------------------------------------------------------------------------------------

archs_ = st.one_of(
    st.sampled_from(POOL),
    st.builds(ConvArch, st.sampled_from((8, 16, 24)), st.sampled_from((1, 2)), st.just(3), st.just(True)),
)
budgets = st.dictionaries(
    st.sampled_from(["a", "b", "c", "d", "e", "f"]), st.lists(archs_, unique=True, max_size=8), min_size=1
)


def needed_trials(targets: dict[str, list[Arch]], trials: int) -> int | None:
    """The number that the refusal of too few trials proposes; None where they are enough."""
    try:
        ladder(targets, capacity, trials)
    except InputError as error:
        return int((error.fix or "").removeprefix("trials = "))
    return None


@given(budgets, st.integers(1, 12), st.booleans())
def test_the_ladder_covers_every_target_within_the_number_of_trials(
    targets: dict[str, list[Arch]], trials: int, flat: bool
) -> None:
    asked: list[Arch] = []

    def size(arch: Arch) -> float:
        asked.append(arch)
        return 1.0 if flat else capacity(arch)

    everything = {arch for archs in targets.values() for arch in archs}
    needed = needed_trials(targets, trials)
    assert needed is None or trials < needed <= sum(bool(archs) for archs in targets.values())
    trials = needed or trials
    picked = ladder(targets, size, trials)
    assert len(asked) == len(set(asked))
    assert len(picked) == len(set(picked)) == min(trials, len(everything))
    assert set(picked) <= everything
    for archs in targets.values():
        assert not archs or set(picked) & set(archs)
    assert picked == ladder(targets, lambda arch: 1.0 if flat else capacity(arch), trials)


@given(budgets)
def test_as_many_trials_as_targets_are_always_enough(targets: dict[str, list[Arch]]) -> None:
    assert len(ladder(targets, capacity, len(targets))) <= len(targets)


def test_one_target_tries_the_widest_of_every_shape_first() -> None:
    picked = ladder({"a": POOL}, capacity, 5)
    assert list(map(str, picked)) == [
        "conv-w32-d2-k5",
        "conv-w32-d1-k5",
        "conv-w32-d2-k3",
        "conv-w32-d1-k3",
        "conv-w24-d2-k5",
    ]


def test_targets_take_turns_at_the_upper_end_of_their_own_budgets() -> None:
    def fits(width: int) -> list[Arch]:
        return [arch for arch in POOL if arch.width <= width]

    picked = ladder({"large": fits(32), "small": fits(8), "medium": fits(16)}, capacity, 6)
    assert sorted(arch.width for arch in picked) == [8, 8, 16, 16, 32, 32]


def test_targets_of_the_same_budget_share_their_trials() -> None:
    assert set(ladder({"a": POOL, "b": POOL}, capacity, 4)) == set(ladder({"a": POOL}, capacity, 4))
    # the largest that both can carry comes before the larger ones that only one of them can
    both = [arch for arch in POOL if arch.kernel == 3]
    picked = ladder({"a": POOL, "b": both}, capacity, 2)
    assert all(arch.kernel == 3 and arch.width == 32 for arch in picked)


def test_targets_without_anything_in_common_need_a_trial_each() -> None:
    with pytest.raises(InputError, match="1 trial cannot cover 2 targets") as caught:
        ladder({"a": [A], "b": [B, C]}, capacity, 1)
    assert caught.value.evidence == "architectures that fit: a 1, b 2"
    assert caught.value.fix == "trials = 2"


def test_transformers_of_other_heads_are_other_shapes() -> None:
    texts = [TextArch(w, 1, heads=h) for w in (32, 64) for h in (2, 4)]
    assert {arch.width for arch in ladder({"a": texts}, lambda arch: arch.width, 2)} == {64}


# -- rankings ----------------------------------------------------------------------------------------------------------

scores_ = st.dictionaries(st.sampled_from(POOL), st.floats(0, 1) | st.just(math.nan), min_size=1)


@given(scores_, budgets, st.integers(1, 5))
def test_finalists_are_the_best_ranked_that_fit(
    ranking: dict[Arch, float], targets: dict[str, list[Arch]], k: int
) -> None:
    found = finalists(ranking, targets, k)
    assert found.keys() == targets.keys()
    for target, archs in targets.items():
        known = [arch for arch in archs if arch in ranking]
        best = found[target]
        assert len(best) == len(set(best)) == min(k, len(known))
        worth = [-math.inf if math.isnan(ranking[arch]) else ranking[arch] for arch in best]
        assert worth == sorted(worth, reverse=True)
        for arch in set(known) - set(best):
            assert math.isnan(ranking[arch]) or ranking[arch] <= worth[-1]
            if ranking[arch] == worth[-1]:
                assert known.index(arch) > known.index(best[-1])


def test_of_equal_ranks_the_cheaper_comes_first() -> None:
    assert ranked([B, A, C], {A: 0.5, B: 0.5, C: 0.6}) == (C, B, A)


@given(st.lists(options, max_size=8))
def test_architectures_are_ordered_by_their_cheapest_precision(given_: list[Option]) -> None:
    def latency(arch: Arch) -> float:
        each = [option.cost for option in given_ if option.arch == arch]
        return min((c.latency_bound_ms or 0.0) if c.latency_ms is None else c.latency_ms for c in each)

    found = by_cost(given_)
    assert set(found) == {option.arch for option in given_}
    assert len(found) == len(set(found))
    assert [latency(arch) for arch in found] == sorted(latency(arch) for arch in found)
    assert found == by_cost(reversed(given_))


@given(st.lists(st.sampled_from(POOL), unique=True), st.sets(st.sampled_from(POOL)))
def test_after_failures_what_is_cheaper_follows_the_most_costly_first(archs: list[Arch], tried: set[Arch]) -> None:
    left = next_smaller(archs, tried)
    assert tried.isdisjoint(left)
    places = [archs.index(arch) for arch in left]
    first = min((archs.index(arch) for arch in tried if arch in archs), default=len(archs))
    assert places == list(range(first - 1, -1, -1))


@given(st.lists(st.builds(Candidate, options, st.floats(0, 1) | st.just(math.nan), st.booleans()), max_size=10))
def test_what_is_kept_passes_and_is_the_most_accurate_that_does(candidates: list[Candidate]) -> None:
    best = most_accurate(candidates)
    passing = [candidate for candidate in candidates if candidate.passes]
    if not passing:
        assert best is None
        return
    assert best is not None
    assert best.passes
    numbers = [candidate.metric for candidate in passing if not math.isnan(candidate.metric)]
    assert best.metric == max(numbers) if numbers else math.isnan(best.metric)


def test_of_equally_accurate_candidates_the_faster_is_kept() -> None:
    slow, fast = (
        Candidate(Option(A, name, Cost(latency_ms=ms, source="measured")), 0.9, True)
        for name, ms in (("fp32", 0.3), ("int8", 0.2))
    )
    assert most_accurate([slow, fast]) == fast
    assert most_accurate([slow, fast._replace(passes=False)]) == slow


def test_the_rank_follows_from_the_teacher_unless_it_is_given() -> None:
    assert resolve_rank("auto", supernet=True) == "supernet"
    assert resolve_rank("auto", supernet=False) == "trials"
    for supernet in (True, False):
        assert resolve_rank("capacity", supernet=supernet) == "capacity"
        assert resolve_rank("trials", supernet=supernet) == "trials"
    with pytest.raises(InputError, match="no shared weights") as caught:
        resolve_rank("supernet", supernet=False)
    assert caught.value.where == "student.choice.rank"
    assert caught.value.fix == 'teacher.strategy = "generic", or rank = "trials"'


def test_choosing_needs_no_torch() -> None:
    code = "import sys; import distill.students.choose, distill.students.halving; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_options_print_as_two_words() -> None:
    assert str(Option(parse_arch("conv-w24-d2-k3"), "int8", Cost())) == "conv-w24-d2-k3 int8"
