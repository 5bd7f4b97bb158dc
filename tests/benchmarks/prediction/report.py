"""What the measurements say: pure functions of predicted and measured figures, and the scatter plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from pydantic import Field

from cli.pipeline.calibrate import others_sentence
from profiles.calibration import HeldOut, Observation, errors, fit_times, graph_milliseconds
from profiles.section import Section

TARGETS = {"median_error": 0.08, "p90_error": 0.20, "rank_correlation": 0.97, "left_out_median": 0.20}
_COLOURS = {"fp32": (31, 95, 166), "int8": (206, 92, 0)}
_SIZE, _MARGIN, _BAND = 900, 90, 0.2


class Compared(Section):
    """One architecture that the fit never saw. Times in milliseconds, end to end; memory in MiB."""

    model: str
    family: str
    precision: str
    predicted_ms: float
    measured_ms: float
    predicted_p99_ms: float | None
    measured_p99_ms: float | None
    predicted_mib: float | None
    measured_mib: float | None
    spread: float
    undisturbed: float
    """Share of its queries during which the core was at its own speed; `measured_ms` is their median."""
    whole_ms: float
    """Median of all queries."""
    left_out_ms: float = Field(gt=0)
    """Predicted by a fit that saw no architecture of this family."""

    @property
    def error(self) -> float:
        """Relative to the measured."""
        return self.predicted_ms / self.measured_ms - 1


def left_out(seen: Sequence[Observation], unseen: Sequence[Observation]) -> dict[tuple[str, str], float]:
    """(Model, precision) of `unseen` -> its median as a fit to `seen` without its family predicts it."""
    found = {}
    for precision, family in sorted({(one.precision, one.family) for one in unseen}):
        times = fit_times([one for one in seen if one.precision == precision and one.family != family])
        for one in unseen:
            if (one.precision, one.family) == (precision, family):
                found[one.model, one.precision] = graph_milliseconds(one.nodes, times)
    return found


def tables(compared: Sequence[Compared]) -> dict[str, Any]:
    """Errors by precision (never seen; family left out, by family), of p99 and of memory."""
    precisions = sorted({one.precision for one in compared})
    of = {precision: [one for one in compared if one.precision == precision] for precision in precisions}
    families = sorted({one.family for one in compared})
    remembered = [one for one in compared if one.predicted_mib is not None and one.measured_mib is not None]
    tailed = [
        (one.predicted_p99_ms, one.measured_p99_ms)
        for one in compared
        if one.predicted_p99_ms is not None and one.measured_p99_ms is not None
    ]
    return {
        "unseen": {
            precision: errors([one.predicted_ms for one in found], [one.measured_ms for one in found]).model_dump()
            for precision, found in of.items()
        },
        "left_out": {
            precision: {
                family: errors([one.left_out_ms for one in part], [one.measured_ms for one in part]).model_dump()
                for family in families
                if (part := [one for one in found if one.family == family])
            }
            for precision, found in of.items()
        },
        "whole": {
            precision: errors([one.predicted_ms for one in found], [one.whole_ms for one in found]).model_dump()
            for precision, found in of.items()
        },
        "undisturbed": float(np.median([one.undisturbed for one in compared])),
        "p99": _errors_or_none(tailed),
        "p99_covered": _share([predicted >= measured for predicted, measured in tailed]),
        "memory": _errors_or_none([(one.predicted_mib or 0.0, one.measured_mib or 0.0) for one in remembered]),
    }


def _errors_or_none(pairs: Sequence[tuple[float, float]]) -> dict[str, Any] | None:
    return errors(*map(list, zip(*pairs, strict=True))).model_dump() if pairs else None


def _share(values: Sequence[bool]) -> float | None:
    return sum(values) / len(values) if values else None


def markdown(document: dict[str, Any]) -> str:
    """The results as a page, from what prediction.json holds, also one that an earlier version wrote."""
    found, calibration = document["tables"], document["calibration"]
    lines = [
        "# Predicted against measured latency",
        "",
        f"`{document['command']}`, {document['date']}, {document['machine']}, {document['versions']}.",
        "",
        f"**{_in_one_breath(document)}**",
        "",
        f"The calibration took {calibration['seconds']:.0f} s for {calibration['models']} models (every one in FP32 "
        f"and INT8 is two), {calibration['threads']} thread(s), batch 1; medians spread by "
        f"{calibration['spread']:.1%} over the rounds. {_meanwhile(document)}",
        "",
        "A shared core is slowed down for milliseconds at a time by what runs on its other thread. So a fixed "
        "computation, the pulse, runs around every query, and medians are those of the queries around which it was "
        f"quick: {calibration['undisturbed']:.0%} of them in the calibration, {found['undisturbed']:.0%} in what it is "
        "compared with (middle of the models). What begins and ends within one query it does not see: medians of "
        "queries of several milliseconds lie between those of an undisturbed core and those of all queries.",
        "",
        "Errors are relative to the measured median, end to end. Targets: median at most 8 %, 90 % of them at most "
        "20 %, rank correlation at least 0.97; at most 20 % median on a family that was left out.",
        "",
        "## Architectures that the fit never saw",
        "",
        "| precision | architectures | median error | 90 % below | rank correlation | met |",
        "|---|---|---|---|---|---|",
        *(
            f"| {precision} | {_figures(entry)} | {'yes' if _met(entry) else 'no'} |"
            for precision, entry in found["unseen"].items()
        ),
        "",
        "## Families that the fit never saw",
        "",
        "Neither these architectures nor any other of their family were in the fit; graphs of layers were.",
        "",
        "| precision | family | architectures | median error | 90 % below | rank correlation | met |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {precision} | {family} | {_figures(entry)} | "
            f"{'yes' if entry['median_error'] <= TARGETS['left_out_median'] else 'no'} |"
            for precision, families in found["left_out"].items()
            for family, entry in families.items()
        ),
        "",
    ]
    if found["p99"] is not None:
        factor = next(one["predicted_p99_ms"] / one["predicted_ms"] for one in document["models"])
        lines += [
            f"p99 of all queries is predicted as {factor:.2f} times the median: median error "
            f"{found['p99']['median_error']:.1%}; {found['p99_covered']:.0%} of the measured are below it.",
            "",
        ]
    if found["memory"] is not None:
        entry = found["memory"]
        lines += [
            f"Peak memory of a fresh process: median error {entry['median_error']:.1%}, 90 % below "
            f"{entry['p90_error']:.1%} ({entry['models']} models).",
            "",
        ]
    lines += [
        "![prediction against measurement](prediction.png)",
        "",
        "Blue: FP32, orange: INT8; the lines are 20 % off.",
        "",
    ]
    return "\n".join(lines)


def _in_one_breath(document: dict[str, Any]) -> str:
    """Errors against both medians, the calibration's own, and what missed its target."""
    found, own = document["tables"], document["calibration"]["held_out"]
    missed = [
        f"{family} in {precision} ({entry['median_error']:.1%})"
        for precision, families in found["left_out"].items()
        for family, entry in families.items()
        if entry["median_error"] > TARGETS["left_out_median"]
    ]
    over = [precision for precision, entry in own.items() if not _met(entry)]
    return (
        f"Median errors on architectures that the fit never saw: {_medians(found['unseen'])} against the medians of "
        f"undisturbed queries, {_medians(found['whole'])} against those of all queries; the calibration's own figures, "
        f"of the architectures that it held out, are {_medians(own)}"
        + (f", which misses the targets in {' and '.join(over)}" if over else "")
        + "; of the families that were left out, "
        + (f"{' and '.join(missed)} missed the target" if missed else "none missed the target")
        + "."
    )


def _medians(entries: dict[str, Any]) -> str:
    return " and ".join(f"{entry['median_error']:.1%} ({precision})" for precision, entry in entries.items())


def _meanwhile(document: dict[str, Any]) -> str:
    """What else ran."""
    if document["busy"] is not None:
        return f"The machine was not quiet: {document['busy']}."
    if "other_cores" not in document["calibration"]:
        return "Other work on the machine was accepted; how much there was, was not recorded."
    words = others_sentence(document["calibration"]["other_cores"])
    return f"{words[0].upper()}{words[1:]}."


def _figures(entry: dict[str, Any]) -> str:
    known = HeldOut.model_validate(entry)
    rank = "-" if known.rank_correlation is None else f"{known.rank_correlation:.3f}"
    return f"{known.models} | {known.median_error:.1%} | {known.p90_error:.1%} | {rank}"


def _met(entry: dict[str, Any]) -> bool:
    return (
        entry["median_error"] <= TARGETS["median_error"]
        and entry["p90_error"] <= TARGETS["p90_error"]
        and (entry["rank_correlation"] or 0.0) >= TARGETS["rank_correlation"]
    )


def scatter(compared: Sequence[Compared], file: Path) -> None:
    """Predicted over measured, both axes logarithmic, with the diagonal and lines 20 % off."""
    values = [value for one in compared for value in (one.predicted_ms, one.measured_ms)]
    low, high = math.log10(min(values)) - 0.08, math.log10(max(values)) + 0.08
    image = Image.new("RGB", (_SIZE, _SIZE), "white")
    draw = ImageDraw.Draw(image)

    def place(milliseconds: float) -> float:
        return (math.log10(milliseconds) - low) / (high - low) * (_SIZE - 2 * _MARGIN) + _MARGIN

    def dot(measured: float, predicted: float) -> tuple[float, float]:
        return place(measured), _SIZE - place(predicted)

    ends = 10**low, 10**high
    for tick in _ticks(low, high):
        at = place(tick)
        draw.line([(at, _MARGIN), (at, _SIZE - _MARGIN)], fill=(225, 225, 225))
        draw.line([(_MARGIN, _SIZE - at), (_SIZE - _MARGIN, _SIZE - at)], fill=(225, 225, 225))
        draw.text((at, _SIZE - _MARGIN + 8), f"{tick:g}", fill="black", anchor="mt", font_size=18)
        draw.text((_MARGIN - 8, _SIZE - at), f"{tick:g}", fill="black", anchor="rm", font_size=18)
    for factor, colour in ((1.0, (90, 90, 90)), (1 + _BAND, (185, 185, 185)), (1 - _BAND, (185, 185, 185))):
        start, end = max(ends[0], ends[0] / factor), min(ends[1], ends[1] / factor)
        draw.line([dot(start, factor * start), dot(end, factor * end)], fill=colour, width=2)
    draw.rectangle([_MARGIN, _MARGIN, _SIZE - _MARGIN, _SIZE - _MARGIN], outline="black")
    for one in compared:
        x, y = dot(one.measured_ms, one.predicted_ms)
        draw.ellipse([x - 5, y - 5, x + 5, y + 5], fill=_COLOURS[one.precision], outline="white")
    draw.text((_SIZE / 2, _SIZE - 30), "measured median, ms", fill="black", anchor="mm", font_size=22)
    draw.text((_MARGIN, _MARGIN - 24), "predicted median, ms", fill="black", anchor="lm", font_size=22)
    image.save(file)


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 of every decade between the ends (logarithms)."""
    decades = range(math.floor(low), math.ceil(high) + 1)
    return [
        step * 10.0**decade
        for decade in decades
        for step in (1, 2, 5)
        if low <= math.log10(step * 10.0**decade) <= high
    ]
