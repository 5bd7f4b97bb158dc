"""OpenVINO on the CPU, directly (package `openvino`): ONNX files and its own .xml files."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from profiles.errors import EdgestillError, InputError
from profiles.runtimes import Clock, RuntimeOptions, TensorSpec, Timed, Usable, run_error
from profiles.runtimes.onnxruntime import check_inputs

Array = np.ndarray[Any, Any]
_INSTALL = 'pip install "edgestill[openvino]"'


def usable(name: str) -> Usable:
    """See `profiles.runtimes.usable`."""
    if find_spec("openvino") is None:
        return Usable(False, "not installed", _INSTALL)
    try:
        core = _core()
        return Usable(True, f"OpenVINO {_version()}, devices: {', '.join(core.available_devices)}")
    except Exception as error:  # a broken installation fails in any way
        return Usable(False, f"installed, but cannot be used: {' '.join(str(error).split())[:200]}", _INSTALL)


def make(name: str, options: RuntimeOptions) -> OpenVino:
    """See `get_runtime`."""
    return OpenVino()


class OpenVino:
    """See `Runtime`."""

    name = "openvino"

    @property
    def version(self) -> str:
        """The installed version."""
        return _version()

    def load(self, model: Path, *, threads: int | None) -> OpenVinoSession:
        """See `Runtime.load`."""
        return OpenVinoSession(model, threads)


class OpenVinoSession:
    """One model, one stream, one request. The request's tensors wrap buffers of ours, allocated once per shape."""

    def __init__(self, model: Path, threads: int | None) -> None:
        if not model.is_file():
            raise InputError("no such model file", where=str(model), fix="name an .onnx file that exists")
        self._model = model
        # FP32 stays FP32 where the processor has BF16 units: the graph says the precision, not a hint of the runtime
        settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "INFERENCE_PRECISION_HINT": "f32",
        }
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        core = _core()
        try:
            read = core.read_model(str(model))
        except Exception as error:
            raise InputError(
                "not a model that OpenVINO reads, or a damaged one",
                where=str(model),
                evidence=_last_line(error),
                fix="export it again, and copy its external data file beside it if it has one",
            ) from error
        try:
            compiled = core.compile_model(read, "CPU", settings)
            self._request: Any = compiled.create_infer_request()
        except Exception as error:
            raise run_error(error, f"OpenVINO {_version()}", model) from error
        # names as in the file: the compiled model's tensors may bear those of nodes that were merged into them
        self.inputs = tuple(_spec(port, model) for port in read.inputs)
        self.outputs = tuple(_spec(port, model) for port in read.outputs)
        self._ports = dict(zip((spec.name for spec in self.inputs), compiled.inputs, strict=True))
        self.options: dict[str, Any] = {
            "device": "CPU",
            "intra_op_threads": threads,
            "streams": 1,
            "performance_hint": "latency",
            "inference_precision": "f32",
        }
        self._buffers: dict[str, Array] = {}

    def query(self, inputs: Mapping[str, Array], clock: Clock) -> Timed:
        """See `Session.query`; `compute` is the request's synchronous call with its tensors in place."""
        if any(
            name not in self._buffers
            or array.shape != self._buffers[name].shape
            or array.dtype != self._buffers[name].dtype
            for name, array in inputs.items()
        ) or len(inputs) != len(self.inputs):
            self._bind(inputs)
        request, buffers = self._request, self._buffers
        try:
            start = clock.now()
            for name, array in inputs.items():
                np.copyto(buffers[name], array)
            ready = clock.now()
            request.infer()
            computed = clock.now()
            outputs = [request.get_output_tensor(index).data.copy() for index in range(len(self.outputs))]
            end = clock.now()
        except Exception as error:
            raise run_error(error, f"OpenVINO {_version()}", self._model) from error
        named = {spec.name: output for spec, output in zip(self.outputs, outputs, strict=True)}
        return Timed(computed - ready, end - start, named)

    def close(self) -> None:
        """Frees the request and its buffers."""
        self._request, self._buffers = None, {}

    def _bind(self, inputs: Mapping[str, Array]) -> None:
        import openvino

        check_inputs(inputs, self.inputs, self._model)
        self._buffers = {name: np.empty(array.shape, array.dtype) for name, array in inputs.items()}
        for name, buffer in self._buffers.items():
            self._request.set_tensor(self._ports[name], openvino.Tensor(buffer, shared_memory=True))


def _spec(port: Any, model: Path) -> TensorSpec:
    shape = port.get_partial_shape()
    sizes = tuple(size.get_length() if size.is_static else None for size in shape)
    try:
        dtype = np.dtype(port.get_element_type().to_dtype()).name
    except Exception as error:
        raise EdgestillError(
            f'"{port.get_any_name()}" is a {port.get_element_type()}, which NumPy cannot hold',
            where=str(model),
            fix="cast it in the graph",
        ) from error
    return TensorSpec(port.get_any_name(), dtype, sizes)


@lru_cache(maxsize=1)
def _core() -> Any:
    import openvino

    return openvino.Core()


def _version() -> str:
    import openvino

    return str(openvino.__version__).split("-", 1)[0]


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
