"""`edgestill methods`."""

from __future__ import annotations

import json
from typing import get_args

import pytest

from distill.objectives.section import describe_objectives
from distill.teachers.section import TeacherKind
from tests.cli.cli_runner import edgestill


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")


def test_all_objectives_teachers_and_students_are_listed() -> None:
    out = edgestill("methods").out
    assert all(entry.kind in out for entry in describe_objectives())
    assert out.count("(control)") == sum(entry.control for entry in describe_objectives())
    document = json.loads(edgestill("methods", "--json").out)
    assert [entry["kind"] for entry in document["objectives"]] == [entry.kind for entry in describe_objectives()]
    assert set(document["teachers"]) == set(get_args(TeacherKind))
    assert set(document["students"]) == {"family", "torch"}
    assert {"conv-w24-d2-k3", "text-w64-d2-h4"} <= set(document["architectures"])
    assert all(document["teachers"].values())


def test_every_listed_architecture_is_one_that_parses() -> None:
    from distill.students.arch import parse_arch

    for word in json.loads(edgestill("methods", "--json").out)["architectures"]:
        assert str(parse_arch(word)) == word


@pytest.mark.parametrize("entry", describe_objectives(), ids=lambda entry: entry.kind)
def test_one_objective_is_told_whole(entry: object) -> None:
    from distill.objectives.section import Description

    assert isinstance(entry, Description)
    for name in (entry.kind, *entry.aliases):
        result = edgestill("methods", name)
        words = " ".join(result.out.split())
        assert result.status == 0
        assert " ".join(entry.source.split()) in words
        assert all(parameter.name in words for parameter in entry.parameters)
        assert json.loads(edgestill("methods", name, "--json").out)["kind"] == entry.kind


def test_an_unknown_method_suggests_the_nearest() -> None:
    result = edgestill("methods", "distance_corelation")
    assert result.status == 2
    assert 'did you mean "distance_correlation"?' in result.err
