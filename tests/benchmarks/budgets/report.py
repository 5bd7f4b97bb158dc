"""What the budgets' runs show: the rules that are compared, the figures, and the page. No training here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cli.report.schema import Report, TargetRow
from cli.report.words import milliseconds, percent, plain_number
from distill.students.arch import Arch, ConvArch

_REFERENCE_WIDTH = 16
MOST_TIMES = 1.25
"""Times the own training of the students that choosing for several targets may take."""
_GRID = 25
"""Limits at which the rules are compared by the pool's costs alone."""


class Priced(NamedTuple):
    """A member of the pool. latency_ms: by precision, on this machine."""

    multiply_adds: int
    latency_ms: Mapping[str, float]


def shape(prices: Mapping[Arch, Priced]) -> list[Arch]:
    """One shape in every width, widest first: one block a stage, 3 x 3 kernels."""
    found = [arch for arch in prices if isinstance(arch, ConvArch) and (arch.depth, arch.kernel) == (1, 3)]
    return sorted(found, key=lambda arch: -arch.width)


def by_hand(prices: Mapping[Arch, Priced], limit: float) -> list[Arch]:
    """One shape scaled by hand: widest first, from where its fastest precision is within the limit (milliseconds)."""
    widths = shape(prices)
    fitting = [arch for arch in widths if min(prices[arch].latency_ms.values(), default=math.inf) <= limit]
    return fitting or widths[-1:]


def by_flops(prices: Mapping[Arch, Priced], limit: float) -> Arch:
    """The member with most multiply-adds among those that should take `limit` at the rate of a reference in FP32.

    The reference is the student of the one shape whose width is nearest to 16. Where nothing should fit, the smallest.
    """
    reference = min(shape(prices), key=lambda arch: abs(arch.width - _REFERENCE_WIDTH))
    rate = prices[reference].multiply_adds / prices[reference].latency_ms["fp32"]
    fitting = [arch for arch, price in prices.items() if price.multiply_adds <= rate * limit]
    if not fitting:
        return min(prices, key=lambda arch: (prices[arch].multiply_adds, str(arch)))
    return max(fitting, key=lambda arch: (prices[arch].multiply_adds, str(arch)))


def broken(prices: Mapping[Arch, Priced], limits: Sequence[float]) -> float:
    """The share of limits at which the student with the right number of multiply-adds takes longer than it may."""
    # of a member far beyond every limit, only that is known
    over = [limit for limit in limits if prices[by_flops(prices, limit)].latency_ms.get("fp32", math.inf) > limit]
    return len(over) / len(limits)


def spread(prices: Mapping[Arch, Priced], count: int = _GRID) -> list[float]:
    """Limits from what the fastest member needs to what the slowest does, in FP32, evenly by their logarithm."""
    found = sorted(price.latency_ms["fp32"] for price in prices.values() if "fp32" in price.latency_ms)
    low, high = math.log(found[0]), math.log(found[-1])
    return [math.exp(low + (high - low) * step / (count - 1)) for step in range(count)]


def figures(
    report: Report,
    compared: Mapping[str, Mapping[str, TargetRow]],
    prices: Mapping[Arch, Priced],
    stages: Mapping[str, float],
) -> dict[str, Any]:
    """Everything that the page tells, as plain values."""
    attached = [row for row in report.targets if row.latency is not None]
    sharing = report.sharing
    assert sharing is not None
    kept = {row.arch for row in report.targets if row.bundle is not None}
    students = {each.arch: each.seconds for each in sharing.trainings if each.role == "student"}
    apart = ("data", "teacher", "bundle")
    own = sum(seconds for name, seconds in stages.items() if not name.startswith(apart))
    found: dict[str, Any] = {
        "date": report.created,
        "machine": report.machine.title,
        "versions": dict(report.versions),
        "n_test": report.n_test,
        "targets": [_row(row) for row in report.targets],
        "why": {row.name: [*row.why, *(f"fix: {fix}" for fix in row.fixes)] for row in report.targets},
        "notes": list(report.notes),
        "rules": {
            "chosen": {row.name: _row(row) for row in attached},
            **{rule: {name: _row(row) for name, row in rows.items()} for rule, rows in compared.items()},
        },
        "time": {
            "teacher": sharing.seconds_of("teacher"),
            "supernet": sharing.seconds_of("supernet"),
            "cache": stages.get("teacher cache", 0.0),
            "trials": sharing.seconds_of("trial"),
            "retraining": sharing.seconds_of("qat"),
            "times_trained": sharing.times(),
            "times_kept": sharing.times(kept=True),
            "students": students,
            "kept": sorted(kept & set(students)),
            "shared_run": own,
            "separate_runs": sharing.separate_seconds,
            "shared_trainings": sharing.seconds,
        },
    }
    if prices:
        limits = spread(prices)
        found["flops_break"] = {"limits": limits, "share": broken(prices, limits), "members": len(prices)}
        found["pool"] = {
            str(arch): {"multiply_adds": price.multiply_adds, "latency_ms": dict(price.latency_ms)}
            for arch, price in prices.items()
        }
    return found


def _row(row: TargetRow) -> dict[str, Any]:
    limit = row.limit("latency_ms")
    return {
        "target": row.name,
        "device": row.device_title,
        "limit_ms": None if limit is None else limit.limit,
        "student": row.arch,
        "precision": row.precision,
        "test": None if row.metric is None else row.metric.value,
        "half_width": None if row.metric is None else row.metric.half_width,
        "ms": None if row.latency is None else row.latency.point,
        "bound_ms": None if row.latency is None else row.latency.upper_bound,
        "verdict": row.verdict,
    }


def markdown(found: Mapping[str, Any]) -> str:
    """The page."""
    time, rules = found["time"], found["rules"]
    every, kept = sum(time["students"].values()), sum(time["students"][arch] for arch in time["kept"])
    passed = len(time["students"]) - len(time["kept"])
    lines = [
        "# One teacher, many budgets",
        "",
        f"Fashion-MNIST, {found['n_test']:,} test images; {found['machine']}, {found['date']}. "
        f"`{found['command']}` made this.",
        "",
        "## The chosen students",
        "",
        *_table(found["targets"]),
        "",
    ]
    for target, reasons in found["why"].items():
        lines += [f"**{target}**", "", *(f"- {reason}" for reason in reasons), ""]
    lines += ["## Against simpler rules, on this machine", ""]
    lines += [
        "By hand: one shape (one block a stage, 3 x 3 kernels), the widest whose measured bound is within the limit. "
        "By FLOPs: the member of the pool with most multiply-adds among those that should be fast enough at the rate "
        "of one measured reference, in FP32; its budget counts as broken when the measurement fails it.",
        "",
        "| rule | "
        + " | ".join(f"{plain_number(row['limit_ms'])} ms" for row in rules["chosen"].values())
        + " | broken |",
        "|---|" + "---|" * (len(rules["chosen"]) + 1),
    ]
    for rule, rows in rules.items():
        cells = [
            f"{percent(row['test'])} % in {milliseconds(row['bound_ms'])} ms, {row['student']} {row['precision']}"
            + ("" if row["verdict"] == "pass" else f" ({row['verdict']})")
            for row in rows.values()
        ]
        over = sum(row["verdict"] == "fail" for row in rows.values())
        lines.append(f"| {rule} | {' | '.join(cells)} | {over} of {len(rows)} |")
    if "flops_break" in found:
        grid = found["flops_break"]
        low, high = (milliseconds(grid["limits"][end]) for end in (0, -1))
        lines += [
            "",
            f"At {len(grid['limits'])} limits from {low} to {high} ms, the student that FLOPs choose takes longer than "
            f"it may in {percent(grid['share'], 0)} % (costs of {grid['members']} members of the pool with fresh "
            "weights, in FP32).",
        ]
    lines += [
        "",
        "## Time",
        "",
        "| what | seconds |",
        "|---|---|",
        f"| teacher, once for all | {time['teacher']:.0f} |",
        f"| teacher with the pool's shared weights, once for all | {time['supernet']:.0f} |",
        f"| cache, once for all | {time['cache']:.0f} |",
        f"| trials | {time['trials']:.0f} |",
        f"| {len(time['kept'])} students that some target kept | {kept:.0f} |",
        f"| {passed} more, trained in full and not kept | {every - kept:.0f} |",
        f"| quantisation-aware training | {time['retraining']:.0f} |",
        f"| the shared run without teacher, cache and data: pricing, trials, students, exports, measurements | "
        f"{time['shared_run']:.0f} |",
        f"| all trainings of the shared run but the teacher's | {time['shared_trainings']:.0f} |",
        f"| the same in a run per target | {time['separate_runs']:.0f} |",
        "",
    ]
    if time["times_trained"] and time["times_kept"]:
        lines += [
            f"Trials, full trainings and quantisation-aware training, against at most {MOST_TIMES:g} times the "
            "students' own training:",
            "",
            f"- {_met(time['times_trained'])} the own training of the distinct students that were trained in full;",
            f"- {_met(time['times_kept'])} that of those that some target kept.",
            "",
            f"The whole run without teacher, cache and data: {time['shared_run'] / every:.2f} and "
            f"{time['shared_run'] / kept:.2f} times.",
        ]
    lines += ["", *(f"- not run: {what}" for what in found["not_run"]), *(f"- {note}" for note in found["notes"])]
    return "\n".join(lines).rstrip() + "\n"


def _met(times: float) -> str:
    """ "1.10 times (met: yes)"."""
    return f"{times:.2f} times (met: {'yes' if times <= MOST_TIMES else 'no'})"


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    head = "| target | device | limit ms | student | file | top-1 % | p99 ms | bound | verdict |"
    lines = [head, "|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        test = "-" if row["test"] is None else f"{percent(row['test'])} ±{percent(row['half_width'])}"
        limit = "-" if row["limit_ms"] is None else plain_number(row["limit_ms"])
        cells = [row["target"], row["device"], limit, row["student"], row["precision"], test]
        cells += [milliseconds(row["ms"]), milliseconds(row["bound_ms"]), row["verdict"]]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
