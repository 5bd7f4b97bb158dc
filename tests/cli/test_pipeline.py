"""A whole run on a small data set of real digits: every stage, resumed, changed and broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cli.app import main
from cli.pipeline import Run
from cli.recipe import load_recipe
from cli.report.schema import load_report
from distill.data.make_fashion_mnist_small import PACKAGED
from export import Plan
from profiles.device import Target
from profiles.errors import EdgestillError

RECIPE = """
name = "small"
objective = "{objective}"

[data]
source = "npz"
path = "clothes.npz"
{data}

[data.augment]
crop = 1
views = 2

[teacher]
arch = "conv-w12-d1-k3"
epochs = 2

[train]
epochs = 2
batch_size = 64

[export]
calibration_samples = 64
parity_samples = 64

[measure]
max_samples = 2000
warmup_seconds = 2.0

[[target]]
name = "here"
arch = "conv-w8-d1-k3"
latency_ms = 500.0
metric_floor = 0.05
file_size_mib = 5

[[target]]
name = "rtx"
device = "rtx-4060-laptop"
arch = "conv-w8-d1-k3"
latency_ms = 1.0

[[target]]
name = "orin"
device = "jetson-orin-nano"
arch = "conv-w8-d1-k3"
"""


@pytest.fixture(scope="session")
def clothes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """700 real images of the packaged set as an .npz of one's own, split by edgestill."""
    with np.load(PACKAGED) as stored:
        images, labels = stored["train_images"][:700], stored["train_labels"][:700]
    folder = tmp_path_factory.mktemp("clothes")
    np.savez_compressed(folder / "clothes.npz", images=images, labels=labels % 3)
    return folder


def write_recipe(folder: Path, *, objective: str = "kd", data: str = "", more: str = "") -> Path:
    path = folder / "small.toml"
    path.write_text(RECIPE.format(objective=objective, data=data) + more)
    return path


def edgestill(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    return int(caught.value.code or 0)


@pytest.fixture(scope="session")
def finished(clothes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run folder."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    assert edgestill("-q", "run", str(write_recipe(clothes)), "--out", str(folder)) == 0
    return folder


def test_a_run_ends_in_a_report_with_a_verdict_per_target(finished: Path) -> None:
    report = load_report(finished / "report.json")
    rows = {row.name: row for row in report.targets}
    assert rows["here"].verdict == "pass"
    assert rows["here"].latency is not None
    assert rows["here"].latency.samples >= 662
    assert rows["rtx"].verdict == rows["orin"].verdict == "not measured"
    assert rows["rtx"].latency is None
    assert rows["rtx"].roofline is not None
    assert rows["rtx"].metric is not None
    assert rows["rtx"].metric.on == "ONNX Runtime here, not the device"
    assert [reference.role for reference in report.references] == ["teacher", "no teacher"]
    assert len(report.bought) == 1
    assert report.exit_status == 0


def test_every_target_has_a_bundle_that_checks_out(finished: Path) -> None:
    from profiles.artifact import verify

    for name in ("here", "rtx", "orin"):
        bundle = finished / "bundles" / name
        verify(bundle, "bundle")
        assert (bundle / "infer.py").is_file()
    done = subprocess.run(
        [sys.executable, "infer.py", "--selftest"],
        cwd=finished / "bundles" / "here",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_run_keeps_what_a_comparison_needs(finished: Path) -> None:
    from cli.report.compare import compare
    from cli.report.sides import load_side

    found = compare(load_side(finished), load_side(finished / "report.json"))
    assert [row.name for row in found.rows] == ["here", "rtx", "orin"]
    for row in found.rows:
        how = {change.quantity: change.how for change in row.changes}
        assert how["metric"] == "the same file and answers"
    # a machine that is busy with other tests may not settle, but its samples are found
    assert {figures.samples() is not None for figures in load_side(finished).figures if figures.latency} == {True}


def test_targets_with_the_same_student_share_its_training(finished: Path) -> None:
    assert sorted(path.name for path in (finished / "students").iterdir()) == [
        "conv-w8-d1-k3",
        "conv-w8-d1-k3--supervised",
    ]


def test_a_second_run_does_no_stage_again(finished: Path, clothes: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("manifest.json")}
    loaded = load_recipe(str(write_recipe(clothes)))
    report = Run(loaded, finished).report()
    again = {stage.name for stage in report.stages if not stage.cached}
    assert not {name for name in again if name.startswith(("data", "teacher", "student", "plain", "export", "measure"))}
    made = {stage.name: stage.made_seconds for stage in report.stages}
    assert made["teacher conv-w12-d1-k3"], "what it took is not forgotten"
    third = Run(load_recipe(str(write_recipe(clothes))), finished).report()
    assert {stage.name: stage.made_seconds for stage in third.stages} == made
    after = {path: path.stat().st_mtime_ns for path in finished.rglob("manifest.json") if "bundles" not in path.parts}
    assert all(before[path] == time for path, time in after.items())


def test_another_limit_changes_the_verdict_and_trains_nothing(finished: Path, clothes: Path, tmp_path: Path) -> None:
    loaded = load_recipe(str(write_recipe(clothes)), ["target.here.latency_ms=0.0001", "target.rtx.latency_ms=2"])
    report = Run(loaded, finished).report()
    assert report.targets[0].verdict == "fail"
    assert report.exit_status == 3
    assert report.targets[0].fixes
    assert all(stage.cached for stage in report.stages if stage.name.startswith(("teacher", "student", "plain")))
    Run(load_recipe(str(write_recipe(clothes))), finished).report()


def test_a_target_that_fails_does_not_take_the_others_with_it(
    finished: Path, clothes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Run.plan

    def broken_for_rtx(run: Run, target: Target) -> Plan:
        if target.name == "rtx":
            raise EdgestillError("the graph diverges", evidence="node Conv_3")
        return plan(run, target)

    monkeypatch.setattr(Run, "plan", broken_for_rtx)
    report = Run(load_recipe(str(write_recipe(clothes))), finished).report()
    rows = {row.name: row for row in report.targets}
    assert rows["rtx"].verdict == "error"
    assert "Conv_3" in (rows["rtx"].error or "")
    assert rows["here"].verdict == "pass"
    assert report.exit_status == 1


def test_the_report_command_reads_what_the_run_wrote(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert edgestill("report", str(finished), "--json") == 0
    assert json.loads(capsys.readouterr().out)["name"] == "small"


def test_stages_by_themselves(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert edgestill("-q", "distill", str(finished), "--json") == 0
    assert json.loads(capsys.readouterr().out)["students"][0]["student"] == "conv-w8-d1-k3"
    assert edgestill("-q", "export", str(finished), "--json") == 0
    assert {"here", "rtx", "orin"} == set(json.loads(capsys.readouterr().out))
    assert edgestill("-q", "bench", str(finished), "--json") == 0
    measured = json.loads(capsys.readouterr().out)
    assert {entry["name"] for entry in measured["here"]} >= {"fp32", "int8"}
    assert measured["rtx"] == []
    assert edgestill("-q", "bench", str(finished / "bundles" / "here"), "--json", "--percentile", "50") == 0
    assert json.loads(capsys.readouterr().out)["measurement"]["input_source"] == "golden sample"


@pytest.mark.parametrize("option", ["--batch=8", "--latency-ms=0.0001", "--threads=2", "--sweep"])
def test_bench_refuses_options_that_a_run_would_ignore(
    finished: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert edgestill("-q", "bench", str(finished), option) == 2
    assert option.split("=", maxsplit=1)[0] in capsys.readouterr().err


def test_a_dry_run_estimates_and_writes_nothing(
    clothes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "never"
    assert edgestill("-q", "run", str(write_recipe(clothes)), "--out", str(out), "--dry-run", "--json") == 0
    estimate = json.loads(capsys.readouterr().out)
    assert estimate["seconds"] > 0
    assert {stage["name"] for stage in estimate["stages"]} >= {
        "data",
        "teacher conv-w12-d1-k3",
        "teacher cache",
        "student conv-w8-d1-k3",
    }
    assert not out.exists()


def test_a_dry_run_on_a_finished_folder_tells_what_a_change_costs(
    finished: Path, clothes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    recipe = str(write_recipe(clothes))
    dry = ["-q", "run", recipe, "--out", str(finished), "--dry-run", "--json"]
    assert edgestill(*dry) == 0
    assert all(stage["finished"] for stage in json.loads(capsys.readouterr().out)["stages"])
    assert edgestill(*dry, "--set", "data.train_size=300", "--set", "train.epochs=50") == 0
    assert not any(stage["finished"] for stage in json.loads(capsys.readouterr().out)["stages"])
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}


def unwritable(folder: Path) -> Path:
    (folder / "taken").write_text("a file where the run folder should go")
    return folder / "taken" / "run"


@pytest.mark.parametrize(
    ("more", "status", "words"),
    [
        ('[[target]]\nname = "x"\ndevice = "jetson-orinnano"', 2, "jetson-orin-nano"),
        ('[[target]]\nname = "x"\ndevice = "jetson-orin-nano"\nstack = "jetpack-9"', 2, "jetpack-"),
        ('[[target]]\nname = "x"\ndevice = "rtx-a2000"\nprecision = "fp8"', 2, "8.9"),
        ('[[target]]\nname = "x"\narch = "conv-w8"', 2, "conv-w"),
    ],
)
def test_what_a_target_cannot_be_is_refused_before_training(
    clothes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: str, status: int, words: str
) -> None:
    recipe = write_recipe(clothes, more=more)
    assert edgestill("-q", "run", str(recipe), "--out", str(tmp_path / "run")) == status
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run" / "teacher").exists()


@pytest.mark.parametrize(
    ("data", "words"),
    [('label_column = "label"', "labels"), ("train_size = 2", "train"), ('classes = ["a"]', "classes")],
)
def test_data_that_does_not_fit_is_refused_with_its_key(
    clothes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], data: str, words: str
) -> None:
    assert edgestill("-q", "run", str(write_recipe(clothes, data=data)), "--out", str(tmp_path / "run")) == 2
    assert words in capsys.readouterr().err


def test_an_objective_without_its_teacher_outputs_is_refused_before_training(
    clothes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(clothes)
    arguments = ["--set", "teacher.kind=none", "--set", "teacher.arch=", "--out", str(tmp_path / "run")]
    text = recipe.read_text().replace('[teacher]\narch = "conv-w12-d1-k3"\nepochs = 2', '[teacher]\nkind = "none"')
    recipe.write_text(text)
    assert edgestill("-q", "run", str(recipe), *arguments[-2:]) == 2
    assert "logits" in capsys.readouterr().err


def test_a_run_folder_that_cannot_be_written_is_told_and_left_alone(
    clothes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert edgestill("-q", "run", str(write_recipe(clothes)), "--out", str(unwritable(tmp_path))) == 1
    message = capsys.readouterr().err
    assert "cannot write" in message
    assert "--out" in message
    assert (tmp_path / "taken").read_text().startswith("a file")


def test_a_full_disk_is_told_and_the_same_command_goes_on(
    clothes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from distill import checkpoint

    recipe, out = write_recipe(clothes), tmp_path / "run"
    kept: Callable[..., None] = checkpoint.torch.save

    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full)
    assert edgestill("-q", "distill", str(recipe), "--out", str(out)) == 1
    assert "disk is full" in capsys.readouterr().err
    monkeypatch.setattr(checkpoint.torch, "save", kept)
    assert edgestill("-q", "distill", str(recipe), "--out", str(out)) == 0


def test_a_truncated_checkpoint_is_named(clothes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, out = write_recipe(clothes), tmp_path / "run"
    partial = out / "teacher.partial"
    partial.mkdir(parents=True)
    (partial / "checkpoint.pt").write_bytes(b"PK\x03\x04 cut off")
    assert edgestill("-q", "distill", str(recipe), "--out", str(out)) == 2
    assert "checkpoint.pt" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_train_one_student(clothes: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *("-m", "cli.app", "distill", str(write_recipe(clothes)), "--out", str(out)),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    manifest = json.loads((out / "students" / "conv-w8-d1-k3" / "manifest.json").read_text())
    assert manifest["info"]["result"]["processes"] == 2
