"""What a run does when INT8 does not keep the metric that its target asks for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cli.app import main
from cli.pipeline import Run
from cli.recipe import load_recipe
from cli.report.schema import load_report
from distill.data.make_fashion_mnist_small import PACKAGED

RECIPE = """
name = "planned"
objective = "kd"

[data]
source = "npz"
path = "clothes.npz"

[teacher]
arch = "conv-w8-d1-k3"
epochs = 1

[student]
arch = "convi-w8-d1-k3"

[train]
epochs = 1
batch_size = 64

[export]
calibration_samples = 32
parity_samples = 32
qat_epochs = 1

[measure]
max_samples = 200
max_seconds = 2
warmup_seconds = 0.5

[[target]]
name = "here"
metric_floor = 0.999
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose floor no student of one epoch reaches."""
    folder = tmp_path_factory.mktemp("planned")
    with np.load(PACKAGED) as stored:
        images, labels = stored["train_images"][:400], stored["train_labels"][:400]
    np.savez_compressed(folder / "clothes.npz", images=images, labels=labels)
    (folder / "planned.toml").write_text(RECIPE)
    return folder / "planned.toml"


def test_a_floor_that_nothing_reaches_ends_in_training_and_every_step_is_reported(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["-q", "run", str(recipe), "--out", str(tmp_path / "run"), "--explain"])
    assert caught.value.code == 3
    shown = capsys.readouterr().out
    assert "What each step of the precision planner bought" in shown
    report = load_report(tmp_path / "run" / "report.json")
    names = [step.name for step in report.targets[0].steps]
    assert names[:4] == ["fp32", "int8", "int8 entropy", "int8 percentile"]
    assert names.index("sensitivity") < names.index("int8-mixed") < names.index("quantisation-aware training")
    assert "int8-qat" in [candidate.precision for candidate in report.targets[0].candidates]
    assert any(stage.name.startswith("quantisation-aware training") for stage in report.stages)
    again = Run(load_recipe(recipe), tmp_path / "run")
    again.export()
    assert all(stage.cached for stage in again.stages)


def test_retraining_can_be_turned_off(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["-q", "export", str(recipe), "--out", str(tmp_path / "run"), "--set", "export.qat=never"])
    assert caught.value.code in (0, None)
    shown = capsys.readouterr().out
    assert "what each step bought (to keep: 99.9%)" in shown
    assert "quantisation-aware" not in shown
