"""ONNX Runtime on the CPU, and the session that its other execution providers share."""

from __future__ import annotations

import json
import math
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort

from profiles.errors import EdgestillError, InputError
from profiles.runtimes import Clock, RuntimeOptions, TensorSpec, Timed, Usable, run_error

Array = np.ndarray[Any, Any]

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(uint8)": "uint8",
    "tensor(int8)": "int8",
    "tensor(uint16)": "uint16",
    "tensor(int16)": "int16",
    "tensor(uint32)": "uint32",
    "tensor(int32)": "int32",
    "tensor(uint64)": "uint64",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}
_PROVIDER = "CPUExecutionProvider"
_ERRORS_ONLY = 3
_KERNEL = "_kernel_time"
_SKIPPED_RUNS = 5
_FASTEST = 4
_DEFAULT = RuntimeOptions()
_LEVELS = {
    "all": "ORT_ENABLE_ALL",
    "extended": "ORT_ENABLE_EXTENDED",
    "basic": "ORT_ENABLE_BASIC",
    "none": "ORT_DISABLE_ALL",
}


def session_settings(threads: int | None, options: RuntimeOptions = _DEFAULT) -> Any:
    """The session options of every measurement."""
    settings = ort.SessionOptions()
    settings.log_severity_level = _ERRORS_ONLY
    settings.graph_optimization_level = getattr(ort.GraphOptimizationLevel, _LEVELS[options.graph_optimization])
    settings.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    settings.inter_op_num_threads = 1
    settings.intra_op_num_threads = threads or 0
    return settings


def _open(model: Path, settings: Any) -> Any:
    if not model.is_file():
        raise InputError("no such model file", where=str(model), fix="name an .onnx file that exists")
    try:
        return ort.InferenceSession(str(model), settings, providers=[_PROVIDER])
    except Exception as error:  # ONNX Runtime's exceptions share no base class but Exception
        raise _load_error(error, model) from error


class OnnxRuntimeSession:
    """One model on the CPU provider.

    The input buffers are allocated once per shape and bound, so that the run call finds its inputs in place.
    """

    def __init__(self, model: Path, threads: int | None, options: RuntimeOptions = _DEFAULT) -> None:
        self._model = model
        self._session: Any = self._opened(model, threads, options)
        self.inputs = _specs(self._session.get_inputs(), model)
        self.outputs = _specs(self._session.get_outputs(), model)
        self.options: dict[str, Any] = {
            "providers": [_PROVIDER],
            "intra_op_threads": threads,
            "inter_op_threads": 1,
            "execution_mode": "sequential",
            "graph_optimization": options.graph_optimization,
        }
        self._binding: Any = None
        self._buffers: dict[str, Array] = {}

    def query(self, inputs: Mapping[str, Array], clock: Clock) -> Timed:
        """See `Session.query`; `compute` is the session's run call with bound inputs."""
        if self._binding is None or any(
            name not in self._buffers
            or array.shape != self._buffers[name].shape
            or array.dtype != self._buffers[name].dtype
            for name, array in inputs.items()
        ):
            self._bind(inputs)
        session, binding, buffers = self._session, self._binding, self._buffers
        try:
            start = clock.now()
            for name, array in inputs.items():
                np.copyto(buffers[name], array)
            ready = clock.now()
            session.run_with_iobinding(binding)
            computed = clock.now()
            outputs = binding.copy_outputs_to_cpu()
            end = clock.now()
        except Exception as error:
            raise _run_error(error, self._model) from error
        return Timed(
            computed - ready,
            end - start,
            {spec.name: output for spec, output in zip(self.outputs, outputs, strict=True)},
        )

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs by name, without clocks.

        Raises:
            EdgestillError: the runtime failed; names the file and the reason.
        """
        check_inputs(inputs, self.inputs, self._model)
        try:
            outputs = self._session.run(None, dict(inputs))
        except Exception as error:
            raise _run_error(error, self._model) from error
        return {spec.name: output for spec, output in zip(self.outputs, outputs, strict=True)}

    def close(self) -> None:
        """Frees the session and its buffers."""
        self._binding = None
        self._buffers = {}
        self._session = None

    def _opened(self, model: Path, threads: int | None, options: RuntimeOptions) -> Any:
        return _open(model, session_settings(threads, options))

    def _bind(self, inputs: Mapping[str, Array]) -> None:
        check_inputs(inputs, self.inputs, self._model)
        self._binding = self._session.io_binding()
        self._buffers = {name: np.empty(array.shape, array.dtype) for name, array in inputs.items()}
        for name, buffer in self._buffers.items():
            # on the CPU the OrtValue wraps the buffer, so filling the buffer is the copy that a user pays for
            self._binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(buffer))
        for spec in self.outputs:
            self._binding.bind_output(spec.name)


class OnnxRuntime:
    """See `Runtime`."""

    name = "onnxruntime"

    def __init__(self, options: RuntimeOptions = _DEFAULT) -> None:
        self._options = options

    @property
    def version(self) -> str:
        """The installed version."""
        return str(ort.__version__)

    def load(self, model: Path, *, threads: int | None) -> OnnxRuntimeSession:
        """See `Runtime.load`."""
        return OnnxRuntimeSession(model, threads, self._options)


def make(name: str, options: RuntimeOptions) -> OnnxRuntime:
    """See `get_runtime`."""
    return OnnxRuntime(options)


def usable(name: str) -> Usable:
    """See `profiles.runtimes.usable`: the CPU provider is part of every ONNX Runtime."""
    return Usable(True, f"ONNX Runtime {ort.__version__}")


def run_model(
    model: Path, inputs: Mapping[str, Array], *, batch_size: int = 256, threads: int | None = None
) -> dict[str, Array]:
    """All rows of `inputs` through the model, for accuracy and parity.

    Args:
        model: an ONNX file.
        inputs: by input name, (N, ...) each, in the graph's own types.
        batch_size: rows per run; a graph with a fixed batch is fed that many, the last rows padded by repetition.
        threads: threads inside an operator; None: as many as the machine has cores.

    Returns:
        By output name, (N, ...).

    Raises:
        InputError: missing or damaged file; names, types or shapes that the graph does not take; no rows.
        EdgestillError: the runtime cannot load or run the model.
    """
    session = OnnxRuntimeSession(model, threads)
    rows = {array.shape[0] for array in inputs.values()}
    if len(rows) != 1 or rows == {0}:
        raise InputError("inputs must have the same number of rows, at least one", evidence=f"{sorted(rows)}")
    total = rows.pop()
    fixed = fixed_batch(session.inputs)
    step = fixed or batch_size
    collected: dict[str, list[Array]] = {spec.name: [] for spec in session.outputs}
    for start in range(0, total, step):
        chosen = np.arange(start, start + step) if fixed else np.arange(start, min(start + step, total))
        kept = min(step, total - start)
        outputs = session.run({name: array[np.minimum(chosen, total - 1)] for name, array in inputs.items()})
        for name, output in outputs.items():
            collected[name].append(output[:kept])
    session.close()
    return {name: np.concatenate(parts) for name, parts in collected.items()}


class TracedNode(NamedTuple):
    """One node of the optimised graph as the runtime's profiler saw it.

    outputs: (dtype as the runtime writes it, shape) of every output. microseconds: of its kernel, the mean of the runs
    that were the fastest quarter as a whole: in the others something else took its share of the core.
    """

    name: str
    operator: str
    outputs: tuple[tuple[str, tuple[int, ...]], ...]
    microseconds: float


def trace(
    model: Path, inputs: Mapping[str, Array], optimised: Path, *, threads: int | None, runs: int = 1
) -> tuple[TracedNode, ...]:
    """Runs the model under the runtime's profiler: the nodes in the order in which they ran, with their real shapes.

    Args:
        model: an ONNX file.
        inputs: one query, by input name.
        optimised: where the graph goes that the runtime made of the model and ran; its weights and attributes are not
            in the trace.
        threads: threads inside an operator.
        runs: queries; a few more come before, uncounted, when there are several.

    Raises:
        InputError: missing or damaged file, inputs that the graph does not take.
        EdgestillError: the runtime cannot load or run the model.
    """
    with tempfile.TemporaryDirectory(prefix="edgestill-") as folder:
        settings = session_settings(threads)
        settings.optimized_model_filepath = str(optimised)
        settings.enable_profiling = True
        settings.profile_file_prefix = str(Path(folder) / "trace")
        session = _open(model, settings)
        check_inputs(inputs, _specs(session.get_inputs(), model), model)
        try:
            for _ in range(traced_runs(runs)):
                session.run(None, dict(inputs))
        except Exception as error:
            raise _run_error(error, model) from error
        return read_trace(Path(session.end_profiling()), runs)


def traced_runs(runs: int) -> int:
    """How often a model is run for `runs` queries in a trace."""
    return runs + (_SKIPPED_RUNS if runs > 1 else 0)


def read_trace(file: Path, runs: int) -> tuple[TracedNode, ...]:
    """The nodes in a trace of `traced_runs(runs)` queries that the runtime's profiler wrote."""
    events, skipped = json.loads(file.read_text(encoding="utf-8")), traced_runs(runs) - runs
    seen: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_KERNEL):
            seen[event["args"]["node_index"]].append(event)
    once = [[event["dur"] for event in found] for found in seen.values() if len(found) == skipped + runs]
    totals = np.sum(once, axis=0)[skipped:] if once else np.empty(0)
    fastest = [int(run) for run in np.argsort(totals, kind="stable")[: math.ceil(runs / _FASTEST)]]
    return tuple(_traced(found[skipped * len(found) // (skipped + runs) :], fastest, runs) for found in seen.values())


def _traced(events: list[dict[str, Any]], fastest: Sequence[int], runs: int) -> TracedNode:
    first = events[0]
    # a node of a subgraph may run several times, or not in every run
    chosen = [events[run] for run in fastest] if len(events) == runs and fastest else events
    return TracedNode(
        name=first["name"].removesuffix(_KERNEL),
        operator=first["args"]["op_name"],
        outputs=tuple(
            (dtype, tuple(shape)) for entry in first["args"]["output_type_shape"] for dtype, shape in entry.items()
        ),
        # the profiler cuts to whole microseconds, which is half of one too little on average
        microseconds=float(np.mean([event["dur"] for event in chosen])) + 0.5,
    )


def random_inputs(
    model: Path, batch: int = 1, shapes: Mapping[str, tuple[int, ...]] | None = None, *, seed: int = 0
) -> dict[str, Array]:
    """Inputs for a model that came without samples: one query, label it as input source "random".

    Floats are standard normal; uint8 is 0 to 255; other integers are 0 or 1, which every vocabulary has; the values
    hardly move the latency of a dense network, yet they do where the graph branches on them.

    Args:
        model: an ONNX file.
        batch: the size of a dynamic first dimension.
        shapes: whole shapes by input name, needed where another dimension is dynamic.
        seed: of the values.

    Raises:
        InputError: missing or damaged file, an unknown input name, a dynamic dimension without a shape, or a fixed
            batch that is not `batch`.
    """
    session = OnnxRuntimeSession(model, 1)
    session.close()
    return random_for(session.inputs, model, batch, shapes, seed=seed)


def random_for(
    specs: tuple[TensorSpec, ...],
    model: Path,
    batch: int = 1,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    *,
    seed: int = 0,
) -> dict[str, Array]:
    """`random_inputs` for a model whose inputs are known."""
    names = [spec.name for spec in specs]
    for name in shapes or {}:
        if name not in names:
            raise InputError(
                f'the model has no input "{name}"', where=str(model), evidence="inputs: " + ", ".join(names)
            )
    generator = np.random.default_rng(seed)
    inputs = {}
    for spec in specs:
        shape = (shapes or {}).get(spec.name) or _static_shape(spec, batch, model)
        inputs[spec.name] = _random(shape, spec.dtype, generator)
    check_inputs(inputs, specs, model)
    return inputs


def fixed_batch(inputs: tuple[TensorSpec, ...]) -> int | None:
    """The batch size that the graph was frozen at, or None when its first dimension is dynamic."""
    sizes = [spec.shape[0] for spec in inputs if spec.shape]
    fixed = [size for size in sizes if isinstance(size, int)]
    return fixed[0] if sizes and len(fixed) == len(sizes) else None


def check_inputs(inputs: Mapping[str, Array], specs: tuple[TensorSpec, ...], model: Path) -> None:
    """Names, types and shapes as the graph wants them.

    Raises:
        InputError: the first difference, with what the graph takes.
    """
    wanted = {spec.name: spec for spec in specs}
    if set(inputs) != set(wanted):
        raise InputError(
            "the inputs are not those of the model",
            where=str(model),
            evidence=f"given: {', '.join(sorted(inputs))}; the model takes: {', '.join(sorted(wanted))}",
        )
    for name, array in inputs.items():
        spec = wanted[name]
        if array.dtype != np.dtype(spec.dtype):
            raise InputError(f'input "{name}" is {array.dtype}, the model takes {spec.dtype}', where=str(model))
        if len(array.shape) != len(spec.shape) or any(
            isinstance(want, int) and want != have for have, want in zip(array.shape, spec.shape, strict=True)
        ):
            raise InputError(
                f'input "{name}" has another shape than the model takes',
                where=str(model),
                evidence=f"given {array.shape}, the model takes {_shape_text(spec)}",
            )


def _static_shape(spec: TensorSpec, batch: int, model: Path) -> tuple[int, ...]:
    if not spec.shape:
        return ()
    first = spec.shape[0]
    if isinstance(first, int) and first != batch:
        raise InputError(
            f"the model takes batch {first} only, not {batch}",
            where=str(model),
            evidence=f'input "{spec.name}" is {_shape_text(spec)}',
            fix=f"batch = {first}, or export the model with a dynamic batch",
        )
    rest = [size for size in spec.shape[1:] if isinstance(size, int)]
    if len(rest) != len(spec.shape) - 1:
        example = "x".join(str(size) if isinstance(size, int) else "224" for size in (batch, *spec.shape[1:]))
        raise InputError(
            f'input "{spec.name}" has a dynamic dimension beside the batch',
            where=str(model),
            evidence=f"its shape is {_shape_text(spec)}",
            fix=f"say which shape to measure, such as {spec.name}:{example}",
        )
    return (batch, *rest)


def _random(shape: tuple[int, ...], dtype: str, generator: np.random.Generator) -> Array:
    if dtype.startswith("float"):
        return generator.standard_normal(shape).astype(dtype)
    high = 256 if dtype == "uint8" else 2
    return generator.integers(0, high, shape).astype(dtype)


def _specs(nodes: Any, model: Path) -> tuple[TensorSpec, ...]:
    specs = []
    for node in nodes:
        if node.type not in _DTYPES:
            raise EdgestillError(
                f'"{node.name}" is a {node.type}, which NumPy cannot hold', where=str(model), fix="cast it in the graph"
            )
        specs.append(TensorSpec(node.name, _DTYPES[node.type], tuple(node.shape)))
    return tuple(specs)


def _shape_text(spec: TensorSpec) -> str:
    return "(" + ", ".join(str(size) if size is not None else "?" for size in spec.shape) + ")"


def _load_error(error: Exception, model: Path) -> EdgestillError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    damaged = ("InvalidProtobuf", "NoSuchFile", "NoModel", "InvalidGraph")
    if type(error).__name__ in damaged or "No graph was found" in reason:  # an empty file has no graph
        return InputError(
            "not an ONNX model, or a damaged one",
            where=str(model),
            evidence=reason,
            fix="export it again, and copy its external data file beside it if it has one",
        )
    found = _run_error(error, model)
    if "memory" in found.message:
        return found
    return EdgestillError(
        f"ONNX Runtime {ort.__version__} cannot load the model",
        where=str(model),
        evidence=reason,
        fix="the evidence names the operator, opset or file; export for this runtime, or upgrade it",
    )


def _run_error(error: Exception, model: Path) -> EdgestillError:
    return run_error(error, f"ONNX Runtime {ort.__version__}", model)
