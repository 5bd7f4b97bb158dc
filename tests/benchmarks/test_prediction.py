"""The benchmark of the predictor, with a few models: what it compares, writes and draws."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from cli.pipeline.calibrate import Effort, calibrate
from cli.pipeline.calibration_models import sample_architectures
from profiles.progress import Silent
from tests.benchmarks.prediction.__main__ import QUICK, compare, unseen_architectures, write
from tests.benchmarks.prediction.report import Compared, markdown, scatter, tables


def compared(model: str, precision: str, measured: float, error: float, family: str = "conv") -> Compared:
    return Compared(
        model=model,
        family=family,
        precision=precision,
        predicted_ms=measured * (1 + error),
        measured_ms=measured,
        predicted_p99_ms=measured * 1.5,
        measured_p99_ms=measured * 1.25,
        predicted_mib=66.0,
        measured_mib=60.0,
        spread=0.01,
        undisturbed=0.8,
        whole_ms=1.1 * measured,
        left_out_ms=measured * (1 + 2 * error),
    )


def test_tables_tell_errors_by_precision_and_left_out_family() -> None:
    found = tables([
        *(compared(f"a{i}", "fp32", 0.1 * 2**i, 0.05) for i in range(4)),
        compared("b", "fp32", 7.0, -0.2, "text"),
        compared("a0", "int8", 0.1, 0.1),
    ])  # fmt: skip
    assert found["unseen"]["fp32"]["median_error"] == pytest.approx(0.05)
    assert found["unseen"]["fp32"]["models"] == 5
    assert found["left_out"]["fp32"]["conv"]["median_error"] == pytest.approx(0.10)
    assert found["left_out"]["fp32"]["text"]["median_error"] == pytest.approx(0.40)
    assert found["unseen"]["int8"]["rank_correlation"] is None
    assert found["p99"]["median_error"] == pytest.approx(0.2)
    assert found["p99_covered"] == 1.0
    assert found["memory"]["median_error"] == pytest.approx(0.1)


def test_the_page_says_at_once_what_was_met_and_what_was_missed() -> None:
    found = [
        *(compared(f"a{i}", precision, 0.1 * 2**i, 0.05) for i in range(4) for precision in ("fp32", "int8")),
        compared("b", "int8", 7.0, 0.2, "text"),
    ]
    own = {"models": 36, "median_error": 0.09, "p90_error": 0.21, "rank_correlation": 0.99}
    calibration = {"seconds": 246.0, "models": 104, "threads": 1, "spread": 0.02, "undisturbed": 0.6}
    document = {
        "command": "a test", "date": "today", "machine": "one", "versions": "none", "busy": None,
        "calibration": {**calibration, "held_out": {"fp32": own}}, "tables": tables(found),
        "models": [one.model_dump() for one in found],
    }  # fmt: skip
    page = markdown(document)
    sentence = next(line for line in page.splitlines() if line.startswith("**"))
    assert "5.0% (fp32) and 5.0% (int8) against the medians of undisturbed queries" in sentence
    assert "against those of all queries" in sentence
    assert "9.0% (fp32), which misses the targets in fp32" in sentence
    assert "text in int8 (40.0%) missed the target" in sentence
    assert "was not recorded" in page
    document["calibration"]["other_cores"] = 0.3  # type: ignore[index]
    assert "Other processes kept 0.3 cores busy meanwhile." in markdown(document)


def test_a_point_on_the_diagonal_is_drawn_there(tmp_path: Path) -> None:
    scatter([compared("a", "fp32", 0.1, 0.0), compared("b", "int8", 10.0, 0.0)], tmp_path / "plot.png")
    image = Image.open(tmp_path / "plot.png").convert("RGB")
    blue = [(x, y) for x in range(image.width) for y in range(image.height) if image.getpixel((x, y)) == (31, 95, 166)]
    assert blue
    assert all(abs(x - (image.height - y)) <= 12 for x, y in blue)


def test_unseen_architectures_are_at_least_thirty_and_unseen() -> None:
    effort = Effort()
    seen = {one.arch for one in sample_architectures(effort.per_family)}
    found = unseen_architectures(effort, 9)
    assert len(found) >= 30
    assert not seen & {one.arch for one in found}


@pytest.mark.slow
def test_a_few_models_go_through_to_the_page(tmp_path: Path) -> None:
    calibrated = calibrate("this-machine", Silent(), effort=QUICK, refuse_busy=False)
    # what is asserted are the documents, never a time
    calibrated = calibrated._replace(busy="a test does not look")
    found = compare(calibrated, unseen_architectures(QUICK, 1), QUICK, Silent())
    assert {(one.family, one.precision) for one in found} == {
        (family, precision) for family in ("conv", "textc") for precision in ("fp32", "int8")
    }
    page = write(calibrated, found, "a test", tmp_path)
    assert page.count("| fp32 |") == 3
    assert json.loads((tmp_path / "prediction.json").read_text())["tables"]["memory"]["models"] == 4
    assert (tmp_path / "prediction.md").read_text() == page
    assert (tmp_path / "prediction.png").is_file()
