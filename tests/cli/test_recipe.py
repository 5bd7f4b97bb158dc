"""The recipe: what is accepted, and what a mistake is answered with."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cli.recipe import builtin_recipes, check, load_recipe, to_toml
from profiles.errors import InputError


def write(folder: Path, text: str) -> str:
    path = folder / "shelf.toml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", builtin_recipes())
def test_every_built_in_recipe_is_valid_and_survives_being_stored(name: str) -> None:
    recipe = load_recipe(name).recipe
    assert check(tomllib.loads(to_toml(recipe)), "stored") == recipe


def test_an_empty_file_is_a_recipe_named_after_it(tmp_path: Path) -> None:
    loaded = load_recipe(write(tmp_path, ""))
    assert loaded.recipe.name == "shelf"
    assert loaded.recipe.objective[0].kind == "kd"
    assert loaded.recipe.target[0].device == "this-machine"
    assert loaded.base == tmp_path


def test_a_method_by_name_is_its_published_mix(tmp_path: Path) -> None:
    (objective,) = load_recipe(write(tmp_path, 'objective = "ec"')).recipe.objective
    assert objective.kind == "embedding_compression"
    assert objective.default_hard_weight == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("text", "where", "fix"),
    [
        ("objectiv = 'kd'", "objectiv", '"objective"'),
        ("[data]\nimagesize = 3", "data.imagesize", '"image_size"'),
        ("[data.augment]\nflips = true", "data.augment.flips", '"flip"'),
        ("[[objective]]\nkind = 'ec'\ndistanc = 'cosine'", "objective[0].distanc", '"distance"'),
        ("[[target]]\nname = 'a'\nlatencyms = 3", "target[0] (a).latencyms", '"latency_ms"'),
        ("[[target]]\nname = 'a'\nprecision = 'fp61'", "target[0] (a).precision", '"fp16"'),
        ("[train]\nepoch = 3", "train.epoch", '"epochs"'),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest_one(tmp_path: Path, text: str, where: str, fix: str) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe(write(tmp_path, text))
    assert caught.value.where is not None
    assert caught.value.where.endswith(where)
    assert caught.value.fix is not None
    assert fix in caught.value.fix


@pytest.mark.parametrize(
    ("text", "where", "message"),
    [
        ("seed = 'x'", "seed", "integer"),
        ("[train]\nepochs = 0", "train.epochs", "greater than or equal to 1"),
        ("[train]\nepochs = 'many'", "train.epochs", "integer"),
        ("objective = 'ecc'", "objective", "ecc"),
        ("[[target]]\ndevice = 'jetson-nano'", "target[0].name", "missing"),
        ("[[target]]\nname = 'a'\n[[target]]\nname = 'a'", "target", 'two targets are called "a"'),
        ("[[target]]\nname = 'a'\npercentile = 42", "target[0] (a).percentile", "50, 90, 95, 99, 99.9"),
    ],
)
def test_a_wrong_value_is_named_with_its_key(tmp_path: Path, text: str, where: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe(write(tmp_path, text))
    assert where in (caught.value.where or "")
    assert message in str(caught.value)


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe(write(tmp_path, "seed = 'x'\n[train]\nepoch = 3"))
    assert "2 mistakes" in caught.value.message
    assert "seed" in (caught.value.evidence or "")
    assert "train.epoch" in (caught.value.evidence or "")


def test_a_recipe_that_is_not_toml_is_told_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not valid TOML") as caught:
        load_recipe(write(tmp_path, "name = x\nseed = 1"))
    assert "line 1" in (caught.value.evidence or "")


def test_a_missing_recipe_is_answered_with_the_built_in_ones() -> None:
    with pytest.raises(InputError) as caught:
        load_recipe("quikstart")
    assert "quickstart" in (caught.value.fix or "")
    with pytest.raises(InputError, match="no recipe"):
        load_recipe("nowhere/shelf.toml")


def test_overrides_reach_tables_and_entries_by_name_and_position(tmp_path: Path) -> None:
    path = write(tmp_path, "[[target]]\nname = 'a'\n[[target]]\nname = 'b'")
    overrides = [
        "train.epochs=3",
        "target.b.latency_ms=5",
        "target.0.batch=4",
        "objective=ec",
        "data.source=fashion-mnist",
    ]
    recipe = load_recipe(path, overrides).recipe
    assert recipe.train.epochs == 3
    assert recipe.target[1].latency_ms == 5
    assert recipe.target[0].batch == 4
    assert recipe.objective[0].kind == "embedding_compression"
    assert recipe.data.source == "fashion-mnist"


@pytest.mark.parametrize("override", ["epochs", "=3", "target.c.batch=1", "name.x=1", "target=1.2.3.4x"])
def test_a_malformed_override_is_refused(tmp_path: Path, override: str) -> None:
    path = write(tmp_path, "name = 'x'\n[[target]]\nname = 'a'")
    with pytest.raises(InputError):
        load_recipe(path, [override])


@settings(max_examples=60, deadline=None)
@given(
    key=st.sampled_from(["seed", "train.epochs", "data.source", "target.0.batch", "teacher.kind", "objective", "name"]),
    value=st.one_of(st.integers(), st.floats(), st.booleans(), st.text(max_size=8)),
)
def test_any_override_gives_a_recipe_or_a_message(
    tmp_path_factory: pytest.TempPathFactory, key: str, value: object
) -> None:
    path = write(tmp_path_factory.mktemp("recipe"), "[[target]]\nname = 'a'")
    try:
        loaded = load_recipe(path, [f"{key}={value}"])
    except InputError:
        return
    assert check(tomllib.loads(to_toml(loaded.recipe)), "stored") == loaded.recipe
