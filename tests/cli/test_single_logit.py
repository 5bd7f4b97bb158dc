"""Runs on two classes whose teacher gives one logit for the second of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cli.pipeline import Run
from cli.recipe import load_recipe
from cli.report.schema import load_report
from distill.data.make_fashion_mnist_small import PACKAGED
from tests.cli.cli_runner import edgestill

COUNT = 400
WRONG_EVERY = 5
RECIPE = """
objective = [{{kind = "{objective}"{settings}}}]
[data]
source = "npz"
path = "two.npz"
classes = ["plain", "striped"]
[data.augment]
views = 1
[teacher]
kind = "array"
logits = "z.npy"
embeddings = "e.npy"
[train]
epochs = 2
batch_size = 64
hard_weight = 0.5
[export]
calibration_samples = 32
parity_samples = 32
[[target]]
name = "rtx"
device = "rtx-4060-laptop"
arch = "conv-w8-d1-k3"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes; a teacher's logit that is right but for every fifth row of the source, and an embedding."""
    with np.load(PACKAGED) as stored:
        images, labels = stored["train_images"][:COUNT], stored["train_labels"][:COUNT] % 2
    np.savez_compressed(tmp_path / "two.npz", images=images, labels=labels)
    right = np.arange(COUNT) % WRONG_EVERY != 0
    z = np.where((labels == 1) == right, 3.0, -1.5)
    np.save(tmp_path / "z.npy", z[:, None].astype(np.float32))
    projection = np.random.default_rng(0).normal(size=(28 * 28, 12))
    np.save(tmp_path / "e.npy", (images.reshape(COUNT, -1) / 255.0 @ projection).astype(np.float32))
    return tmp_path


def write(folder: Path, objective: str, settings: str = "") -> str:
    path = folder / f"{objective}.toml"
    path.write_text(RECIPE.format(objective=objective, settings=settings))
    return str(path)


def test_kd_from_one_logit_and_the_teachers_accuracy_in_the_report(folder: Path) -> None:
    recipe = write(folder, "kd")
    done = edgestill("run", recipe, "--out", str(folder / "run"))
    assert done.status in (0, 4), done.err
    assert 'one logit: taken for class "striped"' in " ".join(done.err.split())
    rows = Run(load_recipe(recipe), folder / "run").dataset.test.rows
    assert rows is not None
    (teacher,) = [row for row in load_report(folder / "run" / "report.json").references if row.role == "teacher"]
    assert teacher.metric is not None
    assert teacher.metric.value == pytest.approx(float((rows % WRONG_EVERY != 0).mean()))
    assert 0.6 < teacher.metric.value < 0.95
    assert not teacher.note


def test_lelp_from_one_logit_takes_it_and_not_the_probes(folder: Path) -> None:
    recipe = write(folder, "lelp", ", null_space = false")  # the null space would need a head: the probe's
    done = edgestill("-q", "distill", recipe, "--out", str(folder / "run"))
    assert done.status == 0, done.err
    logits = np.load(folder / "run" / "cache" / "train_logits.npy")
    assert logits.shape[2] == 2
    assert set(np.unique(logits[0], axis=0).flatten().tolist()) == {-1.5, 0.0, 3.0}
    last = json.loads(next((folder / "run" / "students").glob("*/metrics.jsonl")).read_text().splitlines()[-1])
    assert last["lelp/probe"] == 0
    assert last["loss/lelp/class"] > 0
    assert last["loss/lelp/subclass"] > 0
