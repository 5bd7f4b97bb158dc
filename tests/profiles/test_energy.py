"""Energy from real sysfs trees: wrap-around, rails of boards, recorded lines of tegrastats, idle subtracted."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profiles import agent
from profiles.energy import MachinePower, Meter, NvmlPower, energy_per_query, find_power

JETPACK_6 = (
    "11-20-2026 10:15:02 RAM 2450/7620MB (lfb 6x4MB) SWAP 0/3810MB (cached 0MB) CPU [12%@1510,3%@1510,0%@1510,1%@1510,"
    "off,off] GR3D_FREQ 31%@[624] cpu@52.3C soc2@50.9C gpu@51.1C tj@52.3C VDD_IN 5140mW/4980mW "
    "VDD_CPU_GPU_CV 1010mW/990mW VDD_SOC 1480mW/1470mW"
)
JETPACK_4 = (
    "RAM 1024/3964MB (lfb 418x4MB) SWAP 0/1982MB (cached 0MB) IRAM 0/252kB(lfb 252kB) CPU [2%@102,off,1%@102,0%@102] "
    "EMC_FREQ 0% GR3D_FREQ 0% PLL@31C CPU@33.5C PMIC@100C GPU@33C AO@41C thermal@33.25C POM_5V_IN 2100/2110 "
    "POM_5V_GPU 40/41 POM_5V_CPU 325/330"
)
XAVIER = "RAM 1903/15692MB (lfb 2948x4MB) CPU [1%@1190] GPU 310/310 CPU 465/465 SOC 930/930 CV 0/0 VDDRQ 155/155"


def put(root: Path, path: str, text: object) -> Path:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{text}\n")
    return file


def rapl(root: Path, microjoules: int = 1_000_000, wraps: int = 262_143_328_850) -> Path:
    base = "sys/class/powercap/intel-rapl:"
    for zone, name in (("0", "package-0"), ("0:0", "core"), ("0:1", "dram"), ("1", "psys")):
        put(root, f"{base}{zone}/name", name)
        put(root, f"{base}{zone}/max_energy_range_uj", wraps)
        put(root, f"{base}{zone}/energy_uj", microjoules)
    return root / f"{base}0/energy_uj"


def test_packages_and_memory_are_counted_once(tmp_path: Path) -> None:
    rapl(tmp_path)
    sensors, reason = agent.power_sensors(str(tmp_path))
    assert [sensor.name for sensor in sensors] == ["package-0", "dram"]
    assert reason == ""
    assert MachinePower(str(tmp_path)).how == "RAPL package-0, RAPL dram"


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 262_143_328_850), st.lists(st.integers(0, 262_143_328_850), min_size=1, max_size=5))
def test_a_counter_is_followed_over_its_wrap_around(
    tmp_path_factory: pytest.TempPathFactory, start: int, steps: list[int]
) -> None:
    root, wraps = tmp_path_factory.mktemp("rapl"), 262_143_328_850
    counter = rapl(root, start, wraps)
    meter = agent.EnergyMeter(agent.power_sensors(str(root))[0])
    position, passed = start, 0
    for step in steps:
        position, passed = (position + step) % (wraps + 1), passed + step
        counter.write_text(f"{position}\n")
        assert meter.joules() == pytest.approx(passed / 1e6, abs=1e-3)
    meter.close()


def test_a_counter_that_only_root_may_read_is_said(tmp_path: Path) -> None:
    # an unreadable file reads as an empty one does: no number (root ignores a file's mode)
    rapl(tmp_path)
    for path in tmp_path.rglob("energy_uj"):
        path.write_text("")
    power = MachinePower(str(tmp_path), tegrastats=None)
    if power.how == "tegrastats":
        pytest.skip("this machine is a Jetson")
    assert not power.readable
    assert "RAPL is there and cannot be read" in power.how
    assert "chmod" in power.how


def test_a_machine_without_sensors_says_so(tmp_path: Path) -> None:
    sensors, reason = agent.power_sensors(str(tmp_path))
    assert sensors == []
    assert "tells no energy" in reason


def ina3221(root: Path) -> None:
    folder = "sys/class/hwmon/hwmon1"
    put(root, f"{folder}/name", "ina3221")
    for channel, (name, millivolts, milliamperes) in enumerate(
        (("VDD_IN", 5000, 1200), ("VDD_CPU_GPU_CV", 5000, 200), ("VDD_SOC", 5000, 300)), start=1
    ):
        put(root, f"{folder}/in{channel}_label", name)
        put(root, f"{folder}/in{channel}_input", millivolts)
        put(root, f"{folder}/curr{channel}_input", milliamperes)


def test_the_input_rail_of_a_jetson_covers_the_others(tmp_path: Path) -> None:
    ina3221(tmp_path)
    rapl(tmp_path)
    (sensor,), _ = agent.power_sensors(str(tmp_path))
    assert (sensor.name, sensor.unit, sensor.read()) == ("VDD_IN", "watts", pytest.approx(6.0))


def test_the_power_monitor_of_jetpack_4_is_read_by_iio(tmp_path: Path) -> None:
    folder = "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0"
    for channel, (name, milliwatts) in enumerate((("POM_5V_IN", 2100), ("POM_5V_GPU", 40))):
        put(tmp_path, f"{folder}/rail_name_{channel}", name)
        put(tmp_path, f"{folder}/in_power{channel}_input", milliwatts)
    (sensor,), _ = agent.power_sensors(str(tmp_path))
    assert (sensor.name, sensor.read()) == ("POM_5V_IN", pytest.approx(2.1))


def test_another_chip_is_read_by_hwmon_its_counter_first(tmp_path: Path) -> None:
    put(tmp_path, "sys/class/hwmon/hwmon0/name", "amd_energy")
    put(tmp_path, "sys/class/hwmon/hwmon0/energy1_input", 5_000_000)
    put(tmp_path, "sys/class/hwmon/hwmon0/energy1_label", "Esocket0")
    put(tmp_path, "sys/class/hwmon/hwmon2/name", "power_meter")
    put(tmp_path, "sys/class/hwmon/hwmon2/power1_average", 42_000_000)
    (sensor,), _ = agent.power_sensors(str(tmp_path))
    assert (sensor.name, sensor.unit, sensor.read()) == ("amd_energy Esocket0", "joules", pytest.approx(5.0))
    (tmp_path / "sys/class/hwmon/hwmon0/energy1_input").unlink()
    (sensor,), _ = agent.power_sensors(str(tmp_path))
    assert (sensor.name, sensor.unit, sensor.read()) == ("power_meter", "watts", pytest.approx(42.0))


@pytest.mark.parametrize(
    ("line", "rail", "watts"),
    [
        (JETPACK_6, "VDD_IN", 5.14),
        (JETPACK_4, "POM_5V_IN", 2.1),
        (XAVIER, "sum of CPU, CV, GPU, SOC, VDDRQ", 1.86),
        ("RAM 2450/7620MB SWAP 0/3810MB", None, None),
    ],
)
def test_lines_of_tegrastats_give_the_boards_power(line: str, rail: str | None, watts: float | None) -> None:
    found = agent.board_watts(agent.tegrastats_watts(line))
    assert found == (None if rail is None else (rail, pytest.approx(watts)))


def test_readings_of_power_are_summed_up_over_time(tmp_path: Path) -> None:
    ina3221(tmp_path)
    meter = agent.EnergyMeter(agent.power_sensors(str(tmp_path))[0])
    meter._at -= 2.0  # as if the last reading were two seconds ago
    assert meter.joules() == pytest.approx(12.0, rel=0.2)
    meter.close()


def test_tegrastats_is_followed_where_its_files_cannot_be_read(tmp_path: Path) -> None:
    # the real program writes such lines for ever
    tool = tmp_path / "tegrastats"
    tool.write_text(f"#!/bin/sh\nwhile :; do echo '{JETPACK_6}'; sleep 0.05; done\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    power = MachinePower(str(tmp_path), tegrastats=str(tool))
    assert power.readable
    meter = power.open()
    meter.joules()
    assert meter.how == "tegrastats VDD_IN"
    meter.close()


class Seconds:
    """A clock and a meter on it: `idle` watts always, `work` joules for each query."""

    readable = True
    how = "a synthetic sensor"

    def __init__(self, idle: float, work: list[float], resting: Callable[[int], float] = lambda index: 0.0) -> None:
        self.ns, self.total = 0, 0.0
        self.idle, self.work, self.resting, self.slept = idle, work, resting, 0

    def now(self) -> int:
        return self.ns

    def sleep(self, seconds: float) -> None:
        self.slept += 1
        self._pass(seconds, (self.idle + self.resting(self.slept)) * seconds)

    def _pass(self, seconds: float, joules: float) -> None:
        self.ns += int(seconds * 1e9)
        self.total += joules

    def query(self, index: int) -> None:
        self._pass(0.002, self.idle * 0.002 + self.work[index % len(self.work)])

    def open(self) -> Meter:
        return self

    def joules(self) -> float:
        return self.total

    def close(self) -> None:
        pass


def test_idle_is_subtracted_and_the_interval_holds_the_truth() -> None:
    machine = Seconds(5.0, [0.009, 0.011, 0.010, 0.0101, 0.0099], lambda index: 0.02 * (index % 3 - 1))
    found = energy_per_query(machine.query, machine, machine, 2.0)
    assert found.millijoules == pytest.approx(10.0, rel=0.02)
    assert found.low is not None
    assert found.high is not None
    assert found.low < 10.0 < found.high
    assert found.idle_watts == pytest.approx(5.0, abs=0.02)
    assert found.busy_watts == pytest.approx(10.0, rel=0.02)
    assert found.queries == 1000
    assert "idle subtracted" in found.how


@pytest.mark.parametrize(("idle", "work"), [(0.0, 0.0), (5.0, -0.001)])
def test_a_sensor_that_tells_nothing_gives_no_figure(idle: float, work: float) -> None:
    machine = Seconds(idle, [work])
    found = energy_per_query(machine.query, machine, machine, 1.0)
    assert found.millijoules is None
    assert "synthetic sensor" in found.how


class Nvml:
    """The four calls of nvidia-ml-py that are used, in their documented units."""

    def __init__(self) -> None:
        self.millijoules = 10_000

    def nvmlInit(self) -> None: ...  # noqa: N802

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetName(self, handle: Any) -> bytes:  # noqa: N802
        return b"NVIDIA RTX A2000"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any) -> int:  # noqa: N802
        self.millijoules += 2_500
        return self.millijoules


def test_the_counter_of_a_gpu_is_in_millijoules() -> None:
    power = NvmlPower(Nvml())
    assert power.how == "NVML, the whole NVIDIA RTX A2000"
    assert power.open().joules() == pytest.approx(2.5)


def test_a_machine_without_a_gpu_says_why_there_is_no_energy_of_one() -> None:
    power = find_power("onnxruntime-cuda")
    if power.readable:
        pytest.skip("there is an NVIDIA GPU here")
    assert "NVML" in power.how or "nvidia-ml-py" in power.how
