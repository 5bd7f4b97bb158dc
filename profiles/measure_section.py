"""The `[measure]` table of a recipe."""

from __future__ import annotations

from pydantic import Field

from profiles.runtimes import GraphOptimization
from profiles.section import Section


class MeasureSection(Section):
    """How latency is measured on this machine; the defaults suit a student of a few milliseconds."""

    threads: int = Field(default=1, ge=1, le=1024)
    """Threads that work inside one operator. One is the default because it is repeatable on a machine that is shared,
    leaves the other cores to the application, and is the fastest for most small students; raise it for a large model.
    The number is part of the measurement's identity: runs with different numbers are not comparable."""
    max_seconds: float = Field(default=60.0, gt=0)
    """Sampling time per candidate, without warm-up. When it ends undecided, the verdict is inconclusive."""
    max_samples: int = Field(default=20_000, ge=64)
    """Samples per candidate at which the last look is taken."""
    confidence: float = Field(default=0.99, gt=0.5, lt=1.0)
    """Confidence of the bounds and of the verdict, over all looks together."""
    warmup_seconds: float = Field(default=10.0, gt=0)
    """Bound on the warm-up of one candidate; a candidate that has not settled by then is called unstable."""
    idle_gap_ms: float = Field(default=0.0, ge=0)
    """Duty cycle: pause between two queries. A device that sleeps between frames is slower per frame."""
    timeout_seconds: float = Field(default=60.0, gt=0)
    """A runtime that answers no query for this long hangs: it is named and left out, the others are measured."""
    affinity: tuple[int, ...] = ()
    """Cores that the measured threads may use; none named: those of this process. Part of a measurement's identity."""
    graph_optimization: GraphOptimization = "all"
    """How far ONNX Runtime rewrites the graph before it runs: all, extended, basic or none."""
    cuda_graph: bool = True
    """On this machine's GPU: launches are recorded once and replayed, where the runtime and the model allow it. On a
    device behind ssh they never are; the measurement's options say so."""
    energy_seconds: float = Field(default=2.0, ge=0)
    """Where the machine tells its power: how long each candidate runs for its energy, and idle as long; 0: none."""
