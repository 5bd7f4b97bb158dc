"""Reads the sensors of the machine it runs on: load, governor, clocks, temperatures, throttling, memory, power mode.

One file, standard library only, Python 3.6 and up, because a device may offer nothing else. It changes nothing and
needs no rights; what a machine does not tell is absent from the result. As a script it prints one JSON document.
"""
# Python 3.6 has no built-in generics, and sysfs paths are plain text here.
# ruff: noqa: UP006, UP035, UP045, PTH119, PTH120, PTH123, PTH207

import glob
import json
import os
import platform
import re
import shutil
import subprocess
import sys
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


if __name__ == "__main__":
    json.dump(read(), sys.stdout, indent=2, sort_keys=True)
    sys.stdout.write("\n")
