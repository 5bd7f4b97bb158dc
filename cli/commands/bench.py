"""`edgestill bench`: only the measuring, of a run's exports or of any ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli import complete
from cli.commands.options import LockClocks, On, Set, Strict
from cli.commands.shared import JsonOption, examples

app = typer.Typer()


@app.command(
    epilog=examples(
        "edgestill bench runs/quickstart", "edgestill bench model.onnx --batch 4 --threads 2 --latency-ms 5"
    )
)
def bench(
    what: Annotated[
        str, typer.Argument(metavar="FILE.onnx|BUNDLE|RUN", help="An ONNX file, a bundle, or a run folder.")
    ],
    overrides: Set = None,
    allow_code: Annotated[
        bool,
        typer.Option(
            "--allow-code",
            help="Import the Python code that a run's recipe names; load a TensorRT engine that brings code.",
        ),
    ] = False,
    device: Annotated[
        str,
        typer.Option("--device", help="What the machine is; with --on, any device.", autocompletion=complete.devices),
    ] = "this-machine",
    on: On = None,
    lock_clocks: LockClocks = False,
    batch: Annotated[
        int | None, typer.Option("--batch", min=1, max=65536, help="Samples per query.  [default: 1]")
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Threads inside an operator.  [default: 1]")
    ] = None,
    percentile: Annotated[
        float | None, typer.Option("--percentile", help="50, 90, 95, 99 or 99.9.  [default: 99]")
    ] = None,
    latency_ms: Annotated[
        float | None, typer.Option("--latency-ms", help="A limit; the verdict follows from it.")
    ] = None,
    scope: Annotated[
        str | None,
        typer.Option("--scope", help="end_to_end or compute: what the limit is about.  [default: end_to_end]"),
    ] = None,
    seconds: Annotated[
        float | None, typer.Option("--max-seconds", min=0.1, help="Sampling time per model.  [default: 60]")
    ] = None,
    shape: Annotated[
        list[str] | None, typer.Option("--shape", metavar="NAME:SHAPE", help="Size of an input's dynamic dimensions.")
    ] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Also throughput over batch sizes.")] = False,
    sweep_threads: Annotated[
        bool, typer.Option("--sweep-threads", help="Also the median latency over thread counts.")
    ] = False,
    runtime: Annotated[
        str | None,
        typer.Option("--runtime", help="What runs it; edgestill doctor lists them.  [default: onnxruntime]"),
    ] = None,
    affinity: Annotated[
        str | None, typer.Option("--affinity", metavar="0,1,...", help="Cores to run on.  [default: all]")
    ] = None,
    graph_optimization: Annotated[
        str | None,
        typer.Option("--graph-optimization", help="ONNX Runtime: all, extended, basic or none.  [default: all]"),
    ] = None,
    cuda_graph: Annotated[
        bool | None, typer.Option("--cuda-graph/--no-cuda-graph", help="GPU: replay recorded launches.  [default: on]")
    ] = None,
    idle_gap_ms: Annotated[
        float | None, typer.Option("--idle-gap-ms", min=0, help="Duty cycle: pause before each query.  [default: 0]")
    ] = None,
    timeout_seconds: Annotated[
        float | None, typer.Option("--timeout-seconds", min=0.1, help="A longer query hangs.  [default: 60]")
    ] = None,
    strict: Strict = False,
    as_json: JsonOption = False,
) -> None:
    """Measure latency, here or over ssh: real inputs where a run or bundle has them, random ones for a bare ONNX file.

    A run is measured as its recipe says; change that with --set. The other options are for files and bundles.

    Exit status: 0 within the limit or no limit, 3 over it, 4 inconclusive.
    """
    from cli import console
    from cli.pipeline.bench import BenchOptions, bench_file, describe, worst_status
    from cli.pipeline.remote import one_host
    from profiles.errors import InputError

    path = Path(what)
    hosts = on or []
    if (path / "recipe.toml").is_file():
        instead = {
            "--batch": (batch, "target.NAME.batch"),
            "--threads": (threads, "measure.threads"),
            "--percentile": (percentile, "target.NAME.percentile"),
            "--latency-ms": (latency_ms, "target.NAME.latency_ms"),
            "--scope": (scope, "target.NAME.latency_scope"),
            "--max-seconds": (seconds, "measure.max_seconds"),
            "--affinity": (None if affinity is None else f"[{affinity}]", "measure.affinity"),
            "--graph-optimization": (graph_optimization, "measure.graph_optimization"),
            "--cuda-graph": (None if cuda_graph is None else str(cuda_graph).lower(), "measure.cuda_graph"),
            "--idle-gap-ms": (idle_gap_ms, "measure.idle_gap_ms"),
            "--timeout-seconds": (timeout_seconds, "measure.timeout_seconds"),
            "--runtime": (runtime, "target.NAME.runtime"),
        }
        for option, (given, key) in instead.items():
            if given is not None:
                raise InputError("a run is measured as its recipe says", where=option, fix=f"--set {key}={given}")
        for option, asked in (
            ("--shape", shape),
            ("--sweep", sweep),
            ("--sweep-threads", sweep_threads),
        ):
            if not asked:
                continue
            raise InputError(
                "this option is for an ONNX file or a bundle",
                where=option,
                fix=f"name one of {path / 'bundles'}",
            )
        from cli.commands.runs import open_folder_or_recipe

        opened = open_folder_or_recipe(what, None, overrides, allow_code=allow_code, strict=strict)
        opened.measure_on(hosts, lock_clocks=lock_clocks)
        found = opened.bench()
        if not opened.is_main:
            return
        document = {name: list(entries.values()) for name, entries in found.items()}
        if as_json:
            console.emit_json(document)
        for name, entries in {} if as_json else document.items():
            missing = f"{name}  not measured: the device is not this machine; name the one that is: --on {name}=HOST"
            console.emit_wrapped(name if entries else missing)
            for measurement in entries:
                console.emit_wrapped(describe(measurement, indent="  "))
        raise typer.Exit(worst_status([entry for entries in document.values() for entry in entries]))
    if overrides:
        raise InputError(
            "this option is for a run folder",
            where="--set",
            fix="leave it out; see --help for the options of files and bundles",
        )
    options = BenchOptions.checked(
        device=device,
        batch=batch or 1,
        threads=threads or 1,
        percentile=99.0 if percentile is None else percentile,
        latency_ms=latency_ms,
        scope=scope or "end_to_end",
        seconds=seconds or 60.0,
        shapes=tuple(shape or ()),
        sweep=sweep,
        strict=strict,
        host=one_host(hosts),
        lock_clocks=lock_clocks,
        runtime=runtime or "onnxruntime",
        sweep_threads=sweep_threads,
        affinity=_cores(affinity),
        graph_optimization=graph_optimization or "all",
        cuda_graph=cuda_graph,
        idle_gap_ms=idle_gap_ms or 0.0,
        timeout_seconds=timeout_seconds or 60.0,
        allow_code=allow_code,
    )
    result = bench_file(path, options, console.make_progress())
    if as_json:
        console.emit_json(result)
    else:
        console.emit_wrapped(describe(result.measurement))
        if result.throughput is not None:
            for point in result.throughput.points:
                console.emit(
                    f"  batch {point.batch:>4}  {point.samples_per_second:10,.0f} samples/s{_moved(point.stable)}"
                )
            console.emit_wrapped(f"  saturates at batch {result.throughput.saturation_batch}; {result.throughput.note}")
        if result.thread_sweep is not None:
            for step in result.thread_sweep.points:
                console.emit(f"  {step.threads:>4} threads  p50 {step.p50_ms:.3f} ms{_moved(step.stable)}")
            console.emit_wrapped(
                f"  saturates at {result.thread_sweep.saturation_threads} threads; {result.thread_sweep.note}"
            )
    raise typer.Exit(worst_status([result.measurement]))


def _moved(stable: bool) -> str:
    return "" if stable else ", never settled"


def _cores(text: str | None) -> tuple[int, ...]:
    from profiles.errors import InputError

    parts = (text or "").replace(" ", "").split(",") if text is not None else []
    if not all(part.isdigit() for part in parts):
        raise InputError(f'"{text}" names no cores', where="--affinity", fix="for example --affinity 0,1")
    return tuple(int(part) for part in parts)
