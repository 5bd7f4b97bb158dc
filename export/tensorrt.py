"""TensorRT 10, 11 and TensorRT-RTX through one thin adapter: parse a graph, build an engine, look into it.

The three modules have the same names, and nothing that TensorRT 11 removed is used. TensorRT-RTX builds engines for a
named compute capability on a machine without a GPU; TensorRT builds on the GPU that will run the engine. Networks are
always strongly typed: the graph says the precision, no flag does. TensorRT 8 knows weak typing only: its engines are
built on the device, see `export.device_build`.
"""

from __future__ import annotations

import importlib
import os
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from export.candidate import Engine
from export.inspection import Inspection, parse_inspection, with_times
from export.section import ExportSection, HardwareCompatibility
from profiles.artifact import file_hash
from profiles.device import Device, Stack
from profiles.engine_check import changed, mismatch, this_gpu
from profiles.errors import EdgestillError, InputError

INSTALL_RTX = "pip install 'edgestill[tensorrt-rtx]'"
RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
"""What TensorRT-RTX 1.7 builds for; 7.5 takes FP16 and INT8 with an FP16 remainder, no FP32 (found by building)."""
OLDEST = 10
"""First major version of TensorRT whose networks can be strongly typed all through, which the adapter relies on."""
_MIB = 1 << 20
_LEVELS = {"ampere+": "AMPERE_PLUS", "same-capability": "SAME_COMPUTE_CAPABILITY"}
_TIMED_RUNS = 20
_BUILT_HERE: set[str] = set()
"""SHA-256 of the plans that this process built: their code is that of the TensorRT that is installed here."""
Batches = tuple[int, int, int]
"""Smallest, optimal and largest batch of an optimisation profile; all equal: one size."""


@dataclass(frozen=True)
class Adapter:
    """An imported module and what to call it."""

    module: Any
    title: str
    version: str
    rtx: bool

    def __str__(self) -> str:
        return f"{self.title} {self.version}"

    @property
    def major(self) -> int:
        return int(self.version.split(".")[0])

    def running(self) -> dict[str, Any]:
        """This module and this machine's GPU, as `engine_check.mismatch` compares them with a manifest."""
        return {"runtime": self.title, "version": self.version, **(this_gpu() or {})}


@dataclass(frozen=True)
class BuildOptions:
    """What the builder is told besides graph, capability and batch.

    more_profiles: after that of the batch itself. workspace_mib: scratch memory of the layers. timing_cache: file with
    what was timed before; written after the build. None of the last two: the builder's own default, no cache.
    """

    more_profiles: tuple[Batches, ...] = ()
    workspace_mib: int | None = None
    hardware_compatibility: HardwareCompatibility = "none"
    version_compatible: bool = False
    optimization_level: int | None = None
    timing_cache: Path | None = None


PLAIN = BuildOptions()


@lru_cache(maxsize=2)
def load_adapter(*, rtx: bool) -> Adapter | None:
    """TensorRT-RTX or TensorRT, None where it is not installed (or its shared libraries do not load)."""
    name = "tensorrt_rtx" if rtx else "tensorrt"
    try:
        module = importlib.import_module(name)
        found = str(module.__version__)
    except (ImportError, OSError, AttributeError):
        return None
    return Adapter(module, "TensorRT-RTX" if rtx else "TensorRT", found, rtx)


def adapter_for(device: Device, stack: Stack) -> Adapter | None:
    """TensorRT, where it is installed in the stack's version and this machine's GPU is the device's; else None.

    By the driver's name, not the compute capability alone: plans are tuned to one model of GPU.
    """
    if not is_this_gpu(device):
        return None
    adapter = load_adapter(rtx=False)
    if adapter is None or adapter.major < OLDEST or _numbers(adapter.version) != _numbers(stack.runtime_version):
        return None
    return adapter


def is_this_gpu(device: Device) -> bool:
    """Whether the GPU of this machine is the device's, by its driver's name and its compute capability."""
    gpu = this_gpu()
    if gpu is None or gpu["compute_capability"] != device.compute_capability:
        return False
    return set(_words(gpu["device"])) <= set(_words(device.title))


def _words(title: str) -> list[str]:
    return [word for word in title.lower().split() if word not in ("nvidia", "geforce", "gpu")]


def workspace_of(section: ExportSection, device: Device) -> int | None:
    """MiB that an engine's layers may take as scratch memory; None: nothing is known of the device's memory.

    The rest is for weights, activations, the CUDA context and, where CPU and GPU share the memory, all other programs.
    A builder without a GPU would allow itself 64 GiB.
    """
    if section.workspace_mib is not None:
        return section.workspace_mib
    if device.memory_gib is None:
        return None
    return int(device.memory_gib * 1024 / (4 if device.unified_memory else 2))


def profiles_of(batch: int, more: tuple[int, ...] = ()) -> tuple[Batches, ...]:
    """Optimisation profiles of an engine: one per batch size, among them 1 and the target's.

    The first is tuned for the target's and takes every batch from 1 to the largest, so that a caller which selects none
    can run any; the others take one size each. Batch 1 alone: a static shape.
    """
    sizes = sorted({1, batch, *more})
    if sizes == [1]:
        return ((1, 1, 1),)
    return ((1, batch, sizes[-1]), *((size, size, size) for size in sizes if size != batch))


def refusal_of_options(section: ExportSection, device: Device, stack: Stack) -> str | None:
    """Why the stack cannot build the engines that `[export]` asks for, with the fact; None: it can."""
    if stack.runtime == "onnxruntime":
        return None
    if section.version_compatible:
        if stack.runtime == "tensorrt-rtx":
            return "version_compatible: engines of TensorRT-RTX run on the version that built them only"
        if _numbers(stack.runtime_version) < (8, 6):
            return f"version_compatible: from TensorRT 8.6 on; {stack.name} has {stack.runtime_version}"
    level = section.hardware_compatibility
    if level == "none":
        return None
    if level == "ampere+" and _numbers(device.compute_capability or "0") < (8, 0):
        return f"hardware_compatibility: from compute capability 8.0 on; {device.title} has {device.compute_capability}"
    if stack.runtime == "tensorrt-rtx":
        return None
    if "Jetson" in stack.os:
        return f"hardware_compatibility: TensorRT has none on Jetson ({stack.os})"
    first = (8, 6) if level == "ampere+" else (10, 9)
    if _numbers(stack.runtime_version) < first:
        named = ".".join(str(part) for part in first)
        return f'hardware_compatibility "{level}": from TensorRT {named} on; {stack.name} has {stack.runtime_version}'
    return None


def parse(adapter: Adapter, graph: Path) -> str | None:
    """Parses the graph, strongly typed; the first errors, or None when the parser takes it."""
    opened = _Opened(adapter)
    return None if opened.parse(graph) else opened.parser_errors()


def build_engine(
    adapter: Adapter,
    graph: Path,
    target: Path,
    *,
    capability: str,
    batch: Batches,
    precision: str,
    options: BuildOptions = PLAIN,
) -> Engine:
    """Writes a raw engine for one compute capability.

    Args:
        capability: such as "8.9". TensorRT, other than TensorRT-RTX, builds for the GPU of this machine: its own.
        batch: of the first optimisation profile; a static shape when all three are equal and there are no others.
        precision: of the graph, for the label.

    Raises:
        EdgestillError: parser or builder refuse, with their first errors; an option that the module does not have; a
            graph with a dynamic dimension that is not the batch, or with an input that decides shapes.
    """
    started = time.perf_counter()
    if not adapter.rtx:
        _require_gpu(adapter, capability, graph)
    opened = _Opened(adapter)
    if not opened.parse(graph):
        raise EdgestillError(f"{adapter} cannot parse the graph", where=graph.name, evidence=opened.parser_errors())
    config = opened.builder.create_builder_config()
    _configure(adapter, config, options, graph)
    if adapter.rtx and options.hardware_compatibility != "ampere+":
        _choose_capability(adapter, config, capability, graph)
    _set_shapes(opened.builder, config, opened.network, (batch, *options.more_profiles), graph)
    # its no-op on TensorRT-RTX would ask for a GPU
    cache = None if adapter.rtx else options.timing_cache
    if cache is not None:
        attach_timing_cache(config, cache)
    plan = opened.builder.build_serialized_network(opened.network, config)
    if plan is None:
        raise EdgestillError(
            f"{adapter} cannot build an engine for compute capability {capability}",
            where=graph.name,
            evidence="; ".join(opened.errors[:3]) or "the builder gave no reason",
        )
    if cache is not None:
        store_timing_cache(config, cache)
    target.write_bytes(memoryview(plan))
    written = file_hash(target)
    _BUILT_HERE.add(written)
    gpu = None if adapter.rtx else this_gpu()
    return Engine(
        file=target,
        compute_capability=capability,
        builder=str(adapter),
        batch=batch,
        more_profiles=options.more_profiles,
        device=gpu["device"] if gpu is not None else None,
        hardware_compatibility=options.hardware_compatibility,
        version_compatible=options.version_compatible,
        workspace_mib=options.workspace_mib,
        sha256=written,
        size_bytes=target.stat().st_size,
        build_seconds=round(time.perf_counter() - started, 3),
        realised_precision=f"{precision} by the graph's types, unverified (not looked into on its GPU)",
    )


def _require_gpu(adapter: Adapter, capability: str, graph: Path) -> None:
    if adapter.major < OLDEST:
        raise EdgestillError(
            f"{adapter} knows weak typing only",
            where=graph.name,
            fix="build on the device: sh build_engine.sh in the bundle",
        )
    gpu = this_gpu()
    if gpu is None or gpu["compute_capability"] != capability:
        here = f"{gpu['device']} with {gpu['compute_capability']}" if gpu is not None else "no GPU"
        raise EdgestillError(
            f"{adapter} builds for the GPU of its own machine alone",
            where=graph.name,
            evidence=f"asked for compute capability {capability}; here is {here}",
            fix="build on the device: sh build_engine.sh in the bundle",
        )


def _configure(adapter: Adapter, config: Any, options: BuildOptions, graph: Path) -> None:
    trt = adapter.module
    # the inspector tells precisions and tactics of such engines only
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib * _MIB)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.version_compatible:
        if adapter.rtx:
            raise EdgestillError(
                f"{adapter} builds no version-compatible engines",
                where=graph.name,
                evidence="such an engine carries the lean runtime, libnvinfer_lean, which TensorRT-RTX does not have",
                fix="version_compatible = false in [export]",
            )
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    # TensorRT-RTX has no such levels: its engines are for capabilities, and without any for 8.0 and later
    if options.hardware_compatibility != "none" and not adapter.rtx:
        level = getattr(trt.HardwareCompatibilityLevel, _LEVELS[options.hardware_compatibility], None)
        if level is None:
            raise EdgestillError(
                f'{adapter} has no hardware compatibility "{options.hardware_compatibility}"',
                where=graph.name,
                evidence="it has " + ", ".join(trt.HardwareCompatibilityLevel.__members__),
                fix='hardware_compatibility = "none" in [export]',
            )
        config.hardware_compatibility_level = level


def _choose_capability(adapter: Adapter, config: Any, capability: str, graph: Path) -> None:
    known = adapter.module.ComputeCapability.__members__
    name = "SM" + capability.replace(".", "")
    if name not in known:
        raise EdgestillError(
            f"{adapter} builds no engine for compute capability {capability}",
            where=graph.name,
            evidence="it knows " + ", ".join(RTX_CAPABILITIES),
        )
    config.num_compute_capabilities = 1
    config.set_compute_capability(known[name], 0)


def attach_timing_cache(config: Any, path: Path) -> None:
    """Lets the builder use what an earlier build timed on this GPU; a file that does not fit is left aside."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # TensorRT-RTX
        stored = path.read_bytes() if path.is_file() else b""
        if not config.set_timing_cache(config.create_timing_cache(stored), False):
            config.set_timing_cache(config.create_timing_cache(b""), False)


def store_timing_cache(config: Any, path: Path) -> None:
    """Writes what the build timed, so that a rebuild takes the same tactics in less time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # TensorRT-RTX
        data = bytes(memoryview(config.get_timing_cache().serialize()))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_bytes(data)
    temporary.replace(path)


def _set_shapes(builder: Any, config: Any, network: Any, profiles: tuple[Batches, ...], graph: Path) -> None:
    """Gives dynamic batches their sizes; inputs without one keep their shape."""
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    dynamic = []
    for tensor in inputs:
        unknown = [place for place, size in enumerate(tuple(tensor.shape)) if size < 0]
        if unknown:
            dynamic.append(tensor)
        if unknown not in ([], [0]) or tensor.is_shape_tensor:
            what = "decides shapes" if tensor.is_shape_tensor else f"is dynamic in dimension {unknown[-1]}"
            raise EdgestillError(
                f'input "{tensor.name}" {what}, and an engine needs its range',
                where=graph.name,
                evidence=f"shape {tuple(tensor.shape)}; -1 is dynamic; only a batch in dimension 0 is known here",
                fix="export it with fixed sizes, or build with trtexec --minShapes --optShapes --maxShapes",
            )
    (smallest, _, largest), *others = profiles
    if smallest == largest and not others:
        for tensor in dynamic:
            tensor.shape = (smallest, *tuple(tensor.shape)[1:])
        return
    for sizes in profiles if dynamic else ():
        profile = builder.create_optimization_profile()
        for tensor in dynamic:
            profile.set_shape(tensor.name, *((size, *tuple(tensor.shape)[1:]) for size in sizes))
        if config.add_optimization_profile(profile) < 0:
            raise EdgestillError(f"the optimisation profile for batch {sizes} does not fit", where=graph.name)


def loadable(adapter: Adapter, plan: Path, built: Mapping[str, Any]) -> str | None:
    """Why `adapter` cannot load the plan on this machine, from its manifest and from the plan itself; None: it can.

    Args:
        built: the engine's entry in the manifest.
    """
    here = adapter.running()
    if "compute_capability" not in here:
        return f"an engine needs an NVIDIA GPU with its driver to load; {adapter} finds none here"
    reason = changed(str(plan), built.get("sha256")) or mismatch(dict(built), here)
    if reason is not None or not hasattr(adapter.module.Runtime, "get_engine_validity"):
        return reason
    return _validity(adapter, plan)


def _validity(adapter: Adapter, plan: Path) -> str | None:
    """What the runtime says of the plan's header (TensorRT-RTX)."""
    trt = adapter.module
    errors: list[str] = []
    runtime = trt.Runtime(_collector(trt, errors))
    validity, found = runtime.get_engine_validity(plan.read_bytes()[: runtime.engine_header_size])
    if validity != trt.EngineValidity.INVALID:
        return None
    causes = [
        name.lower().replace("_", " ")
        for name, flag in trt.EngineInvalidityDiagnostics.__members__.items()
        if int(flag) & int(found)
    ]
    return f"{adapter} refuses the engine: " + (", ".join(causes) or "; ".join(errors[:1]) or "no reason given")


def open_plan(adapter: Adapter, plan: Path, built: Mapping[str, Any], *, allow_code: bool = False) -> Any:
    """The deserialised engine; keep the adapter's module loaded as long as it is used.

    A version-compatible plan brings its own runtime: code, which runs with this process's rights. What `built` says of
    it is no reason to trust it, as whoever made the plan wrote that, too.

    Args:
        allow_code: the user said that such a plan may be loaded. One that this process built may be anyway.

    Raises:
        InputError: it does not belong here, or it brings code and that is not allowed; the reason says why.
        EdgestillError: the runtime refuses it all the same.
    """
    reason = loadable(adapter, plan, built)
    if reason is not None:
        raise InputError(reason, where=str(plan), fix="build one on this device: sh build_engine.sh in the bundle")
    allowed = allow_code or file_hash(plan) in _BUILT_HERE
    if built.get("version_compatible") and not allowed:
        raise InputError(
            "the engine is version-compatible: it brings code that would run here, and it was not built here",
            where=str(plan),
            fix="--allow-code, where you trust who built it; else sh build_engine.sh in the bundle",
        )
    trt = adapter.module
    errors: list[str] = []
    runtime = trt.Runtime(_collector(trt, errors))
    if allowed:
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(plan.read_bytes())
    if engine is None:
        raise EdgestillError(f"{adapter} cannot load the engine", where=str(plan), evidence="; ".join(errors[:3]))
    return engine


def inspect_engine(adapter: Adapter, engine: Engine) -> Inspection:
    """Layers, precisions, reformats and, with CUDA in PyTorch, times. Needs the GPU that the engine is for.

    Raises:
        InputError, EdgestillError: see `open_plan`.
    """
    opened = open_plan(adapter, engine.file, engine.model_dump(mode="json", exclude={"inspection"}))
    context = opened.create_execution_context()
    _choose_shapes(adapter, opened, context, engine.batch[1])
    inspector = opened.create_engine_inspector()
    inspector.execution_context = context
    text = inspector.get_engine_information(adapter.module.LayerInformationFormat.JSON)
    found = parse_inspection(text, str(adapter))
    times = _layer_times(adapter, opened, context)
    return with_times(found, times) if times else found


def _choose_shapes(adapter: Adapter, engine: Any, context: Any, batch: int) -> None:
    for name in _tensors(adapter, engine, "INPUT"):
        shape = tuple(engine.get_tensor_shape(name))
        if -1 in shape:
            context.set_input_shape(name, tuple(batch if size < 0 else size for size in shape))


def _tensors(adapter: Adapter, engine: Any, mode: str) -> list[str]:
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    wanted = getattr(adapter.module.TensorIOMode, mode)
    return [name for name in names if engine.get_tensor_mode(name) == wanted]


def _layer_times(adapter: Adapter, engine: Any, context: Any) -> dict[str, float]:
    """Milliseconds per run by layer, the mean of some runs on zeros; empty where PyTorch has no CUDA."""
    import torch

    if not torch.cuda.is_available():
        return {}
    times: dict[str, float] = {}

    class Collector(adapter.module.IProfiler):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            adapter.module.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            times[layer_name] = times.get(layer_name, 0.0) + ms / _TIMED_RUNS

    buffers = []
    for name in (*_tensors(adapter, engine, "INPUT"), *_tensors(adapter, engine, "OUTPUT")):
        shape = tuple(context.get_tensor_shape(name))
        count = max(1, torch.Size(shape).numel()) * engine.get_tensor_dtype(name).itemsize
        buffers.append(torch.zeros(int(count), dtype=torch.uint8, device="cuda"))
        context.set_tensor_address(name, buffers[-1].data_ptr())
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    for _ in range(3):
        context.execute_async_v3(stream.cuda_stream)
    stream.synchronize()
    profiler = Collector()
    context.profiler = profiler
    for _ in range(_TIMED_RUNS):
        context.execute_async_v3(stream.cuda_stream)
        stream.synchronize()
    return times


class _Opened:
    """Builder, strongly typed network and parser, kept alive together: the network does not own its builder."""

    def __init__(self, adapter: Adapter) -> None:
        trt = adapter.module
        self.errors: list[str] = []
        self._logger = _collector(trt, self.errors)
        self.builder = trt.Builder(self._logger)
        self.network = self.builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        self.parser = trt.OnnxParser(self.network, self._logger)

    def parse(self, graph: Path) -> bool:
        # with its path the parser finds weights that lie beside the graph
        return bool(self.parser.parse(graph.read_bytes(), str(graph)))

    def parser_errors(self) -> str:
        """What the parser refused, by node; at most three."""
        described = []
        for index in range(min(self.parser.num_errors, 3)):
            error = self.parser.get_error(index)
            text = "; ".join(line for line in error.desc().splitlines() if line.strip() and not _about_the_gpu(line))
            described.append(f"{error.node_operator()} {error.node_name()}: {text}")
        return "; ".join(described or self.errors[:3]) or "the parser gave no reason"


def _collector(trt: Any, errors: list[str]) -> Any:
    """A logger that keeps errors and prints nothing."""

    class Collector(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            lines = [line for line in msg.splitlines() if line.strip()]
            failed = severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR)
            if failed and lines and not _about_the_gpu(lines[0]):
                errors.append(lines[0].strip())

    return Collector()


def _about_the_gpu(line: str) -> bool:
    """The builder complains about the missing driver before it goes on without one."""
    return "catchCudaError" in line or "cudaError" in line


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def evidence_label(adapter: Adapter, runtime: str, version: str) -> str:
    """What a parse proves: the parser's own version, and that it is not the target's when it is not."""
    return f"parsed by {adapter}" + ("" if adapter.rtx and runtime == "tensorrt-rtx" else f" (not TensorRT {version})")
