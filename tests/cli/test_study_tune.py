"""`edgestill study --tune`: as many trials for every method, validation alone, resumable, reported."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cli.pipeline import study as pipeline
from cli.pipeline import tune
from cli.pipeline.study import Study, fit
from cli.pipeline.study_report import build_study_report
from cli.recipe import load_recipe
from cli.report.study import render_study, to_csv
from cli.report.study_schema import StudyReport, TuningRow
from cli.search import Dimension, changed, defaults, propose, search_space
from cli.study_grid import Combination, build_grid
from distill.data.dataset import Split
from distill.data.make_fashion_mnist_small import PACKAGED
from distill.objectives.section import Description, describe_objectives, resolve_hard_weight
from distill.training import train
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
views = 1

[teacher]
arch = "conv-w8-d1-k3"
epochs = 1

[student]
arch = "conv-w8-d1-k3"

[train]
epochs = 1
batch_size = 32
"""
METHODS = ["supervised", "kd", "lelp"]
ASKED = ("--vary", "objective=supervised,kd,lelp", "--seeds", "1")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe for 200 real images of three classes."""
    folder = tmp_path_factory.mktemp("clothes")
    with np.load(PACKAGED) as stored:
        images, labels = stored["train_images"][:200], stored["train_labels"][:200]
    np.savez_compressed(folder / "clothes.npz", images=images, labels=labels % 3)
    path = folder / "small.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def finished(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """The folder of a study of three methods with three trials each, and what the command printed."""
    folder = tmp_path_factory.mktemp("studies") / "tuned"
    result = edgestill("study", str(recipe), *ASKED, "--tune", "3", "--out", str(folder))
    assert result.status == 0, result.err
    return folder, result


def report_of(folder: Path) -> StudyReport:
    return StudyReport.model_validate_json((folder / "study.json").read_text())


def make(recipe: Path, folder: Path, trials: int, progress: Any = None, *, methods: Any = ("kd",)) -> Study:
    return Study(load_recipe(str(recipe)), folder, vary={"objective": methods}, seeds=1, tune=trials, progress=progress)


def found(rows: tuple[TuningRow, ...]) -> list[list[tuple[Any, ...]]]:
    """What must not depend on when or where a tuning ran."""
    return [[(trial.settings, trial.validation, trial.error) for trial in row.trials] for row in rows]


def count_trainings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders of the trials that are trained from here on."""
    trained: list[str] = []

    def counted(job: Any, progress: Any) -> Any:
        trained.append(f"{job.cell.folder.parent.name}/{job.cell.folder.name}")
        return fit(job, progress)

    monkeypatch.setattr(tune, "fit", counted)
    return trained


# -- fair ------------------------------------------------------------------------------------------------------------


def test_every_method_gets_the_same_trials_and_its_defaults_first(finished: tuple[Path, Result]) -> None:
    report = report_of(finished[0])
    assert report.tune == 3
    assert [row.method for row in report.tuning] == METHODS
    assert [len(row.trials) for row in report.tuning] == [3, 3, 3]
    rates = [[trial.settings["train.learning_rate"] for trial in row.trials] for row in report.tuning]
    assert rates[0][0] == 0.002
    assert len(set(rates[0])) == 3
    assert rates[0] == rates[1] == rates[2]  # the plain student is tuned as much
    kd = report.tuning[1].trials
    assert kd[0].settings == {"train.learning_rate": 0.002, "objective.kd.tau": 4.0, "train.hard_weight": 0.1}
    assert {row.seed for row in report.tuning}.isdisjoint(cell.seed for cell in report.cells)


def test_the_cells_have_the_best_settings(finished: tuple[Path, Result]) -> None:
    report = report_of(finished[0])
    cells = {cell.method: cell for cell in report.cells}
    for row in report.tuning:
        scores = [trial.validation for trial in row.trials if trial.validation is not None]
        assert row.chosen is not None
        assert row.chosen.validation == max(scores)
        assert row.best == scores.index(max(scores))
    chosen = report.tuning[1].chosen
    assert chosen is not None
    assert cells["kd"].hard_weight == chosen.settings["train.hard_weight"]
    study = make(Path(report.recipe), finished[0], 3, methods=METHODS)
    tune.look(study)
    sections = study.grid.combinations[1].recipe.objective
    assert getattr(sections[0], "tau") == chosen.settings["objective.kd.tau"]  # noqa: B009


def test_the_first_of_equals_is_chosen(finished: tuple[Path, Result]) -> None:
    row = report_of(finished[0]).tuning[0]
    trials = [trial.model_copy(update={"validation": 0.5}) for trial in row.trials]
    study = make(Path(report_of(finished[0]).recipe), finished[0], 3, methods=METHODS)
    combination, tuning = tune._tunings(study)[0]
    assert tune._row(combination, tuning, trials).best == 0
    assert tune._chosen(combination, tune._row(combination, tuning, trials)) is combination


class _Poison:
    """A test split that nobody may look at."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"the test split's {name} was read")

    def __len__(self) -> int:
        raise AssertionError("the test split was counted")


def test_tuning_never_looks_at_the_test_split(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = make(recipe, tmp_path / "s", 2, methods=["supervised", "ec"])
    study.prepare()
    real, poison = pipeline._modules, cast("Split", _Poison())

    def poisoned(job: Any) -> Any:
        dataset, cache, student, objective = real(job)
        return replace(dataset, test=poison), cache, student, objective

    monkeypatch.setattr(pipeline, "_modules", poisoned)
    study.train()
    assert [[trial.validation is not None for trial in row.trials] for row in study.tuning] == [[True, True]] * 2
    # the cells look at it, so the same poison stops them
    assert ["the test split" in failure.error for failure in study.failures] == [True, True]
    for path in (tmp_path / "s" / "tuning").rglob("trial.json"):
        assert "test" not in json.loads(path.read_text())


def test_a_trial_keeps_its_result_alone(finished: tuple[Path, Result]) -> None:
    files = {path.name for path in (finished[0] / "tuning").rglob("*") if path.is_file()}
    assert files == {"manifest.json", "trial.json"}


# -- resumable -------------------------------------------------------------------------------------------------------


def test_a_stopped_tuning_goes_on_and_ends_as_if_it_had_not_been(
    finished: tuple[Path, Result], recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(recipe, tmp_path / "s", 3).prepare()
    with pytest.raises(Interrupted):
        make(recipe, tmp_path / "s", 3, StopAfter(7)).run()  # in the second trial: a training has five steps
    assert [path.parent.name for path in (tmp_path / "s").rglob("trial.json")] == ["trial-000"]
    trained = count_trainings(monkeypatch)
    report = make(recipe, tmp_path / "s", 3).run()
    assert trained == ["kd/trial-001", "kd/trial-002"]
    assert found(report.tuning) == found(report_of(finished[0]).tuning[1:2])
    trained.clear()
    assert edgestill("-q", "study", str(recipe), *ASKED, "--tune", "3", "--out", str(finished[0])).status == 0
    assert trained == []


def test_more_trials_keep_those_that_are_there_and_other_settings_do_not(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make(recipe, tmp_path / "s", 1).run()
    trained = count_trainings(monkeypatch)
    report = make(recipe, tmp_path / "s", 2).run()
    assert trained == ["kd/trial-001"]
    assert found(report.tuning)[0][:1] == found(first.tuning)[0]
    trained.clear()
    loaded = load_recipe(str(recipe), ["train.learning_rate=0.003"])
    vary: dict[str, list[Any]] = {"objective": ["kd"]}
    with pytest.raises(InputError, match="other settings"):
        Study(loaded, tmp_path / "s", vary=vary, seeds=1, tune=2).run()
    assert trained == []
    Study(loaded, tmp_path / "s", vary=vary, seeds=1, tune=2, replace_others=True).run()
    assert trained == ["kd/trial-000", "kd/trial-001"]


def test_a_trial_that_fails_counts_and_is_not_made_again(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*arguments: Any, **options: Any) -> Any:
        if options["seed"] == tune.SEED:
            raise EdgestillError("the loss is not a number any more", where="epoch 1")
        return train(*arguments, **options)

    monkeypatch.setattr(pipeline, "train", failing)
    report = make(recipe, tmp_path / "s", 2).run()
    (row,) = report.tuning
    assert [trial.validation for trial in row.trials] == [None, None]
    assert row.best is None
    assert report.cells[0].hard_weight == 0.1  # the defaults
    assert "2 failed, such as: the loss is not a number any more" in " ".join(render_study(report).split())
    assert report.exit_status == 0
    trained = count_trainings(monkeypatch)
    make(recipe, tmp_path / "s", 2).run()
    assert trained == []


def test_a_tuning_that_breaks_leaves_the_others_alone(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaking(*arguments: Any, **options: Any) -> Any:
        if options["title"].startswith("kd"):
            raise RuntimeError("out of memory")
        return train(*arguments, **options)

    # the cell of an earlier tuning is there, and is not one of this
    assert make(recipe, tmp_path / "s", 1, methods=["supervised", "kd"]).run().exit_status == 0
    monkeypatch.setattr(pipeline, "train", breaking)
    report = make(recipe, tmp_path / "s", 2, methods=["supervised", "kd"]).run()
    assert [(cell.label, cell.error) for cell in report.failed] == [("kd, tuning", "RuntimeError: out of memory")]
    assert [row.method for row in report.tuning] == ["supervised"]
    assert [cell.method for cell in report.cells] == ["supervised"]
    assert report.exit_status == 1


def test_the_cells_of_a_finished_tuning_are_known_without_training(finished: tuple[Path, Result], recipe: Path) -> None:
    report = build_study_report(make(recipe, finished[0], 3, methods=METHODS))
    assert found(report.tuning) == found(report_of(finished[0]).tuning)
    assert [cell.method for cell in report.cells] == METHODS
    assert not make(recipe, finished[0], 4, methods=METHODS).finished()


@pytest.mark.slow
def test_two_processes_tune_as_one_does(finished: tuple[Path, Result], recipe: Path, tmp_path: Path) -> None:
    arguments = ("study", str(recipe), *ASKED, "--tune", "3", "--jobs", "2", "--out", str(tmp_path / "s"))
    assert edgestill("-q", *arguments).status == 0
    ours, theirs = report_of(tmp_path / "s"), report_of(finished[0])
    assert [[trial.settings for trial in row.trials] for row in ours.tuning] == [
        [trial.settings for trial in row.trials] for row in theirs.tuning
    ]
    assert [len(cell.terms) for cell in ours.cells] == [len(cell.terms) for cell in theirs.cells]


# -- told ------------------------------------------------------------------------------------------------------------


def test_the_report_shows_trials_and_settings(finished: tuple[Path, Result]) -> None:
    folder, result = finished
    out = " ".join(result.out.split())
    assert f"3 trainings per method with seed {tune.SEED}, the first with its defaults" in out
    assert "3/3 tunings" in result.err
    report = report_of(folder)
    for row in report.tuning:
        assert row.chosen is not None
        assert f"learning_rate {row.chosen.settings['train.learning_rate']:g}" in out
    assert report.tuning[1].search["objective.kd.tau"] == "1 to 8, log"


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("ascii_only", [False, True])
def test_no_line_is_wider_than_the_terminal(finished: tuple[Path, Result], width: int, ascii_only: bool) -> None:
    report = report_of(finished[0]).model_copy(update={"folder": "runs/small"})
    renamed = tuple(row.model_copy(update={"method": row.method + " tau=1" * 12}) for row in report.tuning)
    text = render_study(report.model_copy(update={"tuning": renamed}), width=width, ascii_only=ascii_only)
    assert max(map(len, text.splitlines())) <= width
    assert not ascii_only or text.isascii()


def test_the_csv_has_a_row_per_training(finished: tuple[Path, Result]) -> None:
    report = report_of(finished[0])
    rows = list(csv.DictReader(io.StringIO(to_csv(report))))
    assert len(rows) == 9 + 3
    trials = [row for row in rows if row["trial"]]
    assert len(trials) == 9
    assert all(row["test"] == "" and row["seed"] == str(tune.SEED) and row["validation"] for row in trials)
    cell = next(row for row in rows if row["method"] == "kd" and not row["trial"])
    assert report.tuning[1].chosen is not None
    assert float(cell["set:objective.kd.tau"]) == report.tuning[1].chosen.settings["objective.kd.tau"]
    assert "trial" not in to_csv(report.model_copy(update={"tune": None, "tuning": ()}))


def test_a_dry_run_counts_the_trials(finished: tuple[Path, Result], recipe: Path, tmp_path: Path) -> None:
    arguments = ("study", str(recipe), *ASKED, "--dry-run", "--json", "--tune")
    plan = json.loads(edgestill(*arguments, "4", "--out", str(tmp_path / "none")).out)
    assert (plan["trials"], plan["trials_done"], plan["cells"], plan["done"]) == (12, 0, 3, 0)
    assert not (tmp_path / "none").exists()
    plan = json.loads(edgestill(*arguments, "3", "--out", str(finished[0])).out)
    assert (plan["trials"], plan["trials_done"], plan["done"], plan["seconds"]) == (9, 9, 3, 0)
    out = edgestill(*arguments[:-2], "--tune", "4", "--out", str(finished[0])).out
    assert "9 of 12 tuning trials and 0 of 3 cells are done" in out
    assert "kd, tuning" in out
    assert "for the rest" in out


def test_the_recipe_may_ask_for_it(recipe: Path, tmp_path: Path) -> None:
    loaded = load_recipe(str(recipe), ["study.tune=2"])
    assert Study(loaded, tmp_path, vary={"objective": ["kd"]}).trials == 2
    with pytest.raises(InputError, match=r"study\.tune"):
        load_recipe(str(recipe), ["study.tune=0"])


@pytest.mark.parametrize("trials", ["0", "-3"])
def test_fewer_than_one_trial_is_refused(recipe: Path, tmp_path: Path, trials: str) -> None:
    result = edgestill("study", str(recipe), *ASKED, "--tune", trials, "--out", str(tmp_path / "s"))
    assert result.status == 2
    assert f"{trials} trials" in result.err
    assert "--tune 20" in result.err
    assert not (tmp_path / "s").exists()


def test_without_optuna_the_extra_is_named(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "optuna" else real(name, *rest)
    )
    result = edgestill("study", str(recipe), *ASKED, "--tune", "2", "--out", str(tmp_path / "s"))
    assert result.status == 2
    assert "pip install 'edgestill[tune]'" in result.err
    assert not (tmp_path / "s").exists()
    assert edgestill("study", str(recipe), *ASKED, "--dry-run", "--out", str(tmp_path / "s")).status == 0


# -- what is searched ------------------------------------------------------------------------------------------------


def grid_of(recipe: Path, objective: list[Any], *overrides: str) -> tuple[Combination, ...]:
    return build_grid(load_recipe(str(recipe), overrides), vary={"objective": objective}).combinations


@pytest.mark.parametrize("entry", describe_objectives(), ids=lambda entry: entry.kind)
def test_every_method_is_searched_around_its_defaults(recipe: Path, entry: Description) -> None:
    (combination,) = grid_of(recipe, [entry.kind])
    space = search_space(combination)
    assert len(space) == len(entry.search) + 1
    assert next(iter(space)) == "train.learning_rate"
    for dimension in space.values():
        if dimension.choices:
            assert dimension.default in dimension.choices
            assert len(dimension.choices) > 1
        else:
            assert dimension.low is not None
            assert dimension.high is not None
            assert dimension.low <= float(dimension.default) <= dimension.high
    same = changed(combination, defaults(space)).recipe
    assert same.objective == combination.recipe.objective
    assert resolve_hard_weight(same.objective, same.train.hard_weight) == entry.default_hard_weight
    for end in ("low", "high"):
        ends = {key: (each.choices or (getattr(each, end),))[-1] for key, each in space.items()}
        assert changed(combination, ends).recipe != combination.recipe
    out = " ".join(edgestill("methods", entry.kind).out.split())
    assert "train.learning_rate x 1/4 to 4" in out
    document = json.loads(edgestill("methods", entry.kind, "--json").out)
    assert document["search"].keys() == entry.search.keys()


def test_what_is_compared_is_not_searched(recipe: Path) -> None:
    tau_one, plain = grid_of(recipe, [{"kind": "kd", "tau": 1.0}, "supervised"], "train.hard_weight=0.5")
    assert [*search_space(tau_one)] == ["train.learning_rate"]
    assert [*search_space(plain)] == ["train.learning_rate"]
    varied = {"train.learning_rate": [0.001, 0.01], "objective.0.tau": [2.0, 4.0]}
    for one in build_grid(load_recipe(str(recipe)), vary=varied).combinations:
        assert [*search_space(one)] == ["train.hard_weight"]
    path = recipe.parent / "variants.toml"
    variant = '\n[[study.variant]]\nname = "warm"\nset = ["objective=kd", "train.learning_rate=0.002"]\n'
    path.write_text(RECIPE + variant)
    loaded = load_recipe(str(path))
    (warm,) = build_grid(loaded).combinations
    assert [*search_space(warm, loaded.recipe.study.variant)] == ["objective.kd.tau", "train.hard_weight"]


def test_with_nothing_to_search_the_defaults_are_the_only_trial(recipe: Path, tmp_path: Path) -> None:
    vary: dict[str, list[Any]] = {"objective": ["supervised"], "train.learning_rate": [0.001]}
    report = Study(load_recipe(str(recipe)), tmp_path / "s", vary=vary, seeds=1, tune=3).run()
    assert [len(row.trials) for row in report.tuning] == [1]
    assert "nothing to search" in render_study(report)


def test_objectives_of_one_kind_go_by_their_place(recipe: Path) -> None:
    two = [[{"kind": "kd"}, {"kind": "kd", "weight": 2.0}, {"kind": "fitnet"}]]
    (combination,) = grid_of(recipe, two, "train.hard_weight=0.5")
    space = search_space(combination)
    assert [*space][1:] == ["objective.0.tau", "objective.1.tau", "objective.fitnet.weight"]
    other = changed(combination, {"objective.1.tau": 2.0}).recipe.objective
    assert [getattr(section, "tau", None) for section in other] == [4.0, 2.0, None]


SPACE = {
    "train.learning_rate": Dimension(low=0.001, high=0.016, log=True, default=0.004),
    "objective.lelp.beta": Dimension(low=0.1, high=10, log=True, default=1.0),
    "objective.lelp.subclasses_per_class": Dimension(choices=(2, 4, 8, 16), default=8),
}


@settings(max_examples=15, deadline=None)
@given(st.lists(st.none() | st.floats(0, 1), max_size=14))
def test_proposals_depend_on_what_is_known_alone_and_stay_in_their_ranges(values: list[float | None]) -> None:
    results: list[tuple[dict[str, Any], float | None]] = []
    for number, value in enumerate(values):
        chosen = defaults(SPACE) if number == 0 else propose(SPACE, results, number)
        results.append((chosen, value))
    number = max(1, len(results))
    drawn = propose(SPACE, results, number)
    assert drawn == propose(SPACE, results, number)
    assert 0.001 <= drawn["train.learning_rate"] <= 0.016
    assert 0.1 <= drawn["objective.lelp.beta"] <= 10
    assert drawn["objective.lelp.subclasses_per_class"] in (2, 4, 8, 16)
    assert float(f"{drawn['objective.lelp.beta']:.4g}") == drawn["objective.lelp.beta"]


def test_many_proposals_find_what_is_good() -> None:
    """Optuna learns from the trials: after forty of them it stands near the top of a hill off the defaults."""
    results: list[tuple[dict[str, Any], float | None]] = [(defaults(SPACE), 0.0)]
    for number in range(1, 40):
        drawn = propose(SPACE, results, number)
        away = abs(np.log(drawn["train.learning_rate"] / 0.001)) + abs(np.log(drawn["objective.lelp.beta"] / 5))
        results.append((drawn, float(-away - (drawn["objective.lelp.subclasses_per_class"] != 2))))
    late = [value for _, value in results[-10:] if value is not None]
    early = [value for _, value in results[1:11] if value is not None]
    assert np.mean(late) > np.mean(early) + 0.5
