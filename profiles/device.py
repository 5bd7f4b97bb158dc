"""What a device is and what it allows: facts, stacks, power modes, limits, and the detection of this machine.

Peaks are bounds for a roofline ("at least x ms"), never predictions. A fact that was not found is absent, not guessed.
"""

from __future__ import annotations

import platform
import re
import subprocess
import tomllib
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from profiles.errors import EdgestillError, InputError, nearest
from profiles.runtimes import available
from profiles.section import Section
from profiles.user_folder import user_devices

Precision = Literal["fp32", "tf32", "fp16", "bf16", "int8", "fp8", "fp4"]
Dialect = Literal["qdq-u8s8", "qdq-s8s8", "weak-tensorrt"]
SizeClass = Literal["small", "medium", "large"]
Evidence = Literal["D", "C", "K"]
"""D: documentation or datasheet. C: computed from cores x clock x operations. K: general knowledge, not yet checked."""

THIS_MACHINE = "this-machine"
ENGINE_RUNTIMES = ("tensorrt", "tensorrt-rtx")
"""They run a built engine of their own stack; the others run the graph."""
PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)
_DEVICES = Path(__file__).parent / "devices"
_DETECTION_DATE = "2026-11"
"""Of the rules in `detect`. The day of a run would change every hash that a detected device goes into."""

# Lowest compute capability of each precision (CUDA C++ Programming Guide, arithmetic throughput and tensor cores).
_NEEDS_CAPABILITY: dict[str, tuple[int, int]] = {
    "fp16": (5, 3),
    "int8": (6, 1),
    "tf32": (8, 0),
    "bf16": (8, 0),
    "fp8": (8, 9),
    "fp4": (10, 0),
}

# ONNX Runtime release -> newest opset and IR version that it loads, found by loading graphs in 1.23.2, 1.25.1, 1.27.0
# and 1.31.1.
_ONNXRUNTIME_ONNX: tuple[tuple[tuple[int, int], int, int], ...] = (
    ((1, 23), 23, 11),
    ((1, 25), 26, 13),
)


class Peaks(Section):
    """Peak rates of one power mode, in 10^12 operations per second (a multiply-add is two), dense, and GB/s (10^9).

    `fp16_tflops` is the tensor cores' rate where there are any, with the accumulator that gives the higher rate.
    """

    fp32_tflops: float | None = Field(None, gt=0)
    tf32_tflops: float | None = Field(None, gt=0)
    fp16_tflops: float | None = Field(None, gt=0)
    int8_tops: float | None = Field(None, gt=0)
    fp8_tflops: float | None = Field(None, gt=0)
    fp4_tflops: float | None = Field(None, gt=0)
    bandwidth_gb_s: float | None = Field(None, gt=0)


class PowerMode(Peaks):
    """One power mode, by the name that the device's own tool uses, without its prefix "MODE_".

    A peak that is absent is that of the device: a bound still, if not the closest one.
    """

    name: str
    watts: float | None = Field(None, gt=0)
    stacks: tuple[str, ...] = ()
    """Names of the stacks that have this mode; empty: all."""
    evidence: dict[str, Evidence] = Field(default_factory=dict)


class Stack(Section):
    """What is installed on a device: it decides the opset and the quantisation dialect of an export."""

    name: str
    os: str
    python: str | None = None
    cuda: str | None = None
    runtime: Literal["onnxruntime", "tensorrt", "tensorrt-rtx"]
    runtime_version: str
    onnxruntime: str | None = None
    """Newest onnxruntime wheel that installs there, where the runtime is another one."""
    max_opset: int = Field(ge=7)
    max_ir: int = Field(ge=3)
    dialect: Dialect
    providers: tuple[str, ...] = ()
    """ONNX Runtime execution providers, best first."""
    evidence: dict[str, Evidence] = Field(default_factory=dict)
    source: str
    date: str


class Device(Peaks):
    """Facts about one device, which never change with a project.

    The peaks are those of the fastest power mode, so that a bound holds in every mode.
    """

    name: str
    title: str
    kind: Literal["cpu", "gpu"]
    machine: Literal["x86-64", "aarch64"] | None = None
    """Instruction set of the host processor, where the device fixes it."""
    compute_capability: str | None = Field(None, pattern=r"^\d+\.\d$")
    cores: int | None = Field(None, ge=1)
    """Physical cores of a CPU, CUDA cores of a GPU."""
    isa: tuple[str, ...] = ()
    """Instruction-set extensions of a CPU: avx2, avx512, vnni, neon, dotprod, i8mm."""
    memory_gib: float | None = Field(None, gt=0)
    unified_memory: bool = False
    """CPU and GPU share one memory, so a process' resident size misses what the GPU took."""
    precisions: tuple[Precision, ...] = Field(min_length=1)
    power_modes: tuple[PowerMode, ...] = ()
    stacks: tuple[Stack, ...] = Field(min_length=1)
    """Newest first; the first is the default."""
    evidence: dict[str, Evidence] = Field(default_factory=dict)
    sources: tuple[str, ...] = Field(min_length=1)
    date: str = Field(pattern=r"^\d{4}-\d{2}(-\d{2})?$")
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for title, names in (
            ("stack", [s.name for s in self.stacks]),
            ("power mode", [m.name for m in self.power_modes]),
        ):
            if len(set(names)) != len(names):
                raise ValueError(f"two entries of {title} share a name")
        stacks = {stack.name for stack in self.stacks}
        for mode in self.power_modes:
            if unknown := set(mode.stacks) - stacks:
                raise ValueError(f"power mode {mode.name} names unknown stacks: {', '.join(sorted(unknown))}")
            for fact in Peaks.model_fields:
                limit, value = getattr(self, fact), getattr(mode, fact)
                if value is not None and (limit is None or value > limit):
                    raise ValueError(f"{fact} of power mode {mode.name} is above the device's own")
        return self

    def peak(self, precision: Precision, power_mode: PowerMode | None = None) -> float | None:
        """Highest rate in operations per second (a multiply-add is two), or None when it is not known.

        BF16 runs at the rate of FP16 on tensor cores; TF32, where its rate is not stated, at half of it at most
        (NVIDIA Ampere, Ada and Hopper architecture whitepapers). TensorRT computes FP32 graphs in TF32 where it can, so
        a lower bound for such a graph takes the peak of TF32.

        >>> load_device("t4").peak("int8")
        130000000000000.0
        """
        if precision not in self.precisions:
            return None

        def stated(fact: str) -> float | None:
            value = getattr(power_mode, fact, None) if power_mode is not None else None
            value = getattr(self, fact) if value is None else value
            return None if value is None else float(value) * 1e12

        if precision == "bf16":
            return stated("fp16_tflops")
        if precision == "tf32":
            half = stated("fp16_tflops")
            return stated("tf32_tflops") or (half / 2 if half is not None else None)
        return stated({"int8": "int8_tops"}.get(precision, f"{precision}_tflops"))

    def bandwidth(self, power_mode: PowerMode | None = None) -> float | None:
        """Peak memory bandwidth in bytes per second, or None when it is not known."""
        value = power_mode.bandwidth_gb_s if power_mode is not None else None
        value = self.bandwidth_gb_s if value is None else value
        return None if value is None else value * 1e9

    def why_not(self, precision: Precision) -> str | None:
        """The fact by which the device cannot compute in `precision`, or None when it can."""
        if precision in self.precisions:
            return None
        if self.kind == "cpu":
            if precision == "fp16":
                return "ONNX Runtime computes FP16 graphs in FP32 on a CPU"
            return f"ONNX Runtime has no {precision.upper()} kernels for this CPU"
        if self.compute_capability is None:
            return f"its file lists {', '.join(self.precisions)} only"
        needs = _NEEDS_CAPABILITY.get(precision)
        capability = tuple(int(part) for part in self.compute_capability.split("."))
        if needs is not None and capability < needs:
            return (
                f"compute capability {self.compute_capability}; "
                f"{precision.upper()} needs {needs[0]}.{needs[1]} or higher"
            )
        return f"compute capability {self.compute_capability} does not compute in {precision.upper()}"


class TargetSection(Section):
    """One `[[target]]` of a recipe: a device, its stack and power mode, and the limits. Every limit is optional."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)
    device: str = THIS_MACHINE
    """A name, "this-machine", or a TOML file relative to the recipe."""
    stack: str | None = None
    power_mode: str | None = None
    runtime: str | None = None
    """What the files are measured and scored with where this machine is the device: one of `edgestill doctor`, such
    as "openvino" or "onnxruntime-cuda"; default: the stack's own. It changes nothing of what is exported."""
    precision: Literal["auto", "fp32", "tf32", "fp16", "bf16", "int8", "fp8", "fp4"] = "auto"
    arch: str | None = None
    """Student architecture of this target; default: the family's for the device's size class."""
    latency_ms: float | None = Field(None, gt=0, allow_inf_nan=False)
    latency_scope: Literal["end_to_end", "compute"] = "end_to_end"
    percentile: float = 99.0
    """50, 90, 95, 99 or 99.9."""
    batch: int = Field(1, ge=1)
    memory_mib: float | None = Field(None, gt=0, allow_inf_nan=False)
    file_size_mib: float | None = Field(None, gt=0, allow_inf_nan=False)
    energy_mj: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Energy of one query above idle, in millijoules; not measured where the machine tells no power."""
    metric_floor: float | None = Field(None, ge=0, le=1)
    """Lowest accepted metric of the exported model, as a fraction."""
    max_metric_drop: float | None = Field(None, ge=0, le=1)
    """Largest accepted loss of the exported model against the FP32 student, as a fraction (0.01: one point)."""

    @field_validator("percentile")
    @classmethod
    def _known_percentile(cls, value: float) -> float:
        if value not in PERCENTILES:
            raise ValueError("must be one of 50, 90, 95, 99, 99.9")
        return value


@dataclass(frozen=True)
class Target:
    """A target section with everything that it names looked up and checked."""

    section: TargetSection
    device: Device
    stack: Stack
    power_mode: PowerMode | None
    is_this_machine: bool

    @property
    def name(self) -> str:
        """The target's name in the recipe."""
        return self.section.name

    @property
    def size_class(self) -> SizeClass:
        """Which default student fits the device; see `size_class`."""
        return size_class(self.device)


def size_class(device: Device) -> SizeClass:
    """The students that a device carries, by its FP32 peak: below 0.5 TFLOPS small, below 4 medium, else large.

    An x86 processor and a device whose peak is not known are medium. The power mode plays no part, so that one
    student serves a device in all of them.
    """
    if device.machine == "x86-64" and device.kind == "cpu":
        return "medium"
    if device.fp32_tflops is None:
        return "medium"
    if device.fp32_tflops < 0.5:
        return "small"
    return "medium" if device.fp32_tflops < 4 else "large"


def list_devices() -> list[str]:
    """Names of the devices that ship with edgestill or that the user added, sorted, after "this-machine"."""
    return [THIS_MACHINE, *sorted(_device_files())]


def _device_files() -> dict[str, Path]:
    """Name -> file. A name that ships with edgestill means the same on every machine, so it wins over a user's file."""
    return {path.stem: path for folder in (user_devices(), _DEVICES) for path in folder.glob("*.toml")}


def load_device(name_or_file: str, *, where: str = "--device", base: Path | None = None) -> Device:
    """The device of that name, this machine, or the one that a TOML file describes.

    Args:
        name_or_file: a name of `list_devices`, or a path that ends in `.toml`.
        where: recipe key or option that held it, for the message.
        base: folder that a relative path starts from; default: the working folder.

    Raises:
        InputError: unknown name (the nearest ones are named), or a missing, malformed or incomplete file.
    """
    if name_or_file == THIS_MACHINE:
        return detect()
    if name_or_file.endswith(".toml"):
        return _read_device((base or Path()) / Path(name_or_file).expanduser(), where)
    path = _device_files().get(name_or_file)
    if path is None:
        raise InputError(
            f'unknown device "{name_or_file}"',
            where=where,
            fix=nearest(name_or_file, list_devices()) + ", or a .toml file that describes yours",
        )
    return _read_device(path, where)


def _read_device(path: Path, where: str) -> Device:
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"no such device file: {path}",
            where=where,
            fix="check the path; it is relative to the recipe's folder",
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}", where=where, evidence=str(error)) from error
    except tomllib.TOMLDecodeError as error:
        raise InputError("not a TOML file", where=str(path), evidence=str(error)) from error
    for table in ("stack", "power_mode"):
        if f"{table}s" in raw:
            raise InputError(f'unknown key "{table}s"', where=str(path), fix=f"write [[{table}]]")
        raw[f"{table}s"] = raw.pop(table, [])
    try:
        return Device.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the whole file"
        key = re.sub(r"^(stack|power_mode)s\b", r"\1", key)
        fix = None
        if first["type"] == "extra_forbidden":
            fix = nearest(str(first["loc"][-1]), _valid_keys(first["loc"]))
        raise InputError(
            f"{key}: {first['msg']}", where=str(path), evidence=f"{error.error_count()} problem(s) in all", fix=fix
        ) from error


def _valid_keys(location: tuple[int | str, ...]) -> list[str]:
    if location[0] == "stacks":
        return sorted(Stack.model_fields)
    if location[0] == "power_modes":
        return sorted(PowerMode.model_fields)
    return sorted((set(Device.model_fields) - {"stacks", "power_modes"}) | {"stack", "power_mode"})


def resolve_target(section: TargetSection, *, base: Path, where: str = "target[0]") -> Target:
    """Looks up and checks everything that a target names.

    Args:
        section: the recipe's table.
        base: the recipe's folder; a device file is relative to it.
        where: the table's place in the recipe, for messages.

    Raises:
        InputError: unknown device, stack or power mode; a power mode that the stack does not have; a precision that
            the device cannot compute in.
    """
    device = load_device(section.device, where=f"{where}.device", base=base)
    stack = _choose_stack(device, section.stack, f"{where}.stack")
    power_mode = _choose_power_mode(device, stack, section.power_mode, f"{where}.power_mode")
    _check_runtime(section, stack, f"{where}.runtime")
    if section.precision != "auto":
        reason = device.why_not(section.precision)
        if reason is not None:
            raise InputError(
                f"{device.title} cannot compute in {section.precision.upper()}",
                where=f"{where}.precision",
                evidence=reason,
                fix='precision = "auto", or one of: ' + ", ".join(device.precisions),
            )
    return Target(section, device, stack, power_mode, is_this_machine=section.device == THIS_MACHINE)


def _check_runtime(section: TargetSection, stack: Stack, where: str) -> None:
    name = section.runtime
    if name is None:
        return
    graphs = [each for each in available() if not each.startswith("torch") and each not in ENGINE_RUNTIMES]
    known = sorted({*graphs, stack.runtime})
    if name not in available():
        raise InputError(f'no runtime "{name}"', where=where, fix=nearest(name, known))
    if name not in known:
        what = "an engine of its own stack" if name in ENGINE_RUNTIMES else "programs that torch.export.save wrote"
        raise InputError(f'"{name}" runs {what}, {stack.name} gets none', where=where, fix=", ".join(known))


def _choose_stack(device: Device, name: str | None, where: str) -> Stack:
    if name is None:
        return device.stacks[0]
    found = [stack for stack in device.stacks if stack.name == name]
    if not found:
        raise InputError(
            f'{device.name} has no stack "{name}"',
            where=where,
            evidence="known: " + ", ".join(stack.name for stack in device.stacks),
            fix=nearest(name, [stack.name for stack in device.stacks]),
        )
    return found[0]


def _choose_power_mode(device: Device, stack: Stack, name: str | None, where: str) -> PowerMode | None:
    if name is None:
        return None
    names = [mode.name for mode in device.power_modes if not mode.stacks or stack.name in mode.stacks]
    found = [mode for mode in device.power_modes if mode.name == name]
    if not found:
        raise InputError(
            f'{device.name} has no power mode "{name}"',
            where=where,
            evidence="known: " + (", ".join(names) or "none"),
            fix=nearest(name, names) if names else "leave power_mode out",
        )
    if found[0].name not in names:
        raise InputError(
            f'power mode "{name}" does not exist in {stack.name}',
            where=where,
            evidence=f"{name} comes with {', '.join(found[0].stacks)}",
            fix=f'stack = "{found[0].stacks[0]}", or a power mode of {stack.name}: {", ".join(names)}',
        )
    return found[0]


@lru_cache(maxsize=1)
def detect() -> Device:
    """This machine as a CPU device: model, physical cores, instruction sets, memory, and the installed ONNX Runtime.

    The FP32 peak is cores x highest clock x 32 operations (AVX2: two fused multiply-adds of 8 lanes) or 64 (AVX-512);
    INT8 four times that, which VNNI reaches. It is absent where the highest clock is not told (most virtual machines),
    as is the memory bandwidth, which no portable interface tells.

    Raises:
        EdgestillError: onnxruntime is not installed.
    """
    import psutil

    machine = _machine()
    cpu = _cpuinfo()
    isa = _isa(machine, cpu)
    cores = int(psutil.cpu_count(logical=False) or psutil.cpu_count() or 1)
    clock = _highest_clock_ghz()
    per_clock = 64 if "avx512" in isa else 32 if "avx2" in isa else None
    fp32 = cores * clock * per_clock / 1e3 if clock is not None and per_clock is not None else None
    facts: dict[str, Any] = {"fp32_tflops": fp32, "int8_tops": fp32 * 4} if fp32 is not None else {}
    title = cpu.get("model name") or cpu.get("Model") or _sysctl("machdep.cpu.brand_string") or platform.processor()
    return Device(
        name=THIS_MACHINE,
        title=f"{title or platform.machine()}, {cores} {'core' if cores == 1 else 'cores'}",
        kind="cpu",
        machine=machine,
        cores=cores,
        isa=isa,
        memory_gib=round(_memory_bytes(int(psutil.virtual_memory().total)) / 2**30, 1),
        precisions=("fp32", "int8"),
        stacks=(_this_stack(machine),),
        evidence=dict.fromkeys(facts, "C"),
        sources=("detected on this machine",),
        date=_DETECTION_DATE,
        **facts,
    )


def _machine() -> Literal["x86-64", "aarch64"] | None:
    name = platform.machine().lower()
    if name in ("x86_64", "amd64"):
        return "x86-64"
    return "aarch64" if name in ("aarch64", "arm64") else None


def _cpuinfo() -> dict[str, str]:
    """The first processor's entries of /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    entries: dict[str, str] = {}
    for line in text.splitlines():
        key, separator, value = line.partition(":")
        if separator:
            entries.setdefault(key.strip(), value.strip())
    return entries


def _isa(machine: str | None, cpuinfo: dict[str, str]) -> tuple[str, ...]:
    flags = set((cpuinfo.get("flags") or cpuinfo.get("Features") or "").split())
    if machine == "aarch64":
        # NEON ("asimd") is part of every 64-bit Arm processor, also where no flags are told.
        dotprod = "asimddp" in flags or _sysctl("hw.optional.arm.FEAT_DotProd") == "1"
        i8mm = "i8mm" in flags or _sysctl("hw.optional.arm.FEAT_I8MM") == "1"
        return ("neon", *(["dotprod"] if dotprod else []), *(["i8mm"] if i8mm else []))
    names = {"avx2": {"avx2"}, "avx512": {"avx512f"}, "vnni": {"avx512_vnni", "avx_vnni"}}
    return tuple(name for name, any_of in names.items() if flags & any_of)


def _sysctl(key: str) -> str | None:
    """A value of macOS' sysctl; None elsewhere."""
    if platform.system() != "Darwin":
        return None
    try:
        done = subprocess.run(["sysctl", "-n", key], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _highest_clock_ghz() -> float | None:
    """The highest clock of any core in GHz. The current clock would not do: a bound must hold when the core boosts."""
    clocks = []
    for path in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/cpuinfo_max_freq"):
        try:
            clocks.append(int(path.read_text()) / 1e6)
        except (OSError, ValueError):
            continue
    return max(clocks, default=None)


def _memory_bytes(physical: int) -> int:
    """Physical memory, or the control group's limit where a container has less."""
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return physical
    return min(physical, int(limit)) if limit.isdigit() else physical


def _this_stack(machine: str | None) -> Stack:
    try:
        installed = version("onnxruntime")
    except PackageNotFoundError:
        try:
            installed = version("onnxruntime-gpu")
        except PackageNotFoundError as error:
            raise EdgestillError(
                "onnxruntime is not installed, so this machine has no runtime", fix="pip install onnxruntime"
            ) from error
    opset, ir = onnxruntime_limits(installed)
    return Stack(
        name=f"onnxruntime-{installed}",
        os=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        runtime="onnxruntime",
        runtime_version=installed,
        max_opset=opset,
        max_ir=ir,
        dialect="qdq-s8s8" if machine == "aarch64" else "qdq-u8s8",
        providers=("CPUExecutionProvider",),
        source="detected on this machine",
        date=_DETECTION_DATE,
    )


def onnxruntime_limits(release: str) -> tuple[int, int]:
    """Newest opset and IR version that an ONNX Runtime release loads; between two known releases, the older one's.

    >>> onnxruntime_limits("1.31.1")
    (26, 13)
    """
    numbers = [int(part) for part in re.findall(r"\d+", release)[:2]]
    asked = (numbers[0], numbers[1]) if len(numbers) == 2 else (0, 0)
    known = [entry for entry in _ONNXRUNTIME_ONNX if entry[0] <= asked] or [_ONNXRUNTIME_ONNX[0]]
    return known[-1][1], known[-1][2]
