"""Under which circumstances something is measured: cores, clocks, load, and what a reader must know of them."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from profiles import agent, statistics
from profiles.errors import InputError
from profiles.measure_section import MeasureSection
from profiles.measurement import Latency

Array = np.ndarray[Any, Any]
_BUSY_CORES = 0.2
_CLOCK_SECONDS = 2.0
_PARTS = 8
_THROTTLED = 0.01
"""Share of the time below the wanted clocks that is said: a driver counts some microseconds in every launch."""
_ONE_WAY = 0.8
"""Share of steps between the parts' medians in one direction, from which a movement is called a drift."""
_APART = 0.8
"""Spells by slow queries, from which they are called single ones."""


@contextmanager
def pinned(cores: tuple[int, ...]) -> Iterator[None]:
    """This thread, and those that it starts, on these cores only.

    Raises:
        InputError: a core that this process may not use, or a system without affinities.
    """
    if not cores:
        yield
        return
    if not hasattr(os, "sched_setaffinity"):
        raise InputError("this system cannot pin threads to cores", where="affinity", fix="leave it out")
    allowed = os.sched_getaffinity(0)
    if not set(cores) <= allowed:
        raise InputError(
            f"core {min(set(cores) - allowed)} may not be used here",
            where="affinity",
            evidence=f"this process may use {', '.join(map(str, sorted(allowed)))}",
        )
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


class ClockWatch:
    """The highest clock of any core, and the GPU's, while sampling, looked at every other second between queries."""

    def __init__(self, read: Callable[[], Mapping[str, float]] = agent.clocks) -> None:
        """read: gives the clocks in MHz by core; default this machine's."""
        self._read = read
        self._due = math.inf
        self._seen: list[float] = []
        self._gpu: list[float] = []

    def start(self) -> None:
        """From now on the machine is busy, so that its clocks are those of the measurement."""
        self._seen, self._gpu, self._due = [], [], 0.0

    def look(self) -> None:
        """Reads the clocks when it is time to."""
        now = time.monotonic()
        if now >= self._due:
            self._due = now + _CLOCK_SECONDS
            clocks = dict(self._read())
            self._gpu += [clocks.pop("gpu")] if "gpu" in clocks else []
            self._seen += [max(clocks.values())] if clocks else []

    def found(self) -> dict[str, dict[str, float]]:
        """Lowest and highest of what was read, in MHz; empty where the machine does not tell."""
        found = {"clock_mhz": self._seen, "gpu_clock_mhz": self._gpu}
        return {key: {"lowest": min(seen), "highest": max(seen)} for key, seen in found.items() if seen}


def environment_of(before: dict[str, Any], after: dict[str, Any], use: dict[str, Any]) -> dict[str, Any]:
    """Facts that stayed, once; facts that moved, before and after."""
    moving = (
        "load",
        "clocks_mhz",
        "temperatures_c",
        "throttle_events",
        "memory_available_mib",
        "governor",
        "power_mode",
        "gpu_power_limit_watts",
        "gpu_state",
        "gpu_processes",
    )
    return {
        **{key: value for key, value in before.items() if key not in moving},
        "before": {key: before[key] for key in moving if key in before},
        "after": {key: after[key] for key in moving if key in after},
        "cpu_use": use,
        "garbage_collection": "off while sampling",
    }


def warnings_of(
    settled: bool,
    section: MeasureSection,
    environment: dict[str, Any],
    asked: Latency,
    samples_ns: Sequence[int],
) -> tuple[str, ...]:
    found = []
    if not settled:
        found.append(f"unstable: latency did not settle within {section.warmup_seconds:g} s of warm-up")
    if not asked.stable:
        found.append(f"unstable: {movement(samples_ns, asked.percentile)}")
    needed = statistics.samples_needed(asked.percentile, asked.bound_confidence)
    if asked.samples < needed:
        full = asked.samples >= section.max_samples
        found.append(
            f"too few samples: p{asked.percentile:g} needs {needed:,}, {asked.samples:,} were taken"
            + (", the most that are allowed" if full else f" in {section.max_seconds:g} s")
            + f"; raise measure.{'max_samples' if full else 'max_seconds'} or ask for a lower percentile"
        )
    use = environment["cpu_use"]
    if use.get("other_cores", 0) >= _BUSY_CORES:
        names = ", ".join(f"{process['name']} {process['cores']:.1f}" for process in use["busiest"])
        found.append(
            f"the machine was busy: other processes used {use['other_cores']:.1f} of {environment['cores']} cores"
            + (f" ({names})" if names else "")
        )
    if use.get("stolen_cores", 0) >= _BUSY_CORES:
        found.append(f"the hypervisor took {use['stolen_cores']:.1f} cores away")
    before, after = environment["before"], environment["after"]
    if after.get("throttle_events", 0) != before.get("throttle_events", 0):
        found.append(
            f"the CPU was throttled: {before.get('throttle_events', 0)} events before, {after['throttle_events']} after"
        )
    seen = environment.get("clock_mhz")
    if seen is not None and seen["highest"] > statistics.MATERIAL * seen["lowest"]:
        found.append(
            f"the clock changed while sampling, between {seen['lowest']:.0f} and {seen['highest']:.0f} MHz; "
            'the governor "performance" or fixed clocks avoid that'
        )
    for fact in ("governor", "power_mode"):
        if before.get(fact) != after.get(fact):
            found.append(f"the {fact.replace('_', ' ')} changed from {before.get(fact)} to {after.get(fact)}")
    return tuple(found)


def gpu_warnings(environment: dict[str, Any]) -> tuple[str, ...]:
    """What a reader must know of the GPU that was measured: other programs on it, throttling, clocks that changed."""
    found = []
    before, after = environment["before"], environment["after"]
    others = {process["pid"]: process for when in (before, after) for process in when.get("gpu_processes", ())}
    if others:
        names = ", ".join(
            f"{process.get('name', 'a process of another container')}"
            + (f" with {process['memory_mib']:.0f} MiB" if "memory_mib" in process else "")
            for process in others.values()
        )
        found.append(f"the GPU was shared: {names}")
    states = (before.get("gpu_state", {}), after.get("gpu_state", {}))
    spent = environment["cpu_use"].get("seconds", 0.0)
    for name in ("power", "thermal"):
        begun, ended = (state.get("throttled_seconds", {}).get(name, 0.0) for state in states)
        if ended - begun > _THROTTLED * spent:
            found.append(f"the GPU was throttled ({name}) for {ended - begun:.1f} s of {spent:.1f} s")
    reasons = dict.fromkeys(reason for state in states for reason in state.get("throttle", ()))
    if reasons:
        found.append(f"the GPU was throttled: {', '.join(reasons)}")
    seen = environment.get("gpu_clock_mhz")
    if seen is not None and seen["highest"] > statistics.MATERIAL * seen["lowest"]:
        found.append(
            f"the GPU's clock changed while sampling, between {seen['lowest']:.0f} and {seen['highest']:.0f} MHz; "
            "nvidia-smi --lock-gpu-clocks avoids that"
        )
    limits = [when.get("gpu_power_limit_watts") for when in (before, after)]
    if limits[0] != limits[1]:
        found.append(f"the GPU's power limit changed from {limits[0]} to {limits[1]} W")
    return tuple(found)


def movement(samples_ns: Array | Sequence[int], percentile: float) -> str:
    """In words, how samples (N,) of an unstable latency moved: a drift, slow spells, or more slow queries at times."""
    milliseconds = np.asarray(samples_ns, dtype=np.float64) / 1e6
    medians = np.asarray([np.median(part) for part in np.array_split(milliseconds, _PARTS)])
    steps = np.diff(medians)
    if (
        medians.max() > statistics.MATERIAL * medians.min()
        and max((steps >= 0).mean(), (steps <= 0).mean()) >= _ONE_WAY
    ):
        return f"it drifted, the median from {medians[0]:.3g} to {medians[-1]:.3g} ms while it was sampled"
    # the middle between what most queries take and what slow ones take
    edge = (statistics.percentile(milliseconds, 50) + statistics.percentile(milliseconds, max(percentile, 75))) / 2
    slow = milliseconds > edge
    spells = int(slow[0]) + int((slow[1:] & ~slow[:-1]).sum())
    middles = f"the median of a part of the run between {medians.min():.3g} and {medians.max():.3g} ms"
    if spells > _APART * slow.sum():
        shares = [part.mean() for part in np.array_split(slow, _PARTS)]
        return (
            f"slow queries came more often at times: between {min(shares):.1%} and {max(shares):.1%} of a part of the "
            f"run over {edge:.3g} ms, {middles}"
        )
    return f"slow queries came in spells: {int(slow.sum()):,} over {edge:.3g} ms in {spells:,} spells, {middles}"
