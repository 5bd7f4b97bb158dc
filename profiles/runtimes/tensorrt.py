"""TensorRT and TensorRT-RTX directly: a built engine, pinned transfers, CUDA events, with and without a CUDA graph.

Written against the documented Python API of TensorRT 10 and 11, TensorRT-RTX 1.x and cuda-bindings 12 and 13.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from profiles.errors import EdgestillError, InputError
from profiles.runtimes import Clock, RuntimeOptions, TensorSpec, Timed, Usable, has_nvidia_gpu, run_error
from profiles.runtimes.onnxruntime import check_inputs

Array = np.ndarray[Any, Any]
_MODULES = {"tensorrt": ("tensorrt", "TensorRT"), "tensorrt-rtx": ("tensorrt_rtx", "TensorRT-RTX")}
_INSTALL = {
    "tensorrt": 'pip install tensorrt "edgestill[nvidia]"',
    "tensorrt-rtx": 'pip install "edgestill[tensorrt-rtx,nvidia]"',
}


def usable(name: str) -> Usable:
    """See `profiles.runtimes.usable`: the module, the CUDA bindings, and a GPU that they see."""
    module, title = _MODULES[name]
    if not has_nvidia_gpu():
        return Usable(False, "there is no NVIDIA GPU here")
    if find_spec(module) is None:
        return Usable(False, "not installed", _INSTALL[name])
    try:
        found = f"{title} {import_module(module).__version__}"
    except Exception as error:  # shared libraries that do not load
        return Usable(False, f"installed, but cannot be imported: {' '.join(str(error).split())[:200]}", _INSTALL[name])
    if find_spec("cuda") is None:
        return Usable(False, f"{found}, but the CUDA bindings are missing", 'pip install "edgestill[nvidia]"')
    try:
        count = _call(_cudart().cudaGetDeviceCount())
    except Exception as error:
        return Usable(False, f"{found}, but CUDA cannot be used: {' '.join(str(error).split())[:200]}")
    return Usable(True, found) if count else Usable(False, f"{found}, but there is no NVIDIA GPU here")


def make(name: str, options: RuntimeOptions) -> TensorRt:
    """See `get_runtime`."""
    return TensorRt(name, options)


class TensorRt:
    """See `Runtime`."""

    def __init__(self, name: str, options: RuntimeOptions) -> None:
        self.name = name
        self._options = options

    @property
    def version(self) -> str:
        """The installed version."""
        return str(import_module(_MODULES[self.name][0]).__version__)

    def load(self, model: Path, *, threads: int | None) -> TensorRtSession:
        """See `Runtime.load`. `model` is a built engine; the processor's threads play no part."""
        return TensorRtSession(
            self.name, model, cuda_graph=self._options.cuda_graph, engine_code=self._options.engine_code
        )


@dataclass
class _Buffer:
    """One tensor's page-locked host memory, and its device memory."""

    host: Array
    host_pointer: int
    device: int


class TensorRtSession:
    """One engine, one context, one stream.

    compute: between two CUDA events around the launch. end to end: from before the copy into the pinned buffer to the
    outputs on the host.
    """

    def __init__(self, name: str, model: Path, *, cuda_graph: bool, engine_code: bool = False) -> None:
        module, self._title = _MODULES[name]
        trt: Any = import_module(module)
        self._trt, self._model, self._wants_graph = trt, model, cuda_graph
        self._title = f"{self._title} {trt.__version__}"
        if not model.is_file():
            raise InputError("no such engine file", where=str(model), fix="build one with edgestill export")
        if model.suffix == ".onnx":
            raise InputError(
                f"{self._title} runs a built engine, not an ONNX file",
                where=str(model),
                fix="build one: edgestill export",
            )
        self._logger = trt.Logger(trt.Logger.ERROR)
        self._runtime = trt.Runtime(self._logger)
        if engine_code:
            self._runtime.engine_host_code_allowed = True
        engine = self._runtime.deserialize_cuda_engine(model.read_bytes())
        if engine is None:
            or_code = "" if engine_code else ", or it is version-compatible and brings code (--allow-code)"
            raise EdgestillError(
                f"the engine does not load: it was built by another version, or for another GPU{or_code}",
                where=str(model),
                evidence=self._title,
                fix="build it on this machine: edgestill export",
            )
        self._engine: Any = engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        reading = [each for each in names if engine.get_tensor_mode(each) == trt.TensorIOMode.INPUT]
        self.inputs = tuple(self._spec(each) for each in reading)
        self.outputs = tuple(self._spec(each) for each in names if each not in reading)
        self._cuda = _cudart()
        try:
            self._context: Any = engine.create_execution_context()
            if self._context is None:
                raise MemoryError("out of memory: no execution context could be made")
            self._stream = _call(self._cuda.cudaStreamCreateWithFlags(self._cuda.cudaStreamNonBlocking))
            self._before, self._after = _call(self._cuda.cudaEventCreate()), _call(self._cuda.cudaEventCreate())
        except Exception as error:
            raise run_error(error, self._title, model) from error
        self.options: dict[str, Any] = {"cuda_graph": False, "transfers": "pinned", "streams": 1}
        self._buffers: dict[str, _Buffer] = {}
        self._graph: Any = None

    def query(self, inputs: Mapping[str, Array], clock: Clock) -> Timed:
        """See `Session.query`."""
        cuda = self._cuda
        try:
            if set(inputs) != {spec.name for spec in self.inputs} or any(
                name not in self._buffers or self._buffers[name].host.shape != array.shape
                for name, array in inputs.items()
            ):
                self._bind(inputs)
            start = clock.now()
            for name, array in inputs.items():
                np.copyto(self._buffers[name].host, array)
                self._copy(self._buffers[name], cuda.cudaMemcpyKind.cudaMemcpyHostToDevice)
            _call(cuda.cudaEventRecord(self._before, self._stream))
            self._launch()
            _call(cuda.cudaEventRecord(self._after, self._stream))
            for spec in self.outputs:
                self._copy(self._buffers[spec.name], cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost)
            _call(cuda.cudaStreamSynchronize(self._stream))
            outputs = {spec.name: self._buffers[spec.name].host.copy() for spec in self.outputs}
            end = clock.now()
            milliseconds = _call(cuda.cudaEventElapsedTime(self._before, self._after))
        except Exception as error:
            raise run_error(error, self._title, self._model) from error
        return Timed(int(milliseconds * 1e6), end - start, outputs)

    def close(self) -> None:
        """Frees the graph, the buffers, the stream and the engine."""
        if self._context is None:
            return
        self._release()
        _call(self._cuda.cudaEventDestroy(self._before))
        _call(self._cuda.cudaEventDestroy(self._after))
        _call(self._cuda.cudaStreamDestroy(self._stream))
        self._context = self._engine = self._runtime = None

    def _launch(self) -> None:
        if self._graph is not None:
            _call(self._cuda.cudaGraphLaunch(self._graph, self._stream))
        elif not self._context.execute_async_v3(int(self._stream)):
            raise EdgestillError(f"{self._title} could not run the engine", where=str(self._model))

    def _copy(self, buffer: _Buffer, kind: Any) -> None:
        ends = (buffer.device, buffer.host_pointer)
        if kind == self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost:
            ends = ends[::-1]
        _call(self._cuda.cudaMemcpyAsync(*ends, buffer.host.nbytes, kind, self._stream))

    def _bind(self, inputs: Mapping[str, Array]) -> None:
        check_inputs(inputs, self.inputs, self._model)
        self._release()
        for name, array in inputs.items():
            if not self._context.set_input_shape(name, array.shape):
                raise InputError(
                    f'the engine does not take input "{name}" of this shape',
                    where=str(self._model),
                    evidence=f"given {array.shape}; its profile: {self._engine.get_tensor_profile_shape(name, 0)}",
                    fix="a batch that the engine was built for",
                )
        for spec in (*self.inputs, *self.outputs):
            shape = tuple(self._context.get_tensor_shape(spec.name))
            buffer = _allocate(self._cuda, shape, np.dtype(spec.dtype))
            self._buffers[spec.name] = buffer
            self._context.set_tensor_address(spec.name, buffer.device)
        # the first launch after a change of shapes allocates, which must not be recorded
        self._launch()
        _call(self._cuda.cudaStreamSynchronize(self._stream))
        if self._wants_graph:
            self._record()

    def _record(self) -> None:
        capturable = getattr(self._context, "is_stream_capturable", None)
        if capturable is not None and not capturable(int(self._stream)):
            self.options["cuda_graph"] = "refused by the engine"
            return
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        _call(self._cuda.cudaStreamBeginCapture(self._stream, mode))
        launched = self._context.execute_async_v3(int(self._stream))
        error, graph = self._cuda.cudaStreamEndCapture(self._stream)
        if not launched or int(error) != 0:
            # control flow that depends on data cannot be recorded (TensorRT's documentation on CUDA graphs)
            self.options["cuda_graph"] = "could not be recorded"
            return
        self._graph = _call(self._cuda.cudaGraphInstantiate(graph, 0))
        _call(self._cuda.cudaGraphDestroy(graph))
        self.options["cuda_graph"] = True

    def _release(self) -> None:
        if self._graph is not None:
            _call(self._cuda.cudaGraphExecDestroy(self._graph))
            self._graph = None
        for buffer in self._buffers.values():
            _call(self._cuda.cudaFree(buffer.device))
            _call(self._cuda.cudaFreeHost(buffer.host_pointer))
        self._buffers = {}

    def _spec(self, name: str) -> TensorSpec:
        try:
            dtype = np.dtype(self._trt.nptype(self._engine.get_tensor_dtype(name))).name
        except TypeError as error:
            raise EdgestillError(
                f'"{name}" is a {self._engine.get_tensor_dtype(name)}, which NumPy cannot hold',
                where=str(self._model),
                fix="cast it in the graph",
            ) from error
        shape = tuple(None if size < 0 else int(size) for size in self._engine.get_tensor_shape(name))
        return TensorSpec(name, dtype, shape)


def _allocate(cuda: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> _Buffer:
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    pointer = int(_call(cuda.cudaMallocHost(size)))
    raw = (ctypes.c_uint8 * size).from_address(pointer)
    host = np.ctypeslib.as_array(raw).view(dtype).reshape(shape)
    return _Buffer(host, pointer, int(_call(cuda.cudaMalloc(size))))


@lru_cache(maxsize=1)
def _cudart() -> Any:
    return import_module("cuda.bindings.runtime")


def _call(result: tuple[Any, ...]) -> Any:
    """The result of a CUDA runtime call, which comes as (error, values...).

    Raises:
        RuntimeError: with CUDA's name and text of the error.
    """
    error, *values = result
    if int(error) != 0:
        text = _cudart().cudaGetErrorString(error)[1]
        raise RuntimeError(f"{error.name}: {text.decode() if isinstance(text, bytes) else text}")
    return values[0] if len(values) == 1 else tuple(values)
