"""How a report tells why a target got its student from the pool; figures invented."""

from __future__ import annotations

from cli.pipeline.limits import missed
from cli.report.html import to_html
from cli.report.schema import Attempt, RankedStudent, RejectedStudent, Report, Selection, SharedTraining, Sharing
from cli.report.terminal import render_text
from cli.report.words import choice_rows, selection_lines, sharing_note
from distill.students.arch import parse_arch
from distill.students.choose import Option, fitting, nearest_miss
from distill.students.pool import Cost, Limits
from profiles.device import TargetSection
from tests.cli.report_example import example

CHOSEN = Attempt(
    arch="conv-w16-d1-k3",
    name="int8",
    precision="int8",
    metric=0.884,
    latency_ms=0.31,
    source="measured",
    passes=True,
    chosen=True,
)
OVER = CHOSEN.model_copy(
    update={
        "arch": "conv-w24-d1-k3",
        "name": "fp32",
        "metric": 0.9,
        "chosen": False,
        "passes": False,
        "problem": "latency 0.46 ms, limit 0.4 ms: FAIL",
    }
)
REJECTED = tuple(
    RejectedStudent(
        arch=f"conv-w{width}-d2-k3",
        precision="fp32",
        reason=f"latency ~{width / 40:g} ms, limit 0.4",
        limit="latency_ms",
        needs=width / 40,
        allowed=0.4,
        source="calibrated",
    )
    for width in (24, 32, 48)
)
SELECTION = Selection(
    pool=56,
    fitting=12,
    source="calibrated",
    ranked=(RankedStudent(arch="conv-w16-d1-k3", by="trial", score=0.8, epochs=2, validation=0.884),),
    attempts=(OVER, CHOSEN),
    rejected=REJECTED,
    shared_with=("door-pi5",),
)
SHARING = Sharing(
    trainings=(
        SharedTraining(role="teacher", arch="conv-w32-d1-k3", epochs=8, seconds=60.0, targets=("a", "b")),
        SharedTraining(role="trial", arch="conv-w16-d1-k3", epochs=1, seconds=4.0, targets=("a", "b")),
        SharedTraining(role="student", arch="conv-w16-d1-k3", epochs=12, seconds=30.0, targets=("a", "b"), kept=True),
        SharedTraining(role="student", arch="conv-w8-d1-k3", epochs=12, seconds=10.0, targets=("b",)),
        SharedTraining(role="qat", arch="conv-w16-d1-k3", epochs=2, seconds=6.0, targets=("a",), kept=True),
    )
)


def with_selection() -> Report:
    found = example()
    row = found.targets[0].model_copy(update={"selection": SELECTION})
    return found.model_copy(update={"targets": (row, *found.targets[1:]), "sharing": SHARING})


def test_the_nearest_three_that_were_not_chosen_are_named_with_the_limit_of_each() -> None:
    lines = selection_lines(SELECTION, "conv-w16-d1-k3")
    assert lines[0] == "conv-w16-d1-k3 int8: 88.4 % on validation, the only file within the limits"
    assert "12 of 56 students fit, costs predicted by the device's calibration" in lines[1]
    assert [line for line in lines if line.startswith("not ")] == [
        "not conv-w24-d1-k3 fp32: latency 0.46 ms, limit 0.4 ms: FAIL",
        "not conv-w24-d2-k3 fp32: latency ~0.6 ms, limit 0.4",
        "not conv-w32-d2-k3 fp32: latency ~0.8 ms, limit 0.4",
    ]
    assert lines[-1] == "the same student as door-pi5"


def test_everything_shows_all_that_were_exported_ranked_and_rejected() -> None:
    rows = choice_rows(SELECTION)
    assert [row[4] for row in rows] == ["rejected", "chosen", "exported", "rejected", "rejected", "rejected"]
    text = render_text(with_selection(), show_all=True)
    assert all(word in text for word in ("conv-w48-d2-k3", "trial of 2 epochs", "Trained once"))
    assert "conv-w48-d2-k3" not in render_text(with_selection())
    assert "conv-w48-d2-k3" in to_html(with_selection())


def test_shared_trainings_are_told_with_the_time_that_they_saved() -> None:
    assert (SHARING.teacher_seconds, SHARING.seconds, SHARING.separate_seconds) == (60.0, 50.0, 84.0)
    assert "34 s saved" in sharing_note(with_selection())
    assert "34 s saved" in " ".join(render_text(with_selection()).split())
    assert sharing_note(example()) == ""


def test_what_choosing_took_is_told_against_the_students_that_were_trained_and_those_that_were_kept() -> None:
    assert (SHARING.times(), SHARING.times(kept=True)) == (50 / 40, 50 / 30)
    note = sharing_note(with_selection())
    assert "1.25 times those of the students that were trained in full and 1.67 times those of the kept ones" in note
    assert [each.title for each in SHARING.trainings[2:]] == ["student, kept", "student, not kept", "for INT8"]
    assert Sharing(trainings=SHARING.trainings[:1]).times() is None


def test_rejected_members_that_are_not_listed_are_counted() -> None:
    assert choice_rows(SELECTION.model_copy(update={"left_out": 1234}))[-1][0] == "1,234 more"


def test_students_that_were_trained_but_not_exported_are_counted_as_trained() -> None:
    more = RankedStudent(arch="conv-w20-d1-k3", by="trial", score=0.8, epochs=2, validation=0.88)
    lines = selection_lines(
        SELECTION.model_copy(update={"ranked": (*SELECTION.ranked, more), "untried": 1}), "conv-w16-d1-k3"
    )
    assert "3 students trained in full" in lines[1]
    assert "cheaper and not tried: 1 student that fits" in lines


def test_what_only_an_assumption_excludes_is_not_said_to_fail() -> None:
    option = Option(parse_arch("conv-w8-d1-k3"), "int8", Cost(latency_ms=0.2, latency_bound_ms=0.05, source="assumed"))
    limits = Limits(latency_ms=0.1)
    miss = nearest_miss(fitting([option], limits)[1], limits)
    assert miss is not None
    (verdict,) = missed(TargetSection(name="there", latency_ms=0.1), miss)
    assert (verdict.verdict, verdict.value) == ("not measured", 0.2)
    assert "by an assumed efficiency" in verdict.reason


def test_where_nothing_fits_the_nearest_fails_its_limits_and_the_others_are_not_measured() -> None:
    option = Option(parse_arch("conv-w8-d1-k3"), "int8", Cost(file_mib=0.1, latency_ms=0.2, source="measured"))
    limits = Limits(latency_ms=0.1, file_mib=1.0)
    _, rejected = fitting([option], limits)
    miss = nearest_miss(rejected, limits)
    assert miss is not None
    section = TargetSection(name="here", latency_ms=0.1, file_size_mib=1.0)
    verdicts = {verdict.name: verdict for verdict in missed(section, miss)}
    assert (verdicts["latency_ms"].verdict, verdicts["latency_ms"].value) == ("fail", 0.2)
    assert "fresh weights" in verdicts["latency_ms"].reason
    assert verdicts["file_size_mib"].verdict == "not measured"
