"""Measuring through an agent: the loop of `profiles.measure` runs here, its rounds of queries run on the device.

Time is the device's own: the clock that the loop reads advances by what the queries took there, so warm-up, looks,
bounds and verdicts are those of a local measurement, and the link's delays count nowhere.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from profiles import agent
from profiles.artifact import content_key, explain_os_errors, file_hash, write_text
from profiles.device import TargetSection
from profiles.energy import SPELLS, energy_of, no_energy
from profiles.errors import EdgestillError, InputError
from profiles.fresh_process import LOAD_SECONDS, HangError, Started
from profiles.measure import Measured, measure, model_files, query_batches
from profiles.measure_section import MeasureSection
from profiles.measurement import Energy, Measurement, Memory
from profiles.progress import Progress
from profiles.remote import DeviceError, Link
from profiles.runtimes import Clock, RuntimeOptions, TensorSpec, Timed
from profiles.runtimes.onnxruntime import TracedNode, read_trace, traced_runs
from profiles.watchdog import Beat

Array = np.ndarray[Any, Any]
T = TypeVar("T")
Stack = Literal["onnxruntime", "tensorrt", "tensorrt-rtx"]

MODULES: dict[Stack, str] = {"onnxruntime": "onnxruntime", "tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
WARM_UP_SECONDS = 0.2
"""A round of the warm-up: one of its windows."""
TRTEXEC_ROUND = 662
"""Queries of one process of `trtexec`, at least: it takes seconds to start, and p99 needs as many."""
TRTEXEC_SECONDS = 30.0
"""Of one process of `trtexec` with a slow model, whose rounds are shorter than that."""
SLOWER = 2.0
"""A round may take this many times what its queries typically take, beside the time-out of a single one."""
CHUNK_BYTES = 64 << 20
_BUILD_SECONDS = 3 * 3600.0
_OPEN_SECONDS = 600.0
_LINK_SECONDS = 120.0
"""The link's own time beside what the device takes, which is bounded there."""
_RESETTLE = 2
"""Queries that the agent runs ahead of a round and does not count."""
_DIED = ("hung", "crashed", "killed")
_DOING = {"open": "while it was loaded", "block": "in its queries", "probe": "in a fresh process"}
_CHECKED_QUERIES = 4
"""Queries whose outputs are brought back from `trtexec`, which starts anew for each."""


class Rung(NamedTuple):
    """Who runs the model on the device. `tool`: of `trtexec`, its path there. wrapped: in the host's wrapper."""

    name: str
    version: str
    tool: str | None = None
    wrapped: bool = False

    @property
    def title(self) -> str:
        """As a person would call it."""
        inside = ", in the wrapper" if self.wrapped else ""
        names = {"onnxruntime": "ONNX Runtime", "tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
        return f"{names.get(self.name, 'trtexec of TensorRT')} {self.version}{inside}"


class Build(NamedTuple):
    """How an engine is built. flags: of weakly typed builders ("fp16", "int8"); with a strongly typed one, none.
    compute_capability: of a GPU that the machine need not have (TensorRT-RTX only); None: of the one that it has."""

    strongly_typed: bool = True
    flags: tuple[str, ...] = ()
    compute_capability: str | None = None


@dataclass(frozen=True)
class Engine:
    """An engine that the device built and that was brought here with its timing cache."""

    file: Path
    cache: Path | None
    rung: Rung
    seconds: float
    workspace_mib: int


@dataclass
class Ladder:
    """What a host offers for a stack, best first."""

    offers: dict[str, Any]
    rungs: list[Rung] = field(default_factory=list)


def ladder(link: Link, stack: Stack) -> Ladder:
    """The rungs that exist on the host: the runtime's Python module, trtexec, and both in the user's wrapper."""
    names = [MODULES[stack]] + (["trtexec"] if stack == "tensorrt" else [])
    wrapper = _wrapper(link)
    found = Ladder(link.ask("offers", names=names, wrapper=wrapper, patience=600))
    for wrapped in (False, True) if wrapper else (False,):
        for name in names:
            offer = found.offers["wrapper " * wrapped + name]
            if offer["version"]:
                found.rungs.append(Rung(name, offer["version"], offer.get("tool"), wrapped))
    return found


def choose_rung(link: Link, stack: Stack) -> Rung:
    """The best rung.

    Raises:
        EdgestillError: the host has none; says what to install.
    """
    found = ladder(link, stack)
    if found.rungs:
        return found.rungs[0]
    reasons = "; ".join(f"{name}: {offer['why']}" for name, offer in found.offers.items() if isinstance(offer, dict))
    if stack == "onnxruntime":
        raise EdgestillError(
            "the device's Python has no onnxruntime",
            where=link.host.name,
            evidence=reasons,
            fix=f"edgestill devices prepare {link.host.name}",
        )
    if stack == "tensorrt-rtx":
        raise EdgestillError(
            "the device's Python has no TensorRT-RTX",
            where=link.host.name,
            evidence=reasons,
            fix=f"edgestill devices detect {link.host.name} --python /path/to/one/that/has/it",
        )
    raise EdgestillError(
        "the device has neither TensorRT's Python module nor trtexec",
        where=link.host.name,
        evidence=reasons,
        fix=f"ssh -t {link.host.shown} sudo apt install libnvinfer-bin",
    )


def _wrapper(link: Link) -> list[str] | None:
    return shlex.split(link.host.wrapper) if link.host.wrapper else None


class DeviceClock:
    """The device's time, as far as queries took it. A pause is asked of the device with the next round."""

    def __init__(self) -> None:
        self.ns = 0
        self.gap_s = 0.0

    def now(self) -> int:
        """Nanoseconds."""
        return self.ns

    def sleep(self, seconds: float) -> None:
        """Sets the pause before each query."""
        self.gap_s = seconds


class RemoteSession:
    """A model that the agent has loaded; see `Session`. Queries run in rounds, their order is that of the batches."""

    outputs: tuple[TensorSpec, ...] = ()
    inputs: tuple[TensorSpec, ...] = ()

    def __init__(self, runtime: RemoteRuntime, model: Path, key: str, options: dict[str, Any]) -> None:
        self.runtime = runtime
        self.model = model
        self.key = key
        self.options = options
        self._typical: float | None = None
        self._start = 0.0
        self._waiting: deque[tuple[int, int, int, int]] = deque()
        self.pulse = 0
        self._issued = 0
        self._wanted = 0

    def ahead(self, count: int) -> None:
        """The next `count` queries belong together. What a round of the warm-up left over is not used."""
        if not self.runtime.coarse:
            self._waiting.clear()
        self._wanted = count

    def query(self, inputs: Mapping[str, Array], clock: Clock) -> Timed:
        """The next query of the round; its outputs stay on the device."""
        if not self._waiting:
            self._run_round()
        compute, whole, spent, self.pulse = self._waiting.popleft()
        self.runtime.clock.ns += spent
        return Timed(compute, whole, {})

    def typical(self) -> float:
        """Seconds that a query takes, of a single one at first."""
        if self._typical is None:
            began = time.monotonic()
            # trtexec loads the engine for it
            limit = self.runtime.load_seconds if self.runtime.coarse else self.runtime.timeout_seconds
            answer = self._block(1, 0.0, limit + self.runtime.clock.gap_s, first=True)
            self._typical = (answer["end_to_end_ns"] or answer["compute_ns"])[0] / 1e9
            self._start = time.monotonic() - began if self.runtime.coarse else 0.0
        return self._typical

    def limit(self, count: int, seconds: float = 0.0) -> float:
        """Seconds after which a round of `count` queries and at least `seconds` hangs."""
        usual = self._start + (count + _RESETTLE) * self.typical()
        return (
            self.runtime.timeout_seconds + SLOWER * (usual + seconds) + (count + _RESETTLE) * self.runtime.clock.gap_s
        )

    def _block(self, count: int, seconds: float, limit: float, *, first: bool = False) -> dict[str, Any]:
        return self.runtime.ask_of(
            self.model,
            "block",
            limit,
            id=self.key,
            start=self._issued,
            count=count,
            seconds=seconds,
            gap_s=self.runtime.clock.gap_s,
            pulse=self.runtime.pulses,
            first=first,
        )

    def _run_round(self) -> None:
        count, seconds, typical = self._wanted or 1, 0.0 if self._wanted else WARM_UP_SECONDS, self.typical()
        if self.runtime.coarse:
            # at least a second, by its own rule
            count, seconds = max(count, min(TRTEXEC_ROUND, int(TRTEXEC_SECONDS / max(typical, 1e-6)))), 1.0
        answer = self._block(count, seconds, self.limit(count, seconds))
        self._wanted = 0
        self.runtime.clocks_seen = answer.get("clocks") or self.runtime.clocks_seen
        compute = answer["compute_ns"]
        self._typical = float(np.median(answer["end_to_end_ns"] or compute)) / 1e9
        pulses = answer.get("pulse_ns") or [0] * len(compute)
        self._waiting.extend(zip(compute, answer["end_to_end_ns"] or compute, answer["spent_ns"], pulses, strict=True))
        self._issued += len(compute)

    def close(self) -> None:
        """The agent keeps the model until the link is closed: its outputs may still be asked for."""


class RemoteRuntime:
    """See `Runtime` and, for the machine itself, `profiles.measure.Place`.

    Args:
        link: to the agent.
        stack: whose runtime it is.
        candidates: model files by name.
        inputs: by name, (N, ...): what the queries cycle through; `inputs_of`: of a candidate that has its own.
        batch: of a query.
        builds: how the engine of a model file is built, where there is one.
        keep: folder for the engines and timing caches that are brought back; one that is there from the same graph,
            TensorRT and device is used again.
        rung: who runs the model; None: the best that the host has.
        facts: what is added to the facts of the machine.
        pulses: run the pulse of `profiles.calibration.observe` around each query; `pulse_of` tells it.
        timeout_seconds: a query that takes longer hangs; see `MeasureSection`.
    """

    def __init__(
        self,
        link: Link,
        stack: Stack,
        candidates: Mapping[str, Path],
        inputs: Mapping[str, Array],
        batch: int,
        *,
        builds: Mapping[Path, Build] | None = None,
        keep: Path | None = None,
        rung: Rung | None = None,
        facts: Mapping[str, Any] | None = None,
        inputs_of: Mapping[str, Mapping[str, Array]] | None = None,
        pulses: bool = False,
        timeout_seconds: float = 60.0,
    ) -> None:
        self.link = link
        self.timeout_seconds = timeout_seconds
        self.stack = stack
        self.candidates = dict(candidates)
        self.rung = rung or choose_rung(link, stack)
        self.name = stack
        self.version = self.rung.version
        self.coarse = self.rung.name == "trtexec"
        self.tells_end_to_end = not self.coarse
        self.clock = DeviceClock()
        self.built: dict[Path, Engine] = {}
        self.clocks_seen: dict[str, float] = {}
        self._builds, self._keep = builds or {}, keep
        self._added = dict(facts or {})
        self._files: dict[Path, str] = {}
        self._sessions: dict[Path, RemoteSession] = {}
        self.pulses = pulses
        self._batches = query_batches(inputs, batch)
        self._own = {self.candidates[name]: query_batches(own, batch) for name, own in (inputs_of or {}).items()}
        wrapper = _wrapper(link) if self.rung.wrapped else None
        link.ask("use_rung", rung=self.rung.name, tool=self.rung.tool, wrapper=wrapper, patience=_OPEN_SECONDS)
        self._inputs = self.send_queries("inputs.bin", self._batches)

    # -- Runtime

    def load(self, model: Path, *, threads: int | None) -> RemoteSession:
        """Sends the model, builds its engine where the runtime needs one, and has it loaded."""
        name = self._send_model(model)
        answer = self.ask_of(
            model,
            "open",
            self.load_seconds,
            id=name,
            model=name,
            threads=threads,
            inputs=self._inputs_for(model),
            shapes=self._shapes,
        )
        options = {**answer["options"], "rung": self.rung.title}
        self._sessions[model] = RemoteSession(self, model, name, options)
        return self._sessions[model]

    @property
    def load_seconds(self) -> float:
        """After so long, loading a model hangs."""
        return max(self.timeout_seconds, LOAD_SECONDS)

    def ask_of(self, model: Path, do: str, limit: float, /, *, processes: int = 1, **request: Any) -> dict[str, Any]:
        """The agent's answer about a model, from a process that is ended after `limit` seconds without one.

        processes: how many the answer needs, one after the other.

        Raises:
            HangError: it was; names the model and the runtime. The next request has a new process.
            EdgestillError: what the agent told, or that the link broke.
        """
        # a new process may have to load the model first
        patience = processes * limit + self.load_seconds + agent.START_SECONDS + _LINK_SECONDS
        try:
            return self.link.ask(do, patience=patience, limit=limit, **request)
        except DeviceError as error:
            if error.kind not in _DIED:
                raise
            told = f"{error.evidence}; on {self.link.host.name}, {_DOING.get(do, do)}"
            message = error.message.replace("on the device", f"on the model {model.name}, on the device")
            if error.kind == "hung":
                raise HangError(message, where=str(model), evidence=told, fix=error.fix) from error
            raise EdgestillError(message, where=str(model), evidence=told, fix=error.fix) from error

    def _inputs_for(self, model: Path) -> dict[str, Any]:
        own = self._own.get(model)
        return self._inputs if own is None else self.send_queries(f"{self._files[model]}.inputs", own)

    @property
    def _shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        return [(name, array.shape) for name, array in self._batches[0].items()]

    def _send_model(self, model: Path) -> str:
        """The name of the file that the agent loads: the graph, or the engine made of it."""
        if model in self._files:
            return self._files[model]
        number = len(self._files)
        files = model_files(model)
        name = f"model{number}.onnx" if len(files) == 1 else model.name
        for file in files:
            self.link.put(name if file is model else file.name, file)
        if self.stack != "onnxruntime":
            name = self._engine(model, name, number)
        self._files[model] = name
        return name

    def _engine(self, model: Path, graph: str, number: int) -> str:
        name, cache = f"model{number}.engine", f"model{number}.cache"
        build = self._builds.get(model, Build())
        workspace = self.link.host.workspace_mib
        identity = content_key(self.rung, machine_identity(self.link.facts), build, self._shapes, workspace)
        stored = self._keep / f"{model_key(model)}-{identity[:16]}.json" if self._keep is not None else None
        if stored is not None and stored.is_file() and stored.with_suffix(".engine").is_file():
            self.link.put(name, stored.with_suffix(".engine"))
            self.built[model] = _known_engine(stored, self.rung)
            return name
        answer = self.ask_of(
            model,
            "build",
            _BUILD_SECONDS,
            model=graph,
            engine=name,
            cache=cache,
            strongly_typed=build.strongly_typed,
            flags=list(build.flags),
            compute_capability=build.compute_capability,
            shapes=self._shapes,
            workspace_mib=workspace,
        )
        if self._keep is not None and stored is not None:
            with explain_os_errors(stored):
                self._keep.mkdir(parents=True, exist_ok=True)
                self.link.get(name, stored.with_suffix(".engine"))
                if answer["cached"]:
                    self.link.get(cache, stored.with_suffix(".cache"))
                # last, so that a half-fetched engine is not taken for a whole one
                facts = {key: answer[key] for key in ("seconds", "workspace_mib", "flags", "version")}
                write_text(stored, json.dumps({**facts, "rung": self.rung.title}, indent=2) + "\n")
            self.built[model] = _known_engine(stored, self.rung)
        return name

    # -- Place

    def ahead(self, name: str, count: int) -> None:
        """See `profiles.measure.Ahead`."""
        self._sessions[self.candidates[name]].ahead(count)

    def facts(self) -> dict[str, Any]:
        """See `profiles.measure.Place.facts`."""
        found: dict[str, Any] = self.link.ask("facts")["facts"]
        return {**found, **self._added, "host": self.link.host.name}

    def clocks(self) -> Mapping[str, float]:
        """See `profiles.measure.Place.clocks`: what came with a round since the last call."""
        found, self.clocks_seen = self.clocks_seen, {}
        return found

    def guarded(self, work: Callable[[Beat], T], seconds: float) -> T:
        """See `profiles.measure.Place.guarded`. The device itself ends what hangs there; see `ask_of`."""
        return work(Beat())

    def others(self) -> dict[str, Any]:
        """See `profiles.measure.Place.others`."""
        found: dict[str, Any] = self.link.ask("use")["use"]
        return found

    def probe(
        self,
        runtime_name: str,
        model: Path,
        inputs: Mapping[str, Array],
        threads: int,
        *,
        options: RuntimeOptions | None = None,
        timeout_seconds: float = 60.0,
    ) -> Started:
        """See `profiles.fresh_process.probe`; on a device whose GPU shares the memory, what the whole system lost."""
        name = self._send_model(model)
        try:
            found = self.ask_of(
                model,
                "probe",
                self.load_seconds,
                limit_first=SLOWER + timeout_seconds,
                model=name,
                threads=threads,
                inputs=self._inputs_for(model),
                shapes=self._shapes,
            )
        except DeviceError as error:
            return Started(None, None, Memory(peak_mib=None, before_load_mib=None, how=f"n/a: {error.message}"))
        peak, how = found["peak_mib"], "VmHWM of a fresh process on the device with Python and the runtime"
        if self.stack != "onnxruntime" and (found["unified"] or found["shares_memory"]):
            # a process' resident size misses what its GPU took of the shared memory
            peak, how = found.get("fall_mib"), "peak fall of the device's MemAvailable while a fresh process ran it"
        elif self.stack != "onnxruntime":
            # of a discrete GPU's memory nothing is in the host's
            peak, how = found.get("gpu_mib"), found["gpu_how"]
        return Started(
            found["load_ms"],
            found["first_inference_ms"],
            Memory(peak_mib=peak, before_load_mib=found["before_load_mib"], how=how),
        )

    def energy(self, name: str, seen: Measurement, section: MeasureSection) -> Energy:
        """The energy of a candidate that runs alone, by the device's sensors; see `profiles.energy.energy_per_query`.

        A failure here leaves its latency as it is: no figure then, and the reason.

        Args:
            name: of the candidate.
            seen: what was measured of it: how long a query takes.
            section: seconds, and the pause between queries.
        """
        if not section.energy_seconds:
            return no_energy("not asked for")
        gap_s = section.idle_gap_ms / 1e3
        longest = gap_s + seen.asked.maximum / 1e3
        try:
            told = self.ask_of(
                self.candidates[name],
                "energy",
                # lead-ins are at most as long as what they lead to, and a spell may end one query late
                section.timeout_seconds + 4 * (section.energy_seconds + SPELLS * longest),
                id=self._files[self.candidates[name]],
                seconds=section.energy_seconds / SPELLS,
                pairs=SPELLS,
                gap_s=gap_s,
            )
        except EdgestillError as error:
            return no_energy(error.message)
        return energy_of(told["idle"], told["busy"], told["how"])

    # -- calibration

    def pulse_of(self, name: str) -> int:
        """Nanoseconds of the pulse around the candidate's last query."""
        return self._sessions[self.candidates[name]].pulse

    def trace(
        self, model: Path, inputs: Mapping[str, Array], optimised: Path, *, threads: int | None, runs: int = 1
    ) -> tuple[TracedNode, ...]:
        """See `profiles.runtimes.onnxruntime.trace`; by the device's ONNX Runtime."""
        name = self._send_model(model)
        self.ask_of(
            model,
            "profile",
            _OPEN_SECONDS,
            model=name,
            threads=threads,
            inputs=self.send_queries("traced.bin", [inputs]),
            runs=traced_runs(runs),
            optimised="optimised.onnx",
            trace="trace.json",
        )
        self.link.get("optimised.onnx", optimised)
        events = optimised.with_suffix(".json")
        self.link.get("trace.json", events)
        self.link.ask("remove", names=["optimised.onnx", "trace.json"])
        return read_trace(events, runs)

    # -- outputs

    def send_queries(self, name: str, batches: Sequence[Mapping[str, Array]]) -> dict[str, Any]:
        """Stores queries in one file on the device and returns how it is read."""
        for position, batch in enumerate(batches):
            self.link.put(name, b"".join(array.tobytes() for array in batch.values()), more=position > 0)
        return {
            "file": name,
            "queries": len(batches),
            "inputs": [
                {"name": key, "dtype": str(array.dtype), "shape": array.shape, "bytes": array.nbytes}
                for key, array in batches[0].items()
            ],
        }

    def outputs(self, model: Path, inputs: Mapping[str, Array], batch: int, folder: Path) -> dict[str, Array]:
        """The model's outputs on all rows of `inputs`, computed on the device; by name, (N, ...).

        trtexec gives those of the first few queries only.

        Args:
            model: loaded before.
            inputs: by name, (N, ...).
            batch: rows of a query; the last query is filled up by repetition.
            folder: for the files that are brought back.

        Raises:
            EdgestillError: an output is not finite, or the link broke.
        """
        rows = len(next(iter(inputs.values())))
        collected: dict[str, list[Array]] = {}
        if self.coarse:
            rows = min(rows, _CHECKED_QUERIES * batch)
        for part in _parts(inputs, rows, batch):
            sent = self.send_queries("held_out.bin", part)
            session = self._sessions[model]
            # trtexec: a process for each query
            queries, processes = (1, len(part)) if self.coarse else (len(part), 1)
            answer = self.ask_of(
                model,
                "outputs",
                session.limit(queries),
                processes=processes,
                id=self._files[model],
                inputs=sent,
                shapes=self._shapes,
                file="outputs.bin",
            )
            found = _from_json(answer["json"]) if "json" in answer else self._fetched(answer, folder)
            for name, array in found.items():
                collected.setdefault(name, []).append(array)
        results = {name: np.concatenate(parts)[:rows] for name, parts in collected.items()}
        for name, array in results.items():
            if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
                raise EdgestillError(
                    f'the model\'s output "{name}" is not finite on the device',
                    where=self.link.host.name,
                    evidence=f"{array.size - int(np.isfinite(array).sum())} of {array.size} values are NaN or infinite",
                    fix="a model that overflows in FP16 may run in FP32",
                )
        return results

    def _fetched(self, answer: Mapping[str, Any], folder: Path) -> dict[str, Array]:
        file = folder / "outputs.bin"
        self.link.get("outputs.bin", file)
        raw, kinds = file.read_bytes(), answer["outputs"]
        file.unlink()
        found: dict[str, list[Array]] = {kind["name"]: [] for kind in kinds}
        start = 0
        for _ in range(answer["queries"]):
            for kind in kinds:
                count = int(np.prod(kind["shape"], dtype=np.int64))
                array = np.frombuffer(raw, kind["dtype"], count, start).reshape(kind["shape"])
                found[kind["name"]].append(array)
                start += array.nbytes
        return {name: np.concatenate(parts) for name, parts in found.items()}


def measure_on(
    runtime: RemoteRuntime,
    inputs: Mapping[str, Array],
    target: TargetSection,
    section: MeasureSection,
    *,
    input_source: str,
    mismatches: Sequence[str] = (),
    fresh_process: bool = True,
    progress: Progress | None = None,
    failures: dict[str, EdgestillError] | None = None,
) -> dict[str, Measured]:
    """Measures the runtime's candidates on its device, by the same loop and rules as on this machine.

    Args:
        runtime: with the candidates and the link.
        inputs: as for `profiles.measure.measure`; those that the runtime was made with.
        target: percentile, scope, batch and limit.
        section: threads, time, confidence.
        input_source: where the inputs are from.
        mismatches: where the device is not what the target says; a limit then is inconclusive.
        fresh_process: as for `profiles.measure.measure`.
        progress: told how many samples there are.
        failures: as for `profiles.measure.measure`.

    Raises:
        InputError: the section asks for what is set on this machine only.
        EdgestillError: what the device told; see `profiles.remote`.
    """
    for key, asked_for in (("affinity", section.affinity), ("graph_optimization", section.graph_optimization != "all")):
        if asked_for:
            raise InputError(
                "this is set on the machine that edgestill runs on only",
                where=f"measure.{key}",
                fix=f"leave {key} out to measure on {runtime.link.host.name}",
            )
    reasons, asked = list(mismatches), target
    if not runtime.tells_end_to_end and target.latency_scope == "end_to_end":
        target = target.model_copy(update={"latency_scope": "compute", "latency_ms": None})
        if asked.latency_ms is not None:
            reasons.append(
                "the limit is about end-to-end times, and trtexec tells compute times only; "
                "with TensorRT's Python module on the device both are measured"
            )
    runtime.timeout_seconds = section.timeout_seconds
    found = measure(
        runtime.candidates,
        inputs,
        target,
        section,
        input_source=input_source,
        runtime=runtime,
        clock=runtime.clock,
        progress=progress,
        fresh_process=fresh_process,
        failures=failures,
        place=runtime,
    )
    energies = {name: runtime.energy(name, each.measurement, section) for name, each in found.items()}
    return {
        name: Measured(
            _judged(each.measurement.model_copy(update={"energy": energies[name]}), asked.latency_ms, reasons),
            each.samples,
        )
        for name, each in found.items()
    }


def _judged(measurement: Measurement, limit_ms: float | None, reasons: Sequence[str]) -> Measurement:
    """The measurement with why its verdict cannot be more than inconclusive, where there is a reason."""
    before, after = (measurement.environment[when].get("throttle_events", 0) for when in ("before", "after"))
    every = [*reasons]
    if before != after:
        every.append(f"the device was throttled while it was measured ({before} events before, {after} after)")
    if not every:
        return measurement
    verdict = None if limit_ms is None else "inconclusive"
    return measurement.model_copy(update={"mismatches": tuple(every), "limit_ms": limit_ms, "verdict": verdict})


def _parts(inputs: Mapping[str, Array], rows: int, batch: int) -> Iterator[list[dict[str, Array]]]:
    """The queries of all rows, in parts that a small device can store."""
    size = sum(array[:1].nbytes for array in inputs.values()) * batch
    at_once = max(1, CHUNK_BYTES // max(size, 1))
    starts = range(0, rows, batch)
    for first in range(0, len(starts), at_once):
        yield [
            {
                name: np.ascontiguousarray(array[np.minimum(np.arange(start, start + batch), rows - 1)])
                for name, array in inputs.items()
            }
            for start in starts[first : first + at_once]
        ]


def _from_json(queries: Sequence[Mapping[str, Any]]) -> dict[str, Array]:
    """Outputs as `trtexec --exportOutput` writes them: "dimensions" like 1x10, and "values"."""
    found: dict[str, list[Array]] = {}
    for query in queries:
        for name, entry in query.items():
            shape = [int(side) for side in str(entry["dimensions"]).split("x")]
            found.setdefault(name, []).append(np.asarray(entry["values"], np.float32).reshape(shape))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def _known_engine(stored: Path, rung: Rung) -> Engine:
    facts = json.loads(stored.read_text(encoding="utf-8"))
    cache = stored.with_suffix(".cache")
    return Engine(
        file=stored.with_suffix(".engine"),
        cache=cache if cache.is_file() else None,
        rung=rung,
        seconds=facts["seconds"],
        workspace_mib=facts["workspace_mib"],
    )


def machine_identity(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts by which two sessions on a machine are the same: not its load, not its temperature."""
    names = ("hostname", "board", "cpu_model", "cores", "memory_mib", "machine", "system", "l4t", "gpu", "driver",
             "compute_capability", "power_mode", "governor")  # fmt: skip
    return {name: facts[name] for name in names if name in facts}


def model_key(model: Path) -> str:
    """A short name for a model's content."""
    return hashlib.sha256("".join(file_hash(path) for path in model_files(model)).encode()).hexdigest()[:16]
