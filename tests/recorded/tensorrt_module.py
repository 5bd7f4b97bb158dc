"""Stands in for NVIDIA's Python module `tensorrt` on a machine without a GPU: the names of TensorRT 10 that are used.

What an "engine" computes is computed by ONNX Runtime, on memory of the stand-in in cudart.c. An engine begins with the
version that made it; what the real module logs of one of another version is a line that users of it quoted.
"""

from __future__ import annotations

import ctypes
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

__version__ = "10.3.0"
_OTHER = (
    "IRuntime::deserializeCudaEngine: Error Code 6: API Usage Error (The engine plan file is not compatible with this "
    "version of TensorRT, expecting library version 10.3.0.26 got {found}, please rebuild.)"
)
_KINDS = {"tensor(uint8)": "UINT8", "tensor(float)": "FLOAT"}


class TensorIOMode(Enum):
    """As `trt.TensorIOMode`."""

    INPUT = 1
    OUTPUT = 2


class DataType(Enum):
    """As `trt.DataType`."""

    UINT8 = "uint8"
    FLOAT = "float32"

    @property
    def itemsize(self) -> int:
        """Bytes."""
        return np.dtype(self.value).itemsize


class MemoryPoolType(Enum):
    """As `trt.MemoryPoolType`."""

    WORKSPACE = 0


class NetworkDefinitionCreationFlag(int, Enum):
    """As `trt.NetworkDefinitionCreationFlag`."""

    STRONGLY_TYPED = 1


class ILogger:
    """As `trt.ILogger`."""

    class Severity(Enum):
        """As `trt.ILogger.Severity`."""

        INTERNAL_ERROR = 0
        ERROR = 1


class Builder:
    """As `trt.Builder`."""

    def __init__(self, logger: Any) -> None:
        self.network = _Network()

    def create_network(self, flags: int) -> _Network:
        assert flags == 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED
        return self.network

    def create_builder_config(self) -> _Config:
        return _Config()

    def create_optimization_profile(self) -> _Profile:
        return _Profile()

    def build_serialized_network(self, network: _Network, config: _Config) -> bytes:
        return f"{__version__}\n".encode() + Path(network.file).read_bytes()


class _Network:
    file = ""


class _Profile:
    def set_shape(self, name: str, *shapes: tuple[int, ...]) -> None:
        assert len(shapes) == 3


class _Config:
    def set_memory_pool_limit(self, pool: MemoryPoolType, size: int) -> None:
        assert size > 0

    def add_optimization_profile(self, profile: _Profile) -> int:
        return 0


class OnnxParser:
    """As `trt.OnnxParser`."""

    num_errors = 0

    def __init__(self, network: _Network, logger: Any) -> None:
        self.network = network

    def parse_from_file(self, path: str) -> bool:
        self.network.file = path
        return True


class Runtime:
    """As `trt.Runtime`."""

    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def deserialize_cuda_engine(self, plan: bytes) -> _Engine | None:
        version, _, graph = plan.partition(b"\n")
        if version.decode() != __version__:
            self.logger.log(ILogger.Severity.ERROR, _OTHER.format(found=version.decode()))
            return None
        return _Engine(graph)


class _Engine:
    def __init__(self, graph: bytes) -> None:
        self.session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
        self.inputs = {spec.name: spec for spec in self.session.get_inputs()}
        self.outputs = {spec.name: spec for spec in self.session.get_outputs()}
        self.names = [*self.inputs, *self.outputs]
        self.num_io_tensors = len(self.names)

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType[_KINDS[{**self.inputs, **self.outputs}[name].type]]

    def create_execution_context(self) -> _Context:
        return _Context(self)


class _Context:
    def __init__(self, engine: _Engine) -> None:
        self.engine = engine
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name not in self.shapes:
            zeros = {key: np.zeros(self.shapes[key], self._dtype(key)) for key in self.engine.inputs}
            found = self.engine.session.run(None, zeros)
            self.shapes.update({key: value.shape for key, value in zip(self.engine.outputs, found, strict=True)})
        return self.shapes[name]

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        given = {}
        for name in self.engine.inputs:
            shape, dtype = self.shapes[name], np.dtype(self._dtype(name))
            raw = ctypes.string_at(self.addresses[name], int(np.prod(shape)) * dtype.itemsize)
            given[name] = np.frombuffer(raw, dtype).reshape(shape)
        for name, value in zip(self.engine.outputs, self.engine.session.run(None, given), strict=True):
            ctypes.memmove(self.addresses[name], value.tobytes(), value.nbytes)
        return True

    def _dtype(self, name: str) -> str:
        return str(self.engine.get_tensor_dtype(name).value)
