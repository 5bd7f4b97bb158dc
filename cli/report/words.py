"""How figures and verdicts are written, once for every renderer."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable
from datetime import datetime

from rich.cells import cell_len

from cli.report.schema import (
    Attempt,
    CostSource,
    Difference,
    LatencyValue,
    LimitName,
    LimitVerdict,
    PlanStep,
    RankedStudent,
    Report,
    Selection,
    ShotGroup,
    ShotName,
    Stage,
    TargetRow,
)
from cli.report.verdict import RowVerdict
from distill.exploration.section import least_kept, starved_classes

VERDICT_WORDS: dict[RowVerdict, str] = {
    "pass": "PASS",
    "fail": "FAIL",
    "inconclusive": "INCONCLUSIVE",
    "not measured": "NOT MEASURED",
    "error": "ERROR",
}
LIMIT_TITLES: dict[LimitName, str] = {
    "latency_ms": "latency",
    "memory_mib": "memory",
    "file_size_mib": "file size",
    "energy_mj": "energy",
    "metric_floor": "metric floor",
    "max_metric_drop": "metric drop",
}
_METRIC_TITLES = {"top1": "top-1", "top5": "top-5", "macro_f1": "macro F1", "map": "mAP"}
SHOT_HEADING = "Mean recall % of classes with many and few training samples"
_SHOT_LIMITS: dict[ShotName, str] = {"many": "> 100", "medium": "20 to 100", "few": "< 20"}
NOT_THE_DEVICE = "ONNX Runtime here, not the device"
MAX_DECIMALS = 6


def metric_title(name: str) -> str:
    """The metric as the field writes it: top1 -> top-1."""
    return _METRIC_TITLES.get(name.lower(), name)


def milliseconds(value: float | None, limit: float | None = None) -> str:
    """A time in ms with three or so significant digits; more where rounding would make it look equal to its limit."""
    if value is None:
        return "-"
    decimals = 3 if value < 0.1 else 2 if value < 100 else 1 if value < 1000 else 0
    if limit is not None and value != limit:
        while decimals < MAX_DECIMALS and float(f"{value:.{decimals}f}") == limit:
            decimals += 1
    return f"{value:,.{decimals}f}"


def mebibytes(value: float | None) -> str:
    """A size in MiB: two decimals below 0.1, one below 1,000."""
    if value is None:
        return "-"
    decimals = 2 if value < 0.1 else 1 if value < 1000 else 0
    return f"{value:,.{decimals}f}"


def percent(fraction: float | None, decimals: int = 1) -> str:
    """A fraction as a percentage without its sign."""
    return "-" if fraction is None else f"{fraction * 100:.{decimals}f}"


def plain_number(value: float) -> str:
    """A number as a recipe would hold it: 4, 0.5, 1500."""
    return f"{value:.10g}"


def percentile_title(value: float) -> str:
    """99 -> p99, 99.9 -> p99.9."""
    return f"p{plain_number(value)}"


def points(difference: Difference, minus: str = "-") -> str:
    """A difference of metrics in percentage points with its interval: +1.7 pt [+0.8, +2.6]."""
    value, low, high = (f"{part * 100:+.1f}" for part in (difference.value, difference.low, difference.high))
    return f"{value} pt [{low}, {high}]".replace("-", minus)


def duration(seconds: float) -> str:
    """A duration with two units at most: 8.1 s, 13 min, 2 h 05 min."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def date(created: str) -> str:
    """ISO 8601 to "2026-11-21 14:02"; anything else is left alone."""
    try:
        return datetime.fromisoformat(created).strftime("%Y-%m-%d %H:%M")
    except ValueError:
        return created


def counts_line(report: Report) -> str:
    """ "1 pass, 1 fail, 1 inconclusive, 1 not measured"; verdicts that nobody has are left out."""
    counts = report.counts
    parts = (
        (counts.errors, "error" if counts.errors == 1 else "errors"),
        (counts.passed, "pass"),
        (counts.failed, "fail"),
        (counts.inconclusive, "inconclusive"),
        (counts.not_measured, "not measured"),
    )
    return ", ".join(f"{count} {word}" for count, word in parts if count) or "no targets"


def subject_line(report: Report) -> str:
    """ "12 classes, 2,000 test images, top-1"."""
    classes = "labels" if report.task == "multilabel" else "classes"
    return f"{report.classes:,} {classes}, {report.n_test:,} test {report.unit}s, {metric_title(report.metric)}"


def scope_words(latency: LatencyValue) -> str:
    """What was timed: "end to end, batch 1"."""
    return f"{'end to end' if latency.scope == 'end_to_end' else 'compute only'}, batch {latency.batch}"


def bound_words(latencies: Iterable[LatencyValue]) -> str:
    """ "bound: 99.8 % confidence"; rounded down, as splitting the error over several looks gives odd figures."""
    confidences = [latency.confidence for latency in latencies]
    return (
        f"bound: {plain_number(math.floor(round(min(confidences) * 1000, 6)) / 10)} % confidence" if confidences else ""
    )


def scopes(report: Report) -> dict[str, list[str]]:
    """What was timed, and for which targets: one entry unless targets differ."""
    found: dict[str, list[str]] = {}
    for row in report.targets:
        if row.latency is not None:
            found.setdefault(scope_words(row.latency), []).append(row.name)
    return found


def percentiles(report: Report) -> list[float]:
    """The percentiles that the measured targets report, each once."""
    return sorted({row.latency.percentile for row in report.targets if row.latency is not None})


def latency_limit(row: TargetRow) -> float | None:
    """The target's latency limit in ms."""
    found = row.limit("latency_ms")
    return None if found is None else found.limit


def on_other_machine(row: TargetRow) -> bool:
    """True when the row's metric was not computed on the device: such a figure carries a star."""
    return row.metric is not None and row.metric.on == NOT_THE_DEVICE


def limit_figures(limit: LimitVerdict) -> tuple[str, str, str]:
    """Value, interval and limit of one limit as text in the unit of `limit_unit`; "-" for what does not exist."""
    as_metric = limit.name in ("metric_floor", "max_metric_drop")

    def write(value: float | None) -> str:
        if as_metric:
            return percent(value)
        return milliseconds(value, limit.limit) if limit.name in ("latency_ms", "energy_mj") else mebibytes(value)

    asked = plain_number(round(limit.limit * 100, 6) if as_metric else limit.limit)
    interval = "-" if limit.low is None or limit.high is None else f"{write(limit.low)} to {write(limit.high)}"
    return write(limit.value), interval, asked


def limit_unit(limit: LimitVerdict) -> str:
    """The unit that `limit_figures` writes in."""
    if limit.name == "latency_ms":
        return "ms"
    return {"energy_mj": "mJ", "metric_floor": "%", "max_metric_drop": "pt"}.get(limit.name, "MiB")


def limit_sentence(limit: LimitVerdict) -> str:
    """One limit in words: "file size 3.1 MiB, limit 2 MiB: FAIL"."""
    value, interval, asked = limit_figures(limit)
    unit = limit_unit(limit)
    found = "not known" if limit.value is None else f"{value} {unit}"
    decided = "" if interval == "-" else f" [{interval}]"
    sentence = f"{LIMIT_TITLES[limit.name]} {found}{decided}, limit {asked} {unit}: {VERDICT_WORDS[limit.verdict]}"
    return f"{sentence}, {limit.reason}" if limit.reason else sentence


def reasons(row: TargetRow) -> list[str]:
    """Why the target has its verdict: the error, the run's own reasons, and every limit but latency that did not pass.

    The latency's figures stand in the table already, and the run explains them; one that passes without a figure says
    why.
    """
    lines = [] if row.error is None else [row.error]
    lines += row.why
    lines += [limit_sentence(limit) for limit in row.limits if limit.verdict != "pass" and limit.name != "latency_ms"]
    latency = row.limit("latency_ms")
    if latency is not None and (latency.reason if latency.verdict == "pass" else not lines):
        lines.append(limit_sentence(latency))
    return lines


def step_figures(step: PlanStep) -> list[str]:
    """Size, metric, time and outcome of one step of the precision planner."""
    return [
        mebibytes(step.size_mib),
        "-" if step.metric is None else percent(step.metric),
        "-" if step.seconds is None else duration(step.seconds),
        {True: "keeps the metric", False: "does not", None: ""}[step.keeps],
    ]


def stage_words(stage: Stage) -> str:
    """ "cached, made in 4 min"; empty for a stage that was done."""
    made = "" if stage.made_seconds is None else f", made in {duration(stage.made_seconds)}"
    return f"cached{made}" if stage.cached else ""


_COSTS: dict[CostSource, str] = {
    "measured": "measured here with fresh weights",
    "calibrated": "predicted by the device's calibration",
    "assumed": "expected",
    "bound": "known at the least",
}
_NEAREST = 3
"""Students that were not chosen, in a report that does not show all of them."""


def selection_lines(selection: Selection, arch: str) -> list[str]:
    """Why a target got this student: what it stands for, from how many it was chosen, and the nearest of the others.

    Args:
        selection: how it was chosen.
        arch: the student; where none could be made, the nearest.
    """
    chosen, passing = selection.chosen, [attempt for attempt in selection.attempts if attempt.passes]
    cost = _COSTS[selection.source]
    if selection.efficiency is not None:
        cost += f" at {percent(selection.efficiency, 0)} % of its peaks ({selection.efficiency_from})"
    fit = f"{selection.fitting} of {selection.pool} students fit, costs {cost}"
    lines = []
    if chosen is None and not selection.fitting:
        lines.append(f"none of the {selection.pool} students of the pool is within the limits, costs {cost}")
    elif chosen is None:
        lines.append(fit)
    else:
        figures = f"{arch} {chosen.name}: {percent(chosen.metric)} % on validation"
        if chosen.passes and len(passing) > 1:
            lines.append(f"{figures}, most accurate of {len(passing)} files within the limits")
        elif chosen.passes:
            lines.append(f"{figures}, the only file within the limits")
        else:
            made = count_words(len({attempt.arch for attempt in selection.attempts}))
            lines.append(f"no file of {made} is within the limits; nearest: {figures}")
        lines.append(f"{fit}; {trained_words(selection)} trained in full: {ranking_words(selection.ranked)}")
    others = [f"not {line}" for line in _over(selection) if chosen is None or line != attempt_words(chosen)]
    lines += others[:_NEAREST]
    if selection.untried:
        fit = "that fits" if selection.untried == 1 else "that fit"
        lines.append(f"cheaper and not tried: {count_words(selection.untried)} {fit}")
    if selection.shared_with:
        lines.append(f"the same student as {', '.join(selection.shared_with)}")
    return lines


def trained_words(selection: Selection) -> str:
    """ "2 students": how many that fit the target were trained in full."""
    trained = {attempt.arch for attempt in selection.attempts}
    return count_words(len(trained | {row.arch for row in selection.ranked if row.validation is not None}))


def count_words(students: int) -> str:
    """ "2 students"."""
    return f"{students} student{'' if students == 1 else 's'}"


def ranking_words(rows: Iterable[RankedStudent]) -> str:
    """How the candidates were told apart before that."""
    known = [row for row in rows if row.score is not None]
    if not known:
        return "without trials, as no more of them were candidates"
    if known[0].by == "supernet":
        return f"best of {len(known)} by their accuracy with shared weights"
    if known[0].by == "capacity":
        return f"largest of {len(known)} by multiply-adds"
    return f"best of {len(known)} in short trainings"


def attempt_words(attempt: Attempt) -> str:
    """One exported file and what is against it: "conv-w24-d1-k3 fp32: latency 0.46 ms, limit 0.4 ms: FAIL"."""
    return f"{attempt.arch} {attempt.name}: {attempt.problem}"


def _over(selection: Selection) -> list[str]:
    """What was not chosen because of a limit: first what was made, then what was not, nearest first."""
    made = [attempt_words(attempt) for attempt in selection.attempts if attempt.problem]
    return made + [f"{row.arch} {row.precision}: {row.reason}" for row in selection.rejected]


def choice_rows(selection: Selection) -> list[tuple[str, str, str, str, str, str]]:
    """All that is known of the students that a target might have got: student, file, metric %, ms, fate, reason.

    What was exported, then what was told apart before any was trained in full, then what was over a limit from the
    start, nearest first. A tilde marks a latency that was not measured.
    """
    rows = []
    for made in selection.attempts:
        mark = "" if made.source == "measured" else "~"
        latency = "-" if made.latency_ms is None else mark + milliseconds(made.latency_ms)
        fate = "chosen" if made.chosen else "passes" if made.passes else "rejected"
        rows.append((made.arch, made.name, percent(made.metric), latency, fate, made.problem))
    exported = {made.arch for made in selection.attempts}
    for row in selection.ranked:
        trained = "" if row.validation is None else f"{percent(row.validation)} % after its full training"
        if row.by == "capacity":
            figure, how = "-", "" if row.score is None else f"{row.score / 1e6:,.2f} million multiply-adds"
        else:
            figure = percent(row.score)
            how = "with shared weights" if row.by == "supernet" else ""
            if row.by == "trial":
                how = "no trial" if row.epochs is None else f"trial of {plain_number(row.epochs)} epochs"
        fate = "exported" if row.arch in exported else "trained" if row.validation is not None else "fits"
        rows.append((row.arch, "", figure, "-", fate, "; ".join(part for part in (how, trained) if part)))
    rows += [(row.arch, row.precision, "-", "-", "rejected", row.reason) for row in selection.rejected]
    if selection.left_out:
        rows.append((f"{selection.left_out:,} more", "", "-", "-", "rejected", "further from fitting, not listed"))
    return rows


def sharing_note(report: Report) -> str:
    """What choosing took beside the students' own training, and saved; empty where no student was trained."""
    sharing = report.sharing
    every, kept = (None, None) if sharing is None else (sharing.times(), sharing.times(kept=True))
    if sharing is None or every is None:
        return ""
    text = f"trainings beside the teacher's ({duration(sharing.teacher_seconds)}): {duration(sharing.seconds)}"
    text += f", {every:.2f} times those of the students that were trained in full"
    text += "" if kept is None else f" and {kept:.2f} times those of the kept ones"
    saved = sharing.separate_seconds - sharing.seconds
    if saved > 0:
        text += f"; {duration(sharing.separate_seconds)} in a run for each target ({duration(saved)} saved)"
    return text


def bound_sentence(row: TargetRow) -> str:
    """The roofline bound, in words that nobody takes for a measurement; empty when there is none."""
    if row.roofline is None:
        return ""
    limiting = "memory bandwidth" if row.roofline.limiting == "memory" else "arithmetic"
    value = row.roofline.bound_ms
    text = f"{value:.2g}" if value < 100 else f"{value:,.0f}"
    return f"not measured; roofline bound: at least {text} ms ({limiting})"


def device_words(row: TargetRow) -> str:
    """What the target runs on: device, stack, power mode."""
    return ", ".join(part for part in (row.device_title, row.stack, row.power_mode) if part)


def state_words(row: TargetRow) -> list[str]:
    """Under which conditions it was measured, or that it was not and what is known nevertheless."""
    words = list(row.conditions)
    if row.latency is not None and not row.latency.stable:
        words.append("never became stable")
    if row.latency is None and row.error is None:
        words += [bound_sentence(row) or "not measured", engine_words(row)]
    return [word for word in words if word]


def provenance(row: TargetRow) -> str:
    """Device, stack, power mode and state of a target in one line."""
    return ", ".join([device_words(row), *state_words(row)])


def energy_words(row: TargetRow) -> str:
    """Energy of one inference with its interval and sensor, or why there is none; empty where nobody looked."""
    energy = row.energy
    if energy is None:
        return ""
    if energy.value is None:
        return f"n/a: {energy.how}"
    known = energy.low is not None and energy.high is not None
    interval = f" [{milliseconds(energy.low)}, {milliseconds(energy.high)}]" if known else ""
    return f"{milliseconds(energy.value)} mJ{interval}{f', {energy.how}' if energy.how else ''}"


def engine_words(row: TargetRow) -> str:
    """What became of the engine: built, parsed only, or why not; empty for runtimes that need none."""
    engine = row.engine
    if engine is None:
        return ""
    parts = [
        f"engine built by {engine.built_by}" if engine.built_by else "",
        f"graph {engine.parsed_by}" if engine.parsed_by else "",
        f"no engine: {engine.not_built_because.removeprefix('not built: ')}" if engine.not_built_because else "",
    ]
    return ", ".join(part for part in parts if part)


def strategy_notes(report: Report) -> list[str]:
    """A sentence on every teacher that learned in another way than from the labels alone."""
    return [f"{row.title}: {row.note}" for row in report.references if row.strategy != "frozen" and row.note]


def shot_title(name: ShotName) -> str:
    """The group with its limits: "many (> 100)"."""
    return f"{name} ({_SHOT_LIMITS[name]})"


def shot_words(group: ShotGroup) -> str:
    """ "many: 4 classes, 131 to 600"."""
    count = f"{len(group.classes):,} class{'' if len(group.classes) == 1 else 'es'}"
    samples = f"{group.fewest:,}" if group.fewest == group.most else f"{group.fewest:,} to {group.most:,}"
    return f"{group.name}: {count}, {samples}"


def shot_notes(report: Report) -> list[str]:
    """Which classes the groups have: how many, of how many training samples each; empty without groups."""
    if report.shots is None:
        return []
    spreads = {metric.confidence for row in report.shots.rows for metric in row.metrics.values()}
    spread = f"; ±: {plain_number(min(spreads) * 100)} %" if spreads else ""
    return [f"training samples of a class: {'; '.join(map(shot_words, report.shots.groups))}{spread}"]


def exploration_notes(report: Report) -> list[str]:
    """What the students explored, and how much of it the filter kept."""
    found = report.exploration
    if found is None:
        return []
    parts = [f"students explored: {found.summary}{' (control)' if found.control else ''}"]
    parts += [f"generator: {found.generator}"] if found.generator else []
    which = len(found.students) > 1
    starved = []
    for student in found.students:
        name = f" ({student.arch})" if which else ""
        rates = {label: share for label, share in student.kept_by_class.items() if share is not None}
        if student.kept is not None:
            least = f", {least_kept(rates)}" if rates else ""
            parts.append(f"kept {percent(student.kept, 0)} %{least}{name}")
        if told := starved_classes(rates):
            fixes = ["a smaller explore.sigma"] * bool(found.sigma)
            fixes += ["a smaller explore.threshold"] * (found.filter == "confidence")
            starved.append(f"explore.filter: {told}{name}; {', or '.join([*fixes, 'another filter'])}")
    return ["; ".join(parts), *starved]


def other_notes(report: Report) -> list[str]:
    """The run's notes without those that the exploration's own lines repeat."""
    shared = [note for note in (sharing_note(report),) if note]
    found = report.exploration
    if found is None:
        return [*report.notes, *shared]
    told = (f"explores: {found.summary}", *(picture.file for picture in found.pictures))
    kept = (note for note in report.notes if not note.endswith(told) and not note.startswith("explore.filter keeps "))
    return [*kept, *shared]


def wrap(text: str, width: int, first: str = "", indent: str = "") -> list[str]:
    """Breaks at spaces into lines of at most `width` terminal cells (wide characters take two); long words stay."""
    lines: list[str] = []
    line, empty = first, True
    for word in text.split(" "):  # double spaces separate columns and are kept
        if not empty and cell_len(line) + 1 + cell_len(word) > width:
            lines.append(line.rstrip())
            line, empty = indent, True
        if word or not empty:
            line += word if empty else f" {word}"
            empty = False
    return [*lines, line.rstrip()]


def page_command(report: Report) -> str:
    """The command that writes the HTML page."""
    return f"edgestill report {shlex.quote(report.folder)} --html report.html"
