"""TensorRT and TensorRT-RTX through one thin adapter: parse a graph, build an engine.

Both modules have the same names. TensorRT-RTX builds engines for a named compute capability on a machine without a GPU;
TensorRT builds on the GPU that will run the engine. Networks are always strongly typed: the graph says the precision,
no flag does.
"""

from __future__ import annotations

import importlib
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import onnx

from export.candidate import Engine
from profiles.artifact import file_hash
from profiles.errors import EdgestillError

INSTALL_RTX = "pip install 'edgestill[tensorrt-rtx]'"
RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0")
"""What TensorRT-RTX 1.7 builds for; 7.5 takes FP16 only (found by building)."""


@dataclass(frozen=True)
class Adapter:
    """An imported module and what to call it."""

    module: Any
    title: str
    version: str
    rtx: bool

    def __str__(self) -> str:
        return f"{self.title} {self.version}"


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


def parse(adapter: Adapter, graph: Path) -> str | None:
    """Parses the graph, strongly typed; the first errors, or None when the parser takes it."""
    opened = _Opened(adapter)
    return None if opened.parser.parse(graph.read_bytes(), str(graph)) else opened.parser_errors()


def build_engine(
    adapter: Adapter, graph: Path, target: Path, *, capability: str, batch: tuple[int, int, int], precision: str
) -> Engine:
    """Writes a raw engine for one compute capability.

    Args:
        capability: such as "8.9".
        batch: smallest, optimal and largest; all equal: a static shape.
        precision: of the graph, for the label.

    Raises:
        EdgestillError: parser or builder refuse, with their first errors.
    """
    trt = adapter.module
    started = time.perf_counter()
    opened = _Opened(adapter)
    if not opened.parser.parse(graph.read_bytes(), str(graph)):
        raise EdgestillError(f"{adapter} cannot parse the graph", where=graph.name, evidence=opened.parser_errors())
    config = opened.builder.create_builder_config()
    if adapter.rtx:
        name = "SM" + capability.replace(".", "")
        if name not in trt.ComputeCapability.__members__:
            raise EdgestillError(
                f"{adapter} builds no engine for compute capability {capability}",
                where=graph.name,
                evidence="it knows " + ", ".join(RTX_CAPABILITIES),
            )
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.__members__[name], 0)
    _set_shapes(opened.builder, config, opened.network, batch)
    plan = opened.builder.build_serialized_network(opened.network, config)
    if plan is None:
        raise EdgestillError(
            f"{adapter} cannot build an engine for compute capability {capability}",
            where=graph.name,
            evidence="; ".join(opened.errors[:3]) or "the builder gave no reason",
        )
    target.write_bytes(memoryview(plan))
    return Engine(
        file=target,
        compute_capability=capability,
        builder=str(adapter),
        batch=batch,
        sha256=file_hash(target),
        size_bytes=target.stat().st_size,
        build_seconds=round(time.perf_counter() - started, 3),
        realised_precision=f"{precision} by the graph's types, unverified (no GPU here)",
    )


def _set_shapes(builder: Any, config: Any, network: Any, batch: tuple[int, int, int]) -> None:
    smallest, optimal, largest = batch
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    if smallest == largest:
        for tensor in inputs:
            tensor.shape = (smallest, *tuple(tensor.shape)[1:])
        return
    profile = builder.create_optimization_profile()
    for tensor in inputs:
        rest = tuple(tensor.shape)[1:]
        profile.set_shape(tensor.name, (smallest, *rest), (optimal, *rest), (largest, *rest))
    config.add_optimization_profile(profile)


class _Opened:
    """Builder, strongly typed network and parser, kept alive together: the network does not own its builder."""

    def __init__(self, adapter: Adapter) -> None:
        trt = adapter.module
        self.errors: list[str] = []
        self._logger = _collector(trt, self.errors)
        self.builder = trt.Builder(self._logger)
        self.network = self.builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        self.parser = trt.OnnxParser(self.network, self._logger)

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


def evidence_label(adapter: Adapter, runtime: str, version: str) -> str:
    """What a parse proves: the parser's own version, and that it is not the target's when it is not."""
    return f"parsed by {adapter}" + ("" if adapter.rtx and runtime == "tensorrt-rtx" else f" (not TensorRT {version})")


def graph_precision(model: onnx.ModelProto) -> str:
    """Types that the graph's computing nodes use: such as "int8, rest fp16"."""
    quantized = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
    half = any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in model.graph.initializer)
    rest = "fp16" if half else "fp32"
    return f"int8, rest {rest}" if quantized else rest
