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
from profiles.energy import PowerSource, energy_of, energy_per_query, find_power, runs_on_gpu
from tests.sensors import put

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
    assert find_power(root=str(tmp_path)).how == "RAPL package-0, RAPL dram"


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
    power = find_power(root=str(tmp_path))
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
    power = PowerSource(*agent.energy_source(False, str(tmp_path), tegrastats=str(tool)))
    assert power.readable
    meter = power.open()
    meter.joules()
    assert meter.how == "tegrastats VDD_IN"
    meter.close()


class Seconds:
    """A clock and a meter on it: `idle` watts at each moment, `work` joules for each query on top."""

    how = "a synthetic sensor"

    def __init__(self, idle: Callable[[float], float], work: list[float]) -> None:
        self.ns, self.total = 0, 0.0
        self.idle, self.work = idle, work

    @property
    def power(self) -> PowerSource:
        return PowerSource(lambda: self, self.how)

    def now(self) -> int:
        return self.ns

    def sleep(self, seconds: float) -> None:
        self._pass(seconds, 0.0)

    def _pass(self, seconds: float, joules: float) -> None:
        self.total += self.idle(self.ns / 1e9 + seconds / 2) * seconds + joules
        self.ns += int(seconds * 1e9)

    def query(self, index: int) -> None:
        self._pass(0.002, self.work[index % len(self.work)])

    def joules(self) -> float:
        return self.total

    def close(self) -> None:
        pass


def test_idle_is_subtracted_and_the_interval_holds_the_truth() -> None:
    machine = Seconds(lambda now: 5.0 + 0.02 * (int(now * 100) % 3 - 1), [0.009, 0.011, 0.010, 0.0101, 0.0099])
    found = energy_per_query(machine.query, machine.power, machine, 2.0)
    assert found.millijoules == pytest.approx(10.0, rel=0.02)
    assert found.low is not None
    assert found.high is not None
    assert found.low <= 10.0 <= found.high
    assert found.idle_watts == pytest.approx(5.0, abs=0.02)
    assert found.busy_watts == pytest.approx(10.0, rel=0.02)
    assert found.queries == 1000
    assert "idle subtracted" in found.how


@settings(max_examples=20, deadline=None)
@given(st.floats(-0.8, 0.8), st.floats(0.002, 0.1))
def test_a_device_that_cools_down_after_the_model_was_loaded_costs_no_query_anything(drift: float, work: float) -> None:
    machine = Seconds(lambda now: 20.0 + drift * now, [work])
    found = energy_per_query(machine.query, machine.power, machine, 2.0)
    assert found.millijoules == pytest.approx(work * 1e3, rel=0.01)
    assert found.low is not None
    assert found.high is not None
    assert found.low - 1e-6 <= work * 1e3 <= found.high + 1e-6


def test_what_a_sensor_tells_late_is_not_taken_for_idle() -> None:
    class Late(Seconds):
        """Tells what was used 0.1 s ago, as a sensor that averages does."""

        def __init__(self) -> None:
            super().__init__(lambda now: 5.0, [0.01])
            self.known = [(0, 0.0)]

        def _pass(self, seconds: float, joules: float) -> None:
            super()._pass(seconds, joules)
            self.known.append((self.ns, self.total))

        def sleep(self, seconds: float) -> None:
            for _ in range(round(seconds * 1000)):
                self._pass(0.001, 0.0)

        def joules(self) -> float:
            return max((total for at, total in self.known if at <= self.ns - 100_000_000), default=0.0)

    machine = Late()
    assert energy_per_query(machine.query, machine.power, machine, 2.0).millijoules == pytest.approx(10.0, rel=0.02)


@pytest.mark.parametrize(("idle", "work"), [(0.0, 0.0), (5.0, -0.001)])
def test_a_sensor_that_tells_nothing_gives_no_figure(idle: float, work: float) -> None:
    machine = Seconds(lambda now: idle, [work])
    found = energy_per_query(machine.query, machine.power, machine, 1.0)
    assert found.millijoules is None
    assert "synthetic sensor" in found.how


def test_the_interval_widens_with_what_the_idle_spells_disagree() -> None:
    busy = [(2.0, 0.2, 100)] * 10
    calm = energy_of([(1.0 + 0.001 * (i % 2), 0.2) for i in range(10)], busy, "sensor")
    restless = energy_of([(1.0 + 0.1 * (i % 2), 0.2) for i in range(10)], busy, "sensor")
    assert calm.low is not None
    assert restless.low is not None
    assert restless.low < calm.low


class Nvml:
    """The calls of libnvidia-ml that are used, as its header has them: a status back, results by reference."""

    def __init__(self, counter: int = 0) -> None:
        self.millijoules, self.counter = 10_000, counter
        self.nvmlErrorString = lambda status: b"Not Supported"  # as ctypes, with attributes of its own

    def nvmlInit_v2(self) -> int:  # noqa: N802
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: int, handle: Any) -> int:  # noqa: N802
        handle._obj.value = 0x7F00_0000_0001
        return index

    def nvmlDeviceGetName(self, handle: Any, name: Any, size: int) -> int:  # noqa: N802
        assert handle.value == 0x7F00_0000_0001, "a handle is as wide as a pointer"
        name.value = b"NVIDIA RTX A2000"
        return 0

    def nvmlDeviceGetClockInfo(self, handle: Any, kind: int, value: Any) -> int:  # noqa: N802
        value._obj.value = {0: 300, 1: 1410}[kind]
        return self.counter

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any, value: Any) -> int:  # noqa: N802
        self.millijoules += 2_500
        value._obj.value = self.millijoules
        return self.counter


def test_the_counter_of_a_gpu_is_in_millijoules(tmp_path: Path) -> None:
    rapl(tmp_path)
    power = PowerSource(*agent.energy_source(True, str(tmp_path), library=Nvml()))
    assert power.how == "NVML, the whole NVIDIA RTX A2000"
    assert power.open().joules() == pytest.approx(2.5)


def test_the_clock_of_what_runs_on_a_gpu_is_the_gpus() -> None:
    assert agent.Clocks(on_gpu=True, library=Nvml()).read() == {"gpu": 1410.0}
    assert agent.Clocks(on_gpu=True, library=Nvml(counter=3)).read() == {}
    assert "gpu" not in agent.Clocks(on_gpu=False).read()


def test_packages_never_stand_for_a_gpu_and_a_jetsons_rail_does(tmp_path: Path) -> None:
    rapl(tmp_path)
    no_counter = PowerSource(*agent.energy_source(True, str(tmp_path), library=Nvml(counter=3)))
    if no_counter.how == "tegrastats":
        pytest.skip("this machine is a Jetson")
    assert not no_counter.readable
    assert no_counter.how == "NVML: Not Supported"
    tool = PowerSource(*agent.energy_source(True, str(tmp_path), tegrastats="tegrastats", library=Nvml(counter=3)))
    assert (tool.readable, tool.how) == (True, "tegrastats")
    ina3221(tmp_path)
    jetson = PowerSource(*agent.energy_source(True, str(tmp_path), library=Nvml(counter=3)))
    assert (jetson.readable, jetson.how) == (True, "INA3221 VDD_IN")
    for path in tmp_path.rglob("in1_input"):
        path.write_text("")
    locked = PowerSource(*agent.energy_source(True, str(tmp_path), library=Nvml(counter=3)))
    assert "NVML: Not Supported; INA3221 is there and cannot be read" in locked.how


def test_a_graphics_card_never_stands_for_the_cpu(tmp_path: Path) -> None:
    put(tmp_path, "sys/class/hwmon/hwmon0/name", "amdgpu")
    put(tmp_path, "sys/class/hwmon/hwmon0/power1_average", 42_000_000)
    assert agent.power_sensors(str(tmp_path))[0] == []


@pytest.mark.parametrize(
    ("runtime", "options", "gpu"),
    [
        ("torch", {"device": "cuda"}, True),
        ("torch-compiled", {"device": "cpu"}, False),
        ("tensorrt", {}, True),
        ("onnxruntime-cuda", {}, True),
        ("onnxruntime", {}, False),
        ("openvino", {"device": "CPU"}, False),
    ],
)
def test_energy_is_read_where_the_session_computes(runtime: str, options: dict[str, str], gpu: bool) -> None:
    assert runs_on_gpu(runtime, options) == gpu


def test_a_machine_without_a_gpu_says_why_there_is_no_energy_of_one(tmp_path: Path) -> None:
    rapl(tmp_path)
    power = find_power(on_gpu=True, root=str(tmp_path))
    if power.readable:
        pytest.skip("there is an NVIDIA GPU here")
    assert "NVML" in power.how
