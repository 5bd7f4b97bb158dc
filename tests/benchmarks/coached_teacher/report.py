"""What the finished cells say: figures, comparisons paired by seed, and the tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from distill.study import compare, over_samples
from tests.benchmarks.coached_teacher.cells import EXTRAS, HARD_WEIGHT, METHODS, Cell, Method
from tests.benchmarks.coached_teacher.tasks import Task

ONLINE, CONTROL, LGTM, KD = "online", "lgtm lambda_inf=0", "lgtm", ("kd", "kd tau=4")
OWN = ("mse", "dist")
"""Objectives whose frozen teacher is a method by itself."""
RATIO = "coached/influence_ratio"


def results(task: Task, done: Sequence[Cell], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Everything about one task. done: its finished cells."""
    found = {method.name: {cell.seed: cell for cell in done if cell.method == method} for method in (*METHODS, *EXTRAS)}
    found = {name: cells for name, cells in found.items() if cells}
    read = {name: {seed: cell.read() for seed, cell in cells.items()} for name, cells in found.items()}
    kd = _chosen_kd(read)
    rows = []
    for name, figures in read.items():
        method = next(each for each in (*METHODS, *EXTRAS) if each.name == name)
        row: dict[str, Any] = {
            "method": name,
            "about": method.about,
            "seeds": sorted(figures),
            "test": [figures[seed]["test"] for seed in sorted(figures)],
            "validation": [figures[seed]["validation"] for seed in sorted(figures)],
            "seconds": [figures[seed]["seconds"] for seed in sorted(figures)],
            "best_epoch": [figures[seed]["best_epoch"] for seed in sorted(figures)],
            "hard_weight": next(iter(figures.values()))["hard_weight"],
        }
        for figure in ("teacher_test", "teacher_validation"):
            if all(figure in cell for cell in figures.values()):
                row[figure] = [figures[seed][figure] for seed in sorted(figures)]
        row["means"] = _average([cell["means"] for cell in figures.values()])
        row["to"] = {
            control: difference
            for control in _controls(method)
            if control in found
            and (difference := _difference(task, found[name], found[control], figures, read[control])) is not None
        }
        rows.append(row)
    return {
        "title": task.settings.title,
        "facts": dict(facts),
        "student": task.settings.student,
        "train": task.settings.train.model_dump(mode="json", exclude_none=True),
        "teacher_learning_rate": task.settings.teacher_learning_rate,
        "layers": task.settings.layers,
        "kd": kd,
        "rows": rows,
    }


def _controls(method: Method) -> list[str]:
    """What a method is compared with: each frozen teacher, the other coached ones, and its own objective's teacher."""
    own = [method.objective.kind] if method.strategy is not None and method.objective.kind in OWN else []
    coached = [] if method.strategy is None else [ONLINE, CONTROL, LGTM]
    return [name for name in (*KD, *coached, *own) if name != method.name]


def _chosen_kd(read: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> str | None:
    """The temperature with the higher mean validation accuracy, over the seeds that both have."""
    there = [name for name in KD if name in read]
    if len(there) < 2:
        return there[0] if there else None
    both = sorted(set(read[KD[0]]) & set(read[KD[1]]))
    if not both:
        return KD[0]
    return max(there, key=lambda name: mean(read[name][seed]["validation"] for seed in both))


def _average(records: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = sorted({name for record in records for name in record})
    return {name: mean(record[name] for record in records if name in record) for name in names}


def _difference(
    task: Task,
    ours: Mapping[int, Cell],
    control: Mapping[int, Cell],
    our_figures: Mapping[int, Mapping[str, Any]],
    their_figures: Mapping[int, Mapping[str, Any]],
) -> dict[str, Any] | None:
    both = sorted(set(ours) & set(control))
    if not both:
        return None
    samples = over_samples(
        "multiclass",
        [ours[seed].logits() for seed in both],
        [control[seed].logits() for seed in both],
        task.dataset.test.labels,
    )
    found = compare(
        [our_figures[seed]["test"] for seed in both], [their_figures[seed]["test"] for seed in both], samples
    )
    return {
        "difference": found.bootstrap.value,
        "seeds_interval": found.seeds,
        "samples_interval": (samples.low, samples.high),
        "wins": found.bootstrap.wins,
        "ties": found.ties,
        "n": found.bootstrap.n,
        "outcome": found.outcome,
    }


# -- words ------------------------------------------------------------------------------------------------------------


def markdown(found: Mapping[str, Any]) -> str:
    """The results as tables."""
    lines = [
        "# Teachers that learn beside the student",
        "",
        "`python -m tests.benchmarks.coached_teacher` trains what is missing and writes this file. This one: "
        f"`{found['command']}`, {found['date']}; {found['machine']}; {found['versions']}.",
        "",
        "All methods of a task share the data, the student's architecture and settings, the number of epochs and, by "
        "seed, the student's initial weights. All teachers start from the same one, which was trained on the same "
        "training samples as the students. Distilled students, with frozen or coached teacher, have the same loss: "
        f"{HARD_WEIGHT:g} of it are the labels, the rest is KL divergence from the teacher at temperature 1 (but for "
        "`kd tau=4`, for `mse`, and for `dist`, which adds the labels at full weight).",
        "",
        "`meta` and `lgtm` hold out 5 % of the training samples; neither student nor teacher trains on them, so their "
        "epochs have fewer steps. The first teacher was trained on them as well. `lgtm lambda_inf=0` holds out the "
        "same ones and makes no use of them. `online`, `kd` and `supervised` train on all. Nothing was tuned for any "
        "method.",
        "",
        "Accuracy of the student on the test split, at the epoch that validation chose: mean ± standard deviation "
        "over seeds, in percent. Differences in points, paired by seed: Student's t over seeds, bootstrap over test "
        "samples. *higher* and *lower* need both intervals on one side of zero, else it is *cannot tell*. Each "
        "interval holds by itself, not for all comparisons together. The seeds share the training samples and the "
        "first teacher, so no interval covers another draw of them.",
        "",
    ]
    for task in found["tasks"].values():
        lines += _task(task)
    if found.get("errors"):
        lines += _errors(found["errors"])
    if found["not_run"]:
        lines += ["", f"Not run ({len(found['not_run'])} trainings): {_grouped(found['not_run'])}.", ""]
    if found["failures"]:
        failed = "; ".join(f"{label}: {why}" for label, why in found["failures"].items())
        lines += ["", f"Failed: {failed}.", ""]
    return "\n".join(lines).rstrip() + "\n"


def _task(task: Mapping[str, Any]) -> list[str]:
    main = {method.name for method in METHODS}
    rows = [row for row in task["rows"] if row["method"] in main]
    extras = [row for row in task["rows"] if row["method"] not in main]
    lines = ["", f"## {task['title']}", "", _facts(task), "", "Against frozen teachers:", "", *_table(rows, KD)]
    coached = [row for row in rows if "teacher_test" in row]
    if coached:
        lines += ["", "Against other teachers that learn:", "", *_table(coached, (ONLINE, CONTROL))]
    if extras:
        lines += ["", "One choice at a time, everything else as in `lgtm`:", "", *_table(extras, (LGTM, task["kd"]))]
    for name in OWN:
        own = [row for row in extras if name in row["to"]]
        if own:
            lines += ["", f"Against the frozen teacher of the same objective, `{name}`:", "", *_table(own, (name,))]
    return [*lines, "", "Teachers and cost:", "", *_teachers(task["rows"], task["facts"]["accuracy"]["test"]), ""]


def _facts(task: Mapping[str, Any]) -> str:
    facts, train = task["facts"], task["train"]
    sizes = facts["samples"]
    learn = f", of which the last {task['layers']} layers, pooler and classifier learn" if task["layers"] else ""
    return (
        f"{sizes['train']:,} training, {sizes['validation']:,} validation and {sizes['test']:,} test samples, "
        f"{facts['classes']} classes. Student {task['student']} ({facts['student_parameters']:,} parameters), "
        f"{train['epochs']} epochs, batches of {train['batch_size']}, AdamW, peak learning rate "
        f"{train['learning_rate']:g}, one-cycle. Teacher {facts['teacher']} "
        f"({facts['parameters']:,} parameters{learn}), trained on the same samples in {facts['seconds']:.0f} s; "
        f"coached with AdamW at a peak of {task['teacher_learning_rate']:g}. By mean validation accuracy the better of "
        f"the two frozen teachers is `{task['kd']}`."
    )


def _table(rows: Sequence[Mapping[str, Any]], controls: Sequence[str]) -> list[str]:
    """Accuracies, and the differences to each control."""
    head = "".join(f" - {name} | t, seeds | bootstrap, test | wins | outcome |" for name in controls)
    lines = [
        f"| method | seeds | accuracy |{head}",
        "|---|---:|---:|" + "---:|---:|---:|---:|---|" * len(controls),
    ]
    for row in rows:
        cells = [row["method"], str(len(row["seeds"])), _spread(row["test"])]
        for name in controls:
            against = row["to"].get(name)
            if against is None:
                cells += [""] * 5
                continue
            wins = f"{against['wins']}/{against['n']}" + (f", {against['ties']} tied" if against["ties"] else "")
            cells += [f"{100 * against['difference']:+.2f}", _points(against["seeds_interval"])]
            cells += [_points(against["samples_interval"]), wins, against["outcome"]]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _teachers(rows: Sequence[Mapping[str, Any]], before: float) -> list[str]:
    """What the teachers became, how large the influence's gradient was, and what a student cost."""
    kd = next((row for row in rows if row["method"] == "kd"), None)
    lines = [
        f"The first teacher has a test accuracy of {100 * before:.2f} %. Gradient ratio: norm of the influence's "
        "gradient over that of the teacher's other terms, as weighted, mean over all steps. Seconds are of one "
        "student's training with its validation, wall-clock, the least of the seeds, since other programs shared the "
        "cores; not in them are what is done once: the first teacher's training, the frozen teacher's cache, and what "
        "enters the layers of a transformer that learn.",
        "",
        "| method | teacher after | gradient ratio | s | / kd | about |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        seconds = min(row["seconds"])
        ratio = row["means"].get(RATIO)
        cells = [
            row["method"],
            _spread(row["teacher_test"]) if "teacher_test" in row else "",
            "" if ratio is None else f"{ratio:.3g}",
            f"{seconds:.1f}",
            "" if kd is None else f"{seconds / min(kd['seconds']):.1f}",
            row["about"],
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _errors(found: Mapping[str, Any]) -> list[str]:
    lines = [
        "",
        "## What the finite difference leaves out",
        "",
        found["about"],
        "",
        "| student | precision | eps ||v|| | u | teacher's gradient | cosine |".replace("||v||", "\\|\\|v\\|\\|"),
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in found["rows"]:
        cells = [row["student"], row["precision"], row["factor"]]
        cells += [f"{row['change']:.1e}", f"{row['gradient']:.1e}", f"{row['cosine']:.6f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _spread(values: Sequence[float]) -> str:
    return f"{100 * mean(values):.2f}" + (f" ± {100 * stdev(values):.2f}" if len(values) > 1 else "")


def _points(interval: Sequence[float] | None) -> str:
    return "-" if interval is None else f"{100 * interval[0]:+.2f} to {100 * interval[1]:+.2f}"


def _grouped(labels: Sequence[str]) -> str:
    """`texts, lgtm: seeds 3, 4; ...` of cells' labels."""
    seeds: dict[str, list[str]] = {}
    for label in labels:
        name, _, seed = label.rpartition(", seed ")
        seeds.setdefault(name, []).append(seed)
    return "; ".join(f"{name}: seeds {', '.join(found)}" for name, found in seeds.items())
