"""What the finished cells say: pure functions of their accuracies, logits and seconds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean, median, stdev
from typing import Any

import numpy as np

from distill.study import compare, over_samples
from tests.benchmarks.generic_teacher.cells import Array, Measured
from tests.benchmarks.generic_teacher.plan import (
    ABLATED_ON,
    ABLATIONS,
    ARMS,
    NEVER_SAMPLED,
    OWN_TEACHER,
    POOL,
    SEEDS,
    SFTN,
    STUDENTS,
    TAUS,
    TEACHER,
    TUNED_ON,
    VANILLA,
    Arm,
    Cell,
    Objective,
    StudentCell,
    TeacherCell,
    student_cell,
    tuning_cells,
)

GROUPS = {"all": STUDENTS, "sampled": POOL, "never sampled": NEVER_SAMPLED, "own teacher": OWN_TEACHER}
SUPERVISED = "supervised"
CONTRASTS = (
    ("gtn-uniform", "sftn-one", "all"),
    ("gtn-easy", "gtn-uniform", "all"),
    ("gtn-uniform", "sftn-each", "own teacher"),
    ("gtn-easy", "sftn-each", "own teacher"),
)
"""Arm, the arm that it is compared with, and on which students: beside the comparisons with the plain teacher."""


class Results:
    """Finished cells, and what the tables ask of them.

    Args:
        found: the finished cells.
        taus: arm -> chosen temperature.
        labels: int64 (N,) of the test split.
        steps: teacher -> seconds of a training step in each interleaved round; None: not measured.
    """

    def __init__(
        self,
        found: Mapping[Cell, Measured],
        taus: Mapping[str, float],
        labels: Array,
        steps: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        self.found, self.taus, self.labels, self.steps = found, taus, labels, steps

    def student(self, arm: Arm | None, objective: Objective, arch: str, seed: int) -> Measured | None:
        """A finished student; arm None: the plain one."""
        if arm is None:
            return self.found.get(StudentCell("supervised", arch, seed))
        if arch not in arm.teachers:
            return None
        cell = student_cell(arm, objective, arch, seed, self.taus)
        return self.found.get(cell) if cell.known else None

    def row(
        self, arm: Arm | None, objective: Objective, students: Sequence[str], control: Arm | None
    ) -> dict[str, Any] | None:
        """Mean and worst student of an arm over the seeds of which all `students` are finished, and the same minus
        the control's over the seeds that both have. None: no such seed."""
        whole = {
            seed: entries
            for seed in SEEDS
            if all(entries := [self.student(arm, objective, arch, seed) for arch in students])
        }
        if not whole:
            return None
        ours = {seed: [entry.test for entry in entries if entry] for seed, entries in whole.items()}
        row: dict[str, Any] = {
            "seeds": list(ours),
            "mean": mean(mean(values) for values in ours.values()),
            "sd_over_seeds": _deviation([mean(values) for values in ours.values()]),
            "worst": mean(min(values) for values in ours.values()),
            "seconds": mean(entry.seconds for entries in whole.values() for entry in entries if entry),
        }
        if arm is not None:
            kl = [
                divergence(teacher.logits, entry.logits)
                for seed, entries in whole.items()
                for arch, entry in zip(students, entries, strict=True)
                if entry and (teacher := self.found.get(TeacherCell(arm.teachers[arch], seed)))
            ]
            row["kl"] = mean(kl) if kl else None
            row |= self.teachers(arm, students)
        row["minus_vanilla"] = self.minus(arm, objective, students, control)
        return row

    def one(self, arm: Arm | None, objective: Objective, arch: str) -> dict[str, Any] | None:
        """Accuracies of one student by seed, and the differences to the plain teacher's; None: none is finished."""
        found = {seed: entry.test for seed in SEEDS if (entry := self.student(arm, objective, arch, seed))}
        if not found:
            return None
        pairs = self.pairs(arm, objective, (arch,), ARMS["vanilla"])
        return {"test": found, "minus_vanilla": {seed: a.test - b.test for seed, ((a, b),) in pairs.items()}}

    def teachers(self, arm: Arm, students: Sequence[str]) -> dict[str, Any]:
        """Accuracy and seconds of an arm's teachers: means over seeds; seconds of all that these students need."""
        teachers = dict.fromkeys(arm.teachers[arch] for arch in students)
        entries = [
            [self.found[cell] for teacher in teachers if (cell := TeacherCell(teacher, seed)) in self.found]
            for seed in SEEDS
        ]
        whole = [entry for entry in entries if len(entry) == len(teachers)]
        if not whole:
            return {"teacher_test": None, "teacher_seconds": None}
        return {
            "teacher_test": mean(mean(one.test for one in entry) for entry in whole),
            "teacher_seconds": median(sum(one.seconds for one in entry) for entry in whole),
        }

    def minus(
        self, arm: Arm | None, objective: Objective, students: Sequence[str], control: Arm | None
    ) -> dict[str, Any] | None:
        """An arm minus the control, paired by student and seed, over the seeds of which both have all `students`.

        Decided as in a study (`distill.study.compare`): Student's t over the seeds' means over the students, and a
        bootstrap over test samples. There is no interval over (student, seed) pairs: students of a seed share a
        teacher, so their differences are not independent.
        """
        pairs = self.pairs(arm, objective, students, control)
        if not pairs:
            return None
        flat = [pair for both in pairs.values() for pair in both]
        samples = over_samples("multiclass", [a.logits for a, _ in flat], [b.logits for _, b in flat], self.labels)
        by_seed = [(mean(a.test for a, _ in both), mean(b.test for _, b in both)) for both in pairs.values()]
        found = compare([a for a, _ in by_seed], [b for _, b in by_seed], samples)
        return {
            "difference": found.bootstrap.value,
            "by_seed": list(found.differences),
            "seeds_interval": found.seeds,
            "samples_interval": (samples.low, samples.high),
            "wins": sum(a.test > b.test for a, b in flat),
            "n": len(flat),
            "outcome": found.outcome,
        }

    def pairs(
        self, arm: Arm | None, objective: Objective, students: Sequence[str], control: Arm | None
    ) -> dict[int, list[tuple[Measured, Measured]]]:
        """Seed -> (ours, the control's) of every student, of the seeds of which both have all `students`."""
        if arm is control:
            return {}
        pairs: dict[int, list[tuple[Measured, Measured]]] = {}
        for seed in SEEDS:
            both = [
                (ours, theirs)
                for arch in students
                if (ours := self.student(arm, objective, arch, seed))
                and (theirs := self.student(control, objective, arch, seed))
            ]
            if len(both) == len(students):
                pairs[seed] = both
        return pairs

    def tuning(self) -> dict[str, Any]:
        """Arm -> temperature, and mean validation accuracy of each candidate that is finished."""
        found: dict[str, Any] = {}
        for arm in ARMS:
            scores = {cell: self.found[cell].validation for cell in tuning_cells(arm) if cell in self.found}
            means = {
                f"{tau:g}": mean(values)
                for tau in TAUS
                if len(values := [score for cell, score in scores.items() if cell.tau == tau]) == len(TUNED_ON)
            }
            found[arm] = {"tau": self.taus.get(arm), "validation": means}
        return found

    def costs(self) -> dict[str, Any]:
        """Seconds of every teacher by seed, and from how many students on GTN is cheaper than SFTN for each."""

        def seconds(cell: TeacherCell) -> float | None:
            return self.found[cell].seconds if cell in self.found else None

        teachers = {teacher.name: teacher for arm in (*ARMS, *ABLATIONS) for teacher in _arm(arm).teachers.values()}
        by_teacher = {
            name: {seed: value for seed in SEEDS if (value := seconds(TeacherCell(teacher, seed))) is not None}
            for name, teacher in teachers.items()
        }
        found: dict[str, Any] = {"seconds": by_teacher, "steps": self.steps, "trainings": {}, "interleaved": {}}
        for arm in ("gtn-uniform", "gtn-easy"):
            if ratios := break_even(arm, by_teacher):
                found["trainings"][arm] = ratios
            if self.steps and (ratios := break_even(arm, _by_round(self.steps))):
                found["interleaved"][arm] = ratios
        return found


def break_even(arm: str, seconds: Mapping[str, Mapping[int, float]]) -> dict[str, Any] | None:
    """What a GTN costs beside SFTN and the plain teacher; None where nothing has all three.

    Args:
        arm: the GTN.
        seconds: teacher -> seed (or round) -> seconds.
    """
    names = [teacher.name for teacher in SFTN.values()]
    common = [each for each in seconds[arm] if all(each in seconds[name] for name in (*names, VANILLA.name))]
    if not common:
        return None
    to_sftn = [seconds[arm][each] / mean(seconds[name][each] for name in names) for each in common]
    return {
        "gtn_over_one_sftn": to_sftn,
        "cheaper_from": students_from(median(to_sftn)),
        "gtn_over_vanilla": [seconds[arm][each] / seconds[VANILLA.name][each] for each in common],
    }


def _by_round(steps: Mapping[str, Sequence[float]]) -> dict[str, dict[int, float]]:
    return {name: dict(enumerate(values)) for name, values in steps.items()}


def _arm(name: str) -> Arm:
    return ARMS.get(name) or ABLATIONS[name]


def students_from(ratio: float) -> int:
    """The smallest whole number of students n with n > ratio: n SFTN teachers then cost more than one GTN."""
    return max(1, math.floor(ratio) + 1)


def divergence(teacher: Array, student: Array) -> float:
    """Mean over samples of KL(p_T || p_S) at temperature 1, of logits (N, C); float64, nats."""
    log_p, log_q = (_log_softmax(logits.astype(np.float64)) for logits in (teacher, student))
    return float((np.exp(log_p) * (log_p - log_q)).sum(1).mean())


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return result


def _deviation(values: Sequence[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None


def tables(results: Results) -> dict[str, Any]:
    """Everything that the tables show, as plain values."""
    found: dict[str, Any] = {"tuning": results.tuning(), "costs": results.costs(), "objectives": {}}
    vanilla = ARMS["vanilla"]
    for objective in ("kd", "lelp"):
        groups: dict[str, Any] = {}
        for group, students in GROUPS.items():
            rows = {SUPERVISED: results.row(None, objective, students, vanilla)}
            for name, arm in ARMS.items():
                if set(students) <= set(arm.students):
                    rows[name] = results.row(arm, objective, students, vanilla)
            groups[group] = {name: row for name, row in rows.items() if row is not None}
        by_student = {
            arch: {name: row for name in (SUPERVISED, *ARMS) if (row := results.one(ARMS.get(name), objective, arch))}
            for arch in STUDENTS
        }
        contrasts = [
            {"arm": arm, "control": control, "group": group, "minus": minus}
            for arm, control, group in CONTRASTS
            if (minus := results.minus(ARMS[arm], objective, GROUPS[group], ARMS[control]))
        ]
        found["objectives"][objective] = {"groups": groups, "by_student": by_student, "contrasts": contrasts}
    found["ablations"] = {}
    for name, arm in ABLATIONS.items():
        assert arm.base is not None
        row = results.row(arm, "kd", ABLATED_ON, ARMS[arm.base])
        if row is not None:
            row["minus_base"] = row.pop("minus_vanilla")
            row["base"] = arm.base
            row["minus_vanilla"] = results.minus(arm, "kd", ABLATED_ON, vanilla)
            found["ablations"][name] = row
    return found


# -- markdown ---------------------------------------------------------------------------------------------------------


def markdown(found: Mapping[str, Any]) -> str:
    """The results as tables."""
    sizes = found["sizes"]
    lines = [
        "# One teacher for a pool of students",
        "",
        "`python -m tests.benchmarks.generic_teacher` trains what is missing and writes this file. This one: "
        f"`{found['command']}`, {found['date']}; {found['machine']}; {found['versions']}.",
        "",
        f"Fashion-MNIST, {found['train']:,} training, {found['validation']:,} validation, {found['test']:,} test "
        f"images, no augmentation. Teacher {TEACHER} ({found['teacher_mflop']:.1f} MFLOP an image, multiplications and "
        f"additions, {found['teacher_parameters']:,} parameters), {sizes['teacher_epochs']} epochs; students "
        f"{sizes['student_epochs']} epochs; peak learning rate {sizes['learning_rate']:g} for all. Sizes are such that "
        f"two CPU cores train it all within two hours (the {found['finished']} finished trainings: "
        f"{found['hours']:.1f} core hours); longer trainings and wider students may say something else. A seed is one "
        "of teacher *and* student: initial weights and order of the samples; the images are the same.",
        "",
        f"- *plain teacher*: labels alone. *SFTN*: conditioned on one student. *GTN*: conditioned on {len(POOL)} "
        "students, two drawn in every step (lambda_CE 1, lambda_KL 3, tau 1; our reading where the paper is silent: "
        "see `distill/strategies/`). *learned (easy)*: the draws come to prefer students of low conditioning loss.",
        f"- *sampled*: the pool of {len(POOL)}. *never sampled*: {', '.join(NEVER_SAMPLED)}, which no GTN saw.",
        "- Accuracies in percent on the test split, of the epoch that validation chose. *worst*: the worst student of "
        "each seed. Both are means over seeds.",
        "- Differences in points to the same student under the plain teacher, paired by student and seed; positive is "
        "better. *t, seeds*: Student's t interval of the seeds' means, 95 %; every seed has another teacher, so seeds "
        "are what counts, and three are few. *bootstrap, test*: over test samples. *higher* and *lower* need both on "
        "one side of zero, all else is *cannot tell*. *wins*: (student, seed) pairs above the plain teacher. Each "
        "interval holds by itself, not for all comparisons together.",
        "- KL: mean KL(teacher || student) on the test split at temperature 1, in nats. Of another teacher it is "
        "another quantity: a softer teacher is easier to follow.",
        "- Seconds are wall-clock of one thread while other trainings shared the machine: medians over seeds, good for "
        "ratios.",
        "",
        *_tuning(found["tuning"]),
    ]
    for objective, title in (("kd", "KD"), ("lelp", "LELP")):
        lines += _objective(title, found["objectives"][objective], found["students"])
    lines += _costs(found["costs"])
    lines += _ablations(found["ablations"])
    lines += _sampled(found["pools"])
    if found["failed"]:
        lines += ["", "## Failed", "", *(f"- {label}: {message}" for label, message in found["failed"].items())]
    lines += ["", "## Not run", ""]
    lines.append(_not_run(found["not_run"]) if found["not_run"] else "Everything is finished.")
    return "\n".join(lines).rstrip() + "\n"


def _tuning(tuning: Mapping[str, Any]) -> list[str]:
    lines = [
        f"KD's temperature of every arm, of {', '.join(f'{tau:g}' for tau in TAUS)}: by the validation accuracy of "
        f"{' and '.join(TUNED_ON)}, seed {SEEDS[0]}, which all students and seeds then use (SFTN's paper uses 4):",
        "",
        "| arm | " + " | ".join(f"tau {tau:g}" for tau in TAUS) + " | chosen |",
        "|---|" + "---:|" * (len(TAUS) + 1),
    ]
    for name, entry in tuning.items():
        cells = [_percent(entry["validation"].get(f"{tau:g}")) for tau in TAUS]
        chosen = "-" if entry["tau"] is None else f"{entry['tau']:g}"
        lines.append("| " + " | ".join([ARMS[name].title, *cells, chosen]) + " |")
    return lines


def _objective(title: str, entry: Mapping[str, Any], students: Sequence[Mapping[str, Any]]) -> list[str]:
    lines: list[str] = []
    groups = entry["groups"]
    for group, heading in (
        ("all", f"{title}: all {len(STUDENTS)} students"),
        ("own teacher", f"{title}: the {len(OWN_TEACHER)} students that have an SFTN teacher of their own"),
    ):
        rows = groups[group]
        lines += ["", f"## {heading}", ""]
        if not rows:
            lines.append("No seed is finished.")
            continue
        lines += [
            "| arm | mean | worst | - plain teacher | t, seeds | bootstrap, test | wins | outcome | teacher | KL | "
            "teacher s | seeds |",
            "|---|---:|---:|---:|---:|---:|---:|---|---:|---:|---:|---:|",
        ]
        for name, row in rows.items():
            cells = [_title(name), _percent(row["mean"]), _percent(row["worst"]), *_against(row, name)]
            cells += [_percent(row.get("teacher_test")), _number(row.get("kl"), 3)]
            cells += [_number(row.get("teacher_seconds"), 0), str(len(row["seeds"]))]
            lines.append("| " + " | ".join(cells) + " |")
    lines += ["", f"## {title}: conditioned teachers among each other", ""]
    lines += ["| difference | students | points | t, seeds | bootstrap, test | wins | outcome |"]
    lines += ["|---|---|---:|---:|---:|---:|---|"]
    for contrast in entry["contrasts"]:
        what = f"{_title(contrast['arm'])} - {_title(contrast['control'])}"
        cells = [what, f"{len(GROUPS[contrast['group']])}", *_differences(contrast["minus"])]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", f"## {title}: sampled and never sampled students", ""]
    lines += [
        "| arm | students | mean | - plain teacher | t, seeds | bootstrap, test | wins | outcome |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for name in (SUPERVISED, *ARMS):
        for group in ("sampled", "never sampled"):
            if row := groups[group].get(name):
                lines.append(
                    "| " + " | ".join([_title(name), group, _percent(row["mean"]), *_against(row, name)]) + " |"
                )
    lines += ["", f"## {title}: student by student", "", *_students(entry["by_student"], students)]
    return lines


def _students(by_student: Mapping[str, Any], students: Sequence[Mapping[str, Any]]) -> list[str]:
    others = [name for name in ARMS if name != "vanilla"]
    lines = [
        "Accuracy under labels alone and under the plain teacher; then points to the latter: mean over seeds, and the "
        "seeds.",
        "",
        "| student | MFLOP | parameters | sampled | labels alone | plain teacher | "
        + " | ".join(ARMS[name].title for name in others)
        + " |",
        "|---|---:|---:|---|---:|---:|" + "---:|" * len(others),
    ]
    for student in students:
        arch, rows = student["arch"], by_student[student["arch"]]
        cells = [arch, f"{student['mflop']:.2f}", f"{student['parameters']:,}", "yes" if student["sampled"] else "no"]
        for name in (SUPERVISED, "vanilla"):
            cells.append(_percent(mean(rows[name]["test"].values()) if name in rows else None))
        for name in others:
            against = rows[name]["minus_vanilla"].values() if name in rows else ()
            seeds = ", ".join(f"{100 * value:+.1f}" for value in against)
            cells.append(f"{_signed(mean(against))} ({seeds})" if against else "")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _costs(costs: Mapping[str, Any]) -> list[str]:
    steps = costs["steps"] or {}
    lines = ["", "## What the teachers cost", ""]
    lines += ["| teacher | s, by seed | to the plain one | ms a step, interleaved | to the plain one |"]
    lines += ["|---|---:|---:|---:|---:|"]
    plain = costs["seconds"][VANILLA.name]
    for name, seconds in costs["seconds"].items():
        if not seconds and name not in steps:
            continue
        ratios = [value / plain[seed] for seed, value in seconds.items() if seed in plain]
        cells = [name, ", ".join(f"{value:.0f}" for value in seconds.values()) or "-"]
        cells.append(f"{median(ratios):.2f}" if ratios else "-")
        if name in steps:
            pairs = zip(steps[name], steps[VANILLA.name], strict=True)
            cells += [f"{1000 * median(steps[name]):.0f}", f"{median(a / b for a, b in pairs):.2f}"]
        else:
            cells += ["-", "-"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "Ratios are medians: over seeds, and over rounds in which every teacher does the same steps in turn.",
        "",
    ]
    for kind, how in (("interleaved", "by interleaved steps"), ("trainings", "by whole trainings")):
        for arm, entry in costs[kind].items():
            lines.append(
                f"- {ARMS[arm].title}, {how}: {median(entry['gtn_over_one_sftn']):.2f} times an SFTN teacher (mean of "
                f"the {len(SFTN)}), so cheaper than one SFTN teacher per student from {entry['cheaper_from']} students "
                f"on; {median(entry['gtn_over_vanilla']):.2f} times the plain teacher, whatever the number of students."
            )
    if not costs["interleaved"]:
        lines.append("- Interleaved steps were not measured: `--steps` does.")
    return lines


def _ablations(ablations: Mapping[str, Any]) -> list[str]:
    lines = ["", "## Choices of ours where the paper is silent", ""]
    if not ablations:
        return [*lines, "No seed is finished."]
    lines += [
        f"KD, students {', '.join(ABLATED_ON)}, each arm with the temperature of the GTN that it varies:",
        "",
        "| changed | mean | - the GTN that it varies | t, seeds | bootstrap, test | outcome | - plain teacher | "
        "teacher | teacher s | seeds |",
        "|---|---:|---:|---:|---:|---|---:|---:|---:|---:|",
    ]
    for name, row in ablations.items():
        base, plain = row["minus_base"], row["minus_vanilla"]
        cells = [ABLATIONS[name].title, _percent(row["mean"])]
        if base is None:
            cells += ["-"] * 4
        else:
            cells += [_signed(base["difference"]), _points(base["seeds_interval"]), _points(base["samples_interval"])]
            cells.append(base["outcome"])
        cells += ["-" if plain is None else _signed(plain["difference"]), _percent(row["teacher_test"])]
        cells += [_number(row["teacher_seconds"], 0), str(len(row["seeds"]))]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _sampled(pools: Mapping[str, Any]) -> list[str]:
    if not pools:
        return []
    lines = ["", "## What the learned distributions came to prefer", "", "Probabilities at the end, by seed:", ""]
    lines += ["| teacher | " + " | ".join(POOL) + " |", "|---|" + "---:|" * len(POOL)]
    for name, seeds in pools.items():
        cells = ["; ".join(f"{found[arch]:.2f}" for found in seeds.values()) for arch in POOL]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return lines


def _not_run(labels: Sequence[str]) -> str:
    """`teacher gtn-hard: seeds 0, 1; ...` of cells' labels."""
    seeds: dict[str, list[str]] = {}
    for label in labels:
        what, _, seed = label.rpartition(", seed ")
        seeds.setdefault(what, []).append(seed)
    return f"{len(labels)} trainings: " + "; ".join(f"{what}: {', '.join(found)}" for what, found in seeds.items())


def _against(row: Mapping[str, Any], name: str) -> list[str]:
    found = row["minus_vanilla"]
    if found is None:
        return ["", "", "", "", "control" if name == "vanilla" else "-"]
    return _differences(found)


def _differences(found: Mapping[str, Any]) -> list[str]:
    return [
        _signed(found["difference"]),
        _points(found["seeds_interval"]),
        _points(found["samples_interval"]),
        f"{found['wins']}/{found['n']}",
        found["outcome"],
    ]


def _title(name: str) -> str:
    return "labels alone" if name == SUPERVISED else ARMS[name].title


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def _signed(value: float) -> str:
    return f"{100 * value:+.2f}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _points(interval: Sequence[float] | None) -> str:
    return "-" if interval is None else f"{100 * interval[0]:+.2f} to {100 * interval[1]:+.2f}"
