"""What the finished cells say: figures, comparisons paired by seed, and the tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import mean, median, stdev
from typing import Any

import numpy as np

from distill.study import compare, over_samples, t_interval
from profiles.shots import group_accuracy, long_tailed, shot_groups
from tests.benchmarks.exploration.cells import Cell, Store, StudentCell, TeacherCell
from tests.benchmarks.exploration.task import (
    AUGMENTED,
    KD,
    LABELS,
    RANDOM,
    RECONSTRUCTED,
    UNLABELLED,
    Arm,
    Choice,
    Knowledge,
    Task,
)
from tests.benchmarks.exploration.timing import PLAIN

FIRST_CONTROLS = (KD.name, LABELS.name)
STRONG_CONTROLS = (AUGMENTED.name, RECONSTRUCTED.name, UNLABELLED.name)
KNOWLEDGE: Mapping[Knowledge, str] = {
    "all": "Teacher trained on all labels of the pool",
    "few": "Teacher trained on the student's own few labels",
}
PICTURE = "exploration_radii.png"


# -- figures ----------------------------------------------------------------------------------------------------------


def results(
    store: Store,
    task: Task,
    done: Sequence[Cell],
    choice: Choice | None,
    tuning: Mapping[StudentCell, float],
    facts: Mapping[str, Any],
    steps: Mapping[str, Sequence[float]] | None,
) -> dict[str, Any]:
    """Everything about one task. done: finished cells, those of other tasks are passed over."""
    own = [cell for cell in done if cell.task == task.name]
    return {
        "title": task.title,
        "facts": dict(facts),
        "student": task.student_arch,
        "train": task.train.model_dump(mode="json", exclude_none=True),
        "further_inputs": task.explore_batch,
        "choice": None if choice is None else asdict(choice),
        "tuned_on": task.tuned_on,
        "tuning": [
            {"arm": cell.arm.name, **asdict(cell.choice), "validation": value}
            for cell, value in tuning.items()
            if cell.task == task.name
        ],
        "steps": None if steps is None else {name: list(seconds) for name, seconds in steps.items()},
        "teachers": {knowledge: _of_teacher(store, task, own, knowledge) for knowledge in KNOWLEDGE},
    }


def _of_teacher(store: Store, task: Task, done: Sequence[Cell], knowledge: Knowledge) -> dict[str, Any]:
    teachers = {
        cell.seed: store.read(cell) for cell in done if isinstance(cell, TeacherCell) and cell.knowledge == knowledge
    }
    arms: dict[str, dict[int, StudentCell]] = {}
    for arm in task.arms:
        cells = {
            cell.seed: cell
            for cell in done
            if isinstance(cell, StudentCell) and cell.arm == arm and cell.knowledge in (knowledge, None)
        }
        if cells:
            arms[arm.name] = dict(sorted(cells.items()))
    if not any(cell.knowledge for cells in arms.values() for cell in cells.values()):
        arms = {}  # labels alone are no comparison
    labels = task.dataset(0).test.labels
    logits = {name: {seed: store.logits(cell) for seed, cell in cells.items()} for name, cells in arms.items()}
    counts = np.bincount(task.dataset(0).train.labels, minlength=len(task.dataset(0).classes))
    groups = shot_groups(counts) if long_tailed(counts) else ()
    rows = []
    for arm in task.arms:
        if arm.name not in arms:
            continue
        told = {seed: store.read(cell) for seed, cell in arms[arm.name].items()}
        row: dict[str, Any] = {
            "arm": arm.name,
            "about": arm.about,
            "main": arm.main,
            "seeds": list(told),
            **{
                figure: [found[figure] for found in told.values()]
                for figure in ("test", "seconds", "seconds_before", "validation")
            },
            "explored": _average([found["explored"] for found in told.values()]),
            "minus": {
                control: _difference(labels, logits[arm.name], logits[control])
                for control in _controls(arm)
                if control in logits and set(logits[control]) & set(logits[arm.name])
            },
            "groups": {
                group.name: _group(labels, group.classes, logits[arm.name], logits.get(KD.name, {})) for group in groups
            },
        }
        rows.append(row)
    return {
        "teacher_test": [told["test"] for _, told in sorted(teachers.items())],
        "groups": [
            {"name": group.name, "classes": len(group.classes), "samples": list(group.samples)} for group in groups
        ],
        "rows": rows,
    }


def _controls(arm: Arm) -> list[str]:
    """What an arm is compared with: KD and labels alone; exploration with the stronger controls, too."""
    strong = STRONG_CONTROLS if arm.explores and arm.name not in STRONG_CONTROLS else ()
    names = [*FIRST_CONTROLS, *strong, *(() if arm.main else (RANDOM.name,))]
    return [name for name in names if name != arm.name]


def _average(records: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = sorted({name for record in records for name in record})
    return {name: mean(record[name] for record in records if name in record) for name in names}


_Logits = Mapping[int, np.ndarray[Any, Any]]


def _difference(labels: np.ndarray[Any, Any], ours: _Logits, control: _Logits) -> dict[str, Any]:
    """Over the seeds that both have."""
    both = sorted(set(ours) & set(control))
    samples = over_samples("multiclass", [ours[seed] for seed in both], [control[seed] for seed in both], labels)
    scores = [[float((each[seed].argmax(1) == labels).mean()) for seed in both] for each in (ours, control)]
    found = compare(scores[0], scores[1], samples)
    return {
        "difference": found.bootstrap.value,
        "seeds_interval": found.seeds,
        "samples_interval": (samples.low, samples.high),
        "wins": found.bootstrap.wins,
        "ties": found.ties,
        "n": found.bootstrap.n,
        "outcome": found.outcome,
    }


def _group(labels: np.ndarray[Any, Any], classes: Sequence[int], ours: _Logits, control: _Logits) -> dict[str, Any]:
    """Mean recall of a group's classes by seed, and the difference to KD with its t interval over seeds."""
    recalls = {seed: group_accuracy(logits, labels, classes).value for seed, logits in ours.items()}
    both = sorted(set(ours) & set(control))
    differences = [recalls[seed] - group_accuracy(control[seed], labels, classes).value for seed in both]
    return {
        "test": list(recalls.values()),
        "minus_kd": mean(differences) if differences else None,
        "seeds_interval": t_interval(differences) if differences else None,
    }


# -- words ------------------------------------------------------------------------------------------------------------


def markdown(found: Mapping[str, Any]) -> str:
    """The results as tables."""
    lines = [
        "# Exploration with a teacher: few labels, long tails",
        "",
        "`python -m tests.benchmarks.exploration` trains what is missing and writes this file. This one: "
        f"`{found['command']}`, {found['date']}; {found['machine']}; {found['versions']}.",
        "",
        "All arms of a task share the student's architecture, the number of steps, batch size and schedule; by seed "
        "also the labelled samples, the initial weights and the order. Every seed draws its own labelled samples (and "
        "trains its own teacher on them, where the teacher knows the few alone). All arms with a teacher "
        "have the same loss, and learn in each step from what it says of the labelled batch and of as many further "
        "inputs. What these are is all that differs. What teaches on them is the teacher's word, never a label. "
        "Gradient exploration passes through the teacher once more for each ascent step, and the agreement filter "
        "asks it about the real inputs, too.",
        "",
        "The weights are those of the last epoch: no arm chooses an epoch. The validation split, the same for all, "
        "served only for the choice of the shared hyper-parameters, on seed 0 and with the teacher that knows all: "
        "temperature, weight of the labels and weight of the further inputs by the arm `KD`, and then the radius of "
        "each kind of exploration, so `TGT` alone had a setting chosen for itself. Validation splits are larger than "
        "the labelled training splits of some tasks.",
        "",
        "Accuracy on the test split, mean ± standard deviation over seeds, in percent. Differences in points, paired "
        "by seed: Student's t over seeds, bootstrap over test samples. *higher* and *lower* need both intervals on one "
        "side of zero, else it is *cannot tell*. Each interval holds by itself, not for all comparisons together. "
        "Seeds share the generator, the unlabelled pool and the teacher that knows all, so no interval covers another "
        "draw of these.",
        "",
    ]
    for name, task in found["tasks"].items():
        lines += _task(name, task)
    lines += _times(found["tasks"])
    if found.get("picture"):
        lines += ["", "## What is explored", "", found["picture"], "", f"![explored samples]({PICTURE})", ""]
    if found["not_run"]:
        lines += ["", f"Not run ({len(found['not_run'])} cells): {_grouped(found['not_run'])}.", ""]
    if found["failures"]:
        failed = "; ".join(f"{label}: {why}" for label, why in found["failures"].items())
        lines += ["", f"Failed: {failed}.", ""]
    return "\n".join(lines).rstrip() + "\n"


def _task(name: str, task: Mapping[str, Any]) -> list[str]:
    lines = ["", f"## {task['title']}", "", _facts(task), "", _chosen(name, task)]
    for knowledge, title in KNOWLEDGE.items():
        teacher = task["teachers"][knowledge]
        if not teacher["rows"]:
            continue
        main = [row for row in teacher["rows"] if row["main"]]
        others = [row for row in teacher["rows"] if not row["main"]]
        explored = [row for row in main if any(control in row["minus"] for control in STRONG_CONTROLS)]
        lines += ["", f"### {title}", ""]
        if teacher["teacher_test"]:
            lines += [f"Test accuracy of the teacher: {_spread(teacher['teacher_test'])} %.", ""]
        lines += _table(main, FIRST_CONTROLS)
        if explored:
            lines += ["", "Exploration against the other controls:", "", *_table(explored, STRONG_CONTROLS)]
        if teacher["groups"]:
            lines += ["", *_groups(teacher, main)]
        if others:
            lines += ["", "Single choices:", "", *_table(others, (RANDOM.name, KD.name, UNLABELLED.name))]
        lines += _figures(teacher["rows"])
    return [*lines, ""]


def _facts(task: Mapping[str, Any]) -> str:
    facts, train = task["facts"], task["train"]
    sizes = facts["samples"]
    steps = f"{train['min_steps']:,} steps or the whole epochs above" if "min_steps" in train else ""
    length = steps or f"{train['epochs']} epochs"
    return (
        f"{sizes['train']:,} labelled ({_counts(facts['counts'])}), {sizes['unlabelled']:,} unlabelled, "
        f"{sizes['validation']:,} validation and {sizes['test']:,} test samples, {len(facts['classes'])} classes. "
        f"Student {task['student']} ({facts['student_parameters']:,} parameters), {length}, batches of "
        f"{train['batch_size']} and {task['further_inputs']} further inputs, AdamW, peak learning rate "
        f"{train['learning_rate']:g}, one-cycle. Teacher {facts['teacher']} ({facts['teacher_parameters']:,} "
        f"parameters). Generator: {facts['generator']}."
    )


def _counts(counts: Sequence[int]) -> str:
    if len(set(counts)) == 1:
        return f"{counts[0]} per class"
    return "by class " + ", ".join(map(str, counts))


def _chosen(name: str, task: Mapping[str, Any]) -> str:
    choice = task["choice"]
    if choice is None:
        return "The hyper-parameters are not chosen yet."
    radii = "".join(f", sigma {sigma:g} ({kind})" for kind, sigma in choice["sigmas"].items())
    chosen = (
        f"Chosen: temperature {choice['tau']:g}, weight of the labels {choice['hard_weight']:g}, lambda_2 "
        f"{choice['weight']:g}{radii}"
    )
    if task["tuned_on"] != name:
        return f"{chosen}; as chosen for {task['tuned_on']}."
    tried = "; ".join(
        f"{row['arm']} {row['tau']:g}/{row['hard_weight']:g}/{row['weight']:g}"
        + "".join(f"/sigma {sigma:g}" for sigma in row["sigmas"].values())
        + f" {100 * row['validation']:.1f}"
        for row in task["tuning"]
    )
    return f"{chosen}. Validation accuracy of all that was tried (temperature/labels/lambda_2): {tried}."


def _table(rows: Sequence[Mapping[str, Any]], controls: Sequence[str]) -> list[str]:
    """Accuracies, and the differences to each control that any row was compared with."""
    there = [name for name in controls if any(name in row["minus"] for row in rows)]
    head = "".join(f" - {name} | t, seeds | bootstrap, test | wins | outcome |" for name in there)
    lines = [
        f"| arm | seeds | accuracy |{head}",
        "|---|---:|---:|" + "---:|---:|---:|---:|---|" * len(there),
    ]
    for row in rows:
        cells = [row["arm"], str(len(row["seeds"])), _spread(row["test"])]
        for name in there:
            against = row["minus"].get(name)
            if against is None:
                cells += [""] * 5
                continue
            wins = f"{against['wins']}/{against['n']}" + (f", {against['ties']} tied" if against["ties"] else "")
            cells += [f"{100 * against['difference']:+.2f}", _points(against["seeds_interval"])]
            cells += [_points(against["samples_interval"]), wins, against["outcome"]]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _groups(teacher: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    told = "; ".join(
        f"{group['name']}: {group['classes']} classes of {group['samples'][0]} to {group['samples'][1]} samples"
        for group in teacher["groups"]
    )
    names = [group["name"] for group in teacher["groups"]]
    lines = [
        f"Mean recall of the classes with many, medium and few training samples ({told}):",
        "",
        "| arm |" + "".join(f" {name}-shot | - KD | t, seeds |" for name in names),
        "|---|" + "---:|---:|---:|" * len(names),
    ]
    for row in rows:
        cells = [row["arm"]]
        for name in names:
            group = row["groups"][name]
            cells.append(_spread(group["test"]))
            if group["minus_kd"] is None or row["arm"] == KD.name:
                cells += ["", ""]
            else:
                cells += [f"{100 * group['minus_kd']:+.2f}", _points(group["seeds_interval"])]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _figures(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keep rates, and how far student and teacher are apart on the further inputs."""
    title = {"explore/kept": "kept, %", "explore/divergence": "divergence", "explore/gain": "gain by the ascent"}
    names = [name for name in title if any(_has(row, name) for row in rows)]
    if not names:
        return []
    lines = [
        "",
        "The further inputs, means over all epochs and seeds: the share that the filter kept, the divergence of the "
        "student from the teacher on them, and how much of it the ascent added. Classes are the teacher's.",
        "",
        "| arm | " + " | ".join(title[name] for name in names) + " | kept by class, % |",
        "|---|" + "---:|" * len(names) + "---|",
    ]
    for row in rows:
        if not any(_has(row, name) for name in names):
            continue
        cells = [row["arm"]]
        for name in names:
            value = row["explored"].get(name)
            percent = name == "explore/kept"
            cells.append("" if value is None else f"{100 * value:.1f}" if percent else f"{value:.3g}")
        kept = [(key, value) for key, value in row["explored"].items() if key.startswith("explore/kept/")]
        told = ", ".join(f"{key.removeprefix('explore/kept/')} {100 * value:.0f}" for key, value in kept)
        cells.append(told if any(value < 1 for _, value in kept) else "")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _has(row: Mapping[str, Any], name: str) -> bool:
    return name in row["explored"]


def _times(tasks: Mapping[str, Any]) -> list[str]:
    """Interleaved steps, and whole trainings."""
    measured = {name: task for name, task in tasks.items() if task["steps"]}
    if not measured:
        return []
    lines = [
        "",
        "## What a step costs",
        "",
        f"One thread; in every round each arm does the same steps in turn. Ratios to `{PLAIN}` of the same round: "
        "median, and the smallest and largest round. Sets of further inputs that are made once are not in it.",
    ]
    for task in measured.values():
        steps = task["steps"]
        lines += [
            "",
            f"{task['title']}:",
            "",
            "| arm | ms a step | ratio | least | most |",
            "|---|---:|---:|---:|---:|",
        ]
        for name, seconds in steps.items():
            ratios = [value / plain for value, plain in zip(seconds, steps[PLAIN], strict=True)]
            figures = [median(ratios), min(ratios), max(ratios)]
            cells = [name, f"{1000 * median(seconds):.1f}", *(f"{value:.2f}" for value in figures)]
            lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _spread(values: Sequence[float]) -> str:
    return f"{100 * mean(values):.2f}" + (f" ± {100 * stdev(values):.2f}" if len(values) > 1 else "")


def _points(interval: Sequence[float] | None) -> str:
    return "-" if interval is None else f"{100 * interval[0]:+.2f} to {100 * interval[1]:+.2f}"


def _grouped(labels: Sequence[str]) -> str:
    """`fashion-10, teacher all, KD: seeds 3, 4; ...` of cells' labels."""
    seeds: dict[str, list[str]] = {}
    for label in labels:
        name, _, seed = label.rpartition(", seed ")
        seeds.setdefault(name, []).append(seed)
    return "; ".join(f"{name}: seeds {', '.join(found)}" for name, found in seeds.items())
