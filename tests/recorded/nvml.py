"""NVML of a machine that this one is not: the functions of nvml.h that the agent calls, over recorded values."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any

NOT_SUPPORTED, INSUFFICIENT_SIZE = 3, 7
NOT_AVAILABLE = 2**64 - 1


@dataclass
class RecordedNvml:
    """Stands where `ctypes.CDLL("libnvidia-ml.so.1")` would: takes and fills what ctypes passes."""

    name: str = "NVIDIA GeForce RTX 4070"
    driver: str = "570.86.15"
    clocks: dict[int, int] = field(default_factory=lambda: {1: 2475, 2: 10501})
    temperature: int = 61
    power_mw: int = 87_250
    limit_mw: int = 200_000
    throttle: int = 0
    violated_ns: dict[int, int] = field(default_factory=lambda: {0: 5_000_000_000, 1: 0})
    compute: dict[int, int] = field(default_factory=dict)
    """Bytes of GPU memory by process id."""
    asked: list[Any] = field(default_factory=list)
    """What was used to find the GPU."""

    def nvmlInit_v2(self) -> int:  # noqa: N802
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: Any, device: Any) -> int:  # noqa: N802
        self.asked.append(index.value)
        device._obj.value = 7
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, device: Any) -> int:  # noqa: N802
        self.asked.append(uuid)
        device._obj.value = 7
        return 0

    def nvmlDeviceGetName(self, device: Any, text: Any, length: Any) -> int:  # noqa: N802
        return self._write(self.name, device, text, length)

    def nvmlSystemGetDriverVersion(self, text: Any, length: Any) -> int:  # noqa: N802
        return self._write(self.driver, ctypes.c_void_p(7), text, length)

    def nvmlDeviceGetClockInfo(self, device: Any, kind: Any, value: Any) -> int:  # noqa: N802
        return self._set(value, self.clocks.get(kind.value), device)

    def nvmlDeviceGetTemperature(self, device: Any, sensor: Any, value: Any) -> int:  # noqa: N802
        return self._set(value, self.temperature if sensor.value == 0 else None, device)

    def nvmlDeviceGetPowerUsage(self, device: Any, value: Any) -> int:  # noqa: N802
        return self._set(value, self.power_mw, device)

    def nvmlDeviceGetEnforcedPowerLimit(self, device: Any, value: Any) -> int:  # noqa: N802
        return self._set(value, self.limit_mw, device)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, device: Any, value: Any) -> int:  # noqa: N802
        return self._set(value, self.throttle, device)

    def nvmlDeviceGetViolationStatus(self, device: Any, policy: Any, times: Any) -> int:  # noqa: N802
        if policy.value not in self.violated_ns:
            return NOT_SUPPORTED
        times._obj.violated_ns = self.violated_ns[policy.value]
        return 0

    def nvmlDeviceGetComputeRunningProcesses_v3(self, device: Any, count: Any, entries: Any) -> int:  # noqa: N802
        room, count._obj.value = count._obj.value, len(self.compute)
        if room < len(self.compute):
            return INSUFFICIENT_SIZE
        for entry, (pid, memory) in zip(entries or (), self.compute.items(), strict=False):
            entry.pid, entry.memory = pid, memory
        return 0

    def _set(self, value: Any, found: int | None, device: Any) -> int:
        assert device.value == 7
        if found is None:
            return NOT_SUPPORTED
        value._obj.value = found
        return 0

    def _write(self, found: str, device: Any, text: Any, length: Any) -> int:
        assert device.value == 7
        assert len(text) == length.value
        text.value = found.encode()
        return 0
