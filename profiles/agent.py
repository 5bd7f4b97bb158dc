"""Reads the sensors of the machine it runs on: load, governor, clocks, temperatures, throttling, memory, power mode.

One file, standard library only, Python 3.6 and up, because a device may offer nothing else. It changes nothing and
needs no rights; what a machine does not tell is absent from the result. As a script it prints one JSON document.
"""
# Python 3.6 has no built-in generics, and sysfs paths are plain text here.
# ruff: noqa: UP006, UP035, UP045, PTH118, PTH119, PTH120, PTH123, PTH207

import glob
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from typing import Any, Dict, List, Optional, Tuple

CPU = "/sys/devices/system/cpu"


def read() -> Dict[str, Any]:
    """Everything that this machine tells now.

    cpu_model; cores (logical); affinity (list of cores that this process may use); load (1, 5, 15 minutes);
    governor (list of those in use); clocks_mhz {core: MHz}; max_clock_mhz; temperatures_c {sensor: degrees Celsius};
    throttle_events (thermal throttle events of all cores since boot); memory_mib and memory_available_mib;
    power_mode (NVIDIA Jetson, by name); machine, system, python.
    """
    found: Dict[str, Any] = {
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "cpu_model": cpu_model(),
        "cores": os.cpu_count(),
        "affinity": affinity(),
        "load": load(),
        "governor": governors(),
        "clocks_mhz": clocks(),
        "max_clock_mhz": max_clock(),
        "temperatures_c": temperatures(),
        "throttle_events": throttle_events(),
        "power_mode": power_mode(),
    }
    found.update(memory())
    return {key: value for key, value in found.items() if value not in (None, [], {}, "")}


def cpu_model() -> str:
    """The CPU's name, as the machine writes it."""
    text = _text("/proc/cpuinfo") or ""
    for key in ("model name", "Model", "Hardware"):
        match = re.search(rf"^{key}\s*:\s*(.+)$", text, re.MULTILINE)
        if match:
            return match.group(1).strip()
    board = _text("/proc/device-tree/model")
    if board:
        return board.strip("\0\n ")
    return platform.processor() or platform.machine()


def affinity() -> List[int]:
    """The cores that this process may use; empty where the system does not tell."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return []


def load() -> List[float]:
    """Load averages over 1, 5 and 15 minutes; empty where the system does not tell."""
    try:
        return [round(value, 2) for value in os.getloadavg()]
    except (OSError, AttributeError):
        return []


def governors() -> List[str]:
    """The frequency governors in use, such as "performance"."""
    texts = [_text(path) for path in glob.glob(CPU + "/cpu[0-9]*/cpufreq/scaling_governor")]
    return sorted({text.strip() for text in texts if text})


def clocks() -> Dict[str, float]:
    """Current clock of each core in MHz."""
    found = {}
    for path in sorted(glob.glob(CPU + "/cpu[0-9]*/cpufreq/scaling_cur_freq")):
        khz = _number(path)
        if khz:
            found[path.split("/")[5]] = round(khz / 1000, 1)
    if not found:
        for index, value in enumerate(
            re.findall(r"^cpu MHz\s*:\s*([\d.]+)", _text("/proc/cpuinfo") or "", re.MULTILINE)
        ):
            found[f"cpu{index}"] = round(float(value), 1)
    return found


def max_clock() -> Optional[float]:
    """The highest clock that the hardware allows, in MHz."""
    values = [_number(path) for path in glob.glob(CPU + "/cpu[0-9]*/cpufreq/cpuinfo_max_freq")]
    return max((value / 1000 for value in values if value), default=None)


def temperatures() -> Dict[str, float]:
    """Degrees Celsius by sensor: thermal zones first, hwmon where there are none."""
    found = {}
    for folder in sorted(glob.glob("/sys/class/thermal/thermal_zone*")):
        value = _number(folder + "/temp")
        if value is not None:
            name = (_text(folder + "/type") or os.path.basename(folder)).strip()
            found[name if name not in found else f"{name} {os.path.basename(folder)}"] = value / 1000
    if not found:
        for path in sorted(glob.glob("/sys/class/hwmon/hwmon*/temp*_input")):
            value = _number(path)
            if value is not None:
                label = _text(path.replace("_input", "_label")) or os.path.basename(path)[: -len("_input")]
                chip = _text(os.path.dirname(path) + "/name") or os.path.basename(os.path.dirname(path))
                found[f"{chip.strip()} {label.strip()}"] = value / 1000
    # a sensor that is switched off reads absolute nonsense; no silicon works outside this range
    return {name: round(value, 1) for name, value in found.items() if -60 < value < 150}


def throttle_events() -> Optional[int]:
    """Thermal throttle events since boot, or on a Raspberry Pi its throttle bits; None where nothing tells."""
    counts = [_number(path) for path in glob.glob(CPU + "/cpu[0-9]*/thermal_throttle/*_throttle_count")]
    known = [count for count in counts if count is not None]
    if known:
        return int(sum(known))
    bits = _text("/sys/devices/platform/soc/soc:firmware/get_throttled")
    return int(bits, 16) if bits else None


def memory() -> Dict[str, float]:
    """memory_mib: installed; memory_available_mib: what a new program could take now."""
    text = _text("/proc/meminfo") or ""
    found = {}
    for key, name in (("MemTotal", "memory_mib"), ("MemAvailable", "memory_available_mib")):
        match = re.search(rf"^{key}:\s+(\d+) kB", text, re.MULTILINE)
        if match:
            found[name] = round(int(match.group(1)) / 1024, 1)
    return found


def power_mode() -> Optional[str]:
    """The power mode of an NVIDIA Jetson by its name (the numbers differ per module); None elsewhere."""
    tool = shutil.which("nvpmodel")
    if tool is None:
        return None
    try:
        # stdin is closed so that a question of the tool can never be answered
        done = subprocess.run(
            [tool, "-q"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r"NV Power Mode:\s*(?:MODE_)?(\S+)", done.stdout.decode("utf-8", "replace"))
    return match.group(1) if match else None


class CpuUse:
    """CPU seconds of the whole machine, of this process and of every process, at one moment."""

    def __init__(self) -> None:
        self.wall = time.monotonic()
        own = os.times()
        self.own = own.user + own.system + own.children_user + own.children_system
        self.busy, self.stolen = _machine_seconds()
        self.processes = _process_seconds()

    def since(self, before: "CpuUse") -> Dict[str, Any]:
        """What others did between two moments.

        other_cores: cores that other processes kept busy on average; stolen_cores: cores that the hypervisor gave to
        other machines; busiest: up to three of those processes, name and cores. Empty where the system does not tell.
        """
        seconds = self.wall - before.wall
        if self.busy is None or before.busy is None or seconds <= 0:
            return {}
        others = (self.busy - before.busy) - (self.own - before.own)
        used: List[Dict[str, Any]] = []
        for pid, (name, total) in self.processes.items():
            cores = (total - before.processes.get(pid, (name, 0.0))[1]) / seconds
            if pid != os.getpid() and cores >= 0.05:
                used.append({"name": name, "cores": round(cores, 2)})
        return {
            "other_cores": round(max(others, 0.0) / seconds, 3),
            "stolen_cores": round((self.stolen - before.stolen) / seconds, 3),
            "busiest": sorted(used, key=lambda entry: -float(entry["cores"]))[:3],
            "seconds": round(seconds, 2),
        }


def _machine_seconds() -> Tuple[Optional[float], float]:
    """Busy and stolen CPU seconds of all cores since boot (proc(5): user nice system idle iowait irq softirq steal)."""
    first = (_text("/proc/stat") or "").split("\n", 1)[0].split()
    if len(first) < 9 or first[0] != "cpu":
        return None, 0.0
    ticks = [int(value) for value in first[1:9]]
    hertz = os.sysconf("SC_CLK_TCK")
    return (ticks[0] + ticks[1] + ticks[2] + ticks[5] + ticks[6]) / hertz, ticks[7] / hertz


def _process_seconds() -> Dict[int, Tuple[str, float]]:
    """CPU seconds of every process by its id, with its name."""
    found = {}
    hertz = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
    for path in glob.glob("/proc/[0-9]*/stat"):
        text = _text(path)
        if text and ")" in text:
            # the name stands in parentheses and may itself hold blanks and parentheses
            name = text[text.index("(") + 1 : text.rindex(")")]
            fields = text[text.rindex(")") + 2 :].split()
            found[int(path.split("/")[2])] = (name, (int(fields[11]) + int(fields[12])) / hertz)
    return found


def _text(path: str) -> Optional[str]:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return None


def _number(path: str) -> Optional[float]:
    text = _text(path)
    try:
        return float(text) if text else None
    except ValueError:
        return None


TOTAL_RAILS = ("VDD_IN", "POM_5V_IN", "VIN_SYS_5V0", "VIN")
"""Rails that feed the whole board of a Jetson; the others are parts of them."""


class PowerSensor:
    """One place where a machine tells energy or power, read through files.

    kind: "rapl", "hwmon" or "ina3221". name: what it covers, such as "package-0" or "VDD_IN". unit: "joules" for a
    counter, "watts" for a reading of now. wraps: joules at which the counter starts again, None where it does not.
    """

    def __init__(
        self,
        kind: str,
        name: str,
        unit: str,
        paths: List[str],
        scale: float,
        wraps: Optional[float] = None,
    ) -> None:
        self.kind, self.name, self.unit = kind, name, unit
        self.paths, self.scale, self.wraps = paths, scale, wraps

    def read(self) -> Optional[float]:
        """Joules or watts, the product of its files' numbers; None where one cannot be read now."""
        value = self.scale
        for path in self.paths:
            number = _number(path)
            if number is None:
                return None
            value *= number
        return value


def power_sensors(root: str = "/") -> Tuple[List[PowerSensor], str]:
    """The sensors whose sum is the most complete figure that this machine tells; none, with the reason.

    A Jetson's input rail first, then RAPL (processor packages and memory), then other hwmon chips with a counter or a
    reading. Sensors of parts that another one covers are left out.
    """
    for found in (_ina3221(root), _rapl(root), _hwmon_power(root)):
        readable = [sensor for sensor in found if sensor.read() is not None]
        if readable:
            return readable, ""
        if found:
            path = found[0].paths[0]
            return [], f"{found[0].kind.upper()} is there and cannot be read (sudo chmod a+r {path})"
    return [], "this machine tells no energy: neither RAPL, INA3221 nor another hwmon sensor in /sys"


def _rapl(root: str) -> List[PowerSensor]:
    """Intel's and AMD's running average power limit counters: every package, and the memory beside it."""
    found = []
    base = os.path.join(root, "sys/class/powercap")
    for folder in sorted(glob.glob(base + "/intel-rapl:*")):
        name = (_text(folder + "/name") or "").strip()
        if not (name.startswith("package") or name == "dram"):
            continue  # cores and graphics are parts of the package, psys would count it twice
        wraps = _number(folder + "/max_energy_range_uj")
        found.append(PowerSensor("rapl", name, "joules", [folder + "/energy_uj"], 1e-6, wraps and (wraps + 1) / 1e6))
    return found


def _ina3221(root: str) -> List[PowerSensor]:
    """The power monitor of the Jetson boards: by hwmon (JetPack 5 and up), by iio (JetPack 4)."""
    rails: Dict[str, PowerSensor] = {}
    for folder in sorted(glob.glob(os.path.join(root, "sys/class/hwmon/hwmon*"))):
        if (_text(folder + "/name") or "").strip() != "ina3221":
            continue
        for path in sorted(glob.glob(folder + "/in[0-9]*_label")):
            name = (_text(path) or "").strip()
            channel = os.path.basename(path)[2 : -len("_label")]
            volts, amperes = f"{folder}/in{channel}_input", f"{folder}/curr{channel}_input"
            if name and _number(amperes) is not None:
                rails[name] = PowerSensor("ina3221", name, "watts", [volts, amperes], 1e-6)  # mV times mA
    for path in sorted(glob.glob(os.path.join(root, "sys/bus/i2c/drivers/ina3221x/*/iio:device*/rail_name_*"))):
        name, channel = (_text(path) or "").strip(), path.rsplit("_", 1)[1]
        power = f"{os.path.dirname(path)}/in_power{channel}_input"
        rails.setdefault(name, PowerSensor("ina3221", name, "watts", [power], 1e-3))
    for name in TOTAL_RAILS:
        if name in rails:
            return [rails[name]]
    return [rails[name] for name in sorted(rails)]


def _hwmon_power(root: str) -> List[PowerSensor]:
    """Other chips: energy counters where there are some, else readings of power."""
    counters: List[PowerSensor] = []
    readings: List[PowerSensor] = []
    for folder in sorted(glob.glob(os.path.join(root, "sys/class/hwmon/hwmon*"))):
        chip = (_text(folder + "/name") or os.path.basename(folder)).strip()
        if chip == "ina3221":
            continue
        for pattern, unit, into in (("energy", "joules", counters), ("power", "watts", readings)):
            for path in sorted(glob.glob(f"{folder}/{pattern}[0-9]*_input")):
                label = (_text(path[: -len("_input")] + "_label") or "").strip()
                into.append(PowerSensor("hwmon", (chip + " " + label).strip(), unit, [path], 1e-6))
        if not glob.glob(folder + "/power[0-9]*_input"):
            readings += [
                PowerSensor("hwmon", chip, "watts", [path], 1e-6)
                for path in sorted(glob.glob(folder + "/power[0-9]*_average"))
            ]
    return counters or readings


def tegrastats_watts(line: str) -> Dict[str, float]:
    """Watts by rail from one line of tegrastats, as JetPack 4 ("POM_5V_IN 2100/2100") and later ones write.

    The first number is that of now, the second an average since the start.
    """
    found = re.findall(r"(?<!\S)([A-Z][A-Z0-9_]*) (\d+)(?:mW)?/\d+(?:mW)?(?!\S)", line)
    return {name: int(value) / 1000 for name, value in found}


def board_watts(rails: Dict[str, float]) -> Optional[Tuple[str, float]]:
    """What the whole board takes: its input rail, else the sum of all rails; None without rails."""
    for name in TOTAL_RAILS:
        if name in rails:
            return name, rails[name]
    return ("sum of " + ", ".join(sorted(rails)), sum(rails.values())) if rails else None


class Tegrastats:
    """tegrastats in the background, for boards whose sensor files cannot be read; it needs no rights."""

    def __init__(self, command: str = "tegrastats", interval_ms: int = 100) -> None:
        self.watts: Optional[float] = None
        self.name = ""
        self._process = subprocess.Popen(
            [command, "--interval", str(interval_ms)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            universal_newlines=True,
        )
        self._thread = threading.Thread(target=self._follow)
        self._thread.daemon = True
        self._thread.start()

    def _follow(self) -> None:
        for line in self._process.stdout or ():
            total = board_watts(tegrastats_watts(line))
            if total is not None:
                self.name, self.watts = total

    def close(self) -> None:
        """Ends it."""
        self._process.terminate()
        self._process.wait()
        self._thread.join(5)


class EnergyMeter:
    """Joules since it was made, of all its sensors together.

    A counter is followed over its wrap-around, for which it must be read at least once per turn. A reading of power is
    taken every `interval` seconds in the background and summed up by the trapezoidal rule.
    """

    def __init__(
        self,
        sensors: List[PowerSensor],
        interval: float = 0.02,
        tegrastats: Optional[Tegrastats] = None,
    ) -> None:
        self.how = ", ".join(f"{sensor.kind.upper()} {sensor.name}" for sensor in sensors)
        self._sensors, self._interval, self._tegrastats = sensors, interval, tegrastats
        self._total = 0.0
        self._counters = {s.paths[0]: s.read() for s in sensors if s.unit == "joules"}
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._watts, self._at = self._read_watts(), time.monotonic()
        self._thread: Optional[threading.Thread] = None
        if tegrastats is not None or any(sensor.unit == "watts" for sensor in sensors):
            self._thread = threading.Thread(target=self._follow)
            self._thread.daemon = True
            self._thread.start()

    def joules(self) -> float:
        """Since the meter was made."""
        with self._lock:
            self._integrate()
            for sensor in self._sensors:
                if sensor.unit == "joules":
                    before, now = self._counters[sensor.paths[0]], sensor.read()
                    if before is not None and now is not None:
                        step = now - before
                        self._total += step if step >= 0 else step + (sensor.wraps or 0.0)
                        self._counters[sensor.paths[0]] = now
            return self._total

    def close(self) -> None:
        """Ends the reading in the background."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(5)
        if self._tegrastats is not None:
            self._tegrastats.close()

    def _follow(self) -> None:
        while not self._stopped.wait(self._interval):
            with self._lock:
                self._integrate()

    def _integrate(self) -> None:
        now, watts = time.monotonic(), self._read_watts()
        if watts is not None:
            self._total += (now - self._at) * (watts if self._watts is None else (watts + self._watts) / 2)
            self._watts, self._at = watts, now

    def _read_watts(self) -> Optional[float]:
        if self._tegrastats is not None:
            self.how = "tegrastats " + self._tegrastats.name
            return self._tegrastats.watts
        readings = [sensor.read() for sensor in self._sensors if sensor.unit == "watts"]
        known = [reading for reading in readings if reading is not None]
        return sum(known) if known else None


if __name__ == "__main__":
    json.dump(read(), sys.stdout, indent=2, sort_keys=True)
    sys.stdout.write("\n")
