"""What runs a model: one file per runtime, one small protocol, looked up by name and imported on first use."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, cast

from profiles.errors import EdgestillError, InputError, nearest

if TYPE_CHECKING:
    import numpy as np

GraphOptimization = Literal["all", "extended", "basic", "none"]

_MODULES = {
    "onnxruntime": "profiles.runtimes.onnxruntime",
    "onnxruntime-cuda": "profiles.runtimes.providers",
    "onnxruntime-tensorrt": "profiles.runtimes.providers",
    "onnxruntime-tensorrt-rtx": "profiles.runtimes.providers",
    "onnxruntime-openvino": "profiles.runtimes.providers",
    "openvino": "profiles.runtimes.openvino",
    "tensorrt": "profiles.runtimes.tensorrt",
    "tensorrt-rtx": "profiles.runtimes.tensorrt",
    "torch": "profiles.runtimes.torch",
    "torch-compiled": "profiles.runtimes.torch",
}


class Clock(Protocol):
    """Where the measuring loop reads the time, so that its tests need none."""

    def now(self) -> int:
        """Nanoseconds since any fixed moment."""
        ...

    def sleep(self, seconds: float) -> None:
        """Waits."""
        ...


class WallClock:
    """The machine's monotonic clock (`time.perf_counter_ns`)."""

    def now(self) -> int:
        return time.perf_counter_ns()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


@dataclass(frozen=True)
class RuntimeOptions:
    """What is set in a runtime beside its threads. What a runtime does not know of, it leaves out of its `options`."""

    graph_optimization: GraphOptimization = "all"
    """How far ONNX Runtime rewrites the graph before it runs."""
    cuda_graph: bool = True
    """Whether a GPU's launches are recorded once and replayed (where the model allows it)."""
    engine_code: bool = False
    """Whether a version-compatible engine may be loaded, whose code then runs here: by the user's word alone, never by
    what a file says."""


@dataclass(frozen=True)
class Usable:
    """Whether a runtime can be used on this machine. `found`: its version, or the reason why not."""

    ok: bool
    found: str
    fix: str | None = None
    """The command that would add it; None where it is there or cannot be had on this machine."""


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a model. `dtype` is NumPy's name. A dynamic dimension is a name, or None without one."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]


class Timed(NamedTuple):
    """One query: nanoseconds on both clocks, and the outputs on the host."""

    compute_ns: int
    end_to_end_ns: int
    outputs: dict[str, np.ndarray[Any, Any]]


class Session(Protocol):
    """A loaded model."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The inputs that a query must give."""
        ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What a query returns."""
        ...

    @property
    def options(self) -> dict[str, Any]:
        """What was set in the runtime; part of a measurement's identity."""
        ...

    def query(self, inputs: Mapping[str, np.ndarray[Any, Any]], clock: Clock) -> Timed:
        """Host inputs in, host outputs out.

        compute: the run call alone, inputs in place (a GPU's runtime: its device events). end to end: with the copy of
        the inputs and of the outputs.

        Raises:
            EdgestillError: the runtime failed; names the file and the reason.
        """
        ...

    def close(self) -> None:
        """Frees the model."""
        ...


class Runtime(Protocol):
    """Loads models."""

    @property
    def name(self) -> str:
        """As `get_runtime` takes it."""
        ...

    @property
    def version(self) -> str:
        """The installed version."""
        ...

    def load(self, model: Path, *, threads: int | None) -> Session:
        """A session that works with `threads` threads inside an operator (None: as many as the machine has cores).

        Raises:
            InputError: the file is missing or not a model.
            EdgestillError: the runtime cannot load it; names the file and the reason.
        """
        ...


def available() -> list[str]:
    """Names that `get_runtime` takes."""
    return sorted(_MODULES)


def get_runtime(name: str, options: RuntimeOptions | None = None) -> Runtime:
    """The runtime of that name.

    Raises:
        InputError: no such runtime, with the nearest name; or one that this machine cannot use, with the reason and the
            command that would add it.
    """
    if name not in _MODULES:
        raise InputError(f'this machine cannot measure with "{name}"', where="runtime", fix=nearest(name, available()))
    found = usable(name)
    if not found.ok:
        raise InputError(
            f'the runtime "{name}" cannot be used on this machine', where="runtime", evidence=found.found, fix=found.fix
        )
    return cast(Runtime, import_module(_MODULES[name]).make(name, options or RuntimeOptions()))


def usable(name: str) -> Usable:
    """Whether a runtime of `available()` can be used here; imports what it needs."""
    return cast(Usable, import_module(_MODULES[name]).usable(name))


def has_nvidia_gpu() -> bool:
    """Whether the driver of an NVIDIA GPU, a Jetson's included, is loaded here."""
    return any(Path(path).exists() for path in ("/dev/nvidiactl", "/dev/nvhost-ctrl-gpu", "/dev/dxg"))


def on_gpu(runtime: str, options: Mapping[str, Any]) -> bool:
    """Whether a session computes on an NVIDIA GPU.

    Args:
        runtime: its name.
        options: its `Session.options`; PyTorch says its device there.
    """
    return "cuda" in runtime or "tensorrt" in runtime or "cuda" in str(options.get("device", ""))


_MEMORY_WORDS = (
    "out of memory",
    "outofmemory",
    "failed to allocate",
    "bad_alloc",
    "bad allocation",
    "can't allocate",
    "cannot allocate",
    "could not allocate",
    "insufficient memory",
)


def run_error(error: Exception, title: str, model: Path) -> EdgestillError:
    """A runtime's failure on a model, as the user is told it; a lack of memory is told apart.

    Args:
        error: as the runtime raised it.
        title: the runtime and its version.
        model: the file.
    """
    if isinstance(error, EdgestillError):
        return error
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if isinstance(error, MemoryError) or any(word in str(error).lower() for word in _MEMORY_WORDS):
        return EdgestillError(
            "the device has not enough memory for the model",
            where=str(model),
            evidence=f"{title}: {reason}",
            fix="a smaller batch, a smaller student, or fewer programs on the device",
        )
    return EdgestillError(f"{title} failed on the model", where=str(model), evidence=reason)
