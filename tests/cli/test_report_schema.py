"""`report.json`: one document, versioned, consistent with itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pydantic import ValidationError

from cli.report.schema import (
    SCHEMA_FILE,
    Counts,
    CurvePoint,
    LatencyValue,
    MetricValue,
    Report,
    Shots,
    TargetRow,
    load_report,
    schema_text,
    to_json,
)
from profiles.errors import InputError
from tests.cli.report_example import example, gate_pi5, line3_orin, long_tail


def test_committed_schema_is_the_models_schema() -> None:
    assert SCHEMA_FILE.read_text(encoding="utf-8") == schema_text(), (
        "run: python -m cli.report.schema > cli/report/report.schema.json"
    )


def test_module_prints_the_schema() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cli.report.schema"], capture_output=True, text=True, check=True, timeout=60
    )
    assert json.loads(done.stdout) == json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))


def test_report_json_is_valid_against_the_committed_schema() -> None:
    schema = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    for report in (example(), long_tail()):
        jsonschema.Draft202012Validator(schema).validate(json.loads(to_json(report)))


@pytest.mark.parametrize("report", [example(), long_tail()])
def test_report_survives_the_disk(tmp_path: Path, report: Report) -> None:
    path = tmp_path / "report.json"
    path.write_text(to_json(report), encoding="utf-8")
    assert load_report(path) == report


def test_a_report_of_before_explorations_is_still_read(tmp_path: Path) -> None:
    document = json.loads(to_json(example()))
    del document["shots"], document["exploration"]
    for run in document["training"]:
        del run["exploration"]
    path = tmp_path / "report.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    assert load_report(path) == example()


def test_a_figure_for_a_group_that_is_not_listed_is_refused() -> None:
    found = long_tail().shots
    assert found is not None
    with pytest.raises(ValidationError, match="not listed"):
        Shots(groups=found.groups[:2], rows=found.rows)


def test_verdict_that_contradicts_the_limits_is_refused() -> None:
    fields = gate_pi5().model_dump() | {"verdict": "pass"}
    with pytest.raises(ValidationError, match="its limits say"):
        TargetRow.model_validate(fields)


def test_exit_status_that_contradicts_the_targets_is_refused() -> None:
    with pytest.raises(ValidationError, match="exit_status"):
        example(exit_status=0)


def test_counts_that_contradict_the_targets_are_refused() -> None:
    with pytest.raises(ValidationError, match="counts"):
        example(counts=Counts(passed=4))


def test_two_targets_of_one_name_are_refused() -> None:
    with pytest.raises(ValidationError, match="same name"):
        example((line3_orin(), line3_orin()))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "schema version None"),
        ('{"schema_version": 99}', "schema version 99"),
        ('{"schema_version": 1}', "does not match"),
    ],
)
def test_unreadable_report_says_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message) as caught:
        load_report(path)
    assert str(path) in str(caught.value)


def test_missing_report_names_the_command_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="edgestill run"):
        load_report(tmp_path / "report.json")


def test_latency_is_copied_in_the_scope_that_was_asked_for() -> None:
    from profiles.measurement import Latency, Measurement

    def clock(scope: str, value: float) -> Latency:
        return Latency.model_validate(
            {"scope": scope, "samples": 662, "mean": value, "minimum": value, "maximum": value, "percentile": 99}
            | {"p50": value, "p90": value, "p95": value, "p99": value, "p99_9": None, "value": value}
            | {"upper_bound": value, "lower_bound": value, "bound_confidence": 0.995, "outliers": 0, "lag1": 0.0}
        )

    parts: dict[str, Any] = {
        "batch": 2,
        "compute": clock("compute", 1.0),
        "end_to_end": clock("end_to_end", 1.5),
        "scope": "compute",
        "stable": True,
        "runtime": "onnxruntime",
        "runtime_version": "1.31.1",
        "options": {"intra_op_threads": 2},
        "input_shapes": {"image": (2, 1, 28, 28)},
        "input_source": "random",
    }
    measurement = Measurement.model_construct(**parts)
    copied = LatencyValue.of(measurement)
    assert (copied.scope, copied.point, copied.batch, copied.confidence) == ("compute", 1.0, 2, 0.995)
    assert (copied.runtime_version, copied.options) == ("1.31.1", {"intra_op_threads": 2})


def test_nan_is_refused_where_json_could_not_hold_it_and_dropped_from_curves() -> None:
    with pytest.raises(ValidationError, match="finite"):
        MetricValue(value=float("nan"), low=0, high=1, n=1)
    assert CurvePoint(epoch=1, train_loss=float("nan"), validation=0.5).train_loss is None


def test_schema_version_is_in_the_document() -> None:
    assert json.loads(to_json(example()))["schema_version"] == Report.model_fields["schema_version"].default == 1
