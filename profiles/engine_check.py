"""Whether an engine may run here, and why not: its manifest against the runtime and the GPU that would run it.

Python 3.6 and the standard library only: every bundle carries this file beside its `infer.py`.
"""

# ruff: noqa: UP006, UP031, UP035, UP045, PTH123

import ctypes
import ctypes.util
import hashlib
import re
from typing import Any, Dict, List, Optional, Tuple

RTX = "TensorRT-RTX"
_ACROSS_MAJORS = {8: 10, 10: 11}
"""Version-compatible plans of the first also run on the second (TensorRT 11.4 support matrix, engine portability)."""
_FIRST_COMPATIBLE = (8, 6)
_RTX_PORTABLE = ("8.0", "8.6", "8.9")
"""Where a portable TensorRT-RTX engine runs, besides 12.0 and later (TensorRT-RTX documentation, CPU-only AOT)."""


def mismatch(built: Dict[str, Any], here: Dict[str, Any]) -> Optional[str]:
    """Why the engine does not run here, one sentence; None: nothing known is in the way.

    Args:
        built: the engine's entry in the manifest: builder, compute_capability, device, hardware_compatibility,
            version_compatible. A fact that is None or missing is not compared.
        here: runtime ("TensorRT" or "TensorRT-RTX"), version, compute_capability, device: the GPU's name.
    """
    for reason in (_version(built, here), _hardware(built, here)):
        if reason is not None:
            return reason
    return None


def this_gpu() -> Optional[Dict[str, Any]]:
    """The first GPU, by its driver: device (the name), compute_capability, memory_mib; None: there is none."""
    for name in ("libcuda.so.1", "nvcuda.dll", ctypes.util.find_library("cuda")):
        try:
            driver = ctypes.CDLL(name) if name else None
        except OSError:
            continue
        if driver is not None:
            break
    else:
        return None
    handle, title, size = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_size_t()
    if driver.cuInit(0) != 0 or driver.cuDeviceGet(ctypes.byref(handle), 0) != 0:
        return None
    capability = []
    for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
        value = ctypes.c_int()
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, handle) != 0:
            return None
        capability.append(value.value)
    if driver.cuDeviceGetName(title, len(title), handle) != 0:
        return None
    if driver.cuDeviceTotalMem_v2(ctypes.byref(size), handle) != 0:
        return None
    return {
        "device": title.value.decode("utf-8", "replace"),
        "compute_capability": "%d.%d" % tuple(capability),
        "memory_mib": size.value >> 20,
    }


def changed(path: str, sha256: Optional[str]) -> Optional[str]:
    """Why the file is not the one that the manifest describes; None: it is, or there is no hash.

    Raises OSError.
    """
    if not sha256 or sha256_of(path) == sha256:
        return None
    return "the engine is not the file that its manifest describes (another SHA-256)"


def sha256_of(path: str) -> str:
    """Of a file's bytes, in hexadecimal. Raises OSError."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def _version(built: Dict[str, Any], here: Dict[str, Any]) -> Optional[str]:
    builder = str(built.get("builder") or "")
    name, _, version = builder.rpartition(" ")
    if not name or not here.get("version"):
        return None
    runtime = "%s %s" % (here["runtime"], here["version"])
    if name != here["runtime"]:
        return "the engine was built by %s; here is %s, which reads none of its engines" % (builder, runtime)
    was, is_now = _numbers(version), _numbers(str(here["version"]))
    shared = min(len(was), len(is_now))
    if was[:shared] == is_now[:shared]:
        return None
    if not built.get("version_compatible"):
        return "the engine was built by %s and runs on that version only; here is %s" % (builder, runtime)
    majors = was[0] == is_now[0] or _ACROSS_MAJORS.get(was[0]) == is_now[0]
    if was[:2] >= _FIRST_COMPATIBLE and is_now > was and majors:
        return None
    return "the engine was built by %s to run on later versions of TensorRT %s; here is %s" % (
        builder,
        " and ".join(str(major) for major in _majors(was[0])),
        runtime,
    )


def _majors(major: int) -> List[int]:
    return [major] + ([_ACROSS_MAJORS[major]] if major in _ACROSS_MAJORS else [])


def _hardware(built: Dict[str, Any], here: Dict[str, Any]) -> Optional[str]:
    level = built.get("hardware_compatibility") or "none"
    was, is_now = built.get("compute_capability"), here.get("compute_capability")
    rtx = str(built.get("builder") or "").startswith(RTX)
    if was and is_now:
        if level == "ampere+":
            later = _numbers(is_now) >= (12, 0) if rtx else _numbers(is_now) >= (8, 0)
            if not later and not (rtx and is_now in _RTX_PORTABLE):
                return "the engine was built for compute capability 8.0 and later, this GPU has %s" % is_now
            return None
        if was != is_now:
            return "the engine was built for compute capability %s, this GPU has %s" % (was, is_now)
    was, is_now = built.get("device"), here.get("device")
    if level == "none" and not rtx and was and is_now and was != is_now:
        return "the engine was built on %s and is tuned to that GPU; this one is %s" % (was, is_now)
    return None


def _numbers(version: str) -> Tuple[int, ...]:
    """(10, 3, 0) of "10.3.0.post1"."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found.group().split(".")) if found else ()
