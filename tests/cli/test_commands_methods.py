"""`edgestill methods`."""

from __future__ import annotations

import json
from typing import get_args

import pytest

from cli import complete
from distill.exploration.section import CONTROLS, GENERATED, ExploreDescription, ExploreKind, describe_explorations
from distill.objectives.section import describe_objectives
from distill.teachers.section import TeacherKind
from tests.cli.cli_runner import edgestill


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")


def test_all_objectives_teachers_and_students_are_listed() -> None:
    out = edgestill("methods").out
    assert all(entry.kind in out for entry in describe_objectives())
    assert out.count("(control)") == sum(entry.control for entry in describe_objectives()) + len(CONTROLS)
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


def test_explorations_are_listed_with_their_source_and_controls_as_such() -> None:
    out = edgestill("methods").out
    table = out[out.index("\nExploration ") : out.index("\nTeacher  ")]
    words = " ".join(table.split())
    for entry in describe_explorations():
        assert entry.kind in words
    assert "arXiv 2208.06825" in words
    assert table.count("(control)") == len(CONTROLS) == 3
    document = json.loads(edgestill("methods", "--json").out)["explorations"]
    assert [entry["kind"] for entry in document] == list(get_args(ExploreKind))
    assert {entry["kind"] for entry in document if entry["control"]} == CONTROLS


@pytest.mark.parametrize("entry", describe_explorations(), ids=lambda entry: entry.kind)
def test_one_exploration_is_told_with_the_keys_that_its_kind_reads(entry: ExploreDescription) -> None:
    result = edgestill("methods", entry.kind)
    words = " ".join(result.out.split())
    assert f'explore.kind = "{entry.kind}"' in words
    assert " ".join(entry.source.split()) in words
    assert ("explore.sigma" in words) == (entry.kind in ("random", "gradient"))
    assert ("explore.generator.latent" in words) == (entry.kind in GENERATED)
    assert ("there to be compared with" in words) == (entry.kind in CONTROLS)
    assert json.loads(edgestill("methods", entry.kind, "--json").out)["kind"] == entry.kind


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("GTN", ["generic"]),
        ("gtn", ["generic"]),
        ("LGTM", ["lgtm"]),
        ("MetaDistil", ["meta"]),
        ("Lelp", ["lelp"]),
        ("EC", ["embedding_compression"]),
        ("Distance-Correlation", ["distance_correlation"]),
        ("TGT", ["random", "gradient"]),
        ("east", ["distance_correlation", "cosine_difference"]),
    ],
)
def test_published_names_are_found_in_any_case(name: str, kinds: list[str]) -> None:
    document = json.loads(edgestill("methods", name, "--json").out)
    found = document if isinstance(document, list) else [document]
    assert [entry["kind"] for entry in found] == kinds
    shown = edgestill("methods", name)
    assert shown.status == 0
    assert shown.out.count("in a recipe") == len(kinds)


def test_what_two_explorations_share_is_told_once_and_values_are_named() -> None:
    words = " ".join(edgestill("methods", "tgt").out.split())
    for name in ("explore.weight", "explore.filter", "explore.sigma", "explore.generator.latent"):
        assert words.count(f"{name} ") == 1, name
    shared, random, gradient = (
        words.index(heading)
        for heading in ("Setting (random, gradient)", "Setting (random alone)", "Setting (gradient alone)")
    )
    assert shared < words.index("explore.generator.width") < random
    assert random < words.index("explore.generator.mask") < gradient < words.index("explore.steps")
    for value in (
        "none drops nothing",
        "agreement:",
        "confidence:",
        "vae (",
        "torch (",
        "masked-lm for",
        "head, or all",
    ):
        assert value in words, value
    told = " ".join(edgestill("methods", "gradient").out.split())
    assert "explore.generator.mask" not in told
    assert "explore.generator.latent" in told


def test_no_two_methods_share_the_name_that_a_recipe_gives_them() -> None:
    document = json.loads(edgestill("methods", "--json").out)
    kinds = [entry["kind"] for group in ("objectives", "strategies", "explorations") for entry in document[group]]
    assert len(kinds) == len(set(kinds))
    for kind in kinds:
        assert json.loads(edgestill("methods", kind.upper(), "--json").out)["kind"] == kind


def test_a_mistyped_published_name_suggests_it() -> None:
    assert 'did you mean "gtn"?' in edgestill("methods", "GTNN").err


@pytest.mark.parametrize(
    ("typed", "found"), [("gr", ["gradient"]), ("GT", ["GTN"]), ("tg", ["tgt"]), ("recon", ["reconstructed"])]
)
def test_completion_knows_methods_in_the_case_that_is_typed(typed: str, found: list[str]) -> None:
    assert complete.methods(typed) == found
