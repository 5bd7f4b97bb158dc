"""Choosing students under budgets: pure functions on plain data, so that every decision can be explained and tested.

No torch and no devices here: what a student costs on a target comes in as `Option`s, what it is worth as numbers. The
way through the functions is `fitting` (what a target's limits leave), `by_cost`, then either `ladder` and
`halving.halve` (short trainings) or `finalists` (another ranking), `most_accurate` of what was trained in full and
measured, `next_smaller` where all of that is over a limit, and `nearest_miss` where nothing is left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, Decimal
from typing import Literal, NamedTuple

from distill.students.arch import Arch, TextArch
from distill.students.pool import Cost, Limits, Source, above, kind_of
from profiles.errors import InputError

Rank = Literal["supernet", "trials", "capacity"]

_NAMES = {"latency_ms": ("latency", "ms"), "memory_mib": ("memory", "MiB"), "file_size_mib": ("file size", "MiB")}
"""What a limit's recipe key is called in a sentence, and its unit."""
_FIELDS = {"latency_ms": "latency_ms", "memory_mib": "memory_mib", "file_size_mib": "file_mib"}
"""The field of `Limits` that holds it."""


@dataclass(frozen=True)
class Option:
    """One architecture in one precision (fp32, fp16, int8 ...), and what it needs on a target."""

    arch: Arch
    precision: str
    cost: Cost

    def __str__(self) -> str:
        return f"{self.arch} {self.precision}"


class Excess(NamedTuple):
    """One limit that an option exceeds. limit: its key in a recipe's `[[target]]`; source: how `needs` is known."""

    limit: str
    needs: float
    allowed: float
    source: Source

    @property
    def overshoot(self) -> float:
        """How many times the limit is needed, above 1."""
        return self.needs / self.allowed if self.allowed > 0 else math.inf

    def __str__(self) -> str:
        name, unit = _NAMES[self.limit]
        mark = {"bound": "at least ", "assumed": "~", "calibrated": "~", "measured": ""}[self.source]
        return f"{name} {mark}{above(self.needs, self.allowed)} {unit}, limit {self.allowed:g}"


class Rejected(NamedTuple):
    """An option that exceeds limits, the worst excess first."""

    option: Option
    excesses: tuple[Excess, ...]

    @property
    def limit(self) -> str:
        """The key of the limit that is exceeded most."""
        return self.excesses[0].limit

    @property
    def needs(self) -> float:
        """What the option needs of it."""
        return self.excesses[0].needs

    @property
    def allowed(self) -> float:
        """What the target allows of it."""
        return self.excesses[0].allowed

    @property
    def overshoot(self) -> float:
        """How many times the most exceeded limit is needed, above 1: how far the option is from fitting."""
        return self.excesses[0].overshoot

    def __str__(self) -> str:
        return f"{self.option}: {'; '.join(map(str, self.excesses))}"


class Miss(NamedTuple):
    """The option that is nearest to fitting a target that nothing fits.

    passing: the target's limits, raised just so far that it would fit. raised: those that were raised, by recipe key.
    """

    option: Option
    excesses: tuple[Excess, ...]
    passing: Limits
    raised: Mapping[str, float]

    @property
    def limit(self) -> str:
        """The key of the limit that is exceeded most."""
        return self.excesses[0].limit

    @property
    def value(self) -> float:
        """What that limit would have to be; other limits may have to be raised, too (see `raised`)."""
        return self.raised[self.limit]

    @property
    def fix(self) -> str:
        """The recipe keys and values that would let it pass."""
        return " and ".join(f"{key} = {_plain(value)}" for key, value in self.raised.items())

    def __str__(self) -> str:
        bound = any(excess.source == "bound" for excess in self.excesses)
        # what it needs at the least need not be enough
        return f"{Rejected(self.option, self.excesses)}; {self.fix} {'at the least' if bound else 'would pass'}"


class Candidate(NamedTuple):
    """One exported artefact of a student that was trained in full.

    option: with its measured cost, where the device is attached. metric: on validation. passes: whether it is within
    every limit that is known about it.
    """

    option: Option
    metric: float
    passes: bool


def fitting(
    options: Iterable[Option], limits: Limits, *, margin: float = 1.0
) -> tuple[tuple[Option, ...], tuple[Rejected, ...]]:
    """What a target's limits leave of the options, and what they reject.

    What is not known rejects nothing. A predicted latency (source "calibrated" or "assumed") may be up to `margin`
    times the limit, as predictions err and the measurement decides; a lower bound above the limit always rejects. A
    measured latency stands for itself: a bound above it is wrong.

    Returns:
        The options that fit, in the order given, and the others, nearest first: by how many times they need the limit
        that they exceed most. Those that were cut off come last, as how far they are is not known.
    """
    fits, rejected = list[Option](), list[Rejected]()
    for option in options:
        if excesses := _worst_first(option.cost, limits, margin):
            rejected.append(Rejected(option, excesses))
        else:
            fits.append(option)
    return tuple(fits), tuple(sorted(rejected, key=lambda entry: (entry.option.cost.is_cut_off, entry.overshoot)))


def by_cost(options: Iterable[Option]) -> tuple[Arch, ...]:
    """The architectures of options, cheapest first, each by its cheapest precision.

    By latency (expected, else its bound), then memory, file size and name; what is not known counts as nothing.
    """
    cheapest: dict[Arch, tuple[float, float, float]] = {}
    for option in options:
        key = _price(option)
        cheapest[option.arch] = min(key, cheapest.get(option.arch, key))
    return tuple(sorted(cheapest, key=lambda arch: (cheapest[arch], str(arch))))


def resolve_rank(rank: Literal["auto", "supernet", "trials", "capacity"], *, supernet: bool) -> Rank:
    """What `student.choice.rank` means for a recipe.

    Args:
        rank: the recipe's word.
        supernet: whether the pool shares trained weights (a teacher of strategy "generic").

    Raises:
        InputError: "supernet" without one.
    """
    if rank == "supernet" and not supernet:
        raise InputError(
            "there are no shared weights to rank the pool with",
            where="student.choice.rank",
            evidence='they come with a teacher of strategy "generic"',
            fix='teacher.strategy = "generic", or rank = "trials"',
        )
    if rank == "auto":
        return "supernet" if supernet else "trials"
    return rank


def ladder(targets: Mapping[str, Sequence[Arch]], capacity: Callable[[Arch], float], trials: int) -> tuple[Arch, ...]:
    """Which architectures get a short training, so that every target can compare some near the end of its budget.

    Of two networks that differ in their width alone, the wider is the better one sooner or later; which depth, kernel
    and kind is best at equal cost is what has to be tried. So a target prefers the largest of every shape (kind, depth,
    and kernel or heads), then the second largest, and so on; among those the ones that are as high on the lists of most
    targets, then the largest. First come trials that cover every target, shared by as many as possible, then the
    targets take turns, the one that has got least first. One trial serves every target that its architecture fits.

    Args:
        targets: by name, the architectures that fit, cheapest first (see `by_cost`); an empty list is passed over.
        capacity: what an architecture can learn, by any measure that grows with it (multiply-adds, or the accuracy with
            shared weights); asked once for each.
        trials: how many there may be over all targets.

    Returns:
        At most `trials` architectures, in the order in which they were picked; all, where no more fit.

    Raises:
        InputError: the targets have so little in common that more trials are needed to have one for each.
    """
    given = {target: tuple(dict.fromkeys(archs)) for target, archs in targets.items() if archs}
    sizes = {
        arch: _number(capacity(arch)) for arch in dict.fromkeys(arch for archs in given.values() for arch in archs)
    }
    rounds = {target: _rounds(archs, sizes) for target, archs in given.items()}
    tops = {target: {arch for arch, turn in found.items() if turn == 0} for target, found in rounds.items()}
    shared = {arch: sum(arch in top for top in tops.values()) for arch in sizes}

    def preferred(target: str) -> list[Arch]:
        turns = rounds[target]
        # sorted() is stable: among equals the cheaper comes first
        return sorted(given[target], key=lambda arch: (turns[arch], -shared[arch], -sizes[arch]))

    wishes = {target: preferred(target) for target in given}
    picked: dict[Arch, None] = {}
    got = dict.fromkeys(given, 0)

    def pick(target: str, arch: Arch) -> None:
        picked[arch] = None
        for other, top in tops.items():
            got[other] += other == target or arch in top

    while uncovered := [target for target, archs in given.items() if picked.keys().isdisjoint(archs)]:
        # the tightest budget has least to choose from, and what fits it mostly fits the others
        tightest = min(uncovered, key=lambda target: len(given[target]))
        pick(tightest, max(wishes[tightest], key=lambda arch: sum(arch in given[target] for target in uncovered)))
    if len(picked) > trials:
        raise InputError(
            f"{trials} trial{'s' if trials > 1 else ''} cannot cover {len(given)} targets",
            where="student.choice.trials",
            evidence="architectures that fit: " + ", ".join(f"{name} {len(archs)}" for name, archs in given.items()),
            fix=f"trials = {len(picked)}",
        )
    while len(picked) < trials and (wanting := [target for target in given if not picked.keys() >= set(given[target])]):
        target = min(wanting, key=lambda target: got[target])
        pick(target, next(arch for arch in wishes[target] if arch not in picked))
    return tuple(picked)


def finalists(
    ranking: Mapping[Arch, float], targets: Mapping[str, Sequence[Arch]], k: int
) -> dict[str, tuple[Arch, ...]]:
    """For every target its `k` best-ranked architectures at most, best first.

    Args:
        ranking: higher is better; nan is worst; what has no rank is left out.
        targets: by name, the architectures that fit, cheapest first (see `by_cost`): of equals the cheaper is better.
        k: students that a target may have trained in full.
    """
    return {target: ranked(archs, ranking)[:k] for target, archs in targets.items()}


def ranked(archs: Iterable[Arch], ranking: Mapping[Arch, float]) -> tuple[Arch, ...]:
    """The architectures that have a rank, best first; nan is worst; of equals the one given first."""
    known = [arch for arch in dict.fromkeys(archs) if arch in ranking]
    return tuple(sorted(known, key=lambda arch: -_number(ranking[arch])))


def next_smaller(archs: Sequence[Arch], tried: Iterable[Arch]) -> tuple[Arch, ...]:
    """What is left for a target when everything that was tried is over a limit: what is cheaper, the most costly first.

    Args:
        archs: those that fit the target, cheapest first (see `by_cost`).
        tried: trained in full and measured; those that do not fit the target by prediction play no part.
    """
    gone = set(tried)
    first = next((place for place, arch in enumerate(archs) if arch in gone), len(archs))
    return tuple(reversed(archs[:first]))


def most_accurate(candidates: Iterable[Candidate]) -> Candidate | None:
    """The best of the candidates that pass; of equals the cheaper, then the one given first; None where none passes."""
    passing = [candidate for candidate in candidates if candidate.passes]
    return min(passing, key=lambda entry: (-_number(entry.metric), _price(entry.option)), default=None)


def nearest_miss(rejected: Sequence[Rejected], limits: Limits) -> Miss | None:
    """The nearest of the rejected options, and the limits with which it would fit, in round numbers.

    Args:
        rejected: nearest first, as `fitting` returns them.
        limits: those that rejected them.

    Returns:
        None where nothing was rejected, or nothing but what nobody looked at.
    """
    option = next((entry.option for entry in rejected if not entry.option.cost.is_cut_off), None)
    if option is None:
        return None
    # without a margin: what is predicted above a limit is not promised to pass
    excesses = _worst_first(option.cost, limits, 1.0)
    raised = {excess.limit: _rounded_up(excess.needs) for excess in excesses}
    passing = replace(limits, **{_FIELDS[key]: value for key, value in raised.items()})
    return Miss(option, excesses, passing, raised)


def _worst_first(cost: Cost, limits: Limits, margin: float) -> tuple[Excess, ...]:
    return tuple(sorted(_excesses(cost, limits, margin), key=lambda excess: -excess.overshoot))


def _excesses(cost: Cost, limits: Limits, margin: float) -> Iterable[Excess]:
    latency = _latency_excess(cost, limits.latency_ms, margin)
    if latency is not None:
        yield latency
    # a prediction's memory is an estimate, an assumption's a lower end; files are written, so their size is known
    memory: Source = "bound" if cost.source == "assumed" else cost.source
    file: Source = "bound" if cost.source in ("assumed", "bound") else "measured"
    if cost.memory_mib is not None and limits.memory_mib is not None and cost.memory_mib > limits.memory_mib:
        yield Excess("memory_mib", cost.memory_mib, limits.memory_mib, memory)
    if cost.file_mib is not None and limits.file_mib is not None and cost.file_mib > limits.file_mib:
        yield Excess("file_size_mib", cost.file_mib, limits.file_mib, file)


def _latency_excess(cost: Cost, limit: float | None, margin: float) -> Excess | None:
    bound, expected = cost.latency_bound_ms, cost.latency_ms
    if limit is None:
        return None
    if expected is not None and cost.source == "measured":
        return Excess("latency_ms", expected, limit, "measured") if expected > limit else None
    if expected is not None and (bound is None or expected >= bound):
        over = expected > margin * limit or (bound is not None and bound > limit)
        return Excess("latency_ms", expected, limit, cost.source) if over else None
    if bound is not None and bound > limit:
        return Excess("latency_ms", bound, limit, "bound")
    return None


def _rounds(archs: Sequence[Arch], sizes: Mapping[Arch, float]) -> dict[Arch, int]:
    """Every architecture's place among those of its shape, the largest at 0; of equals the one given first."""
    shapes: dict[tuple[str, int, int], list[Arch]] = {}
    for arch in sorted(archs, key=lambda arch: -sizes[arch]):
        last = arch.kernel or (arch.heads if isinstance(arch, TextArch) else 0)
        shapes.setdefault((kind_of(arch), arch.depth, last), []).append(arch)
    return {arch: place for members in shapes.values() for place, arch in enumerate(members)}


def _price(option: Option) -> tuple[float, float, float]:
    cost = option.cost
    latency = cost.latency_ms if cost.latency_ms is not None else cost.latency_bound_ms
    return latency or 0.0, cost.memory_mib or 0.0, cost.file_mib or 0.0


def _number(value: float) -> float:
    """Of a diverged training, nothing is expected."""
    return -math.inf if math.isnan(value) else value


def _rounded_up(value: float) -> float:
    """The least number of three significant digits that is not below `value`, which is positive."""
    exact = Decimal(value)
    return float(exact.quantize(Decimal(1).scaleb(exact.adjusted() - 2), rounding=ROUND_CEILING))


def _plain(value: float) -> str:
    """The number as a recipe would hold it."""
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)
