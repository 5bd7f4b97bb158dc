"""The page in a real browser: nothing goes wrong in it, points explain themselves, and it fits a phone and paper."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cli.report.chart import METRIC, chart_data
from cli.report.html import MOST_BYTES, to_html
from cli.report.schema import EnergyValue, Report
from tests.cli.report_example import depot_nx, example, gate_pi5, latency, line3_orin, office_rtx

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def with_energy() -> Report:
    def row(target: Any, value: float) -> Any:
        energy = EnergyValue(value=value, low=value * 0.95, high=value * 1.05, how="INA3221, idle subtracted")
        return target.model_copy(update={"energy": energy})

    return example((row(line3_orin(), 3.2), row(gate_pi5(), 210.0), office_rtx(), depot_nx()))


def test_every_latency_has_an_axis_of_its_own_and_what_is_unknown_has_none() -> None:
    compute = latency(1.0, 1.1, 0.9).model_copy(update={"scope": "compute"})
    other = line3_orin().model_copy(update={"name": "other", "latency": compute})
    data = chart_data(example((line3_orin(), gate_pi5(), other, depot_nx())))
    titles = [axis["title"] for axis in data["axes"]]
    assert titles[:2] == ["p99 ms, end to end, batch 1", "p99 ms, compute only, batch 1"]
    assert titles[-1] == "top-1 %"
    assert "energy mJ" not in titles
    point = next(each for each in data["points"] if each["label"] == "depot-nx")
    assert set(point["values"]) == {METRIC, "size"}
    assert {each["set"] for each in data["points"]} == {"shipped", "tried"}
    assert [(line["title"], line["value"]) for line in data["lines"]] == [("teacher", 93.1), ("floor", 87.0)]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    executable = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if executable is None:
        pytest.skip(f"no browser is installed: {', '.join(BROWSERS)}")
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with api.sync_playwright() as playwright:
        # the tests may run as root in a container, where the sandbox cannot
        found = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def open_page(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Opens a report without a network; in the end nothing may have been logged or asked for."""
    said: list[str] = []
    contexts: list[Any] = []

    def open_it(report: Report, width: int = 1100, **options: Any) -> Any:
        file = tmp_path / "report.html"
        file.write_text(to_html(report), encoding="utf-8")
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, offline=True, **options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.append(request.url) if request.url != file.as_uri() else None)
        page.goto(file.as_uri())
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert said == []


def names(page: Any) -> list[str]:
    return [text.split(":")[0].split("\n")[0] for text in points(page)]


def points(page: Any) -> list[str]:
    return [point.get_attribute("aria-label") for point in page.locator("#chart .point").all()]


def test_points_are_reached_by_mouse_and_keyboard_and_tell_their_figures(open_page: Callable[..., Any]) -> None:
    page = open_page(with_energy())
    assert names(page) == ["line3-orin", "gate-pi5", "office-rtx"]
    assert "depot-nx" in page.locator("#chart-missing").inner_text()
    tip = page.locator(".tip")
    assert not tip.is_visible()
    page.locator("#chart .point").nth(1).hover()
    assert "gate-pi5: FAIL" in tip.inner_text()
    assert "p99 31.80 ms [31.20, 32.40], end to end, batch 1" in tip.inner_text()
    page.mouse.move(0, 0)
    assert not tip.is_visible()
    page.locator("#chart-controls select").last.focus()
    page.keyboard.press("Tab")
    assert "line3-orin: PASS" in tip.inner_text()
    page.keyboard.press("Escape")
    assert not tip.is_visible()
    # an interval on both axes, and a front that starts at the fastest
    assert page.locator("#chart .point").first.locator(".whisker").count() == 2
    assert page.locator("#chart .front").count() == 1


def test_axes_and_sets_can_be_chosen_and_filters_hold_for_the_whole_page(open_page: Callable[..., Any]) -> None:
    page = open_page(with_energy())
    across, up, show = page.locator("#chart-controls select").all()
    across.select_option(label="energy mJ")
    up.select_option(label="file size MiB")
    assert names(page) == ["line3-orin", "gate-pi5"]
    assert page.locator("#chart svg").get_attribute("aria-label") == "file size MiB over energy mJ"
    across.select_option(label="file size MiB")
    up.select_option(label="top-1 %")
    show.select_option(value="tried")
    assert names(page) == ["line3-orin, fp32", "line3-orin, fp16", "line3-orin, int8", "gate-pi5, int8"]
    page.get_by_role("checkbox", name="fp16").uncheck()
    page.get_by_role("checkbox", name="gate-pi5").uncheck()
    assert names(page) == ["line3-orin, fp32", "line3-orin, int8"]
    assert page.locator("tr[data-target=gate-pi5]:visible, .card[data-target=gate-pi5]:visible").count() == 0
    assert page.locator("tr[data-target=line3-orin]:visible").count() > 0
    for box in page.locator("#filters input").all():
        box.uncheck()
    assert "everything is filtered out" in page.locator("#chart").inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_horizontal_scrolling(open_page: Callable[..., Any], scheme: str) -> None:
    page = open_page(with_energy(), 390, color_scheme=scheme, has_touch=True)
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    wide = "[...document.querySelectorAll('.scroll')].filter((each) => each.scrollWidth > each.clientWidth + 1).length"
    assert page.evaluate(wide) == 0
    sizes = "[...document.querySelectorAll('body *')].map((each) => parseFloat(getComputedStyle(each).fontSize))"
    assert min(page.evaluate(sizes)) >= 12
    page.locator("#chart .point").first.tap()
    box = page.locator(".tip").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 390
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (scheme == "dark")


def test_on_paper_the_ground_is_white_and_all_is_open(open_page: Callable[..., Any]) -> None:
    page = open_page(with_energy(), color_scheme="dark")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.locator("#filters").is_visible()
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details:not([open])").count() > 0


def test_foreign_text_stays_text(open_page: Callable[..., Any]) -> None:
    evil = '</script><script>document.title = "taken"</script><img src=x onerror="document.title=1">'
    rows = tuple(row.model_copy(update={"name": f"{evil}{i}"}) for i, row in enumerate((line3_orin(), gate_pi5())))
    page = open_page(example(rows, name="safe"))
    assert page.title() == "safe · edgestill"
    page.locator("#chart .point").first.hover()
    assert evil in page.locator(".tip").inner_text()


def test_without_script_the_tables_are_there(open_page: Callable[..., Any]) -> None:
    page = open_page(with_energy(), java_script_enabled=False)
    assert "The chart needs JavaScript" in page.locator("#chart").inner_text()
    assert page.locator("tr[data-target=gate-pi5]").first.is_visible()


def test_a_report_without_anything_to_draw_opens(open_page: Callable[..., Any]) -> None:
    page = open_page(example(()))
    assert "nothing to compare" in page.locator("body").inner_text()


def test_a_huge_run_stays_within_the_pages_size(tmp_path: Path) -> None:
    from tests.cli.report_example import long_tail

    huge = long_tail()
    assert huge.exploration is not None
    picture = tmp_path / "explored" / "explored.png"
    picture.parent.mkdir()
    picture.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(3_000_000))
    run = huge.training[0]
    curve = tuple(run.curve[0].model_copy(update={"epoch": i / 10, "validation": 0.5}) for i in range(5000))
    row = line3_orin().model_copy(update={"environment": {f"fact {i}": "x" * 100 for i in range(20_000)}})
    text = to_html(
        example(
            (row, gate_pi5()), exploration=huge.exploration, training=(run.model_copy(update={"curve": curve}),) * 9
        ),
        tmp_path,
    )
    assert len(text.encode()) < MOST_BYTES
    assert "too large for this page" in text
    assert "the rest is in report.json" in text
