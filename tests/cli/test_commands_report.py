"""`edgestill report` on a stored report."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from cli.report.schema import Report, to_json
from tests.cli.cli_runner import Result, edgestill
from tests.cli.report_example import example, long_tail


@pytest.fixture
def run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "report.json").write_text(to_json(example()), encoding="utf-8")
    return tmp_path


def report(folder: Path, *options: str) -> Result:
    return edgestill("report", str(folder), *options)


def test_it_prints_the_report_and_exits_0_unless_asked(run_folder: Path) -> None:
    plain = report(run_folder)
    assert plain.status == 0
    assert all(row.name in plain.out for row in example().targets)
    assert plain.out == edgestill("report", str(run_folder / "report.json")).out
    assert report(run_folder, "--exit-status").status == example().exit_status == 3
    assert len(report(run_folder, "--all").out) > len(plain.out)


def test_json_is_the_document_and_nothing_else(run_folder: Path) -> None:
    result = report(run_folder, "--json")
    assert Report.model_validate_json(result.out) == example()
    assert result.err == ""


def test_files_are_written_and_a_dash_is_standard_output(run_folder: Path) -> None:
    page = run_folder / "page.html"
    written = report(run_folder, "--html", str(page), "--markdown", str(run_folder / "a.md"), "--csv", "-")
    assert written.status == 0
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert "| " in (run_folder / "a.md").read_text(encoding="utf-8")
    names = [row["name"] for row in csv.DictReader(io.StringIO(written.out))]
    assert names[: len(example().targets)] == [row.name for row in example().targets]
    assert f"wrote {page}" in written.err
    assert report(run_folder, "--html", str(page), "-q").err == ""


def test_the_page_has_the_pictures_of_the_run_folder(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(to_json(long_tail()), encoding="utf-8")
    (tmp_path / "explored").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "explored" / "explored.png")
    for run in (tmp_path, tmp_path / "report.json"):
        page = edgestill("report", str(run), "--html", "-").out
        assert page.count("data:image/png;base64,") == 1


def test_two_documents_do_not_share_standard_output(run_folder: Path) -> None:
    result = report(run_folder, "--csv", "-", "--json")
    assert result.status == 2
    assert result.out == ""


def test_a_missing_run_or_folder_is_explained(run_folder: Path) -> None:
    assert "there is no report here" in report(run_folder / "nowhere").err
    missing = report(run_folder, "--html", str(run_folder / "no" / "page.html"))
    assert missing.status == 2
    assert "mkdir" in missing.err


def test_a_damaged_report_is_explained(run_folder: Path) -> None:
    document = json.loads(to_json(example()))
    del document["targets"]
    (run_folder / "report.json").write_text(json.dumps(document))
    result = report(run_folder)
    assert result.status == 2
    assert "targets" in result.err
