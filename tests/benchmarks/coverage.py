"""Whether the measured bounds hold as often as they claim, and whether drift and bursts end as "unstable".

    python -m tests.benchmarks.coverage [--repetitions 1000] [--quick]

A synthetic runtime on a synthetic clock draws latencies from known distributions. The measuring loop itself (warm-up,
sampling, description) runs on them, for p50, p90 and p99. Writes results/coverage.json and .md: how often a number was
given, how often its bounds held the true percentile, and how often it was called unstable. Some minutes.
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
from scipy import optimize, stats

from profiles.device import TargetSection
from profiles.measure import describe, plan_looks, querying, sample, warm_up
from profiles.measure_section import MeasureSection
from profiles.progress import Silent
from profiles.runtimes import Clock, TensorSpec, Timed

RESULTS = Path(__file__).parent / "results"
PERCENTILES = (50.0, 90.0, 99.0)
SUSPECT = 0.001
"""A coverage below the claim that chance explains with less than this probability is a failure."""
_MS = 1_000_000
_QUERIES = 8000
"""Drawn per repetition; more than warm-up and sampling take together."""
_CONFIDENCE = 0.99

Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Kind:
    """A distribution of latencies in milliseconds.

    steady: it has percentiles, so that a number is right. independent: its samples are, as the bounds' claim supposes.
    """

    name: str
    what: str
    steady: bool
    draw: Callable[[np.random.Generator, int], Floats]
    quantile: Callable[[float], float]
    independent: bool = True


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
        self._latencies = [int(value) for value in latencies * _MS]
        self._next = 0

    def query(self, inputs: Mapping[str, Any], clock: Clock) -> Timed:
        latency = self._latencies[self._next % len(self._latencies)]
        self._next += 1
        clock.sleep(latency / 1e9)
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


def _short_bursts(random: np.random.Generator, n: int) -> Floats:
    slow = np.repeat(random.random(n // 4 + 1) < 0.03, 4)[:n]
    return np.where(slow, random.normal(3, 0.06, n), random.normal(1, 0.02, n))


def _long_bursts(random: np.random.Generator, n: int) -> Floats:
    slow = (np.arange(n) + random.integers(700)) % 700 < 100
    return np.where(slow, random.normal(3, 0.06, n), random.normal(1, 0.02, n))


def _drift(random: np.random.Generator, n: int) -> Floats:
    return random.normal(1, 0.02, n) * np.exp(np.arange(n) / 2500)


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
    Kind("short bursts", "1 ms, 3 % at 3 ms, four queries on end", True, _short_bursts, _mixture(0.03, 3, 0.06), False),
    Kind("drifting", "1 ms, slower by 49 % every 1,000 queries", False, _drift, lambda p: float("nan")),
    Kind("bursty", "1 ms, and 3 ms for 100 queries in every 700", False, _long_bursts, lambda p: float("nan")),
)


def run(kind: Kind, percentile: float, repetitions: int, seed: int = 0) -> Row:
    """Measures the synthetic runtime that often."""
    random = np.random.default_rng([seed, KINDS.index(kind), int(percentile)])
    section = MeasureSection(confidence=_CONFIDENCE, warmup_seconds=3)
    plan = plan_looks(TargetSection(name="t", percentile=percentile, latency_scope="compute"), section)
    unstable, upper, lower, errors, samples = 0, 0, 0, [], []
    truth = kind.quantile(percentile)
    with Silent().task("", None) as task:
        for _ in range(repetitions):
            clock = Virtual()
            query = querying(Drawn(kind.draw(random, _QUERIES)), [{}], clock, 0.0)
            warm = warm_up(query, clock, percentile=percentile, scope="compute", max_seconds=section.warmup_seconds)
            sampled = sample({"a": query}, {"a": warm.typical_ns}, plan, clock, task)["a"]
            found = describe(sampled.compute_ns, "compute", percentile, plan.look_confidence)
            samples.append(found.samples)
            if not (warm.stable and found.stable):
                unstable += 1
                continue
            assert found.value is not None
            assert found.upper_bound is not None
            assert found.lower_bound is not None
            # nanoseconds are whole numbers, so that a bound may lie half of one beside the truth
            upper += found.upper_bound >= truth - 1e-6
            lower += found.lower_bound <= truth + 1e-6
            errors.append(abs(found.value - truth) / truth)
    given = repetitions - unstable
    if not kind.steady:
        holds: bool | None = _chance(unstable, repetitions) >= SUSPECT
    else:
        holds = min(_chance(upper, given), _chance(lower, given)) >= SUSPECT if kind.independent else None
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


def _chance(successes: int, n: int) -> float:
    """How probable so few successes are when each has the claimed probability."""
    return float(stats.binom.cdf(successes, n, _CONFIDENCE)) if n else 1.0


_WORDS = {True: "holds", False: "FAILS", None: "not claimed"}


def table(rows: list[Row], created: str) -> str:
    """The page."""
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
        f"{share(row.lower)} | {share(row.error)} | {_WORDS[row.holds]} |"
        for row in rows
    ]
    lines += ["", *(f"- {kind.name}: {kind.what}" for kind in KINDS)]
    lines += [
        "",
        "A row of a steady distribution holds when both bounds contain the truth at least as often as claimed, a "
        f"drifting or bursty one when at least as many end as unstable (tested at {SUSPECT}). The unstable ones among "
        "the first three are false alarms, of the warm-up's windows and of the test of the samples together. Short "
        "bursts are dependent samples with a percentile: the bounds claim nothing there and are shown for how far they "
        "are off.",
        "",
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=1000)
    parser.add_argument("--quick", action="store_true", help="30 repetitions, nothing written")
    chosen = parser.parse_args(arguments)
    repetitions = 30 if chosen.quick else chosen.repetitions
    # the loop collects garbage before it samples, which is slow work among the objects of the imported modules
    gc.freeze()
    rows = []
    for kind in KINDS:
        for percentile in PERCENTILES:
            rows.append(run(kind, percentile, repetitions))
            print(rows[-1], flush=True)
    created = datetime.now(UTC).date().isoformat()
    text = table(rows, created)
    print(text)
    if not chosen.quick:
        RESULTS.mkdir(exist_ok=True)
        document = {
            "created": created,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "confidence": _CONFIDENCE,
            "rows": [asdict(row) for row in rows],
        }
        (RESULTS / "coverage.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        (RESULTS / "coverage.md").write_text(text, encoding="utf-8")
    return 1 if any(row.holds is False for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
