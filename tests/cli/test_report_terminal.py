"""The terminal's report: its layout, and that it holds in every width, colour and encoding."""

from __future__ import annotations

import io
import re
from html import unescape
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from cli.report.html import to_html
from cli.report.plot import plot_lines
from cli.report.schema import LatencyValue, LimitVerdict, Report, TargetRow
from cli.report.tables import to_markdown
from cli.report.terminal import Style, print_report, render_text, terminal_width, wants_color
from cli.report.verdict import overall_verdict
from cli.report.words import duration, milliseconds, shot_title
from profiles.shots import FEW, MANY
from tests.cli.report_example import depot_nx, example, gate_pi5, line3_orin, long_tail, office_rtx

GOLDEN = Path(__file__).with_name("report_80.txt")
ANSI = re.compile(r"\x1b")
MAKERS = (line3_orin, gate_pi5, office_rtx, depot_nx)


def crowd(count: int, name: str = "a-camera-with-a-very-long-name-over-the-shelf-{}") -> Report:
    """Many targets with long names, long architectures and latencies from 0.01 to 10,000 ms."""
    rows = []
    for index in range(count):
        row = MAKERS[index % 4]()
        changes: dict[str, object] = {"name": name.format(index), "arch": "convi-w160-d24-k5"}
        if row.latency is not None:
            point = 0.011 * 4.3**index % 9999
            changes["latency"] = row.latency.model_copy(update={"point": point, "upper_bound": point * 1.02})
        rows.append(row.model_copy(update=changes))
    return example(tuple(rows))


def test_layout_at_80_columns_is_the_agreed_one() -> None:
    assert render_text(example(), width=80) == GOLDEN.read_text(encoding="utf-8")


@pytest.mark.parametrize("width", [76, 80, 100, 120, 200])
@pytest.mark.parametrize("count", [0, 1, 2, 4, 15])
@pytest.mark.parametrize("ascii_only", [False, True])
@pytest.mark.parametrize(
    "name", ["t{}", "a-camera-with-a-very-long-name-over-the-shelf-{}", "カメラの棚の名前はとても長い-{}"]
)
def test_nothing_is_wider_than_the_terminal(width: int, count: int, ascii_only: bool, name: str) -> None:
    text = render_text(crowd(count, name), width=width, ascii_only=ascii_only, show_all=True)
    too_wide = [line for line in text.splitlines() if cell_len(line) > width]
    assert not too_wide


@pytest.mark.parametrize("show_all", [False, True])
def test_ascii_output_is_ascii(show_all: bool) -> None:
    row = line3_orin().model_copy(update={"name": "läden-α", "conditions": ("58 °C", "≥ 3 µs")})
    text = render_text(example((row, gate_pi5(), office_rtx())), ascii_only=True, show_all=show_all)
    assert text.isascii()
    assert "+ laden-?" in text
    assert "x gate-pi5" in text
    assert "+-1.2" in text


def test_plain_output_has_no_escape_codes_and_no_trailing_space() -> None:
    text = render_text(example(), show_all=True)
    assert not ANSI.search(text)
    assert all(line == line.rstrip() for line in text.splitlines())


def test_colour_changes_nothing_but_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")  # the caller has asked for colour, which is the last word
    coloured = render_text(example(), width=80, color=True)
    assert ANSI.search(coloured)
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == render_text(example(), width=80)


def test_escape_codes_in_names_do_not_reach_the_terminal() -> None:
    row = line3_orin().model_copy(update={"name": "red\x1b[31m\nline", "why": ("bell\a",)})
    text = render_text(example((row,)), color=False)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)


def test_verdicts_are_told_by_mark_and_word() -> None:
    text = render_text(example())
    for start, end in (("✓ line3", "PASS"), ("✗ gate", "FAIL"), ("? office", "INCONCL."), ("- depot", "not run")):
        assert any(line.startswith(start) and line.endswith(end) for line in text.splitlines())
    assert "INCONCLUSIVE" in render_text(example(), width=120)


def test_roofline_bound_is_never_in_the_latency_column() -> None:
    text = render_text(example((depot_nx(),)))
    row = next(line for line in text.splitlines() if line.startswith("- depot-nx"))
    assert "0.3" not in row
    assert "roofline bound: at least 0.3 ms" in text


@pytest.mark.parametrize(("rows", "said"), [((), "no measured"), ((line3_orin(), depot_nx()), "one measured")])
def test_fewer_than_two_points_are_not_plotted(rows: tuple[TargetRow, ...], said: str) -> None:
    lines = plot_lines(example(rows), 80)
    assert len(lines) == 1
    assert said in lines[0]


def test_different_percentiles_stand_with_their_values() -> None:
    latency = LatencyValue(percentile=95, point=20.0, upper_bound=21.0, lower_bound=19.0, scope="compute", batch=8)
    limits = (LimitVerdict(name="latency_ms", limit=30.0, value=20.0, verdict="pass"),)
    other = gate_pi5().model_copy(update={"latency": latency, "limits": limits, "verdict": "pass"})
    text = render_text(example((line3_orin(), other)))
    assert "latency ms" in text
    assert "p99 2.31" in text
    assert "p95 20.00" in text
    assert "compute only, batch 8: gate-pi5" in text
    assert "not all points timed alike" in text


def test_failed_limit_other_than_latency_is_explained() -> None:
    limits = (
        LimitVerdict(name="latency_ms", limit=4.0, value=2.31, low=2.27, high=2.38, verdict="pass"),
        LimitVerdict(name="file_size_mib", limit=0.5, value=0.9, verdict="fail"),
    )
    row = line3_orin().model_copy(update={"limits": limits, "verdict": overall_verdict(limits), "why": ()})
    assert "file size 0.9 MiB, limit 0.5 MiB: FAIL" in render_text(example((row,)))


def test_error_of_a_target_is_shown_with_its_reason() -> None:
    row = line3_orin().model_copy(
        update={"verdict": "error", "error": "the builder ran out of memory", "latency": None}
    )
    text = render_text(example((row, gate_pi5())))
    assert "! line3-orin" in text
    assert "the builder ran out of memory" in text
    assert "exit status 1" in text


def test_targets_on_one_device_share_their_provenance() -> None:
    twin = line3_orin().model_copy(update={"name": "line4-orin"})
    text = render_text(example((line3_orin(), twin)))
    assert text.count("JetPack 6.2.1") == 1
    assert "line3-orin, line4-orin:" in text
    assert "TensorRT 10.3.0, 15W, 58 °C\n" in text
    warmer = twin.model_copy(update={"conditions": ("71 °C",)})
    assert "TensorRT 10.3.0, 15W\n    line3-orin: 58 °C\n    line4-orin: 71 °C\n" in render_text(
        example((line3_orin(), warmer))
    )


def test_unstable_measurement_says_so() -> None:
    row = line3_orin()
    assert row.latency is not None
    row = row.model_copy(update={"latency": row.latency.model_copy(update={"stable": False})})
    assert "never became stable" in " ".join(render_text(example((row,))).split())


def test_all_shows_candidates_limits_stages_and_training() -> None:
    text = " ".join(render_text(example(), show_all=True).split())
    for expected in (
        "Candidates, metric on the validation split",
        "12 % slower than int8, which keeps the floor",
        "the limit lies within the interval after 20,000 runs",
        "metric floor 91.4 90.2 to 92.6 87 % PASS",
        "peak memory: fall of MemAvailable",
        "5,200 2 min",
        "data 1.2 s cached",
    ):
        assert expected in text


def test_long_paths_are_broken_only_at_spaces() -> None:
    folder = "runs of mine/" + "shelf-camera-" * 8
    text = render_text(example(folder=folder), width=80)
    command = text[text.index("edgestill report ") :].replace(" \\\n ", "")
    assert " ".join(command.split()) == f"edgestill report '{folder}' --html report.html"


@given(st.floats(1e-3, 1e4), st.floats(1e-3, 1e4))
def test_printed_latency_looks_equal_to_its_limit_only_when_it_is(value: float, limit: float) -> None:
    limit = round(limit, 2)
    if abs(value - limit) > 1e-6:
        assert float(milliseconds(value, limit).replace(",", "")) != limit


@given(st.text(min_size=1, max_size=60), st.integers(4, 40), st.booleans())
@settings(max_examples=200)
def test_cut_text_is_one_printable_line_that_fits(text: str, width: int, ascii_only: bool) -> None:
    style = Style(80, ascii_only)
    cut = style.cut(style.clean(text), width)
    assert cell_len(cut) <= width
    assert len(cut.splitlines()) <= 1


def test_plot_gives_every_target_a_place_even_when_crowded() -> None:
    report = crowd(40, "t{}")
    text = "\n".join(plot_lines(report, 80))
    measured = [row.name for row in report.targets if row.latency is not None]
    assert all(re.search(rf"\b{name}\b", text) for name in measured)


class Stream(io.StringIO):
    """A text stream that may claim to be a terminal; `io.StringIO` has no encoding of its own."""

    def __init__(self, terminal: bool, encoding: str) -> None:
        super().__init__()
        self._terminal, self._encoding = terminal, encoding

    def isatty(self) -> bool:
        return self._terminal

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "TERM"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_pipe_gets_80_columns_without_colour(environment: pytest.MonkeyPatch) -> None:
    pipe = Stream(False, "utf-8")
    print_report(example(), pipe)
    assert pipe.getvalue() == GOLDEN.read_text(encoding="utf-8")


def test_terminal_gets_colour_unless_told_otherwise(environment: pytest.MonkeyPatch) -> None:
    terminal = Stream(True, "utf-8")
    assert wants_color(terminal)
    environment.setenv("NO_COLOR", "1")
    assert not wants_color(terminal)
    environment.delenv("NO_COLOR")
    environment.setenv("TERM", "dumb")
    assert not wants_color(terminal)


def test_columns_variable_decides_the_width(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("COLUMNS", "100")
    assert terminal_width(Stream(False, "utf-8")) == 100


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_other_encodings_get_ascii(environment: pytest.MonkeyPatch, encoding: str) -> None:
    stream = Stream(False, encoding)
    print_report(example(), stream)
    assert stream.getvalue().isascii()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (8.14, "8.1 s"), (61, "61 s"), (100, "2 min"), (3600, "60 min"), (7500, "2 h 05 min")],
)
def test_durations_have_two_units_at_most(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize("width", [76, 80, 100, 120])
@pytest.mark.parametrize("ascii_only", [False, True])
def test_a_long_tail_fits_in_every_width_and_encoding(width: int, ascii_only: bool) -> None:
    found = long_tail()
    assert found.shots is not None
    names = tuple(f"a-camera-with-a-very-long-name-{index}" for index in range(5))
    first = found.shots.rows[0].model_copy(update={"targets": names, "arch": "package.module:a_function_of_mine"})
    shots = found.shots.model_copy(update={"rows": (first, *found.shots.rows)})
    text = render_text(found.model_copy(update={"shots": shots}), width, ascii_only=ascii_only, show_all=True)
    assert not [line for line in text.splitlines() if cell_len(line) > width]
    assert text.isascii() or not ascii_only


def test_classes_with_many_and_few_training_samples_have_a_table() -> None:
    text = render_text(long_tail(), width=80)
    start = text.index("Mean recall % of classes")
    table = text[start : text.index("\n\n", start)].splitlines()
    assert table[1].split() == ["many", "medium", "few"]
    assert table[2].split() == ["line3-orin", "conv-w24-d2", "int8", "97.2", "±0.9", "91.5", "±1.6", "78.3", "±2.4"]
    assert [line.split("  ")[1] for line in table[2:6]] == ["line3-orin", "gate-pi5", "teacher", "no teacher"]
    assert "many: 4 classes, 231 to 4,000; medium: 5 classes, 24 to 98;" in " ".join(text.split())
    assert "many (> 100)" in render_text(long_tail(), width=120)
    assert "Mean recall" not in render_text(example())


def test_the_groups_limits_are_those_that_they_were_made_with() -> None:
    assert (shot_title("many"), shot_title("few")) == (f"many (> {MANY})", f"few (< {FEW})")
    assert shot_title("medium") == f"medium ({FEW} to {MANY})"


def test_a_group_without_test_samples_has_no_figure() -> None:
    found = long_tail()
    assert found.shots is not None
    row = found.shots.rows[0]
    bare = row.model_copy(update={"metrics": {name: row.metrics[name] for name in ("many", "medium")}})
    text = render_text(found.model_copy(update={"shots": found.shots.model_copy(update={"rows": (bare,)})}))
    assert any(
        line.startswith("  line3-orin  conv-w24-d2  int8  97.2") and line.endswith(" -") for line in text.split("\n")
    )


def test_the_exploration_and_its_pictures_are_named() -> None:
    words = " ".join(render_text(long_tail()).split())
    assert "students explored: random, sigma 1, around the training samples, filtered by confidence" in words
    assert "generator: vae, 32 latents; kept 83 %, least of shelf 11: 41 %" in words
    assert "look at runs/shelf-camera/explored/explored.png" in words
    assert "explored" not in render_text(example())


def test_notes_that_the_exploration_repeats_are_left_out_and_others_stay() -> None:
    found = long_tail()
    assert found.exploration is not None
    notes = (
        f"explores: {found.exploration.summary}",
        "explored samples at three radii: /elsewhere/runs/shelf-camera/explored/explored.png",
        "explore.filter keeps 83 % of the further inputs, least of shelf 11: 41 %",
        "2 of 300 unlabelled samples are also in the test split",
    )
    text = render_text(found.model_copy(update={"notes": notes}))
    assert text.count("note: ") == 1
    assert "note: 2 of 300 unlabelled samples" in text
    assert render_text(example(notes=notes)).count("note: ") == 4


def test_classes_of_which_a_filter_keeps_next_to_nothing_are_named_in_every_form() -> None:
    found = long_tail()
    assert found.exploration is not None
    by_class = {"shelf 1": 0.0, "shelf 2": 0.02, "shelf 3": 0.05, "shelf 4": 0.9}
    student = found.exploration.students[0].model_copy(update={"kept": 0.24, "kept_by_class": by_class})
    update = {"exploration": found.exploration.model_copy(update={"students": (student,)})}
    # without a long tail, too
    for report in (found.model_copy(update=update), found.model_copy(update={**update, "shots": None})):
        text = " ".join(render_text(report).split())
        for form in (text, unescape(to_html(report)), to_markdown(report)):
            assert "kept 24 %, least of shelf 1: 0 %, shelf 2: 2 %, shelf 3: 5 %" in form
            assert "less than 5 % is kept of shelf 1, shelf 2, too little to learn from" in form
            assert "a smaller explore.sigma, or a smaller explore.threshold" in form
    assert "too little to learn from" not in render_text(long_tail())


def test_the_exploration_without_filter_says_nothing_of_keeping_and_a_control_is_called_so() -> None:
    found = long_tail().exploration
    assert found is not None
    plain = found.model_copy(
        update={"kind": "augmented", "control": True, "generator": "", "summary": "augmented", "students": ()}
    )
    words = " ".join(render_text(long_tail().model_copy(update={"exploration": plain})).split())
    assert "students explored: augmented (control)" in words
    assert "kept 83" not in words
    assert "generator:" not in words


def test_training_names_teacher_strategy_and_exploration() -> None:
    student = example().training[1].model_copy(update={"strategy": "lgtm", "exploration": "random"})
    assert student.title == "student (lgtm, random)"
    text = render_text(example(training=(student,)), width=120, show_all=True)
    assert "student (lgtm, random)" in text
