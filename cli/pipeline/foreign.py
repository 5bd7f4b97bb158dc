"""Exporting a model that was not distilled here, from what was typed on the command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from cli.recipe import export_section
from export import Plan, export_model, parse_example, refusal_of
from profiles.device import TargetSection, resolve_target
from profiles.errors import InputError
from profiles.opening import open_arrays
from profiles.progress import Progress
from profiles.usercode import load_factory


@dataclass(frozen=True)
class ForeignModel:
    """A model as the command line names it.

    factory: package.module:name. kwargs: a JSON object. examples: [NAME:]SHAPE[:TYPE] texts. samples: an .npz of real
    inputs by name. output: which one. precisions: as a target's. batch: of a query; None: the first example's. labels:
    a text file, one label per line.
    """

    factory: str
    kwargs: str | None
    weights: Path | None
    examples: tuple[str, ...]
    samples: Path | None
    output: str | None = None
    precisions: tuple[str, ...] = ("auto",)
    batch: int | None = None
    labels: Path | None = None


def export_foreign(
    model: ForeignModel,
    *,
    device: str,
    stack: str | None,
    out: Path | None,
    progress: Progress,
    overrides: Sequence[str] = (),
) -> tuple[Plan, list[Path]]:
    """Builds, exports and bundles the model for one device.

    Args:
        overrides: `export.KEY=VALUE` texts.

    Raises:
        InputError: a path, argument, weight, example or sample that does not fit; see the fields.
        EdgestillError: the export fails, or a graph does not compute what the model does.
    """
    if out is None:
        raise InputError("no folder to export into", where="--out", fix="--out exported")
    section = export_section(overrides, without=("qat", "qat_epochs"))
    target = resolve_target(TargetSection(name="export", device=device, stack=stack), base=Path.cwd(), where="--device")
    for precision in model.precisions:
        reason = refusal_of(precision, target.device, target.stack, model.samples is not None)
        if reason is not None:
            needs = precision in ("int8", "fp8") and model.samples is None
            raise InputError(
                reason,
                where=f"--precision {precision}",
                fix="--samples FILE.npz with real inputs by name" if needs else "--precision auto",
            )
    # Typed by the user, so the code is theirs to run; only a path out of a recipe has to be allowed.
    factory = load_factory(model.factory, base=Path.cwd(), where="--model", allow_code=True)
    network = _made(factory, model)
    if not isinstance(network, nn.Module):
        raise InputError(
            f'"{model.factory}" does not make a torch module',
            where="--model",
            evidence=f"it returned a {type(network).__name__}",
            fix="name a class or a function that returns an nn.Module",
        )
    return export_model(
        network,
        [parse_example(text, position=index) for index, text in enumerate(model.examples)],
        device=target.device,
        stack=target.stack,
        folder=out,
        samples=_samples(model.samples),
        weights=model.weights,
        output=model.output,
        precisions=model.precisions,
        batch=model.batch,
        labels=_labels(model.labels),
        section=section,
        progress=progress,
    )


def _made(factory: Any, model: ForeignModel) -> Any:
    """What the dotted path names: a module as it is, else what calling it returns."""
    if isinstance(factory, nn.Module) and model.kwargs is None:
        return factory
    arguments = _kwargs(model.kwargs)
    try:
        return factory(**arguments)
    except Exception as error:  # a user's code may raise anything
        does = "does not take these arguments" if isinstance(error, TypeError) else "failed"
        raise InputError(
            f'"{model.factory}" {does}',
            where=f"--kwargs '{model.kwargs}'" if model.kwargs else f"--model {model.factory}",
            evidence=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}",
            fix=f"--kwargs with the arguments of {model.factory} as a JSON object",
        ) from error


def _kwargs(text: str | None) -> dict[str, object]:
    if text is None:
        return {}
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            "not JSON", where="--kwargs", evidence=str(error), fix="""--kwargs '{"width": 32}'"""
        ) from error
    if not isinstance(values, dict):
        raise InputError("not a JSON object", where="--kwargs", evidence=text, fix="""--kwargs '{"width": 32}'""")
    return values


def _labels(path: Path | None) -> list[str]:
    if path is None:
        return []
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read", where="--labels", evidence=str(error)) from error
    if not lines or not all(line.strip() for line in lines):
        raise InputError(
            f"{path} has {'an empty line' if lines else 'no line'}", where="--labels", fix="one label per line"
        )
    return lines


def _samples(path: Path | None) -> dict[str, np.ndarray] | None:
    return None if path is None else open_arrays(path, where=f"--samples {path}")
