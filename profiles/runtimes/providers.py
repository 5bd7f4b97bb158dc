"""ONNX Runtime on other execution providers: CUDA and TensorRT; OpenVINO and TensorRT-RTX, as plugins or built in.

A session that silently fell back to the CPU would be measured under another's name, so loading fails unless the
provider that was asked for took part.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from profiles.errors import EdgestillError, InputError
from profiles.runtimes import Clock, RuntimeOptions, Timed, Usable, has_nvidia_gpu, run_error
from profiles.runtimes.onnxruntime import OnnxRuntimeSession, check_inputs, session_settings

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class _Kind:
    provider: str
    install: str
    plugin: str | None = None
    """A package that brings the provider to a plain onnxruntime."""
    on_cuda: bool = False
    """Whether inputs and outputs lie on the GPU while it computes."""


_SWAP = "pip uninstall --yes onnxruntime && pip install onnxruntime-gpu"
_KINDS = {
    "onnxruntime-cuda": _Kind("CUDAExecutionProvider", _SWAP, on_cuda=True),
    "onnxruntime-tensorrt": _Kind("TensorrtExecutionProvider", f"{_SWAP} tensorrt-cu12", on_cuda=True),
    "onnxruntime-tensorrt-rtx": _Kind(
        "NvTensorRTRTXExecutionProvider", "pip install onnxruntime-ep-nv-tensorrt-rtx", "onnxruntime_ep_nv_tensorrt_rtx"
    ),
    "onnxruntime-openvino": _Kind(
        "OpenVINOExecutionProvider", "pip install onnxruntime-ep-openvino", "onnxruntime_ep_openvino"
    ),
}


def usable(name: str) -> Usable:
    """See `profiles.runtimes.usable`. A provider that ONNX Runtime lists may still find no device when it loads."""
    kind = _KINDS[name]
    if kind.provider in ort.get_available_providers():
        if kind.on_cuda and not has_nvidia_gpu():
            return Usable(False, "this onnxruntime has it, but there is no NVIDIA GPU here")
        return Usable(True, f"ONNX Runtime {ort.__version__}, built in")
    if kind.plugin is None or find_spec(kind.plugin) is None:
        reason = "this onnxruntime was built without it" if kind.plugin is None else "the plugin is not installed"
        needs_gpu = "openvino" not in name
        if needs_gpu and not has_nvidia_gpu():
            return Usable(False, f"{reason}, and there is no NVIDIA GPU here")
        return Usable(False, reason, kind.install)
    try:
        devices = _plugin_devices(kind.plugin)
    except Exception as error:  # a plugin that does not fit this ONNX Runtime fails in any way
        return Usable(False, f"the plugin does not load: {' '.join(str(error).split())[:200]}", kind.install)
    if not devices:
        return Usable(False, "the plugin is installed and finds no device that it supports here")
    return Usable(True, f"ONNX Runtime {ort.__version__}, plugin")


def make(name: str, options: RuntimeOptions) -> ProviderRuntime:
    """See `get_runtime`."""
    return ProviderRuntime(name, options)


class ProviderRuntime:
    """See `Runtime`."""

    def __init__(self, name: str, options: RuntimeOptions) -> None:
        self.name = name
        self._options = options

    @property
    def version(self) -> str:
        """The installed version."""
        return str(ort.__version__)

    def load(self, model: Path, *, threads: int | None) -> OnnxRuntimeSession:
        """See `Runtime.load`."""
        kind = _KINDS[self.name]
        return (_CudaSession if kind.on_cuda else _HostSession)(model, threads, self._options, kind)


class _HostSession(OnnxRuntimeSession):
    """Inputs and outputs in host memory: `compute` holds the provider's own transfers, where it has any."""

    def __init__(self, model: Path, threads: int | None, options: RuntimeOptions, kind: _Kind) -> None:
        self._kind = kind
        self._choices = _provider_options(kind, threads, options)
        super().__init__(model, threads, options)
        self.options |= {"providers": [kind.provider], "provider_options": self._choices, "buffers": "host"}

    def _opened(self, model: Path, threads: int | None, options: RuntimeOptions) -> Any:
        if not model.is_file():
            raise InputError("no such model file", where=str(model), fix="name an .onnx file that exists")
        settings = session_settings(threads, options)
        kind, title = self._kind, f"{self._kind.provider} of ONNX Runtime {ort.__version__}"
        try:
            if kind.provider in ort.get_available_providers():
                session = ort.InferenceSession(str(model), settings, providers=[(kind.provider, self._choices)])
            else:
                settings.add_provider_for_devices(_plugin_devices(kind.plugin or "")[:1], self._choices)
                session = ort.InferenceSession(str(model), settings)
        except Exception as error:  # ONNX Runtime's exceptions share no base class but Exception
            raise run_error(error, title, model) from error
        if kind.provider not in session.get_providers():
            raise EdgestillError(
                f"{title} did not take the model and ONNX Runtime fell back to {', '.join(session.get_providers())}",
                where=str(model),
                fix='its log says why; "edgestill doctor" says what is installed',
            )
        return session


class _CudaSession(_HostSession):
    """Inputs and outputs on the GPU: `compute` is the run call, which waits for the GPU; transfers come on top.

    ONNX Runtime gives no access to its stream's events, so that the launch is part of `compute`.
    """

    def __init__(self, model: Path, threads: int | None, options: RuntimeOptions, kind: _Kind) -> None:
        super().__init__(model, threads, options, kind)
        self.options["buffers"] = "CUDA"
        self._inputs_there: dict[str, Any] = {}
        self._outputs_there: list[Any] = []

    def query(self, inputs: Mapping[str, Array], clock: Clock) -> Timed:
        """See `Session.query`."""
        if self._binding is None or any(self._buffers[n].shape != array.shape for n, array in inputs.items()):
            self._bind(inputs)
        try:
            start = clock.now()
            for name, array in inputs.items():
                self._inputs_there[name].update_inplace(np.ascontiguousarray(array))
            ready = clock.now()
            self._session.run_with_iobinding(self._binding)
            computed = clock.now()
            values = self._outputs_there or self._binding.get_outputs()
            outputs = [value.numpy() for value in values]
            end = clock.now()
        except Exception as error:
            raise run_error(error, f"{self._kind.provider} of ONNX Runtime {ort.__version__}", self._model) from error
        named = {spec.name: output for spec, output in zip(self.outputs, outputs, strict=True)}
        return Timed(computed - ready, end - start, named)

    def close(self) -> None:
        """Frees the session and its buffers."""
        super().close()
        self._inputs_there, self._outputs_there = {}, []

    def _bind(self, inputs: Mapping[str, Array]) -> None:
        check_inputs(inputs, self.inputs, self._model)
        self._binding = self._session.io_binding()
        self._buffers = dict(inputs)
        self._inputs_there = {name: ort.OrtValue.ortvalue_from_numpy(a, "cuda", 0) for name, a in inputs.items()}
        for name, value in self._inputs_there.items():
            self._binding.bind_ortvalue_input(name, value)
        batch = next(iter(inputs.values())).shape[0]
        self._outputs_there = []
        for spec in self.outputs:
            # a recorded CUDA graph writes to the addresses that it was recorded with
            shape = [batch if index == 0 and not isinstance(s, int) else s for index, s in enumerate(spec.shape)]
            if all(isinstance(size, int) for size in shape):
                there = ort.OrtValue.ortvalue_from_shape_and_type(shape, np.dtype(spec.dtype), "cuda", 0)
                self._outputs_there.append(there)
                self._binding.bind_ortvalue_output(spec.name, there)
            else:
                self._binding.bind_output(spec.name, "cuda")
        if len(self._outputs_there) != len(self.outputs):
            self._outputs_there = []


def _provider_options(kind: _Kind, threads: int | None, options: RuntimeOptions) -> dict[str, str]:
    graph = "1" if options.cuda_graph else "0"
    if kind.provider == "OpenVINOExecutionProvider":
        device: dict[str, str] = {"NUM_STREAMS": "1"}
        if threads is not None:
            device["INFERENCE_NUM_THREADS"] = str(threads)
        return {"load_config": json.dumps({"CPU": device})}
    if kind.provider == "TensorrtExecutionProvider":
        return {"device_id": "0", "trt_cuda_graph_enable": graph}
    if kind.provider == "NvTensorRTRTXExecutionProvider":
        return {"enable_cuda_graph": graph}
    return {"device_id": "0", "enable_cuda_graph": graph}


@lru_cache(maxsize=4)
def _plugin_devices(package: str) -> list[Any]:
    """The devices that a plugin package serves on this machine."""
    plugin = import_module(package)
    name = plugin.get_ep_name()
    ort.register_execution_provider_library(name, str(plugin.get_library_path()))
    return [device for device in ort.get_ep_devices() if device.ep_name == name]
