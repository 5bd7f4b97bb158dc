"""Measuring an ONNX file or a bundle by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
from pydantic import ValidationError

from cli.pipeline.run import refuse_unquiet
from cli.report.verdict import exit_status
from profiles import agent, artifact
from profiles.device import THIS_MACHINE, TargetSection, load_device
from profiles.errors import InputError
from profiles.measure import measure, runtime_options
from profiles.measure_section import MeasureSection
from profiles.measurement import Energy, Measurement, Outcome, Scope, ThreadSweep, Throughput
from profiles.opening import open_arrays, open_bundle, open_graph
from profiles.progress import Progress
from profiles.remote_device import made_for_another
from profiles.runtimes import GraphOptimization, RuntimeOptions, get_runtime
from profiles.runtimes.onnxruntime import random_for, random_inputs
from profiles.section import Section
from profiles.sweep import sweep, sweep_threads

NO_GRAPH = "on a device the agent launches each query anew and records no CUDA graph"


@dataclass(frozen=True)
class BenchOptions:
    """How to measure; see `edgestill bench --help`. shapes: NAME:SHAPE texts. host: where; None: here. allow_code: the
    user said that an engine which brings code may be loaded."""

    target: TargetSection
    measure: MeasureSection
    shapes: tuple[str, ...]
    sweep: bool
    strict: bool
    host: str | None = None
    lock_clocks: bool = False
    runtime: str = "onnxruntime"
    sweep_threads: bool = False
    allow_code: bool = False

    @property
    def runtime_options(self) -> RuntimeOptions:
        """What is asked of the runtime."""
        return replace(runtime_options(self.measure), engine_code=self.allow_code)

    @classmethod
    def checked(
        cls,
        *,
        device: str,
        batch: int,
        threads: int,
        percentile: float,
        latency_ms: float | None,
        scope: str,
        seconds: float,
        shapes: tuple[str, ...],
        sweep: bool,
        strict: bool,
        host: str | None = None,
        lock_clocks: bool = False,
        runtime: str = "onnxruntime",
        sweep_threads: bool = False,
        affinity: tuple[int, ...] = (),
        graph_optimization: str = "all",
        cuda_graph: bool | None = None,
        idle_gap_ms: float = 0.0,
        timeout_seconds: float = 60.0,
        allow_code: bool = False,
    ) -> BenchOptions:
        """The options of a command line. cuda_graph: None: on here; the agent records none on a device.

        Raises:
            InputError: a value that does not exist, or a device that is not this machine.
        """
        if scope not in get_args(Scope):
            raise InputError(f'no scope "{scope}"', where="--scope", fix="end_to_end, or compute")
        if host is None and lock_clocks:
            raise InputError("clocks are locked on a remote device only", where="--lock-clocks", fix="add --on HOST")
        for option, asked in (
            ("--sweep", sweep),
            ("--sweep-threads", sweep_threads),
            ("--runtime", runtime != "onnxruntime"),
            ("--affinity", affinity),
            ("--graph-optimization", graph_optimization != "all"),
            ("--allow-code", allow_code),
            ("--cuda-graph", cuda_graph),
        ):
            if host is not None and asked:
                raise InputError(
                    "this is for this machine only",
                    where=option,
                    evidence=NO_GRAPH if option == "--cuda-graph" else None,
                    fix=f"leave {option} or --on out",
                )
        if host is None and device != THIS_MACHINE:
            title = load_device(device).title
            raise InputError(
                f"this machine is no {title}, so nothing can be measured for it here",
                where="--device",
                fix="leave --device out to measure here, or name the machine that is one: --on HOST",
            )
        try:
            target = TargetSection(
                name="bench",
                device=device,
                batch=batch,
                percentile=percentile,
                latency_ms=latency_ms,
                latency_scope=cast(Scope, scope),
            )
        except ValidationError as error:
            first = error.errors()[0]
            option = str(first["loc"][0]).replace("_", "-")
            raise InputError(first["msg"].removeprefix("Value error, "), where=f"--{option}") from error
        if graph_optimization not in get_args(GraphOptimization):
            raise InputError(
                f'no level "{graph_optimization}"',
                where="--graph-optimization",
                fix=", ".join(get_args(GraphOptimization)),
            )
        section = MeasureSection(
            threads=threads,
            max_seconds=seconds,
            affinity=affinity,
            graph_optimization=cast(GraphOptimization, graph_optimization),
            cuda_graph=host is None if cuda_graph is None else cuda_graph,
            idle_gap_ms=idle_gap_ms,
            timeout_seconds=timeout_seconds,
        )
        if host is None:
            get_runtime(runtime)  # refused before anything is read
        return cls(target, section, shapes, sweep, strict, host, lock_clocks, runtime, sweep_threads, allow_code)


class BenchResult(Section):
    """What `edgestill bench FILE` tells."""

    measurement: Measurement
    throughput: Throughput | None = None
    thread_sweep: ThreadSweep | None = None


def bench_file(path: Path, options: BenchOptions, progress: Progress) -> BenchResult:
    """Measures a model file (random inputs) or a bundle (its golden samples).

    A limit is not judged where a bundle was made for something else than what measures it: the figure is not its.

    Raises:
        InputError: neither of both, a damaged one, or options that do not fit the model.
        EdgestillError: the model does not run, or `strict` and the machine was not quiet.
    """
    model, inputs, source, info = _model_and_inputs(path, options)
    name = path.name
    if options.host is not None:
        from cli.pipeline.remote import bench_on

        found = bench_on(
            options.host, name, model, inputs, options, input_source=source, made_for=info, progress=progress
        )
        if options.strict:
            refuse_unquiet([found[name].measurement])
        return BenchResult(measurement=found[name].measurement)
    runtime = get_runtime(options.runtime, options.runtime_options)
    found = measure(
        {name: model},
        inputs,
        options.target,
        options.measure,
        input_source=source,
        runtime=runtime,
        options=options.runtime_options,
        progress=progress,
    )
    if options.strict:
        refuse_unquiet([found[name].measurement])
    measurement = found[name].measurement
    reasons = () if info is None else _not_what_it_is_for(info, options.runtime)
    if reasons:
        verdict = None if measurement.limit_ms is None else "inconclusive"
        measurement = measurement.model_copy(update={"mismatches": reasons, "verdict": verdict})
    throughput = None
    if options.sweep:
        wide = {key: np.concatenate([array] * (256 // len(array) + 1))[:256] for key, array in inputs.items()}
        throughput = sweep(model, wide, options.measure, runtime=runtime, progress=progress)
    threads = None
    if options.sweep_threads:
        threads = sweep_threads(
            model, inputs, options.measure, batch=options.target.batch, runtime=runtime, progress=progress
        )
    return BenchResult(measurement=measurement, throughput=throughput, thread_sweep=threads)


def _not_what_it_is_for(info: Mapping[str, Any], runtime: str) -> tuple[str, ...]:
    """Why a measurement here says nothing about the device that a bundle is for; empty: it does."""
    reasons = [made_for_another(info["device"], {**agent.board(), **agent.read()})]
    wanted = str(info["stack"]["runtime"])
    if wanted not in ("onnxruntime", runtime):
        reasons.append(f"measured with {runtime}, the bundle is for {wanted}")
    return tuple(reason for reason in reasons if reason is not None)


def _model_and_inputs(
    path: Path, options: BenchOptions
) -> tuple[Path, dict[str, np.ndarray[Any, Any]], str, Mapping[str, Any] | None]:
    """The file to run, its inputs, where those are from, and the manifest's facts when it is a bundle's."""
    if not path.exists():
        raise InputError(
            f"no such file or folder: {path}", where=str(path), fix="name an .onnx file, a bundle or a run"
        )
    of_its_own = path.suffix != ".onnx" and options.host is None and not options.runtime.startswith("onnxruntime")
    if path.is_file() and not of_its_own:
        graph = open_graph(path).graph
        shapes = _same_names(graph, options.target.batch, _sizes(options.shapes))
        return path, random_inputs(path, options.target.batch, shapes), "random", None
    if path.is_file():
        session = get_runtime(options.runtime, options.runtime_options).load(path, threads=1)
        try:
            return path, random_for(session.inputs, path, options.target.batch, _sizes(options.shapes)), "random", None
        finally:
            session.close()
    if not (path / artifact.MANIFEST).is_file():
        raise InputError(
            f"{path} is neither a bundle nor a run folder",
            where=str(path),
            fix="a bundle has a manifest.json, a run a recipe.toml",
        )
    if options.shapes:
        raise InputError("a bundle's golden sample has its shape", where="--shape", fix="leave it out")
    manifest = open_bundle(path)
    golden = open_arrays(path / "golden.npz")
    inputs = {entry["name"]: golden[f"input_{entry['name']}"] for entry in manifest.info["inputs"]}
    repeats = options.target.batch
    return (
        _runs_in(path, manifest.info, options),
        {key: np.repeat(array, repeats, 0) for key, array in inputs.items()},
        "golden sample",
        manifest.info,
    )


def _runs_in(bundle: Path, info: Mapping[str, Any], options: BenchOptions) -> Path:
    """The file of the bundle that the runtime takes: TensorRT runs an engine, the others the graph."""
    if options.runtime not in ("tensorrt", "tensorrt-rtx"):
        return bundle / str(info["model"])
    static = info.get("static_engine") if options.target.batch == 1 else None
    engine = static or info.get("engine")
    if engine is None:
        raise InputError(
            "the bundle has no engine",
            where=str(bundle),
            evidence=info.get("engine_note"),
            fix="sh build_engine.sh, in the bundle, and bench the engine file",
        )
    if engine.get("version_compatible") and not options.allow_code:
        raise InputError(
            "the bundle's engine is version-compatible: it brings code that would run here",
            where=str(bundle / str(engine["file"])),
            fix="--allow-code, where you trust who built it; else sh build_engine.sh in the bundle",
        )
    return bundle / str(engine["file"])


def _same_names(graph: Any, batch: int, given: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes given, and those of inputs whose dynamic dimensions have names that these settle.

    Raises:
        InputError: an input has a dynamic dimension that nothing settles.
    """
    stored = {tensor.name for tensor in graph.initializer}
    dims = {
        entry.name: [dim.dim_param or dim.dim_value or None for dim in entry.type.tensor_type.shape.dim]
        for entry in graph.input
        if entry.name not in stored
    }
    known: dict[str, int] = {}
    for name, shape in given.items():
        known |= {dim: size for dim, size in zip(dims.get(name, []), shape, strict=False) if isinstance(dim, str)}
    if unknown := [name for name in given if name not in dims]:
        raise InputError(
            f'the model has no input "{unknown[0]}"', where="--shape", evidence=f"its inputs: {', '.join(dims)}"
        )
    rows = {shape[0] for name, shape in given.items() if shape and dims[name] and not isinstance(dims[name][0], int)}
    if rows and rows != {batch}:
        raise InputError(
            f"the first size is the batch, which is {batch} here",
            where="--shape",
            evidence=", ".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in given.items()),
            fix=f"--batch {max(rows)}, or a first size of {batch}",
        )
    shapes = dict(given)
    for name, (first, *rest) in ((name, sizes) for name, sizes in dims.items() if sizes and name not in given):
        if isinstance(first, str):
            known.setdefault(first, batch)
        sizes = [batch if first is None else first, *rest]
        if any(not isinstance(size, int) and size not in known for size in sizes):
            words = ", ".join("?" if size is None else str(size) for size in sizes)
            example = "x".join(str(size if isinstance(size, int) else known.get(str(size), 64)) for size in sizes)
            raise InputError(
                f'input "{name}" has a dynamic dimension beside the batch',
                where="--shape",
                evidence=f"its shape is ({words})",
                fix=f"--shape {name}:{example}",
            )
        if any(isinstance(size, str) for size in rest):
            shapes[name] = tuple(size if isinstance(size, int) else known[str(size)] for size in sizes)
    return shapes


def _sizes(texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    sizes = {}
    for text in texts:
        name, _, shape = text.rpartition(":")
        sides = shape.split("x")
        if not name or not all(side.isdigit() and int(side) > 0 for side in sides):
            raise InputError(
                f'"{text}" is not NAME:SHAPE', where="--shape", fix="for example --shape image:1x3x224x224"
            )
        sizes[name] = tuple(int(side) for side in sides)
    return sizes


def describe(measurement: Measurement, indent: str = "") -> str:
    """A measurement in a few lines of text."""
    asked = measurement.asked
    word = "end to end" if asked.scope == "end_to_end" else "compute"

    def figure(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    threads = measurement.options.get("intra_op_threads")
    host = measurement.environment.get("host")
    lines = [
        f"{measurement.name}: {f'on {host}, ' if host else ''}{word}, batch {measurement.batch}, "
        f"{f'{threads} thread(s), ' if threads is not None else ''}"
        f"{measurement.runtime} {measurement.runtime_version}, {measurement.input_source}",
    ]
    if measurement.stable:
        lines += [
            f"  p50 {figure(asked.p50)}  p90 {figure(asked.p90)}  p99 {figure(asked.p99)}  max {asked.maximum:.3f} ms, "
            f"{asked.samples:,} runs, {asked.outliers:,} outliers counted",
            f"  p{asked.percentile:g} {figure(asked.value)} ms, between {figure(asked.lower_bound)} and "
            f"{figure(asked.upper_bound)} ms with {asked.bound_confidence:.1%} confidence each",
        ]
    else:
        lines.append(
            f"  p{asked.percentile:g} UNSTABLE, no figure: {asked.samples:,} runs between {asked.minimum:.3f} and "
            f"{asked.maximum:.3f} ms" + (f", half of them within {asked.p50:.3f}" if asked.p50 is not None else "")
        )
    if measurement.limit_ms is not None:
        lines.append(f"  limit {measurement.limit_ms:g} ms: {(measurement.verdict or 'inconclusive').upper()}")
    peak = measurement.memory.peak_mib
    lines.append(
        f"  load {figure(measurement.load_ms)} ms, first inference {figure(measurement.first_inference_ms)} ms, "
        + (f"peak memory {peak:.0f} MiB" if peak is not None else f"peak memory n/a: {measurement.memory.how}")
    )
    if measurement.energy is not None:
        lines.append(f"  {energy_words(measurement.energy)}")
    nodes, graph = (measurement.options.get(key) for key in ("nodes", "cuda_graph"))
    if isinstance(nodes, dict) and len(nodes) > 1:
        lines.append("  nodes by provider: " + ", ".join(f"{name} {count}" for name, count in nodes.items()))
    if isinstance(graph, str):
        lines.append(f"  CUDA graph {graph}")
    lines += [f"  not decided: {reason}" for reason in measurement.mismatches]
    lines += [f"  note: {warning}" for warning in measurement.warnings]
    return "\n".join(indent + line for text in lines for line in text.splitlines())


def energy_words(energy: Energy) -> str:
    """The energy of a query in one line, or why it is not known."""
    if energy.millijoules is None or energy.low is None or energy.high is None:
        return f"energy n/a: {energy.how}"
    return (
        f"energy {energy.millijoules:.3g} mJ per query, between {energy.low:.3g} and {energy.high:.3g} mJ with "
        f"{energy.confidence:.0%} confidence ({energy.how})"
    )


@dataclass(frozen=True)
class _Judged:
    verdict: Outcome


def worst_status(measurements: Sequence[Measurement]) -> int:
    """Exit status of measurements: 3 when a limit failed, else 4 when one is inconclusive, else 0."""
    return exit_status([_Judged(found.verdict) for found in measurements if found.verdict is not None])
