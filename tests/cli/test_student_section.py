"""The `[student]` table: a pool to choose from, how it is chosen, and what does not go together."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from cli.recipe import check, load_recipe, to_toml
from distill.students.section import ChoiceSection, StudentSection
from profiles.errors import InputError


def recipe(**student: Any) -> dict[str, Any]:
    return {"name": "a", "student": student}


@pytest.mark.parametrize("pool", ["conv", ["conv", "convi"], ["conv-w8-d1-k3", "conv-w16-d1-k3"]])
def test_a_pool_is_a_kind_or_a_list_and_a_resolved_recipe_loads_again(pool: str | list[str], tmp_path: Any) -> None:
    loaded = check(recipe(pool=pool, choice={"widths": [8, 16], "finalists": 2, "margin": 1.1}), "test")
    assert loaded.student.pool == (pool if isinstance(pool, str) else tuple(pool))
    assert loaded.student.choice == ChoiceSection(widths=(8, 16), finalists=2, margin=1.1)
    file = tmp_path / "a.toml"
    file.write_text(to_toml(loaded), encoding="utf-8")
    assert load_recipe(str(file)).recipe == loaded
    assert StudentSection(**loaded.student.model_dump()) == loaded.student


def test_a_pool_can_be_given_on_the_command_line() -> None:
    student = load_recipe("quickstart", ["student.pool=conv", "student.choice.trials=5"]).recipe.student
    assert (student.pool, student.choice.trials) == ("conv", 5)
    student = load_recipe("quickstart", ['student.pool=["conv", "convi"]']).recipe.student
    assert student.pool == ("conv", "convi")


@pytest.mark.parametrize(
    ("student", "key", "message"),
    [
        ({"pool": "conv", "arch": "conv-w8-d1-k3"}, "student", '"pool" and "arch" exclude each other'),
        ({"pool": "conv", "family": "text"}, "student", '"conv" in the pool does not belong to family = "text"'),
        ({"pool": []}, "student.pool", "nothing to choose from"),
        ({"pool": 3}, "student.pool", "a pool is a kind"),
        ({"pool": ["conv", 3]}, "student.pool", "a pool is a kind"),
        ({"choice": {"finalists": 2}}, "student", "add pool ="),
        (
            {"kind": "torch", "factory": "a:b", "pool": "conv"},
            "student",
            '"pool" belongs to a student of kind "family"',
        ),
        (
            {"kind": "torch", "factory": "a:b", "choice": {"trials": 9}},
            "student",
            '"choice" belongs to a student of kind "family"',
        ),
        ({"pool": "conv", "choice": {"trials": 2}}, "student.choice", "2 trials cannot tell 3 finalists"),
        ({"pool": "conv", "choice": {"widths": []}}, "student.choice.widths", "at least 1 item"),
        ({"pool": "conv", "choice": {"margin": 0.9}}, "student.choice.margin", "greater than or equal to 1"),
        ({"pool": "conv", "choice": {"trial_share": 1.0}}, "student.choice.trial_share", "less than or equal to 0.5"),
        ({"pool": "conv", "choice": {"assumed_efficiency": 0}}, "student.choice.assumed_efficiency", "greater than 0"),
        ({"pool": "conv", "choice": {"rank": "supernets"}}, "student.choice.rank", "not a valid value"),
        ({"pool": "conv", "choice": {"finalist": 2}}, "student.choice.finalist", "unknown key"),
    ],
)
def test_what_does_not_go_together_is_refused_at_its_key(student: dict[str, Any], key: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        check(recipe(**student), "test")
    assert caught.value.where == f"test, {key}"
    assert message in caught.value.message


def test_a_family_that_the_pool_belongs_to_may_be_named() -> None:
    assert StudentSection(family="conv", pool=("conv", "convi-w8-d1-k3")).family == "conv"


def test_few_trials_are_no_mistake_where_nothing_is_tried() -> None:
    for rank in ("supernet", "capacity"):
        assert ChoiceSection(rank=rank, trials=1).trials == 1
    with pytest.raises(ValidationError, match="trials of at least 3, or finalists = 1"):
        ChoiceSection(rank="trials", trials=1)
