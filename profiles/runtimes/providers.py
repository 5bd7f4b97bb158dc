"""ONNX Runtime on other execution providers: CUDA and TensorRT; OpenVINO and TensorRT-RTX, as plugins or built in.

A session that silently fell back to the CPU would be measured under another's name: ONNX Runtime is asked which
provider runs how many nodes, that is recorded, and loading fails where the one that was asked for runs none.

A CUDA graph is recorded once per session, for inputs of one shape at fixed addresses (so say the documents of the CUDA
and the TensorRT-RTX provider). Other shapes therefore get a session of their own, and a model that cannot be recorded
runs without.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.metadata import packages_distributions
from importlib.metadata import version as package_version
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


_GPU = 'pip install "onnxruntime-gpu[cuda,cudnn]"'
SWAP = f"pip uninstall --yes onnxruntime && {_GPU}"
"""onnxruntime-gpu replaces onnxruntime, which has the same module; its extras are the CUDA libraries that it links."""
_TENSORRT = ' "tensorrt-cu13<11"'  # onnxruntime-gpu links libnvinfer.so.10
_KINDS = {
    "onnxruntime-cuda": _Kind("CUDAExecutionProvider", SWAP, on_cuda=True),
    "onnxruntime-tensorrt": _Kind("TensorrtExecutionProvider", SWAP + _TENSORRT, on_cuda=True),
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
        if kind.on_cuda and (missing := library_error(kind.provider)) is not None:
            # the package lists its providers whether or not their libraries are there
            fix = kind.install.replace(SWAP, _GPU).replace("cu13", f"cu{_cuda_major()}")
            return Usable(False, f"this onnxruntime has it, but its library does not load: {missing}", fix)
        return Usable(True, f"ONNX Runtime {provider_version(name)}, built in")
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
    return Usable(True, f"ONNX Runtime {provider_version(name)}, plugin")


def provider_version(name: str) -> str:
    """ONNX Runtime's version, and that of what computes: the plugin, the CUDA it was built for, TensorRT's library."""
    kind, parts = _KINDS[name], [str(ort.__version__)]
    if kind.plugin is not None and kind.provider not in ort.get_available_providers():
        parts += [
            f"{package} {package_version(package)}" for package in packages_distributions().get(kind.plugin, [])[:1]
        ]
    built_for = getattr(ort, "cuda_version", None)
    if kind.on_cuda and built_for:
        parts.append(f"CUDA {built_for}")
    if kind.provider == "TensorrtExecutionProvider" and (found := _tensorrt_version()) is not None:
        parts.append(f"TensorRT {found}")
    return ", ".join(parts)


def library_error(provider: str, folder: Path | None = None) -> str | None:
    """Why the library of a built-in provider does not load; None where it does, or lies elsewhere.

    Asked in a process of its own: a provider's library must not be loaded before ONNX Runtime loads it.

    Args:
        provider: CUDAExecutionProvider or TensorrtExecutionProvider.
        folder: with the libraries; default onnxruntime's.
    """
    return _library_error(provider, folder or Path(ort.__file__).parent / "capi")


@lru_cache(maxsize=8)
def _library_error(provider: str, folder: Path) -> str | None:
    short = provider.removesuffix("ExecutionProvider").lower()
    root = str(Path(__file__).resolve().parent.parent.parent)
    code = (
        f"import sys; sys.path.append({root!r}); "
        "from profiles.runtimes.providers import load_library; sys.exit(load_library(*sys.argv[1:]))"
    )
    try:
        command = [sys.executable, "-P", "-c", code, str(folder), short]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return " ".join(str(error).split())
    return done.stdout.strip() or None


def load_library(folder: str, short: str) -> int:
    """Prints why a provider's library does not load; the process of `library_error`."""
    _preload()
    for name, mode in (("shared", ctypes.RTLD_GLOBAL), (short, ctypes.DEFAULT_MODE)):
        for file in Path(folder).glob(f"*onnxruntime_providers_{name}.*"):
            try:
                ctypes.CDLL(str(file), mode)
            except OSError as error:
                print(" ".join(str(error).split()))  # noqa: T201
                return 1
    return 0


@lru_cache(maxsize=1)
def _preload() -> None:
    """Loads the libraries that pip installed beside onnxruntime-gpu, which it does not look for by itself."""
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
        if hasattr(ort, "preload_dlls"):
            ort.preload_dlls()
    with contextlib.suppress(Exception):  # not installed, or broken: the provider's library then says what is missing
        import_module("tensorrt")


def _cuda_major() -> str:
    return str(getattr(ort, "cuda_version", None) or "13").partition(".")[0]


def _tensorrt_version() -> str | None:
    """Of the library that the provider links, once it is loaded: getInferLibVersion() is 101303 for 10.13.3."""
    try:
        found = int(
            ctypes.CDLL("nvinfer_10.dll" if sys.platform == "win32" else "libnvinfer.so.10").getInferLibVersion()
        )
    except (OSError, AttributeError):
        return None
    return f"{found // 10000}.{found // 100 % 100}.{found % 100}"


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
        """The installed version, with the provider's."""
        return provider_version(self.name)

    def load(self, model: Path, *, threads: int | None) -> OnnxRuntimeSession:
        """See `Runtime.load`."""
        kind = _KINDS[self.name]
        return (_CudaSession if kind.on_cuda else _HostSession)(model, threads, self._options, kind)


class _HostSession(OnnxRuntimeSession):
    """Inputs and outputs in host memory: `compute` holds the provider's own transfers, where it has any."""

    _buffers_are = "host"

    def __init__(self, model: Path, threads: int | None, options: RuntimeOptions, kind: _Kind) -> None:
        self._kind = kind
        self._asked = (model, threads, options)
        self._graph: bool | str = options.cuda_graph and _records(kind)
        self._answered = False
        super().__init__(model, threads, options)
        self._tell()

    def query(self, inputs: Mapping[str, Array], clock: Clock) -> Timed:
        """See `Session.query`."""
        if self._graph is True and self._binding is not None and self._other_shapes(inputs):
            self._open_again()
        try:
            found = self._query(inputs, clock)
        except InputError:
            raise
        except EdgestillError as error:
            # the first queries are those that are recorded
            if self._graph is not True or self._answered:
                raise
            self._graph = f"refused: {_short(error.evidence or error.message)}"
            self._open_again()
            found = self._query(inputs, clock)
        self._answered = True
        return found

    def _query(self, inputs: Mapping[str, Array], clock: Clock) -> Timed:
        return super().query(inputs, clock)

    def _other_shapes(self, inputs: Mapping[str, Array]) -> bool:
        return any(name in self._buffers and self._buffers[name].shape != each.shape for name, each in inputs.items())

    def _open_again(self) -> None:
        self.close()
        self._answered = False
        self._session = self._opened(*self._asked)
        self._tell()

    def _tell(self) -> None:
        """Brings `options` up to date with the session."""
        graph = self._graph
        self.options |= {
            "providers": [self._kind.provider],
            "provider_options": _provider_options(self._kind, self._asked[1], cuda_graph=graph is True),
            "buffers": self._buffers_are,
            "nodes": assigned(self._session) or f"not told by ONNX Runtime {ort.__version__}",
        }
        if _records(self._kind):
            self.options["cuda_graph"] = graph

    def _opened(self, model: Path, threads: int | None, options: RuntimeOptions) -> Any:
        if not model.is_file():
            raise InputError("no such model file", where=str(model), fix="name an .onnx file that exists")
        if self._kind.on_cuda:
            _preload()
        title = f"{self._kind.provider} of ONNX Runtime {ort.__version__}"
        try:
            try:
                session = self._created(model, threads, options, cuda_graph=self._graph is True)
            except Exception as error:
                if self._graph is not True:
                    raise
                # ONNX Runtime refuses a session with a graph when nodes are elsewhere, or there is control flow
                session = self._created(model, threads, options, cuda_graph=False)
                self._graph = f"refused: {_short(str(error))}"
        except Exception as error:  # ONNX Runtime's exceptions share no base class but Exception
            raise run_error(error, title, model) from error
        nodes = assigned(session)
        if self._kind.provider not in session.get_providers() or (nodes and not nodes.get(self._kind.provider)):
            instead = ", ".join(nodes or session.get_providers())
            raise EdgestillError(
                f"{title} did not take the model and ONNX Runtime fell back to {instead}",
                where=str(model),
                fix='its log says why; "edgestill doctor" says what is installed',
            )
        return session

    def _created(self, model: Path, threads: int | None, options: RuntimeOptions, *, cuda_graph: bool) -> Any:
        kind, settings = self._kind, session_settings(threads, options)
        settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        choices = _provider_options(kind, threads, cuda_graph=cuda_graph)
        if kind.provider in ort.get_available_providers():
            return ort.InferenceSession(str(model), settings, providers=[(kind.provider, choices)])
        settings.add_provider_for_devices(_plugin_devices(kind.plugin or "")[:1], choices)
        return ort.InferenceSession(str(model), settings)


def assigned(session: Any) -> dict[str, int]:
    """How many nodes of the optimised graph each provider runs; empty where this ONNX Runtime does not tell."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return {}
    found: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        found[part.ep_name] += len(part.get_nodes())
    return dict(found)


class _CudaSession(_HostSession):
    """Inputs and outputs on the GPU: `compute` is the run call, which waits for the GPU; transfers come on top.

    ONNX Runtime gives no access to its stream's events, so that the launch is part of `compute`.
    """

    _buffers_are = "CUDA"

    def __init__(self, model: Path, threads: int | None, options: RuntimeOptions, kind: _Kind) -> None:
        self._inputs_there: dict[str, Any] = {}
        self._outputs_there: list[Any] = []
        super().__init__(model, threads, options, kind)

    def _query(self, inputs: Mapping[str, Array], clock: Clock) -> Timed:
        if self._binding is None or set(inputs) != set(self._buffers) or self._other_shapes(inputs):
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


def _records(kind: _Kind) -> bool:
    """Whether the provider can record a CUDA graph."""
    return kind.on_cuda or kind.provider == "NvTensorRTRTXExecutionProvider"


def _short(text: str) -> str:
    return " ".join(text.split())[:200]


def _provider_options(kind: _Kind, threads: int | None, *, cuda_graph: bool) -> dict[str, str]:
    graph = "1" if cuda_graph else "0"
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
