"""What is read of an NVIDIA GPU, and what is said of it: the library is a recorded one, its headers are real."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from profiles import agent
from profiles.conditions import ClockWatch, environment_of, gpu_warnings
from profiles.runtimes import on_gpu
from profiles.runtimes.probe import _peak_on_gpu
from tests.recorded.nvml import NOT_AVAILABLE, RecordedNvml

USE = {"other_cores": 0.0, "stolen_cores": 0.0, "busiest": [], "seconds": 10.0}


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> RecordedNvml:
    """A machine with an RTX 4070."""
    library = RecordedNvml()
    monkeypatch.setattr(agent, "_GPUS", [agent.Gpu(library)])
    return library


@pytest.fixture
def another() -> Iterator[int]:
    """A process that does not descend from this one: its parent is gone."""
    shell = ["sh", "-c", "sleep 60 >/dev/null 2>&1 & echo $!"]
    pid = int(subprocess.run(shell, capture_output=True, text=True, check=True).stdout)
    yield pid
    os.kill(pid, signal.SIGKILL)


def test_the_facts_of_this_machine_name_its_gpu_driver_clocks_and_limits(card: RecordedNvml) -> None:
    found = agent.read()
    assert (found["gpu"], found["driver"]) == ("NVIDIA GeForce RTX 4070", "570.86.15")
    assert found["gpu_power_limit_watts"] == 200.0
    assert found["gpu_state"] == {
        "clock_mhz": 2475,
        "memory_clock_mhz": 10501,
        "temperature_c": 61,
        "power_watts": 87.2,
        "throttle": [],
        "throttled_seconds": {"power": 5.0, "thermal": 0.0},
    }
    assert "gpu_processes" not in found
    assert found["clocks_mhz"]["gpu"] == 2475.0


def test_what_a_gpu_does_not_tell_is_absent(card: RecordedNvml) -> None:
    card.clocks, card.violated_ns = {}, {}
    card.nvmlDeviceGetPowerUsage = lambda *_: 3  # type: ignore[method-assign]
    assert set(agent.read()["gpu_state"]) == {"temperature_c", "throttle"}
    assert "gpu" not in agent.clocks()


@pytest.mark.parametrize(
    ("visible", "asked"), [("", 0), ("2,0", 2), ("GPU-8f6d,GPU-1", b"GPU-8f6d"), ("MIG-1", 0), ("-1", 0)]
)
def test_the_gpu_is_the_first_that_cuda_may_use(visible: str, asked: Any) -> None:
    library = RecordedNvml()
    agent.Gpu(library, visible)
    assert library.asked == [asked]


def test_another_program_on_the_gpu_is_named_and_this_one_is_not(card: RecordedNvml, another: int) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    card.compute = {os.getpid(): 300 * 2**20, child.pid: 200 * 2**20, another: 512 * 2**20}
    (found,) = agent.read()["gpu_processes"]
    child.communicate(b"\n")
    assert found == {"pid": another, "name": Path(f"/proc/{another}/comm").read_text().strip(), "memory_mib": 512.0}
    card.compute = {another: NOT_AVAILABLE}
    assert "memory_mib" not in agent.read()["gpu_processes"][0]


def test_in_a_container_one_of_the_hosts_processes_is_this_one(card: RecordedNvml) -> None:
    beyond = int(Path("/proc/sys/kernel/pid_max").read_text()) + 1
    card.compute = {beyond: 2**20}
    assert "gpu_processes" not in agent.read()
    card.compute = {beyond: 2**20, beyond + 1: 2**20}
    assert [process["pid"] for process in agent.read()["gpu_processes"]] == [beyond + 1]


@pytest.mark.skipif(find_spec("pynvml") is None, reason="nvidia-ml-py is not installed")
def test_structures_and_numbers_are_those_of_nvidias_own_bindings() -> None:
    import pynvml

    for ours, theirs in (
        (agent._ProcessInfo, pynvml.c_nvmlProcessInfo_v3_t),
        (agent._ProcessInfo, pynvml.c_nvmlProcessInfo_v2_t),
        (agent._Violation, pynvml.c_nvmlViolationTime_t),
    ):
        assert [kind for _, kind in ours._fields_] == [kind for _, kind in theirs._fields_]
        assert ctypes.sizeof(ours) == ctypes.sizeof(theirs)
    names = ("SwPowerCap", "HwSlowdown", "SwThermalSlowdown", "HwThermalSlowdown", "HwPowerBrakeSlowdown")
    assert [bit for bit, _ in agent.THROTTLES] == [getattr(pynvml, f"nvmlClocksThrottleReason{name}") for name in names]
    assert agent._INSUFFICIENT_SIZE == pynvml.NVML_ERROR_INSUFFICIENT_SIZE
    assert (pynvml.NVML_CLOCK_SM, pynvml.NVML_CLOCK_MEM, pynvml.NVML_TEMPERATURE_GPU) == (1, 2, 0)
    assert (pynvml.NVML_PERF_POLICY_POWER, pynvml.NVML_PERF_POLICY_THERMAL) == (0, 1)


def test_a_shared_throttled_or_changing_gpu_is_said(card: RecordedNvml, another: int) -> None:
    before = agent.read()
    quiet = environment_of(before, agent.read(), USE)
    assert gpu_warnings(quiet) == ()
    assert quiet["gpu"] == card.name
    assert quiet["before"]["gpu_state"]["temperature_c"] == 61
    card.compute = {os.getpid(): 2**20, another: 512 * 2**20}
    card.violated_ns = {0: 5_050_000_000, 1: 3_000_000_000}
    card.throttle, card.limit_mw = 0x40 | 0x1, 150_000
    name = Path(f"/proc/{another}/comm").read_text().strip()
    environment = environment_of(before, agent.read(), USE)
    assert gpu_warnings(environment) == (
        f"the GPU was shared: {name} with 512 MiB",
        "the GPU was throttled (thermal) for 3.0 s of 10.0 s",
        "the GPU was throttled: hardware thermal slowdown",
        "the GPU's power limit changed from 200.0 to 150.0 W",
    )


def test_the_gpus_clock_is_watched_apart_from_the_processors() -> None:
    clocks = {"cpu0": 3000.0, "gpu": 2400.0}
    watch = ClockWatch(lambda: clocks)
    watch.start()
    watch.look()
    clocks["gpu"], watch._due = 1200.0, 0.0
    watch.look()
    found = watch.found()
    assert found == {
        "clock_mhz": {"lowest": 3000.0, "highest": 3000.0},
        "gpu_clock_mhz": {"lowest": 1200.0, "highest": 2400.0},
    }
    assert "between 1200 and 2400 MHz" in gpu_warnings({**environment_of({}, {}, USE), **found})[0]


def test_which_sessions_compute_on_the_gpu() -> None:
    assert on_gpu("onnxruntime-cuda", {})
    assert on_gpu("tensorrt-rtx", {})
    assert on_gpu("torch", {"device": "cuda"})
    assert not on_gpu("torch", {"device": "cpu"})
    assert not on_gpu("openvino", {"device": "CPU"})
    assert not on_gpu("onnxruntime", {})


def test_the_memory_of_a_model_on_a_gpu_is_the_most_that_its_process_held_there(card: RecordedNvml) -> None:
    card.compute = {1: 900 * 2**20}
    watch = agent.MemoryWatch()
    card.compute[os.getpid()] = 700 * 2**20
    watch._look()
    card.compute[os.getpid()] = 400 * 2**20
    found = watch.close()
    assert (found["gpu_mib"], found["unified"]) == (700.0, False)
    assert found["gpu_how"].startswith("NVML: GPU memory of a fresh process")
    told = _peak_on_gpu(found)
    assert told["peak_mib"] == 700.0
    assert re.search(r"beside it \d+ MiB of the host \(VmHWM\)", str(told["how"]))


@pytest.mark.parametrize(
    ("later", "memory", "reason"),
    [
        ({}, None, "does not list the process"),
        ({70_000_001: 2**30}, 1024.0, ""),
        ({70_000_001: 2**30, 70_000_002: 2**30}, None, "2 processes began to use the GPU meanwhile"),
        ({os.getpid(): NOT_AVAILABLE}, None, "does not tell the memory of a process"),
    ],
)
def test_memory_that_the_driver_does_not_tell_is_not_guessed(
    card: RecordedNvml, later: dict[int, int], memory: float | None, reason: str
) -> None:
    card.compute = {1: 900 * 2**20}
    watch = agent.MemoryWatch()
    card.compute |= later
    found = watch.close()
    assert found.get("gpu_mib") == memory
    assert reason in found["gpu_how"]
    assert _peak_on_gpu(found)["peak_mib"] == memory, "never the host's memory in its place"


def test_without_a_driver_the_memory_on_the_gpu_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "_GPUS", [None])
    found = agent.MemoryWatch().close()
    assert found == {"unified": False, "gpu_how": "n/a: no NVIDIA driver tells the GPU memory of a process here"}


def test_where_cpu_and_gpu_share_one_memory_it_is_what_the_system_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    free = [5000.0]
    monkeypatch.setattr(agent, "unified", lambda: True)
    monkeypatch.setattr(agent, "memory", lambda: {"memory_available_mib": free[0]})
    watch = agent.MemoryWatch()
    free[0] = 4200.0
    watch._look()
    free[0] = 4600.0
    found = watch.close()
    assert (found["gpu_mib"], found["unified"]) == (800.0, True)
    assert "MemAvailable" in _peak_on_gpu(found)["how"]  # type: ignore[operator]
