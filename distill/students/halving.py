"""Successive halving: which candidates are worth a full training (Jamieson & Talwalkar 2016, arXiv 1502.07943).

All candidates get a short training; the best third of every target (at least as many as may be trained in full) gets
one three times as long, and so on until every target is down to its finalists. Three is the factor of Hyperband (Li et
al. 2018, arXiv 1603.06560).

Every training starts afresh and runs its own one-cycle schedule to the end. Stopping a long one early and going on
with it later would be cheaper on paper, but in the middle of a one-cycle schedule the learning rate is near its
peak, where the accuracy says little about the end; and a schedule that has come to its end cannot be gone on with,
as its learning rate is zero. As separate trainings, rungs are ordinary artefacts: an interrupted choice goes on where
it stopped, and asks again for what it already has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from distill.students.arch import Arch
from distill.students.choose import ranked

ETA = 3
"""By how much the number of candidates falls, and the length of their trainings grows, from one rung to the next."""


class Rung(NamedTuple):
    """One round of trainings of equal length. share: of a full training's epochs. scores: higher is better."""

    share: float
    scores: Mapping[Arch, float]


class Planned(NamedTuple):
    """One round before it is run: at most so many trainings."""

    share: float
    trainings: int


@dataclass(frozen=True)
class Halving:
    """What successive halving found.

    finalists: by target, those worth a full training, best first. order: by target, all of its candidates: the
    finalists, then who left in the last rung, and so on. rungs: what was trained.
    """

    finalists: Mapping[str, tuple[Arch, ...]]
    order: Mapping[str, tuple[Arch, ...]]
    rungs: tuple[Rung, ...]

    @property
    def trainings(self) -> float:
        """How many full trainings all rungs together come to."""
        return sum(rung.share * len(rung.scores) for rung in self.rungs)


def halve(
    targets: Mapping[str, Sequence[Arch]],
    train: Callable[[Arch, float], float],
    *,
    finalists: int,
    share: float,
    eta: int = ETA,
) -> Halving:
    """Trains candidates for short, then the best of them for longer, until every target has its finalists.

    A target that has no more candidates than finalists needs no trial. A training serves every target that has the
    candidate. No rung reaches the length of a full training: where the next one would, the last scores decide.

    Args:
        targets: by name, the candidates that fit, cheapest first: of equal scores the cheaper is preferred.
        train: trains an architecture afresh for a share of the epochs and returns its score, higher is better, nan
            where it diverged; called at most once for each in a rung, always in the same order.
        finalists: how many of a target may be trained in full, at least 1.
        share: of a full training's epochs, in the first rung; above 0.
        eta: at least 2.
    """
    alive = {target: tuple(dict.fromkeys(archs)) for target, archs in targets.items()}
    # where nothing has been tried, the most costly candidate is the most promising
    order = {target: archs[::-1] for target, archs in alive.items()}
    rungs: list[Rung] = []
    while share < 1 and (active := [target for target, archs in alive.items() if len(archs) > finalists]):
        scores = {arch: train(arch, share) for arch in dict.fromkeys(arch for t in active for arch in alive[t])}
        rungs.append(Rung(share, scores))
        for target, archs in alive.items():
            # scores of different rungs do not compare
            if not scores.keys() >= set(archs):
                continue
            best = ranked(archs, scores)
            order[target] = best + order[target][len(best) :]
            kept = set(best[: _kept(len(best), finalists, eta)])
            alive[target] = tuple(arch for arch in archs if arch in kept)
        share *= eta
    chosen = {target: archs[:finalists] for target, archs in order.items()}
    return Halving(chosen, order, tuple(rungs))


def planned(
    targets: Mapping[str, Sequence[Arch]], *, finalists: int, share: float, eta: int = ETA
) -> tuple[Planned, ...]:
    """What `halve` would train at most, rung by rung, before anything is known about scores."""
    archs = {target: set(given) for target, given in targets.items()}
    left = {target: len(given) for target, given in archs.items()}
    rungs: list[Planned] = []
    while share < 1 and (active := [target for target, count in left.items() if count > finalists]):
        distinct = len(set().union(*(archs[target] for target in active)))
        rungs.append(Planned(share, min(distinct, sum(left[target] for target in active))))
        left = {target: min(count, _kept(count, finalists, eta)) for target, count in left.items()}
        share *= eta
    return tuple(rungs)


def _kept(count: int, finalists: int, eta: int) -> int:
    return max(finalists, math.ceil(count / eta))
