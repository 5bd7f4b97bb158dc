"""Reads the sensors of the machine it runs on, and measures models there for a host that sent it over ssh.

One file, standard library only, Python 3.6 and up, because a device may offer nothing else. Reading changes nothing and
needs no rights; what a machine does not tell is absent from the result. As a script it prints one JSON document.

Sent over ssh (`profiles.remote`) it works in one folder that it makes, asks nothing of the internet or of sudo, and
removes the folder and every process at the end: when the host says so, when the link breaks, and, by a second process
that waits for nothing else, when the agent itself is killed. Models run in further processes, which may die without it.
"""
# Python 3.6 has no built-in generics, and sysfs paths are plain text here.
# ruff: noqa: B904, B905, PTH100, PTH104, PTH107, PTH110, PTH111, PTH113, PTH118, PTH119, PTH120, PTH123, PTH202, PTH207, SIM105, SIM115
# ruff: noqa: PLW2901, UP006, UP031, UP035, UP037, UP045

import ctypes
import ctypes.util
import errno
import gc
import glob
import json
import os
import platform
import queue
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

ROOT = os.environ.get("EDGESTILL_ROOT", "/")
"""Where the file system is whose /sys is read: in a container, the folder that the machine's own is mounted at."""
CPU = os.path.join(ROOT, "sys/devices/system/cpu")


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
            found[path.split("/")[-3]] = round(khz / 1000, 1)
    if not found:
        for index, value in enumerate(
            re.findall(r"^cpu MHz\s*:\s*([\d.]+)", _text("/proc/cpuinfo") or "", re.MULTILINE)
        ):
            found[f"cpu{index}"] = round(float(value), 1)
    for path in glob.glob(os.path.join(ROOT, "sys/class/devfreq/*/cur_freq")):
        hertz = _number(path)
        name = path.split("/")[-2]
        if hertz and re.search(r"gpu|gv11b|ga10b|gp10b|gm20b", name):
            found["gpu"] = round(hertz / 1e6, 1)
    return found


def max_clock() -> Optional[float]:
    """The highest clock that the hardware allows, in MHz."""
    values = [_number(path) for path in glob.glob(CPU + "/cpu[0-9]*/cpufreq/cpuinfo_max_freq")]
    return max((value / 1000 for value in values if value), default=None)


def temperatures() -> Dict[str, float]:
    """Degrees Celsius by sensor: thermal zones first, hwmon where there are none."""
    found = {}
    for folder in sorted(glob.glob(os.path.join(ROOT, "sys/class/thermal/thermal_zone*"))):
        value = _number(folder + "/temp")
        if value is not None:
            name = (_text(folder + "/type") or os.path.basename(folder)).strip()
            found[name if name not in found else f"{name} {os.path.basename(folder)}"] = value / 1000
    if not found:
        for path in sorted(glob.glob(os.path.join(ROOT, "sys/class/hwmon/hwmon*/temp*_input"))):
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
    # an Orin's counters of over-current and under-voltage, each of which slows the clocks
    counts += [_number(path) for path in glob.glob(os.path.join(ROOT, "sys/class/hwmon/hwmon*/oc*_event_cnt"))]
    known = [count for count in counts if count is not None]
    if known:
        return int(sum(known))
    bits = _text(os.path.join(ROOT, "sys/devices/platform/soc/soc:firmware/get_throttled"))
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
    match = re.search(r"NV Power Mode:\s*(?:MODE_)?(\S+)", _output(["nvpmodel", "-q"]) or "")
    return match.group(1) if match else None


class CpuUse:
    """CPU seconds of the whole machine, of this process and of every process, at one moment."""

    def __init__(self) -> None:
        self.wall = time.monotonic()
        own = os.times()
        self.own = own.user + own.system + own.children_user + own.children_system
        self.busy, self.stolen = _machine_seconds()
        self.processes = _process_seconds()

    def since(self, before: "CpuUse", worker: int = 0) -> Dict[str, Any]:
        """What others did between two moments. worker: a process of this one's, which does not count as another.

        other_cores: cores that other processes kept busy on average; stolen_cores: cores that the hypervisor gave to
        other machines; busiest: up to three of those processes, name and cores. Empty where the system does not tell.
        """
        seconds = self.wall - before.wall
        if self.busy is None or before.busy is None or seconds <= 0:
            return {}
        others = (self.busy - before.busy) - (self.own - before.own)
        if worker in self.processes:
            others -= self.processes[worker][1] - before.processes.get(worker, ("", 0.0))[1]
        used: List[Dict[str, Any]] = []
        for pid, (name, total) in self.processes.items():
            cores = (total - before.processes.get(pid, (name, 0.0))[1]) / seconds
            if pid not in (os.getpid(), worker) and cores >= 0.05:
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


def _output(command: List[str]) -> Optional[str]:
    """What a tool prints; None where it is missing or fails."""
    tool = shutil.which(command[0])
    if tool is None:
        return None
    try:
        # stdin is closed so that a question of the tool, such as about a reboot, can never be answered
        done = subprocess.run(
            [tool, *command[1:]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode("utf-8", "replace")


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


# -- power and energy --------------------------------------------------------------------------------------------------


TOTAL_RAILS = ("VDD_IN", "POM_5V_IN", "VIN_SYS_5V0", "VIN")
"""Rails that feed the whole board of a Jetson; the others are parts of them."""


_GRAPHICS = ("amdgpu", "radeon", "nouveau", "i915", "xe")
"""Chips in hwmon whose power is that of a graphics card, which does not run what the CPU runs."""


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


def power_sensors(root: str = ROOT) -> Tuple[List[PowerSensor], str]:
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
        if chip == "ina3221" or chip in _GRAPHICS:
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


_NVML_CLOCK_SM = 1


class Nvml:
    """NVIDIA's management library about the first GPU that CUDA counts; a device's Python need not have its package.

    Raises:
        OSError: no driver, no GPU, or a GPU that does not tell what is asked.
    """

    def __init__(self, library: Any = None) -> None:
        self.library = library or ctypes.CDLL("libnvidia-ml.so.1")
        self._check(self.library.nvmlInit_v2())
        self.handle = ctypes.c_void_p()
        place = _cuda_bus() if library is None else None
        # NVML counts by the bus, CUDA by speed and by CUDA_VISIBLE_DEVICES
        self._check(
            self.library.nvmlDeviceGetHandleByPciBusId_v2(place, ctypes.byref(self.handle))
            if place
            else self.library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(self.handle))
        )
        name = ctypes.create_string_buffer(96)
        self._check(self.library.nvmlDeviceGetName(self.handle, name, 96))
        self.name = name.value.decode("utf-8", "replace")

    def joules(self) -> float:
        """The board's counter (Volta and later), since the driver was loaded."""
        value = ctypes.c_ulonglong()
        self._check(self.library.nvmlDeviceGetTotalEnergyConsumption(self.handle, ctypes.byref(value)))
        return value.value / 1e3

    def clock(self) -> int:
        """Of its multiprocessors now, in MHz."""
        value = ctypes.c_uint()
        self._check(self.library.nvmlDeviceGetClockInfo(self.handle, _NVML_CLOCK_SM, ctypes.byref(value)))
        return value.value

    def _check(self, status: int) -> None:
        if status != 0:
            self.library.nvmlErrorString.restype = ctypes.c_char_p
            raise OSError(self.library.nvmlErrorString(status).decode("utf-8", "replace"))


def _cuda_bus() -> Optional[bytes]:
    """Where on the bus CUDA's first GPU is; None where there is no CUDA."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        device, place = ctypes.c_int(), ctypes.create_string_buffer(32)
        if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0):
            return None
        return None if cuda.cuDeviceGetPCIBusId(place, 32, device) else place.value
    except (OSError, AttributeError):
        return None


class NvmlMeter:
    """Joules of a GPU since it was made; see `EnergyMeter`."""

    def __init__(self, gpu: Nvml) -> None:
        self.how = "NVML, the whole " + gpu.name
        self._gpu, self._began = gpu, gpu.joules()

    def joules(self) -> float:
        """Since the meter was made."""
        return self._gpu.joules() - self._began

    def close(self) -> None:
        """Nothing runs in the background."""


class Clocks:
    """The clocks in MHz of what runs a model: the cores', or the GPU's alone."""

    def __init__(self, on_gpu: bool, library: Any = None) -> None:
        self._on_gpu, self._due = on_gpu, 0.0
        self._gpu: Optional[Nvml] = None
        if on_gpu:
            try:
                self._gpu = Nvml(library)
            except OSError:
                pass  # a Jetson's own driver tells, or nothing does

    def read(self) -> Dict[str, float]:
        """Now; empty where nothing tells."""
        found = clocks()
        if not self._on_gpu:
            found.pop("gpu", None)
            return found
        if "gpu" in found:
            return {"gpu": found["gpu"]}
        try:
            return {"gpu": float(self._gpu.clock())} if self._gpu is not None else {}
        except OSError:
            return {}

    def look(self) -> Dict[str, float]:
        """Now, at most once in a second, since reading takes a moment; empty in between."""
        if time.monotonic() < self._due:
            return {}
        self._due = time.monotonic() + 1.0
        return self.read()

    def highest_while(self, work: Callable[[], Any]) -> Tuple[Any, Dict[str, float]]:
        """What work returns, and the highest clocks meanwhile: of a process that starts, loads and then computes."""
        found: Dict[str, float] = {}
        done = threading.Event()

        def follow() -> None:
            while not done.wait(0.1):
                for name, value in self.read().items():
                    found[name] = max(value, found.get(name, 0.0))

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            return work(), found
        finally:
            done.set()
            thread.join()


def energy_source(
    on_gpu: bool, root: str = ROOT, tegrastats: Optional[str] = None, library: Any = None
) -> Tuple[Optional[Callable[[], Any]], str]:
    """What starts a meter for a model that runs on the CPU, or on an NVIDIA GPU, and which sensor it reads.

    A GPU's own counter; where it has none, as on a Jetson, the rail or the tool that tells the whole board, GPU
    included. A counter of processor packages never stands for a GPU. Without any: None, and the reason.
    """
    sensors, reason = power_sensors(root)
    if on_gpu:
        try:
            gpu = Nvml(library)
            gpu.joules()
            return (lambda: NvmlMeter(gpu)), "NVML, the whole " + gpu.name
        except OSError as error:
            reason = "NVML: %s" % error + ("; " + reason if reason.startswith("INA3221") else "")
    if sensors and (not on_gpu or sensors[0].kind == "ina3221"):
        return (lambda: EnergyMeter(sensors)), ", ".join(f"{sensor.kind.upper()} {sensor.name}" for sensor in sensors)
    tool = tegrastats or shutil.which("tegrastats")
    if tool is None:
        return None, reason
    command = tool

    def follow() -> EnergyMeter:
        meter = EnergyMeter([], tegrastats=Tegrastats(command))
        time.sleep(0.5)  # its first line
        return meter

    return follow, "tegrastats"


LEAD_SECONDS = 0.15
"""What a sensor that averages and a clock that follows the load may need; as long a lead-in does not count."""


def energy_spells(
    joules: Callable[[], float],
    now: Callable[[], int],
    rest: Callable[[float], None],
    work: Callable[[float], int],
    seconds: float,
    pairs: int,
) -> Dict[str, Any]:
    """Pairs of an idle and a busy spell, each after a lead-in that does not count.

    The order within the pairs turns about (idle busy, busy idle, ...), so that a slow change, as of a device that
    cools down or lowers its clocks after the model was loaded, falls on both alike.

    joules: since any moment. now: nanoseconds. rest: idles for seconds. work: runs queries for seconds, one at least,
    and returns their number. Returns idle [[joules, seconds]] and busy [[joules, seconds, queries]], a row per pair.
    """
    lead = min(seconds, LEAD_SECONDS)
    found: Dict[str, Any] = {"idle": [], "busy": []}
    for index in range(pairs):
        for kind in ("idle", "busy") if index % 2 == 0 else ("busy", "idle"):
            if kind == "idle":
                rest(lead)
                before, start = joules(), now()
                rest(seconds)
                found[kind].append([joules() - before, (now() - start) / 1e9])
            else:
                work(lead)
                before, start = joules(), now()
                count = work(seconds)
                found[kind].append([joules() - before, (now() - start) / 1e9, count])
    return found


# -- a Jetson's own tools ----------------------------------------------------------------------------------------------


def board() -> Dict[str, Any]:
    """What the machine is: board (device tree), hostname, C library, L4T release (of JetPack), GPU and its driver."""
    found: Dict[str, Any] = {
        "hostname": platform.node(),
        "libc": platform.libc_ver()[1],
        "board": (_text("/proc/device-tree/model") or "").strip("\0\n "),
        "l4t": l4t_release(_text("/etc/nv_tegra_release") or ""),
        "tegrastats": tegrastats(),
    }
    card = _output(["nvidia-smi", "--query-gpu=name,driver_version,compute_cap,memory.total", "--format=csv,noheader"])
    if card and "," in card:
        names = ("gpu", "driver", "compute_capability", "gpu_memory")
        found.update(zip(names, (part.strip() for part in card.splitlines()[0].split(","))))
    version = _output(["dpkg-query", "-W", "-f=${Version}", "nvidia-jetpack"]) if found["l4t"] else None
    found["jetpack"] = (version or "").partition("+")[0]
    return {key: value for key, value in found.items() if value not in (None, [], {}, "")}


def l4t_release(text: str) -> str:
    """ "36.4.3" from the first line of /etc/nv_tegra_release: `# R36 (release), REVISION: 4.3, GCID: ...`."""
    match = re.search(r"# R(\d+) \(release\), REVISION: ([\d.]+)", text)
    return match.group(1) + "." + match.group(2) if match else ""


def tegrastats() -> Dict[str, Any]:
    """One line of NVIDIA's `tegrastats`, parsed; empty elsewhere."""
    tool = shutil.which("tegrastats")
    if tool is None:
        return {}
    try:
        process = subprocess.Popen(
            [tool, "--interval", "200"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
    except OSError:
        return {}
    timer = threading.Timer(5.0, process.kill)
    timer.start()
    try:
        assert process.stdout is not None
        return parse_tegrastats(process.stdout.readline().decode("utf-8", "replace"))
    finally:
        timer.cancel()
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def parse_tegrastats(line: str) -> Dict[str, Any]:
    """ram_mib, gpu_percent, gpu_mhz (as the line has them), temperatures_c, power_mw (now, not the average).

    A sensor that is off reads -256 C and is left out. JetPack 4 writes rails without a unit (`POM_5V_IN 2534/2534`), 5
    and later in mW.
    """
    found: Dict[str, Any] = {}
    match = re.search(r"\bRAM (\d+)/(\d+)MB", line)
    if match:
        found["ram_mib"] = int(match.group(1))
    match = re.search(r"\bGR3D_FREQ (\d+)%(?:@\[?(\d+))?", line)
    if match:
        found["gpu_percent"] = int(match.group(1))
        if match.group(2):
            found["gpu_mhz"] = int(match.group(2))
    degrees = {name: float(value) for name, value in re.findall(r"\b(\w+)@(-?[\d.]+)C\b", line)}
    found["temperatures_c"] = {name: value for name, value in degrees.items() if -60 < value < 150}
    found["power_mw"] = {name: round(watts * 1000) for name, watts in tegrastats_watts(line).items()}
    return {key: value for key, value in found.items() if value not in (None, {}, "")}


def parse_trtexec_times(text: str, warm_up_ms: float) -> List[float]:
    """Compute milliseconds of every query of `trtexec --exportTimes`, without those of the warm-up.

    The JSON's keys changed with the versions (`startInMs`, later `startH2dMs`); `startComputeMs` and `computeMs` are in
    all of them. TensorRT 8 also writes the warm-up's queries.

    Raises:
        Problem: not such a file, or no query after the warm-up.
    """
    try:
        entries = [(float(entry["startComputeMs"]), float(entry["computeMs"])) for entry in json.loads(text)]
    except (ValueError, KeyError, TypeError) as error:
        raise Problem("failed", "trtexec's times cannot be read", str(error))
    times = [compute for start, compute in entries if start >= warm_up_ms]
    if not times or not all(0 < value < 1e9 for value in times):
        raise Problem("failed", "trtexec timed no query", "%d entries in its times" % len(entries))
    return times


def trtexec_version(text: str) -> str:
    """ "8.5.2" from `[TensorRT v8502]`, "10.3.0" from `[TensorRT v100300]`; empty when there is none."""
    match = re.search(r"\[TensorRT v(\d+)\]", text)
    if not match:
        return ""
    number = int(match.group(1))
    major = 1000 if number < 10000 else 10000
    return "%d.%d.%d" % (number // major, number % major // 100, number % 100)


def explain_trtexec(output: str, status: int) -> "Problem":
    """Which of the known failures of TensorRT's builder or runtime an output shows."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "[E]" in line] or [line for line in lines if "rror" in line] or lines[-1:]
    known = (
        ("disk_full", "the device's disk is full", r"No space left on device"),
        (
            "other_engine",
            "the engine was made by another TensorRT or for another GPU",
            r"Version tag does not match|[Ss]erializationCheck|serialized engine.*version|different (?:version|model)"
            r"|engine plan file is (?:not compatible|generated on an incompatible)",
        ),
        (
            "unsupported_operator",
            "TensorRT on the device does not know an operator of the graph",
            r"No importer registered for op|[Uu]nsupported (?:ONNX )?operator|UNSUPPORTED_NODE|Plugin not found",
        ),
        (
            "builder_memory",
            "TensorRT ran out of memory on the device",
            r"[Oo]ut ?[Oo]f ?[Mm]emory|OutOfMemory|could not be allocated|bad_alloc|insufficient memory",
        ),
        ("no_gpu", "TensorRT finds no GPU", r"no CUDA-capable device|CUDA initialization failure|libcuda"),
    )
    # a build that fails for one reason may have warned of another
    for said in ([line for line in lines if not re.search(r"\[[IWV]\]", line)], lines):
        for kind, message, pattern in known:
            found = [line for line in said if re.search(pattern, line)]
            if found:
                return Problem(kind, message, found[0])
    if status in (-9, 137):
        return Problem("builder_memory", "the system killed TensorRT, most likely for its memory", "killed by signal 9")
    return Problem("failed", "TensorRT failed on the device", errors[0] if errors else "exit status %d" % status)


# -- serving: what a host asks over ssh --------------------------------------------------------------------------------


PROTOCOL = 1
SILENCE = 90.0
"""Seconds without a word from the host after which the link counts as cut; the host speaks every 10."""
TRTEXEC = ("trtexec", "/usr/src/tensorrt/bin/trtexec")
_WARM_UP_MS = 200
_RESETTLE = 2
_CHUNK = 1 << 20


class Problem(Exception):
    """Something that the host explains to its user: a kind, a sentence and the line that shows it."""

    def __init__(self, kind: str, message: str, evidence: str = "") -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.evidence = evidence

    def document(self) -> Dict[str, Any]:
        """As the host reads it."""
        return {"error": {"kind": self.kind, "message": self.message, "evidence": self.evidence[:500]}}


def _explained(error: BaseException) -> "Problem":
    if isinstance(error, Problem):
        return error
    text = str(error).strip().splitlines()[:1] or [type(error).__name__]
    # EFBIG: a limit on file sizes; for a user it is the same as a full disk
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return Problem("disk_full", "the device's disk is full", text[0])
    if isinstance(error, MemoryError):
        return Problem("builder_memory", "the device is out of memory", text[0])
    return Problem("failed", "the agent failed on the device", "%s: %s" % (type(error).__name__, text[0]))


class Lines:
    """Lines and payloads from a file descriptor, with a bound on silence.

    Raises:
        EOFError: the other side is gone, or said nothing for `silence` seconds.
    """

    def __init__(self, descriptor: int, silence: Optional[float] = None) -> None:
        self.descriptor = descriptor
        self.silence = silence
        self.buffer = b""

    def _fill(self) -> None:
        if self.silence is not None and not select.select([self.descriptor], [], [], self.silence)[0]:
            raise EOFError("silence")
        data = os.read(self.descriptor, _CHUNK)
        if not data:
            raise EOFError("closed")
        self.buffer += data

    def line(self) -> bytes:
        """The next line, without its end."""
        while b"\n" not in self.buffer:
            self._fill()
        line, _, self.buffer = self.buffer.partition(b"\n")
        return line

    def payload(self, size: int) -> Iterator[bytes]:
        """The next `size` bytes, in pieces."""
        while size:
            if not self.buffer:
                self._fill()
            piece, self.buffer = self.buffer[:size], self.buffer[size:]
            size -= len(piece)
            yield piece


def remove(folder: str) -> None:
    """Ends what the agent started, gives changed clocks back, and removes its folder. Safe to call twice."""
    for line in (_text(os.path.join(folder, "children")) or "").splitlines():
        pid, _, started = line.partition(" ")
        _end(int(pid), started)
    undo = _text(os.path.join(folder, "undo.json"))
    if undo:
        try:
            for command in json.loads(undo):
                subprocess.call(
                    command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=30
                )
        except (OSError, ValueError, subprocess.TimeoutExpired):
            pass  # the device went away or lost its rights; there is nobody left to tell
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if not os.path.exists(folder):
            return
        time.sleep(0.1)  # a child that was killed may still close its files


def _started(pid: int) -> str:
    """When a process started, so that another one that got its number is left alone; empty: it is gone."""
    text = _text("/proc/%d/stat" % pid) or ""
    fields = text[text.rindex(")") + 2 :].split() if ")" in text else []
    return "" if not fields or fields[0] == "Z" else fields[19]


def _end(pid: int, started: str) -> None:
    """Asks a process group to end, which a container's client passes on, and kills what is left of it."""
    if not started or _started(pid) != started:
        return
    for number, patience in ((signal.SIGTERM, 50), (signal.SIGKILL, 20)):
        try:
            os.killpg(pid, number)
        except OSError:
            return
        for _ in range(patience):
            if _started(pid) != started:
                return
            time.sleep(0.1)


def _start_janitor(folder: str) -> Tuple[int, int]:
    """A process that removes everything once the agent is gone, however it went. Its id, and what to close at the end.

    Only the agent holds the pipe's other end, so the pipe ends with it, even where it was killed.
    """
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(read)
        return pid, write
    try:
        os.setsid()
        os.close(write)
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(nothing, descriptor)
        for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        os.read(read, 1)
        remove(folder)
    finally:
        os._exit(0)


class Worker:
    """A process of its own that loads models and runs them: it may die without the agent."""

    def __init__(self, agent: "Agent", prefix: Sequence[str]) -> None:
        python = sys.executable if not prefix else "python3"
        command = [*prefix, python, "-B", os.path.join(agent.folder, "agent.py"), "worker"]
        self.agent = agent
        self.process = agent.start(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.stdin = self.process.stdin
        self.lines = Lines(self.process.stdout.fileno())
        self.noise: List[bytes] = []
        self.drain = threading.Thread(target=self._drain, daemon=True)
        self.drain.start()

    def _drain(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.noise = [*self.noise, line][-50:]

    def ask(self, request: Dict[str, Any]) -> Dict[str, Any]:
        """The worker's answer.

        Raises:
            Problem: what the worker told, or how it died.
        """
        try:
            self.stdin.write(json.dumps(request).encode() + b"\n")
            self.stdin.flush()
            answer: Dict[str, Any] = json.loads(self.lines.line().decode())
        except (OSError, EOFError, ValueError):
            status = self.process.wait()
            self.drain.join(1.0)
            output = b"".join(self.noise).decode("utf-8", "replace")
            if status == -9:
                raise Problem("killed", "a process on the device was killed", "killed by signal 9, as for its memory")
            raise explain_trtexec(output, status)
        if "error" in answer:
            told = answer["error"]
            raise Problem(told["kind"], told["message"], told["evidence"])
        return answer

    def close(self) -> None:
        """Ends the process."""
        self.agent.stop(self.process)
        self.drain.join(1.0)
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                try:
                    stream.close()
                except OSError:
                    pass


class Trtexec:
    """An engine that `trtexec` times, a process per round. It tells compute times only."""

    def __init__(self, agent: "Agent", prefix: Sequence[str], tool: str) -> None:
        self.agent = agent
        self.command = [*prefix, tool]
        self.help = agent.output([*self.command, "--help"])[1]
        self.version = trtexec_version(self.help)

    def _has(self, flag: str) -> bool:
        return re.search(r"(^|\s)--%s\b" % re.escape(flag), self.help) is not None

    def build(self, request: Dict[str, Any]) -> Dict[str, Any]:
        """Builds an engine, with every flag whose default depends on the version set."""
        paths = {key: self.agent.path(request[key]) for key in ("model", "engine", "cache")}
        flags = ["--onnx=" + paths["model"], "--saveEngine=" + paths["engine"]]
        flags.append("--skipInference" if self._has("skipInference") else "--buildOnly")
        if self._has("timingCacheFile"):
            flags.append("--timingCacheFile=" + paths["cache"])
        workspace = request["workspace_mib"]
        flags.append(
            "--memPoolSize=workspace:%d" % workspace if self._has("memPoolSize") else "--workspace=%d" % workspace
        )
        if request["strongly_typed"] and self._has("stronglyTyped"):
            flags.append("--stronglyTyped")
        flags += ["--" + flag for flag in request["flags"]]
        if request["shapes"]:
            texts = ["%s:%s" % (name, "x".join(str(side) for side in shape)) for name, shape in request["shapes"]]
            flags += ["--%sShapes=%s" % (kind, ",".join(texts)) for kind in ("min", "opt", "max")]
        began = now()
        status, output = self.agent.output([*self.command, *flags])
        if status != 0 or not os.path.isfile(paths["engine"]):
            raise explain_trtexec(output, status)
        return {"seconds": (now() - began) / 1e9, "flags": flags[2:], "version": self.version}

    def times(self, engine: str, inputs: Dict[str, str], shapes: Any, count: int) -> List[int]:
        """Compute nanoseconds of at least `count` queries, and of a second at least."""
        file = self.agent.path("times.json")
        flags = ["--exportTimes=" + file, "--warmUp=%d" % _WARM_UP_MS, "--iterations=%d" % count, "--duration=1"]
        # TensorRT 11 leaves transfers out unless it is told; before, they were the default
        flags += ["--%s" % flag for flag in ("dataTransfers", "useSpinWait") if self._has(flag)]
        if self._has("infStreams"):
            flags.append("--infStreams=1")
        elif self._has("streams"):
            flags.append("--streams=1")
        self._run(engine, inputs, shapes, flags)
        times = parse_trtexec_times(_text(file) or "", _WARM_UP_MS)
        return [round(value * 1e6) for value in times]

    def outputs(self, engine: str, inputs: Dict[str, str], shapes: Any) -> Dict[str, Any]:
        """The outputs of one query by name: {"dimensions", "values"}."""
        file = self.agent.path("outputs.json")
        self._run(engine, inputs, shapes, ["--exportOutput=" + file, "--iterations=1", "--duration=0", "--warmUp=0"])
        try:
            return {entry["name"]: entry for entry in json.loads(_text(file) or "")}
        except (ValueError, KeyError, TypeError) as error:
            raise Problem("failed", "trtexec's outputs cannot be read", str(error))

    def _run(self, engine: str, inputs: Dict[str, str], shapes: Any, flags: List[str]) -> None:
        command = [*self.command, "--loadEngine=" + self.agent.path(engine), "--avgRuns=1"]
        command.append("--loadInputs=" + ",".join("%s:%s" % (name, path) for name, path in inputs.items()))
        if shapes:
            texts = ["%s:%s" % (name, "x".join(str(side) for side in shape)) for name, shape in shapes]
            command.append("--shapes=" + ",".join(texts))
        status, output = self.agent.output([*command, *flags])
        if status != 0:
            raise explain_trtexec(output, status)


class Agent:
    """Answers a host's requests, one at a time, inside one folder."""

    def __init__(self, source: str, base: Optional[str], packages: Optional[str]) -> None:
        self.packages = os.path.expanduser(packages) if packages else None
        try:
            self.folder = tempfile.mkdtemp(prefix="edgestill-", dir=base or None)
        except OSError as error:
            raise _explained(error)
        try:
            with open(self.path("agent.py"), "w", encoding="utf-8") as file:
                file.write(source)
        except OSError as error:
            remove(self.folder)
            raise _explained(error)
        self.janitor, self.pipe = _start_janitor(self.folder)
        with open(self.path("owners"), "w", encoding="utf-8") as file:
            file.writelines("%d %s\n" % (pid, _started(pid)) for pid in (os.getpid(), self.janitor))
        self.requests: "queue.Queue[Dict[str, Any]]" = queue.Queue()
        self.worker: Optional[Worker] = None
        self.rung: List[str] = []
        self.trtexec: Optional[Trtexec] = None
        self.engines: Dict[str, Dict[str, Any]] = {}
        self.use = CpuUse()
        self.lock = threading.Lock()
        self.ended = False

    def path(self, name: str) -> str:
        """A file of the folder.

        Raises:
            Problem: a name that leads out of it.
        """
        if os.path.basename(name) != name or name in ("", ".", ".."):
            raise Problem("failed", "a file outside of the agent's folder was asked for", name)
        return os.path.join(self.folder, name)

    # -- processes

    def start(self, command: Sequence[str], **streams: Any) -> "subprocess.Popen[bytes]":
        """Starts a process in a group of its own, which ends with the agent."""
        try:
            # some runtimes leave files in the temporary folder and in the user's home
            own = {
                "TMPDIR": self.folder,
                "XDG_CACHE_HOME": os.path.join(self.folder, "cache"),
                "CUDA_CACHE_PATH": os.path.join(self.folder, "cuda"),
            }
            if self.packages:
                paths = [self.packages, os.environ.get("PYTHONPATH", "")]
                own["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
            process = subprocess.Popen(
                list(command), cwd=self.folder, env={**os.environ, **own}, start_new_session=True, **streams
            )
        except OSError as error:
            raise Problem("failed", "%s cannot be started" % command[0], str(error))
        with open(self.path("children"), "a", encoding="utf-8") as file:
            file.write("%d %s\n" % (process.pid, _started(process.pid)))
        return process

    def stop(self, process: "subprocess.Popen[bytes]") -> None:
        """Ends a process and what it started."""
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except OSError:
            pass
        process.wait()

    def output(self, command: Sequence[str], timeout: Optional[float] = None) -> Tuple[int, str]:
        """Exit status, and standard output and error together."""
        process = self.start(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            text = process.communicate(timeout=timeout)[0].decode("utf-8", "replace")
        except subprocess.TimeoutExpired:
            self.stop(process)
            return 124, "no answer within %d s" % (timeout or 0)
        return process.returncode, text

    # -- the host's side

    def serve(self) -> int:
        """Reads requests until the host says that it is done, or is gone."""
        self.out = os.dup(1)
        os.dup2(2, 1)  # what a library prints must not look like an answer
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, lambda *_: self.end(1))
        self.send(
            {"agent": PROTOCOL, "folder": self.folder, "pid": os.getpid(), "janitor": self.janitor, **board(), **read()}
        )
        threading.Thread(target=self._listen, daemon=True).start()
        while True:
            request = self.requests.get()
            if request["do"] == "bye":
                self.end(0)
            try:
                answer = getattr(self, "do_" + request["do"])(request)
            except BaseException as error:
                answer = _explained(error).document()
            if answer is not None:
                self.send(answer)

    def _listen(self) -> None:
        lines = Lines(0, SILENCE)
        try:
            while True:
                request = json.loads(lines.line().decode())
                if request["do"] == "put":
                    request["failed"] = self._receive(request, lines)
                if request["do"] != "ping":
                    self.requests.put(request)
        except (EOFError, OSError, ValueError):
            self.end(1)

    def _receive(self, request: Dict[str, Any], lines: Lines) -> Optional[Dict[str, Any]]:
        """Stores a payload; on failure reads on to its end, so that the next line is one again."""
        failed = None
        try:
            file = open(self.path(request["name"]), "ab" if request.get("more") else "wb", buffering=0)
        except (OSError, Problem) as error:
            file, failed = None, _explained(error)
        for piece in lines.payload(request["bytes"]):
            try:
                while file is not None and failed is None and piece:
                    piece = piece[file.write(piece) :]
            except OSError as error:
                failed = _explained(error)
        if file is not None:
            file.close()
        return failed.document() if failed else None

    def send(self, answer: Dict[str, Any], payload: Optional[str] = None) -> None:
        """A line, and the content of a file behind it."""
        try:
            _write(self.out, json.dumps(answer).encode() + b"\n")
            if payload is not None:
                with open(payload, "rb") as file:
                    for piece in iter(lambda: file.read(_CHUNK), b""):
                        _write(self.out, piece)
        except OSError:
            self.end(1)

    def end(self, status: int) -> None:
        """Removes everything and ends this process; the janitor then finds nothing left."""
        with self.lock:
            if self.ended:
                return
            self.ended = True
        remove(self.folder)
        os.close(self.pipe)
        try:
            os.waitpid(self.janitor, 0)
        except OSError:
            pass
        os._exit(status)

    # -- requests

    def do_put(self, request: Dict[str, Any]) -> Dict[str, Any]:
        return request["failed"] or {"stored": request["name"]}

    def do_get(self, request: Dict[str, Any]) -> None:
        path = self.path(request["name"])
        if not os.path.isfile(path):
            raise Problem("failed", "no such file on the device", request["name"])
        self.send({"bytes": os.path.getsize(path)}, path)

    def do_remove(self, request: Dict[str, Any]) -> Dict[str, Any]:
        for name in request["names"]:
            path = self.path(name)
            if os.path.isfile(path):
                os.remove(path)
        return {}

    def do_facts(self, request: Dict[str, Any]) -> Dict[str, Any]:
        return {"facts": {**board(), **read()}}

    def do_use(self, request: Dict[str, Any]) -> Dict[str, Any]:
        """What others did since the last such request."""
        before, self.use = self.use, CpuUse()
        own = self.worker.process.pid if self.worker is not None else 0
        return {"use": self.use.since(before, own)}

    def do_offers(self, request: Dict[str, Any]) -> Dict[str, Any]:
        """Which runtimes are here: version by name, "" where there is none and why; trtexec with its path."""
        found: Dict[str, Any] = {}
        for name in request["names"]:
            found[name] = self._trtexec_offer([]) if name == "trtexec" else self._module_offer([], sys.executable, name)
        wrapper = request.get("wrapper")
        if wrapper:
            prefix = [part.replace("{folder}", self.folder) for part in wrapper]
            for name in request["names"]:
                found["wrapper " + name] = (
                    self._trtexec_offer(prefix) if name == "trtexec" else self._module_offer(prefix, "python3", name)
                )
        found["disk_free_mib"] = round(shutil.disk_usage(self.folder).free / 2**20)
        return found

    def _module_offer(self, prefix: List[str], python: str, name: str) -> Dict[str, Any]:
        code = "import %s as m; print('version', m.__version__)" % name
        status, text = self.output([*prefix, python, "-B", "-c", code], timeout=120)
        match = re.search(r"^version (\S+)", text, re.MULTILINE)
        if status == 0 and match:
            return {"version": match.group(1)}
        last = text.strip().splitlines()[-1:] or ["exit status %d" % status]
        return {"version": "", "why": last[0][:300]}

    def _trtexec_offer(self, prefix: List[str]) -> Dict[str, Any]:
        for tool in TRTEXEC:
            if not prefix and shutil.which(tool) is None:
                continue
            status, text = self.output([*prefix, tool, "--help"], timeout=120)
            if trtexec_version(text):
                return {"version": trtexec_version(text), "tool": tool}
            why = text.strip().splitlines()[-1:] or ["exit status %d" % status]
        return {"version": "", "why": why[0][:300] if prefix else "neither on PATH nor in /usr/src/tensorrt/bin"}

    def do_use_rung(self, request: Dict[str, Any]) -> Dict[str, Any]:
        """Chooses who measures: "onnxruntime", "tensorrt", "tensorrt_rtx" or "trtexec", with a wrapper or without."""
        prefix = [part.replace("{folder}", self.folder) for part in request.get("wrapper") or []]
        self.rung = [request["rung"], *prefix]
        if request["rung"] == "trtexec":
            self.trtexec = Trtexec(self, prefix, request["tool"])
            return {}
        self.worker = Worker(self, prefix)
        return self.worker.ask({"do": "start", "rung": request["rung"]})

    def do_build(self, request: Dict[str, Any]) -> Dict[str, Any]:
        """An engine from a graph, in a process of its own; its timing cache beside it."""
        available = memory().get("memory_available_mib", 2048.0)
        request["workspace_mib"] = request.get("workspace_mib") or max(64, int(available / 2))
        if self.trtexec is not None:
            built = self.trtexec.build(request)
        else:
            builder = Worker(self, self.rung[1:])
            try:
                builder.ask({"do": "start", "rung": self.rung[0]})
                built = builder.ask(request)
            except Problem as problem:
                if problem.kind == "killed":
                    raise Problem("builder_memory", "the system killed TensorRT's builder", problem.evidence)
                raise
            finally:
                builder.close()
        return {
            **built,
            "cached": os.path.isfile(self.path(request["cache"])),
            "workspace_mib": request["workspace_mib"],
            "bytes": os.path.getsize(self.path(request["engine"])),
        }

    def do_open(self, request: Dict[str, Any]) -> Dict[str, Any]:
        """Loads a model for rounds of queries."""
        if self.trtexec is not None:
            self.engines[request["id"]] = request
            return {"version": self.trtexec.version, "options": {"tool": self.trtexec.command[-1]}}
        assert self.worker is not None
        return self.worker.ask(request)

    def do_block(self, request: Dict[str, Any]) -> Dict[str, Any]:
        """A round of queries: `count` of them, or as many as `seconds` take."""
        if self.trtexec is None:
            assert self.worker is not None
            return self.worker.ask(request)
        opened = self.engines[request["id"]]
        timer, inputs, count = self.trtexec, self._first_query(opened), max(request["count"], 64)
        compute, seen = Clocks(on_gpu=True).highest_while(
            lambda: timer.times(opened["model"], inputs, opened["shapes"], count)
        )
        return {"compute_ns": compute, "end_to_end_ns": None, "spent_ns": compute, "clocks": seen}

    def do_energy(self, request: Dict[str, Any]) -> Dict[str, Any]:
        """Idle and busy spells of a model (`energy_spells`), and which sensor told them.

        Raises:
            Problem: no sensor covers what runs the model, or the model only runs in a process per round.
        """
        if self.trtexec is not None:
            why = "trtexec starts and loads anew for every round, which takes energy as well"
            raise Problem("not_told", why + "; with TensorRT's Python module on the device it is read")
        worker = self.worker
        assert worker is not None
        start, how = energy_source(self.rung[0] != "onnxruntime")
        if start is None:
            raise Problem("not_told", how)
        done = [0]

        def work(seconds: float) -> int:
            asked = {"do": "busy", "id": request["id"], "gap_s": request["gap_s"], "start": done[0], "seconds": seconds}
            count: int = worker.ask(asked)["queries"]
            done[0] += count
            return count

        meter = start()
        try:
            found = energy_spells(meter.joules, now, time.sleep, work, request["seconds"], request["pairs"])
            return {**found, "how": meter.how}
        finally:
            meter.close()

    def do_outputs(self, request: Dict[str, Any]) -> Dict[str, Any]:
        """The outputs of all queries of a file, raw and one after the other, in another."""
        if self.trtexec is None:
            assert self.worker is not None
            return self.worker.ask(request)
        found = []
        for index in range(request["inputs"]["queries"]):
            inputs = self._query_files(request["inputs"], index)
            found.append(self.trtexec.outputs(self.engines[request["id"]]["model"], inputs, request["shapes"]))
        return {"json": found}

    def _first_query(self, opened: Dict[str, Any]) -> Dict[str, str]:
        return self._query_files(opened["inputs"], 0)

    def _query_files(self, inputs: Dict[str, Any], index: int) -> Dict[str, str]:
        """One query's inputs as files, as trtexec reads them."""
        found = {}
        with open(self.path(inputs["file"]), "rb") as file:
            file.seek(index * sum(entry["bytes"] for entry in inputs["inputs"]))
            for position, entry in enumerate(inputs["inputs"]):
                found[entry["name"]] = self.path("input-%d.bin" % position)
                with open(found[entry["name"]], "wb") as stored:
                    stored.write(file.read(entry["bytes"]))
        return found

    def do_probe(self, request: Dict[str, Any]) -> Dict[str, Any]:
        """Load time, first inference and peak memory in a fresh process; the lowest free memory meanwhile, too."""
        if self.trtexec is not None:
            raise Problem("not_told", "trtexec tells neither load time nor memory")
        before = memory().get("memory_available_mib")
        lowest = [before]
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.02):
                value = memory().get("memory_available_mib")
                if value is not None and lowest[0] is not None:
                    lowest[0] = min(lowest[0], value)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        fresh = Worker(self, self.rung[1:])
        try:
            fresh.ask({"do": "start", "rung": self.rung[0]})
            found = fresh.ask({**request, "do": "probe"})
        finally:
            fresh.close()
            done.set()
            watcher.join()
        if before is not None and lowest[0] is not None:
            found["fall_mib"] = round(before - lowest[0], 1)
        return found

    def do_profile(self, request: Dict[str, Any]) -> Dict[str, Any]:
        """ONNX Runtime's own trace of some queries, and the graph that it made of the model, as files."""
        assert self.worker is not None
        return self.worker.ask(request)

    def do_close(self, request: Dict[str, Any]) -> Dict[str, Any]:
        """Ends the process that holds the models."""
        if self.worker is not None:
            self.worker.close()
        self.worker, self.trtexec, self.engines = None, None, {}
        return {}

    def do_lock_clocks(self, request: Dict[str, Any]) -> Dict[str, Any]:
        """Sets the highest clocks, after noting how to give the present ones back when the agent ends.

        Raises:
            Problem: no tool for it, or no right to use it.
        """
        sudo = [] if os.getuid() == 0 else ["sudo", "-n"]
        tool = shutil.which("jetson_clocks", path=os.environ.get("PATH", "") + os.pathsep + "/usr/bin")
        if tool is None:
            raise Problem("no_clocks", "this device has no jetson_clocks", "not on PATH")
        stored = self.path("clocks.conf")
        status, text = self.output([*sudo, tool, "--store", stored], timeout=60)
        if status != 0:
            kind = "sudo_needed" if re.search(r"password|sudo|root|ermission", text) else "failed"
            raise Problem(
                kind, "the clocks cannot be locked", (text.strip().splitlines() or ["status %d" % status])[-1]
            )
        with open(self.path("undo.json"), "w", encoding="utf-8") as file:
            json.dump([[*sudo, tool, "--restore", stored]], file)
        status, text = self.output([*sudo, tool], timeout=60)
        if status != 0:
            raise Problem("failed", "jetson_clocks failed", (text.strip().splitlines() or ["status %d" % status])[-1])
        return {"clocks": "locked by jetson_clocks, restored at the end"}

    def do_unpack(self, request: Dict[str, Any]) -> Dict[str, Any]:
        """Unpacks wheels that were sent into a folder of the user's, which stays; pip and sudo are not needed.

        Without wheels, removes that folder.
        """
        place = os.path.expanduser(request["place"])
        fresh = place + ".new"
        try:
            shutil.rmtree(fresh, ignore_errors=True)
            for name in request["wheels"]:
                with zipfile.ZipFile(self.path(name)) as wheel:
                    wheel.extractall(fresh)
            shutil.rmtree(place, ignore_errors=True)
            if request["wheels"]:
                os.rename(fresh, place)
        except (OSError, zipfile.BadZipFile) as error:
            shutil.rmtree(fresh, ignore_errors=True)
            raise _explained(error)
        self.packages = place if request["wheels"] else None
        return {"place": place}


# -- the worker: loads models and runs them ----------------------------------------------------------------------------


def now() -> int:
    """Nanoseconds of a monotonic clock; Python 3.6 has no integer one."""
    return _NOW()


_NOW = getattr(time, "perf_counter_ns", None) or (lambda: int(time.perf_counter() * 1e9))


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def read_queries(inputs: Dict[str, Any], folder: str) -> List[Dict[str, bytes]]:
    """The queries of a file: by input name, raw bytes in C order."""
    queries = []
    with open(os.path.join(folder, inputs["file"]), "rb") as file:
        for _ in range(inputs["queries"]):
            queries.append({entry["name"]: file.read(entry["bytes"]) for entry in inputs["inputs"]})
    return queries


class OrtModel:
    """One graph in ONNX Runtime's CPU provider, exactly as edgestill measures it on its own machine."""

    def __init__(self, runtime: Any, request: Dict[str, Any]) -> None:
        # the runtime brings it; the agent itself needs the standard library only
        self.runtime, self.numpy = runtime, __import__("numpy")
        settings = self._settings(request)
        try:
            self.session = runtime.InferenceSession(request["path"], settings, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise self._refused(error)
        self.names = [output.name for output in self.session.get_outputs()]
        self.options = {
            "providers": ["CPUExecutionProvider"],
            "intra_op_threads": request["threads"],
            "inter_op_threads": 1,
            "execution_mode": "sequential",
            "graph_optimization": "all",
        }
        self.binding: Any = None

    def _settings(self, request: Dict[str, Any]) -> Any:
        settings = self.runtime.SessionOptions()
        settings.log_severity_level = 3
        settings.graph_optimization_level = self.runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
        settings.execution_mode = self.runtime.ExecutionMode.ORT_SEQUENTIAL
        settings.inter_op_num_threads = 1
        settings.intra_op_num_threads = request["threads"] or 0
        return settings

    def _refused(self, error: Exception) -> "Problem":
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if re.search(r"opset|ir_version|IR version|not a registered|NOT_IMPLEMENTED|No Op registered", text):
            return Problem("unsupported_operator", "ONNX Runtime on the device does not take the graph", text)
        return Problem("failed", "ONNX Runtime on the device cannot load or run the model", text)

    def arrays(self, queries: List[Dict[str, bytes]], inputs: Dict[str, Any]) -> List[Dict[str, Any]]:
        """The queries as arrays."""
        kinds = {entry["name"]: (entry["dtype"], entry["shape"]) for entry in inputs["inputs"]}
        return [
            {name: self.numpy.frombuffer(data, kinds[name][0]).reshape(kinds[name][1]) for name, data in query.items()}
            for query in queries
        ]

    def prepare(self, queries: List[Dict[str, bytes]], inputs: Dict[str, Any]) -> None:
        """Binds input buffers, so that the run call finds its inputs in place."""
        self.queries = self.arrays(queries, inputs)
        self.binding = self.session.io_binding()
        self.buffers = {name: self.numpy.empty(array.shape, array.dtype) for name, array in self.queries[0].items()}
        for name, buffer in self.buffers.items():
            self.binding.bind_ortvalue_input(name, self.runtime.OrtValue.ortvalue_from_numpy(buffer))
        for name in self.names:
            self.binding.bind_output(name)

    def query(self, index: int) -> Tuple[int, int]:
        """Compute and end-to-end nanoseconds of one query."""
        query = self.queries[index % len(self.queries)]
        try:
            start = now()
            for name, array in query.items():
                self.numpy.copyto(self.buffers[name], array)
            ready = now()
            self.session.run_with_iobinding(self.binding)
            computed = now()
            self.binding.copy_outputs_to_cpu()
            end = now()
        except Exception as error:
            raise self._refused(error)
        return computed - ready, end - start

    def outputs(
        self, queries: List[Dict[str, bytes]], inputs: Dict[str, Any]
    ) -> Iterator[List[Tuple[str, str, Any, bytes]]]:
        """Per query: name, dtype, shape and raw bytes of every output."""
        for query in self.arrays(queries, inputs):
            try:
                found = self.session.run(None, query)
            except Exception as error:
                raise self._refused(error)
            yield [
                (name, str(array.dtype), list(array.shape), array.tobytes()) for name, array in zip(self.names, found)
            ]

    def profile(self, request: Dict[str, Any], folder: str) -> Dict[str, Any]:
        """Runs the model under the runtime's profiler; see `profiles.runtimes.onnxruntime.trace`."""
        settings = self._settings(request)
        settings.optimized_model_filepath = os.path.join(folder, request["optimised"])
        settings.enable_profiling = True
        settings.profile_file_prefix = os.path.join(folder, "trace")
        session = self.runtime.InferenceSession(request["path"], settings, providers=["CPUExecutionProvider"])
        query = self.arrays(read_queries(request["inputs"], folder), request["inputs"])[0]
        for _ in range(request["runs"]):
            session.run(None, query)
        os.rename(session.end_profiling(), os.path.join(folder, request["trace"]))
        return {}


_CUDA_INTEGRATED = 18
"""cudaDevAttrIntegrated: whether the GPU works in the CPU's memory, as on a Jetson."""


class TrtModel:
    """An engine in TensorRT's Python module, with memory from the CUDA runtime through ctypes; NumPy is not needed."""

    def __init__(self, trt: Any, request: Dict[str, Any]) -> None:
        self.trt = trt
        self.cuda = _load_cuda()
        self.logger = _TrtLogger(trt)
        self.check(self.cuda.cudaSetDevice(0))
        self.runtime = trt.Runtime(self.logger.sink)
        with open(request["path"], "rb") as file:
            self.engine = self.runtime.deserialize_cuda_engine(file.read())
        if self.engine is None:
            raise explain_trtexec("\n".join(self.logger.errors) or "the engine cannot be loaded", 1)
        self.context = self.engine.create_execution_context()
        if self.context is None:
            raise explain_trtexec("\n".join(self.logger.errors) or "out of memory", 1)
        self.stream = ctypes.c_void_p()
        self.check(self.cuda.cudaStreamCreate(ctypes.byref(self.stream)))
        self.begin, self.finish = ctypes.c_void_p(), ctypes.c_void_p()
        for event in (self.begin, self.finish):
            self.check(self.cuda.cudaEventCreate(ctypes.byref(event)))
        self.options = {"cuda_graph": False, "host_memory": "pinned"}
        integrated = ctypes.c_int()
        self.check(self.cuda.cudaDeviceGetAttribute(ctypes.byref(integrated), _CUDA_INTEGRATED, 0))
        self.shares_memory = bool(integrated.value)
        self.inputs: List[Tuple[str, Any, Any, int]] = []
        self.results: List[Tuple[str, str, Any, Any, Any, int]] = []

    def check(self, status: int) -> None:
        """Raises a Problem for a CUDA error."""
        if status != 0:
            self.cuda.cudaGetErrorString.restype = ctypes.c_char_p
            text = self.cuda.cudaGetErrorString(status).decode()
            kind = "builder_memory" if status == 2 else "no_gpu" if status in (35, 100) else "failed"
            raise Problem(kind, "CUDA failed on the device", text)

    def _tensors(self) -> List[Tuple[str, bool]]:
        if hasattr(self.engine, "num_io_tensors"):
            names = [self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors)]
            return [(name, self.engine.get_tensor_mode(name) == self.trt.TensorIOMode.INPUT) for name in names]
        # before TensorRT 8.5
        return [(name, self.engine.binding_is_input(name)) for name in self.engine]

    def prepare(self, queries: List[Dict[str, bytes]], inputs: Dict[str, Any]) -> None:
        """Sets the shapes and gives every input and output a buffer on the device and a pinned one on the host."""
        self.queries = queries
        modern = hasattr(self.engine, "num_io_tensors")
        shapes = {entry["name"]: tuple(entry["shape"]) for entry in inputs["inputs"]}
        tensors = self._tensors()
        for name, is_input in tensors:
            if is_input:
                accepted = (
                    self.context.set_input_shape(name, shapes[name])
                    if modern
                    else self.context.set_binding_shape(self.engine.get_binding_index(name), shapes[name])
                )
                if accepted is False:
                    raise Problem("failed", "the engine does not take this shape", "%s: %s" % (name, shapes[name]))
        addresses = []
        for name, is_input in tensors:
            if modern:
                shape, dtype = tuple(self.context.get_tensor_shape(name)), self.engine.get_tensor_dtype(name)
            else:
                index = self.engine.get_binding_index(name)
                shape, dtype = tuple(self.context.get_binding_shape(index)), self.engine.get_binding_dtype(index)
            size = dtype.itemsize
            for side in shape:
                size *= side
            device, host = ctypes.c_void_p(), ctypes.c_void_p()
            self.check(self.cuda.cudaMalloc(ctypes.byref(device), ctypes.c_size_t(max(size, 1))))
            self.check(self.cuda.cudaHostAlloc(ctypes.byref(host), ctypes.c_size_t(max(size, 1)), 0))
            if is_input:
                self.inputs.append((name, device, host, size))
            else:
                self.results.append(
                    (name, _TRT_DTYPES.get(str(dtype).split(".")[-1], "float32"), list(shape), device, host, size)
                )
            if modern:
                self.context.set_tensor_address(name, device.value)
            addresses.append(device.value)
        self.modern, self.addresses = modern, addresses

    def query(self, index: int) -> Tuple[int, int]:
        """Compute (CUDA events) and end-to-end nanoseconds of one query."""
        query = self.queries[index % len(self.queries)]
        cuda, stream = self.cuda, self.stream
        start = now()
        for name, device, host, size in self.inputs:
            ctypes.memmove(host, query[name], size)
            self.check(cuda.cudaMemcpyAsync(device, host, ctypes.c_size_t(size), 1, stream))
        self.check(cuda.cudaEventRecord(self.begin, stream))
        done = (
            self.context.execute_async_v3(stream.value)
            if self.modern
            else self.context.execute_async_v2(self.addresses, stream.value)
        )
        self.check(cuda.cudaEventRecord(self.finish, stream))
        for _name, _dtype, _shape, device, host, size in self.results:
            self.check(cuda.cudaMemcpyAsync(host, device, ctypes.c_size_t(size), 2, stream))
        self.check(cuda.cudaStreamSynchronize(stream))
        end = now()
        if not done:
            raise explain_trtexec("\n".join(self.logger.errors) or "the engine failed to run", 1)
        elapsed = ctypes.c_float()
        self.check(cuda.cudaEventElapsedTime(ctypes.byref(elapsed), self.begin, self.finish))
        return int(elapsed.value * 1e6), end - start

    def outputs(
        self, queries: List[Dict[str, bytes]], inputs: Dict[str, Any]
    ) -> Iterator[List[Tuple[str, str, Any, bytes]]]:
        """Per query: name, dtype, shape and raw bytes of every output."""
        if not self.inputs:
            self.prepare(queries, inputs)
        kept, self.queries = self.queries, queries
        for index in range(len(queries)):
            self.query(index)
            yield [
                (name, dtype, shape, ctypes.string_at(host, size))
                for name, dtype, shape, _device, host, size in self.results
            ]
        self.queries = kept


_TRT_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "UINT8": "uint8",
    "BOOL": "bool",
}


class _TrtLogger:
    """Keeps TensorRT's errors and prints nothing."""

    def __init__(self, trt: Any) -> None:
        self.errors: List[str] = []
        keep = self.errors

        class Sink(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, msg: str) -> None:
                if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                    keep.append(msg.strip().splitlines()[0] if msg.strip() else "")

        self.sink = Sink()


def _load_cuda() -> Any:
    """The CUDA runtime's library.

    Raises:
        Problem: there is none.
    """
    folders = ["/usr/local/cuda/lib64", "/usr/local/cuda/targets/aarch64-linux/lib"]
    folders += [os.path.join(path, "nvidia", part, "lib") for path in sys.path for part in ("cuda_runtime", "cu13")]
    names = [ctypes.util.find_library("cudart") or "libcudart.so"]
    names += ["libcudart.so" + end for end in (".13", ".12", ".11.0", ".10.2")]
    names += sorted(path for folder in folders for path in glob.glob(os.path.join(folder, "libcudart.so*")))
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise Problem("no_gpu", "the device has no CUDA runtime", "libcudart.so was not found")


def build_engine(trt: Any, request: Dict[str, Any], folder: str) -> Dict[str, Any]:
    """Builds an engine with TensorRT's Python module and stores its timing cache."""
    began = now()
    logger = _TrtLogger(trt)
    builder = trt.Builder(logger.sink)
    if builder is None:
        raise explain_trtexec("\n".join(logger.errors), 1)
    flags = 0
    kinds = trt.NetworkDefinitionCreationFlag
    if request["strongly_typed"] and hasattr(kinds, "STRONGLY_TYPED"):
        flags |= 1 << int(kinds.STRONGLY_TYPED)
    if int(trt.__version__.split(".")[0]) < 10 and hasattr(kinds, "EXPLICIT_BATCH"):
        flags |= 1 << int(kinds.EXPLICIT_BATCH)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, logger.sink)
    # by path, so that weights beside the graph are found
    if not parser.parse_from_file(os.path.join(folder, request["model"])):
        text = "; ".join(str(parser.get_error(index).desc()) for index in range(min(parser.num_errors, 3)))
        raise Problem("unsupported_operator", "TensorRT on the device cannot parse the graph", text)
    config = builder.create_builder_config()
    workspace = request["workspace_mib"] << 20
    if hasattr(config, "set_memory_pool_limit"):
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    else:
        config.max_workspace_size = workspace
    for flag in request["flags"]:
        config.set_flag(getattr(trt.BuilderFlag, flag.upper()))
    if request["shapes"]:
        profile = builder.create_optimization_profile()
        for name, shape in request["shapes"]:
            profile.set_shape(name, tuple(shape), tuple(shape), tuple(shape))
        config.add_optimization_profile(profile)
    if request.get("compute_capability") and hasattr(config, "set_compute_capability"):
        config.num_compute_capabilities = 1
        name = "SM" + request["compute_capability"].replace(".", "")
        config.set_compute_capability(trt.ComputeCapability.__members__[name], 0)
    timing = os.path.join(folder, request["cache"])
    cache = None
    if hasattr(config, "create_timing_cache"):
        content = b""
        if os.path.isfile(timing):
            with open(timing, "rb") as file:
                content = file.read()
        cache = config.create_timing_cache(content)
        if cache is not None:
            config.set_timing_cache(cache, False)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise explain_trtexec("\n".join(logger.errors) or "the builder gave no reason", 1)
    with open(os.path.join(folder, request["engine"]), "wb") as file:
        file.write(memoryview(plan))
    if cache is not None:
        with open(timing, "wb") as file:
            file.write(memoryview(cache.serialize()))
    return {"seconds": (now() - began) / 1e9, "flags": list(request["flags"]), "version": str(trt.__version__)}


def work() -> int:
    """The worker's loop: a request per line in, an answer per line out."""
    out = os.dup(1)
    os.dup2(2, 1)
    folder = os.path.dirname(os.path.abspath(__file__))
    lines = Lines(0)
    module: Any = None
    models: Dict[str, Any] = {}
    rung, clocks_now = "", Clocks(on_gpu=False)

    def opened(request: Dict[str, Any]) -> Any:
        request["path"] = os.path.join(folder, request["model"])
        model = OrtModel(module, request) if rung == "onnxruntime" else TrtModel(module, request)
        model.prepare(read_queries(request["inputs"], folder), request["inputs"])
        return model

    while True:
        try:
            request = json.loads(lines.line().decode())
        except (EOFError, ValueError):
            return 0
        try:
            what = request["do"]
            if what == "start":
                rung = request["rung"]
                module = __import__(rung)
                if hasattr(module, "disable_telemetry_events"):
                    module.disable_telemetry_events()
                clocks_now = Clocks(rung != "onnxruntime")
                answer: Dict[str, Any] = {"version": str(module.__version__)}
            elif what == "build":
                answer = build_engine(module, request, folder)
            elif what == "open":
                models[request["id"]] = model = opened(request)
                answer = {"version": str(module.__version__), "options": model.options}
            elif what == "block":
                answer = {**run_block(models[request["id"]], request), "clocks": clocks_now.look()}
            elif what == "busy":
                answer = run_for(models[request["id"]], request)
            elif what == "outputs":
                answer = store_outputs(models[request["id"]], request, folder)
            elif what == "profile":
                request["path"] = os.path.join(folder, request["model"])
                answer = OrtModel(module, request).profile(request, folder)
            else:
                answer = probe(opened, request)
        except BaseException as error:
            answer = _explained(error).document()
        _write(out, json.dumps(answer).encode() + b"\n")


def run_block(model: Any, request: Dict[str, Any]) -> Dict[str, List[int]]:
    """Queries from `start` on: `count` of them, and more until `seconds` have passed."""
    compute: List[int] = []
    whole: List[int] = []
    spent: List[int] = []
    pulses: List[int] = []
    gap, enough = request["gap_s"], request["seconds"] * 1e9
    index = request["start"]
    gc.collect()
    gc.disable()
    try:
        # the device idled while it waited for this request: two queries for its caches and clocks, as on any switch
        for settling in range(_RESETTLE):
            model.query(index + settling)
        before = began = now()
        while len(compute) < request["count"] or before - began < enough:
            if gap:
                time.sleep(gap)
            pulse = _pulse() if request.get("pulse") else 0
            times = model.query(index)
            after = now()
            pulses.append(max(pulse, _pulse()) if pulse else 0)
            compute.append(times[0])
            whole.append(times[1])
            spent.append(after - before)
            before, index = after, index + 1
    finally:
        gc.enable()
    return {"compute_ns": compute, "end_to_end_ns": whole, "spent_ns": spent, "pulse_ns": pulses}


def run_for(model: Any, request: Dict[str, Any]) -> Dict[str, int]:
    """Queries from `start` on until `seconds` have passed, one at least; their number."""
    count, end = 0, now() + request["seconds"] * 1e9
    while not count or now() < end:
        if request["gap_s"]:
            time.sleep(request["gap_s"])
        model.query(request["start"] + count)
        count += 1
    return {"queries": count}


def _pulse() -> int:
    """Nanoseconds of a fixed small computation: how fast the core is at this moment. See `profiles.calibration`."""
    laps = []
    for _ in range(2):
        start = now()
        sum(_PULSE)
        laps.append(now() - start)
    return min(laps)


_PULSE = range(400)


def store_outputs(model: Any, request: Dict[str, Any], folder: str) -> Dict[str, Any]:
    """Writes the outputs of all queries, raw, and says what they are."""
    kinds: List[Dict[str, Any]] = []
    with open(os.path.join(folder, request["file"]), "wb") as file:
        for found in model.outputs(read_queries(request["inputs"], folder), request["inputs"]):
            kinds = [{"name": name, "dtype": dtype, "shape": shape} for name, dtype, shape, _ in found]
            for *_, data in found:
                file.write(data)
    return {"outputs": kinds, "queries": request["inputs"]["queries"]}


def probe(opened: Callable[[Dict[str, Any]], Any], request: Dict[str, Any]) -> Dict[str, Any]:
    """Load time, first inference and peak resident memory of this process, which did nothing else before."""
    before = _resident("VmRSS")
    start = now()
    model = opened(request)
    loaded = now()
    model.query(0)
    first = now()
    end = now() + 2 * 10**9
    for index in range(1, 20):
        model.query(index)
        if now() > end:
            break
    return {
        "load_ms": (loaded - start) / 1e6,
        "first_inference_ms": (first - loaded) / 1e6,
        "before_load_mib": before,
        "peak_mib": _resident("VmHWM"),
        "shares_memory": getattr(model, "shares_memory", False),
    }


def _resident(field: str) -> Optional[float]:
    match = re.search(r"^%s:\s+(\d+) kB" % field, _text("/proc/self/status") or "", re.MULTILINE)
    return int(match.group(1)) / 1024 if match else None


def sweep(folder: str) -> int:
    """Makes sure that an agent whose link broke left nothing: it cleans up by itself, else this does it."""
    if not os.path.basename(folder).startswith("edgestill-"):
        return 1
    for _ in range(80):
        owners = [line.split(" ") for line in (_text(os.path.join(folder, "owners")) or "").splitlines()]
        if not os.path.exists(folder) or not any(_started(int(pid)) == started for pid, started in owners):
            break
        time.sleep(0.1)
    alone = not os.path.exists(folder)
    remove(folder)
    sys.stdout.write(json.dumps({"gone": not os.path.exists(folder), "by_itself": alone}) + "\n")
    return 0


def main(arguments: List[str]) -> int:
    """Serves a host when it was sent over ssh, works for the agent when told to, else prints this machine's facts."""
    source, left = globals().get("SOURCE"), globals().get("SWEEP")
    if left:
        return sweep(left)
    if source:
        try:
            agent = Agent(source, globals().get("BASE"), globals().get("PACKAGES"))
        except Problem as problem:
            sys.stdout.write(json.dumps({"agent": PROTOCOL, **problem.document()}) + "\n")
            return 1
        return agent.serve()
    if arguments[1:] == ["worker"]:
        return work()
    json.dump(read(), sys.stdout, indent=2, sort_keys=True)
    sys.stdout.write("\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
