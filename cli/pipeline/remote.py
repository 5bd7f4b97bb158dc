"""Measuring on other machines: which target runs where, an agent per machine, several machines at once."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from export.candidate import Candidate, Engine, Plan
from profiles import artifact
from profiles.device import THIS_MACHINE, Stack, Target, resolve_target
from profiles.errors import EdgestillError, InputError, Interrupted
from profiles.measure import load_measurement, save_measurement
from profiles.progress import Progress
from profiles.remote import Host, Link
from profiles.remote_device import made_for_another, mismatches, remembered, remembered_for
from profiles.remote_runtime import (
    Build,
    RemoteRuntime,
    Rung,
    choose_rung,
    ladder,
    machine_identity,
    measure_on,
    model_key,
)

if TYPE_CHECKING:
    from cli.pipeline.bench import BenchOptions
    from cli.pipeline.run import Run
    from distill.data import Split
    from profiles.measure import Measured
    from profiles.measurement import Measurement

Array = np.ndarray[Any, Any]


def one_host(texts: Sequence[str]) -> str | None:
    """The host of a file's or bundle's `--on`.

    Raises:
        InputError: several, or one for a target.
    """
    if len(texts) > 1 or any("=" in text for text in texts):
        raise InputError(
            "a file or a bundle is measured on one host", where="--on", fix=f"--on {texts[0].rpartition('=')[2]}"
        )
    return texts[0] if texts else None


def hosts_of(texts: Sequence[str], targets: Sequence[Target]) -> dict[str, Host]:
    """Hosts by target's name, from texts like TARGET=HOST; TARGET alone means the host that is known to be its device.

    Raises:
        InputError: no such target, one named twice, or no host known for its device.
    """
    by_name = {target.name: target for target in targets}
    found: dict[str, Host] = {}
    for text in texts:
        name, equals, host = text.partition("=")
        if name not in by_name:
            known = ", ".join(by_name)
            raise InputError(
                f'the recipe has no target "{name}"',
                where="--on",
                evidence=f"targets: {known}",
                fix=f"--on {next(iter(by_name))}=HOST",
            )
        if name in found:
            raise InputError(f'target "{name}" has two hosts', where="--on", fix="name one")
        if not equals:
            device = by_name[name].device.name
            seen = remembered_for(device)
            if seen is None:
                raise InputError(f"no host is known to be a {device}", where="--on", fix=f"--on {name}=HOST")
            host = seen
        found[name] = remembered(host)
    return found


def build_of(stack: Stack, precision: str) -> Build:
    """How an engine of that precision is built for a stack: weakly typed builders are told by flags, others by the
    graph."""
    if stack.dialect != "weak-tensorrt":
        return Build()
    flags = {"fp16": ("fp16",), "int8": ("int8", "fp16")}
    return Build(strongly_typed=False, flags=flags.get(precision, ()))


@contextmanager
def clocks_locked(link: Link, wanted: bool) -> Iterator[dict[str, Any]]:
    """Locks the clocks where that is wanted; the agent gives them back when it ends. Yields facts to record."""
    yield dict(link.ask("lock_clocks")) if wanted else {}


class Remote:
    """The targets of a run that are measured on other machines.

    One thread per host: a device does one thing at a time, several devices work at once.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.hosts: dict[str, Host] = {}
        self.lock_clocks = False
        self._started: dict[str, Future[dict[str, Measurement]]] = {}
        self._pools: list[ThreadPoolExecutor] = []
        self._links: set[Link] = set()
        self._lock = threading.Lock()
        self._closing = False

    def assign(self, texts: Sequence[str], *, lock_clocks: bool) -> None:
        """See `Run.measure_on`."""
        self.hosts, self.lock_clocks = hosts_of(texts, self.run.targets), lock_clocks
        if lock_clocks and not self.hosts:
            raise InputError("clocks are locked on a remote device only", where="--lock-clocks", fix="add --on")

    def has(self, target: Target) -> bool:
        """Whether the target has a host."""
        return target.name in self.hosts

    def start_measuring(self) -> None:
        """Starts measuring every target whose student is settled already."""
        budgets = self.run.budgets
        settled = [
            target
            for target in self.run.targets
            if self.has(target) and (budgets is None or not budgets.chooses(target))
        ]
        if len({self.hosts[target.name].name for target in settled}) > 1:
            self.start({target.name: self.run.plan(target) for target in settled})

    def start(self, plans: Mapping[str, Plan], *, fresh: bool = False) -> None:
        """Starts measuring targets with a host, each host in a thread of its own; `measurements` waits for them."""
        by_host: dict[str, list[Target]] = {}
        for target in self.run.targets:
            if self.has(target) and target.name in plans:
                by_host.setdefault(self.hosts[target.name].name, []).append(target)
        for targets in by_host.values():
            pool = ThreadPoolExecutor(1)
            self._pools.append(pool)
            for target in targets:
                self._started[target.name] = pool.submit(self._measure, target, plans[target.name], None, False, fresh)
            pool.shutdown(wait=False)

    def close(self) -> None:
        """Ends what is still measured: targets that wait are not begun, agents end at once and leave nothing."""
        with self._lock:
            self._closing = True
            links = list(self._links)
        for pool in self._pools:
            pool.shutdown(wait=False, cancel_futures=True)
        for link in links:
            link.stop()
        for pool in self._pools:
            pool.shutdown()
        self._pools, self._started, self._closing = [], {}, False

    @contextmanager
    def _link(self, host: Host) -> Iterator[Link]:
        """A link that `close` can stop."""
        with Link(host, self.run.say_once) as link:
            with self._lock:
                if self._closing:
                    raise Interrupted("stopped before it was measured", where=host.name)
                self._links.add(link)
            try:
                yield link
            finally:
                with self._lock:
                    self._links.discard(link)

    def measurements(
        self, target: Target, found: Plan, *, arch: str | None, rescued: bool, fresh: bool
    ) -> dict[str, Measurement]:
        """See `Run.measurements`. What was measured with the same files and options on the same device is used again.

        Raises:
            EdgestillError: what ssh or the device told; see `profiles.remote`.
        """
        started = self._started.pop(target.name, None) if arch is None else None
        return started.result() if started is not None else self._measure(target, found, arch, rescued, fresh)

    def _measure(
        self, target: Target, found: Plan, arch: str | None, rescued: bool, fresh: bool
    ) -> dict[str, Measurement]:
        run, host = self.run, self.hosts[target.name]
        files = {candidate.name: candidate.file for candidate in found.usable if candidate.file is not None}
        name = target.name if arch is None else f"{target.name}--{arch}" + "--rescued" * rescued
        folder = run.folder / "measurements" / name
        with (
            run.timed(f"measure {target.name} on {host.name}" + ("" if arch is None else f" {arch}")) as stage,
            self._link(host) as link,
        ):
            rung = choose_rung(link, target.stack.runtime)
            key = artifact.content_key(
                target.section,
                run.recipe.measure,
                {name: artifact.file_hash(file) for name, file in files.items()},
                target.device,
                target.stack,
                rung,
                machine_identity(link.facts),
                self.lock_clocks,
            )
            if not fresh and artifact.current(folder, "measurements", key) is not None:
                # a candidate that failed has none
                stored = {
                    name: load_measurement(folder / f"{name}.json").measurement
                    for name in files
                    if (folder / f"{name}.json").is_file()
                }
                # what --strict would refuse is measured anew: the device may be quiet by now
                if not (run.strict and any(measurement.warnings for measurement in stored.values())):
                    stage["cached"] = True
                    return stored
            failures: dict[str, EdgestillError] = {}
            with clocks_locked(link, self.lock_clocks) as clocks:
                inputs = run.measured_inputs(target)
                runtime = self._runtime(link, target, found, files, inputs, rung, clocks)
                results = measure_on(
                    runtime,
                    inputs,
                    target.section,
                    run.recipe.measure,
                    input_source="real samples (validation split)",
                    mismatches=mismatches(target, link.facts, rung, host),
                    progress=run.progress,
                    failures=failures,
                )
            if files and not results:
                raise next(iter(failures.values()))
            for failed, error in failures.items():
                run.say_once(f"{target.name}: {failed} could not be measured: {error.message} ({error.evidence})")
            with artifact.create(folder, "measurements", key) as temporary:
                for result in results.values():
                    save_measurement(temporary, result.measurement, result.samples)
        measurements = {name: result.measurement for name, result in results.items()}
        if run.strict:
            from cli.pipeline.run import refuse_unquiet

            refuse_unquiet(measurements.values())
        return measurements

    def _runtime(
        self,
        link: Link,
        target: Target,
        found: Plan,
        files: Mapping[str, Path],
        inputs: Mapping[str, Array],
        rung: Rung,
        facts: Mapping[str, Any],
    ) -> RemoteRuntime:
        return RemoteRuntime(
            link,
            target.stack.runtime,
            files,
            inputs,
            target.section.batch,
            builds={file: build_of(target.stack, found[name].precision) for name, file in files.items()},
            keep=self._engines(target),
            rung=rung,
            facts=facts,
        )

    def _engines(self, target: Target) -> Path:
        return self.run.folder / "engines" / target.name

    def with_engines(self, target: Target, found: Plan) -> Plan:
        """The plan with the engines that the device built, so that they are bundled."""
        candidates = []
        for candidate in found.candidates:
            engine = self._engine_of(target, candidate)
            candidates.append(candidate if engine is None else candidate.model_copy(update={"engine": engine}))
        return found.model_copy(update={"candidates": tuple(candidates)})

    def _engine_of(self, target: Target, candidate: Candidate) -> Engine | None:
        if candidate.file is None or target.device.compute_capability is None:
            return None
        stored = sorted(
            self._engines(target).glob(f"{model_key(candidate.file)}-*.json"), key=lambda path: path.stat().st_mtime
        )
        if not stored:
            return None
        facts, file = json.loads(stored[-1].read_text(encoding="utf-8")), stored[-1].with_suffix(".engine")
        batch = target.section.batch
        return Engine(
            file=file,
            compute_capability=target.device.compute_capability,
            builder=f"TensorRT {facts['version']}",
            batch=(batch, batch, batch),
            sha256=artifact.file_hash(file),
            size_bytes=file.stat().st_size,
            build_seconds=round(facts["seconds"], 3),
            realised_precision=f"{candidate.precision} as the graph or the builder's flags say; built on the device",
        )

    def outputs(
        self, target: Target, found: Plan, candidate: Candidate, split: Split, here: Array
    ) -> tuple[Array, bool, str]:
        """(N, C) class logits of the chosen candidate on a split, computed on the device.

        Args:
            target: whose host it is.
            found: its plan.
            candidate: of that plan.
            split: what is scored.
            here: the same logits from ONNX Runtime on this machine.

        Returns:
            The logits, whether they are the device's, and what is to be said. `trtexec` gives outputs of a few queries
            only; then those of this machine stand, after a comparison.
        """
        assert candidate.file is not None
        run, host = self.run, self.hosts[target.name]
        folder = run.folder / "measurements" / f"{target.name}--outputs"
        spec = run.dataset.input
        inputs = {spec.name: np.asarray(split.inputs)}
        with run.timed(f"test on {host.name} {target.name}") as stage, self._link(host) as link:
            rung = choose_rung(link, target.stack.runtime)
            facts = machine_identity(link.facts)
            key = artifact.content_key(artifact.file_hash(candidate.file), run.dataset.key, rung, facts)
            if artifact.current(folder, "outputs", key) is not None:
                stage["cached"] = True
            else:
                files = {candidate.name: candidate.file}
                runtime = self._runtime(link, target, found, files, run.measured_inputs(target), rung, {})
                runtime.load(candidate.file, threads=run.recipe.measure.threads)
                with artifact.create(folder, "outputs", key) as temporary:
                    batch = target.section.batch
                    np.save(
                        temporary / "logits.npy",
                        runtime.outputs(candidate.file, inputs, batch, temporary)["logits"],
                    )
        logits = np.load(folder / "logits.npy", allow_pickle=False)
        same = float((logits.argmax(-1) == here[: len(logits)].argmax(-1)).mean())
        largest = float(np.abs(logits.astype(np.float64) - here[: len(logits)]).max())
        told = (
            f"outputs of {len(logits):,} test samples on the device: largest difference {largest:.2g} from ONNX "
            f"Runtime here, {same:.1%} of decisions alike"
        )
        if len(logits) < len(here):
            return here, False, f"{told}; trtexec gives no more, so the metric was computed here"
        return logits, True, told


def bench_on(
    host: str,
    name: str,
    model: Path,
    inputs: Mapping[str, Array],
    options: BenchOptions,
    *,
    input_source: str,
    made_for: Mapping[str, Any] | None,
    progress: Progress,
) -> dict[str, Measured]:
    """Measures one file on a host. Its runtime is that of `options.target.device`'s stack; without a device, ONNX
    Runtime where the host's Python has it, else TensorRT.

    Args:
        made_for: facts of the bundle that the file is of: on another device than its own a limit is inconclusive.

    Raises:
        EdgestillError: what ssh or the device told; see `profiles.remote`.
    """
    with Link(remembered(host)) as link, clocks_locked(link, options.lock_clocks) as clocks:
        reasons: tuple[str, ...] = ()
        rung: Rung | None = None
        if options.target.device == THIS_MACHINE:
            runtime = "onnxruntime"
            rungs = ladder(link, "onnxruntime").rungs or ladder(link, "tensorrt").rungs
            if rungs:
                rung = rungs[0]
                runtime = "onnxruntime" if rung.name == "onnxruntime" else "tensorrt"
            build = Build()
        else:
            target = resolve_target(options.target, base=Path(), where="--device")
            runtime = target.stack.runtime
            rung = choose_rung(link, target.stack.runtime)
            reasons = mismatches(target, link.facts, rung, link.host)
            build = build_of(target.stack, "fp32")
        # where the user says that the host is the bundle's device, that is not guessed from its name
        said = options.target.device if options.target.device != THIS_MACHINE else None
        if made_for is not None and made_for["device"]["name"] != said:
            another = made_for_another(made_for["device"], link.facts)
            reasons += () if another is None else (another,)
        remote = RemoteRuntime(
            link,
            runtime,  # type: ignore[arg-type]  # a stack's own words
            {name: model},
            inputs,
            options.target.batch,
            builds={model: build},
            rung=rung,
            facts=clocks,
        )
        return measure_on(
            remote,
            inputs,
            options.target,
            options.measure,
            input_source=input_source,
            mismatches=reasons,
            progress=progress,
        )
