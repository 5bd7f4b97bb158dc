"""Whether the measured bounds hold as often as they claim, and whether drift and bursts end as "unstable".

    python -m tests.benchmarks.coverage [--repetitions 1000] [--quick]

A synthetic runtime on a synthetic clock draws latencies from known distributions. The measuring loop itself (warm-up,
sampling, description) runs on them, for p50, p90 and p99, without a limit and with one that is the true percentile but
for a hair. Writes results/coverage.json and .md: how often a number was given, how often its bounds held the true
percentile, how often it was called unstable, and how often a verdict was wrong. Some minutes.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from scipy import optimize, signal, stats

from profiles.device import TargetSection
from profiles.measure import Plan, Sampled, WarmUp, describe, plan_looks, querying, sample, warm_up
from profiles.measure_section import MeasureSection
from profiles.progress import Silent
from profiles.runtimes import TensorSpec, Timed

RESULTS = Path(__file__).parent / "results"
PERCENTILES = (50.0, 90.0, 99.0)
SUSPECT = 0.001
"""A coverage below the claim that chance explains with less than this probability is a failure."""
_MS = 1_000_000
_QUERIES = 8000
"""Drawn per repetition; more than warm-up and sampling take together."""
_CONFIDENCE = 0.99
_MOST_SAMPLES = 2000
"""With a limit: few of the limits that are the percentile itself are ever decided, so the last look ends it."""
_HAIR = 1e-5

Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Kind:
    """A distribution of latencies in milliseconds.

    steady: it has percentiles, so that a number is right; else every measurement has to end as unstable. claimed:
    whether the bounds of its percentiles claim to hold.
    """

    name: str
    what: str
    steady: bool
    draw: Callable[[np.random.Generator, int], Floats]
    quantile: Callable[[float], float]
    claimed: bool = True
    percentiles: tuple[float, ...] = PERCENTILES


@dataclass(frozen=True)
class Row:
    """What came of one kind at one percentile. upper, lower: shares of the numbers given whose bound held the truth."""

    kind: str
    percentile: float
    repetitions: int
    unstable: float
    upper: float | None
    lower: float | None
    error: float | None
    """Median of the estimate's relative error."""
    samples: float
    """Mean number of samples."""
    holds: bool | None
    """None where nothing is claimed."""


@dataclass(frozen=True)
class Judged:
    """What came of limits at the true percentile, a hair above and a hair below it in turn. wrong, decided: shares."""

    kind: str
    percentile: float
    repetitions: int
    wrong: float
    decided: float
    looks: float
    """Mean number of looks."""
    holds: bool | None
    """None where nothing is claimed."""


class Virtual:
    """A clock that passes only when somebody sleeps."""

    def __init__(self) -> None:
        self.ns = 0

    def now(self) -> int:
        return self.ns

    def sleep(self, seconds: float) -> None:
        self.ns += round(seconds * 1e9)


class Drawn:
    """A session whose latencies are given."""

    inputs = (TensorSpec("x", "float32", (1,)),)
    outputs = (TensorSpec("y", "float32", (1,)),)
    options: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, latencies: Floats) -> None:
        self._latencies = (latencies * _MS).astype(np.int64).tolist()
        self._next = 0

    def query(self, inputs: Mapping[str, Any], clock: Virtual) -> Timed:  # type: ignore[override]
        latency = self._latencies[self._next % _QUERIES]
        self._next += 1
        clock.ns += latency
        return Timed(latency, latency, {})

    def close(self) -> None:
        pass


def _mixture(share: float, slow: float, spread: float) -> Callable[[float], float]:
    def cumulated(x: float, p: float) -> float:
        fast = stats.norm.cdf(x, 1, 0.02)
        return float((1 - share) * fast + share * stats.norm.cdf(x, slow, spread) - p / 100)

    return lambda p: float(optimize.brentq(cumulated, 0.5, slow + 10 * spread, args=(p,)))


def _bimodal(random: np.random.Generator, n: int) -> Floats:
    slow = random.random(n) < 0.03
    return np.where(slow, random.normal(5, 0.1, n), random.normal(1, 0.02, n))


def _autoregression(r: float, spread: float) -> Callable[[np.random.Generator, int], Floats]:
    """Log-normal latencies with a median of 1 ms, each depending on the one before."""

    def draw(random: np.random.Generator, n: int) -> Floats:
        noise = random.normal(0, np.sqrt(1 - r * r), n)
        noise[0] = random.normal()
        return np.exp(spread * np.asarray(signal.lfilter([1.0], [1.0, -r], noise)))

    return draw


def _log_normal(spread: float) -> Callable[[float], float]:
    return lambda p: float(np.exp(spread * stats.norm.ppf(p / 100)))


def _short_bursts(share: float) -> Callable[[np.random.Generator, int], Floats]:
    def draw(random: np.random.Generator, n: int) -> Floats:
        slow = np.repeat(random.random(n // 4 + 1) < share, 4)[:n]
        return np.where(slow, random.normal(3, 0.06, n), random.normal(1, 0.02, n))

    return draw


def _long_bursts(slow: float, length: int, period: int) -> Callable[[np.random.Generator, int], Floats]:
    def draw(random: np.random.Generator, n: int) -> Floats:
        within = (np.arange(n) + random.integers(period)) % period < length
        return np.where(within, random.normal(slow, 0.02 * slow, n), random.normal(1, 0.02, n))

    return draw


def _single_burst(random: np.random.Generator, n: int) -> Floats:
    latencies = random.normal(1, 0.02, n)
    # after the warm-up, which takes 600 queries, and before the last of 1,324 samples
    start = random.integers(700, 1800)
    latencies[start : start + 20] *= 3
    return latencies


def _drift(random: np.random.Generator, n: int) -> Floats:
    return random.normal(1, 0.02, n) * np.exp(np.arange(n) / 4500)


def _none(p: float) -> float:
    return float("nan")


KINDS = (
    Kind("constant", "1 ms", True, lambda random, n: np.ones(n), lambda p: 1.0),
    Kind("bimodal", "1 ms, and 3 % at 5 ms", True, _bimodal, _mixture(0.03, 5, 0.1)),
    Kind(
        "heavy tail",
        "1 ms plus Pareto with exponent 1.5 (infinite variance)",
        True,
        lambda random, n: 1 + random.pareto(1.5, n),
        lambda p: (1 - p / 100) ** (-1 / 1.5),
    ),
    *(
        Kind(
            f"AR {r:g}, {spread:.0%}",
            f"a first-order autoregression with r = {r:g}, log-normal with a spread of {spread:.0%}",
            True,
            _autoregression(r, spread),
            _log_normal(spread),
        )
        for r, spread in ((0.3, 0.03), (0.5, 0.03), (0.9, 0.03), (0.9, 0.2))
    ),
    Kind("short bursts", "1 ms, 20 % at 3 ms, four queries on end", True, _short_bursts(0.2), _mixture(0.2, 3, 0.06)),
    Kind("rare bursts", "the same with 3 %", True, _short_bursts(0.03), _mixture(0.03, 3, 0.06), claimed=False),
    Kind("drifting", "1 ms, slower by 25 % every 1,000 queries", False, _drift, _none),
    Kind("bursty", "1 ms, and 3 ms for 100 queries in every 500", False, _long_bursts(3, 100, 500), _none),
    Kind(
        "mildly bursty",
        "1 ms, and 1.3 ms for 50 queries in every 500",
        False,
        _long_bursts(1.3, 50, 500),
        _none,
        percentiles=(99.0,),
    ),
    Kind("one burst", "1 ms, and 3 ms for 20 of all queries, on end", False, _single_burst, _none, percentiles=(99.0,)),
)
JUDGED = tuple(kind for kind in KINDS if kind.steady and kind.name != "constant")


def run(kind: Kind, percentile: float, repetitions: int, seed: int = 0) -> Row:
    """Measures the synthetic runtime that often, without a limit."""
    random = np.random.default_rng([seed, KINDS.index(kind), int(percentile)])
    section = MeasureSection(confidence=_CONFIDENCE, warmup_seconds=3)
    plan = plan_looks(TargetSection(name="t", percentile=percentile, latency_scope="compute"), section)
    unstable, upper, lower, errors, samples = 0, 0, 0, [], []
    truth = kind.quantile(percentile)
    for _ in range(repetitions):
        warm, sampled = _measured(kind, random, section, plan)
        found = describe(sampled.compute_ns, "compute", percentile, plan.look_confidence)
        samples.append(found.samples)
        if not (warm.stable and found.stable):
            unstable += 1
            continue
        assert found.value is not None
        assert found.upper_bound is not None
        assert found.lower_bound is not None
        # nanoseconds are whole numbers, so that a bound may lie one beside the truth
        upper += found.upper_bound >= truth - 2e-6
        lower += found.lower_bound <= truth + 2e-6
        errors.append(abs(found.value - truth) / truth)
    given = repetitions - unstable
    if not kind.steady:
        holds: bool | None = chance(unstable, repetitions) >= SUSPECT
    else:
        holds = min(chance(upper, given), chance(lower, given)) >= SUSPECT if kind.claimed else None
    return Row(
        kind=kind.name,
        percentile=percentile,
        repetitions=repetitions,
        unstable=unstable / repetitions,
        upper=upper / given if given and kind.steady else None,
        lower=lower / given if given and kind.steady else None,
        error=float(np.median(errors)) if given and kind.steady else None,
        samples=float(np.mean(samples)),
        holds=holds,
    )


def judged(kind: Kind, percentile: float, repetitions: int, seed: int = 0) -> Judged:
    """Measures the synthetic runtime that often with a limit that the percentile misses, or keeps, by a hair."""
    random = np.random.default_rng([seed, 1000 + KINDS.index(kind), int(percentile)])
    section = MeasureSection(confidence=_CONFIDENCE, warmup_seconds=3, max_samples=_MOST_SAMPLES)
    wrong, decided, looks = 0, 0, 0
    for repetition in range(repetitions):
        limit = kind.quantile(percentile) * (1 + (_HAIR if repetition % 2 else -_HAIR))
        target = TargetSection(name="t", percentile=percentile, latency_scope="compute", latency_ms=limit)
        _, sampled = _measured(kind, random, section, plan_looks(target, section))
        wrong += sampled.verdict == ("fail" if repetition % 2 else "pass")
        decided += sampled.verdict != "inconclusive"
        looks += sampled.looks
    return Judged(
        kind=kind.name,
        percentile=percentile,
        repetitions=repetitions,
        wrong=wrong / repetitions,
        decided=decided / repetitions,
        looks=looks / repetitions,
        holds=chance(repetitions - wrong, repetitions) >= SUSPECT if kind.claimed else None,
    )


def _measured(kind: Kind, random: np.random.Generator, section: MeasureSection, plan: Plan) -> tuple[WarmUp, Sampled]:
    clock = Virtual()
    query = querying(Drawn(kind.draw(random, _QUERIES)), [{}], clock, 0.0)
    warm = warm_up(query, clock, percentile=plan.percentile, scope="compute", max_seconds=section.warmup_seconds)
    with Silent().task("", None) as task:
        return warm, sample({"a": query}, {"a": warm.typical_ns}, plan, clock, task)["a"]


def chance(successes: int, n: int) -> float:
    """How probable so few successes are when each has the claimed probability."""
    return float(stats.binom.cdf(successes, n, _CONFIDENCE)) if n else 1.0


_WORDS = {True: "holds", False: "FAILS", None: "not claimed"}


def table(rows: list[Row], verdicts: list[Judged], created: str) -> str:
    """The page."""
    steady = {kind.name for kind in KINDS if kind.steady}
    lines = [
        "# Coverage of the measured bounds",
        "",
        f"Made by `python -m tests.benchmarks.coverage` on {created}. A synthetic runtime on a synthetic clock, "
        f"{rows[0].repetitions:,} measurements each; each bound claims {_CONFIDENCE:.0%}.",
        "",
        "| latencies | percentile | samples | unstable | upper bound holds | lower bound holds | median error | |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def share(value: float | None) -> str:
        return "" if value is None else f"{value:.1%}"

    lines += [
        f"| {row.kind} | p{row.percentile:g} | {row.samples:,.0f} | {row.unstable:.1%} | {share(row.upper)} | "
        f"{share(row.lower)} | {share(row.error)} | "
        f"{'no number' if row.kind in steady and row.upper is None else _WORDS[row.holds]} |"
        for row in rows
    ]
    lines += ["", *(f"- {kind.name}: {kind.what}" for kind in KINDS)]
    lines += [
        "",
        "Of the measurements that gave a number, a row of a steady kind says how often each bound held the true "
        "percentile, and holds when that is at least as often as claimed; a drifting or bursty one holds when at least "
        f"as many end as unstable (tested at {SUSPECT}). Unstable ones among the first three kinds are false alarms, "
        "of the warm-up's windows and of the test of the samples together. Nothing is claimed of rare bursts: a run "
        "may hold none of them, or one, and then its samples cannot tell how they vary.",
        "",
        "With a limit that is the true percentile, a hair more and a hair less in turn, and at most "
        f"{_MOST_SAMPLES:,} samples in doubling looks: how often PASS or FAIL was wrong, which claims to be at most "
        f"{1 - _CONFIDENCE:.0%} over all looks together.",
        "",
        "| latencies | percentile | looks | decided | wrong | |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.kind} | p{row.percentile:g} | {row.looks:.1f} | {row.decided:.1%} | {row.wrong:.1%} | "
        f"{_WORDS[row.holds]} |"
        for row in verdicts
    ]
    return "\n".join([*lines, ""])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=1000)
    parser.add_argument("--quick", action="store_true", help="30 repetitions, nothing written")
    chosen = parser.parse_args(arguments)
    repetitions = 30 if chosen.quick else chosen.repetitions
    # the loop collects garbage before it samples, which is slow work among the objects of the imported modules
    gc.freeze()
    rows, verdicts = [], []
    for kind in KINDS:
        for percentile in kind.percentiles:
            rows.append(run(kind, percentile, repetitions))
            print(rows[-1], flush=True)
    for kind in JUDGED:
        for percentile in PERCENTILES[1:]:
            verdicts.append(judged(kind, percentile, repetitions))
            print(verdicts[-1], flush=True)
    created = datetime.now(UTC).date().isoformat()
    text = table(rows, verdicts, created)
    print(text)
    if not chosen.quick:
        RESULTS.mkdir(exist_ok=True)
        document = {
            "created": created,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "confidence": _CONFIDENCE,
            "rows": [asdict(row) for row in rows],
            "verdicts": [asdict(row) for row in verdicts],
        }
        (RESULTS / "coverage.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        (RESULTS / "coverage.md").write_text(text, encoding="utf-8")
    return 1 if any(row.holds is False for row in [*rows, *verdicts]) else 0


if __name__ == "__main__":
    sys.exit(main())
