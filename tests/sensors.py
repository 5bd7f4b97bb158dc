"""A machine's sensor files that move: a RAPL counter that follows what a process computes."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

CORE = "sys/devices/system/cpu/cpu0"
RAPL = "sys/class/powercap/intel-rapl:0"


def put(root: Path, path: str, text: object) -> Path:
    """Writes a sensor's file, at once: a reader sees the old content or the new one."""
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_name(f"{file.name}.new")
    fresh.write_text(f"{text}\n")
    fresh.replace(file)
    return file


@contextlib.contextmanager
def counting(root: Path, pid: int, *, idle: float, busy: float) -> Iterator[None]:
    """A package's counter that grows by `idle` watts, and by `busy` watts more while process `pid` computes."""
    put(root, f"{RAPL}/name", "package-0")
    put(root, f"{RAPL}/max_energy_range_uj", 262_143_328_850)
    stopped = threading.Event()

    def computed() -> float:
        try:
            return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9
        except (OSError, ValueError):
            return before

    before = 0.0
    before, began = computed(), time.monotonic()

    def write() -> None:
        joules = idle * (time.monotonic() - began) + busy * (computed() - before)
        put(root, f"{RAPL}/energy_uj", int(joules * 1e6))

    def follow() -> None:
        while not stopped.wait(0.003):
            write()

    write()
    with _running(follow, stopped):
        yield


@contextlib.contextmanager
def slowing_down(root: Path) -> Iterator[None]:
    """A core that counts thermal events all the time, and whose clock falls, by a third in the first second."""
    stopped, began = threading.Event(), time.monotonic()

    def write() -> None:
        spent = time.monotonic() - began
        put(root, f"{CORE}/cpufreq/scaling_cur_freq", int(2e6 / (1 + 0.5 * spent)))
        put(root, f"{CORE}/thermal_throttle/core_throttle_count", int(spent * 100))

    def follow() -> None:
        while not stopped.wait(0.01):
            write()

    write()
    with _running(follow, stopped):
        yield


@contextlib.contextmanager
def _running(work: Callable[[], None], stopped: threading.Event) -> Iterator[None]:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
