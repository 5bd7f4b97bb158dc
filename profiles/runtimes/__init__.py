"""What runs a model: one file per runtime, one small protocol, looked up by name and imported on first use."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

from profiles.errors import InputError, nearest

if TYPE_CHECKING:
    import numpy as np

_MODULES = {"onnxruntime": "profiles.runtimes.onnxruntime"}


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
        """As in a device's stack: "onnxruntime", "tensorrt", ..."""
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


def get_runtime(name: str) -> Runtime:
    """The runtime of that name.

    Raises:
        InputError: no such runtime, with the nearest name.
    """
    if name not in _MODULES:
        raise InputError(f'this machine cannot measure with "{name}"', where="runtime", fix=nearest(name, available()))
    return cast(Runtime, import_module(_MODULES[name]).RUNTIME)
