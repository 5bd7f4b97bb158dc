"""A report as four devices would give it (figures invented), used by the report's tests."""

from __future__ import annotations

from cli.report.schema import (
    Bought,
    CandidateRow,
    Counts,
    CurvePoint,
    DataFacts,
    Difference,
    Engine,
    Exploration,
    ExploredStudent,
    LatencyValue,
    LimitVerdict,
    Machine,
    MetricPlace,
    MetricValue,
    Picture,
    ReferenceRow,
    Report,
    Roofline,
    ShotGroup,
    ShotName,
    ShotRow,
    Shots,
    Stage,
    TargetRow,
    TrainingRun,
)
from cli.report.verdict import exit_status

HERE: MetricPlace = "ONNX Runtime here, not the device"


def metric(percent: float, half: float, n: int = 2000, on: MetricPlace = "artifact in its runtime") -> MetricValue:
    return MetricValue(
        value=percent / 100, low=(percent - half) / 100, high=(percent + half) / 100, n=n, method="Wilson", on=on
    )


def latency(point: float, bound: float, lower: float, samples: int = 1324, percentile: float = 99) -> LatencyValue:
    return LatencyValue(
        percentile=percentile,
        point=point,
        upper_bound=bound,
        lower_bound=lower,
        samples=samples,
        p50=point * 0.9,
        mean=point * 0.91,
        max=bound * 1.1,
        outliers=3,
    )


def line3_orin() -> TargetRow:
    return TargetRow(
        name="line3-orin",
        device="jetson-orin-nano",
        device_title="Orin Nano 8GB",
        host="orin-07",
        stack="JetPack 6.2.1, TensorRT 10.3.0",
        power_mode="15W",
        conditions=("58 °C",),
        arch="conv-w24-d2",
        precision="int8",
        compute_precision="int8, fp16 where int8 has no kernel",
        model_file="model.int8.onnx",
        bundle="bundles/line3-orin",
        size_mib=0.9,
        metric=metric(91.4, 1.2),
        latency=latency(2.31, 2.38, 2.27),
        load_ms=412.0,
        first_inference_ms=9.4,
        peak_memory_mib=188.0,
        peak_memory_how="fall of MemAvailable",
        limits=(
            LimitVerdict(name="latency_ms", limit=4.0, value=2.31, low=2.27, high=2.38, verdict="pass"),
            LimitVerdict(name="memory_mib", limit=500, value=188.0, verdict="pass"),
            LimitVerdict(name="metric_floor", limit=0.87, value=0.914, low=0.902, high=0.926, verdict="pass"),
        ),
        verdict="pass",
        engine=Engine(file="model.plan", built_by="TensorRT 10.3.0"),
        candidates=(
            CandidateRow(precision="fp32", size_mib=3.1, metric=metric(91.9, 1.2), rejected_because="2.1 times slower"),
            CandidateRow(
                precision="fp16",
                size_mib=1.7,
                metric=metric(91.8, 1.2),
                latency=latency(2.63, 2.70, 2.60),
                rejected_because="12 % slower than int8, which keeps the floor",
            ),
            CandidateRow(
                precision="int8", size_mib=0.9, metric=metric(91.4, 1.2), latency=latency(2.31, 2.38, 2.27), chosen=True
            ),
        ),
        why=("int8, not fp16: 12 % faster, -0.4 pt [-1.0, +0.2], floor 87 kept",),
        environment={"governor": "schedutil", "threads": 1, "temperature_c": [57.0, 58.5]},
    )


def gate_pi5() -> TargetRow:
    return TargetRow(
        name="gate-pi5",
        device="raspberry-pi-5",
        device_title="Pi 5 8GB",
        host="pi-gw-2",
        stack="ONNX Runtime 1.31.1",
        conditions=("4 threads", "61 to 74 °C"),
        arch="conv-w16-d2",
        precision="int8",
        bundle="bundles/gate-pi5",
        size_mib=0.5,
        metric=metric(88.9, 1.4),
        latency=latency(31.8, 32.4, 31.2),
        limits=(
            LimitVerdict(name="latency_ms", limit=30.0, value=31.8, low=31.2, high=32.4, verdict="fail"),
            LimitVerdict(name="metric_floor", limit=0.87, value=0.889, low=0.875, high=0.903, verdict="pass"),
        ),
        verdict="fail",
        candidates=(
            CandidateRow(
                precision="int8", size_mib=0.5, metric=metric(88.7, 1.4), latency=latency(31.8, 32.4, 31.2), chosen=True
            ),
        ),
        why=("6 % over. Next smaller, conv-w12-d2: 24.1 ms but 85.9 %, floor 87",),
        fixes=("latency_ms = 33, or metric_floor = 0.85",),
    )


def office_rtx() -> TargetRow:
    return TargetRow(
        name="office-rtx",
        device="rtx-4060-laptop",
        device_title="RTX 4060 Laptop",
        host="rtx-lap",
        stack="TensorRT-RTX 1.7.1",
        conditions=("clocks not locked",),
        arch="conv-w32-d3",
        precision="fp16",
        bundle="bundles/office-rtx",
        size_mib=2.1,
        metric=metric(92.3, 1.2),
        latency=latency(0.97, 1.06, 0.93, samples=20000),
        limits=(
            LimitVerdict(
                name="latency_ms",
                limit=1.0,
                value=0.97,
                low=0.93,
                high=1.06,
                verdict="inconclusive",
                reason="the limit lies within the interval after 20,000 runs",
            ),
        ),
        verdict="inconclusive",
        why=("p99 0.97 < limit 1.0 < bound 1.06 after 20,000 runs; clocks moved",),
        fixes=("lock the clocks, or percentile = 95 (0.91, bound 0.93)",),
    )


def depot_nx() -> TargetRow:
    return TargetRow(
        name="depot-nx",
        device="jetson-orin-nx",
        device_title="Orin NX 16GB",
        stack="JetPack 6.2.1, TensorRT 10.3.0",
        power_mode="25W",
        arch="conv-w24-d2",
        precision="fp16",
        bundle="bundles/depot-nx",
        size_mib=1.7,
        metric=metric(91.8, 1.2, on=HERE),
        roofline=Roofline(bound_ms=0.3, limiting="memory"),
        limits=(
            LimitVerdict(name="latency_ms", limit=5.0, verdict="not measured", reason="the device is not attached"),
            LimitVerdict(name="file_size_mib", limit=4.0, value=1.7, verdict="pass"),
        ),
        verdict="not measured",
        engine=Engine(
            parsed_by="parsed by TensorRT-RTX 1.7.1",
            not_built_because="TensorRT 10.3.0 builds it on the device",
        ),
        why=("no host given: edgestill run shelf-camera.toml --on depot-nx=HOST",),
    )


def example(targets: tuple[TargetRow, ...] | None = None, **changes: object) -> Report:
    """report.md's four targets, or others; the summary follows from the targets."""
    rows = (line3_orin(), gate_pi5(), office_rtx(), depot_nx()) if targets is None else targets
    fields: dict[str, object] = {
        "name": "shelf-camera",
        "created": "2026-11-21T14:02:11+00:00",
        "seconds": 793.0,
        "versions": {"edgestill": "0.1.0", "torch": "2.13.0", "onnx": "1.23.2", "onnxruntime": "1.31.1"},
        "machine": Machine(title="Xeon, 2 cores, 15 GiB", host="build-1", os="Debian 12", python="3.11.2"),
        "recipe": "shelf-camera.toml",
        "folder": "runs/shelf-camera",
        "task": "multiclass",
        "metric": "top1",
        "classes": 12,
        "n_test": 2000,
        "unit": "image",
        "exit_status": exit_status(rows),
        "counts": Counts.of(rows),
        "targets": rows,
        "references": (
            ReferenceRow(role="teacher", arch="conv-w96-d4", size_mib=41.3, metric=metric(93.1, 1.1, on="PyTorch")),
            ReferenceRow(role="no teacher", arch="conv-w24-d2", size_mib=3.1, metric=metric(89.7, 1.3, on="PyTorch")),
        ),
        "bought": (
            Bought(arch="conv-w24-d2", difference=Difference(value=0.017, low=0.008, high=0.026), objective="ec"),
        ),
        "stages": (
            Stage(name="data", seconds=1.2, cached=True),
            Stage(name="teacher", seconds=301.0),
            Stage(name="students", seconds=402.5),
            Stage(name="export", seconds=61.0),
            Stage(name="measure", seconds=27.3),
        ),
        "training": (
            TrainingRun(
                role="teacher",
                arch="conv-w96-d4",
                objective="supervised",
                epochs=12,
                best_epoch=11,
                seconds=301.0,
                samples_per_second=2100.0,
                curve=tuple(
                    CurvePoint(epoch=e, train_loss=2.0 / e, validation=0.93 - 0.3 / e**1.5) for e in range(1, 13)
                ),
            ),
            TrainingRun(
                role="student",
                arch="conv-w24-d2",
                objective="ec",
                epochs=10,
                best_epoch=9,
                seconds=140.0,
                samples_per_second=5200.0,
                curve=tuple(
                    CurvePoint(epoch=e, train_loss=1.6 / e, validation=0.915 - 0.4 / e**1.5) for e in range(1, 11)
                ),
            ),
        ),
        "data": DataFacts(
            source="imagefolder",
            title="photos",
            licence="own",
            splits={"train": 9600, "validation": 1200, "test": 2000},
            labels=tuple(f"shelf {index}" for index in range(12)),
            input="uint8 3x224x224",
        ),
    }
    return Report.model_validate(fields | changes)


def long_tail() -> Report:
    """The example with a long tail and an exploration."""

    def figures(many: float, medium: float, few: float, on: MetricPlace = "PyTorch") -> dict[ShotName, MetricValue]:
        return {
            "many": metric(many, 0.9, 700, on),
            "medium": metric(medium, 1.6, 800, on),
            "few": metric(few, 2.4, 500, on),
        }

    labels = tuple(f"shelf {index}" for index in range(12))
    device: MetricPlace = "artifact in its runtime"
    shots = Shots(
        groups=(
            ShotGroup(name="many", classes=labels[:4], fewest=231, most=4000, n_test=700),
            ShotGroup(name="medium", classes=labels[4:9], fewest=24, most=98, n_test=800),
            ShotGroup(name="few", classes=labels[9:], fewest=4, most=17, n_test=500),
        ),
        rows=(
            ShotRow(
                role="student",
                targets=("line3-orin",),
                arch="conv-w24-d2",
                precision="int8",
                metrics=figures(97.2, 91.5, 78.3, device),
            ),
            ShotRow(
                role="student",
                targets=("gate-pi5",),
                arch="conv-w16-d2",
                precision="int8",
                metrics=figures(96.0, 88.1, 69.9, device),
            ),
            ShotRow(role="teacher", arch="conv-w96-d4", metrics=figures(98.4, 93.0, 84.2)),
            ShotRow(role="no teacher", arch="conv-w24-d2", metrics=figures(97.3, 89.2, 66.0)),
        ),
    )
    exploration = Exploration(
        kind="random",
        weight=1.0,
        sigma=1.0,
        generator="vae, 32 latents",
        filter="confidence",
        summary="random, sigma 1, around the training samples, filtered by confidence",
        students=(
            ExploredStudent(
                arch="conv-w24-d2",
                kept=0.83,
                kept_by_class=dict(zip(labels, [0.9] * 9 + [0.5, None, 0.41], strict=True)),
                divergence=0.21,
            ),
        ),
        pictures=(
            Picture(file="explored/explored.png", title="explored samples at three radii"),
            Picture(file="generator/reconstructions.png", title="what the generator makes of real images"),
        ),
    )
    return example(shots=shots, exploration=exploration)
