"""Runs whose student has a split head: every dialect gets its INT8 graph, and what ships gives class logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from cli.pipeline import Run
from cli.recipe import load_recipe
from distill.data.make_fashion_mnist_small import PACKAGED

RECIPE = """
name = "split"
objective = [{objective}]

[data]
source = "npz"
path = "clothes.npz"

[data.augment]
crop = 1
views = 1

[teacher]
arch = "conv-w12-d1-k3"
epochs = 2

[train]
epochs = 4
batch_size = 64

[export]
calibration_samples = 64
parity_samples = 64
{targets}
"""
ARCH = "conv-w8-d1-k3"
TARGET = '\n[[target]]\nname = "{name}"\ndevice = "{device}"\narch = "' + ARCH + '"\n'
DEVICES = {"here": "this-machine", "pi": "raspberry-pi-5", "rtx": "rtx-4060-laptop"}
INT8 = {"here": ["int8"], "pi": ["int8"], "rtx": ["int8-fp16", "int8-fp32"]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "names"),
    [
        ('{kind = "lelp", subclasses_per_class = 4, tau = 2.0}', ("here", "rtx")),
        ('{kind = "subclass", subclasses_per_class = 2}', ("here", "pi")),
    ],
)
def test_a_split_head_ships_in_every_precision(objective: str, names: tuple[str, ...], tmp_path: Path) -> None:
    with np.load(PACKAGED) as stored:
        images, labels = stored["train_images"][:400], stored["train_labels"][:400]
    np.savez_compressed(tmp_path / "clothes.npz", images=images, labels=labels % 3)
    targets = "".join(TARGET.format(name=name, device=DEVICES[name]) for name in names)
    recipe = tmp_path / "split.toml"
    recipe.write_text(RECIPE.format(objective=objective, targets=targets))
    run = Run(load_recipe(str(recipe)), tmp_path / "run")
    expected = run.test_logits(run.student(ARCH))
    assert expected.shape == (len(run.dataset.test), 3)
    for target, name in zip(run.targets, names, strict=True):
        found = run.plan(target)
        half = ["fp16"] if name == "rtx" else []
        assert [candidate.name for candidate in found.usable] == ["fp32", *half, *INT8[name]], found.candidates
        for candidate in found.usable:
            assert candidate.file is not None
            outputs = run.outputs(candidate.to_score or candidate.file, run.dataset.test)
            assert outputs.shape == expected.shape
            error = np.abs(outputs - expected).max() / np.abs(expected).max()
            assert error < {"fp32": 1e-4, "fp16": 2e-2, "int8": 0.2}[candidate.precision]
            operators = [node.op_type for node in onnx.load(str(candidate.file)).graph.node]
            assert "QuantizeLinear" not in operators[operators.index("ReduceMax") :]
