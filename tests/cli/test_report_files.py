"""The page, CSV and Markdown."""

from __future__ import annotations

import csv
import io
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from cli.report.html import to_html
from cli.report.schema import Report
from cli.report.svg import accuracy_latency
from cli.report.tables import CSV_COLUMNS, to_csv, to_markdown
from tests.cli.report_example import depot_nx, example, gate_pi5, line3_orin, office_rtx

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
    return example((row, gate_pi5(), office_rtx()), name=EVIL)


@pytest.mark.parametrize("report", [example(), example(()), example((depot_nx(),)), evil()])
def test_page_is_well_formed_and_self_contained(report: Report) -> None:
    text = to_html(report)
    page = parse(text)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "img", "iframe"}
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


def test_plot_is_valid_xml_with_a_title_per_point() -> None:
    root = ElementTree.fromstring(accuracy_latency(example()))
    titles = [element.text or "" for element in root.iter("title")]
    assert sum(title.startswith(("line3-orin", "gate-pi5", "office-rtx")) for title in titles) == 3
    assert not any("depot-nx" in title for title in titles)


def test_plot_needs_two_points() -> None:
    assert accuracy_latency(example((line3_orin(), depot_nx()))) == ""


def test_csv_has_a_line_per_target_and_reference_in_full_precision() -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(example()))))
    assert tuple(rows[0]) == CSV_COLUMNS
    assert [row["row"] for row in rows] == ["target"] * 4 + ["teacher", "no teacher"]
    assert float(rows[1]["latency_upper_bound_ms"]) == 32.4
    assert rows[1]["verdict"] == "FAIL"
    assert rows[3]["latency_ms"] == ""
    assert float(rows[3]["roofline_at_least_ms"]) == 0.3


def test_csv_keeps_commas_quotes_and_line_feeds() -> None:
    row = line3_orin().model_copy(update={"name": 'a "b",\nc'})
    rows = list(csv.DictReader(io.StringIO(to_csv(example((row,))))))
    assert rows[0]["name"] == 'a "b",\nc'


@pytest.mark.parametrize("report", [example(), evil()])
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
