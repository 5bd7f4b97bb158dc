"""The page, CSV and Markdown."""

from __future__ import annotations

import base64
import csv
import io
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from cli.report.html import to_html
from cli.report.schema import Report
from cli.report.tables import CSV_COLUMNS, to_csv, to_markdown
from tests.cli.report_example import depot_nx, example, gate_pi5, line3_orin, long_tail, office_rtx

EVIL = '<script>alert("x")</script>|`*_[a](b)&'
VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that tags are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def parse(text: str) -> Page:
    page = Page()
    page.feed(text)
    page.close()
    assert not page.open
    return page


def evil() -> Report:
    row = line3_orin().model_copy(
        update={"name": EVIL, "why": (EVIL,), "fixes": (EVIL,), "conditions": (EVIL,), "environment": {EVIL: EVIL}}
    )
    shots, exploration = long_tail().shots, long_tail().exploration
    assert shots is not None
    assert exploration is not None
    rows = (shots.rows[0].model_copy(update={"targets": (EVIL,), "arch": EVIL}), *shots.rows[1:])
    groups = (shots.groups[0].model_copy(update={"classes": (EVIL,)}), *shots.groups[1:])
    picture = exploration.pictures[0].model_copy(update={"file": EVIL, "title": EVIL})
    student = exploration.students[0].model_copy(update={"arch": EVIL, "kept_by_class": {EVIL: 0.5}})
    return example(
        (row, gate_pi5(), office_rtx()),
        name=EVIL,
        shots=shots.model_copy(update={"rows": rows, "groups": groups}),
        exploration=exploration.model_copy(
            update={"summary": EVIL, "generator": EVIL, "pictures": (picture,), "students": (student,)}
        ),
    )


@pytest.mark.parametrize("report", [example(), example(()), example((depot_nx(),)), long_tail(), evil()])
def test_page_is_well_formed_and_self_contained(report: Report) -> None:
    text = to_html(report)
    page = parse(text)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"link", "img", "iframe"}
    assert [set(attributes) for tag, attributes in page.tags if tag == "script"] == [{"type", "id"}, set()]
    assert not any(value and "http" in value for _, attributes in page.tags for value in attributes.values())
    assert "@import" not in text
    assert "url(" not in text
    assert len(text.encode()) < 2_000_000


def test_page_says_verdicts_reasons_and_fixes() -> None:
    text = parse(to_html(example())).text
    for expected in ("✓ PASS", "✗ FAIL", "? INCONCLUSIVE", "– NOT MEASURED", "latency_ms = 33, or metric_floor = 0.85"):
        assert expected in text
    assert "roofline bound: at least 0.3 ms" in text
    assert "distilling conv-w24-d2 bought +1.7 pt [+0.8, +2.6]" in text


def test_page_shows_foreign_text_as_text() -> None:
    assert EVIL in parse(to_html(evil())).text


def test_csv_has_a_line_per_target_and_reference_in_full_precision() -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(example()))))
    assert tuple(rows[0]) == CSV_COLUMNS
    assert [row["row"] for row in rows] == ["target"] * 4 + ["teacher", "no teacher"]
    assert float(rows[1]["latency_upper_bound_ms"]) == 32.4
    assert rows[1]["verdict"] == "FAIL"
    assert rows[3]["latency_ms"] == ""
    assert float(rows[3]["roofline_at_least_ms"]) == 0.3
    assert rows[0]["energy_mj"] == ""


def test_csv_keeps_commas_quotes_and_line_feeds() -> None:
    row = line3_orin().model_copy(update={"name": 'a "b",\nc'})
    rows = list(csv.DictReader(io.StringIO(to_csv(example((row,))))))
    assert rows[0]["name"] == 'a "b",\nc'


@pytest.mark.parametrize("report", [example(), long_tail(), evil()])
def test_markdown_table_has_the_same_cells_in_every_row(report: Report) -> None:
    lines = to_markdown(report).splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("| Target | Student"))
    table = lines[start : lines.index("", start)]
    assert len(table) == 2 + len(report.targets) + 2
    assert {line.replace("\\|", "").count("|") for line in table} == {10}


def test_markdown_says_verdict_bound_and_bought() -> None:
    text = to_markdown(example())
    assert "| gate-pi5 | conv-w16-d2 | int8 | 0.5 | 88.9 ±1.4 | 31.80 | 32.40 | 30 | **FAIL** |" in text
    assert "bound: 99 % confidence; ±: 95 %" in text
    assert "bought +1.7 pt [+0.8, +2.6]" in text
    assert "<script" not in to_markdown(evil())


def test_page_takes_the_runs_pictures_with_it(tmp_path: Path) -> None:
    picture = tmp_path / "explored" / "explored.png"
    picture.parent.mkdir()
    Image.new("RGB", (12, 8), (200, 30, 40)).save(picture)
    page = parse(to_html(long_tail(), tmp_path))
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(sources) == 1  # the other picture is not there
    # on a phone it keeps its size and is scrolled
    assert '<figure><div class="scroll"><img ' in to_html(long_tail(), tmp_path)
    start, data = (sources[0] or "").split(",")
    assert start == "data:image/png;base64"
    assert base64.b64decode(data) == picture.read_bytes()
    assert "explored samples at three radii explored/explored.png" in page.text
    assert "generator/reconstructions.png" in page.text


def test_page_embeds_nothing_but_pictures_and_examples_of_the_run_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "explored").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "outside.png")
    (folder / "explored" / "explored.png").write_text("no picture <b>at all</b>", encoding="utf-8")
    (folder / "examples.txt").write_text("a dull film -> <i>a fine film</i>\n", encoding="utf-8")
    report = long_tail()
    assert report.exploration is not None
    files = ("../outside.png", "explored/explored.png", "examples.txt")
    pictures = tuple(report.exploration.pictures[0].model_copy(update={"file": file}) for file in files)
    exploration = report.exploration.model_copy(update={"pictures": pictures})
    page = parse(to_html(report.model_copy(update={"exploration": exploration}), folder))
    assert not any(tag in ("img", "b", "i") for tag, _ in page.tags)
    assert "no picture" not in page.text
    assert "a dull film -> <i>a fine film</i>" in page.text


def test_page_says_how_the_tail_fares_and_what_was_kept() -> None:
    text = parse(to_html(long_tail())).text
    assert "Mean recall of classes with many and few training samples" in text
    for words in ("97.2 ±0.9", "66.0 ±2.4", "few: 3 classes, 4 to 17", "few: shelf 9, shelf 10, shelf 11"):
        assert words in text
    assert "students explored: random, sigma 1" in text
    assert "generator: vae, 32 latents; kept 83 %, least of shelf 11: 41 %" in text
    assert "Exploration" not in parse(to_html(example())).text


def test_csv_has_the_groups_in_full_precision_and_the_exploration() -> None:
    rows = {row["name"] or row["row"]: row for row in csv.DictReader(io.StringIO(to_csv(long_tail())))}
    report = long_tail()
    assert report.shots is not None
    few = report.shots.rows[0].metrics["few"]
    assert float(rows["line3-orin"]["few_shot_value"]) == few.value
    assert float(rows["line3-orin"]["few_shot_low"]) == few.low
    assert int(rows["line3-orin"]["few_shot_n"]) == 500
    assert float(rows["no teacher"]["few_shot_value"]) == 0.66
    assert rows["office-rtx"]["few_shot_value"] == ""
    assert {rows[name]["exploration"] for name in ("line3-orin", "depot-nx")} == {"random"}
    assert next(csv.DictReader(io.StringIO(to_csv(example()))))["exploration"] == "none"


def test_markdown_has_a_table_of_the_groups() -> None:
    text = to_markdown(long_tail())
    assert "| line3-orin | conv-w24-d2 | int8 | 97.2 ±0.9 | 91.5 ±1.6 | 78.3 ±2.4 |" in text
    assert "| _no teacher_ | conv-w24-d2 | fp32 | 97.3 ±0.9 | 89.2 ±1.6 | 66.0 ±2.4 |" in text
    assert "students explored: random, sigma 1" in text
    assert "Mean recall" not in to_markdown(example())
