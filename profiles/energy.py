"""Energy of one query above idle: where it is read on this machine, and the interval of its mean.

The sensors, their choice and the order of the spells are the agent's, so that a remote device is read by the same code.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from profiles import agent
from profiles.measurement import Energy
from profiles.runtimes import Clock

SPELLS = 10
"""Pairs of an idle and a busy spell: the spread of what they tell gives the interval."""
_CONFIDENCE = 0.95
_ON_GPU = ("onnxruntime-cuda", "onnxruntime-tensorrt", "onnxruntime-tensorrt-rtx", "tensorrt", "tensorrt-rtx")


class Meter(Protocol):
    """A running count."""

    @property
    def how(self) -> str:
        """Which sensor."""
        ...

    def joules(self) -> float:
        """Since it was opened."""
        ...

    def close(self) -> None:
        """Ends what runs in the background."""
        ...


def no_energy(reason: str) -> Energy:
    """No figure, and why."""
    return Energy(millijoules=None, how=reason)


@dataclass(frozen=True)
class PowerSource:
    """Where energy is read. how: which sensor, and what it covers; the reason when there is none."""

    start: Callable[[], Meter] | None
    how: str

    @property
    def readable(self) -> bool:
        """Whether there is anything to read."""
        return self.start is not None

    def open(self) -> Meter:
        """Starts to count; readable."""
        assert self.start is not None
        return self.start()


def find_power(*, on_gpu: bool = False, root: str | None = None) -> PowerSource:
    """The best source for a model that runs on the CPU, or on an NVIDIA GPU; see `agent.energy_source`.

    Args:
        on_gpu: see `runs_on_gpu`.
        root: of the file system, for tests.
    """
    return PowerSource(*agent.energy_source(on_gpu, root or agent.ROOT))


def runs_on_gpu(runtime: str, options: Mapping[str, Any]) -> bool:
    """Whether a session computes on an NVIDIA GPU, by its runtime and what is set in it (`Session.options`)."""
    return runtime in _ON_GPU or str(options.get("device", "")).startswith("cuda")


def energy_per_query(query: Callable[[int], Any], power: PowerSource, clock: Clock, seconds: float) -> Energy:
    """Energy of one query above idle, from `SPELLS` pairs of an idle and a busy spell in turn.

    Args:
        query: runs the i-th query.
        power: readable.
        clock: of the spells.
        seconds: idle in all, and busy in all; without the lead-ins of the spells.
    """
    done = 0

    def work(length: float) -> int:
        nonlocal done
        count, start = 0, clock.now()
        while not count or clock.now() - start < length * 1e9:
            query(done + count)
            count += 1
        done += count
        return count

    meter = power.open()
    try:
        spells = agent.energy_spells(meter.joules, clock.now, clock.sleep, work, seconds / SPELLS, SPELLS)
        how = meter.how
    finally:
        meter.close()
    return energy_of(spells["idle"], spells["busy"], how)


def energy_of(idle: Sequence[tuple[float, float]], busy: Sequence[tuple[float, float, int]], how: str) -> Energy:
    """What pairs of an idle and a busy spell tell of one query.

    Mean over the pairs of (joules - idle watts * seconds) / queries, with Student's t interval over the pairs, which
    holds the uncertainty of idle as well.

    Args:
        idle: joules and seconds of each pair's idle spell.
        busy: joules, seconds and queries of its busy spell.
        how: which sensor.
    """
    resting = [joules / seconds for joules, seconds in idle]
    costs = [
        (joules - watts * seconds) / queries for watts, (joules, seconds, queries) in zip(resting, busy, strict=True)
    ]
    idle_watts = statistics.mean(resting)
    busy_watts = sum(spell[0] for spell in busy) / sum(spell[1] for spell in busy)
    if idle_watts == 0.0 and busy_watts == 0.0:
        return no_energy(f"{how} did not move")
    mean = statistics.mean(costs)
    half = _student(len(costs) - 1) * statistics.stdev(costs) / math.sqrt(len(costs))
    queries = sum(spell[2] for spell in busy)
    if mean <= 0.0:
        return Energy(
            millijoules=None,
            idle_watts=idle_watts,
            busy_watts=busy_watts,
            queries=queries,
            how=f"{how} told no more than idle",
        )
    return Energy(
        millijoules=mean * 1e3,
        low=(mean - half) * 1e3,
        high=(mean + half) * 1e3,
        confidence=_CONFIDENCE,
        idle_watts=idle_watts,
        busy_watts=busy_watts,
        queries=queries,
        how=f"{how}, idle subtracted",
    )


def _student(degrees: int) -> float:
    from scipy.stats import t

    return float(t.ppf((1 + _CONFIDENCE) / 2, degrees))
