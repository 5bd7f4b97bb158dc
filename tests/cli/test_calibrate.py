"""`edgestill devices calibrate`: a small calibration of this machine from end to end, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import pytest

from cli import console
from cli.pipeline import calibrate as module
from cli.pipeline.calibrate import Calibrated, Effort, calibrate, error_rows
from cli.pipeline.calibration_models import FAMILIES, build, realistic_rows, sample_architectures, sample_layers
from distill.students.arch import parse_arch
from profiles.calibration import Calibration, calibrations_folder, predict, save_calibration, usable
from profiles.device import detect
from profiles.errors import EdgestillError, InputError
from profiles.measure import graph_precision
from profiles.progress import Silent, Task
from profiles.runtimes.onnxruntime import run_model
from tests.cli.cli_runner import edgestill

SMALL = Effort(families=("conv", "textc"), per_family=1, layers=2, runs=8, queries=64, seconds=0.3, probes=3)


@pytest.fixture(autouse=True)
def own_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGESTILL_CONFIG", str(tmp_path / "config"))
    monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return calibrate("this-machine", Silent(), effort=SMALL, refuse_busy=False).calibration


def test_a_calibration_is_made_stored_shown_and_used(calibration: Calibration, tmp_path: Path) -> None:
    device = detect()
    assert usable(calibration, device, device.stacks[0], 1) is calibration
    assert set(calibration.times) == {"fp32", "int8"}
    assert calibration.models == 2 * (2 * SMALL.per_family + SMALL.layers)
    assert calibration.memory
    assert [row[:2] for row in error_rows(calibration)] == [("FP32", "2"), ("INT8", "2")]
    assert "none; edgestill devices calibrate" in edgestill("devices", "show", "this-machine").out
    save_calibration(calibration)
    assert f"{calibration.date[:10]}, 1 thread(s): median error" in edgestill("devices", "show", "this-machine").out
    files = build(sample_layers(1, seed=5)[0], device, tmp_path)
    for precision, file in files.items():
        found = predict(file, calibration, precision=precision)  # type: ignore[arg-type]
        assert 0 <= found.overhead_ms < found.p50_ms
        assert found.p99_ms is None, "a few queries tell no p99"
        assert found.memory_mib is not None
        assert found.memory_mib > 0


def test_one_of_another_version_is_shown_as_out_of_date(calibration: Calibration) -> None:
    save_calibration(calibration.model_copy(update={"runtime_version": "1.0.0"}))
    shown = " ".join(edgestill("devices", "show", "this-machine").out.split())
    assert "out of date (onnxruntime version: calibrated with 1.0.0" in shown


def test_the_command_prints_a_table_or_json(calibration: Calibration, monkeypatch: pytest.MonkeyPatch) -> None:
    # the measuring itself is that of the fixture; here it is the words that count
    monkeypatch.setattr(module, "calibrate", lambda *_arguments, **_options: Calibrated(calibration, [], None))
    printed = edgestill("devices", "calibrate")
    assert printed.status == 0
    assert all(word in printed.out for word in ("Median error", "FP32", "INT8", "did not see", "other processes"))
    document = json.loads(edgestill("devices", "calibrate", "--json").out)
    assert document["runtime"] == "onnxruntime"
    assert Path(document["file"]).is_file()


def test_a_busy_machine_is_refused_and_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("profiles.calibration.MAX_SPREAD", -1.0)
    few = Effort(per_family=0, layers=1, runs=4, queries=64, seconds=0.2, probes=3)
    with pytest.raises(EdgestillError, match="not quiet enough") as caught:
        calibrate("this-machine", Silent(), effort=few)
    assert "spread by" in (caught.value.evidence or "")
    assert not calibrations_folder().exists()


@pytest.mark.parametrize(
    ("use", "threads", "words"),
    [
        ({"other_cores": 0.1, "stolen_cores": 0.0}, 1, None),
        ({}, 1, None),
        ({"other_cores": 2.6, "stolen_cores": 0.0}, 1, None),
        ({"other_cores": 2.8, "stolen_cores": 0.0}, 1, "used 2.8 of 4 cores"),
        ({"other_cores": 0.5, "stolen_cores": 0.0}, 4, "measuring takes 4 whole"),
        ({"other_cores": 99.0, "stolen_cores": 0.0, "busiest": [{"name": "train", "cores": 2.0}]}, 1, "train 2.0"),
        ({"other_cores": 0.0, "stolen_cores": 0.5}, 1, "the hypervisor took 0.5"),
    ],
)
def test_other_work_on_the_cores_is_told(
    use: dict[str, object], threads: int, words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("profiles.agent.affinity", lambda: [0, 1, 2, 3])
    reason = module._others(use, threads)
    assert reason is None if words is None else words in (reason or "")


def test_another_device_is_refused_for_now() -> None:
    result = edgestill("devices", "calibrate", "raspberry-pi-5")
    assert result.status == 2
    assert "does not calibrate over a network yet" in result.err
    assert edgestill("devices", "calibrate", "no-such-board").status == 2


class Stopping(Silent):
    """The user presses Ctrl-C when the first task starts."""

    @contextmanager
    def task(self, title: str, total: int | None, unit: str = "samples") -> Iterator[Task]:
        with super().task(title, total, unit) as task:
            yield task
            raise KeyboardInterrupt


def test_ctrl_c_leaves_the_calibration_that_was_there(
    calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = save_calibration(calibration)
    before = place.read_bytes()
    monkeypatch.setattr(console, "make_progress", Stopping)
    monkeypatch.setattr(module, "sample_architectures", lambda *_arguments, **_options: ())
    monkeypatch.setattr(module, "sample_layers", lambda _count: sample_layers(1))
    assert edgestill("devices", "calibrate").status == 130
    assert place.read_bytes() == before


def test_the_sample_spans_every_family_and_repeats_itself() -> None:
    found = sample_architectures(6, seed=3)
    assert found == sample_architectures(6, seed=3)
    assert {one.family for one in found} == set(FAMILIES)
    assert len({one.name for one in found}) == 24
    assert all(str(parse_arch(one.arch or "")) == one.arch for one in found)
    assert len({one.spec.shape for one in found}) >= 6
    drawn = [one.arch or "" for one in found]
    assert not set(drawn) & {one.arch for one in sample_architectures(6, seed=4, without=drawn)}


@pytest.mark.slow
def test_many_models_are_exported_by_processes(tmp_path: Path) -> None:
    sampled = sample_layers(6, seed=9)
    found = module.export_all(sampled, detect(), tmp_path, Silent())
    assert set(found) == {one.name for one in sampled}
    assert all(file.is_file() for files in found.values() for file in files.values())


@pytest.mark.parametrize("position", range(6))
def test_graphs_of_layers_run_in_both_precisions(position: int, tmp_path: Path) -> None:
    sampled = sample_layers(6, seed=2)[position]
    files = build(sampled, detect(), tmp_path)
    rows = {sampled.spec.name: realistic_rows(sampled.spec, 2)}
    for precision, file in files.items():
        onnx.checker.check_model(str(file), full_check=True)
        assert graph_precision(file) == precision
        assert run_model(file, rows)["logits"].shape[0] == 2


def test_a_file_that_is_no_device_is_an_input_error() -> None:
    with pytest.raises(InputError):
        calibrate("./none.toml", Silent())
