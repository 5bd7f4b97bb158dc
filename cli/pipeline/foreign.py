"""Exporting a model that was not distilled here, from what was typed on the command line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from export import Plan, export_model, parse_example
from profiles.device import TargetSection, resolve_target
from profiles.errors import InputError
from profiles.opening import open_arrays
from profiles.progress import Progress
from profiles.usercode import load_factory


@dataclass(frozen=True)
class ForeignModel:
    """A model as the command line names it.

    factory: package.module:name. kwargs: a JSON object. examples: [NAME:]SHAPE[:TYPE] texts in the order of forward()'s
    arguments. samples: an .npz of real inputs by name.
    """

    factory: str
    kwargs: str | None
    weights: Path | None
    examples: tuple[str, ...]
    samples: Path | None


def export_foreign(
    model: ForeignModel, *, device: str, stack: str | None, out: Path | None, progress: Progress
) -> tuple[Plan, list[Path]]:
    """Builds, exports and bundles the model for one device.

    Raises:
        InputError: a path, argument, weight, example or sample that does not fit; see the fields.
        EdgestillError: the export fails, or a graph does not compute what the model does.
    """
    if out is None:
        raise InputError("no folder to export into", where="--out", fix="--out exported")
    target = resolve_target(TargetSection(name="export", device=device, stack=stack), base=Path.cwd(), where="--device")
    # Typed by the user, so the code is theirs to run; only a path out of a recipe has to be allowed.
    factory = load_factory(model.factory, base=Path.cwd(), where="--model", allow_code=True)
    try:
        network = factory(**_kwargs(model.kwargs))
    except TypeError as error:
        raise InputError(
            f'"{model.factory}" does not take these arguments', where="--kwargs", evidence=str(error)
        ) from error
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
        progress=progress,
    )


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


def _samples(path: Path | None) -> dict[str, np.ndarray] | None:
    return None if path is None else open_arrays(path, where=f"--samples {path}")
