"""`edgestill study`: what is refused, and a small real study from the command line to its table."""

from __future__ import annotations

import contextlib
import csv
import importlib
import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.overrides import parse_values
from cli.pipeline import study as pipeline
from cli.pipeline.study import Study
from cli.pipeline.study_plan import plan_study
from cli.pipeline.study_report import build_study_report
from cli.recipe import load_recipe
from cli.report.study import render_study, to_csv
from cli.report.study_schema import StudyReport
from cli.study_grid import build_grid, method_label
from distill.data.load import load_dataset, open_dataset
from distill.data.make_fashion_mnist_small import PACKAGED
from distill.teachers.strategy_section import CoachedSection
from profiles.errors import EdgestillError, InputError, Interrupted
from tests.cli.cli_runner import Result, edgestill
from tests.distill.training_cases import StopAfter

RECIPE = """
name = "small"

[data]
source = "npz"
path = "clothes.npz"

[data.augment]
crop = 1
views = 2

[teacher]
arch = "conv-w12-d1-k3"
epochs = 1

[student]
arch = "conv-w8-d1-k3"

[train]
epochs = 2
batch_size = 32
"""
VARY = ("--vary", "objective=supervised,kd", "--vary", "data.train_size=60,240")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe for 400 real images of three classes."""
    folder = tmp_path_factory.mktemp("clothes")
    with np.load(PACKAGED) as stored:
        images, labels = stored["train_images"][:400], stored["train_labels"][:400]
    np.savez_compressed(folder / "clothes.npz", images=images, labels=labels % 3)
    path = folder / "small.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def finished(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """The folder of a finished study of 2 methods, 2 sizes and 2 seeds, and what the command printed."""
    folder = tmp_path_factory.mktemp("studies") / "small"
    result = edgestill("study", str(recipe), *VARY, "--seeds", "2", "--out", str(folder))
    assert result.status == 0, result.err
    return folder, result


def report_of(folder: Path) -> StudyReport:
    return StudyReport.model_validate_json((folder / "study.json").read_text())


def times(folder: Path) -> dict[str, int]:
    """When each finished cell was written."""
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns for path in sorted(folder.glob("cells/*/*/cell.json"))
    }


def scores(report: StudyReport) -> dict[tuple[str, str, int], tuple[float, float, int]]:
    return {
        (cell.method, str(cell.factors), cell.seed): (cell.test, cell.validation, cell.best_epoch)
        for cell in report.cells
    }


# -- what is asked ----------------------------------------------------------------------------------------------------


def test_values_are_split_at_commas_outside_of_brackets_and_quotes() -> None:
    text = 'supervised,{kind="kd",tau=1.0},[{kind="ec"},{kind="kd"}], 0.5 ,true,"a,b"'
    assert parse_values(text, "--vary") == (
        "supervised",
        {"kind": "kd", "tau": 1.0},
        [{"kind": "ec"}, {"kind": "kd"}],
        0.5,
        True,
        "a,b",
    )


_words = st.text("abcdefghijklmnopqrstuvwxyz_-", min_size=1, max_size=8).filter(
    lambda word: word not in ("true", "false", "inf", "nan", "-inf", "-nan")
)
_plain = st.one_of(
    st.integers(-(2**40), 2**40),
    st.booleans(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(min_codepoint=32, max_codepoint=126, exclude_characters='"\\'), max_size=12),
)
_values = st.recursive(
    _plain,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["kind", "tau", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)


def toml(value: Any) -> str:
    """A value as TOML in one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(toml(entry) for entry in value) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else repr(value)


@given(st.lists(_values, min_size=1, max_size=5))
def test_any_list_of_toml_values_comes_back_from_its_text(values: list[Any]) -> None:
    assert list(parse_values(",".join(toml(value) for value in values), "--vary")) == values


@given(st.lists(_words, min_size=1, max_size=5))
def test_words_need_no_quotes(words: list[str]) -> None:
    assert parse_values(",".join(words), "--vary") == tuple(words)


@given(st.text(st.sampled_from("ab,[]{}\"'=1 "), max_size=20))
def test_any_text_gives_values_or_an_explanation(text: str) -> None:
    with contextlib.suppress(InputError):
        assert len(parse_values(text, "--vary")) >= 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kd,,ec", "nothing between"),
        ("", "nothing between"),
        ("{kind=kd}", "not a TOML value"),
        ('{kind="kd"', "} is missing"),
        ('"kd', '" is missing'),
    ],
)
def test_what_cannot_be_read_is_explained(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_values(text, "--vary")


def test_a_recipes_settings_of_one_strategy_are_for_the_methods_that_have_it(recipe: Path) -> None:
    settings = ['teacher.strategy="lgtm"', "teacher.coached.held_out=0.1", "teacher.coached.lambda_inf=2.0"]
    vary = ["objective=kd", "teacher.strategy=frozen,online,lgtm"]
    grid = build_grid(load_recipe(str(recipe), ["teacher.kind='train'", *settings]), vary=vary)
    found = {combination.recipe.teacher.strategy: combination.recipe.teacher for combination in grid.combinations}
    assert found["frozen"].coached == CoachedSection()
    assert found["online"].coached == CoachedSection(held_out=0.1)
    assert found["lgtm"].coached == CoachedSection(held_out=0.1, lambda_inf=2.0)


def test_methods_are_named_by_kind_and_by_what_is_not_default(recipe: Path) -> None:
    vary = ["objective=supervised,ec,{kind='kd',tau=1.0},[{kind='ec',detach=false},{kind='kd'}]"]
    grid = build_grid(load_recipe(str(recipe), ["train.hard_weight=0.3"]), vary=vary)
    assert grid.methods == (
        "supervised",
        "embedding_compression",
        "kd tau=1",
        "embedding_compression detach=false+kd",
    )
    assert grid.control == "supervised"
    assert [one.hard_weight for one in grid.combinations] == [None, 0.3, 0.3, 0.3]


def test_a_control_goes_by_its_label_its_alias_or_its_table(recipe: Path) -> None:
    loaded, vary = load_recipe(str(recipe)), ["objective=ec,{kind='kd',tau=1.0}"]
    assert build_grid(loaded, vary=vary).control == "embedding_compression"
    assert build_grid(loaded, vary=vary, control="ec").control == "embedding_compression"
    assert build_grid(loaded, vary=vary, control="kd tau=1").control == "kd tau=1"
    assert build_grid(loaded, vary=vary, control="{kind='kd',tau=1.0}").control == "kd tau=1"


def test_the_recipe_says_what_is_compared_and_the_command_line_replaces_a_list(recipe: Path) -> None:
    path = recipe.with_name("table.toml")
    path.write_text(
        RECIPE
        + """
[study]
seeds = 3
control = "mixed"
[study.vary]
objective = ["supervised", {kind = "kd", tau = 1.0}]
data.train_size = [60, 120]
"train.epochs" = [1]
[[study.variant]]
name = "mixed"
set = ["train.hard_weight=0.3", 'objective=[{kind="ec"},{kind="kd"}]']
"""
    )
    loaded = load_recipe(str(path))
    grid = build_grid(loaded, vary=["data.train_size=80"])
    assert grid.methods == ("supervised", "kd tau=1", "mixed")
    assert grid.factors == {"data.train_size": (80,), "train.epochs": (1,)}
    assert (grid.control, grid.seeds) == ("mixed", 3)
    assert len(grid.combinations) == 3
    mixed = grid.combinations[2].recipe
    assert [section.kind for section in mixed.objective] == ["embedding_compression", "kd"]
    assert mixed.train.hard_weight == 0.3
    assert method_label(mixed.objective) == "embedding_compression+kd"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["nothing to compare", "--vary"]),
        (["--vary", "objective"], ["KEY=VALUE"]),
        (["--vary", "objectives=kd,ec"], ["objectives", "objective"]),
        (["--vary", "objective=supervised,kdd"], ["objective=kdd", '"kd"']),
        (["--vary", 'objective=kd,{kind="kd",taus=1}'], ["taus", "tau"]),
        (["--vary", "train.epochs=2,none"], ["train.epochs=none"]),
        (["--vary", "train.epochs=2,2"], ["train.epochs", "twice"]),
        (["--vary", "objective=kd,kd"], ["two methods are called"]),
        (["--vary", "objective=kd", "--vary", "objective=ec"], ["varied twice"]),
        (["--vary", "objective=supervised,[{kind='ec'},{kind='kd'}]"], ["embedding_compression+kd", "hard_weight"]),
        (["--vary", "objective=supervised,kd", "--control", "lelp"], ["control", "lelp"]),
        (["--vary", "objective=supervised,ec", "--set", "train.mixup=0.2"], ["embedding_compression", "train.mixup"]),
        (["--vary", "measure.threads=1,2"], ["measure.threads", "changes nothing"]),
        (["--vary", "objective=supervised,kd", "--seeds", "0"], ["--seeds"]),
        (["--vary", "objective=supervised,kd", "--jobs", "0"], ["--jobs"]),
        (["--vary", "objective=supervised,kd", "--json", "--csv", "-"], ["standard output"]),
        (["--vary", "objective=kd", "--vary", "data.train_size=60,9000"], ["9000", "data.train_size"]),
        (["--vary", "objective=kd", "--vary", "data.train_size=2,60"], ["train_size=2", "3 classes"]),
        (
            ["--vary", "data.train_size=6,60", "--set", "objective=kd", "--set", "data.imbalance=exp:100"],
            ["data.imbalance", "without a training sample"],
        ),
        (
            ["--vary", 'objective=supervised,{kind="crd",negatives=100}', "--vary", "data.train_size=60,240"],
            ["crd", "train_size=60", "negatives"],
        ),
        (["--vary", "objective=supervised,kd", "--set", "teacher.kind=none"], ["kd", "logits"]),
        (["--vary", "student.arch=conv-w8-d1-k3,conv-w8-q1"], ["student", "conv-w8-q1"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_work_is_refused_before_anything_is_trained(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], parts: list[str]
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("something was trained")

    monkeypatch.setattr("cli.pipeline.run.train", never)
    monkeypatch.setattr("cli.pipeline.study.train", never)
    # a recipe's teacher of kind "none" takes no arch
    base = ["--set", "teacher.arch=conv-w12-d1-k3"] if "teacher.kind=none" not in arguments else []
    path = recipe
    if not base:
        path = recipe.with_name("untaught.toml")
        path.write_text(RECIPE.replace('arch = "conv-w12-d1-k3"\nepochs = 1\n', ""))
    result = edgestill("-q", "study", str(path), *arguments, *base, "--out", str(tmp_path / "s"))
    assert result.status == 2, result.err
    for part in parts:
        assert part in result.err


# -- a small study ----------------------------------------------------------------------------------------------------


def test_the_table_shows_every_method_at_every_size(finished: tuple[Path, Result]) -> None:
    _, result = finished
    assert "data.train_size = 60" in result.out
    assert "data.train_size = 240" in result.out
    assert result.out.count("supervised") >= 3
    assert "over training samples" in result.out
    assert "trained on 280 samples" in result.out  # the recipe's own training split
    assert "nested parts of the 280 training samples" in " ".join(result.out.split())
    assert all(len(line) <= 80 for line in result.out.splitlines() if "study.json" not in line)


def test_the_report_command_shows_a_study_again(finished: tuple[Path, Result], tmp_path: Path) -> None:
    folder, result = finished
    shown = edgestill("report", str(folder))
    assert shown.status == 0
    assert shown.out == result.out
    assert json.loads(edgestill("report", str(folder), "--json").out)["planned"] == 8
    assert edgestill("report", str(folder), "--csv", str(tmp_path / "cells.csv")).status == 0
    assert len((tmp_path / "cells.csv").read_text().splitlines()) == 9
    refused = edgestill("report", str(folder), "--html", str(tmp_path / "page.html"))
    assert refused.status == 2
    assert "--html" in refused.err
    (tmp_path / "study.json").write_text('{"name": "half')
    damaged = edgestill("report", str(tmp_path))
    assert damaged.status == 2
    assert "damaged" in damaged.err


def test_a_study_that_learned_nothing_says_so(recipe: Path, tmp_path: Path) -> None:
    result = edgestill(
        *("study", str(recipe), "--vary", "objective=supervised,kd", "--vary", "data.train_size=3", "--seeds", "1"),
        *("--out", str(tmp_path / "s"), "--set", "train.epochs=1", "--set", "train.learning_rate=1e-9"),
    )
    words = " ".join(result.out.split())
    assert "no method is better than always answering" in words
    assert "+0.00 +0.00" not in words  # one seed has no interval


def test_the_report_holds_what_the_cells_hold(finished: tuple[Path, Result]) -> None:
    folder, _ = finished
    report = report_of(folder)
    assert (report.planned, len(report.cells), report.exit_status) == (8, 8, 0)
    assert [block.train_samples for block in report.blocks] == [60, 240]
    for block in report.blocks:
        control, kd = block.rows
        assert control.method == "supervised"
        assert control.to_control is None
        assert kd.to_control is not None
        differences = [kd.test[seed] - control.test[seed] for seed in (0, 1)]
        assert kd.to_control.difference == pytest.approx(np.mean(differences))
        assert list(kd.to_control.by_seed.values()) == pytest.approx(differences)
        assert kd.mean == pytest.approx(np.mean(list(kd.test.values())))
        assert kd.sd == pytest.approx(np.std(list(kd.test.values()), ddof=1))
        assert kd.hard_weight == 0.1
    assert report.teachers[0].train_samples == 280
    labels = open_dataset(folder / "base" / "data").test.labels
    for cell in report.cells:
        slug = f"{cell.method}--train_size={cell.factors['data.train_size']}"
        logits = np.load(folder / "cells" / slug / f"seed-{cell.seed}" / "test_logits.npy")
        assert logits.dtype == np.float32
        assert cell.test == pytest.approx((logits.argmax(1) == labels).mean())


def test_trainings_leave_neither_weights_nor_checkpoints(finished: tuple[Path, Result]) -> None:
    folder, _ = finished
    assert not list(folder.glob("cells/**/*.safetensors"))
    assert not list(folder.glob("cells/**/*.pt"))
    assert len(list(folder.glob("cells/*/*"))) == 8


def test_a_finished_study_is_only_read(finished: tuple[Path, Result], recipe: Path) -> None:
    folder, _ = finished
    before = times(folder)
    result = edgestill("-q", "study", str(recipe), *VARY, "--seeds", "2", "--out", str(folder), "--json")
    assert result.status == 0
    assert times(folder) == before
    assert scores(StudyReport.model_validate(json.loads(result.out))) == scores(report_of(folder))


def test_more_seeds_and_more_values_leave_finished_cells_alone(
    finished: tuple[Path, Result], recipe: Path, tmp_path: Path
) -> None:
    folder, _ = finished
    before = times(folder)
    table = tmp_path / "cells.csv"
    grown = ("--vary", "objective=supervised,kd,ec", "--vary", "data.train_size=60,240")
    result = edgestill("-q", "study", str(recipe), *grown, "--seeds", "3", "--out", str(folder), "--csv", str(table))
    assert result.status == 0, result.err
    after = times(folder)
    assert len(after) == 18
    assert {name: after[name] for name in before} == before
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 18
    assert {row["method"] for row in rows} == {"supervised", "kd", "embedding_compression"}
    assert {row["data.train_size"] for row in rows} == {"60", "240"}
    assert all(0 <= float(row["test"]) <= 1 for row in rows)


def test_a_dry_run_tells_what_is_done_and_writes_nothing(
    finished: tuple[Path, Result], recipe: Path, tmp_path: Path
) -> None:
    folder, _ = finished
    asked = ("--vary", "objective=supervised,dkd", "--vary", "data.train_size=60,240", "--seeds", "2", "--dry-run")
    result = edgestill("-q", "study", str(recipe), *asked, "--out", str(folder))
    lines = [" ".join(line.split()) for line in result.out.splitlines()]
    assert "supervised, train_size=60 2 of 2 done" in lines
    assert any(line.startswith("dkd, train_size=240 0 of 2 done about") for line in lines)
    assert "4 of 8 cells are done" in result.out
    elsewhere = edgestill("-q", "study", str(recipe), *asked, "--out", str(tmp_path / "new"), "--json")
    assert json.loads(elsewhere.out)["done"] == 0
    assert json.loads(elsewhere.out)["seconds"] is None
    assert not (tmp_path / "new").exists()


def test_another_setting_makes_the_cells_anew(finished: tuple[Path, Result], recipe: Path) -> None:
    folder, _ = finished
    study = Study(load_recipe(str(recipe)), folder, vary={"objective": ["supervised"], "data.train_size": [60, 240]})
    changed = Study(
        load_recipe(str(recipe), ["train.weight_decay=0.1"]),
        folder,
        vary={"objective": ["supervised"], "data.train_size": [60, 240]},
        replace_others=True,
    )
    assert [job.key for job in study.prepare()] != [job.key for job in changed.prepare()]


def test_cells_of_other_settings_are_not_reported(finished: tuple[Path, Result], recipe: Path) -> None:
    folder, _ = finished
    vary: dict[str, list[Any]] = {"objective": ["supervised", "kd"], "data.train_size": [60, 240]}
    same = build_study_report(Study(load_recipe(str(recipe)), folder, vary=vary, seeds=2))
    assert len(same.cells) == 8
    other = build_study_report(Study(load_recipe(str(recipe), ["train.epochs=7"]), folder, vary=vary, seeds=2))
    assert (other.cells, other.blocks, other.teachers) == ((), (), ())


def test_what_decides_a_cell_beside_its_recipe_is_in_its_key(
    finished: tuple[Path, Result], recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vary: dict[str, list[Any]] = {"objective": ["supervised", "kd"], "data.train_size": [60, 240]}
    study = Study(load_recipe(str(recipe)), finished[0], vary=vary, seeds=2, replace_others=True)
    built: list[int] = []
    real = pipeline.build_student

    def counted(*arguments: Any, **options: Any) -> Any:
        built.append(options["seed"])
        return real(*arguments, **options)

    monkeypatch.setattr(pipeline, "build_student", counted)
    before = [job.key for job in study.prepare()]
    assert built == [0, 1]  # eight cells, one student
    assert len(study.finished()) == 8
    monkeypatch.setattr(pipeline, "TRAINING_FORM", -1)
    assert not set(before) & {job.key for job in study.prepare()}
    assert not study.finished()
    assert plan_study(Study(load_recipe(str(recipe)), finished[0], vary=vary, seeds=2)).done == 0


NETWORK = """
from torch import nn

class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(784, 8), ACTIVATION())
        self.head = nn.Linear(8, 3)
        INITIAL

    def forward(self, x):
        return self.head(self.body(x)FACTOR)
"""


def test_a_changed_network_of_ones_own_makes_the_cells_anew(recipe: Path, tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    student = 'kind = "torch"\nfactory = "study_network:Network"'
    text = RECIPE.replace('path = "clothes.npz"', f'path = "{recipe.parent / "clothes.npz"}"')
    path.write_text(text.replace('arch = "conv-w8-d1-k3"', student))
    keys = []
    for words in (
        {"ACTIVATION": "nn.ReLU", "INITIAL": "pass", "FACTOR": ""},
        {"ACTIVATION": "nn.ReLU", "INITIAL": "nn.init.zeros_(self.body[1].bias)", "FACTOR": ""},
        {"ACTIVATION": "nn.GELU", "INITIAL": "pass", "FACTOR": ""},
        {"ACTIVATION": "nn.ReLU", "INITIAL": "pass", "FACTOR": ".abs() * 2"},
        {"ACTIVATION": "nn.ReLU", "INITIAL": "pass", "FACTOR": ""},
    ):
        source = NETWORK
        for name, word in words.items():
            source = source.replace(name, word)
        (tmp_path / "study_network.py").write_text(source)
        sys.modules.pop("study_network", None)
        importlib.invalidate_caches()
        vary = {"objective": ["supervised"]}
        study = Study(load_recipe(str(path)), tmp_path / "s", vary=vary, seeds=1, allow_code=True)
        keys.append(study.prepare()[0].key)
    sys.modules.pop("study_network", None)
    assert len(set(keys)) == 4
    assert keys[0] == keys[-1]


def test_a_students_arch_of_its_target_is_a_setting(recipe: Path, tmp_path: Path) -> None:
    path = recipe.with_name("target.toml")
    vary = {"objective": ["supervised"]}
    found = set()
    for arch in ('arch = "conv-w8-d1-k3"', 'arch = "conv-w12-d1-k3"', "", 'device = "raspberry-pi-5"'):
        path.write_text(RECIPE.replace('arch = "conv-w8-d1-k3"', "") + f'\n[[target]]\nname = "a"\n{arch}\n')
        study = Study(load_recipe(str(path)), tmp_path / "s", vary=vary, seeds=1)
        found.add(study.settings_key(study.grid.combinations[0], 0))
    assert len(found) == 4


def test_a_larger_training_set_than_the_recipes_own_tells_what_is_made_anew(recipe: Path, tmp_path: Path) -> None:
    loaded = load_recipe(str(recipe), ["train.epochs=1", "data.train_size=60"])

    def run(*sizes: int) -> list[str]:
        progress = StopAfter(10_000)
        vary: dict[str, Any] = {"objective": ["supervised"], "data.train_size": sizes}
        Study(loaded, tmp_path / "s", vary=vary, seeds=2, progress=progress, replace_others=True).train()
        return [note for note in progress.notes if "anew" in note]

    assert run(30) == []
    assert run(30, 60) == []
    note = "4 finished cells belong to a smaller training split (60 samples, now 90) and are made anew"
    assert run(30, 60, 90) == [note]
    assert run(30, 60, 90) == []


@pytest.mark.parametrize(
    ("key", "method"),
    [("train.epochs=1", "supervised"), ("teacher.epochs=2", "supervised"), ("teacher.epochs=2", "kd")],
)
def test_finished_trainings_of_other_settings_and_their_teacher_are_not_replaced_unasked(
    key: str, method: str, finished: tuple[Path, Result], recipe: Path, tmp_path: Path
) -> None:
    folder, _ = finished
    copy = tmp_path / "s"
    shutil.copytree(folder, copy)
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file()}
    asked = ("study", str(recipe), "--out", str(copy), "--vary", f"objective={method}", "--set", key, "--seeds", "1")
    refused = edgestill(*asked, "--vary", "data.train_size=60")
    assert refused.status == 2
    assert "other settings" in refused.err
    assert "--replace" in refused.err
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file()} == before
    assert edgestill(*asked, "--vary", "data.train_size=60", "--replace").status == 0


def test_a_csv_into_a_folder_that_is_not_there_is_told_before_training(recipe: Path, tmp_path: Path) -> None:
    result = edgestill(
        "study", str(recipe), *VARY, "--csv", str(tmp_path / "no" / "x.csv"), "--out", str(tmp_path / "s")
    )
    assert result.status == 2
    assert "--csv" in result.err
    assert not (tmp_path / "s").exists()


def test_a_smaller_training_set_follows_the_seed_of_the_splits(recipe: Path, tmp_path: Path) -> None:
    rows = {}
    for seed, overrides in ((0, []), (0, ["data.split_seed=0"]), (1, ["data.split_seed=0"]), (1, [])):
        loaded = load_recipe(str(recipe), [f"seed={seed}", *overrides])
        vary: dict[str, list[Any]] = {"objective": ["supervised"], "data.train_size": [60]}
        (job,) = Study(loaded, tmp_path / f"{seed}{len(overrides)}", vary=vary, seeds=1).prepare()
        found = pipeline._modules(job)[0].train.rows
        assert found is not None
        rows[seed, bool(overrides)] = found.tolist()
    assert rows[0, False] == rows[0, True] == rows[1, True] != rows[1, False]


def test_an_interruption_counts_the_cells_of_this_recipe_alone(recipe: Path, tmp_path: Path) -> None:
    vary: dict[str, list[Any]] = {"objective": ["supervised"], "data.train_size": [60]}
    Study(load_recipe(str(recipe), ["train.epochs=1"]), tmp_path / "s", vary=vary, seeds=2).train()
    other = Study(
        load_recipe(str(recipe)), tmp_path / "s", vary=vary, seeds=2, progress=StopAfter(2), replace_others=True
    )
    with pytest.raises(Interrupted, match="0 of 2 cells are done"):
        other.train()


def test_two_names_of_one_method_tie_on_every_seed(recipe: Path, tmp_path: Path) -> None:
    path = recipe.with_name("twice.toml")
    path.write_text(RECIPE + '\n[[study.variant]]\nname = "again"\nset = ["objective=supervised"]\n')
    asked = ("--vary", "objective=supervised", "--seeds", "2", "--set", "train.epochs=1", "--set", "data.train_size=60")
    result = edgestill("-q", "study", str(path), *asked, "--out", str(tmp_path / "s"))
    assert result.status == 0, result.err
    row = report_of(tmp_path / "s").blocks[0].rows[1].to_control
    assert row is not None
    assert (row.wins, row.ties, row.n) == (0, 2, 2)
    assert "0/2, 2 ties" in result.out
    assert "again: the same on every seed" in result.out
    assert "too few" not in result.out
    assert "the seeds share the training samples: no interval covers another draw" in " ".join(result.out.split())


def test_every_teacher_is_reported_with_its_accuracy_and_its_time(recipe: Path, tmp_path: Path) -> None:
    asked = ("--vary", "objective=supervised,kd,subclass", "--seeds", "1", "--set", "train.epochs=1")
    result = edgestill("-q", "study", str(recipe), *asked, "--set", "data.train_size=60", "--out", str(tmp_path / "s"))
    assert result.status == 0, result.err
    plain, again = report_of(tmp_path / "s").teachers
    assert (plain.methods, plain.subclasses) == (("kd",), None)
    assert again.methods == ("subclass",)
    assert again.subclasses
    for teacher in (plain, again):
        assert teacher.test is not None
        assert teacher.test > 0
        assert teacher.seconds is not None
        assert teacher.seconds > 0
    out = " ".join(result.out.split())
    assert "teacher of kd: conv-w12-d1-k3, trained on 60 samples in" in out
    assert f"teacher of subclass: conv-w12-d1-k3, trained with {again.subclasses} subclasses per class on 60" in out
    assert "time of one student's training, without its teacher's" in out
    assert "the seeds share the training samples, teacher and augmented views" in out


def test_classes_that_cannot_be_split_are_refused_before_any_student_is_trained(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine samples of three classes vary in six directions; the embedding itself has more."""

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a student was trained")

    monkeypatch.setattr("cli.pipeline.study.train", never)
    vary = ("--vary", "objective=supervised,lelp", "--vary", "data.train_size=60,9", "--seeds", "1")
    result = edgestill("-q", "study", str(recipe), *vary, "--out", str(tmp_path / "s"))
    assert result.status == 2, result.err
    for part in ("lelp, train_size=9", "objective[0].subclasses_per_class", "6 or fewer"):
        assert part in " ".join(result.err.split())


def test_smaller_training_sets_are_parts_of_larger_ones_and_share_cache_and_data(
    finished: tuple[Path, Result], recipe: Path
) -> None:
    folder, _ = finished
    study = Study(load_recipe(str(recipe)), folder, vary={"objective": ["kd"], "data.train_size": [60, 240]}, seeds=1)
    small, large = study.prepare()
    few, cached_few, *_ = pipeline._modules(small)
    many, cached_many, *_ = pipeline._modules(large)
    assert few.train.rows is not None
    assert many.train.rows is not None
    assert set(few.train.rows.tolist()) < set(many.train.rows.tolist())
    shares = [np.bincount(data.train.labels) / len(data.train) for data in (few, many)]
    assert np.abs(shares[0] - shares[1]).max() < 0.05
    assert cached_few is not None
    assert cached_many is not None
    assert cached_few.folder == cached_many.folder
    where = {row: place for place, row in enumerate(many.train.rows.tolist())}
    places = [where[row] for row in few.train.rows.tolist()]
    assert cached_few.train_logits is not None
    assert cached_many.train_logits is not None
    assert np.array_equal(cached_few.train_logits, cached_many.train_logits[:, places])


def test_a_stopped_study_goes_on_and_ends_as_if_it_had_not_been(
    finished: tuple[Path, Result], recipe: Path, tmp_path: Path
) -> None:
    """Ctrl-C in the middle of the third training: two cells are kept, the third goes on from its checkpoint."""
    folder, _ = finished

    def study(progress: Any = None) -> Study:
        vary: dict[str, list[Any]] = {"objective": ["supervised", "kd"], "data.train_size": [60, 240]}
        return Study(load_recipe(str(recipe)), tmp_path / "s", vary=vary, seeds=1, progress=progress)

    study().prepare()  # the teacher is there; what follows counts steps of students
    stop = StopAfter(15)
    with pytest.raises(Interrupted, match="2 of 4 cells are done"):
        study(stop).train()
    kept = times(tmp_path / "s")
    assert len(kept) == 2
    assert list((tmp_path / "s").glob("cells/*/*.partial/checkpoint.pt"))
    resumed = StopAfter(10_000)
    report = study(resumed).run()
    assert any("resumed" in note for note in resumed.notes)
    after = times(tmp_path / "s")
    assert len(after) == 4
    assert {name: after[name] for name in kept} == kept
    whole = {
        key: value for key, value in scores(report_of(folder)).items() if key[2] == 0 and "embedding" not in key[0]
    }
    assert scores(report) == whole


def test_a_training_that_fails_is_named_and_the_others_go_on(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = pipeline.train

    def failing(*arguments: Any, **options: Any) -> Any:
        if options["seed"] == 1 and options["title"].startswith("kd"):
            raise EdgestillError("the loss is not a number any more", where="epoch 1")
        return real(*arguments, **options)

    monkeypatch.setattr(pipeline, "train", failing)
    asked = ("--vary", "objective=supervised,kd", "--seeds", "2", "--set", "train.epochs=1")
    result = edgestill("study", str(recipe), *asked, "--out", str(tmp_path / "s"))
    assert result.status == 1
    assert "kd, seed 1: the loss is not a number any more" in " ".join(result.out.split())
    assert "3 of 4 cells" in result.out
    report = report_of(tmp_path / "s")
    assert [cell.label for cell in report.failed] == ["kd, seed 1"]
    row = report.blocks[0].rows[1]
    assert row.to_control is not None
    assert row.to_control.n == 1
    monkeypatch.setattr(pipeline, "train", real)
    assert edgestill("-q", "study", str(recipe), *asked, "--out", str(tmp_path / "s")).status == 0


def test_settings_of_data_and_teacher_get_a_base_of_their_own(recipe: Path, tmp_path: Path) -> None:
    vary = {"objective": ["supervised", "kd"], "teacher.epochs": [1, 2]}
    study = Study(load_recipe(str(recipe), ["train.epochs=1"]), tmp_path / "s", vary=vary, seeds=1)
    report = study.run()
    bases = sorted(path.name for path in (tmp_path / "s").iterdir() if path.name.startswith("base"))
    assert bases[0] == "base"
    assert len(bases) == 2
    assert [teacher.factors for teacher in report.teachers] == [{"teacher.epochs": 1}, {"teacher.epochs": 2}]
    assert len(report.blocks) == 2
    plain = [block.rows[0].test for block in report.blocks]
    assert plain[0] == plain[1]  # the plain student does not see the teacher


def test_every_size_of_a_long_tail_is_the_data_of_a_run_with_it(recipe: Path, tmp_path: Path) -> None:
    """train_size first, then the tail is thinned out of it; the base is not a part of another size's."""
    loaded = load_recipe(str(recipe), ["data.imbalance=exp:4", "train.epochs=1"])
    vary = {"objective": ["supervised", "kd"], "data.train_size": [60, 120]}
    study = Study(loaded, tmp_path / "study", vary=vary, seeds=1)
    report = study.run()
    assert report.exit_status == 0, report.failed
    assert len(list((tmp_path / "study").glob("base*/teacher"))) == 2
    for size in (60, 120):
        asked = load_recipe(str(recipe), ["data.imbalance=exp:4", f"data.train_size={size}"]).recipe
        expected = load_dataset(asked.data, seed=asked.seed, base=loaded.base, folder=tmp_path / str(size))
        counts = np.bincount(expected.train.labels)
        assert counts[0] // 4 == counts[2]
        (one,) = (
            combination for combination in study.grid.combinations if combination.label == f"kd, train_size={size}"
        )
        dataset = study.base(one).dataset
        assert np.array_equal(dataset.train.rows, expected.train.rows)  # type: ignore[arg-type]
        assert np.array_equal(dataset.test.rows, expected.test.rows)  # type: ignore[arg-type]
        found = {
            cell.read().train_samples for cell in study.cells if cell.combination.factors["data.train_size"] == size
        }
        assert found == {len(expected.train)}
    assert any("every train_size of a long-tailed training split has data and teacher" in note for note in report.notes)
    assert not any("nested parts" in note for note in report.notes)


def test_several_labels_are_judged_by_map(recipe: Path, tmp_path: Path) -> None:
    with np.load(PACKAGED) as stored:
        images, labels = stored["train_images"][:300], stored["train_labels"][:300]
    several = np.stack([labels % 2, labels % 3 == 0, labels > 5], axis=1).astype(np.uint8)
    known = np.random.default_rng(0).random(several.shape) < 0.9
    np.savez_compressed(tmp_path / "several.npz", images=images, labels=several, mask=known)
    path = tmp_path / "several.toml"
    path.write_text(RECIPE.replace("clothes.npz", "several.npz").replace("[data]", '[data]\ntask = "multilabel"', 1))
    asked = ("--vary", "objective=supervised,kd", "--vary", "data.train_size=60,200", "--seeds", "2")
    result = edgestill("-q", "study", str(path), *asked, "--out", str(tmp_path / "s"))
    assert result.status == 0, result.err
    report = report_of(tmp_path / "s")
    assert report.metric == "mAP"
    row = report.blocks[0].rows[1]
    assert row.to_control is not None
    low, high = row.to_control.samples_interval
    assert low <= row.to_control.difference <= high
    assert "mAP %" in result.out


def test_kept_students_can_be_loaded(recipe: Path, tmp_path: Path) -> None:
    asked = ("--vary", "objective=supervised", "--seeds", "1", "--set", "train.epochs=1", "--keep-students")
    assert edgestill("-q", "study", str(recipe), *asked, "--out", str(tmp_path / "s")).status == 0
    assert list((tmp_path / "s").glob("cells/supervised/seed-0/student/student.safetensors"))


# -- several processes ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(finished: tuple[Path, Result], recipe: Path, tmp_path: Path) -> None:
    asked = ("study", str(recipe), *VARY, "--seeds", "2", "--jobs", "2", "--out", str(tmp_path / "s"))
    assert edgestill("-q", *asked).status == 0
    ours, alone = scores(report_of(tmp_path / "s")), scores(report_of(finished[0]))
    assert len(ours) == 8
    assert ours == {cell: alone[cell] for cell in ours}


@pytest.mark.slow
def test_ctrl_c_stops_every_process_and_the_same_command_goes_on(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    command = [sys.executable, "-m", "cli.app", "study", str(recipe), "--vary", "objective=supervised,kd"]
    command += ["--seeds", "1", "--jobs", "2", "--out", str(folder), "--set", "data.train_size=60"]
    command += ["--set", "train.epochs=200", "--set", "train.checkpoint_every=10"]
    # a shell's background jobs ignore Ctrl-C, and so would what they start
    stop = signal.SIGTERM if signal.getsignal(signal.SIGINT) is signal.SIG_IGN else signal.SIGINT
    working = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while not list(folder.glob("cells/*/*.partial/checkpoint.pt")) and time.monotonic() < deadline:
        time.sleep(0.02)
    working.send_signal(stop)
    out, _ = working.communicate(timeout=60)
    assert working.returncode == 130, out
    assert "the same command goes on" in out
    assert "Traceback" not in out
    assert list(folder.glob("cells/*/*.partial/checkpoint.pt"))
    alone = ["1" if before == "--jobs" else word for before, word in itertools.pairwise(command[2:])]
    done = edgestill(*alone)
    assert done.status == 0, done.err
    assert len(times(folder)) == 2


# -- how it looks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 100, 120])
@pytest.mark.parametrize("ascii_only", [False, True])
def test_no_line_is_wider_than_the_terminal(finished: tuple[Path, Result], width: int, ascii_only: bool) -> None:
    report = report_of(finished[0]).model_copy(update={"folder": "runs/small"})
    renamed = [
        block.model_copy(
            update={"rows": tuple(row.model_copy(update={"method": row.method + " tau=1" * 8}) for row in block.rows)}
        )
        for block in report.blocks
    ]
    long = report.model_copy(
        update={"blocks": tuple(renamed), "methods": tuple(name + " tau=1" * 8 for name in report.methods)}
    )
    for shown in (report, long):
        text = render_study(shown, width=width, ascii_only=ascii_only)
        assert max(len(line) for line in text.splitlines()) <= width
        assert text.isascii() or not ascii_only


def test_colours_are_only_added(finished: tuple[Path, Result]) -> None:
    import re

    report = report_of(finished[0])
    coloured = render_study(report, color=True)
    assert "\x1b[" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == render_study(report)


def test_more_methods_than_marks_go_by_letters(finished: tuple[Path, Result]) -> None:
    report = report_of(finished[0])
    many = tuple(f"method {number}" for number in range(12))
    rows = [
        tuple(block.rows[0].model_copy(update={"method": name, "to_control": None}) for name in many)
        for block in report.blocks
    ]
    blocks = tuple(block.model_copy(update={"rows": row}) for block, row in zip(report.blocks, rows, strict=True))
    text = render_study(report.model_copy(update={"methods": many, "blocks": blocks}))
    assert "a method 0" in text
    assert "l method 11" in text


def test_the_csv_of_a_report_has_a_row_per_cell(finished: tuple[Path, Result]) -> None:
    report = report_of(finished[0])
    assert len(to_csv(report).splitlines()) == 1 + len(report.cells)
