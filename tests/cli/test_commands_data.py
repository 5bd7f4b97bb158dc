"""`edgestill data`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distill.data.catalogue import list_catalogue
from tests.cli.cli_runner import edgestill


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGESTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "100")


def test_the_catalogue_is_listed_with_what_is_here() -> None:
    assert edgestill("data") == edgestill("data", "list")
    places = {entry["name"]: entry["place"] for entry in json.loads(edgestill("data", "--json").out)}
    assert list(places) == [entry.name for entry in list_catalogue()]
    assert Path(places["fashion-mnist-small"]).is_file()
    assert places["movie-snippets"] is None


@pytest.mark.parametrize("entry", list_catalogue(), ids=lambda entry: entry.name)
def test_licence_and_citation_are_shown(entry: object) -> None:
    from distill.data.catalogue import CatalogueEntry

    assert isinstance(entry, CatalogueEntry)
    words = " ".join(edgestill("data", "show", entry.name).out.split())
    assert entry.licence in words
    assert entry.citation in words
    assert json.loads(edgestill("data", "show", entry.name, "--json").out)["licence"] == entry.licence


def test_what_ships_needs_no_fetching() -> None:
    result = edgestill("data", "fetch", "fashion-mnist-small", "--json")
    assert result.status == 0
    assert Path(json.loads(result.out)["place"]).is_file()
    assert "source = " in edgestill("data", "fetch", "fashion-mnist-small").out


def test_an_unknown_data_set_suggests_the_nearest() -> None:
    result = edgestill("data", "fetch", "fashion-mnist-smal")
    assert result.status == 2
    assert "fashion-mnist-small" in result.err
