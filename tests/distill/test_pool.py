"""Pools of architectures: what is in them, what is refused, and what the limits of the targets leave."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.data import InputSpec
from distill.students.arch import Arch, ConvArch, TextArch, default_arch, parse_arch, teacher_arch
from distill.students.pool import (
    Cost,
    Limits,
    family_pool,
    kind_of,
    largest,
    parse_pool,
    restrict,
    stage_boundaries,
    student_pool,
)
from profiles.errors import InputError

IMAGES = InputSpec("image", (1, 28, 28), (0.286,), (0.353,))
TOKENS = InputSpec("tokens", (12,), vocabulary=40, pad_id=0)


def spec_of(arch: Arch) -> InputSpec:
    return IMAGES if isinstance(arch, ConvArch) else TOKENS


def words(pool: tuple[Arch, ...]) -> list[str]:
    return [str(arch) for arch in pool]


def last(arch: Arch) -> int:
    return arch.kernel or (arch.heads if isinstance(arch, TextArch) else 0)


conv_archs = st.builds(
    ConvArch,
    st.sampled_from(ConvArch.widths),
    st.sampled_from(ConvArch.depths),
    st.sampled_from(ConvArch.kernels),
    st.booleans(),
)
textc_archs = st.builds(
    TextArch,
    st.sampled_from(TextArch.widths),
    st.sampled_from(TextArch.depths),
    kernel=st.sampled_from(TextArch.kernels),
)
text_archs = st.tuples(
    st.sampled_from(TextArch.widths), st.sampled_from(TextArch.depths), st.sampled_from(TextArch.head_counts)
).map(lambda t: TextArch(t[0], t[1], heads=t[2] if t[0] % t[2] == 0 else 1))
same_family = st.one_of(st.tuples(conv_archs, conv_archs), st.tuples(text_archs, st.one_of(text_archs, textc_archs)))


@given(same_family)
def test_the_familys_own_pool_is_small_sorted_and_not_larger_than_the_teacher(pair: tuple[Arch, Arch]) -> None:
    teacher, like = pair
    pool = family_pool(teacher, spec_of(like), like=like)
    assert 1 <= len(pool) < 60
    assert like in pool
    assert len(set(pool)) == len(pool)
    assert [(a.width, a.depth, last(a)) for a in pool] == sorted((a.width, a.depth, last(a)) for a in pool)
    assert {kind_of(arch) for arch in pool} == {kind_of(like)}
    for arch in pool:
        assert parse_arch(str(arch)) == arch
        if arch != like:
            assert arch.width <= teacher.width
            assert arch.depth <= (max(2, teacher.depth) if isinstance(like, ConvArch) else teacher.depth)
    most = largest(pool)
    assert most.width == max(arch.width for arch in pool)
    assert most.depth == max(arch.depth for arch in pool)
    assert most.kernel == max(arch.kernel for arch in pool)
    assert kind_of(most) == kind_of(like)


@given(
    like=st.one_of(conv_archs, text_archs, textc_archs),
    widths=st.lists(st.integers(-4, 1100), min_size=1, max_size=4),
    depths=st.lists(st.integers(-1, 14), min_size=1, max_size=4),
    lasts=st.lists(st.integers(-1, 18), min_size=1, max_size=4),
)
@settings(max_examples=300)
def test_given_choices_are_combined_or_refused_with_their_key(
    like: Arch, widths: list[int], depths: list[int], lasts: list[int]
) -> None:
    third = "heads" if kind_of(like) == "text" else "kernels"
    spec = spec_of(like)
    teacher = parse_arch(teacher_arch(None, spec))
    prefix, letter = kind_of(like), "h" if third == "heads" else "k"

    def valid(width: int, depth: int, value: int) -> bool:
        try:
            parse_arch(f"{prefix}-w{width}-d{depth}-{letter}{value}")
        except InputError:
            return False
        return True

    allowed = type(like)
    ranges = (allowed.widths, allowed.depths, TextArch.head_counts if third == "heads" else allowed.kernels)
    in_range = all(
        all(value in r for value in values) for values, r in zip((widths, depths, lasts), ranges, strict=True)
    )
    expected = [f"{prefix}-w{w}-d{d}-{letter}{v}" for w, d, v in product(widths, depths, lasts) if valid(w, d, v)]
    choices = {"widths": widths, "depths": depths, third: lasts}
    if in_range and expected:
        assert sorted(words(family_pool(teacher, spec, like=like, **choices))) == sorted(set(expected))
        return
    with pytest.raises(InputError) as caught:
        family_pool(teacher, spec, like=like, **choices)
    assert (caught.value.where or "").startswith("teacher.generic.")
    assert caught.value.fix


def test_default_pools_of_the_default_teachers() -> None:
    conv = family_pool(parse_arch("conv-w32-d1-k3"), IMAGES, like=parse_arch("conv-w8-d1-k3"))
    assert words(conv) == [
        f"conv-w{w}-d{d}-k{k}" for w in (8, 12, 16, 24, 32) for d in (1, 2) for k in (3, 5)
    ]  # fmt: skip
    inverted = family_pool(parse_arch("conv-w32-d1-k3"), IMAGES, like=parse_arch("convi-w8-d1-k3"))
    assert [word.replace("convi", "conv") for word in words(inverted)] == words(conv)
    text = family_pool(parse_arch("text-w128-d1-h8"), TOKENS, like=parse_arch("text-w64-d1-h4"))
    assert words(text) == [
        "text-w32-d1-h2",
        "text-w64-d1-h2",
        "text-w64-d1-h4",
        "text-w96-d1-h2",
        "text-w96-d1-h4",
        "text-w128-d1-h2",
        "text-w128-d1-h4",
        "text-w128-d1-h8",
    ]
    textc = family_pool(parse_arch("text-w64-d1-h8"), TOKENS, like=parse_arch("textc-w64-d2-k5"))
    assert words(textc) == [
        "textc-w32-d1-k3",
        "textc-w32-d1-k5",
        "textc-w64-d1-k3",
        "textc-w64-d1-k5",
        "textc-w64-d2-k5",
    ]


@pytest.mark.parametrize("spec", [IMAGES, TOKENS], ids=["images", "texts"])
@pytest.mark.parametrize("size", ["small", "medium", "large"])
def test_every_default_student_of_its_kind_is_in_the_default_pool(spec: InputSpec, size: str) -> None:
    like = parse_arch(default_arch(None, size, spec))  # type: ignore[arg-type]
    assert like in family_pool(parse_arch(teacher_arch(None, spec)), spec, like=like)


def test_a_teacher_narrower_than_the_grid_is_its_own_upper_end() -> None:
    conv = family_pool(parse_arch("conv-w4-d1-k3"), IMAGES, like=parse_arch("conv-w4-d1-k3"), depths=[1], kernels=[3])
    assert words(conv) == ["conv-w4-d1-k3"]
    text = family_pool(parse_arch("text-w24-d1-h3"), TOKENS, like=parse_arch("text-w24-d1-h3"), depths=[1])
    assert words(text) == ["text-w24-d1-h1"]


def test_with_choices_of_the_recipe_the_student_itself_need_not_be_a_member() -> None:
    pool = family_pool(
        parse_arch("conv-w32-d1-k3"), IMAGES, like=parse_arch("conv-w20-d1-k3"), widths=[8, 16], kernels=[3, 3]
    )
    assert words(pool) == ["conv-w8-d1-k3", "conv-w8-d2-k3", "conv-w16-d1-k3", "conv-w16-d2-k3"]


def test_heads_that_do_not_divide_a_width_are_left_out_until_nothing_is_left() -> None:
    teacher, like = parse_arch("text-w256-d4-h8"), parse_arch("text-w64-d2-h4")
    pool = family_pool(teacher, TOKENS, like=like, widths=[16, 24], depths=[1], heads=[3, 4])
    assert words(pool) == ["text-w16-d1-h4", "text-w24-d1-h3", "text-w24-d1-h4"]
    with pytest.raises(InputError, match="no number of heads") as caught:
        family_pool(teacher, TOKENS, like=like, widths=[16, 32], heads=[3, 5])
    assert caught.value.where == "teacher.generic.heads"
    assert caught.value.evidence == "heads 3, 5; widths 16, 32"
    assert caught.value.fix == "heads = [1, 2, 4, 8, 16] divide a width of 16"


@pytest.mark.parametrize(
    ("like", "choice", "where", "evidence", "fix"),
    [
        ("conv-w8-d1-k3", {"widths": [8, 10]}, "widths[1]", "4 to 512 in steps of 4", "8 is the nearest"),
        ("conv-w8-d1-k3", {"depths": [0]}, "depths[0]", "1 to 8", "1 is the nearest"),
        ("conv-w8-d1-k3", {"kernels": [4]}, "kernels[0]", "3 to 7 in steps of 2", "3 is the nearest"),
        ("text-w64-d2-h4", {"heads": [32]}, "heads[0]", "1 to 16", "16 is the nearest"),
        ("conv-w8-d1-k3", {"heads": [2]}, "heads", "student is conv-w8-d1-k3", "kernels = [3, 5]"),
        ("textc-w64-d2-k5", {"heads": [2]}, "heads", "student is textc-w64-d2-k5", "kernels = [3, 5]"),
        ("text-w64-d2-h4", {"kernels": [3]}, "kernels", "student is text-w64-d2-h4", "heads = [2, 4, 8]"),
    ],
)
def test_a_choice_that_is_out_of_range_or_of_another_kind_is_refused(
    like: str, choice: dict[str, list[int]], where: str, evidence: str, fix: str
) -> None:
    arch = parse_arch(like)
    with pytest.raises(InputError) as caught:
        family_pool(parse_arch(teacher_arch(None, spec_of(arch))), spec_of(arch), like=arch, **choice)
    assert caught.value.where == f"teacher.generic.{where}"
    assert evidence in (caught.value.evidence or "")
    assert caught.value.fix == fix


def test_named_pools_are_sorted_without_duplicates() -> None:
    pool = parse_pool(["conv-w16-d1-k3", "conv-w8-d2-k5", "conv-w16-d1-k3", "conv-w8-d1-k5"], IMAGES)
    assert words(pool) == ["conv-w8-d1-k5", "conv-w8-d2-k5", "conv-w16-d1-k3"]


@pytest.mark.parametrize(
    ("named", "entry", "message"),
    [
        (["conv-w8-d1-k3", "convi-w12-d1-k3"], 1, '"convi" and "conv" cannot share'),
        (["conv-w8-d1-k3", "conv-w9-d1-k3"], 1, "out of range"),
        (["vit-w8"], 0, "names no architecture"),
        (["conv-w8-d1-k3", "text-w64-d2-h4"], 1, "reads texts"),
    ],
)
def test_a_named_pool_is_refused_at_the_entry_that_is_wrong(named: list[str], entry: int, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse_pool(named, IMAGES)
    assert caught.value.where == f"teacher.generic.archs[{entry}]"
    assert caught.value.fix


def test_the_fix_of_mixed_kinds_is_an_architecture_of_the_first_kind() -> None:
    for named in (["text-w64-d2-h4", "textc-w72-d3-k5"], ["textc-w64-d2-k5", "text-w72-d3-h4"]):
        with pytest.raises(InputError, match="cannot share") as caught:
            parse_pool(named, TOKENS)
        proposed = (caught.value.fix or "").split('"')[1]
        assert kind_of(parse_arch(proposed)) == kind_of(parse_arch(named[0]))


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ("conv-w8-d2-k3 conv-w16-d1-k5", "conv-w16-d2-k5"),
        ("convi-w8-d2-k3 convi-w16-d1-k5", "convi-w16-d2-k5"),
        ("textc-w32-d2-k3 textc-w16-d1-k7", "textc-w32-d2-k7"),
        ("text-w24-d3-h3 text-w32-d1-h2", "text-w32-d3-h2"),
    ],
)
def test_the_largest_has_the_largest_of_each_and_heads_that_divide(members: str, expected: str) -> None:
    assert str(largest([parse_arch(word) for word in members.split()])) == expected


def test_boundaries_lie_between_stages_or_blocks() -> None:
    assert stage_boundaries(parse_arch("conv-w32-d3-k3"), IMAGES) == 2
    assert stage_boundaries(parse_arch("conv-w32-d1-k3"), InputSpec("image", (1, 8, 8), (0.5,), (0.5,))) == 1
    assert stage_boundaries(parse_arch("text-w64-d4-h4"), TOKENS) == 3
    assert stage_boundaries(parse_arch("text-w64-d1-h4"), TOKENS) == 0


POOL = tuple(parse_arch(f"conv-w{w}-d{d}-k3") for w in (8, 16, 32) for d in (1, 2))


def cost(arch: Arch) -> Mapping[str, Cost]:
    """A figure that grows with the architecture; the second target is twice as slow and keeps its memory to itself."""
    size = arch.width * arch.depth
    return {"near": Cost(size / 8, size / 4, size / 16), "far": Cost(size / 8, None, size / 8)}


def test_what_at_least_one_target_can_carry_stays() -> None:
    kept, excluded = restrict(POOL, cost, {"near": Limits(file_mib=2.0), "far": Limits(latency_ms=4.0, memory_mib=1)})
    assert words(kept) == ["conv-w8-d1-k3", "conv-w8-d2-k3", "conv-w16-d1-k3", "conv-w16-d2-k3", "conv-w32-d1-k3"]
    assert [str(entry) for entry in excluded] == [
        "near: file_size_mib 2 excludes 3 of 6 (the smallest of them needs 4 MiB, conv-w16-d2-k3)",
        "far: latency_ms 4 excludes 1 of 6 (the smallest of them needs 8 ms, conv-w32-d2-k3)",
    ]
    assert words(excluded[0].archs) == ["conv-w16-d2-k3", "conv-w32-d1-k3", "conv-w32-d2-k3"]


def test_a_cost_at_the_limit_fits_and_one_that_is_not_known_excludes_nothing() -> None:
    assert restrict(POOL, cost, {"near": Limits(file_mib=8.0)}) == (POOL, ())
    assert restrict(POOL, cost, {"far": Limits(memory_mib=0.001)}) == (POOL, ())
    assert restrict(POOL, cost, {"near": Limits(latency_ms=0.01), "far": Limits()})[0] == POOL
    assert restrict(POOL, cost, {}) == (POOL, ())


def test_nothing_left_says_which_limit_of_which_target_excludes_what() -> None:
    limits = {"line3": Limits(memory_mib=1.5, latency_ms=1), "line4": Limits(file_mib=1.5, latency_ms=0.7)}

    def on_the_line(arch: Arch) -> Mapping[str, Cost]:
        # line4: small files are slow, so that no limit alone excludes everything
        size = arch.width * arch.depth
        return {
            "line3": Cost(memory_mib=size / 5, latency_bound_ms=size / 16),
            "line4": Cost(size / 16, None, 16 / size),
        }

    with pytest.raises(InputError, match="no target can carry any of the 6") as caught:
        restrict(POOL, on_the_line, limits)
    assert caught.value.where == "teacher.generic"
    assert [line.strip() for line in (caught.value.evidence or "").splitlines()] == [
        "line3: memory_mib 1.5 excludes all 6 (smallest needs 1.6 MiB, conv-w8-d1-k3)",
        "line3: latency_ms 1 excludes 3 of 6 (the smallest of them needs 2 ms, conv-w16-d2-k3)",
        "line4: file_size_mib 1.5 excludes 3 of 6 (the smallest of them needs 2 MiB, conv-w16-d2-k3)",
        "line4: latency_ms 0.7 excludes 3 of 6 (the smallest of them needs 1 ms, conv-w8-d2-k3)",
    ]
    assert "within_limits = false" in (caught.value.fix or "")


def test_a_cost_just_above_its_limit_does_not_print_as_the_limit() -> None:
    arch = POOL[0]
    with pytest.raises(InputError) as caught:
        restrict([arch], lambda _: {"a": Cost(file_mib=2.0000125)}, {"a": Limits(file_mib=2.0)})
    assert "excludes all 1 (smallest needs 2.00001 MiB" in (caught.value.evidence or "")


@given(
    costs=st.lists(
        st.tuples(*[st.one_of(st.none(), st.floats(0, 10)) for _ in range(6)]), min_size=len(POOL), max_size=len(POOL)
    ),
    limits=st.tuples(*[st.one_of(st.none(), st.floats(0.1, 10)) for _ in range(6)]),
)
def test_restriction_agrees_with_asking_every_target_about_every_member(
    costs: list[tuple[float | None, ...]], limits: tuple[float | None, ...]
) -> None:
    table = {arch: {"a": Cost(*entry[:3]), "b": Cost(*entry[3:])} for arch, entry in zip(POOL, costs, strict=True)}
    expected = tuple(
        arch
        for arch, entry in zip(POOL, costs, strict=True)
        if any(
            all(v is None or m is None or v <= m for v, m in zip(entry[s], limits[s], strict=True))
            for s in (slice(3), slice(3, 6))
        )
    )
    asked: list[Arch] = []

    def ask(arch: Arch) -> Mapping[str, Cost]:
        asked.append(arch)
        return table[arch]

    bounds = {"a": Limits(*limits[:3]), "b": Limits(*limits[3:])}
    if expected:
        kept, excluded = restrict(POOL, ask, bounds)
        assert kept == expected
        assert all(entry.needs > entry.allowed and entry.smallest in entry.archs for entry in excluded)
        gone = set(POOL) - set(kept)
        assert gone <= {arch for entry in excluded for arch in entry.archs}
    else:
        with pytest.raises(InputError):
            restrict(POOL, ask, bounds)
    assert asked == list(POOL)


def test_a_kind_without_a_teacher_has_the_familys_whole_grid() -> None:
    for kind, spec, widths in (
        ("conv", IMAGES, {8, 12, 16, 24, 32, 48, 64}),
        ("convi", IMAGES, {8, 12, 16, 24, 32, 48, 64}),
        ("text", TOKENS, {32, 64, 96, 128, 192, 256}),
        ("textc", TOKENS, {32, 64, 96, 128, 192, 256}),
    ):
        pool = student_pool(kind, spec)
        assert {kind_of(arch) for arch in pool} == {kind}
        assert {arch.width for arch in pool} == widths
        assert {arch.depth for arch in pool} == {1, 2, 3, 4}
        assert len(pool) < 60


@given(st.one_of(conv_archs, text_archs))
def test_a_kind_beside_a_teacher_of_its_family_stays_within_the_teachers_size(teacher: Arch) -> None:
    spec = spec_of(teacher)
    for kind in ("conv", "convi") if isinstance(teacher, ConvArch) else ("text", "textc"):
        expected = family_pool(teacher, spec, like=kind)
        if len(expected) == 1:  # one narrow transformer layer leaves nothing to choose
            with pytest.raises(InputError, match="a pool of one"):
                student_pool(kind, spec, teacher=teacher)
            continue
        pool = student_pool(kind, spec, teacher=teacher)
        assert pool == expected
        assert all(arch.width <= teacher.width for arch in pool)


def test_kinds_and_architectures_may_be_mixed_and_every_choice_is_for_the_kinds_that_have_it() -> None:
    pool = student_pool(["convi", "conv", "conv-w20-d1-k7"], IMAGES, widths=[16, 8], depths=[1], kernels=[3])
    assert words(pool) == ["conv-w8-d1-k3", "convi-w8-d1-k3", "conv-w16-d1-k3", "convi-w16-d1-k3", "conv-w20-d1-k7"]
    texts = student_pool(["text", "textc"], TOKENS, widths=[64], depths=[2], kernels=[5, 7], heads=[4])
    assert words(texts) == ["text-w64-d2-h4", "textc-w64-d2-k5", "textc-w64-d2-k7"]
    assert words(student_pool(["conv-w8-d1-k3", "conv-w16-d1-k3", "conv-w8-d1-k3"], IMAGES)) == [
        "conv-w8-d1-k3",
        "conv-w16-d1-k3",
    ]


@given(
    st.lists(st.sampled_from(["conv", "convi", "conv-w8-d1-k3", "convi-w8-d1-k3", "conv-w64-d8-k7"]), min_size=1),
    st.booleans(),
)
def test_pools_that_share_weights_are_of_one_kind(entries: list[str], shared: bool) -> None:
    kinds = {entry.partition("-")[0] for entry in entries}
    if shared and len(kinds) > 1:
        with pytest.raises(InputError, match="cannot share their weights") as caught:
            student_pool(entries, IMAGES, shared=True)
        assert f'pool = "{entries[0].partition("-")[0]}"' in (caught.value.fix or "")
    elif len(set(entries)) > 1 or set(entries) & {"conv", "convi"}:
        pool = student_pool(entries, IMAGES, shared=shared)
        assert {kind_of(arch) for arch in pool} == kinds
        assert {entry for entry in entries if "-" in entry} <= set(words(pool))
    else:
        with pytest.raises(InputError, match="a pool of one"):
            student_pool(entries, IMAGES, shared=shared)


@pytest.mark.parametrize(
    ("pool", "choices", "where", "message", "fix"),
    [
        ("conw", {}, "student.pool", '"conw" is neither a kind nor', 'did you mean "conv"?'),
        (["conv", "vit-w8"], {}, "student.pool[1]", '"vit-w8" is neither', "such as conv-w24-d2-k3"),
        (["conv", "conv-w9-d1-k3"], {}, "student.pool[1]", "width 9 is out of range", "width 8 is the nearest"),
        ("text", {}, "student.pool", 'the "text" family reads texts', '"conv" or "convi", or architectures such as'),
        (["conv", "textc-w64-d2-k5"], {}, "student.pool[1]", "reads texts", '"conv" or "convi"'),
        ("conv-w8-d1-k3", {}, "student.pool", "a pool of one leaves", 'arch = "conv-w8-d1-k3" in place of the pool'),
        (["conv-w8-d1-k3"], {}, "student.pool", "a pool of one leaves", 'arch = "conv-w8-d1-k3" in place of the pool'),
        (
            "conv",
            {"widths": [8], "depths": [1], "kernels": [3]},
            "student.pool",
            "a pool of one leaves",
            'arch = "conv-w8-d1-k3" in place of the pool',
        ),
        ([], {}, "student.pool", "a pool of none", 'pool = "conv"'),
        ("conv", {"heads": [2]}, "student.choice.heads", 'kind "conv" have no heads', "kernels = [3, 5]"),
        ("conv", {"widths": [8, 9]}, "student.choice.widths[1]", "9 is out of range", "8 is the nearest"),
        (
            ["conv-w8-d1-k3", "conv-w8-d1-k5"],
            {"depths": [1]},
            "student.choice.depths",
            "one by one",
            'leave depths out, or pool = "conv"',
        ),
        (
            ["conv", "convi"],
            {"widths": list(range(4, 260, 4))},
            "student.choice",
            "the pool has 1024 architectures",
            "fewer widths, depths or kernels",
        ),
    ],
)
def test_pools_of_students_that_cannot_be_are_refused_at_their_key(
    pool: str | list[str], choices: dict[str, list[int]], where: str, message: str, fix: str
) -> None:
    with pytest.raises(InputError) as caught:
        student_pool(pool, IMAGES, **choices)
    assert caught.value.where == where
    assert message in caught.value.message
    assert fix in (caught.value.fix or "")


def test_a_kind_of_the_other_input_gets_the_right_kinds_proposed() -> None:
    with pytest.raises(InputError, match="reads images") as caught:
        student_pool("convi", TOKENS)
    assert caught.value.fix == '"text" or "textc", or architectures such as text-w64-d2-h4'
    with pytest.raises(InputError, match="have no kernels") as caught:
        student_pool("text", TOKENS, kernels=[3])
    assert caught.value.where == "student.choice.kernels"
    assert caught.value.evidence == 'the pool is of kind "text"'


def test_too_many_named_architectures_are_refused() -> None:
    named = [str(ConvArch(width, depth, 3)) for width in range(4, 260, 4) for depth in range(1, 6)]
    with pytest.raises(InputError, match="the pool has 320") as caught:
        student_pool(named, IMAGES)
    assert (caught.value.where, caught.value.fix) == ("student.pool", "name 256 of them")


def test_pools_need_no_torch() -> None:
    code = "import sys; from distill.students import family_pool, restrict; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
