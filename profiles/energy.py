"""Energy of one query above idle: where it is read on this machine, and the interval of its mean.

The readers of files and of tegrastats are the agent's, so that a remote device is read by the same code; NVIDIA's
library (package `nvidia-ml-py`) is asked here.
"""

from __future__ import annotations

import math
import shutil
import statistics
import time
from collections.abc import Callable
from typing import Any, Protocol

from profiles import agent
from profiles.measurement import Energy
from profiles.runtimes import Clock

SPELLS = 10
"""Spells of a run, idle as many: the spread of their means gives the interval."""
_CONFIDENCE = 0.95
_ON_GPU = ("onnxruntime-cuda", "onnxruntime-tensorrt", "onnxruntime-tensorrt-rtx", "tensorrt", "tensorrt-rtx")


class PowerSource(Protocol):
    """Where energy is read."""

    @property
    def readable(self) -> bool:
        """Whether there is anything to read."""
        ...

    @property
    def how(self) -> str:
        """Which sensor, and what it covers; the reason when there is none."""
        ...

    def open(self) -> Meter:
        """Starts to count."""
        ...


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


def find_power(runtime: str = "onnxruntime", root: str = "/") -> PowerSource:
    """The best source for models that run in this runtime: the GPU's own for a GPU's runtime, else the machine's.

    Args:
        runtime: as `get_runtime` takes it.
        root: of the file system, for tests.
    """
    if runtime in _ON_GPU:
        return NvmlPower()
    return MachinePower(root)


class MachinePower:
    """RAPL, INA3221, hwmon, and tegrastats where their files cannot be read."""

    def __init__(self, root: str = "/", tegrastats: str | None = None) -> None:
        self._sensors, reason = agent.power_sensors(root)
        self._tegrastats = tegrastats or shutil.which("tegrastats")
        self.readable = bool(self._sensors) or self._tegrastats is not None
        self.how = reason
        if self._sensors:
            self.how = ", ".join(f"{sensor.kind.upper()} {sensor.name}" for sensor in self._sensors)
        elif self._tegrastats is not None:
            self.how = "tegrastats"

    def open(self) -> Meter:
        """See `PowerSource.open`."""
        if self._sensors:
            return agent.EnergyMeter(self._sensors)
        meter = agent.EnergyMeter([], tegrastats=agent.Tegrastats(self._tegrastats or "tegrastats"))
        time.sleep(0.5)  # its first line
        return meter


class NvmlPower:
    """The energy counter of the first NVIDIA GPU (Volta and later), the whole board."""

    def __init__(self, nvml: Any = None) -> None:
        self.readable, self.how = False, ""
        self._nvml = nvml
        try:
            if self._nvml is None:
                import pynvml

                self._nvml = pynvml
            self._nvml.nvmlInit()
            self._handle = self._nvml.nvmlDeviceGetHandleByIndex(0)
            self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
            name = self._nvml.nvmlDeviceGetName(self._handle)
        except ImportError:
            self.how = 'the package nvidia-ml-py is not installed (pip install "edgestill[nvidia]")'
        except Exception as error:  # NVMLError of any kind: no driver, no GPU, an old GPU without the counter
            self.how = f"NVML: {error}"
        else:
            self.readable = True
            self.how = f"NVML, the whole {name.decode() if isinstance(name, bytes) else name}"

    def open(self) -> Meter:
        """See `PowerSource.open`."""
        return _NvmlMeter(lambda: float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3, self.how)


class _NvmlMeter:
    def __init__(self, read: Callable[[], float], how: str) -> None:
        self._read, self.how = read, how
        self._began = read()

    def joules(self) -> float:
        """See `Meter.joules`."""
        return self._read() - self._began

    def close(self) -> None:
        """Nothing runs in the background."""


def energy_per_query(query: Callable[[int], Any], power: PowerSource, clock: Clock, seconds: float) -> Energy:
    """Energy of one query above idle, from `SPELLS` idle spells and as many busy ones.

    Mean over the busy spells of (joules - idle watts * seconds) / queries, with Student's t interval; the idle watts'
    own uncertainty is added in quadrature.

    Args:
        query: runs the i-th query.
        power: readable.
        clock: of the spells.
        seconds: idle in all, and busy in all.
    """
    length = seconds / SPELLS
    meter = power.open()
    try:
        idle = [_spell(meter, clock, lambda: clock.sleep(length)) for _ in range(SPELLS)]
        watts = [joules / spent for joules, spent in idle]
        costs, queries, busy_joules, busy_seconds = [], 0, 0.0, 0.0
        resting = statistics.mean(watts)
        for _ in range(SPELLS):
            (joules, spent), count = _busy(meter, clock, length, query, queries)
            queries += count
            busy_joules, busy_seconds = busy_joules + joules, busy_seconds + spent
            costs.append((joules - resting * spent) / count)
        how = meter.how
    finally:
        meter.close()
    mean = statistics.mean(costs)
    errors = (
        statistics.stdev(costs) / math.sqrt(SPELLS),
        statistics.stdev(watts) / math.sqrt(SPELLS) * busy_seconds / queries,
    )
    half = _student(SPELLS - 1) * math.hypot(*errors)
    if busy_joules == 0.0 and resting == 0.0:
        return no_energy(f"{how} did not move")
    if mean + half <= 0.0 or mean <= 0.0:
        return Energy(
            millijoules=None,
            idle_watts=resting,
            busy_watts=busy_joules / busy_seconds,
            queries=queries,
            how=f"{how} told no more than idle",
        )
    return Energy(
        millijoules=mean * 1e3,
        low=(mean - half) * 1e3,
        high=(mean + half) * 1e3,
        confidence=_CONFIDENCE,
        idle_watts=resting,
        busy_watts=busy_joules / busy_seconds,
        queries=queries,
        how=f"{how}, idle subtracted",
    )


def _spell(meter: Meter, clock: Clock, work: Callable[[], None]) -> tuple[float, float]:
    """Joules and seconds."""
    before, start = meter.joules(), clock.now()
    work()
    return meter.joules() - before, (clock.now() - start) / 1e9


def _busy(
    meter: Meter, clock: Clock, seconds: float, query: Callable[[int], Any], first: int
) -> tuple[tuple[float, float], int]:
    count = 0

    def work() -> None:
        nonlocal count
        start = clock.now()
        while not count or clock.now() - start < seconds * 1e9:
            query(first + count)
            count += 1

    spent = _spell(meter, clock, work)
    return spent, count


def _student(degrees: int) -> float:
    from scipy.stats import t

    return float(t.ppf((1 + _CONFIDENCE) / 2, degrees))
